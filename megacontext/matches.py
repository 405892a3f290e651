"""
Where the newest tokens have stood before: for every entry of a working context and every newest token, whether the entry's tokens hold that
token, and whether they hold it behind the same token as now (a pair). What the next tokens need is most often what followed last time.

What follows a match in the last tokens of a block stands in the next one. So an entry holds the tokens from LEAD before it to LEAD before its end: each token belongs to one
entry, that which holds most of what follows it. With the tokens of the entry itself, LensNet gets 0.03 less of what the best entries gain (LOG.md, 2026-11-27).

Training asks the rows themselves. At a tick, a session asks a bit set for each entry: the hashes of its tokens and pairs (Bloom, 1970, with one hash
function), made from the ids in the tree when the entry comes into view or is first asked about, so that a refocus touches newest tokens x entries, whatever the entries cover.
For a million tokens that takes as long as some steps of the GPT: what 32 gists in view become takes the bits of theirs.
A bit set may say yes where the truth is no: in one case in 500 for a block, in one of 20 for a gist of 1,024 tokens of ordinary text.
After a prompt it looks through the ids of the whole history instead.

M = readings, E = entries, n = newest tokens, T = tokens of a row, K = block, Q = T / K
"""
import numpy as np
import torch
import torch.nn.functional as F

from megacontext.span import BLOCK

NEWEST = 64            # newest tokens that ask: a question of a few lines
LEAD = BLOCK // 4      # tokens that an entry's own stand before it
KINDS = 2              # a token by itself, and behind the one before it
AT_ONCE = 1 << 12      # blocks of a history that are looked through at a time
STEP = 8               # tokens from one window of a search to the next
PER_BLOCK = BLOCK // STEP
BITS = (1 << 15, 1 << 20) # of an entry's set: up to level 2, and above (a gist of level 3 stands for 32,768 tokens)
LEAST = 512               # of the smaller sets there is room for at first, 2 MiB
MIX = (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB) # splitmix64 (Steele et al., 2014): shifts and factors that spread 64 bits evenly


# ----------------------------------------------------------------------------------------------------------------------
# In rows

