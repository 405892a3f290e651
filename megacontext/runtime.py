"""
The runtime session: unbounded history in, next-token logits out, at the cost of one working context.

Every 4 tokens, one tick, before the next of them is read:
    ingest     every 32, finished blocks that are about to leave the raw tail get their gists (ingest.py)
    score      LensNet says which entries deserve detail                            (lensnet.py)
    allocate   the focus allocator expands and collapses within the budget          (allocator.py)
    splice     keys and values of the entries come into view or leave it            (shown.py, kv_store.py)
Then that token is read behind what is in view, and those up to the next tick, like in any GPT with a KV cache.

Keys and values belong to entries: a gist's are a function of the gist alone, a raw block's are those it had when it was read. So a refocus
splices and does not re-read: only blocks that come into view and were never read, or were forgotten, have to be read: in the next token's forward.
`exact=True` re-reads every raw block from the earliest edit on: the reference that the splicing is compared with.

A session is a stream (nanochat.conversation): feed(ids, prompt) -> logits, skim(ids), length. A prompt much longer than the tail is not read by the GPT
at all but its end: GistNet summarises it, and LensNet opens what the question asks for.

L = layers, H = kv heads, d = head width, n = entries
"""
import time
from contextlib import contextmanager
from math import inf

import numpy as np
import torch

from megacontext.allocator import Focus, begin, refocus
from megacontext.gist_reading import read_gists
from megacontext.ingest import NODES_AT_ONCE, complete, embed_tokens, ids_before, ingest
from megacontext.kv_store import KVStore
from megacontext.lensnet import Scorer
from megacontext.matches import Matches
from megacontext.positions import compressed
from megacontext.search import best_of, block_scores, looked_into
from megacontext.span import BLOCK
from megacontext.state import State, check_mark, check_saved, history, load_state, save_state, weights
from megacontext.telemetry import Telemetry
from megacontext.shown import Shown
from megacontext.working_context import LEAST_BUDGET, LONGEST, Pins, advance, check, check_pins, coarsest, cost, laid, raw_tail
from nanochat.common import UserError
from nanochat.gpt import Entries, causal_after

COMMIT = 4096         # tokens between commits while reading: a commit waits for the disk, 13 to 100 ms. save() commits too
REFOCUS_EVERY = 4    # tokens: what the next tokens need is in the newest ones. Every 8 takes half of the ticks, and sessions gain a fifth less (LOG.md, 2026-11-30)
MARGIN = 0.5         # nats over the rest of a block: what an expansion must be better by than each collapse that pays for it; with 1.0, of 2,048 tokens, sessions lost a fifth of what they gain (LOG.md, 2026-11-30)
COOLDOWN = 0         # ticks that a node rests after an edit: with 8 what was opened stood in the way of what was wanted next (LOG.md, 2026-11-27)
TURNS = 10           # refocuses after a prompt for each level in view, as long as they find something to edit: two blocks a refocus
STAGES = ("read", "ingest", "score", "allocate", "splice")


