"""
Laws of the tree: what went in comes out, whatever happened in between; what was not committed may be lost, what was may not;
and a tree that is not what it says is refused. On disk and in memory it is the same tree.
"""

import os
import random
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch

from megacontext import column as column_file
from megacontext.column import CHUNK, CODECS, decode, encode, row_bytes
from megacontext.span import BLOCK, Span
from megacontext.tree import MegaTree, TreeError, make_header

from tree_truth import HEADER, D, K, check_tree, ids, ingest, vectors

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A committed tree of 70,001 tokens: four chunks of ids, several of gists, three levels."""
    path = tmp_path_factory.mktemp("sample") / "tree"
    with MegaTree.create(path, HEADER) as tree:
        ingest(tree, 70_001)
    return path


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


def test_a_tree_is_made_only_where_there_is_nothing(tmp_path, sample):
    with pytest.raises(TreeError, match="expected an empty or new folder"):
        MegaTree.create(sample, HEADER)
    with pytest.raises(TreeError, match="no tree in"):
        MegaTree.open(tmp_path / "nowhere")
    with pytest.raises(TreeError, match="no tree in"):
        MegaTree.open(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# What is not whole is refused, with what was expected and what was found

def damaged(sample, tmp_path, name, change):
    """A copy of the sample with one file changed: change(bytes) -> bytes, or None to remove it."""
    path = tmp_path / "damaged"
    if path.exists():
        shutil.rmtree(path)
    shutil.copytree(sample, path)
    data = change(bytearray((path / name).read_bytes()))
    (path / name).unlink()
    if data is not None:
        (path / name).write_bytes(data)
    return path


def files(sample):
    return sorted(p.name for p in sample.glob("level*"))


def test_every_committed_byte_is_under_a_checksum(sample, tmp_path):
    """Flip single bits all over every file: verify() names the file, and a read never returns the damaged bytes."""
    rng = random.Random(0)
    with MegaTree.open(sample, mode="r") as tree:
        assert tree.verify() == sum(os.path.getsize(sample / name) for name in files(sample))
    for name in files(sample):
        size = os.path.getsize(sample / name)
        for at in {0, size - 1, size // 2, *(rng.randrange(size) for _ in range(6))}:
            def flip(data):
                data[at] ^= 1 << rng.randrange(8)
                return data
            path = damaged(sample, tmp_path, name, flip)
            last_chunk = at >= (size - 1) // CHUNK * CHUNK
            if last_chunk:
                with pytest.raises(TreeError, match=f"{name} is damaged .* expected checksum .* found"):
                    MegaTree.open(path, mode="r")
                continue
            with MegaTree.open(path, mode="r") as tree:
                with pytest.raises(TreeError, match=f"{name} is damaged"):
                    tree.verify()
                with pytest.raises(TreeError, match=f"{name} is damaged"):
                    check_tree(tree)


def test_a_truncated_or_missing_file_is_refused(sample, tmp_path):
    for name in files(sample):
        size = os.path.getsize(sample / name)
        for left in {0, size - 1, size // 2}:
            with pytest.raises(TreeError, match=f"{name} is truncated: expected at least {size} bytes .* found {left}"):
                MegaTree.open(damaged(sample, tmp_path, name, lambda data: data[:left]), mode="r")
        with pytest.raises(TreeError, match=f"{name}: expected .* rows, found no file"):
            MegaTree.open(damaged(sample, tmp_path, name, lambda data: None), mode="r")


def test_a_damaged_record_is_refused_or_harmless(sample, tmp_path):
    """Any byte of tree.db, inverted: the tree is refused, or (the byte was unused) it is verified and whole."""
    rng = random.Random(0)
    size = os.path.getsize(sample / "tree.db")
    refused = 0
    for at in [*range(0, 100, 7), *(rng.randrange(size) for _ in range(150))]:
        def flip(data):
            data[at] ^= 0xFF
            return data
        path = damaged(sample, tmp_path, "tree.db", flip)
        try:
            with MegaTree.open(path, mode="r") as tree:
                tree.verify()
                check_tree(tree, 70_001)
        except TreeError:
            refused += 1
    assert refused > 20
    for change in (lambda data: b"", lambda data: b"not a database" * 100, lambda data: data[:5000], lambda data: None):
        with pytest.raises(TreeError, match="tree.db"):
            with MegaTree.open(damaged(sample, tmp_path, "tree.db", change), mode="r") as tree:
                tree.verify()


@pytest.mark.parametrize("change", ["rows", "chunk"])
def test_a_record_that_was_edited_is_refused(sample, tmp_path, change):
    """Valid SQLite, wrong numbers: one token less than was committed, or a checksum that is not the chunk's."""
    shutil.copytree(sample, tmp_path / "t")
    with sqlite3.connect(tmp_path / "t" / "tree.db") as db:
        if change == "rows":
            assert db.execute("update state set body = replace(body, '70001', '70000')").rowcount == 1
        else:
            assert db.execute("update chunks set crc = crc + 1 where file = 'level1.gists' and chunk = 0").rowcount == 1
    db.close()
    with pytest.raises(TreeError, match="does not match its checksum" if change == "rows" else "level1.gists is damaged in bytes 0"):
        with MegaTree.open(tmp_path / "t", mode="r") as tree:
            tree.verify()


