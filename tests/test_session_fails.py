"""
Sessions whose tree fails: a disk that is full, once, at each place where the tree is asked for something. The tree is the only truth, so what
follows must be what a new session on that tree says, whatever the old one had in view when it failed.
"""
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from megacontext import runtime
from megacontext.ingest import ingest
from megacontext.runtime import Session
from megacontext.span import BLOCK, Span
from megacontext.telemetry import Telemetry
from megacontext.tree import MegaTree, TreeError, make_header
from megacontext.working_context import Pins, check, cost
from nanochat.common import UserError
from tests.test_runtime import some_ids
from tests.tiny import tiny_networks

HEADER = make_header(32, 0, gist_dtype="float32")


class FailsOnce(MegaTree):
    """A tree that raises when it is asked for the n-th time from now (`left`), before it does what it was asked for or, if `late`, after it."""

    left, late, asked = 0, False, 0

    def ask(self, name, args):
        self.asked, self.left = self.asked + 1, self.left - 1
        fails = self.left == 0
        if fails and not self.late:
            raise TreeError("no space")
        result = getattr(MegaTree, name)(self, *args)
        if fails:
            raise TreeError("no space, it was seen late")
        return result


for name in ("append_tokens", "append_gists", "commit", "truncate", "tokens", "gists", "gists_of"):
    setattr(FailsOnce, name, lambda self, *args, name=name: self.ask(name, args))


def on_a_tree_that_fails(networks, ids, left=0, late=False, telemetry=None):
    """A session on a history, whose tree fails the `left`-th time that it is asked for something from then on (0 = never)."""
    tree = FailsOnce.in_memory(HEADER)
    ingest(*networks[:2], tree, ids)
    memory = Session(*networks, tree, 192, margin=0.0, longest=10_000, telemetry=telemetry)
    tree.left, tree.late, tree.asked = left, late, 0
    return memory


def check_it_goes_on(memory, networks, refocused=False):
    """It says what a new session on a copy of its tree says, and holds in view what that one holds. refocused: both are, first of all."""
    twin = Session(*networks, memory.tree.fork(), memory.budget, margin=memory.margin, pins=memory.pins, longest=memory.longest)
    for session in (memory, twin) if refocused else ():
        session.refocus()
    check_they_agree(memory, twin)


def check_they_agree(memory, twin):
    for n in (1, 40, 1):
        assert torch.allclose(memory.feed(some_ids(n, seed=9)), twin.feed(some_ids(n, seed=9)), atol=1e-4)
        assert memory.spans == twin.spans and memory.shown.cache.length == cost(memory.spans) and not memory.waiting
        check(memory.spans, memory.length, memory.budget)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("history, n", [(1279, 1), (1250, 60), (1250, 300)])
def test_a_session_goes_on_after_a_failure_at_any_place(history, n, late, monkeypatch):
    """
    A full disk once ended a session: a failed commit kept the refocus of that tick from running, a failed ingest left what was in view behind the
    tree, and some tokens later every feed ended in "the KV cache holds 192 entries and 193 are needed", though there was space again.
    Here: a token that completes a block with a commit, a prompt with ticks, a prompt that is ingested but for its end.
    """
    networks, before, ids = tiny_networks(), some_ids(history), some_ids(n, seed=1)
    monkeypatch.setattr(runtime, "COMMIT", 2 * BLOCK)
    memory = on_a_tree_that_fails(networks, before)
    memory.feed(ids)
    times = memory.tree.asked
    for left in sorted({*range(1, min(times, 4) + 1), *np.linspace(1, times, 7, dtype=int).tolist()}):
        memory = on_a_tree_that_fails(networks, before, left, late)
        with pytest.raises(TreeError, match="no space"):
            memory.feed(ids)
        assert memory.tree.tokens(0, memory.length).tolist() == (before + ids)[:memory.length], "length tells what has been fed"
        check_it_goes_on(memory, networks)


