"""Laws of the plan: the published ladder comes out, scaling rules hold between any two depths, curves have no jumps."""

import math

import pytest

from nanochat.common import UserError
from nanochat.cost import parameter_counts
from nanochat.gpt import GPTConfig
from nanochat.schedule import (accumulation, fit_rows, lr_multiplier, muon_momentum, plan, short_run, warmdown_start,
                               weight_decay_multiplier, whole_rows)

LADDER = {  # depth: (width, scaling M, tokens B, log2 batch), nanochat's published miniseries at vocabulary 32768
    4: (256, 11.5, 0.14, 18), 8: (512, 41.9, 0.50, 18), 12: (768, 110.1, 1.32, 19), 16: (1024, 234.9, 2.82, 19),
    20: (1280, 435.2, 5.22, 20), 24: (1536, 729.8, 8.76, 20), 28: (1792, 1138, 13.65, 20)}


@pytest.mark.parametrize("depth", LADDER)
def test_the_ladder_comes_out(depth):
    p = plan(depth, 32768)
    width, scaling, tokens, batch = LADDER[depth]
    assert (p.width, math.log2(p.batch_tokens)) == (width, batch)
    assert p.scaling_params / 1e6 == pytest.approx(scaling, rel=0.005)
    assert p.tokens / 1e9 == pytest.approx(tokens, rel=0.015)


def test_the_reference_depth_has_multipliers_of_one():
    p = plan(12, 32768)
    assert (p.batch_tokens, p.lr_mult, p.weight_decay_mult) == (2**19, 1.0, 1.0)


@pytest.mark.parametrize("depth", range(1, 33, 3))
@pytest.mark.parametrize("vocab", [512, 4096, 65536])
def test_plan_shape_and_count_are_the_models(depth, vocab):
    p, config = plan(depth, vocab, 512), GPTConfig.from_depth(depth, vocab, 512)
    assert (p.width, p.heads) == (config.width, config.heads)
    assert p.scaling_params == parameter_counts(config)["scaling"] - config.previous * config.width ** 2 # horizons are nanochat's


@pytest.mark.parametrize("depth", [4, 12, 20, 28])
def test_the_weights_average_over_a_constant_share_of_the_run(depth):
    """lr x decay x steps, the number of time constants in a run, is the same at every depth (rule 5)."""
    p = plan(depth, 32768)
    assert p.lr_mult * p.weight_decay_mult * p.steps == pytest.approx(2520, rel=0.01)


def test_what_is_set_by_hand_stays():
    p = plan(4, 4096, 512, tokens=4_000_000, batch_tokens=16384)
    assert (p.batch_tokens, p.steps) == (16384, 244)
    assert p.lr_mult == pytest.approx(math.sqrt(16384 / 2**19))
    assert plan(4, 4096, 512, steps=7).steps == 7
    short, long = plan(4, 4096, tokens=10**6), plan(4, 4096, tokens=10**9)
    assert short.batch_tokens < long.batch_tokens
    with pytest.raises(UserError, match="both"):
        plan(4, 4096, tokens=1000, steps=2)
    with pytest.raises(UserError, match="positive"):
        plan(0, 4096)
    with pytest.raises(UserError, match="at least 1"):
        plan(4, 4096, steps=0)


@pytest.mark.parametrize("tokens", [200_000, 500_000, 1_000_000, 2_000_000])
def test_a_short_run_gets_steps_and_rates_that_let_it_learn(tokens):
    """The batch rule alone gave 12 steps to 200,000 tokens, at a seventh of the rates: nothing was learnt."""
    p = plan(4, 4096, 512, tokens=tokens)
    assert 64 <= p.steps <= 256
    assert p.lr_mult < p.lr_mult * short_run(p) <= 1.0


def test_a_whole_run_is_not_touched_by_what_short_ones_need():
    for depth in (4, 12, 20):
        p = plan(depth, 32768)
        assert short_run(p) == pytest.approx(1.0, abs=0.01) and p.steps > 500
    hand = plan(4, 4096, 512, tokens=1_000_000, batch_tokens=4096)
    assert short_run(hand) == pytest.approx(math.sqrt(12 * hand.scaling_params / hand.tokens))
    assert short_run(plan(12, 32768, tokens=10**7, batch_tokens=2**19)) == 1.0, "never above the rates of the reference batch"


