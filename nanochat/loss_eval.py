"""
Bits per byte: how many bits the model needs to say one byte of text. Unlike loss per token it does not depend on how the
tokenizer cuts, so models with different vocabularies compare.

    bits per byte = sum of nats over tokens / (ln 2 x sum of bytes of those tokens)

In:  a loss function, batches, the bytes of every token id. Out: a number, the same on every rank.
Targets that stand for no byte of text count in neither sum: special tokens (0 bytes) and masked ones (-1).
"""

import math

import torch
import torch.distributed as td


@torch.no_grad()
def bits_per_byte(loss_fn, batches, token_bytes, world=1, device="cpu"):
    """
    loss_fn      batch -> nats per target (B, T); what it gives for masked targets is ignored, NaN included
    batches      finite iterable of objects with .targets (B, T); ranks may hold different numbers of them, or none
    token_bytes  (V,) bytes of each id, 0 for specials
    Raises ValueError when no target of any rank counts: there is nothing to measure.
    """
    token_bytes = torch.as_tensor(token_bytes, device=device)
    nats = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.int64)
    for batch in batches:
        losses = loss_fn(batch)
        targets = batch.targets.to(device)
        assert losses.shape == targets.shape, f"loss_fn gave {tuple(losses.shape)} for targets {tuple(targets.shape)}"
        lengths = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        nats += losses.double()[lengths > 0].sum().cpu()
        count += lengths.sum().cpu()
    if world > 1:
        td.all_reduce(nats)  # CPU tensors: by gloo, whatever the device
        td.all_reduce(count)
    if count == 0:
        raise ValueError("no target stands for any byte: the evaluation set is empty, or wholly masked")
    return nats.item() / (math.log(2) * count.item())
