"""
What bench/runtime.py measures, one function for each number of its tables. In: the networks and a tree. Out: numbers.
"""

import ctypes
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import megacontext.cost as memory_cost
import megacontext.runtime as runtime
from megacontext.gistnet import GistNet
from megacontext.ingest import NODES_AT_ONCE, ingest
from megacontext.lensnet import LensNet
from megacontext.runtime import Session
from megacontext.span import BLOCK
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import cost as entries_of
from nanochat import cost, hardware
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

SLICE = 2 * BLOCK      # tokens that one decodes before it is another's turn
WARM_UP = 8 * BLOCK
PROFILE = 16 * BLOCK   # tokens of the run with timers
QUESTION = 20          # tokens of a prompt to a session that has a history
LARGE = 10_000_000
CHUNK = 2048           # of a prefill


@dataclass
class Rig:
    """What every measurement needs."""
    gpt: GPT
    gistnet: GistNet
    lensnet: LensNet
    budget: int
    text: np.ndarray # ids to read, int32
    refocus_every: int = runtime.REFOCUS_EVERY

    def session(self, tree, **settings):
        return Session(self.gpt, self.gistnet, self.lensnet, tree, self.budget, refocus_every=self.refocus_every, **settings)

    def header(self):
        return make_header(self.gpt.config.width, 0)

    def sync(self):
        if self.gpt.device.type == "cuda":
            torch.cuda.synchronize()

    def fits(self, entries):
        """May a full attention of so many entries be tried? Its cache, and the mask of a prefill, in half of the memory that is free."""
        itemsize = self.gpt.dtype.itemsize
        need = entries * (cost.kv_bytes(self.gpt.config, itemsize) + CHUNK * (1 + itemsize))
        return need <= hardware.describe(self.gpt.device).free_memory / 2


# ---------------------------------------------------------------------------------------------------------------------
# Growth

def grow(rig, tree, length):
    """Ingest up to `length` tokens, then some ticks of a session, and what this process holds then."""
    start, before = time.perf_counter(), tree.length
    ingest(rig.gpt, rig.gistnet, tree, rig.text[before:length])
    seconds = time.perf_counter() - start
    session = rig.session(tree)
    decode(lambda id: session.feed([id]), rig.text[length:length + 2 * BLOCK])
    rss, anon = resident()
    return dict(length=length, ingest_tokens_s=(length - before) / seconds, rss_mb=rss, rss_anon_mb=anon)


def settle(rig):
    """What a process takes once, whatever it reads later, is taken before growth is measured: kernels, and what bulk ingest leaves in the heap."""
    tree = MegaTree.in_memory(rig.header())
    for _ in range(3):
        ingest(rig.gpt, rig.gistnet, tree, np.resize(rig.text, 2 * NODES_AT_ONCE * BLOCK))
        session = rig.session(tree)
        decode(lambda id: session.feed([id]), np.resize(rig.text, 2 * BLOCK))


