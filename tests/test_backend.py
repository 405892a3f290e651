"""What computes attention is tried before it is trusted. Fake machines and fake kernels stand for those that are not here."""
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nanochat import backend, hardware
from nanochat.attention import Recent, attend, in_window
from nanochat.gpt import GPT, GPTConfig

SHAPE = dict(heads=4, kv_heads=2, head_width=16)


def machine(device="cuda", capability=(9, 0), name="Test GPU"):
    return hardware.Machine(device=device, name=name, devices=1, cores=4, ram=2**36, memory=2**36, free_memory=2**36, disk_free=2**40, peak_flops=None, capability=capability)


def pick(find, here=None, dtype=torch.bfloat16):
    """The trial runs on this CPU, whatever the machine says that it is."""
    return backend.pick_causal(here or machine(), torch.device("cpu"), dtype, **SHAPE, find=find)


def honest(q, k, v, causal, window_size):
    """FlashAttention's interface, computed slowly: q (B, N, H, d); window_size counts the tokens before the own one."""
    assert causal and q.dtype == torch.bfloat16
    before, after = window_size
    assert after == (-1 if before == -1 else 0)
    place = torch.arange(q.size(1))
    see = in_window(place, place, q.size(1) if before == -1 else before + 1)[None, None]
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), see).transpose(1, 2)


def no_image(*args, **kwargs):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously reported")


def off_by_one(q, k, v, causal, window_size):
    return honest(q, k, v, causal, (window_size[0] + (window_size[0] > 0), window_size[1]))


def gradients_wrong(q, k, v, causal, window_size):
    return honest(q, k.detach() + 0 * k, v, causal, window_size)


def found(function):
    return lambda: ("fake", backend.as_attention(function))


def must_not_look():
    raise AssertionError("a kernel for another machine must not even be loaded")


@pytest.mark.parametrize("here, dtype, why", [
    (machine("cpu", None), torch.bfloat16, "no CUDA device"),
    (machine("mps", None), torch.bfloat16, "no CUDA device"),
    (machine(capability=(8, 0), name="A100"), torch.bfloat16, "A100 has 8.0"),
    (machine(capability=(10, 0), name="B200"), torch.bfloat16, "B200 has 10.0"),
    (machine(capability=(12, 0), name="RTX 5090"), torch.bfloat16, "RTX 5090 has 12.0"),
    (machine(), torch.float32, "in float32")])
def test_where_it_cannot_run_it_is_not_loaded(here, dtype, why):
    kernel = pick(must_not_look, here, dtype)
    assert kernel.name == "SDPA" and why in kernel.why and kernel.run is None
    assert str(kernel).startswith("SDPA: ") and "\n" not in str(kernel)


@pytest.mark.parametrize("find, why", [
    (lambda: None, "not installed"),
    (found(no_image), "no kernel image"),
    (found(off_by_one), "away from SDPA"),
    (found(gradients_wrong), "its dk is 100.0% away"),
    (found(lambda *args, **kwargs: torch.full((1, 300, 4, 16), float("nan"), requires_grad=True)), "RuntimeError"),
    (must_not_look, "AssertionError")])
def test_what_fails_its_trial_is_told_and_not_used(find, why):
    """Elsewhere FlashAttention 3 loaded on Blackwell and the run died at its first step."""
    kernel = pick(find)
    assert kernel.name == "SDPA" and why in kernel.why and kernel.run is None and "\n" not in str(kernel)


@pytest.mark.parametrize("function", [honest, lambda *args, **kwargs: (honest(*args, **kwargs), "sums of the softmax")])
def test_what_agrees_is_used_by_the_gpt(function):
    kernel = pick(found(function))
    assert kernel.name == "FA3" and "fake" in kernel.why
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 40, layers=3, heads=2, kv_heads=1, width=32, windows="SL", short_window=8))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ids, asked = torch.randint(64, (2, 40)), []
    wanted = gpt(ids)

    def counted(q, k, v, window):
        asked.append(window)
        return kernel.run(q, k, v, window)
    gpt.flash = counted
    torch.testing.assert_close(gpt(ids), wanted, atol=0.1, rtol=0.05)
    assert asked == [8, None, None], "S, L, and the last layer, which is long"


def test_a_trial_leaves_the_runs_random_numbers_alone():
    before = torch.get_rng_state()
    pick(found(honest))
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# FlexAttention

def masks(device):
    """A causal rule as it should be."""
    rule = lambda b, h, i, j: j <= i
    return create_block_mask(rule, 1, None, 40, 40, device=device), torch.ones(40, 40, dtype=torch.bool, device=device).tril()[None, None]


def test_flex_is_tried_on_cuda_only():
    kernel = backend.pick_masked(machine("cpu", None), torch.device("cpu"), torch.float32, **SHAPE, masks=lambda device: 1 / 0)
    assert str(kernel) == "SDPA with masks: no CUDA device"


def test_flex_that_does_not_compile_or_disagrees_is_told(monkeypatch):
    def broken(q, k, v, see):
        if isinstance(see, BlockMask):
            raise RuntimeError("out of resource: shared memory\n\nmore lines")
        return attend(q, k, v, see)

    pick = lambda: backend.pick_masked(machine(), torch.device("cpu"), torch.float32, **SHAPE, masks=masks)
    monkeypatch.setattr(backend, "attend", broken)
    assert str(pick()) == "SDPA with masks: FlexAttention was tried and failed: RuntimeError: out of resource: shared memory"
    monkeypatch.setattr(backend, "attend", lambda q, k, v, see: attend(q, k, v, "all" if isinstance(see, BlockMask) else see))
    assert "away from SDPA" in pick().why
    monkeypatch.setattr(backend, "attend", lambda q, k, v, see: attend(q, k, v, "causal" if isinstance(see, BlockMask) else see))
    assert pick().name == "FlexAttention"


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gets_what_runs_on_it(dtype):
    """Never a crash, whatever is installed; and what was chosen is right at another shape too."""
    from megacontext.layout import trial_masks
    device = torch.device("cuda")
    about = (hardware.describe(device), device, dtype, 4, 4, 128)
    causal, masked = backend.pick_causal(*about), backend.pick_masked(*about, trial_masks)
    print(causal, masked, sep="\n")
    assert masked.name == "FlexAttention", masked.why
    if causal.run is not None:
        place = torch.arange(700, device=device)
        backend.compare(Recent(256, causal.run), in_window(place, place, 256)[None, None], (2, 4, 4, 700, 128), device, dtype)
