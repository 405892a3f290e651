"""
After a prompt: which blocks of the whole history deserve detail, whether they are in view or not.

At a tick, LensNet sees entries. A gist of 1,024 tokens is scored for what it holds somewhere, and a long history has many that hold most words of a
question by chance: of a million tokens, the one that holds them in one block does not come first. So a question is put to every block, as a search
engine would, and a gist is worth what its best block is. It takes some 0.08 microseconds a token of history, once for each prompt, and no gist or
key is read for it (docs/RUNTIME.md).
"""
import numpy as np
import torch

from megacontext.matches import AT_ONCE, NEWEST, bits, block_hits
from megacontext.span import BLOCK


@torch.no_grad()
def block_scores(lensnet, tree, raw, distance, device="cpu"):
    """
    LensNet's score of each finished block of the tree, float32 numpy (blocks,).
    raw       indices of the blocks that are shown raw
    distance  a function: token positions, a float64 numpy array -> distances from now as the GPT sees them, torch (n,)
    """
    words, n = block_hits(tree), min(NEWEST, tree.length)
    count = len(words)
    held = sum(bits(words[a:a + AT_ONCE], n).sum(axis=0) for a in range(0, count, AT_ONCE))
    held, blocks = torch.as_tensor(held, dtype=torch.float32, device=device)[None], torch.tensor([float(count)], device=device)
    levels = torch.ones(1, count, dtype=torch.long, device=device)
    levels[0, list(raw)] = 0
    distances = distance(np.arange(count) * float(BLOCK) + (BLOCK - 1) / 2)[None]
    scores = []
    for a in range(0, count, AT_ONCE):
        first, last = max(0, a - 1), min(count, a + AT_ONCE) # LensNet looks at the entry before each
        hits = torch.from_numpy(bits(words[first:last], n)).to(device)[None].float()
        scores.append(lensnet.worth(hits, levels[:, first:last], distances[:, first:last], held, blocks)[0, a - first:])
    scores = torch.cat(scores)
    return (scores - scores.mean()).cpu().numpy()


def best_of(scores, spans):
    """What each of the finished spans, which tile the history from its start, is worth: the score of its best block, as a list."""
    return np.maximum.reduceat(scores, [span.start // BLOCK for span in spans]).tolist() if spans else []
