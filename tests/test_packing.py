"""How rows are packed: by hand, beside a slow twin, and conversations, which are whole or counted."""
import random

import pytest
from hypothesis import given, settings

from nanochat import documents, packing
from nanochat.dataloader import Loader, val_loader
from tests.loading import BOS, Bytes, by_row, leave_no_threads, pieces_of, random_texts, shapes, take


def test_packing_by_hand():
    """T = 8. Inputs of a text of n letters: n + 1."""
    texts = ["aaaa", "bb", "cccccc", "d", "eee"]  # 5, 3, 7, 2, 4 inputs
    (batch,) = list(val_loader(texts, Bytes(), 4, 8, lanes=1))
    rows = ["".join("|" if i == BOS else chr(i) for i in row) for row in batch.inputs.tolist()]
    assert rows == ["|cccccc|", "|aaaa|bb", "|eee|d||", "||||||||"]  # longest first, then the longest that fits
    assert batch.targets.tolist()[0] == [*b"cccccc", BOS, -1]
    assert batch.targets.tolist()[2] == [*b"eee", BOS, *b"d", BOS, -1, -1]
    assert batch.rows.tolist() == [0, 1, 2, -1] and (batch.targets[3] == -1).all()
    texts = ["cccccc", "bb"]  # for ever: a row of 7 has room for 1, so the shortest (3) is cropped to it
    loader = Loader(texts, Bytes(), 1, 8, lanes=1)
    (batch,) = take(loader, 1)
    assert batch.inputs.tolist()[0] == [BOS, *b"cccccc", BOS] and batch.targets.tolist()[0] == [*b"cccccc", BOS, *b"b"]
    assert loader.stats["cropped"] == 2


