"""Where the newest tokens have stood before: rows beside a slow search, bit sets beside the rows."""
import random

import numpy as np
import pytest
import torch

from megacontext import matches
from megacontext.matches import KINDS, LEAD, NEWEST, STEP, Matches, bits, row_hits, window_hits
from megacontext.span import BLOCK, Span
from megacontext.tree import MegaTree, make_header


def slow_hits(ids, docs, q, K, now):
    """One reading: for each block and each of the newest tokens before `now`, look through what the block holds: a quarter of it from before it, and not its last quarter."""
    Q = len(docs)
    hits = np.zeros((Q, KINDS, NEWEST), bool)
    for i in range(NEWEST):
        at = now - NEWEST + i
        if at < 0 or docs[at // K] != docs[q]:
            continue
        for b in range(Q):
            for place in range(b * K - (K // 4 if b and docs[b - 1] == docs[b] else 0), (b + 1) * K - K // 4):
                if ids[place] == ids[at]:
                    hits[b, 0, i] = True
                    hits[b, 1, i] |= (ids[place - 1] if place else -1) == (ids[at - 1] if at else -1)
    return hits


@pytest.mark.parametrize("K", [8, 32])
def test_rows_are_searched_as_a_slow_search_does(K):
    rng = np.random.default_rng(0)
    T = 256
    ids, docs = rng.integers(0, 20, (2, T)), np.sort(rng.integers(0, 3, (2, T // K)), axis=1)
    block = rng.integers(0, T // K, (2, 3))
    later = block * K + rng.integers(0, K, (2, 3))
    for now in (None, later):
        got = row_hits(*map(torch.from_numpy, (ids, docs, block)), K, None if now is None else torch.from_numpy(now))
        for b in range(2):
            for p in range(3):
                assert np.array_equal(got[b, p].numpy(), slow_hits(ids[b], docs[b], block[b, p], K, block[b, p] * K if now is None else now[b, p]))


def tree_of(ids):
    tree = MegaTree.in_memory(make_header(4, 0))
    tree.append_tokens(ids)
    return tree


def truth(ids, starts, stops=None):
    """What tokens from each of `starts` to each of `stops` (None = BLOCK later) hold of the newest, (E, KINDS, n)."""
    ids = list(ids)
    pairs = list(zip([-1] + ids, ids))
    asked = pairs[-NEWEST:]
    ranges = zip(starts, stops or [a + BLOCK for a in starts])
    return np.array([[[token in set(ids[a:b]) for _, token in asked], [pair in set(pairs[a:b]) for pair in asked]] for a, b in ranges])


def held_by(ids, spans):
    """truth() of spans, each of which holds what stands LEAD tokens before its own."""
    return truth(ids, [max(0, s.start - LEAD) for s in spans], [s.stop - LEAD for s in spans])


@pytest.mark.parametrize("length", [BLOCK, 50, 40 * BLOCK + 7])
def test_a_set_never_denies_what_is_there_and_seldom_claims_what_is_not(length):
    rng = np.random.default_rng(length)
    ids = rng.zipf(1.2, length) % 30_000
    spans = [Span(0, b) for b in range(length // BLOCK)] + [Span(1, b) for b in range(length // BLOCK)] + [Span(2, n) for n in range(length // BLOCK ** 2)]
    hits, true = Matches().hits(tree_of(ids), spans), held_by(ids, spans)
    assert hits.shape == (len(spans), KINDS, min(length, NEWEST))
    assert (hits | ~true).all()
    coarse = np.array([span.level == 2 for span in spans])
    wrong = (hits & ~true)[~coarse]
    assert wrong.sum() <= 2 + 0.01 * wrong.size
    assert not coarse.any() or (hits & ~true)[coarse].mean() < 0.1


@pytest.mark.parametrize("length", [BLOCK, 50, 40 * BLOCK + 7])
def test_every_window_of_a_history_is_looked_through(length, monkeypatch):
    """Exact, and the same whatever number of blocks is looked at at a time."""
    ids = np.random.default_rng(length).zipf(1.2, length) % 30_000
    true = truth(ids, range(0, length // BLOCK * BLOCK - BLOCK + 1, STEP))
    for at_once in (1, 7, 1000):
        monkeypatch.setattr(matches, "AT_ONCE", at_once)
        words = window_hits(tree_of(ids))
        assert words.dtype == np.uint64 and np.array_equal(bits(words, min(length, NEWEST)), true)
    if length > 50:
        assert true[:, 0].any() and not true[:, 0].all()


def test_an_entry_holds_what_the_most_of_what_follows_stands_in_it():
    """A fact across two blocks: the block of its value has no word of the question, but for the last tokens of the block before, which are all its own."""
    ids = np.arange(100, 100 + 8 * BLOCK)
    blocks = [Span(0, b) for b in range(3)]
    ids[-1], far = ids[2 * BLOCK - LEAD], ids[2 * BLOCK - LEAD - 1]
    assert Matches().hits(tree_of(ids), blocks)[:, 0, -1].tolist() == [False, False, True]
    ids[-1] = far
    assert Matches().hits(tree_of(ids), blocks)[:, 0, -1].tolist() == [False, True, False]


def test_a_gist_of_level_3_still_tells_what_it_holds():
    """Its 32,768 tokens would fill the set of a level-2 gist: nearly every question would be answered yes."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2 ** 31, BLOCK ** 3 + NEWEST)
    ids[-3:] = ids[100:103]
    hits = Matches().hits(tree_of(ids), [Span(3, 0)])
    assert hits[0, 0, -3:].all() and hits[0, 1, -2:].all() and hits.mean() < 0.15


def test_columns_of_spans_that_left_are_used_again(monkeypatch):
    """Whatever came and went before, a span's answer is that of its own tokens; and there are no more columns than the views were wide."""
    monkeypatch.setattr(matches, "LEAST", 8)
    rng = random.Random(0)
    ids = np.random.default_rng(1).integers(0, 500, 64 * BLOCK)
    tree, kept = tree_of(ids), Matches()
    for _ in range(40):
        spans = [Span(rng.randrange(2), b) for b in sorted(rng.sample(range(64), rng.randrange(1, 20)))] + [Span(2, n) for n in range(rng.randrange(3))]
        true, hits = held_by(ids, spans), kept.hits(tree, spans)
        assert np.array_equal(hits, Matches().hits(tree, spans)) and (hits | ~true).all()
        assert kept.fine.columns <= 2 * 21 + 7


def test_a_block_and_its_gist_share_a_set():
    tree, kept = tree_of(range(4 * BLOCK)), Matches()
    hits = kept.hits(tree, [Span(1, 1), Span(0, 1), Span(1, 3)])
    assert np.array_equal(hits[0], hits[1]) and not np.array_equal(hits[0], hits[2]) and len(kept.fine.column) == 2


def test_what_could_not_be_looked_up_is_looked_up_again(monkeypatch):
    """Its set would hold nothing, and deny all that is there, for as long as it is in view; and what was found before it failed would be told of whoever has its column next."""
    tree, kept = tree_of(np.arange(200) % 50), Matches()
    spans = [Span(1, 0), Span(1, 2), Span(1, 3)]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(tree, "tokens", lambda a, b, calls=[]: MegaTree.tokens(tree, a, b) if calls.append(a) or len(calls) < 3 else (_ for _ in ()).throw(MemoryError()))
        kept.hits(tree, spans)
    assert not kept.fine.table.any()
    assert np.array_equal(kept.hits(tree, spans), Matches().hits(tree, spans)) and kept.hits(tree, spans).any()
    assert kept.hits(tree, []).shape == (0, KINDS, NEWEST)


def set_of(kept, span):
    return kept.coarse.held[span.level, span.index]


def watch_ids(tree, monkeypatch):
    """From now on, a list of how many ids the tree is asked for at a time."""
    asked = []
    monkeypatch.setattr(tree, "tokens", lambda a, b: asked.append(b - a) or MegaTree.tokens(tree, a, b))
    return asked


@pytest.mark.parametrize("gist", [Span(4, 0), Span(4, 1)])
def test_a_gist_of_a_million_tokens_has_the_sets_of_its_children(gist, monkeypatch):
    """
    A million ids were hashed at the first tick that showed a gist of level 4, though the 32 gists that became it had just been in view, with sets as
    large. Theirs together are its own, bit for bit, and the ids are not looked at. Where one is missing they are.
    """
    tree, kept, fresh = tree_of(np.random.default_rng(gist.index).integers(0, 2 ** 31, gist.stop + 100)), Matches(), Matches()
    fresh.hits(tree, [gist])
    kept.hits(tree, gist.children())
    with monkeypatch.context() as patch:
        asked = watch_ids(tree, patch)
        kept.hits(tree, [gist])
        assert asked == [NEWEST + 1], "the newest tokens, and nothing else"
    assert np.array_equal(set_of(kept, gist), set_of(fresh, gist)) and 0.5 < np.unpackbits(set_of(kept, gist)).mean() < 0.9
    kept = Matches()
    kept.hits(tree, gist.children()[1:])
    kept.hits(tree, [gist])
    assert np.array_equal(set_of(kept, gist), set_of(fresh, gist))


def test_children_that_leave_give_their_sets_first(monkeypatch):
    """Whatever else is new beside the gist that they became."""
    tree, kept, fresh, gist = tree_of(np.random.default_rng(0).integers(0, 2 ** 31, 2 * BLOCK ** 4)), Matches(), Matches(), Span(4, 0)
    *others, last = Span(4, 1).children()
    kept.hits(tree, gist.children() + others)
    asked = watch_ids(tree, monkeypatch)
    for sets in (kept, fresh):
        sets.hits(tree, [last, gist])
    assert sorted(asked)[-2:] == [BLOCK ** 3 + 1, gist.stop - LEAD] and asked.index(gist.stop - LEAD) > len(asked) // 2, "only the fresh one asks for a million ids"
    assert len(kept.coarse.held) == 2 and all(np.array_equal(set_of(kept, span), set_of(fresh, span)) for span in (last, gist))


def test_bits_are_evenly_used():
    """Ids are small consecutive numbers and a set takes the remainder of their hash: none of its bits may be out of reach."""
    bits = matches.hashed(np.arange(30_000), np.arange(30_000)[::-1]) % np.uint64(1 << 10)
    for kind in bits:
        counts = np.bincount(kind.astype(np.int64), minlength=1 << 10)
        assert counts.min() > 0 and counts.max() < 4 * counts.mean()
