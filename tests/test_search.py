"""The whole history asked at once, beside LensNet asked of all blocks as entries."""
import numpy as np
import pytest
import torch

from megacontext import search
from megacontext.lensnet import LensConfig, LensNet
from megacontext.matches import NEWEST, bits, block_hits
from megacontext.search import best_of, block_scores
from megacontext.span import BLOCK, Span
from tests.test_matches import tree_of


def net():
    torch.manual_seed(0)
    lens = LensNet(LensConfig())
    torch.nn.init.normal_(lens.score.weight)
    return lens


def distance(length):
    return lambda centres: torch.from_numpy(length - centres).float().clamp(min=1)


@pytest.mark.parametrize("length", [BLOCK, 3 * BLOCK + 5, 40 * BLOCK])
def test_some_blocks_at_a_time_score_as_all_together(length, monkeypatch):
    lens, ids = net(), np.random.default_rng(length).zipf(1.3, length) % 500
    tree, count, raw = tree_of(ids), length // BLOCK, [0, length // BLOCK - 1]
    levels = torch.ones(1, count, dtype=torch.long)
    levels[0, raw] = 0
    hits = torch.from_numpy(bits(block_hits(tree), min(NEWEST, length)))
    distances = distance(length)(np.arange(count) * BLOCK + (BLOCK - 1) / 2)
    with torch.no_grad():
        expected = lens(hits[None], levels, distances[None])[0].numpy()
    for at_once in (1, 3, 1000):
        monkeypatch.setattr(search, "AT_ONCE", at_once)
        assert np.allclose(block_scores(lens, tree, raw, distance(length)), expected, atol=1e-5)
    assert count == 1 or expected.std() > 0


def test_a_gist_is_worth_what_its_best_block_is():
    scores = np.random.default_rng(0).normal(size=70)
    spans = [Span(2, 0), *(Span(1, b) for b in range(32, 60)), *(Span(0, b) for b in range(60, 70))]
    assert best_of(scores, spans) == [scores[:32].max(), *scores[32:]]
    assert best_of(scores[:0], []) == []
