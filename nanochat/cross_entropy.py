"""
Next-token loss without all the logits at once: the soft-capped cross-entropy of hidden states, a piece of the tokens at a time.

Logits are by far the largest tensor of a small model (8,192 tokens x 32,768 ids in fp32: 1 GiB, held four times by autograd). Here a
piece's logits are turned, in place, into the gradient of its loss as soon as they are there, and into the gradients of the hidden
states and of the head right after, so nothing of size tokens x V outlives its piece and nothing is computed twice. (Cut Cross-Entropy,
arXiv 2411.09009, and Liger do the same in one kernel.) The loss is a sum, so its gradients wait for one number from outside.

n = tokens, D = width, V = vocabulary
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -1    # a target that has no loss
SOFTCAP = 15.0
# fp32 logits of a piece, in numbers. CPU: 8 MiB stay in the cache from pass to pass. GPU: a quarter GiB keeps the matrix units busy
PIECE = {"cpu": 2**21, "cuda": 2**26, "mps": 2**25}


def softcap(logits):
    """Logits in fp32, softly capped at +-15."""
    return SOFTCAP * torch.tanh(logits.float() / SOFTCAP)


def piece_tokens(device_type, vocab_size):
    """Tokens whose logits may live at the same time."""
    return max(1, PIECE[device_type] // vocab_size)


def nats_and_slope_(logits, targets):
    """
    logits (n, V) fp32 before the soft cap, targets (n,) -> nats (n,), 0 where there is no target. The logits are overwritten by the
    gradient of the sum of the nats. exp of a capped logit cannot overflow, so no maximum is taken out first.
    """
    there = (targets != IGNORE)[:, None]
    index = targets.clamp(min=0)[:, None]
    u = logits.div_(SOFTCAP).tanh_()
    target = u.gather(1, index)
    e = (u * SOFTCAP).exp_()
    total = e.sum(dim=1, keepdim=True)
    nats = (total.log() - SOFTCAP * target) * there
    u.square_()                                                   # d cap(z) / dz = 1 - u^2
    torch.addcmul(e, e, u, value=-1, out=u)                       # softmax x (1 - u^2), times total
    u.scatter_add_(1, index, total * (target.square() - 1))       # the target's own -1 x (1 - u^2)
    u.mul_(there / total)
    return nats.squeeze(1)


class TotalNats(torch.autograd.Function):
    """hidden (n, D), weight (V, D), targets (n,) -> the sum of their nats; both gradients are computed along with it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, piece, nats_and_slope_):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            nats = torch.zeros((), device=hidden.device)
            to_hidden, to_weight = ctx.needs_input_grad[:2]
            d_hidden = torch.empty_like(hidden) if to_hidden else None
            d_weight = torch.zeros_like(weight) if to_weight else None
            for part in (slice(i, i + piece) for i in range(0, len(targets), piece)):
                slope = (h[part] @ w.T).float()
                nats += nats_and_slope_(slope, targets[part]).sum()
                slope = slope.to(dtype)
                if to_hidden:
                    d_hidden[part] = slope @ w
                if to_weight and dtype == d_weight.dtype:
                    d_weight.addmm_(slope.T, h[part])
                elif to_weight:
                    d_weight += slope.T @ h[part]
        ctx.save_for_backward(d_hidden, d_weight)
        return nats

    @staticmethod
    def backward(ctx, outside):
        return *(None if d is None else d * outside for d in ctx.saved_tensors), None, None, None


def token_nats(head, hidden, targets, piece):
    """
    hidden (n, D), targets (n,) -> nats (n,), in pieces; each token's loss may be weighed differently afterwards, so where gradients are
    asked for, a piece's logits are computed a second time in backward. head: hidden -> soft-capped logits.
    """
    nats = lambda hidden, targets: F.cross_entropy(head(hidden), targets, ignore_index=IGNORE, reduction="none")
    if len(targets) <= piece:
        return nats(hidden, targets)
    again = lambda *part: checkpoint(nats, *part, use_reentrant=False, preserve_rng_state=False)
    run = again if torch.is_grad_enabled() else nats
    return torch.cat([run(*part) for part in zip(hidden.split(piece), targets.split(piece))])
