"""
Checkpoints: what a run needs to go on as if nothing had happened. Safetensors and JSON, never pickle.

    <folder>/step_000200/gpt.safetensors      one file per module: gpt, gistnet, lensnet, ...
                         optim.safetensors    whole optimizer state by parameter name, for any number of ranks
                         meta.json            config, arguments, commit, tokenizer fingerprint, loader and RNG state

The idea: a folder called step_* is complete, always. It is written under another name, flushed to disk and then renamed,
which the filesystem does at once or not at all; so a kill at any instant leaves the last complete checkpoint readable.
One writer per folder (rank 0 of one run); any number of readers.
"""

import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat.common import UserError

FORMAT = 1
STEP = re.compile(r"step_(\d{6,})")


# ---------------------------------------------------------------------------------------------------------------------
# Save

def save(folder, step, modules, optimizer=None, meta=None, keep=None, main=True):
    """
    Write <folder>/step_<step>. Every rank calls it (the optimizer gathers its shards); only `main`, rank 0, writes.

    modules     {"gpt": module, ...}
    meta        JSON-able: whatever the caller needs back. argv, commit and time are added here
    keep        keep only this many checkpoints: this one, and of the others those of the highest steps (None: all)
    Returns the folder written. Raises UserError where the disk takes no more: nothing half is left there, and what was complete stays.
    """
    assert "optim" not in modules, "the name 'optim' is taken by the optimizer's file"
    assert keep is None or keep >= 1, f"keep must be at least 1, got {keep}"
    folder = Path(folder)
    target = folder / f"step_{step:06d}"
    state = optimizer.state_dict() if optimizer is not None else None
    if not main:
        return target

    tmp = folder / f"tmp_{target.name}"
    try:
        _write(tmp, step, modules, state, meta)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        have = steps(folder)
        kept = f"the last complete checkpoint, step {have[-1]}, is kept" if have else "there is no checkpoint before it"
        raise UserError(f"step {step} could not be saved in {folder} ({error}); {kept}. Make room there, and go on with --resume") from error
    _move_in(tmp, target)
    if keep is not None:
        others = [other for other in steps(folder) if other != step]
        for old in others[:max(0, len(others) - keep + 1)]:
            _remove(folder, old)
    return target


