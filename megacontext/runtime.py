"""
The runtime session: unbounded history in, next-token logits out, at the cost of one working context.

Every 32 tokens, one tick:
    ingest    the finished block gets its gist; the tree grows                     (ingest.py)
    refocus   LensNet scores the entries, the allocator expands and collapses      (lensnet.py, allocator.py)
    assemble  keys and values of the entries in view, in timeline order, into one cache
    decode    tokens are read behind that cache like in any GPT with a KV cache

Keys and values belong to entries, not to working contexts: a gist's are a function of the gist alone, a raw block's are those it
had when it was read. So a refocus splices and does not re-read: only blocks that come into view and were never read, or were
forgotten, cost a forward. Keys are kept unturned and are turned to the positions of the moment (positions.py).
`exact=True` re-reads every raw block from the earliest edit on: the reference that the splicing is compared with.

A session is a stream (nanochat.engine): feed(ids) -> logits, length. A prompt much longer than the tail is not read by the GPT
at all but its end: GistNet summarises it, and LensNet opens what the question asks for.

L = layers, H = kv heads, d = head width, n = entries
"""
import json
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megacontext.allocator import Focus, refocus
from megacontext.ingest import complete, embed_tokens, ingest
from megacontext.lensnet import TAIL as ASKING
from megacontext.positions import map_positions
from megacontext.span import BLOCK, Span
from megacontext.telemetry import Telemetry
from megacontext.working_context import Pins, advance, assemble, check, cost
from nanochat.attention import rope_angles, rotate
from nanochat.common import UserError
from nanochat.gpt import Entries, causal_after
from nanochat.kv_cache import KVCache

COMMIT = 1024         # tokens between commits while reading: a commit waits for the disk some 13 ms. save() commits too
MARGIN = 0.02        # nats a block: what an expansion must be better by than the collapse that pays for it
STAGES = ("read", "ingest", "refocus")
LEAST_BUDGET = 6 * BLOCK # a raw tail, room for the next block, and the most gists that cannot collapse: 31 a level, up to level 4