def row_hits(ids, docs, block, K, now=None):
    """
    Readings block (B, P) of rows ids (B, T) with documents docs (B, Q): what each earlier block holds of the NEWEST tokens, bool (B, P, Q, KINDS, n).
    What stands before the row, or belongs to another document, is held by nobody.
    K: tokens of a block, whose own stand K // 4 before it;  now (B, P): the place that the newest stand before (None = where the reading block begins)
    """
    lead, device = K * LEAD // BLOCK, ids.device
    before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
    now = block * K if now is None else now
    index = now[:, :, None] + torch.arange(-NEWEST, 0, device=device) # (B, P, n)
    at = index.clamp(min=0).flatten(1)
    there = (index >= 0) & (docs.gather(1, at // K).view_as(index) == docs.gather(1, block)[:, :, None])
    newest, newest_before = (t.gather(1, at).view_as(index)[:, :, None, None] for t in (ids, before)) # (B, P, 1, 1, n)
    led = torch.cat([torch.zeros_like(docs[:, :1], dtype=torch.bool), docs[:, 1:] == docs[:, :-1]], dim=1) # (B, Q), whether the block goes on from the one before it
    own = lambda t: F.pad(t, (lead, -lead), value=-2).unflatten(1, (-1, K)) # (B, Q, K), of each block
    held = own(ids).masked_fill(~led[:, :, None] & (torch.arange(K, device=device) < lead), -2)[:, None, :, :, None] # -2 is no token
    held_before = own(before)[:, None, :, :, None]
    same = held == newest # (B, P, Q, K, n)
    hits = torch.stack([same.any(3), (same & (held_before == newest_before)).any(3)], dim=3)
    return hits & there[:, :, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# In a session

def window_hits(tree):
    """
    What each window of BLOCK tokens, one from every STEP-th token on, holds of the tree's NEWEST tokens, found by looking through its finished blocks:
    uint64 numpy (windows, KINDS), bit i for the i-th of them, oldest first; bits() takes them apart. Exact; takes time in proportion to the history.
    """
    newest, newest_before = _with_before(tree, max(0, tree.length - NEWEST), tree.length)
    bit = np.uint64(1) << np.arange(len(newest), dtype=np.uint64)
    size = int(max(newest.max(), newest_before.max())) + 3
    tables = np.zeros((2, size), np.uint64) # a token -> the newest tokens that are it, that stand behind it; -1 and what is none of them has its place at the ends
    np.bitwise_or.at(tables[0], newest + 1, bit)
    np.bitwise_or.at(tables[1], newest_before + 1, bit)
    blocks = tree.length // BLOCK
    steps = np.empty((blocks * PER_BLOCK, KINDS), np.uint64) # the same of STEP tokens each
    for first in range(0, blocks, AT_ONCE):
        last = min(blocks, first + AT_ONCE)
        alone, behind = (table[np.minimum(held + 1, size - 1)] for table, held in zip(tables, _with_before(tree, first * BLOCK, last * BLOCK)))
        for kind, found in enumerate((alone, alone & behind)):
            steps[first * PER_BLOCK:last * PER_BLOCK, kind] = np.bitwise_or.reduce(found.reshape(-1, STEP), axis=1)
    windows = len(steps) - PER_BLOCK + 1
    return np.bitwise_or.reduce([steps[i:windows + i] for i in range(PER_BLOCK)])


def bits(words, n):
    """uint64 (windows, KINDS) -> bool (windows, KINDS, n)."""
    return np.unpackbits(words.astype("<u8")[..., None].view(np.uint8), axis=-1, count=n, bitorder="little").view(bool)


def hashed(ids, before):
    """Ids (n,) and the ids before them, -1 and up -> (KINDS, n) uint64, evenly spread."""
    ids = np.asarray(ids, np.uint64)
    x = np.stack([ids, ids + (np.asarray(before, np.int64) + 2).astype(np.uint64) * np.uint64(1 << 32)])
    for shift, factor in MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class Matches:
    """The bit sets of the entries in view, and of those that were asked about lately."""

    def __init__(self):
        self.fine, self.coarse = _Slices(), _Sets()

    def hits(self, tree, spans):
        """What each of `spans`, finished ones of the tree, holds of its NEWEST tokens: bool numpy (E, KINDS, n)."""
        asked = hashed(*_with_before(tree, max(0, tree.length - NEWEST), tree.length)) # (KINDS, n)
        stretches = [(span.level or 1, span.index) for span in spans] # a block holds what its gist does
        hits = np.empty((len(spans), *asked.shape), dtype=bool)
        high = np.array([level > 2 for level, _ in stretches], dtype=bool)
        for sets, here in ((self.fine, ~high), (self.coarse, high)):
            if here.any():
                hits[here] = sets.ask(tree, [one for one, wanted in zip(stretches, here) if wanted], asked)
        return hits


class _Slices:
    """
    Bit sets of blocks and of gists up to level 2, stretches (level, index) from level 1 up, side by side: a row for each bit, and in it a column for each stretch, eight to a byte (signatures in
    slices: Faloutsos and Chan, 1988). So a question looks at as many rows as it has tokens, and not at as many sets as there are stretches.
    """

    def __init__(self):
        self.table, self.column = np.zeros((BITS[0], LEAST // 8), np.uint8), {}

    @property
    def columns(self):
        """How many there is room for."""
        return 8 * self.table.shape[1]

    def ask(self, tree, stretches, asked):
        """(E, KINDS, n) bool: which bits of the stretches' sets are set."""
        self._hold(tree, stretches)
        rows = np.unpackbits(self.table[bit_of(asked, BITS[0])], axis=-1, bitorder="little") # (KINDS, n, columns)
        return rows.take([self.column[one] for one in stretches], axis=-1).transpose(2, 0, 1).view(bool)

    def _hold(self, tree, stretches):
        new = sorted({one for one in stretches if one not in self.column})
        if not new:
            return
        self._make_room(stretches, len(new))
        used = set(self.column.values())
        free = [column for column in range(self.columns) if column not in used][:len(new)]
        found, at = [], 0
        for i in range(1, len(new) + 1): # those that follow each other are looked up together
            if i == len(new) or new[i] != (new[at][0], new[i - 1][1] + 1):
                found.append(self._look_up(tree, new[at:i], free[at:i]))
                at = i
        for places, bits in found: # behind all that may fail: a free column is empty, and what has a column is there
            np.bitwise_or.at(self.table.reshape(-1), places, bits)
        self.column.update(zip(new, free))

    def _make_room(self, stretches, more):
        """Free columns for `more` stretches: those that are not asked about give up theirs first, then there are more."""
        if len(self.column) + more <= self.columns:
            return
        wanted = set(stretches)
        self.column = {one: column for one, column in self.column.items() if one in wanted}
        kept = np.zeros(self.columns, np.uint8)
        kept[list(self.column.values())] = 1
        self.table &= np.packbits(kept, bitorder="little")
        if len(wanted) > self.columns:
            self.table = np.pad(self.table, ((0, 0), (0, -(-2 * len(wanted) // 8) - self.table.shape[1])))

    def _look_up(self, tree, run, columns):
        """Of stretches of one level that follow each other, the bytes of the table and the bits to set in them, in time in proportion to their tokens (docs/RUNTIME.md)."""
        (level, first), width = run[0], BLOCK ** run[0][0]
        ids, before = _with_before(tree, max(0, first * width - LEAD), (first + len(run)) * width - LEAD)
        column = np.repeat(columns, width)[-len(ids):] # no lead stands before the first token of all
        rows = bit_of(hashed(ids, before), BITS[0])
        return (rows * self.table.shape[1] + (column >> 3)).reshape(-1), np.tile((1 << (column & 7)).astype(np.uint8), KINDS)


class _Sets:
    """Bit sets of the few gists above level 2, packed, one for each stretch (level, index) that was asked about last."""

    def __init__(self):
        self.held = {}

    def ask(self, tree, stretches, asked):
        """(E, KINDS, n) bool: which bits of the stretches' sets are set."""
        for one in stretches:
            if one not in self.held:
                known = self._of_children(*one)
                self.held[one] = self._of_ids(tree, *one) if known is None else known
        self.held = {one: self.held[one] for one in stretches}
        bit = bit_of(asked, BITS[1])
        return (np.stack([self.held[one][bit >> 3] for one in stretches]) >> (bit & 7).astype(np.uint8) & 1).view(bool)

    def _of_children(self, level, index):
        """The set of a gist of a million tokens or more: all that its children hold. They were in view when they became it. None where one's set is not here."""
        rows = [self.held.get((level - 1, index * BLOCK + i)) for i in range(BLOCK)]
        return None if any(row is None for row in rows) else np.bitwise_or.reduce(rows)

    def _of_ids(self, tree, level, index):
        """A stretch's set, in time in proportion to its tokens."""
        width, flags = BLOCK ** level, np.zeros(BITS[1], bool)
        flags[bit_of(hashed(*_with_before(tree, max(0, index * width - LEAD), (index + 1) * width - LEAD)), BITS[1]).ravel()] = True
        return np.packbits(flags, bitorder="little")


def bit_of(hashes, bits):
    """Which bit of a set of so many stands for a hash."""
    return (hashes % np.uint64(bits)).astype(np.int64)


def _with_before(tree, start, stop):
    """Ids start..stop and the ids before them; before the first of all stands -1."""
    ids = tree.tokens(max(0, start - 1), stop).astype(np.int64)
    return (ids[1:], ids[:-1]) if start else (ids, np.concatenate([[-1], ids[:-1]]))
