"""
GistNet: the embeddings of a block's children in, one gist embedding out.

A gist lives in the space of token embeddings (unit RMS), so the GPT can read it in place of its children. The same network
makes level-1 gists from tokens and level-2 gists from level-1 gists. The shape is the 32 -> 1 -> 32 -> 1 of the MegaContext
notes, as a narrow transformer over [children, slot]: in the first layer the slot pools the children into a draft, in the next
the children look at the draft while it looks at them again. A gist starts as the mean of its children plus a learned
correction that is zero at first: a slot query without the mean took several times longer to become readable.

Each child of a level-1 block may also look at up to `left` tokens before the block (a compressor that sees only its own block
loses what pronouns and names refer to). Nothing else crosses a block's edge, so a gist depends on its block and its left
context alone, and ingesting a text in pieces gives what ingesting it at once gives.

N = blocks, K = children a block, C = tokens of left context, D = model width, w = inner width
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
    left: int = 32       # C
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
    """One pre-norm transformer layer of the inner width. Extra keys (the left context) can be read but not written."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, keys, n, rope, mask=None):
        """The last n of keys (N, m, w) read all of them, at angles rope (1, 1, m, d/2): their next states (N, n, w). mask (N, 1, 1, m): True where they may look."""
        z, keys = keys[:, -n:], norm(keys)
        q, k, v = self.q(keys[:, -n:]), *self.kv(keys).chunk(2, dim=-1)
        q, k, v = (t.view(t.size(0), t.size(1), self.heads, -1).transpose(1, 2) for t in (q, k, v))
        cos, sin = rope
        q, k = rotate(norm(q), cos[:, :, -n:], sin[:, :, -n:]), rotate(norm(k), cos, sin)
        y = attend(q, k, v, "all" if mask is None else mask.expand(-1, -1, n, -1))
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

    def forward(self, children, level, left=None, left_seen=None):
        """
        children (N, K, D) of the level below -> gists (N, D) of `level` (1 = children are tokens), at unit RMS.
        left (N, C, D), level 1 only: the tokens before each block; left_seen (N, C) bool: False where there is none (None: all are there).
        """
        N, K, _ = children.shape
        mark = self.level_embedding[min(level, self.config.levels) - 1]
        z = torch.cat([self.narrow(children), self.slot.expand(N, 1, -1)], dim=1) + mark # (N, K + 1, w)
        C = left.size(1) if left is not None else 0
        cos, sin = rope_angles(torch.arange(-C, K + 1, device=children.device)[None], self.config.inner // self.config.heads)
        for i, block in enumerate(self.rounds):
            keys, mask = z, None
            if i == 0 and C: # one layer reads the left: more would need the left's own left
                keys = torch.cat([self.narrow(left) + mark, z], dim=1)
                mask = None if left_seen is None else torch.cat([left_seen, left_seen.new_ones(N, K + 1)], dim=1)[:, None, None]
            n, m = 1 if block is self.rounds[-1] else K + 1, keys.size(1) # of the last round nobody reads more than the slot
            z = block(keys, n, (cos[:, :, -m:], sin[:, :, -m:]), mask)
        return norm(self.begin(children) + self.widen(norm(z[:, -1])))

    def begin(self, children):
        """What the network corrects: children (N, K, D) -> their means (N, D), at unit RMS."""
        return norm(children.mean(dim=1))

    def level_one(self, x, docs, block):
        """
        Gists of a row of tokens, with left context: x (B, T, D), docs (B, T/block) the document of each block -> (B, T/block, D).
        A block never looks to the left of its own document.
        """
        B, T, D = x.shape
        Q, C = T // block, self.config.left
        children = x.view(B * Q, block, D)
        if C == 0:
            return self(children, 1).view(B, Q, D)
        index = torch.arange(Q, device=x.device)[:, None] * block + torch.arange(-C, 0, device=x.device) # (Q, C), negative before the row
        left = x[:, index.clamp(min=0)].view(B * Q, C, D)
        same = docs[:, index.clamp(min=0) // block] == docs[:, :, None] # (B, Q, C)
        return self(children, 1, left, (same & (index >= 0)).view(B * Q, C)).view(B, Q, D)
