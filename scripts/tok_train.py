"""
Train the tokenizer:

python -m scripts.tok_train --source climbmix --vocab-size 32768

A small one from what every machine has, in seconds:

python -m scripts.tok_train --source stdlib --vocab-size 4096 --max-chars 20000000

Ends with a line `summary key=value ...`. The tokenizer is base_dir()/tokenizer/tokenizer.json, the numbers are in log.jsonl
beside it. Everything trained later is tied to its fingerprint: a new tokenizer means new models.
"""

import argparse
import os
import time

from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.dataset import Sample, add_data_dir, notes, open_source, use_data_dir
from nanochat.run import Log
from nanochat.tokenizer import SPECIAL_TOKENS, TooLittleText, Tokenizer

parser = argparse.ArgumentParser(description="Train the tokenizer", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--source", default="stdlib", help="stdlib, dir:PATH, climbmix, or a mix such as dir:books:0.7,stdlib:0.3")
parser.add_argument("--vocab-size", type=int, default=32768, help="size of the vocabulary, the nine special tokens included")
parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to learn from (-1 = the whole source)")
parser.add_argument("--doc-cap", type=int, default=-1, help="most characters taken of one document (-1 = a share of --max-chars from each, then more of the long ones)")
parser.add_argument("--threads", type=int, default=-1, help="threads that count pieces (-1 = every core); changes nothing else")
add_data_dir(parser)


class Progress:
    """A line every few seconds."""

    def __init__(self, every=5):
        self.every, self.start = every, time.monotonic()
        self.last = self.start

    def __call__(self, stage, done, total):
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        what = f"{done / 1e6:.0f} MB counted" if stage == "count" else f"{done} of {total} merges"
        print0(f"{what} | {now - self.start:.0f} s")


def main():
    args = parser.parse_args()
    if args.vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"--vocab-size {args.vocab_size}: expected at least {256 + len(SPECIAL_TOKENS)}, room for 256 bytes and "
                        f"{len(SPECIAL_TOKENS)} special tokens")
    for flag in ("max_chars", "doc_cap", "threads"):
        if getattr(args, flag) < 1 and getattr(args, flag) != -1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1, or -1")
    if args.threads > os.cpu_count():
        raise UserError(f"--threads {args.threads}: expected at most {os.cpu_count()}, the cores of this machine, or -1 for all of them")
    use_data_dir(args.data_dir)
    source = open_source(args.source, "train")
    for note in notes(source):
        print0(note)
    max_chars, doc_cap, threads = (None if value == -1 else value for value in (args.max_chars, args.doc_cap, args.threads))

    sample = Sample(source, max_chars, doc_cap)
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(sample, args.vocab_size, threads, Progress())
    except TooLittleText as error:
        limits = [f"--doc-cap {doc_cap}"] * (doc_cap is not None) + [f"--max-chars {max_chars}"] * (sample.chars == max_chars)
        raise UserError(f"{args.source}: {error}. It was shown {sample.chars:,} characters of {sample.documents:,} document(s)"
                        + (f"; {' and '.join(limits)} kept more from it" if limits else "")) from error
    except ValueError as error:
        raise UserError(f"{args.source}: {error}") from error
    seconds = time.perf_counter() - start
    path = tokenizer.save()
    print0(f"saved {path}")

    lengths = tokenizer.token_bytes()[256:len(tokenizer.tokens)]
    log = Log(base_dir() / "tokenizer")
    log.summary(source=args.source, vocab_size=tokenizer.vocab_size, documents=sample.documents, chars=sample.chars, seconds=seconds,
                mchars_per_second=sample.chars / 1e6 / seconds, mean_token_bytes=float(lengths.mean()) if len(lengths) else 1.0,
                longest_token_bytes=int(tokenizer.token_bytes().max()), fingerprint=tokenizer.fingerprint[:12])
    log.close()


if __name__ == "__main__":
    run_main(main)
