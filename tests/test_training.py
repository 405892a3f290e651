"""The training scripts as a user runs them, tiny: two processes give one process's losses, and a killed run goes on as if nothing happened."""
import importlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint, hardware
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from scripts import stage
from scripts.load import load_stage, newest_tag
from scripts.stage import same_flags
from tests.tiny import tiny_networks
from tests.tiny_run import make_run, make_text

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--depth", "1", "--lr", "0.05", "--max-seq-len", "128", "--batch-tokens", "1024", "--num-steps", "6", "--eval-tokens", "1024", "--save-every", "3", "--log-every", "1", "--device", "cpu", "--dtype", "fp32"]
SAME = 1e-5 # nats or bits: losses that differ in the order of their sums only


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
    """In fp32 only the order of sums differs, some 1e-6 here. Within 2e-2, and in bf16 on some CPUs, the test passed where ranks exchanged no gradients at all."""
    out = base_train(place, "one", "--device-batch", "8")
    losses, summary = curve(place, "one")
    assert out.splitlines()[-1].startswith("summary stage=base") and sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1]
    assert "attention   SDPA: no CUDA device" in out.splitlines() and "            for rows with gists SDPA with masks: no CUDA device" in out.splitlines()

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    base_train(place, "two", "--device-batch", "4", launch=torchrun)
    dealt, dealt_summary = curve(place, "two")
    for step in losses:
        assert dealt[step] == pytest.approx(losses[step], abs=SAME), f"step {step}"
    assert dealt_summary["val_bpb"] == pytest.approx(summary["val_bpb"], abs=SAME)

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
        assert [dealt[step] for step in steps] == pytest.approx([losses[step] for step in steps], abs=SAME), tag
        assert dealt_summary["val_bpb"] == pytest.approx(summary["val_bpb"], abs=SAME), tag


def in_process(monkeypatch, place, script, *flags):
    """A script's main() here, which saves the start of a process."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place[0]))
    monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
    importlib.import_module(f"scripts.{script}").main()


def test_a_later_stage_that_is_resumed_is_the_uninterrupted_one_bit_for_bit(base, tmp_path, monkeypatch):
    """Mid-training, then fine-tuning on what it left: losses, gradients, and in the end all weights and the optimizer's state. The steps after the kill are a plain round and one with gists."""
    make_run("base")
    flags = ["--source", make_text(tmp_path / "text"), "--num-steps", "4", "--max-seq-len", "512", "--batch-tokens", "4096", "--device-batch", "4", "--eval-tokens", "2048", "--save-every", "2",
             "--log-every", "1", "--device", "cpu"]
    for script, folder, begin in (("mid_train", base / "mid_checkpoints", ["--base-tag", "t"]), ("chat_sft", base / "sft_checkpoints", ["--mid-tag", "t"])):
        in_process(monkeypatch, (base, None), script, *flags, *begin)
        shutil.copytree(folder / "t" / "step_000002", folder / "killed" / "step_000002")
        in_process(monkeypatch, (base, None), script, *flags, *begin, "--tag", "killed", "--resume")
        logs = [[json.loads(line) for line in (folder / tag / "log.jsonl").read_text().splitlines()] for tag in ("t", "killed")]
        whole, resumed = ({line["step"]: (line["loss"], line["grad_norm"]) for line in log if "loss" in line} for log in logs)
        assert sorted(whole) == [1, 2, 3, 4] and resumed == {step: whole[step] for step in (3, 4)}
        assert logs[0][-1]["summary"]["val_bpb"] == logs[1][-1]["summary"]["val_bpb"]
        ends = [checkpoint.load(folder / tag) for tag in ("t", "killed")]
        for one, other in zip(*([*end.tensors.values(), end.optimizer] for end in ends), strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_takes_as_many_rows_as_before_whatever_memory_is_free_now(place, monkeypatch, capsys):
    """Rows followed free memory at the moment of each start: a resumed run could take others without a word, which adds up the same numbers in another order."""
    flags, folder = [*TINY, "--plain", "--source", f"dir:{place[1]}"], place[0] / "base_checkpoints"

    def train(tag, fit, *more):
        monkeypatch.setattr(stage.hardware, "device_rows", lambda *_: (fit, f"{fit} fit"))
        in_process(monkeypatch, place, "base_train", *flags, "--tag", tag, *more)
        out = capsys.readouterr().out.splitlines()
        [memory], [plan] = ([line.split(None, 1)[1] for line in out if line.startswith(word)] for word in ("memory ", "plan "))
        return memory, plan.split("; ")[1].split(" x 128")[0]

    def resume(tag, fit, *more, **changed):
        shutil.copytree(folder / "rows" / "step_000003", folder / tag / "step_000003")
        path = folder / tag / "step_000003" / "meta.json"
        path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | changed).items() if value is not None}))
        return train(tag, fit, "--resume", *more)
    assert train("rows", 2) == ("2 fit", "4 x 2 rows")
    assert resume("rows-more", 8) == ("2 rows per device, as before; 8 fit", "4 x 2 rows")
    assert curve(place, "rows-more")[0] == {step: loss for step, loss in curve(place, "rows")[0].items() if step > 3}, "bit for bit"
    assert resume("rows-fewer", 1) == ("1 fit; it was 2 rows before, so losses are the same to rounding only", "8 x 1 rows")
    assert resume("rows-world", 8, world=4) == resume("rows-old", 8, world=None, rows=None) == ("8 fit", "1 x 8 rows")
    assert curve(place, "rows-world")[0] == pytest.approx(curve(place, "rows-more")[0], rel=1e-5), "other rows at a time add up the same numbers, on some processors in the same order"
    assert resume("rows-asked", 1, "--device-batch", "4")[1] == "2 x 4 rows"