def test_every_process_has_a_row_to_read():
    assert plan(4, 4096, 2048, tokens=100_000, world=8).batch_tokens == 8 * 2048


@pytest.mark.parametrize("T, world", [(96, 1), (2048, 3), (1024, 6), (160, 8), (512, 4)])
@pytest.mark.parametrize("tokens", [None, 20_000, 1_000_000])
def test_the_derived_batch_is_whole_rows_for_every_process(T, world, tokens):
    """A power of two is no number of rows of 96 tokens, nor of rows for three: such a run ended in "Change --batch-tokens", which nobody had given."""
    p = plan(4, 4096, T, tokens=tokens, world=world)
    rows = fit_rows(p.batch_tokens, 16, T, world)
    assert accumulation(p.batch_tokens, rows, T, world) * rows * T * world == p.batch_tokens
    power = plan(4, 4096, 1, tokens=tokens).batch_tokens
    assert p.batch_tokens == T * world or abs(p.batch_tokens - power) <= T * world / 2
    assert whole_rows(p.batch_tokens, T, world) == p.batch_tokens, "a later stage of the same rows has the same batch"


def test_a_two_minute_run_does_not_decay_its_weights_away():
    """With 1 / D of the tokens really seen, 4M tokens at depth 4 gave a decay of 23% per step: the weights never grew."""
    p = plan(4, 8192, 512, tokens=4_000_000)
    assert 0.02 * p.lr_mult * short_run(p) * 0.28 * p.weight_decay_mult < 0.05


@pytest.mark.parametrize("batch, rows, T, world", [(2**19, 32, 2048, 8), (2**14, 4, 512, 2)])
def test_accumulation_covers_the_batch_exactly(batch, rows, T, world):
    assert accumulation(batch, rows, T, world) * rows * T * world == batch
    with pytest.raises(UserError, match="--device-batch"):
        accumulation(batch + T, rows, T, world)


def test_fit_rows_is_the_largest_that_divides():
    assert fit_rows(2**18, 20, 2048, 2) == 16
    assert fit_rows(3 * 2**12, 16, 512, 2) == 12
    with pytest.raises(UserError, match="multiple of 1024"):
        fit_rows(1000, 16, 512, 2)


@pytest.mark.parametrize("total", [1, 2, 20, 61, 500, 2520, 10_000])
def test_curves_stay_in_range_and_have_no_jumps(total):
    lr = [lr_multiplier(s, total) for s in range(total + 1)]
    mu = [muon_momentum(s, total) for s in range(total + 1)]
    wd = [weight_decay_multiplier(s, total) for s in range(total + 1)]
    assert all(0 < x <= 1 for x in lr) and all(0.85 <= x <= 0.97 for x in mu) and all(0 <= x <= 1 for x in wd)
    assert all(abs(a - b) < max(0.026, 3 / total) for a, b in zip(lr, lr[1:]))
    assert all(abs(a - b) < max(0.001, 0.2 / total) for a, b in zip(mu, mu[1:]))
    assert all(a >= b for a, b in zip(wd, wd[1:]))
    assert all(b <= a for a, b in zip(lr[40:], lr[41:]))  # after the warmup it never rises


def test_the_learning_rate_by_hand():
    """2520 steps: 1/40 at once, 1 from step 39 to 882, halfway down in the middle of the last 65%, 0.05 at the end."""
    assert warmdown_start(2520) == 882
    values = [lr_multiplier(s, 2520) for s in (0, 39, 882, 882 + 819, 2520)]
    assert values == pytest.approx([1 / 40, 1, 1, 0.525, 0.05])


def test_the_momentum_by_hand():
    assert [muon_momentum(s, 2520) for s in (0, 200, 400, 882, 882 + 819, 2520)] == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90])


def test_the_decay_by_hand():
    assert [weight_decay_multiplier(s, 100) for s in (0, 50, 100, 200)] == pytest.approx([1, 0.5, 0, 0], abs=1e-12)
