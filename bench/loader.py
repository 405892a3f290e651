"""
How many tokens a second the loader delivers, with nothing to wait for it:

python -m bench.loader                                  # on the Python standard library, about a minute
python -m bench.loader --source dir:PATH --threads 2

Three loads, each from a fresh loader: short documents (~3,000 characters, packed best-fit at align 1), whole documents
(align 32, as the memory is trained), and one document that holds all of the source. They are measured in turn, several times,
and the best of each counts: what others do on the machine can only slow a loader down. Beside them: what is cropped or
padded for other numbers of waiting pieces, how long a resume takes, and what training the smallest GPT on this CPU eats.
The last line is one JSON object; the bars are tokens_per_second and long_doc_tokens_per_second >= 1,000,000 on 2 cores.
"""

import argparse
import json
import random
import time

import torch

from nanochat import packing
from nanochat.common import UserError, run_main
from nanochat.dataloader import Loader
from nanochat.dataset import open_source
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

SHORT = 7.6, 0.95  # mean and deviation of the logarithm of the characters of a short document: 3,000 on average


def short_documents(texts):
    """Web text is many short documents and some long ones: the source, cut at lengths from a log-normal distribution."""
    rng = random.Random(0)
    for text in texts:
        at = 0
        while at < len(text):
            size = 1 + int(rng.lognormvariate(*SHORT))
            yield text[at:at + size]
            at += size


def measure(items, align, tokenizer, args):
    """Tokens a second between the first batch and the end, and the loader."""
    with Loader(items, tokenizer, args.batch, args.seq_len, align=align, threads=args.threads) as loader:
        next(loader)
        start, first = time.perf_counter(), loader.stats["tokens"]
        while (took := time.perf_counter() - start) < args.seconds:
            next(loader)
        return (loader.stats["tokens"] - first) / took, loader


def measure_all(loads, tokenizer, args):
    """{load: (tokens a second of each run, a loader that has run)}, of {load: (items, align)}."""
    runs = {name: [] for name in loads}
    for _ in range(args.repeats):
        for name, load in loads.items():
            runs[name].append(measure(*load, tokenizer, args))
    return {name: ([speed for speed, _ in found], found[-1][1]) for name, found in runs.items()}


def shares(loader):
    """Of what came in, the share that was cropped; of the rows, the share that is padding."""
    stats = loader.stats
    return {"cropped": round(stats["cropped"] / (stats["tokens"] + stats["cropped"]), 5),
            "padded": round(stats["padded"] / (stats["tokens"] + stats["padded"]), 5)}


def packing_table(short, tokenizer, args, tokens=2_000_000):
    """{waiting pieces: {align: shares}} on short documents."""
    table, usual = {}, packing.WAITING
    for waiting in (32, 128, 512):
        packing.WAITING, table[waiting] = waiting, {}
        for align in (1, 32):
            with Loader(short, tokenizer, args.batch, args.seq_len, align=align, threads=args.threads) as loader:
                for _ in range(tokens // (args.batch * args.seq_len)):
                    next(loader)
                table[waiting][f"align {align}"] = shares(loader)
    packing.WAITING = usual
    return table


def resume_seconds(items, tokenizer, args, state):
    start = time.perf_counter()
    with Loader(items, tokenizer, args.batch, args.seq_len, align=32, state=state, threads=args.threads) as loader:
        next(loader)
    return time.perf_counter() - start


def training_speed(threads, steps=3, rows=4, seq_len=512, vocab_size=4096):
    """Tokens a second of forward and backward of the smallest GPT (depth 4) with a small vocabulary, in the best step."""
    gpt = GPT(GPTConfig.from_depth(4, vocab_size, seq_len))
    ids, best = torch.randint(vocab_size, (rows, seq_len + 1)), float("inf")
    for count in [*range(1, threads + 1)] * steps: # fewer threads are faster where others use the machine too
        torch.set_num_threads(count)
        start = time.perf_counter()
        gpt(ids[:, :-1], ids[:, 1:]).backward()
        best = min(best, time.perf_counter() - start)
    return rows * seq_len / best


def main():
    parser = argparse.ArgumentParser(description="Speed of the data loader")
    parser.add_argument("--source", default="stdlib", help="text to load")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the tokenizer, trained here on the source")
    parser.add_argument("--chars", type=int, default=20_000_000, help="of the source to use")
    parser.add_argument("--seconds", type=float, default=2, help="per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each load, of which the best counts")
    parser.add_argument("--threads", type=int, default=2, help="of the tokenizer")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row")
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        raise UserError(f"expected --repeats and --threads of at least 1, got {args.repeats} and {args.threads}")

    texts, size = [], 0
    for text in open_source(args.source).documents():
        texts.append(text)
        size += len(text)
        if size > args.chars:
            break
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(iter(texts), args.vocab_size, threads=args.threads)
    except ValueError as error:
        raise UserError(f"{args.source}: {error}") from error
    print(f"{len(texts):,} documents, {size:,} characters of {args.source}; tokenizer of {args.vocab_size:,} trained in "
          f"{time.perf_counter() - start:.1f} s")
    short = list(short_documents(texts))
    random.Random(0).shuffle(short)

    loads = {"short documents": (short, 1), "whole documents": (texts, 32), "one document": (["\n".join(texts)], 32)}
    measured = measure_all(loads, tokenizer, args)
    for name, (speeds, loader) in measured.items():
        runs = ", ".join(f"{speed:,.0f}" for speed in speeds)
        print(f"{name:16} align {loads[name][1]:2}  {max(speeds):12,.0f} tokens/s, the best of {runs}  {shares(loader)}")
    state = measured["whole documents"][1].state()
    again = resume_seconds(texts, tokenizer, args, state)
    print(f"resumed in {again:.2f} s from a state of {len(json.dumps(state)):,} bytes")
    table = packing_table(short, tokenizer, args)
    for waiting, row in table.items():
        print(f"{waiting:5} waiting pieces: {row}")
    eaten = training_speed(args.threads)
    print(f"training a GPT of depth 4 here eats {eaten:,.0f} tokens/s")
    short_speed, long_speed, giant_speed = (max(speeds) for speeds, _ in measured.values())
    print(json.dumps({"tokens_per_second": round(short_speed), "long_doc_tokens_per_second": round(min(long_speed, giant_speed)),
                      "whole_documents_tokens_per_second": round(long_speed), "one_document_tokens_per_second": round(giant_speed),
                      "cpu_training_tokens_per_second": round(eaten), "times_cpu_training": round(min(short_speed, long_speed, giant_speed) / eaten, 1),
                      "resume_seconds": round(again, 2), "waiting": packing.WAITING, "packing": table, "repeats": args.repeats,
                      "source": args.source, "threads": args.threads, "seq_len": args.seq_len, "vocab_size": args.vocab_size}))


if __name__ == "__main__":
    run_main(main)
