"""
Laws of the tree: what went in comes out, whatever happened in between; what was not committed may be lost, what was may not.
On disk and in memory it is the same tree.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megacontext import record
from megacontext.column import CODECS, decode, encode, row_bytes
from megacontext.span import Span
from megacontext.tree import MegaTree, TreeError, make_header

from tree_truth import HEADER, D, K, check_tree, ids, ingest, vectors


# ----------------------------------------------------------------------------------------------------------------------
# What goes in comes out

def test_a_tree_by_hand():
    tree = MegaTree.in_memory(HEADER)
    assert (tree.length, tree.levels, tree.pending(1)) == (0, 1, (0, 0))
    tree.append_tokens(range(100, 170))
    assert (tree.length, tree.levels, tree.pending(1)) == (70, 1, (0, 2))
    assert tree.tokens(31, 34).tolist() == [131, 132, 133]
    tree.append_gists(1, np.ones((2, D)), np.zeros((2, K)))
    assert (tree.levels, tree.count(1), tree.pending(1), tree.pending(2)) == (2, 2, (2, 2), (0, 0))
    assert tree.gists(1, 1, 2).tolist() == [[1.0] * D]
    tree.truncate(63)
    assert (tree.length, tree.count(1)) == (63, 1)


def storm(seed, steps, root):
    """
    One tree on disk, one in memory, one truth, random operations: append, gists late or at once, commit, rewind, close,
    crash (close without commit), reopen, fork. After each, all agree.
    """
    rng = random.Random(seed)
    disk, memory, salt, committed = MegaTree.create(root / "t0", HEADER), MegaTree.in_memory(HEADER), 0, 0
    reader = None
    for step in range(steps):
        op = rng.choices(["append", "commit", "rewind", "reopen", "crash", "fork", "read", "reader"], [10, 3, 2, 1, 1, 0.3, 6, 1])[0]
        if op == "append":
            n = rng.choice([0, 1, 7, 31, 32, 33, 1000, 5000, 20_000])
            ingest(disk, n)
            ingest(memory, n)
        elif op == "commit":
            disk.commit()
            committed = disk.length
        elif op == "rewind":
            to = rng.randrange(disk.length + 1)
            disk.truncate(to)
            memory.truncate(to)
            committed = to
        elif op == "reopen":
            disk.close()
            disk = MegaTree.open(disk.folder, model="gpt-1")
            committed = disk.length
        elif op == "crash":
            disk.close(commit=False)
            disk = MegaTree.open(disk.folder)
            assert disk.length == committed, "lost a commit, or kept what was never committed"
            memory.truncate(committed)
        elif op == "fork":
            at = rng.randrange(disk.length + 1)
            fork = disk.fork(root / f"t{step + 1}", at)
            ingest(disk, 100)  # the trunk goes on, the branch does not notice
            disk.close()
            disk, memory, committed = fork, memory.fork(None, at), at
        elif op == "reader":
            reader = MegaTree.open(disk.folder, mode="r")
            check_tree(reader, committed)
            reader.close()
        elif op == "read" and disk.length:
            a = rng.randrange(disk.length)
            b = min(disk.length, a + rng.choice([1, 32, 5000]))
            assert (disk.tokens(a, b) == ids(a, b)).all()
        assert (disk.length, disk.levels) == (memory.length, memory.levels)
        assert [disk.count(level) for level in range(5)] == [memory.count(level) for level in range(5)]
        if step % 10 == 0:
            check_tree(disk)
            check_tree(memory)
    disk.commit()
    assert disk.verify() == sum(column.rows * column.row for column in disk.columns.values())
    check_tree(disk)
    check_tree(memory)
    disk.close()


@pytest.mark.parametrize("seed", range(5))
def test_disk_memory_and_truth_agree_through_a_storm(seed, tmp_path):
    storm(seed, 80, tmp_path)


def test_piece_by_piece_is_the_same_files_as_at_once(tmp_path):
    """Incremental ingest is bulk ingest, as far as the tree goes: to the byte, once both are closed."""
    rng = random.Random(0)
    with MegaTree.create(tmp_path / "once", HEADER) as tree:
        ingest(tree, 40_000)
    with MegaTree.create(tmp_path / "pieces", HEADER) as tree:
        while tree.length < 40_000:
            ingest(tree, min(rng.choice([1, 5, 32, 999]), 40_000 - tree.length))
            if rng.random() < 0.1:
                tree.commit()
    for name in sorted(p.name for p in (tmp_path / "once").glob("level*")):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "pieces" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", CODECS)
def test_codecs_round_as_they_say(dtype):
    x = np.random.default_rng(0).normal(size=(500, D)).astype(np.float32) * np.logspace(-3, 3, 500, dtype=np.float32)[:, None]
    x[0] = 0
    x[1, :4] = [1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -8, 1 + 2 ** -8 + 2 ** -20]  # half-way between two bfloat16, and just above
    back = decode(encode(x, dtype), dtype)
    assert back.dtype == np.float32
    if dtype == "float32":
        np.testing.assert_array_equal(back, x)
    elif dtype == "int8":
        assert (np.abs(back - x).max(axis=1) <= np.abs(x).max(axis=1) / 254 * 1.0001).all()  # half a step of 127
    else:
        np.testing.assert_array_equal(back, torch.from_numpy(x).to(getattr(torch, dtype)).float().numpy())
    np.testing.assert_array_equal(decode(encode(back, dtype), dtype), back)  # storing twice changes nothing
    tree = MegaTree.in_memory(make_header(D, 0, gist_dtype=dtype))
    tree.append_tokens(np.arange(64))
    tree.append_gists(1, x[:2])
    np.testing.assert_array_equal(tree.gists(1, 0, 2), back[:2])


def test_gists_of_spans_at_mixed_levels(sample):
    tree = MegaTree.open(sample, mode="r")
    spans = [Span(2, 3), Span(1, 700), Span(0, 5), Span(3, 1), Span(1, 2), Span(0, 2186)]
    for got, one, width, salt in ((tree.gists_of(spans), tree.gists, D, 0), (tree.keys_of(spans), tree.keys, K, 1)):
        slow = np.concatenate([one(span.level or 1, span.index, span.index + 1) for span in spans])
        np.testing.assert_array_equal(got, slow)
        np.testing.assert_array_equal(got[2], vectors(1, 5, 6, width, salt)[0])
    assert tree.gists_of([]).shape == (0, D)
    with pytest.raises(TreeError, match="node 2187 of level 1, which has 2187"):
        tree.gists_of([Span(0, 2187, live=17)])
    tree.close()


def test_verify_and_reads_amid_an_uncommitted_append(tmp_path):
    """verify() checks the committed part of a chunk; what was written behind it since must stay readable."""
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 100)
        tree.commit()
        ingest(tree, 50)
        assert tree.verify() == 4 * 100 + 2 * 3 * (D + K)
        check_tree(tree, 150)


def test_gists_never_come_before_their_children():
    tree = MegaTree.in_memory(HEADER)
    tree.append_tokens(np.arange(95))
    with pytest.raises(AssertionError, match="before their children"):
        tree.append_gists(1, np.zeros((3, D)), np.zeros((3, K)))
    with pytest.raises(AssertionError, match="before their children"):
        tree.append_gists(2, np.zeros((1, D)), np.zeros((1, K)))


def test_bad_input_is_refused_and_leaves_no_trace(tmp_path):
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 64)
        with pytest.raises(ValueError, match="2\\*\\*31"):
            tree.append_tokens([1, -1])
        tree.append_tokens(np.arange(32))
        nan = np.zeros((1, D), np.float32)
        nan[0, 3] = np.nan
        for gists, keys in ((nan, np.zeros((1, K))), (np.zeros((1, D)), np.full((1, K), np.inf))):
            with pytest.raises(ValueError, match="not finite"):
                tree.append_gists(1, gists, keys)
        with pytest.raises(AssertionError, match="shape"):
            tree.append_gists(1, np.zeros((1, D + 1)), np.zeros((1, K)))
        assert (tree.count(1), tree.columns[1, "keys"].rows) == (2, 2)
        with pytest.raises(TreeError, match="nodes 90..97 of level 0, which has 96"):
            tree.tokens(90, 97)
        with pytest.raises(TreeError, match="level 3, which has 0"):
            tree.gists(3, 0, 1)
        with pytest.raises(TreeError, match="cannot rewind to 97"):
            tree.truncate(97)
    with pytest.raises(TreeError, match="float8"):
        make_header(D, K, gist_dtype="float8")


def test_a_new_gistnet_keeps_the_tokens_and_starts_the_gists_again(tmp_path):
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 40_000)
        tree.reset_gists(gistnet="gist-2")
        assert (tree.length, tree.levels, tree.pending(1)) == (40_000, 1, (0, 1250))
        tree.append_gists(1, vectors(1, 0, 500, D, 5), vectors(1, 0, 500, K, 6))  # interrupted here
    with pytest.raises(TreeError, match="another gistnet: expected gist-1, found gist-2"):
        MegaTree.open(tmp_path / "t", gistnet="gist-1")
    with MegaTree.open(tmp_path / "t", gistnet="gist-2") as tree:
        assert tree.pending(1) == (500, 1250)
        np.testing.assert_array_equal(tree.gists(1, 0, 500), vectors(1, 0, 500, D, 5))
        tree.verify()


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("width, dtype", [(8, "bfloat16"), (100, "bfloat16"), (D, "int8"), (D, "float32")])
def test_gists_of_another_width_or_dtype_take_the_place_of_the_old_ones(tmp_path, place, width, dtype):
    """A model of another size reads the same tokens. Rows of two sizes share a file, one after the other."""
    rng = np.random.default_rng(0)
    with MegaTree.create(tmp_path / "t", HEADER) if place == "disk" else MegaTree.in_memory(HEADER) as tree:
        ingest(tree, 70_001)
        tree.commit()
        tree.reset_gists(model="gpt-2", width=width, gist_dtype=dtype)
        assert not tree.whole
        for level in (1, 2, 3):
            a, b = tree.pending(level)
            tree.append_gists(level, rng.integers(-127, 128, (b, width)).astype(np.float32), rng.integers(-127, 128, (b, K)))
        assert tree.whole and tree.sizes()["level 1"] == 2187 * (row_bytes(width, dtype) + row_bytes(K, dtype))
        one, three = tree.gists(1, 0, 2187), tree.gists(3, 1, 2)
    if place == "disk":
        with MegaTree.open(tmp_path / "t", model="gpt-2") as tree:
            tree.verify()
            assert (tree.tokens(0, 70_001) == ids(0, 70_001)).all()
            np.testing.assert_array_equal(tree.gists(1, 0, 2187), one)
            np.testing.assert_array_equal(tree.gists(3, 1, 2), three)
            assert sum(tree.sizes().values()) - tree.sizes()["record"] == 4 * 70_001 + (2187 + 68 + 2) * (row_bytes(width, dtype) + row_bytes(K, dtype))


def test_a_reader_of_gists_that_are_written_again_is_told_to_open_the_tree_again(tmp_path):
    """It once went on with the old header: it would have read the new rows at the old width. The file keeps what was promised to it."""
    with MegaTree.create(tmp_path / "t", HEADER) as writer:
        ingest(writer, 70_001)
    reader = MegaTree.open(tmp_path / "t", mode="r")
    old = reader.gists(1, 0, 2187)  # has the file mapped
    with MegaTree.open(tmp_path / "t") as writer:
        size = (tmp_path / "t" / "level1.gists").stat().st_size
        writer.reset_gists(model="gpt-2", width=4)
        writer.append_gists(1, np.ones((500, 4)), np.ones((500, K)))
    assert (tmp_path / "t" / "level1.gists").stat().st_size >= size == old.size * 2
    for _ in range(2):
        with pytest.raises(TreeError, match="refresh"):
            reader.gists(1, 0, 2187)
        with pytest.raises(TreeError, match="Open it again"):
            reader.refresh()
    reader.close()


# ----------------------------------------------------------------------------------------------------------------------
# Readers and the writer

def test_a_reader_sees_commits_and_only_commits(tmp_path):
    writer = MegaTree.create(tmp_path / "t", HEADER)
    reader = MegaTree.open(tmp_path / "t", mode="r")
    check_tree(reader, 0)
    done = 0
    for n in (5, 100, 40_000, 1, 33):
        ingest(writer, n)
        reader.refresh()
        check_tree(reader, done)
        writer.commit()
        done += n
        check_tree(reader)  # still the old length, and still right, while the file grows
        reader.refresh()
        check_tree(reader, done)
    with pytest.raises(TreeError, match="open for reading"):
        reader.append_tokens([1])
    with pytest.raises(TreeError, match="open for reading"):
        reader.truncate(0)
    writer.truncate(20_000)
    writer.append_tokens(ids(20_000, 60_000, salt=9))
    writer.commit()
    writer.close()
    for _ in range(2):  # history was rewritten under it: said, not served, and said again
        with pytest.raises(TreeError, match="refresh"):
            check_tree(reader)
    reader.refresh()
    assert (reader.tokens(20_000, 60_000) == ids(20_000, 60_000, salt=9)).all()
    reader.close()


def test_a_second_writer_is_told_who_the_first_one_is(tmp_path):
    code = ("import sys, time; from megacontext.tree import MegaTree; t = MegaTree.open(sys.argv[1]); "
            "print('ready', flush=True); sys.stdin.read()")
    MegaTree.create(tmp_path / "t", HEADER).close()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "t"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(TreeError, match=f"written by process {other.pid}"):
            MegaTree.open(tmp_path / "t")
        MegaTree.open(tmp_path / "t", mode="r").close()  # readers are welcome
    finally:
        other.kill()
        other.wait()
    tree = MegaTree.open(tmp_path / "t")  # the lock died with its owner
    with pytest.raises(TreeError, match=f"written by process {os.getpid()}"):
        MegaTree.open(tmp_path / "t")
    tree.close()


READ_ONLY = """
import os, sys, numpy.testing
sys.path[:0] = [".", "tests"]
from tree_truth import check_tree
from megacontext.tree import MegaTree
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
with MegaTree.open(sys.argv[1], mode="r") as tree:
    check_tree(tree, int(sys.argv[2]))
    tree.verify()
