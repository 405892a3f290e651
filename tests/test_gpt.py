"""The GPT reads entries; plain text is a special case of them, in any order of chunks."""
import math

import pytest
import torch

from nanochat.attention import norm
from nanochat.gpt import GPT, IGNORE, Entries, GPTConfig, ReluSquared, causal_after
from nanochat.kv_cache import KVCache
from tests.tiny import VOCAB, stir, tiny_gpt


def test_entries_with_a_causal_mask_are_the_plain_gpt():
    """Law 8: the seam costs nothing. Same entries, same positions, visibility spelled out: same logits."""
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (2, 50))
    see = causal_after(0, 50, "cpu")
    through_the_seam = gpt.head(gpt.trunk(gpt.embed(ids), torch.arange(50.0)[None], see))
    assert torch.allclose(gpt(ids), through_the_seam, atol=1e-5)


def test_entries_may_come_in_any_order():
    """A row is a set of entries: shuffling them, with positions and visibility, shuffles the answers."""
    gpt, ids, N = tiny_gpt(), torch.randint(VOCAB, (1, 40)), 40
    order = torch.randperm(N)
    see = causal_after(0, N, "cpu")[:, :, order][:, :, :, order]
    entries = gpt.embed(ids)
    entries = Entries(entries.x[:, order], [value[:, order] for value in entries.values])
    shuffled = gpt.head(gpt.trunk(entries, torch.arange(N)[None, order], see))
    assert torch.allclose(gpt(ids)[:, order], shuffled, atol=1e-5)


def test_only_distances_matter():
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (1, 40))
    moved = gpt.head(gpt.trunk(gpt.embed(ids), 1000 + torch.arange(40)[None], "causal"))
    assert torch.allclose(gpt(ids), moved, atol=1e-3)


def test_reading_in_chunks_is_reading_at_once():
    """Elsewhere a chunk's first token lost sight of its neighbour and logits were off by 1.9 (chunked prefill)."""
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (2, 60))
    whole = gpt(ids)
    for cuts in ([60], [1] * 60, [7, 1, 30, 22], [59, 1]):
        cache, at = KVCache(gpt.config, 2, 60), 0
        for n in cuts:
            logits = gpt.extend(ids[:, at:at + n], cache)
            at += n
            assert torch.allclose(logits, whole[:, at - 1], atol=1e-4), f"cuts {cuts}, at {at}"


@pytest.mark.parametrize("windows", ["L", "SL"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_newest_alone_is_what_it_is_among_all(masked, windows):
    """What a prefill asks for: the same hidden state, and the same keys and values of all, though the last layer goes no further with the others."""
    gpt, ids, worked = stir(GPT(GPTConfig(VOCAB, 64, 3, width=32, windows=windows, short_window=7))), torch.randint(VOCAB, (2, 40)), []
    gpt.blocks[-1].mlp.register_forward_hook(lambda mlp, inputs, output: worked.append(output.size(1)))
    whole, alone = KVCache(gpt.config, 2, 40), KVCache(gpt.config, 2, 40)
    see = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril() & ~(torch.arange(40) == 3) | torch.eye(40, dtype=torch.bool) if masked else "causal"
    among, newest = (gpt.trunk(gpt.embed(ids), torch.arange(40)[None], see, cache, last) for cache, last in ((whole, False), (alone, True)))
    assert newest.shape == (2, 1, gpt.config.width) and torch.allclose(newest, among[:, -1:], atol=1e-5)
    assert torch.equal(whole.k, alone.k) and torch.equal(whole.v, alone.v) and alone.length == 40 and worked == [40, 1]


def test_the_future_is_invisible():
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (1, 40))
    changed = ids.clone()
    changed[:, 25:] = torch.randint(VOCAB, (1, 15))
    assert torch.equal(gpt(ids)[:, :25], gpt(changed)[:, :25])


def test_an_all_masked_batch_has_no_loss_and_no_nan():
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (2, 10))
    loss = gpt(ids, torch.full_like(ids, IGNORE))
    loss.backward()
    assert loss == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in gpt.parameters())


def test_mean_loss_counts_targets_only():
    gpt, ids = tiny_gpt(), torch.randint(VOCAB, (2, 10))
    targets = torch.randint(VOCAB, (2, 10))
    targets[0, :7] = IGNORE
    by_hand = -torch.log_softmax(gpt(ids), -1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)[targets != IGNORE]
    assert torch.allclose(gpt(ids, targets), by_hand.mean(), atol=1e-5)
    assert torch.allclose(gpt(ids, targets, "none").sum(), by_hand.sum(), atol=1e-4)


