"""
What a session is at one moment, beside its tree: which spans are in view, with their keys and values, and what the allocator remembers.
A State stays in memory to go back to, or is written to a folder to go on from in another process: one file, replaced whole, with the keys
and values as tensors and the rest as JSON in its header.

L = layers, H = kv heads, n = entries of a span, d = head width
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from megacontext.allocator import Focus
from megacontext.span import Span
from megacontext.working_context import Pins
from nanochat.common import UserError

FILE = "session.safetensors"


@dataclass(frozen=True)
class State:
    model: str    # as the tree's header names who wrote its gists; None where it does not
    length: int   # tokens of history
    budget: int
    n_diff: int
    margin: float
    pins: Pins
    spans: list   # the working context
    scores: list
    focus: Focus
    frame: int    # the length for which positions are mapped
    stats: dict
    kv: dict      # finished span -> k, v, each (L, H, n, d), keys unturned; in the order of the cache
    loose: tuple  # k, v of the live block's tokens


def save_state(state, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {"loose": state.loose} | {f"{span.level}.{span.index}": pair for span, pair in state.kv.items()}
    tensors = {f"{kind}.{name}": tensor.contiguous() for name, pair in named.items() for kind, tensor in zip("kv", pair)}
    plain = {name: getattr(state, name) for name in ("model", "length", "budget", "n_diff", "margin", "scores", "frame", "stats")}
    plain |= dict(pins=asdict(state.pins), spans=[[s.level, s.index, s.live] for s in state.spans], order=[[s.level, s.index] for s in state.kv],
                  tick=state.focus.tick, edited=[[node.level, node.index, tick] for node, tick in state.focus.edited.items()])
    save_file(tensors, folder / (FILE + ".new"), metadata={"session": json.dumps(plain)})
    (folder / (FILE + ".new")).replace(folder / FILE)


def saved(folder):
    """What save_state wrote but the keys and values (a dict: length, budget, spans, ...), None if there is nothing."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["session"])
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, the session is then assembled anew from its tree") from None


def load_state(folder, device="cpu"):
    plain = saved(folder)
    if plain is None:
        raise UserError(f"no saved session in {folder}: expected {FILE} there")
    tensors = load_file(Path(folder) / FILE, device=str(device))
    pair = lambda name: (tensors[f"k.{name}"], tensors[f"v.{name}"])
    kv = {Span(level, index): pair(f"{level}.{index}") for level, index in plain["order"]}
    return State(model=plain["model"], length=plain["length"], budget=plain["budget"], n_diff=plain["n_diff"], margin=plain["margin"],
                 pins=Pins(**{kind: tuple(map(tuple, ranges)) for kind, ranges in plain["pins"].items()}),
                 spans=[Span(*span) for span in plain["spans"]], scores=plain["scores"],
                 focus=Focus(plain["tick"], {Span(level, index): tick for level, index, tick in plain["edited"]}),
                 frame=plain["frame"], stats=plain["stats"], kv=kv, loose=pair("loose"))
