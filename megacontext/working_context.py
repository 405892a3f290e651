"""
The working context: which spans of the history the GPT reads now, and how that list may change.
A working context is a plain list of Span, oldest first, that tiles the timeline [0, length) within a budget of entries.
Every function takes a list and returns a new one, so a plan that fails half-way leaves the old context untouched.
Nothing here ever drops history to make it fit (a budget that cannot be met is an error): it is only read more coarsely.

    [L2 gist 0..1023][L1 1024..1055][L1 1056..1087] ... [block 4064..4095][live block 4096..4106]
     1 entry          1 entry        1 entry             32 entries         11 entries

Laws: budget, contiguity, alignment (a span starts at a multiple of its width), level, atomic swaps. Span is an index
within a level, so alignment cannot be broken; `check` looks for the others, and raises BrokenLaw at the first.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from math import inf

from nanochat.common import UserError
from megacontext.span import BLOCK, GAIN, Span, width_of

TAIL = 8 * BLOCK  # newest tokens that stay raw; the training layout draws raw tails of 0..8 blocks
LONGEST = BLOCK ** 5     # tokens of history that every budget can show
LEAST_BUDGET = 6 * BLOCK # for that: a raw tail, room for the next block, and the most gists that cannot collapse, 31 a level up to level 4


class BrokenLaw(AssertionError):
    """A working context that must not exist: our own mistake, never repaired."""


def cost(spans):
    """Entries the GPT would read."""
    return sum([1 if span.level else span.live or BLOCK for span in spans])  # span.cost, without 5,000 calls per tick


def check(spans, length, budget=inf, top=inf):
    """Raise BrokenLaw unless `spans` tile [0, length) within `budget`, with no level above `top` and one live block at most."""
    at, used = 0, 0
    for i, span in enumerate(spans):
        level, width = span.level, width_of(span.level)
        if span.index * width != at:
            raise BrokenLaw(f"contiguity: {span} (entry {i}) starts at {span.start}, the one before it stops at {at}")
        if level > top:
            raise BrokenLaw(f"level: {span} (entry {i}) is of level {level}, the highest allowed is {top}")
        if span.live and i != len(spans) - 1:
            raise BrokenLaw(f"level: {span} is an unfinished block but {len(spans) - 1 - i} spans follow it")
        at += span.live or width
        used += 1 if level else span.live or width
    if at != length:
        raise BrokenLaw(f"contiguity: the spans cover [0, {at}), the history is [0, {length})")
    if used > budget:
        raise BrokenLaw(f"budget: {used} entries, at most {budget} allowed")


def find(spans, position):
    """Index of the span that covers a token position."""
    i = bisect_right(spans, position, key=lambda span: span.start) - 1
    assert 0 <= i and position < spans[i].stop, f"no span covers position {position}: the context ends at {spans[-1].stop if spans else 0}"
    return i


# ----------------------------------------------------------------------------------------------------------------------
# One edit: the parent or all of its children, never part

def expand(spans, i, budget=inf):
    """Replace gist i by its children. Raises ValueError if they do not fit: pay first, with a collapse."""
    after = spans[:i] + spans[i].children() + spans[i + 1:]
    if budget != inf and cost(after) > budget:
        raise ValueError(f"expanding {spans[i]} takes {cost(after)} entries of a budget of {budget}: collapse something first")
    return after


def siblings(spans, i):
    """(lo, hi) such that spans[lo:hi] is exactly the set that collapses with span i, or None if they are not all here."""
    span = spans[i]
    if span.live:
        return None
    if span.level == 0:
        return i, i + 1
    lo = i - span.index % BLOCK
    hi = lo + BLOCK
    if lo < 0 or hi > len(spans):
        return None
    first = span.index - span.index % BLOCK
    here = all(spans[lo + j].level == span.level and spans[lo + j].index == first + j for j in range(BLOCK))
    return (lo, hi) if here else None


def collapse(spans, i):
    """Replace span i and all its siblings by their parent. Raises ValueError if a sibling is missing or at another level."""
    group = siblings(spans, i)
    if group is None:
        raise ValueError(f"{spans[i]} cannot collapse: it is live, or not all {BLOCK} children of its parent are in the context")
    lo, hi = group
    return spans[:lo] + [spans[i].parent()] + spans[hi:]


def groups(spans):
    """Every (lo, hi) that could collapse into one gist now, oldest first: finished blocks, and runs of 32 sibling gists."""
    found, level, run = [], -1, 0  # run: how many of the family that started last are here, all at `level`
    for i, span in enumerate(spans):
        if span.level == 0:
            level = 0
            if not span.live:
                found.append((i, i + 1))
        elif span.index % BLOCK == 0:
            level, run = span.level, 1
        elif span.level == level:
            run += 1
            if run == BLOCK:
                found.append((i + 1 - BLOCK, i + 1))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Growth: the live block takes tokens until it is a block, then the next one opens

def advance(spans, length, budget=inf):
    """
    The context after the history has grown to `length` tokens: the new ones are raw, at the end.
    They must fit: call make_room first (the budget holds at every moment, not only after a repair).
    """
    now = spans[-1].stop if spans else 0
    assert length >= now, f"history only grows: the context covers {now} tokens, asked to advance to {length}"
    after = list(spans)
    if after and after[-1].live:
        after.pop()
    at = after[-1].stop if after else 0
    after += [Span(0, b) for b in range(at // BLOCK, length // BLOCK)]
    if length % BLOCK and length > at:
        after.append(Span(0, length // BLOCK, live=length % BLOCK))
    if budget != inf and cost(after) > budget:
        raise ValueError(f"{length - now} new tokens make {cost(after)} entries of a budget of {budget}: make_room({length - now}) first")
    return after


@dataclass(frozen=True)
class Pins:
    """
    Orders that stand above scores and recency, as (start, stop) token ranges; a block counts if it overlaps one.
    raw    always shown as tokens
    never  never shown as tokens once the block is finished (a gist of it may be shown)
    """
    raw: tuple = ()
    never: tuple = ()

    def __post_init__(self):
        for start, stop in self.raw + self.never:
            if not 0 <= start < stop:
                raise UserError(f"a pin is a token range (start, stop) with 0 <= start < stop, got ({start}, {stop})")
        for start, stop in self.raw:
            for a, b in self.never:
                if start // BLOCK * BLOCK < -(-b // BLOCK) * BLOCK and a // BLOCK * BLOCK < -(-stop // BLOCK) * BLOCK:
                    raise UserError(f"tokens {start}..{stop} are pinned raw and {a}..{b} never raw, and they share a block: drop one of them")

    def wants_raw(self, span):
        return any(span.start < stop and start < span.stop for start, stop in self.raw)

    def forbids_raw(self, span):
        return any(span.start < stop and start < span.stop for start, stop in self.never)


def make_room(spans, budget, room=0, tail=TAIL, pins=Pins(), top=inf):
    """
    Collapse, by age alone, until `room` more entries fit in the budget. Deterministic; returns the new list.

    Blocks older than the newest `tail` tokens go first, oldest first. When none is left, 32 gists become their parent:
    the level that takes most of the context gives, its oldest family first. So no level starves the others, and level 3
    appears by itself once level 2 has become the crowd.
    """
    short = cost(spans) + room - budget
    if short <= 0:
        return list(spans)
    edge = (spans[-1].stop if spans else 0) - tail
    after = []
    for span in spans:  # oldest first
        if short > 0 and span.level == 0 and not span.live and span.stop <= edge and top >= 1 and not pins.wants_raw(span):
            span = span.parent()
            short -= GAIN
        after.append(span)
    while short > 0:
        crowd = [0] * (max((span.level for span in after), default=0) + 1)
        for span in after:
            crowd[span.level] += 1
        ready = [(lo, hi) for lo, hi in groups(after) if 1 <= after[lo].level < top]
        if not ready:
            raise UserError(f"{cost(spans)} entries and {room} more do not fit a budget of {budget}: with everything collapsed outside the "
                             f"last {tail} tokens{' and the pins' if pins.raw else ''} it is still {short} over. Raise the budget, or lower tail or pins")
        lo, hi = min(ready, key=lambda group: (-crowd[after[group[0]].level], after[group[0]].level, group[0]))
        after[lo:hi] = [after[lo].parent()]
        short -= GAIN
    return after


# ----------------------------------------------------------------------------------------------------------------------
# What a session of this budget never gives up: its newest tokens, and the sight of all of its history

def raw_tail(budget):
    """Newest tokens that a session of this budget keeps raw whatever the scores say: a quarter of it, in whole blocks, and no more than training draws."""
    return min(TAIL, budget // 4 // BLOCK * BLOCK)


def coarsest(length, budget):
    """
    The highest level that a history is shown at: the lowest whose gists of it all, with up to 31 left over on each level below, take no more than
    an eighth of the budget. So what nobody needs to close stays in sight, and tokens have nearly all of the room: a gist is worth less than its share of a
    block that is opened (LOG.md, 2026-11-27).
    """
    level = 1
    while length // BLOCK ** level > _highest(level, budget):
        level += 1
    return level


def _highest(level, budget):
    """Gists of the highest level that are shown at most, where it is this one."""
    return max(0, budget // 8 - GAIN * (level - 1))


def check_pins(pins, budget, first=0, longest=LONGEST):
    """Refuse what could not stay raw at some length from `first` tokens, those of now, up to `longest`. Checked when it is pinned: later, every refocus would fail."""
    most, length, blocks = most_kept(pins, budget, first, longest)
    if blocks and most > budget:
        raise UserError(f"{blocks} blocks of {BLOCK} tokens pinned raw do not fit a budget of {budget}: with the gists beside them and of all else, the newest {raw_tail(budget)} tokens "
                        f"and room for the next block it is {most} entries at {length:,} tokens of history. Unpin some, or raise the budget")


def most_kept(pins, budget, first=0, longest=LONGEST):
    """
    The most entries that are left when all has collapsed that may, with room for the next block, over all lengths: (entries, length, pinned blocks). Beside the raw tail
    they are the gists that are too few for a parent, and 31 more for each finished gist that stays open, because it holds a pinned block.
    """
    tail, longest = raw_tail(budget), max(first, longest)
    finished = lambda length: max(0, length - tail) // BLOCK # blocks before the tail
    blocks = {block for start, stop in pins.raw for block in range(start // BLOCK, min(-(-stop // BLOCK), finished(longest)))}
    pinned = [sorted({block // BLOCK ** level for block in blocks}) for level in range(coarsest(longest, budget))] # nodes of level + 1 that hold one
    most = (0, first)
    for top in range(1, len(pinned) + 1):
        last = finished(min(longest, max((_highest(level, budget) + 1) * BLOCK ** level for level in range(1, top + 1)) - 1)) # the last length that shows no higher level
        for n in {last} | {last // BLOCK ** level * BLOCK ** level - 1 for level in range(1, top)}: # most are left over just before one more is complete
            if n >= finished(first):
                gists = n // BLOCK ** (top - 1) + sum(n // BLOCK ** level % BLOCK for level in range(top - 1))
                opened = sum(bisect_left(pinned[level], n // BLOCK ** level) for level in range(top))
                most = max(most, (gists + GAIN * opened + tail + BLOCK, n * BLOCK + tail))
    return *most, len(blocks)


# ----------------------------------------------------------------------------------------------------------------------
# A context from nothing

def assemble(length, budget, tail=TAIL, top=inf):
    """
    The finest legal tiling of [0, length) within `budget`, finer where it is newer. O(budget), whatever the length.

    The coarsest level used is the lowest that fits (gists of level 2 hold far less than those of level 1). What is left
    of the budget then opens gists newest first: half of it at the coarsest level, half of the rest one level below, and so
    on; the last share goes to raw tokens. At most GAIN - 1 entries stay unspent, unless everything is raw.

    tail  newest tokens that are raw whatever happens (the live block is raw anyway)
    top   highest level that the tree has; by default as many as the length needs
    """
    assert length >= 0 and tail >= 0, f"length and tail are counts of tokens, got {length} and {tail}"
    edges = _coarsest_edges(length, budget, tail, top)
    room = budget - _cost_of(edges, length)
    for level in range(len(edges) - 1, 0, -1):
        room -= _open_newest(edges, level, room // 2 if level > 1 else room)
    while room >= GAIN and edges[0] > 0:  # a share that found nothing left to open at its level: finest level first
        level = next(l for l in range(1, len(edges)) if edges[l - 1] > edges[l])
        room -= _open_newest(edges, level, room)
    spans, stop = [], length
    for level, start in enumerate(edges):  # newest zone first
        zone = [Span(level, i) for i in range(start // width_of(level), stop // width_of(level))]
        if level == 0 and stop % BLOCK:
            zone.append(Span(0, stop // BLOCK, live=stop % BLOCK))
        spans, stop = zone + spans, start
    return spans


# edges[l] is where the zone of level l starts; it stops where the finer zone starts: edges[l - 1], or length for level 0.
# The coarsest zone starts at 0. Each edge is a multiple of the width one level up, so every zone is made of whole spans.

def _coarsest_edges(length, budget, tail, top):
    edges, level = [], 0
    edge = max(length - tail, 0) // BLOCK * BLOCK  # where this level would hand over to the next one
    while True:
        least = _cost_of(edges + [0], length)
        if least <= budget:
            return edges + [0]
        if edge == 0 or level >= top:
            raise UserError(f"{length} tokens of history do not fit a budget of {budget} entries: the coarsest tiling takes {least} "
                            f"(the last {tail} tokens raw, gists up to level {level}). Raise the budget or lower the tail"
                            + (f"; levels above {top} are not allowed here" if edge and level >= top else ""))
        edges.append(edge)
        level += 1
        edge = edge // width_of(level + 1) * width_of(level + 1)


def _cost_of(edges, length):
    total = length - edges[0]
    for level in range(1, len(edges)):
        total += (edges[level - 1] - edges[level]) // width_of(level)
    return total


def _open_newest(edges, level, room):
    """Open as many of the newest spans of `level` as `room` pays for; moves one edge, returns the entries spent."""
    here = (edges[level - 1] - edges[level]) // width_of(level)
    opened = min(room // GAIN, here)
    edges[level - 1] -= opened * width_of(level)
    return opened * GAIN
