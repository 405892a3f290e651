"""
Supervised fine-tuning: only what the assistant says has a loss.

python -m scripts.chat_sft --num-steps 60 --max-seq-len 1024
python -m scripts.chat_sft --conversations mine.jsonl                # your own, one {"messages": [...]} a line
"""
import argparse
from collections import Counter

from nanochat import checkpoint, schedule
from nanochat.common import checkpoint_dir, run_main
from nanochat.packing import fate
from scripts.load import load_stage
from scripts.mixtures import Parts, conversations
from scripts.stage import add_flags, given, start, train
from tasks.customjson import HELD, CustomJSON

parser = argparse.ArgumentParser(description="Fine-tune on conversations", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--mid-tag", default="", help="tag of the mid-trained checkpoint to start from (empty = the newest)")
parser.add_argument("--tag", default="", help="tag of the result (empty = the same)")
parser.add_argument("--source", default="stdlib", help="long documents that questions are asked about")
parser.add_argument("--hub", action="store_true", help="add SmolTalk, MMLU and GSM8K from the data hub")
parser.add_argument("--conversations", default="", help="a JSONL file of your own conversations, half of the mixture")
parser.add_argument("--num-steps", type=int, default=100)
parser.add_argument("--lr", type=float, default=0.5, help="times the base run's learning rates")
add_flags(parser, curriculum="32:1", plain_every=2, labels_every=4)


def tell(own, tokenizer, seq_len):
    """What rows of seq_len tokens make of one's own conversations, in one line."""
    becomes = Counter(fate(tokenizer.render(conversation)[1], seq_len) for conversation in own)
    held = f"{len(own.part('val'))} held out for validation" if len(own) >= HELD else f"validation is on the same ones, as they are fewer than {HELD}"
    return (f"own         {len(own)} conversations: {becomes['cut']} longer than the row of {seq_len} tokens and cut there, {becomes['skipped']} without an answer "
            f"within it and skipped, {own.unanswered} whose last message had no answer and was left out; {held}")


def main():
    args = parser.parse_args()
    own = CustomJSON(args.conversations) if args.conversations else None # first of all: a broken line is told at once
    place = start(args)
    mid = load_stage("mid", args.mid_tag or None)
    batch_tokens = given(args.batch_tokens) or schedule.whole_rows(mid.meta["batch_tokens"], args.max_seq_len, place.dist.world)
    plan = schedule.plan(mid.gpt.config.layers, mid.tokenizer.vocab_size, args.max_seq_len, steps=args.num_steps, batch_tokens=batch_tokens)

    def mix(split):
        talk = conversations(args.source, split, mid.tokenizer, args.max_seq_len, args.hub, args.seed)
        return Parts([(talk, 0.5), (own.part(split), 0.5)]) if own else talk

    if own and place.dist.main:
        print(tell(own, mid.tokenizer, args.max_seq_len), flush=True)

    momenta = checkpoint.load(checkpoint_dir("mid", mid.tag), mid.meta["step"]).optimizer
    train("sft", args.tag or mid.tag, args, place, (mid.gpt, mid.gistnet, mid.lensnet), mid.tokenizer, plan, mix("train"), mix("val"),
          identity=dict(source=args.source, conversations=own and own.sha256, mid=mid.tag, lr=mid.meta["lr"]), rates=args.lr * mid.meta["lr"], warmdown=1.0, final=0.0, first_optimizer=momenta)


if __name__ == "__main__":
    run_main(main)
