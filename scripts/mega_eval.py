"""
Does the memory pay? Six tables, and one JSON line with all of their numbers:

    trailing loss    at equal visible budget: a sliding window, gists by recency, LensNet's choice, controls, full attention
    by budget        bits per byte against the visible budget, window and gists beside full attention
    dNLL@32          what a gist costs in place of what it stands for, by level
    LensNet          how much of the oracle's gain it gets, beside recency, random, embedding and BM25
    recall           a passkey in a history many times the budget, by length and depth (conversation stages)
    telemetry        what the sessions of that recall did: swaps, budget in use, entries and openings by level, ms per stage

python -m scripts.mega_eval --stage sft
python -m scripts.mega_eval --stage base --source dir:books --seq-len 2048 --budget 256 --documents 24
"""
import argparse
import json
import math
import time

import numpy as np
import torch

from megacontext.evaluate import by_budget, gist_price, lens_quality, trailing
from megacontext.runtime import LEAST_BUDGET, STAGES
from megacontext.span import BLOCK
from megacontext.telemetry import Telemetry
from nanochat import report
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.engine import Engine
from nanochat.run import Log
from scripts.load import load_stage, open_stream
from scripts.mixtures import texts_of
from tasks.needle import Passkey

parser = argparse.ArgumentParser(description="Measure what the memory is worth", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="base, mid or sft")
parser.add_argument("--tag", default="", help="tag of the checkpoint (empty = the newest)")
parser.add_argument("--source", default="stdlib", help="long validation documents")
parser.add_argument("--seq-len", type=int, default=-1, help="tokens of a row (-1 = the longest that the model was trained on)")
parser.add_argument("--budget", type=int, default=-1, help="visible entries (-1 = a quarter of the row)")
parser.add_argument("--documents", type=int, default=12, help="rows for each seed")
parser.add_argument("--seeds", type=int, default=3, help="samples of rows; the spread is over them")
parser.add_argument("--recall-lengths", default="1024,8192", help="tokens of history, comma list; empty = no recall table")
parser.add_argument("--recall-problems", type=int, default=6, help="questions for each length and depth")
parser.add_argument("--run", default="", help="name of a wandb run (empty = no wandb)")
parser.add_argument("--device", default="")
add_data_dir(parser)

DEPTHS = (0.0, 0.5, 0.9)


def long_documents(source, tokenizer, T, most=100):
    """Ids of the first documents that have more than T tokens, `most` of them."""
    long = []
    for text in source.documents():
        ids = [tokenizer.bos] + tokenizer.encode(text)
        if len(ids) > T:
            long.append(ids)
        if len(long) == most:
            break
    if len(long) < 2:
        raise UserError(f"only {len(long)} of the validation documents have {T + 1} tokens or more: lower --seq-len or give another --source")
    return long