def test_a_fresh_model_knows_nothing():
    """Output projections start at zero, so the first loss is ln V to a hair."""
    torch.manual_seed(0)
    gpt, ids = GPT(GPTConfig(VOCAB, width=32)), torch.randint(VOCAB, (4, 30))
    assert abs(gpt(ids, torch.randint(VOCAB, (4, 30))).item() - math.log(VOCAB)) < 0.02


def test_relu_squared_has_the_derivative_of_its_formula():
    x = torch.randn(4, 50, requires_grad=True)
    outside = torch.randn(4, 50)
    slow = torch.autograd.grad(x.clamp(min=0) ** 2, x, outside)[0]
    assert torch.equal(ReluSquared.apply(x), x.clamp(min=0) ** 2)
    torch.testing.assert_close(torch.autograd.grad(ReluSquared.apply(x), x, outside)[0], slow, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_the_norm_in_training_is_pytorchs(dtype, scale):
    """Its value and its derivative, beside F.rms_norm in float64; for tiny x, where eps counts, and for x = 0."""
    x, outside = (torch.randn(4, 50, 64, dtype=torch.float64) * s for s in (scale, 1.0))
    x[0, 0] = 0
    x, outside = (t.to(dtype).double() for t in (x, outside))
    rough = x.to(dtype).requires_grad_()
    exact = x.clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(exact, (64,), eps=torch.finfo(torch.float32).eps)
    y, tolerance = norm(rough), 4 * torch.finfo(dtype).eps
    [slope], [expected_slope] = torch.autograd.grad(y, rough, outside.to(dtype)), torch.autograd.grad(expected, exact, outside)
    assert y.dtype == slope.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=tolerance, atol=8 * tolerance * expected_slope.abs().max().item())
    torch.testing.assert_close(norm(x.to(dtype)), y, rtol=tolerance, atol=0) # what inference has


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_checkpointed_activations_change_no_bit(amp):
    """Layers computed again in backward: the same loss, the same gradients, and what waits for backward is a fraction."""
    ids = torch.randint(VOCAB, (2, 60))
    results, kept = [], []
    for again in (False, True):
        gpt = tiny_gpt()
        gpt.checkpoint_activations, waiting = again, []
        with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: waiting.append(t.numel()) or t, lambda t: t):
                loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss, *(p.grad for p in gpt.parameters())])
        kept.append(sum(waiting))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert kept[1] < kept[0] / 2


def test_value_embeddings_sit_on_alternate_layers_and_the_last():
    assert GPTConfig(VOCAB, layers=5).value_layers == [0, 2, 4]
    assert GPTConfig(VOCAB, layers=4).value_layers == [1, 3]


def test_depth_is_the_one_dial():
    for depth, width in ((4, 256), (12, 768), (20, 1280), (5, 384)):
        config = GPTConfig.from_depth(depth, VOCAB)
        assert (config.layers, config.width, config.head_width) == (depth, width, 128)


def slow_embedding(gpt, ids):
    """The embedding of the last of ids, one product a token before it."""
    table = torch.nn.functional.rms_norm(gpt.embed_table.weight, (gpt.config.width,))
    x, weights = table[ids[-1]].clone(), gpt.previous.weight.split(gpt.config.width, dim=1)
    for back, weight in enumerate(weights, 1):
        if back >= len(ids) or gpt.config.bos in ids[-back:] or ids[-1 - back] < 0:
            break
        x = x + weight @ table[ids[-1 - back]]
    return torch.nn.functional.rms_norm(x, x.shape)


def test_an_embedding_knows_the_tokens_before_it_of_its_own_document():
    """
    Against one product at a time, in one row, behind tokens given as `before`, and with padding (-1) in front. Elsewhere the first token of a packed
    document was smeared with the last of another (bug B8 of the reference).
    """
    gpt = tiny_gpt()
    gpt.config = GPTConfig(**(gpt.config.to_dict() | {"bos": 5}))
    for row in ([1, 2, 3, 4, 6, 7, 8, 9], [1, 2, 5, 3, 4, 6, 7, 8], [5, 1, 5, 5, 2, 3, 4, 6], [-1, -1, -1, 9, 8, 7, 6, 4]):
        wanted = torch.stack([slow_embedding(gpt, row[:n + 1]) for n in range(len(row)) if row[n] >= 0])
        skip = len(row) - len(wanted)
        torch.testing.assert_close(gpt.embed(torch.tensor([row])).x[0, skip:], wanted)
        for start in range(max(1, skip), len(row)):
            behind = gpt.embed(torch.tensor([row[start:]]), torch.tensor([row[:start]]))
            torch.testing.assert_close(behind.x[0], wanted[start - skip:])
