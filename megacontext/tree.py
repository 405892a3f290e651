"""
The MegaContext tree: all of history, append-only, in memory or on disk.

level 0   token ids, int32
level l   one gist per 32 nodes of the level below: a vector of width D and LensNet's key of width K, for l >= 1

Levels appear by themselves as the history needs them. A gist may only be appended once its 32 children are there, so a
tree never holds a gist of tokens that it does not have; gists may lag behind the tokens (`pending` says which).
Rows come back as they went in, up to the rounding of the header's gist_dtype; token ids always exactly.

D = width of a gist row, K = width of a key row (0 = none)
"""

import shutil
from array import array
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from megacontext.column import CODECS, DISK_FULL, RESTORE, FileColumn, MemoryColumn, TreeError, decode, encode, row_bytes
from megacontext.record import LEFTOVERS, Record, flush_folder, tree_at
from megacontext.span import BLOCK

FORMAT = "megacontext-tree"
BROKEN_OFF = "a fork that was broken off"  # the format of one until all of it is there
VERSION = 1


def make_header(width, key_width, gist_dtype="bfloat16", **identity):
    """
    What a tree says of itself. `identity` names what its numbers mean, as strings or numbers: model=, tokenizer=, gistnet=,
    lensnet= fingerprints. A tree opened with another identity is refused.
    """
    if gist_dtype not in CODECS:
        raise TreeError(f"no gist_dtype {gist_dtype!r}: expected one of {', '.join(CODECS)}")
    if width < 1 or key_width < 0:
        raise TreeError(f"a tree needs width >= 1 and key_width >= 0, got {width} and {key_width}")
    return {"format": FORMAT, "version": VERSION, "block": BLOCK, "width": width, "key_width": key_width, "gist_dtype": gist_dtype, **identity}


