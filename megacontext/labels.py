"""
What an edit is worth, measured: the loss of the next block with the edit and without it.

For a block q of a row and its working context, draw some edits (open a gist of tokens, close a raw block), read the
block once more under each edited context, and compare. All keys and values of the row exist once, so an edit costs K more query
tokens in one forward without gradients.

The label of an entry is the value of its detail in nats over the block: the loss with the coarser view less the loss with the finer
one, whichever of the two the context had. Positive = detail helps. (A LensNet elsewhere was once trained on the opposite sign
and looked healthy: tests/test_labels.py has an oracle case.)

B = rows, Q = blocks, K = block, P = readings a row, V = edits a reading
"""
from dataclasses import dataclass

import numpy as np
import torch

from megacontext.layout import FAN, GIST, RAW, Copies, entry_positions, stretches
from nanochat.gpt import IGNORE


@dataclass
class Labels:
    """P readings a row with V edits each; every tensor starts with (B, P)."""
    block: torch.Tensor    # (B, P)     the block q that reads
    entry: torch.Tensor    # (B, P, V)  the edited block
    value: torch.Tensor    # (B, P, V)  nats over the K tokens that detail is worth
    valid: torch.Tensor    # (B, P, V)  bool, False = there was no such edit


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
def measure(gpt, read, targets, table, K, rngs, readings, edits, see=stretches):
    """
    read       a function: copies -> Entries of the row's tokens, gists and copies (losses.row_entries)
    targets (B, T), table (B, Q, Q) as the row was read, rngs one numpy generator a row
    see        layout.stretches, or layout.block_mask
    """
    B, T = targets.shape
    Q, device = T // K, targets.device
    counts = (targets != IGNORE).view(B, Q, K).sum(-1)
    drawn = [draw_edits(*row, rng, readings, edits) for *row, rng in zip(table.cpu().numpy(), counts.cpu().numpy(), rngs)]
    block, entry, lines = (torch.from_numpy(np.stack(column)).to(device) for column in zip(*drawn))
    copies = Copies(block.repeat_interleave(edits, dim=1), lines.flatten(1, 2))
    hidden = gpt.trunk(read(copies), entry_positions(T, K, copies, device), see(table, K, copies))
    wanted = targets.view(B, Q, K).gather(1, copies.block[:, :, None].expand(-1, -1, K)) # (B, P * V, K)
    start = T + Q + Q // FAN
    edited = gpt.loss(hidden[:, start:], wanted.flatten(1), "none").view(B, readings, edits, K).sum(-1)
    read_plain = (block[:, :, None] * K + torch.arange(K, device=device)).flatten(1) # (B, P * K), the tokens of the blocks as the row was read
    plain = gpt.loss(hidden[torch.arange(B, device=device)[:, None], read_plain], targets.gather(1, read_plain), "none").view(B, readings, K).sum(-1)
    coarse = table.gather(1, block[:, :, None].expand(-1, -1, Q)) # (B, P, Q) the line before the edit
    was_raw = coarse.gather(2, entry.clamp(min=0)) == RAW
    gain = plain[:, :, None] - edited # > 0: the edit helped
    value = torch.where(was_raw, -gain, gain) # closing a raw block that helps means its detail was worth less than nothing
    return Labels(block, entry, value, entry >= 0)
