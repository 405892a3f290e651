"""
Does the memory pay? Measured on rows of one long document each, through the layout that training uses, at equal visible budget: at
every block each method may read W entries, whatever their level, its own block included.

    window      the newest raw blocks: what the others are compared with
    window with sinks  one of them is the row's first (attention sinks: Xiao et al., 2023). Training shows no sinks, and of a small budget a block for them is
                much: it is worse than the window, and what was compared with it looked better
    bm25        the newest raw blocks and as many older ones that BM25 finds, asked as it does best here; no gists
    embedding   the same, found by the cosine of mean token embeddings
    random      MegaContext: a gist for every older block, and half of the raw blocks chosen at random
    pooled      recency, with the mean of a block's tokens in place of its gist: what no training gives
    recency     MegaContext without LensNet: the newest raw blocks, and a gist for every older one
    lensnet     MegaContext: half of the raw blocks are those that LensNet asks for
    lensnet alone  the newest raw blocks and as many older ones that LensNet asks for; no gists: what it is worth as a retriever, and what gists cost in raw blocks
    oracle      as lensnet, chosen by the measured gain of opening each block alone for the very tokens that are then read. A ceiling for
                choosing greedily, and no method: it looks at the targets
    swapped     recency with the gists of another document (a control: content must matter)
    no gists    recency without its gists (a control)
    full        every token raw, at no budget: the ceiling of reading

Gists here are of level 1 only. A session shows gists of level 2 too, so in rows of more than 1,024 tokens these methods spend more on gists than it does
(58 of 256 entries for 2,048 tokens): what a session reads is measured by bench/refocus.py.

B = rows, T = tokens, Q = blocks, W = budget, V = blocks opened in turn, D = model width
"""
from dataclasses import dataclass

import numpy as np
import torch

from megacontext.contexts import ASKING, SPARE, best, bm25_scores, chosen_table, cost, embedding_scores, recency_table, retrieved_table, window_table
from megacontext.layout import FAN, GIST, HIDDEN, RAW, entry_positions, shown, stretches
from megacontext.losses import lens_scores, pool_values, row_entries
from megacontext.reread import Reading
from megacontext.span import BLOCK
from nanochat.attention import norm
from nanochat.gpt import Entries

METHODS = ("window", "window with sinks", "bm25", "embedding", "random", "pooled", "recency", "lensnet", "lensnet alone", "oracle", "swapped", "no gists", "full")


@dataclass
class Networks:
    gpt: torch.nn.Module
    gistnet: torch.nn.Module
    lensnet: torch.nn.Module


class Rows:
    """Rows (B, T + 1), each of one document: embedded once, with their gists, and with the ways of ranking the blocks before each block."""

    @torch.no_grad()
    def __init__(self, networks, rows, W, rng):
        self.inputs, self.targets, self.W = rows[:, :-1], rows[:, 1:], W
        (self.B, self.T), self.device = self.inputs.shape, rows.device
        self.Q, self.gpt = self.T // BLOCK, networks.gpt
        docs = torch.zeros(self.B, self.Q, dtype=torch.long, device=self.device)
        self.entries = row_entries(networks.gpt, networks.gistnet, self.inputs, BLOCK)
        self.spared = recency_table(self.Q, W, spare=SPARE) # what is in view before the spared raw blocks are given away
        ask = torch.arange(self.Q, device=self.device).expand(self.B, -1)
        wanted = lens_scores(networks.lensnet, self.inputs, docs, self.batch(self.spared), ask, BLOCK)
        self.scores = {"lensnet": wanted[:, :, :self.Q].float().cpu().numpy(), "random": rng.random((self.B, self.Q, self.Q)),
                       "bm25": bm25_scores(self.inputs), "embedding": embedding_scores(self.entries.x[:, :self.T])}

    def batch(self, table):
        """A table (Q, Q), or one for each row (B, Q, Q), as a tensor (B, Q, Q)."""
        return torch.from_numpy(table).to(self.device).expand(self.B, -1, -1)

    def tables(self, make, scores):
        """One table for each row, make(Q, W, scores of the row)."""
        return np.stack([make(self.Q, self.W, s) for s in scores])

    @torch.no_grad()
    def nats(self, table, tail, entries=None, W=None):
        """Nats (B, tail) of the last tokens of the rows, read through a table within W entries (None = the rows' own budget)."""
        assert (cost(table) <= (W or self.W)).all(), f"a context costs {cost(table).max()} entries, the budget is {W or self.W}"
        hidden = self.gpt.trunk(entries or self.entries, entry_positions(self.T, BLOCK, device=self.device), stretches(self.batch(table), BLOCK))
        return self.gpt.loss(hidden[:, self.T - tail:self.T], self.targets[:, -tail:], "none")

    @torch.no_grad()
    def plain(self, tail):
        """The same with every token raw, at no budget."""
        hidden = self.gpt.trunk(self.gpt.embed(self.inputs), torch.arange(self.T, device=self.device)[None], "causal")
        return self.gpt.loss(hidden[:, -tail:], self.targets[:, -tail:], "none")


