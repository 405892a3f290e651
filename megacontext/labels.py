"""
What an edit is worth, measured: the loss of the next tokens with the edit and without it.

For a block q of a row and its working context, draw some edits (open a gist of tokens, close a raw block), read the
block once more under each edited context, and compare. The keys and values of the row are those that the loss has just read it with,
so an edit costs a forward of K tokens, without gradients.

The label of an entry is the value of its detail in nats over the rest of the block, from the place on where LensNet is asked: the loss with the coarser view
less the loss with the finer one, whichever of the two the context had. A session asks all over a block, so a place is where one of its PARTS parts begins, as likely
as any other: asked where blocks begin and nowhere else, LensNet gets half of what can be gained within the next 8 tokens by two blocks, and three fifths so (LOG.md, 2026-11-27). Positive = detail helps. (A LensNet elsewhere was once trained on the opposite sign
and looked healthy: tests/test_labels.py has an oracle case.)

B = rows, Q = blocks, K = block, P = readings a row, V = edits a reading
"""
from dataclasses import dataclass

import numpy as np
import torch

from megacontext.layout import GIST, RAW, own_blocks, past
from nanochat.gpt import IGNORE, Entries


PARTS = 4 # of a block; LensNet learns where each begins: at every 8th token of 32


@dataclass
class Labels:
    """P readings a row with V edits each; every tensor starts with (B, P)."""
    block: torch.Tensor    # (B, P)     the block q that reads
    now: torch.Tensor      # (B, P)     the place in the row that its tokens count from
    entry: torch.Tensor    # (B, P, V)  the edited block
    value: torch.Tensor    # (B, P, V)  nats over the block's tokens from there on that detail is worth
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


def first_targets(targets, K):
    """
    targets (B, T) -> (B, Q), the place of each block's first target, or where it begins if it has none: in a text that is where a block begins, in a conversation
    where an answer does, as after a prompt, behind the whole question. LensNet is asked what to open there, and learns from there on.
    """
    able = (targets != IGNORE).unflatten(1, (-1, K)) # (B, Q, K)
    return torch.arange(able.size(1), device=targets.device) * K + able.int().argmax(-1)


def draw_edits(table, left, rng, readings, edits):
    """
    table (Q, Q) numpy, the working contexts of one row, left (Q, PARTS) bool numpy, whether a block has targets in each of its parts or after it. Returns block (P,), part (P,),
    entry (P, V) and edited lines (P, V, Q); entry -1 = no edit. Readings are drawn among the blocks that have a target, without which every
    edit is worth 0, and an entry to edit.
    """
    Q = len(table)
    able = [q for q in range(1, Q) if left[q, 0] and ((table[q, :q] == RAW) | (table[q, :q] == GIST)).any()]
    block, part = np.zeros((2, readings), dtype=np.int64)
    entry = np.full((readings, edits), -1, dtype=np.int64)
    lines = np.zeros((readings, edits, Q), dtype=np.int64)
    if not able:
        return block, part, entry, lines
    for p in range(readings):
        q = block[p] = able[rng.integers(len(able))]
        part[p] = rng.choice(np.flatnonzero(left[q]))
        lines[p] = table[q]
        choices = np.flatnonzero((table[q, :q] == RAW) | (table[q, :q] == GIST))
        for v, b in enumerate(rng.permutation(choices)[:edits]):
            entry[p, v] = b
            lines[p, v, b] = GIST if table[q, b] == RAW else RAW
    return block, part, entry, lines


@torch.no_grad()
def measure(gpt, entries, front, hidden, targets, table, K, rngs, readings, edits):
    """
    entries of losses.row_entries, as they were read through table (B, Q, Q) with hidden states (B, at least T, D); front an InFront of them.
    targets (B, T), rngs one numpy generator a row.
    """
    B, T = targets.shape
    Q, device = T // K, targets.device
    parts = (targets != IGNORE).view(B, Q, PARTS, K // PARTS).any(-1)
    left = parts.flip(-1).cummax(-1).values.flip(-1)
    drawn = [draw_edits(*row, rng, readings, edits) for *row, rng in zip(table.cpu().numpy(), left.cpu().numpy(), rngs)]
    block, part, entry, lines = (torch.from_numpy(np.stack(column)).to(device) for column in zip(*drawn))
    now = torch.maximum(first_targets(targets, K).gather(1, block), block * K + part * (K // PARTS))
    places = lambda blocks: (blocks[:, :, None] * K + torch.arange(K, device=device)).flatten(1) # of their tokens
    pick = lambda t, index: t.gather(1, index[:, :, None].expand(-1, -1, t.size(2)))

    once, again = places(block), places(block.repeat_interleave(edits, dim=1)) # (B, P * K), (B, P * V * K)
    counted = targets.gather(1, once).masked_fill(once < now.repeat_interleave(K, dim=1), IGNORE)
    see = torch.cat([past(lines.flatten(1, 2), K), own_blocks(readings * edits, K, device).expand(B, -1, -1)], dim=2)[:, None]
    copied = Entries(pick(entries.x, again), [pick(value, again) for value in entries.values])
    wanted = counted.unflatten(1, (readings, 1, K)).expand(-1, -1, edits, -1).flatten(1) # (B, P * V * K)
    edited = gpt.loss(gpt.trunk(copied, again.float(), see, front), wanted, "none").view(B, readings, edits, K).sum(-1)
    plain = gpt.loss(pick(hidden, once), counted, "none").view(B, readings, 1, K).sum(-1)
    coarse = table.gather(1, block[:, :, None].expand(-1, -1, Q)) # (B, P, Q) the line before the edit
    was_raw = coarse.gather(2, entry.clamp(min=0)) == RAW
    gain = plain - edited # > 0: the edit helped
    value = torch.where(was_raw, -gain, gain) # closing a raw block that helps means its detail was worth less than nothing
    return Labels(block, now, entry, value, entry >= 0)
