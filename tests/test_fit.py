"""The training loop when something goes wrong: overflow, NaN, no memory left. What was saved before stays, and the log says what happened."""
import json

import pytest
import torch

from nanochat.common import Dist, UserError
from nanochat.dataloader import Batch
from nanochat.gpt import IGNORE
from nanochat.hardware import out_of_memory_told
from nanochat.optim import make_optimizer
from nanochat.run import Log, Progress
from nanochat.train import Curves, LossScale, PlainObjective, compile_gpt, fit
from tests.tiny import VOCAB, tiny_gpt

STEPS = 8


def batches(masked=()):
    """Batch n of the run is a function of n alone."""
    n = 0
    while True:
        ids = torch.randint(VOCAB, (2, 33), generator=torch.Generator().manual_seed(n))
        targets = torch.full_like(ids[:, 1:], IGNORE) if n in masked else ids[:, 1:]
        yield Batch(ids[:, :-1], targets, torch.zeros(2, 1, dtype=torch.long), torch.tensor([2 * n, 2 * n + 1]))
        n += 1


class Breaking(PlainObjective):
    """The plain objective, but call number `at` goes wrong in the way of `how`."""

    def __init__(self, gpt, at=(), how=lambda loss: loss):
        super().__init__(gpt)
        self.at, self.how, self.calls = at, how, 0

    def __call__(self, batch):
        loss, sums = super().__call__(batch)
        self.calls += 1
        return (self.how(loss) if self.calls - 1 in self.at else loss), sums


def run(folder, at=(), how=None, scale=None, amp=None, saves=None, masked=(), save_every=3, **settings):
    """Train a tiny GPT for STEPS steps; returns it, its optimizer, and the lines of the log."""
    gpt = tiny_gpt()
    optimizer = make_optimizer(gpt)
    log = Log(folder)
    saves = [] if saves is None else saves
    fit(Breaking(gpt, at, how), optimizer, batches(masked), Curves(STEPS), log=log, progress=Progress(STEPS, 64), dist=Dist(), device=torch.device("cpu"), scale=scale, amp=amp,
        save=lambda step: saves.append((step, {name: p.detach().clone() for name, p in gpt.named_parameters()})), save_every=save_every, log_every=1, **settings)
    log.close()
    return gpt, optimizer, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Overflow(torch.autograd.Function):
    """A loss that is a number, with a gradient that is none: what fp16 does."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, outside):
        return outside * float("inf")


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_a_scaled_loss_makes_the_same_run(tmp_path):
    """The scale is a power of two: it changes exponents only, so nothing at all in fp32."""
    plain, _, lines = run(tmp_path / "a")
    scaled, _, scaled_lines = run(tmp_path / "b", scale=LossScale())
    assert same(plain, scaled)
    assert [line["loss"] for line in lines] == [line["loss"] for line in scaled_lines]
    assert scaled_lines[-1]["loss_scale"] == 2**16 and "loss_scale" not in lines[-1]


def test_a_step_that_overflows_is_skipped_counted_and_halves_the_scale(tmp_path):
    saves, scale = [], LossScale()
    _, optimizer, lines = run(tmp_path, at=(2, 4), how=Overflow.apply, scale=scale, saves=saves, save_every=1)
    after = dict(saves)
    assert optimizer.skipped == 2 and [line["skipped"] for line in lines] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [line["loss_scale"] for line in lines] == [2**16] * 2 + [2**15] * 2 + [2**14] * 4
    for step in range(2, STEPS + 1):
        assert all(torch.equal(after[step][name], p) for name, p in after[step - 1].items()) == (step in (3, 5)), step
    assert scale.state() == dict(value=2**14, good=3)


def test_the_scale_grows_after_many_good_steps_and_continues_from_its_state():
    scale = LossScale(good=LossScale.GOOD_STEPS - 2)
    scale.update(skipped=False)
    scale = LossScale(**json.loads(json.dumps(scale.state()))) # as a checkpoint's meta keeps it
    scale.update(skipped=False)
    assert scale.state() == dict(value=2.0**17, good=0)
    scale.update(skipped=True)
    assert scale.state() == dict(value=2.0**16, good=0)


def test_a_scale_that_helps_no_more_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="fp16.*--dtype"):
        run(tmp_path, at=range(STEPS), how=Overflow.apply, scale=LossScale(4.0))


def test_fp16_learns_as_fp32_does(tmp_path):
    """Real float16 products (CPUs have them, slowly): the same losses to its precision, no step lost."""
    _, optimizer, half = run(tmp_path / "half", scale=LossScale(), amp=torch.float16)
    _, _, full = run(tmp_path / "full")
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], abs=2e-3) # before steps amplify what rounding began
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], abs=0.05)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("how, says", [(lambda loss: loss * float("nan"), None), (Overflow.apply, None)])
def test_without_a_scale_a_broken_gradient_is_skipped_and_counted_too(tmp_path, how, says):
    _, optimizer, lines = run(tmp_path, at=(2,), how=how)
    assert optimizer.skipped == 1 and lines[-1]["skipped"] == 1 and lines[2]["grad_norm"] in ("inf", "nan")


class Broken(PlainObjective):
    """Reports NaN from call `at` on."""
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        loss, sums = super().__call__(batch)
        bad = float("nan") if self.calls > 5 else 1.0
        return loss * bad, dict(sums, nats=sums["nats"] * bad)


def test_a_loss_that_is_no_number_stops_and_what_was_saved_stays(tmp_path):
    gpt, saves, log = tiny_gpt(), [], Log(tmp_path)
    with pytest.raises(UserError, match="loss is nan at step 6; the checkpoint of step 3 is kept"):
        fit(Broken(gpt), make_optimizer(gpt), batches(), Curves(STEPS), log=log, progress=Progress(STEPS, 64), dist=Dist(), device=torch.device("cpu"),
            save=saves.append, save_every=3, log_every=10)
    assert saves == [3]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    """On a GPU steps are not checked one by one: a gradient of NaN under a loss that is a number was stepped, and saved as the last checkpoint."""
    gpt, saves = tiny_gpt(), []
    optimizer = make_optimizer(gpt)
    step = optimizer.step
    monkeypatch.setattr(optimizer, "step", lambda norm, check, grad_scale: step(norm=norm, check=False, grad_scale=grad_scale))
    with pytest.raises(UserError, match="norm is nan at step 6; the checkpoint of step 3 is kept"):
        fit(Breaking(gpt, (5,), Overflow.apply), optimizer, batches(), Curves(STEPS), log=Log(tmp_path), progress=Progress(STEPS, 64), dist=Dist(), device=torch.device("cpu"),
            save=saves.append, save_every=3, log_every=10)
    assert saves == [3]


def test_a_micro_batch_without_targets_contributes_nothing(tmp_path):
    """Half of a step's rows masked: the gradient is that of the others alone, and no step is lost."""
    gpt, twin = tiny_gpt(), tiny_gpt()
    fit(PlainObjective(gpt), make_optimizer(gpt), batches(masked=(0, 2)), Curves(1), log=Log(tmp_path), progress=Progress(1, 64), dist=Dist(), device=torch.device("cpu"), accumulate=2)
    optimizer, batch = make_optimizer(twin), list(zip(range(2), batches()))[1][1]
    Curves(1).apply(optimizer, 0)
    (PlainObjective(twin)(batch)[0] / 2).backward()
    optimizer.step()
    assert same(gpt, twin)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(PlainObjective(tiny_gpt())(batch)[0].item(), rel=1e-5) and line["skipped"] == 0


