"""
LensNet: which entries of the working context deserve detail now.

One signed score an entry: the nats that the next tokens are expected to gain if the entry is shown in detail, less the average
over the entries at hand. > 0 wants detail (expand a gist, keep raw tokens), < 0 can give it up. Scores add up to about zero, so
what they ask for and what they offer balance.

What the next tokens need is most often what followed last time, so the question is where the newest tokens have stood before, alone or behind
the same token as now (matches.py). A match in few of the entries says more than one in many (inverse document frequency: Sparck Jones, 1972);
that an entry of many blocks holds a token of many blocks is chance, and says less than that a block does.
For each entry, the newest 2, 8, 16, 32 and 64 tokens give the mean and the best of these weights; a small head weighs them against distance,
whether the entry is raw, and the same of the entry before (what followed a match may be in the next block). All entries are seen together: it
is not causal. When it chooses, what stands far away is doubted: a nat for each doubling of its distance beyond 512 tokens. Few labels are of such entries, and
without it sessions of 2,048 tokens opened far blocks where near ones were worth more (LOG.md, 2026-11-27).

A gist of any level is scored alike, for what it holds of the newest tokens. Of a gist of gists that says which of them a tick looks into (search.py): what is
opened there is a block, laid on it, and blocks are what it learns from.

Cosines of embeddings and gists in place of exact matches gave 0.52 of the oracle's gain where these give 0.57 (LOG.md, 2026-11-21), and
learnt keys with two cross-attention layers, as in the MegaContext notes, less than cosines: few labels cannot teach a network what matches.

M = readings, E = entries, n = newest tokens, F = features
"""
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from megacontext.matches import KINDS, NEWEST

RECENT = (2, 8, 16, 32, NEWEST)
MATCHES = 2 * KINDS * len(RECENT)
PLACES = 4 + 2       # of distance, and whether it is shown raw or as a gist
WIDTHS = 4           # kinds of entries by what they stand for: 1 block (raw or level 1), 32 (level 2), 1,024, 32,768 and more
ROW = 64             # blocks of the longest rows of training: matches in more than that are not rarer than a head has seen
FARTHEST = 1024      # tokens; what is further away is just far: no row of training is long enough to say how far a million tokens are
DOUBT, DOUBTED = 1.0, 512 # nats for each doubling of a distance beyond so many tokens


@dataclass(frozen=True)
class LensConfig:
    hidden: int = 32  # of the head

    def to_dict(self):
        return asdict(self)


class LensNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("share", torch.stack([(torch.arange(NEWEST) >= NEWEST - k) / k for k in RECENT], dim=1), persistent=False) # (NEWEST, 5)
        self.register_buffer("decay", -1 / torch.tensor([64.0, 256.0]), persistent=False)
        self.register_buffer("blocks", 32.0 ** torch.arange(WIDTHS), persistent=False)
        self.register_buffer("shown", torch.eye(2), persistent=False)
        self.up = nn.Linear(2 * MATCHES + PLACES, config.hidden)
        self.score = nn.Linear(config.hidden, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, hits, levels, distances, seen=None, doubt=True):
        """
        hits (M, E, KINDS, n) bool   what each entry, in the order of the timeline, holds of the newest tokens, oldest first
        levels (M, E)                0 = shown raw, 1 = a gist of tokens, 2 and more = a gist of gists
        distances (M, E)             tokens between the entry's centre and now, > 0
        seen (M, E) bool             False = no such entry; None = all are there
        doubt                        False = what the labels teach, for their loss
        Returns scores (M, E) in nats over what is left of the block that is being read; entries not seen get 0.
        """
        hits, blocks = hits.float(), self.blocks[levels.clamp(1, WIDTHS) - 1] # (M, E, KINDS, n), (M, E)
        if seen is not None:
            hits, blocks = hits * seen[:, :, None, None], blocks * seen
        scores = self.worth(hits, levels, distances, hits.sum(1), blocks.sum(1), seen, doubt)
        if seen is None:
            return scores - scores.mean(dim=1, keepdim=True)
        return (scores - (scores * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)) * seen

    def worth(self, hits, levels, distances, held, blocks, seen=None, doubt=True):
        """
        Scores (M, E) that are not centred yet, of some of the entries: held (M, KINDS, n) of all entries hold each of the newest tokens, and all
        stand for blocks (M,). hits are floats. Computed in fp32 wherever it is called, in a bf16 evaluation too: it is tiny.
        """
        with torch.autocast(levels.device.type, enabled=False):
            n, width = hits.size(-1), levels.clamp(1, WIDTHS) - 1
            share = (held + 0.5) / (blocks[:, None, None] + 1) # (M, KINDS, n), of the blocks that entries stand for
            rarity = -torch.log(-torch.expm1(torch.log1p(-share)[:, None] * self.blocks[:, None, None])) # (M, WIDTHS, KINDS, n), in nats
            rarity = rarity * (math.log(ROW) / blocks.clamp(min=ROW).log())[:, None, None, None] # as large as in rows of training, whatever is in view
            weights = hits * rarity[torch.arange(len(hits), device=hits.device)[:, None], width]
            means = weights @ self.share[NEWEST - n:] # (M, E, KINDS, 5)
            newest_first = weights.flip(-1)
            best = torch.stack([newest_first[..., :k].amax(-1) for k in RECENT], dim=-1)
            matches = torch.cat([means, best], dim=-1).flatten(2) # (M, E, MATCHES)
            less = doubt * DOUBT * torch.log2(distances.float().clamp(min=DOUBTED) / DOUBTED)
            distances = distances.float().clamp(max=FARTHEST)[..., None]
            far = torch.log(distances) - 5
            features = [matches, _before(matches, seen), far, far.square(), torch.exp(distances * self.decay), self.shown[levels.clamp(max=1)]]
            return self.score(F.gelu(self.up(torch.cat(features, dim=-1)))).squeeze(-1) - less


