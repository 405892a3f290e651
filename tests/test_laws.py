"""
The laws of a working context, under random operations: budget, contiguity, alignment, level, position, atomic swaps,
lossless history. Beside them: cases small enough to check in one's head, slow obvious versions to compare with, and the
failures of an earlier implementation of this idea, each under its own name.
"""

import random
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest

from megacontext.allocator import Edit, Focus, refocus
from megacontext.span import BLOCK, GAIN, Span, width_of
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import BrokenLaw, Pins, advance, assemble, check, closed, cost, end_of, find, groups, in_order, make_room
from nanochat.common import UserError


# ----------------------------------------------------------------------------------------------------------------------
# One edit at a time: what a plan of many must come to

def expand(spans, node, budget=None):
    """
    Show the block of `node`, a gist of level 1, as tokens: in the place of the gist, or laid on the gist of gists that covers it. Raises ValueError if it does not
    fit: pay first, with a collapse.
    """
    block = Span(0, node.index)
    i = find(spans, node.start)
    if spans[i].level == 0:
        raise ValueError(f"{block} is shown already")
    after = spans[:i] + [block] + spans[i + 1:] if spans[i] == node else in_order([*spans, block])
    if budget is not None and cost(after) > budget:
        raise ValueError(f"expanding {node} takes {cost(after)} entries of a budget of {budget}: collapse something first")
    return after


def collapse(spans, node):
    """Let `node` stand for its block, or for all of its children. Raises ValueError if they are not there to collapse."""
    group = next((group for group in groups(spans) if group.node == node), None)
    if group is None:
        raise ValueError(f"{node} cannot take the place of its children: its block is not shown, or not all {BLOCK} of them are")
    return spans[:group.lo] + closed(spans, group) + spans[group.hi:]


# ----------------------------------------------------------------------------------------------------------------------
# The slow and obvious: look at every single token

def obviously_legal(spans, length, budget):
    seen = [[] for _ in range(length)] # by what levels each token is shown
    for span in spans:
        tokens = span.live if span.live else 32 if span.level == 0 else 32 ** span.level
        first = span.index * (32 if span.level == 0 else 32 ** span.level)
        assert first % (32 ** span.level) == 0
        assert first + tokens <= length # a gist stands for finished tokens only
        for token in range(first, first + tokens):
            seen[token].append(span.level)
    assert all(len(levels) == 1 or len(levels) == 2 and levels[0] > 1 and levels[1] == 0 for levels in seen)
    assert [(span.start, -span.level) for span in spans] == sorted((span.start, -span.level) for span in spans)
    assert sum(len(span.positions()) for span in spans) <= budget


