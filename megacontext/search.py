"""
Which blocks that are not in view deserve detail: at a tick those under some gists of 1,024 tokens, after a prompt those of the whole history.

A gist of 1,024 tokens is scored for what it holds somewhere, and a long history has many that hold most words of a
question by chance: of a million tokens, the one that holds them in one block does not come first. So a question is put to the whole history, as a search
engine would, and a gist is worth what its best block is.

A fact may lie across two blocks, and neither holds all that was asked for. So windows of a block's length are scored, one from every 8th token on, and a block is
worth the best of those that reach into it (LOG.md, 2026-11-22; passages that overlap: Callan, 1994). No gist or key is read for it; docs/RUNTIME.md says how long it takes.
"""
from functools import lru_cache

import numpy as np
import torch

from megacontext.matches import AT_ONCE, NEWEST, PER_BLOCK, STEP, bits, window_hits
from megacontext.span import BLOCK, Span


@torch.no_grad()
def block_scores(lensnet, tree, distance, device="cpu"):
    """
    What LensNet finds each finished block of the tree worth, float32 numpy (blocks,): the best score of the windows that lie in it or reach into it,
    scored as the gists of so many blocks would be.
    distance  a function: token positions, a float64 numpy array -> distances from now as the GPT sees them, (n,)
    """
    words, n = window_hits(tree), min(NEWEST, tree.length)
    blocks = words[::PER_BLOCK]
    held = sum(bits(blocks[a:a + AT_ONCE], n).sum(axis=0) for a in range(0, len(blocks), AT_ONCE))
    held, count = torch.as_tensor(held, dtype=torch.float32, device=device)[None], torch.tensor([float(len(blocks))], device=device)
    best = np.full(len(blocks), -np.inf, np.float32)
    for shift in range(PER_BLOCK):
        scores = _scores(lensnet, words[shift::PER_BLOCK], n, held, count, lambda i: distance(i * float(BLOCK) + shift * STEP + (BLOCK - 1) / 2))
        for reaches in range(1 + (shift > 0)): # a window that is no block reaches into the next one
            there = best[reaches:reaches + len(scores)]
            np.maximum(there, scores, out=there)
    return best - best.mean()


def _scores(lensnet, words, n, held, count, distance):
    """LensNet's scores, numpy (W,), of windows that follow each other; distance: of the i-th, as in block_scores."""
    scores = []
    for a in range(0, len(words), AT_ONCE):
        first, last = max(0, a - 1), min(len(words), a + AT_ONCE) # LensNet looks at the entry before each
        hits = torch.from_numpy(bits(words[first:last], n)).to(held.device)[None].float()
        levels = torch.ones(1, last - first, dtype=torch.long, device=held.device)
        distances = torch.as_tensor(distance(np.arange(first, last)), dtype=torch.float32, device=held.device)[None]
        scores.append(lensnet.worth(hits, levels, distances, held, count)[0, a - first:])
    return torch.cat(scores).cpu().numpy() if scores else np.zeros(0, np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Scores of what is in view, and of blocks that may be laid on it

BEAM = 4 # gists of 1,024 tokens that a tick looks into


def best_of(scores, spans):
    """
    Scores of all finished blocks, numpy, and finished spans of a working context -> (what each is worth, a list: the score of its best block; [(gist of level 1, score)] of
    the blocks beneath gists of gists that are worth most: more than can be laid at a time).
    """
    best, free = [], np.zeros(len(scores), bool)
    for span in spans:
        here = slice(span.start // BLOCK, span.stop // BLOCK)
        free[here] = span.level > 1 # a block that is laid comes after what it is laid on
        best.append(float(scores[here].max()))
    blocks = np.flatnonzero(free)
    return best, [(Span(1, b), float(scores[b])) for b in blocks[np.argsort(-scores[blocks], kind="stable")[:BLOCK]].tolist()]


def looked_into(spans, ask):
    """
    The same at a tick, where only what is in view is scored, and the blocks of BEAM gists of 1,024 tokens: those that score highest, if there are more. What is laid on one that is not
    looked into is scored beside it, an overlap that no row of training has.
    ask: a function, spans in the order of the timeline -> their scores, numpy
    """
    families = [span for span in spans if span.level == 2]
    if not families:
        return ask(spans).tolist(), []
    if len(families) > BEAM:
        families = [span for _, span in sorted(zip((-ask(families)).tolist(), families))[:BEAM]]
    places, here, seen, at = dict.fromkeys(families), set(spans), [], 0 # places: of a family's blocks among those that are asked
    for span in spans:
        if span in places:
            places[span] = slice(len(seen), len(seen) + BLOCK)
            seen += [block if block in here else node for block, node in _beneath(span)]
            at = span.stop
        elif span.start >= at: # else it is laid on a gist that is looked into, and among its blocks
            seen.append(span)
    scores = ask(seen)
    told = dict(zip(seen, scores.tolist()))
    beneath = [(node, told[node]) for span in families for _, node in _beneath(span) if node in told]
    return [float(scores[places[span]].max()) if span in places else told[span] for span in spans], beneath


@lru_cache(maxsize=64)
def _beneath(span):
    """The blocks of a gist of level 2, and their gists."""
    return [(Span(0, node.index), node) for node in span.children()]