try:
    MegaTree.open(sys.argv[1])
except Exception as error:
    print(error)
"""


def test_who_may_not_write_reads_beside_a_writer_and_after_its_death():
    """Such a reader once took files for unchanging and left the write-ahead log out: an intact tree was 'damaged: no such table: state'."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which lets nobody else in
        os.chmod(folder, 0o755)
        folder = Path(folder)
        writer = MegaTree.create(folder / "live", HEADER)
        ingest(writer, 10_000)
        writer.commit()
        shutil.copytree(folder / "live", folder / "killed")
        with MegaTree.create(folder / "closed", HEADER) as tree:
            ingest(tree, 10_000)
        for name in ("live", "killed", "closed"):
            for path in (folder / name).iterdir():
                path.chmod(0o444)
            (folder / name).chmod(0o555)
            out = subprocess.run([sys.executable, "-c", READ_ONLY, folder / name, "10000"], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
            assert f"cannot open a tree in {folder / name} (Permission denied)" in out.stdout, out
            (folder / name).chmod(0o755)
        writer.close()


def test_where_there_is_no_flock_a_tree_is_in_memory_or_refused(tmp_path, sample, monkeypatch):
    """Windows: nothing of megacontext could be imported, for want of fcntl. What was there stays as it is, and nothing is made."""
    monkeypatch.setattr(record, "fcntl", None)
    for attempt in (lambda: MegaTree.create(tmp_path / "t", HEADER), lambda: MegaTree.open(sample), lambda: MegaTree.open(sample, mode="r"), lambda: MegaTree.exists(sample)):
        with pytest.raises(TreeError, match="expected a system with flock .* Keep the tree in memory"):
            attempt()
    assert not (tmp_path / "t").exists()
    tree = MegaTree.in_memory(HEADER)
    ingest(tree, 3000)
    check_tree(tree, 3000)


def test_a_tree_is_made_only_where_there_is_nothing(tmp_path, sample):
    with pytest.raises(TreeError, match="expected an empty or new folder"):
        MegaTree.create(sample, HEADER)
    with pytest.raises(TreeError, match="no tree in"):
        MegaTree.open(tmp_path / "nowhere")
    with pytest.raises(TreeError, match="no tree in"):
        MegaTree.open(tmp_path)
