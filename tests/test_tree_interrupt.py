"""
Ctrl-C at every single line of what a tree does, once each. Whoever catches it goes on with the same tree: what was committed is there, what
follows is written where it belongs, and the folder opens again.
"""
import os
import shutil
import sys
from pathlib import Path

import pytest

from megacontext import column, record
from megacontext.tree import MegaTree

from tree_truth import HEADER, check_tree, ingest

FILES = {file.__file__ for file in (record,)}


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
def committed(tmp_path_factory):
    path = tmp_path_factory.mktemp("committed") / "tree"
    with MegaTree.create(path, HEADER) as tree:
        ingest(tree, START)
    return path


def every_interrupt(committed, tmp_path, action, then, least):
    """Interrupt action(tree) at each of its lines, then go on with then(tree) and more tokens: the tree is whole, and has at least so many of the committed tokens."""
    at, lines = 0, set()
    while True:
        at += 1
        folder = shutil.copytree(committed, tmp_path / "tree")
        tree = MegaTree.open(folder)
        tree.record.db.execute("pragma synchronous = off")
        ingest(tree, WAITING)
        where = interrupted(lambda: action(tree), at)
        try:
            then(tree)
            length = tree.length
            ingest(tree, 100)
            tree.close()
            with MegaTree.open(folder) as tree:
                tree.verify()
                check_tree(tree, length + 100)
        except Exception as error:
            raise AssertionError(f"interrupted before {where}, the {at}-th line") from error
        assert length >= least, where
        shutil.rmtree(folder)
        if where is None:
            return lines
        lines.add(where)


def grow(tree):
    """A chunk of ids is filled and the next begun, a node of level 2 completed, and all of it committed."""
    ingest(tree, 33)
    tree.commit()


@pytest.fixture(autouse=True)
def nothing_is_flushed(monkeypatch):
    """It takes most of the time, and no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(column, "_flush", lambda fd: None)


def test_a_growing_tree_survives_an_interrupt_at_any_line(committed, tmp_path):
    """Just after `begin` it left a transaction open, and every later commit failed: 'cannot start a transaction within a transaction'."""
    lines = every_interrupt(committed, tmp_path, grow, MegaTree.commit, least=START)
    assert len(lines) > 10
