"""
LoRA: what a trained GPT learns anew while its own weights stay (Hu et al., 2021, arXiv 2106.09685). Beside each matrix W of its blocks two thin ones
are learnt, and the layer gives W x + up down x. `up` starts at zero, so at first nothing has changed; in the end W takes in the product, and the GPT is as plain as before.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

LEAST = 64 # narrower matrices, the gates, have no rank to spare


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def adapt(gpt, rank):
    """Give every matrix of the blocks two thin ones of this rank, and let nothing else of the GPT learn."""
    gpt.requires_grad_(False)
    for linear in _matrices(gpt, nn.Linear):
        linear.__class__ = Adapted
        like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
        linear.lora_down = nn.Parameter(torch.randn(rank, linear.in_features, **like) * linear.in_features ** -0.5)
        linear.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, **like))


@torch.no_grad()
def merge(gpt):
    """The matrices take in what was learnt beside them."""
    for linear in _matrices(gpt, Adapted):
        linear.weight += linear.lora_up @ linear.lora_down
        del linear.lora_up, linear.lora_down
        linear.__class__ = nn.Linear


def _matrices(gpt, kind):
    return [module for module in gpt.blocks.modules() if type(module) is kind and min(module.weight.shape) >= LEAST]
