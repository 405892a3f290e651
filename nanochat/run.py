"""
What a run says: one event, one line. The same numbers go to the terminal, to a JSON-lines file, and to wandb if asked.

In:  log.write(step, loss=..., val_bpb=...). Out: <folder>/<name>.jsonl, one object per line, appended and flushed, so that
a run that dies has told everything up to then and a resumed run goes on in the same file.
"""

import json
import math
import shlex
import time
from pathlib import Path

from nanochat.common import UserError, print0


class Log:
    """
    folder, name    where the lines go: <folder>/<name>.jsonl (folder None: terminal only)
    wandb_project   None = never; otherwise the run `run` of this project, unless run is "" or "dummy"
    config          settings of the run, sent to wandb
    main            only rank 0 writes; elsewhere every call does nothing
    """

    def __init__(self, folder, name="log", wandb_project=None, config=None, run="", main=True):
        self.main, self.file, self.wandb = main, None, None
        if not main:
            return
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(folder) / f"{name}.jsonl", "a", encoding="utf-8")
        if wandb_project and run not in ("", "dummy"):
            try:
                import wandb
            except ImportError as error:
                raise UserError(f"--run {run} logs to wandb, which is not installed: pip install wandb, or leave --run out") from error
            self.wandb = wandb.init(project=wandb_project, name=run, config=config or {})

    def write(self, step, show=True, **metrics):
        """One line: numbers, strings, lists, tensors of one element. show=False keeps it off the terminal."""
        if not self.main:
            return
        metrics = {key: _plain(value) for key, value in metrics.items()}
        if self.file is not None:
            # JSON has no nan or inf: they are written as strings, so that every line can be read by any reader
            safe = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
            self.file.write(json.dumps({"step": step, **safe}) + "\n")
            self.file.flush()
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)
        if show:
            print0(f"step {step} | " + " ".join(f"{key}={short(value)}" for key, value in metrics.items()))

    def summary(self, **metrics):
        """The last word of a run: `summary key=value ...` on the terminal (shlex.split takes it apart), {"summary": {...}} in the file."""
        if not self.main:
            return
        metrics = {key: _plain(value) for key, value in metrics.items()}
        if self.file is not None:
            self.file.write(json.dumps({"summary": metrics}) + "\n")
            self.file.flush()
        if self.wandb is not None:
            self.wandb.summary.update(metrics)
        print0("summary " + " ".join(f"{key}={short(value, 8)}" for key, value in metrics.items()))

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        self.file = self.wandb = None


def _plain(value):
    """A tensor or numpy number of one element -> a Python number."""
    return value.item() if hasattr(value, "item") else value


def short(value, digits=5):
    """A value for reading: of a number 5 significant digits, none for None, words with spaces in quotes, so that shlex.split finds them again."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    text = str(value)
    return shlex.quote(text) if text != "".join(text.split()) else text


def duration(seconds):
    """3671 -> 1h01m, 61 -> 1m01s."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m:02}m" if h else f"{m}m{s:02}s"


class Progress:
    """
    The dense step line, and the clock behind it.

        0123/2520 | loss 3.2101 | lr 1.00 | 0.42 s | 123,456 tok/s | mfu 51.2% | 12m03s + 3h10m

    The first `warm` steps compile and tune kernels: they are left out of the average that the eta and the summary use.
    peak_flops is that of all devices together; where it is None (a CPU, an unknown GPU) mfu is none, null in JSON, rather than an invented one.
    """

    def __init__(self, total, tokens_per_step, flops_per_token=0.0, peak_flops=None, start=0, warm=10, clock=time.perf_counter):
        self.total, self.tokens_per_step, self.flops_per_token, self.peak_flops = total, tokens_per_step, flops_per_token, peak_flops
        self.warm, self.clock = min(warm, max(0, (total - start) // 2)), clock
        self.done, self.first, self.spent, self.timed, self.counted = 0, start, 0.0, 0.0, 0
        self.last = clock()

    def left_out(self, seconds):
        """Call after an evaluation or a save that took so long: their time is not the steps'."""
        self.last += seconds

    def tick(self, step, loss, lr=1.0, steps=1, **more):
        """After each step, or each `steps` of them, device synchronized. Returns (metrics for the log, the line to print)."""
        now = self.clock()
        dt, self.last = (now - self.last) / steps, now
        self.done += steps
        self.spent += dt * steps
        if self.done - steps >= self.warm:
            self.timed += dt * steps
            self.counted += steps
        rate = self.tokens_per_step / dt
        mfu = self._mfu(rate)
        metrics = dict(loss=loss, lr=lr, dt=dt, tokens_per_s=rate, mfu=mfu)
        left = (self.total - step - 1) * self.seconds_per_step
        line = [f"{step:0{len(str(self.total))}d}/{self.total}", f"loss {loss:.4f}", f"lr {lr:.2f}"]
        line += [f"{key} {short(_plain(value), 4)}" for key, value in more.items()]
        line += [f"{dt:.2f} s", f"{rate:,.0f} tok/s", "mfu none" if mfu is None else f"mfu {100 * mfu:.1f}%"]
        return metrics | more, " | ".join(line + [f"{duration(self.spent)} + {duration(left)}"])

    def _mfu(self, tokens_per_s):
        """Model FLOPs utilisation: what the model needs over what the devices could do; None if the peak is not known."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops and self.flops_per_token else None

    @property
    def seconds_per_step(self):
        """Average of the warm steps; before there are any, of all so far."""
        if self.counted:
            return self.timed / self.counted
        return self.spent / max(1, self.done)

    def summary(self):
        """Averages for the summary line: tokens_per_s, mfu, seconds trained."""
        rate = self.tokens_per_step / self.seconds_per_step if self.done else 0.0
        return dict(tokens_per_s=rate, train_s=self.spent, mfu=self._mfu(rate))
