"""
Several sessions, of any lengths, that read their next tokens in one forward.

Each session keeps its own tree, working context and ticks; only the cache is shared, a row for each. A row holds as many entries as its
session shows, so the forward covers the longest row, with a mask for what is really there.

B = sessions, C = entries of the longest row, V = vocabulary
"""
import time
from math import inf

import torch
from torch.nn.utils.rnn import pad_sequence

from nanochat.kv_cache import KVCache


class Batch:
    def __init__(self, sessions):
        """Sessions of one GPT. They can be fed alone as before: they live in the rows of this batch from now on."""
        assert sessions and len({id(session.gpt) for session in sessions}) == 1, "a batch is made of sessions of one GPT"
        self.sessions, self.gpt = list(sessions), sessions[0].gpt
        self.cache = KVCache(self.gpt.config, len(sessions), max(session.budget for session in sessions), self.gpt.device, self.gpt.dtype)
        for row, session in enumerate(self.sessions):
            session.shown.move(self.cache, row)

    @torch.no_grad()
    def feed(self, tokens):
        """
        tokens: one id for each session -> logits (B, V) of the tokens that follow. A session whose token is None waits: its logits mean nothing.
        If it fails, the length of each session tells whether its token was read; all of them can go on.
        """
        start, device = time.perf_counter(), self.gpt.device
        assert len(tokens) == len(self.sessions), f"one token, or None, for each of {len(self.sessions)} sessions, got {len(tokens)}"
        going = [row for row, token in enumerate(tokens) if token is not None]
        for row in going:
            self.sessions[row].ready()
            with self.sessions[row].changing():
                self.sessions[row].read_waiting()
        places = [session.length for session in self.sessions]
        ids = torch.tensor([[token or 0] for token in tokens], device=device)
        entries = self.gpt.embed(ids, torch.tensor([session.before() for session in self.sessions], device=device))
        positions = torch.cat([session.shown.mapped_token(place) for session, place in zip(self.sessions, places)])
        rows = Rows(self.cache, torch.tensor([session.shown.cache.length for session in self.sessions], device=device))
        logits = self.gpt.head(self.gpt.trunk(entries, positions, self._weighed(rows), rows)[:, -1])
        share = (time.perf_counter() - start) / len(tokens)
        for row in going:
            session = self.sessions[row]
            with session.changing():
                session.tree.append_tokens([tokens[row]])
                session.shown.note(session.shown.cache.length, [places[row]])
                session.shown.cache.advance(1)
                session._count("read", time.perf_counter() - share, read_tokens=1)
                session.grown([tokens[row]])
        return logits

    def _weighed(self, rows):
        """What each row sees, with the weights of its entries where one has more gists than usual."""
        shown = [session.shown for session in self.sessions]
        if not any(one.crowded for one in shown):
            return rows.see
        weights = pad_sequence([one.weights[:rows.end] for one in shown], batch_first=True) # (B, C)
        return weights[:, None, None].where(rows.see, -inf)


class Rows:
    """What the trunk asks of a cache, with a length of its own for every row."""

    def __init__(self, cache, lengths):
        self.cache, self.lengths = cache, lengths
        self.end = int(lengths.max()) + 1
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.see = (torch.arange(self.end, device=lengths.device) <= lengths[:, None])[:, None, None] # (B, 1, 1, C)

    def append(self, layer, k, v):
        """Write k and v (B, H, 1, d), each row's at its own end; return the rows as far as the longest goes."""
        self.cache.k[layer, self.rows, :, self.lengths] = k[:, :, 0]
        self.cache.v[layer, self.rows, :, self.lengths] = v[:, :, 0]
        return self.cache.k[layer, :, :, :self.end], self.cache.v[layer, :, :, :self.end]

    def advance(self, n):
        """The sessions count for themselves."""