def _write(tmp, step, modules, state, meta):
    """A whole checkpoint, flushed, under a name that nobody reads."""
    tmp.parent.mkdir(parents=True, exist_ok=True)
    for leftover in tmp.parent.glob("tmp_*"):  # of a writer that was killed
        shutil.rmtree(leftover)
    tmp.mkdir()
    for name, module in modules.items():
        save_file(_plain(module), tmp / f"{name}.safetensors")
    if state is not None:
        save_file(state, tmp / "optim.safetensors")
    sizes = {path.name: path.stat().st_size for path in sorted(tmp.iterdir())}
    record = dict(meta or {}, format=FORMAT, step=step, files=sizes, argv=sys.argv, commit=git_commit(),
                  torch=torch.__version__, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    (tmp / "meta.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in tmp.iterdir():
        flush(path)
    flush(tmp)


def _plain(module):
    """Weights on the CPU under the names of the uncompiled module. Shared tensors are copied: safetensors wants no aliases."""
    return {name.replace("_orig_mod.", ""): tensor.detach().cpu().contiguous().clone()
            for name, tensor in module.state_dict().items()}


def flush(path):
    """Force a file, or the list of names in a folder, down to the disk. Windows has no such call for a folder, and for a file wants a handle that may write."""
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _move_in(tmp, target):
    """
    Rename tmp to target. A folder cannot be renamed onto another, so an earlier checkpoint of this very step first steps
    aside to <target>.old, which readers accept while <target> is absent.
    """
    aside = target.with_name(target.name + ".old")
    if target.exists():
        if aside.exists():
            shutil.rmtree(aside)
        target.rename(aside)
    tmp.rename(target)
    flush(target.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _remove(folder, step):
    """Out of sight first, so that a kill halfway leaves no half checkpoint that looks whole. (.old first: it counts alone.)"""
    for path in (folder / f"step_{step:06d}.old", folder / f"step_{step:06d}"):
        if path.exists():
            gone = folder / f"tmp_gone_{path.name}"
            path.rename(gone)
            shutil.rmtree(gone)


# ---------------------------------------------------------------------------------------------------------------------
# Load

@dataclass
class Checkpoint:
    step: int
    folder: Path
    tensors: dict    # {module: {name: tensor}}
    optimizer: dict  # {"<parameter>.<what>": tensor}, or None
    meta: dict


def steps(folder):
    """Steps of the complete checkpoints in a folder, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = (STEP.fullmatch(path.name.removesuffix(".old")) for path in folder.iterdir())
    return sorted({int(match[1]) for match in names if match})


def find(folder, step=None):
    """The folder of one checkpoint: the given step, or the last."""
    have = steps(folder)
    if not have:
        raise UserError(f"no checkpoint in {folder}: expected folders like step_000200. Train first, or check the tag")
    if step is not None and step not in have:
        raise UserError(f"no checkpoint of step {step} in {folder}: it has {', '.join(map(str, have))}")
    step = have[-1] if step is None else step
    path = Path(folder) / f"step_{step:06d}"
    return path if path.exists() else path.with_name(path.name + ".old")


def read_meta(path):
    """meta.json of one checkpoint folder, and a check that its files are the ones that were written."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a checkpoint: {error}") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} has checkpoint format {meta.get('format')}, this code reads {FORMAT}")
    for name, size in meta["files"].items():
        file = path / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise UserError(f"{file} is damaged: {size} bytes were written, " +
                            ("it is gone" if found is None else f"{found} are there") + ". Use another step")
    return meta


def load(folder, step=None, device="cpu", optimizer=True, modules=None):
    """
    Read the last complete checkpoint of a folder, or a given step.

    optimizer   False leaves the optimizer's state on disk
    modules     names to read (None: all there are)
    """
    path = find(folder, step)
    meta = read_meta(path)
    names = [name.removesuffix(".safetensors") for name in meta["files"] if name != "optim.safetensors"]
    missing = sorted(set(modules or ()) - set(names))
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}: it holds {', '.join(names)}")
    tensors = {name: load_file(path / f"{name}.safetensors", device=str(device)) for name in names
               if modules is None or name in modules}
    state = load_file(path / "optim.safetensors") if optimizer and "optim.safetensors" in meta["files"] else None
    return Checkpoint(meta["step"], path, tensors, state, meta)


def shapes(folder, module="gpt", step=None):
    """{name: shape} of a module's weights, read from the header only."""
    with safe_open(find(folder, step) / f"{module}.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def check_match(meta, **expected):
    """
    Refuse a checkpoint that was made for something else: check_match(meta, config=config.to_dict(), tokenizer=fingerprint).
    Raises UserError naming every field that differs, with both values.
    """
    differences = [line for key, want in expected.items() for line in _differences(key, meta.get(key), want)]
    if differences:
        raise UserError("the checkpoint does not match this run:\n  " + "\n  ".join(differences) +
                        "\nUse the settings that it was trained with, or start a new run under another tag")


def _differences(name, have, want):
    if isinstance(have, dict) and isinstance(want, dict):
        return [line for key in sorted(have | want) for line in _differences(f"{name}.{key}", have.get(key), want.get(key))]
    want = list(want) if isinstance(want, tuple) else want  # JSON knows no tuples
    return [] if have == want else [f"{name}: the checkpoint has {have!r}, this run has {want!r}"]


# ---------------------------------------------------------------------------------------------------------------------
# What goes into meta

def git_commit():
    """Commit that this code runs from, with "-dirty" when files differ from it; None outside a repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    try:
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if git("status", "--porcelain", "--untracked-files=no").stdout else "")


def rng_state():
    """All generators of this process, JSON-able. Ranks are seeded alike, so rank 0's stand for all."""
    pack = lambda tensor: base64.b64encode(tensor.numpy().tobytes()).decode()
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": pack(torch.get_rng_state()),
        "cuda": pack(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state):
    """Put the generators back to where rng_state() saw them."""
    unpack = lambda text: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(unpack(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(unpack(state["cuda"]))
