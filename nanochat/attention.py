"""
Attention over entries: who may look at whom, and where everybody stands.

An entry is a token or a gist; the attention does not know which. Visibility (`see`) is one of
    "causal"    row i sees columns 0..i of the same entries
    "all"       every row sees every column (one new token reading a cache)
    bool mask   (B or 1, 1, Nq, Nk), True where the query may look
    BlockMask   the same rule for FlexAttention, on CUDA
Positions come in as numbers, so a gist may stand anywhere, also between two tokens. Rotary angles are computed in fp32 for
the positions at hand (RoPE: Su et al., 2021; base 1e5 as in nanochat), there is no table to outgrow.

B = batch, N = entries, H = heads, d = head width
"""
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

ROPE_BASE = 100_000
_compiled_flex = None


def norm(x):
    """RMS norm without parameters."""
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
    grouped = q.size(1) != k.size(1)
    if isinstance(see, BlockMask):
        return _flex(q, k, v, see, grouped)
    if isinstance(see, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=grouped)
    if see == "causal":
        assert q.size(2) == k.size(2), f"causal needs as many queries as keys, got {q.size(2)} and {k.size(2)}"
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    assert see == "all", f"see is 'causal', 'all', a bool mask or a BlockMask, got {see!r}"
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def _flex(q, k, v, see, grouped):
    """FlexAttention skips the tiles that nobody sees, but only once compiled; uncompiled it would be slower than a mask."""
    global _compiled_flex
    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=False)
    return _compiled_flex(q, k, v, block_mask=see, enable_gqa=grouped)
