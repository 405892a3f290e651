"""
What the GPT makes of gists: their keys and values. A gist sees itself only, so each is read alone, at position 0, where keys are unturned, and
what comes out is a function of the gist: the same in every working context.

L = layers, H = kv heads, d = head width, n = gists
"""
import numpy as np
import torch
import torch.nn.functional as F

from nanochat.gpt import Entries
from nanochat.kv_cache import KVCache

LOOKED_AT = 1024 # tokens that a gist's value embeddings are the mean of, at most


def read_gists(gpt, tree, spans):
    """Spans, n of them, that have gists in the tree -> [(span, k, v)], each (L, H, 1, d), keys unturned. A forward of many costs hardly more than a forward of one."""
    x = torch.as_tensor(tree.gists_of(spans), dtype=gpt.dtype, device=gpt.device)
    values = [means[:, None] for means in value_means(gpt, tree, spans)]
    alone = KVCache(gpt.config, len(spans), 1, gpt.device, gpt.dtype)
    gpt.trunk(Entries(x[:, None], values), torch.zeros(1, 1, device=gpt.device), "all", alone)
    return [(span, alone.k[:, i].clone(), alone.v[:, i].clone()) for i, span in enumerate(spans)]


def value_means(gpt, tree, spans):
    """
    Gists' value embeddings are the means of their tokens': (n, value_width) a value layer. Above level 2, where training never goes, of
    LOOKED_AT tokens at even distances: the mean of a million rows would stop the session for seconds.
    """
    ids = [tree.tokens(span.start, span.stop)[::max(1, span.width // LOOKED_AT)] for span in spans]
    starts = torch.tensor([0] + [len(some) for some in ids[:-1]], device=gpt.device).cumsum(0)
    ids = torch.as_tensor(np.concatenate(ids), dtype=torch.long, device=gpt.device)
    return [F.embedding_bag(ids, table.weight, starts, mode="mean") for table in gpt.value_tables]
