"""One row, many working contexts: the fast mask against a slow one, and nothing ever leaks from the future."""
import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from megacontext.layout import FAN, GIST, HIDDEN, NODE, RAW, STRETCH, block_mask, draw_table, entry_positions, full_table, stretches, trial_masks, visibility, visibility_rule
from megacontext.losses import row_entries
from nanochat.attention import attend
from tests.tiny import VOCAB, tiny_networks


def random_row(seed, K=4, Q=70):
    rng = np.random.default_rng(seed)
    docs = np.sort(rng.integers(0, 3, Q)) if seed % 2 else np.zeros(Q, dtype=int)
    return docs, draw_table(docs, K, rng, tail=(0, 8 * K)), rng


def slow_visibility(table, K):
    """May row entry i look at column entry j? One pair at a time, from the words of layout.py."""
    Q = len(table)
    T, G = Q * K, Q // FAN
    N = T + Q + G
    see = np.zeros((N, N), dtype=bool)

    def line_allows(line, j):
        if j < T:
            return line[j // K] == RAW
        if j < T + Q:
            return line[j - T] == GIST
        return line[(j - T - Q) * FAN] == NODE

    for i in range(N):
        for j in range(N):
            if i < T:
                see[i, j] = (j <= i and j // K == i // K) if j < T and j // K == i // K else line_allows(table[i // K], j)
            else:
                see[i, j] = i == j
    return see


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_the_rule(seed):
    _, table, _ = random_row(seed)
    assert np.array_equal(visibility(torch.from_numpy(table)[None], 4)[0, 0].numpy(), slow_visibility(table, 4))


def random_batch(seed, K=4, Q=70):
    """The tables of two rows."""
    return torch.stack([torch.from_numpy(random_row(seed + i, K, Q)[1]) for i in (0, 10)])


@pytest.mark.parametrize("K, Q", [(4, 70), (4, 96), (32, 8), (32, 33), (8, 96), (16, 64)])
def test_the_flex_rule_is_the_mask(K, Q):
    """Also which tiles of 128 x 128 may be skipped and which need no rule, whether the row ends with a tile or not."""
    table = random_batch(0, K, Q)
    dense = visibility(table, K)
    N, rule = dense.size(-1), visibility_rule(table, K)
    assert torch.equal(create_mask(rule, 2, None, N, N, device="cpu"), dense)
    slow, fast = create_block_mask(rule, 2, None, N, N, device="cpu"), block_mask(table, K)
    assert fast.shape == slow.shape and fast.BLOCK_SIZE == slow.BLOCK_SIZE

    def tiles(count, columns):
        return [[sorted(line[:n].tolist()) for n, line in zip(*row)] for row in zip(count[:, 0], columns[:, 0])]

    for name in ("kv", "full_kv", "q", "full_q"): # q: what the backward pass walks along
        args = ([getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")] for mask in (fast, slow))
        assert tiles(*next(args)) == tiles(*next(args)), name


@pytest.mark.parametrize("K, Q", [(4, 70), (4, 96), (32, 8), (32, 33), (8, 96), (16, 64)])
def test_stretches_are_the_mask_without_what_it_rules_out(K, Q):
    """Put together they are the mask; and attending by either gives the same, gradients too, where heads share keys."""
    table = random_batch(0, K, Q)
    dense, see = visibility(table, K), stretches(table, K)
    N = dense.size(-1)
    whole, seen = torch.zeros_like(dense), 0
    for rows, columns, mask in see.pieces:
        assert rows.start == seen
        seen = rows.stop
        index = torch.arange(N)
        if mask is None:
            whole[:, :, index[rows], index[rows]] = True
        else:
            wanted = torch.cat([index[part] for part in columns])
            whole[:, :, index[rows][:, None], wanted] = mask
    assert seen == N and torch.equal(whole, dense)
    assert len(see.pieces) == -(-Q * K // STRETCH) + 1, "tokens, gists"
    q, k, v = (torch.randn(2, heads, N, 8, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for rule in (see, dense):
        y = attend(q, k, v, rule)
        results.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_full_tiles_are_found():
    """A row read raw throughout: of its 3 x 3 tiles, the 3 below the diagonal hold no rule, the 3 on it do, the rest are skipped."""
    mask = block_mask(full_table(torch.zeros(1, 12, dtype=torch.long)), 32)
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 0] and mask.kv_num_blocks[0, 0].tolist() == [1, 1, 1, 1], "the fourth row of tiles is gists"


def test_flex_attention_is_the_dense_mask():
    gpt, gistnet, _ = tiny_networks()
    K, Q = 8, 70
    table = random_batch(0, K, Q)
    entries = row_entries(gpt, gistnet, torch.randint(VOCAB, (2, Q * K)), K)
    positions = entry_positions(Q * K, K)
    with torch.no_grad():
        flex, dense = (gpt.trunk(entries, positions, see(table, K)) for see in (block_mask, visibility))
    torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_compiled_flex_attention_is_the_dense_mask():
    """Forward and backward through the whole GPT, as in a training step."""
    gpt, gistnet, _ = (network.cuda() for network in tiny_networks(width=64))
    K, Q = 8, 70
    table = random_batch(0, K, Q).cuda()
    ids, results = torch.randint(VOCAB, (2, Q * K)).cuda(), []
    for see in (block_mask, visibility):
        entries = row_entries(gpt, gistnet, ids, K)
        hidden = gpt.trunk(entries, entry_positions(Q * K, K, "cuda"), see(table, K))
        networks = [*gpt.blocks.parameters(), *gistnet.parameters()]
        results.append([hidden, *(g for g in torch.autograd.grad(hidden.square().mean(), networks, allow_unused=True) if g is not None)])
    for flex, dense in zip(*results, strict=True):
        assert (flex - dense).norm() <= 0.02 * dense.norm() + 1e-5


def test_the_trial_tries_every_kind_of_view():
    block, dense = trial_masks("cpu")
    N = dense.size(-1)
    assert N % 128, "a row that does not end with a tile is the harder case"
    assert torch.equal(create_mask(block.mask_mod, 1, None, N, N, device="cpu"), dense)
    T, Q = 16 * 83, 83
    assert dense[..., :T, T:T + Q].any() and dense[..., :T, T + Q:].any(), "gists, level-2 gists"


@pytest.mark.parametrize("seed", range(30))
def test_drawn_contexts_are_legal(seed):
    """Every earlier block of the document is covered once or given up as a whole; level-2 gists cover all 32 or none; nobody else's."""
    docs, table, _ = random_row(seed)
    for q, line in enumerate(table):
        assert (line[q:] == HIDDEN).all(), "the present and the future are never context"
        assert (line[docs != docs[q]] == HIDDEN).all(), "another document's blocks are never visible"
        before = line[:q][docs[:q] == docs[q]]
        if (before == GIST).any() or (before == NODE).any():
            assert (before != HIDDEN).all(), "with gists, a context tiles its document"
        for n in range(len(line) // FAN):
            family = line[n * FAN:(n + 1) * FAN]
            assert (family == NODE).all() or (family != NODE).all(), "a level-2 gist stands for all 32 blocks or for none"


def test_every_kind_of_view_is_drawn():
    seen = set()
    for seed in range(20):
        seen |= set(np.unique(random_row(seed)[1]))
    assert seen == {HIDDEN, RAW, GIST, NODE}


@pytest.mark.parametrize("seed", range(3))
def test_nothing_leaks_from_the_future(seed):
    """A gist sums up a whole block, so a wrong mask would show a token its own future. Change the future: the past must not move."""
    gpt, gistnet, _ = tiny_networks()
    K, Q = 8, 70
    _, table, rng = random_row(seed, K, Q)
    ids = torch.randint(VOCAB, (1, Q * K))
    for cut in rng.integers(1, Q * K, 6):
        changed = ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 1 + torch.randint(VOCAB - 1, (1, Q * K - cut))) % VOCAB
        hidden = [gpt.trunk(row_entries(gpt, gistnet, x, K), entry_positions(Q * K, K), visibility(torch.from_numpy(table)[None], K)) for x in (ids, changed)]
        assert torch.allclose(hidden[0][:, :cut], hidden[1][:, :cut], atol=1e-5), f"token {cut} reached back"
        assert not torch.allclose(hidden[0][:, cut], hidden[1][:, cut]), "the change itself must show"


def test_a_context_of_raw_blocks_is_the_plain_gpt():
    """Law 8, identity."""
    gpt, gistnet, _ = tiny_networks()
    K, Q = 8, 40
    ids, docs = torch.randint(VOCAB, (2, Q * K)), torch.zeros(2, Q, dtype=torch.long)
    hidden = gpt.trunk(row_entries(gpt, gistnet, ids, K), entry_positions(Q * K, K), visibility(full_table(docs), K))
    assert torch.allclose(gpt.head(hidden[:, :Q * K]), gpt(ids), atol=1e-4)


def test_a_gist_stands_at_the_centre_of_its_span():
    """Law 5. 2 blocks of 4 tokens: tokens 0..7, gists at 1.5 and 5.5."""
    assert entry_positions(8, 4)[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1.5, 5.5]
    assert entry_positions(FAN * 4, 4)[0, -1] == (FAN * 4 - 1) / 2