def test_a_session_goes_on_after_its_network_failed_or_its_reader_left(monkeypatch):
    """Memory that runs out in the middle of a forward, and a reader who stops the taking in of a long prompt: the tree is whole, what was in view is not."""
    networks = tiny_networks()
    for failing in ("read_waiting", "_read_gists", "_read_again", "score"):
        memory = on_a_tree_that_fails(networks, some_ids(1250))
        with monkeypatch.context() as patch:
            patch.setattr(memory, failing, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                for _ in range(10):
                    memory.feed(some_ids(300, memory.length))
        check_it_goes_on(memory, networks)
    memory = on_a_tree_that_fails(networks, some_ids(1250))
    taken, before = memory.skim(some_ids(300)), memory.length
    assert next(taken) + before == memory.length > before
    taken.close()
    check_it_goes_on(memory, networks)


PINNED = Pins(raw=((100, 101),), never=((5960, 5961),)) # of 6,000 tokens: to obey it, a block is laid on a gist and read, and one of the tail gets its gist


@pytest.mark.parametrize("failing", ["_splice", "_read_gists", "read_waiting"])
def test_a_session_goes_on_after_a_refocus_that_was_asked_for_failed(failing, monkeypatch):
    """/pin refocuses at once. What failed in that left a plan without its keys and values: every feed and refocus since ended in an error, or in logits of another context."""
    networks = tiny_networks()
    for refocused in (False, True):
        memory = on_a_tree_that_fails(networks, some_ids(6000))
        memory.pins = PINNED
        with monkeypatch.context() as patch:
            patch.setattr(memory, failing, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                memory.refocus()
        check_it_goes_on(memory, networks, refocused)
        assert Span(0, 3) in memory.spans


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_telemetry_that_fails_costs_a_session_nothing():
    """It was told in the middle of a tick: a full disk was an OSError at every one, and each time all that was in view was forgotten and assembled anew."""
    networks, ids = tiny_networks(), some_ids(1250)

    def lost(line):
        raise ConnectionError("nobody listens")

    with pytest.warns(UserWarning, match="/dev/full"):
        silent, loud, twin = (on_a_tree_that_fails(networks, ids, telemetry=telemetry) for telemetry in (Telemetry("/dev/full"), Telemetry(tell=lost), None))
        for n in (1, 40, 1, 300, 40, 70):
            expected = twin.feed(some_ids(n, seed=n))
            assert torch.allclose(silent.feed(some_ids(n, seed=n)), expected, atol=1e-4)
            with suppress(ConnectionError): # once for every tick
                loud.feed(some_ids(n, seed=n))
            assert loud.spans == silent.spans == twin.spans and loud.shown.cache.length == twin.shown.cache.length > 0
    assert silent.telemetry.ticks == twin.telemetry.ticks > 10 and loud.untold
    loud.telemetry.tell = None
    check_they_agree(loud, twin)
    assert loud.telemetry.ticks == twin.telemetry.ticks


def two_to_pin(networks):
    """A session that has moved on from what it assembled, and another that goes on alike."""
    memory = on_a_tree_that_fails(networks, some_ids(5950))
    for t in some_ids(50, seed=1):
        memory.feed([t])
    return memory, memory.fork()


@pytest.mark.parametrize("late", [False, True])
def test_what_a_refocus_had_not_changed_when_its_tree_failed_is_still_in_view(late):
    """A tree that fails at any place, once: while entries are scored nothing has changed, and all goes on as if nobody had asked; later, as a new session does."""
    networks, kept = tiny_networks(), []
    memory, _ = two_to_pin(networks)
    memory.pins, memory.tree.asked = PINNED, 0
    memory.refocus()
    for left in np.linspace(1, memory.tree.asked, 6, dtype=int).tolist():
        memory, twin = two_to_pin(networks)
        memory.pins = twin.pins = PINNED
        memory.tree.left, memory.tree.late = left, late
        with pytest.raises(TreeError, match="no space"):
            memory.refocus()
        kept.append(memory.shown.cache.length > 0)
        check_they_agree(memory, twin) if kept[-1] else check_it_goes_on(memory, networks)
    assert kept[0] and not kept[-1]


def test_pins_that_are_refused_change_nothing():
    memory, twin = two_to_pin(tiny_networks())
    with pytest.raises(UserError, match="Unpin some"):
        memory.pins = Pins(raw=((0, 200),))
    assert memory.pins == Pins()
    check_they_agree(memory, twin)


def stopped_in_a_tick(networks, monkeypatch):
    """A session that failed between its plan and its splice: what it had in view was no longer what its working context said."""
    memory = on_a_tree_that_fails(networks, some_ids(1248))
    for t in some_ids(BLOCK):
        memory.feed([t]) # so that the next tick has to collapse something
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_splice", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            memory.feed([1])
    return memory


def test_what_is_saved_after_a_failure_is_whole(tmp_path, monkeypatch):
    """chat saves when it ends, however it ends: a session with nothing in view is assembled before it is marked, forked or saved."""
    networks = tiny_networks()
    memory = stopped_in_a_tick(networks, monkeypatch)
    memory.save(tmp_path)
    assert memory.view()["used"] == cost(memory.spans) == memory.shown.cache.length > 0
    again = Session.open(tmp_path, *networks, memory.tree.fork())
    assert torch.allclose(again.feed([1]), memory.feed([1]), atol=1e-4)


def test_a_rewind_that_could_not_be_committed_is_committed_before_the_next_token(tmp_path):
    """The tree refuses to write behind such a rewind: the session said so at every token."""
    networks, ids = tiny_networks(), some_ids(1300)
    with MegaTree.create(tmp_path / "tree", HEADER) as tree:
        memory = Session(*networks, tree, 192)
        marks = [memory.mark()]
        memory.feed(ids)
        marks.append(memory.mark())
        for mark in reversed(marks):
            memory.feed(some_ids(70, seed=1))
            tree.commit()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tree.record, "write", lambda *_: (_ for _ in ()).throw(TreeError("no space")))
                for attempt in (lambda: memory.rewind(mark), lambda: memory.feed([1])):
                    with pytest.raises(TreeError, match="no space"):
                        attempt()
            assert memory.length == mark.length
            check_it_goes_on(memory, networks)
