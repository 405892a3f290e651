"""
LoRA: what a trained GPT learns anew while its own weights stay (Hu et al., 2021, arXiv 2106.09685). Beside each matrix W of its blocks two thin ones
are learnt, and the layer gives W x + up down x. `up` starts at zero, so at first nothing has changed; in the end W takes in the product, and the GPT is as plain as before.
"""
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import UserError


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def adapt(gpt, rank):
    """Give every matrix of the blocks but the gates two thin ones, and let nothing else of the GPT learn."""
    if not 0 < rank < gpt.config.value_width:
        raise UserError(f"a rank of {rank} beside matrices of {gpt.config.value_width} and more: expected 1 to {gpt.config.value_width - 1}")
    gpt.config = replace(gpt.config, lora=rank)
    gpt.requires_grad_(False)
    for name, linear in gpt.blocks.named_modules():
        if isinstance(linear, nn.Linear) and not name.endswith("gate"):
            like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
            linear.__class__ = Adapted
            linear.lora_down = nn.Parameter(torch.randn(rank, linear.in_features, **like) * linear.in_features ** -0.5)
            linear.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, **like))


@torch.no_grad()
def merge(gpt):
    """The matrices take in what was learnt beside them: a plain GPT again, all of which may learn."""
    gpt.config = replace(gpt.config, lora=0)
    for linear in gpt.blocks.modules():
        if isinstance(linear, Adapted):
            linear.weight += linear.lora_up @ linear.lora_down
            del linear.lora_up, linear.lora_down
            linear.__class__ = nn.Linear
    gpt.requires_grad_(True)