def test_a_new_run_under_an_old_tag_sets_the_old_one_aside(place, monkeypatch, capsys):
    """
    A shorter second run under the tag of a longer one ended well, with its own checkpoints deleted, those of the old run in their place, and both in one log: the next
    stage took the old model.
    """
    flags = [*TINY, "--plain", "--source", f"dir:{place[1]}", "--tag", "twice", "--save-every", "2"]
    folder = place[0] / "base_checkpoints" / "twice"
    found = lambda folder: sorted(path.name for path in folder.glob("step_*"))
    in_process(monkeypatch, place, "base_train", *flags)
    assert "set aside" not in capsys.readouterr().out
    in_process(monkeypatch, place, "base_train", *flags, "--num-steps", "3")
    [aside] = folder.parent.glob("twice.before-*")
    assert found(folder) == ["step_000002", "step_000003"] and found(aside) == ["step_000004", "step_000006"]
    assert f"set aside   {folder} of an earlier run, now {aside.name}" in capsys.readouterr().out.splitlines()
    assert sorted(curve(place, "twice")[0]) == [1, 2, 3] and sorted(curve(place, aside.name)[0]) == [1, 2, 3, 4, 5, 6]
    os.utime(aside / "step_000006", (2e9, 2e9))
    assert newest_tag("base") != aside.name, "what was set aside is not what a next stage begins with"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_pinned_where_a_gpu_takes_them(place, monkeypatch, device):
    """The loader could pin and nobody asked it to: every copy to the GPU was from memory that can be moved, and waited."""
    pins = []

    def watched(make):
        return lambda *args, **settings: pins.append(settings.get("pin")) or make(*args, **settings)
    for name in ("Loader", "val_loader"):
        monkeypatch.setattr(stage, name, watched(getattr(stage, name)))
    in_process(monkeypatch, place, "base_train", *TINY, "--plain", "--source", f"dir:{place[1]}", "--tag", f"pin-{device}", "--num-steps", "1", "--device", device, "--no-compile")
    assert pins == [device == "cuda"] * 2


@pytest.mark.parametrize("keep, steps", [(("--keep", "1"), [3]), ((), [2, 3]), (("--keep", "-1"), [1, 2, 3])])
def test_as_many_checkpoints_stay_as_asked(place, monkeypatch, keep, steps):
    """Two, always: a curve over a run, or its best step, could not be had afterwards."""
    tag = "keep" + "".join(keep)
    in_process(monkeypatch, place, "base_train", *TINY, "--plain", "--source", f"dir:{place[1]}", "--tag", tag, "--num-steps", "3", "--save-every", "1", *keep)
    assert checkpoint.steps(place[0] / "base_checkpoints" / tag) == steps


