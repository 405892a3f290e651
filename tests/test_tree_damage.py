"""A tree that is not what it says is refused, with what was expected and what was found; so is one whose writer was killed."""

import json
import os
import random
import shutil
import sqlite3
import zlib

import pytest

from megacontext.column import CHUNK
from megacontext.tree import MegaTree, TreeError

from tree_truth import HEADER, check_tree, ids, ingest


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


def test_a_rewind_that_meets_a_damaged_gist_changes_nothing(sample, tmp_path):
    """The tokens were cut before the gists were looked at, and the next commit made a tree that was never opened again: more gists than its tokens have."""
    def flip(data):
        data[5] ^= 1
        return data
    path = damaged(sample, tmp_path, "level1.gists", flip)
    with MegaTree.open(path) as tree:
        before = [column.rows for column in tree.columns.values()]
        with pytest.raises(TreeError, match="level1.gists is damaged in bytes 0"):
            tree.truncate(32 * 600)
        assert [column.rows for column in tree.columns.values()] == before
        tree.append_tokens([1, 2, 3])
    with MegaTree.open(path) as tree:
        assert tree.tokens(0, 70_004).tolist() == [*ids(0, 70_001).tolist(), 1, 2, 3] and tree.count(1) == 2187


def test_a_fork_that_meets_a_damaged_chunk_leaves_nothing(sample, tmp_path):
    """It left an empty tree: the next fork was told that there is a tree, and whoever opened it had lost everything."""
    def flip(data):
        data[70_000] ^= 1
        return data
    with MegaTree.open(damaged(sample, tmp_path, "level0.ids", flip)) as tree:
        for tokens in (None, 20_000, None):
            with pytest.raises(TreeError, match="level0.ids is damaged in bytes 65536"):
                tree.fork(tmp_path / "fork", tokens)
            assert not (tmp_path / "fork").exists()
        tree.fork(tmp_path / "fork", 16_000).close()
    with MegaTree.open(tmp_path / "fork") as tree:
        check_tree(tree, 16_000)


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_truncated_or_missing_file_is_refused(sample, tmp_path, mode):
    """And who has all tokens is told that gists are made of them. A writer made the missing file, empty, before it looked."""
    for name in files(sample):
        size = os.path.getsize(sample / name)
        todo = "Restore the tree from a copy" if name == "level0.ids" else f"Make all gists anew from the tokens, .*: python -m scripts.mega_ingest --tree {tmp_path} --renew"
        for left in {0, size - 1, size // 2}:
            with pytest.raises(TreeError, match=f"{name} is truncated: expected at least {size} bytes .* found {left}. {todo}"):
                MegaTree.open(damaged(sample, tmp_path, name, lambda data: data[:left]), mode)
        path = damaged(sample, tmp_path, name, lambda data: None)
        for _ in range(2):
            with pytest.raises(TreeError, match=f"{name}: expected .* rows, found no file. {todo}"):
                MegaTree.open(path, mode)


def test_a_tree_opens_without_its_gists_however_they_are_and_only_a_commit_forgets_them(sample, tmp_path):
    path = shutil.copytree(sample, tmp_path / "t")
    tree = MegaTree.open(path, gists=False)
    assert (tree.length, tree.levels, tree.damage()) == (70_001, 1, {})
    tree.close(commit=False)
    with MegaTree.open(path) as tree:
        check_tree(tree, 70_001)
    (path / "level1.keys").write_bytes(b"too short")
    (path / "level2.gists").unlink()
    with MegaTree.open(path, gists=False) as tree:
        assert sorted(tree.damage()) == ["level1.keys", "level2.gists"]
        tree.reset_gists(model="gpt-2")
        ingest(tree, 0)
    with MegaTree.open(path, model="gpt-2") as tree:
        tree.verify()
        check_tree(tree, 70_001)


def test_more_gists_than_tokens_have_are_damaged_gists(sample, tmp_path):
    """What a rewind once left that met a damaged chunk: its tokens are whole, so there is a way back."""
    path = shutil.copytree(sample, tmp_path / "t")
    with MegaTree.open(path) as tree:
        tree.columns[0, "ids"].truncate(1000)
    with pytest.raises(TreeError, match="expected at most 31 gists at level 1, found 2187. .*--renew"):
        MegaTree.open(path)
    with MegaTree.open(path, gists=False) as tree:
        assert list(tree.damage()) == ["level1.gists"]
        tree.reset_gists()
        ingest(tree, 0)
    with MegaTree.open(path) as tree:
        check_tree(tree, 1000)


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


# ----------------------------------------------------------------------------------------------------------------------
# The writer was killed

RECORD = ("tree.db", "tree.db-journal", "tree.db-wal", "tree.db-shm", "commits")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """{what: (folder as a kill leaves it, tokens committed in it)}: after a commit, and in the middle of one, when SQLite has changed its file in part."""
    root = tmp_path_factory.mktemp("killed")
    tree = MegaTree.create(root / "t", HEADER)
    for _ in range(3):
        ingest(tree, 10_000)
        tree.commit()
    shutil.copytree(root / "t", root / "after")
    tree.truncate(20_000)
    ingest(tree, 10_000)
    tree.commit()
    db = tree.record.db
    db.execute("pragma cache_size = 1")  # pages are written early

    class Watched:
        in_transaction = True
        executemany = db.executemany

        def execute(self, statement, *args):
            if statement == "commit":
                shutil.copytree(root / "t", root / "amid")
            return db.execute(statement, *args)
    ingest(tree, 4_000_000, gists=False)
    tree.record.db = Watched()
    tree.commit()
    tree.record.db = db
    tree.close()
    for name in ("level0.ids", "lock"):  # what is beyond the commit is not needed
        with open(root / "amid" / name, "r+b") as file:
            file.truncate(min(file.seek(0, 2), 200_000))
    return {"after": (root / "after", 30_000), "amid": (root / "amid", 30_000)}


@pytest.mark.parametrize("what", ["after", "amid"])
def test_a_killed_tree_is_whole_or_refused_and_never_less(killed, tmp_path, what):
    """
    A flipped bit in SQLite's write-ahead log was the end of it: 10,000 committed tokens were none, verify() passed, and the next append would have
    written over them. Every file of the record, flipped, cut and removed: what opens and is verified has all that was committed.
    """
    sample, length = killed[what]
    rng, refused = random.Random(0), 0
    assert what == "after" or os.path.getsize(sample / "tree.db-journal") > 4096
    for name in filter(lambda name: (sample / name).exists(), RECORD):
        size = os.path.getsize(sample / name)
        places = sorted({*range(0, min(size, 100), 5), *(rng.randrange(size) for _ in range(50))}) if size else []

        def flip(at):
            def change(data):
                data[at] ^= 1 << rng.randrange(8)
                return data
            return change
        changes = [flip(at) for at in places] + [lambda data, left=left: data[:left] for left in {0, size // 3, max(size - 1, 0)}] + [lambda data: None]
        for change in changes:
            path = damaged(sample, tmp_path, name, change)
            try:
                with MegaTree.open(path, mode="r") as tree:
                    tree.verify()
                    check_tree(tree, length)
            except TreeError:
                refused += 1
    assert refused > 20


@pytest.mark.parametrize("name, message", [
    ("commits", "expected its number of commits in the file commits, found none"), ("tree.db", "expected the commit record tree.db beside .* bytes of level0.ids, found none")])
def test_what_a_killed_tree_has_lost_of_its_record_is_named_and_not_made_anew(killed, tmp_path, name, message):
    """A missing log was once 'no such table: state'."""
    path = damaged(killed["after"][0], tmp_path, name, lambda data: None)
    before = (path / "level0.ids").read_bytes()
    for attempt in [lambda: MegaTree.open(path), lambda: MegaTree.open(path, mode="r")] + [lambda: MegaTree.create(path, HEADER)] * (name == "tree.db"):
        with pytest.raises(TreeError, match=message):
            attempt()
    assert (path / "level0.ids").read_bytes() == before


def test_a_record_that_is_older_than_its_tree_is_refused(tmp_path):
    """An older copy of tree.db, whole in itself: what was committed since would look like what a crash leaves, and be written over."""
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 1000)
        tree.commit()
        older = (tmp_path / "t" / "tree.db").read_bytes()
        reader = MegaTree.open(tmp_path / "t", mode="r")
        ingest(tree, 1000)
        tree.commit()
        assert reader.verify() and reader.length == 1000  # a reader may know of less, for it has not looked again
        reader.close()
    (tmp_path / "t" / "tree.db").write_bytes(older)
    for mode in ("a", "r"):
        with pytest.raises(TreeError, match="not the newest: expected commit 3 or a later one, found 1"):
            MegaTree.open(tmp_path / "t", mode)


def test_a_tree_made_before_commits_were_counted_is_gone_on_with(tmp_path):
    """Such trees have a write-ahead log too. A reader leaves them as they are, and the first commit counts."""
    with MegaTree.create(tmp_path / "t", HEADER) as tree:
        ingest(tree, 1000)
    with sqlite3.connect(tmp_path / "t" / "tree.db") as db:
        state = json.loads(db.execute("select body from state").fetchone()[0])
        body = json.dumps({key: state[key] for key in state if key != "commits"})
        db.execute("update state set body = ?, crc = ?", (body, zlib.crc32(body.encode())))
    db.execute("pragma journal_mode = wal")
    db.close()
    (tmp_path / "t" / "commits").unlink()
    with MegaTree.open(tmp_path / "t", mode="r") as tree:
        check_tree(tree, 1000)
    with MegaTree.open(tmp_path / "t") as tree:
        check_tree(tree, 1000)
        ingest(tree, 1000)
    with MegaTree.open(tmp_path / "t") as tree:
        check_tree(tree, 2000)
        assert tree.record.state["commits"] == 1 and tree.record.db.execute("pragma journal_mode").fetchone() == ("truncate",)
    assert sorted(path.name for path in (tmp_path / "t").glob("tree.db*")) in (["tree.db"], ["tree.db", "tree.db-journal"])
    (tmp_path / "t" / "commits").unlink()
    with pytest.raises(TreeError, match="number of commits"):
        MegaTree.open(tmp_path / "t")


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