def sample_rows(long, T, count, rng):
    """count rows (count, T + 1), each a stretch of one document that starts on a block; documents in turn, none twice before all were used."""
    order = rng.permutation(len(long))
    rows = []
    for i in range(count):
        ids = long[order[i % len(long)]]
        start = int(rng.integers(0, (len(ids) - T - 1) // BLOCK + 1)) * BLOCK
        rows.append(ids[start:start + T + 1])
    return torch.tensor(rows)


def spread(values):
    """mean and standard deviation over seeds."""
    return dict(mean=float(np.mean(values)), spread=float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


def told(numbers, digits=4):
    return f"{numbers['mean']:.{digits}f} +- {numbers['spread']:.{digits}f}"


def main():
    args = parser.parse_args()
    use_data_dir(args.data_dir)
    began = time.time()
    device = torch.device(args.device or pick_device_type())
    loaded = load_stage(args.stage, args.tag or None, device=device)
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: there is nothing to measure")
    gpt, gistnet, lensnet, tokenizer = loaded.gpt, loaded.gistnet, loaded.lensnet, loaded.tokenizer
    T = args.seq_len if args.seq_len > 0 else gpt.config.seq_len
    W = args.budget if args.budget > 0 else T // 4
    texts = long_documents(open_source(args.source, "val"), tokenizer, T)
    losses, prices, found, correlation, signs, curve = [], {1: [], 2: []}, [], [], [], []
    budgets = sorted({T // 16, T // 8, T // 4, T // 2})
    bytes_of = torch.as_tensor(tokenizer.token_bytes(), device=device)
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        rows = sample_rows(texts, T, args.documents, rng).to(device)
        several = rows.split(4) if len(rows) % 4 != 1 else rows.split(len(rows))
        parts = [trailing(gpt, gistnet, lensnet, part, W, rng) for part in several]
        losses.append({name: float(np.mean([part[name] for part in parts])) for name in parts[0]})
        few, last = rows[:4], slice(T * 3 // 4, T)
        bits = (bytes_of[few[:, 1:][:, last]].float().mean() * math.log(2)).item() # nats per token / this = bits per byte
        curve.append({W: {name: value / bits for name, value in row.items()} for W, row in by_budget(gpt, gistnet, few, budgets).items()})
        for level, price in gist_price(gpt, gistnet, few, rng).items():
            prices[level].append(float(np.mean(price)))
        gains, corr, right = lens_quality(gpt, gistnet, lensnet, few, W, rng)
        found.append({name: float(np.mean(gain)) for name, gain in gains.items()})
        correlation += corr
        signs += right
        print0(f"seed {seed}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses[-1].items()) + f" ({time.time() - began:.0f} s)")

    loss = {name: spread([sample[name] for sample in losses]) for name in losses[0]}
    by = {W: {name: spread([sample[W][name] for sample in curve]) for name in curve[0][W]} for W in curve[0]}
    gap = {name: spread([sample["window"] - sample[name] for sample in losses]) for name in losses[0]} # paired: rows are the same
    lens = {name: spread([sample[name] for sample in found]) for name in found[0]}
    helps = all(sample["oracle"] > 0 for sample in found) # else nothing was worth opening, and a share of nothing means nothing
    regret = {name: spread([1 - sample[name] / sample["oracle"] for sample in found]) for name in found[0]} if helps else None
    price = {level: spread(values) for level, values in prices.items() if values}
    data = dict(stage=args.stage, tag=loaded.tag, source=args.source, seq_len=T, budget=W, seeds=args.seeds, trailing=loss, better_than_window=gap, bpb_by_budget=by, dnll_32=price,
                lens_gain=lens, lens_regret=regret, lens_correlation=float(np.mean(correlation)) if correlation else None, lens_signs=float(np.mean(signs)) if signs else None)
    tables = [
        f"Rows of {T} tokens from {args.source} (validation), {args.documents} rows for each of {args.seeds} seeds; every method sees {W} entries, full sees all. "
        "Nats per token over the last quarter; +- is the standard deviation over seeds.",
        report.table(["method", "loss", "better than the window by"], [[name, told(loss[name]), told(gap[name])] for name in loss]),
        f"Bits per byte of the last quarter against the visible budget (4 rows of each seed); all {T} tokens raw: {told(by[T]['full'])}.",
        report.table(["budget", "window", "recency with gists"], [[str(W), told(by[W]["window"]), told(by[W]["recency"]) if "recency" in by[W] else None] for W in budgets]),
        "What is lost over the next 32 tokens, in nats per token, when one thing is shown more coarsely (dNLL@32):",
        report.table(["level", "dNLL@32"], [[f"{32 ** level} tokens as one gist", told(p)] for level, p in price.items()]),
        f"Two gists opened: gain in nats over the next block, and regret against the oracle (0 = as good, 1 = no gain). LensNet's scores correlate "
        f"{data['lens_correlation'] or 0:.2f} with measured gains; {100 * (data['lens_signs'] or 0):.0f}% of the signs are right where the gain is beyond one standard deviation.",
        report.table(["choice", "gain", "regret"], [[name, told(lens[name]), told(regret[name], 2) if helps else None] for name in lens]),
    ]
    if args.recall_lengths and args.stage != "base":
        data["recall"], data["telemetry"], table = recall(loaded, args, W, began)
        tables += [f"Passkey recall with a working context of {max(W, LEAST_BUDGET)} entries: share of {args.recall_problems} questions answered, by length of the history and depth (0 = oldest).", table,
                   "Telemetry of these sessions, means over their ticks; milliseconds since the tick before, median and 99th percentile.", telemetry_table(data["telemetry"])]
    report.write_section("mega", f"Memory ({args.stage})", *tables, data=data, seconds=time.time() - began)
    for table in tables:
        print0(table + "\n")
    log = Log(None, wandb_project="nanochat-mega", run=args.run, config=vars(args))
    log.summary(**{f"loss_{name}": numbers["mean"] for name, numbers in loss.items()}, **telemetry_numbers(data.get("telemetry", {})))
    log.close()
    print0(json.dumps(data))


def recall(loaded, args, W, began):
    """
    Passkeys through the runtime session, with LensNet and by recency alone.
    Returns ({"method/length/depth": share answered}, {"method/length": summary of the telemetry}, the table of shares).
    """
    texts, measure = texts_of(args.source, "val"), lambda text: len(loaded.tokenizer.encode(text))
    engine, data, summaries, rows = Engine(loaded.tokenizer), {}, {}, []
    for length in map(int, args.recall_lengths.split(",")):
        for name, n_diff in (("lensnet", 4), ("recency", 0)):
            shares, telemetry = [], Telemetry()
            for depth in DEPTHS:
                task = Passkey(texts, length=length, depth=depth, measure=measure, split="val", size=args.recall_problems)
                right = 0
                for i in range(len(task)):
                    conversation = task[i]
                    stream = open_stream(loaded, budget=max(W, LEAST_BUDGET), telemetry=telemetry)
                    stream.n_diff = n_diff
                    prompt = loaded.tokenizer.render_prompt({"messages": conversation["messages"][:-1]})
                    answer = loaded.tokenizer.decode(list(engine.generate(stream, prompt, max_tokens=16, temperature=0)))
                    right += task.evaluate(conversation, answer)
                    telemetry.next_session()
                shares.append(right / len(task))
                data[f"{name}/{length}/{depth}"] = shares[-1]
            summaries[f"{name}/{length}"] = telemetry.summary()
            rows.append([f"{length} tokens, {name}", *[f"{100 * share:.0f}%" for share in shares]])
            print0(f"recall {rows[-1]} ({time.time() - began:.0f} s)")
    return data, summaries, report.table(["history", *[f"depth {depth}" for depth in DEPTHS]], rows)


def telemetry_numbers(summaries):
    """What a dashboard plots of them, by names such as "lensnet/8192/swap_rate"."""
    return {f"{name}/{key}": value for name, told in summaries.items()
            for key, value in dict(swap_rate=told["swap_rate"], budget_use=told["budget_use"], **{f"{stage}_ms": told["ms"][stage]["p50"] for stage in STAGES}).items()}


def telemetry_table(summaries):
    """summaries: {"method/length": Telemetry.summary()}"""
    by_level = lambda numbers: ", ".join(f"{level}: {n}" for level, n in numbers.items()) or "none"
    rows = []
    for name, told in summaries.items():
        method, length = name.split("/")
        opened = {kind.removeprefix("expand "): n for kind, n in told["edits"].items() if kind.startswith("expand")}
        entries = {level: f"{n:.1f}" for level, n in told["residency"].items()}
        ms = [f"{told['ms'][stage]['p50']:.2f}, {told['ms'][stage]['p99']:.2f}" for stage in STAGES]
        rows.append([f"{length} tokens, {method}", f"{told['ticks']}", f"{told['swap_rate']:.4f}", f"{100 * told['budget_use']:.0f}%", by_level(entries), by_level(opened), *ms])
    return report.table(["history", "ticks", "edits a span", "budget in use", "entries by level", "opened by level", *[f"{stage} ms" for stage in STAGES]], rows)


if __name__ == "__main__":
    run_main(main)
