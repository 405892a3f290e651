"""
GistNet: the embeddings of a block's children in, one gist embedding out.

A gist lives in the space of token embeddings (unit RMS), so the GPT can read it in place of its children. The same network
makes level-1 gists from tokens and level-2 gists from level-1 gists. The shape is the 32 -> 1 -> 32 -> 1 of the MegaContext
notes, as a narrow transformer over [children, slot]: in the first layer the slot pools the children into a draft, in the next
the children look at the draft while it looks at them again. A gist starts as the mean of its children plus a learned
correction that is zero at first: a slot query without the mean took several times longer to become readable.

Nothing crosses a block's edge but what the GPT's embeddings know of the few tokens before them, so ingesting a text in pieces gives what
ingesting it at once gives. Children that also looked at 32 or 256 tokens left of their block made gists no better (LOG.md, 2026-11-30).

N = blocks, K = children a block, D = model width, w = inner width
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import attend, norm, rope_angles, rotate


@dataclass(frozen=True)
class GistConfig:
    width: int           # D, same as the GPT it serves
    inner: int = 128     # w; ingest costs about (w / D)^2 of a GPT layer
    heads: int = 4
    layers: int = 3      # rounds of children and draft looking at each other
    levels: int = 2      # highest level with its own embedding; higher ones share the last

    @classmethod
    def for_gpt(cls, config):
        """
        Inner width a quarter of the model's, at least 64: some 1% of a forward at d12. In bench.gist_recall at width 128 an inner width of 32 answers what 64 and 128
        do (LOG.md, 2026-11-22).
        """
        return cls(config.width, max(64, config.width // 4))

    def to_dict(self):
        return asdict(self)


class GistBlock(nn.Module):
    """One pre-norm transformer layer of the inner width, in which every entry sees all."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, keys, n, rope):
        """The last n of keys (N, m, w) read all of them, at angles rope (1, 1, m, d/2): their next states (N, n, w)."""
        z, keys = keys[:, -n:], norm(keys)
        q, k, v = self.q(keys[:, -n:]), *self.kv(keys).chunk(2, dim=-1)
        q, k, v = (t.view(t.size(0), t.size(1), self.heads, -1).transpose(1, 2) for t in (q, k, v))
        cos, sin = rope
        q, k = rotate(norm(q), cos[:, :, -n:], sin[:, :, -n:]), rotate(norm(k), cos, sin)
        y = attend(q, k, v, "all")
        z = z + self.out(y.transpose(1, 2).flatten(2))
        return z + self.down(F.relu(self.up(norm(z))).square())


class GistNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.narrow = nn.Linear(config.width, config.inner, bias=False)
        self.slot = nn.Parameter(torch.randn(1, 1, config.inner) * 0.1)
        self.level_embedding = nn.Parameter(torch.zeros(config.levels, config.inner))
        self.rounds = nn.ModuleList([GistBlock(config.inner, config.heads) for _ in range(config.layers)])
        self.widen = nn.Linear(config.inner, config.width, bias=False)
        nn.init.zeros_(self.widen.weight)

    def forward(self, children, level):
        """children (N, K, D) of the level below -> gists (N, D) of `level` (1 = children are tokens), at unit RMS."""
        N, K, _ = children.shape
        mark = self.level_embedding[min(level, self.config.levels) - 1]
        z = torch.cat([self.narrow(children), self.slot.expand(N, 1, -1)], dim=1) + mark # (N, K + 1, w)
        rope = rope_angles(torch.arange(K + 1, device=children.device)[None], self.config.inner // self.config.heads)
        for block in self.rounds:
            z = block(z, 1 if block is self.rounds[-1] else K + 1, rope) # of the last round nobody reads more than the slot
        return norm(self.begin(children) + self.widen(norm(z[:, -1])))

    def begin(self, children):
        """What the network corrects: children (N, K, D) -> their means (N, D), at unit RMS."""
        return norm(children.mean(dim=1))