def resident():
    """
    MB of this process in memory: all, and without what is mapped from files. The C library first gives back what of its heap is free: it keeps
    60 MB of it or not as chance has it, and a history of a million tokens takes 5 (LOG.md, 2026-11-22).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))


def disk_bytes(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def decode(step, ids):
    """The milliseconds that each id took, until its next token had come to Python."""
    times = []
    for id in ids.tolist():
        start = time.perf_counter()
        int(step(id).argmax())
        times.append(1000 * (time.perf_counter() - start))
    return times


def plain(rig, entries):
    """A step of the plain engine behind so many entries; they stay as many."""
    cache = KVCache(rig.gpt.config, 1, entries + 1, rig.gpt.device, rig.gpt.dtype)
    for tensor in (cache.k, cache.v):
        tensor.fill_(0.1) # memory that was never written would be read faster
    cache.length = entries

    def step(id):
        logits = rig.gpt.extend(torch.tensor([[id]], device=rig.gpt.device), cache)[0]
        cache.rewind(entries)
        return logits
    return step


def in_turn(rig, sessions, rounds, tokens, seed):
    """
    Sessions, {name: Session}, and the plain engine decode the same ids, a slice each in turn, in an order drawn anew every time.
    Returns {name or "plain": what it took, and of a session what its ticks did in a block}.
    """
    steps = {name: lambda id, session=session: session.feed([id]) for name, session in sessions.items()} | {"plain": plain(rig, rig.budget - BLOCK // 2)}
    for step in steps.values():
        decode(step, np.resize(rig.text, WARM_UP))
    before = {name: dict(session.stats) for name, session in sessions.items()}
    rng, ms = random.Random(seed), {name: [] for name in steps}
    for ids in np.resize(rig.text, (rounds * tokens // SLICE, SLICE)):
        for name in rng.sample(list(steps), len(steps)):
            ms[name] += decode(steps[name], ids)
    told = {}
    for name, times in ms.items():
        means = np.array(times).reshape(rounds, tokens).mean(axis=1)
        told[name] = dict(rounds_ms=means.tolist(), mean_ms=float(np.median(means)), median_ms=float(np.median(times)), p99_ms=float(np.percentile(times, 99)),
                          max_ms=max(times))
    for name, session in sessions.items():
        edits, read = (session.stats[count] - before[name][count] for count in ("edits", "read_tokens"))
        told[name] |= dict(edits=BLOCK * edits / (rounds * tokens), again=BLOCK * read / (rounds * tokens) - BLOCK)
    return told


def stages(rig, session):
    """A run with timers: milliseconds of a block of 32 tokens by stage, what is in view on average, and the memory held."""
    spent, cuda = dict.fromkeys(("ingest", "refocus", "lens", "allocator"), 0.0), rig.gpt.device.type == "cuda"

    def timed(name, work):
        def wrapped(*args, **settings):
            rig.sync()
            start = time.perf_counter()
            result = work(*args, **settings)
            rig.sync()
            spent[name] += 1000 * (time.perf_counter() - start)
            return result
        return wrapped

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    visible, asked, total, ids, scorer = [], [], 0.0, np.resize(rig.text, PROFILE), session.scorer
    with mock.patch.multiple(runtime, complete=timed("ingest", runtime.complete), refocus=timed("allocator", runtime.refocus)), \
         mock.patch.multiple(session, score=timed("lens", session.score), refocus=timed("refocus", session.refocus),
                             scorer=lambda hits, *rest: (asked.append(len(hits)), scorer(hits, *rest))[1]):
        for id in ids:
            total += decode(lambda id: session.feed([id]), id[None])[0]
            visible.append(entries_of(session.spans))
    blocks = PROFILE // BLOCK
    ms = {name: value / blocks for name, value in spent.items()}
    row = dict(block_ms=total / blocks, read_ms=total / blocks - ms["ingest"] - ms["refocus"], ingest_ms=ms["ingest"], refocus_ms=ms["refocus"],
               lens_ms=ms["lens"], allocator_ms=ms["allocator"], splice_ms=ms["refocus"] - ms["lens"] - ms["allocator"])
    row |= {f"{name}_share": row[f"{name}_ms"] / row["block_ms"] for name in ("ingest", "lens", "allocator", "splice")}
    for_a_moment = torch.cuda.max_memory_allocated() - allocated if cuda else 0
    return row | dict(visible=statistics.mean(visible), spans=len(session.spans), asked=sum(asked) / PROFILE, held_mb=(held(session) + for_a_moment) / 2 ** 20)


def question(rig, session, times=3):
    """
    {question_ms: from a prompt of QUESTION tokens to the first token of the answer, search_ms: of these, LensNet's look through the whole history}: medians.
    It is what a history's length may cost: once for each prompt.
    """
    took, searched, search = [], [], runtime.block_scores

    def timed(*args):
        rig.sync()
        start = time.perf_counter()
        scores = search(*args)
        searched.append(time.perf_counter() - start)
        return scores

    with mock.patch.object(runtime, "block_scores", timed):
        for ids in np.resize(rig.text, (times, QUESTION)).tolist():
            took.append(seconds(rig, lambda: int(session.feed(ids).argmax())))
    return dict(question_ms=1000 * statistics.median(took), search_ms=1000 * statistics.median(searched) if searched else 0.0)


def held(thing):
    """Bytes of the tensors that can be reached from an object, networks and trees left out."""
    seen, storages, todo = set(), {}, [thing]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (torch.nn.Module, MegaTree, type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple)):
            todo += thing
        else:
            todo += getattr(thing, "__dict__", {}).values()
    return sum(storages.values())


def full_attention(rig, length):
    """Milliseconds a token of plain full attention over the whole history, None where it does not fit."""
    return statistics.median(decode(plain(rig, length), rig.text[:10])[2:]) if rig.fits(length) else None


# ---------------------------------------------------------------------------------------------------------------------
# The first token of a prompt

def seconds(rig, work):
    rig.sync()
    start = time.perf_counter()
    work()
    rig.sync()
    return time.perf_counter() - start


def first_token(rig, n, path):
    """Seconds from a prompt of n tokens to the first token: by full attention, by a session, and of ingest alone; the median of some runs."""
    ids, took = rig.text[:n].tolist(), {"prefill": [], "session": [], "ingest": [], "next": []}

    def prefill():
        cache = KVCache(rig.gpt.config, 1, n, rig.gpt.device, rig.gpt.dtype)
        for start in range(0, n, CHUNK):
            logits = rig.gpt.extend(torch.tensor([ids[start:start + CHUNK]], device=rig.gpt.device), cache)
        int(logits.argmax())

    for run in range(max(1, min(3, 2 ** 13 // n))):
        if rig.fits(n):
            took["prefill"].append(seconds(rig, prefill))
        with MegaTree.create(path / f"session-{run}", rig.header()) as tree:
            session = rig.session(tree)
            took["session"].append(seconds(rig, lambda: int(session.feed(ids).argmax())))
            took["next"].append(seconds(rig, lambda: int(session.feed(ids[:1]).argmax())))
        with MegaTree.create(path / f"ingest-{run}", rig.header()) as tree:
            took["ingest"].append(seconds(rig, lambda: ingest(rig.gpt, rig.gistnet, tree, ids)))
    return dict(prompt=n) | {f"{name}_s": statistics.median(times) if times else None for name, times in took.items()}


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs, and ten million tokens

def flops(config, gist_config, lens_config, asked, budget):
    """Per token of history, over the base's forward of one decoded token at W; LensNet is asked of so many entries a token."""
    base = cost.forward_flops(config, budget)
    return dict(base_mflops=base / 1e6, gistnet_flops_share=memory_cost.ingest_flops(gist_config) / base,
                lensnet_flops_share=memory_cost.score_flops(lens_config, asked) / base,
                embed_flops_share=memory_cost.embed_flops(config) / base, lane_flops_share=memory_cost.lane_flops(config) / base)


def large_tree(tree, path):
    """A tree of LARGE tokens whose rows are those of `tree`, over and over: no network is asked."""
    tokens = tree.tokens(0, tree.length)
    gists = {level: tree.gists(level, 0, tree.count(level)) for level in range(1, tree.levels)}
    with MegaTree.create(path, tree.header) as large:
        while large.length < LARGE:
            large.append_tokens(np.resize(tokens, min(2 ** 20, LARGE - large.length)))
            level = 1
            while (pending := large.pending(level))[1]:
                a, b = pending
                if a < b:
                    large.append_gists(level, np.resize(gists[min(level, max(gists))], (b - a, tree.header["width"])))
                level += 1


OPEN = """
import json, sqlite3, sys, time
import numpy
from megacontext.tree import MegaTree
from megacontext.working_context import assemble
resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
before, start = resident(), time.perf_counter()
tree = MegaTree.open(sys.argv[1])
opened = time.perf_counter() - start
spans = assemble(tree.length, int(sys.argv[2]), tail=32)
tree.gists_of([span for span in spans if not span.live])
tree.tokens(tree.length - 256, tree.length)
print(json.dumps(dict(tokens=tree.length, seconds=opened, look_seconds=time.perf_counter() - start - opened, rss_mb=resident() - before)))
"""


def open_large(rig, tree, path):
    """A tree of LARGE tokens opened in a fresh process: {tokens, seconds, look_seconds, rss_mb}"""
    large_tree(tree, path)
    out = subprocess.run([sys.executable, "-c", OPEN, path, str(rig.budget)], cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout)
