"""
What computes attention in a run, picked at its start: the fastest kernel that really runs here, and the reason, to print.

In:  the machine, the number format, the heads. Out: a Kernel (name, why, function).
The idea: trust nothing but a trial. A kernel may be installed, load, and die at its first launch ("no kernel image" of FlashAttention 3 on
Blackwell), or run and be wrong. So each is tried on a small case, forward and backward, beside SDPA; what fails is told, and SDPA runs.

H = heads, N = entries, d = head width
"""
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat.attention import Recent, attend, in_window

HOPPER = (9, 0)
FLASH_REPO = ("kernels-community/flash-attn3", 1) # where the `kernels` package fetches FlashAttention 3, and which version
CLOSE = 0.02 # relative error in a trial; bf16 rounds by 0.004


@dataclass(frozen=True)
class Kernel:
    name: str
    why: str
    run: Callable | None = None # FlashAttention 3: (q, k, v, window) -> y. The others are attend()'s own

    def __str__(self):
        return f"{self.name}: {self.why}"


def pick_causal(machine, device, dtype, heads, kv_heads, head_width, find=None):
    """What computes plain causal attention, with windows and without: FlashAttention 3 or SDPA."""
    sdpa = lambda why: Kernel("SDPA", why)
    if machine.device != "cuda":
        return sdpa("no CUDA device")
    if machine.capability != HOPPER:
        return sdpa(f"FA3 is made for compute capability 9.0, {machine.name} has {machine.capability[0]}.{machine.capability[1]}")
    if dtype != torch.bfloat16:
        return sdpa(f"FA3 is used in bfloat16 only, and this run is in {str(dtype).removeprefix('torch.')}")
    try:
        found = (find or find_flash)()
        if found is None:
            return sdpa("FA3 is not installed (flash_attn_interface, or the package kernels)")
        source, flash = found
        for window in (None, 96):
            place = torch.arange(300, device=device)
            twin = in_window(place, place, window or 300)[None, None]
            compare(Recent(window, flash), twin, (1, heads, kv_heads, 300, head_width), device, dtype)
    except Exception as error: # whatever a foreign kernel throws: the run goes on without it, and says so
        return sdpa(f"FA3 was tried and failed: {first_line(error)}")
    return Kernel("FA3", f"{source} runs here and agrees with SDPA", flash)


def pick_masked(machine, device, dtype, heads, kv_heads, head_width, masks):
    """
    What computes attention under a rule that is not causal: FlexAttention or SDPA with masks.
    masks   a function: device -> the same small rule as (BlockMask, bool mask), for the trial
    """
    dense = lambda why: Kernel("SDPA with masks", why)
    if machine.device != "cuda":
        return dense("no CUDA device")
    try:
        block, twin = masks(device)
        compare(block, twin, (twin.size(0), heads, kv_heads, twin.size(-1), head_width), device, dtype)
    except Exception as error: # whatever the compiler throws
        return dense(f"FlexAttention was tried and failed: {first_line(error)}")
    return Kernel("FlexAttention", "it compiles here and agrees with SDPA")


def find_flash():
    """(where it comes from, (q, k, v, window) -> y), or None if it is not installed."""
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func
        return "flash_attn_interface", as_attention(flash_attn_func)
    if importlib.util.find_spec("kernels"):
        from kernels import get_kernel
        repo, version = FLASH_REPO
        return repo, as_attention(get_kernel(repo, version=version).flash_attn_func)
    return None


def as_attention(flash_attn_func):
    """FlashAttention's interface in our shapes: q (B, H, N, d). It takes heads last but one, and counts the tokens before the own one."""
    def flash(q, k, v, window):
        q, k, v_last = (t.transpose(1, 2).to(torch.bfloat16) for t in (q, k, v))
        y = flash_attn_func(q, k, v_last, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0))
        y = y[0] if isinstance(y, tuple) else y # some versions return the softmax's sums too
        return y.transpose(1, 2).to(v.dtype)
    return flash


def compare(see, twin, shape, device, dtype):
    """Raise RuntimeError unless attending by `see` is attending by the bool mask `twin`, in value and in gradients."""
    B, H, Hkv, N, d = shape
    generator = torch.Generator().manual_seed(0) # its own: the run's random numbers stay where they were
    draw = lambda heads: torch.randn(B, heads, N, d, generator=generator).to(device, dtype)
    q, k, v = (draw(heads).requires_grad_() for heads in (H, Hkv, Hkv))
    ahead = draw(H)
    results = []
    for rule in (see, twin):
        y = attend(q, k, v, rule)
        results.append((y, *torch.autograd.grad(y, (q, k, v), ahead)))
    for name, got, wanted in zip(("y", "dq", "dk", "dv"), *results):
        error = ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()
        if not error < CLOSE:
            raise RuntimeError(f"its {name} is {error:.1%} away from SDPA's")


def first_line(error):
    text = " ".join(str(error).split("\n\n")[0].split())
    return f"{type(error).__name__}: {text[:160]}"
