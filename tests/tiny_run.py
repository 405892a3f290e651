"""A run's folder as training leaves it, in a second: a real tokenizer, tiny networks with random weights, a folder of real text."""
import inspect
import random
import textwrap
from pathlib import Path

import torch

from nanochat import checkpoint
from nanochat.common import checkpoint_dir
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.load import build, describe, modules
from tests.tiny import stir

STEP = 3
_tokenizer = None


def tiny_tokenizer():
    """Trained once for all tests, on the source of a few modules."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = Tokenizer.train([inspect.getsource(module) for module in (random, textwrap)], 400)
    return _tokenizer


def make_run(*stages, seq_len=512, memory=True, seed=0, width=32, windows="L"):
    """Save the same networks as the last checkpoint, tag "t", of each stage, below base_dir(). Returns the networks."""
    tokenizer = tiny_tokenizer()
    tokenizer.save()
    torch.manual_seed(seed)
    config = GPTConfig(tokenizer.vocab_size, seq_len, layers=2, heads=2, kv_heads=2, width=width, bos=tokenizer.bos, windows=windows)
    networks = build(config, memory, dict(width=width, inner=16, heads=2, layers=2), dict(hidden=8))
    for network in networks:
        if network is not None:
            stir(network)
    for stage in stages:
        meta = dict(networks=describe(*networks, tokenizer), batch_tokens=1024, lr=1.0)
        checkpoint.save(checkpoint_dir(stage, "t"), STEP, modules(*networks), None, meta)
    return networks


def make_text(folder, files=150):
    """Python files with functions and classes of unique names, so that every kind of code question can be asked. Returns the source's spec."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for n in range(files):
        parts = [f'"""Module {n}."""\n']
        for m in range(4):
            parts.append(f"\n\ndef move_{n}_{m}(speed, weight, limit={rng.randrange(10, 99)}):\n    total = speed * weight\n    return total + {rng.randrange(100, 999)}\n")
        parts.append(f"\n\nclass Box{n}(Base{n}):\n    def fill(self, height, width):\n        return height * {n + 20}\n\n"
                     f"    def drain(self, rate, pause={n + 50}):\n        return rate - {n + 30}\n")
        (folder / f"module_{n}.py").write_text("".join(parts))
    return f"dir:{folder}"
