"""A full disk is a clear error that loses nothing, and tokens that wait in memory to be written are there for everybody."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megacontext.span import BLOCK
from megacontext.tree import MegaTree, TreeError

from tree_truth import HEADER, check_tree, ids, ingest


class FullDisk:
    """The n-th write from now, and all that follow, find no space; one write may succeed in part first."""

    def __init__(self, monkeypatch, after, partial):
        self.left, self.partial = after, partial
        write, grow = os.pwrite, os.posix_fallocate
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: self.wrap(write, fd, data, at))
        monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: self.wrap(grow, fd, at, size))

    def wrap(self, call, fd, x, y):
        if self.left == 0:
            if self.partial and call.__name__ == "pwrite" and len(x) > 1:
                self.partial = False
                return call(fd, x[:len(x) // 2], y)
            raise OSError(28, "No space left on device")
        self.left -= 1
        return call(fd, x, y)


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("partial", [False, True])
def test_a_full_disk_is_a_clear_error_and_nothing_committed_is_lost(tmp_path, monkeypatch, after, partial):
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 3000)
    tree.commit()
    with monkeypatch.context() as patch:
        FullDisk(patch, after, partial)
        with pytest.raises(TreeError, match="no space for .* Everything committed is intact"):
            for _ in range(20):
                ingest(tree, 20_000)
        n = tree.length  # the tree in memory is still in order: whole rows, keys and gists together
        assert (tree.tokens(0, n) == ids(0, n)).all()
        assert all(tree.columns[level, "keys"].rows == tree.count(level) for level in range(1, tree.levels))
    shutil.copytree(tmp_path / "t", tmp_path / "crashed")
    with MegaTree.open(tmp_path / "crashed") as crashed:
        crashed.verify()
        check_tree(crashed, 3000)
    ingest(tree, 1000)  # space was freed: it goes on where it was
    tree.close()
    with MegaTree.open(tmp_path / "t") as tree:
        check_tree(tree, n + 1000)
        tree.verify()


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_wait_in_memory_are_there_for_everybody(tmp_path, seed):
    """Single tokens are written a block at a time. Reads, rewinds, forks and commits at any moment see them, as the list that is the obvious twin."""
    rng, truth, committed = random.Random(seed), [], []
    tree = MegaTree.create(tmp_path / "t", HEADER)
    for step in range(1500):
        id = rng.randrange(2 ** 31)
        tree.append_tokens([id] if rng.random() < 0.97 else np.array([id, 1, 2]))
        truth += [id] if tree.length == len(truth) + 1 else [id, 1, 2]
        what, a = rng.random(), rng.randrange(max(0, len(truth) - 70), len(truth))
        if what < 0.1:
            b = rng.randrange(a, len(truth) + 1)
            assert tree.tokens(a, b).tolist() == truth[a:b]
        elif what < 0.12:
            tree.truncate(a)
            del truth[a:]
            committed = list(truth)
        elif what < 0.14:
            tree.commit()
            committed = list(truth)
        elif what < 0.15:
            assert tree.fork().tokens(0, len(truth)).tolist() == truth
            with MegaTree.open(tmp_path / "t", mode="r") as reader:
                assert reader.tokens(0, reader.length).tolist() == committed
        assert tree.length == len(truth)
    shutil.copytree(tmp_path / "t", tmp_path / "crashed") # as a kill would leave it
    tree.close()
    for name, expected in (("crashed", committed), ("t", truth)):
        with MegaTree.open(tmp_path / name) as again:
            again.verify()
            assert again.tokens(0, again.length).tolist() == expected


def test_single_tokens_are_written_a_block_at_a_time(tmp_path, monkeypatch):
    tree, writes, write = MegaTree.create(tmp_path / "t", HEADER), [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (writes.append(len(data)), write(fd, data, at))[1])
    for id in range(10 * BLOCK):
        tree.append_tokens([id])
    assert writes == 10 * [4 * BLOCK]
    tree.close()


def test_a_disk_that_is_full_when_a_block_is_written_loses_none_of_its_tokens(tmp_path, monkeypatch):
    tree = MegaTree.create(tmp_path / "t", HEADER)
    tree.append_tokens(list(range(BLOCK - 1)))
    with monkeypatch.context() as patch:
        FullDisk(patch, 0, partial=False)
        for attempt in (lambda: tree.append_tokens([31]), tree.commit, lambda: tree.truncate(5)):
            with pytest.raises(TreeError, match="no space for"):
                attempt()
        assert tree.length == 5 and tree.tokens(2, 5).tolist() == [2, 3, 4]
    tree.append_tokens([9])
    tree.close()
    with MegaTree.open(tmp_path / "t") as tree:
        assert tree.tokens(0, tree.length).tolist() == [0, 1, 2, 3, 4, 9]


def test_a_commit_that_finds_no_space_can_be_tried_again(tmp_path):
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 3000)
    tree.commit()
    pages = tree.record.db.execute("pragma page_count").fetchone()[0]
    ingest(tree, 8_000_000, gists=False)
    tree.record.db.execute(f"pragma max_page_count = {pages}")
    with pytest.raises(TreeError, match="the commit failed .*full.* intact"):
        tree.commit()
    other = MegaTree.open(tmp_path / "t", mode="r")
    check_tree(other, 3000)
    other.close()
    tree.record.db.execute("pragma max_page_count = 1000000")
    tree.close()
    with MegaTree.open(tmp_path / "t") as tree:
        assert tree.length == 8_003_000
        tree.verify()


def test_a_rewind_that_could_not_be_committed_overwrites_nothing(tmp_path, monkeypatch):
    """Found in review: had the append after a failed rewind gone ahead, it would have written over committed tokens."""
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 3000)
    tree.commit()
    with monkeypatch.context() as patch:
        patch.setattr(tree.record, "write", lambda *_: (_ for _ in ()).throw(TreeError("the commit failed")))
        with pytest.raises(TreeError):
            tree.truncate(100)
    with pytest.raises(AssertionError, match="commit that before appending"):
        tree.append_tokens([1, 2, 3])
    tree.close(commit=False)
    with MegaTree.open(tmp_path / "t") as tree:
        check_tree(tree, 3000)


def test_a_close_that_finds_no_space_lets_go_of_the_tree(tmp_path, monkeypatch):
    """It once kept the lock, and the process was told that it was itself the other writer."""
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 3000)
    tree.commit()
    for _ in range(2):
        with monkeypatch.context() as patch:
            tree.append_tokens([1, 2, 3])
            FullDisk(patch, 0, partial=False)
            with pytest.raises(TreeError, match="no space for .* more bytes"):
                tree.close()
        tree = MegaTree.open(tmp_path / "t")
        check_tree(tree, 3000)
    with monkeypatch.context() as patch:
        FullDisk(patch, 3, partial=False)
        with pytest.raises(TreeError, match="no space for .* more bytes"):
            tree.fork(tmp_path / "fork")
    fork = tree.fork(tmp_path / "fork")  # one that finds none leaves nothing in the way
    check_tree(fork, 3000)
    fork.close()
    tree.close()


@pytest.mark.parametrize("module, name", [(os, "open"), (os, "pwrite"), (os, "ftruncate"), (Path, "mkdir"), (Path, "touch"), (Path, "rename"), (sqlite3, "connect")])
def test_a_disk_that_is_full_when_a_tree_is_made_is_told_and_the_tree_is_made_when_it_is_not(tmp_path, monkeypatch, module, name):
    """It was 'damaged: restore it from a copy', and stayed so."""
    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full") if module is sqlite3 else OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(TreeError, match="disk is full.* Free some space"):
            MegaTree.create(tmp_path / "t", HEADER)
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 100)


@pytest.mark.parametrize("path, message", [("file", "File exists"), ("file/tree", "Not a directory")])
def test_a_file_where_the_folder_should_be_is_told(tmp_path, path, message):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(TreeError, match=f"cannot make a tree in .*{message}.* expected a folder"):
        MegaTree.create(tmp_path / path, HEADER)


FILE_LIMIT = """
import resource, sys
import numpy as np
from megacontext.tree import MegaTree, TreeError
tree = MegaTree.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try:
    while True:
        tree.append_tokens(np.arange(tree.length, tree.length + 5000))
        tree.commit()
except TreeError as error:
    print(tree.length, error)
"""


def test_the_system_itself_says_no(tmp_path):
    """A real limit on file size, set by the kernel: 1,000,000 bytes hold 250,000 token ids."""
    MegaTree.create(tmp_path / "t", HEADER).close()
    out = subprocess.run([sys.executable, "-c", FILE_LIMIT, tmp_path / "t"], capture_output=True, text=True, timeout=120)
    length, error = out.stdout.split(" ", 1)
    assert "no space for" in error and "File too large" in error, out
    assert 100_000 <= int(length) <= 250_000
    with MegaTree.open(tmp_path / "t") as tree:
        assert tree.length == int(length)
        assert (tree.tokens(0, tree.length) == np.arange(tree.length)).all()
