"""
Does the memory pay? Measured on rows of one long document each, through the layout that training uses.

Equal visible budget: at every block the model may read W entries, whatever their level, its own block included. Methods differ in
what they spend it on:
    window    the newest raw blocks, nothing else
    recency   the newest raw blocks, and a gist for every older block
    lensnet   as recency, but half of the raw blocks are those that LensNet asks for
    random    as lensnet, with blocks drawn at random
    swapped   recency with the gists of another document (a control: content must matter)
    no gists  recency without its gists
    full      every token raw: the ceiling, at no budget
The loss is taken over the last quarter of a row, in nats per token.

B = rows, T = tokens, K = block, Q = blocks, W = budget, P = readings a row, E = entries
"""
import math
from collections import Counter

import numpy as np
import torch

from megacontext.labels import measure
from megacontext.layout import FAN, GIST, HIDDEN, NODE, RAW, Copies, entry_positions, visibility
from megacontext.losses import lens_scores, row_entries, with_copies
from megacontext.span import BLOCK
from nanochat.gpt import Entries


# ----------------------------------------------------------------------------------------------------------------------
# Working contexts of a fixed budget

def raw_blocks(q, W, gists):
    """How many earlier blocks block q can read raw within W entries, when all the others are gists (or nothing)."""
    room = W - BLOCK
    n = min(q, room // BLOCK)
    while gists and n and n * BLOCK + (q - n) > room:
        n -= 1
    if gists and q - n > room - n * BLOCK:
        raise ValueError(f"a budget of {W} cannot hold gists of {q} blocks: raise it, or shorten the rows")
    return n


def window_table(Q, W):
    table = np.zeros((Q, Q), dtype=np.int64)
    for q in range(Q):
        table[q, q - raw_blocks(q, W, gists=False):q] = RAW
    return table


def recency_table(Q, W, older=GIST, spare=0):
    """spare: the share of the raw blocks that is left for others to choose."""
    table = np.zeros((Q, Q), dtype=np.int64)
    for q in range(Q):
        n = raw_blocks(q, W, gists=True)
        n -= int(n * spare)
        table[q, :q - n], table[q, q - n:q] = older, RAW
    return table


def chosen_table(Q, W, scores, spare=0.5):
    """recency_table with its spared raw blocks given to the best `scores` (Q, Q): line q ranks the blocks before q."""
    table = recency_table(Q, W, spare=spare)
    for q in range(Q):
        free = np.flatnonzero(table[q] == GIST)
        count = min(raw_blocks(q, W, gists=True) - int((table[q] == RAW).sum()), len(free))
        if count:
            table[q, free[np.argsort(-scores[q, free], kind="stable")[:count]]] = RAW
    return table


# ----------------------------------------------------------------------------------------------------------------------
# Trailing loss

@torch.no_grad()
def row_nats(gpt, entries, targets, table):
    """Nats (B, T) of a row read through table (B, Q, Q)."""
    T = targets.size(1)
    hidden = gpt.trunk(entries, entry_positions(T, BLOCK, device=targets.device), visibility(table, BLOCK))
    return gpt.loss(hidden[:, :T], targets, "none")


def swapped(entries, T):
    """The same rows with the gists (and their values) of the next row."""
    swap = lambda t: torch.cat([t[:, :T], t[:, T:].roll(1, 0)], dim=1)
    return Entries(swap(entries.x), [swap(value) for value in entries.values])


@torch.no_grad()
def trailing(gpt, gistnet, lensnet, rows, W, rng):
    """rows (B, T + 1), each from one document, B >= 2 -> {method: nats per token over the last quarter}."""
    inputs, targets = rows[:, :-1], rows[:, 1:]
    (B, T), device = inputs.shape, inputs.device
    Q, last = T // BLOCK, slice(T * 3 // 4, T)
    docs = torch.zeros(B, Q, dtype=torch.long, device=device)
    entries = row_entries(gpt, gistnet, inputs, docs, BLOCK)
    same = lambda table: torch.from_numpy(table).to(device)[None].expand(B, -1, -1)
    spared = same(recency_table(Q, W, spare=0.5))
    wanted = lens_scores(lensnet, inputs, docs, spared, torch.arange(Q, device=device).expand(B, -1), BLOCK)[:, :, :Q].float().cpu().numpy()
    chosen = lambda scores: torch.from_numpy(np.stack([chosen_table(Q, W, s) for s in scores])).to(device)
    views = {
        "window": (entries, same(window_table(Q, W))),
        "recency": (entries, same(recency_table(Q, W))),
        "lensnet": (entries, chosen(wanted)),
        "random": (entries, chosen(rng.random((B, Q, Q)))),
        "swapped": (swapped(entries, T), same(recency_table(Q, W))),
        "no gists": (entries, same(recency_table(Q, W, older=HIDDEN))),
    }
    nats = {name: row_nats(gpt, e, targets, table)[:, last].mean().item() for name, (e, table) in views.items()}
    nats["full"] = gpt(inputs, targets, "none")[:, last].mean().item()
    return nats


@torch.no_grad()
def by_budget(gpt, gistnet, rows, budgets):
    """
    Loss against visible budget: rows (B, T + 1) -> {budget: {"window" and "recency": nats per token over the last quarter}}, and under T
    {"full": ...}, every token raw. A budget that cannot hold a gist of every block has no "recency".
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    (B, T), device = inputs.shape, inputs.device
    Q, last = T // BLOCK, slice(T * 3 // 4, T)
    entries = row_entries(gpt, gistnet, inputs, torch.zeros(B, Q, dtype=torch.long, device=device), BLOCK)
    found = {T: {"full": gpt(inputs, targets, "none")[:, last].mean().item()}}
    for W in budgets:
        tables = {"window": window_table(Q, W)} | ({"recency": recency_table(Q, W)} if W - BLOCK >= Q - 1 else {})
        found[W] = {name: row_nats(gpt, entries, targets, torch.from_numpy(table).to(device)[None].expand(B, -1, -1))[:, last].mean().item() for name, table in tables.items()}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a gist costs, and whether LensNet knows

@torch.no_grad()
def gist_price(gpt, gistnet, rows, rng, readings=4, edits=4):
    """
    dNLL@32 by level: what the next block loses, in nats per token, when one raw block is read as its gist (level 1), or
    the first 32 gists of the row as theirs (level 2), everything else raw. -> {level: list of prices}; level 2 only in rows of 34 blocks or more.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    (B, T), device = inputs.shape, inputs.device
    Q = T // BLOCK
    docs = torch.zeros(B, Q, dtype=torch.long, device=device)
    entries = row_entries(gpt, gistnet, inputs, docs, BLOCK)
    everything_raw = np.tril(np.full((Q, Q), RAW), -1)
    batch = torch.from_numpy(everything_raw).to(device)[None].expand(B, -1, -1)
    rngs = [np.random.default_rng(rng.integers(1 << 31)) for _ in range(B)]
    labels = measure(gpt, lambda copies: with_copies(entries, copies, BLOCK), targets, batch, BLOCK, rngs, readings, edits)
    prices = {1: (labels.value[labels.valid] / BLOCK).tolist()}
    if Q > FAN + 1:
        nats = []
        for view in (GIST, NODE):
            table = everything_raw.copy()
            table[FAN + 1:, :FAN] = view
            nats.append(row_nats(gpt, entries, targets, torch.from_numpy(table).to(device)[None].expand(B, -1, -1))[:, (FAN + 1) * BLOCK:])
        prices[2] = (nats[1] - nats[0]).view(B, -1, BLOCK).mean(-1).flatten().tolist()
    return prices


@torch.no_grad()
def lens_quality(gpt, gistnet, lensnet, rows, W, rng, readings=4, opened=2):
    """
    Every gist of some readings is opened in turn, and its gain for the next block measured. -> for each way to choose, a list with one
    entry a reading: (gain of its `opened` best, gain of the oracle's), and for LensNet (correlation, share of right signs) lists.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:]
    (B, T), device = inputs.shape, inputs.device
    Q = T // BLOCK
    docs = torch.zeros(B, Q, dtype=torch.long, device=device)
    entries = row_entries(gpt, gistnet, inputs, docs, BLOCK)
    table = recency_table(Q, W, spare=0.5)
    batch = torch.from_numpy(table).to(device)[None].expand(B, -1, -1)
    plain = row_nats(gpt, entries, targets, batch).view(B, Q, BLOCK).sum(-1)
    gains, correlation, signs = {}, [], []
    for q in rng.choice(np.arange(Q // 2, Q), size=min(readings, Q // 2), replace=False).tolist():
        free = np.flatnonzero(table[q] == GIST)
        if len(free) <= opened:
            continue
        lines = np.repeat(table[q][None], len(free), 0)
        lines[np.arange(len(free)), free] = RAW
        copies = Copies(torch.full((B, len(free)), q, device=device), torch.from_numpy(lines).to(device)[None].expand(B, -1, -1))
        hidden = gpt.trunk(with_copies(entries, copies, BLOCK), entry_positions(T, BLOCK, copies, device), visibility(batch, BLOCK, copies))
        wanted = targets.view(B, Q, BLOCK)[:, q].repeat(1, len(free))
        edited = gpt.loss(hidden[:, T + Q + Q // FAN:], wanted, "none").view(B, len(free), BLOCK).sum(-1)
        gain = (plain[:, q:q + 1] - edited).float().cpu().numpy() # (B, free), > 0: opening it helps
        scores = lens_scores(lensnet, inputs, docs, batch, torch.full((B, 1), q, device=device), BLOCK)[:, 0, free].float().cpu().numpy()
        asked = entries.x[:, T + q - 2:T + q].mean(1)
        likeness = torch.cosine_similarity(entries.x[:, T + torch.as_tensor(free, device=device)], asked[:, None], dim=-1).float().cpu().numpy()
        for i in range(B):
            ways = {"lensnet": scores[i], "recency": free.astype(float), "random": rng.random(len(free)), "embedding": likeness[i],
                    "bm25": bm25(inputs[i].tolist(), free, q), "oracle": gain[i]}
            for name, score in ways.items():
                best = np.argsort(-score, kind="stable")[:opened]
                gains.setdefault(name, []).append(float(gain[i, best].sum()))
            if scores[i].std() > 0 and gain[i].std() > 0:
                correlation.append(float(np.corrcoef(scores[i], gain[i])[0, 1]))
            big = np.abs(gain[i] - gain[i].mean()) > gain[i].std()
            signs += ((scores[i] > 0) == (gain[i] > gain[i].mean()))[big].tolist()
    return gains, correlation, signs


def bm25(ids, blocks, q, k1=1.5, b=0.75):
    """Okapi BM25 of the last two blocks before q as a query, over tokens, against each of `blocks` (all of one length, so b does nothing)."""
    bags = [Counter(ids[block * BLOCK:(block + 1) * BLOCK]) for block in blocks]
    seen = Counter(token for bag in bags for token in bag)
    query = set(ids[max(0, q - 2) * BLOCK:q * BLOCK])
    rarity = {token: math.log(1 + (len(bags) - seen[token] + 0.5) / (seen[token] + 0.5)) for token in query}
    return np.array([sum(rarity[t] * bag[t] * (k1 + 1) / (bag[t] + k1) for t in query) for bag in bags])
