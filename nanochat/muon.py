"""
One Muon step: momentum in, the nearest orthogonal matrix out, with the refinements that paid.

Muon (Jordan et al., kellerjordan.github.io/posts/muon) moves a matrix by the nearest orthogonal matrix to its momentum,
so that every direction learns equally fast. The recipe here is nanochat's of 2026, one function per line:
  nesterov            momentum with a look-ahead
  polar_express       5 quintic steps to the polar factor (arXiv 2505.16932)
  snap_norm           Muon+: the Frobenius norm that an exact polar factor has
  normalize_variance  NorMuon: divide by a factored running RMS, overall norm kept (arXiv 2510.05491)
  muon_step           all of them, then the step with weight decay
Two of nanochat's are left out, which paid nothing here over three seeds (LOG.md, 2026-11-27): MuonEq, rows to equal length before
orthogonalising, and weight decay only where the step already moves a weight towards zero (arXiv 2510.12402).

Every function takes a stack (K, m, n): K matrices of one shape.
"""

import torch

# Five odd quintics a x + b x^3 + c x^5. Composed they send every singular value in [1e-3, 1] to 1 +- 0.13 (each row is
# the minimax polynomial for the interval that the rows before it leave; greedy is optimal, arXiv 2505.16932 theorem 3.1).
# All but the last are evaluated at x / 1.02, so that rounding in bf16 cannot push a value beyond the interval.
# tests/test_optim.py derives these numbers again.
POLAR_EXPRESS = (
    (8.124717664848651, -22.234930870384343, 15.669493810949838),
    (4.0265285407276465, -2.7778248154347778, 0.4934811897041597),
    (3.8712655426296996, -2.7411234328830405, 0.4997995960419331),
    (3.2533526052652944, -2.3449578445647545, 0.4619670395911473),
    (2.3006520199548177, -1.6689039845747486, 0.41880731195256665),
)
EPS = 1e-20  # guards divisions by the norm of an all-zero gradient (the first step after zero-initialised projections)


def nesterov(grad, buffer, momentum):
    """Running mean of gradients, updated in place; returns the look-ahead mix of it and the newest gradient."""
    buffer.mul_(momentum).add_(grad * (1 - momentum))
    return grad * (1 - momentum) + buffer * momentum


def polar_express(update, dtype=torch.float32):
    """
    Nearest orthogonal matrix, about: U S V^T -> U V^T with singular values in 1 +- 0.13. Products run in `dtype`.
    Works on the wide side, so that the Gram matrix is the small one. Of a matrix twice as wide as high or more, in fp32, only the Gram matrix goes through
    the steps: X's next one is P X, the Gram matrix's P G P, and the product of all P meets X once. (Squared singular values do not bear bf16.)
    """
    tall = update.size(-2) > update.size(-1)
    X = update.mT if tall else update
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.01).clamp_min(EPS)  # largest singular value <= 1, with room to round
    X = X.to(dtype).contiguous()
    if dtype == torch.float32 and X.size(-1) >= 2 * X.size(-2):
        X = _product(X @ X.mT) @ X
        return (X.mT if tall else X).to(update.dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = X @ X.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, poly, X, beta=a)                    # a X + (b A + c A^2) X
    return (X.mT if tall else X).to(update.dtype)


def _product(gram):
    """The product of the five P = a I + b G + c G^2, G being the Gram matrix (K, m, m) before the first, between them P G P."""
    product = None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        product = poly if product is None else poly @ product
        if i + 1 < len(POLAR_EXPRESS):
            gram = poly @ gram @ poly
    return product


def snap_norm(update):
    """Muon+: an exact polar factor has Frobenius norm sqrt(min(m, n)); give the approximate one the same."""
    exact = min(update.shape[-2:]) ** 0.5
    return update * (exact / update.norm(dim=(-2, -1), keepdim=True).clamp_min(EPS))


def variance_dim(m, n):
    """NorMuon averages squares along the shorter side of the matrix: the running mean has one number per long-side line."""
    return -1 if m >= n else -2


def normalize_variance(update, variance, beta2):
    """NorMuon: divide each line by its running RMS, then restore the norm of the whole. variance is updated in place."""
    mean_square = update.square().mean(dim=variance_dim(*update.shape[-2:]), keepdim=True)
    variance.mul_(beta2).add_(mean_square * (1 - beta2))
    scaled = update * variance.clamp_min(1e-10).rsqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, scaled))
    return scaled * (before / after.clamp_min(EPS))


def muon_step(params, grads, buffer, variance, lr, momentum, beta2, weight_decay, dtype):
    """One Muon step on a stack (K, m, n); params, buffer and variance change in place."""
    update = nesterov(grads, buffer, momentum)
    update = polar_express(update, dtype)
    update = snap_norm(update)
    update = normalize_variance(update, variance, beta2)
    m, n = params.shape[-2:]
    lr = lr * max(1.0, m / n) ** 0.5  # a tall matrix: keep the RMS change of its outputs the same
    params.mul_(1 - lr * weight_decay).sub_(lr * update)


def muon_dtype(device):
    """bf16 where matrix units exist for it; elsewhere emulated bf16 is slower and coarser than fp32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32
