"""A row read once and asked again: the same numbers as reading the whole row anew for every question."""
import numpy as np
import pytest
import torch

import nanochat.gpt
from megacontext.layout import GIST, RAW, draw_table, entry_positions, shown, visibility
from megacontext.losses import row_entries
from megacontext.reread import AT_ONCE, Reading
from megacontext.span import BLOCK
from tests.tiny import VOCAB, tiny_networks

Q, B = 40, 2
T = Q * BLOCK


def a_row(seed):
    gpt, gistnet, _ = tiny_networks(seed)
    rng = np.random.default_rng(seed)
    ids = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    table = torch.from_numpy(draw_table(np.zeros(Q, dtype=int), BLOCK, rng)).expand(B, -1, -1)
    with torch.no_grad():
        entries = row_entries(gpt, gistnet, ids[:, :-1], BLOCK)
    return gpt, entries, ids[:, 1:], table, rng


def random_lines(rng, q, V):
    lines = np.stack([draw_table(np.zeros(Q, dtype=int), BLOCK, rng)[q] for _ in range(V)])
    lines[0] = 0 # nothing in view
    return torch.from_numpy(lines)


@pytest.mark.parametrize("seed", range(3))
def test_a_block_read_again_is_the_row_read_with_another_line(seed):
    """The slow way: a forward over the whole row for each line."""
    gpt, entries, targets, table, rng = a_row(seed)
    q, V = int(rng.integers(20, Q)), AT_ONCE + 3
    lines = random_lines(rng, q, V)
    fast = Reading(gpt, entries, targets, table).again(q * BLOCK, BLOCK, shown(lines, BLOCK))
    for v in (0, 1, AT_ONCE, V - 1):
        edited = table.clone()
        edited[:, q] = lines[v]
        with torch.no_grad():
            hidden = gpt.trunk(entries, entry_positions(T, BLOCK), visibility(edited, BLOCK))
            slow = gpt.loss(hidden[:, q * BLOCK:(q + 1) * BLOCK], targets[:, q * BLOCK:(q + 1) * BLOCK], "none")
        assert torch.allclose(fast[:, v], slow, atol=2e-4)
    assert (fast[:, 1] - fast[:, 0]).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(2))
def test_a_stretch_of_several_blocks_is_the_plain_gpt_behind_raw_tokens(seed):
    gpt, entries, targets, _, _ = a_row(seed)
    line = torch.where(torch.arange(Q) < 30, RAW, 0)[None]
    raw = torch.ones(Q, Q, dtype=torch.long).tril(-1).expand(B, -1, -1) * RAW
    reading = Reading(gpt, entries, targets, raw)
    H = 4 * BLOCK
    found, tokens = reading.again(30 * BLOCK, H, shown(line, BLOCK))[:, 0], slice(30 * BLOCK, 30 * BLOCK + H)
    with torch.no_grad():
        hidden = gpt.trunk(type(entries)(entries.x[:, :T], [value[:, :T] for value in entries.values]), torch.arange(T)[None], "causal")
        plain = gpt.loss(hidden, targets, "none")
    assert torch.allclose(found, plain[:, tokens], atol=2e-4), "everything raw: nothing has changed"
    assert torch.allclose(reading.again(30 * BLOCK, BLOCK, shown(line, BLOCK))[:, 0], found[:, :BLOCK], atol=2e-4), "a shorter horizon is the start of a longer one"


def test_nothing_of_the_stretch_sees_its_own_future():
    gpt, entries, targets, table, rng = a_row(0)
    line, start, H = random_lines(rng, 30, 2), 30 * BLOCK, 2 * BLOCK
    before = Reading(gpt, entries, targets, table).again(start, H, shown(line, BLOCK))
    cut = 40
    entries.x[:, start + cut:start + H] = torch.randn(B, H - cut, entries.x.size(2))
    after = Reading(gpt, entries, targets, table).again(start, H, shown(line, BLOCK))
    assert torch.allclose(before[..., :cut], after[..., :cut], atol=1e-4) and not torch.allclose(before[..., cut:], after[..., cut:], atol=1e-2)


def test_the_attention_is_the_models_own(monkeypatch):
    """The slow way: an attend() of our own that keeps its weights. Gists opened or not, they sum to what tokens leave over."""
    gpt, entries, targets, table, rng = a_row(1)
    q, H = 30, 2 * BLOCK
    line = shown(random_lines(rng, q, 2), BLOCK)[1]
    reading = Reading(gpt, entries, targets, table)
    found, kept = reading.attention(q * BLOCK, H, line), []

    def slow(queries, keys, values, see):
        scores = (queries @ keys.transpose(2, 3) / queries.size(-1) ** 0.5).masked_fill(~see, float("-inf"))
        kept.append(scores.softmax(-1))
        return kept[-1] @ values

    monkeypatch.setattr(nanochat.gpt, "attend", slow)
    reading.again(q * BLOCK, H, line[None])
    wanted = torch.stack(kept).mean(dim=(0, 2, 3))[:, :int(line.sum())] # over layers, heads, tokens
    assert torch.allclose(found[:, line], wanted, atol=1e-5) and (found[:, ~line] == 0).all()
    assert ((found.sum(1) > 0) & (found.sum(1) < 1)).all(), "the rest went to the tokens themselves"


def test_what_a_line_shows():
    line = torch.zeros(1, Q, dtype=torch.long)
    line[0, 0], line[0, 3] = RAW, GIST
    found = shown(line, BLOCK)[0].nonzero()[:, 0].tolist()
    assert found == [*range(BLOCK), T + 3] and shown(line, BLOCK).size(1) == T + Q + Q // BLOCK
