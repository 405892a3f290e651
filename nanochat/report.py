"""
The report: one page that says what a run trained, on which machine, for how long, and what was measured.

python -m nanochat.report --reset --tier cpu      at the start of a run: forget the sections of the one before
python -m nanochat.report                         at its end, or at any time: put together what is there

In:  sections that the evaluation scripts leave in base_dir()/report (write_section), and the summary line that each training
     stage leaves in its log.jsonl.
Out: report.md, here and in base_dir()/report, with the pictures that stand there.
The idea: whoever measures writes his own section, once, with its numbers beside it as JSON. Assembling only reads and places.
What nobody measured is named as missing; no cell of a table is ever filled from anywhere else.

A *result* is one number of the table that compares the stages:
{"measure": "val bpb", "stage": "sft", "memory": False, "value": 1.234}, and for a share of n also "n", "low", "high".
"""

import argparse
import json
import math
import os
import platform
import re
import time
from pathlib import Path

from nanochat.checkpoint import git_commit
from nanochat.common import STAGES, base_dir, pick_device_type, print0, run_main
from nanochat.hardware import describe
from nanochat.run import duration

SECTIONS = { # in the order of the page: name -> the command that writes it
    "tokenizer": "python -m scripts.tok_eval",
    "base": "python -m scripts.base_eval",
    "chat": "python -m scripts.chat_eval",
    "mega": "python -m scripts.mega_eval --stage base",
    "recall": "python -m scripts.recall_eval",
}
EXPECTED_STAGES = ("base", "mid", "sft") # rl is extra
START = "run.json"


# ---------------------------------------------------------------------------------------------------------------------
# Writing a section

def folder():
    return base_dir() / "report"


def write_section(name, title, *parts, data=None, results=(), seconds=None):
    """
    Write report/<name>.md from paragraphs and tables (Markdown text each), and report/<name>.json with the raw numbers.

    data      JSON-able, whatever the section was made from; read_data(name) gives it back
    results   rows for the table of stages, see the top of this file
    seconds   what the measurement took
    Returns the path of the Markdown.
    """
    folder().mkdir(parents=True, exist_ok=True)
    record = dict(title=title, written=now(), commit=git_commit(), seconds=seconds, results=list(results), data=data)
    write_whole(folder() / f"{name}.json", json.dumps(record, indent=1) + "\n")
    path = folder() / f"{name}.md"
    write_whole(path, "\n\n".join([f"## {title}", *(part.strip("\n") for part in parts if part)]) + "\n")
    return path


def write_whole(path, text):
    """A reader, or a kill, sees the old file or the new one and never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_record(name):
    """What write_section kept beside the section, or None: sections may also be Markdown alone."""
    path = folder() / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_data(name):
    """The numbers of an earlier section of this run, so that another stage can be added to it. {} if there is none."""
    return (read_record(name) or {}).get("data") or {}


def table(head, rows):
    """Markdown. The first column is text, the others are numbers; None = not measured."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    for line in lines:
        assert len(line) == len(head), f"a row of {len(line)} cells under a head of {len(head)}: {line}"
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def fence(text):
    """Text as it is, in a code block that it cannot close."""
    marks = "```"
    while marks in text:
        marks += "`"
    return f"{marks}text\n{text}\n{marks}"


def wilson(right, n, z=1.96):
    """
    (low, high), the 95% interval of a share of which `right` of `n` were seen. Unlike the textbook's p +- 1.96 s it stays in [0, 1] and is
    right for small n and for shares near 0 or 1 (Wilson 1927).
    """
    assert 0 <= right <= n and n > 0, f"{right} of {n}"
    p = right / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if right == 0 else low), (1.0 if right == n else high) # exact at the ends, where rounding leaves 1e-17


# ---------------------------------------------------------------------------------------------------------------------
# Reading what the run left

def summaries(log):
    """All summary lines of a log.jsonl, oldest first. A last line cut short by a kill is no line."""
    if not log.exists():
        return []
    found = []
    for line in log.read_text(encoding="utf-8").split("\n"):
        if not line.startswith('{"summary"'):
            continue
        try:
            summary = json.loads(line)["summary"]
        except ValueError:
            continue
        if "memory" in summary: # what runs before 2026-11-27 called it
            summary["gists"] = summary.pop("memory")
        found.append(summary)
    return found


