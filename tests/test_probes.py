"""What one gist carries: the horizon, the leak that must not be, and the numbers by hand."""
import math

import numpy as np
import pytest
import torch

from megacontext import probes
from megacontext.evaluate import Networks, Rows
from megacontext.layout import FAN, GIST, HIDDEN, NODE, RAW, visibility
from megacontext.span import BLOCK
from tests.tiny import VOCAB, tiny_networks


def some_rows(Q, seed=0, W=None, rows=2):
    ids = torch.randint(VOCAB, (rows, Q * BLOCK + 1), generator=torch.Generator().manual_seed(seed))
    return Rows(Networks(*tiny_networks(seed)), ids, W or Q * BLOCK, np.random.default_rng(seed))


@pytest.mark.parametrize("q", [3, 20, 45])
def test_an_edit_is_one_edit(q):
    kinds, against, lines = probes.draw_lines(50, q, np.random.default_rng(q), 4)
    assert kinds[0] == "" and (lines[0][:q] == RAW).all() and (lines[:, q:] == HIDDEN).all()
    for kind, other, line in zip(kinds, against, lines):
        changed = np.flatnonzero(line != lines[other])
        if kind.startswith("1"):
            assert len(changed) == 1 and line[changed[0]] == GIST and (kind == "1 newest") == (changed[0] == q - 1)
        elif kind:
            assert changed.tolist() == list(range(FAN)) and (line[:FAN] == NODE).all() and (lines[other][:FAN] == (GIST if kind == "2" else RAW)).all()
    assert ("2" in kinds) == (q > FAN)


