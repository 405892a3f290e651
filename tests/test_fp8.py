"""fp8 layers: their formulas against plain products, which layers they are, and that nothing else notices. torch._scaled_mm runs on CPUs too."""
import pytest
import torch
import torch.nn as nn

from nanochat import cost, fp8, hardware
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from tests.tiny import VOCAB, stir

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x, dtype):
    """The slow twin of 8 bits: there and back."""
    bits, scale = fp8.quantise(x, dtype)
    return bits.float() * scale


def close(a, b, tolerance):
    assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), f"{((a - b).norm() / b.norm()).item():.4f}"


@pytest.mark.parametrize("dtype, steps", [(E4, 2**-4), (E5, 2**-3)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rounding_keeps_its_promise(dtype, steps, size):
    """Whatever the scale of a tensor, its largest number is kept to rounding, and normal numbers to half a step of the format."""
    x = torch.randn(1000) * size
    assert rounded(x, dtype).abs().max() == pytest.approx(x.abs().max().item(), rel=1e-5)
    large = x.abs() > 0.01 * x.abs().max()
    assert ((rounded(x, dtype) - x).abs()[large] <= steps * x.abs()[large] * 1.001).all()
    assert rounded(torch.zeros(5), dtype).tolist() == [0] * 5


@pytest.mark.parametrize("rows", [32, 33, 1])
def test_forward_and_backward_are_products_of_rounded_numbers(rows):
    """
    Against quantise-dequantise and plain matmul: to bf16 rounding. Against unrounded numbers: to that of 3 and 2 bits. A number of rows
    that the kernel does not take (gists make odd ones) is no exception.
    """
    linear, x = nn.Linear(128, 192, bias=False), torch.randn(rows, 128, requires_grad=True)
    outside = torch.randn(rows, 192) * 1e-4
    x8, w8, g8 = rounded(x.detach(), E4), rounded(linear.weight.detach(), E4), rounded(outside.bfloat16(), E5)
    plain = torch.autograd.grad(linear(x), (x, linear.weight), outside)
    before = linear(x).detach()
    linear.__class__ = fp8.Fp8Linear
    y = linear(x)
    got = torch.autograd.grad(y, (x, linear.weight), outside.bfloat16())
    close(y.float(), x8 @ w8.T, 4e-3)
    close(got[0], g8 @ w8, 4e-3)
    close(got[1], g8.T @ x8, 4e-3)
    for a, b in zip((y.detach().float(), *got), (before, *plain)):
        close(a, b, 0.08)
    assert [t.dtype for t in got] == [torch.float32] * 2


def fp8_gpt(width=256):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(VOCAB, 64, layers=2, heads=2, kv_heads=2, width=width))
    return stir(gpt, 0.02)


def test_only_layers_that_suit_and_no_name_changes():
    gpt = fp8_gpt()
    names, counts = list(gpt.state_dict()), cost.count_by_role(gpt)
    assert fp8.convert(gpt) == 12 # q, k, v, out, up, down of two layers; not the gates (12 wide), the head, `previous`
    assert list(gpt.state_dict()) == names
    assert not isinstance(gpt.lm_head, fp8.Fp8Linear) and not isinstance(gpt.blocks[1].attn.gate, fp8.Fp8Linear)
    assert fp8.convert(fp8_gpt(width=96)) == 0 # 96 is a multiple of 16, but below 128


def test_flops_do_not_see_the_format():
    """nanochat counted by the class of a layer and lost 11 of 12 FLOPs with --fp8 (bug B1 of the reference): d24 had an MFU of 5%."""
    gpt = fp8_gpt()
    before = cost.count_by_role(gpt), cost.train_flops(gpt.config)
    fp8.convert(gpt)
    assert (cost.count_by_role(gpt), cost.train_flops(gpt.config)) == before


def test_evaluation_is_as_ever():
    gpt, ids = fp8_gpt(), torch.randint(VOCAB, (2, 40))
    gpt.eval()
    with torch.no_grad():
        plain = gpt(ids)
        fp8.convert(gpt)
        assert torch.equal(gpt(ids), plain)
        gpt.train()
        assert torch.equal(gpt(ids), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16): # learning, it is not
        learning = gpt(ids).detach()
        gpt.eval()
        assert not torch.equal(learning, gpt(ids))


def test_training_in_fp8_follows_plain_training():
    """The gradient of every matrix of a GPT, in bf16 around fp8: the same direction as in fp32."""
    ids, grads = torch.randint(VOCAB, (2, 65)), []
    for eight in (False, True):
        gpt = fp8_gpt()
        if eight:
            fp8.convert(gpt)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=eight):
            loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads.append([loss.detach()[None], *(p.grad for p in gpt.blocks.parameters())])
    for plain, eight in zip(*grads):
        assert torch.cosine_similarity(plain.flatten(), eight.flatten(), dim=0) > 0.98


def machine(device, capability):
    return hardware.Machine(device, "Test Card", 1, 4, 2**36, 2**36, 2**36, 2**40, None, capability)


@pytest.mark.parametrize("device, capability, dtype, says", [
    ("cpu", None, torch.bfloat16, "8.9"), ("cuda", (8, 0), torch.bfloat16, "8.0"), ("cuda", (9, 0), torch.float32, "--dtype bf16"), ("cuda", (9, 0), torch.float16, "--dtype bf16")])
def test_refused_where_it_cannot_be(device, capability, dtype, says):
    with pytest.raises(UserError, match=says):
        fp8.check(machine(device, capability), dtype)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_taken_where_it_can(capability):
    fp8.check(machine("cuda", capability), torch.bfloat16)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("this GPU has no fp8 units")
    x, weight = torch.randn(48, 128), torch.randn(192, 128)
    results = []
    for device in ("cpu", "cuda"):
        a, w = (t.to(device).requires_grad_() for t in (x, weight))
        y = fp8.Fp8Product.apply(a, w)
        results.append([y.float().cpu(), *(g.cpu() for g in torch.autograd.grad(y.float().square().sum(), (a, w)))])
    for a, b in zip(*results):
        close(b, a, 1e-2)
