"""
The working context: which spans of the history the GPT reads now, and how that list may change.
A working context is a plain list of Span, in the order of the timeline, within a budget of entries. Gists and blocks tile the timeline [0, length). On a
gist of gists, blocks of its stretch may be laid: it goes on standing for all of it, and they are shown besides.
Every function takes a list and returns a new one, so a plan that fails half-way leaves the old context untouched.
Nothing here ever drops history to make it fit (a budget that cannot be met is an error): it is only read more coarsely.

    [L2 gist 0..1023]              [L1 1024..1055][L1 1056..1087] ... [block 4064..4095][live block 4096..4106]
     1 entry                        1 entry        1 entry             32 entries         11 entries
         [block 96..127], laid on it
          32 entries

So a block of any past costs 32 entries. Where gists had to be opened into 32 gists on the way to it, those took the place of blocks (LOG.md, 2026-11-30).

Laws: budget, contiguity, alignment (a span starts at a multiple of its width), level, atomic swaps. Span is an index
within a level, so alignment cannot be broken; `check` looks for the others, and raises BrokenLaw at the first.
"""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

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
    """
    Raise BrokenLaw unless `spans` tile [0, length) within `budget`, with no level above `top` and one live block at most. Blocks that start before the tiles so far
    stop are laid: the newest tile must be a gist of gists then, and cover them, and they must follow each other.
    """
    at, used, bed = 0, 0, 0 # tiles so far stop at `at`; blocks may be laid from `bed` on
    for i, span in enumerate(spans):
        level, width = span.level, width_of(span.level)
        start = span.index * width
        if bed <= start < at and level == 0 and not span.live:
            bed = start + width
            used += width
            continue
        if start != at:
            raise BrokenLaw(f"contiguity: {span} (entry {i}) starts at {start}, the tiles before it stop at {at}")
        if level > top:
            raise BrokenLaw(f"level: {span} (entry {i}) is of level {level}, the highest allowed is {top}")
        if span.live and i != len(spans) - 1:
            raise BrokenLaw(f"level: {span} is an unfinished block but {len(spans) - 1 - i} spans follow it")
        at += span.live or width
        bed = start if level > 1 else at
        used += 1 if level else span.live or width
    if at != length:
        raise BrokenLaw(f"contiguity: the spans cover [0, {at}), the history is [0, {length})")
    if used > budget:
        raise BrokenLaw(f"budget: {used} entries, at most {budget} allowed")


def end_of(spans):
    """Tokens of history that a working context covers: the last span may be laid on the last gist."""
    return max(spans[-1].stop, next((span.stop for span in reversed(spans) if span.level), 0)) if spans else 0


def laid(spans):
    """Which of them are blocks that are laid, a list of bools: those that start before the tiles so far stop."""
    at, found = 0, []
    for span in spans:
        found.append(span.start < at)
        at = max(at, span.stop)
    return found


def find(spans, position):
    """Index of the finest span that covers a token position."""
    assert 0 <= position < end_of(spans), f"no span covers position {position}: the context ends at {end_of(spans)}"
    i = bisect_right(spans, position, key=lambda span: span.start) - 1
    while spans[i].stop <= position: # a block laid before the position, on a gist that covers it
        i -= 1
    return i


def place_of(span):
    """What spans of a working context are in the order of: where they start, a gist before what is laid on it."""
    return span.start, -span.level


def in_order(spans):
    return sorted(spans, key=place_of)


def blocks(spans):
    """Those of them that are tokens."""
    return [span for span in spans if span.level == 0]


# ----------------------------------------------------------------------------------------------------------------------
# What may collapse: a block of tokens, or all children of a gist, never part

class Group(NamedTuple):
    """spans[lo:hi] may collapse: a block of tokens for its gist, or leave where it is laid on another; all children of a gist for that, and what is shown as tokens in their stretch is laid on it."""
    lo: int
    hi: int
    node: Span # the gist that it is, of the block or of the children
    frees: int # entries; a family of blocks alone takes one, and is one of its parent's then


