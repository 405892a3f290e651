"""The co-training objective: honest targets, every network learns, and the number of processes changes nothing."""
import copy
import math

import numpy as np
import pytest
import torch

from megacontext.layout import block_mask, visibility
from megacontext.losses import CoTraining, CoTrainingOptions, parse_curriculum
from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.optim import make_optimizer
from nanochat.train import PlainObjective
from tests.tiny import VOCAB, tiny_networks

T = 1280 # long enough for a level-2 gist of full blocks to be readable


def batch(rows, seed=0, T=T, ids=None):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (len(rows), T + 1), generator=g) if ids is None else ids
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros(len(rows), T // 32, dtype=torch.long), torch.tensor(rows))


def objective(seed=0, **options):
    return CoTraining(*tiny_networks(seed), CoTrainingOptions(**{"tail": (0, 96), **options}))


def test_random_tokens_cannot_be_predicted():
    """
    Fresh random tokens every step: no model may get below ln V. Elsewhere targets were the inputs themselves, and within 40 steps
    the loss on random tokens was 0.4 where 5.5 is the floor.
    """
    o = objective(curriculum=((8, 0.5), (32, 1.0)))
    optimizer = make_optimizer(o.gpt, dict(gistnet=o.gistnet, lensnet=o.lensnet))
    losses = []
    for step in range(24):
        o.start_step(step, 24)
        loss, sums = o(batch(list(range(4 * step, 4 * step + 4)), seed=step, T=256))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(o.report({name: float(sums.get(name, 0)) for name in o.SUMS})["loss"])
    assert min(losses) > math.log(VOCAB) - 0.03, losses
    assert losses[-1] < losses[0], "it did learn that there is nothing to know"


def test_every_parameter_has_a_gradient_a_slot_and_a_key_and_moves(tmp_path):
    """Elsewhere GistNet and LensNet were in no optimizer and in no checkpoint: 0 of 41 tensors."""
    o = objective()
    networks = dict(gpt=o.gpt, gistnet=o.gistnet, lensnet=o.lensnet)
    before = {name: copy.deepcopy(module.state_dict()) for name, module in networks.items()}
    optimizer = make_optimizer(o.gpt, dict(gistnet=o.gistnet, lensnet=o.lensnet))
    for rows in ([0, 1], [8, 9, 10, 11]): # a plain round and a labelled one
        loss, _ = o(batch(rows))
        loss.backward()
    for name, module in networks.items():
        for key, p in module.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, f"{name}.{key} gets no gradient"
    optimizer.step()
    state = optimizer.state_dict()
    checkpoint.save(tmp_path, 1, networks, optimizer, {})
    saved = checkpoint.load(tmp_path)
    for name, module in networks.items():
        for key, p in module.named_parameters():
            assert any(slot.startswith(f"{name}.{key}.") for slot in state), f"{name}.{key} has no optimizer slot"
            assert torch.equal(saved.tensors[name][key], p), f"{name}.{key} is not in the checkpoint"
            assert not torch.equal(before[name][key], p), f"{name}.{key} did not move"


def test_lensnet_does_not_train_the_others_and_they_do_not_cheat_for_it():
    o = objective()
    entries_grad = torch.autograd.grad(_lens_part(o), [*o.gpt.parameters(), *o.gistnet.parameters()], allow_unused=True)
    assert all(g is None for g in entries_grad)


def _lens_part(o):
    _, labels = o._read_gists(*[getattr(batch([8, 10]), name) for name in ("inputs", "targets", "docs", "rows")], torch.tensor([True, True]))
    return labels["lens_squares"]


def test_the_loss_is_the_same_however_rows_are_dealt():
    """One process with four rows, or two with two: the sum over ranks is the loss of the whole, to rounding."""
    o = objective()
    for rows in ([0, 1, 2, 3], [8, 9, 10, 11], [6, 7, 8, 9]):
        whole = batch(rows)
        part = lambda pick: Batch(*(getattr(whole, name)[pick] for name in ("inputs", "targets", "docs", "rows")))
        together, sums = o(whole)
        halves = [o(part(slice(r, None, 2))) for r in range(2)]
        assert torch.allclose(together, sum(loss for loss, _ in halves) / 2, atol=1e-4)
        for name, value in sums.items():
            assert torch.allclose(value.float(), sum(s[name] for _, s in halves if name in s).float(), rtol=1e-3, atol=1e-2), name


def test_plain_rounds_are_the_plain_graph():
    o = objective()
    rows = batch([0, 1])
    assert torch.equal(o(rows)[0], PlainObjective(o.gpt)(rows)[0])


def test_lensnet_learns_a_rule_that_can_be_learnt():
    """Labels that follow from distance alone: the unexplained share falls below a half. (A loss stuck at 1 would be a dead net.)"""
    o = objective()
    optimizer = torch.optim.Adam(o.lensnet.parameters(), lr=3e-3)
    M, E, n = 8, 20, 16
    g = torch.Generator().manual_seed(0)
    for step in range(150):
        distances = torch.randint(32, 2000, (M, E), generator=g)
        wanted = -torch.log(distances.float())
        wanted = wanted - wanted.mean(1, keepdim=True)
        got = o.lensnet(torch.randn(M, n, 32, generator=g), torch.ones(M, n, dtype=torch.bool), torch.randn(M, E, 32, generator=g),
                        torch.ones(M, E, dtype=torch.long), distances, torch.ones(M, E, dtype=torch.bool))
        loss = (got - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_scores_balance_and_ignore_who_is_not_there():
    """The budget's net zero: scores add up to nothing. An entry that is not seen has no score and no influence."""
    _, _, lensnet = tiny_networks()
    args = lambda keys: (torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)), torch.ones(1, 5, dtype=torch.bool), keys,
                         torch.ones(1, 9, dtype=torch.long), torch.arange(10, 100, 10)[None], torch.arange(9)[None] < 7)
    keys = torch.randn(1, 9, 32)
    scores = lensnet(*args(keys))
    other = keys.clone()
    other[:, 7:] += 5
    assert abs(scores.sum()) < 1e-4 and (scores[:, 7:] == 0).all() and torch.allclose(scores, lensnet(*args(other)))


def test_lensnet_is_not_causal():
    """An old entry must see what is asked now: elsewhere its score did not depend on anything newer, so it could not."""
    _, _, lensnet = tiny_networks()
    tail = torch.randn(1, 5, 32, requires_grad=True)
    scores = lensnet(tail, torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 9, 32), torch.ones(1, 9, dtype=torch.long), torch.arange(100, 10, -10)[None], torch.ones(1, 9, dtype=torch.bool))
    assert torch.autograd.grad(scores[0, 0], tail)[0][0, -1].abs().max() > 0


def test_curricula():
    assert parse_curriculum("8:0.3,32:1") == ((8, 0.3), (32, 1.0))
    for wrong in ("8", "7:0.3,32:1", "8:0.5", ""):
        with pytest.raises(UserError):
            parse_curriculum(wrong)


def test_a_block_mask_changes_nothing():
    """The objective on FlexAttention and on a dense mask: the same loss, the same labels. (Uncompiled here, and forward only: all that a CPU has.)"""
    networks, results = tiny_networks(), []
    for see in (visibility, block_mask):
        o = CoTraining(*networks, CoTrainingOptions(tail=(0, 96), readings=2, edits=3), see)
        with torch.no_grad():
            loss, sums = o(batch([8, 9, 10, 11]))
        results.append([loss, *(sums[name].float() for name in ("gist_nats", "lens_squares", "label_squares", "lens_products"))])
    assert results[0][3] > 0, "edits were priced"
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, atol=1e-3, rtol=1e-3)