def slow_rows(texts, T, align, waiting, count):
    """One lane: lists, linear scans."""
    source = (piece for _ in iter(int, 1) for text in texts for piece in pieces_of(text, T))
    pool, rows, cropped = [], [], 0
    while len(rows) < count:
        row, at = [], 0
        while len(pool) < waiting:
            piece = next(source)
            if len(piece[0]) == T:
                row = [(0, piece)]
                break
            pool.append(piece)
        while not row or (len(row[0][1][0]) < T and at < T):
            fits = [piece for piece in pool if len(piece[0]) <= T - at]
            if fits:
                piece = max(fits, key=lambda piece: len(piece[0]))  # max gives the first, the oldest
            elif align == 1:
                piece = min(reversed(pool), key=lambda piece: len(piece[0]))
            else:
                break
            pool = [other for other in pool if other is not piece]
            cropped += max(0, len(piece[0]) - (T - at))
            piece = piece[0][:T - at], piece[1][:T - at]
            row.append((at, piece))
            at += -(-len(piece[0]) // align) * align
            if not pool:
                break
        inputs, targets = [BOS] * T, [-1] * T
        for at, piece in row:
            inputs[at:at + len(piece[0])], targets[at:at + len(piece[0])] = piece
        rows.append((inputs, targets))
    return rows, cropped


@settings(max_examples=120, deadline=None)
@given(shapes)
def test_packing_equals_a_slow_twin(shape):
    T, align, count = 32 * shape["blocks"], shape["align"], 24
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", shape["size"])
        patch.setattr(packing, "WAITING", shape["waiting"])
        loader = Loader(texts, Bytes(), 8, T, align=align, lanes=1)
        rows = by_row(take(loader, count // 8))
    slow, cropped = slow_rows(texts, T, align, shape["waiting"], count)
    assert [rows[n][:2] for n in range(count)] == slow
    assert loader.stats["cropped"] == cropped


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_every_token_is_accounted_for(shape):
    """tokens + padded = rows * T, and what came in is what went out, what was cropped and what waits."""
    T = 32 * shape["blocks"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    loader = Loader(texts, Bytes(), 8, T, align=shape["align"], lanes=1)
    batches = take(loader, 6)
    stats, lane = loader.stats, loader.state()["lanes"]["0"]
    assert stats["rows"] == 48 and stats["tokens"] + stats["padded"] == 48 * T
    assert stats["tokens"] == sum(int((batch.targets >= 0).sum()) for batch in batches)
    waiting = sum(address[4] for address in lane["waiting"])
    assert sum(lane["tally"]) == stats["tokens"] + stats["cropped"] + waiting
    doc, at, skip = lane["places"][0]
    begun = [texts[i % len(texts)] for i in range(doc)]
    assert stats["documents"] in (len(begun), len(begun) + 1) and stats["empty"] == begun.count("")
    whole = sum(len(text.encode()) + 1 for text in begun if text)
    inside = sum(lane["tally"]) - whole # of the document that has been begun
    assert 0 <= inside <= len(texts[doc % len(texts)].encode())
    assert stats["epochs"] == [doc / len(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def conversation(rng, longest):
    ids, mask = [BOS], [0]
    for turn in range(rng.randrange(1, 5)):
        size = rng.randrange(1, longest)
        ids += [rng.randrange(256) for _ in range(size)]
        mask += [turn % 2] * size
    return ids, mask


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("align", [1, 32])
def test_conversations_are_whole_or_counted(seed, align):
    """Every row parses into conversations, each whole or cut at T; what is skipped and cut is counted to the token."""
    rng, T = random.Random(seed), 128
    items = [conversation(rng, 60) for _ in range(60)]
    loader = Loader(items, None, 4, T, align=align, lanes=4, one_pass=True)
    with loader:
        rows = by_row(loader)
    expected = []
    for ids, mask in items:
        ids, mask = ids[:T + 1], mask[:T + 1]
        if any(mask[1:]):
            expected.append((ids[:-1], [i if m else -1 for i, m in zip(ids[1:], mask[1:])]))
    found = []
    for inputs, targets, _ in rows.values():
        starts = [i for i in range(T) if inputs[i] == BOS] + [T]
        for at, end in zip(starts, starts[1:]):
            if (size := max((i + 1 for i in range(at, end) if targets[i] >= 0), default=0)):
                found.append((inputs[at:end], targets[at:end], size - at))
                assert at % align == 0
    assert sorted((ids[:size], goals[:size]) for ids, goals, size in found) == sorted(
        (ids[:size], goals[:size]) for ids, goals in expected for size in [max(i + 1 for i in range(len(goals)) if goals[i] >= 0)])
    stats = loader.stats
    total = sum(len(ids) - 1 for ids, _ in items)
    assert stats["documents"] == 60 and stats["skipped"] == 60 - len(expected)
    assert stats["cut"] == sum(len(ids) - 1 > T and any(mask[1:T + 1]) for ids, mask in items)
    assert stats["tokens"] + stats["cropped"] == total and stats["tokens"] == sum(len(ids) for ids, _ in expected)


@pytest.mark.parametrize("said, becomes", [(3, "whole"), (5, "whole"), (6, "cut"), (90, "cut")])
def test_the_rule_for_a_conversation_longer_than_its_row_by_hand(said, becomes):
    """
    A row of 8: three tokens of the user's, then so many of the assistant's. There used to be a second rule, in the tokenizer, that
    nothing but its own test used; this is the one that trains.
    """
    ids, mask = [BOS, *b"abc", *b"x" * said], [0] * 4 + [1] * said
    assert packing.fate(mask, 8) == becomes
    loader = Loader([(ids, mask)], None, 1, 8, lanes=1, one_pass=True)
    [batch] = take(loader, 1)
    seen = min(said, 5)
    assert batch.inputs.tolist()[0] == [*ids[:3 + seen], *[BOS] * (5 - seen)] and batch.targets.tolist()[0] == [-1] * 3 + [120] * seen + [-1] * (5 - seen)
    assert (loader.stats["cut"], loader.stats["cropped"]) == (int(becomes == "cut"), said - seen)


@pytest.mark.parametrize("mask", [[0] * 9 + [1], [1] + [0] * 40, []])
def test_a_conversation_without_an_answer_in_its_row_is_skipped(mask):
    assert packing.fate(mask, 8) == "skipped"


def test_conversations_in_training_are_padded_not_cropped():
    rng = random.Random(0)
    items = [conversation(rng, 20) for _ in range(50)]
    items = [item for item in items if any(item[1][1:])]
    loader = Loader(items, None, 8, 128)
    rows = by_row(take(loader, 10))
    assert loader.stats["cropped"] == loader.stats["cut"] == 0 < loader.stats["padded"]
    wholes = {tuple(ids[:-1]) for ids, _ in items}
    for inputs, targets, _ in rows.values():
        starts = [i for i in range(128) if inputs[i] == BOS] + [128]
        for at, end in zip(starts, starts[1:]):
            assert tuple(inputs[at:end]) in wholes | {(BOS,)}


def test_conversations_are_rendered_when_their_turn_comes():
    class Rows:
        reads = 0

        def __len__(self):
            return 10_000

        def __getitem__(self, i):
            self.reads += 1
            return {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i}"}]}

    items = Rows()
    rows = by_row(take(Loader(items, Bytes(), 4, 64, lanes=2), 2))
    assert items.reads < 2000
    spoken = bytes(i for i in rows[0][1] if i >= 0).decode()
    assert spoken and set(spoken) <= set("0123456789"), "loss on the assistant's words only"