def steps(log):
    """{step: metrics} of a log.jsonl. Where a step comes again, or an earlier one, a killed run was resumed: what was logged from there on is forgotten."""
    found, last = {}, 0
    for line in log.read_text(encoding="utf-8").split("\n"):
        if line.startswith('{"step"') and line.endswith("}"):
            metrics = json.loads(line)
            step = metrics["step"]
            if step < last or found.get(step, {}).keys() & metrics.keys() > {"step"}: # validation has a line of its own, with other keys
                found = {n: found[n] for n in found if n < step}
            found.setdefault(step, {}).update(metrics)
            last = step
    return found


def last_run(stage, tag=None):
    """The summary of the stage's finished run: of this tag, else of the one that was logged last. None = no run has finished."""
    logs = sorted((base_dir() / f"{stage}_checkpoints").glob(f"{tag or '*'}/log.jsonl"), key=lambda path: path.stat().st_mtime)
    finished = [found[-1] for log in logs if (found := summaries(log))]
    return finished[-1] if finished else None


def tokenizer_run():
    """The summary of the tokenizer's training; the same log holds lines of its evaluation."""
    found = [summary for summary in summaries(base_dir() / "tokenizer" / "log.jsonl") if "mchars_per_second" in summary]
    return found[-1] if found else None


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def card():
    """Where and on what this runs."""
    import torch
    machine = describe(pick_device_type())
    return {"machine": str(machine), "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
            "python": platform.python_version(), "torch": torch.__version__, "commit": git_commit()}


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page

def head(start):
    """The card: start is what --reset noted, or None."""
    here = card()
    commit = here["commit"] or "not a git repository"
    if start and start["commit"] != here["commit"]:
        commit = f"{start['commit']} at the start, {commit} now"
    rows = [("date", now()), ("machine", here["machine"]), ("system", here["system"]), ("python", here["python"]), ("torch", here["torch"]),
            ("commit", commit.replace("-dirty", " with uncommitted changes"))]
    if start:
        rows += [(name, start[name]) for name in ("tier", "arguments") if start.get(name)]
        rows += [("started", start["date"]), ("time since the start", duration(time.time() - start["time"]))]
    return table(("", "this run"), rows)


def stage_table(runs, tokenizer, records):
    """What was trained, and the time of everything that noted its time."""
    rows, total = [], 0.0
    if tokenizer is not None:
        total += tokenizer["seconds"]
        rows.append(["tokenizer", None, None, None, None, None, None, duration(tokenizer["seconds"])])
    for stage, run in runs.items():
        total += run["train_s"]
        memory = "with memory" if run["gists"] else "plain"
        rows.append([f"{stage} training, {memory} ({run['tag']})", run["params"], run["steps"], run["tokens"], round(run["tokens_per_s"]),
                     f"{100 * run['mfu']:.1f}%" if run.get("mfu") is not None else None, f"{run['peak_mb']:,.0f}", duration(run["train_s"])])
    for name, record in records.items():
        if record.get("seconds") is not None:
            total += record["seconds"]
            rows.append([f"{name} evaluation", None, None, None, None, None, None, duration(record["seconds"])])
    rows.append(["all", None, None, None, None, None, None, duration(total)])
    return table(("stage", "parameters", "steps", "tokens", "tokens/s", "MFU", "peak MB", "time"), rows)


def training_curves(runs):
    """Base training with memory beside the same without (its tag ends in -plain), drawn where both were run. -> Markdown, or "" where not."""
    name = runs["base"]["tag"].removesuffix("-plain") if "base" in runs else None
    logs = {kind: base_dir() / "base_checkpoints" / f"{name}{end}" / "log.jsonl" for kind, end in (("plain", "-plain"), ("memory", ""))}
    if name is None or not all(log.exists() for log in logs.values()):
        return ""
    plain, memory = steps(logs["plain"]), steps(logs["memory"])
    told = {"plain": (plain, "loss"), "with memory, rows read plainly": (memory, "loss_plain"), "with memory, rows read through gists": (memory, "loss_gist")}
    curves = {label: [(step, line[key], 0) for step, line in lines.items() if key in line] for label, (lines, key) in told.items()}
    from nanochat import plots # here: loading matplotlib takes longer than the rest of a report
    plots.lines(folder() / "training.png", [(f"base training, {name}", "nats per token", {label: points for label, points in curves.items() if points})], "step")
    return "![base training with memory and without](training.png)"


