"""
Rows of a public data set, from a local folder or from the hub, and the tasks that are made of them.

In:  the hub's name of the set, its configuration, a split, the fields of a row; NANOCHAT_DATA_DIR may name a folder of local copies.
Out: Rows: `len(rows)` and `rows[i]` -> dict of those fields, each of its type. Rows are parsed and checked when they are asked
     for, so a large set opens at once; an error names the file and the row. RowTask: a task whose conversations are rows.

A local copy is NANOCHAT_DATA_DIR/<name>/ with files <split>.<ext> or, for a set with configurations, <config>/<split>.<ext>;
<ext> is parquet, jsonl or csv, the last two also with .gz; parts of a split are <split>-00000.<ext>, ... in order. The fields
have the hub's names; in a csv a field that is a list is written as JSON. The local copy is preferred; the hub needs the
`datasets` package and a network.
"""

import csv
import gzip
import io
import json
import os
import zlib
from bisect import bisect_right
from functools import cache
from itertools import accumulate
from pathlib import Path

from nanochat.common import UserError, check_unicode
from tasks.common import Task, check_conversation, clip, digest

EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
PATIENCE = 5             # seconds to wait for the hub's first word
LONGEST_FIELD = 1 << 30  # characters of a field of a csv; Python's own limit of 131,072 is less than some prompts have


class Rows:
    """
    One list out of several parts.

    parts   (len, fetch(i) -> row, where(i) -> text) of each
    shapes  what a row may look like: one or more {field: type}. The first whose fields are all there is taken
    name    what the rows are, in short
    fingerprint  changes when the files do, by their names and sizes
    """

    def __init__(self, parts, shapes, name, fingerprint):
        self.parts, self.shapes, self.name, self.fingerprint = parts, shapes, name, fingerprint
        self.ends = list(accumulate(part[0] for part in parts))
        if not len(self):
            raise UserError(f"{name}: expected at least one row, got none")

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        part, i = self._find(i)
        return check_row(self.parts[part][1](i), self.shapes, self.parts[part][2](i))

    def where(self, i):
        """File and place of row i."""
        part, i = self._find(i)
        return self.parts[part][2](i)

    def _find(self, i):
        """(number of the part, number of the row in it)"""
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        part = bisect_right(self.ends, i)
        return part, i - (self.ends[part - 1] if part else 0)


def check_row(row, shapes, where):
    """The fields of a row that are asked for, each of its type. Null is as good as absent."""
    given = {field for field, value in row.items() if value is not None} if isinstance(row, dict) else set()
    shape = next((shape for shape in shapes if shape.keys() <= given), None)
    if shape is None:
        got = f"only {', '.join(sorted(given)) or 'nulls'}" if isinstance(row, dict) else clip(row)
        raise UserError(f"{where}: expected the fields {', or '.join(', '.join(shape) for shape in shapes)}, got {got}")
    return {field: check_field(row[field], kind, f"{where}, field {field}") for field, kind in shape.items()}


def check_field(value, kind, where):
    """A value of the kind that was asked for; what is no text may be written as JSON, as in a csv."""
    if isinstance(value, str) and kind is not str:
        value = parse_json(value, where)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: expected {KINDS[kind]}, got {clip(value)}")
    if kind is str:
        try:
            check_unicode(value)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return value