class Session:
    def __init__(self, gpt, gistnet, lensnet, tree, budget, *, n_diff=4, margin=MARGIN, refocus_every=REFOCUS_EVERY, pins=Pins(), exact=False, positions=compressed,
                 longest=LONGEST, kept=4, kept_in_ram=8, telemetry=None, state=None):
        """
        budget        most entries the GPT reads at once, tokens and gists alike
        n_diff        most edits a refocus; 0 = recency alone
        margin        what an expansion must be better by than the collapse that pays for it, in nats
        refocus_every tokens between refocuses, a divisor of 32, at least 2
        positions     the policy, one of positions.POLICIES
        longest       tokens of history for which the pins must leave room: fewer where a session is known to end
        kept          budgets of keys and values kept on the device when they leave the view, and kept_in_ram in RAM behind them
        telemetry     a megacontext.telemetry.Telemetry that is told of every tick (default: one that keeps to memory)
        state         a mark() to go on from; else the history that the tree holds already is assembled, not re-read
        """
        if budget < LEAST_BUDGET:
            raise UserError(f"a working context of {budget} entries is too small: expected at least {LEAST_BUDGET}, raise --budget")
        if refocus_every < 2 or BLOCK % refocus_every: # a tick knows one token that is not read yet: it must not be the one that completes a block
            raise UserError(f"a refocus every {refocus_every} tokens: expected a divisor of {BLOCK}, at least 2")
        self.gpt, self.gistnet, self.lensnet, self.tree = gpt, gistnet, lensnet, tree
        self.budget, self.n_diff, self.margin, self.refocus_every, self.longest, self.pins, self.exact = budget, n_diff, margin, refocus_every, longest, pins, exact
        self.kept, self.kept_in_ram, self.tail = kept, kept_in_ram, raw_tail(budget)
        self.scorer, self.shown, self.store = Scorer(lensnet), Shown(gpt, budget, positions), KVStore(gpt.device, kept * budget, kept_in_ram * budget)
        self._forget()
        self.telemetry, self.told, self.untold, self.depth = telemetry or Telemetry(), {}, [], 0
        self.stats = dict(ticks=0, edits=0, read_tokens=0, ingested_tokens=0) | {f"{stage}_ms": 0.0 for stage in STAGES}
        if state is not None:
            self.stats = dict(state.stats)
            self.told = dict(self.stats)
            self._restore(state)
        elif tree.length:
            self._assemble()

    @property
    def length(self):
        """Tokens of history."""
        return self.tree.length

    @property
    def spans(self):
        """The working context, oldest first. It follows the tokens that were read when somebody looks, not at every token."""
        if self._behind:
            self.spans = advance(self._spans, self.tree.length) # the last refocus left room for it
        return self._spans

    @spans.setter
    def spans(self, spans):
        self._spans, self._behind = spans, False

    @property
    def pins(self):
        return self._pins

    @pins.setter
    def pins(self, pins):
        check_pins(pins, self.budget, self.tree.length, self.longest)
        self._pins = pins

    @property
    def scores(self):
        """What LensNet said of each span when it was last asked, 0 of what it was not."""
        return [self.newest_scores.get(span, 0.0) for span in self.spans]

    # ------------------------------------------------------------------------------------------------------------------
    # The tree is the only truth: after a failure, what is in view is made from it again

    @contextmanager
    def changing(self):
        """For all that changes tree and view together. What fails in here may leave them apart, so then nothing is in view: ready() starts over. Ticks are told behind it."""
        self.depth += 1
        try:
            yield
        except BaseException:
            self._forget()
            raise
        finally:
            self.depth -= 1
        while self.untold and not self.depth: # whatever telling them may do, tokens and view are as they should be
            self.telemetry.tick(*self.untold.pop(0))

    def ready(self):
        """Nothing is in view before the first token, or after a failure: then show what the tree holds, as a new session on it would."""
        if not self.shown.cache.length:
            with self.changing():
                self.tree.commit() # it may be what failed, and no token may follow a rewind that was not committed
                if self.tree.length:
                    self._assemble()

    def _forget(self):
        """Nothing is in view, and nothing is kept but the tree."""
        self.shown.clear()
        self.store.clear()
        self.spans, self.newest_scores, self.edits, self.focus = [], {}, [], Focus() # newest_scores: span -> what LensNet said of it at the last tick
        self.matches = Matches()
        self.waiting = [] # raw blocks of the working context that are read along with the next token
        self.last = None # ids of the newest tokens, P of them; None where they have to be looked up

    # ------------------------------------------------------------------------------------------------------------------
    # Reading

    @torch.no_grad()
    def feed(self, ids, prompt=True):
        """
        ids, at least one -> logits (V,) of the token that follows. One token is decoding. Several are a prompt: after it the context is refocused on what it asks, and its
        end is read again in that light. prompt=False: several ask nothing either, and leave what they would one by one, where they are not so many that skim() has their beginning.
        If it fails, `length` tells how many of the ids are in the tree: those have been fed, the next feed goes on behind them.
        """
        if len(ids) == 0:
            raise ValueError("nothing to feed: expected at least one token id")
        self.ready()
        with self.changing():
            return self._feed(list(ids), prompt and len(ids) > 1)

    def _feed(self, ids, prompt):
        step = BLOCK if prompt else self.refocus_every # what is said has every tick, a prompt one a block
        done = max(self.skim(ids), default=0)
        if done:
            start = time.perf_counter()
            self.ready()
            self._count("splice", start)
        ids = ids[done:]
        while ids:
            room = step - self.tree.length % step
            logits, ids = self._read(ids[:room], self.tree.length), ids[room:]
        if prompt and self.n_diff and self._settle():
            logits = self._read_again(logits)
        return logits

    def skim(self, ids):
        """
        Take in what of a prompt the GPT need not read, only remember: all but a raw tail, where the prompt is longer than two. A generator of the tokens taken in so far, a
        stretch at a time; feed() takes the rest. Whoever stops it has those in the history. Until the next feed or mark nothing is in view: a context of before is of no more use.
        """
        skip, done, stretch = len(ids) - self.tail, 0, NODES_AT_ONCE * BLOCK
        if skip <= self.tail:
            return
        self._forget()
        while done < skip:
            start = time.perf_counter()
            stop = min(done + stretch - self.tree.length % stretch, skip)
            ingest(self.gpt, self.gistnet, self.tree, ids[done:stop])
            self._count("ingest", start, ingested_tokens=stop - done)
            done = stop
            yield done

    def _settle(self):
        """Search the whole history for what the prompt asks, and refocus until nothing more is wanted, TURNS times for each level in view at most. Returns whether anything was edited."""
        if not (levels := max(span.level for span in self.spans)):
            return False
        start, edits, self.focus = time.perf_counter(), [], Focus(self.focus.tick)
        found = block_scores(self.lensnet, self.tree, lambda centres: self.shown.distances(centres, self.tree.length), self.gpt.device)
        self._count("score", start)
        for _ in range(TURNS * levels):
            if not self.refocus(found):
                break
            edits += self.edits
        self.edits, rest = edits, self.focus.tick + BLOCK // self.refocus_every
        self.focus = Focus(self.focus.tick, {edit.node: rest for edit in edits if edit.kind == "expand"}) # for a block of an answer, whose own words match elsewhere, and closed what it was read from (LOG.md, 2026-11-30)
        return len(edits) > 0

    def _read(self, ids, length):
        """Read tokens that stay within the live block, behind `length` others."""
        known, P = torch.tensor([self.before() + ids], device=self.gpt.device), self.gpt.config.previous
        self.take(ids)
        start = time.perf_counter()
        logits = self._forward(self.gpt.embed(known[:, P:], known[:, :P]), length)
        self._count("read", start, read_tokens=len(ids))
        self.grown(ids)
        return logits

    def take(self, ids):
        """Append tokens to the tree that are read next. If a tick is due it comes first and knows the first of them, as they come one by one: what it opens is there when they are read."""
        self.before() # of them, while the tree ends in front of them
        due, self._behind = self.tree.length > 0 and self.tree.length % self.refocus_every == 0, True
        self.tree.append_tokens(ids[:1])
        if due:
            self.refocus(wait=True)
        self.tree.append_tokens(ids[1:])

    def before(self):
        """Ids of the newest tokens, P of them, in whose light the next one is embedded; -1 where there are not so many."""
        if self.last is None:
            self.last = ids_before(self.gpt, self.tree, self.tree.length)[0].tolist()
        return self.last

    def _forward(self, entries, start):
        """Read entries of the timeline's newest tokens, from `start` on, and the blocks that wait, behind what is in view; logits (V,) of the next token."""
        n = entries.x.size(1)
        if self.waiting:
            hidden = self.read_waiting(entries, np.arange(start, start + n))
        else:
            hidden = self.shown.read(entries, range(start, start + n), "all" if n == 1 else causal_after(self.shown.cache.length, n, self.gpt.device))
        return self.gpt.head(hidden[0, -1])

    def grown(self, ids):
        """Tokens ids, which take() appended to the tree, were read: a finished block gets its place."""
        self.last, self._behind = (self.before() + ids)[-self.gpt.config.previous:], True
        if self.tree.length % BLOCK == 0:
            self.shown.seal(self.spans[-1:])
            start = time.perf_counter()
            first, last = self.tree.pending(1)
            if last - first > self.tail // BLOCK: # what is in the tail cannot collapse: its gists are written together, later
                complete(self.gpt, self.gistnet, self.tree)
            if self.tree.length % COMMIT == 0:
                self.tree.commit()
            self._count("ingest", start)

    def flush(self):
        """Write the gists of every finished block, and commit."""
        complete(self.gpt, self.gistnet, self.tree)
        self.tree.commit()

    def _read_again(self, logits):
        """After a refocus: the live block, and a raw block just before it, are read again, so that they see what was opened. The new logits; the old ones if all is a gist."""
        shown, start = self.shown, self.tree.length - self.spans[-1].live
        whole = [span for span in self.spans[-2:] if span.level == 0 and span.stop == start]
        start -= BLOCK * len(whole)
        if start == self.tree.length:
            return logits
        shown.lift()
        shown.remove(set(whole))
        logits = self._forward(embed_tokens(self.gpt, self.tree, start, self.tree.length), start)
        shown.seal(whole)
        return logits

    # ------------------------------------------------------------------------------------------------------------------
    # Refocus

    @torch.no_grad()
    def refocus(self, found=None, wait=False):
        """Score the entries, edit the working context, splice. Returns the edits. found: as in score(); wait: what has to be read may wait for the next token."""
        self.ready()
        start = time.perf_counter()
        if self.pins.never: # a block may collapse while it is in the tail
            complete(self.gpt, self.gistnet, self.tree)
            start = self._count("ingest", start)
        scores, beneath = self.score(found)
        start = self._count("score", start, ticks=1)
        self.newest_scores = dict(zip(self.spans, scores))
        plan = refocus(self.spans, scores, self.budget, self.focus, beneath=beneath, n_diff=self.n_diff, margin=self.margin, cooldown=COOLDOWN, tail=self.tail, pins=self.pins, top=coarsest(self.tree.length, self.budget), room=BLOCK - self.tree.length % BLOCK) # so that the live block can be finished before the next tick
        with self.changing(): # nothing has until here: pins that do not fit are refused, and all stays in view
            self.spans, self.edits, self.focus = plan
            check(self.spans, self.tree.length, self.budget)
            start = self._count("allocate", start, edits=len(self.edits))
            if self.edits or self.tree.length % BLOCK == 1: # without edits, positions are mapped anew where a block begins only
                loose = self.shown.lift()
                self.waiting = self._splice()
                self.shown.lay(*loose)
                if not wait:
                    self.read_waiting()
            self._count("splice", start)
            self._note()
        return self.edits

    def score(self, found=None):
        """LensNet's score of each span, a list, 0 for the live block; and (gist, score) of blocks that may be laid on others. found: scores of all finished blocks, if the history was searched."""
        spans = [span for span in self.spans if not span.live]
        if not spans or not self.n_diff:
            return [0.0] * len(self.spans), []
        scores, beneath = best_of(found, spans) if found is not None else looked_into(spans, self._ask)
        return scores + [0.0] * (len(self.spans) - len(spans)), beneath # the live block is the last

    def _ask(self, spans):
        """LensNet's scores of finished spans of the tree, in the order of the timeline, numpy (n,)."""
        levels, indices = np.array([span[:2] for span in spans]).T
        widths = BLOCK ** levels.clip(1)
        return self.scorer(self.matches.hits(self.tree, spans), levels, self.shown.distances(indices * widths + (widths - 1) / 2, self.tree.length))

    # ------------------------------------------------------------------------------------------------------------------
    # Keys and values

    @torch.no_grad()
    def _assemble(self):
        """A fresh working context for the tree as it is, by recency and as the pins order."""
        complete(self.gpt, self.gistnet, self.tree)
        self.shown.lift() # the live block as far as it went: what follows is read with it
        self.spans = begin(self.tree.length, self.budget, self.tail, self.pins)
        self.newest_scores = {}
        self.waiting, live = self._splice(now=True), self.spans[-1].live
        if live:
            self._forward(embed_tokens(self.gpt, self.tree, self.tree.length - live, self.tree.length), self.tree.length - live)
            self.stats["read_tokens"] += live
        self.read_waiting()

    def _splice(self, now=False):
        """Show the entries of the working context, but for the live block and the raw blocks that must be read first: returns these. now: at the positions of this moment."""
        shown, wanted = self.shown, {span for span in self.spans if not span.live}
        earliest = min((edit.node.start for edit in self.edits), default=inf) if self.exact else inf
        stale = {span for span in wanted if span.level == 0 and span.start >= earliest}
        for span in stale:
            self.store.drop(span)
        for span, (k, v) in shown.remove((set(shown.spans) - wanted) | stale).items():
            if span not in stale:
                self.store.put(span, k, v)
        shown.reframe(self.tree.length, now)
        missing = wanted.difference(shown.spans)
        new = [span for span in self.spans if span in missing] # in the order of the timeline
        held = [(span, *self.store.take(span)) for span in new if span in self.store] # before anything else goes in, and pushes it out
        missing.difference_update(span for span, _, _ in held)
        gists, blocks = ([span for span in new if span in missing and (span.level > 0) == is_gist] for is_gist in (True, False))
        shown.add(held + self._read_gists(gists) if gists else held)
        return blocks

    def _read_gists(self, spans):
        """Keys and values of gists, as a list of (span, k, v). Those that raw blocks in view will have when they collapse are read along, into the store."""
        ahead = [span.parent() for span, on in zip(self.spans, laid(self.spans)) if span.level == 0 and not on and span.index < self.tree.count(1)] # none comes in the place of what is laid
        read = read_gists(self.gpt, self.tree, spans + [span for span in ahead if span not in self.store])
        for span, k, v in read[len(spans):]:
            self.store.put(span, k, v)
        return read[:len(spans)]

    def read_waiting(self, newest=None, places=()):
        """Read the blocks that wait, and the newest tokens, entries (1, n) at `places`, in one forward: each sees what lies before it on the timeline. Returns the last's hidden state (1, 1, D)."""
        blocks, self.waiting = self.waiting, []
        if not blocks:
            return None
        shown, loose = self.shown, self.shown.loose
        timeline = np.concatenate([*(span.positions() for span in blocks), places])
        read = [embed_tokens(self.gpt, self.tree, span.start, span.stop) for span in blocks] + ([newest] if newest else [])
        entries = Entries(torch.cat([e.x for e in read], dim=1), [torch.cat(layer, dim=1) for layer in zip(*(e.values for e in read))])
        columns = np.concatenate([shown.ends(), timeline])
        see = torch.from_numpy(columns <= timeline[:, None]).to(self.gpt.device) # what a gist stands for must lie before a token that sees it: not so where the token's block is laid on it
        hidden = shown.read(entries, timeline, see[None, None])
        shown.seal(blocks, behind=loose)
        self.stats["read_tokens"] += cost(blocks)
        return hidden

    # ------------------------------------------------------------------------------------------------------------------
    # Telemetry

    def _count(self, stage, start, **counts):
        """Time since `start` belongs to a stage; returns now."""
        now = time.perf_counter()
        self.stats[f"{stage}_ms"] += (now - start) * 1000
        for name, count in counts.items():
            self.stats[name] += count
        return now

    def _note(self):
        """One tick for the telemetry: what changed, and what each stage took since the last one."""
        ms = {stage: self.stats[f"{stage}_ms"] - self.told.get(f"{stage}_ms", 0.0) for stage in STAGES}
        self.told = dict(self.stats)
        self.untold.append((self.tree.length, self.spans, self.budget, self.edits, ms))

    def view(self):
        """What a person wants to see: the working context as a list, and a few numbers."""
        strip = [dict(level=s.level, start=s.start, stop=s.stop, score=round(score, 4)) for s, score in zip(self.spans, self.scores)]
        return dict(spans=strip, tokens=self.tree.length, budget=self.budget, used=cost(self.spans), newest_edits=len(self.edits), **self.stats)

    # ------------------------------------------------------------------------------------------------------------------
    # Marks: go back to one, go on from one elsewhere, keep one on disk

    def mark(self):
        """A State to rewind(), fork() or save(): a copy of the keys and values in view, a look at all ids. What is kept out of view is forgotten, here as there: both go on alike."""
        self.ready()
        self.store.clear()
        shown = self.shown
        return State(model=self.tree.header.get("model"), gpt=weights(self.gpt), length=self.length, history=history(self.tree, self.length), budget=self.budget,
                     n_diff=self.n_diff, margin=self.margin, refocus_every=self.refocus_every, pins=self.pins, longest=self.longest, exact=self.exact, positions=shown.policy,
                     spans=list(self.spans), scores=self.scores, focus=self.focus, frame=shown.frame, stats=dict(self.stats), kv=shown.pairs(), loose=shown.loose_pair())

    def rewind(self, state):
        """Back to a mark of this session, to its pins too: what was read since is forgotten, and the next tokens are those that followed the mark."""
        check_mark(state, self.tree, self.budget)
        with self.changing():
            self._forget() # keys and values too: blocks past the mark will be other blocks
            self.pins = state.pins
            self.tree.truncate(state.length)
            self._restore(state)

    def fork(self, path=None):
        """Another session that starts where this one stands, on a tree of its own: in the new folder `path`, or in memory."""
        state = self.mark()
        return Session(self.gpt, self.gistnet, self.lensnet, self.tree.fork(path), kept=self.kept, kept_in_ram=self.kept_in_ram, state=state, **state.settings())

    def save(self, folder):
        """Write the session beside its tree, which is on disk already: which spans are in view, and their keys and values, so that the next token is the same."""
        state = self.mark()
        self.flush()
        save_state(state, folder)

    @classmethod
    def open(cls, folder, gpt, gistnet, lensnet, tree, **settings):
        """Continue a saved session: the same next tokens, in another process. settings: those that are to differ from the saved ones; for another budget its context is assembled anew."""
        state = load_state(folder, gpt.device)
        check_saved(state, folder, tree, gpt)
        return cls(gpt, gistnet, lensnet, tree, state=state if settings.get("budget", state.budget) == state.budget else None, **state.settings() | settings)

    def _restore(self, state):
        self.spans, self.newest_scores, self.focus, self.edits = list(state.spans), dict(zip(state.spans, state.scores)), state.focus, []
        check(self.spans, self.tree.length, self.budget)
        self.shown.set_frame(state.frame)
        self.shown.add([(span, k, v) for span, (k, v) in state.kv.items()])
        k, v = state.loose
        timeline = np.arange(state.length - k.size(2), state.length)
        self.shown.lay(self.shown.turned(k, timeline), v, timeline, state.frame)
        if self.pins != state.pins:
            self.refocus() # orders are obeyed before anything is read
