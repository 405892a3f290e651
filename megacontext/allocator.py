"""
The focus allocator: which spans to open and which to close, given LensNet's scores. Scores in, edits out.
A greedy planner with two priority queues (seeds, "Focus Allocator"): the hottest gists are opened, each paid for by the
coldest block or family of 32 gists that is present. LensNet, the tree and the clock are someone else's business.

A score says what detail is worth here: > 0 wants more, < 0 can give some up. Every expansion costs GAIN = 31 entries and
every collapse frees 31, so gain per entry and gain rank alike. A family's score is the mean of its members': it stays on
the scale of one score whether it is 1 block or 32 gists (a sum would make every lukewarm family look 32 times as hot or
as cold as a block).

The order of one tick:
1. pins    orders, not wishes: pinned-raw spans are opened to the bottom, never-raw blocks closed, at once and in full
2. room    the coldest families close until `room` more tokens fit; this alone may ignore the cooldown
3. focus   at most `n_diff` edits: open the hottest gist if there is room, or if its score beats the payer's by `margin`
Nothing closes unless its place is needed. A gist is opened one level per tick, coarse before fine among equals: its children are scored before they are opened.
A node edited less than `cooldown` ticks ago rests. The plan touches each span at most once, and is applied as a whole.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf, isfinite
from typing import NamedTuple

from nanochat.common import UserError
from megacontext.span import BLOCK, GAIN, Span
from megacontext.working_context import TAIL, BrokenLaw, Pins, assemble, coarsest, cost, groups, make_room


class Edit(NamedTuple):
    kind: str   # "expand": node gives way to its children. "collapse": the children give way to node
    node: Span  # the parent, always a gist


@dataclass(frozen=True)
class Focus:
    """What a refocus must know of the ones before it. Start with Focus(), pass on the one that came back."""
    tick: int = 0
    edited: dict = field(default_factory=dict)  # node -> tick of its last edit; only nodes still resting are kept


class Refocus(NamedTuple):
    spans: list   # the new working context
    edits: list   # list of Edit, in the order they were planned
    focus: Focus  # for the next tick


def refocus(spans, scores, budget, focus=Focus(), *, n_diff=4, margin=0.1, cooldown=8, room=BLOCK, tail=TAIL, pins=Pins(), top=inf):
    """
    One tick of focus: returns Refocus(spans, edits, focus). The same arguments always give the same answer.

    spans, scores  the working context and one finite float per span
    budget         most entries the GPT may read; `room` of them are left free for the tokens of the next tick
    n_diff         most edits that follow the scores (those for pins and room are not counted: they are not a choice)
    margin         hysteresis: what an expansion must score above the collapse that pays for it
    cooldown       ticks that a node rests after an edit
    tail           newest tokens, never collapsed;  pins: see Pins;  top: highest level that may be shown
    """
    assert len(spans) == len(scores), f"one score per span: {len(spans)} spans, {len(scores)} scores"
    assert min(n_diff, margin, cooldown, room, tail) >= 0, "n_diff, margin, cooldown, room and tail cannot be negative"
    if not all(map(isfinite, scores)):
        bad = next(i for i, score in enumerate(scores) if not isfinite(score))
        raise BrokenLaw(f"{spans[bad]} has score {scores[bad]}: LensNet must give finite scores")
    spans, scores, edits = _obey(spans, scores, budget - room, pins, top)
    resting = {node for node, tick in focus.edited.items() if focus.tick - tick < cooldown}

    plan = _Plan(spans, scores, budget - room, resting, tail, pins, top)
    plan.make_room()
    plan.follow_scores(n_diff, margin)
    after = plan.apply()
    edits += plan.edits
    if cost(after) > budget - room:  # only families of families are left, which have no score yet: close them by age
        coarser = make_room(after, budget, room, tail, pins, top)
        edits += _collapses(after, coarser)
        after = coarser

    edited = {node: tick for node, tick in focus.edited.items() if focus.tick + 1 - tick < cooldown}
    edited.update((edit.node, focus.tick) for edit in edits)
    return Refocus(after, edits, Focus(focus.tick + 1, edited))


def begin(length, budget, tail=TAIL, pins=Pins()):
    """The first context of a history of `length` tokens, by recency, with room for the rest of its block. What is pinned is done: the oldest pay for it, the newest get what it frees."""
    room = BLOCK - length % BLOCK
    spans = assemble(length, budget - room, tail=tail)
    return refocus(spans, [span.start + 1.0 for span in spans], budget, n_diff=len(spans), margin=inf, room=room, tail=tail, pins=pins, top=coarsest(length, budget)).spans


class _Plan:
    """A set of edits against one budget. Spans are marked, not moved, so their indices hold until apply()."""

    def __init__(self, spans, scores, budget, resting, tail, pins, top):
        self.spans, self.scores, self.resting, self.pins = spans, scores, resting, pins
        self.room = budget - cost(spans)
        self.edits, self.cuts = [], {}  # cuts: first index replaced -> (one past the last, replacement)
        self.busy = set()               # every index in a cut: a span is touched once at most
        edge = (spans[-1].stop if spans else 0) - tail
        self.rested, self.tired = [], []  # heaps of families that may pay, (score, level, lo, hi): coldest, then finest, then oldest
        for lo, hi in groups(spans):
            span = spans[lo]
            if span.level >= top or span.level == 0 and (span.stop > edge or pins.wants_raw(span)):
                continue
            heap = self.tired if span.parent() in resting else self.rested
            heap.append((sum(scores[lo:hi]) / (hi - lo), span.level, lo, hi))
        heapify(self.rested)
        heapify(self.tired)

    def make_room(self):
        """Close the coldest until the cost is within the budget; rested families first, then any."""
        while self.room < 0 and (self.rested or self.tired):
            _, _, lo, hi = heappop(self.rested or self.tired)
            self._collapse(lo, hi)

    def follow_scores(self, n_diff, margin):
        """Open the hottest gists, each into free room or paid for by the coldest family, `n_diff` edits in all."""
        hot = [(-score, -span.level, i) for i, (span, score) in enumerate(zip(self.spans, self.scores)) if score > 0 and span.level]
        heapify(hot)
        while hot and n_diff > 0:
            score, level, i = heappop(hot)
            if i in self.busy or self.spans[i] in self.resting or level == -1 and self.pins.forbids_raw(self.spans[i]):
                continue
            if self.room < GAIN:
                if n_diff < 2 or not self.rested or -score - self.rested[0][0] <= margin:
                    return  # a swap is two edits; and who cannot beat the coldest family of all leaves no hope to cooler ones
                payer = self._payer(keep=i)
                if payer is None:
                    continue
                if -score - payer[0] <= margin:
                    heappush(self.rested, payer)
                    continue
                self._collapse(payer[2], payer[3])
                n_diff -= 1
            self._expand(i)
            n_diff -= 1

    def _payer(self, keep):
        """Take the coldest rested family that is untouched and does not hold span `keep`, or None."""
        aside, found = [], None
        while self.rested and found is None:
            family = heappop(self.rested)
            _, _, lo, hi = family
            if lo <= keep < hi:
                aside.append(family)
            elif self.busy.isdisjoint(range(lo, hi)):
                found = family
        for family in aside:
            heappush(self.rested, family)
        return found

    def _collapse(self, lo, hi):
        self._cut(lo, hi, Edit("collapse", self.spans[lo].parent()), GAIN)

    def _expand(self, i):
        self._cut(i, i + 1, Edit("expand", self.spans[i]), -GAIN)

    def _cut(self, lo, hi, edit, freed):
        self.cuts[lo] = hi, [edit.node] if edit.kind == "collapse" else edit.node.children()
        self.busy.update(range(lo, hi))
        self.edits.append(edit)
        self.room += freed

    def apply(self):
        """The new list, all edits at once."""
        after, at = [], 0
        for lo in sorted(self.cuts):
            hi, replacement = self.cuts[lo]
            assert lo >= at, f"two edits touch span {lo}: {self.edits}"
            after += self.spans[at:lo] + replacement
            at = hi
        return after + self.spans[at:]


def _obey(spans, scores, budget, pins, top):
    """Apply the pins, whatever the budget: returns (spans, scores, edits). Children inherit the score of their gist."""
    if not pins.raw and not pins.never:
        return spans, scores, []
    after, kept, edits = [], [], []
    todo = [(span, score) for span, score in zip(reversed(spans), reversed(scores))]  # a stack, oldest on top
    while todo:
        span, score = todo.pop()
        if span.level and pins.wants_raw(span):
            edits.append(Edit("expand", span))
            todo += [(child, score) for child in reversed(span.children())]
            continue
        if span.level == 0 and not span.live and top >= 1 and pins.forbids_raw(span):
            span = span.parent()
            edits.append(Edit("collapse", span))
        after.append(span)
        kept.append(score)
    held = sum(span.cost for span in after if span.level == 0 and pins.wants_raw(span))
    if held > budget:
        raise UserError(f"the pins keep {held} tokens raw, the budget leaves {budget} entries: unpin some, or raise the budget")
    return after, kept, edits


def _collapses(before, after):
    """The collapses that lead from `before` to the coarser `after`, children before parents."""
    here, edits = set(before), []

    def close(node):
        for child in node.children():
            if child not in here:
                close(child)
        edits.append(Edit("collapse", node))

    for span in after:
        if span not in here:
            close(span)
    return edits
