"""
Mid-training: the base model learns what a conversation looks like and what its memory is for. Rows are longer than in base
training; part of them are long documents, part are conversations about long texts, and every token has a loss.

python -m scripts.mid_train --num-steps 100 --max-seq-len 2048

With --freeze-base the GPT stays as it is and only GistNet and LensNet learn: a memory for a model that was trained without one. With --lora too it learns
from the new text by thin matrices beside its own, which these take in when the checkpoint is loaded; the memory gains nothing by it (docs/RESULTS.md).

python -m scripts.mid_train --base-tag plain --tag frozen --freeze-base --lora 8 --documents 1 --num-steps 100 --max-seq-len 1024
"""
import argparse

from nanochat import checkpoint, schedule
from nanochat.common import UserError, checkpoint_dir, run_main
from nanochat.dataset import open_source
from nanochat.lora import adapt
from scripts.load import build, load_stage
from scripts.mixtures import Everything, Parts, conversations
from scripts.stage import add_flags, given, start, train

parser = argparse.ArgumentParser(description="Mid-train on long documents and conversations", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--base-tag", default="", help="tag of the base checkpoint to start from (empty = the newest)")
parser.add_argument("--tag", default="", help="tag of the result (empty = the same)")
parser.add_argument("--source", default="stdlib", help="long documents, also those that questions are asked about")
parser.add_argument("--hub", action="store_true", help="add SmolTalk, MMLU and GSM8K from the data hub")
parser.add_argument("--documents", type=float, default=0.5, help="share of the tokens that are plain documents")
parser.add_argument("--freeze-base", action="store_true", help="train GistNet and LensNet only and, without --lora, read no row without gists, whatever --plain-every says; the base may be one without them (base_train --plain), with windows of L")
parser.add_argument("--lora", type=int, default=0, help="with --freeze-base: rank of the thin matrices that the GPT learns beside its own (0 = none); rows without gists are read as --plain-every says")
parser.add_argument("--num-steps", type=int, default=-1, help="steps (-1 = a tenth of the base run's)")
parser.add_argument("--lr", type=float, default=0.5, help="times the base run's learning rates")
add_flags(parser, curriculum="32:1", plain_every=2, labels_every=2, reconstruct_every=8, asked=1.0, opens=5) # as a session opens: plain reading and sessions are the better for it (LOG.md, 2026-11-30)


def main():
    args = parser.parse_args()
    if not 0 <= args.documents <= 1:
        raise UserError(f"--documents {args.documents}: expected a share from 0 to 1, of the tokens")
    if args.lora < 0 or args.lora and not args.freeze_base:
        raise UserError(f"--lora {args.lora}: expected a rank from 1 up, with --freeze-base, or 0 for none; without --freeze-base all of the GPT learns")
    if args.lora and args.fp8:
        raise UserError("--lora with --fp8: products beside thin matrices are not computed in 8 bits. Leave one of them out")
    place = start(args)
    base = load_stage("base", args.base_tag or None, seq_len=args.max_seq_len)
    steps = given(args.num_steps) or max(1, base.meta["steps"] // 10)
    batch_tokens = given(args.batch_tokens) or schedule.whole_rows(base.meta["batch_tokens"], args.max_seq_len, place.dist.world)
    plan = schedule.plan(base.gpt.config.layers, base.tokenizer.vocab_size, args.max_seq_len, steps=steps, batch_tokens=batch_tokens)

    def mix(split):
        talk = conversations(args.source, split, base.tokenizer, args.max_seq_len, args.hub, args.seed)
        return Parts([(open_source(args.source, split), args.documents), *((Everything(task, base.tokenizer), share * (1 - args.documents)) for task, share in talk.parts)])

    networks = (base.gpt, base.gistnet, base.lensnet)
    if args.freeze_base:
        if base.gistnet is None:
            networks = (base.gpt, *build(base.gpt.config, memory=True)[1:])
        if args.lora:
            adapt(base.gpt, args.lora)
        else:
            base.gpt.requires_grad_(False)
            args.plain_every = 0 # a row without gists would teach nobody
    momenta = None if args.freeze_base else checkpoint.load(checkpoint_dir("base", base.tag), base.meta["step"]).optimizer
    train("mid", args.tag or base.tag, args, place, networks, base.tokenizer, plan, mix("train"), mix("val"),
          identity=dict(source=args.source, base=base.tag, lr=base.meta["lr"], frozen=args.freeze_base or None), rates=args.lr * base.meta["lr"], warmdown=1.0, final=0.1, first_optimizer=momenta)


if __name__ == "__main__":
    run_main(main)