@pytest.mark.parametrize("change, message", [
    (dict(version=2), "another version: expected 1, found 2"),
    (dict(format="other"), "another format: expected megacontext-tree, found other"),
    (dict(block=16), "another block: expected 32, found 16"),
    (dict(model="gpt-2"), "another model: expected gpt-1, found gpt-2"),
    (dict(tokenizer=None), "another tokenizer: expected tok-1, found None"),
])
def test_a_tree_of_another_version_or_model_is_refused(tmp_path, change, message):
    MegaTree.create(tmp_path / "t", HEADER | change).close()
    with pytest.raises(TreeError, match=message):
        MegaTree.open(tmp_path / "t", model="gpt-1", tokenizer="tok-1")
    with pytest.raises(TreeError, match=message):
        MegaTree.open(tmp_path / "t", mode="r", model="gpt-1", tokenizer="tok-1")
    if "model" in change:
        MegaTree.open(tmp_path / "t", model="gpt-2").close()  # and the failed opens let go of the lock


# ----------------------------------------------------------------------------------------------------------------------
# A full disk

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


# ----------------------------------------------------------------------------------------------------------------------
# Ten million tokens

OPEN = """
import sys, time
import numpy, sqlite3, resource
from megacontext.tree import MegaTree
status = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
rss, start = status(), time.perf_counter()
tree = MegaTree.open(sys.argv[1], mode=sys.argv[2], model="gpt-1")
print(time.perf_counter() - start, status() - rss, tree.length, tree.levels)
assert tree.tokens(5_000_000, 5_000_001)[0] == 5_000_000 * 2654435761 % 2 ** 31
"""


@pytest.fixture(scope="module")
def ten_million(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "tree"
    with MegaTree.create(path, HEADER) as tree:
        while tree.length < 10_000_000:
            ingest(tree, 1_000_000)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_ten_million_tokens_open_at_once_and_take_no_memory(ten_million, mode):
    out = subprocess.run([sys.executable, "-c", OPEN, ten_million, mode], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    seconds, megabytes, length, levels = map(float, out.stdout.split())
    assert (length, levels) == (10_000_000, 5)
    assert seconds < 1 and megabytes < 50, f"{seconds:.3f} s, {megabytes:.1f} MB"


def test_an_append_costs_the_same_at_a_thousand_and_at_ten_million(ten_million, tmp_path, monkeypatch):
    """Counted, not timed: bytes written and read and rows of the record changed, for one block and its commit."""
    def account(path, blocks=32):
        tree, counts = MegaTree.open(path), {"written": 0, "read": 0, "rows": 0}
        write, read = os.pwrite, os.pread
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at: (counts.update(written=counts["written"] + len(data)), write(fd, data, at))[1])
            patch.setattr(os, "pread", lambda fd, n, at: (counts.update(read=counts["read"] + n), read(fd, n, at))[1])
            patch.setattr(column_file.mmap, "mmap", None)  # an append maps nothing
            changes = tree.record.db.total_changes
            for _ in range(blocks):
                ingest(tree, BLOCK)
                tree.commit()
            counts["rows"] = tree.record.db.total_changes - changes
        length = tree.length
        tree.close()
        with MegaTree.open(path) as tree:
            tree.truncate(length - blocks * BLOCK)
        return counts
    with MegaTree.create(tmp_path / "small", HEADER) as tree:
        ingest(tree, 1024)
    small, large = account(tmp_path / "small"), account(ten_million)
    assert small["read"] == large["read"] == 0
    assert abs(large["written"] - small["written"]) <= 8 * (2 * D + 2 * K)  # a few more parents may fall due
    assert large["rows"] <= 1.2 * small["rows"]


def test_disk_bytes_are_what_the_accounting_says(ten_million):
    """4 bytes of id, and (D + K) bf16 numbers per gist, 1/31 of a gist per token: 4 + 2 (D + K) / 31 = 6.06; the record is extra."""
    total = sum(os.path.getsize(p) for p in ten_million.glob("level*")) / 10_000_000
    with MegaTree.open(ten_million, mode="r") as tree:
        sizes = tree.sizes()
    record = sizes.pop("record")
    assert sum(sizes.values()) / 10_000_000 == pytest.approx(total, rel=1e-3) and sizes["ids"] == 40_000_000
    assert 0 < record / 10_000_000 < 0.02
    assert total == pytest.approx(4 + 2 * (D + K) / 31, rel=1e-3)
    assert os.path.getsize(ten_million / "tree.db") / 10_000_000 < 0.02
