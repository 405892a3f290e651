"""
What a GPU says of this code, in one go and within ten minutes; runs/gpu_check.sh starts it:
bash runs/gpu_check.sh              (one H100 or H200; no network; results in $OUT, default out/gpu_check)
bash runs/gpu_check.sh --tiny       (the same small, on a CPU: that the script works is all it shows)

Each section is a command of its own with a limit of its own: train (d12 and d20, bf16 and fp8, with memory and without), infer (eager and
static), a chat as scripts/chat_cli.py has it (plain and with memory), the tests that need a GPU, FlexAttention beside its SDPA twin, the memory's
runtime. A section that fails or takes too long is told and the next one starts; when the ten minutes are over, the rest is told as not run: what
PyTorch compiled it keeps on disk, so a second call gets further, and --only takes what is missing alone. <out>/gpu_check.jsonl gets one line a section,
<out>/gpu_check.txt all that they printed. The last thing printed is which bars are met. Exit code 1 if a section failed, else 0: a bar that is
missed is a result.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megacontext.layout import FAN
from nanochat.common import UserError, pick_device_type, run_main

ROOT = Path(__file__).resolve().parent.parent

parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Training, inference and memory on one GPU, with bars", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--tiny", action="store_true", help="everything small, on the CPU")
parser.add_argument("--out", default="out/gpu_check", help="folder of the results")
parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing, and let nothing run, after so long")
parser.add_argument("--only", default="", help="sections whose names have one of these words, separated by commas (empty = all)")


@dataclass(frozen=True)
class Section:
    name: str
    limit: int            # seconds
    command: tuple        # words after python -m
    json: bool = True     # its last line is JSON


def sections(tiny):
    """
    The most important first: what comes last is what a slow machine does not get to. The first eight fit into the time even at their limits; with a
    memory most of it goes to the compiler, so fp8 is shown on the last stage of the curriculum only.
    """
    def train(depth, batch, rows, limit, memory=False, fp8=False):
        shape = ("--depth", "1", "--vocab-size", "512", "--max-seq-len", "128", "--batch-tokens", "1024", "--steps", "2", "--warm", "1", "--device", "cpu") if tiny \
            else ("--depth", str(depth), "--batch-tokens", str(batch), "--device-batch", str(rows), "--steps", "4", "--warm", "2", "--device", "cuda", "--dtype", "bf16")
        more = (() if memory else ("--plain",)) + (("--fp8",) if fp8 and not tiny else ()) + (("--curriculum", f"{FAN}:1") if memory and fp8 else ())
        return Section(f"train d{depth} {'fp8' if fp8 else 'bf16'}{' memory' if memory else ''}", limit, ("bench.train", *shape, *more))

    d12, d20 = (12, 65536, 16), (20, 131072, 8) # an eighth of the run's batch: what each of 8 GPUs has to do; rows that fit with memory too
    chat = lambda *of_gpu: ("bench.streams", *(("--depth", "1", "--vocab-size", "512", "--new", "4", "--repeats", "1", "--device", "cpu") if tiny else ("--depth", "12", "--device", "cuda", *of_gpu)))
    small = ("--prompt", "300", "--budget", "192") if tiny else ()
    talk = ("--depth", "1", "--vocab-size", "512", "--prompt", "16", "--new", "4", "--repeats", "1", "--device", "cpu") if tiny else ("--depth", "12", "--new", "128", "--repeats", "1", "--device", "cuda")
    static, eager = (Section(f"infer d12 {steps}", 45, ("bench.infer", *talk, "--steps", steps)) for steps in ("static", "eager"))
    flex = Section("flex", 45, ("bench.flex", *(("--tokens", "256", "--heads", "2", "--device", "cpu") if tiny else ("--tokens", "2048", "--heads", "6", "--device", "cuda"))))
    size = ("--depth", "1", "--vocab-size", "256", "--budget", "192", "--lengths", "256,512", "--prompts", "64", "--tokens", "64", "--rounds", "1") if tiny \
        else ("--depth", "12", "--vocab-size", "32768", "--budget", "2048", "--lengths", "8k,64k", "--prompts", "1k,8k", "--tokens", "128", "--device", "cuda")
    return [train(*d12, 45), train(*d12, 90, memory=True), train(*d20, 70),
            Section("chat d12", 30, chat("--prompt", "1024", "--new", "512")), Section("chat d12 memory", 30, (*chat("--prompt", "8192", "--new", "256"), "--memory", *small)),
            train(*d20, 150, memory=True), Section("tests", 70, ("pytest", "-q", *tests(tiny)), json=False), train(*d20, 70, fp8=True),
            train(*d12, 45, fp8=True), static, flex, Section("runtime d12", 90, ("bench.runtime", "--quick", *size)),
            train(*d12, 60, memory=True, fp8=True), train(*d20, 100, memory=True, fp8=True), eager]


def tests(tiny):
    """What pytest is to run: all that is marked gpu, from the files that have any (others may need packages that are not here)."""
    if tiny:
        return ("tests/test_layout.py", "-k", "plain_gpt")
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    return ("-m", "gpu", *(str(path.relative_to(ROOT)) for path in marked))


# ---------------------------------------------------------------------------------------------------------------------
# Running

def run_section(section, seconds, out):
    """One line of the results: {section, ok, seconds, error, result}. seconds: the most that it may take."""
    line = dict(section=section.name, ok=False, seconds=0.0, error=None, result=None)
    if seconds <= 0:
        return line | dict(error="not run: the time was over")
    print(f"\n{'-' * 100}\n{section.name}: python -m {' '.join(section.command)}", flush=True)
    begin = time.monotonic()
    with open(out / "gpu_check.txt", "a+", encoding="utf-8") as file:
        file.write(f"\n== {section.name}: python -m {' '.join(section.command)}\n")
        file.flush()
        child = subprocess.Popen([sys.executable, "-m", *section.command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL) # compilers that it started too
            child.wait()
            code = None
        file.seek(0)
        said = file.read().rpartition("\n== ")[2].splitlines()
    print("\n".join(said[-12:]), flush=True)
    line["seconds"] = round(time.monotonic() - begin, 1)
    if code != 0:
        return line | dict(error=f"longer than {seconds:.0f} s" if code is None else f"exit code {code}: {said[-1][:300]}")
    if not section.json:
        return line | dict(ok=True, result=dict(passed=True))
    try:
        return line | dict(ok=True, result=json.loads(said[-1]))
    except ValueError:
        return line | dict(error=f"its last line is not JSON: {said[-1][:300]}")


def run_all(chosen, out, minutes):
    """All sections, one after the other; returns their lines."""
    end, lines = time.monotonic() + 60 * minutes, []
    for section in chosen:
        line = run_section(section, min(section.limit, end - time.monotonic()), out)
        lines.append(line)
        with open(out / "gpu_check.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Bars

def bars(lines):
    """[(what, bar, measured, met)] from the lines of the sections; measured and met are None where something failed or was not there."""
    results = {line["section"]: line["result"] for line in lines if line["result"] is not None}
    found = []

    def bar(what, goal, value, holds, show="{:.3g}", of=()):
        try:
            got = value(*(results[name] for name in of))
        except KeyError: # of the sections: a result that lacks what it should have is not excused
            if all(name in results for name in of):
                raise
            got = None
        found.append((what, goal, "not measured" if got is None else show.format(got), None if got is None else bool(holds(got))))

    bar("d20 bf16: MFU", ">= 50%", lambda row: row["mfu"], lambda x: x >= 0.50, "{:.1%}", ["train d20 bf16"])
    for depth in (12, 20):
        bar(f"d{depth} bf16: step with memory over plain", "<= 1.25", lambda co, plain: co["step_ms"] / plain["step_ms"], lambda x: x <= 1.25, "{:.3f}",
            [f"train d{depth} bf16 memory", f"train d{depth} bf16"])
    bar("d20 fp8: tokens/s over bf16", "> 1", lambda fp8, bf16: fp8["tokens_s"] / bf16["tokens_s"], lambda x: x > 1, "{:.3f}", ["train d20 fp8", "train d20 bf16"])
    bar("the same with memory, the last stage", "> 1", lambda fp8, bf16: bf16["stages"][-1]["step_ms"] / fp8["stages"][-1]["step_ms"], lambda x: x > 1, "{:.3f}",
        ["train d20 fp8 memory", "train d20 bf16 memory"])
    bar("d12, a chat without memory: tokens/s", ">= 800", lambda row: row["tokens_s"], lambda x: x >= 800, "{:,.0f}", ["chat d12"])
    bar("d12, batch 1: tokens/s decoded", ">= 800", lambda row: next(r["tokens_s"] for r in row["rows"] if r["batch"] == 1), lambda x: x >= 800, "{:,.0f}", ["infer d12 static"])
    bar("tests on the GPU, identity among them", "pass", lambda row: row["passed"], lambda x: x, "{}", ["tests"])
    bar("FlexAttention: largest error over SDPA's", "<= 2", lambda row: row["worst"], lambda x: x <= 2, "{:.2f}", ["flex"])
    bar("d12: a session's overhead at 8k", "<= 3%", lambda row: row["overhead"], lambda x: x <= 0.03, "{:.1%}", ["runtime d12"])
    bar("d12: longest history over 8k, ms a token", "<= 1.05", lambda row: row["flatness"], lambda x: x <= 1.05, "{:.3f}", ["runtime d12"])
    return found


def main():
    args = parser.parse_args()
    if not args.tiny and pick_device_type() != "cuda":
        raise UserError("PyTorch sees no CUDA device here. --tiny runs the same small on a CPU")
    words = [word for word in args.only.split(",") if word]
    chosen = [section for section in sections(args.tiny) if not words or any(word in section.name for word in words)]
    if not chosen:
        raise UserError(f"--only {args.only}: no section has such a name. There are: {', '.join(section.name for section in sections(args.tiny))}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu_check.jsonl", "gpu_check.txt"):
        (out / name).write_text("")
    lines = run_all(chosen, out, args.minutes)
    print(f"\n{'section':<26}{'seconds':>9}  result")
    for line in lines:
        print(f"{line['section']:<26}{line['seconds']:9.1f}  {'ok' if line['ok'] and not line['error'] else line['error']}")
    print(f"\n{'bar':<44}{'goal':>9}{'measured':>14}" + ("   (small, on a CPU: these say nothing of a GPU)" if args.tiny else ""))
    for what, goal, measured, met in bars(lines):
        print(f"{what:<44}{goal:>9}{measured:>14}  {'' if met is None else 'met' if met else 'MISSED'}")
    if not all(line["ok"] for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
