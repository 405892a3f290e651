"""
Ctrl-C at every single line of what a tree does, once each. Whoever catches it goes on with the same tree: what was committed is there, what
follows is written where it belongs, and the folder opens again.
"""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from megacontext import column, record, tree
from megacontext.tree import MegaTree, TreeError

from tree_truth import HEADER, check_tree, ids, ingest

FILES = {file.__file__ for file in (column, record, tree)}


def interrupted(action, at):
    """Do action(), interrupted just before the at-th line of FILES that it comes to. Returns which line that was, None if it was done before."""
    lines, where = 0, None

    def trace(frame, event, _):
        nonlocal lines, where
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return where


START, WAITING = 16_360, 3  # tokens that are committed, and that wait behind them; a chunk of ids ends at 16,384


@pytest.fixture(scope="module")
def committed():
    """The folder of a tree. In RAM where the system has a place for that: there is a copy for each line, and no power fails here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        with MegaTree.create(Path(folder) / "committed", HEADER) as tree:
            ingest(tree, START)
        yield Path(folder) / "committed"


def every_interrupt(committed, action, then, least=START):
    """Interrupt action(tree) at each of its lines, then go on with then(tree) and more tokens: the tree is whole, and has at least so many tokens of before. Returns the lines."""
    at, lines, folder = 0, set(), committed.with_name("tree")
    while True:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(committed, folder)
        tree = MegaTree.open(folder)
        ingest(tree, WAITING)
        where = interrupted(lambda: action(tree), at)
        try:
            then(tree)
            length = tree.length
            with MegaTree.open(folder, mode="r") as reader:
                reader.verify()
                assert reader.length >= least
            ingest(tree, 100)
            tree.close()
            tree = MegaTree.open(folder)
            tree.verify()
            check_tree(tree, length + 100)
            tree.close(commit=False)
        except Exception as error:
            raise AssertionError(f"interrupted before {where}, the {at}-th line") from error
        if where is None:
            return lines
        lines.add(where)


def grow(tree):
    """A chunk of ids is filled and the next begun, a node of level 2 completed, and all of it committed."""
    ingest(tree, 33)
    tree.commit()


@pytest.mark.parametrize("then, least", [(MegaTree.commit, START), (lambda tree: tree.tokens(0, tree.length), START), (lambda tree: tree.truncate(START - 40), START - 40)],
                         ids=["commit", "read", "rewind"])
def test_a_growing_tree_survives_an_interrupt_at_any_line(committed, then, least):
    """
    A column's checksum was ahead of its rows in the middle of an append: the next commit wrote it, and the tree was 'damaged' for good. Keys were ahead of
    gists. And just after `begin` a transaction stayed open: every later commit failed, 'cannot start a transaction within a transaction'.
    """
    assert len(every_interrupt(committed, grow, then, least)) > 100


def test_a_rewind_survives_an_interrupt_at_any_line(committed):
    """Tokens were cut and their gists were not: the next commit made a tree that was never opened again."""
    lengths = set()

    def then(tree):
        lengths.add(tree.length)
        tree.commit()
    assert len(every_interrupt(committed, lambda tree: tree.truncate(START // 2), then, least=START // 2)) > 50
    assert lengths == {START // 2, START + WAITING}, "all of it or nothing"


def test_a_reader_survives_an_interrupt_at_any_line(committed):
    """It closed the map of a file before it made the longer one: 'mmap closed or invalid' at every read since."""
    def look(tree):
        tree.tokens(0, 5)
        ingest(tree, 33)
        return tree.tokens(0, tree.length), tree.gists(1, 0, tree.count(1))
    every_interrupt(committed, look, lambda tree: tree.tokens(0, tree.length))


def test_a_rewind_of_what_an_interrupted_commit_had_committed_is_told_to_readers(tmp_path, monkeypatch):
    """Interrupted when the record was written and the tree did not know it yet: the rewind looked like one of tokens that nobody had seen, and a reader of them was served others."""
    tree = MegaTree.create(tmp_path / "t", HEADER)
    ingest(tree, 3000)
    with monkeypatch.context() as patch:
        write = tree.record.write

        def interrupted_at_its_end(*args):
            write(*args)
            raise KeyboardInterrupt
        patch.setattr(tree.record, "write", interrupted_at_its_end)
        with pytest.raises(KeyboardInterrupt):
            tree.commit()
    reader = MegaTree.open(tmp_path / "t", mode="r")
    check_tree(reader, 3000)
    tree.truncate(1000)
    tree.append_tokens(ids(1000, 3000, salt=1))
    tree.commit()
    with pytest.raises(TreeError, match="was rewound by its writer"):
        reader.tokens(0, 3000)
    reader.close()
    tree.close()
