"""Ten million tokens: opening and appending cost what they cost at a thousand, and the disk holds what the accounting says."""

import os
import shutil
import subprocess
import sys

import pytest

from megacontext import column as column_file
from megacontext.span import BLOCK
from megacontext.tree import MegaTree

from tree_truth import HEADER, D, K, ingest


OPEN = """
import sys, time
import numpy, sqlite3, resource
from megacontext.tree import MegaTree
status = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
rss, start = status(), time.perf_counter()
tree = MegaTree.open(sys.argv[1], mode=sys.argv[2], model="gpt-1")
print(time.perf_counter() - start, status() - rss, tree.length, tree.levels)
assert tree.tokens(5_000_000, 5_000_001)[0] == 5_000_000 * 2654435761 % 2 ** 31
"""


@pytest.fixture(scope="module")
def ten_million(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "tree"
    with MegaTree.create(path, HEADER) as tree:
        while tree.length < 10_000_000:
            ingest(tree, 1_000_000)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_ten_million_tokens_open_at_once_and_take_no_memory(ten_million, mode):
    out = subprocess.run([sys.executable, "-c", OPEN, ten_million, mode], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    seconds, megabytes, length, levels = map(float, out.stdout.split())
    assert (length, levels) == (10_000_000, 5)
    assert seconds < 1 and megabytes < 50, f"{seconds:.3f} s, {megabytes:.1f} MB"


def test_an_append_costs_the_same_at_a_thousand_and_at_ten_million(ten_million, tmp_path, monkeypatch):
    """Counted, not timed: bytes written and read and rows of the record changed, for one block and its commit."""
    def account(path, blocks=32):
        tree, counts = MegaTree.open(path), {"written": 0, "read": 0, "rows": 0}
        write, read = os.pwrite, os.pread
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at: (counts.update(written=counts["written"] + len(data)), write(fd, data, at))[1])
            patch.setattr(os, "pread", lambda fd, n, at: (counts.update(read=counts["read"] + n), read(fd, n, at))[1])
            patch.setattr(column_file.mmap, "mmap", None)  # an append maps nothing
            changes = tree.record.db.total_changes
            for _ in range(blocks):
                ingest(tree, BLOCK)
                tree.commit()
            counts["rows"] = tree.record.db.total_changes - changes
        length = tree.length
        tree.close()
        with MegaTree.open(path) as tree:
            tree.truncate(length - blocks * BLOCK)
        return counts
    with MegaTree.create(tmp_path / "small", HEADER) as tree:
        ingest(tree, 1024)
    small, large = account(tmp_path / "small"), account(ten_million)
    assert small["read"] == large["read"] == 0
    assert abs(large["written"] - small["written"]) <= 8 * (2 * D + 2 * K)  # a few more parents may fall due
    assert large["rows"] <= 1.2 * small["rows"]


def test_disk_bytes_are_what_the_accounting_says(ten_million):
    """4 bytes of id, and (D + K) bf16 numbers per gist, 1/31 of a gist per token: 4 + 2 (D + K) / 31 = 6.06; the record is extra."""
    total = sum(os.path.getsize(p) for p in ten_million.glob("level*")) / 10_000_000
    with MegaTree.open(ten_million, mode="r") as tree:
        sizes = tree.sizes()
    record = sizes.pop("record")
    assert sum(sizes.values()) / 10_000_000 == pytest.approx(total, rel=1e-3) and sizes["ids"] == 40_000_000
    assert 0 < record / 10_000_000 < 0.02
    assert total == pytest.approx(4 + 2 * (D + K) / 31, rel=1e-3)
    assert os.path.getsize(ten_million / "tree.db") / 10_000_000 < 0.02
