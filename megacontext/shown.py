"""
What the GPT has in front of it: the keys and values of exactly the entries of a working context, at the positions of the moment.

Keys and values belong to entries, not to working contexts. So an edit moves entries in and out, and reads nothing again. Attention does not
care for the order of its keys, so newcomers stand at the end whatever their place on the timeline; only the loose entries, tokens of
the block that is not full yet, must come last. Keys are kept as they were before they were turned, beside the turned ones that the GPT reads,
so that turning them anew, to other positions, never adds rounding to rounding.

Positions follow positions.py, mapped for a history of `frame` tokens. The frame is held for some ticks while new tokens run on past it, and
moved before any distance can leave the trained range: so keys are turned anew now and then, not at every tick.

A long history brings more gists into view than a trained row ever showed, and a softmax gives a thousand of them a weight that drowns the tokens:
what stood open in plain sight was then misread two times in three. So gists beyond the `usual` number share the weight of the usual ones (LOG.md, 2026-11-22).

L = layers, H = kv heads, d = head width, n = entries
"""
from math import inf, log

import numpy as np
import torch

from megacontext.positions import compressed
from megacontext.span import BLOCK
from nanochat.attention import rope_angles, rotate
from nanochat.kv_cache import KVCache


class Shown:
    def __init__(self, gpt, capacity, policy=compressed):
        """capacity: most entries; policy: from places on the timeline to positions, one of positions.POLICIES."""
        config = gpt.config
        self.gpt, self.policy = gpt, policy
        self.cache = KVCache(config, 1, capacity, gpt.device, gpt.dtype)
        self.unturned = torch.zeros_like(self.cache.k[:, 0]) # (L, H, capacity, d)
        self.places = np.zeros(capacity)                     # of each entry on the timeline
        self.usual = max(1, config.seq_len // BLOCK)         # gists in a trained row
        self.weights = torch.zeros(capacity, device=gpt.device, dtype=gpt.dtype) # of each entry, added to its attention scores
        self.hold = max(BLOCK, config.seq_len // 16 // BLOCK * BLOCK) # tokens that a frame lasts
        self.trained = config.seq_len - self.hold - BLOCK             # so that positions past the frame are trained ones too
        self.clear()

    def clear(self):
        """Nothing is in view."""
        self.cache.rewind(0)
        self.spans = []  # in the order of the cache; loose entries follow
        self.settled = 0 # entries of the spans
        self._weigh()
        self.set_frame(0)

    @property
    def loose(self):
        """How many tokens at the end of the cache belong to no span yet."""
        return self.cache.length - self.settled

    def ends(self):
        """Of each entry, the last token that it stands for: numpy (entries,)."""
        return np.concatenate([*([span.stop - 1] if span.level else span.positions() for span in self.spans), self.places[self.settled:self.cache.length]])

    # ------------------------------------------------------------------------------------------------------------------
    # Positions

    def mapped(self, timeline, frame=None):
        """Timeline positions (n,) -> positions the GPT was trained on, float64 numpy (n,); as they are in this frame, or were in another."""
        return self.policy(np.asarray(timeline, dtype=np.float64), self.frame if frame is None else frame, self.trained)

    def positions(self, timeline, frame=None):
        """The same as the GPT takes them, (1, n) fp32."""
        return torch.as_tensor(self.mapped(timeline, frame), dtype=torch.float32, device=self.gpt.device)[None]

    def mapped_token(self, place):
        """positions() of one token about as new as the frame, at less cost: there, every policy keeps distances."""
        return torch.full((1, 1), self.head + (place - self.frame), device=self.gpt.device)

    def distances(self, timeline, now):
        """Tokens between timeline positions (n,) and `now`, as the GPT sees them, within what was trained: numpy (n,)."""
        return (self.mapped(float(now)) - self.mapped(timeline)).clip(1)

    def turned(self, k, timeline, frame=None, back=False):
        """Keys (L, H, n, d) turned to where the timeline positions (n,) are mapped in this frame or another, or back from there."""
        cos, sin = rope_angles(self.positions(timeline, frame), self.gpt.config.head_width)
        return rotate(k, cos, -sin if back else sin)

    def set_frame(self, length):
        """Positions are mapped for a history of `length` tokens; nothing must be in view yet, or be turned after this."""
        self.frame, self.head = length, float(self.policy(float(length), length, self.trained)) # head: where the next token stands

    def reframe(self, length, now=False):
        """Map positions for a history of `length` tokens, if the frame has been held long enough or `now`."""
        assert self.loose == 0, f"{self.loose} loose entries have no unturned keys: seal or lift them first"
        if length == self.frame or not now and length < self.frame + self.hold:
            return
        n, here = self.cache.length, self.places[:self.cache.length]
        before = self.mapped(here)
        self.set_frame(length)
        if n and not np.array_equal(before, self.mapped(here)):
            self.cache.k[:, 0, :, :n] = self.turned(self.unturned[:, :, :n], here)

    # ------------------------------------------------------------------------------------------------------------------
    # Entries

    def add(self, triples):
        """Show spans: a list of (span, k, v), keys unturned."""
        if triples:
            spans, ks, vs = zip(*triples)
            k, timeline, start = torch.cat(ks, dim=2), np.concatenate([span.positions() for span in spans]), self.cache.length
            self.unturned[:, :, start:start + len(timeline)] = k
            self._append(self.turned(k, timeline), torch.cat(vs, dim=2), timeline)
            self.spans += spans
            self.settled = self.cache.length
            self._weigh()

    def remove(self, gone):
        """
        Take a set of spans out of view -> {span: (k, v)}, keys unturned. Into the holes move the last spans of their size, so that little is
        left to move when the others close ranks.
        """
        assert self.loose == 0, f"{self.loose} loose entries would be left behind: seal or lift them first"
        out, row, holes, kept, at = {}, [], {}, {}, 0 # row: of each span that was here, [span or None for a hole, its place]
        for i, span in enumerate(self.spans):
            n, leaves = span.cost, span in gone
            if leaves:
                out[span] = self._pair(at, at + n)
            (holes if leaves else kept).setdefault(n, []).append(i)
            row.append((None if leaves else span, at))
            at += n
        for n, here in holes.items():
            last = kept.get(n, [])
            fit = sum(hole < i for hole, i in zip(here, reversed(last))) # the last so many come after the first so many holes
            for hole, i in zip(here, last[len(last) - fit:]):
                row[hole], row[i] = row[i], (None, 0)
        self._close_ranks([(span, place) for span, place in row if span is not None])
        return out

    def _close_ranks(self, row):
        """Spans, each [span, its place in the cache], stand one behind the other in this order: places only get lower, so left to right nothing is lost."""
        moves, at = [], 0 # [to, from, entries]
        for span, place in row:
            n = span.cost
            if moves and moves[-1][1] + moves[-1][2] == place and moves[-1][0] + moves[-1][2] == at:
                moves[-1][2] += n
            elif place != at:
                moves.append([at, place, n])
            at += n
        tensors = self.cache.k[:, 0], self.cache.v[:, 0], self.unturned
        for to, place, n in moves:
            for tensor in tensors:
                source = tensor[:, :, place:place + n]
                tensor[:, :, to:to + n] = source.clone() if place < to + n else source
            self.places[to:to + n] = self.places[place:place + n]
        self.spans, self.settled = [span for span, _ in row], at
        self.cache.rewind(at)
        self._weigh()

    def _weigh(self):
        """Gists together weigh no more than the usual number of them."""
        gists = sum(span.level > 0 for span in self.spans)
        self.crowded = gists > self.usual # else all weights are 0
        self.weights.zero_()
        if self.crowded:
            less = log(self.usual / gists)
            self.weights[:self.settled] = torch.from_numpy(np.repeat([less if span.level else 0.0 for span in self.spans], [span.cost for span in self.spans]))

    def weighed(self, see):
        """What entries about to be read may see of the cache and of themselves, "all" (one entry) or a bool mask (..., columns), as a mask with the entries' weights."""
        if not self.crowded:
            return see
        if isinstance(see, str):
            return self.weights[None, None, None, :self.cache.length + 1]
        return self.weights[:see.size(-1)].where(see, -inf)

    def read(self, entries, timeline, see):
        """Read entries (1, n) that stand at timeline positions (n,); they stay in view, loose. Returns the last one's hidden state (1, 1, D)."""
        start = self.cache.length
        positions = self.positions(timeline) if len(timeline) > 1 else self.mapped_token(timeline[0])
        hidden = self.gpt.trunk(entries, positions, self.weighed(see), self.cache, last=True)
        self.note(start, timeline)
        return hidden

    def note(self, start, timeline):
        """Entries from `start` on were written to the cache, and stand at these timeline positions."""
        if len(timeline) == 1: # a decoding step: to make an array of one number takes longer than all else here
            self.places[start] = timeline[0]
        else:
            self.places[start:start + len(timeline)] = timeline

    def seal(self, spans, behind=0):
        """The loose entries behind the first `behind` are all of `spans`. They change places with those, which stay loose."""
        start, end = self.settled, self.settled + sum(span.cost for span in spans)
        assert end + behind <= self.cache.length, f"{spans} have {end - start} entries, {self.loose} are loose, {behind} of them before these"
        if behind:
            for here in (self.cache.k[:, 0, :, start:end + behind], self.cache.v[:, 0, :, start:end + behind]):
                here.copy_(here.roll(-behind, dims=2))
            self.places[start:end + behind] = np.roll(self.places[start:end + behind], -behind)
        self.unturned[:, :, start:end] = self.turned(self.cache.k[:, 0, :, start:end], self.places[start:end], back=True)
        self.spans += spans
        self.settled = end

    def lift(self):
        """Take the loose entries out of the cache -> (k, v, timeline, frame), keys as the GPT reads them in this frame. lay() brings them back."""
        start, end = self.settled, self.cache.length
        k, v = self.cache.k[:, 0, :, start:end].clone(), self.cache.v[:, 0, :, start:end].clone()
        self.cache.rewind(start)
        return k, v, self.places[start:end].copy(), self.frame

    def lay(self, k, v, timeline, frame):
        """Loose entries come back, at the end, their keys as they were read in `frame`: they are lifted several times a block, and turned anew only where it has moved since."""
        self._append(k if frame == self.frame else self.turned(self.turned(k, timeline, frame, back=True), timeline), v, timeline)

    def pairs(self):
        """{span: (k, v)} of all spans in the order of the cache, keys unturned."""
        out, at = {}, 0
        for span in self.spans:
            out[span] = self._pair(at, at + span.cost)
            at += span.cost
        return out

    def loose_pair(self):
        """(k, v) of the loose entries, keys unturned."""
        start, end = self.settled, self.cache.length
        return self.turned(self.cache.k[:, 0, :, start:end], self.places[start:end], back=True), self.cache.v[:, 0, :, start:end].clone()

    # ------------------------------------------------------------------------------------------------------------------

    def _pair(self, start, end):
        return self.unturned[:, :, start:end].clone(), self.cache.v[:, 0, :, start:end].clone()

    def _append(self, k, v, timeline):
        """Entries come into view at the end, with keys that are turned."""
        start, end = self.cache.length, self.cache.length + len(timeline)
        self.note(start, timeline)
        self.cache.k[:, 0, :, start:end] = k
        self.cache.v[:, 0, :, start:end] = v
        self.cache.advance(len(timeline))
