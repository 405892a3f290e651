"""A tree that is not what it says is refused, with what was expected and what was found."""

import os
import random
import shutil
import sqlite3

import pytest

from megacontext.column import CHUNK
from megacontext.tree import MegaTree, TreeError

from tree_truth import HEADER, check_tree


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
