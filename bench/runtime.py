"""
What a session costs at a fixed visible budget W, whatever the history:
python -m bench.runtime                                       (d4 on the CPU: some 25 minutes on 2 slow cores)
python -m bench.runtime --quick                               (under 5 minutes there)
python -m bench.runtime --cpu-time                            (the CPU time of its one thread: on a machine that others use too)
python -m bench.runtime --device cuda --depth 12 --vocab-size 32768 --budget 2048
python -m bench.runtime --stage sft                           (a trained checkpoint that reads the standard library)

Networks at random (speed does not depend on them) read ids from a Zipf distribution; LensNet's last layer, which starts at zero, is
random too, so that a tick makes edits: `edits` says how many. One tree grows on disk, by real ingest, from length to length.
    decoding    a session on a copy of the tree at each length, beside the plain engine that reads W - 16 entries: the room of a session is full
                just before a block is full, and 32 entries are free after it; `visible` is what it reads on average. They decode the same ids, 2 blocks
                each in turn, so that a slow phase of the machine meets all; what is told is the median over rounds of a round's mean (of the
                ratio of means in flatness and overhead). Ticks are in it; a commit to disk is not in
                every round. median, p99 and max are of single tokens; a tick falls on every 4th. The next token always comes to Python. Each
                length grows by what is decoded.
    a block     of 32 tokens: where its milliseconds go, from timers around the stages of its ticks, in a run of its own
    question    a prompt of 20 tokens to the session at each length: to the first token of its answer, and of that the search through the whole history,
                which is the one thing that takes longer the longer the history is
    full        plain full attention, reading as many entries as the history has, as far as they fit into half of the free memory
    exact       a session that re-reads instead of splicing, in turn with the others
    held        bytes of the session's own tensors; on cuda, and what it takes for a moment beyond them
    rss         of this process, warm, right after ingest to that length and some ticks of a session there, before the rest is measured
    disk        blocks of the tree's folder
    ttft        to the first token of a prompt: prefilled by full attention in pieces of 2,048, fed to an empty session, merely ingested
    flops       of GistNet and LensNet, by arithmetic (megacontext/cost.py), over the base's forward of one token at W
    open        ten million tokens, the rows of the tree over and over, opened in a fresh process; rss includes a first look at a context
The last line is JSON. Bars: flatness <= 1.05, overhead <= 0.05 (0.03 on a GPU at d12), ingest_speedup >= 10 at 100k, rss_bytes_per_token <= 64,
gistnet_flops_share and lensnet_flops_share < 0.005, open_10m_seconds < 1, open_10m_rss_mb < 50.
"""

import argparse
import json
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch

from bench import measure
from bench.measure import Rig
from megacontext.gistnet import GistConfig, GistNet
from megacontext.lensnet import LensConfig, LensNet
from megacontext.runtime import REFOCUS_EVERY
from megacontext.span import BLOCK
from megacontext.tree import MegaTree
from megacontext.working_context import LEAST_BUDGET
from nanochat import cost, hardware
from nanochat.common import UserError, run_main, setup
from nanochat.dataset import open_source
from nanochat.gpt import GPT, GPTConfig
from scripts.load import load_stage

REFERENCE = 8 * 1024   # the history that the longest is compared with; without it, the shortest
QUICK_FULL = 64 * 1024 # with --quick, the longest history that full attention reads

