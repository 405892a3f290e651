"""
The commit record of a tree on disk: a small SQLite file that says what counts as written.
Columns are flushed first, the record is changed afterwards, in one transaction. So at any instant the record names only bytes
that are safely in their files; what a crash left behind them is ignored, and overwritten by the next append.

It holds one row of state (the header, the rows of each column, its own checksum) and one checksum per chunk of each column.
Opening reads the one row; a chunk's checksum is looked up when the chunk is read.
"""

import fcntl
import json
import os
import sqlite3
import zlib

from megacontext.column import TreeError

DAMAGED = (sqlite3.Error, UnicodeDecodeError)  # SQLite quotes what it could not read, and Python cannot decode the quotation

SCHEMA = """
begin;
create table state (id integer primary key check (id = 1), body text not null, crc integer not null);
create table chunks (file text, chunk integer, bytes integer not null, crc integer not null, primary key (file, chunk)) without rowid;
commit;
"""


class Record:
    """
    The record of the tree in `folder`. A writer holds a lock from here to close(); the system frees it however the process ends.
    state  {"header": {...}, "rows": {file: rows}, "high": {file: most rows ever committed}, "rewinds": number of}
    """

    def __init__(self, folder, writable, create=None):
        self.path, self.lock = folder / "tree.db", None
        if create is None and not self.path.exists():
            raise TreeError(f"no tree in {folder}: expected a file tree.db there, found none. Make one with MegaTree.create or scripts.mega_ingest")
        if writable:
            self.lock = _lock(folder)
        mode = "rwc" if create else "rw" if writable else "ro" if os.access(folder, os.W_OK) else "ro&immutable=1"  # read-only media have no writer
        name = str(self.path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        try:
            self.db = sqlite3.connect(f"file:{name}?mode={mode}", uri=True, isolation_level=None, timeout=30, check_same_thread=False)
            if writable:
                self.db.execute("pragma journal_mode = wal")
                self.db.execute("pragma synchronous = full")
            if create is not None:
                self.db.executescript(SCHEMA)
                self.write(create, {})
            self.seen = self._version()  # before the state: what is committed in between counts as news
            self.state = self._read()
        except DAMAGED as error:
            self.close()
            raise self._damaged(error)
        except TreeError:
            self.close()
            raise

    def refresh(self):
        """Read the state again: another process may have committed."""
        try:
            self.seen = self._version()  # before the state: what is committed in between counts as news
            self.state = self._read()
        except DAMAGED as error:
            raise self._damaged(error)

    def rewound(self):
        """Has the history been rewritten since the state was read? Cheap when nobody has committed."""
        try:
            version = self._version()
            if version != self.seen:
                if self._read()["rewinds"] != self.state["rewinds"]:
                    return True
                self.seen = version
            return False
        except DAMAGED as error:
            raise self._damaged(error)

    def checksum(self, file, chunk):
        """(bytes, crc32) of a committed chunk, or None."""
        try:
            return self.db.execute("select bytes, crc from chunks where file = ? and chunk = ?", (file, chunk)).fetchone()
        except DAMAGED as error:
            raise self._damaged(error)

    def write(self, state, changes):
        """
        One transaction: the new state and, per file, (cut, {chunk: (bytes, crc32)}): chunks from `cut` on are void, these are new.
        """
        body = json.dumps(state, sort_keys=True)
        try:
            self.db.execute("begin immediate")
            try:
                for file, (cut, chunks) in changes.items():
                    if cut is not None:
                        self.db.execute("delete from chunks where file = ? and chunk >= ?", (file, cut))
                    self.db.executemany("insert or replace into chunks values (?, ?, ?, ?)", [(file, chunk, *sums) for chunk, sums in chunks.items()])
                self.db.execute("insert or replace into state values (1, ?, ?)", (body, zlib.crc32(body.encode())))
                self.db.execute("commit")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("rollback")
                raise
        except sqlite3.OperationalError as error:
            raise TreeError(f"{self.path}: the commit failed ({error}). Everything committed before is intact: free some space and commit again") from error
        self.state = json.loads(body)

    def damage(self):
        """What SQLite finds wrong with its own file, or None."""
        try:
            found = self.db.execute("pragma integrity_check").fetchone()[0]
        except DAMAGED as error:
            return str(self._damaged(error))
        return None if found == "ok" else str(self._damaged(found))

    def close(self):
        if hasattr(self, "db"):
            self.db.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _version(self):
        return self.db.execute("pragma data_version").fetchone()[0]

    def _read(self):
        row = self.db.execute("select cast(body as blob), crc from state where id = 1").fetchone()
        if row is None:
            raise TreeError(f"{self.path} holds no state: the tree was never finished being made. Remove the folder and make it again")
        body, crc = row
        if body is None or zlib.crc32(body) != crc:
            raise self._damaged("its state does not match its checksum")
        return json.loads(body)

    def _damaged(self, what):
        return TreeError(f"{self.path} is damaged: expected an intact commit record, found: {what}. Restore the tree from a copy")


def _lock(folder):
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode().strip() or "unknown"
        os.close(fd)
        raise TreeError(f"{folder} is being written by process {owner}: expected no other writer. Stop it, or open the tree with mode=\"r\"") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
