"""
fp8 training of large linear layers: products of 8-bit floats, twice as fast as bf16 on GPUs that have them (Hopper, Ada, Blackwell).

Each tensor is scaled so that its largest number just fits, anew every time (tensorwise dynamic scaling), and rounded to e4m3 (weights and
activations: 3 bits of precision, up to 448) or e5m2 (gradients: 2 bits, up to 57,344). The product is accumulated in fp32 by
torch._scaled_mm. Parameters, optimizer and everything that is not such a product stay as they are, and a layer that does not learn
right now (evaluation, generation, the pricing of edits) computes as ever. The head is left out: its loss comes in pieces
(cross_entropy.py), and nanochat measured 1% for it.

n = tokens, k = width in, m = width out
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import UserError

ROUND, LEAST = 16, 128  # dimensions that the kernel takes, and from where on it pays
CAPABILITY = (8, 9)


def check(machine, dtype):
    """Refuse --fp8 where it cannot run."""
    if machine.device != "cuda" or machine.capability < CAPABILITY:
        has = "which has none" if machine.device != "cuda" else f"which has {machine.capability[0]}.{machine.capability[1]}"
        raise UserError(f"--fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more (Ada, Hopper, Blackwell), this is {machine.name}, {has}. Leave --fp8 out")
    if dtype != torch.bfloat16:
        raise UserError(f"--fp8 goes with bf16 activations, --dtype asks for {dtype}. Use --dtype bf16, or leave --fp8 out")


def quantise(x, dtype):
    """x -> (x / scale in 8 bits, scale), the scale such that the largest number just fits. Zeros stay zeros."""
    scale = (x.abs().amax().float() / torch.finfo(dtype).max).clamp(min=1e-12)
    return (x.float() / scale).to(dtype), scale


def product(a, b, scale_a, scale_b):
    """a (n, k) @ b.T for b (m, k), both in 8 bits -> (n, m) in bf16."""
    return torch._scaled_mm(a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


def turned(x):
    """The transpose, in memory too: the kernel reads both operands along the dimension that is summed."""
    return x.T.contiguous()


class Fp8Product(torch.autograd.Function):
    """x (n, k), weight (m, k) -> x @ weight.T, with all three products of forward and backward in 8 bits. n is a multiple of 16."""

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_scale = quantise(x, torch.float8_e4m3fn)
        w8, w_scale = quantise(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.types = x.dtype, weight.dtype
        return product(x8, w8, x_scale, w_scale)

    @staticmethod
    def backward(ctx, outside):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(outside, torch.float8_e5m2)
        d_x = product(g8, turned(w8), g_scale, w_scale)                  # (n, m) @ (m, k)
        d_weight = product(turned(g8), turned(x8), g_scale, x_scale)     # (m, n) @ (n, k)
        return d_x.to(ctx.types[0]), d_weight.to(ctx.types[1])


class Fp8Linear(nn.Linear):
    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        flat = x.reshape(-1, self.in_features)
        n = len(flat)
        padded = F.pad(flat, (0, 0, 0, -n % ROUND)) # gists make rows of odd lengths
        return Fp8Product.apply(padded, self.weight)[:n].view(*x.shape[:-1], self.out_features)


def suits(module):
    return type(module) is nn.Linear and module.bias is None and all(size % ROUND == 0 and size >= LEAST for size in module.weight.shape)


def convert(gpt):
    """Let the linear layers of the trunk that suit compute in fp8; weights and their names stay. Returns how many do."""
    chosen = [module for module in gpt.blocks.modules() if suits(module)]
    for module in chosen:
        module.__class__ = Fp8Linear
    return len(chosen)