def swapped(entries, T):
    """
    The same rows with the gists (and their values) of the row before, the first with those of the second: where rows are of documents in turn, neighbours are
    never of one document, but the first and the last of a part may be.
    """
    assert len(entries.x) >= 2, "swapped gists come from another row"
    other = torch.arange(-1, len(entries.x) - 1, device=entries.x.device).abs() # 1, 0, 1, 2, ...
    swap = lambda t: torch.cat([t[:, :T], t[other, T:]], dim=1)
    return Entries(swap(entries.x), [swap(value) for value in entries.values])


def pooled(entries, T):
    """The same rows with gists that no network made: the mean of the children, at unit RMS; their values are means already."""
    gists = norm(pool_values(entries.x[:, :T], BLOCK))
    return Entries(torch.cat([entries.x[:, :T], gists, norm(pool_values(gists, FAN))], dim=1), entries.values)


# ----------------------------------------------------------------------------------------------------------------------
# Trailing loss

def trailing(rows, tail):
    """{method: nats (B, tail) of the last tokens}, for all of METHODS but the oracle. Rows >= 2: swapped needs another document."""
    Q, W, scores = rows.Q, rows.W, rows.scores
    views = {
        "window": (window_table(Q, W), None),
        "window with sinks": (window_table(Q, W, sinks=True), None),
        "bm25": (rows.tables(retrieved_table, scores["bm25"]), None),
        "embedding": (rows.tables(retrieved_table, scores["embedding"]), None),
        "random": (rows.tables(chosen_table, scores["random"]), None),
        "pooled": (recency_table(Q, W), pooled(rows.entries, rows.T)),
        "recency": (recency_table(Q, W), None),
        "lensnet": (rows.tables(chosen_table, scores["lensnet"]), None),
        "lensnet alone": (rows.tables(retrieved_table, scores["lensnet"]), None),
        "swapped": (recency_table(Q, W), swapped(rows.entries, rows.T)),
        "no gists": (recency_table(Q, W, older=HIDDEN), None),
    }
    return {name: rows.nats(table, tail, entries) for name, (table, entries) in views.items()} | {"full": rows.plain(tail)}


@dataclass
class Opened:
    """Block q read with each of its `blocks`, gists otherwise, opened in turn. The context has room for them: spared blocks are not given away yet."""
    q: int
    blocks: np.ndarray   # (V,)
    gain: np.ndarray     # (B, V, BLOCK) nats a token that opening the block alone saves
    attention: np.ndarray  # (B, V) share of the attention of the tokens just before q that goes to the gist


def opened(rows, tail):
    """What opening each gist is worth to each of the last tail // BLOCK blocks of the rows: a list of Opened."""
    first = rows.Q - tail // BLOCK
    table = rows.tables(chosen_table, rows.scores["lensnet"])
    table[:, first:] = rows.spared[first:]
    reading = Reading(rows.gpt, rows.entries, rows.targets, rows.batch(table))
    return [open_each(reading, rows.spared[q], q) for q in range(first, rows.Q)]


