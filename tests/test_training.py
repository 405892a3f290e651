"""The training scripts as a user runs them, tiny: two processes give one process's losses, and a killed run goes on as if nothing happened."""
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--depth", "1", "--max-seq-len", "128", "--batch-tokens", "1024", "--num-steps", "6", "--eval-tokens", "1024", "--save-every", "3", "--log-every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base folder with a tokenizer and a few files of text."""
    from nanochat.tokenizer import Tokenizer
    base, text = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("text")
    for i in range(12):
        lines = (f"line {n} of file {i}: the sum of {n} and {i} is {n + i}.\n" for n in range(40 + 10 * i))
        (text / f"{i}.txt").write_text("".join(lines))
    Tokenizer.train((path.read_text() for path in sorted(text.glob("*.txt"))), 320).save(base / "tokenizer")
    return base, text


def run(place, *command, launch=()):
    """A script in a process of its own; returns what it printed."""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *launch, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def base_train(place, tag, *more, launch=()):
    return run(place, "scripts.base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", tag, *more, launch=launch)


def curve(place, tag):
    """{step: loss}, and the summary, of a run's log."""
    lines = [json.loads(line) for line in (place[0] / "base_checkpoints" / tag / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return losses, next(line["summary"] for line in lines if "summary" in line)


def test_two_processes_and_a_resumed_one_give_the_losses_of_one(place):
    out = base_train(place, "one", "--device-batch", "8")
    losses, summary = curve(place, "one")
    assert out.splitlines()[-1].startswith("summary stage=base") and sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    assert "attention   SDPA: no CUDA device" in out.splitlines() and "            for rows with gists SDPA with a dense mask: no CUDA device" in out.splitlines()

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    base_train(place, "two", "--device-batch", "4", launch=torchrun)
    dealt, dealt_summary = curve(place, "two")
    for step in losses:
        assert dealt[step] == pytest.approx(losses[step], abs=2e-2), f"step {step}"
    assert dealt_summary["val_bpb"] == pytest.approx(summary["val_bpb"], abs=2e-2)

    folder = place[0] / "base_checkpoints"
    (folder / "killed").mkdir()
    shutil.copytree(folder / "one" / "step_000003", folder / "killed" / "step_000003") # what a kill after step 3 leaves
    base_train(place, "killed", "--device-batch", "8", "--resume")
    resumed, resumed_summary = curve(place, "killed")
    assert resumed == {step: loss for step, loss in losses.items() if step > 3}, "bit for bit"
    assert resumed_summary["val_bpb"] == summary["val_bpb"]


@pytest.mark.slow
def test_four_processes_and_a_run_that_goes_on_with_another_number_give_the_losses_of_one(place):
    folder = place[0] / "base_checkpoints"
    torchrun = lambda n: ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")
    if not (folder / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    losses, summary = curve(place, "one")
    base_train(place, "four", "--device-batch", "2", launch=torchrun(4))
    for number, before in ((2, "one"), (1, "four"), (4, "one")):
        tag = f"{before}-then-{number}"
        shutil.copytree(folder / before / "step_000003", folder / tag / "step_000003")
        base_train(place, tag, "--device-batch", str(8 // number), "--resume", launch=torchrun(number) if number > 1 else ())
    for tag, steps in (("four", range(1, 7)), ("one-then-2", range(4, 7)), ("four-then-1", range(4, 7)), ("one-then-4", range(4, 7))):
        dealt, dealt_summary = curve(place, tag)
        assert sorted(dealt) == list(steps), tag
        assert [dealt[step] for step in steps] == pytest.approx([losses[step] for step in steps], abs=2e-2), tag
        assert dealt_summary["val_bpb"] == pytest.approx(summary["val_bpb"], abs=2e-2), tag


def test_a_checkpoint_of_another_run_is_refused(place):
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", "one", "--seed", "7", "--resume"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr


def test_the_data_folder_by_flag_and_what_was_left_out(place):
    """--data-dir was known to the download only: what it had fetched elsewhere, no other script found. What is no text is told at the start."""
    (place[1] / "notes.json").write_text("{}")
    out = run(place, "scripts.base_train", *TINY, "--source", f"dir:{place[1].name}", "--data-dir", str(place[1].parent), "--tag", "flag", "--plain", "--num-steps", "1")
    assert f"text        dir:{place[1].name}: left out: 1 file of other kinds (.json 1)" in out.splitlines()
    (place[1] / "notes.json").unlink()


def test_short_windows_by_flag(place):
    """A row of 256 tokens has a window of 128. What computes attention, and why, is told at the start; with memory the flag is refused."""
    out = run(place, "scripts.base_train", *TINY, "--depth", "2", "--max-seq-len", "256", "--source", f"dir:{place[1]}", "--tag", "short", "--num-steps", "1", "--plain", "--windows", "SL")
    assert "attention   SDPA: no CUDA device; windows SL, S = 128 tokens" in out.splitlines()
    assert json.loads((place[0] / "base_checkpoints" / "short" / "step_000001" / "meta.json").read_text())["networks"]["gpt"]["short_window"] == 128
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--depth", "2", "--source", f"dir:{place[1]}", "--windows", "SL"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--plain" in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_a_script_that_opens_text_takes_a_data_folder(name):
    flags = getattr(getattr(importlib.import_module(f"scripts.{name}"), "parser", None), "_option_string_actions", {})
    if "--source" in flags:
        source = (ROOT / "scripts" / f"{name}.py").read_text()
        assert "--data-dir" in flags and ("use_data_dir(args.data_dir)" in source or "start(args)" in source)


def test_without_the_memory_package_the_plain_model_trains_and_talks(place):
    """nanochat stands alone: with megacontext/ deleted (here: impossible to import), a plain run ends, loads and answers."""
    program = f"""
import runpy, sys
sys.modules["megacontext"] = None
sys.argv = ["base_train", *{TINY!r}, "--source", "dir:{place[1]}", "--tag", "alone", "--plain"]
try:
    runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as end:
    assert not end.code
from scripts.load import load_stage, open_stream
loaded = load_stage("base", "alone")
print("logits", tuple(open_stream(loaded, memory=False).feed([loaded.tokenizer.bos]).shape))
"""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logits (320,)" in done.stdout
