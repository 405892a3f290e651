"""Equal visible budget: no method reads more than W entries at any block, none sees the future, and scores say what they say."""
import math

import numpy as np
import pytest
import torch

from megacontext.contexts import QUERY, SPARE, bag, best, bm25, bm25_scores, chosen_table, cost, embedding_scores, raw_blocks, recency_table, retrieved_table, window_table
from megacontext.layout import FAN, GIST, HIDDEN, NODE, RAW
from megacontext.matches import LEAD
from megacontext.span import BLOCK
from nanochat.common import UserError

SIZES = [(Q, W) for Q in (1, 8, 33, 64) for W in (2 * BLOCK, 4 * BLOCK, 8 * BLOCK - 1, 64 * BLOCK) if W - BLOCK >= Q - 1]


def every_table(Q, W, rng):
    scores = rng.normal(size=(Q, Q))
    return {"window": window_table(Q, W), "window with sinks": window_table(Q, W, sinks=True), "recency": recency_table(Q, W), "no gists": recency_table(Q, W, older=HIDDEN),
            "chosen": chosen_table(Q, W, scores), "retrieved": retrieved_table(Q, W, scores)}


def slow_cost(line):
    """One block at a time, from the words of contexts.py."""
    total, nodes = BLOCK, set()
    for b, view in enumerate(line):
        total += {RAW: BLOCK, GIST: 1}.get(view, 0)
        if view == NODE:
            nodes.add(b // FAN)
    return total + len(nodes)


@pytest.mark.parametrize("Q, W", SIZES)
def test_no_method_costs_more_than_the_budget_or_sees_the_future(Q, W):
    for name, table in every_table(Q, W, np.random.default_rng(Q + W)).items():
        costs = cost(table)
        assert costs.tolist() == [slow_cost(line) for line in table]
        assert (costs <= W).all(), f"{name} costs {costs.max()} of {W}"
        assert (table[np.triu_indices(Q)] == HIDDEN).all(), f"{name} sees its own block or the future"


def test_a_node_costs_one_whatever_it_covers():
    line = np.array([NODE] * FAN + [GIST] * 3 + [RAW] * 2 + [HIDDEN])
    assert cost(line) == slow_cost(line) == BLOCK + 1 + 3 + 2 * BLOCK


@pytest.mark.parametrize("Q, W", SIZES)
def test_memory_tiles_the_past_and_choosing_moves_raw_blocks_without_adding_any(Q, W):
    tables = every_table(Q, W, np.random.default_rng(Q))
    for q in range(Q):
        for name in ("recency", "chosen"):
            assert (tables[name][q, :q] != HIDDEN).all(), f"{name} at block {q} leaves something out"
        raws = [(tables[name][q] == RAW).sum() for name in ("recency", "chosen", "no gists")]
        assert len(set(raws)) == 1, "the same number of raw blocks, so the same cost"
        assert (tables["window"][q] == RAW).sum() == (tables["retrieved"][q] == RAW).sum() == min(q, W // BLOCK - 1), "windows and retrieval fill the budget"


@pytest.mark.parametrize("seed", range(10))
def test_the_best_scored_blocks_are_raw_and_the_newest_too(seed):
    rng = np.random.default_rng(seed)
    Q, W = 40, 10 * BLOCK
    scores = rng.permutation(Q * Q).reshape(Q, Q).astype(float)
    for table, gists in ((chosen_table(Q, W, scores), True), (retrieved_table(Q, W, scores), False)):
        for q in range(Q):
            n = raw_blocks(q, W, gists)
            near = n - int(n * SPARE)
            assert (table[q, q - near:q] == RAW).all()
            older = np.flatnonzero(table[q, :q - near] == RAW)
            wanted = sorted(range(q - near), key=lambda b: -scores[q, b])[:n - near]
            assert sorted(wanted) == older.tolist()


def test_a_window_keeps_the_first_block_where_it_has_sinks():
    """5 blocks of budget: the own one, the first, and the three newest."""
    assert np.flatnonzero(window_table(10, 5 * BLOCK, sinks=True)[9] == RAW).tolist() == [0, 6, 7, 8]
    assert np.flatnonzero(window_table(10, 5 * BLOCK)[9] == RAW).tolist() == [5, 6, 7, 8]
    assert np.flatnonzero(window_table(10, 2 * BLOCK, sinks=True)[9] == RAW).tolist() == [8], "one block is no place for a sink"


def test_a_budget_without_room_is_the_users_mistake():
    with pytest.raises(UserError, match="raise --budget"):
        recency_table(64, 2 * BLOCK)
    with pytest.raises(UserError, match="raise --budget"):
        window_table(4, BLOCK - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Scores

def test_equals_go_to_the_older():
    assert best(np.array([3, 5, 8]), np.array([1.0, 2.0, 2.0]), 2).tolist() == [5, 8]
    assert best(np.array([3, 5, 8]), np.zeros(3), 2).tolist() == [3, 5]


def test_bm25_by_hand():
    """
    Three blocks, and a query of five 9s, 7, 5, 6. Block 0 holds 7 four times, none behind a 9; block 1 the pair 5, 6, which stands where block 0 ends, and both by themselves.
    What is in one of three blocks counts ln(1 + 2.5 / 1.5) times n * 2.5 / (n + 1.5).
    """
    ids = [7] * 4 + [1] * 26 + [5, 6] + [2] * 64 + [9] * 5 + [7, 5, 6] + [3] * 24
    assert LEAD == QUERY == 8
    found = bm25(ids, [bag(ids, block) for block in range(3)], 104)
    assert found == pytest.approx([math.log(1 + 2.5 / 1.5) * 10 / 5.5, math.log(1 + 2.5 / 1.5) * 3, 0])


@pytest.mark.parametrize("seed", range(3))
def test_scores_know_nothing_of_what_follows(seed):
    """Change everything from block q on: what ranks the blocks before q must not move."""
    gen = torch.Generator().manual_seed(seed)
    Q, q = 12, 7
    ids, x = torch.randint(0, 50, (2, Q * BLOCK), generator=gen), torch.randn(2, Q * BLOCK, 16, generator=gen)
    other_ids, other_x = ids.clone(), x.clone()
    other_ids[:, q * BLOCK:] += 50
    other_x[:, q * BLOCK:] += torch.randn(2, (Q - q) * BLOCK, 16, generator=gen)
    for scores, others in ((bm25_scores(ids), bm25_scores(other_ids)), (embedding_scores(x), embedding_scores(other_x))):
        past = np.tril_indices(q + 1, -1)
        assert np.allclose(scores[:, past[0], past[1]], others[:, past[0], past[1]])
        assert not np.allclose(scores[:, q + 2, :q], others[:, q + 2, :q]), "the change itself must show"


def test_a_repeated_block_is_found():
    """Block 2 says again what stands just before block 9."""
    gen = torch.Generator().manual_seed(0)
    ids, x = torch.randint(0, 1000, (1, 10 * BLOCK), generator=gen), torch.randn(1, 10 * BLOCK, 16, generator=gen)
    for t in (ids, x):
        t[:, 8 * BLOCK:9 * BLOCK] = t[:, 2 * BLOCK:3 * BLOCK]
    assert embedding_scores(x)[0, 9, :7].argmax() == 2
    assert bm25_scores(ids)[0, 9, :7].argmax() == 3, "which holds what followed it"
