"""Pins, the orders that stand above scores: obeyed at every forward of a session, and refused where a budget could not keep them at every length to come."""
import random

import numpy as np
import pytest
import torch

from megacontext.allocator import refocus
from megacontext.runtime import Session
from megacontext.shown import Shown
from megacontext.span import BLOCK, Span
from megacontext.working_context import LEAST_BUDGET, LONGEST, Pins, assemble, check, check_pins, coarsest, cost, most_kept, raw_tail
from nanochat.common import UserError
from tests.test_runtime import session, some_ids
from tests.tiny import tiny_networks


def watch_pins(monkeypatch, pins):
    """From now on, every forward of every session sees pinned blocks as tokens, no token of a finished block that is never raw, and at most its budget. Returns counts."""
    read, seen = Shown.read, dict(forwards=0, raw=0, never=0)

    def watched(shown, entries, timeline, see):
        places = np.concatenate([shown.places[:shown.cache.length], timeline])
        raw = {int(place) // BLOCK for place in places if place == int(place)} # a gist's centre lies between two tokens
        last = int(max(places)) // BLOCK # this one is being written
        orders = {kind: {block for start, stop in getattr(pins, kind) for block in range(start // BLOCK, (stop - 1) // BLOCK + 1) if block < last} for kind in ("raw", "never")}
        assert orders["raw"] <= raw and not orders["never"] & raw, f"{orders} were ordered, {sorted(raw)} are raw"
        assert len(places) <= shown.cache.capacity
        for kind in orders:
            seen[kind] += len(orders[kind]) > 0
        seen["forwards"] += 1
        return read(shown, entries, timeline, see)

    monkeypatch.setattr(Shown, "read", watched)
    return seen


@pytest.mark.parametrize("pins", [Pins(raw=((0, 20), (600, 650), (1490, 1500))), Pins(never=((0, 64), (700, 1450), (1470, 1600))), Pins(raw=((100, 101),), never=((0, 32), (1200, 9999)))])
def test_pins_are_obeyed_at_every_forward(pins, monkeypatch, tmp_path):
    """
    What is assembled anew did not know of pins, so up to 31 tokens after a long prompt, or of a session opened again, were read with a pinned block
    as a gist, or a block that must not be seen in full view. Here: growth, a long prompt, a tree opened anew, a saved session, a rewind, a failure.
    """
    networks, ids = tiny_networks(), some_ids(1500)
    seen = watch_pins(monkeypatch, pins)
    memory = session(networks, budget=320, margin=0.0, pins=pins, longest=2000)
    memory.feed(ids[:40])
    memory.feed(ids[40:1473])
    mark = memory.mark()
    for t in ids[1473:]:
        memory.feed([t])
    check(memory.spans, 1500, 320)
    memory.save(tmp_path)
    before = seen["forwards"]
    for again in (Session(*networks, memory.tree.fork(), 320, pins=pins, longest=2000), Session.open(tmp_path, *networks, memory.tree.fork())):
        check(again.spans, 1500, 320)
        again.feed(ids[:1])
        again.feed(ids[:70])
    memory.rewind(mark)
    memory._forget()
    memory.feed(ids[1473:])
    assert seen["forwards"] > before and all(seen[kind] > 20 for kind in seen if kind == "forwards" or getattr(pins, kind))


def test_other_pins_than_those_that_were_saved_are_obeyed_at_once(monkeypatch, tmp_path):
    networks, pins = tiny_networks(), Pins(raw=((0, 20),), never=((1300, 1400),))
    memory = session(networks, budget=320, longest=2000)
    memory.feed(some_ids(1500))
    memory.save(tmp_path)
    watch_pins(monkeypatch, pins)
    again = Session.open(tmp_path, *networks, memory.tree.fork(), pins=pins)
    assert Span(0, 0) in again.spans
    again.feed([1])


def test_a_block_of_the_tail_that_is_pinned_out_of_sight_collapses_at_once():
    """Its gist was written at the end of a block only: until then a refocus failed for want of it, and left spans in view that had no keys and values."""
    memory = session(budget=192)
    memory.feed(some_ids(1500)) # in the middle of a block
    memory.pins = Pins(never=((1470, 1471),))
    memory.refocus()
    assert [span.level for span in memory.spans if span.start <= 1470 < span.stop] == [1] and memory.shown.cache.length == cost(memory.spans)


def test_what_pins_free_is_spent_on_the_newest():
    """Blocks that are never raw leave room, in which the newest others are opened: a context of the same cost as without pins, but for less than one block."""
    memory = session(budget=192, pins=Pins(never=((0, 40_000),)))
    memory.feed(some_ids(6000))
    again = Session(*tiny_networks(), memory.tree, 192, pins=memory.pins)
    assert {span.level for span in again.spans if not span.live} == {1, 2} and cost(again.spans) > 192 - BLOCK - 31
    again = Session(*tiny_networks(), memory.tree, 192, pins=Pins(never=((4000, 40_000),)))
    raw = [span.index for span in again.spans if span.level == 0 and not span.live]
    assert raw == list(range(125 - len(raw), 125)) and cost(again.spans) > 192 - BLOCK - 32


@pytest.mark.parametrize("pins", [Pins(raw=((0, 400),)), Pins(raw=((2000, 2300), (5000, 5010)))])
def test_pins_that_do_not_fit_are_refused_before_anything_is_read(pins):
    memory = session(budget=192)
    memory.feed(some_ids(6000))
    with pytest.raises(UserError, match="do not fit a budget of 192.* Unpin some"):
        Session(*tiny_networks(), memory.tree, 192, pins=pins, longest=6100)


def test_pins_that_a_budget_cannot_keep_for_ever_are_refused_when_they_are_set():
    """
    Only /pin asked what pins may cost. A session took these, read 24,636 tokens with them, and then said at every feed that they do not fit, which took back nothing and read nothing.
    What is refused leaves the pins that are.
    """
    with pytest.raises(UserError, match="2 blocks of 32 tokens pinned raw do not fit a budget of 256: .* Unpin some, or raise the budget"):
        session(budget=256, pins=Pins(raw=((0, 64),)))
    memory = session(budget=512, pins=Pins(raw=((0, 64),)))
    memory.feed(some_ids(1500))
    with pytest.raises(UserError, match="15 blocks"):
        memory.pins = Pins(raw=((0, 64), (1000, 1400)))
    assert memory.pins == Pins(raw=((0, 64),))
    memory.feed(some_ids(30_000))
    assert {Span(0, 0), Span(0, 1)} <= set(memory.spans)


def test_a_pin_takes_its_block_and_no_gists_beside_it():
    """A million tokens through 512 entries: 31 gists left over on each of three levels, and the pinned block, laid on one of the highest."""
    length = 32 ** 4 - 32 + 128 # all but one block before a raw tail of 128
    assert most_kept(Pins(), 512, longest=length) == (128 + 32 + 3 * 31, length, 0)
    assert most_kept(Pins(raw=((5, 6),)), 512, longest=length) == (128 + 32 + 3 * 31 + 32, length, 1)
    assert most_kept(Pins(), LEAST_BUDGET)[0] <= LEAST_BUDGET < most_kept(Pins(), LEAST_BUDGET, longest=64 * LONGEST)[0]


def least_cost(length, budget, pins):
    """The slow twin: entries of a history when all has collapsed that may, by its tree, with room for the next block."""
    blocks, top = (length - raw_tail(budget)) // BLOCK, coarsest(length, budget)

    def of(span):
        if span.start >= blocks * BLOCK:
            return 0
        if span.stop <= blocks * BLOCK and span.level <= top and not (span.level == 1 and pins.wants_raw(span)):
            return 1 + BLOCK * sum(pins.wants_raw(Span(0, b)) for b in range(span.start // BLOCK, span.stop // BLOCK))
        return BLOCK if span.level == 1 else sum(map(of, span.children()))

    return of(Span(4, 0)) + raw_tail(budget) + BLOCK


@pytest.mark.parametrize("seed", range(8))
def test_what_pins_may_take_is_that_of_the_worst_length(seed):
    """Against every length of a range, where it may be an entry a block too high; and at the worst length the allocator finds a context for what is accepted, and none for what cannot be."""
    rng = random.Random(seed)
    budget, first = rng.choice([192, 256, 320, 512]), BLOCK * rng.randrange(10, 1000)
    last = first + rng.choice([100, 3000, 20_000])
    for _ in range(3):
        raw = [(start, start + rng.randrange(1, 100)) for start in (rng.randrange(last) for _ in range(rng.randrange(4)))]
        pins = Pins(raw=tuple(raw))
        most, told, blocks = most_kept(pins, budget, first, last)
        worst, length = max((least_cost(n, budget, pins), n) for n in range(first, last + 1, BLOCK))
        assert worst <= most <= worst + blocks and first - BLOCK < told <= last + BLOCK
        spans = assemble(length, budget - BLOCK, tail=raw_tail(budget))
        obeyed = lambda: refocus(spans, [0.0] * len(spans), budget, tail=raw_tail(budget), pins=pins, top=coarsest(length, budget))
        if worst <= budget:
            check(obeyed().spans, length, budget)
        for refused in (obeyed,) * (worst > budget) + (lambda: check_pins(pins, budget, first, last),) * (most > budget):
            with pytest.raises(UserError, match="[Pp]in"):
                refused()
        if most <= budget:
            check_pins(pins, budget, first, last)


@pytest.mark.parametrize("then, since", [(Pins(), Pins(raw=((2000, 2040),))), (Pins(raw=((10, 20),)), Pins()), (Pins(never=((900, 940),)), Pins(raw=((900, 940), (1560, 1600))))])
def test_rewound_the_pins_are_those_of_the_mark(then, since, monkeypatch):
    """What was pinned after the mark stayed so: tokens that came to stand where forgotten ones had been were pinned, and what follows the mark was not what had followed it."""
    memory, after = session(budget=320, margin=0.0, pins=then, longest=3000), some_ids(70, seed=2)
    memory.feed(some_ids(1500))
    mark = memory.mark()
    expected = [memory.feed([t]) for t in after]
    memory.feed(some_ids(600, seed=1))
    memory.pins = since
    memory.refocus()
    memory.rewind(mark)
    assert memory.pins == then
    for t, logits in zip(after, expected):
        assert torch.allclose(memory.feed([t]), logits, atol=1e-4)
    watch_pins(monkeypatch, then)
    memory.feed(some_ids(700, seed=3)) # over the place of what was pinned
