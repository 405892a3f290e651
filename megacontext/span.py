"""
One entry of a working context, named by its place in the tree.
A span is a level and a node index, nothing more: where it starts, how far it reaches and what it costs follow from
them, so a span that is misaligned or that lies about its width cannot be written down.

level 0   a block of 32 raw tokens (or the live block, the one still being written: 1..31 tokens)
level l   one gist that stands for 32**l tokens, l >= 1

A block and the level-1 gist of the same index cover the same 32 tokens: opening the gist gives the one block. Opening a
gist of level 2 or more would give its 32 children, but what is opened there is a block, laid on it (working_context.py) for BLOCK = 32
entries. A block in the place of its gist takes GAIN = 31 more, and so many are free when 32 gists become one.
"""

from typing import NamedTuple

BLOCK = 32        # tokens in a block, and children of a gist
GAIN = BLOCK - 1  # entries that a block takes beyond its gist, and 32 gists beyond their parent


def width_of(level):
    """Tokens covered by one span of a level: 32 for a block, 32**level for a gist."""
    return BLOCK ** (level or 1)


class _Span(NamedTuple):
    level: int
    index: int     # node number within its level, oldest = 0
    live: int = 0  # tokens written so far if this is the unfinished block, else 0


class Span(_Span):
    """A tuple, because sets and dictionaries of some hundred of them are made at every tick: of dataclasses they take seven to ten times as long."""
    __slots__ = ()

    def __new__(cls, level, index, live=0):
        assert level >= 0 and index >= 0, f"a span has level >= 0 and index >= 0, got {level} and {index}"
        assert 0 <= live < BLOCK, f"a live block holds 1..{BLOCK - 1} tokens (0 = finished), got {live}"
        assert level == 0 or live == 0, f"only a block of tokens can be live, got level {level}"
        return super().__new__(cls, level, index, live)

    @property
    def start(self):
        """First token covered: a multiple of 32**level, by construction."""
        return self.index * width_of(self.level)

    @property
    def width(self):
        """Tokens covered."""
        return self.live or width_of(self.level)

    @property
    def stop(self):
        """One past the last token covered."""
        return self.start + self.width

    @property
    def cost(self):
        """Entries it takes up in front of the GPT: its tokens if raw, 1 if it is a gist of any level."""
        return 1 if self.level else self.live or BLOCK

    @property
    def centre(self):
        """Mean of the token positions covered, (start + stop - 1) / 2: a lone token would stand at its own index."""
        return self.start + (self.width - 1) / 2

    def positions(self):
        """Where its entries stand on the timeline: each token at its own index, a gist at its centre."""
        return [self.centre] if self.level else [float(p) for p in range(self.start, self.stop)]

    def parent(self):
        """The gist that replaces this span (and its 31 siblings, from level 1 up)."""
        assert not self.live, f"the live block has {self.live} of {BLOCK} tokens: it has no gist yet"
        return Span(1, self.index) if self.level == 0 else Span(self.level + 1, self.index // BLOCK)

    def children(self):
        """What replaces this gist when it is opened, oldest first: its block, or its 32 gists."""
        assert self.level > 0, "a block of tokens is as fine as it gets: it has no children"
        if self.level == 1:
            return [Span(0, self.index)]
        first = self.index * BLOCK
        return [Span(self.level - 1, first + i) for i in range(BLOCK)]
