"""The whole history asked at once, beside LensNet asked of all blocks as entries."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megacontext import search
from megacontext.lensnet import LensConfig, LensNet
from megacontext.matches import STEP
from megacontext.search import BEAM, best_of, block_scores, looked_into
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


def test_a_gist_is_worth_what_its_best_block_is_and_its_best_blocks_may_be_laid():
    scores = np.random.default_rng(0).normal(size=102)
    spans = [Span(2, 0), Span(0, 5), Span(2, 1), *(Span(1, b) for b in range(64, 92)), *(Span(0, b) for b in range(92, 102))]
    best, beneath = best_of(scores, spans)
    assert best == [scores[:32].max(), scores[5], scores[32:64].max(), *scores[64:]]
    below = [b for b in range(64) if b != 5]
    assert beneath == [(Span(1, b), scores[b]) for b in sorted(below, key=lambda b: -scores[b])[:32]]
    assert best_of(scores[:0], []) == ([], [])


@pytest.mark.parametrize("count", [0, 1, BEAM, BEAM + 3])
def test_a_tick_looks_into_the_gists_of_gists_that_score_highest(count):
    """With a function that scores spans at random: what is in view is asked, in order, with the blocks of some gists in their place, and each is told."""
    rng, worth, asked = np.random.default_rng(count), {}, []
    spans = [span for i in range(count) for span in (Span(2, i), *([Span(0, 32 * i + 3)] if i % 2 else []))] + [Span(1, 32 * count), Span(0, 32 * count + 1)]
    def ask(seen):
        asked.append(seen)
        return np.array([worth.setdefault(span, rng.normal()) for span in seen])
    scores, beneath = looked_into(spans, ask)
    families = [Span(2, i) for i in range(count)]
    families = sorted(families, key=lambda span: -worth[span])[:BEAM] if count > BEAM else families
    assert len(asked) == 1 + (count > BEAM) and (count <= BEAM or asked[0] == [Span(2, i) for i in range(count)])
    assert [span.start for span in asked[-1]] == sorted(span.start for span in asked[-1])
    assert sorted(beneath) == sorted((node, worth[node]) for family in families for node in family.children() if Span(0, node.index) not in spans)
    for span, score in zip(spans, scores):
        if span in families:
            shown = [Span(0, node.index) if Span(0, node.index) in spans else node for node in span.children()]
            assert score == max(worth[block] for block in shown) and set(shown) <= set(asked[-1])
        else:
            assert score == worth[span] and span in asked[-1]
