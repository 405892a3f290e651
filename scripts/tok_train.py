"""
Train the tokenizer:

python -m scripts.tok_train --source climbmix --vocab-size 32768

A small one from what every machine has, in seconds:

python -m scripts.tok_train --source stdlib --vocab-size 4096 --max-chars 20000000

Ends with a line `summary key=value ...`. The tokenizer is base_dir()/tokenizer/tokenizer.json, the numbers are in log.jsonl
beside it. Everything trained later is tied to its fingerprint: a new tokenizer means new models.
"""

import argparse
import time

from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.dataset import open_source
from nanochat.run import Log
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

parser = argparse.ArgumentParser(description="Train the tokenizer", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--source", default="stdlib", help="stdlib, dir:PATH, climbmix, or a mix such as dir:books:0.7,stdlib:0.3")
parser.add_argument("--vocab-size", type=int, default=32768, help="size of the vocabulary, the nine special tokens included")
parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to learn from (-1 = the whole source)")
parser.add_argument("--doc-cap", type=int, default=10_000, help="most characters taken of one document, for variety (-1 = all)")
parser.add_argument("--threads", type=int, default=-1, help="threads that count pieces (-1 = every core); changes nothing else")


class Sample:
    """The texts to learn from, and how many there were once they are drawn."""

    def __init__(self, documents, max_chars, doc_cap):
        self.source, self.max_chars, self.doc_cap = documents, max_chars, doc_cap
        self.documents = self.chars = 0

    def __iter__(self):
        for text in self.source:
            text = text if self.doc_cap == -1 else text[:self.doc_cap]
            if self.max_chars != -1:
                text = text[:self.max_chars - self.chars]
            self.documents += 1
            self.chars += len(text)
            yield text
            if self.chars == self.max_chars:
                return


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

    sample = Sample(open_source(args.source, "train").documents(), args.max_chars, args.doc_cap)
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(sample, args.vocab_size, args.threads if args.threads != -1 else None, Progress())
    except ValueError as error: # a text that is no Unicode, or too little of it for so many tokens
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