@pytest.mark.parametrize("script, flag, value", [
    *(("base_train", flag, value) for flag, values in {
        "--lr": ("0", "-1", "nan", "inf"), "--log-every": "0", "--seed": ("-1", str(2**63)), "--num-tokens": ("0", "-2"), "--num-steps": "0", "--device-batch": ("0", "-2"),
        "--batch-tokens": "0", "--eval-every": "0", "--save-every": "0", "--keep": ("0", "-2"), "--eval-tokens": "0", "--max-seq-len": ("0", "100"), "--plain-every": "1", "--labels-every": "0", "--asked": ("-0.5", "2"), "--opens": ("-1",)}.items() for value in values),
    ("mid_train", "--lr", "0"), ("mid_train", "--documents", "2"), ("chat_sft", "--lr", "-1"), ("chat_sft", "--num-steps", "0"),
    *(("chat_rl", flag, value) for flag, values in {
        "--lr": ("0", "-1"), "--top-k": ("0", "-2"), "--temperature": ("-1", "0", "nan"), "--digits": "0", "--num-steps": "0", "--device-batch": "0", "--keep": ("0", "-2"), "--seed": ("-1",)}.items() for value in values)])
def test_a_number_that_nobody_can_mean_is_one_line(base, monkeypatch, script, flag, value):
    """Some ended in a traceback, some were taken for -1, "you decide", and --lr -1 trained uphill to the end."""
    with pytest.raises(UserError, match=f"^{flag} {float(value) if flag in ('--lr', '--temperature', '--documents', '--asked') else value}: expected "):
        in_process(monkeypatch, (base, None), script, flag, value, "--device", "cpu")


