"""Laws of sharding: 1, 2 and 4 processes make the same run, and hand their state to any other number of processes; one that fails ends all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as td
import torch.nn as nn

from nanochat import checkpoint
from nanochat.loss_eval import bits_per_byte
from nanochat.optim import make_optimizer, pad_to, reduce_mean
from nanochat.schedule import lr_multiplier

STEPS, ROWS = 5, 4


class Odd(nn.Module):
    """Sizes that divide by nothing: a stack of 3 matrices, tables of 5 x 7, a lone scalar."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 7) for _ in range(3))
        self.place = nn.Parameter(torch.randn(5, 7))
        self.gain = nn.Parameter(torch.ones(()))
        self.lonely = nn.Linear(3, 2, bias=False)


def build(tiny, dist):
    gpt = tiny()
    torch.manual_seed(1)
    extra = Odd()
    return gpt, extra, make_optimizer(gpt, {"gistnet": extra}, dist)


def tiny():
    from nanochat.gpt import GPT, GPTConfig
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=61, seq_len=32, layers=3, heads=2, kv_heads=2, width=32))


def objective(gpt, extra, ids):
    x = extra.place.mean() + extra.gain
    for layer in extra.layers:
        x = x + layer(ids[:, :5].float() / 61).square().mean()
    return gpt(ids[:, :-1], ids[:, 1:]) + 0.01 * x + 0.01 * extra.lonely(ids[:, :3].float() / 61).square().mean()


def train(dist, first, last, gpt, extra, optimizer):
    """Steps first..last on rows that are dealt to ranks: rank r takes its ROWS / world of each global batch of ROWS."""
    losses = []
    for step in range(first, last):
        ids = torch.randint(0, 61, (ROWS, 17), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(dist.world)[dist.rank]
        total = torch.zeros(())
        for row in mine.split(1):  # row by row whatever the world, so that sums run alike
            loss = objective(gpt, extra, row) / len(mine)
            loss.backward()
            total += loss.detach()
        if dist.world > 1:
            td.all_reduce(total)
        losses.append(total.item() / dist.world)
        optimizer.set_schedule(lr=lr_multiplier(step, 40))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run(dist, folder, first, last, resume_from=None):
    """Train steps first..last, saving to (and starting from) a checkpoint."""
    gpt, extra, optimizer = build(tiny, dist)
    if resume_from is not None:
        found = checkpoint.load(resume_from)
        gpt.load_state_dict(found.tensors["gpt"])
        extra.load_state_dict(found.tensors["gistnet"])
        optimizer.load_state_dict(found.optimizer)
    losses = train(dist, first, last, gpt, extra, optimizer)
    checkpoint.save(folder, last, {"gpt": gpt, "gistnet": extra}, optimizer, {"losses": losses}, main=dist.main)
    if dist.world > 1:  # every rank holds the same weights, bit for bit
        mine = torch.cat([p.detach().flatten() for p in [*gpt.parameters(), *extra.parameters()]])
        theirs = mine.clone()
        td.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), f"rank {dist.rank} has drifted from rank 0"


def assert_same(a, b, tolerance):
    a, b = checkpoint.load(a), checkpoint.load(b)
    assert a.meta["losses"] == pytest.approx(b.meta["losses"], abs=tolerance)
    assert a.optimizer.keys() == b.optimizer.keys()
    for name in a.tensors:
        for key, value in a.tensors[name].items():
            torch.testing.assert_close(value, b.tensors[name][key], rtol=0, atol=tolerance, msg=lambda m: f"{name}.{key}: {m}")
    for key, value in a.optimizer.items():
        torch.testing.assert_close(value, b.optimizer[key], rtol=0, atol=tolerance, msg=lambda m: f"{key}: {m}")


def test_any_number_of_processes_makes_the_same_run_and_resumes_any_other(spawn, tmp_path):
    """
    A: 5 steps alone. B: 5 steps on 2, and on 4. C: 3 steps on 4, then 2 more on 2, then compared with A.
    Losses, weights and optimizer state agree to rounding (sums over ranks run in another order than sums over rows).
    """
    from nanochat.common import Dist
    run(Dist(), tmp_path / "one", 0, STEPS)
    for world in (2, 4):
        spawn(run, world, tmp_path / f"w{world}", 0, STEPS)
        assert_same(tmp_path / "one", tmp_path / f"w{world}", 2e-3)
    spawn(run, 4, tmp_path / "half", 0, 3)
    spawn(run, 2, tmp_path / "resumed", 3, STEPS, tmp_path / "half")
    resumed = checkpoint.load(tmp_path / "resumed").meta["losses"]
    assert resumed == pytest.approx(checkpoint.load(tmp_path / "one").meta["losses"][3:], abs=1e-3)
    state = checkpoint.load(tmp_path / "resumed")
    for key, value in checkpoint.load(tmp_path / "one").tensors["gpt"].items():
        torch.testing.assert_close(state.tensors["gpt"][key], value, rtol=0, atol=2e-3)


