"""
The MegaContext tree: all of history, append-only, in memory or on disk.

level 0   token ids, int32
level l   one gist per 32 nodes of the level below: a vector of width D and LensNet's key of width K, for l >= 1

Levels appear by themselves as the history needs them. A gist may only be appended once its 32 children are there, so a
tree never holds a gist of tokens that it does not have; gists may lag behind the tokens (`pending` says which).
Rows come back as they went in, up to the rounding of the header's gist_dtype; token ids always exactly.

D = width of a gist row, K = width of a key row (0 = none)
"""

import numpy as np

from nanochat.common import UserError
from megacontext.column import CODECS, MemoryColumn, decode, encode, row_bytes
from megacontext.span import BLOCK

FORMAT = "megacontext-tree"
VERSION = 1


class TreeError(UserError):
    """A tree that cannot be used as asked: what was expected, what was found, what to do."""


def make_header(width, key_width, gist_dtype="bfloat16", **identity):
    """
    What a tree says of itself. `identity` names what its numbers mean, as strings or numbers: model=, tokenizer=, gistnet=,
    lensnet= fingerprints. A tree opened with another identity is refused.
    """
    if gist_dtype not in CODECS:
        raise UserError(f"no gist_dtype {gist_dtype!r}: expected one of {', '.join(CODECS)}")
    if width < 1 or key_width < 0:
        raise UserError(f"a tree needs width >= 1 and key_width >= 0, got {width} and {key_width}")
    return {"format": FORMAT, "version": VERSION, "block": BLOCK, "width": width, "key_width": key_width, "gist_dtype": gist_dtype, **identity}


class MegaTree:
    def __init__(self, header, columns, new_column):
        self.header, self.columns, self._new_column = header, columns, new_column

    @classmethod
    def in_memory(cls, header):
        """A tree that lives and dies with the process."""
        tree = cls(header, {}, lambda name, row: MemoryColumn(row))
        tree._column(0, "ids")
        return tree

    # ------------------------------------------------------------------------------------------------------------------
    # What is there

    @property
    def length(self):
        """Tokens of history."""
        return self._column(0, "ids").rows

    def count(self, level):
        """Nodes at a level: tokens at level 0, gists above."""
        column = self.columns.get((level, "gists" if level else "ids"))
        return column.rows if column else 0

    @property
    def levels(self):
        """How many levels hold something, level 0 included: the highest level is levels - 1."""
        level = 1
        while self.count(level):
            level += 1
        return level

    def pending(self, level):
        """(a, b): the nodes of a level whose 32 children are all here, but not their gist yet."""
        assert level >= 1, f"tokens are appended, not derived: levels start at 1, got {level}"
        return self.count(level), self.count(level - 1) // BLOCK

    def tokens(self, a, b):
        """(b - a,) int32: token ids a..b."""
        return self._read(0, "ids", a, b).view(np.int32).reshape(-1)

    def gists(self, level, a, b):
        """(b - a, D) float32: the gists of nodes a..b."""
        return decode(self._read(level, "gists", a, b), self.header["gist_dtype"])

    def keys(self, level, a, b):
        """(b - a, K) float32: LensNet's keys of nodes a..b."""
        if self.header["key_width"] == 0:
            raise TreeError("this tree holds no LensNet keys (key_width 0): re-ingest it with a LensNet")
        return decode(self._read(level, "keys", a, b), self.header["gist_dtype"])

    # ------------------------------------------------------------------------------------------------------------------
    # Growth

    def append_tokens(self, ids):
        """Add token ids at the end of the history."""
        ids = np.asarray(ids)
        assert ids.ndim == 1 and (ids.size == 0 or ids.dtype.kind in "iu"), f"expected a row of token ids, got {ids.dtype} {ids.shape}"
        if ids.size and not 0 <= ids.min() <= ids.max() < 2 ** 31:
            raise ValueError(f"token ids must be in 0..2**31 - 1, got {ids.min()}..{ids.max()}")
        self._column(0, "ids").append(np.ascontiguousarray(ids, np.int32).view(np.uint8).reshape(-1, 4))

    def append_gists(self, level, gists, keys=None):
        """Add the next gists of a level: (n, D), with their LensNet keys (n, K) if the tree holds keys."""
        gists = np.asarray(gists, np.float32)
        keys = np.zeros((len(gists), 0), np.float32) if keys is None else np.asarray(keys, np.float32)
        D, K = self.header["width"], self.header["key_width"]
        assert gists.ndim == 2 and gists.shape[1] == D, f"expected gists of shape (n, {D}), got {gists.shape}"
        assert keys.shape == (len(gists), K), f"expected keys of shape ({len(gists)}, {K}), got {keys.shape}"
        a, b = self.pending(level)
        assert a + len(gists) <= b, f"level {level} has {a} gists and children for {b}: {len(gists)} more would come before their children"
        rows = encode(gists, self.header["gist_dtype"])
        key_rows = encode(keys, self.header["gist_dtype"]) if K else None
        if K:
            self._column(level, "keys").append(key_rows)
        self._column(level, "gists").append(rows)

    def truncate(self, tokens):
        """Forget everything after the first `tokens` tokens: whole gists of later tokens go too."""
        if not 0 <= tokens <= self.length:
            raise TreeError(f"cannot rewind to {tokens} tokens: the tree has {self.length}")
        for (level, _), column in self.columns.items():
            column.truncate(min(column.rows, tokens // BLOCK ** level))

    def commit(self):
        """Make everything appended so far durable (in memory there is nothing to do)."""

    # ------------------------------------------------------------------------------------------------------------------

    def _column(self, level, kind):
        if (level, kind) not in self.columns:
            row = 4 if kind == "ids" else row_bytes(self.header["width" if kind == "gists" else "key_width"], self.header["gist_dtype"])
            self.columns[level, kind] = self._new_column(f"level{level}.{kind}", row)
        return self.columns[level, kind]

    def _read(self, level, kind, a, b):
        here = self.count(level)
        if not 0 <= a <= b <= here:
            raise TreeError(f"asked for nodes {a}..{b} of level {level}, which has {here} (the tree has levels 0..{self.levels - 1})")
        return self._column(level, kind).read(a, b)
