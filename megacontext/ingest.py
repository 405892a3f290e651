"""
Text into the tree: tokens appended, and for every block that is complete its gist, and so on up the levels.

The base model is not asked: ingest costs GistNet alone, which is what makes reading a code base many times faster than
prefilling it. Ingesting piece by piece gives what ingesting at once gives, because a gist depends on its own block and on the few
tokens that the GPT embeds it behind. (To rounding; bit by bit where pieces end at stretches: a product of few rows may round otherwise.)

D = model width
"""
import torch

from megacontext.span import BLOCK

NODES_AT_ONCE = 256 # 8,192 tokens, a stretch: bounds the memory of a bulk ingest, and what a kill can lose


@torch.no_grad()
def ingest(gpt, gistnet, tree, ids, progress=None):
    """
    Append ids (a list or 1-D array of token ids) and every node that they complete, then commit. `progress(done)` is called with the
    tokens summarised so far. Commits every stretch, so a kill loses little and never leaves a block without its gist.
    """
    step, start = NODES_AT_ONCE * BLOCK, 0
    while start < len(ids):
        stop = min(start + step - tree.length % step, len(ids)) # stretches start at the same places however the ids come
        tree.append_tokens(ids[start:stop])
        complete(gpt, gistnet, tree)
        tree.commit()
        start = stop
        if progress is not None:
            progress(start)


@torch.no_grad()
def catch_up(gpt, gistnet, tree, progress=None):
    """
    Write the gists that are missing, all of them after MegaTree.reset_gists, and commit every stretch: a kill loses one, and calling
    this again goes on after the last. `progress(done)` is called with the tokens of the tree summarised so far.
    """
    blocks = tree.length // BLOCK
    while not tree.whole:
        complete(gpt, gistnet, tree, min((tree.count(1) // NODES_AT_ONCE + 1) * NODES_AT_ONCE, blocks))
        tree.commit()
        if progress is not None:
            progress(tree.count(1) * BLOCK)


@torch.no_grad()
def complete(gpt, gistnet, tree, blocks=None):
    """
    Write the gists of all nodes whose children are all there and that have none yet, or those of the first `blocks` blocks and what
    lies above them. Commits nothing.
    """
    level = 1
    below = tree.length // BLOCK if blocks is None else blocks # nodes that level 1 should have
    while below:
        for first in range(tree.count(level), below, NODES_AT_ONCE):
            last = min(first + NODES_AT_ONCE, below)
            gists = token_gists(gpt, gistnet, tree, first, last) if level == 1 else upper_gists(gpt, gistnet, tree, level, first, last)
            tree.append_gists(level, gists.float().cpu().numpy())
        level, below = level + 1, below // BLOCK


def ids_before(gpt, tree, start):
    """Ids (1, P) of the tokens of the tree in front of `start`, in whose light the GPT embeds the next; -1 where there is none."""
    ids = tree.tokens(max(0, start - gpt.config.previous), start)
    return torch.tensor([[-1] * (gpt.config.previous - len(ids)) + ids.tolist()], device=gpt.device)


def embed_tokens(gpt, tree, start, stop):
    """Entries (1, stop - start) of tokens of the tree, behind those before them."""
    ids = torch.as_tensor(tree.tokens(start, stop), dtype=torch.long, device=gpt.device)[None]
    return gpt.embed(ids, ids_before(gpt, tree, start))


def token_gists(gpt, gistnet, tree, first, last):
    """Level-1 gists (n, D) of blocks first..last-1."""
    return gistnet(embed_tokens(gpt, tree, first * BLOCK, last * BLOCK).x[0].unflatten(0, (-1, BLOCK)), 1)


def upper_gists(gpt, gistnet, tree, level, first, last):
    """Gists (n, D) of nodes first..last-1 of level 2 or more, from the gists below them."""
    below = torch.as_tensor(tree.gists(level - 1, first * BLOCK, last * BLOCK), dtype=gpt.dtype, device=gpt.device)
    return gistnet(below.view(last - first, BLOCK, -1), level)
