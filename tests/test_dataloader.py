"""
Laws of the loader: rows hold the documents and nothing else, mixes keep their weights, and hard input ends in no error. How rows are packed:
test_packing.py; ranks and being killed: test_loader_ranks.py.
"""

import gc
import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings

from nanochat import documents, packing
from nanochat.common import UserError
from nanochat.dataloader import Loader, val_loader
from nanochat.dataset import open_source
from tests.loading import BOS, Bytes, Parts, by_row, leave_no_threads, pieces_of, random_texts, sequence, shapes, take

# ---------------------------------------------------------------------------------------------------------------------
# What is in the rows

@settings(max_examples=120, deadline=None)
@given(shapes)
def test_a_pass_holds_every_piece_of_every_document_once(shape):
    T, align = 32 * shape["blocks"], shape["align"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", shape["size"])
        patch.setattr(packing, "WAITING", shape["waiting"])
        batches = list(val_loader(texts, Bytes(), 3, T, align=align))
    expected = sorted(piece for text in texts for piece in pieces_of(text, T))
    found = []
    for inputs, targets, docs in by_row(batches).values():
        at = 0
        while at < T: # parse the row: a piece ends with the target BOS, or with the row
            if at % align == 0 and targets[at] >= 0:
                end = at + 1
                while end < T and targets[end - 1] != BOS:
                    end += 1
                found.append((inputs[at:end], targets[at:end]))
                owners = {docs[block] for block in range(-(-at // 32), end // 32)}
                assert len(owners) <= 1 and -1 not in owners, "blocks inside a piece are its own"
                at = end
            else:
                assert inputs[at] == BOS and targets[at] == -1, "padding"
                at += 1
    assert sorted(found) == expected


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_no_block_of_32_mixes_two_documents(shape):
    T = 32 * shape["blocks"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    for inputs, targets, docs in by_row(take(Loader(texts, Bytes(), 4, T, align=32, lanes=2), 5)).values():
        owner, count = -1, -1
        for block, doc in enumerate(docs):
            ids, goals = inputs[32 * block:32 * block + 32], targets[32 * block:32 * block + 32]
            starts = [i for i in range(32) if ids[i] == BOS and goals[i] != -1]
            assert starts in ([], [0]), "a document starts at the first token of a block, so its 32-grid is anchored there"
            live = [goal != -1 for goal in goals]
            assert live == sorted(live, reverse=True), "padding comes after the document, never inside it"
            assert (doc == -1) == (not any(live))
            if doc not in (-1, owner):
                count += 1
                assert doc == count, "documents of a row are numbered in order"
                owner = doc
            elif doc == owner:
                assert starts == [], "two documents must not have the same number"


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_docs_at_align_1_own_whole_blocks_only(shape):
    T = 32 * shape["blocks"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    for inputs, targets, docs in by_row(take(Loader(texts, Bytes(), 4, T, lanes=2), 5)).values():
        starts = [i for i in range(1, T) if targets[i - 1] == BOS]
        for block, doc in enumerate(docs):
            mixed = any(32 * block < start < 32 * block + 32 for start in starts)
            assert (doc == -1) == mixed
            if not mixed:
                assert doc == sum(start <= 32 * block for start in starts)


def test_long_documents_keep_their_order():
    """Rows of one lane, one after the other, are one document after the other."""
    texts = ["".join(f"{doc}.{i} " for i in range(1000)) for doc in range(2)]
    rows = by_row(take(Loader(texts, Bytes(), 8, 64, lanes=1), 40))
    ids = [token for n in range(len(rows)) for token in rows[n][0]]
    full = [pieces_of(text, 64) for text in texts * 9]
    expected = [token for pieces in full for inputs, _ in pieces if len(inputs) == 64 for token in inputs]
    assert ids == expected[:len(ids)], "full pieces only: fewer than WAITING tails have come together"


# ---------------------------------------------------------------------------------------------------------------------
# Seeds, mixes, epochs, evaluation

def test_a_seed_starts_elsewhere_and_loses_nothing():
    texts = [f"document {i:02d}" for i in range(40)]
    def first(seed):
        return by_row(take(Loader(texts, Bytes(), 8, 64, seed=seed), 5))
    assert first(1) == first(1) != first(2) and first(0) != first(1)
    rows = by_row(val_loader(texts, Bytes(), 4, 64, seed=7))
    found = b"".join(bytes(i for i in inputs if i != BOS) for inputs, _, _ in rows.values()).decode()
    assert sorted(found[i:i + 11] for i in range(0, len(found), 11)) == texts


@pytest.mark.parametrize("align", [1, 32])
def test_a_mix_keeps_its_weights_in_tokens_at_any_time(align):
    """Also while one part is in the middle of a document of a million tokens."""
    mix = Parts((["b" * 1_000_000, "b" * 500_000], 0.7), ([f"{'s' * 99}"] * 50, 0.3))
    loader = Loader(mix, Bytes(), 32, 512, align=align, lanes=4)
    with loader:
        for _ in range(6):
            next(loader)
            for lane in loader.state()["lanes"].values():
                assert abs(lane["tally"][0] / 0.7 - lane["tally"][1] / 0.3) <= 512 / 0.3
    assert loader.stats["epochs"][1] > 1 > loader.stats["epochs"][0]


def test_epochs_repeat_the_documents():
    texts = ["x" * 63, "y" * 63, "z" * 63]
    rows = by_row(take(Loader(texts, Bytes(), 3, 64, lanes=1), 4))
    assert [chr(rows[n][0][1]) for n in range(12)] == list("xyz" * 4)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_fewer_documents_than_lanes_or_ranks(world, count):
    """Training starves no lane and no rank; in a pass some ranks get nothing, and each document still comes once."""
    texts = [chr(97 + i) * 200 for i in range(count)]
    ranks = [take(Loader(texts, Bytes(), 2, 64, rank=rank, world=world), 3) for rank in range(world)]
    assert all(len(batches) == 3 and (batch.targets >= 0).any() for batches in ranks for batch in batches)
    passes = [list(val_loader(texts, Bytes(), 2, 64, rank=rank, world=world)) for rank in range(world)]
    rows = by_row(batch for batches in passes for batch in batches)
    found = sorted(i for inputs, targets, _ in rows.values() for i in targets if i >= 0)
    assert found == sorted(i for text in texts for i in sequence(text)[1:])
    assert sum(bool(batches) for batches in passes) == min(world, count)


@pytest.mark.parametrize("rows", [3, 100])
def test_fewer_row_groups_than_ranks(tmp_path, monkeypatch, rows):
    """
    A parquet file of one row group for eight ranks: where ranks take whole row groups, seven of them would have nothing to read. Here
    they take rows of the run, so the eight together give what one gives, and no process decodes the group twice.
    """
    texts = [f"document {i:03d} " * 9 for i in range(rows)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "only.parquet")
    assert pq.ParquetFile(tmp_path / "only.parquet").num_row_groups == 1
    reads, read = [], documents.ParquetFile._read
    monkeypatch.setattr(documents.ParquetFile, "_read", lambda file, group: reads.append(group) or read(file, group))
    source = open_source(f"dir:{tmp_path}")
    one = by_row(take(Loader(source, Bytes(), 16, 64), 3))
    ranks = [take(Loader(source, Bytes(), 2, 64, rank=rank, world=8), 3) for rank in range(8)]
    assert all(len(batches) == 3 and (batch.targets >= 0).any() for batches in ranks for batch in batches)
    assert by_row(batch for batches in ranks for batch in batches) == one and reads == [0]
    passes = [list(val_loader(source, Bytes(), 2, 64, rank=rank, world=8)) for rank in range(8)]
    found = by_row(batch for batches in passes for batch in batches)
    assert sum(target >= 0 for _, targets, _ in found.values() for target in targets) == sum(len(sequence(text)) - 1 for text in source.documents())


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_lanes_that_share_a_document_start_apart(tmp_path, monkeypatch, count, big):
    """One text file, eight lanes: all rows of a batch would be the same eight times, and training would see 1/8 of it."""
    if big:
        monkeypatch.setattr(documents, "BIG", 10)
        monkeypatch.setattr(documents, "SLICE", 1000)
    texts = ["".join(f"{doc} line {i} é\n" for i in range(2000)) for doc in range(count)]
    for doc, text in enumerate(texts):
        (tmp_path / f"{doc}.txt").write_text(text)
    files = [documents.TextFile(tmp_path / f"{doc}.txt")[0] for doc in range(count)] if big else texts
    loader = Loader(files, Bytes(), 8, 64)
    first = take(loader, 1)[0].inputs
    assert (first[:, 0] == BOS).all(), "each starts as a document does"
    heads = [bytes(i for i in row[1:20]).split(b"\n")[0].decode().split() for row in first.tolist()]
    lines = {}
    for doc, _, line, _ in heads:
        lines.setdefault(doc, []).append(int(line))
    assert sorted(map(int, lines)) == list(range(count))
    for starts in lines.values():
        gaps = np.diff(sorted(starts) + [2000])
        assert min(starts) == 0 and gaps.min() > 0.9 * 2000 / len(starts)
    more = Loader(files, Bytes(), 8, 64, state=loader.state())
    straight = Loader(files, Bytes(), 8, 64)
    assert by_row(take(more, 600)) == by_row(take(straight, 601)[1:]), "also when the first document ends and comes again"
    assert straight.stats == more.stats


def test_one_line_without_an_end_starts_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 50_000)
    big = documents.BigText(tmp_path / "a.txt", 0, 100_000)
    for share in (0.1, 0.33335, 0.5, 0.9999):
        at = documents.near(big, share)
        assert at % 2 == 0 and abs(at - share * 100_000) <= 2
        assert "".join(text for _, _, text in documents.slices(big, at)) == "é" * ((100_000 - at) // 2)
    assert documents.near(big, 0.99999) == documents.near("x", 0.9) == 0, "nothing is left there: start at the start"
    assert documents.near("ab\n", 0.5) == 0


@pytest.mark.parametrize("max_rows", [0, 1, 7, 16, 10_000])
def test_a_pass_is_the_same_every_time_and_ends_where_it_is_told(max_rows):
    texts = random_texts(3, 40, 300)
    rows = val_loader(texts, Bytes(), 4, 64, align=32, max_rows=max_rows)
    first = by_row(rows)
    assert by_row(rows) == first
    everything = by_row(val_loader(texts, Bytes(), 4, 64, align=32))
    assert first == {n: row for n, row in everything.items() if n < max_rows}
    split = by_row(batch for rank in range(4)
                   for batch in val_loader(texts, Bytes(), 3, 64, align=32, max_rows=max_rows, rank=rank, world=4))
    assert split == first


# ---------------------------------------------------------------------------------------------------------------------
# Hard input

def test_empty_documents_are_counted_and_nothing_else_ends_in_an_error():
    loader = Loader(["", "text", "", ""] * 9, Bytes(), 4, 32)
    take(loader, 2)
    assert 0 < loader.stats["empty"] < loader.stats["documents"]
    with pytest.raises(UserError, match="nothing to learn from.*empty"):
        take(Loader([""] * 5, Bytes(), 4, 32), 1)
    with pytest.raises(UserError, match="nothing to learn from.*skipped"):
        take(Loader([([BOS, 1, 2], [0, 0, 0])] * 5, None, 4, 32), 1)
    assert list(val_loader([""] * 5, Bytes(), 4, 32)) == []


def test_an_error_in_the_thread_is_raised_in_the_run(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("fine " * 100)
    (tmp_path / "7.txt").write_bytes(b"\xff")
    (tmp_path / "8.txt").write_bytes(b"\xff")
    loader = Loader(open_source(f"dir:{tmp_path}"), Bytes(), 8, 32)
    for _ in range(2): # it stays an error
        with pytest.raises(UserError, match="[78].txt is not UTF-8"):
            take(loader, 1000)
            next(loader)


def test_a_giant_document_streams_in_little_memory(tmp_path):
    """80 MB in one file, of which the first 32 rows need a few slices."""
    with open(tmp_path / "giant.txt", "w") as file:
        for i in range(80):
            file.write(f"{i} some words and a line end\n" * (1_000_000 // 30))
    source = open_source(f"dir:{tmp_path}")
    tokenizer = Bytes()
    tracemalloc.start()
    loader = Loader(source, tokenizer, 16, 2048, align=32, ahead=1, lanes=2)
    take(loader, 2)
    tokenizer.log = sum(map(len, tokenizer.log))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == 1 and peak < 25e6, f"{peak / 1e6:.0f} MB"
    assert tokenizer.log < 2_000_000


def test_a_loader_that_is_dropped_ends_its_thread():
    loader = Loader(["text"] * 9, Bytes(), 1, 32)
    next(loader)
    thread = next(thread for thread in threading.enumerate() if thread.name == "loader")
    del loader
    gc.collect()
    assert not thread.is_alive()
    with Loader(["text"] * 9, Bytes(), 1, 32) as loader:
        pass
    with pytest.raises(AssertionError, match="closed"):
        next(loader)


def test_batches_are_what_they_say():
    (batch,) = take(Loader(["some text"] * 99, Bytes(), 3, 70), 1)
    assert batch.inputs.shape == batch.targets.shape == (3, 70) and batch.docs.shape == (3, 2) and batch.rows.shape == (3,)
    assert {tensor.dtype for tensor in (batch.inputs, batch.targets, batch.docs, batch.rows)} == {torch.int64}
    assert batch.to("cpu").inputs is batch.inputs or torch.equal(batch.to("cpu").inputs, batch.inputs)
    assert np.array_equal(batch.rows, [0, 1, 2])


@pytest.mark.gpu
def test_pinned_batches_reach_the_gpu():
    items = ["some text"] * 99
    pinned, plain = (take(Loader(items, Bytes(), 3, 64, pin=pin), 1)[0] for pin in (True, False))
    assert pinned.inputs.is_pinned() and not plain.inputs.is_pinned()
    there = pinned.to("cuda")
    assert there.targets.device.type == "cuda" and torch.equal(there.inputs.cpu(), plain.inputs)
