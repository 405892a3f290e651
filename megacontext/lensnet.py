"""
LensNet: which entries of the working context deserve detail now.

One signed score an entry: the nats that the next tokens are expected to gain if the entry is shown in detail, less the average
over the entries at hand. > 0 wants detail (expand a gist, keep raw tokens), < 0 can give it up. Scores add up to about zero, so
what they ask for and what they offer balance.

Dual cross-attention, as in the MegaContext notes: the tail (the newest raw tokens) reads the entries, then the entries read the
tail back, so an old entry knows what is being asked now. An entry also gets its best match with any single tail token (late
interaction: Khattab and Zaharia, 2020). What an entry brings is one narrow key, computed once from its gist when the text is
ingested and kept in the tree; a refocus touches keys and the tail only.

M = readings, E = entries, n = tail tokens, D = model width, w = key width
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import attend, norm

TAIL = 64 # newest tokens that ask; a question of a few lines


@dataclass(frozen=True)
class LensConfig:
    width: int        # D, same as the GPT it serves
    key: int = 64     # w
    heads: int = 4
    levels: int = 2   # highest level with its own embedding; higher ones share the last

    @classmethod
    def for_gpt(cls, config):
        return cls(config.width)

    def to_dict(self):
        return asdict(self)


class CrossAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, context, seen):
        """x (M, a, w) reads context (M, b, w) where seen (M, b); a reading with nothing to see must not be asked for."""
        q, k, v = self.q(norm(x)), *self.kv(norm(context)).chunk(2, dim=-1)
        q, k, v = (t.view(t.size(0), t.size(1), self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = attend(q, k, v, seen[:, None, None].expand(-1, 1, q.size(2), -1))
        return x + self.out(y.transpose(1, 2).flatten(2))


class LensNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        w = config.key
        self.entry_key = nn.Linear(config.width, w, bias=False)
        self.level_embedding = nn.Parameter(torch.zeros(config.levels + 1, w))
        self.distance = nn.Linear(2, w, bias=True)
        self.token = nn.Linear(config.width, w, bias=False)
        self.token_before = nn.Linear(config.width, w, bias=False)
        self.tail_reads, self.entries_read = CrossAttention(w, config.heads), CrossAttention(w, config.heads)
        self.ask, self.offer = nn.Linear(w, w, bias=False), nn.Linear(w, w, bias=False)
        self.up, self.score = nn.Linear(w + 1, 2 * w, bias=False), nn.Linear(2 * w, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def key(self, gists):
        """gists (..., D) -> keys (..., w), to be kept beside the gists."""
        return self.entry_key(gists)

    def forward(self, tail, tail_seen, keys, levels, distances, seen):
        """
        tail (M, n, D)       embeddings of the newest tokens, oldest first; tail_seen (M, n) bool
        keys (M, E, w)       of the entries; a raw block brings the key of its gist
        levels (M, E)        0 = shown raw, 1 = a gist of tokens, 2 = a gist of gists
        distances (M, E)     tokens between the entry's centre and now, > 0
        seen (M, E) bool     False = no such entry
        Returns scores (M, E) in nats over the next block; entries not seen get 0.
        """
        before = F.pad(tail, (0, 0, 1, 0))[:, :-1]
        asks = self.token(tail) + self.token_before(before) # (M, n, w), a token in the light of the one before
        far = torch.log1p(distances.float())
        marks = self.level_embedding[levels.clamp(max=self.config.levels)]
        entries = keys + marks + self.distance(torch.stack([far / 8, (far / 8).square()], dim=-1).to(keys.dtype))
        asks = self.tail_reads(asks, entries, seen)
        entries = self.entries_read(entries, asks, tail_seen)
        match = norm(self.offer(keys)) @ norm(self.ask(asks)).transpose(1, 2) # (M, E, n), within +-w
        match = match.masked_fill(~tail_seen[:, None], -1e4).amax(dim=-1, keepdim=True) / self.config.key
        scores = self.score(F.relu(self.up(torch.cat([norm(entries), match * 4], dim=-1))).square()).squeeze(-1)
        scores = scores.masked_fill(~seen, 0.0)
        return (scores - scores.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)).masked_fill(~seen, 0.0)