def groups(spans, edge=inf):
    """Every Group of a working context, in the order of their ends. Families with blocks past `edge` in them stay as they are: nothing is laid there."""
    found, at = [], 0          # tiles so far stop at `at`
    level = run = first = gists = 0 # of the newest tiles, so many are of this level, the first of them child 0 of its parent; gists: not shown as tokens
    for i, span in enumerate(spans):
        if span.live:
            break
        start = span.index * width_of(span.level)
        if start < at:
            found.append(Group(i, i + 1, span.parent(), BLOCK)) # laid
        else:
            at = start + width_of(span.level)
            if span.index % BLOCK == 0:
                level, run, first, gists = span.level or 1, 0, i, 0
            run = run + 1 if (span.level or 1) == level and (span.level or at <= edge) else -BLOCK
            if span.level:
                gists += run > 0
            else:
                found.append(Group(i, i + 1, span.parent(), GAIN))
        last = i + 1 == len(spans) or spans[i + 1].start >= at # nothing more is laid on this tile
        if run == BLOCK and last:
            node = Span(level + 1, spans[first].index // BLOCK)
            found.append(Group(first, i + 1, node, gists - 1))
    return found


def closed(spans, group):
    """What stands in the place of a group of `spans` once it has collapsed."""
    here = spans[group.lo:group.hi]
    if group.node.level > 1:
        return [group.node] + blocks(here)
    return [group.node] if group.frees == GAIN else []


# ----------------------------------------------------------------------------------------------------------------------
# Growth: the live block takes tokens until it is a block, then the next one opens

def advance(spans, length, budget=inf):
    """
    The context after the history has grown to `length` tokens: the new ones are raw, at the end.
    They must fit: call make_room first (the budget holds at every moment, not only after a repair).
    """
    now = end_of(spans)
    assert length >= now, f"history only grows: the context covers {now} tokens, asked to advance to {length}"
    after = list(spans)
    if after and after[-1].live:
        after.pop()
    at = end_of(after)
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

    def blocks(self, start, stop):
        """The blocks of tokens start..stop, multiples of 32, that are always shown, in order."""
        wanted = {index for a, b in self.raw for index in range(max(a, start) // BLOCK, -(-min(b, stop) // BLOCK))}
        return [Span(0, index) for index in sorted(wanted)]

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
    edge = end_of(spans) - tail
    after = []
    for span, on in zip(spans, laid(spans)):  # oldest first
        if short > 0 and span.level == 0 and not span.live and span.stop <= edge and top >= 1 and not pins.wants_raw(span):
            short -= BLOCK if on else GAIN
            after += [] if on else [span.parent()]
        else:
            after.append(span)
    while short > 0:
        crowd = Counter([span.level for span in after])
        ready = [group for group in groups(after, edge) if 2 <= group.node.level <= top]
        if not ready:
            raise UserError(f"{cost(spans)} entries and {room} more do not fit a budget of {budget}: with everything collapsed outside the "
                             f"last {tail} tokens{' and the pins' if pins.raw else ''} it is still {short} over. Raise the budget, or lower tail or pins")
        group = min(ready, key=lambda group: (group.frees < 1, -crowd[group.node.level - 1], group.node.level, group.lo))
        after[group.lo:group.hi] = closed(after, group)
        short -= group.frees
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
    The most entries that may be left when all has collapsed that can, with room for the next block, over all lengths: (entries, length, pinned blocks). Beside the raw tail
    they are the pinned blocks, and the gists that are too few for a parent: told one too high for a pinned block that stands in the place of one of these, and is not laid on another.
    """
    tail, longest = raw_tail(budget), max(first, longest)
    finished = lambda length: max(0, length - tail) // BLOCK # blocks before the tail
    most = (0, first)
    for top in range(1, coarsest(longest, budget) + 1):
        last = finished(min(longest, max((_highest(level, budget) + 1) * BLOCK ** level for level in range(1, top + 1)) - 1)) # the last length that shows no higher level
        for n in {last} | {last // BLOCK ** level * BLOCK ** level - 1 for level in range(1, top)}: # most are left over just before one more is complete
            if n >= finished(first):
                gists = n // BLOCK ** (top - 1) + sum(n // BLOCK ** level % BLOCK for level in range(top - 1))
                most = max(most, (gists + BLOCK * len(pins.blocks(0, n * BLOCK)) + tail + BLOCK, n * BLOCK + tail))
    return *most, len(pins.blocks(0, finished(longest) * BLOCK))


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
