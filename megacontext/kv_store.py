"""
Keys and values of spans that are out of view, so that opening them again costs no forward.

A cache in two tiers, both bounded and least recently used first out: the newest stay on the device, what falls out of it goes to RAM, what
falls out of that is forgotten. Nothing here is the truth: what is missing is computed again from the tree. On a CPU the second tier would
be the same memory as the first: there is only the first.

L = layers, H = kv heads, n = entries of a span (32 tokens, or one gist), d = head width
"""
from collections import OrderedDict

import torch


class KVStore:
    def __init__(self, device, device_entries, ram_entries):
        """Sizes are in entries: a block of tokens takes 32, a gist 1."""
        self.device, self.sizes = torch.device(device), (device_entries, ram_entries)
        self.clear()

    def clear(self):
        """Nothing is kept."""
        self.near = Tier(self.sizes[0])
        self.far = Tier(0 if self.device.type == "cpu" else self.sizes[1])

    def __contains__(self, key):
        return key in self.near.held or key in self.far.held

    @property
    def entries(self):
        """(on the device, in RAM)."""
        return self.near.entries, self.far.entries

    def put(self, key, k, v):
        """k and v (L, H, n, d) of the span `key`, which was not here."""
        assert key not in self, f"{key} is in the store already: take it before it is put again"
        for old, pair in self.near.add(key, (k, v)):
            if self.far.size:
                self.far.add(old, tuple(t.cpu() for t in pair))

    def take(self, key):
        """The k and v of a span, on the device; it leaves the store."""
        tier = self.near if key in self.near.held else self.far
        return tuple(t.to(self.device) for t in tier.take(key))

    def drop(self, key):
        """Forget a span, if it is here: it will be read anew."""
        if key in self:
            self.take(key)


class Tier:
    """Pairs of k and v, at most `size` entries of them."""

    def __init__(self, size):
        self.size, self.entries, self.held = size, 0, OrderedDict()

    def add(self, key, pair):
        """Returns the (key, pair) that had to go, oldest first."""
        self.held[key] = pair
        self.entries += pair[0].size(2)
        out = []
        while self.entries > self.size:
            old = next(iter(self.held))
            out.append((old, self.take(old)))
        return out

    def take(self, key):
        pair = self.held.pop(key)
        self.entries -= pair[0].size(2)
        return pair
