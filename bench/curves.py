"""
Training curves of finished runs, one beside the other: with memory and without, or any others. Reads what each wrote into its log.jsonl, trains nothing.

python -m scripts.base_train --eval-every 60
python -m scripts.base_train --eval-every 60 --plain --tag plain
python -m bench.curves base/d4 base/plain --labels "with memory,plain" --png training.png

By the tokens trained on:
    val_bpb         bits per byte of validation text, read plainly: at the end, and every --eval-every steps of the training script
    loss_plain      nats a token of the training rows that are read plainly, which in a run without memory are all
    loss_gist       nats a token of those with gists
    lens_explained  share of the labels' variance that LensNet explains: 1 - lens_loss, so 0 = knows nothing. Labels begin once gists are of 32 tokens
Losses are of other rows where a memory is than where none is; validation is of the same. The last three are means over the newest --smooth lines of the log that tell
them. The table cuts the longest run into --points stretches and shows what was told last in each, - where nothing was. Of a run that was killed and resumed only what it
went on with counts. The last line is JSON.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

from nanochat import report
from nanochat.common import UserError, checkpoint_dir, print0, run_main

TRAINING = { # whether with memory: {curve: key of the log}
    True: {"loss_plain": "loss_plain", "loss_gist": "loss_gist", "lens_explained": "lens_loss"},
    False: {"loss_plain": "loss"},
}
CURVES = ("val_bpb", *TRAINING[True])

parser = argparse.ArgumentParser(description="Training curves of finished runs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("checkpoints", nargs="+", help="finished runs, each as stage/tag")
parser.add_argument("--labels", default="", help="what to call them, comma list (empty = by their checkpoints)")
parser.add_argument("--points", type=int, default=6, help="stretches of the table")
parser.add_argument("--smooth", type=int, default=5, help="lines of the log a mean is over")
parser.add_argument("--png", default="", help="where to draw them (empty = nowhere)")


def settle(args):
    """The name of each checkpoint; UserError for what cannot be told or drawn."""
    labels = [label.strip() for label in args.labels.split(",")] if args.labels else args.checkpoints
    if len(labels) != len(args.checkpoints) or len(set(labels)) != len(labels) or not all(labels):
        raise UserError(f"{len(args.checkpoints)} checkpoints are called {', '.join(map(repr, labels))}: expected a name for each in --labels, each another")
    if args.points < 1 or args.smooth < 1:
        raise UserError(f"--points {args.points} --smooth {args.smooth}: expected at least 1 of each")
    if args.png and not args.png.endswith(".png"):
        raise UserError(f"--png {args.png}: expected a name that ends in .png")
    return labels


def find_log(checkpoint):
    """The log of a run given as stage/tag."""
    stage, _, tag = checkpoint.partition("/")
    if not tag:
        raise UserError(f"{checkpoint!r} is no checkpoint: expected stage/tag, such as base/d4")
    folder = checkpoint_dir(stage, tag)
    if not (folder / "log.jsonl").exists():
        others = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/log.jsonl"))) or "none"
        raise UserError(f"{checkpoint}: there is no {folder / 'log.jsonl' if folder.exists() else folder}. Tags of {stage} that have a log: {others}. "
                        "Train it, or set NANOCHAT_BASE_DIR to where it is")
    return folder / "log.jsonl"


def told(log, lines, key):
    """[(step, value), ...] of a key, in the order of steps."""
    values = [(step, lines[step][key]) for step in sorted(lines) if key in lines[step]]
    if not values:
        raise UserError(f"no step in {log} tells {key}, which a curve is drawn from: expected a run of base, mid or sft by this version of the code. Train it again"
                        + ", for longer: LensNet has labels once gists are of 32 tokens" * (key == "lens_loss"))
    for step, value in values:
        if not isinstance(value, (int, float)) or not math.isfinite(value): # what is not finite is logged as a string
            raise UserError(f"{log}, step {step}: {key} is {value!r}, expected a number. Leave this run out, or train it again")
    return values


def read(checkpoint, smooth):
    """
    A run given as stage/tag -> (its summary, {curve: [(tokens, value), ...]}).

    smooth  lines that a mean is over; val_bpb is shown as it is
    """
    log = find_log(checkpoint)
    summaries, lines = report.summaries(log), report.steps(log)
    trained = max(lines, default=0)
    if not summaries or summaries[-1].get("steps", trained) != trained: # a summary of other steps is of a run before
        raise UserError(f"{checkpoint} is not finished: {log} has no summary behind step {trained}. The training command with --resume goes on with it")
    run = summaries[-1]
    missing = [key for key in ("steps", "tokens", "gists", "val_bpb") if key not in run]
    if missing:
        raise UserError(f"the summary in {log} has no {', '.join(missing)}: expected that of base, mid or sft by this version of the code. Train it again")
    lines[trained] = lines[trained] | dict(val_bpb=run["val_bpb"]) # a run that was killed in its last validation tells it in the summary alone
    curves = {"val_bpb": told(log, lines, "val_bpb")}
    for curve, key in TRAINING[bool(run["gists"])].items():
        values = told(log, lines, key)
        means = [statistics.mean(value for _, value in values[max(0, i - smooth):i]) for i in range(1, len(values) + 1)]
        curves[curve] = [(step, 1 - mean if key == "lens_loss" else mean) for (step, _), mean in zip(values, means)]
    return run, {curve: [(step * run["tokens"] // run["steps"], value) for step, value in points] for curve, points in curves.items()}


def sample(curves, length, count):
    """[{"tokens": end, curve: value}, ...] of `count` stretches that make up `length` tokens: what each curve tells last within each, None where nothing."""
    found = []
    for n in range(count):
        begin, end = length * n // count, length * (n + 1) // count
        found.append(dict(tokens=end, **{curve: next((value for tokens, value in reversed(curves.get(curve, [])) if begin < tokens <= end), None) for curve in CURVES}))
    return found


def draw(path, curves, smooth):
    """curves: {label: {curve: [(tokens, value), ...]}} -> a picture of two panels, and a third where any run has a memory."""
    from nanochat import plots # here: loading matplotlib takes longer than all of the rest
    points = lambda curve, suffix="": {label + suffix: [(tokens / 1e6, value, 0) for tokens, value in found[curve]] for label, found in curves.items() if curve in found}
    panels = [("validation, read plainly", "bits per byte", points("val_bpb")),
              (f"training rows, means of {smooth} lines of the log", "nats per token", points("loss_plain") | points("loss_gist", ", rows with gists")),
              ("LensNet", "share of the labels' variance explained", points("lens_explained"))]
    plots.lines(path, [panel for panel in panels if panel[2]], "million tokens")


def main():
    args = parser.parse_args()
    labels = settle(args)
    runs, curves = {}, {}
    for label, checkpoint in zip(labels, args.checkpoints):
        run, curves[label] = read(checkpoint, args.smooth)
        runs[label] = dict(checkpoint=checkpoint, **{key: run.get(key) for key in ("gists", "seed", "steps", "tokens")})
        print0(f"{label}: {checkpoint}, {'with memory' if run['gists'] else 'plain'}, {run['steps']:,} steps of {run['tokens'] // run['steps']:,} tokens, seed {run.get('seed')}")
    length = max(run["tokens"] for run in runs.values())
    for label, run in runs.items():
        run["points"] = sample(curves[label], length, args.points)
    rows = [[label, *run["points"][n].values()] for n in range(args.points) for label, run in runs.items()]
    print0("\n" + report.table(["run", "tokens", *CURVES], rows))
    if args.png:
        draw(Path(args.png), curves, args.smooth)
        print0(f"\ndrawn in {args.png}")
    print0(json.dumps(dict(bench="curves", smooth=args.smooth, runs=runs)))


if __name__ == "__main__":
    run_main(main)
