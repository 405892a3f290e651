"""
What an edit is worth, measured: the loss of the next block with the edit and without it.

For a block q of a row and its working context, draw some edits (open a gist of tokens, close a raw block), read the
block once more under each edited context, and compare. The keys and values of the row are those that the loss has just read it with,
so an edit costs a forward of K tokens, without gradients.

The label of an entry is the value of its detail in nats over the block: the loss with the coarser view less the loss with the finer
one, whichever of the two the context had. Positive = detail helps. (A LensNet elsewhere was once trained on the opposite sign
and looked healthy: tests/test_labels.py has an oracle case.)

B = rows, Q = blocks, K = block, P = readings a row, V = edits a reading
"""
from dataclasses import dataclass

import numpy as np
import torch

from megacontext.layout import GIST, RAW, own_blocks, past
from nanochat.gpt import IGNORE, Entries


@dataclass
class Labels:
    """P readings a row with V edits each; every tensor starts with (B, P)."""
    block: torch.Tensor    # (B, P)     the block q that reads
    entry: torch.Tensor    # (B, P, V)  the edited block
    value: torch.Tensor    # (B, P, V)  nats over the K tokens that detail is worth
    valid: torch.Tensor    # (B, P, V)  bool, False = there was no such edit


class RowRead:
    """Given to a trunk as its cache: remembers the keys and values of a row, layer by layer, and changes nothing."""

    def __init__(self):
        self.layers = {}

    def append(self, layer, k, v):
        self.layers[layer] = k.detach(), v.detach()
        return k, v

    def advance(self, n):
        """All layers have come by."""


class InFront:
    """Given to a trunk as its cache: the keys and values of some rows (their indices) that were read stand before what is read now, which nobody keeps."""

    def __init__(self, read, rows):
        self.layers, self.rows = read.layers, rows

    def append(self, layer, k, v):
        return tuple(torch.cat([before[self.rows], new], dim=2) for before, new in zip(self.layers[layer], (k, v))) # a layer at a time: less at once

    def advance(self, n):
        """All layers have come by."""


def draw_edits(table, counts, rng, readings, edits):
    """
    table (Q, Q) numpy, the working contexts of one row, counts (Q,) numpy, how many of a block's tokens have a target. Returns block (P,),
    entry (P, V) and edited lines (P, V, Q); entry -1 = no edit. Readings are drawn among the blocks that have a target, without which every
    edit is worth 0, and an entry to edit.
    """
    Q = len(table)
    able = [q for q in range(1, Q) if counts[q] and ((table[q, :q] == RAW) | (table[q, :q] == GIST)).any()]
    block = np.zeros(readings, dtype=np.int64)
    entry = np.full((readings, edits), -1, dtype=np.int64)
    lines = np.zeros((readings, edits, Q), dtype=np.int64)
    if not able:
        return block, entry, lines
    for p in range(readings):
        q = block[p] = able[rng.integers(len(able))]
        lines[p] = table[q]
        choices = np.flatnonzero((table[q, :q] == RAW) | (table[q, :q] == GIST))
        for v, b in enumerate(rng.permutation(choices)[:edits]):
            entry[p, v] = b
            lines[p, v, b] = GIST if table[q, b] == RAW else RAW
    return block, entry, lines


@torch.no_grad()
def measure(gpt, entries, front, hidden, targets, table, K, rngs, readings, edits):
    """
    entries of losses.row_entries, as they were read through table (B, Q, Q) with hidden states (B, at least T, D); front an InFront of them.
    targets (B, T), rngs one numpy generator a row.
    """
    B, T = targets.shape
    Q, device = T // K, targets.device
    counts = (targets != IGNORE).view(B, Q, K).sum(-1)
    drawn = [draw_edits(*row, rng, readings, edits) for *row, rng in zip(table.cpu().numpy(), counts.cpu().numpy(), rngs)]
    block, entry, lines = (torch.from_numpy(np.stack(column)).to(device) for column in zip(*drawn))
    places = lambda blocks: (blocks[:, :, None] * K + torch.arange(K, device=device)).flatten(1) # of their tokens
    pick = lambda t, index: t.gather(1, index[:, :, None].expand(-1, -1, t.size(2)))

    once, again = places(block), places(block.repeat_interleave(edits, dim=1)) # (B, P * K), (B, P * V * K)
    see = torch.cat([past(lines.flatten(1, 2), K), own_blocks(readings * edits, K, device).expand(B, -1, -1)], dim=2)[:, None]
    copied = Entries(pick(entries.x, again), [pick(value, again) for value in entries.values])
    edited = gpt.loss(gpt.trunk(copied, again.float(), see, front), targets.gather(1, again), "none").view(B, readings, edits, K).sum(-1)
    plain = gpt.loss(pick(hidden, once), targets.gather(1, once), "none").view(B, readings, 1, K).sum(-1)
    coarse = table.gather(1, block[:, :, None].expand(-1, -1, Q)) # (B, P, Q) the line before the edit
    was_raw = coarse.gather(2, entry.clamp(min=0)) == RAW
    gain = plain - edited # > 0: the edit helped
    value = torch.where(was_raw, -gain, gain) # closing a raw block that helps means its detail was worth less than nothing
    return Labels(block, entry, value, entry >= 0)