def open_each(reading, line, q):
    """Opened of one block q that reads through line (Q,)."""
    device, blocks = reading.targets.device, np.flatnonzero(line == GIST)
    lines = np.repeat(line[None], len(blocks) + 1, 0) # the first: none is opened
    lines[np.arange(len(blocks)) + 1, blocks] = RAW
    nats = reading.again(q * BLOCK, BLOCK, shown(torch.from_numpy(lines).to(device), BLOCK))
    asking = line.copy()
    asking[q - ASKING:] = HIDDEN # the tokens just before q see each other, and the same context
    T = reading.targets.size(1)
    look = reading.attention((q - ASKING) * BLOCK, ASKING * BLOCK, shown(torch.from_numpy(asking).to(device), BLOCK))
    return Opened(q, blocks, (nats[:, :1] - nats[:, 1:]).float().cpu().numpy(), look[:, T + torch.from_numpy(blocks).to(device)].cpu().numpy())


def oracle(rows, found, tail):
    """Nats (B, tail): the spared raw blocks of the last blocks go to the largest measured gains; before them as with LensNet."""
    scores = rows.scores["lensnet"].copy()
    for one in found:
        scores[:, one.q, one.blocks] = one.gain.sum(-1)
    return rows.nats(rows.tables(chosen_table, scores), tail)


def by_budget(rows, budgets, tail):
    """
    Loss against visible budget: {budget: {"window" and "recency": nats per token over the last `tail`, one number a row}}, and under T
    {"full": ...}, every token raw. A budget that cannot hold a gist of every block has no "recency".
    """
    found = {rows.T: {"full": rows.plain(tail).mean(dim=1).tolist()}}
    for W in budgets:
        tables = {"window": window_table(rows.Q, W)} | ({"recency": recency_table(rows.Q, W)} if W - BLOCK >= rows.Q - 1 else {})
        found[W] = {name: rows.nats(table, tail, W=W).mean(dim=1).tolist() for name, table in tables.items()}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Does LensNet know what is worth opening?

WAYS = ("lensnet", "recency", "random", "attention", "bm25", "embedding", "oracle")


def lens_quality(rows, found, count=2):
    """
    Every way of ranking gists against the measured gains of opening them: {way: dict of lists, one number a reading}
        gain         nats over the next block by its `count` best, each opened alone
        correlation  of its scores with the gains
        signs        of each edit whose utility is above noise: was the sign of its score right
    and "positive": of the same edits, is the utility above 0; "points": (LensNet's score, utility) of all edits.
    Utility is a gain less the mean of the reading's gains, and a score counts less the mean of the reading's scores: LensNet is trained to say differences. It is above
    noise when it is larger than twice its standard error, from the spread of the gain over the tokens of the block.
    """
    told = {way: dict(gain=[], correlation=[], signs=[]) for way in WAYS} | {"positive": [], "points": []}
    for one in found:
        for i in range(rows.B):
            gain, noise = one.gain[i].sum(-1), one.gain[i].std(-1, ddof=1) * BLOCK ** 0.5
            if len(gain) <= count:
                continue
            scores = {way: rows.scores[way][i, one.q, one.blocks] for way in ("lensnet", "random", "bm25", "embedding")}
            scores |= {"recency": one.blocks.astype(float), "attention": one.attention[i], "oracle": gain}
            utility = gain - gain.mean()
            sure, above = np.abs(utility) > 2 * noise, {way: score > score.mean() for way, score in scores.items()}
            for way in WAYS:
                told[way]["signs"] += (above[way] == (utility > 0))[sure].tolist()
                told[way]["gain"].append(float(gain[best(np.arange(len(gain)), scores[way], count)].sum()))
                if scores[way].std() > 0 and gain.std() > 0:
                    told[way]["correlation"].append(float(np.corrcoef(scores[way], gain)[0, 1]))
            told["positive"] += (utility > 0)[sure].tolist()
            told["points"] += list(zip((scores["lensnet"] - scores["lensnet"].mean()).tolist(), utility.tolist()))
    return told