def special_cases(dist):
    """What a rank does alone must be agreed by all; run on 3 ranks, so that nothing divides."""
    # the mean over ranks, my share of it
    mine, wait = reduce_mean(torch.arange(6.0).view(3, 2) * (dist.rank + 1), dist)
    wait()
    assert mine.tolist() == [[dist.rank * 4.0, (2 * dist.rank + 1) * 2.0]]
    assert pad_to(torch.ones(4, 2), 6).sum() == 8

    # a gradient that only rank 1 has counts as zero on the others; one that nobody has leaves its parameter alone
    gpt, extra, optimizer = build(tiny, dist)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    if dist.rank == 1:
        gpt.blocks[1].mlp.up.weight.grad = torch.ones_like(gpt.blocks[1].mlp.up.weight)
    norm = optimizer.step(norm=True)
    assert norm.item() == pytest.approx(before["blocks.1.mlp.up.weight"].numel() ** 0.5 / 3)
    moved = [name for name, p in gpt.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["blocks.1.mlp.up.weight"]

    # NaN on one rank: all refuse the step together
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.ones_like(p) * (float("nan") if dist.rank == 2 else 1.0)
    optimizer.step(check=True)
    assert optimizer.skipped == 1 and all(torch.equal(p, before[name]) for name, p in gpt.named_parameters())

    # each rank stores its share of the optimizer state only
    stored = sum(v.numel() for bucket in optimizer.buckets for v in bucket.state.values())
    state = optimizer.state_dict()
    assert bool(state) == dist.main
    if dist.main:
        assert stored < 0.45 * sum(v.numel() for v in state.values())

    # bits per byte: ranks with different numbers of batches, one with none
    batches = [type("Batch", (), {"targets": torch.tensor([[1, 2, -1, 0]])})] * dist.rank
    loss = lambda batch: torch.tensor([[1.0, 2.0, float("nan"), 50.0]])
    bpb = bits_per_byte(loss, batches, [0, 3, 5], world=dist.world)
    assert bpb == pytest.approx(3 / (0.6931471805599453 * 8))


def test_ranks_agree_in_special_cases(spawn):
    spawn(special_cases, 3)


def agreements(dist, folder):
    """On 3 ranks: all have it, one of them does not, all lack it, and what rank 0 fetches the others find."""
    from nanochat.common import UserError, all_or_none

    def lack(*ranks, error=UserError):
        if dist.rank in ranks:
            raise error(f"rank {dist.rank} lacks it")
        return dist.rank
    assert all_or_none(lambda: lack(), dist) == (dist.rank, None)
    for rank in range(3):
        assert all_or_none(lambda: lack(rank, error=ValueError), dist) == (None, f"rank {rank} lacks it")
    assert all_or_none(lambda: lack(0, 1, 2), dist) == (None, "rank 0 lacks it"), "the others were not asked"

    def fetch():
        if dist.main:
            time.sleep(0.2)
            (folder / "data").touch()
        return (folder / "data").exists()
    assert all_or_none(fetch, dist) == (True, None)


def test_ranks_have_something_together_or_not_at_all(spawn, tmp_path):
    spawn(agreements, 3, tmp_path)


def failing(dist):
    td.barrier() # who is done before the other has found it dies of that
    assert dist.rank == 0, "rank 1 breaks"


def test_a_failure_of_one_rank_fails_the_whole(spawn):
    with pytest.raises(Exception, match="rank 1 breaks"):
        spawn(failing, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Under torchrun, as a user starts it

PROGRAM = """
import os, signal, time, torch, torch.distributed as td
from nanochat.common import UserError, run_main, setup
def main():
    device, dist = setup("cpu")
    td.all_reduce(torch.ones(1))
    if "{how}" == "all" or dist.rank == 1:
        {what}
    if "{how}" == "one, the other is busy":
        time.sleep(60)
    for _ in range(3):
        td.all_reduce(torch.ones(1)) # the others wait here
run_main(main)
"""


@pytest.mark.parametrize("how, what, says", [
    pytest.param("one", "raise RuntimeError('this rank breaks')", "RuntimeError: this rank breaks", id="raises"),
    pytest.param("one", "os.kill(os.getpid(), signal.SIGKILL)", "another process was killed", id="is killed"),
    pytest.param("one, the other is busy", "os.kill(os.getpid(), signal.SIGKILL)", "another process was killed", id="is killed unseen"),
    pytest.param("one", "raise UserError('only this rank minds')", "error: only this rank minds", id="one minds", marks=pytest.mark.slow),
    pytest.param("all", "raise UserError('the loss is nan')", "error: the loss is nan", id="all mind", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_job_with_one_message(tmp_path, how, what, says):
    """
    Every rank used to tell its own end: the reason, as often as there were ranks, among tracebacks of lost connections that were only its
    consequence; and a rank that left with exit code 2 was aborted on its way out by the process group that it left open.
    """
    (tmp_path / "program.py").write_text(PROGRAM.format(how=how, what=what))
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "program.py"],
                          cwd=Path(__file__).parent.parent, env=os.environ | dict(PYTHONPATH="."), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - start < 60
    told, launcher = done.stderr.split("failed (exitcode: ", 1) # what follows is torchrun's own report
    assert told.count(says) == 1 and "SIGABRT" not in launcher
    if "SIGKILL" in what: # rank 0 loses the connection, or torchrun tells it to stop: whichever comes first
        assert "rank 0 of 2" in told and "rank 1 of 2" not in told and told.count("Traceback") == told.count("rank 0 of 2 failed")
    else:
        assert told.count("Traceback") == told.count("rank 1 of 2 failed") == ("RuntimeError" in what)
