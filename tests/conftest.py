"""Shared by all tests: one thread (several test runs may share the machine), seeds, small models, several processes."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # tests import the packages and their own helpers without an installation
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselect with -m 'not slow'")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base_dir() of the test's own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The folder of a committed tree of 70,001 tokens: four chunks of ids, several of gists, three levels. Not to be changed."""
    from megacontext.tree import MegaTree
    from tree_truth import HEADER, ingest
    path = tmp_path_factory.mktemp("sample") / "tree"
    with MegaTree.create(path, HEADER) as tree:
        ingest(tree, 70_001)
    return path


@pytest.fixture
def tiny_gpt():
    """(vocab_size=61, width=32, ...) -> a GPT small enough to train within a test."""
    from nanochat.gpt import GPT, GPTConfig

    def build(seed=0, **shape):
        torch.manual_seed(seed)
        return GPT(GPTConfig(**(dict(vocab_size=61, seq_len=32, layers=3, heads=2, kv_heads=2, width=32) | shape)))
    return build


def _child(rank, function, world, rendezvous, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import torch.distributed as td

    from nanochat.common import Dist
    td.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        function(Dist(rank, rank, world), *args)
    finally:
        td.destroy_process_group()


@pytest.fixture
def spawn(tmp_path):
    """spawn(function, world, *args): run function(dist, *args) in `world` gloo processes; a failure in one fails the test."""
    def run(function, world, *args):
        import torch.multiprocessing as mp
        method = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"
        if method == "forkserver":  # a clean process that has imported torch once and forks: a tenth of a second, not three
            mp.set_forkserver_preload(["torch", "torch.distributed", "nanochat.optim", "nanochat.gpt", "nanochat.checkpoint"])
        run.count += 1
        args_of_child = (function, world, tmp_path / f"rendezvous{run.count}", args)
        mp.start_processes(_child, args_of_child, nprocs=world, start_method=method)
    run.count = 0
    return run
