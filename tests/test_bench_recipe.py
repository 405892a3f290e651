"""bench/recipe.py: a variant is another training, only while it lasts, and rows of the table are what they say."""
import math

import pytest
import torch

from bench import recipe
from nanochat.dataloader import Batch
from nanochat.gpt import GPTConfig
from nanochat.optim import make_optimizer

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


def test_the_spread_is_that_of_paired_differences():
    first, found = [dict(bpb=1.0), dict(bpb=2.0), dict(bpb=3.0)], [dict(bpb=1.1), dict(bpb=2.3), dict(bpb=3.2)]
    assert recipe.told("x", found, first) == ["x", f"2.2000 +- {0.1 / math.sqrt(3):.4f}"] and recipe.told("as it is", first, first) == ["as it is", "2.0000"]
