"""The store of keys and values out of view: bounded, least recently used first out, device before RAM."""
import random

import pytest
import torch

from megacontext.kv_store import KVStore
from megacontext.span import Span


def pair(span, seed=0):
    generator = torch.Generator().manual_seed(hash((span.level, span.index, seed)) % 2 ** 31)
    return torch.randn(2, 1, span.cost, 4, generator=generator), torch.randn(2, 1, span.cost, 4, generator=generator)


def two_tiers(near, far):
    store = KVStore("cpu", near, far)
    store.far.size = far # a CPU has one tier; here it plays a device with RAM behind it
    return store


def test_the_oldest_goes_to_ram_and_then_is_forgotten():
    store, blocks = two_tiers(64, 32), [Span(0, i) for i in range(4)]
    for block in blocks:
        store.put(block, *pair(block))
    assert blocks[0] not in store and all(block in store for block in blocks[1:])
    assert store.entries == (64, 32) and list(store.far.held) == [blocks[1]]
    k, v = store.take(blocks[1])
    assert torch.equal(k, pair(blocks[1])[0]) and torch.equal(v, pair(blocks[1])[1])
    assert store.entries == (64, 0)


def test_a_cpu_has_one_tier():
    assert KVStore("cpu", 64, 1000).far.size == 0


@pytest.mark.parametrize("seed", range(20))
def test_it_is_two_lists_in_order_of_use(seed):
    """Against the obvious twin, two lists of spans: the same spans are held in the same order, and come back bit by bit."""
    rng, sizes = random.Random(seed), (70, 100)
    store, values, twin = two_tiers(*sizes), {}, ([], [])
    for step in range(300):
        span = Span(rng.randrange(2), rng.randrange(12))
        if span in store:
            assert all(map(torch.equal, store.take(span), values[span]))
            twin[0 if span in twin[0] else 1].remove(span)
        else:
            values[span] = pair(span, step)
            store.put(span, *values[span])
            twin[0].append(span)
            for tier, after in ((0, twin[1]), (1, [])):
                while sum(held.cost for held in twin[tier]) > sizes[tier]:
                    after.append(twin[tier].pop(0))
        assert (list(store.near.held), list(store.far.held)) == twin
        assert store.entries == tuple(sum(held.cost for held in tier) for tier in twin)