parser = argparse.ArgumentParser(description="What a session costs at a fixed budget, whatever the history", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--quick", action="store_true", help="3 short rounds, prompts up to 32k, full attention up to 64k")
# the model
parser.add_argument("--depth", type=int, default=4, help="layers of the GPT; everything else follows")
parser.add_argument("--vocab-size", type=int, default=4096)
parser.add_argument("--stage", default="", help="a trained checkpoint of this stage instead: base, mid, sft or rl")
parser.add_argument("--tag", default=None, help="name of the checkpoint folder (default: the newest)")
parser.add_argument("--budget", type=int, default=512, help="W, most entries that the GPT reads at once")
parser.add_argument("--refocus-every", type=int, default=REFOCUS_EVERY, help="tokens between refocuses of the sessions, a divisor of 32, at least 2")
parser.add_argument("--device", default="cpu", help="cuda, mps or cpu")
parser.add_argument("--dtype", default="auto", help="of the weights: auto, bf16, fp16 or fp32")
# what is measured
parser.add_argument("--lengths", default="1k,8k,64k,512k,1M", help="histories, ascending; k = 1,024, M = 1,024k")
parser.add_argument("--prompts", default="", help="prompts of the ttft table (empty = 1k,8k,32k and, without --quick, 100k)")
parser.add_argument("--tokens", type=int, default=-1, help="tokens decoded at each length in a round (-1 = 256 with --quick, 1024 without)")
parser.add_argument("--rounds", type=int, default=-1, help="rounds (-1 = 3 with --quick, 7 without)")
parser.add_argument("--threads", type=int, default=1, help="of the CPU; more make every step wait for the slowest, where others use the machine too")
parser.add_argument("--cpu-time", action="store_true", help="measure the CPU time of the one thread instead of the wall clock's, for a machine that others use too")
parser.add_argument("--seed", type=int, default=0)


def main():
    args = parser.parse_args()
    lengths = sizes("--lengths", args.lengths)
    prompts = sizes("--prompts", args.prompts or ("1k,8k,32k" if args.quick else "1k,8k,32k,100k"))
    rounds = args.rounds if args.rounds != -1 else 3 if args.quick else 7
    tokens = args.tokens if args.tokens != -1 else 256 if args.quick else 1024
    check(args, lengths, prompts, rounds, tokens)
    device, _ = setup(args.device, args.seed)
    if args.cpu_time and (device.type != "cpu" or args.threads != 1):
        raise UserError(f"--cpu-time counts one thread, and this would run on {args.threads} of {device.type}: expected --threads 1 on a CPU. Leave it out")
    machine = hardware.describe(device)
    dtype, reason = hardware.pick_dtype(machine, args.dtype)
    rig = make_rig(args, device, dtype, max(lengths[-1] + 2 * BLOCK, *prompts))
    if not rig.fits(prompts[0]):
        raise UserError(f"--prompts {args.prompts}: full attention over {prompts[0]} tokens takes more than half of the free memory. Expected a shorter first prompt")
    torch.set_num_threads(args.threads)
    config = rig.gpt.config
    print(machine)
    print(f"d{config.layers}, {cost.parameter_counts(config)['total'] / 1e6:.1f}M parameters in {str(dtype).removeprefix('torch.')} ({reason}), "
          f"{args.stage or 'random'} weights, W = {args.budget}, {torch.get_num_threads()} threads")
    clock = patch.object(time, "perf_counter", time.thread_time) if args.cpu_time else nullcontext() # the clock of the session's own timers too
    with TemporaryDirectory(prefix="bench-runtime-") as folder, clock:
        told = run(rig, lengths, prompts, rounds, tokens, args, Path(folder))
    print(json.dumps(dict(bench="runtime", machine=machine.name, depth=config.layers, vocab_size=config.vocab_size, dtype=str(dtype), stage=args.stage,
                          budget=args.budget, refocus_every=args.refocus_every, tokens=tokens, rounds=rounds, seed=args.seed, clock="cpu" if args.cpu_time else "wall", threads=torch.get_num_threads(), torch=torch.__version__, **told)))


def run(rig, lengths, prompts, rounds, tokens, args, folder):
    """All measurements, each table as soon as it is known; returns what the JSON line tells."""
    with ExitStack() as stack:
        tree = stack.enter_context(MegaTree.create(folder / "tree", rig.header()))
        measure.settle(rig)
        rows = print_growth(measure.grow(rig, tree, length) for length in lengths)
        first = next((row for row in rows if row["length"] == REFERENCE), rows[0])
        last = rows[-1]
        for row in rows:
            tree.fork(folder / str(row["length"]), row["length"]).close()
            row["disk_bytes_per_token"] = measure.disk_bytes(folder / str(row["length"])) / row["length"]
        sessions = {length: rig.session(stack.enter_context(MegaTree.open(folder / str(length)))) for length in lengths}
        exact = rig.session(stack.enter_context(tree.fork(folder / "exact", first["length"])), exact=True)
        decoded = measure.in_turn(rig, sessions | {"exact": exact}, rounds, tokens, args.seed)
        plain_ms = decoded["plain"]["mean_ms"]
        for row in rows:
            row |= decoded[row["length"]] | measure.stages(rig, sessions[row["length"]]) | measure.question(rig, sessions[row["length"]])
            row["overhead"] = ratio(row, decoded["plain"]) - 1
        print_decoding(rows, plain_ms, rig)
        print_questions(rows)
        first["exact_ms"] = decoded["exact"]["mean_ms"]
        for row in rows:
            if row["length"] <= QUICK_FULL or not args.quick:
                row["full_ms"] = measure.full_attention(rig, row["length"])
        print_beside(rows)
        measure.first_token(rig, prompts[0], folder / "warm-up")
        ttft = print_ttft(measure.first_token(rig, n, folder / f"prompt-{n}") for n in prompts)
        account = flops_by_depth(rig, last["asked"])
        print_flops(account, args.budget, last["asked"])
        large = measure.open_large(rig, tree, folder / "large")
        print(f"\na tree of {large['tokens']:,} tokens: opened in {large['seconds']:.3f} s, a context of it looked at in {large['look_seconds']:.3f} s, "
              f"{large['rss_mb']:.1f} MB resident")
    slope = lambda name: (last[name] - first[name]) * 2 ** 20 / (last["length"] - first["length"])
    prefilled = [row for row in ttft if row["prefill_s"] is not None][-1] # the longest prompt that fits
    return dict(
        reference=first["length"], longest=last["length"], plain_ms=plain_ms, plain_rounds_ms=decoded["plain"]["rounds_ms"], flatness=ratio(last, first),
        held_ratio=last["held_mb"] / first["held_mb"], question_ms=first["question_ms"], question_ms_longest=last["question_ms"], overhead=first["overhead"], overhead_longest=last["overhead"],
        ingest_speedup=prefilled["prefill_s"] / prefilled["ingest_s"], ttft_speedup=prefilled["prefill_s"] / prefilled["session_s"], speedup_prompt=prefilled["prompt"],
        rss_bytes_per_token=slope("rss_mb"), rss_anon_bytes_per_token=slope("rss_anon_mb"), disk_bytes_per_token=last["disk_bytes_per_token"],
        open_10m_seconds=large["seconds"], open_10m_look_seconds=large["look_seconds"], open_10m_rss_mb=large["rss_mb"], open_10m_tokens=large["tokens"],
        **{name: share for name, share in account[0].items() if name.endswith("_share")}, flops=account, rows=rows, ttft=ttft)


def ratio(row, other):
    """How many times the milliseconds of another: the median over rounds of the ratio within a round."""
    return float(np.median(np.array(row["rounds_ms"]) / np.array(other["rounds_ms"])))


def sizes(flag, text):
    """"1k,8k,1M" -> [1024, 8192, 1048576]"""
    try:
        return [int(word.rstrip("kM")) * {"k": 1024, "M": 1024 ** 2}.get(word[-1:], 1) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: expected whole numbers separated by commas, such as 1k,8k,1M") from None


def check(args, lengths, prompts, rounds, tokens):
    if len(lengths) < 2 or lengths != sorted(set(lengths)) or lengths[0] < 1 or any(length % BLOCK for length in lengths):
        raise UserError(f"--lengths {args.lengths}: expected at least two, ascending, each a multiple of {BLOCK}")
    if lengths[-1] == REFERENCE:
        raise UserError(f"--lengths {args.lengths}: expected a history longer than {REFERENCE} tokens, which others are compared with")
    if prompts != sorted(set(prompts)) or prompts[0] < 1:
        raise UserError(f"--prompts {args.prompts}: expected lengths of at least 1, ascending")
    if tokens < measure.SLICE or tokens % measure.SLICE or rounds < 1:
        raise UserError(f"--tokens {tokens} --rounds {rounds}: expected a multiple of {measure.SLICE} tokens, and at least one round")
    if args.threads < 1:
        raise UserError(f"--threads {args.threads}: expected at least 1")
    if args.refocus_every < 2 or BLOCK % args.refocus_every:
        raise UserError(f"--refocus-every {args.refocus_every}: expected a divisor of {BLOCK}, at least 2")
    if args.budget < LEAST_BUDGET:
        raise UserError(f"--budget {args.budget}: expected at least {LEAST_BUDGET} entries")


def make_rig(args, device, dtype, longest):
    """The networks, random or trained, and at least `longest` ids for them to read."""
    if args.stage:
        loaded, ids = load_stage(args.stage, args.tag, device=device, dtype=dtype), []
        if loaded.gistnet is None:
            raise UserError(f"the checkpoint {loaded.stage}/{loaded.tag} was trained without memory: name another with --tag")
        for document in open_source("stdlib").documents():
            ids += loaded.tokenizer.encode(document)
            if len(ids) >= longest:
                break
        return Rig(loaded.gpt, loaded.gistnet, loaded.lensnet, args.budget, np.resize(np.array(ids, np.int32), longest), args.refocus_every)
    gpt = GPT(GPTConfig.from_depth(args.depth, args.vocab_size))
    gistnet, lensnet = GistNet(GistConfig.for_gpt(gpt.config)), LensNet(LensConfig())
    torch.nn.init.normal_(lensnet.score.weight)
    share = 1 / np.arange(1, args.vocab_size + 1)
    text = np.random.default_rng(args.seed).choice(args.vocab_size, longest, p=share / share.sum()).astype(np.int32)
    return Rig(gpt.to(device, dtype).eval(), gistnet.to(device, dtype).eval(), lensnet.to(device).eval(), args.budget, text, args.refocus_every)


def flops_by_depth(rig, asked):
    """The account of FLOPs of this model, then of d12 and d20 with a vocabulary of 32,768, where LensNet is asked of so many entries a token."""
    accounts = [dict(model="this") | measure.flops(rig.gpt.config, rig.gistnet.config, rig.lensnet.config, asked, rig.budget)]
    for depth in (12, 20):
        config = GPTConfig.from_depth(depth, 32768)
        accounts.append(dict(model=f"d{depth}") | measure.flops(config, GistConfig.for_gpt(config), LensConfig(), asked, rig.budget))
    return accounts


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def table(rows, columns):
    """Each row as soon as it is measured; returns them as a list. columns: (heading, key, format); None is told as -"""
    print("".join(f"{heading:>11}" for heading, _, _ in columns), flush=True)
    told = []
    for row in rows:
        print("".join(f"{'-' if row.get(key) is None else format(row[key], form):>11}" for _, key, form in columns), flush=True)
        told.append(row)
    return told


def print_growth(rows):
    print("\na tree that grows: tokens a second of ingest, MB resident with a session there")
    return table(rows, [("history", "length", ",d"), ("ingest/s", "ingest_tokens_s", ",.0f"), ("rss_mb", "rss_mb", ".1f"), ("anon_mb", "rss_anon_mb", ".1f")])


def print_decoding(rows, plain_ms, rig):
    print(f"\ndecoding, ms a token; the plain engine behind {rig.budget - BLOCK // 2} entries: {plain_ms:.3f}")
    table(rows, [("history", "length", ",d"), ("visible", "visible", ".0f"), ("mean", "mean_ms", ".3f"), ("median", "median_ms", ".3f"), ("p99", "p99_ms", ".2f"), ("max", "max_ms", ".1f"),
                 ("overhead", "overhead", ".1%"), ("held_mb", "held_mb", ".1f"), ("disk_B/tok", "disk_bytes_per_token", ".2f")])
    print(f"\na block of 32 tokens, ms, with the ticks in it (32 plain steps: {BLOCK * plain_ms:.1f}); edits, and tokens read again for them")
    table(rows, [("history", "length", ",d"), ("spans", "spans", "d"), ("edits", "edits", ".2f"), ("again", "again", ".1f"), ("all", "block_ms", ".1f"),
                 ("32 steps", "read_ms", ".1f"), ("GistNet", "ingest_ms", ".2f"), ("refocus", "refocus_ms", ".2f"), ("LensNet", "lens_ms", ".2f"),
                 ("allocator", "allocator_ms", ".2f"), ("splice", "splice_ms", ".2f")])
    print("\nshare of a block's time")
    table(rows, [("history", "length", ",d"), *((name, f"{key}_share", ".2%") for name, key in
                 (("GistNet", "ingest"), ("LensNet", "lens"), ("allocator", "allocator"), ("splice", "splice")))])


def print_questions(rows):
    print(f"\na prompt of {measure.QUESTION} tokens, ms to the first token of its answer")
    table(rows, [("history", "length", ",d"), ("question", "question_ms", ".1f"), ("search", "search_ms", ".2f")])


def print_beside(rows):
    print("\nbeside it, ms a token")
    table(rows, [("history", "length", ",d"), ("session", "mean_ms", ".3f"), ("exact", "exact_ms", ".3f"), ("full", "full_ms", ".3f")])


def print_ttft(rows):
    print("\nto the first token of a prompt, seconds")
    return table(rows, [("prompt", "prompt", ",d"), ("prefill", "prefill_s", ".3f"), ("session", "session_s", ".3f"), ("ingest", "ingest_s", ".3f"), ("next token", "next_s", ".4f")])


def print_flops(rows, budget, asked):
    print(f"\nFLOPs a token of history over the base's forward of a token at W = {budget}; LensNet scores {asked:.1f} entries a token")
    table(rows, [("model", "model", "s"), ("base_MF", "base_mflops", ",.1f"), ("GistNet", "gistnet_flops_share", ".2%"), ("LensNet", "lensnet_flops_share", ".2%"),
                 ("re-embed", "embed_flops_share", ".2%"), ("gist lane", "lane_flops_share", ".2%")])


if __name__ == "__main__":
    run_main(main)