class Session:
    def __init__(self, gpt, gistnet, lensnet, tree, budget, *, n_diff=4, margin=MARGIN, pins=Pins(), exact=False, kept_tokens=None,
                 telemetry=None):
        """
        budget        most entries the GPT reads at once, tokens and gists alike
        n_diff        most edits a refocus; 0 = recency alone
        kept_tokens   raw tokens whose keys and values are kept when they leave the view (default: four budgets)
        telemetry     a megacontext.telemetry.Telemetry that is told of every tick (default: one that keeps to memory)
        The tree may hold a history already: it is assembled, not re-read.
        """
        if budget < LEAST_BUDGET:
            raise UserError(f"a working context of {budget} entries is too small: expected at least {LEAST_BUDGET}, raise --budget")
        self.gpt, self.gistnet, self.lensnet, self.tree = gpt, gistnet, lensnet, tree
        self.budget, self.n_diff, self.margin, self.pins, self.exact = budget, n_diff, margin, pins, exact
        self.tail = min(8 * BLOCK, budget // 4 // BLOCK * BLOCK) # raw whatever the scores say
        self.trained = gpt.config.seq_len - 2 * BLOCK # between two ticks, positions run up to a block and a live block past it
        self.kept_blocks = (4 * budget if kept_tokens is None else kept_tokens) // BLOCK
        self.cache = KVCache(gpt.config, 1, budget, gpt.device, gpt.dtype)
        self.kv = OrderedDict() # (level, index) -> k, v, each (L, H, n, d), keys unturned; least recently used first
        self.spans, self.scores, self.edits, self.focus = [], [], [], Focus()
        self.frame = tree.length # the length at which positions were last mapped
        self.telemetry, self.told = telemetry or Telemetry(), {}
        self.stats = dict(ticks=0, edits=0, read_tokens=0, ingested_tokens=0, refocus_ms=0.0, read_ms=0.0, ingest_ms=0.0)
        if tree.length:
            self._assemble()

    @property
    def length(self):
        """Tokens of history."""
        return self.tree.length

    # ------------------------------------------------------------------------------------------------------------------
    # Reading

    @torch.no_grad()
    def feed(self, ids, progress=None):
        """
        ids, at least one -> logits (V,) of the token that follows. One token is decoding. Several are a prompt: after it the
        context is refocused on what it asks, and its end is read again in that light.
        """
        if len(ids) == 0:
            raise ValueError("nothing to feed: expected at least one token id")
        ids = list(ids)
        skip = len(ids) - 2 * self.tail
        if skip > 0: # a long prompt: what is beyond the tail need not be read by the GPT, only remembered
            skip += self.tail
            start = time.perf_counter()
            self.kv.pop((0, self.tree.length // BLOCK), None) # of the live block as far as it went
            ingest(self.gpt, self.gistnet, self.tree, ids[:skip], progress)
            self._count("ingest", start, ingested_tokens=skip)
            self._assemble()
            ids, prompt = ids[skip:], True
        else:
            prompt = len(ids) > 1
        while ids:
            room = BLOCK - self.tree.length % BLOCK
            logits = self._read(ids[:room])
            ids = ids[room:]
        if prompt and self.n_diff and self.refocus():
            logits = self._read_again()
        return logits

    def _read(self, ids):
        """Read tokens that stay within the live block; a tick when they complete it."""
        start, n, length = time.perf_counter(), len(ids), self.tree.length
        self.tree.append_tokens(ids)
        logits = self._forward(length)
        self.spans = advance(self.spans, length + n) # the last refocus left room for it
        self.scores = (self.scores + [0.0])[:len(self.spans)]
        self._count("read", start, read_tokens=n)
        if self.tree.length % BLOCK == 0:
            start = time.perf_counter()
            complete(self.gpt, self.gistnet, self.tree)
            if self.tree.length % COMMIT == 0:
                self.tree.commit()
            self._count("ingest", start)
            self.refocus()
        return logits

    def _forward(self, start):
        """Read the timeline's tokens from `start` to its end behind the cache; logits (V,) of the next token."""
        n = self.tree.length - start
        positions = self._mapped(np.arange(start, start + n))
        see = "all" if n == 1 else causal_after(self.cache.length, n, self.gpt.device)
        return self.gpt.head(self.gpt.trunk(embed_tokens(self.gpt, self.tree, start, start + n), positions, see, self.cache)[0, -1])

    def _read_again(self):
        """After a refocus: the live block, and a raw block just before it, are read again, so that they see what was opened."""
        spans = self.spans[-2:] if self.spans[-1].live else self.spans[-1:]
        first = min(span.start for span in spans if span.level == 0)
        self.cache.rewind(self.cache.length - (self.tree.length - first))
        return self._forward(first)

    # ------------------------------------------------------------------------------------------------------------------
    # Refocus

    @torch.no_grad()
    def refocus(self):
        """Score the entries, edit the working context, splice. Returns the edits."""
        start = time.perf_counter()
        self._keep_live()
        scores = self.score()
        plan = refocus(self.spans, scores, self.budget, self.focus, n_diff=self.n_diff, margin=self.margin, tail=self.tail, pins=self.pins,
                       room=BLOCK - self.tree.length % BLOCK) # so that the live block can be finished before the next tick
        by_span = dict(zip(self.spans, scores))
        self.spans, self.edits, self.focus = plan
        self.scores = [by_span.get(span, 0.0) for span in self.spans]
        check(self.spans, self.tree.length, self.budget)
        if self.exact and self.edits:
            earliest = min(edit.node.start for edit in self.edits)
            for span in self.spans:
                if span.level == 0 and span.start >= earliest:
                    self.kv.pop((0, span.index), None)
        self._splice()
        self._count("refocus", start, ticks=1, edits=len(self.edits))
        self._tell()
        return self.edits

    def score(self):
        """LensNet's score of each span: a list of floats, 0 for the live block."""
        device, length = self.gpt.device, self.tree.length
        done = [i for i, span in enumerate(self.spans) if not span.live]
        scores = [0.0] * len(self.spans)
        if not done or not self.n_diff:
            return scores
        spans = [self.spans[i] for i in done]
        tail = embed_tokens(self.gpt, self.tree, max(0, length - ASKING), length).x
        gists = torch.as_tensor(self.tree.gists_of(spans), dtype=self.gpt.dtype, device=device)
        levels = torch.tensor([span.level for span in spans], device=device)
        here = self._mapped(np.array([span.centre for span in spans]))[0]
        distances = (self._mapped(np.array([length]))[0] - here).clamp(min=1) # as the GPT sees them, within what was trained
        seen = torch.ones(1, len(spans), dtype=torch.bool, device=device)
        tail_seen = torch.ones(1, tail.size(1), dtype=torch.bool, device=device)
        got = self.lensnet(tail, tail_seen, gists[None], levels[None], distances[None], seen)[0].tolist()
        for i, score in zip(done, got):
            scores[i] = score
        return scores

    # ------------------------------------------------------------------------------------------------------------------
    # Keys and values

    def _assemble(self):
        """A fresh working context for the tree as it is, by recency."""
        self.spans = assemble(self.tree.length, self.budget - BLOCK, tail=self.tail)
        self.scores = [0.0] * len(self.spans)
        for span in self.spans:
            if span.live:
                self.kv.pop((0, span.index), None)
        self._splice()

    def _mapped(self, timeline):
        """Timeline positions (n,) -> positions the GPT was trained on, (1, n) fp32."""
        mapped = map_positions(np.asarray(timeline, dtype=np.float64), self.frame, self.trained)
        return torch.as_tensor(mapped, dtype=torch.float32, device=self.gpt.device)[None]

    def _turned(self, k, timeline, back=False):
        """Keys (L, H, n, d) turned to where the timeline positions (n,) are mapped now, or back from there."""
        cos, sin = rope_angles(self._mapped(timeline), self.gpt.config.head_width)
        return rotate(k, cos, -sin if back else sin)

    def _keep_live(self):
        """Take the newest block's and the live block's keys and values out of the cache: they were read since the last splice."""
        at = self.cache.length
        for span in reversed(self.spans[-2:]):
            if span.level == 0 and at:
                at -= span.width
                k = self._turned(self.cache.k[:, 0, :, at:at + span.width], np.arange(span.start, span.stop), back=True)
                self.kv[(0, span.index)] = (k, self.cache.v[:, 0, :, at:at + span.width].clone())

    def _splice(self):
        """Make the cache hold exactly the entries of the working context, at the positions of now."""
        self.frame = self.tree.length
        gists = [span for span in self.spans if span.level and (span.level, span.index) not in self.kv]
        if gists:
            self._read_gists(gists)
        blocks = [span for span in self.spans if span.level == 0 and (0, span.index) not in self.kv]
        if blocks:
            self._load([span for span in self.spans if (span.level, span.index) in self.kv])
            self._read_blocks(blocks)
        self._load(self.spans)
        self._forget()

    def _load(self, spans):
        """Fill the cache with these spans."""
        self.cache.length = 0
        if not spans:
            return
        pairs = []
        for span in spans:
            key = (span.level, span.index)
            self.kv.move_to_end(key)
            pairs.append(self.kv[key])
        timeline = np.concatenate([span.positions() for span in spans])
        end = len(timeline)
        self.cache.k[:, 0, :, :end] = self._turned(torch.cat([k for k, _ in pairs], dim=2), timeline)
        self.cache.v[:, 0, :, :end] = torch.cat([v for _, v in pairs], dim=2)
        self.cache.length = end

    def _read_gists(self, spans):
        """Keys and values of gists: each is read alone, because a gist sees itself only."""
        gpt = self.gpt
        x = torch.as_tensor(self.tree.gists_of(spans), dtype=gpt.dtype, device=gpt.device)
        means = [self._value_means(span) for span in spans]
        values = [torch.stack([mean[i] for mean in means])[:, None] for i in range(len(gpt.config.value_layers))]
        alone = KVCache(gpt.config, len(spans), 1, gpt.device, gpt.dtype)
        gpt.trunk(Entries(x[:, None], values), torch.zeros(1, 1, device=gpt.device), "all", alone) # at position 0 keys are unturned
        for i, span in enumerate(spans):
            self.kv[(span.level, span.index)] = (alone.k[:, i].clone(), alone.v[:, i].clone())

    def _value_means(self, span):
        """A gist's value embeddings are the means of its tokens': one (value_width,) a value layer."""
        ids = torch.as_tensor(self.tree.tokens(span.start, span.stop), dtype=torch.long, device=self.gpt.device)
        return [table(ids).mean(dim=0) for table in self.gpt.value_tables]

    def _read_blocks(self, blocks):
        """Read raw blocks behind what is in the cache, all in one forward: each sees what lies before it on the timeline."""
        device, have = self.gpt.device, self.cache.length
        room = KVCache(self.gpt.config, 1, have + sum(span.width for span in blocks), device, self.gpt.dtype)
        room.k[:, :, :, :have], room.v[:, :, :, :have], room.length = self.cache.k[:, :, :, :have], self.cache.v[:, :, :, :have], have
        loaded = [span for span in self.spans if span not in set(blocks)]
        columns = torch.as_tensor(np.concatenate([span.positions() for span in loaded + blocks]), device=device)
        timeline = np.concatenate([span.positions() for span in blocks])
        read = [embed_tokens(self.gpt, self.tree, span.start, span.stop) for span in blocks]
        entries = Entries(torch.cat([e.x for e in read], dim=1), [torch.cat(layer, dim=1) for layer in zip(*(e.values for e in read))])
        see = columns <= torch.as_tensor(timeline, device=device)[:, None] # a gist's centre lies before its successor's first token
        self.gpt.trunk(entries, self._mapped(timeline), see[None, None], room)
        k, v = self._turned(room.k[:, 0, :, have:], timeline, back=True), room.v[:, 0, :, have:]
        at = 0
        for span in blocks:
            self.kv[(0, span.index)] = (k[:, :, at:at + span.width].clone(), v[:, :, at:at + span.width].clone())
            at += span.width
        self.stats["read_tokens"] += len(timeline)

    def _forget(self):
        """Drop the least recently shown keys and values; the tree can always give them back."""
        most = len(self.spans) + self.kept_blocks
        while len(self.kv) > most:
            self.kv.popitem(last=False)

    # ------------------------------------------------------------------------------------------------------------------
    # Telemetry and persistence

    def _count(self, stage, start, **counts):
        self.stats[f"{stage}_ms"] += (time.perf_counter() - start) * 1000
        for name, count in counts.items():
            self.stats[name] += count

    def _tell(self):
        """One tick to the telemetry: what changed, and what each stage took since the last one."""
        ms = {stage: self.stats[f"{stage}_ms"] - self.told.get(stage, 0.0) for stage in STAGES}
        self.told = {stage: self.stats[f"{stage}_ms"] for stage in STAGES}
        self.telemetry.tick(self.tree.length, self.spans, self.budget, self.edits, ms)

    def view(self):
        """What a person wants to see: the working context as a list, and a few numbers."""
        strip = [dict(level=s.level, start=s.start, stop=s.stop, score=round(score, 4)) for s, score in zip(self.spans, self.scores)]
        return dict(spans=strip, tokens=self.tree.length, budget=self.budget, used=cost(self.spans), newest_edits=len(self.edits), **self.stats)

    def save(self, folder):
        """
        Write the session beside its tree: which spans are in view, and their keys and values, so that the next token is the same.
        The tree itself is on disk already if it was created there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_live()
        self.tree.commit()
        state = dict(length=self.tree.length, budget=self.budget, n_diff=self.n_diff, margin=self.margin, pins=asdict(self.pins),
                     spans=[[s.level, s.index, s.live] for s in self.spans], scores=self.scores, frame=self.frame, tick=self.focus.tick,
                     edited=[[node.level, node.index, tick] for node, tick in self.focus.edited.items()], stats=self.stats)
        tensors = {}
        for span in self.spans:
            k, v = self.kv[(span.level, span.index)]
            tensors |= {f"k.{span.level}.{span.index}": k.contiguous(), f"v.{span.level}.{span.index}": v.contiguous()}
        save_file(tensors, folder / "kv.safetensors.new")
        (folder / "kv.safetensors.new").replace(folder / "kv.safetensors")
        (folder / "session.json.new").write_text(json.dumps(state))
        (folder / "session.json.new").replace(folder / "session.json")

    @staticmethod
    def saved(folder):
        """What save() wrote about the session in a folder (a dict: length, budget, spans, ...), None if there is none."""
        path = Path(folder) / "session.json"
        return json.loads(path.read_text()) if path.exists() else None

    @classmethod
    def open(cls, folder, gpt, gistnet, lensnet, tree, **settings):
        """Continue a saved session: the same next tokens, in another process."""
        folder = Path(folder)
        state = cls.saved(folder)
        if state is None:
            raise UserError(f"no saved session in {folder}: expected session.json there")
        if state["length"] != tree.length:
            raise UserError(f"the session in {folder} was saved at {state['length']} tokens, its tree holds {tree.length}: they do not belong together")
        settings = dict(budget=state["budget"], n_diff=state["n_diff"], margin=state["margin"], pins=Pins(**{k: tuple(map(tuple, v)) for k, v in state["pins"].items()})) | settings
        self = cls.__new__(cls)
        empty = _Empty()
        cls.__init__(self, gpt, gistnet, lensnet, empty, **settings)
        self.tree, self.frame, self.stats = tree, state["frame"], state["stats"]
        self.spans, self.scores = [Span(*s) for s in state["spans"]], state["scores"]
        self.focus = Focus(state["tick"], {Span(level, index): tick for level, index, tick in state["edited"]})
        tensors = load_file(folder / "kv.safetensors", device=str(gpt.device))
        for span in self.spans:
            self.kv[(span.level, span.index)] = (tensors[f"k.{span.level}.{span.index}"], tensors[f"v.{span.level}.{span.index}"])
        check(self.spans, tree.length, self.budget)
        self._load(self.spans)
        return self


class _Empty:
    """A tree of no tokens, so that a session can be set up before its saved state is laid over it."""
    length = 0