def test_the_price_is_that_of_reading_the_row_with_the_edit_in_force():
    """The slow way: the H tokens one block at a time through tables, in which every later block keeps the edit."""
    rows, H = some_rows(12), 64
    q, b = 6, 2
    line = np.where(np.arange(rows.Q) < q, RAW, HIDDEN)
    found = probes.price(rows, FixedDraw(q, b), readings=1, edits=1)["1"][H]
    nats = []
    for edited in (False, True):
        table = np.tril(np.full((rows.Q, rows.Q), RAW), -1)
        for later in range(q, q + H // BLOCK):
            table[later, :q] = np.where((np.arange(rows.Q) == b) & edited, GIST, line)[:q]
        nats.append(rows.nats(table, rows.T)[:, q * BLOCK:q * BLOCK + H].mean(dim=1))
    assert found == pytest.approx((nats[1] - nats[0]).tolist(), abs=1e-4) and any(abs(value) > 1e-4 for value in found)


class FixedDraw:
    """A generator that draws block q and edit b."""

    def __init__(self, q, b):
        self.q, self.b = q, b

    def integers(self, low, high, size):
        assert low <= self.q < high
        return np.array([self.q] * size)

    def choice(self, n, size, replace):
        return np.array([self.b] * size)


def test_every_kind_and_horizon_is_priced():
    found = probes.price(some_rows(40, W=2000), np.random.default_rng(1), readings=6, edits=2)
    assert set(found) == set(probes.COARSER) and all(set(by) == set(probes.HORIZONS) for by in found.values())
    assert len(found["1"][32]) == 6 * 2 * 2 and len(found["1 newest"][128]) == 6 * 2


def test_substitutability_by_hand():
    """Over 32 tokens: 0.001 a token is 0.032 in all, 0.02 is 0.64, 0.2 is 6.4, 2 is 64."""
    told = probes.substitutability([0.001, 0.02, 0.2, 2.0], 32)
    assert told == dict(dnll=pytest.approx(0.55525), ppl_ratio=pytest.approx(math.exp(0.55525)), **{"below_0.1_a_token": 0.5, "below_1_a_token": 0.75, "below_0.1_in_all": 0.25, "below_1_in_all": 0.5})


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction

def test_reconstruction_is_each_block_read_alone_behind_its_gist():
    """The slow way: one block at a time, in a row of two entries' kinds only: the gist, then 32 tokens right behind its span."""
    rows = some_rows(6)
    T, found = rows.T, probes.reconstruction(rows)
    assert list(found) == [1], "six blocks have no level-2 gist"
    found = {name: float(np.mean(nats)) for name, nats in found[1].items()}
    total = {"own": [], "other": [], "nothing": []}
    for i in range(rows.B):
        for q in range(rows.Q):
            tokens = slice(q * BLOCK, (q + 1) * BLOCK)
            for name, owner in (("own", i), ("other", (i - 1) % rows.B), ("nothing", None)):
                pick = lambda t: t[i, tokens] if owner is None else torch.cat([t[owner, T + q:T + q + 1], t[i, tokens]])
                entries = type(rows.entries)(pick(rows.entries.x)[None], [pick(value)[None] for value in rows.entries.values])
                places = torch.arange(BLOCK, dtype=torch.float32) + (q + 1) * BLOCK
                positions = (places if owner is None else torch.cat([torch.tensor([q * BLOCK + 15.5]), places]))[None]
                with torch.no_grad():
                    hidden = rows.gpt.trunk(entries, positions, "causal")[:, -BLOCK:-1]
                    total[name].append(rows.gpt.loss(hidden, rows.targets[i:i + 1, tokens][:, :-1]).item())
    assert found == pytest.approx({name: float(np.mean(nats)) for name, nats in total.items()}, abs=1e-4)
    assert found["own"] != pytest.approx(found["other"], abs=1e-4)


def test_reconstruction_cannot_read_what_it_predicts(monkeypatch):
    """Nothing but the gist may tell: with gists held fixed, tokens of other blocks and of the block's own future change nothing."""
    monkeypatch.setattr(probes, "stretches", visibility) # the mask as a whole
    rows = some_rows(FAN + 2)
    assert list(probes.reconstruction(rows)) == [1, 2]
    seen = []
    trunk = rows.gpt.trunk
    rows.gpt.trunk = lambda entries, positions, see: seen.append((positions, see)) or trunk(entries, positions, see)
    probes.reconstruction(rows)
    gists = range(rows.T, rows.T + rows.Q + 1)
    for n, (positions, see) in enumerate(seen):
        level, name = 1 + n // 3, ("own", "other", "nothing")[n % 3]
        for token in (0, 33, rows.T - 3 * BLOCK + 5):
            q = token // BLOCK
            mine = set(range(q * BLOCK, token + 1)) | (set() if name == "nothing" else {rows.T + q if level == 1 else rows.T + rows.Q})
            assert set(see[0, 0, token].nonzero()[:, 0].tolist()) == mine
            if name != "nothing":
                gist = max(mine & set(gists))
                assert 0 < positions[0, token] - positions[0, gist] <= (1 if level == 1 else FAN) * BLOCK / 2 + BLOCK, "right behind the gist's span, as a gist always is"


# ----------------------------------------------------------------------------------------------------------------------
# Diversity

def test_diversity_by_hand():
    same = probes.diversity(torch.ones(5, 8))
    assert same["rank"] == pytest.approx(1) and same["cosine"] == pytest.approx(1)
    apart = probes.diversity(3 * torch.eye(6))
    assert apart["rank"] == pytest.approx(6) and apart["cosine"] == pytest.approx(0, abs=1e-9)
    two = probes.diversity(torch.tensor([[1.0, 0], [0, 1], [0, 2]])) # cosines 0, 0, 1
    assert two["cosine"] == pytest.approx(1 / 3) and 1 < two["rank"] < 2


def test_the_slow_cosine():
    gists = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    pairs = [torch.cosine_similarity(gists[i], gists[j], dim=0).item() for i in range(9) for j in range(9) if i != j]
    assert probes.diversity(gists)["cosine"] == pytest.approx(np.mean(pairs), abs=1e-6)
