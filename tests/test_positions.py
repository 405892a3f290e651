"""Laws of the position policies: what is near keeps its true distance, nothing leaves the trained range, order is kept."""

import numpy as np
import pytest
import torch

from megacontext.positions import absolute, clamped, compressed, map_positions

torch.set_num_threads(1)
ROUNDING = 1e-9
LENGTHS = [1, 2, 7, 64, 1000, 10 ** 5, 10 ** 7, 10 ** 9]  # as a number of tokens beyond `trained`


def timeline(length, trained, points=2000):
    """Some positions of [0, length]: spread, all around the newest `trained`, the oldest few, halves (centres of gists)."""
    far = np.round(2 * np.linspace(0, length, points)) / 2
    near = np.arange(max(0, length - trained), length + 0.5, 0.5)
    return np.unique(np.concatenate([far, near, np.arange(0, min(64, length), 0.5)]))


@pytest.mark.parametrize("trained", [2, 3, 16, 255, 2048])
@pytest.mark.parametrize("beyond", LENGTHS)
def test_compressed_is_monotone_and_bounded_and_exact_in_the_tail(trained, beyond):
    length = trained + beyond
    p = timeline(length, trained)
    mapped = compressed(p, length, trained)
    assert (np.diff(mapped) > 0).all(), "two positions swapped or merged"
    assert mapped.min() >= -ROUNDING and mapped.max() <= trained
    assert abs(mapped[0]) <= ROUNDING and mapped[-1] == trained
    tail = p >= length - trained // 2
    assert tail.sum() >= 2
    np.testing.assert_array_equal(trained - mapped[tail], length - p[tail])  # true distances, to the bit
    assert (np.diff(mapped) <= np.diff(p) * (1 + 1e-6)).all(), "a distance was stretched"


@pytest.mark.parametrize("length", [0, 1, 100, 2047, 2048])
def test_a_history_within_the_trained_range_is_left_alone(length):
    p = timeline(length, 2048)
    for policy in (compressed, absolute, clamped):
        np.testing.assert_array_equal(policy(p, length, 2048), p)


@pytest.mark.parametrize("beyond", LENGTHS)
def test_no_jump_and_no_kink_where_the_compression_begins(beyond):
    trained, length = 2048, 2048 + beyond
    edge = length - trained // 2
    step = 1 / 8
    before, at, after = (compressed(edge + x, length, trained) for x in (-step, 0.0, step))
    assert after - at == step  # tail side: the identity
    assert abs((at - before) / step - 1) < 2e-3  # far side: slope 1 in the limit


def test_growing_by_a_token_moves_nothing_much():
    """Continuity in time: also at the moment when the history outgrows the trained range."""
    for length in [2048, 2049, 5000, 10 ** 6]:
        p = timeline(length, 2048)
        shift = compressed(p, length + 1, 2048) - compressed(p, length, 2048)
        assert np.abs(shift).max() <= 1 + ROUNDING


def test_far_distances_are_log_like():
    """Each doubling of the distance takes about the same room: worked on 1,048,576 tokens in a range of 2048."""
    length = 2 ** 20
    rooms = np.diff([compressed(float(length - 2 ** e), length, 2048) for e in range(14, 21)])
    assert (rooms < 0).all()
    assert rooms.min() / rooms.max() < 1.2, f"doublings take {-rooms} positions"


def test_one_case_by_hand():
    """trained 4, length 8: distances 1, 2 stay; f(8) must be 4, so log(1 + 6k) = 2k, k = 0.8188...; f(5) = 2 + log(1 + 3k)/k."""
    k = 1.0
    for _ in range(200):
        k = np.log(1 + 6 * k) / 2  # the slow, obvious fixed point
    f5 = 2 + np.log(1 + 3 * k) / k
    assert compressed(7.0, 8, 4) == 3 and compressed(6.0, 8, 4) == 2
    assert compressed(3.0, 8, 4) == pytest.approx(4 - f5, abs=1e-9)
    assert compressed(0.0, 8, 4) == pytest.approx(0, abs=1e-9)


def test_floats_numpy_and_torch_agree():
    p = timeline(10 ** 8, 512)
    mapped = map_positions(p, 10 ** 8, 512)
    np.testing.assert_allclose(map_positions(torch.from_numpy(p), 10 ** 8, 512).numpy(), mapped, atol=ROUNDING)
    np.testing.assert_allclose([map_positions(float(x), 10 ** 8, 512) for x in p[::100]], mapped[::100], atol=ROUNDING)
    np.testing.assert_allclose(clamped(torch.from_numpy(p), 10 ** 8, 512).numpy(), clamped(p, 10 ** 8, 512), atol=0)


def test_absolute_leaves_the_range_and_clamped_piles_up():
    p = np.array([0.0, 10, 90, 95, 100])
    np.testing.assert_array_equal(absolute(p, 100, 16), p)
    np.testing.assert_array_equal(clamped(p, 100, 16), [0, 0, 6, 11, 16])


def test_float32_is_refused():
    """In float32, 2**24 + 1 == 2**24: neighbours far out would silently share a position."""
    for p in (np.zeros(3, np.float32), torch.zeros(3), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="float64"):
            map_positions(p, 10 ** 8, 2048)
    with pytest.raises(ValueError, match="trained >= 2"):
        map_positions(0.0, 10, 1)