def beneath(rng, spans, most):
    """Up to so many gists of level 1, at random, whose blocks may be laid: under gists of gists, and not shown."""
    beds, here = [span for span in spans if span.level > 1], set(spans)
    drawn = [rng.choice(beds) for _ in range(most if beds else 0)]
    nodes = {Span(1, rng.randrange(span.start // 32, span.stop // 32)) for span in drawn}
    return sorted(node for node in nodes if Span(0, node.index) not in here)


def openable(rng, spans):
    """A gist of level 1 whose block may be opened, at random, in view or beneath what is; None if none was found."""
    nodes = [span for span in spans if span.level == 1] if rng.random() < 0.5 else []
    nodes = nodes or beneath(rng, spans, 1)
    return rng.choice(nodes) if nodes else None


def random_spans(rng, length, budget, edits=60):
    """A legal context that no tidy rule would give: assembled, then expanded and collapsed here and there."""
    spans = assemble(length, budget, tail=rng.choice([0, 0, 40]))
    for _ in range(edits):
        node, ready = openable(rng, spans), [group for group in groups(spans) if group.frees > 0]
        if rng.random() < 0.5 and node and cost(spans) + 32 <= budget:
            spans = expand(spans, node)
        elif ready and rng.random() < 0.7:
            spans = collapse(spans, rng.choice(ready).node)
    return spans


def replayed(spans, edits):
    """What a list of edits does, one at a time, with the two elementary operations."""
    for kind, node in edits:
        spans = (expand if kind == "expand" else collapse)(spans, node)
    return spans


# ----------------------------------------------------------------------------------------------------------------------
# Span

def test_a_span_by_hand():
    block, live, gist, high = Span(0, 3), Span(0, 3, live=7), Span(1, 3), Span(2, 3)
    assert (block.start, block.stop, block.width, block.cost, block.centre) == (96, 128, 32, 32, 111.5)
    assert (live.start, live.stop, live.width, live.cost, live.centre) == (96, 103, 7, 7, 99.0)
    assert (gist.start, gist.stop, gist.width, gist.cost, gist.centre) == (96, 128, 32, 1, 111.5)
    assert (high.start, high.stop, high.width, high.cost, high.centre) == (3072, 4096, 1024, 1, 3583.5)
    assert Span(0, 3, live=1).centre == 96  # a lone token stands at its own index
    assert live.positions() == [96, 97, 98, 99, 100, 101, 102] and gist.positions() == [111.5]


@pytest.mark.parametrize("seed", range(60))
def test_parent_and_children_are_inverse_and_cover_the_same_tokens(seed):
    rng = random.Random(seed)
    span = Span(rng.randrange(1, 7), rng.randrange(10 ** 9))
    children = span.children()
    assert all(child.parent() == span for child in children)
    assert (children[0].start, children[-1].stop) == (span.start, span.stop)
    assert all(a.stop == b.start for a, b in zip(children, children[1:]))
    assert sum(child.cost for child in children) - span.cost == GAIN  # 31 at every level: never 1,023
    assert np.mean([p for child in children for p in child.positions()]) == pytest.approx(span.centre)


@pytest.mark.parametrize("bad", [dict(level=-1, index=0), dict(level=0, index=-1), dict(level=0, index=0, live=32), dict(level=1, index=0, live=3)])
def test_a_span_that_cannot_be_is_not_made(bad):
    with pytest.raises(AssertionError):
        Span(**bad)


def test_the_live_block_has_no_gist_and_a_block_no_children():
    with pytest.raises(AssertionError, match="5 of 32"):
        Span(0, 2, live=5).parent()
    with pytest.raises(AssertionError, match="no children"):
        Span(0, 2).children()


# ----------------------------------------------------------------------------------------------------------------------
# check() itself must be able to fail

@pytest.mark.parametrize("seed", range(60))
def test_check_agrees_with_the_obvious_version_and_sees_every_damage(seed):
    rng = random.Random(seed)
    length, budget = rng.randrange(1, 5000), rng.randrange(200, 500)
    spans = random_spans(rng, length, budget)
    obviously_legal(spans, length, budget)
    check(spans, length, budget)
    tiles = [i for i, span in enumerate(spans) if not any(other.level > 1 and other.start <= span.start < other.stop for other in spans[:i])]
    i, j = rng.choice(tiles), rng.randrange(len(spans)) # without a block that is laid the context is legal
    damaged = {
        "dropped": spans[:i] + spans[i + 1:],
        "twice": spans[:i] + [spans[i]] + spans[i:],
        "moved": spans[:i] + [spans[i]._replace(index=spans[i].index + 1)] + spans[i + 1:],
        "swapped": [spans[j] if k == i else spans[i] if k == j else span for k, span in enumerate(spans)] if i != j else spans[1:],
        "coarser alone": spans[:i] + [Span(spans[i].level + 2, spans[i].index)] + spans[i + 1:],
        "laid twice": spans + [Span(0, 0)],
        "live inside": spans[:i] + [Span(0, spans[i].start // 32, live=5)] + spans[i + 1:] + [Span(0, length // 32 + 1)],
    }
    for name, wrong in damaged.items():
        with pytest.raises(BrokenLaw):
            check(wrong, length, budget)
            pytest.fail(f"damage not seen: {name}")
    with pytest.raises(BrokenLaw, match="budget"):
        check(spans, length, cost(spans) - 1)
    top = max(span.level for span in spans)
    if top:
        with pytest.raises(BrokenLaw, match="level"):
            check(spans, length, budget, top=top - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Assembly

def test_assembly_by_hand():
    assert assemble(0, 0) == []
    assert assemble(70, 70) == [Span(0, 0), Span(0, 1), Span(0, 2, live=6)]
    # 70 tokens in 40 entries: the live 6, room for one raw block (32) and one gist (1) = 39
    assert assemble(70, 40, tail=0) == [Span(1, 0), Span(0, 1), Span(0, 2, live=6)]
    assert assemble(70, 38, tail=0) == [Span(1, 0), Span(1, 1), Span(0, 2, live=6)]
    # 2,048 tokens in 64 entries: 64 level-1 gists fit exactly, so nothing is coarser and nothing finer
    assert assemble(2048, 64, tail=0) == [Span(1, i) for i in range(64)]
    # in 63 they do not: two level-2 gists cost 2, the newer one opens (+31 = 33); 30 are left, one short of a block
    assert assemble(2048, 63, tail=0) == [Span(2, 0)] + [Span(1, i) for i in range(32, 64)]
    # 2 gists of level 3 and one of level 2, and too little room to share: the finest there is opens
    assert assemble(66_560, 63, tail=0) == [Span(3, 0), Span(3, 1)] + [Span(1, i) for i in range(2048, 2080)]


def test_assembly_shares_what_is_left_of_the_budget():
    """A million tokens in 8,192 entries. At the coarsest, 976 gists of level 2, 10 of level 1 and 256 tokens make 1,242. Half of the
    other 6,950 opens 112 gists of level 2 into 3,584 of level 1 (3,472); the rest opens 112 of level 1 into blocks."""
    assert assemble(1_000_000, 1_242) == [Span(2, i) for i in range(976)] + [Span(1, i) for i in range(31232, 31242)] + [Span(0, i) for i in range(31242, 31250)]
    spans = assemble(1_000_000, 8192)
    assert [sum(span.level == level for span in spans) for level in (0, 1, 2)] == [8 + 112, 10 + 3_584 - 112, 976 - 112]


@pytest.mark.parametrize("seed", range(120))
def test_assembly_is_legal_finest_and_finer_where_newer(seed):
    rng = random.Random(seed)
    length = int(10 ** rng.uniform(0, 9))
    budget = rng.randrange(400, 3000)
    tail = rng.choice([0, 1, 31, 32, 100, 256])
    spans = assemble(length, budget, tail)
    check(spans, length, budget)
    if length < 20000:
        obviously_legal(spans, length, budget)
    levels = [span.level for span in spans]
    assert levels == sorted(levels, reverse=True), "an older span is finer than a newer one"
    assert all(span.level == 0 for span in spans if span.stop > length - tail), "the tail is raw"
    assert cost(spans) > budget - GAIN or max(levels) == 0, "room for one more expansion was left"
    coarsest = max(levels)
    if coarsest:  # one level less does not fit, even with a bare tail
        with pytest.raises(UserError, match="coarsest tiling"):
            assemble(length, budget, tail, top=coarsest - 1)


def test_level_3_and_above_appear_by_themselves():
    """With 1,000 entries, level 1 tiles 24k tokens beside the tail, level 2 some 760k, level 3 some 24M, level 4 the rest."""
    tops = [max(span.level for span in assemble(length, 1000)) for length in (500, 20_000, 700_000, 20_000_000, 700_000_000)]
    assert tops == [0, 1, 2, 3, 4]


def test_assembly_and_growth_do_work_in_proportion_to_the_budget_not_the_history():
    calls, made = Counter(), Span.__new__
    with patch.object(Span, "__new__", lambda *args, **settings: (calls.update(spans=1), made(*args, **settings))[1]):
        for length in (10 ** 6, 10 ** 9, 10 ** 12):
            calls.clear()
            spans = assemble(length, 1024)
            assert calls["spans"] == len(spans) <= 1024


def test_a_budget_that_cannot_be_met_is_refused_not_trimmed():
    with pytest.raises(UserError, match="256 tokens raw"):
        assemble(10_000, 200)
    with pytest.raises(UserError, match="levels above 1"):
        assemble(10 ** 6, 1000, top=1)
    with pytest.raises(UserError, match="still .* over"):
        make_room([Span(0, i) for i in range(10)], 320, room=32, tail=320)


# ----------------------------------------------------------------------------------------------------------------------
# Edits and growth

@pytest.mark.parametrize("seed", range(60))
def test_collapse_undoes_expand_and_touches_nothing_else(seed):
    rng = random.Random(seed)
    length = rng.randrange(1, 200_000)
    spans = random_spans(rng, length, 600)
    before = list(spans)
    for node in [span for span in spans if span.level == 1] + beneath(rng, spans, 20):
        opened = expand(spans, node)
        check(opened, length)
        assert cost(opened) == cost(spans) + (GAIN if node in spans else 32)
        assert collapse(opened, node) == spans
    assert spans == before, "an operation changed the list it was given"


def test_a_block_is_laid_on_a_gist_of_gists_by_hand():
    spans = [Span(2, 0), Span(1, 32), Span(0, 33)]
    laid = expand(spans, Span(1, 5))
    assert laid == [Span(2, 0), Span(0, 5), Span(1, 32), Span(0, 33)] and cost(laid) == 1 + 32 + 1 + 32
    check(laid, 34 * 32)
    two = expand(laid, Span(1, 0))
    assert two == [Span(2, 0), Span(0, 0), Span(0, 5), Span(1, 32), Span(0, 33)]
    assert [find(two, token) for token in (0, 31, 32, 170, 192, 1023, 1024, 1056)] == [1, 1, 0, 2, 0, 0, 3, 4]
    assert groups(two) == [(1, 2, Span(1, 0), 32), (2, 3, Span(1, 5), 32), (4, 5, Span(1, 33), 31)]
    with pytest.raises(ValueError, match="shown already"):
        expand(two, Span(1, 0))
    with pytest.raises(ValueError, match="collapse something first"):
        expand(spans, Span(1, 5), budget=65)
    for wrong in ([Span(0, 5), Span(2, 0), *spans[1:]], [Span(2, 0), Span(0, 5), Span(0, 5), *spans[1:]], [Span(2, 0), Span(1, 5), *spans[1:]], [*spans, Span(0, 5)],
                  [Span(2, 0), Span(0, 5), Span(0, 4), *spans[1:]], [Span(1, 0), Span(0, 0), *(Span(1, i) for i in range(1, 33)), Span(0, 33)]):
        with pytest.raises(BrokenLaw, match="contiguity"):
            check(wrong, 34 * 32)


def test_a_family_collapses_around_blocks_that_stay_by_hand():
    """29 gists and 3 blocks become a gist of gists, with the blocks laid on it; a family whose blocks reach past the edge stays, and one of blocks alone takes an entry more."""
    family = [Span(0, i) if i in (3, 4, 20) else Span(1, i) for i in range(32)]
    assert groups(family)[-1] == (0, 32, Span(2, 0), 28)
    assert collapse(family, Span(2, 0)) == [Span(2, 0), Span(0, 3), Span(0, 4), Span(0, 20)]
    assert [group for group in groups(family, edge=640) if group.node.level > 1] == [] and groups(family, edge=672)[-1].node == Span(2, 0)
    blocks = [Span(0, i) for i in range(32)]
    assert groups(blocks)[-1] == (0, 32, Span(2, 0), -1) and collapse(blocks, Span(2, 0)) == [Span(2, 0), *blocks]
    assert refocus([*blocks, Span(1, 32)], [-1.0] * 32 + [1.0], 1025, n_diff=9, room=0, tail=1024 + 32).edits == [] # which pays for nothing
    # gists of gists with blocks on them: those lie on their parent then, the last one's too
    high = [span for i in range(32) for span in ([Span(2, i), Span(0, 32 * i + 7)] if i in (0, 31) else [Span(2, i)])]
    check(high, 32 ** 3)
    assert collapse(high, Span(3, 0)) == [Span(3, 0), Span(0, 7), Span(0, 999)]


@pytest.mark.parametrize("seed", range(60))
def test_groups_are_what_a_look_at_every_span_says(seed):
    rng = random.Random(seed)
    length = rng.randrange(1, 100_000)
    spans = random_spans(rng, length, 700, edits=200)
    here, slow = set(spans), []
    for node in {span.parent() for span in spans if not span.live}:
        if node.level == 1:
            slow += [(node, 31 if not any(span.level > 1 and span.start <= node.start < span.stop for span in spans) else 32)]
        else:
            shown = [child for child in node.children() if child in here or node.level == 2 and Span(0, child.index) in here]
            gists = sum(child in here for child in shown)
            if len(shown) == 32 and not any(span.level >= node.level and span.start <= node.start < span.stop for span in spans):
                slow.append((node, gists - 1))
    assert sorted((group.node, group.frees) for group in groups(spans)) == sorted(slow)
    for group in groups(spans):
        after = collapse(spans, group.node)
        check(after, length)
        assert cost(after) == cost(spans) - group.frees


def test_growth_token_by_token_by_hand():
    spans = []
    for length in range(1, 100):
        spans = advance(spans, length)
        check(spans, length)
        assert len(spans) == -(-length // 32) and spans[-1].live == length % 32
    assert spans == [Span(0, 0), Span(0, 1), Span(0, 2), Span(0, 3, live=3)]
    assert advance(spans, 99) == spans
    assert advance([], 99) == spans
    with pytest.raises(ValueError, match="make_room"):
        advance(spans, 100, budget=99)
    with pytest.raises(AssertionError, match="only grows"):
        advance(spans, 98)


def test_make_room_by_hand():
    spans = [Span(0, 0), Span(0, 1), Span(0, 2), Span(0, 3, live=3)]  # 99 entries
    assert make_room(spans, 99, room=0, tail=0) == spans
    assert make_room(spans, 99, room=1, tail=0) == [Span(1, 0)] + spans[1:]  # the oldest block pays first
    assert make_room(spans, 99, room=1, tail=0, pins=Pins(raw=((5, 6),))) == [Span(0, 0), Span(1, 1)] + spans[2:]
    family = [Span(1, i) for i in range(64)]
    assert make_room(family, 64, room=1, tail=0) == [Span(2, 0)] + family[32:]
    # a family with a block of the tail in it stays
    tail = [Span(1, i) for i in range(30)] + [Span(0, 30), Span(0, 31)]
    with pytest.raises(UserError, match="still 1 over"):
        make_room(tail, 94, room=1, tail=64)
    laid = [Span(2, 0), Span(0, 3), Span(0, 9)] + [Span(1, i) for i in range(32, 64)]
    assert make_room(laid, cost(laid), room=1, tail=0) == [laid[0], *laid[2:]]  # the oldest block leaves what it lies on
    assert make_room(laid, 64, room=1, tail=0) == [laid[0], *laid[3:]]
    # level 2 is the crowd: its oldest family goes before the 32 gists of level 1
    crowd = [Span(2, i) for i in range(64)] + [Span(1, 2048 + i) for i in range(32)]
    assert make_room(crowd, 96, room=1, tail=0) == [Span(3, 0)] + crowd[32:]


@pytest.mark.parametrize("seed", range(40))
def test_a_stream_of_any_length_stays_within_a_small_budget(seed):
    """Up to 3 million tokens in chunks through 600 entries, by age alone. Level 3 appears when level 2 has become the crowd."""
    rng = random.Random(seed)
    spans, length, budget = [], 0, 600
    for _ in range(60):
        chunk = rng.choice([1, 5, 31, 32, 33, 100, 250])
        spans = advance(make_room(spans, budget, chunk, tail=64), length + chunk, budget)
        length += chunk
        check(spans, length, budget)
    length = rng.randrange(10 ** 6, 3 * 10 ** 6)
    spans = assemble(length, budget, tail=64)
    for _ in range(300):
        spans = advance(make_room(spans, budget, 97, tail=64), length + 97, budget)
        length += 97
    check(spans, length, budget)
    assert all(span.level == 0 for span in spans if span.stop > length - 64)
    assert max(span.level for span in spans) == 3


def test_find():
    spans = assemble(100_000, 500)
    for position in (0, 1, 50_000, 99_999):
        span = spans[find(spans, position)]
        assert span.start <= position < span.stop
    with pytest.raises(AssertionError):
        find(spans, 100_000)


# ----------------------------------------------------------------------------------------------------------------------
# Everything at once, for a long time

def storm(seed, operations, budget=420, tail=64):
    """
    Random operations on one growing history, every law checked after each. The tree is real: a raw span must give exactly
    the tokens that were ingested, and a gist must exist.
    """
    rng = random.Random(seed)
    tree = MegaTree.in_memory(make_header(width=1, key_width=0, gist_dtype="float32"))
    truth = np.random.default_rng(seed).integers(0, 2 ** 31, 200_000)
    spans, focus, length, done = [], Focus(), 0, Counter()

    def ingest(n):
        tree.append_tokens(truth[length:length + n])
        for level in range(1, tree.levels + 1):
            a, b = tree.pending(level)
            tree.append_gists(level, np.arange(a, b, dtype=np.float32)[:, None])

    while sum(done.values()) - done["nothing to do"] < operations:
        op = rng.choices(["grow", "expand", "collapse", "room", "refocus", "assemble", "rewind"], [30, 30, 20, 5, 12, 1, 0.2])[0]
        if op == "grow" and length < len(truth) - 100:
            n = rng.choice([1, 1, 2, 31, 32, 33, 80])
            ingest(n)
            spans = advance(make_room(spans, budget, n, tail), length + n, budget)
            length += n
        elif op == "expand" and (node := openable(rng, spans)):
            try:
                spans = expand(spans, node, budget)
            except ValueError:
                assert cost(spans) + (GAIN if node in spans else 32) > budget
                op = "expand refused"
        elif op == "collapse" and (ready := [group for group in groups(spans) if group.frees > 0]):
            spans = collapse(spans, rng.choice(ready).node)
        elif op == "room":
            spans = make_room(spans, budget, rng.randrange(100), tail)
        elif op == "refocus":
            scores = [rng.uniform(-1, 1) for _ in spans]
            told = [(node, rng.uniform(-1, 1)) for node in beneath(rng, spans, 8)]
            spans, _, focus = refocus(spans, scores, budget, focus, beneath=told, tail=tail, n_diff=rng.randrange(8))
        elif op == "assemble":
            spans = assemble(length, budget, tail)
        elif op == "rewind":
            length = rng.randrange(max(0, length - 3000), length + 1)
            tree.truncate(length)
            spans, focus = assemble(length, budget, tail), Focus()
        else:
            op = "nothing to do"
        done[op] += 1
        check(spans, length, budget, top=tree.levels - 1)
        if spans:
            span = spans[rng.randrange(len(spans))]
            if span.level:
                assert tree.gists(span.level, span.index, span.index + 1) == span.index
            else:
                assert (tree.tokens(span.start, span.stop) == truth[span.start:span.stop]).all()
    assert min(done[op] for op in ("grow", "expand", "expand refused", "collapse", "room", "refocus", "assemble", "rewind")) > 0, done
    check_lossless(spans, tree, truth)
    return done


def check_lossless(spans, tree, truth):
    """Lossless: any gist of the context opens, level by level, to exactly the tokens that were ingested there."""
    for span in spans:
        if span.width > 40_000:
            continue
        todo, tokens = [span], []
        while todo:
            node = todo.pop()
            if node.level:
                todo += reversed(node.children())
            else:
                tokens += tree.tokens(node.start, node.stop).tolist()
        assert tokens == truth[span.start:span.stop].tolist()


@pytest.mark.parametrize("seed", range(4))
def test_all_laws_hold_under_20_000_random_operations(seed):
    storm(seed, 20_000)


@pytest.mark.slow
def test_all_laws_hold_under_a_million_random_operations():
    for seed in range(10):
        print(storm(100 + seed, 100_000))


# ----------------------------------------------------------------------------------------------------------------------
# Failures of an earlier implementation of this idea. How each would look if it came back is in its docstring.

def full_context(length=16_384, budget=1024):
    spans = assemble(length, budget, tail=0)
    while cost(spans) < budget - GAIN:
        spans = expand(spans, next(span for span in spans if span.level == 1))
    return spans, length, cost(spans)


def test_expanding_at_the_budget_never_deletes_history():
    """
    It kept the budget by dropping the OLDEST entries after an expansion: 12 rounds of 4 edits moved the first covered
    position from 0 to 8,292 of 16,384. Here a lone expansion is refused, and refocus pays with collapses.
    """
    spans, length, budget = full_context()
    hot = next(span for span in spans if span.level == 1)
    with pytest.raises(ValueError, match="collapse something first"):
        expand(spans, hot, budget)
    rng, focus = random.Random(0), Focus()
    for _ in range(100):
        spans, _, focus = refocus(spans, [rng.uniform(-1, 1) for _ in spans], budget, focus, room=0, tail=0, cooldown=0)
        assert spans[0].start == 0 and end_of(spans) == length
        check(spans, length, budget)


def test_a_collapse_is_never_unaligned():
    """
    It collapsed any 32 consecutive equal entries: 295 of 304 gists summarised the wrong tokens (tokens 37..68 got the gist
    of 32..63). Here 32 consecutive gists that are not one family have no parent, and no token index can name one.
    """
    consecutive = [Span(1, i) for i in range(5, 37)]  # 32 in a row, but 27 of one family and 5 of the next
    spans = [Span(0, i) for i in range(5)] + consecutive
    check(spans, 37 * 32)
    assert [group for group in groups(spans) if group.node.level > 1] == [(0, 32, Span(2, 0), 26)] # its own family: 5 blocks and 27 gists
    assert collapse(spans, Span(2, 0)) == [Span(2, 0), *spans[:5], *(Span(1, i) for i in range(32, 37))]
    with pytest.raises(ValueError, match="not all 32"):
        collapse(spans, Span(2, 1))
    spans, length, budget = full_context()
    rng, focus = random.Random(1), Focus()
    for _ in range(100):
        spans, edits, focus = refocus(spans, [rng.uniform(-1, 1) for _ in spans], budget, focus, room=0, tail=0, cooldown=0)
        assert all(node.start % width_of(node.level) == 0 for _, node in edits)
        assert all(span.start % width_of(span.level) == 0 for span in spans)


def test_a_set_of_edits_leaves_no_gap_and_no_overlap():
    """
    Start positions of later edits went stale while earlier ones were applied: 6 to 14 gaps or overlaps after 12 rounds.
    Here a plan marks spans and is applied once; the tokens covered are counted one by one.
    """
    spans, length, budget = full_context()
    rng, focus = random.Random(2), Focus()
    for _ in range(30):
        spans, edits, focus = refocus(spans, [rng.uniform(-1, 1) for _ in spans], budget, focus, room=0, tail=0, n_diff=16, cooldown=0)
        assert len(edits) > 4
        obviously_legal(spans, length, budget)


@pytest.mark.parametrize("mood", ["cold but one", "all hot", "all cold"])
def test_refocus_expands_at_the_full_budget(mood):
    """
    It expanded only below the budget and collapsed only above it, never both in one pass: with every score at -1 but one it
    made 0 edits at the budget, for ever. Here the coldest pays for the hottest in the same tick, even if all are wanted.
    """
    spans, length, budget = full_context()
    target = next(i for i, span in enumerate(spans) if span.level == 1)
    scores = {"cold but one": [-1.0] * len(spans), "all hot": [0.5 + i / 1e4 for i in range(len(spans), 0, -1)], "all cold": [-1.0] * len(spans)}[mood]
    if mood != "all cold":
        scores[target] = 1.0
    after, edits, _ = refocus(spans, scores, budget, room=0, tail=0)
    check(after, length, budget)
    if mood == "all cold":
        assert edits == []  # nobody asks for detail and nobody's place is needed: nothing to gain
    else:
        assert Edit("expand", spans[target]) in edits
        assert any(kind == "collapse" for kind, _ in edits)
        assert cost(after) == cost(spans)