def no_memory(*args, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("module, name", [(GPT, "to"), (stage, "make_optimizer"), (stage, "pick_attention")])
def test_what_does_not_fit_before_the_first_step_is_told_in_a_line(place, monkeypatch, module, name):
    """The first to run out of memory is often the copy of the weights to the GPU; the optimizer, twice as large, ended in a traceback."""
    monkeypatch.setattr(module, name, no_memory)
    with pytest.raises(UserError, match="memory ran out while the device took the networks and their optimizer, before any step.*--depth"):
        in_process(monkeypatch, place, "base_train", *TINY, "--plain", "--source", f"dir:{place[1]}", "--tag", "no")


def test_a_checkpoint_that_does_not_fit_is_told_in_a_line(place, monkeypatch):
    """Of this run with --resume, or of the stage before, whose optimizer the next one begins with."""
    flags = ["--plain", "--source", f"dir:{place[1]}", "--tag", "fits", "--num-steps", "1"]
    in_process(monkeypatch, place, "base_train", *TINY, *flags)
    monkeypatch.setattr(MuonAdamW, "load_state_dict", no_memory)
    with pytest.raises(UserError, match="memory ran out while the last checkpoint was read, which stays as it is.*--depth"):
        in_process(monkeypatch, place, "base_train", *TINY, *flags, "--resume")
    with pytest.raises(UserError, match="memory ran out while the optimizer of the stage before was read, before any step.*--depth"):
        in_process(monkeypatch, place, "mid_train", "--base-tag", "fits", *flags[1:], "--documents", "1", "--max-seq-len", "512", "--eval-tokens", "1024", "--device", "cpu")


def test_a_validation_that_is_still_owed_tells_of_memory_too(place, monkeypatch):
    """Killed in its last validation, a run that goes on has nothing left to do but that."""
    flags = [*TINY, "--plain", "--source", f"dir:{place[1]}", "--tag", "owed", "--num-steps", "1"]
    in_process(monkeypatch, place, "base_train", *flags)
    monkeypatch.setattr(stage, "bits_per_byte", lambda *_: torch.empty(2**58))
    with pytest.raises(UserError, match="memory ran out in the validation; the checkpoint of step 1 is kept"):
        in_process(monkeypatch, place, "base_train", *flags, "--resume")


def test_a_checkpoint_of_another_run_is_refused(place):
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", "one", "--seed", "7", "--resume"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "seed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("flag, value", [("--lr", "0.1"), ("--curriculum", "16:0.5,32:1"), ("--plain-every", "2"), ("--labels-every", "4"), ("--asked", "1"), ("--opens", "3"), ("--seed", "7")])
def test_a_run_goes_on_with_the_flags_it_was_begun_with(place, monkeypatch, flag, value):
    """Another curriculum, or another share of plain rows, went on without a word, and made neither the one run nor the other."""
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    with pytest.raises(UserError, match=rf"{flag.strip('-').replace('-', '_')}: the checkpoint has .*, this run has '?{value}"):
        in_process(monkeypatch, place, "base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", "one", "--resume", flag, value)


def test_a_run_from_before_there_was_a_flag_goes_on_as_it_was_begun(place, monkeypatch):
    """Every run opened two in half of its rows; one that says nothing of it was refused to those who go on so."""
    flags = [*TINY, "--source", f"dir:{place[1]}", "--tag", "older"]
    in_process(monkeypatch, place, "base_train", *flags)
    load = checkpoint.load

    def older(*args, **kwargs):
        saved = load(*args, **kwargs)
        assert [saved.meta["args"].pop(flag) for flag in ("asked", "opens")] == [0.5, 2]
        return saved

    monkeypatch.setattr(checkpoint, "load", older)
    in_process(monkeypatch, place, "base_train", *flags, "--resume")
    with pytest.raises(UserError, match="opens: the checkpoint has 2, this run has 3"):
        in_process(monkeypatch, place, "base_train", *flags, "--resume", "--opens", "3")


def test_flags_reach_the_objective_and_mid_training_opens_as_sessions_do():
    gpt, gistnet, lensnet = tiny_networks()
    options = lambda *flags: stage.co_training(gpt, gistnet, lensnet, importlib.import_module("scripts.mid_train").parser.parse_args(flags), hardware.describe(gpt.device), torch.float32).options
    told = options()
    assert (told.asked, told.opens, told.reconstruct_every, told.plain_every, told.labels_every) == (1.0, 5, 8, 2, 2)
    told = options("--asked", "0.25", "--opens", "7", "--reconstruct-every", "3", "--plain-every", "4", "--labels-every", "6", "--seed", "9", "--curriculum", "16:0.5,32:1")
    assert (told.asked, told.opens, told.reconstruct_every, told.plain_every, told.labels_every, told.seed, told.curriculum) == (0.25, 7, 3, 4, 6, 9, ((16, 0.5), (32, 1.0)))


def test_a_later_stage_goes_on_with_its_own_rates_and_shares(place, monkeypatch):
    """Its checkpoint told the base run's rates, which --lr multiplies, and nothing of --documents or --fp8."""
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    flags = ["--base-tag", "one", "--tag", "later", "--source", f"dir:{place[1]}", "--documents", "1", "--num-steps", "1", "--max-seq-len", "512", "--eval-tokens", "1024", "--device", "cpu"]
    in_process(monkeypatch, place, "mid_train", *flags)
    for flag, value in (("--lr", "0.25"), ("--documents", "0.9")):
        with pytest.raises(UserError, match=f"{flag[2:]}: the checkpoint has .*, this run has {value}"):
            in_process(monkeypatch, place, "mid_train", *flags, "--resume", flag, value)
    assert same_flags(Namespace(lr=1, fp8=True, plain=True, curriculum="32:1")) == dict(lr=1, fp8=True), "a plain run has no curriculum"


def test_the_summary_and_the_log_hold_what_a_run_is_judged_by(place):
    """
    Per step: loss, tokens/s, MFU, gradient norm, skipped steps, memory; per validation val_bpb; at the end all of it, and FLOPs. No peak of a CPU is known: its MFU was
    left out of line and JSON alike, and "memory=1" said that there were gists, beside peak_mb, which is the memory.
    """
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    lines = [json.loads(line) for line in (place[0] / "base_checkpoints" / "one" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "lr", "dt", "tokens_per_s", "mfu", "grad_norm", "skipped", "peak_mb"} <= lines[0].keys()
    assert lines[-2].keys() == {"step", "val_bpb"}
    summary = lines[-1]["summary"]
    assert {"val_bpb", "tokens_per_s", "train_s", "flops", "peak_mb", "params", "tokens", "steps", "skipped_steps", "seed"} <= summary.keys() and "memory" not in summary
    assert summary["mfu"] is None and summary["gists"] == 1
    assert summary["flops"] > 6 * summary["tokens"] * 1e5 and summary["skipped_steps"] == 0


def test_checkpointed_activations_change_no_loss_and_rows_are_explained(place):
    """Co-training, layers computed again in backward: bit for bit the run that keeps them. --device-batch is worked out, and said."""
    if not (place[0] / "base_checkpoints" / "one").exists():
        base_train(place, "one", "--device-batch", "8")
    out = base_train(place, "again", "--checkpoint-activations")
    assert curve(place, "again")[0] == curve(place, "one")[0]
    told = next(line for line in out.splitlines() if line.startswith("memory "))
    assert "up to 64 rows x 128 tokens" in told and "GiB usable, layers computed again in backward; logits of 6553 tokens at a time" in told


NO_MEMORY = """
import runpy, sys
import torch
from megacontext.losses import CoTraining
real, calls = CoTraining.forward, []
def forward(self, batch):
    calls.append(1)
    if len(calls) == 5:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return real(self, batch)
CoTraining.forward = forward
sys.argv = ["base_train", *{flags!r}]
runpy.run_module("scripts.base_train", run_name="__main__")
"""


def test_out_of_memory_ends_in_a_line_and_the_run_goes_on_with_fewer_rows(place):
    """Memory that runs out in step 5: exit 2, the flags to lower, the checkpoint of step 3 there; the same run ends with --device-batch 4 --resume."""
    flags = [*TINY, "--source", f"dir:{place[1]}", "--tag", "full", "--device-batch", "8"]
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", NO_MEMORY.format(flags=flags)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "memory ran out in step 5; the checkpoint of step 3 is kept. Lower --device-batch" in done.stderr
    assert sorted(path.name for path in (place[0] / "base_checkpoints" / "full").glob("step_*")) == ["step_000003"]
    base_train(place, "full", "--device-batch", "4", "--resume")
    assert curve(place, "full")[1]["steps"] == 6


@pytest.mark.parametrize("flags, says", [(["--fp8"], "8.9"), (["--dtype", "fp16"], "needs a GPU")])
def test_formats_that_this_machine_lacks_are_refused(place, flags, says):
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", "no", *flags],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


FP16 = """
import runpy, sys
import torch
from nanochat import hardware
from nanochat.train import LossScale
hardware.pick_dtype = lambda machine, asked: (torch.float16, "a CPU that can, slowly")
LossScale.GOOD_STEPS = 4
sys.argv = ["base_train", *{flags!r}]
try:
    runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as end:
    assert not end.code
"""


def test_a_resumed_fp16_run_has_the_scale_it_had(place):
    """The scale doubles at step 4. Resumed from step 3, it does so at step 4 too, and the losses are the same bit for bit."""
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    folder, lines = place[0] / "base_checkpoints", {}
    for tag, more in (("half", []), ("half2", ["--resume"])):
        flags = [*TINY, "--source", f"dir:{place[1]}", "--tag", tag, "--device-batch", "8", *more]
        done = subprocess.run([sys.executable, "-c", FP16.format(flags=flags)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        log = [json.loads(line) for line in (folder / tag / "log.jsonl").read_text().splitlines()]
        lines[tag] = {line["step"]: (line["loss"], line["grad_norm"], line["loss_scale"]) for line in log if "loss" in line}
        assert log[-1]["summary"]["skipped_steps"] == 0, "LensNet divided 0 by 0 in fp16"
        if tag == "half":
            (folder / "half2").mkdir()
            shutil.copytree(folder / "half" / "step_000003", folder / "half2" / "step_000003")
    assert [scale for _, _, scale in lines["half"].values()] == [2.0**16] * 3 + [2.0**17] * 3
    assert lines["half2"] == {step: line for step, line in lines["half"].items() if step > 3}


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


def test_the_shares_of_plain_and_of_labelled_rows_are_flags_of_every_stage(place):
    """Every second round is plain where looking up is learnt, and a quarter to a half of all rounds are labelled; a share that leaves no row to the gists is refused before anything is built."""
    stages = [importlib.import_module(f"scripts.{name}").parser for name in ("base_train", "mid_train", "chat_sft")]
    assert [[parser.get_default(flag) for parser in stages] for flag in ("plain_every", "labels_every")] == [[4, 2, 2], [2, 2, 4]]
    plain, labelled = {}, {}
    for every in ("2", "4"):
        run(place, "scripts.base_train", *TINY, "--source", f"dir:{place[1]}", "--tag", f"every{every}", "--plain-every", every, "--labels-every", every, "--curriculum", "32:1")
        lines = [json.loads(line) for line in (place[0] / "base_checkpoints" / f"every{every}" / "log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line] # a step is a round of eight rows
        plain[every] = [n for n, line in enumerate(steps) if "loss_plain" in line]
        labelled[every] = [n for n, line in enumerate(steps) if "lens_loss" in line]
        assert all("loss_gist" in line for n, line in enumerate(steps) if n not in plain[every])
    assert plain == {"2": [0, 2, 4], "4": [0, 4]} and labelled == {"2": [1, 3, 5], "4": [1, 5]}
    env = dict(os.environ, NANOCHAT_BASE_DIR=str(place[0]), OMP_NUM_THREADS="1")
    for flag in ("--plain-every", "--labels-every"):
        done = subprocess.run([sys.executable, "-m", "scripts.base_train", *TINY, flag, "1"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and f"{flag} 1: expected at least 2" in done.stderr and "Traceback" not in done.stderr


def test_a_frozen_base_is_left_as_it_is_while_its_memory_learns(place, monkeypatch):
    """Of a base that was trained without a memory; what the two networks learn is told as ever. With --lora the base learns beside its weights, and is loaded as one that has learnt."""
    base_train(place, "bare", "--plain", "--max-seq-len", "512")
    stage = ["--source", f"dir:{place[1]}", "--num-steps", "6", "--max-seq-len", "512", "--batch-tokens", "4096", "--device-batch", "8", "--eval-tokens", "1024", "--save-every", "1", "--log-every", "1", "--device", "cpu"]
    base = checkpoint.load(place[0] / "base_checkpoints" / "bare").tensors
    differ = lambda one, other, name: {key for key in one[name] if not one[name][key].equal(other[name][key])}
    for tag, lora in (("frozen", []), ("adapted", ["--lora", "2"])):
        run(place, "scripts.mid_train", "--base-tag", "bare", "--tag", tag, "--freeze-base", *lora, "--documents", "1", *stage)
        first, last = (checkpoint.load(place[0] / "mid_checkpoints" / tag, step).tensors for step in (5, 6))
        assert base.keys() == {"gpt"} and not differ(base, last, "gpt") and differ(first, last, "gistnet")
        assert last["lensnet"]["score.weight"].any() # it starts at zero
        lines = [json.loads(line) for line in (place[0] / "mid_checkpoints" / tag / "log.jsonl").read_text().splitlines()]
        read = ["gist" if "loss_gist" in line else "plain" for line in lines if "loss" in line] # a step is a round of eight rows
        assert read == (["plain", "gist"] * 3 if lora else ["gist"] * 6) and any("lens_loss" in line for line in lines)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place[0]))
    loaded = load_stage("mid", "adapted").gpt.state_dict()
    assert loaded.keys() == base["gpt"].keys() and {name.split(".")[-2] for name in differ(dict(gpt=loaded), base, "gpt")} == {"q", "k", "v", "out", "up", "down"}
    run(place, "scripts.chat_sft", "--mid-tag", "adapted", "--tag", "adapted", *stage)


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