def with_pictures(text, where):
    """Pictures stand beside the report's sections, and so do links to them; a page in the folder `where` must say where that is."""
    place = Path(os.path.relpath(folder(), where)).as_posix()
    return re.sub(r"(!\[[^\]]*\])\(([\w.-]+\.png)\)", rf"\1({place}/\2)", text) if place != "." else text


def result_table(runs, records):
    """
    Every measure in a row, every stage in a column, and a second column where something was measured with memory.
    The validation at the end of a training stage comes first (each on the rows that it trains on: not to be compared along the
    line), the sections' own numbers after it.
    """
    results = [dict(measure="val bpb on the stage's own rows", stage=stage, memory=False, value=run["val_bpb"])
               for stage, run in runs.items() if "val_bpb" in run]
    for record in records.values():
        results += record.get("results") or []
    if not results:
        return "No stage was measured yet."
    cells, measures = {}, {}
    for result in results:
        measures.setdefault(result["measure"])
        cells[result["measure"], result["stage"], bool(result["memory"])] = result
    columns = [(stage, memory) for stage in STAGES for memory in (False, True) if any(key[1:] == (stage, memory) for key in cells)]
    names = [stage + (", with memory" if memory else "") for stage, memory in columns]
    rows = [[measure, *(show(cells.get((measure, *column))) for column in columns)] for measure in measures]
    return table(("measure", *names), rows)


def show(result):
    """A result in a cell. A share of n comes with its interval."""
    if result is None or result["value"] is None:
        return None
    if result.get("n"):
        return f"{100 * result['value']:.1f}% ({100 * result['low']:.0f}-{100 * result['high']:.0f})"
    return float(result["value"])


def assemble(tag=None):
    """The whole page as Markdown."""
    names = [name for name in SECTIONS if (folder() / f"{name}.md").exists()]
    others = sorted(path.stem for path in folder().glob("*.md") if path.stem not in SECTIONS and path.stem != "report")
    records = {name: record for name in names + others if (record := read_record(name))}
    start = json.loads((folder() / START).read_text()) if (folder() / START).exists() else None
    runs = {stage: run for stage in STAGES if (run := last_run(stage, tag))}
    tokenizer = tokenizer_run()

    missing = [f"{stage} training: no finished run" for stage in EXPECTED_STAGES if stage not in runs]
    missing += [f"{name}: not measured (`{command}`)" for name, command in SECTIONS.items() if name not in names]
    parts = ["# Report", head(start), "## Stages", stage_table(runs, tokenizer, records), *filter(None, [training_curves(runs)]), "## Results", result_table(runs, records),
             "Shares are in percent with their 95% interval; - is what was not measured."]
    if missing:
        parts += ["## Missing", "\n".join(f"- {line}" for line in missing)]
    if tokenizer is not None:
        facts = [(key.replace("_", " "), value) for key, value in tokenizer.items()]
        parts += ["## Tokenizer training", table(("", "measured"), facts)]
    parts += [(folder() / f"{name}.md").read_text(encoding="utf-8").strip("\n") for name in names + others]
    return "\n\n".join(parts) + "\n"


def reset(tier="", arguments=""):
    """Forget the sections of the run before, and note when and from what this one starts."""
    folder().mkdir(parents=True, exist_ok=True)
    for path in [path for kind in ("md", "json", "png") for path in folder().glob(f"*.{kind}")]:
        path.unlink()
    start = dict(tier=tier, arguments=arguments, commit=git_commit(), date=now(), time=time.time())
    write_whole(folder() / START, json.dumps(start, indent=1) + "\n")


parser = argparse.ArgumentParser(description="Put the report together", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--reset", action="store_true", help="start a run: forget all sections, note the time, write no report")
parser.add_argument("--tier", default="", help="with --reset: the recipe of this run, for the card")
parser.add_argument("--arguments", default="", help="with --reset: how the run was started, for the card")
parser.add_argument("--tag", default="", help="name of the checkpoint folders (empty = of each stage the one trained last)")


def main():
    args = parser.parse_args()
    if args.reset:
        reset(args.tier, args.arguments)
        print0(f"report      cleared {folder()}")
        return
    text = assemble(args.tag or None)
    folder().mkdir(parents=True, exist_ok=True)
    for path in (folder() / "report.md", Path("report.md").absolute()):
        write_whole(path, with_pictures(text, path.parent))
        print0(f"report      {path}")


if __name__ == "__main__":
    run_main(main)
