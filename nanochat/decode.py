"""
One decoding step of fixed shape, so that a GPU can replay it.

A small model decodes one token in a few hundred kernels of microseconds each; launching them from Python takes far longer
than running them. A CUDA graph records the launches once and replays them as one. It replays the same kernels on the same
memory, so nothing in the step may depend on how long the text is: the new keys go to a place that is read from a tensor,
and attention always covers the whole cache, with a mask for what is really there.

Without CUDA the same step runs unrecorded: for tests, it brings no speed there.

B = batch, C = capacity of the cache, V = vocabulary
"""

import torch


class StaticDecode:
    def __init__(self, gpt, cache, pad=None):
        """
        cache  a KVCache; whatever else writes to it between two steps is seen (it is the same memory)
        pad    (B,) first columns of each row that nobody may see; None = none
        """
        B, device = cache.k.size(1), gpt.device
        self.gpt, self.cache = gpt, cache
        self.pad = torch.zeros(B, dtype=torch.long, device=device) if pad is None else pad
        self.ids = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.before = torch.zeros(B, cache.previous, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device) # where the new entry goes
        self.place = torch.arange(cache.capacity, device=device)
        self.graph = self.logits = None

    @torch.no_grad()
    def step(self, ids):
        """ids (B, 1), after at least one token in the cache -> logits (B, V)."""
        assert self.cache.length > 0, "a decoding step continues something: the cache is empty"
        self.before.copy_(self.cache.remember(ids))
        self.ids.copy_(ids)
        self.at.fill_(self.cache.length)
        if self.gpt.device.type != "cuda":
            self.logits = self._forward()
        elif self.graph is None:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        self.cache.length += 1
        return self.logits.clone() # the next step writes over them

    def _record(self):
        """
        Run the step on a side stream first, as CUDA asks, then record it. Both write where the replay will write again. What autocast keeps of
        converted weights ends with its block, so a recording makes its own; and what other threads ask of CUDA meanwhile is no part of it.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        autocast = torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"), autocast:
            self.logits = self._forward()

    def _forward(self):
        see = (self.place <= self.at) & (self.place >= self.pad[:, None]) # (B, C)
        positions = (self.at - self.pad)[:, None]
        hidden = self.gpt.trunk(self.gpt.embed(self.ids, self.before), positions, see[:, None, None], self)
        return self.gpt.head(hidden[:, -1])

    # What the trunk asks of a cache

    @property
    def length(self):
        """Entries before the new one, as a tensor that a replay reads again."""
        return self.at

    def append(self, layer, k, v):
        """Write k and v (B, H, 1, d) at the place in `at`; return all of the cache, filled or not. Under autocast they come in another format."""
        self.cache.k[layer].index_copy_(2, self.at, k.to(self.cache.k.dtype))
        self.cache.v[layer].index_copy_(2, self.at, v.to(self.cache.v.dtype))
        return self.cache.k[layer], self.cache.v[layer]

    def advance(self, n):
        """The length is counted outside: a recorded step cannot count."""
