"""
The focus allocator: which spans to open and which to close, given LensNet's scores. Scores in, edits out.
A greedy planner with two priority queues (seeds, "Focus Allocator"): the hottest blocks are opened, each paid for by the
coldest blocks or families of 32 gists that are present. LensNet, the tree and the clock are someone else's business.

A score says what detail is worth here: > 0 wants more, < 0 can give some up. What is opened is a block: in the place of its gist, for GAIN = 31 entries, or laid on
the gist of gists that covers it, for 32; so gain per entry and gain rank alike. A family's score is the mean of its gists': it stays on
the scale of one score whether it is 1 block or 32 gists (a sum would make every lukewarm family look 32 times as hot or
as cold as a block).

The order of one tick:
1. pins    orders, not wishes: pinned-raw blocks are opened, never-raw blocks closed, at once and in full
2. room    the coldest families close until `room` more tokens fit; this alone may ignore the cooldown
3. focus   at most `n_diff` edits: open the hottest block if there is room, or if its score beats the payers' by `margin`
Nothing closes unless its place is needed.
A node edited less than `cooldown` ticks ago rests, and one that Focus says is to rest longer. The plan touches each span at most once, and is applied as a whole.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import islice
from math import inf, isfinite
from typing import NamedTuple

from nanochat.common import UserError
from megacontext.span import BLOCK, GAIN, Span
from megacontext.working_context import TAIL, BrokenLaw, Pins, assemble, blocks, closed, coarsest, cost, end_of, groups, in_order, laid, make_room, place_of


class Edit(NamedTuple):
    kind: str   # "expand": the block of node is shown. "collapse": it is not any more, or node, of a higher level, stands for its children
    node: Span  # a gist


@dataclass(frozen=True)
class Focus:
    """What a refocus must know of the ones before it. Start with Focus(), pass on the one that came back."""
    tick: int = 0
    edited: dict = field(default_factory=dict)  # node -> tick of its last edit, or one to come, until which it rests whatever the cooldown; only nodes still resting are kept


class Refocus(NamedTuple):
    spans: list   # the new working context
    edits: list   # list of Edit, in the order they were planned
    focus: Focus  # for the next tick


def refocus(spans, scores, budget, focus=Focus(), *, beneath=(), n_diff=4, margin=0.1, cooldown=8, room=BLOCK, tail=TAIL, pins=Pins(), top=inf):
    """
    One tick of focus: returns Refocus(spans, edits, focus). The same arguments always give the same answer.

    spans, scores  the working context and one finite float per span
    budget         most entries the GPT may read; `room` of them are left free for the tokens of the next tick
    beneath        (gist of level 1, score) of blocks that may be laid on the gists of gists in view
    n_diff         most edits that follow the scores (those for pins and room are not counted: they are not a choice)
    margin         hysteresis: what an expansion must score above each collapse that pays for it, not all together: what the second frees beyond need pays for the next
    cooldown       ticks that a node rests after an edit
    tail           newest tokens, never collapsed;  pins: see Pins;  top: highest level that may be shown
    """
    assert len(spans) == len(scores), f"one score per span: {len(spans)} spans, {len(scores)} scores"
    assert min(n_diff, margin, cooldown, room, tail) >= 0, "n_diff, margin, cooldown, room and tail cannot be negative"
    for span, score in [*zip(spans, scores), *beneath]:
        if not isfinite(score):
            raise BrokenLaw(f"{span} has score {score}: LensNet must give finite scores")
    spans, scores, edits = _obey(spans, scores, budget - room, pins, top)
    resting = {node for node, tick in focus.edited.items() if focus.tick - tick < cooldown}

    plan = _Plan(spans, scores, budget - room, resting, tail, pins, top)
    plan.make_room()
    plan.follow_scores(beneath, n_diff, margin)
    after = plan.apply()
    edits += plan.edits
    if cost(after) > budget - room:  # only families are left whose members were closed in this plan, which have no score yet: close them by age
        coarser = make_room(after, budget, room, tail, pins, top)
        edits += _collapses(after, coarser)
        after = coarser

    edited = {node: tick for node, tick in focus.edited.items() if focus.tick + 1 - tick < cooldown}
    edited.update((edit.node, focus.tick) for edit in edits)
    return Refocus(after, edits, Focus(focus.tick + 1, edited))


def begin(length, budget, tail=TAIL, pins=Pins()):
    """The first context of a history of `length` tokens, by recency, with room for the rest of its block. What is pinned is done: the oldest pay for it, the newest get what it frees."""
    room, more, freed = BLOCK - length % BLOCK, -1, 0
    while freed > more: # blocks that are never shown free room, in which more are opened, which may be such blocks too
        more = freed
        spans = assemble(length, budget - room + more, tail=tail)
        freed = GAIN * sum(pins.forbids_raw(span) for span in blocks(spans) if not span.live)
    older = (Span(1, b) for span in reversed(spans) if span.level > 1 for b in reversed(range(span.start // BLOCK, span.stop // BLOCK)))
    newest = [(node, node.start + 1.0) for node in islice(older, budget // BLOCK)]
    return refocus(spans, [span.start + 1.0 for span in spans], budget, beneath=newest, n_diff=len(spans), margin=inf, room=room, tail=tail, pins=pins, top=coarsest(length, budget)).spans


class _Plan:
    """A set of edits against one budget. Spans are marked, not moved, so their indices hold until apply()."""

    def __init__(self, spans, scores, budget, resting, tail, pins, top):
        self.spans, self.scores, self.resting, self.pins = spans, scores, resting, pins
        self.room = budget - cost(spans)
        self.edits, self.cuts, self.laid = [], {}, []  # cuts: first index replaced -> (one past the last, replacement); laid: new blocks
        self.busy = set()               # every index in a cut: a span is touched once at most
        edge = end_of(spans) - tail
        self.rested, self.tired = [], []  # heaps of groups that may pay, (score, level, group): coldest, then finest, then oldest
        for group in groups(spans, edge):
            lo, hi, node, frees = group
            family = node.level > 1
            if frees < 1 or node.level > top or not family and (node.stop > edge or pins.wants_raw(node)):
                continue
            told = [score for span, score in zip(spans[lo:hi], scores[lo:hi]) if span.level] if family else scores[lo:hi]
            heap = self.tired if node in resting else self.rested
            heap.append((sum(told) / len(told), node.level - 1, group))
        heapify(self.rested)
        heapify(self.tired)

    def make_room(self):
        """Close the coldest until the cost is within the budget; rested groups first, then any."""
        while self.room < 0 and (self.rested or self.tired):
            group = heappop(self.rested or self.tired)[2]
            if self.busy.isdisjoint(range(group.lo, group.hi)):
                self._collapse(group)

    def follow_scores(self, beneath, n_diff, margin):
        """Open the hottest blocks, each into free room or paid for by the coldest groups, `n_diff` edits in all."""
        hot = [(-score, span, i, GAIN) for i, (span, score) in enumerate(zip(self.spans, self.scores)) if score > 0 and span.level == 1]
        there = {span.index for span in blocks(self.spans)} # a pin may just have laid it
        hot += [(-score, node, None, BLOCK) for node, score in beneath if score > 0 and node.index not in there] # None: it is no span, but laid on one
        heapify(hot)
        while hot and n_diff > 0:
            score, node, i, price = heappop(hot)
            if i in self.busy or node in self.resting or self.pins.forbids_raw(node):
                continue
            payers = self._payers(price - self.room, -score - margin, n_diff - 1, keep=i)
            if payers is None:
                if not self.rested or self.rested[0][0] >= -score - margin:
                    return # who cannot beat the coldest of all leaves no hope to cooler ones
                continue
            for group in payers:
                self._collapse(group)
            self._expand(node, i, price)
            n_diff -= 1 + len(payers)

    def _payers(self, short, below, most, keep):
        """The coldest rested groups that together free `short` entries, `most` of them, all scored less than `below`, untouched and without span `keep`; None if there are not enough."""
        taken, aside = [], []
        while short > 0 and len(taken) < most and self.rested and self.rested[0][0] < below:
            family = heappop(self.rested)
            group = family[2]
            here = range(group.lo, group.hi)
            if keep in here or any(group.lo < one[2].hi and one[2].lo < group.hi for one in taken) or len(taken) + 1 == most and group.frees < short:
                aside.append(family)
            elif self.busy.isdisjoint(here):
                taken.append(family)
                short -= group.frees
        for family in aside if short <= 0 else aside + taken:
            heappush(self.rested, family)
        return [group for _, _, group in taken] if short <= 0 else None

    def _collapse(self, group):
        self._cut(group.lo, group.hi, closed(self.spans, group), Edit("collapse", group.node), group.frees)

    def _expand(self, node, i, price):
        if i is None:
            self.laid += node.children()
            self.edits.append(Edit("expand", node))
            self.room -= price
        else:
            self._cut(i, i + 1, node.children(), Edit("expand", node), -price)

    def _cut(self, lo, hi, replacement, edit, freed):
        self.cuts[lo] = hi, replacement
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
        after += self.spans[at:]
        return in_order(after + self.laid) if self.laid else after


def _obey(spans, scores, budget, pins, top):
    """Apply the pins, whatever the budget: returns (spans, scores, edits). What is opened inherits the score of the gist that it is opened from."""
    if not pins.raw and not pins.never:
        return spans, scores, []
    shown, edits, here = [], [], set(spans) # shown: (span, score)
    for span, score, on in zip(spans, scores, laid(spans)):
        if span.level == 1 and pins.wants_raw(span):
            edits.append(Edit("expand", span))
            span, = span.children()
        elif span.level > 1:
            wanted = [block for block in pins.blocks(span.start, span.stop) if block not in here]
            edits += [Edit("expand", block.parent()) for block in wanted]
            shown += [(block, score) for block in wanted]
        elif span.level == 0 and not span.live and top >= 1 and pins.forbids_raw(span):
            edits.append(Edit("collapse", span.parent()))
            if on:
                continue
            span = span.parent()
        shown.append((span, score))
    shown = sorted(shown, key=lambda one: place_of(one[0]))
    after, kept = [span for span, _ in shown], [score for _, score in shown]
    held = sum(span.cost for span in after if span.level == 0 and pins.wants_raw(span))
    if held > budget:
        raise UserError(f"the pins keep {held} tokens raw, the budget leaves {budget} entries: unpin some, or raise the budget")
    return after, kept, edits


def _collapses(before, after):
    """The collapses that lead from `before` to the coarser `after`, children before parents."""
    here, edits = set(before), []

    def close(node):
        for child in node.children():
            if child not in here and child.level > 1:
                close(child)
        edits.append(Edit("collapse", node))

    left = set(after)
    for block in blocks(before):
        if block not in left:
            edits.append(Edit("collapse", block.parent()))
    for span in after:
        if span.level > 1 and span not in here:
            close(span)
    return edits
