"""
Attention over entries: who may look at whom, and where everybody stands.

An entry is a token or a gist; the attention does not know which. Visibility (`see`) is one of
    "causal"    row i sees columns 0..i of the same entries
    "all"       every row sees every column (one new token reading a cache)
    a mask      (B or 1, 1, Nq, Nk): bool, True where the query may look, or numbers that are added to the scores
    Stretches   the same rule in pieces, without the columns that a piece of the queries never sees
    BlockMask   the same rule for FlexAttention, on CUDA
    Recent      the newest of what "causal" or "all" shows, or all of "causal" on FlashAttention 3
    a list      for each row of the batch what it may see of keys and values of its own: k and v are as many, (1, H, Nk, d) of any length
Positions come in as numbers, so a gist may stand anywhere, also between two tokens. Rotary angles are computed in fp32 for
the positions at hand (RoPE: Su et al., 2021; base 1e5 as in nanochat), there is no table to outgrow.

B = batch, N = entries, H = heads, d = head width
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROPE_BASE = 100_000
FLEX_SHAPES = 64 # rows x entries that FlexAttention may be compiled for; past PyTorch's 8 it would run uncompiled, scores and all
_compiled_flex = None


@dataclass(frozen=True)
class Stretches:
    """
    The queries in consecutive pieces, each (its rows, the parts of the columns that it may see, a bool mask (B or 1, 1, rows, columns) over these),
    rows and parts as slices. No mask: each of the rows sees itself and nothing else.
    """
    pieces: list


@dataclass(frozen=True)
class Recent:
    """The queries are the newest of the keys, and each sees the `window` keys up to its own place."""
    window: int | None              # None = all of them
    flash: Callable | None = None   # FlashAttention 3, (q, k, v, window) -> y, where nanochat/backend.py chose it; None = SDPA


class UnitRMS(torch.autograd.Function):
    """
    F.rms_norm for training on a CPU, where PyTorch makes it of many small steps: y = r x with r = 1 / RMS(x) has dx = r (dy - y mean(dy y)), three passes over memory.
    """

    @staticmethod
    def forward(ctx, x):
        dtype = torch.promote_types(x.dtype, torch.float32) # F.rms_norm computes in it, and takes its eps
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        r = (length.square() / x.size(-1) + torch.finfo(dtype).eps).rsqrt()
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx, outside):
        y, r = ctx.saved_tensors
        dtype, y, outside = y.dtype, y.to(r.dtype), outside.to(r.dtype)
        along = torch.linalg.vecdot(outside, y)[..., None] / y.size(-1)
        return torch.addcmul(outside, y, along, value=-1).mul_(r).to(dtype)


def norm(x):
    """RMS norm without parameters."""
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled():
        return UnitRMS.apply(x)
    return F.rms_norm(x, (x.size(-1),))


def rope_angles(positions, head_width):
    """positions (B or 1, N), any real numbers -> cos, sin, each (B or 1, 1, N, d/2) in fp32, to broadcast over heads."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    theta = positions.float()[:, None, :, None] * ROPE_BASE ** -exponents
    return theta.cos(), theta.sin()


def rotate(x, cos, sin):
    """x (B, H, N, d) turned by its angles. Turning twice adds the angles; turning by (cos, -sin) undoes it."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1).to(x.dtype)


def attend(q, k, v, see):
    """q (B, H, Nq, d), k and v (B, Hkv, Nk, d) -> (B, H, Nq, d)."""
    if isinstance(see, list):
        return torch.cat([attend(q[row:row + 1], *own) for row, own in enumerate(zip(k, v, see, strict=True))])
    grouped = q.size(1) != k.size(1)
    if isinstance(see, BlockMask):
        return _flex(q, k, v, see, grouped)
    if isinstance(see, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=grouped)
    if isinstance(see, Stretches):
        return torch.cat([_piece(q, k, v, *piece) for piece in see.pieces], dim=2)
    if isinstance(see, Recent):
        return see.flash(q, k, v, see.window) if see.flash is not None else _recent(q, k, v, see.window)
    if see == "causal":
        assert q.size(2) == k.size(2), f"causal needs as many queries as keys, got {q.size(2)} and {k.size(2)}"
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    assert see == "all", f"see is 'causal', 'all', a bool mask, Stretches, a BlockMask or Recent, got {see!r}"
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def _piece(q, k, v, rows, columns, mask):
    if mask is None: # the softmax of one score is 1
        return v[:, :, rows].repeat_interleave(q.size(1) // v.size(1), dim=1)
    k, v = (torch.cat([t[:, :, part] for part in columns], dim=2) for t in (k, v))
    return attend(q[:, :, rows], k, v, mask)


def in_window(rows, columns, window):
    """Places of queries (..., Nq) and of keys (..., Nk) -> bool (..., Nq, Nk): the key is one of the `window` up to the query's own."""
    distance = rows[..., :, None] - columns[..., None, :]
    return (distance >= 0) & (distance < window)


def _recent(q, k, v, window):
    """
    Half a window of queries at a time, with their own keys and the `window` before them: 1.5 x window columns a row, in memory and
    in work, where a mask over everything has Nk. (A whole window at a time is slower on a CPU: 1.2 x in fp32 and in bf16.)
    """
    Nq, Nk, step = q.size(2), k.size(2), -(-window // 2)
    if Nq == 1:
        return attend(q, k[:, :, -window:], v[:, :, -window:], "all")
    pieces = []
    for first in range(Nk - Nq, Nk, step): # columns of the queries
        start, stop = max(0, first - window), min(first + step, Nk) # columns of their keys
        rows, columns = torch.arange(first, stop, device=q.device), torch.arange(start, stop, device=q.device)
        see = in_window(rows, columns, window)[None, None] if first else "causal"
        pieces.append(attend(q[:, :, first - Nk + Nq:stop - Nk + Nq], k[:, :, start:stop], v[:, :, start:stop], see))
    return torch.cat(pieces, dim=2)


def _flex(q, k, v, see, grouped):
    """FlexAttention skips the tiles that nobody sees, but only once compiled; uncompiled (on a CPU, for tests) it is slower than a mask."""
    global _compiled_flex
    q, k = q.to(v.dtype), k.to(v.dtype) # autocast may have normed them in fp32
    if not q.is_cuda:
        return flex_attention(q, k, v, block_mask=see, enable_gqa=grouped)
    if _compiled_flex is None:
        torch._dynamo.config.recompile_limit = max(FLEX_SHAPES, torch._dynamo.config.recompile_limit)
        _compiled_flex = torch.compile(flex_attention, dynamic=False)
    return _compiled_flex(q, k, v, block_mask=see, enable_gqa=grouped)
