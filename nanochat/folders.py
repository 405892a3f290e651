"""
A folder of one's own text: which of its files are text, and which of those are kept for validation.

In:  a folder
Out: the names and sizes of its text files, lines about what was left out, and the names of each split
The ideas: links are followed, and what is left out is told. A file's name decides its split and its place in the order, so
both are the same on every machine, and a new file moves no others.
"""

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.documents import TABLES, open_bytes, suffix

SPLITS = ("train", "val")
VAL_SHARE = 0.05
USUAL = 0.01, 0.2  # share of validation in all bytes; outside of it something is said
SUFFIXES = (".txt", ".md", ".py") + TABLES
PACKED = (".gz", ".bz2", ".xz", ".zst")
PROBE = 8192  # bytes at either end of a file that its fingerprint looks at


@dataclass
class Folder:
    """
    root    where it is
    sizes   {name below root: bytes} of the text files, sorted
    notes   lines about what is there and was left out
    shards  whether these are shards, of which the last is for validation
    """
    root: Path
    sizes: dict
    notes: list = field(default_factory=list)
    shards: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# What is in a folder

def walk(root):
    """
    ({name: bytes} of every file below a folder but the hidden ones, links that lead nowhere, folders that cannot be read).
    A folder is read once, under its own name rather than a link's, so links that lead in a circle come to an end.
    """
    files, broken, closed, seen = {}, [], [], set()
    folders, links = [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            stat = os.stat(root / folder)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            closed.append(folder or ".")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(name)
                elif entry.is_file():
                    files[name] = entry.stat().st_size
                elif entry.is_symlink():
                    broken.append(name)
            except OSError: # a link to itself
                broken.append(name)
    return files, broken, closed


def find_text(root):
    """The Folder at a path. Where there are shard_*.parquet, nothing else in it is text."""
    files, broken, closed = walk(root)
    shards = [name for name in files if re.fullmatch(r"shard_[^/]*\.parquet", name)]
    text = set(shards or (name for name in files if suffix(name) in SUFFIXES))
    empty = {name for name in text if files[name] == 0 and suffix(name) != ".parquet"} # an empty parquet file is a broken one
    others = Counter(kind(name) for name in files.keys() - text)
    notes = []
    if others:
        order = sorted(others, key=lambda name: (-others[name], name))
        kinds = ", ".join(f"{name} {others[name]}" for name in order[:8]) + ", ..." * (len(order) > 8)
        notes.append(f"left out: {many(others.total(), 'file')} {'beside the shards' if shards else 'of other kinds'} ({kinds})")
    for names, what in ((empty, "empty file"), (broken, "dead link"), (closed, "unreadable folder")):
        if names:
            notes.append(f"left out: {many(len(names), what)} ({some(names)})")
    return Folder(root, {name: files[name] for name in sorted(text - empty)}, notes, bool(shards))


def many(count, what):
    return f"{count:,} {what}{'s' * (count != 1)}"


def kind(name):
    """A file's suffix, both of them where it is packed (.jsonl.gz)."""
    suffixes = Path(name.lower()).suffixes
    return "".join(suffixes[-2 if suffix(name) in PACKED else -1:]) or "no suffix"


def some(names, most=3):
    """A few names, for people: bytes that are not UTF-8 show as U+FFFD."""
    names = sorted(names)
    shown = ", ".join(os.fsencode(name).decode(errors="replace") for name in names[:most])
    return shown + ", ..." * (len(names) > most)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and fingerprints

def name_hash(name):
    """A file's name as a number in [0, 1): decides its split and its place in the order."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big") / 2**64


def split_names(names, split):
    """
    Names of one split, in the order of their hashes (a shuffle that is the same everywhere).
    val is every name that hashes below VAL_SHARE; with few names at least one, and train keeps at least one.
    """
    assert len(names) >= 2, "one file is split inside"
    order = sorted(names, key=name_hash)
    val = sum(name_hash(name) < VAL_SHARE for name in order)
    val = min(max(val, 1), len(order) - 1)
    return order[:val] if split == "val" else order[val:]


def split_folder(folder, split):
    """Names of one split of a Folder: of shards the last is val, of other files those that split_names chooses."""
    names = list(folder.sizes)
    if folder.shards:
        return names[-1:] if split == "val" else names[:-1]
    return split_names(names, split)


def split_notes(folder):
    """A line where validation is far from its usual share: two files are split as one and one, however large they are."""
    if folder.shards:
        return []
    val, total = sum(folder.sizes[name] for name in split_folder(folder, "val")), sum(folder.sizes.values())
    low, high = USUAL
    if low * total <= val <= high * total:
        return []
    return [f"validation is {val:,} of {total:,} bytes, {val / total:.1%} where some 5% are usual: files are kept whole, and their names "
            f"choose. With more files, or all text in one, it comes closer"]


def fingerprint(split, root, names):
    """
    Of the named files, in hex: changes when one is added, taken out, renamed or edited, but not when the folder is moved or copied. Of
    a file it sees the size and PROBE bytes at either end: an edit of the middle alone that keeps the size goes unnoticed.
    """
    digest = hashlib.sha256(split.encode())
    for name in names:
        with open_bytes(root / name) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            ends = file.read(PROBE)
            file.seek(max(PROBE, size - PROBE))
            ends += file.read(PROBE)
        digest.update(f"\n{name}:{size}:".encode(errors="surrogateescape") + hashlib.sha256(ends).digest())
    return digest.hexdigest()[:16]
