"""
Append-only columns of fixed-size rows, in memory or in a memory-mapped file, and the codecs that turn vectors into rows.
A column knows rows of bytes, nothing of tokens or gists; what is committed is the record's business (record.py).

Codecs: float32 (N, W) in, uint8 (N, row bytes) out, and back. bfloat16 rounds to nearest even; int8 keeps one float32 scale per row.
"""

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# Codecs: name -> (bytes per row of width W, encode, decode)


def _to_bfloat16(x):
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round half to even: what torch does


def _from_bfloat16(rows):
    return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_int8(x):
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True, initial=0), np.finfo(np.float32).tiny) / np.float32(127)
    codes = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return np.concatenate([scale.astype(np.float32).view(np.uint8), codes.view(np.uint8)], axis=1)


def _from_int8(rows):
    return np.ascontiguousarray(rows[:, :4]).view(np.float32) * rows[:, 4:].view(np.int8).astype(np.float32)


CODECS = {
    "bfloat16": (lambda width: 2 * width, _to_bfloat16, _from_bfloat16),
    "float16": (lambda width: 2 * width, lambda x: x.astype(np.float16), lambda rows: rows.view(np.float16).astype(np.float32)),
    "float32": (lambda width: 4 * width, lambda x: x, lambda rows: rows.view(np.float32).copy()),
    "int8": (lambda width: 4 + width, _to_int8, _from_int8),
}


def encode(x, dtype):
    """(N, W) float32 -> (N, row bytes) uint8."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    with np.errstate(over="ignore"):  # looked for below, for every dtype at once
        rows = np.ascontiguousarray(CODECS[dtype][1](x)).view(np.uint8)
    if not np.isfinite(decode(rows, dtype)).all():
        raise ValueError(f"a vector to store is not finite, or too large for {dtype}: largest entry {np.abs(x).max()}")
    return rows


def decode(rows, dtype):
    """(N, row bytes) uint8 -> (N, W) float32."""
    return CODECS[dtype][2](np.ascontiguousarray(rows))


def row_bytes(width, dtype):
    return CODECS[dtype][0](width)


# ----------------------------------------------------------------------------------------------------------------------

class MemoryColumn:
    """Rows in one growing buffer; it doubles, so an append costs the same whatever came before."""

    def __init__(self, row):
        self.row, self.rows = row, 0
        self.buffer = np.empty((16, row), np.uint8)

    def append(self, rows):
        need = self.rows + len(rows)
        if need > len(self.buffer):
            grown = np.empty((max(need, 2 * len(self.buffer)), self.row), np.uint8)
            grown[:self.rows] = self.buffer[:self.rows]
            self.buffer = grown
        self.buffer[self.rows:need] = rows
        self.rows = need

    def read(self, a, b):
        return self.buffer[a:b].copy()

    def truncate(self, rows):
        self.rows = rows
