"""
The commit record of a tree on disk: a small SQLite file that says what counts as written.
Columns are flushed first, the record is changed afterwards, in one transaction. So at any instant the record names only bytes
that are safely in their files; what a crash left behind them is ignored, and overwritten by the next append.

It holds one row of state (the header, the rows of each column, its own checksum) and one checksum per chunk of each column.
Opening reads the one row; a chunk's checksum is looked up when the chunk is read.

SQLite keeps a rollback journal: what a commit replaces is there until the commit is done, and what is committed is in tree.db alone, under its
checksum. That takes some 20 ms a commit longer than a write-ahead log, where a flipped bit is the end of the log and takes the commits behind it
along without a word. The file `commits` counts them, written after each: a record that is older than it says is refused.
"""

import json
import os
import sqlite3
import sys
import zlib

from megacontext.column import TreeError, full

try:
    import fcntl
except ModuleNotFoundError:  # Windows: a tree is in memory there
    fcntl = None

DAMAGED = (sqlite3.Error, UnicodeDecodeError)  # SQLite quotes what it could not read, and Python cannot decode the quotation

LEFTOVERS = ("lock", "commits", "level0.ids", "tree.db.new", "tree.db.new-journal")  # what a creation may leave that was broken off

SCHEMA = """
begin;
create table state (id integer primary key check (id = 1), body text not null, crc integer not null);
create table chunks (file text, chunk integer, bytes integer not null, crc integer not null, primary key (file, chunk)) without rowid;
commit;
"""
PUT_STATE = "insert or replace into state values (1, ?, ?)"


