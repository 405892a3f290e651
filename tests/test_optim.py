"""Laws of the optimizer: each Muon trick does what it is for, the whole equals a slow twin, every parameter has one home."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

from nanochat import muon
from nanochat.optim import make_optimizer, param_groups

SHAPES = [(8, 8), (4, 16), (16, 4), (2, 12), (33, 7)]


# ---------------------------------------------------------------------------------------------------------------------
# Polar Express: the constants, and what they do

def minimax_quintic(low, high):
    """Odd quintic nearest to 1 on [low, high] (Remez: its error is the same, with alternating sign, at 4 points)."""
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    for _ in range(100):
        x = np.array([low, *inner, high])
        a, b, c, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)  # extrema of the polynomial: roots of its derivative
        inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
    return a, b, c


def test_polar_express_constants_are_the_minimax_polynomials():
    """Derived again: each polynomial is optimal for the interval that its predecessors leave of [1e-3, 1]."""
    low, high, cushion, safety = 1e-3, 1.0, 0.02407327424182761, 1.02  # cushion: the paper's, for stable first steps
    for i, constants in enumerate(muon.POLAR_EXPRESS):
        a, b, c = minimax_quintic(max(low, cushion * high), high)
        p = lambda x: a * x + b * x**3 + c * x**5
        if cushion * high > low:  # the interval was narrowed: recentre what comes out around 1
            scale = 2 / (p(low) + p(high))
            a, b, c = a * scale, b * scale, c * scale
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
        s = safety if i < len(muon.POLAR_EXPRESS) - 1 else 1
        np.testing.assert_allclose(constants, (a / s, b / s**3, c / s**5), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e8])
def test_polar_express_equals_the_svd_polar_factor_roughly(shape, scale):
    matrices = torch.randn(5, *shape) * scale
    U, S, Vh = torch.linalg.svd(matrices, full_matrices=False)
    out = muon.polar_express(matrices)
    kept = S / S.norm(dim=-1, keepdim=True) > 5e-3  # smaller ones are allowed to stay small
    values = torch.einsum("kmi,kmn,kin->ki", U, out, Vh)
    assert (values[kept] - 1).abs().max() < 0.2
    off = out - U @ torch.diag_embed(values) @ Vh
    assert off.abs().max() < 1e-3  # singular vectors do not turn


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (16, 256), (48, 480)])
def test_through_the_gram_matrix_as_step_by_step(shape):
    """Wide matrices take the short way in fp32; in float64 all go step by step. Singular values from 1 down to a ten-thousandth, whose squares fp32 hardly sees."""
    matrices = torch.randn(3, *shape) @ torch.diag(torch.logspace(0, -4, shape[1]))
    expected = muon.polar_express(matrices.double(), torch.float64)
    assert (muon.polar_express(matrices) - expected).norm() < 1e-3 * expected.norm()
    assert torch.linalg.svdvals(expected).max() < 1.2


def test_polar_express_leaves_each_matrix_of_a_stack_alone():
    matrices = torch.randn(4, 6, 10)
    matrices[2] *= 1e6
    one_by_one = torch.stack([muon.polar_express(m[None])[0] for m in matrices])
    torch.testing.assert_close(muon.polar_express(matrices), one_by_one, rtol=1e-5, atol=1e-6)


def test_polar_express_of_zero_is_zero():
    assert muon.polar_express(torch.zeros(2, 4, 6)).eq(0).all()


def test_polar_express_by_hand():
    """A diagonal matrix stays diagonal with values near 1, signs kept."""
    out = muon.polar_express(torch.diag(torch.tensor([3.0, -0.5]))[None])[0]
    torch.testing.assert_close(out, torch.diag(torch.tensor([1.0, -1.0])), rtol=0.15, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The other tricks, one property each

def test_nesterov_looks_ahead():
    """By hand: buffer 0, gradient 1, momentum 0.9 -> buffer 0.1, step 0.1 * 1 + 0.9 * 0.1 = 0.19."""
    buffer = torch.zeros(1, 1, 1)
    assert muon.nesterov(torch.ones(1, 1, 1), buffer, 0.9).item() == pytest.approx(0.19)
    assert buffer.item() == pytest.approx(0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_snap_norm_gives_the_norm_of_an_orthogonal_matrix(shape):
    norms = muon.snap_norm(torch.randn(3, *shape) * 7).norm(dim=(-2, -1))
    torch.testing.assert_close(norms, torch.full((3,), min(shape) ** 0.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_variance_keeps_the_norm_and_evens_the_lines(shape):
    dim = muon.variance_dim(*shape)
    lines = (shape[0], 1) if dim == -1 else (1, shape[1])
    x = torch.randn(3, *shape) * (torch.rand(3, *lines) + 0.1)
    out = muon.normalize_variance(x, torch.zeros(3, *lines), beta2=0.9)
    torch.testing.assert_close(out.norm(dim=(-2, -1)), x.norm(dim=(-2, -1)))
    rms = out.square().mean(dim=dim)  # from a cold start the running RMS is the line's own: all lines come out alike
    torch.testing.assert_close(rms, rms[:, :1].expand_as(rms), rtol=1e-3, atol=1e-6)


def test_weight_decay_shrinks_every_weight_beside_the_step():
    """Of a step at a rate of 0.02 with a decay of 0.5: a hundredth of what each weight was, whichever way the step moves it."""
    params, grads = torch.randn(1, 6, 6), torch.randn(1, 6, 6)
    torch.testing.assert_close(muon_once(params, grads, 0.0) - muon_once(params, grads, 0.5), 0.02 * 0.5 * params)


def muon_once(params, grads, wd):
    out = params.clone()
    muon.muon_step(out, grads, torch.zeros_like(grads), torch.zeros(1, 6, 1), 0.02, 0.95, 0.9, wd, torch.float32)
    return out


def test_a_zero_gradient_moves_nothing():
    """The first step after zero-initialised projections: q, k, v have gradients of exactly zero. It must not be NaN."""
    params = torch.randn(2, 4, 8)
    before = params.clone()
    muon.muon_step(params, torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), torch.zeros(2, 1, 8), 0.02, 0.95, 0.9, 0.0, torch.float32)
    assert torch.equal(params, before)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    grads = [torch.randn(2, 6, 9) for _ in range(4)]
    after = []
    for s in (1.0, scale):
        params, buffer, variance = torch.ones(2, 6, 9), torch.zeros(2, 6, 9), torch.zeros(2, 1, 9)
        for g in grads:
            muon.muon_step(params, g * s, buffer, variance, 0.02, 0.95, 0.9, 0.1, torch.float32)
        after.append(params)
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The whole against a slow and obvious twin

class SlowTwin:
    """One parameter at a time, textbook formulas, fp64."""

    def __init__(self, groups):
        self.groups, self.state = groups, {}

    def step(self, params, grads):
        for group in self.groups:
            for name in group["names"]:
                p, g = params[name], grads[name].double()
                s = self.state.setdefault(name, {"t": 0, "m": torch.zeros_like(p), "v": None})
                params[name] = self.muon(p, g, s, group) if group["kind"] == "muon" else self.adamw(p, g, s, group)

    def adamw(self, p, g, s, group):
        (b1, b2), lr = group["betas"], group["lr"]
        s["t"] += 1
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * (s["v"] if s["v"] is not None else 0) + (1 - b2) * g * g
        m, v = s["m"] / (1 - b1 ** s["t"]), s["v"] / (1 - b2 ** s["t"])
        return p - lr * group["weight_decay"] * p - lr * m / (v.sqrt() + group["eps"])

    def muon(self, p, g, s, group):
        mu, rows, cols = group["momentum"], *p.shape
        s["m"] = mu * s["m"] + (1 - mu) * g
        u = (1 - mu) * g + mu * s["m"]
        u = u / (1.01 * u.norm()) if u.norm() > 0 else u
        for a, b, c in muon.POLAR_EXPRESS:
            u = a * u + b * (u @ u.T) @ u + c * (u @ u.T) @ (u @ u.T) @ u
        size = min(rows, cols) ** 0.5
        u = u / u.norm() * size if u.norm() > 0 else u
        axis = 1 if rows >= cols else 0
        s["v"] = 0.9 * (s["v"] if s["v"] is not None else 0) + 0.1 * (u * u).mean(axis, keepdim=True)
        u = u / s["v"].clamp(min=1e-10).sqrt()
        u = u / u.norm() * size if u.norm() > 0 else u
        lr = group["lr"] * max(1, rows / cols) ** 0.5
        return p - lr * (u + group["weight_decay"] * p)


def test_the_optimizer_equals_its_slow_twin(tiny_gpt):
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    twin = SlowTwin(optimizer.param_groups)
    params = {f"gpt.{name}": p.detach().double() for name, p in gpt.named_parameters()}
    for step in range(4):
        optimizer.set_schedule(lr=1 - step / 4, momentum=0.85 + step / 100, weight_decay=1 - step / 5)
        for p in gpt.parameters():
            p.grad = torch.randn_like(p)
        twin.step(params, {f"gpt.{name}": p.grad for name, p in gpt.named_parameters()})
        optimizer.step()
    for name, p in gpt.named_parameters():
        torch.testing.assert_close(p.detach().double(), params[f"gpt.{name}"], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")


def test_it_learns(tiny_gpt):
    """A tiny GPT learns a fixed batch by heart: from ln 61 = 4.1 to under a tenth of it within 60 steps."""
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    ids = torch.randint(0, 61, (4, 17))
    for _ in range(60):
        loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.4


# ---------------------------------------------------------------------------------------------------------------------
# Groups

class Extra(nn.Module):
    """Shaped like GistNet: matrices, a slot, a place table, a level embedding, a bias, a scorer with one output."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Linear(8, 8)
        self.slot = nn.Parameter(torch.zeros(1, 8))
        self.place = nn.Parameter(torch.zeros(32, 8))
        self.level_embedding = nn.Embedding(4, 8)
        self.score = nn.Linear(8, 1)
        self.temperature = nn.Parameter(torch.ones(()))


