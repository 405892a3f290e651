"""bench/recipe.py: a variant is another training, only while it lasts, and rows of the table are what they say."""
import math

import numpy as np
import pytest
import torch

from bench import recipe
from megacontext.evaluate import Networks, Rows, trailing
from megacontext.gistnet import GistConfig
from megacontext.probes import reconstruction
from nanochat.dataloader import Batch
from nanochat.gpt import GPTConfig
from nanochat.optim import make_optimizer
from tests.tiny import VOCAB, tiny_networks

CONFIG = GPTConfig(vocab_size=50, seq_len=640, layers=2, heads=2, kv_heads=2, width=64)
STEPS = 12


def learnt(variant):
    """The loss of each step, on the same tokens: at the start of the curriculum and at its end, rows with labels and without, and plain ones."""
    ids, losses = torch.randint(50, (4, 641), generator=torch.Generator().manual_seed(1)), []
    with recipe.changed(variant, CONFIG, seed=0) as objective:
        for p in objective.gistnet.parameters():
            if not p.any(): # else what a gist takes from elsewhere is nothing for the first few steps
                torch.nn.init.normal_(p, std=0.1)
        optimizer = make_optimizer(objective.gpt, dict(gistnet=objective.gistnet, lensnet=objective.lensnet))
        for step, first in ((1, 16), (1, 32), (11, 8), (11, 16)):
            objective.start_step(step, STEPS)
            loss, _ = objective(Batch(ids[:, :-1], ids[:, 1:], torch.zeros(4, 20, dtype=torch.long), torch.arange(first, first + 4)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("variant", list(recipe.VARIANTS))
def test_a_variant_changes_something_and_leaves_nothing_behind(variant):
    """A setting that missed its target would report that it does not matter."""
    as_it_is = learnt("as it is")
    if variant != "as it is":
        assert learnt(variant) != as_it_is
    assert learnt("as it is") == as_it_is


def test_it_is_what_training_builds():
    config = GPTConfig(vocab_size=50, seq_len=64, layers=2, heads=6, kv_heads=6, width=384)
    with recipe.changed("as it is", config, seed=0) as objective:
        assert objective.gistnet.config == GistConfig.for_gpt(config)


def test_what_is_judged_is_what_mega_eval_tells():
    """Five rows: once the fifth was read by itself, and its gists of another row were its own."""
    networks, ids = Networks(*tiny_networks()), torch.randint(VOCAB, (5, 1281), generator=torch.Generator().manual_seed(1))
    rows = Rows(networks, ids, 160, np.random.default_rng(0))
    nats, decoded = trailing(rows, 320), reconstruction(rows)[1]
    better = {name: (nats[other] - nats["recency"]).mean().item() for name, other in dict(window="window", none="no gists", swapped="swapped").items()}
    better |= dict(raw=(nats["recency"] - nats["lensnet"]).mean().item(), decoded=np.mean(decoded["nothing"]) - np.mean(decoded["own"]))
    assert recipe.judge(networks, ids) == pytest.approx(better, abs=1e-4) and min(map(abs, better.values())) > 1e-3


def test_the_spread_is_that_of_paired_differences():
    first, found = [dict(bpb=1.0), dict(bpb=2.0), dict(bpb=3.0)], [dict(bpb=1.1), dict(bpb=2.3), dict(bpb=3.2)]
    assert recipe.told("x", found, first) == ["x", f"2.2000 +- {0.1 / math.sqrt(3):.4f}"] and recipe.told("as it is", first, first) == ["as it is", "2.0000"]
