"""
Does the memory pay? Tables, pictures, and one JSON line with all of their numbers:

    trailing loss    at equal visible budget: a window, retrieval, gists by recency, LensNet's choice, an oracle, controls, full
                     attention; with growing context (megacontext/evaluate.py says what each is)
    by budget        bits per byte against the visible budget, window and gists beside full attention
    dNLL@H           what a gist costs in place of what it stands for, by level and horizon; how often it is as good (megacontext/probes.py)
    one gist         a block's tokens read behind their gist alone; how different gists are
    LensNet          correlation with measured gains, signs, and how much of the oracle's gain it gets, beside other ways to choose: on text, and on
                     questions about what was said far back (conversation stages; scripts/asked.py)
    recall           questions about what was said far back, by length and depth (conversation stages; scripts/recall.py)
    telemetry        what the sessions of that recall did: swaps, budget in use, entries and openings by level, ms per stage; with --telemetry FILE
                     what those of a chat did, from the lines that they wrote, and nothing else: no checkpoint is needed

python -m scripts.mega_eval --stage sft
python -m scripts.mega_eval --checkpoint mid/d4 --source dir:books --seq-len 2048 --budget 256 --documents 24
python -m scripts.mega_eval --telemetry ticks.jsonl    # after chat_cli --telemetry ticks.jsonl, or chat_web or mega_demo
"""
import argparse
import json
import math
import time

import numpy as np
import torch

from megacontext import probes
from megacontext.evaluate import METHODS, WAYS, Networks, Rows, by_budget, lens_quality, opened, oracle, pooled, trailing
from megacontext.span import BLOCK
from megacontext.telemetry import summaries
from nanochat import plots, report
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.run import Log
from scripts.asked import SLACK, answer_rows, ask
from scripts.load import load_stage
from scripts.recall import Questions, add_recall_flags, numbers, percent, picture, recall_tables, settle_recall, spread, telemetry_numbers, telemetry_table

parser = argparse.ArgumentParser(description="Measure what the memory is worth", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="base, mid or sft")
parser.add_argument("--tag", default="", help="tag of the checkpoint (empty = the newest)")
parser.add_argument("--checkpoint", default="", help="stage/tag, in place of --stage and --tag")
parser.add_argument("--source", default="stdlib", help="long validation documents")
parser.add_argument("--seq-len", type=int, default=-1, help="tokens of a row (-1 = the longest that the model was trained on)")
parser.add_argument("--lengths", default="", help="tokens of context, comma list; all end where the row ends (empty = a quarter, half and all of it)")
parser.add_argument("--budget", type=int, default=-1, help="visible entries (-1 = an eighth of the row)")
parser.add_argument("--documents", type=int, default=12, help="rows for each seed")
parser.add_argument("--measured-rows", type=int, default=4, help="rows of each seed with every edit measured: oracle, LensNet, dNLL, one gist")
parser.add_argument("--seeds", type=int, default=3, help="samples of rows and questions; the spread is over them")
add_recall_flags(parser.add_argument_group("recall", "questions, which a model of stage base is not asked: given for one, these flags are refused"))
parser.add_argument("--telemetry", default=None, help="sum up this file, which chat_cli, chat_web or mega_demo wrote with the same flag, and measure nothing")
parser.add_argument("--run", default="", help="name of a wandb run (empty = no wandb)")
parser.add_argument("--device", default="")
add_data_dir(parser)

TRAILING = 512 # tokens at the end of a context that the loss is taken over, or its last quarter


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def refuse_unused(args):
    """UserError where flags of the recall were given, be it with their defaults, that nothing would be asked by."""
    names = [name for name in vars(args) if name.startswith("recall_")]
    unused, why = [], ""
    if args.stage == "base":
        unused, why = names, "expected a model that was trained on conversations, got base, which is asked nothing: name one by --stage or --checkpoint, or leave them out"
    elif not args.recall_lengths:
        unused, why = ("recall_depths", "recall_problems", "recall_budget"), "expected --recall-lengths of at least one beside them, got none: give some, or leave them out"
    bare = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(names))) # no default takes the place of these None
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(bare, name)] # an empty list asks for nothing, and gets it
    if given:
        raise UserError(f"{', '.join(given)}: {why}")


