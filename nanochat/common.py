"""
What every other file leans on: where things live on disk, who speaks when several processes run, how a run starts
and ends, and how a user's mistake is told from ours.

In:  environment variables (NANOCHAT_BASE_DIR, and RANK / LOCAL_RANK / WORLD_SIZE as torchrun sets them).
Out: paths, a device, a `Dist` that says which process this is.
The idea: no global state. A function that needs to know its rank is handed a `Dist`.
"""

import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's, told in one line: what was expected, what came, what to do. Everything else is ours."""


KILLED = "another process was killed: most often memory ran out"


def run_main(main):
    """
    Run a script's main() and turn its end into an exit code: 0 done, 2 the user's mistake, 130 interrupted, 143 told to stop by torchrun.
    Nothing else is caught: our own mistakes keep their traceback. Where several processes run, the first that fails says why, once for all of
    them; the others fail for the same reason, or because it is gone. One that was killed cannot speak: then the first that misses it does, or that
    torchrun tells to stop because of it.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    several = world > 1
    if several: # torchrun ends the others this way when one is gone, often before they could miss it themselves
        signal.signal(signal.SIGTERM, lambda *_: _end(f"rank {rank} of {world} was told to stop, and the whole job ends. If nobody asked for that, {KILLED}\n", 143, several))
    try:
        main()
    except UserError as error:
        _end(f"error: {error}\n", 2, several)
    except KeyboardInterrupt:
        _end("interrupted\n", 130, several)
    except Exception: # whatever it is, the other processes end with it; alone it is raised as it came
        if not several:
            raise
        _end(f"{traceback.format_exc()}rank {rank} of {world} failed, and the whole job ends with it. If the error above is a lost connection, {KILLED}\n",
             1, several)


def _end(message, code, several):
    if several:
        signal.signal(signal.SIGTERM, signal.SIG_IGN) # who has begun to speak is not told to stop
    if not several or _first_to_fail():
        sys.stderr.write(message)
        sys.stderr.flush()
    if several:
        sys.stdout.flush()
        os._exit(code) # not through the destructors of a process group that others are still in: they abort, or wait for ever
    sys.exit(code)


def _first_to_fail():
    """Whether no other process that torchrun started on this machine has said why the job fails."""
    mine = os.environ.get("TORCHELASTIC_ERROR_FILE") # in a folder of this process, in the folder of this job and attempt
    try:
        mine is None or (Path(mine).parent.parent / "told").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Places

STAGES = ("base", "mid", "sft", "rl")


def base_dir() -> Path:
    """The folder that holds everything we make: tokenizer/, data/, <stage>_checkpoints/<tag>/, report/."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): set NANOCHAT_BASE_DIR to one that can be written to") from error
    return folder


def checkpoint_dir(stage: str, tag: str) -> Path:
    """Where one model of one stage keeps its checkpoints. Not created here: reading must not leave empty folders."""
    if stage not in STAGES:
        raise UserError(f"no stage called {stage!r}: expected one of {', '.join(STAGES)}")
    return base_dir() / f"{stage}_checkpoints" / tag


ASIDE = ".before-" # and the time, behind the name of what was set aside


def set_aside(path):
    """Rename a folder that is in the way of a new one, so that nothing old is mixed in or lost. Returns its new path."""
    aside = path.with_name(f"{path.name}{ASIDE}{time.strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    return aside


# ---------------------------------------------------------------------------------------------------------------------
# Processes

@dataclass(frozen=True)
class Dist:
    """Which process this is: `rank` of `world` in the whole job, `local_rank` on this machine."""
    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


def dist_info() -> Dist:
    """What torchrun told us through the environment; a plain `python` is process 0 of 1."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if not given:
        return Dist()
    if len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise UserError(f"{', '.join(given)} set but not {missing}: start several processes with torchrun, or unset them")
    return Dist(*(int(os.environ[name]) for name in names))


def print0(*args, **kwargs):
    """print() from rank 0 only, flushed at once so that a log being followed is never behind."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def pick_device_type() -> str:
    """cuda if there is one, else Apple's mps, else cpu."""
    import torch
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def seed_all(seed: int):
    """Seed every generator that library code may draw from. All ranks share it: they must build the same weights."""
    import numpy as np
    import torch
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # also seeds every cuda and mps generator


def setup(device_type: str = "", seed: int = 0):
    """
    Start a run: choose the device, seed, join the other processes.

    device_type  "cuda", "mps", "cpu", or "" to pick the best there is
    Returns (torch.device, Dist). Call cleanup() at the end.
    """
    import torch
    dist = dist_info()
    device_type = device_type or pick_device_type()
    if device_type not in ("cuda", "mps", "cpu"):
        raise UserError(f"device {device_type!r} is not known: expected cuda, mps or cpu (or nothing, to pick one)")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but PyTorch sees no CUDA device. Use --device cpu, or check the driver")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but this PyTorch has none. Use --device cpu")
    if device_type == "cuda" and dist.local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {dist.local_rank} has no GPU: this machine has {torch.cuda.device_count()}. "
                        f"Lower --nproc_per_node")

    seed_all(seed)
    device = torch.device(device_type, dist.local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # tf32 for what is left in fp32
    if dist.world > 1:
        import torch.distributed as td
        if device_type == "mps":
            raise UserError(f"{dist.world} processes were started, but mps trains in one. Start with plain python")
        if not td.is_initialized():
            if device_type == "cuda":
                td.init_process_group("cpu:gloo,cuda:nccl", device_id=device)  # flags travel by gloo
            else:
                td.init_process_group("gloo")
    return device, dist


def all_or_none(make, dist):
    """
    (what make() gives, None) on every rank, or (None, why) on every rank where one of them meets a UserError or a ValueError: one that went on
    alone would wait for the others for good, or add up what does not belong together. Rank 0 goes first: what it downloads, the others find.
    """
    import torch.distributed as td
    made = why = None
    for turn in (True, False):
        if dist.main == turn and why is None:
            try:
                made = make()
            except (UserError, ValueError) as error:
                why = str(error)
        if dist.world > 1:
            told = [None] * dist.world
            td.all_gather_object(told, why)
            why = next((reason for reason in told if reason is not None), None)
    return (made, None) if why is None else (None, why)


def cleanup():
    """Leave the other processes in good order; does nothing in a run of one."""
    import torch.distributed as td
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Text

def check_unicode(text):
    """Refuse lone surrogates, which have no UTF-8 form. They come from decoding with errors="surrogateescape"."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which "
                         f"has no UTF-8 form: read the text with errors=\"replace\"") from None
