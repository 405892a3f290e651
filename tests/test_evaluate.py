"""The harness on tiny random networks: every method at equal cost, blind to the future; the oracle is one; controls are what they say."""
import numpy as np
import pytest
import torch

from megacontext import evaluate
from megacontext.contexts import cost
from megacontext.evaluate import METHODS, WAYS, Networks, Rows, by_budget, lens_quality, opened, oracle, pooled, swapped, trailing
from megacontext.layout import FAN, GIST, RAW, entry_positions, visibility
from megacontext.losses import row_entries
from megacontext.span import BLOCK
from nanochat.attention import norm
from tests.tiny import VOCAB, tiny_networks

Q, W, TAIL = 24, 8 * BLOCK, 6 * BLOCK


def ids(seed=0, rows=3, blocks=Q):
    return torch.randint(VOCAB, (rows, blocks * BLOCK + 1), generator=torch.Generator().manual_seed(seed))


def some_rows(seed=0, given=None):
    return Rows(Networks(*tiny_networks(seed)), ids(seed) if given is None else given, W, np.random.default_rng(seed))


def test_every_method_pays_the_same_and_all_are_there(monkeypatch):
    rows, seen = some_rows(), []
    read = Rows.nats
    monkeypatch.setattr(Rows, "nats", lambda self, table, *more, **named: seen.append(table) or read(self, table, *more, **named))
    found = trailing(rows, TAIL)
    found["oracle"] = oracle(rows, opened(rows, TAIL), TAIL)
    assert set(found) == set(METHODS) and all(nats.shape == (3, TAIL) and torch.isfinite(nats).all() for nats in found.values())
    assert len(seen) == len(METHODS) - 1, "all but full attention read through a table"
    assert all((cost(table) <= W).all() for table in seen)
    rich = max(cost(table)[..., -1].max() for table in seen)
    with pytest.raises(AssertionError, match="the budget is"):
        rows.nats(seen[0], TAIL, W=rich - 1)


def test_the_past_does_not_move_when_the_future_does():
    """Other tokens in the last two blocks: what every method says of the tokens before them stays, the oracle's too."""
    given = ids()
    other, cut = given.clone(), (Q - 2) * BLOCK
    other[:, cut + 1:] = (other[:, cut + 1:] + 1) % VOCAB
    losses = []
    for x in (given, other):
        rows = some_rows(given=x)
        losses.append(trailing(rows, TAIL) | {"oracle": oracle(rows, opened(rows, TAIL), TAIL)})
    for method in METHODS:
        a, b = (nats[method] for nats in losses)
        assert torch.allclose(a[:, :-2 * BLOCK], b[:, :-2 * BLOCK], atol=1e-4), f"{method} looked ahead"
        assert not torch.allclose(a, b, atol=1e-2)


