"""
The training loop that base, mid and SFT share. What differs between them is the objective, the data and the schedule, and
those come in as values; the loop itself only steps, logs, evaluates and saves.

An objective is called with a batch and returns (loss, sums): the loss to descend, and sums of what is worth knowing with their
counts, by the names in objective.SUMS, so that they may be added over micro-batches, steps and ranks before
objective.report(sums) turns them into the numbers of the log.
"""
import gc
import math
import time

import torch
import torch.distributed as td

from nanochat import hardware, schedule
from nanochat.common import UserError, print0
from nanochat.gpt import IGNORE


class PlainObjective:
    """Next-token loss of the GPT alone, summed over targets and divided by the entries of the batch."""
    SUMS = ("nats", "tokens")

    def __init__(self, gpt):
        self.gpt = gpt

    def start_step(self, step, total):
        """Called before each step: a curriculum would look at it."""

    def __call__(self, batch):
        nats = self.gpt(batch.inputs, batch.targets, "sum")
        return nats / batch.inputs.numel(), dict(nats=nats.detach(), tokens=(batch.targets != IGNORE).sum())

    def report(self, sums):
        return dict(loss=sums["nats"] / max(1, sums["tokens"]))


class Curves:
    """The schedule of a run of `total` steps, applied to an optimizer."""

    def __init__(self, total, warmup=40, warmdown_ratio=0.65, final=0.05, momentum_warmup=400):
        self.total, self.warmup, self.warmdown_ratio, self.final = total, min(warmup, total // 10), warmdown_ratio, final
        self.momentum_warmup = min(momentum_warmup, max(1, total // 4))

    def apply(self, optimizer, step):
        lr = schedule.lr_multiplier(step, self.total, self.warmup, self.warmdown_ratio, self.final)
        momentum = schedule.muon_momentum(step, self.total, self.momentum_warmup, self.warmdown_ratio)
        optimizer.set_schedule(lr, momentum, schedule.weight_decay_multiplier(step, self.total))
        return lr


def compile_gpt(gpt):
    """
    Compile the parts of a training forward, in place: module and parameter names stay as they are. The parts are what every objective
    calls; shapes are fixed in each (a curriculum of three block sizes makes some ten of them, bounded here far above).
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for name in ("embed", "trunk", "nats_and_slope_"):
        setattr(gpt, name, torch.compile(getattr(gpt, name), dynamic=False))


class LossScale:
    """
    fp16 has no numbers below 6e-8, where most gradients lie, so the loss is multiplied before backward and the gradients are divided after.
    A step whose gradients overflowed is skipped and the scale halved; it doubles after 2,000 good steps (both as in torch.amp.GradScaler).
    All ranks see the same norm, so they agree.
    """
    GOOD_STEPS = 2000

    def __init__(self, value=2.0**16, good=0):
        self.value, self.good = value, good

    def update(self, skipped):
        if skipped:
            self.value, self.good = self.value / 2, 0
            if self.value < 1:
                raise UserError("gradients overflow fp16 even where the loss is not scaled up: expected numbers, got inf. Use --dtype fp32 (or bf16), or lower the learning rates")
        else:
            self.good += 1
            if self.good == self.GOOD_STEPS:
                self.value, self.good = self.value * 2, 0

    def state(self):
        return dict(value=self.value, good=self.good)


def fit(objective, optimizer, loader, curves, *, log, progress, dist, device, start=0, accumulate=1, amp=None, scale=None,
        evaluate=None, eval_every=0, save=None, save_every=0, log_every=10):
    """
    Train from step `start` to curves.total.

    loader       endless iterator of batches
    accumulate   micro-batches a step
    amp          torch.bfloat16 or float16 to run forwards in mixed precision, None for the parameters' own
    scale        LossScale, for float16
    evaluate     step -> metrics for the log; every eval_every steps and at the end, after saving
    save         step -> None; every save_every steps and at the end, before evaluating, so that an evaluation can lose nothing
    Raises UserError when the loss or the gradient stops being a number, or memory runs out: what was saved before stays.
    """
    sums = dict.fromkeys(objective.SUMS, 0.0)
    batches = iter(loader)
    saved = logged = start
    gc.collect()
    gc.freeze() # what lives now lives to the end: the collector need not look at it every few hundred steps

    left = lambda: "; nothing is saved here" if save is None else kept(saved)
    for step in range(start, curves.total):
        lr = curves.apply(optimizer, step)
        objective.start_step(step, curves.total)
        factor, skipped = 1.0 if scale is None else scale.value, optimizer.skipped
        with hardware.out_of_memory_told(f"in step {step + 1}{left()}"):
            for _ in range(accumulate):
                batch = next(batches).to(device)
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    loss, part = objective(batch)
                (loss / accumulate * factor).backward()
                for name, value in part.items():
                    sums[name] = sums[name] + value
            norm = optimizer.step(norm=True, check=scale is not None or device.type == "cpu", grad_scale=factor)
        optimizer.zero_grad()
        skipped = optimizer.skipped > skipped
        if scale is not None:
            scale.update(skipped)
        done = step + 1
        last = done == curves.total
        saving = save is not None and (last or save_every > 0 and done % save_every == 0)
        if done % log_every == 0 or last or saving: # what is not a number must not be saved
            metrics = objective.report(added(sums, dist))
            sums = dict.fromkeys(objective.SUMS, 0.0)
            then = f"at step {done}{left()}. Lower the learning rates, or look at the data"
            if not math.isfinite(metrics["loss"]):
                raise UserError(f"the loss is {metrics['loss']} {then}")
            if not skipped and not math.isfinite(norm): # its step was taken: the weights are not numbers any more
                raise UserError(f"the gradient's norm is {norm} {then}")
            more = {name: value for name, value in metrics.items() if name != "loss"}
            metrics, line = progress.tick(step, metrics["loss"], lr, steps=done - logged, **more)
            logged = done
            log.write(done, show=False, grad_norm=norm, skipped=optimizer.skipped, peak_mb=hardware.peak_memory(device) / 2**20,
                      **metrics, **({} if scale is None else dict(loss_scale=scale.value)))
            print0(line)
        began = time.perf_counter()
        if saving:
            with hardware.out_of_memory_told(f"while step {done} was saved{left()}", "Free what other programs hold of it, or take a device with more"):
                save(done)
            saved = done
        if evaluate is not None and (last or eval_every > 0 and done % eval_every == 0):
            with hardware.out_of_memory_told(f"in the validation after step {done}{left()}"):
                log.write(done, **evaluate(done))
        progress.left_out(time.perf_counter() - began)
    gc.unfreeze()


def kept(saved):
    """What an error that ends a run leaves, for its line. saved: step of the last checkpoint, 0 = none."""
    return f"; the checkpoint of step {saved} is kept" if saved else "; no checkpoint was written yet: --save-every N writes one every N steps"


def added(sums, dist):
    """Sums over all ranks as plain numbers."""
    total = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64)
    if dist.world > 1:
        td.all_reduce(total)
    return dict(zip(sums, total.tolist()))
