"""Laws of checkpoints: what comes back is what was saved, a kill at any instant costs at most the save under way."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.optim import make_optimizer


def small():
    return nn.Linear(3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Round trip

def train(gpt, optimizer, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 61, (2, 17), generator=g)
        gpt(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tiny_gpt, tmp_path):
    gpt, extra = tiny_gpt(), small()
    optimizer = make_optimizer(gpt, {"gistnet": extra})
    train(gpt, optimizer, range(4))
    checkpoint.save(tmp_path, 4, {"gpt": gpt, "gistnet": extra}, optimizer, {"config": gpt.config.to_dict()})
    train(gpt, optimizer, range(4, 8))

    found = checkpoint.load(tmp_path)
    checkpoint.check_match(found.meta, config=gpt.config.to_dict())
    again, extra_again = tiny_gpt(seed=9), small()
    again.load_state_dict(found.tensors["gpt"])
    extra_again.load_state_dict(found.tensors["gistnet"])
    resumed = make_optimizer(again, {"gistnet": extra_again})
    resumed.load_state_dict(found.optimizer)
    train(again, resumed, range(found.step, 8))
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), again.parameters()))


def test_generators_go_on_where_they_stopped():
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(1).item())
    random.gauss(0, 1), np.random.randn()  # leaves half a pair of normals cached: part of the state
    state = json.loads(json.dumps(checkpoint.rng_state()))
    first = draw()
    draw()
    checkpoint.set_rng_state(state)
    assert draw() == first


def test_only_what_is_asked_for_is_read(tiny_gpt, tmp_path):
    gpt = tiny_gpt()
    checkpoint.save(tmp_path, 1, {"gpt": gpt, "gistnet": small()}, make_optimizer(gpt))
    found = checkpoint.load(tmp_path, optimizer=False, modules=["gistnet"])
    assert list(found.tensors) == ["gistnet"] and found.optimizer is None
    assert checkpoint.shapes(tmp_path, "gistnet") == {"weight": (2, 3), "bias": (2,)}
    with pytest.raises(UserError, match="no lensnet: it holds gistnet, gpt|no lensnet: it holds gpt, gistnet"):
        checkpoint.load(tmp_path, modules=["lensnet"])


def test_tied_and_strided_weights_are_saved_as_they_look(tmp_path):
    module = nn.Module()
    module.a = nn.Parameter(torch.randn(4, 3))
    module.b = module.a
    module.register_buffer("c", torch.randn(5, 2).T)
    checkpoint.save(tmp_path, 1, {"m": module})
    tensors = checkpoint.load(tmp_path).tensors["m"]
    assert all(torch.equal(tensors[k], v) for k, v in module.state_dict().items()) and len(tensors) == 3


def test_no_pickle_anywhere(tiny_gpt, tmp_path):
    gpt = tiny_gpt()
    path = checkpoint.save(tmp_path, 1, {"gpt": gpt}, make_optimizer(gpt))
    assert sorted(p.name for p in path.iterdir()) == ["gpt.safetensors", "meta.json", "optim.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint

def test_keep_and_last(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):  # longer than six digits: sorted as numbers, not as names
        checkpoint.save(tmp_path, step, {"m": small()}, keep=2)
    assert checkpoint.steps(tmp_path) == [999_999, 1_000_000]
    assert checkpoint.load(tmp_path).step == 1_000_000
    assert checkpoint.load(tmp_path, 999_999).step == 999_999
    with pytest.raises(UserError, match="it has 999999, 1000000"):
        checkpoint.load(tmp_path, 5)


def test_what_was_just_saved_stays_whatever_lay_there_before(tmp_path):
    """The highest step numbers were kept: a shorter run over an older one's folder deleted its own checkpoints as it saved them, and left the old model in place."""
    for step in (15, 20, 4, 8):
        checkpoint.save(tmp_path, step, {"m": small()}, keep=2)
        assert step in checkpoint.steps(tmp_path)
    assert checkpoint.steps(tmp_path) == [8, 20]
    checkpoint.save(tmp_path, 3, {"m": small()}, keep=1)
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.save(tmp_path, 5, {"m": small()}, keep=4) # fewer than are kept
    assert checkpoint.steps(tmp_path) == [3, 5]