def test_every_parameter_has_one_home(tiny_gpt):
    groups = param_groups(tiny_gpt(), {"gistnet": Extra(), "lensnet": Extra()}, lr_scale=0.5)
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names))
    home = {name: group for group in groups for name in group["names"]}
    assert set(home) == {f"gpt.{n}" for n, _ in tiny_gpt().named_parameters()} | {
        f"{m}.{n}" for m in ("gistnet", "lensnet") for n, _ in Extra().named_parameters()}
    kind = lambda name: home[name]["kind"]
    lookups = ("gpt.embed_table.", "gpt.lm_head.", "gpt.value_tables.", "gpt.resid_scale", "gpt.x0_scale")
    assert all((kind(name) == "adamw") == name.startswith(lookups) for name in home if name.startswith("gpt."))
    assert [name for name in home if name.startswith("gistnet.") and kind(name) == "muon"] == ["gistnet.pool.weight"]
    assert home["gistnet.pool.weight"]["lr"] == pytest.approx(0.01)
    assert all(kind(name) == "adamw" and home[name]["lr"] == pytest.approx(0.01) for name in home if name.startswith("lensnet.")), "its rate is its own"


def test_the_rates_of_tables_follow_the_width(tiny_gpt):
    """D = 192 is a quarter of 768, where they were tuned: tables learn twice as fast, matrices and scalars the same."""
    lr = {group["label"]: group["lr"] for group in param_groups(tiny_gpt(width=192), lr_scale=0.5)}
    assert lr == pytest.approx(dict(matrices=0.01, head=0.008, embed=0.3, values=0.15, resid=0.0025, x0=0.025))


