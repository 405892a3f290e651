"""
The keys and values of what has been read, so that a new token costs one token.

Preallocated for `capacity` entries. Keys are stored as they are read, turned to their positions. Every row of the batch holds
the same number of entries.

L = layers, P = tokens before that an embedding knows, B = batch, H = kv heads, d = head width
"""
import torch
import torch.nn.functional as F


class KVCache:
    def __init__(self, config, batch, capacity, device="cpu", dtype=torch.float32):
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.ids = torch.zeros(batch, capacity, dtype=torch.long, device=device) # of the tokens read through GPT.extend
        self.previous = config.previous
        self.length = 0

    @property
    def capacity(self):
        return self.k.size(3)

    def append(self, layer, k, v):
        """Write the new entries of one layer, k and v (B, H, n, d), after the old ones; return all of them, (B, H, length+n, d)."""
        end = self.length + k.size(2)
        self._room(end)
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def remember(self, ids):
        """Note the ids (B, n) about to be appended, -1 for padding; returns those before the first, (B, P), -1 where there is none."""
        self._room(self.length + ids.size(1))
        self.ids[:, self.length:self.length + ids.size(1)] = ids
        known = self.ids[:, max(0, self.length - self.previous):self.length]
        return F.pad(known, (self.previous - known.size(1), 0), value=-1)

    def _room(self, end):
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} entries and {end} are needed: raise its capacity or read less")

    def advance(self, n):
        """All layers have appended n entries."""
        self.length += n

    def rewind(self, length):
        """Forget everything after the first `length` entries."""
        assert 0 <= length <= self.length, f"cannot rewind a cache of {self.length} entries to {length}"
        self.length = length
