"""
LensNet: which entries of the working context deserve detail now.

One signed score an entry: the nats that the next tokens are expected to gain if the entry is shown in detail, less the average
over the entries at hand. > 0 wants detail (expand a gist, keep raw tokens), < 0 can give it up. Scores add up to about zero, so
what they ask for and what they offer balance.

What the next tokens need is most often what followed last time, so the question is where the newest tokens have been seen before.
The tail (the newest raw tokens) and the entries meet in the space of token embeddings, where a gist is close to the mean of
its children, and each side reads the other: an entry looks for its best and its average match among the newest 2, 8, 32, 64 tokens
(late interaction: Khattab and Zaharia, 2020), and each token spreads its attention over the entries, so that a token that matches everywhere
says nothing. A small head weighs these against distance, level, and the same matches of the entry before (what followed a match may
be in the next block). Nothing has to be stored beside the gists.

With learnt keys and two cross-attention layers in place of the matches, as in the MegaContext notes, the same labels gave 0.50 of the
oracle's gain against 0.64 so (LOG.md, 2026-11-21): few labels cannot teach a network what the embeddings already know.

M = readings, E = entries, n = tail tokens, D = model width, F = features
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import norm

TAIL = 64            # newest tokens that ask: a question of a few lines
RECENT = (2, 8, 32, TAIL)
MATCHES = 3 * len(RECENT)
PLACES = 4 + 3       # of distance, and one for each level shown


@dataclass(frozen=True)
class LensConfig:
    width: int        # D, same as the GPT it serves
    hidden: int = 32  # of the head

    @classmethod
    def for_gpt(cls, config):
        return cls(config.width)

    def to_dict(self):
        return asdict(self)


class LensNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.channel_scale = nn.Parameter(torch.ones(config.width)) # which channels of an embedding tell blocks apart
        self.sharpness = nn.Parameter(torch.tensor(20.0))           # of a token's attention over entries; cosines are small
        self.up = nn.Linear(2 * MATCHES + PLACES, config.hidden)
        self.score = nn.Linear(config.hidden, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, tail, tail_seen, gists, levels, distances, seen):
        """
        tail (M, n, D)       embeddings of the newest tokens, oldest first; tail_seen (M, n) bool
        gists (M, E, D)      of the entries in the order of the timeline; a raw block brings the mean of its tokens, which a gist is close to
        levels (M, E)        0 = shown raw, 1 = a gist of tokens, 2 and more = a gist of gists
        distances (M, E)     tokens between the entry's centre and now, > 0
        seen (M, E) bool     False = no such entry
        Returns scores (M, E) in nats over the next block; entries not seen get 0. Computed in fp32 wherever it is called: it is tiny, and its
        deviations vanish in fp16.
        """
        with torch.autocast(tail.device.type, enabled=False):
            return self._score(tail, tail_seen, gists, levels, distances, seen)

    def _score(self, tail, tail_seen, gists, levels, distances, seen):
        tail, gists = tail.float(), gists.float()
        likeness = norm(gists * self.channel_scale) @ norm(tail).transpose(1, 2) / self.config.width # (M, E, n), cosines
        likeness = likeness.masked_fill(~tail_seen[:, None], 0.0)
        count = seen.sum(1)[:, None, None].clamp(min=1)
        spread = torch.softmax((likeness * self.sharpness).masked_fill(~seen[:, :, None], float("-inf")).nan_to_num(neginf=-1e4), dim=1) * count
        matches = torch.stack([f(part[..., -k:]) for k in RECENT for part, f in ((likeness, _mean), (likeness, _best), (spread, _mean))], dim=-1)
        matches = among(matches, seen)
        newest = torch.where(seen, torch.arange(1, seen.size(1) + 1, device=seen.device), 0).cummax(dim=1).values # of the newest entry so far, from 1
        before = F.pad(matches, (0, 0, 1, 0)).gather(1, F.pad(newest, (1, 0))[:, :-1, None].expand_as(matches)) # of the seen entry before; none: zeros
        far = torch.log(distances.float())
        place = torch.stack([far - 5, (far - 5).square(), torch.exp(-distances / 64), torch.exp(-distances / 256)], dim=-1)
        shown = F.one_hot(levels.clamp(max=2), 3).float()
        scores = self.score(F.gelu(self.up(torch.cat([matches, before, place, shown], dim=-1)))).squeeze(-1)
        return (scores - _mean_over(scores, seen)) * seen


def _mean(x):
    return x.mean(dim=-1)


def _best(x):
    return x.amax(dim=-1)


def _mean_over(x, seen):
    """Mean over the entries that are there, (M, 1)."""
    return (x * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)


def among(features, seen):
    """Features (M, E, F) as deviations from the other entries' of the same reading, in standard deviations; 0 where not seen."""
    there = seen[..., None]
    count = there.sum(1, keepdim=True).clamp(min=1)
    centred = (features - (features * there).sum(1, keepdim=True) / count) * there
    return centred / (centred.square().sum(1, keepdim=True) / count + 1e-8).sqrt()
