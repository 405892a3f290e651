"""
A code base as one text, and the way back from its tokens to files and lines. For scripts that show a memory what it has read.

In:  a folder of Python files, or nothing for Python's own library
Out: CodeBase: .text, and for a token of a history that holds it "file.py:12" and the text of that line
"""

import sysconfig
from bisect import bisect_right
from math import inf
from pathlib import Path

import numpy as np

from megacontext.span import BLOCK
from nanochat.common import UserError
from nanochat.dataset import is_text, open_source


def python_files(folder):
    """[(name, path)] of the Python files below a folder that hold UTF-8 text, by name."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder at {folder}: expected one with Python files, or leave --code out for Python's own library")
    paths = sorted(path for path in root.rglob("*.py") if not any(part.startswith(".") for part in path.relative_to(root).parts))
    files = [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file() and is_text(path)]
    if not files:
        raise UserError(f"no Python files below {folder}: questions are read off their definitions, name a folder with .py files")
    return files


def library_files(rng):
    """[(name, path)] of Python's own library in a drawn order, the files that training keeps for validation before all others."""
    root, files = Path(sysconfig.get_paths()["stdlib"]), []
    for split in ("val", "train"):
        files += shuffled([(file.path.relative_to(root).as_posix(), file.path) for file in open_source("stdlib", split).files], rng)
    return files


def shuffled(items, rng):
    return rng.sample(items, len(items))


def take_files(folder, tokens, rng, measure):
    """
    Files in a drawn order until they have `tokens` tokens together, or all there are. A file of more than a quarter of that is passed over.
    folder None = Python's own library. measure: text -> tokens. Returns [(name, text)] by name, and how many files were passed over.
    """
    files = library_files(rng) if folder is None else shuffled(python_files(folder), rng)
    taken, have, large = [], 0, 0
    for name, path in files:
        if have >= tokens:
            break
        text = path.read_bytes().decode()
        size = measure(text)
        if size > tokens / 4: # tables of data are no code base
            large += 1
        else:
            taken.append((name, text))
            have += size
    if not taken:
        raise UserError(f"each of {large} files has more than a quarter of --tokens {tokens}: expected smaller ones, raise --tokens")
    return sorted(taken), large


class CodeBase:
    """Files as one text, and the way back: from a byte of the text, or a token of a history that holds it, to a file and a line."""

    def __init__(self, files):
        """files: list of (name, text)."""
        self.files, self.heads = files, [f"# {name}\n" for name, _ in files]
        parts = [f"{head}{text}\n".encode() for head, (_, text) in zip(self.heads, files)]
        self.text = b"".join(parts)
        self.file_at = np.cumsum([0] + [len(part) for part in parts]).tolist()          # where each file begins
        self.lines = self.text.split(b"\n")
        self.line_at = np.cumsum([0] + [len(line) + 1 for line in self.lines]).tolist() # where each line begins
        self.token_at = np.zeros(0, np.int64)                                          # where each token begins, see lay()

    def byte(self, file, at):
        """The byte where character `at` of a file's text stands."""
        return self.file_at[file] + len((self.heads[file] + self.files[file][1][:at]).encode())

    def line(self, byte):
        """(file name, line number from 1, text) of the first line with ink at or after a byte."""
        n = bisect_right(self.line_at, byte) - 1
        while not self.lines[n].strip() and n + 2 < len(self.lines):
            n += 1
        file = bisect_right(self.file_at, self.line_at[n]) - 1
        return self.files[file][0], n - bisect_right(self.line_at, self.file_at[file]) + 1, self.lines[n].decode().strip()

    def lay(self, tokenizer, ids):
        """Find the text in a history of token ids; from now on tokens have a place."""
        sizes = np.array([len(tokenizer.decode_bytes([i])) for i in ids])
        self.token_at = np.cumsum(sizes) - sizes - tokenizer.decode_bytes(ids).index(self.text)

    def blocks(self, first, last):
        """The blocks that hold bytes first..last of the text, as a range."""
        a, b = np.searchsorted(self.token_at, [first, last], side="right") - 1
        return range(int(a) // BLOCK, int(b) // BLOCK + 1)

    def place(self, token):
        """("file.py:12", text of the line) for a token; ("conversation", "") for one outside the code base."""
        byte = self.token_at[token] if token < len(self.token_at) else inf
        if byte >= len(self.text):
            return "conversation", ""
        name, number, text = self.line(max(int(byte), 0))
        name = name if len(name) <= 27 else "..." + name[-24:]
        return f"{name}:{number}" if number else name, text # the line before a file's first is its name
