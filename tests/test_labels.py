"""The price of an edit has the right sign: an oracle for whom one block, and only in detail, is worth two nats."""

import numpy as np
import pytest
import torch

from megacontext.labels import PARTS, InFront, RowRead, draw_edits, measure
from megacontext.layout import GIST, RAW, draw_table, entry_positions, visibility
from megacontext.losses import row_entries
from nanochat.gpt import IGNORE, Entries
from tests.tiny import VOCAB, tiny_networks

K, Q = 4, 70
T = K * Q


class Oracle:
    """A GPT that says each token at a cost of 3 nats, less 0.5 a token if it sees block `secret` raw, less 0.1 if it sees its gist."""

    def __init__(self, secret):
        self.secret = secret

    def trunk(self, entries, positions, see, cache=None):
        raw = see[:, 0, :, self.secret * K:(self.secret + 1) * K].all(-1)
        gist = see[:, 0, :, T + self.secret]
        return (3 - 0.5 * raw.float() - 0.1 * gist.float())[..., None]

    def loss(self, hidden, targets, reduction):
        assert reduction == "none"
        return hidden[..., 0].masked_fill(targets == IGNORE, 0)


def labels_for(table, secret, seed=0, readings=30, edits=8, targets=torch.zeros(1, T, dtype=torch.long)):
    table, gpt = torch.from_numpy(table)[None], Oracle(secret)
    hidden = gpt.trunk(None, None, visibility(table, K))
    return measure(gpt, Entries(torch.zeros(1, T, 1), []), None, hidden, targets, table, K, [np.random.default_rng(seed)], readings, edits)


@pytest.mark.parametrize("shown", [GIST, RAW])
def test_detail_that_helps_has_a_positive_label(shown):
    """Elsewhere scores correlated +0.95 with harm and it passed for health. Opening or closing: the label is the worth of the detail."""
    table = np.full((Q, Q), GIST)
    table[np.triu_indices(Q)] = 0
    secret = 5
    table[secret + 1:, secret] = shown
    labels = labels_for(table, secret)
    hit = labels.entry == secret
    assert hit.any(), "the case must price the secret block"
    left = (labels.block + 1) * K - labels.now
    assert set(left[0].tolist()) == {1, 2, 3, 4}, "any tick of a block may ask"
    assert torch.allclose(labels.value[hit], (0.5 - 0.1) * left[:, :, None].expand_as(hit)[hit]), "0.4 nats a token, over those of the block that are left"
    assert (labels.value[labels.valid & ~hit] == 0).all(), "other blocks are worth nothing"


@pytest.mark.parametrize("seed", range(20))
def test_edits_are_legal_and_single(seed):
    rng = np.random.default_rng(seed)
    table = draw_table(np.zeros(Q, dtype=int), K, rng, tail=(0, 32))
    block, _, entry, lines = draw_edits(table, np.ones((Q, PARTS), bool), rng, 4, 6)
    for p, q in enumerate(block):
        assert len({e for e in entry[p] if e >= 0}) == (entry[p] >= 0).sum(), "an edit is drawn once"
        for e, line in zip(entry[p], lines[p]):
            changed = np.flatnonzero(line != table[q])
            if e < 0:
                assert not changed.size
            else:
                assert changed.tolist() == [e] and {line[e], table[q, e]} == {RAW, GIST}


def test_readings_are_of_blocks_with_targets():
    """In a conversation only answers count. A block without targets would say that every edit is worth nothing, and LensNet would learn to say so too."""
    table = np.full((Q, Q), GIST)
    table[np.triu_indices(Q)] = 0
    targets = torch.full((1, T), IGNORE)
    targets[0, [20 * K + 1, 50 * K]] = 0
    labels = labels_for(table, secret=3, targets=targets)
    assert set(labels.block[0].tolist()) == {20, 50}
    assert set(zip(labels.block[0].tolist(), labels.now[0].tolist())) == {(20, 20 * K + 1), (50, 50 * K)}, "asked where the targets begin: behind them nothing is left to gain"
    nothing = labels_for(table, secret=3, targets=torch.full((1, T), IGNORE))
    assert not nothing.valid.any()


@pytest.mark.parametrize("K, Q", [(32, 20), (8, 70)])
def test_a_label_is_the_difference_of_two_forwards_over_the_row(K, Q):
    """The slow way: the whole row read with the block's line and with the edited one, for some rows of a batch."""
    gpt, gistnet, _ = tiny_networks(1)
    B, T, chosen = 3, Q * K, torch.tensor([True, False, True])
    ids = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(1))
    table = torch.stack([torch.from_numpy(draw_table(np.zeros(Q, dtype=int), K, np.random.default_rng(b), gists=1)) for b in range(B)])
    entries = row_entries(gpt, gistnet, ids[:, :-1], K)
    targets, positions, read = ids[:, 1:], entry_positions(T, K), RowRead()
    hidden = gpt.trunk(entries, positions, visibility(table, K), read)
    assert torch.equal(hidden, gpt.trunk(entries, positions, visibility(table, K))), "remembering changes nothing"
    some = Entries(entries.x[chosen], [value[chosen] for value in entries.values])
    labels = measure(gpt, some, InFront(read, torch.tensor([0, 2])), hidden[chosen], targets[chosen], table[chosen], K, [np.random.default_rng(b) for b in range(2)], 2, 3)
    assert labels.value.abs().max() > 0.01

    def nats(b, table, q, now):
        row = Entries(entries.x[b:b + 1], [value[b:b + 1] for value in entries.values])
        here = slice(now, (q + 1) * K)
        return gpt.loss(gpt.trunk(row, positions, visibility(table[None], K))[:, here], targets[b:b + 1, here], "none").sum()

    for i, b in enumerate((0, 2)):
        for p, q in enumerate(labels.block[i].tolist()):
            for v, changed in enumerate(labels.entry[i, p].tolist()):
                lines = {view: table[b].clone() for view in (GIST, RAW)}
                for view, line in lines.items():
                    line[q, changed] = view
                assert labels.valid[i, p, v]
                now = labels.now[i, p].item()
                assert abs(nats(b, lines[GIST], q, now) - nats(b, lines[RAW], q, now) - labels.value[i, p, v]) < 2e-3
