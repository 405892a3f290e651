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
be in the next block). An entry's key is its vector, scaled and normed: a session computes it once, when the entry comes into view, and then a
refocus touches newest tokens x keys only. Nothing has to be stored beside the gists.

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
        self.register_buffer("ends", torch.tensor(RECENT) - 1, persistent=False)
        self.register_buffer("decay", -1 / torch.tensor([64.0, 256.0]), persistent=False)
        self.register_buffer("shown", torch.eye(3), persistent=False)
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
        Returns scores (M, E) in nats over the next block; entries not seen get 0.
        """
        return self.compare(tail, self.keys(gists), levels, distances, tail_seen, seen)

    def keys(self, gists):
        """What the newest tokens are compared with: (..., D) -> (..., D). The dot product of a key and a normed embedding is their cosine."""
        return norm(gists.float() * self.channel_scale) / self.config.width

    def compare(self, tail, keys, levels, distances, tail_seen=None, seen=None):
        """Scores (M, E) from keys instead of gists, the rest as in forward. A mask of None: all are there."""
        n = tail.size(1)
        likeness = keys @ norm(tail.float()).transpose(1, 2) # (M, E, n), cosines
        likeness = likeness if tail_seen is None else likeness.masked_fill(~tail_seen[:, None], 0.0)
        sharp = likeness * self.sharpness
        sharp, count = (sharp, keys.size(1)) if seen is None else (sharp.masked_fill(~seen[:, :, None], -1e4), seen.sum(1)[:, None, None].clamp(min=1))
        spread = torch.softmax(sharp, dim=1) * count
        ends = self.ends if n == TAIL else self.ends.clamp(max=n - 1)
        newest_first = torch.stack([likeness, spread]).flip(-1)
        like, spread = newest_first.cumsum(dim=-1).index_select(-1, ends) / (ends + 1) # means over the newest k, (M, E, 4)
        best = newest_first[0].cummax(dim=-1).values.index_select(-1, ends)
        matches = among(torch.stack([like, best, spread], dim=-1).flatten(-2), seen)
        distances = distances.float()[..., None]
        far = torch.log(distances) - 5
        features = [matches, _before(matches, seen), far, far.square(), torch.exp(distances * self.decay), self.shown[levels.clamp(max=2)]]
        scores = self.score(F.gelu(self.up(torch.cat(features, dim=-1)))).squeeze(-1)
        if seen is None:
            return scores - scores.mean(dim=1, keepdim=True)
        return (scores - (scores * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)) * seen


def _before(matches, seen):
    """The matches (M, E, F) of the seen entry before each; zeros where there is none."""
    earlier = F.pad(matches, (0, 0, 1, 0))
    if seen is None:
        return earlier[:, :-1]
    newest = torch.where(seen, torch.arange(1, seen.size(1) + 1, device=seen.device), 0).cummax(dim=1).values # of the newest entry so far, from 1
    return earlier.gather(1, F.pad(newest, (1, 0))[:, :-1, None].expand_as(matches))


def among(features, seen):
    """Features (M, E, F) as deviations from the other entries' of the same reading, in standard deviations; 0 where not seen."""
    if seen is None:
        variance, mean = torch.var_mean(features, dim=1, correction=0, keepdim=True)
        return (features - mean) * (variance + 1e-8).rsqrt()
    there = seen[..., None]
    count = there.sum(1, keepdim=True).clamp(min=1)
    centred = (features - (features * there).sum(1, keepdim=True) / count) * there
    return centred / (centred.square().sum(1, keepdim=True) / count + 1e-8).sqrt()
