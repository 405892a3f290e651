"""
A row read once, and then asked: what would these tokens cost in front of other entries?

All keys and values of the row exist once, so an answer costs only the tokens that are read again: H of them for each line of entries that
they may see, however long the row. What labels.py does for blocks here and there in a row, while training; here a stretch may be as long as
wanted, and only entries that somebody looks at are touched.

B = rows, T = tokens, N = entries of the row (tokens, gists, level-2 gists), V = lines, H = tokens read again, L = layers
"""
import torch

from megacontext.layout import entry_positions, stretches
from megacontext.span import BLOCK
from nanochat.attention import norm, rope_angles, rotate
from nanochat.gpt import QK_GAIN, Entries
from nanochat.kv_cache import KVCache

AT_ONCE = 8 # lines of a forward: what one of them sees is in front of all, masked, so many lines would look past much


class Reading:
    @torch.no_grad()
    def __init__(self, gpt, entries, targets, table):
        """entries of losses.row_entries in blocks of 32, targets (B, T), table (B, Q, Q): read now."""
        B, T = targets.shape
        self.gpt, self.entries, self.targets = gpt, entries, targets
        self.positions = entry_positions(T, BLOCK, device=targets.device)
        self.cache = KVCache(gpt.config, B, entries.x.size(1), gpt.device, gpt.dtype)
        gpt.trunk(entries, self.positions, stretches(table, BLOCK), self.cache)

    @torch.no_grad()
    def again(self, start, H, seen):
        """Nats (B, V, H) of the H tokens from `start` on, once for each line of seen (V, N): the entries they see besides each other, causally."""
        parts = []
        for lines in seen.split(AT_ONCE):
            hidden, _, _ = self._read(start, H, lines)
            wanted = self.targets[:, start:start + H].repeat_interleave(len(lines), dim=0)
            parts.append(self.gpt.loss(hidden, wanted, "none").unflatten(0, (-1, len(lines))))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def attention(self, start, H, seen):
        """The share of their attention that the same tokens give to each entry, (B, N): mean over layers, heads and tokens. seen (N,)."""
        asked, config = [], self.gpt.config
        hooks = [block.attn.q.register_forward_hook(lambda module, inputs, output: asked.append(output)) for block in self.gpt.blocks]
        try:
            _, cache, index = self._read(start, H, seen[None])
        finally:
            for hook in hooks:
                hook.remove()
        rope, S = rope_angles(self.positions[:, start:start + H], config.head_width), len(index)
        hidden = torch.ones(H, H, dtype=torch.bool, device=index.device).triu(1)
        share = torch.zeros(len(self.targets), self.entries.x.size(1), device=index.device)
        for layer, q in enumerate(asked):
            q = rotate(norm(q.unflatten(2, (config.heads, -1)).transpose(1, 2)) * QK_GAIN, *rope)
            k = cache.k[layer].repeat_interleave(config.heads // config.kv_heads, dim=1)
            scores = (q @ k.transpose(2, 3)).float() / config.head_width ** 0.5 # (B, heads, H, S + H)
            scores[..., S:].masked_fill_(hidden, float("-inf"))
            share[:, index] += scores.softmax(-1)[..., :S].mean(dim=(1, 2)) / config.layers
        return share

    def _read(self, start, H, seen):
        """Rows times lines at once -> hidden states (B * V, H, D), the cache, and which entries of the row stand in it first."""
        B, V, index = len(self.targets), len(seen), seen.any(dim=0).nonzero()[:, 0]
        S, device = len(index), self.targets.device
        cache = KVCache(self.gpt.config, B * V, S + H, device, self.gpt.dtype)
        for held, kept in ((cache.k, self.cache.k), (cache.v, self.cache.v)):
            held[:, :, :, :S] = kept[:, :, :, index].repeat_interleave(V, dim=1)
        cache.advance(S)
        own = torch.ones(H, H, dtype=torch.bool, device=device).tril()
        see = torch.cat([seen[:, None, index].expand(-1, H, -1), own.expand(V, -1, -1)], dim=2).repeat(B, 1, 1)[:, None]
        stretch = lambda t: t[:, start:start + H].repeat_interleave(V, dim=0)
        entries = Entries(stretch(self.entries.x), [stretch(value) for value in self.entries.values])
        return self.gpt.trunk(entries, self.positions[:, start:start + H], see, cache), cache, index