def test_an_empty_place_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "tmp_step_000003").mkdir()
    (tmp_path / "step_12").mkdir()  # not a name that we write
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.load(tmp_path)


def test_the_same_step_can_be_saved_again(tmp_path):
    first, second = small(), small()
    checkpoint.save(tmp_path, 7, {"m": first})
    checkpoint.save(tmp_path, 7, {"m": second})
    assert torch.equal(checkpoint.load(tmp_path).tensors["m"]["weight"], second.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000007"]


def test_only_the_main_rank_writes(tmp_path):
    checkpoint.save(tmp_path, 7, {"m": small()}, main=False)
    assert list(tmp_path.iterdir()) == []


def test_on_windows_files_are_flushed_by_handles_that_may_write_and_folders_not_at_all(tmp_path, monkeypatch):
    """There a folder cannot be opened, nor a handle flushed that only reads: no checkpoint could be saved."""
    windows, flags, flushed = types.ModuleType("os"), {}, []

    def open_file(path, how):
        if path.is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        fd = os.open(path, how)
        flags[fd] = path.name, how
        return fd

    def fsync(fd):
        name, how = flags[fd]
        if not how & os.O_RDWR:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flushed.append(name)
    vars(windows).update(vars(os) | dict(name="nt", open=open_file, fsync=fsync))
    monkeypatch.setattr(checkpoint, "os", windows)
    path = checkpoint.save(tmp_path, 7, {"m": small()})
    assert sorted(flushed) == sorted(file.name for file in path.iterdir()) == ["m.safetensors", "meta.json"]
    assert checkpoint.load(tmp_path).step == 7


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

def test_a_mismatch_names_what_differs():
    meta = {"config": {"width": 256, "layers": 4}, "tokenizer": "abc", "shape": [1, 2]}
    checkpoint.check_match(meta, config={"width": 256, "layers": 4}, tokenizer="abc", shape=(1, 2))
    with pytest.raises(UserError) as error:
        checkpoint.check_match(meta, config={"width": 512, "layers": 4, "extra": 1}, tokenizer="xyz")
    text = str(error.value)
    assert "config.width: the checkpoint has 256, this run has 512" in text and "config.extra" in text
    assert "tokenizer" in text and "layers" not in text


@pytest.mark.parametrize("harm", ["truncate", "remove", "format", "json"])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm):
    path = checkpoint.save(tmp_path, 1, {"m": small()})
    weights, meta = path / "m.safetensors", path / "meta.json"
    if harm == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    if harm == "remove":
        weights.unlink()
    if harm == "format":
        meta.write_text(meta.read_text().replace('"format": 1', '"format": 0'))
    if harm == "json":
        meta.write_text(meta.read_text()[:20])
    with pytest.raises(UserError, match="damaged|format|not a checkpoint"):
        checkpoint.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks

@pytest.mark.parametrize("where", ["weights", "meta", "flush"])
def test_a_full_disk_is_one_line_and_nothing_half_stays(tmp_path, monkeypatch, where):
    """It ended in a traceback, and what had been written of the step stayed on the full disk. Weights: a file may really grow no further."""
    resource = pytest.importorskip("resource")
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def save(step, fails):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with monkeypatch.context() as patch:
            if fails and where == "weights":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
            elif fails:
                patch.setattr(*((Path, "write_text") if where == "meta" else (os, "fsync")), full)
            try:
                checkpoint.save(tmp_path, step, {"gistnet": small(), "gpt": nn.Linear(256, 256)}, keep=2)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = "File too large" if where == "weights" else "No space left on device"
    with pytest.raises(UserError, match=f"^step 2 could not be saved in {tmp_path} \\(.*{told}.*\\); there is no checkpoint before it. Make room there, and go on with --resume$"):
        save(2, True)
    assert list(tmp_path.iterdir()) == []
    save(2, False)
    save(4, False)
    for step in (6, 4): # 4: over itself
        with pytest.raises(UserError, match=f"^step {step} could not be saved .*; the last complete checkpoint, step 4, is kept. Make room"):
            save(step, True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000004"]
        assert checkpoint.load(tmp_path, 2).step == 2 and checkpoint.load(tmp_path).step == 4
    save(6, False)
    assert checkpoint.steps(tmp_path) == [4, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Kills

WRITER = """
import sys, torch
sys.path.insert(0, {root!r})
from nanochat import checkpoint
torch.set_num_threads(1)
modules = {{name: torch.nn.Linear(64, 64) for name in ("gpt", "gistnet")}}
class Optimizer:
    def state_dict(self): return {{"m": modules["gpt"].weight.detach().clone()}}
checkpoint.git_commit = lambda: None  # a process of its own: not what is tested, and slow
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    for module in modules.values():
        torch.nn.init.constant_(module.weight, step)
    checkpoint.save(sys.argv[1], step, modules, Optimizer(), dict(value=step), keep=2)
    checkpoint.save(sys.argv[1], step, modules, Optimizer(), dict(value=step), keep=2)  # and over itself
    print(step, flush=True)
    step += 1
"""


def test_a_kill_at_any_instant_leaves_the_last_complete_checkpoint(tmp_path):
    """
    A writer that saves without pause is killed (SIGKILL, nothing can be tidied) at random instants, 4 times on the same
    folder. Whatever was announced as saved is there, nothing is half there, and the next writer goes on.
    """
    rng = random.Random(0)
    root, script = str(Path(__file__).resolve().parent.parent), tmp_path / "writer.py"
    script.write_text(WRITER.format(root=root))
    folder, step = tmp_path / "checkpoints", 1
    for _ in range(4):
        writer = subprocess.Popen([sys.executable, str(script), str(folder), str(step)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline().strip() == "ready"
        first = int(writer.stdout.readline())  # at least one save is done
        time.sleep(rng.uniform(0, 0.08))
        os.kill(writer.pid, signal.SIGKILL)
        announced = [first] + [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        writer.wait()
        writer.stdout.close()
        assert announced == list(range(step, step + len(announced)))
        for saved in checkpoint.steps(folder):
            found = checkpoint.load(folder, saved)
            assert found.meta["value"] == saved
            values = [found.tensors[name]["weight"] for name in ("gpt", "gistnet")] + [found.optimizer["m"]]
            assert all(value.eq(saved).all() for value in values)
        last = checkpoint.load(folder).step
        assert last in (announced[-1], announced[-1] + 1)
        step = last + 1


class Crash(BaseException):
    pass


@pytest.mark.parametrize("case", ["new step", "same step again", "after a stop"])
def test_a_stop_after_every_single_operation(tmp_path, monkeypatch, case):
    """The same law without luck: save is stopped before its 1st, 2nd, 3rd ... change to the disk until one save ends."""
    count = {"left": None}

    def fragile(function):
        def wrapped(*args, **kwargs):
            if count["left"] is not None:
                if count["left"] == 0:
                    raise Crash
                count["left"] -= 1
            return function(*args, **kwargs)
        return wrapped

    for owner, name in [(Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (checkpoint, "save_file"), (os, "rmdir"),
                        (os, "unlink"), (os, "fsync")]:
        monkeypatch.setattr(owner, name, fragile(getattr(owner, name)))
    monkeypatch.setattr(checkpoint, "git_commit", lambda: None)

    class Holder(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(torch.full((2,), float(value)))

    for stop in range(100):
        folder = tmp_path / f"run{stop}"
        count["left"] = None
        checkpoint.save(folder, 1, {"m": Holder(1)})
        checkpoint.save(folder, 2, {"m": Holder(2)})
        if case == "after a stop":  # which fell while the old version of step 2 was being thrown away
            (folder / "step_000002.old").mkdir()
        target, value = (2, 20) if case == "same step again" else (3, 3)
        count["left"] = stop
        try:
            checkpoint.save(folder, target, {"m": Holder(value)}, keep=1)
            done = True
        except Crash:
            done = False
        count["left"] = None
        found = checkpoint.load(folder)
        assert found.tensors["m"]["w"][0].item() in ((value,) if done else (2, value))
        assert found.step == (2 if found.tensors["m"]["w"][0] in (2, 20) else 3)
        for step in checkpoint.steps(folder):
            checkpoint.load(folder, step)
        checkpoint.save(folder, 4, {"m": Holder(4)}, keep=1)  # and the next save clears up
        assert [p.name for p in folder.iterdir()] == ["step_000004"]
        if done:
            assert stop > 5
            return
    raise AssertionError("save never came to its end")