def test_what_all_are_compared_with_spends_its_budget_on_the_newest_blocks(monkeypatch):
    """With a block of sinks in place of the third newest the baseline was worse by 0.17 nats a token, and all that was compared with it better."""
    rows, seen = some_rows(), []
    monkeypatch.setattr(Rows, "nats", lambda self, table, *more, **named: seen.append(table) or torch.zeros(3, TAIL))
    trailing(rows, TAIL)
    by_budget(rows, [W], TAIL)
    raw = lambda table: np.flatnonzero(table[Q - 1] == RAW).tolist()
    newest = list(range(Q - W // BLOCK, Q - 1))
    assert raw(seen[0]) == raw(seen[len(METHODS) - 2]) == newest and raw(seen[1]) == [0, *newest[1:]]


def test_full_is_the_plain_gpt_and_a_budget_for_everything_is_full():
    rows = some_rows()
    everything = by_budget(rows, [W, Q * BLOCK], TAIL)
    assert everything[Q * BLOCK]["window"] == pytest.approx(trailing(rows, TAIL)["full"].mean(1).tolist(), abs=1e-4)
    assert torch.allclose(rows.plain(TAIL), rows.gpt(rows.inputs, rows.targets, "none")[:, -TAIL:].detach(), atol=1e-5)
    assert set(everything[W]) == {"window", "recency"} and set(by_budget(rows, [BLOCK], TAIL)[BLOCK]) == {"window"}


def test_the_gain_of_opening_is_that_of_reading_again_with_it_open():
    """The slow way: one forward over the whole row for each block opened."""
    rows = some_rows(1)
    found = opened(rows, TAIL)
    assert [one.q for one in found] == list(range(Q - TAIL // BLOCK, Q))
    one, table = found[2], rows.tables(evaluate.chosen_table, rows.scores["lensnet"])
    table[:, Q - TAIL // BLOCK:] = rows.spared[Q - TAIL // BLOCK:]
    nats = []
    for block in (None, *one.blocks[:3], one.blocks[-1]):
        line = torch.from_numpy(rows.spared[one.q]).clone()
        if block is not None:
            assert line[block] == GIST
            line[block] = RAW
        edited = torch.from_numpy(table).clone()
        edited[:, one.q] = line
        with torch.no_grad():
            hidden = rows.gpt.trunk(rows.entries, entry_positions(rows.T, BLOCK), visibility(edited, BLOCK))
            here = slice(one.q * BLOCK, (one.q + 1) * BLOCK)
            nats.append(rows.gpt.loss(hidden[:, here], rows.targets[:, here], "none"))
    slow = torch.stack([nats[0] - later for later in nats[1:]], dim=1).numpy()
    assert np.allclose(one.gain[:, [0, 1, 2, -1]], slow, atol=3e-4) and np.abs(slow).max() > 1e-3


def test_the_oracle_gains_at_least_what_every_other_choice_does():
    rows = some_rows(2)
    quality = lens_quality(rows, opened(rows, TAIL))
    for way in WAYS:
        assert len(quality[way]["gain"]) == 3 * TAIL // BLOCK
        assert (np.array(quality["oracle"]["gain"]) >= np.array(quality[way]["gain"]) - 1e-9).all(), way
    assert np.allclose(quality["oracle"]["correlation"], 1)


def test_an_oracle_that_reads_alone_is_best_for_the_first_block_it_chooses_for():
    """With one block to open, the measured gain is the whole gain: no other choice of one block reads that block better."""
    rows = Rows(Networks(*tiny_networks(3)), ids(3), 4 * BLOCK, np.random.default_rng(3)) # room for two raw blocks: one is spared
    first = Q - TAIL // BLOCK
    found = opened(rows, TAIL)
    best = oracle(rows, found, TAIL)[:, :BLOCK].sum(1)
    prefix = rows.tables(evaluate.chosen_table, rows.scores["lensnet"])
    for block in found[0].blocks:
        scores = rows.scores["lensnet"].copy()
        scores[:, first] = np.arange(Q) == block
        table = rows.tables(evaluate.chosen_table, scores)
        assert (table[:, :first] == prefix[:, :first]).all() and (table[:, first, block] == RAW).all()
        assert (rows.nats(table, TAIL)[:, :BLOCK].sum(1) >= best - 1e-3).all()


class Sure:
    """Rows whose scores are given."""

    def __init__(self, scores, B):
        self.scores, self.B = scores, B


def test_signs_and_regret_by_hand():
    """Four gists; tokens gain 0.1, 0, 0, -0.1 each, without noise. LensNet has one sign of the two that count wrong."""
    gain = np.repeat(np.array([0.1, 0.0, 0.0, -0.1])[None, :, None], BLOCK, axis=2)
    wrong = np.array([1.0, -1.0, -1.0, 1.0])
    line = np.zeros((1, 9, 9))
    line[0, 8, :4] = wrong
    rows = Sure({way: line for way in ("lensnet", "random", "bm25", "embedding")}, 1)
    told = lens_quality(rows, [evaluate.Opened(8, np.arange(4), gain, np.array([[4.0, 3, 2, 1]]))], count=2)
    assert told["lensnet"]["signs"] == [True, False], "the first is right and the last is wrong; the two without utility do not count"
    assert told["positive"] == [True, False] and told["attention"]["signs"] == told["oracle"]["signs"] == [True, True] and told["recency"]["signs"] == [False, False]
    assert told["oracle"]["gain"] == pytest.approx([3.2]) and told["attention"]["gain"] == pytest.approx([3.2]) and told["lensnet"]["gain"] == pytest.approx([0.0])
    assert told["recency"]["gain"] == pytest.approx([-3.2]) and told["recency"]["correlation"][0] < 0 and len(told["points"]) == 4


@pytest.mark.parametrize("offset", [0, 5, -5])
def test_differences_of_scores_count(offset):
    gain = np.repeat(np.array([0.1, 0.0, 0.0, -0.1])[None, :, None], BLOCK, axis=2)
    line = np.zeros((1, 9, 9))
    line[0, 8, :4] = np.array([1.0, 0, 0, -1]) + offset
    told = lens_quality(Sure({way: line for way in ("lensnet", "random", "bm25", "embedding")}, 1), [evaluate.Opened(8, np.arange(4), gain, np.ones((1, 4)))])
    assert told["lensnet"]["signs"] == [True, True] and [score for score, _ in told["points"]] == [1, 0, 0, -1]


def test_noise_hides_signs():
    """A gain that comes from one token of 32 is within twice its standard error; the same gain from all of them is not."""
    spiky, even = np.zeros(BLOCK), np.full(BLOCK, 0.1)
    spiky[0] = 3.2
    for tokens, counted in ((spiky, 0), (even + np.random.default_rng(0).normal(0, 0.01, BLOCK), 1)):
        noise = np.random.default_rng(1).normal(0, 1.0, (8, BLOCK))
        gain = np.concatenate([tokens[None], noise - noise.mean(-1, keepdims=True)])[None]
        line = np.zeros((1, 20, 20))
        line[0, 19, 0] = 1
        told = lens_quality(Sure({way: line for way in ("lensnet", "random", "bm25", "embedding")}, 1), [evaluate.Opened(19, np.arange(9), gain, np.zeros((1, 9)))])
        assert told["lensnet"]["signs"] == [True] * counted


# ----------------------------------------------------------------------------------------------------------------------
# Controls

def test_swapped_gists_are_another_documents_and_pooled_ones_are_means():
    rows = some_rows()
    T, entries = rows.T, rows.entries
    other = swapped(entries, T)
    assert torch.equal(other.x[:, :T], entries.x[:, :T]) and all(torch.equal(other.x[i, T:], entries.x[j, T:]) for i, j in enumerate((1, 0, 1)))
    assert all(torch.equal(a[1, T:], b[0, T:]) for a, b in zip(other.values, entries.values))
    mean = pooled(entries, T)
    assert torch.equal(mean.x[:, :T], entries.x[:, :T]) and mean.x.shape == entries.x.shape
    assert torch.allclose(mean.x[1, T + 5], norm(entries.x[1, 5 * BLOCK:6 * BLOCK].mean(0)), atol=1e-6)
    assert not torch.allclose(mean.x[:, T:], entries.x[:, T:], atol=0.1)


def test_pooled_gists_are_what_an_untrained_gistnet_writes():
    """At its start GistNet's correction is zero: then recency and pooled are the same, at level 2 too."""
    from megacontext.gistnet import GistConfig, GistNet
    gpt, _, _ = tiny_networks()
    gistnet = GistNet(GistConfig(gpt.config.width, inner=16, heads=2, layers=2))
    x = ids(rows=2, blocks=FAN + 2)[:, :-1]
    with torch.no_grad():
        entries = row_entries(gpt, gistnet, x, BLOCK)
    assert torch.allclose(pooled(entries, x.size(1)).x, entries.x, atol=1e-4)


def test_swapping_needs_two_documents():
    with pytest.raises(AssertionError, match="another row"):
        trailing(some_rows(given=ids(rows=1)), TAIL)