class RowTask(Task):
    """A task over rows. A subclass gives `read(row, where)`: a checked row, and its place for an error, -> conversation."""

    empty = False # may a message say nothing?

    def __init__(self, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows

    @property
    def fingerprint(self):
        return digest(super().fingerprint, self.rows.fingerprint)

    def count(self):
        return len(self.rows)

    def example(self, index):
        where = self.rows.where(index)
        conversation = self.read(self.rows[index], where)
        if problem := check_conversation(conversation, self.empty):
            raise UserError(f"{where}: {problem}")
        return conversation


def load_rows(hub_name, config, split, *shapes, name=None, also=()):
    """
    Rows of one split: the local copy first, then the hub.
    name  of the local folder (the hub's, without its owner); also: other places in NANOCHAT_DATA_DIR, without extension,
          where the authors' own file names put this split
    """
    name = name or hub_name.split("/")[-1]
    files, looked = local_files(name, config, split, also)
    if files:
        facts = digest(name, config, split, [(path.name, path.stat().st_size) for path in files])
        return Rows([read_file(path) for path in files], shapes, f"{name} {split} ({', '.join(map(str, files))})", facts)
    trouble = ""
    try:
        import datasets
        if trouble := hub_trouble():
            datasets.config.HF_HUB_OFFLINE = True # then it looks into its cache of what was fetched before, at once
        table = datasets.load_dataset(hub_name, config, split=split)
    except Exception as error: # the hub fails in many ways; each has the same two ways out
        raise UserError(f"no data for {name}, split {split}. Either put {looked}, or give this machine network access to the hub "
                        f"({hub_name}{f', {config}' if config else ''}): {trouble or f'{type(error).__name__}: {error}'}") from error
    return Rows([(len(table), lambda i: table[i], lambda i: f"{hub_name} {split}, row {i}")], shapes, f"{hub_name} {split}", digest(hub_name, config, split))


@cache
def hub_trouble():
    """
    Why the hub cannot be reached, "" if it can. Asked once in a process: its client tries each file six times, so that without a
    network every absent set took 24 seconds to say so.
    """
    from huggingface_hub import constants, get_session
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error: # of whichever library the client speaks HTTP with
        return f"no answer from {constants.ENDPOINT} ({type(error).__name__}: {error})"
    return ""


def local_files(name, config, split, also=()):
    """(files of this split, in order; a phrase that says where they should be)."""
    root = os.environ.get("NANOCHAT_DATA_DIR")
    if not root:
        return [], f"{name}/{split}.jsonl (or .parquet, .csv) into a folder and set NANOCHAT_DATA_DIR to that folder"
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"NANOCHAT_DATA_DIR: expected a folder of data sets, there is none at {folder}")
    stems = ([f"{name}/{config}/{split}"] if config else []) + [f"{name}/{split}", *also]
    for stem in stems:
        whole = [path for ext in EXTENSIONS if (path := folder / f"{stem}{ext}").is_file()]
        parts = sorted(path for ext in EXTENSIONS for path in folder.glob(f"{stem}-*{ext}"))
        if len(whole) + bool(parts) > 1:
            raise UserError(f"{folder}: expected one copy of {stem}, got {', '.join(path.name for path in whole + parts)}")
        if whole or parts:
            return whole or parts, ""
    return [], f"{stems[0]}.jsonl (or .parquet, .csv) into {folder}"


# ---------------------------------------------------------------------------------------------------------------------
# Files: each reader gives one part of Rows

def read_file(path):
    if path.suffix == ".parquet":
        return read_parquet(path)
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    return read_jsonl(path) if kind == "jsonl" else read_csv(path)


def read_text(path):
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected {'gzipped ' if path.suffix == '.gz' else ''}UTF-8 text, got {error}") from error


def read_jsonl(path):
    lines = [(n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    def where(i):
        return f"{path}, line {lines[i][0]}"
    def fetch(i):
        return parse_json(lines[i][1], where(i))
    return len(lines), fetch, where


def parse_json(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error: # broken, or nested a hundred thousand deep
        raise UserError(f"{where}: expected JSON, got {clip(text)} ({error})") from error


def read_csv(path):
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    lines = []  # (number, row)
    try:
        for row in reader:
            if row: # not a blank line
                lines.append((reader.line_num, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}. A field with a comma, a quote or a line end in it stands in quotes, a quote in it is doubled") from error
    header = lines[0][1] if lines else []
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: expected {len(header)} columns as in the first line, got {len(row)}")
    return len(lines[1:]), lambda i: dict(zip(header, lines[i + 1][1])), lambda i: f"{path}, line {lines[i + 1][0]}"


def read_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: expected a parquet file, got {error}") from error
    def where(i):
        return f"{path}, row {i}"
    def fetch(i):
        try:
            return table.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise UserError(f"{where(i)}: expected UTF-8 text, got {error}") from error
    return table.num_rows, fetch, where
