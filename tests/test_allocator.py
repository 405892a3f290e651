"""
The focus allocator: what one tick opens and closes, by hand, beside slow twins, and its promises with random scores and pins. The laws of what it leaves
behind are those of test_laws.py, which has the random contexts too.
"""
import random

import pytest

from megacontext.allocator import Edit, Focus, begin, refocus
from megacontext.span import BLOCK, Span
from megacontext.working_context import LEAST_BUDGET, BrokenLaw, Pins, advance, assemble, check, coarsest, cost, find, groups, raw_tail
from nanochat.common import UserError
from tests.test_laws import beneath, random_spans, replayed


def test_refocus_by_hand():
    """At the budget: the hot gist opens, the coldest block pays, everything else stays where it is."""
    spans = [Span(1, 0), Span(1, 1), Span(0, 2), Span(0, 3), Span(0, 4, live=4)]
    scores = [0.2, 0.9, -0.3, -0.8, 0.0]
    after, edits, focus = refocus(spans, scores, 70, room=0, tail=0, n_diff=2)
    assert edits == [Edit("collapse", Span(1, 3)), Edit("expand", Span(1, 1))]
    assert after == [Span(1, 0), Span(0, 1), Span(0, 2), Span(1, 3), Span(0, 4, live=4)]
    assert focus == Focus(1, {Span(1, 1): 0, Span(1, 3): 0})
    # with four edits, the second gist swaps with the second block as well
    assert refocus(spans, scores, 70, room=0, tail=0, n_diff=4).spans == [Span(0, 0), Span(0, 1), Span(1, 2), Span(1, 3), Span(0, 4, live=4)]
    # with three, not: a swap is two edits. With room for a block, no one pays
    assert len(refocus(spans, scores, 70, room=0, tail=0, n_diff=3).edits) == 2
    assert refocus(spans, scores, 101, room=0, tail=0, n_diff=1).edits == [Edit("expand", Span(1, 1))]
    # the margin: 0.9 beats -0.8 by 1.7, not by 1.75
    assert refocus(spans, scores, 70, room=0, tail=0, margin=1.75).edits == []
    # the tail: tokens 64..131 are protected, so nobody can pay
    assert refocus(spans, scores, 70, room=0, tail=68).edits == []


