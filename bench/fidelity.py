"""
What the memory's shortcuts cost in likelihood, on long validation text (documents one after the other):
python -m bench.fidelity --stage sft --source stdlib
python -m bench.fidelity --stage base --source dir:books --history 65536 --budget 1024 --places 16

    gist dtype   nats per token of the next --next tokens, read one by one by a session on a tree of --history tokens whose gists are
                 kept as fp32, bf16 or int8; and the difference to fp32. The control reads gists of another place: where that costs
                 nothing, the model makes no use of its gists, and the row of int8 says little
    splicing     the session as it runs beside exact=True, which reads all raw blocks again from the earliest edit on: KL(exact || fast) in
                 nats, how often both have the same likeliest token, and the difference in nats per token, over what is read after a refocus
                 that edited something (--read tokens in all)
Every variant reads the same places, so differences are paired. Places are drawn anew for each seed; +- is the standard deviation of the seeds'
means. One function a table, (loaded, ids, args) -> (text, numbers); the last line is JSON with the numbers of all.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from megacontext.column import row_bytes
from megacontext.ingest import ingest
from megacontext.runtime import Session
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import LEAST_BUDGET
from nanochat import report
from nanochat.common import UserError, pick_device_type, run_main
from nanochat.dataset import open_source
from scripts.load import load_stage

TEXT = 1_000_000 # tokens of validation text that places are drawn from, at most
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
CONTROL = "bf16, of another place"

parser = argparse.ArgumentParser(description="What gist formats and splicing cost in nats", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="base, mid, sft or rl")
parser.add_argument("--tag", default=None, help="name of the checkpoint folder (default: the newest)")
parser.add_argument("--source", default="stdlib", help="whose validation documents are read")
parser.add_argument("--history", type=int, default=8192, help="tokens in the tree before the first one is read")
parser.add_argument("--budget", type=int, default=-1, help="entries in view (-1 = half the longest row that was trained on)")
parser.add_argument("--next", type=int, default=64, help="tokens read to compare gist formats")
parser.add_argument("--read", type=int, default=256, help="tokens read to compare splicing with exact re-reading")
parser.add_argument("--places", type=int, default=8, help="places in the text for each seed")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")


def main():
    args = parser.parse_args()
    if min(args.seeds, args.next, args.read) < 1 or args.places < 2 or args.history < 0:
        raise UserError("--seeds, --next and --read must be at least 1, --places at least 2, --history at least 0")
    began = time.time()
    loaded = load_stage(args.stage, args.tag, device=args.device or pick_device_type())
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: there is nothing to measure")
    args.budget = args.budget if args.budget != -1 else max(LEAST_BUDGET, loaded.gpt.config.seq_len // 2)
    ids = long_text(args.source, loaded.tokenizer)
    print(f"{loaded.stage}/{loaded.tag} step {loaded.meta['step']}, {len(ids):,} tokens of {args.source} (validation), histories of {args.history:,} read through "
          f"{args.budget} entries, {args.places} places for each of {args.seeds} seeds", flush=True)
    told = dict(bench="fidelity", stage=loaded.stage, tag=loaded.tag, step=loaded.meta["step"], source=args.source, history=args.history, budget=args.budget, seeds=args.seeds, places=args.places)
    for name, table in (("gist_dtype", gist_dtypes), ("splicing", splicing)):
        text, told[name] = table(loaded, ids, args)
        print(f"\n{text}\n({time.time() - began:.0f} s)", flush=True)
    print(json.dumps(told))


# ---------------------------------------------------------------------------------------------------------------------
# What the tables share

def long_text(source, tokenizer, split="val", most=TEXT):
    """Ids of documents one after the other, `most` of them at most."""
    ids = []
    for text in open_source(source, split).documents():
        ids += [tokenizer.bos] + tokenizer.encode(text)
        if len(ids) >= most:
            break
    return ids[:most]


def stretches(ids, length, args):
    """For each seed, a list of args.places stretches of `length` ids."""
    if len(ids) < length:
        raise UserError(f"the validation text has {len(ids):,} tokens, expected at least {length:,}: lower --history, or give another --source")
    for seed in range(args.seeds):
        starts = np.random.default_rng(seed).integers(0, len(ids) - length + 1, args.places)
        yield [ids[start:start + length] for start in starts.tolist()]


def remembered(loaded, history, dtype="bfloat16"):
    """A tree of these tokens."""
    tree = MegaTree.in_memory(make_header(loaded.gpt.config.width, 0, dtype))
    ingest(loaded.gpt, loaded.gistnet, tree, history)
    return tree


def session(loaded, tree, args, **settings):
    return Session(loaded.gpt, loaded.gistnet, loaded.lensnet, tree, args.budget, **settings)


def spread(means):
    """Of one number a seed: mean and standard deviation (None for a single seed)."""
    return dict(mean=statistics.mean(means), spread=statistics.stdev(means) if len(means) > 1 else None)


def pm(numbers, digits=5):
    return f"{numbers['mean']:.{digits}f}" + (f" +- {numbers['spread']:.{digits}f}" if numbers["spread"] is not None else "")


# ---------------------------------------------------------------------------------------------------------------------
# One function a table

def gist_dtypes(loaded, ids, args):
    """The next tokens read through gists of each format."""
    means = {name: [] for name in (*DTYPES.values(), CONTROL)} # one number a seed
    for places in stretches(ids, args.history + args.next + 1, args):
        nats = {name: [] for name in means}
        for i, stretch in enumerate(places):
            history, read = stretch[:args.history], stretch[args.history:]
            trees = {name: remembered(loaded, history, dtype) for dtype, name in DTYPES.items()}
            trees[CONTROL] = with_gists_of(remembered(loaded, places[i - 1][:args.history]), history)
            for name, tree in trees.items():
                stream = session(loaded, tree, args)
                logits = torch.stack([stream.feed([token]) for token in read[:-1]]).float()
                nats[name].append(torch.nn.functional.cross_entropy(logits, torch.tensor(read[1:], device=logits.device)).item())
        for name, values in nats.items():
            means[name].append(statistics.mean(values))
    sizes = {name: row_bytes(loaded.gpt.config.width, dtype) for dtype, name in DTYPES.items()}
    data = {name: dict(gist_bytes=sizes.get(name), nats=spread(values), more_than_fp32=spread([a - b for a, b in zip(values, means["fp32"])])) for name, values in means.items()}
    data["int8_more_than_bf16"] = spread([a - b for a, b in zip(means["int8"], means["bf16"])])
    rows = [[name, data[name]["gist_bytes"], pm(data[name]["nats"]), pm(data[name]["more_than_fp32"])] for name in means]
    return (f"Gist dtype: the next {args.next} tokens. int8 costs {pm(data['int8_more_than_bf16'])} nats per token more than bf16.\n"
            + report.table(["gists kept as", "bytes a gist", "nats per token", "more than fp32"], rows)), data


def with_gists_of(tree, tokens):
    """A tree of these tokens with the gists of another tree of as many."""
    swapped = MegaTree.in_memory(tree.header)
    swapped.append_tokens(tokens)
    for level in range(1, tree.levels):
        swapped.append_gists(level, tree.gists(level, 0, tree.count(level)))
    return swapped


def splicing(loaded, ids, args):
    """The fast session beside the exact one, token by token, after the first refocus that edited something."""
    means, tokens, edits = dict(kl=[], agree=[], more_nats=[]), 0, 0
    for places in stretches(ids, args.history + args.read + 1, args):
        found = dict(kl=[], agree=[], more_nats=[]) # one number a token
        for stretch in places:
            history, read = stretch[:args.history], stretch[args.history:]
            tree = remembered(loaded, history)
            fast, exact, edited = session(loaded, tree.fork(), args), session(loaded, tree, args, exact=True), False
            for token, following in zip(read, read[1:]):
                a, b = (stream.feed([token]).float().log_softmax(-1) for stream in (exact, fast))
                assert fast.spans == exact.spans, "both are to read through the same working context"
                if edited:
                    found["kl"].append((a.exp() * (a - b)).sum().item())
                    found["agree"].append(float(a.argmax() == b.argmax()))
                    found["more_nats"].append((a[following] - b[following]).item())
                edited = edited or bool(fast.edits)
            edits += fast.stats["edits"]
        if not found["kl"]:
            raise UserError(f"no refocus edited anything within {args.read} tokens at {args.places} places: raise --read or --places, or lower --budget")
        tokens += len(found["kl"])
        for name, values in found.items():
            means[name].append(statistics.mean(values))
    data = {name: spread(values) for name, values in means.items()} | dict(tokens=tokens, edits=edits)
    rows = [["KL(exact, fast), nats per token", pm(data["kl"])], ["same likeliest token", pm(data["agree"], 4)], ["nats per token more than exact", pm(data["more_nats"])]]
    return f"Splicing beside exact re-reading, {tokens:,} tokens read after {edits:,} edits.\n" + report.table(["fast session", f"{args.seeds} seeds"], rows), data


if __name__ == "__main__":
    run_main(main)