def _before(matches, seen):
    """The matches (M, E, F) of the seen entry before each; zeros where there is none."""
    earlier = F.pad(matches, (0, 0, 1, 0))
    if seen is None:
        return earlier[:, :-1]
    newest = torch.where(seen, torch.arange(1, seen.size(1) + 1, device=seen.device), 0).cummax(dim=1).values # of the newest entry so far, from 1
    return earlier.gather(1, F.pad(newest, (1, 0))[:, :-1, None].expand_as(matches))


class Scorer:
    """
    LensNet.forward() for one reading, as a session asks it every few tokens: in numpy on the CPU, wherever the networks are. The numbers are so few that
    PyTorch's fifty operations take twice as long.
    """

    def __init__(self, lensnet):
        self.share, self.decay, self.blocks, self.shown = (t.cpu().numpy() for t in (lensnet.share, lensnet.decay, lensnet.blocks, lensnet.shown))
        self.up, self.bias, self.score = (t.detach().cpu().numpy().T for t in (lensnet.up.weight, lensnet.up.bias, lensnet.score.weight))

    def __call__(self, hits, levels, distances):
        """hits (E, KINDS, n) bool, levels (E,) int, distances (E,) float, numpy, as in LensNet.forward() -> scores (E,), float32 numpy."""
        (E, _, n), width = hits.shape, levels.clip(1, WIDTHS) - 1
        blocks = self.blocks[width].sum()
        share = (hits.sum(0, dtype=np.float32) + np.float32(0.5)) / (blocks + 1)
        rarity = -np.log(-np.expm1(np.log1p(-share) * self.blocks[:, None, None])) * np.float32(math.log(ROW) / math.log(max(blocks, ROW)))
        weights = hits * rarity[width]
        means = weights.reshape(-1, n) @ self.share[NEWEST - n:]
        newest = np.maximum.reduceat(weights, [max(0, n - k) for k in reversed(RECENT)], axis=2)[:, :, ::-1] # the best of the newest 2, of the next 6, ...
        best = np.maximum.accumulate(newest, axis=2)
        matches = np.concatenate([means.reshape(best.shape), best], axis=2).reshape(E, MATCHES)
        before = np.concatenate([np.zeros_like(matches[:1]), matches[:-1]])
        distances = distances.astype(np.float32)
        near = distances.clip(max=FARTHEST)[:, None]
        far = np.log(near) - np.float32(5)
        features = np.concatenate([matches, before, far, far * far, np.exp(near * self.decay), self.shown[levels.clip(max=1)]], axis=1)
        scores = (F.gelu(torch.from_numpy(features @ self.up + self.bias)).numpy() @ self.score)[:, 0]
        scores = scores - np.float32(DOUBT) * np.log2(distances.clip(DOUBTED) / np.float32(DOUBTED))
        return scores - scores.mean()