def no_memory(kind):
    def how(loss):
        raise kind
    return how


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_names_the_flags_and_keeps_what_was_saved(tmp_path, error):
    saves = []
    with pytest.raises(UserError, match="step 5; the checkpoint of step 3 is kept.*--device-batch.*--checkpoint-activations.*--max-seq-len") as told:
        run(tmp_path, at=(4,), how=no_memory(error), saves=saves)
    assert [step for step, _ in saves] == [3] and "\n" not in str(told.value)


@pytest.mark.parametrize("every, told", [(2, "step 2; no checkpoint was written yet: --save-every"), (4, "step 4; the checkpoint of step 3 is kept"), (0, "step 8; the checkpoint of step 8 is kept")])
def test_out_of_memory_in_a_validation_is_told_as_in_a_step(tmp_path, every, told):
    """It came after hours of training, and ended them in a traceback, which says nothing of what was saved."""
    def evaluate(step):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match=f"memory ran out in the validation after {told}.*--device-batch"):
        run(tmp_path, evaluate=evaluate, eval_every=every)


def test_out_of_memory_while_a_checkpoint_is_saved_is_told(tmp_path):
    """Saving gathers the optimizer's states."""
    class Full(list):
        def append(self, saved):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="memory ran out while step 3 was saved; no checkpoint was written yet.*Free what other programs hold"):
        run(tmp_path, saves=Full())


@pytest.mark.parametrize("broken", [lambda gpt: Breaking(gpt, (1,), no_memory(torch.OutOfMemoryError("CUDA out of memory"))), Broken], ids=["memory", "loss"])
def test_before_the_first_checkpoint_none_is_said_to_be_kept(tmp_path, broken):
    """By default nothing is saved before the end: "the checkpoint of step 0 is kept" sent people to look for one."""
    gpt = tiny_gpt()
    with pytest.raises(UserError, match="; no checkpoint was written yet: --save-every N writes one every N steps. Lower"):
        fit(broken(gpt), make_optimizer(gpt), batches(), Curves(STEPS), log=Log(tmp_path), progress=Progress(STEPS, 64), dist=Dist(), device=torch.device("cpu"), save=print, log_every=1)


def test_pytorch_says_what_we_listen_for():
    """The allocator's own words, for an allocation that no machine has room for; another error is let through."""
    with pytest.raises(UserError, match="--device-batch"), out_of_memory_told("here"):
        torch.empty(2**58)
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_told("here"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.mark.slow
def test_a_compiled_gpt_makes_the_same_run_under_the_same_names(tmp_path):
    """Losses to rounding; names in a checkpoint are the plain ones. A batch of another shape is another graph, not a wrong one."""
    torch._dynamo.reset()
    gpt, plain = tiny_gpt(layers=2), tiny_gpt(layers=2)
    names = list(gpt.state_dict())
    compile_gpt(gpt)
    for ids in (torch.randint(VOCAB, (2, 33)), torch.randint(VOCAB, (3, 65))):
        losses = []
        for model in (gpt, plain):
            loss = model(ids[:, :-1], ids[:, 1:], "sum")
            losses.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        for a, b in zip(*losses):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert list(gpt.state_dict()) == names