@pytest.mark.parametrize("seed", range(120))
def test_refocus_keeps_every_law_and_its_own_promises(seed):
    rng = random.Random(seed)
    length = int(10 ** rng.uniform(1, 6.5))
    budget = rng.randrange(300, 900)
    tail, room, n_diff = rng.choice([0, 32, 100]), rng.choice([0, 1, 32]), rng.randrange(0, 7)
    margin = rng.choice([0, 0.1, 0.5])
    spans = random_spans(rng, length, budget)
    focus, pins, past = Focus(), Pins(), length - tail
    if past > 96 and rng.random() < 0.5:
        at = rng.randrange(past // 32 - 1)
        pins = Pins(raw=((32 * at, 32 * at + 1),), never=((32 * at + 32, 32 * at + 64),))
    for tick in range(6):
        scores = [rng.uniform(-1, 1) for _ in spans]
        told = [(node, rng.uniform(-1, 1)) for node in beneath(rng, spans, 40)]
        tick = lambda n: refocus(list(spans), list(scores), budget, focus, beneath=told, n_diff=n, tail=tail, room=room, margin=margin, pins=pins)
        result = tick(n_diff)
        assert result == tick(n_diff), "not deterministic"
        check(result.spans, length, budget - room)
        assert replayed(spans, result.edits) == result.spans, "the edits do not tell what was done"
        assert all(spans[i].level or spans[i] in result.spans for i in range(len(spans)) if spans[i].stop > length - tail), "a block of the tail closed"
        assert len(result.edits) <= len(tick(0).edits) + n_diff # those for room are no choice
        scored = dict(zip(spans, scores)) | dict(told)
        for kind, node in result.edits:
            if kind == "expand":
                assert pins.wants_raw(node) or scored[node] > 0, "opened something that did not ask for it"
            elif node.level > 1:
                assert not any(span.level == 0 and node.start <= span.start < node.stop and span.stop > length - tail for span in spans), "a block of the tail was laid"
        spans, focus = result.spans, result.focus
        assert all(focus.tick - t <= 8 for t in focus.edited.values())


def first_swap_slow(spans, scores, told):
    """The hottest that one payer is enough for, and what it is worth more than the coldest of those, by trying every pair at a full budget; None if nothing is."""
    hot = [(score, span, 31) for span, score in zip(spans, scores) if span.level == 1] + [(score, node, 32) for node, score in told]
    for score, node, price in sorted(hot, key=lambda one: -one[0]):
        payers = []
        for lo, hi, parent, frees in groups(spans):
            gists = [s for span, s in zip(spans[lo:hi], scores[lo:hi]) if span.level or parent.level == 1]
            if frees >= price and node not in spans[lo:hi]:
                payers.append(sum(gists) / len(gists))
        if score > 0 and payers and score > min(payers):
            return node, score - min(payers)
    return None


@pytest.mark.parametrize("seed", range(60))
def test_the_first_swap_is_the_best_of_all_swaps(seed):
    rng = random.Random(1000 + seed)
    length = rng.randrange(3000, 60_000)
    spans = random_spans(rng, length, 500)
    scores = [rng.uniform(-1, 1) for _ in spans]
    told = [(node, rng.uniform(-1, 1)) for node in beneath(rng, spans, 20)]
    result, best = refocus(spans, scores, cost(spans), beneath=told, n_diff=2, room=0, tail=0, margin=0), first_swap_slow(spans, scores, told)
    if best is None:
        assert result.edits == []
        return
    (pay, payer), (get, node) = result.edits
    assert (pay, get) == ("collapse", "expand") and node == best[0]
    lo, hi = next((lo, hi) for lo, hi, parent, _ in groups(spans) if parent == payer)
    paid = [score for span, score in zip(spans[lo:hi], scores[lo:hi]) if span.level or payer.level == 1]
    assert (dict(zip(spans, scores)) | dict(told))[node] - sum(paid) / len(paid) == pytest.approx(best[1])


def test_a_block_of_any_past_is_laid_in_one_tick():
    """Token 5,000 is wanted and nothing else: two blocks in their gists' place free 62 entries, of which it takes 32; its gist of 1,024 tokens stays."""
    spans, budget = [Span(2, i) for i in range(8)] + [Span(0, 256 + i) for i in range(10)], 8 + 320
    after, edits, _ = refocus(spans, [-0.5] * 18, budget, beneath=[(Span(1, 156), 0.9), (Span(1, 7), -0.1)], room=0, tail=0)
    assert edits == [Edit("collapse", Span(1, 256)), Edit("collapse", Span(1, 257)), Edit("expand", Span(1, 156))]
    assert after[3:7] == [Span(2, 3), Span(2, 4), Span(0, 156), Span(2, 5)] and after[find(after, 5000)] == Span(0, 156)
    check(after, 8192 + 320, budget)
    # one block that is laid pays for another
    assert refocus(after, [-0.5] * 19, cost(after), beneath=[(Span(1, 157), 0.9)], room=0, tail=0, n_diff=2, cooldown=0).edits == [Edit("collapse", Span(1, 156)), Edit("expand", Span(1, 157))]


def test_a_pin_and_a_score_lay_a_block_once():
    """A block that was pinned just before the tick that would have laid it was laid twice, and the session stopped at a broken law."""
    spans = [Span(2, 0), *(Span(0, b) for b in range(32, 40))]
    for n_diff in (0, 4):
        after, edits, _ = refocus(spans, [-1.0] * 9, 400, beneath=[(Span(1, 5), 2.0)], room=0, tail=0, pins=Pins(raw=((160, 170),)), n_diff=n_diff)
        assert after == [Span(2, 0), Span(0, 5), *spans[1:]] and edits == [Edit("expand", Span(1, 5))]


def test_a_block_that_is_laid_and_must_not_be_leaves():
    spans = [Span(2, 0), Span(0, 5), Span(0, 32)]
    after, edits, _ = refocus(spans, [1.0] * 3, 400, room=0, tail=0, pins=Pins(never=((160, 170),)))
    assert after == [Span(2, 0), Span(0, 32)] and edits == [Edit("collapse", Span(1, 5))]


def test_a_first_context_with_pins_of_both_kinds():
    for end in range(2000, 9000, 500):
        pins = Pins(raw=((end - 900, end - 890),), never=((end - 700, end),))
        check(begin(end, 512, 128, pins), end, 512)


def test_scores_that_flip_every_tick_do_not_make_it_ping_pong():
    """Two neighbours that want the one raw place in turn: with a cooldown of 8 they swap in 5 ticks of 40, without in every one."""
    def swaps(cooldown):
        spans, focus, n = [Span(0, 0), Span(1, 1)], Focus(), 0
        for tick in range(40):
            hot = tick % 2
            scores = [1.0 if span.index == hot else -1.0 for span in spans]
            spans, edits, focus = refocus(spans, scores, 33, focus, room=0, tail=0, cooldown=cooldown)
            n += bool(edits)
        return n
    assert swaps(0) >= 38
    assert 1 <= swaps(8) <= 5


def test_a_node_rests_after_an_edit_whether_it_was_opened_or_closed():
    spans, scores = [Span(1, 0), Span(0, 1), Span(0, 2)], [-0.9, -0.5, 0.5]
    closed = Focus(5, {Span(1, 0): 3})  # gist 0 was closed at tick 3, and is hot now
    assert refocus(spans, [0.9, -0.5, 0.5], 65, closed, room=0, tail=0, cooldown=3).edits == []
    assert len(refocus(spans, [0.9, -0.5, 0.5], 65, closed, room=0, tail=0, cooldown=2).edits) == 2
    spans = [Span(1, 0), Span(0, 1), Span(0, 2)]
    opened = Focus(5, {Span(1, 1): 3})  # block 1 was opened at tick 3, and is the coldest now: block 2 pays in its place
    pay, _ = refocus(spans, [0.9, -0.9, -0.5], 65, opened, room=0, tail=0, cooldown=3).edits
    assert pay == Edit("collapse", Span(1, 2))
    pay, _ = refocus(spans, [0.9, -0.9, -0.5], 65, opened, room=0, tail=0, cooldown=2).edits
    assert pay == Edit("collapse", Span(1, 1))
    # room too is made by those who are rested, if they can
    assert refocus(spans, [-1, -0.9, -0.5], 65, opened, room=1, tail=0, cooldown=3, n_diff=0).edits == [Edit("collapse", Span(1, 2))]


def test_a_gist_does_not_pay_for_itself_and_the_margin_holds_for_whoever_does():
    """The family of the hot gist is the coldest, but cannot pay for it; the block that could is worth nearly as much as the gist."""
    spans = [Span(1, i) for i in range(32)] + [Span(0, 32)]
    scores = [0.9] + [-1.0] * 31 + [0.85]
    assert refocus(spans, scores, 64, room=0, tail=0, margin=0.1).edits == []
    assert refocus(spans, scores, 64, room=0, tail=0, margin=0.04).edits == [Edit("collapse", Span(1, 32)), Edit("expand", Span(1, 0))]


def test_when_closing_families_is_not_enough_their_parents_close():
    """32 blocks must fit in 20 entries: they become gists, and the gists, not scored yet, one gist of level 2."""
    spans = [Span(0, i) for i in range(32)]
    after, edits, focus = refocus(spans, [1.0] * 32, 52, room=32, tail=0)
    assert after == [Span(2, 0)] and replayed(spans, edits) == after
    assert edits == [Edit("collapse", Span(1, i)) for i in range(32)] + [Edit("collapse", Span(2, 0))]
    assert set(focus.edited) == {node for _, node in edits}


def test_noise_around_a_tie_moves_nothing():
    rng = random.Random(0)
    spans = [Span(1, i) for i in range(40)] + [Span(0, 40 + i) for i in range(10)]
    for _ in range(50):
        scores = [0.3 + rng.uniform(-0.04, 0.04) for _ in spans]
        assert refocus(spans, scores, cost(spans), room=0, tail=0).edits == []


def test_room_is_made_by_the_coldest_not_by_the_oldest():
    spans = [Span(0, i) for i in range(10)]
    scores = [0.5, 0.4, 0.3, -0.2, 0.1, -0.9, 0.2, 0.6, 0.7, 0.8]
    after, edits, _ = refocus(spans, scores, 320, room=32, tail=0, n_diff=0)
    assert edits == [Edit("collapse", Span(1, 5)), Edit("collapse", Span(1, 3))]
    assert cost(after) == 320 - 62


def test_room_goes_before_rest():
    """A block opened a tick ago rests, but when it is the only one that can pay for new tokens, it pays."""
    spans, edits, focus = refocus([Span(1, 0), Span(0, 1, live=3)], [1.0, 0.0], 40, room=0, tail=0)
    assert edits == [Edit("expand", Span(1, 0))]
    assert refocus(spans, [-1.0, 0.0], 40, focus, room=5, tail=0).edits == []
    assert refocus(spans, [-1.0, 0.0], 40, focus, room=6, tail=0).edits == [Edit("collapse", Span(1, 0))]


def test_pins_are_obeyed_at_once_and_for_good():
    rng = random.Random(0)
    length, budget = 100_000, 2500
    spans, focus = assemble(length, budget - 32), Focus()
    pins = Pins(raw=((40_000, 40_100), (70_016, 70_017)), never=((99_900, 99_950), (50_000, 52_000)))
    for _ in range(40):
        before = spans
        scores = [1.0 if pins.forbids_raw(span) else -1.0 if pins.wants_raw(span) else rng.uniform(-1, 1) for span in spans]  # LensNet says the opposite
        spans, edits, focus = refocus(spans, scores, budget, focus, pins=pins)
        assert replayed(before, edits) == spans
        spans = advance(spans, length := length + 32, budget)
        check(spans, length, budget)
        assert all(spans[find(spans, p)].level == 0 for p in [*range(40_000, 40_100), 70_016])
        assert all(spans[find(spans, p)].level > 0 for p in [*range(99_900, 99_950), *range(50_000, 52_000)])


def test_pins_that_cannot_be_obeyed_are_refused():
    with pytest.raises(UserError, match="share a block"):
        Pins(raw=((0, 40),), never=((60, 70),))  # 32..39 and 60..63 are in one block
    Pins(raw=((0, 32),), never=((32, 70),))
    with pytest.raises(UserError, match="start < stop"):
        Pins(raw=((5, 5),))
    with pytest.raises(UserError, match="unpin"):
        refocus(assemble(10_000, 500), [0.0] * len(assemble(10_000, 500)), 500, pins=Pins(raw=((0, 1000),)))


def test_bad_scores_are_refused():
    spans = [Span(0, 0), Span(0, 1)]
    with pytest.raises(BrokenLaw, match="finite"):
        refocus(spans, [0.0, float("nan")], 64, room=0)
    with pytest.raises(AssertionError, match="one score per span"):
        refocus(spans, [0.0], 64, room=0)


def test_the_highest_level_is_the_lowest_that_has_room():
    """A budget of 2,048: 256 gists of 32 tokens are an eighth of it, so nothing of such a history is hidden in level 2; 225 of level 2 leave room for 31 of level 1."""
    for length, level in ((0, 1), (32 * 256, 1), (32 * 257, 2), (1024 * 226 - 1, 2), (1024 * 226, 3), (2**15 * 195 - 1, 3)):
        assert coarsest(length, 2048) == level


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 256, 2048])
@pytest.mark.parametrize("length", [8 * 32 ** 4 - 1, 32 ** 5 - 1, 32 ** 5])
def test_every_history_has_a_first_context(budget, length):
    """A whole block was left free behind a block half full: with the least budget a tree of 8,388,607 tokens, which a session can grow to, could not be opened."""
    spans = begin(length, budget, raw_tail(budget))
    check(spans, length, budget - (BLOCK - length % BLOCK))


@pytest.mark.parametrize("budget", [LEAST_BUDGET, 256, 512])
def test_the_highest_level_always_leaves_room(budget):
    """Scores at random, at the longest histories of every level: with what cannot close left over on each, a refocus that may go no higher still fits."""
    rng, tail = random.Random(budget), raw_tail(budget)
    most = [BLOCK ** level * count for level in range(1, 5) for count in (1, 2, 3, budget // 4, budget // 2 - 31 * (level - 1)) if count > 0]
    for length in most:
        length = max(BLOCK, length - 20 * BLOCK)
        spans, focus = assemble(length, budget - BLOCK, tail=tail), Focus()
        for _ in range(40):
            scores = [rng.gauss(0, 9) for _ in spans]
            spans, _, focus = refocus(spans, scores, budget, focus, tail=tail, top=coarsest(length, budget))
            check(spans, length, budget - BLOCK)
            length += BLOCK
            spans = advance(spans, length)
