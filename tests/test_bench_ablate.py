"""bench/ablate.py: a variant is another model or another step, only while it lasts; costs are paired by seed."""
import math

import pytest
import torch

from bench import ablate
from nanochat.gpt import GPTConfig

CONFIG = GPTConfig(vocab_size=50, seq_len=32, layers=2, heads=2, kv_heads=2, width=32)


def learnt(variant):
    """The loss after three steps on the same tokens."""
    ids = torch.randint(50, (4, 33), generator=torch.Generator().manual_seed(1))
    with ablate.without(variant, CONFIG, seed=0, weight_decay=0.5) as (gpt, optimizer, curve):
        for _ in range(3):
            gpt(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return gpt(ids[:, :-1], ids[:, 1:]).item(), curve


@pytest.mark.parametrize("variant", list(ablate.VARIANTS))
def test_a_variant_changes_something_and_leaves_nothing_behind(variant):
    """A patch that missed its target would report that its trick costs nothing."""
    whole = learnt("the whole recipe")
    if variant != "the whole recipe":
        assert learnt(variant) != whole
    assert learnt("the whole recipe") == whole


def test_costs_are_paired_by_seed():
    """By hand: costs 0.1, 0.3 and 0.2 have mean 0.2, deviation 0.1, standard error 0.1 / sqrt(3), though the runs themselves spread far wider."""
    rows, numbers = ablate.rows_of({"the whole recipe": [1.0, 2.0, 3.0], "no x0": [1.1, 2.3, 3.2]})
    assert numbers["no x0"]["cost"] == pytest.approx(0.2) and numbers["no x0"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert numbers["the whole recipe"]["spread"] == pytest.approx(1.0)
    assert rows[1][2] == "+0.2000 +- 0.0577"
