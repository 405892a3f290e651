"""
What a session is at one moment, beside its tree: which spans are in view, with their keys and values, and what the allocator remembers.
A State stays in memory to go back to, or is written to a folder to go on from in another process: one file, replaced whole, with the keys
and values as tensors and the rest as JSON in its header. Both have a checksum: what is read is what was written, or it is refused.

L = layers, H = kv heads, n = entries of a span, d = head width
"""
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megacontext.allocator import Focus
from megacontext.positions import POLICIES
from megacontext.span import Span
from megacontext.working_context import Pins
from nanochat.checkpoint import flush
from nanochat.common import UserError

FILE = "session.safetensors"
FORMAT = "megacontext-session 2" # the number goes up when what is written changes
AT_ONCE = 1 << 20                # tokens of a history that are looked at together
ANEW = "Delete it: the session is then assembled anew from its tree"


@dataclass(frozen=True)
class State:
    model: str    # as the tree's header names who wrote its gists; None where it does not
    gpt: int      # whose keys and values these are, as weights() tells GPTs apart
    length: int   # tokens of history
    history: int  # their checksum
    budget: int
    n_diff: int
    margin: float
    refocus_every: int
    pins: Pins
    longest: int  # tokens of history that they fit
    exact: bool
    positions: Callable # the policy, one of positions.POLICIES
    spans: list   # the working context
    scores: list
    focus: Focus
    frame: int    # the length for which positions are mapped
    stats: dict
    kv: dict      # finished span -> k, v, each (L, H, n, d), keys unturned; in the order of the cache
    loose: tuple  # k, v of the live block's tokens

    def settings(self):
        """What a Session that goes on from here is made with."""
        return {name: getattr(self, name) for name in ("budget", "n_diff", "margin", "refocus_every", "pins", "longest", "exact", "positions")}


def history(tree, length):
    """crc32 of the first `length` token ids of a tree, which tells histories of one length apart. A million take some milliseconds."""
    crc = 0
    for start in range(0, length, AT_ONCE):
        crc = zlib.crc32(tree.tokens(start, min(start + AT_ONCE, length)), crc)
    return crc


def weights(gpt):
    """crc32 of some 4,096 numbers of each tensor of a GPT, rounded to bf16: training moves them all; fp32 and bf16 are one, fp16 is another. A hundred million parameters take some milliseconds."""
    crc = 0
    for _, tensor in gpt.named_parameters():
        flat = tensor.detach().flatten()
        some = flat[::flat.numel() // 4096 | 1].bfloat16().contiguous().cpu() # an odd step, so that no column of a matrix is passed over
        crc = zlib.crc32(some.view(torch.uint8).numpy(), crc)
    return crc


def save_state(state, folder):
    """Write it into a folder, durably: after a crash at any instant the folder holds this one or the one before, whole."""
    folder = Path(folder)
    path, new = folder / FILE, folder / (FILE + ".new")
    named = {"loose": state.loose} | {f"{span.level}.{span.index}": pair for span, pair in state.kv.items()}
    tensors = {f"{kind}.{name}": tensor.cpu().contiguous() for name, pair in named.items() for kind, tensor in zip("kv", pair)}
    plain = {name: getattr(state, name) for name in ("model", "gpt", "length", "history", "budget", "n_diff", "margin", "refocus_every", "longest", "exact", "scores", "frame", "stats")}
    plain |= dict(pins=asdict(state.pins), spans=[[s.level, s.index, s.live] for s in state.spans], order=[[s.level, s.index] for s in state.kv],
                  positions={policy: name for name, policy in POLICIES.items()}[state.positions],
                  tick=state.focus.tick, edited=[[node.level, node.index, tick] for node, tick in state.focus.edited.items()], crc=_checksum(tensors))
    session = json.dumps(plain)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, metadata={"format": FORMAT, "session": session, "crc": str(zlib.crc32(session.encode()))})
        flush(new)
        new.replace(path)
        flush(folder)
    except (OSError, SafetensorError) as error:
        if new.exists():
            new.unlink()
        raise UserError(f"the session could not be written to {path} ({error}). What was saved there before is intact, and the tree has all tokens: make room there and save again") from error


def saved(folder):
    """What save_state wrote but the keys and values (a dict: length, budget, spans, ...), None if there is nothing."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: expected a saved session, found what cannot be read ({error}). {ANEW}") from None
    if found.get("format") != FORMAT:
        raise UserError(f"{path} cannot be read: expected the format {FORMAT!r}, found {found.get('format')!r}, so it is damaged or was written by other code. {ANEW}")
    session = found.get("session", "")
    _check(path, found.get("crc"), str(zlib.crc32(session.encode())))
    return json.loads(session)


def load_state(folder, device="cpu"):
    path, plain = Path(folder) / FILE, saved(folder)
    if plain is None:
        raise UserError(f"no saved session in {folder}: expected {FILE} there")
    tensors = load_file(path)
    _check(path, plain["crc"], _checksum(tensors))
    pair = lambda name: (tensors[f"k.{name}"].to(device), tensors[f"v.{name}"].to(device))
    kv = {Span(level, index): pair(f"{level}.{index}") for level, index in plain["order"]}
    return State(model=plain["model"], gpt=plain["gpt"], length=plain["length"], history=plain["history"], budget=plain["budget"], n_diff=plain["n_diff"], margin=plain["margin"],
                 refocus_every=plain["refocus_every"], pins=Pins(**{kind: tuple(map(tuple, ranges)) for kind, ranges in plain["pins"].items()}), longest=plain["longest"], exact=plain["exact"], positions=POLICIES[plain["positions"]],
                 spans=[Span(*span) for span in plain["spans"]], scores=plain["scores"],
                 focus=Focus(plain["tick"], {Span(level, index): tick for level, index, tick in plain["edited"]}),
                 frame=plain["frame"], stats=plain["stats"], kv=kv, loose=pair("loose"))


def check_mark(state, tree, budget):
    """Refuse to go back to what a session of this budget on this tree was never at, or is no longer behind."""
    if state.budget != budget:
        raise UserError(f"cannot rewind to a mark of a session with a budget of {state.budget}: this one has {budget}. Use a mark of its own")
    if state.length > tree.length:
        raise UserError(f"cannot rewind to {state.length} tokens: this session has {tree.length}")
    if state.history != history(tree, state.length):
        raise UserError(f"cannot rewind to a mark of {state.length} tokens: this session was rewound further since, and has read other tokens there. Use an older mark")


def check_saved(state, folder, tree, gpt):
    """Refuse to go on from what was saved in a folder of another history, with gists of another model, or by another GPT, whose keys and values are not this one's."""
    here = tree.header.get("model"), tree.length, history(tree, tree.length)
    if (state.model, state.length, state.history) != here:
        raise UserError(f"the session in {folder} and its tree do not belong together: expected model {state.model}, {state.length} tokens and their checksum {state.history}, "
                        f"found model {here[0]}, {here[1]} and {here[2]}. {ANEW}")
    if state.gpt != weights(gpt):
        raise UserError(f"another GPT wrote the keys and values of the session in {folder}: expected weights with checksum {state.gpt}, found {weights(gpt)}. {ANEW}")


def _checksum(tensors):
    """crc32 of tensors on the CPU, {name: tensor}: of names, shapes, types and every byte."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc))
    return crc


def _check(path, expected, found):
    if expected != found:
        raise UserError(f"{path} is damaged: expected checksum {expected}, found {found}. {ANEW}")
