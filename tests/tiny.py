"""Networks small enough for a test, with every weight moved off zero so that nothing passes by being silent."""
import torch

from megacontext.gistnet import GistConfig, GistNet
from megacontext.lensnet import LensConfig, LensNet
from nanochat.gpt import GPT, GPTConfig

VOCAB = 64


def tiny_gpt(seed=0, seq_len=2048, layers=3, width=32):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(VOCAB, seq_len, layers, heads=2, kv_heads=2, width=width))
    return stir(gpt)


def tiny_networks(seed=0, seq_len=2048, width=32):
    gpt = tiny_gpt(seed, seq_len, width=width)
    gistnet = stir(GistNet(GistConfig(gpt.config.width, inner=16, heads=2, layers=2)))
    lensnet = stir(LensNet(LensConfig(hidden=8)))
    return gpt, gistnet, lensnet


def stir(module, std=0.2):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * std)
    return module