def settle(args, seq_len):
    """Fill in what was left to the checkpoint; UserError for what cannot be measured."""
    least = 4 * BLOCK
    T = args.seq_len = args.seq_len if args.seq_len > 0 else seq_len
    if T > seq_len:
        raise UserError(f"--seq-len {T}: the model was trained on rows of {seq_len}. A session maps what is further away to positions that it knows, rows do not: these tables would measure "
                        "positions (bench/positions.py does)")
    args.lengths = sorted({*(numbers(args.lengths) or [T // 4, T // 2, T]), T})
    args.budget = args.budget if args.budget > 0 else T // 8
    if T < 16 * BLOCK or any(length % least or not least <= length <= T for length in args.lengths):
        raise UserError(f"expected --seq-len of at least {16 * BLOCK} and --lengths that are multiples of {least} up to it, got {T} and {args.lengths}")
    if args.seeds < 2 or not 2 <= args.measured_rows <= args.documents:
        raise UserError(f"expected --seeds of at least 2 and --measured-rows from 2 to --documents, got {args.seeds} and {args.measured_rows} of {args.documents}")
    settle_recall(args, T)


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
    """
    count rows (count, T + 1), each a stretch of one document that starts on a block, and which of `long` it is of, numpy (count,); documents in turn, none twice
    before all were used.
    """
    of = rng.permutation(len(long))[np.arange(count) % len(long)]
    rows = []
    for ids in (long[i] for i in of):
        start = int(rng.integers(0, (len(ids) - T - 1) // BLOCK + 1)) * BLOCK
        rows.append(ids[start:start + T + 1])
    return torch.tensor(rows), of


def tail_of(length):
    return min(TRAILING, length // 4 // BLOCK * BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# One seed

def parts(rows, size):
    """Rows in parts of at least `size`, as far as there are so many, and less than twice that: what fits into memory, and never one row alone."""
    return rows.tensor_split(max(1, len(rows) // size))


def joined(nests):
    """Nests of dicts with lists at their leaves -> one nest, the lists joined."""
    found = {}
    for nest in nests:
        for key, value in nest.items():
            found[key] = joined([found.get(key, {}), value]) if isinstance(value, dict) else found.get(key, []) + value
    return found


def measure_losses(networks, rows, args, rng):
    """
    Rows read with each length of context -> ({length: {method: {"loss", "better_than_window", "same_tokens", "above_window"}}}, lens_quality at the
    full length). same_tokens: the loss of the tokens that count at every length; above_window: the same less the window's at the full length.
    """
    found, shared, few = {}, min(map(tail_of, args.lengths)), args.measured_rows
    for length in args.lengths:
        tail, part = tail_of(length), rows[:, -(length + 1):]
        chunks = [trailing(Rows(networks, chunk, args.budget, rng), tail) for chunk in parts(part, 4)]
        nats = {method: torch.cat([chunk[method] for chunk in chunks]) for method in chunks[0]}
        measured = [(some, opened(some, tail)) for some in (Rows(networks, chunk, args.budget, rng) for chunk in parts(part[:few], 2))]
        nats["oracle"] = torch.cat([oracle(some, gains, tail) for some, gains in measured])
        against = lambda n: nats["window"][:len(n)]
        found[length] = {method: dict(loss=nats[method].mean().item(), better_than_window=(against(nats[method]) - nats[method]).mean().item(),
                                      same_tokens=nats[method][:, -shared:].mean().item()) for method in METHODS}
    for row in found.values():
        for method in set(METHODS) - {"oracle"}: # it was measured on fewer rows
            row[method]["above_window"] = row[method]["same_tokens"] - found[args.seq_len]["window"]["same_tokens"]
    return found, joined([lens_quality(some, gains) for some, gains in measured]) # of the last length, which is the longest


def lens_numbers(quality):
    """Means of lens_quality: {"correlation", "gain", "regret", "signs": {way}}, "above_noise" (a share of all edits) and "positive" (a share of those)."""
    kept = {way: quality[way] for way in WAYS}
    gain = {way: float(np.mean(told["gain"])) for way, told in kept.items() if told["gain"]}
    told = dict(gain=gain, correlation={way: float(np.mean(told["correlation"])) for way, told in kept.items() if told["correlation"]})
    if gain.get("oracle", 0) > 0: # else nothing was worth opening, and a share of nothing means nothing
        told["regret"] = {way: 1 - value / gain["oracle"] for way, value in gain.items()}
    if quality["points"]:
        told["above_noise"] = len(quality["positive"]) / len(quality["points"])
    if quality["positive"]:
        told |= dict(positive=float(np.mean(quality["positive"])), signs={way: float(np.mean(told["signs"])) for way, told in kept.items()})
    return told


def measure_asked(networks, tokenizer, questions, args, seed, rng, device):
    """{task: lens_numbers of reading answers}, and {task: why it was not asked}."""
    found, missing = {}, {}
    for name in args.recall_tasks:
        try:
            task = questions.task(name, length=args.seq_len + SLACK, seed=seed, size=4 * args.documents)
            rows, sizes = answer_rows(tokenizer, task, args.seq_len, args.documents)
        except (UserError, ValueError) as error:
            missing[name] = str(error)
            continue
        several = zip(parts(rows.to(device), 4), parts(torch.tensor(sizes), 4))
        found[name] = lens_numbers(joined([ask(networks, some, few.tolist(), args.budget, rng) for some, few in several]))
    return found, missing


def measure_gists(networks, rows, args, rng):
    """dNLL@H with substitutability, reconstruction and diversity."""
    several = [Rows(networks, part, args.budget, rng) for part in parts(rows, 2)]
    price = {kind: {H: probes.substitutability(lost, H) for H, lost in horizons.items()} for kind, horizons in joined([probes.price(some, rng) for some in several]).items()}
    behind = {level: {name: float(np.mean(nats)) for name, nats in row.items()} for level, row in joined([probes.reconstruction(some) for some in several]).items()}
    diverse = {}
    for name, make in (("trained", lambda some: some.entries), ("pooled", lambda some: pooled(some.entries, some.T))):
        levels = [probes.all_gists(make(some), some.T) for some in several]
        diverse[name] = {level: probes.diversity(torch.cat([gists[level] for gists in levels])) for level in levels[0]}
    return dict(dnll=price, reconstruction=behind, diversity=diverse)


def measure_budgets(networks, rows, args, rng, bytes_of):
    """Bits per byte of the last tokens by visible budget."""
    T, tail = args.seq_len, tail_of(args.seq_len)
    bits = (bytes_of[rows[:, 1:][:, -tail:]].float().mean() * math.log(2)).item() # nats per token / this = bits per byte
    budgets = sorted({T // 16, T // 8, T // 4, T // 2})
    found = joined([by_budget(Rows(networks, part, args.budget, rng), budgets, tail) for part in parts(rows, 2)])
    return {W: {name: float(np.mean(nats)) / bits for name, nats in row.items()} for W, row in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# All seeds

def over_seeds(samples):
    """One nest of dicts a seed -> the same nest with spread() of the numbers at its leaves, of the seeds that have them."""
    found = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        values = [sample[key] for sample in samples if key in sample]
        found[key] = over_seeds(values) if isinstance(values[0], dict) else spread(values)
    return found


def closed_gaps(samples, length):
    """{method: share of the way from the window to full attention}, where full attention is better at every seed; else None."""
    rows = [sample[length] for sample in samples]
    if not all(row["full"]["better_than_window"] > 0 for row in rows):
        return None
    return {method: spread([row[method]["better_than_window"] / row["full"]["better_than_window"] for row in rows]) for method in METHODS if method != "oracle"}


def told(number, digits=4):
    return None if number is None else f"{number['mean']:.{digits}f}" + ("" if number["spread"] is None else f" +- {number['spread']:.{digits}f}")


def tell_sessions(path):
    """The table and the numbers of a file of ticks, by session."""
    told, left_out = summaries(path)
    if not told:
        raise UserError(f"{path} has no ticks: a session tells of its first once it has read a few tokens")
    print0(telemetry_table({f"{session}/{summary['length']}": summary for session, summary in told.items()}) + "\n")
    if left_out:
        print0(f"Lines of {path} that are no ticks, as a kill or a full disk leaves one, and are left out: {left_out}\n")
    print0(json.dumps(told))


def main():
    args = parser.parse_args()
    if args.telemetry is not None:
        return tell_sessions(args.telemetry)
    if args.checkpoint:
        args.stage, _, args.tag = args.checkpoint.partition("/")
    refuse_unused(args)
    use_data_dir(args.data_dir)
    began, device = time.time(), torch.device(args.device or pick_device_type())
    loaded = load_stage(args.stage, args.tag or None, device=device)
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: there is nothing to measure")
    settle(args, loaded.gpt.config.seq_len)
    networks, tokenizer = Networks(loaded.gpt, loaded.gistnet, loaded.lensnet), loaded.tokenizer
    texts = long_documents(open_source(args.source, "val"), tokenizer, args.seq_len)
    bytes_of = torch.as_tensor(tokenizer.token_bytes(), device=device)
    samples, points, not_asked = [], [], {}
    questions = Questions(args.source, tokenizer) if args.stage != "base" else None
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        rows = sample_rows(texts, args.seq_len, args.documents, rng)[0].to(device)
        few = rows[:args.measured_rows]
        losses, quality = measure_losses(networks, rows, args, rng)
        samples.append(dict(trailing=losses, bpb_by_budget=measure_budgets(networks, few, args, rng, bytes_of), lens=lens_numbers(quality), **measure_gists(networks, few, args, rng)))
        points += quality["points"]
        if questions is not None:
            samples[-1]["lens_asked"], missing = measure_asked(networks, tokenizer, questions, args, seed, rng, device)
            not_asked |= missing
        last = losses[args.seq_len]
        print0(f"seed {seed}: " + ", ".join(f"{method} {last[method]['loss']:.4f}" for method in METHODS) + f" ({time.time() - began:.0f} s)")
    data = dict(stage=args.stage, tag=loaded.tag, step=loaded.meta["step"], source=args.source, seq_len=args.seq_len, lengths=args.lengths, budget=args.budget, seeds=args.seeds,
                documents=args.documents, measured_rows=args.measured_rows, **over_seeds(samples), gap_closed=closed_gaps([s["trailing"] for s in samples], args.seq_len))
    data["lens_not_asked"] = not_asked
    tables = [*trailing_tables(data, args), *gist_tables(data), *lens_tables(data, points), *asked_tables(data)]
    if args.recall_lengths and args.stage != "base":
        tables += recall_tables(loaded, data, args, began, "mega_recall.png")
    report.write_section("mega", f"Memory ({args.stage})", *tables, data=data, seconds=time.time() - began)
    for table in tables:
        print0(table + "\n")
    log = Log(None, wandb_project="nanochat-mega", run=args.run, config=vars(args))
    log.summary(**{f"loss_{name}": row["loss"]["mean"] for name, row in data["trailing"][args.seq_len].items()}, **telemetry_numbers(data.get("telemetry", {})))
    log.close()
    print0(json.dumps(data))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures

def trailing_tables(data, args):
    T, by, gap = args.seq_len, data["trailing"], data["gap_closed"]
    rows = [[name, told(row["loss"]), told(row["better_than_window"]), told(gap[name], 2) if gap and name in gap else None] for name, row in by[T].items()]
    curve = lambda key, bars: {name: [(length, by[length][name][key]["mean"], by[length][name][key]["spread"] if bars else None) for length in args.lengths] for name in METHODS if name != "oracle"}
    # each seed has other documents, so the spread of the losses themselves would hide everything
    panels = [(f"the same last {min(map(tail_of, args.lengths))} tokens, {data['budget']} entries in view", "nats per token", curve("same_tokens", False)),
              (f"less the window's of {T} tokens, paired", "nats per token", curve("above_window", True))]
    plots.lines(report.folder() / "mega_context.png", panels, "tokens of context", log=True)
    budgets = data["bpb_by_budget"]
    return [
        f"Rows of {T} tokens from {data['source']} (validation), {data['documents']} rows for each of {data['seeds']} seeds; every method sees {data['budget']} entries, full sees all. "
        f"Nats per token over the last {tail_of(T)}; +- is the standard deviation over seeds. The oracle looks at the targets and was measured on {data['measured_rows']} rows of each seed; "
        "what it is better by is paired, its loss is not to be compared with the others'.",
        report.table(["method", "loss", "better than the window by", "share of the way to full"], rows),
        f"With growing context, all ending at the same place, {data['budget']} entries in view: better than the window by, over the last {', '.join(f'{tail_of(length)}' for length in args.lengths)} tokens",
        report.table(["method", *[f"{length} tokens" for length in args.lengths]], [[name, *[told(by[length][name]["better_than_window"]) for length in args.lengths]] for name in METHODS]),
        picture("mega_context.png", "loss against context"),
        f"Bits per byte against the visible budget ({data['measured_rows']} rows of each seed); all {T} tokens raw: {told(budgets[T]['full'])}.",
        report.table(["budget", "window", "recency with gists"], [[str(W), told(row["window"]), told(row.get("recency"))] for W, row in budgets.items() if W != T]),
    ]


def gist_tables(data):
    rows = [[f"{probes.COARSER[kind]}", H, told(row["dnll"]), told(row["ppl_ratio"]), *[percent(row[f"below_{x}_{per}"]) for per in ("a_token", "in_all") for x in (0.1, 1)]]
            for kind, horizons in data["dnll"].items() for H, row in horizons.items()]
    behind = [[f"{32 ** level} tokens", *[told(row[name]) for name in ("own", "other", "nothing")]] for level, row in data["reconstruction"].items()]
    diverse = [[f"{name}, level {level}", int(row["n"]["mean"]), told(row["rank"], 1), told(row["cosine"], 3)] for name, levels in data["diversity"].items() for level, row in levels.items()]
    return [
        "What the next H tokens lose, in nats per token, when one thing is shown more coarsely for all of them (dNLL@H), the ratio of perplexities, and the share of spans that lose less than "
        "0.1 and 1 nat a token, and less than 0.1 and 1 nat over all H tokens.",
        report.table(["shown more coarsely", "H", "dNLL@H", "ppl ratio", "< 0.1 a token", "< 1 a token", "< 0.1 in all", "< 1 in all"], rows),
        "A block's tokens 2 to 32, read behind one gist and nothing else, in nats per token (reconstruction; base and mid-training read some blocks of level 1 so, by --reconstruct-every, level 2 never was).",
        report.table(["gist of", "its own gist", "another document's", "nothing"], behind),
        "How many directions gists take: effective rank (at most their number and the model's width), and the mean cosine of two of them; pooled = means of tokens, untrained.",
        report.table(["gists", "number", "effective rank", "mean cosine"], diverse),
    ]


def lens_tables(data, points):
    lens = data["lens"]
    if points:
        plots.scatter(report.folder() / "mega_lens.png", points, "LensNet's score", "measured utility, nats", "opening one gist, the next 32 tokens")
    return [
        "Two gists opened: gain in nats over the next block, each opened alone; regret against the oracle's (0 = as good, 1 = no gain); correlation of the scores with the gains. " + above_noise(lens),
        report.table(["choice", "gain", "regret", "correlation", "signs right"], choices(lens)), picture("mega_lens.png", "LensNet's score against measured utility") if points else "",
    ]


def above_noise(lens):
    if lens.get("positive", {}).get("spread") is None:
        return "No edit's utility was above noise at two seeds or more."
    positive = lens["positive"]["mean"]
    return f"Signs count where the utility is beyond twice its standard error, in {100 * lens['above_noise']['mean']:.0f}% of the edits; it is above 0 in {100 * positive:.0f}% of these, so " \
           f"always saying {'yes' if positive > 0.5 else 'no'} gets {100 * max(positive, 1 - positive):.0f}% right."


def choices(lens, *first):
    return [[*first, way, told(lens["gain"].get(way)), told(lens.get("regret", {}).get(way), 2), told(lens["correlation"].get(way), 3), told(lens.get("signs", {}).get(way), 2)] for way in WAYS if way in lens["gain"]]


def asked_tables(data):
    tables, asked = [], data.get("lens_asked", {})
    if asked:
        tables += ["The same for the tokens of an answer, at the end of a row that holds what is asked for. " + " ".join(f"{name}: {above_noise(lens)}" for name, lens in asked.items()),
                   report.table(["question", "choice", "gain", "regret", "correlation", "signs right"], [row for name, lens in asked.items() for row in choices(lens, name)])]
    if data["lens_not_asked"]:
        tables.append("\n".join(f"- not asked: {name}, {reason}" for name, reason in data["lens_not_asked"].items()))
    return tables


if __name__ == "__main__":
    run_main(main)