def test_a_parameter_without_a_rule_is_named(tiny_gpt):
    gpt = tiny_gpt()
    gpt.register_parameter("mystery", nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(AssertionError, match="mystery"):
        param_groups(gpt)


def test_a_shared_parameter_is_refused(tiny_gpt):
    gpt = tiny_gpt()
    extra = nn.Module()
    extra.table = gpt.embed_table
    with pytest.raises(AssertionError, match="shared"):
        param_groups(gpt, {"gistnet": extra})


def test_frozen_parameters_are_left_out(tiny_gpt):
    gpt = tiny_gpt()
    for p in gpt.parameters():
        p.requires_grad = False
    assert {g["label"] for g in param_groups(gpt, {"gistnet": Extra()})} == {"gistnet matrices", "gistnet rest"}


# ---------------------------------------------------------------------------------------------------------------------
# Missing and broken gradients

def test_a_parameter_without_gradient_stands_still(tiny_gpt):
    """
    Muon's step has the same size for any gradient: a network that learns every 4th step would drift at full speed on its
    momentum in between. Half of a stack, too: only the matrices that have a gradient move.
    """
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    for p in gpt.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    state = optimizer.state_dict()
    for p in gpt.blocks[1].parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    after = optimizer.state_dict()
    for name, p in gpt.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("blocks.1."), name
    for key in state:
        assert torch.equal(state[key], after[key]) != key.startswith("gpt.blocks.1."), key


def test_part_of_a_stack_steps_like_the_whole(tiny_gpt):
    """Blocks 0 and 2 step in one call or in two: the same matrices come out."""
    results = []
    for together in (True, False):
        gpt = tiny_gpt()
        optimizer = make_optimizer(gpt)
        rounds = [(0, 1, 2)] if together else [(0, 2), (1,)]
        for blocks in rounds:
            optimizer.zero_grad()
            for i in blocks:
                g = torch.Generator().manual_seed(i)
                for p in gpt.blocks[i].parameters():
                    p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
        results.append([p.detach() for p in gpt.blocks.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_gradient_is_refused_and_counted(tiny_gpt, bad):
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    state = optimizer.state_dict()
    for p in gpt.parameters():
        p.grad = torch.randn_like(p)
    gpt.blocks[1].mlp.up.weight.grad[0, 0] = bad
    assert not math.isfinite(optimizer.step(check=True))
    assert optimizer.skipped == 1
    assert all(torch.equal(p, before[name]) for name, p in gpt.named_parameters())
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state_dict().items())


def test_the_norm_is_the_norm_and_the_scale_is_undone(tiny_gpt):
    results = []
    for scale in (1.0, 1024.0):
        gpt = tiny_gpt()
        optimizer = make_optimizer(gpt)
        g = torch.Generator().manual_seed(3)
        grads = [torch.randn(p.shape, generator=g) for p in gpt.parameters()]
        for p, grad in zip(gpt.parameters(), grads):
            p.grad = grad * scale
        norm = optimizer.step(check=scale > 1, norm=True, grad_scale=scale)
        assert norm.item() == pytest.approx(math.sqrt(sum(grad.square().sum() for grad in grads)), rel=1e-5)
        results.append([p.detach() for p in gpt.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# State

def test_state_goes_through_a_file_and_back(tiny_gpt, tmp_path):
    from safetensors.torch import load_file, save_file

    def steps(gpt, optimizer, seeds):
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            for p in gpt.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()

    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    steps(gpt, optimizer, range(3))
    save_file(optimizer.state_dict(), tmp_path / "optim.safetensors")
    other = tiny_gpt(seed=5)
    other.load_state_dict(gpt.state_dict())
    resumed = make_optimizer(other)
    resumed.load_state_dict(load_file(tmp_path / "optim.safetensors"))
    steps(gpt, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), other.parameters()))


def test_state_of_another_model_is_refused(tiny_gpt):
    state = make_optimizer(tiny_gpt()).state_dict()
    with pytest.raises(ValueError, match="blocks.3"):
        make_optimizer(tiny_gpt(layers=4)).load_state_dict(state)
    with pytest.raises(ValueError, match="shape"):
        make_optimizer(tiny_gpt(width=64)).load_state_dict(state)
    make_optimizer(tiny_gpt(), {"gistnet": Extra()}).load_state_dict(state, partial=True)  # new modules start cold


def test_a_bf16_table_learns_in_bf16_with_fp32_state(tiny_gpt):
    gpt = tiny_gpt()
    gpt.embed_table.bfloat16()
    optimizer = make_optimizer(gpt)
    before = gpt.embed_table.weight.detach().clone()
    for p in gpt.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert gpt.embed_table.weight.dtype == torch.bfloat16
    assert not torch.equal(gpt.embed_table.weight, before)
    assert optimizer.state_dict()["gpt.embed_table.weight.exp_avg"].dtype == torch.float32


@pytest.mark.slow
def test_compiled_steps_equal_plain_ones_and_do_not_recompile(tiny_gpt):
    results = []
    for compile in (False, True):
        torch._dynamo.reset()
        gpt = tiny_gpt(layers=1)
        optimizer = make_optimizer(gpt, compile=compile)
        for step in range(4):
            optimizer.set_schedule(lr=1 - step / 4, momentum=0.9 + step / 100)
            g = torch.Generator().manual_seed(step)
            for p in gpt.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            if step == 1:
                torch.compiler.set_stance("fail_on_recompile")
            optimizer.step()
        torch.compiler.set_stance("default")
        results.append([p.detach() for p in gpt.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_steps_follow_cpu_steps(tiny_gpt):
    """bf16 products on the GPU, fp32 on the CPU: the same directions, to the precision of bf16."""
    results = []
    for device in ("cpu", "cuda"):
        gpt = tiny_gpt().to(device)
        start = [p.detach().cpu().clone() for p in gpt.parameters()]
        optimizer = make_optimizer(gpt)
        g = torch.Generator().manual_seed(1)
        for p in gpt.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(device)
        optimizer.step()
        results.append([p.detach().cpu() - s for p, s in zip(gpt.parameters(), start)])
    for a, b in zip(*results):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
