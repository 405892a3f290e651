"""
Working contexts of equal visible budget: what each method that mega_eval compares shows to each block of a row.

A method is a table as in layout.py: table[q, b] says how block q reads block b. Every line costs at most W entries, its own block
included, a token 1 and a gist 1, whatever its level. Methods differ in what they spend that on:
    window      the newest raw blocks, with sinks behind the first one (attention sinks: Xiao et al., 2023)
    retrieved   the newest raw blocks, and as many older ones, those that score best; no gists
    recency     the newest raw blocks, and a gist for every older one
    chosen      as recency, but half of the raw blocks are those that score best
Scores are matrices: line q ranks the blocks before q, and is made of nothing but what stands before q.

Q = blocks, K = block, W = budget, B = rows, D = model width
"""
import math
from collections import Counter

import numpy as np
import torch

from megacontext.layout import FAN, GIST, NODE, RAW
from megacontext.matches import LEAD
from megacontext.span import BLOCK
from nanochat.attention import norm
from nanochat.common import UserError

ASKING = 2   # blocks before q that ask by their embeddings: 64 tokens, as many as ask LensNet
QUERY = 8    # tokens that ask BM25: more, and it finds worse (LOG.md, 2026-11-30)
SPARE = 0.5  # share of the raw blocks that is for scores to give


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def cost(table):
    """Entries that each block reads at most, its own tokens included: table (..., Q, Q) numpy -> (..., Q)."""
    nodes = (table == NODE).sum(-1) // FAN
    return BLOCK * (1 + (table == RAW).sum(-1)) + (table == GIST).sum(-1) + nodes


def raw_blocks(q, W, gists):
    """How many earlier blocks block q can read raw within W entries, when all the others are gists (or nothing)."""
    room = W - BLOCK
    n = min(q, room // BLOCK)
    while gists and n and n * BLOCK + (q - n) > room:
        n -= 1
    if room < 0 or gists and q - n > room - n * BLOCK:
        raise UserError(f"a budget of {W} entries cannot hold a block and gists of {q} others: raise --budget, or shorten the rows (--seq-len, --lengths)")
    return n


def window_table(Q, W, sinks=False):
    """sinks: one block of two or more is the row's first."""
    table = np.zeros((Q, Q), dtype=np.int64)
    for q in range(Q):
        n = raw_blocks(q, W, gists=False)
        if sinks and n >= 2:
            table[q, 0] = RAW
            n -= 1
        table[q, q - n:q] = RAW
    return table


def recency_table(Q, W, older=GIST, spare=0.0):
    """spare: the share of the raw blocks that is left for others to choose."""
    table = np.zeros((Q, Q), dtype=np.int64)
    for q in range(Q):
        n = raw_blocks(q, W, gists=True)
        n -= int(n * spare)
        table[q, :q - n], table[q, q - n:q] = older, RAW
    return table


def chosen_table(Q, W, scores, spare=SPARE):
    """recency_table with its spared raw blocks given to the best `scores` (Q, Q)."""
    table = recency_table(Q, W, spare=spare)
    for q in range(Q):
        free = np.flatnonzero(table[q] == GIST)
        count = min(raw_blocks(q, W, gists=True) - int((table[q] == RAW).sum()), len(free))
        table[q, best(free, scores[q, free], count)] = RAW
    return table


def retrieved_table(Q, W, scores, spare=SPARE):
    """The newest raw blocks and the best-scored older ones, nothing else."""
    table = np.zeros((Q, Q), dtype=np.int64)
    for q in range(Q):
        n = raw_blocks(q, W, gists=False)
        near = n - int(n * spare)
        table[q, q - near:q] = RAW
        older = np.arange(q - near)
        table[q, best(older, scores[q, older], n - near)] = RAW
    return table


def best(blocks, scores, count):
    """The `count` of `blocks` with the highest scores; of equals the older."""
    return blocks[np.argsort(-scores, kind="stable")[:count]]


# ----------------------------------------------------------------------------------------------------------------------
# Scores that need no network of ours: (B, Q, Q) numpy each

def bm25_scores(ids):
    """bm25() of the tokens just before each block, ids (B, T)."""
    B, T = ids.shape
    scores = np.zeros((B, T // BLOCK, T // BLOCK))
    for i, row in enumerate(ids.tolist()):
        bags = [bag(row, b) for b in range(T // BLOCK)]
        for q in range(1, T // BLOCK):
            scores[i, q, :q] = bm25(row, bags[:q], q * BLOCK)
    return scores


def terms(ids, start, stop):
    """Tokens start..stop of a row, each alone and behind the one before it."""
    return [*ids[start:stop], *zip(ids[max(0, start - 1):stop - 1], ids[max(1, start):stop])]


def bag(ids, block):
    """The terms of a block for bm25(): a block's own stand LEAD before it, as LensNet has them, so that it holds most of what follows them."""
    return Counter(terms(ids, max(0, block * BLOCK - LEAD), (block + 1) * BLOCK - LEAD))


def bm25(ids, bags, now, k1=1.5):
    """
    Okapi BM25 of `bags` for the QUERY tokens before the place `now`. All blocks have one length, so the norm for length (b) does nothing (the first, which has
    no lead, is shorter). Asked as usual, by 64 tokens alone of blocks as they stand, it is worse than the newest blocks here (LOG.md, 2026-11-30).
    """
    seen = Counter(term for held in bags for term in held)
    rarity = {term: math.log(1 + (len(bags) - seen[term] + 0.5) / (seen[term] + 0.5)) for term in set(terms(ids, max(0, now - QUERY), now))}
    return np.array([sum(r * held[t] * (k1 + 1) / (held[t] + k1) for t, r in rarity.items() if t in held) for held in bags])


def embedding_scores(x):
    """Cosine of the mean embedding of the blocks just before q and that of each block; x (B, T, D), embedded tokens."""
    means = norm(x.float().unflatten(1, (-1, BLOCK)).mean(dim=2)) # (B, Q, D)
    B, Q, D = means.shape
    asked = torch.stack([means[:, max(0, q - ASKING):max(1, q)].mean(dim=1) for q in range(Q)], dim=1)
    return torch.einsum("bqd,bkd->bqk", norm(asked), means).cpu().numpy() / D
