"""The loss a piece at a time is the loss at once: the same nats, the same gradients, and never more logits than a piece has."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import cross_entropy
from nanochat.cross_entropy import IGNORE, nats_and_slope_, softcap
from tests.tiny import VOCAB, tiny_gpt

SHAPE = (3, 37)


@pytest.fixture(params=[1, 10, 64, 1000])
def piece(request, monkeypatch):
    """Tokens of a piece: one, some that do not divide the whole, more than there are."""
    monkeypatch.setitem(cross_entropy.PIECE, "cpu", request.param * VOCAB)
    return request.param


def sample(masked=0.3, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(*SHAPE, 32, generator=g)
    targets = torch.randint(VOCAB, SHAPE, generator=g)
    targets[torch.rand(SHAPE, generator=g) < masked] = IGNORE
    return hidden.requires_grad_(), targets


def at_once(gpt, hidden, targets, reduction):
    """The slow twin: all logits, PyTorch's own cross-entropy and derivatives."""
    logits = softcap(F.linear(hidden, gpt.lm_head.weight))
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(targets)
    return {"none": nats, "sum": nats.sum(), "mean": nats.sum() / (targets != IGNORE).sum().clamp(min=1)}[reduction]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("masked, scale, amp", [(0.3, 1, None), (1.0, 1, None), (0.0, 30, None), (0.3, 1, torch.bfloat16)])
def test_pieces_are_the_whole(piece, reduction, masked, scale, amp):
    """Scale 30 drives logits into the cap, where exp is largest and the slope of the cap vanishes."""
    gpt, (hidden, targets) = tiny_gpt(), sample(masked, scale=scale)
    weights = torch.linspace(-1, 2, targets.numel()).view(SHAPE) if reduction == "none" else 0.37 # each token's own weight, as in chat_rl
    wanted = hidden, gpt.lm_head.weight
    results = []
    for loss in (gpt.loss, lambda *args: at_once(gpt, *args)):
        with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
            nats = loss(hidden, targets, reduction)
        results.append([nats.detach(), *torch.autograd.grad((nats * weights).sum(), wanted)])
    for got, want in zip(*results):
        assert got.shape == want.shape and got.dtype == want.dtype and torch.isfinite(got).all()
        assert (got - want).norm() <= (2e-2 if amp else 2e-6) * want.norm() + 1e-12


def test_without_gradients_the_loss_is_the_same(piece):
    gpt, (hidden, targets) = tiny_gpt(), sample()
    for reduction in ("sum", "mean", "none"):
        with torch.no_grad():
            quiet = gpt.loss(hidden, targets, reduction)
        torch.testing.assert_close(quiet, gpt.loss(hidden, targets, reduction).detach(), rtol=1e-6, atol=1e-5)


def test_a_frozen_head_passes_gradients_on_and_gets_none():
    gpt, (hidden, targets) = tiny_gpt(), sample()
    gpt.lm_head.weight.requires_grad_(False)
    gpt.loss(hidden, targets, "sum").backward()
    assert hidden.grad.abs().max() > 0 and gpt.lm_head.weight.grad is None


def test_by_hand():
    """Two ids, logits 0 and 0: ln 2 nats, and slopes -1/2 and 1/2 (the cap has slope 1 at 0). A masked row has neither."""
    logits = torch.zeros(2, 2)
    nats = nats_and_slope_(logits, torch.tensor([0, IGNORE]))
    assert nats.tolist() == pytest.approx([0.693147, 0])
    assert logits.tolist() == [[-0.5, 0.5], [0, 0]]


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that comes into being."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_more_logits_than_a_piece_has(monkeypatch, reduction):
    """64 tokens a piece of 111: nothing larger than 64 x V is made in forward or backward (the hidden states are smaller)."""
    monkeypatch.setitem(cross_entropy.PIECE, "cpu", 64 * VOCAB)
    gpt, (hidden, targets) = tiny_gpt(), sample()
    with Largest() as largest:
        gpt.loss(hidden, targets, reduction).sum().backward()
    assert largest.size == max(64 * VOCAB, hidden.numel())
    with Largest() as largest:
        at_once(gpt, hidden, targets, reduction).sum().backward()
    assert largest.size == targets.numel() * VOCAB
