"""
Pretrain a GPT, with GistNet and LensNet co-trained (or --plain without them). On a laptop, two minutes:

python -m scripts.base_train --depth 4 --max-seq-len 512 --num-tokens 200000

On 8 GPUs:

torchrun --standalone --nproc_per_node=8 -m scripts.base_train --depth 20 --source climbmix

Everything else follows from --depth (nanochat/schedule.py says how). Ends with a line `summary key=value ...`; the same numbers and the
whole curve are in <checkpoint folder>/log.jsonl. flops and mfu in it count the GPT alone (nanochat/cost.py), gists=1 a run that trained GistNet and LensNet
too, whose work they leave out; mfu is none where no peak is known, as on every CPU. Killed? The same command with --resume goes on from the last checkpoint.
"""
import argparse

from nanochat import schedule
from nanochat.common import run_main
from nanochat.dataset import open_source
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.load import build
from scripts.stage import add_flags, given, start, train

parser = argparse.ArgumentParser(description="Pretrain a GPT with its memory networks", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--depth", type=int, default=4, help="layers; width, batch, horizon and rates follow from it")
parser.add_argument("--plain", action="store_true", help="no gists: the plain GPT on the same rows")
parser.add_argument("--windows", default="L", help="with --plain: how far layers look back, repeated over them: S = a quarter of the row, L = all of it, such as SSSL")
parser.add_argument("--source", default="stdlib", help="stdlib, dir:PATH, climbmix, or a mix such as dir:books:0.7,stdlib:0.3")
parser.add_argument("--num-tokens", type=int, default=-1, help="tokens to train on (-1 = 12 per scaling parameter)")
parser.add_argument("--num-steps", type=int, default=-1, help="optimizer steps instead of tokens")
parser.add_argument("--lr", type=float, default=1.0, help="times the learning rates that follow from batch and horizon")
parser.add_argument("--tag", default="", help="name of the checkpoint folder (empty = d<depth>)")
add_flags(parser, curriculum="8:0.3,16:0.55,32:1", plain_every=4, labels_every=2, reconstruct_every=8)


def main():
    args = parser.parse_args()
    place = start(args)
    tokenizer = Tokenizer.load()
    plan = schedule.plan(args.depth, tokenizer.vocab_size, args.max_seq_len, tokens=given(args.num_tokens), steps=given(args.num_steps), batch_tokens=given(args.batch_tokens),
                         world=place.dist.world)
    rates = args.lr * schedule.short_run(plan)
    networks = build(GPTConfig.from_depth(args.depth, tokenizer.vocab_size, args.max_seq_len, tokenizer.bos, windows=args.windows), memory=not args.plain)
    train("base", args.tag or f"d{args.depth}", args, place, networks, tokenizer, plan, open_source(args.source, "train"), open_source(args.source, "val"),
          identity=dict(source=args.source, lr=rates), rates=rates)


if __name__ == "__main__":
    run_main(main)
