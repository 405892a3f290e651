"""
Documents on disk: one by one, by number, in bounded memory.

In:  paths of text, JSON lines and parquet files
Out: objects with len(file) documents, file[i] being a str, or a BigText where that would be larger than BIG; and
     `slices(document)`, the pieces of text that are tokenized one at a time
The idea: any document can be fetched by its number. A parquet file is read a row group at a time, a jsonl file is seen
through the offsets of its lines, and a text file beyond BIG never becomes a str. What cannot be read is an error that
names the file and the place; nothing is skipped or repaired. Only a byte-order mark at the start of a file is no part of
its text, whatever the kind of file.
"""

import json
import os
import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

from nanochat.common import UserError

SLICE = 100_000              # characters that are tokenized as one text; a longer document is cut at line ends near this
BIG = 16 << 20               # bytes; a larger text file is streamed from disk, a smaller one is read whole
READ = 1 << 18               # bytes of such a file that are read at a time
ROW_GROUP_CACHE = 256 << 20  # bytes of decoded row groups kept, shared by all sources of the process
TABLES = (".jsonl", ".parquet")  # files of many documents
BOM = b"\xef\xbb\xbf"            # how some editors begin a file of UTF-8


def open_bytes(path):
    """The file, to read from; one that cannot be opened is a UserError."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise cannot_open(path, error)


def cannot_open(path, error):
    return UserError(f"{path} cannot be opened ({error.strerror}): make it readable, or take it out of the folder")


def bom(file):
    """How many bytes at the start of an open file are a byte-order mark."""
    return len(BOM) if file.read(len(BOM)) == BOM else 0


# ---------------------------------------------------------------------------------------------------------------------
# Long documents are tokenized in slices

def cut_point(text):
    """
    Where to end the first slice of a text longer than SLICE: 0 < cut <= SLICE.

    Best is between a line end and a line that starts with ink, then just before a lone space: the split pattern of the
    tokenizer has a border at both, so the slices give the very tokens that the whole text would. Only a text without
    either in half a slice (50,000 characters) is cut at SLICE flat, where a few tokens may differ.
    """
    assert len(text) > SLICE, f"{len(text)} characters need no cut"
    low, at = SLICE // 2, SLICE
    while (at := text.rfind("\n", low, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    at = SLICE
    while (at := text.rfind(" ", low, at)) >= 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return SLICE


def slices(document, at=0):
    """
    (at, next, text) for each slice of a document from place `at` on, which must be 0, some earlier `next`, or from near().
    Places count characters in a str and bytes in a BigText; the slices are the same for both.
    """
    if isinstance(document, BigText):
        yield from document.slices(at)
        return
    while at < len(document):
        text = document[at:at + SLICE + 1]
        text = text if len(text) <= SLICE else text[:cut_point(text)]
        yield at, at + len(text), text
        at += len(text)


def excerpt(document, start=0, stop=None):
    """Characters [start, stop) of a document: one str, or of a BigText a str for each slice that has some."""
    if not isinstance(document, BigText):
        yield document[start:stop]
        return
    at = 0
    for _, _, text in document.slices():
        if part := text[max(0, start - at):stop if stop is None else max(0, stop - at)]:
            yield part
        at += len(text)
        if stop is not None and at >= stop:
            return


def near(document, share):
    """A place to start at, past a share of the document: after a line end within the next 1,000 characters, if there is."""
    goal = int(share * len(document))
    if isinstance(document, BigText):
        at = document.near(goal)
    else:
        at = document.find("\n", goal, goal + 1000) + 1 or goal
    return at if at < len(document) else 0


class BigText:
    """A document that stays on disk: bytes [start, stop) of a UTF-8 file, read slice by slice."""

    def __init__(self, path, start, stop):
        self.path, self.start, self.stop = path, start, stop

    def __len__(self):
        """In bytes, as its places are."""
        return self.stop - self.start

    def slices(self, at=0):
        with open_bytes(self.path) as file:
            file.seek(self.start + at)
            left, tail, text = self.stop - self.start - at, b"", ""
            while left or text:
                while left and len(text) <= SLICE:
                    data = file.read(min(left, READ))
                    if not data:
                        raise UserError(f"{self.path} became shorter while it was read: leave data files alone during a run")
                    left -= len(data)
                    text, tail = self._decode(text, tail + data, last=not left, end=self.stop - left)
                piece = text if len(text) <= SLICE else text[:cut_point(text)]
                size = len(piece.encode())
                yield at, at + size, piece
                at, text = at + size, text[len(piece):]

    def near(self, goal):
        with open_bytes(self.path) as file:
            file.seek(self.start + goal)
            data = file.read(min(1000, len(self) - goal))
        border = data.find(b"\n") + 1
        inside = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), len(data))  # not in a character
        return goal + (border or inside)

    def _decode(self, text, data, last, end):
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            if not last and error.end == len(data) and len(data) - error.start < 4:  # a character cut by the end of a read
                return text + data[:error.start].decode(), data[error.start:]
            raise not_utf8(self.path, end - len(data) + error.start)


def not_utf8(path, at):
    return UserError(f"{path} is not UTF-8 text (byte {at}): convert it (iconv -t utf-8) or take it out of the folder")


# ---------------------------------------------------------------------------------------------------------------------
# Files: len(file) documents, file[i] is one of them

class TextFile:
    """A file that is one document: bytes [start, stop) of it, the whole file unless said otherwise."""

    def __init__(self, path, start=0, stop=None):
        self.path, self.start = path, start
        try:
            self.stop = stop if stop is not None else os.path.getsize(path)
        except OSError as error:
            raise cannot_open(path, error)

    def __len__(self):
        return 1

    def __getitem__(self, i):
        with open_bytes(self.path) as file:
            start = self.start or bom(file)
            if self.stop - start > BIG:
                return BigText(self.path, start, self.stop)
            file.seek(start)
            data = file.read(self.stop - start)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, start + error.start)


class JsonLines:
    """One JSON object a line, text in its field `text`. Blank lines are no documents. Opening notes where lines start."""

    def __init__(self, path):
        self.path = path
        self.starts, self.lines = array("q"), array("q")
        with open_bytes(path) as file:
            at = bom(file)
            file.seek(at)
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.starts.append(at)
                    self.lines.append(number)
                at += len(line)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, i):
        with open_bytes(self.path) as file:
            file.seek(self.starts[i])
            line = file.readline()
        where = f"{self.path}, line {self.lines[i]}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start} of the line): convert the file or drop the line")
        except (ValueError, RecursionError) as error: # the second where brackets are nested thousands deep
            raise UserError(f"{where}: expected a JSON object, got {line[:60]!r} ({error}): repair or drop the line")
        if not isinstance(record, dict) or "text" not in record:
            found = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{where}: expected an object with a field `text`, got {found}")
        return check_text(record["text"], where)


def check_text(text, where):
    """A value of a `text` field as str: null counts as empty, and half a surrogate pair is no text."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected a string in `text`, got a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half of a surrogate pair, which is not text: repair it")
    return text


