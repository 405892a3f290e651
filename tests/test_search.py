"""The whole history asked at once, beside LensNet asked of all blocks as entries."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacontext import search
from megacontext.lensnet import LensConfig, LensNet
from megacontext.matches import STEP
from megacontext.search import best_of, block_scores
from megacontext.span import BLOCK, Span
from tests.test_matches import tree_of, truth


def net():
    torch.manual_seed(0)
    lens = LensNet(LensConfig())
    torch.nn.init.normal_(lens.score.weight)
    return lens


@pytest.mark.parametrize("length", [BLOCK, 3 * BLOCK + 5, 40 * BLOCK])
def test_a_block_is_worth_its_best_window(length, monkeypatch):
    """Beside LensNet asked of all windows that lie side by side as if they were the entries of a working context, for each place to begin."""
    lens, ids = net(), np.random.default_rng(length).zipf(1.3, length) % 500
    tree, count = tree_of(ids), length // BLOCK
    expected = np.full(count, -np.inf)
    for shift in range(0, BLOCK, STEP):
        starts = range(shift, count * BLOCK - BLOCK + 1, BLOCK)
        if not starts:
            continue
        hits, blocks = (torch.from_numpy(truth(ids, starts)).float()[None] for starts in (starts, range(0, count * BLOCK, BLOCK)))
        distances = (length - torch.tensor([[a + (BLOCK - 1) / 2 for a in starts]])).clamp(min=1)
        with torch.no_grad():
            scores = lens.worth(hits, torch.ones_like(distances).long(), distances, blocks.sum(1), torch.tensor([float(count)]))[0].tolist()
        for a, score in zip(starts, scores):
            for b in {a // BLOCK, (a + BLOCK - 1) // BLOCK}:
                expected[b] = max(expected[b], score)
    for at_once in (1, 3, 1000):
        monkeypatch.setattr(search, "AT_ONCE", at_once)
        got = block_scores(lens, tree, lambda centres: torch.from_numpy(length - centres).float().clamp(min=1))
        assert np.allclose(got, expected - expected.mean(), atol=1e-5)
    assert count == 1 or expected.std() > 0


def test_a_search_is_in_fp32_within_a_bf16_evaluation():
    """On a CPU with bf16, base_eval's continuations ended in "Got unsupported ScalarType BFloat16": autocast had taken LensNet's head along."""
    tree, distance = tree_of(np.arange(40 * BLOCK) % 300), lambda centres: torch.from_numpy(1e4 - centres).float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = block_scores(net(), tree, distance)
    assert np.array_equal(scores, block_scores(net(), tree, distance)) and scores.std() > 0


def test_both_blocks_of_a_fact_across_them_are_found():
    """A LensNet that counts matches: alone, the block with the smaller part of the words would stand behind one with more of them."""
    ids = np.arange(1000, 1000 + 20 * BLOCK)
    ids[-6:] = range(1, 7)
    ids[5 * BLOCK - 5:5 * BLOCK + 1] = range(1, 7) # one word in block 5
    ids[9 * BLOCK + 10:9 * BLOCK + 13] = range(2, 5) # a block that holds three
    count = SimpleNamespace(worth=lambda hits, *rest: hits[:, :, 0, -6:].sum(-1)) # of the newest six tokens
    scores = block_scores(count, tree_of(ids), lambda centres: torch.from_numpy(centres))
    before = scores[:18] # what stands before the question
    assert sorted(np.argsort(before)[-2:]) == [4, 5] and scores[4] == scores[5] > scores[9] > np.median(before)


def test_a_gist_is_worth_what_its_best_block_is():
    scores = np.random.default_rng(0).normal(size=70)
    spans = [Span(2, 0), *(Span(1, b) for b in range(32, 60)), *(Span(0, b) for b in range(60, 70))]
    assert best_of(scores, spans) == [scores[:32].max(), *scores[32:]]
    assert best_of(scores[:0], []) == []