class Record:
    """
    The record of the tree in `folder`. A writer holds a lock from here to close(); the system frees it however the process ends.
    state  {"header": {...}, "rows": {file: rows}, "high": {file: most rows ever committed}, "rewinds": number of, "commits": number of}
    """

    def __init__(self, folder, writable, create=None):
        self.path, self.lock, self.db = folder / "tree.db", None, None
        if create is None and not tree_at(folder):
            raise TreeError(f"no tree in {folder}: expected a file tree.db there, found none. Make one with MegaTree.create or scripts.mega_ingest")
        try:
            if writable:
                self.lock = _lock(folder)
            if create is not None:
                _make(folder, create)
            name = str(self.path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
            self.db = sqlite3.connect(f"file:{name}?mode=rw", uri=True, isolation_level=None, timeout=30, check_same_thread=False)  # reads only where it may not write
            if writable:
                self.db.execute("pragma journal_mode = truncate")  # flushed at full, where a power failure may bring a deleted journal back, and undo the commit
                self.db.execute("pragma synchronous = full")
            else:
                self.db.execute("pragma query_only = on")
            self.seen = self._version()  # before the state: what is committed in between counts as news
            self.state = self._read()
        except DAMAGED as error:
            self.close()
            raise self._told(error)
        except BaseException:
            self.close()
            raise

    def refresh(self):
        """Read the state again: another process may have committed."""
        try:
            self.seen = self._version()  # before the state: what is committed in between counts as news
            self.state = self._read()
        except DAMAGED as error:
            raise self._told(error)

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
            raise self._told(error)

    def checksum(self, file, chunk):
        """(bytes, crc32) of a committed chunk, or None."""
        try:
            return self.db.execute("select bytes, crc from chunks where file = ? and chunk = ?", (file, chunk)).fetchone()
        except DAMAGED as error:
            raise self._told(error)

    def write(self, state, changes):
        """
        One transaction: the new state (but "commits", counted here) and, per file, (cut, {chunk: (bytes, crc32)}): chunks from `cut` on are void,
        these are new.
        """
        if "commits" not in self.state:  # made before commits were counted
            _count(self.path.parent, 0, flush=True)
        state = state | {"commits": self.state.get("commits", 0) + 1}
        try:
            try:  # around the begin too: an interrupt just after it must not leave the transaction open
                self.db.execute("begin immediate")
                for file, (cut, chunks) in changes.items():
                    if cut is not None:
                        self.db.execute("delete from chunks where file = ? and chunk >= ?", (file, cut))
                    self.db.executemany("insert or replace into chunks values (?, ?, ?, ?)", [(file, chunk, *sums) for chunk, sums in chunks.items()])
                self.db.execute(PUT_STATE, _checked(state))
                self.db.execute("commit")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("rollback")
                raise
        except sqlite3.OperationalError as error:
            todo = "let those who read it finish" if _busy(error) else "free some space"
            raise TreeError(f"{self.path}: the commit failed ({error}). Everything committed before is intact: {todo} and commit again") from error
        self.state = json.loads(json.dumps(state))
        try:
            _count(self.path.parent, state["commits"])
        except OSError as error:
            raise full(self.path.with_name("commits"), len(_count_line(0)), error)

    def damage(self):
        """What is wrong with the record as it is now on disk, or None."""
        try:
            self._read()
            found = self.db.execute("pragma integrity_check").fetchone()[0]
        except DAMAGED as error:
            return str(self._told(error))
        except TreeError as error:
            return str(error)
        return None if found == "ok" else str(self._damaged(found))

    def close(self):
        if self.db is not None:
            self.db.close()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _version(self):
        return self.db.execute("pragma data_version").fetchone()[0]

    def _read(self):
        counted = self._counted()  # before the state: a commit in between is no loss
        row = self.db.execute("select cast(body as blob), crc from state where id = 1").fetchone()
        if row is None:
            raise self._damaged("no state")
        body, crc = row
        if body is None or zlib.crc32(body) != crc:
            raise self._damaged("its state does not match its checksum")
        state = json.loads(body)
        if "commits" in state:  # else it was made before they were counted
            if counted is None:
                raise TreeError(f"{self.path.parent} is damaged: expected its number of commits in the file commits, found none that is whole. Restore the tree from a copy")
            if state["commits"] < counted:
                raise TreeError(f"{self.path} is not the newest: expected commit {counted} or a later one, found {state['commits']}. Restore the whole tree from a copy")
        return state

    def _counted(self):
        """How many commits the file of their number knows of, None if it is damaged or not there."""
        try:
            data = (self.path.parent / "commits").read_bytes()
        except FileNotFoundError:
            return None
        number = data.split(b" ")[0]
        return int(number) if number.isdigit() and data == _count_line(int(number)) else None

    def _told(self, error):
        """The error to raise for one of SQLite's: others that hold the record, or a commit that we may not roll back, are no damage."""
        if _busy(error):
            return TreeError(f"{self.path} is held by another process for more than 30 s ({error}): expected it to read or commit and let go. End it, if it hangs")
        journal = self.path.with_name("tree.db-journal")
        undoing = (self.path, journal, self.path.parent)  # what has to be written for it
        if isinstance(error, sqlite3.OperationalError) and journal.exists() and journal.stat().st_size and not all(os.access(path, os.W_OK) for path in undoing):
            return TreeError(f"the writer of {self.path} was killed in the middle of a commit, and to undo that takes permission to write {', '.join(path.name for path in undoing)} ({error}). "
                             f"Open the tree once with it, or read a copy of the folder")
        return self._damaged(error)

    def _damaged(self, what):
        return TreeError(f"{self.path} is damaged: expected an intact commit record, found: {what}. Restore the tree from a copy")


def tree_at(folder):
    """
    Whether a tree was made in a folder. What a creation leaves that was broken off is none; a tree that has lost its record is refused, and so is
    every folder where the system has no flock.
    """
    if fcntl is None:  # nor pread, nor folders that can be flushed
        raise TreeError(f"no tree on disk here: expected a system with flock (Linux, macOS), found {sys.platform}. Keep the tree in memory, or use Linux, for instance in WSL")
    if (folder / "tree.db").exists():
        return True
    tokens = folder / "level0.ids"
    if tokens.exists() and tokens.stat().st_size:
        raise TreeError(f"{folder} is damaged: expected the commit record tree.db beside {tokens.stat().st_size} bytes of level0.ids, found none. Restore the tree from a copy")
    return False


def flush_folder(folder):
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _make(folder, state):
    """A record of this state and no chunks. It gets its name when it is done: a creation that is broken off leaves no tree."""
    if tree_at(folder):
        raise TreeError(f"cannot make a tree in {folder}: expected none there, found one that another process has made meanwhile. Open it")
    new = folder / "tree.db.new"
    new.unlink(missing_ok=True)
    new.with_name("tree.db.new-journal").unlink(missing_ok=True)
    _count(folder, 0, flush=True)
    try:
        db = sqlite3.connect(new, isolation_level=None)
        try:
            db.executescript(SCHEMA)
            db.execute(PUT_STATE, _checked(state | {"commits": 0}))
        finally:
            db.close()
    except sqlite3.Error as error:
        raise TreeError(f"{folder}: no tree could be made ({error}). Free some space, or name a folder on another disk, and make it again") from None
    new.rename(folder / "tree.db")
    flush_folder(folder)


def _checked(state):
    """(body, crc32): a state as its row has it."""
    body = json.dumps(state, sort_keys=True)
    return body, zlib.crc32(body.encode())


def _count(folder, commits, flush=False):
    """Write the number of commits, in place. Not flushed after a commit: one that a power failure sets back still says what was committed before it."""
    fd = os.open(folder / "commits", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, _count_line(commits), 0)
        if flush:
            os.fsync(fd)
    finally:
        os.close(fd)


def _count_line(commits):
    return b"%020d %08x\n" % (commits, zlib.crc32(b"%d" % commits))


def _busy(error):
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _lock(folder):
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode().strip() or "unknown"
        os.close(fd)
        raise TreeError(f"{folder} is being written by process {owner}: expected no other writer. Stop it, or open the tree with mode=\"r\"") from None
    except OSError:
        os.close(fd)
        raise
    return fd
