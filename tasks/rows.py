"""
Rows of a public data set, from a local folder or from the hub.

In:  the hub's name of the set, its configuration, a split; NANOCHAT_DATA_DIR may name a folder of local copies.
Out: Rows: `len(rows)` and `rows[i]` -> dict. Rows are parsed when they are asked for, so a large set opens at once.

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
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from nanochat.common import UserError
from tasks.common import clip

EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


class Rows:
    """
    One list out of several parts. A part is (len, fetch(i) -> dict, where(i) -> text); `fields` must be in every row.
    """

    def __init__(self, parts, fields=()):
        self.parts, self.fields = parts, fields
        self.ends = list(accumulate(part[0] for part in parts))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        assert 0 <= i < len(self), f"row {i} of {len(self)}"
        part = bisect_right(self.ends, i)
        _, fetch, where = self.parts[part]
        i -= self.ends[part - 1] if part else 0
        row = fetch(i)
        missing = [field for field in self.fields if field not in row] if isinstance(row, dict) else None
        if missing is None or missing:
            got = f"only {', '.join(map(str, row))}" if isinstance(row, dict) else clip(row)
            raise UserError(f"{where(i)}: expected the fields {', '.join(self.fields)}, got {got}")
        return row


def load_rows(hub_name, config, split, name=None, fields=(), also=()):
    """
    Rows of one split: the local copy first, then the hub.
    name  of the local folder (the hub's, without its owner); also: other places in NANOCHAT_DATA_DIR, without extension,
          where the authors' own file names put this split
    """
    name = name or hub_name.split("/")[-1]
    files, looked = local_files(name, config, split, also)
    if files:
        return Rows([read_file(path) for path in files], fields)
    try:
        import datasets
        table = datasets.load_dataset(hub_name, config, split=split)
    except Exception as error: # the hub fails in many ways; each has the same two ways out
        raise UserError(f"no data for {name}, split {split}. Either put {looked}, or give this machine network access to the "
                        f"hub ({hub_name}{f', {config}' if config else ''}): {type(error).__name__}: {error}") from error
    return Rows([(len(table), lambda i: table[i], lambda i: f"{hub_name} {split}, row {i}")], fields)


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
    except (OSError, EOFError, UnicodeDecodeError) as error:
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
        raise UserError(f"{where}: expected one JSON object, got {clip(text)} ({error})") from error


def read_csv(path):
    rows = list(csv.DictReader(io.StringIO(read_text(path)), strict=True))
    return len(rows), lambda i: rows[i], lambda i: f"{path}, row {i}"


def read_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: expected a parquet file, got {error}") from error
    return table.num_rows, lambda i: table.slice(i, 1).to_pylist()[0], lambda i: f"{path}, row {i}"


def listed(value, where):
    """A field that holds a list or an object, as it came or (from a csv) written as JSON."""
    return parse_json(value, where) if isinstance(value, str) else value
