"""
Append-only columns of fixed-size rows, in memory or in a memory-mapped file, and the codecs that turn vectors into rows.
A column knows rows of bytes, nothing of tokens or gists; which rows are committed is the record's business (record.py).

Codecs: float32 (N, W) in, uint8 (N, row bytes) out, and back. bfloat16 rounds to nearest even; int8 keeps one float32 scale per row.

A file is written with pwrite and read through a map, so a full disk is an error and never a bus error. Single tokens wait in memory until
they are a block: to write one takes the system longer than all else that is done about a token here. The file is checksummed in
chunks of 64 KiB; a chunk is checked the first time that it is read, so no damaged byte is ever used, and opening reads nothing.
"""

import errno
import mmap
import os
import zlib
from typing import NamedTuple

import numpy as np

from nanochat.common import UserError


class TreeError(UserError):
    """A tree that cannot be used as asked: what was expected, what was found, what to do."""


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
        self.row, self.end = row, 0
        self.buffer = np.empty((16, row), np.uint8)

    @property
    def rows(self):
        return self.end

    def append(self, data):
        """Bytes of whole rows, as in FileColumn."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, self.row)
        need = self.rows + len(rows)
        if need > len(self.buffer):
            grown = np.empty((max(need, 2 * len(self.buffer)), self.row), np.uint8)
            grown[:self.rows] = self.buffer[:self.rows]
            self.buffer = grown
        self.buffer[self.rows:need] = rows
        self.end = need

    def read(self, a, b):
        return self.buffer[a:b].copy()

    def take(self, indices):
        return self.buffer[indices]

    def truncate(self, rows):
        self.end = rows

    def resize(self, row):
        """Rows of another width from now on. There must be none."""
        assert self.rows == 0, f"{self.rows} rows are in the way"
        self.row, self.buffer = row, np.empty((16, row), np.uint8)


# ----------------------------------------------------------------------------------------------------------------------

CHUNK = 64 * 1024
HELD = 128                       # rows wait for others until they are so many bytes: a block of token ids
RESIDENT = 64 * 1024 * 1024      # bytes of a file that may stay mapped in memory, about; the system's own cache is not counted
TOUCH = 256 * 1024               # what one page fault maps, with its neighbours
LARGEST_STEP = 16 * 1024 * 1024  # bytes that a file grows by at a time, at most; an eighth of its size while it is smaller
RESTORE = "Restore the tree from a copy"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_flush = getattr(os, "fdatasync", os.fsync)  # macOS has only fsync


class End(NamedTuple):
    """
    Where a file column ends: one value, put in the place of the last one in one step, so that an interrupt leaves the one or the other.
    Bytes of the file behind it count for nothing, so whoever puts an older one back has undone what came between.
    """

    written: int            # rows in the file
    held: bytes = b""       # the rows behind them, as long as they are not written
    crc: int = 0            # of the unfinished last chunk of the written rows
    filled: dict = {}       # chunk -> (bytes, crc32) of those that got full since the last commit; never changed in place
    cut: int | None = None  # chunks of the record from here on are void, since the last commit


class FileColumn:
    """
    Rows in one file. Only bytes after the last committed row are ever written, so a crash leaves the committed ones as they were.

    rows      how many rows the record says there are
    checksum  function: chunk number -> (bytes, crc32) of the committed chunk, or None
    remedy    what to do if they are damaged
    check     False: the file may be damaged or gone, for all of its rows are going to be truncated
    """

    def __init__(self, path, row, rows, checksum, writable, remedy=RESTORE, check=True):
        self.path, self.row, self.checksum, self.remedy = path, row, checksum, remedy
        self.committed_rows = rows  # the most that the record may name
        self.is_new = not rows  # its folder must be flushed too, once, by whoever commits its first rows
        try:
            make = 0 if rows and check else os.O_CREAT
            self.fd = os.open(path, os.O_RDWR | make if writable else os.O_RDONLY, 0o644)
        except FileNotFoundError:
            raise TreeError(f"{path}: expected {rows} rows, found no file. {remedy}") from None
        except OSError as error:
            raise full(path, row, error)
        self.size = os.fstat(self.fd).st_size
        self.map, self.resident = None, 0
        self.trusted = {}  # chunk -> bytes of it known to be good: checked, or written by us
        self.unflushed = False
        crc = 0
        if rows and check:
            if self.size < rows * row:
                raise TreeError(f"{path} is truncated: expected at least {rows * row} bytes ({rows} rows), found {self.size}. {remedy}")
            last, filled = (rows * row - 1) // CHUNK, (rows * row - 1) % CHUNK + 1
            self._check(last, filled)
            if writable and filled < CHUNK:
                size, crc = checksum(last)
                if size != filled:
                    raise TreeError(f"{path}: expected a checksum of {filled} bytes for chunk {last}, found one of {size}. {remedy}")
        self.end = self.committed_end = End(rows, crc=crc)

    @property
    def rows(self):
        return self.end.written + len(self.end.held) // self.row

    def append(self, data):
        """Bytes of whole rows. A few wait in memory for the next ones."""
        assert self.rows >= self.committed_rows, f"{self.path} was rewound: commit that before appending, which overwrites committed rows"
        data = self.end.held + data
        if len(data) < HELD:
            self.end = self.end._replace(held=data)
        else:
            self._write(data)

    def write(self):
        """Write the rows that wait."""
        if self.end.held:
            self._write(self.end.held)

    def _write(self, data):
        """Write data where the held rows begin: these, and what follows them."""
        at, crc, filled = self.end.written * self.row, self.end.crc, {}
        self._grow(at + len(data))
        view, done = memoryview(data), 0
        self.unflushed = True
        while done < len(data):
            try:
                done += os.pwrite(self.fd, view[done:], at + done)
            except OSError as error:
                raise full(self.path, len(data) - done, error)
        while len(view):
            chunk, inside = divmod(at, CHUNK)
            piece = view[:CHUNK - inside]
            crc = zlib.crc32(piece, crc)
            self.trusted[chunk] = inside + len(piece)
            if inside + len(piece) == CHUNK:
                filled[chunk], crc = (CHUNK, crc), 0
            view, at = view[len(piece):], at + len(piece)
        self.end = self.end._replace(written=at // self.row, held=b"", crc=crc, filled=self.end.filled | filled)

    def read(self, a, b):
        start, stop = a * self.row, b * self.row
        if start == stop:
            return np.empty((0, self.row), np.uint8)
        if self.end.held:
            first = self.end.written * self.row
            if start >= first:
                return np.frombuffer(bytearray(self.end.held[start - first:stop - first]), np.uint8).reshape(b - a, self.row)
            self.write()
        for chunk in range(start // CHUNK, (stop - 1) // CHUNK + 1):
            self._trust(chunk, min(stop - chunk * CHUNK, CHUNK))
        self._touch(stop, stop - start + TOUCH)
        return np.frombuffer(self.map, np.uint8, stop - start, start).reshape(b - a, self.row).copy()

    def take(self, indices):
        """Rows at any indices, in the order given."""
        if len(indices) == 0:
            return np.empty((0, self.row), np.uint8)
        self.write()
        first, last = indices * self.row // CHUNK, ((indices + 1) * self.row - 1) // CHUNK
        end = self.rows * self.row
        chunks = {chunk for a, b in set(zip(first.tolist(), last.tolist())) for chunk in range(a, b + 1)}
        for chunk in chunks:
            self._trust(chunk, min(end - chunk * CHUNK, CHUNK))
        self._touch(end, len(chunks) * TOUCH)
        return np.frombuffer(self.map, np.uint8, end).reshape(self.rows, self.row)[indices]

    def truncate(self, rows):
        """Forget the last rows. If they were committed, commit this before the next append: that one will overwrite them."""
        end = self.end
        if rows >= end.written:
            self.end = end._replace(held=end.held[:(rows - end.written) * self.row])
            return
        chunk, inside = divmod(rows * self.row, CHUNK)
        crc, cut = 0, end.cut
        if inside:
            self._trust(chunk, inside)
            crc = zlib.crc32(os.pread(self.fd, inside, chunk * CHUNK))
        if rows < self.committed_rows:
            cut = chunk if cut is None else min(cut, chunk)
        self.end = End(rows, crc=crc, filled={c: sums for c, sums in end.filled.items() if c < chunk}, cut=cut)

    def resize(self, row):
        """Rows of another width from now on. There must be none."""
        assert self.rows == 0, f"{self.rows} rows of {self.path} are in the way"
        self.row = row

    def flush(self):
        """Make the written bytes durable; the record may speak of them only after this."""
        if self.unflushed:
            _flush(self.fd)
            self.unflushed = False
        self.committed_rows = max(self.committed_rows, self.rows)  # whether or not committed() is ever reached

    def changes(self):
        """(cut, {chunk: (bytes, crc32)}) for the record, None where it has them."""
        end = self.end
        if end == self.committed_end:
            return None
        chunk, inside = divmod(end.written * self.row, CHUNK)
        return end.cut, end.filled | ({chunk: (inside, end.crc)} if inside else {})

    def committed(self):
        self.is_new, self.committed_rows = False, self.rows
        self.end = self.committed_end = self.end._replace(filled={}, cut=None)

    def trim(self, rows):
        """Give back the space grown ahead of use. `rows` must be the most that any reader was ever promised."""
        os.ftruncate(self.fd, min(self.size, rows * self.row))

    def damage(self, rows):
        """Check the first `rows` rows, byte by byte; returns what is wrong, or None."""
        stop = rows * self.row
        try:
            for chunk in range(-(-stop // CHUNK)):
                self._check(chunk, min(stop - chunk * CHUNK, CHUNK))
        except TreeError as error:
            return str(error)
        return None

    def close(self):
        if self.map is not None:
            self.map.close()
        os.close(self.fd)

    def _grow(self, size):
        if size <= self.size:
            return
        step = min(max(CHUNK, self.size // 8), LARGEST_STEP)
        size = -(-size // step) * step
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, self.size, size - self.size)
            else:
                os.ftruncate(self.fd, size)  # macOS: a sparse file; a full disk then shows in pwrite
        except OSError as error:
            raise full(self.path, size - self.size, error)
        self.size = size

    def _trust(self, chunk, needed):
        if self.trusted.get(chunk, 0) < needed:
            self._check(chunk, needed)

    def _touch(self, stop, size):
        """Have the first `stop` bytes mapped; about `size` bytes of them are going to be read."""
        if self.map is None or len(self.map) < stop:
            self.map, self.resident = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ), 0  # nobody else has the old one, so it goes
        self.resident += size
        if self.resident > RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self.map.madvise(mmap.MADV_DONTNEED)
            self.resident = 0

    def _check(self, chunk, needed):
        found = self.checksum(chunk)
        if found is None or found[0] < needed:
            raise TreeError(f"{self.path}: no checksum of the first {needed} bytes of chunk {chunk}. If another process rewound the tree, refresh(), "
                            f"else the record is damaged. {self.remedy}")
        size, crc = found
        actual = zlib.crc32(os.pread(self.fd, size, chunk * CHUNK))
        if actual != crc:
            raise TreeError(f"{self.path} is damaged in bytes {chunk * CHUNK}..{chunk * CHUNK + size}: expected checksum {crc:08x}, found {actual:08x}. {self.remedy}")
        self.trusted[chunk] = max(size, self.trusted.get(chunk, 0))  # we may have written beyond what is committed


def full(path, size, error):
    """The error to raise when `size` more bytes could not be had."""
    if error.errno not in DISK_FULL:
        return error
    return TreeError(f"{path}: no space for {size} more bytes ({error.strerror}). Everything committed is intact: free some space, open the tree and go on")
