"""
Kill the writer of a tree at any instant: what it had committed is there, whole, and ingest goes on from it.
First every instant one after the other, without luck: the folder is copied before each single write, flush and statement, as
if the process had died right there, and each copy is opened. Then real processes, really killed.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from megacontext import column as column_file
from megacontext import record as record_file
from megacontext import tree as tree_file
from megacontext.tree import MegaTree, TreeError

from tree_truth import HEADER, K, check_tree, ids, ingest


class Instants:
    """Copies the folder before every system call or statement that changes it, and notes the order they came in."""

    def __init__(self, folder, copies, monkeypatch, tree):
        self.folder, self.copies, self.events = folder, copies, []
        self.before(monkeypatch, os, "pwrite")
        self.before(monkeypatch, os, "posix_fallocate")
        self.before(monkeypatch, column_file, "_flush")
        self.before(monkeypatch, tree_file, "flush_folder")
        db = tree.record.db
        tree.record.db = self  # stands in for the connection: same methods, with a copy before each statement
        self.db = db

    def before(self, monkeypatch, module, name):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (self.snapshot(name), call(*args))[1])

    def snapshot(self, event):
        shutil.copytree(self.folder, self.copies / f"{len(self.events):04}")
        self.events.append(event)

    def execute(self, statement, *args):
        self.snapshot(statement.split(" ")[0])
        return self.db.execute(statement, *args)

    def executemany(self, statement, rows):
        self.snapshot("insert many")
        return self.db.executemany(statement, rows)

    @property
    def in_transaction(self):
        return self.db.in_transaction

    def close(self):
        self.db.close()


def test_at_every_instant_of_a_commit_the_tree_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 40_000)
    tree.commit()
    (tmp_path / "at").mkdir()
    with monkeypatch.context() as patch:
        instants = Instants(tmp_path / "t", tmp_path / "at", patch, tree)
        ingest(tree, 25_000)  # fills chunks, opens new ones
        tree.commit()
        marker = len(instants.events)
        tree.truncate(33_333)  # cuts committed rows off ...
        tree.append_tokens(ids(33_333, 50_000, salt=5))  # ... and writes other ones over them
        tree.commit()
        tree.record.db = instants.db
    tree.close()
    assert marker >= 10 and len(instants.events) >= marker + 8
    lengths = []
    for i, event in enumerate(instants.events):
        with MegaTree.open(tmp_path / "at" / f"{i:04}") as crashed:
            crashed.verify()
            lengths.append(crashed.length)
            if crashed.length == 50_000:
                assert (crashed.tokens(33_333, 50_000) == ids(33_333, 50_000, salt=5)).all()
            else:
                check_tree(crashed)
            salt_free = min(crashed.length, 33_333)
            assert (crashed.tokens(0, salt_free) == ids(0, salt_free)).all()
            ingest(crashed, 100, gists=False)  # and it goes on
    assert lengths[:marker] == [40_000] * lengths.count(40_000) + [65_000] * (marker - lengths.count(40_000))
    assert set(lengths) == {40_000, 65_000, 33_333, 50_000} and lengths[-1] == 50_000, lengths  # an instant after each commit: they are counted then


def test_at_every_instant_of_a_reset_the_gists_are_the_old_or_the_new_ones(tmp_path, monkeypatch):
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 40_000)
    tree.commit()
    (tmp_path / "at").mkdir()
    with monkeypatch.context() as patch:
        instants = Instants(tmp_path / "t", tmp_path / "at", patch, tree)
        tree.reset_gists(model="gpt-2", width=4)
        tree.append_gists(1, np.full((1250, 4), 2.0), np.full((1250, K), 3.0))
        tree.commit()
        tree.record.db = instants.db
    tree.close()
    seen = []
    for i in range(len(instants.events)):
        with MegaTree.open(tmp_path / "at" / f"{i:04}") as crashed:
            crashed.verify()
            assert (crashed.tokens(0, 40_000) == ids(0, 40_000)).all()
            model, count = crashed.header["model"], crashed.count(1)
            if model == "gpt-1":
                check_tree(crashed, 40_000)
            else:
                assert count in (0, 1250) and (crashed.gists(1, 0, count) == 2.0).all() and crashed.count(2) == 0
        seen += [(model, count)] if (model, count) not in seen else []
    assert seen == [("gpt-1", 1250), ("gpt-2", 0), ("gpt-2", 1250)], seen


def test_data_is_flushed_before_the_record_speaks_of_it(tmp_path, monkeypatch):
    """What a power failure needs and a kill cannot show: the order of the calls."""
    tree = MegaTree.create(tmp_path / "t", HEADER)
    (tmp_path / "at").mkdir()
    with monkeypatch.context() as patch:
        instants = Instants(tmp_path / "t", tmp_path / "at", patch, tree)
        ingest(tree, 3000)
        tree.commit()
        tree.record.db = instants.db
    events = instants.events
    commit, begin = events.index("commit"), events.index("begin")
    assert events[commit:] == ["commit", "pwrite"]  # the number of commits, when the commit is done
    writes = [i for i, event in enumerate(events[:commit]) if event in ("pwrite", "posix_fallocate")]
    flushes = [i for i, event in enumerate(events) if event == "_flush"]
    assert len(flushes) == 5  # ids, and gists and keys of two levels
    assert max(writes) < min(flushes) <= max(flushes) < events.index("flush_folder") < begin < commit
    assert instants.db.execute("pragma synchronous").fetchone() == (2,)  # full: SQLite flushes its own journal, and that it is void again
    tree.close()


def test_the_name_of_a_file_that_a_killed_writer_made_is_flushed_by_the_next(tmp_path, monkeypatch):
    """Who found the file there took its name for durable: a power failure could have taken it, and the committed gists in it, away."""
    MegaTree.create(tmp_path / "t", HEADER).close()
    (tmp_path / "t" / "level1.gists").touch()
    flushed = []
    with MegaTree.open(tmp_path / "t") as tree:
        monkeypatch.setattr(tree_file, "flush_folder", flushed.append)
        for n in (31, 1, 5, 27):
            ingest(tree, n)
            tree.commit()
    assert flushed == [tmp_path / "t"] * 2  # the first ids, the first gists


def test_killed_before_any_step_of_its_making_a_tree_is_made_again(tmp_path, monkeypatch):
    """It once had a folder, its files and an empty record one after the other: whoever came back was told to make it, and then that it was there."""
    (tmp_path / "at").mkdir()
    copies, folder = [], tmp_path / "t"

    def before(module, name):
        call = getattr(module, name)

        def step(*args, **settings):
            if folder.exists():
                copies.append(tmp_path / "at" / str(len(copies)))
                shutil.copytree(folder, copies[-1])
            return call(*args, **settings)
        monkeypatch.setattr(module, name, step)

    with monkeypatch.context() as monkeypatch:
        for name in ("open", "pwrite", "fsync", "rename", "ftruncate"):
            before(os, name)
        for name in ("touch", "rename", "unlink"):
            before(type(tmp_path), name)
        before(sqlite3, "connect")
        before(record_file, "_checked")
        MegaTree.create(folder, HEADER).close(commit=False)
    assert len(copies) > 10
    made = [MegaTree.exists(copy) for copy in copies]
    assert made == sorted(made) and not made[10]
    for copy in copies:
        with MegaTree.open(copy) if MegaTree.exists(copy) else MegaTree.create(copy, HEADER) as tree:
            ingest(tree, 100)
        with MegaTree.open(copy, model="gpt-1") as tree:
            check_tree(tree, 100)
        assert not (copy / "tree.db.new").exists()


def test_a_fork_that_was_killed_is_no_empty_tree(sample, tmp_path, monkeypatch):
    with MegaTree.open(sample, mode="r") as tree:
        with monkeypatch.context() as patch:
            commit = MegaTree.commit
            patch.setattr(MegaTree, "commit", lambda fork: (shutil.copytree(fork.folder, tmp_path / "killed"), commit(fork)))
            fork = tree.fork(tmp_path / "fork")
        fork.close()
    with MegaTree.open(tmp_path / "fork", model="gpt-1") as fork:
        check_tree(fork, 70_001)
    for mode in ("a", "r"):
        with pytest.raises(TreeError, match="killed is of another format: expected megacontext-tree, found a fork that was broken off"):
            MegaTree.open(tmp_path / "killed", mode)


# ----------------------------------------------------------------------------------------------------------------------

READER = """
import os, sys, numpy.testing
sys.path[:0] = [".", "tests"]
from tree_truth import check_tree
from megacontext.tree import MegaTree
if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere
def look(what):
    try:
        check_tree(what(), 10_000)
        print("whole", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
kept = []
for path in sys.stdin:
    look(lambda: kept.append(MegaTree.open(path.strip(), mode="r")) or kept[-1])
    look(lambda: kept[0].refresh() or kept[0])
"""


def test_a_commit_broken_off_is_told_to_who_may_not_undo_it_and_undone_by_who_may():
    """A reader who might write all but the record itself was told that the record is damaged, and to restore the tree from a copy."""
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which lets nobody else in
        os.chmod(folder, 0o755)
        folder = Path(folder)
        with MegaTree.create(folder / "t", HEADER) as tree:
            ingest(tree, 10_000)
        reader = subprocess.Popen([sys.executable, "-c", READER], cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def told(path):
            """What a reader is told who opens it, and one who opened the tree before the commit."""
            reader.stdin.write(f"{path}\n")
            reader.stdin.flush()
            return [reader.stdout.readline().rstrip() for _ in range(2)]

        def let(path, others, in_folder, record):
            for file in path.iterdir():
                file.chmod(others)
            (path / "tree.db").chmod(record)
            path.chmod(in_folder)
            return path

        assert told(let(folder / "t", 0o444, 0o555, 0o444)) == ["whole", "whole"]
        let(folder / "t", 0o644, 0o755, 0o644)
        writer = subprocess.run([sys.executable, "-c", KILLED, folder / "t"], cwd=Path(__file__).parent.parent)
        assert writer.returncode == -signal.SIGKILL and (folder / "t" / "tree.db-journal").stat().st_size
        copies = {name: shutil.copytree(folder / "t", folder / name) for name in ("nothing", "folder", "files", "but the record", "all")}
        rights = {"but the record": (0o666, 0o777, 0o444), "nothing": (0o444, 0o555, 0o444), "folder": (0o444, 0o777, 0o444), "files": (0o666, 0o555, 0o666)}
        before = let(folder / "t", 0o444, 0o555, 0o444)
        for name, modes in rights.items():
            new, old = told(let(copies[name], *modes))
            for line, path in (new, copies[name]), (old, before):
                assert line.startswith(f"TreeError the writer of {path}/tree.db was killed in the middle of a commit, and to undo that takes permission to write tree.db, tree.db-journal, {path.name} ("), (name, line)
                assert line.endswith("Open the tree once with it, or read a copy of the folder"), (name, line)
        let(folder / "t", 0o644, 0o755, 0o644)
        MegaTree.open(folder / "t").close(commit=False)
        let(folder / "t", 0o444, 0o555, 0o444)
        assert told(let(copies["all"], 0o666, 0o777, 0o666)) == ["whole", "whole"], "who may write undoes it, in reading too, and once it is undone all read on"
        reader.communicate()
        assert reader.returncode == 0
        for path in folder.iterdir():
            path.chmod(0o755)


KILLED = """
import os, signal, sys
sys.path[:0] = [".", "tests"]
from tree_truth import ingest
from megacontext.tree import MegaTree

class Dies:  # stands in for the connection
    def __init__(self, db):
        self.db, self.executemany = db, db.executemany
    def execute(self, statement, *args):
        if statement == "commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.db.execute(statement, *args)

tree = MegaTree.open(sys.argv[1])
tree.record.db.execute("pragma cache_size = 1")  # so SQLite overwrites pages before the commit, as a longer one does
ingest(tree, 300_000)
tree.record.db = Dies(tree.record.db)
tree.commit()
"""

CHILD = """
import os, random, sys
sys.path.insert(0, sys.argv[2])
from megacontext.tree import MegaTree
from tree_truth import ingest
rng = random.Random(int(sys.argv[3]))
tree = MegaTree.open(sys.argv[1], model="gpt-1")
say = lambda line: os.write(1, f"{line}\\n".encode()) # at once: of print(), unbuffered, a kill may leave a word
say("ready")
while True:
    for _ in range(rng.randrange(1, 6)):
        ingest(tree, rng.choice([1, 32, 100, 3000]))
    if rng.random() < 0.1:
        to = rng.randrange(max(0, tree.length - 5000), tree.length + 1)
        say(f"rewinding {to}")
        tree.truncate(to)
    tree.commit()
    say(f"committed {tree.length}")
    if rng.random() < 0.05:
        tree.close()
        tree = MegaTree.open(sys.argv[1])
"""


def kill_and_look(path, kills, seed):
    """Start an ingest, kill -9 it after a random while, open, compare every token and gist with what must be there. Again."""
    rng = random.Random(seed)
    MegaTree.create(path, HEADER).close()
    here = os.path.dirname(os.path.abspath(__file__))
    progress = 0
    for kill in range(kills):
        child = subprocess.Popen([sys.executable, "-c", CHILD, path, here, str(seed * 1000 + kill)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        said = child.stdout.read().splitlines()
        assert child.wait() == -signal.SIGKILL
        with MegaTree.open(path, model="gpt-1") as tree:
            tree.verify()
            check_tree(tree)
            promised = 0
            for line in said:  # each is a whole line: the child wrote it at once
                word, n = line.split()
                promised = int(n) if word == "committed" else min(promised, int(n))
            assert tree.length >= promised, f"{promised} tokens were committed, {tree.length} are left"
            progress += bool(said)
            ingest(tree, 10)
            if tree.length > 400_000:
                tree.truncate(rng.randrange(100_000))
    assert progress > kills // 2, "the children were killed before they did anything: nothing was tested"


def test_killed_10_times(tmp_path):
    kill_and_look(tmp_path / "t", 10, seed=1)


@pytest.mark.slow
def test_killed_200_times(tmp_path):
    kill_and_look(tmp_path / "t", 200, seed=2)
