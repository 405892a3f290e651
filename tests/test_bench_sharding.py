"""bench/sharding.py: what is timed against each other is the same training."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import sharding
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_all_ways_take_the_same_steps():
    """Three layers, so that no bucket of matrices divides by two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bench.sharding",
               "--depth", "3", "--vocab-size", "61", "--max-seq-len", "64", "--steps", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["found"]
    assert tuple(found) == sharding.WAYS
    losses = [found[way]["loss"] for way in sharding.WAYS]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5) and losses[0] < 3.5, "four steps learn something: ln 61 is 4.11"
    assert all(row["both"] == pytest.approx(row["read"] + row["step"]) and row["read"] > 0 < row["step"] for row in found.values())


def test_parts_are_those_of_fully_shard():
    """torch.chunk, which it cuts with, gives fewer parts than ranks where they do not come out even: the others have none."""
    for size, world in ((10, 8), (2, 8), (2, 4), (7, 2), (8, 4)):
        whole = torch.arange(size)
        parts = list(whole.chunk(world))
        parts += [whole[:0]] * (world - len(parts))
        assert all(torch.equal(sharding.cut(whole, rank, world), part) for rank, part in enumerate(parts))


@pytest.mark.parametrize("flags, words", [([], "one process shards nothing"), (["--rows", "0"], "numbers of at least 1")])
def test_mistakes_are_told(monkeypatch, flags, words):
    monkeypatch.setattr(sys, "argv", ["sharding", "--device", "cpu", *flags])
    with pytest.raises(UserError, match=words):
        sharding.main()