class RowGroups:
    """The most recently used row groups, decoded, up to a number of bytes (or one, however large). Safe for threads."""

    def __init__(self, limit):
        self.limit, self.groups, self.lock = limit, OrderedDict(), threading.Lock()

    def get(self, key, read):
        with self.lock:
            if key not in self.groups:
                self.groups[key] = read()
                while len(self.groups) > 1 and sum(group.nbytes for group in self.groups.values()) > self.limit:
                    self.groups.popitem(last=False)
            self.groups.move_to_end(key)
            return self.groups[key]


row_groups = RowGroups(ROW_GROUP_CACHE)


class ParquetFile:
    """A table with a column `text`, a document a row. Opening reads the footer only; a row group is decoded when needed."""

    def __init__(self, path):
        import pyarrow as pa
        import pyarrow.parquet as pq
        self.path, self.broken = path, (pa.ArrowException, OSError)
        try:
            with open_bytes(path) as handle, pq.ParquetFile(handle) as file: # by itself it opens no name that is not UTF-8
                schema, meta = file.schema_arrow, file.metadata
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        except self.broken as error:
            raise self._unreadable(error)
        if "text" not in schema.names:
            raise UserError(f"{path} has no column `text`, only {', '.join(schema.names) or 'none at all'}")
        kind = schema.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise UserError(f"{path}: expected strings in the column `text`, got {kind}")
        self.starts = [0, *accumulate(sizes)]
        stat = os.stat(path)
        self.key = (str(path), stat.st_size, stat.st_mtime_ns)

    def _unreadable(self, error):
        first = str(error).strip().split("\n")[0]
        return UserError(f"{self.path} cannot be read as parquet ({first}): delete it and fetch or make it again")

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, i):
        group = bisect_right(self.starts, i) - 1
        value = row_groups.get((self.key, group), lambda: self._read(group))[i - self.starts[group]]
        try:
            return check_text(value.as_py(), f"{self.path}, row {i}")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}, row {i}: not UTF-8 (byte {error.start}): write the file again from valid text")

    def _read(self, group):
        import pyarrow.parquet as pq
        try:
            with open_bytes(self.path) as handle, pq.ParquetFile(handle) as file:
                return file.read_row_group(group, columns=["text"]).column("text")
        except self.broken as error:
            raise self._unreadable(error)


class Part:
    """Documents [start, stop) of a file of rows."""

    def __init__(self, file, start, stop):
        self.file, self.start, self.stop = file, start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, i):
        return self.file[self.start + i]


def open_file(path):
    return {".jsonl": JsonLines, ".parquet": ParquetFile}.get(suffix(path), TextFile)(path)


def suffix(path):
    """What decides how a file is read: .TXT is .txt."""
    return Path(path).suffix.lower()