class MegaTree:
    """Make one with create, open or in_memory. One thread at a time; one writer per tree, any number of readers."""

    def __init__(self, header, folder=None, record=None, writable=True, gists=True):
        self.header, self.folder, self.record, self.writable = dict(header), folder, record, writable
        self.columns = {}  # (level, "ids" | "gists" | "keys") -> column
        for name in record.state["rows"] if record else ["level0.ids"]:
            level, kind = _parse(name)
            keep = gists or level == 0
            column = self._column(level, kind, check=keep)
            if not keep:
                column.truncate(0)

    @classmethod
    def in_memory(cls, header):
        """A tree that lives and dies with the process."""
        return cls(header)

    @staticmethod
    def exists(path):
        """Whether there is a tree in the folder `path`, whole or damaged. What a creation leaves that was broken off is none."""
        return tree_at(Path(path))

    @classmethod
    def create(cls, path, header):
        """A new, empty tree in the folder `path`, open for writing. One that was broken off is made again."""
        folder = Path(path)
        if tree_at(folder):
            raise TreeError(f"cannot make a tree in {folder}: expected an empty or new folder, found a tree. Open it, or name another")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [file.name for file in folder.iterdir() if file.name not in LEFTOVERS]
            if found:
                raise TreeError(f"cannot make a tree in {folder}: expected an empty or new folder, found {len(found)} files. Name another")
            (folder / "level0.ids").touch()  # before the record that names it
            flush_folder(folder.parent)
            record = Record(folder, True, create={"header": header, "rows": {"level0.ids": 0}, "high": {}, "rewinds": 0})
        except OSError as error:
            raise _cannot("make", folder, error) from None
        return cls(header, folder, record)

    @classmethod
    def open(cls, path, mode="a", gists=True, **identity):
        """
        The tree in the folder `path` as it was last committed. mode "a" goes on writing, "r" only reads.
        gists     False: nobody looks at its gists, which may be damaged or gone, and the first commit forgets them all. For reset_gists
        identity  what the tree must have been made with (model=..., tokenizer=..., gistnet=...), else it is refused
        """
        if mode not in ("a", "r"):
            raise ValueError(f"mode is \"a\" (append) or \"r\" (read), got {mode!r}")
        assert gists or mode == "a", "only a writer forgets gists"
        folder = Path(path)
        try:
            record = Record(folder, mode == "a")
        except OSError as error:
            raise _cannot("open", folder, error) from None
        try:
            header = record.state["header"]
            for name, expected in {"format": FORMAT, "version": VERSION, "block": BLOCK, **identity}.items():
                if header.get(name) != expected:
                    raise TreeError(f"{folder} is of another {name}: expected {expected}, found {header.get(name)}. "
                                    f"Use what it was made with, or ingest its text again into a new tree")
            tree = cls(header, folder, record, mode == "a", gists)
            if gists:
                tree._check_counts()
        except BaseException:
            record.close()
            raise
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

    @property
    def whole(self):
        """Whether every node whose 32 children are all here has its gist: not so while the gists are written again."""
        return all(self.count(level) == self.pending(level)[1] for level in range(1, self.levels + 1))

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

    def gists_of(self, spans):
        """(n, D) float32: a gist per span, of any levels, at one read per level. A block gives the gist of its tokens."""
        return self._of(spans, "gists")

    def keys_of(self, spans):
        """(n, K) float32: a LensNet key per span, as gists_of."""
        return self._of(spans, "keys")

    # ------------------------------------------------------------------------------------------------------------------
    # Growth

    def append_tokens(self, ids):
        """Add token ids, a list or a 1-D array, at the end of the history."""
        self._check_writable()
        self._column(0, "ids").append(_id_bytes(ids))

    def append_gists(self, level, gists, keys=None):
        """Add the next gists of a level: (n, D), with their LensNet keys (n, K) if the tree holds keys."""
        gists = np.asarray(gists, np.float32)
        keys = np.zeros((len(gists), 0), np.float32) if keys is None else np.asarray(keys, np.float32)
        D, K = self.header["width"], self.header["key_width"]
        assert gists.ndim == 2 and gists.shape[1] == D, f"expected gists of shape (n, {D}), got {gists.shape}"
        assert keys.shape == (len(gists), K), f"expected keys of shape ({len(gists)}, {K}), got {keys.shape}"
        a, b = self.pending(level)
        assert a + len(gists) <= b, f"level {level} has {a} gists and children for {b}: {len(gists)} more would come before their children"
        self._check_writable()
        rows = {kind: encode(x, self.header["gist_dtype"]).tobytes() for kind, x in (("keys", keys), ("gists", gists)) if x.shape[1]}
        columns = {kind: self._column(level, kind) for kind in rows}  # made before anything is in them
        with self._all_or_none():
            for kind, data in rows.items():
                columns[kind].append(data)

    def commit(self):
        """Make everything appended so far durable, all of it or, if the power fails first, none of it."""
        if self.record is None:
            return
        self._check_writable()
        for column in self.columns.values():
            column.write()
        for column in self.columns.values():
            column.flush()
        if any(column.is_new for column in self.columns.values()):
            flush_folder(self.folder)
        named = {f"level{level}.{kind}": column for (level, kind), column in self.columns.items()}
        rows = {name: column.rows for name, column in named.items()}
        high = {name: max(n, self.record.state["high"].get(name, 0)) for name, n in rows.items()}
        rewinds = self.record.state["rewinds"] + any(column.end.cut is not None for column in named.values())
        changes = {name: column.changes() for name, column in named.items()}
        self.record.write({"header": self.header, "rows": rows, "high": high, "rewinds": rewinds}, {name: new for name, new in changes.items() if new})
        for column in named.values():
            column.committed()

    def truncate(self, tokens):
        """
        Rewind: forget everything after the first `tokens` tokens, and the gists that stand for any of it. Commits, since the
        next append overwrites what was cut. Readers of the longer history must refresh().
        """
        if not 0 <= tokens <= self.length:
            raise TreeError(f"cannot rewind to {tokens} tokens: the tree has {self.length}")
        self._check_writable()
        with self._all_or_none():
            for (level, _), column in self.columns.items():
                column.truncate(min(column.rows, tokens // BLOCK ** level))
        self.commit()

    def reset_gists(self, **changes):
        """
        Forget all gists and keys but keep the tokens, and change the header: the identity (model=...), and if need be the width or
        gist_dtype. To be ingested again (megacontext/ingest.py). Commits; who reads the old gists is told to open the tree again.
        """
        self._check_writable()
        self.header.update(changes)
        for (level, kind), column in self.columns.items():
            if level:
                column.truncate(0)
                before, name = column.row, f"level{level}.{kind}"
                column.resize(self._row(kind))
                if self.record:  # what readers of the old rows were promised, in new ones: trim() keeps that much of the file
                    self.record.state["high"][name] = -(-self.record.state["high"].get(name, 0) * before // column.row)
        self.commit()

    def fork(self, path=None, tokens=None):
        """
        A copy of the first `tokens` tokens (default: all) and their gists in a new folder, or in memory. The two then go their own ways. One that fails
        leaves nothing there, and one that is killed no tree that opens.
        """
        tokens = self.length if tokens is None else tokens
        if not 0 <= tokens <= self.length:
            raise TreeError(f"cannot fork at {tokens} tokens: the tree has {self.length}")
        copy = MegaTree.in_memory(self.header) if path is None else MegaTree.create(path, self.header | {"format": BROKEN_OFF})
        try:
            for (level, kind), column in self.columns.items():
                rows, step = min(column.rows, tokens // BLOCK ** level), max(1, 2 ** 20 // column.row)
                for a in range(0, rows, step):
                    copy._column(level, kind).append(column.read(a, min(a + step, rows)).tobytes())
            copy.header = dict(self.header)
            copy.commit()
        except BaseException:
            copy.close(commit=False)
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)  # it was new or empty
            raise
        return copy

    # ------------------------------------------------------------------------------------------------------------------
    # On disk

    def refresh(self):
        """A reader sees what has been committed since it opened."""
        assert not self.writable, "the writer knows best: only a reader refreshes"
        before = self.record.seen, self.record.state
        self.record.refresh()
        if self.record.state["header"] != self.header:
            found = self.record.state["header"]
            self.record.seen, self.record.state = before  # so that the next read is refused too
            raise TreeError(f"the gists of {self.folder} are being written again since it was opened: expected {self.header}, found {found}. Open it again")
        for column in self.columns.values():
            column.close()
        self.columns = {}
        for name in self.record.state["rows"]:
            self._column(*_parse(name))
        self._check_counts()

    def damage(self):
        """{file: what is wrong with it}: every committed byte is checked against its checksum, and the record against itself."""
        columns = {name: self._column(*_parse(name)).damage(n) for name, n in self.record.state["rows"].items()}
        return {name: wrong for name, wrong in ({"tree.db": self.record.damage()} | columns | self._miscounts()).items() if wrong}

    def verify(self):
        """Check every committed byte against its checksum; TreeError says all that is wrong. Returns the number of bytes checked."""
        if self.record is None:
            return 0
        wrong = self.damage()
        if wrong:
            raise TreeError("\n".join(wrong.values()))
        return sum(n * self._column(*_parse(name)).row for name, n in self.record.state["rows"].items())

    def sizes(self):
        """{what: bytes in use}: "ids", "level 1" and so on (gists and keys), and "record" for the files of a tree on disk that say what is committed."""
        sizes = {}
        for (level, _), column in sorted(self.columns.items()):
            name = f"level {level}" if level else "ids"
            sizes[name] = sizes.get(name, 0) + column.rows * column.row
        if self.record:
            sizes["record"] = sum(path.stat().st_size for path in (self.folder / "tree.db", self.folder / "tree.db-journal", self.folder / "commits") if path.exists())
        return sizes

    def close(self, commit=True):
        """Commit (unless told not to) and let go of the files and the lock, of these also if the commit fails."""
        if self.record is None:
            return
        try:
            if self.writable and commit:
                self.commit()
            if self.writable:
                for (level, kind), column in self.columns.items():
                    column.trim(self.record.state["high"].get(f"level{level}.{kind}", 0))
        finally:  # a full disk keeps nothing open
            for column in self.columns.values():
                column.close()
            self.record.close()
            self.columns = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(commit=kind is None)

    # ------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _all_or_none(self):
        """What fails in here, at a full disk, a damaged chunk or an interrupt, leaves every column as it was: none may get ahead of the others."""
        ends = [(column, column.end) for column in self.columns.values()]
        try:
            yield
        except BaseException:
            for column, end in ends:
                column.end = end
            raise

    def _of(self, spans, kind):
        width = self.header["width" if kind == "gists" else "key_width"]
        levels = np.array([span.level or 1 for span in spans], np.int64)
        indices = np.array([span.index for span in spans], np.int64)
        found = np.empty((len(spans), width), np.float32)
        for level in set(levels.tolist()):
            here = levels == level
            if indices[here].max() >= self.count(level):
                raise TreeError(f"asked for node {indices[here].max()} of level {level}, which has {self.count(level)}: a gist stands for finished blocks only")
            found[here] = decode(self._column(level, kind).take(indices[here]), self.header["gist_dtype"])
        self._check_not_rewound()
        return found

    def _column(self, level, kind, check=True):
        if (level, kind) not in self.columns:
            row = self._row(kind)
            name = f"level{level}.{kind}"
            if self.record is None:
                self.columns[level, kind] = MemoryColumn(row)
            else:
                rows = self.record.state["rows"].get(name, 0)
                self.columns[level, kind] = FileColumn(self.folder / name, row, rows, partial(self.record.checksum, name), self.writable, self._remedy(level), check)
        return self.columns[level, kind]

    def _row(self, kind):
        return 4 if kind == "ids" else row_bytes(self.header["width" if kind == "gists" else "key_width"], self.header["gist_dtype"])

    def _check_writable(self):
        if not self.writable:
            raise TreeError(f"{self.folder} is open for reading: expected mode=\"a\" to change it, it was opened with mode=\"r\"")

    def _remedy(self, level):
        """What to do about a damaged file of a level."""
        again = f"Make all gists anew from the tokens, with the --stage and --tag of their model: python -m scripts.mega_ingest --tree {self.folder.parent} --renew"
        return again if level else RESTORE

    def _check_counts(self):
        wrong = self._miscounts()
        if wrong:
            raise TreeError("\n".join(wrong.values()))

    def _miscounts(self):
        """{file: what is wrong with its number of rows}: the record's own numbers must make a tree."""
        rows, wrong = self.record.state["rows"], {}
        for level in range(1, 1 + max(_parse(name)[0] for name in rows)):
            below, here, keys = (rows.get(name, 0) for name in (f"level{level - 1}.{'gists' if level > 1 else 'ids'}", f"level{level}.gists", f"level{level}.keys"))
            if here > below // BLOCK:
                wrong[f"level{level}.gists"] = f"{self.folder}: expected at most {below // BLOCK} gists at level {level}, found {here}. {self._remedy(level)}"
            if self.header["key_width"] and keys != here:
                wrong[f"level{level}.keys"] = f"{self.folder}: expected {here} keys at level {level}, found {keys}. {self._remedy(level)}"
        return wrong

    def _read(self, level, kind, a, b):
        here = self.count(level)
        if not 0 <= a <= b <= here:
            raise TreeError(f"asked for nodes {a}..{b} of level {level}, which has {here} (the tree has levels 0..{self.levels - 1})")
        rows = self._column(level, kind).read(a, b) if a < b else np.empty((0, self._row(kind)), np.uint8)
        self._check_not_rewound()
        return rows

    def _check_not_rewound(self):
        """After a read: a writer commits a rewind before it overwrites anything, so what was read before this says yes is sound."""
        if not self.writable and self.record.rewound():
            raise TreeError(f"{self.folder} was rewound by its writer since it was opened: refresh() and read again")


def _id_bytes(ids):
    """int32 bytes. A list stays out of numpy: for a single id its handful of calls took longer than all else that is done about a token."""
    if isinstance(ids, list):
        least, most = (min(ids), max(ids)) if ids else (0, 0)
    else:
        ids = np.asarray(ids)
        assert ids.ndim == 1 and (ids.size == 0 or ids.dtype.kind in "iu"), f"expected a row of token ids, got {ids.dtype} {ids.shape}"
        least, most = (ids.min(), ids.max()) if ids.size else (0, 0)
    if not 0 <= least <= most < 2 ** 31:
        raise ValueError(f"token ids must be in 0..2**31 - 1, got {least}..{most}")
    return array("i", ids).tobytes() if isinstance(ids, list) else ids.astype(np.int32).tobytes()


def _parse(name):
    level, kind = name.removeprefix("level").split(".")
    return int(level), kind


def _cannot(what, folder, error):
    """The error to raise where the system said no to a tree as a whole."""
    if error.errno in DISK_FULL:
        return TreeError(f"cannot {what} a tree in {folder}: the disk is full ({error.strerror}). Free some space, or name a folder on another disk, and do it again")
    return TreeError(f"cannot {what} a tree in {folder} ({error.strerror}): expected a folder that may be written to. Name another, or change who may")
