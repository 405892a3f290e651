"""
The co-training objective: GPT, GistNet and LensNet in one step.

Some rows are read plainly, exactly as without MegaContext. The others are read once with their gists in the row and a random
working context for every block (layout.py); every raw token has a next-token loss, so every position teaches the gists to be
read and GistNet to write them. On a few rows the price of edits is measured (labels.py) and LensNet learns to predict it.

Which row is read how, and every random draw, follow from the row's number alone, so the loss does not depend on how rows are
dealt to processes. The loss is a sum over targets divided by the entries of the batch, which adds up over micro-batches and ranks.

B = rows, T = tokens, K = block, Q = T / K
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from megacontext.labels import InFront, RowRead, first_targets, measure
from megacontext.layout import FAN, GIST, NODE, RAW, TAIL, draw_table, entry_positions, stretches
from megacontext.matches import row_hits
from nanochat.common import UserError
from nanochat.gpt import IGNORE, Entries


@dataclass(frozen=True)
class CoTrainingOptions:
    seed: int = 0
    plain_every: int = 4      # one round of rows in so many is read plainly (0 = none)
    labels_every: int = 2     # one round in so many has edits measured, once gists are of 32 tokens, as a session's are; at least 2
    lanes: int = 8            # rows a round
    tail: tuple = TAIL        # raw tail in tokens
    asked: float = 0.5        # share of the rows with gists of 32 tokens in which LensNet opens blocks, as in a session, besides those opened by chance
    opens: int = 2            # how many, for every block that reads
    reading_tokens: int = 512 # tokens of a labelled row a reading, of which it has at least one: labels cost the same share of a step at any length
    edits: int = 6            # V, edits a reading
    reconstruct_every: int = 0 # one block in so many of a row with gists is also read behind its gist and nothing else (0 = none)
    curriculum: tuple = ((8, 0.3), (16, 0.55), (FAN, 1.0)) # (children a gist, up to this share of the steps)

    def readings(self, T):
        """P, the readings of a labelled row of T tokens."""
        return max(1, T // self.reading_tokens)

    def plain(self, rounds):
        """Which of these rounds, an array of their numbers, are read plainly."""
        return rounds % self.plain_every == 0 if self.plain_every else np.zeros(len(rounds), dtype=bool)

    def labelled(self, rounds):
        """Which of them have edits measured: one in labels_every or, where that one is plain, the next, which is neither plain nor due itself."""
        due = lambda numbers: numbers % self.labels_every == 1
        return (due(rounds) | due(rounds - 1) & self.plain(rounds - 1)) & ~self.plain(rounds)


def parse_curriculum(text):
    """ "8:0.3,16:0.55,32:1" -> ((8, 0.3), (16, 0.55), (32, 1.0)): small blocks first, because large ones do not bootstrap."""
    try:
        stages = tuple((int(block), float(share)) for block, share in (stage.split(":") for stage in text.split(",")))
    except ValueError:
        raise UserError(f"a curriculum is block:share pairs such as 8:0.3,16:0.55,32:1, got {text!r}") from None
    shares = [0.0, *(share for _, share in stages)]
    if any(block < 1 or FAN % block for block, _ in stages) or stages[-1] != (FAN, 1.0) or any(share <= before for before, share in zip(shares, shares[1:])):
        raise UserError(f"the blocks of a curriculum divide {FAN}, its shares grow, and it ends with {FAN}:1; got {text!r}")
    return stages


def pool_values(values, fan):
    """Attention is linear in its values, so a parent's value embedding is the mean of its children's: (B, n*fan, w) -> (B, n, w)."""
    B, N, w = values.shape
    return values[:, :N // fan * fan].view(B, N // fan, fan, w).mean(dim=2)


def row_entries(gpt, gistnet, ids, K):
    """ids (B, T) -> Entries of T tokens, Q level-1 gists and Q // 32 level-2 gists, in this order."""
    tokens = gpt.embed(ids)
    B, T, D = tokens.x.shape
    gists = gistnet(tokens.x.reshape(-1, K, D), 1).view(B, T // K, D)
    G = gists.size(1) // FAN
    nodes = gistnet(gists[:, :G * FAN].reshape(B * G, FAN, D), 2).view(B, G, D) if G else gists[:, :0]
    values = []
    for value in tokens.values:
        pooled = pool_values(value, K)
        values.append(torch.cat([value, pooled, pool_values(pooled, FAN)], dim=1))
    return Entries(torch.cat([tokens.x, gists, nodes], dim=1), values)


class CoTraining(nn.Module):
    """objective(batch) -> (loss, sums), as nanochat.train.fit wants it."""
    SUMS = ("plain_nats", "plain_tokens", "gist_nats", "gist_tokens", "told_nats", "told_tokens", "lens_squares", "label_squares", "lens_products", "score_squares", "labels")

    def __init__(self, gpt, gistnet, lensnet, options, see=stretches):
        """see: how a row's table becomes what the trunk takes, layout.stretches or, on CUDA, layout.block_mask."""
        super().__init__()
        self.gpt, self.gistnet, self.lensnet, self.options, self.see = gpt, gistnet, lensnet, options, see
        self.block = FAN # children a level-1 gist; the curriculum grows it

    def start_step(self, step, total):
        self.block = next(block for block, share in self.options.curriculum if step < share * total)

    def report(self, sums):
        """What the log shows; loss_told is that of blocks behind their gists, in nats a token. LensNet's loss is the share of the labels' variance that it leaves unexplained: 1 = knows nothing."""
        shown = dict(loss=(sums["plain_nats"] + sums["gist_nats"]) / max(1, sums["plain_tokens"] + sums["gist_tokens"]))
        shown |= {f"loss_{name}": sums[f"{name}_nats"] / sums[f"{name}_tokens"] for name in ("plain", "gist", "told") if sums[f"{name}_tokens"]}
        if sums["label_squares"]:
            shown["lens_loss"] = sums["lens_squares"] / sums["label_squares"]
        if sums["label_squares"] and sums["score_squares"]:
            shown["lens_corr"] = sums["lens_products"] / (sums["label_squares"] * sums["score_squares"]) ** 0.5
        return shown

    def forward(self, batch):
        """
        batch: inputs and targets (B, T), docs (B, T // 32), rows (B,) global row numbers, all on the GPT's device.
        The sums are by the names of SUMS; what this batch did not measure is left out.
        """
        o, K = self.options, self.block
        rounds = batch.rows.cpu().numpy() // o.lanes
        plain, labelled = torch.from_numpy(o.plain(rounds)), torch.from_numpy(o.labelled(rounds) & (K == FAN))
        nats, metrics = 0.0, {}
        for name, chosen, reader in (("plain", plain, self._read_plain), ("gist", ~plain, self._read_gists)):
            if chosen.any():
                inputs, targets = batch.inputs[chosen], batch.targets[chosen]
                total, told, labels = reader(inputs, targets, batch.docs[chosen], batch.rows[chosen], labelled[chosen])
                count = (targets != IGNORE).sum()
                nats = nats + total
                metrics.update({f"{name}_nats": total.detach(), f"{name}_tokens": count})
                if told is not None:
                    nats = nats + told[0]
                    metrics.update(told_nats=told[0].detach(), told_tokens=told[1])
                if labels is not None:
                    # without a weight, which would change nothing but the gradient's norm in the log: this reaches no other network, and Adam's steps do not depend on the scale of a loss
                    nats = nats + labels["lens_squares"] * batch.inputs.size(1) / (o.readings(batch.inputs.size(1)) * o.edits)
                    metrics.update({key: value.detach() for key, value in labels.items()})
        return nats / batch.inputs.numel(), metrics

    def _reconstruct(self, entries, targets, K, rows):
        """
        Nats, summed, and how many there are, of tokens 2 to K of one block in `reconstruct_every`, drawn for each row, said anew right behind the span of its gist: they see the gist and
        each other, causally, and nothing else. So the gist has to hold its block's words (REFRAG: Lin et al., 2025, without it no curriculum helps a frozen reader).
        """
        (B, T), Q = targets.shape, targets.size(1) // K
        n, row = max(1, Q // self.options.reconstruct_every), torch.arange(B, device=targets.device)[:, None]
        rngs = [np.random.default_rng([self.options.seed, number, 1]) for number in rows.tolist()] # of its own: all else of a run is drawn as without it
        block = torch.from_numpy(np.stack([rng.choice(Q, n, replace=False) for rng in rngs])).to(targets.device) # (B, n)
        tokens = lambda t: t[:, :T].unflatten(1, (Q, K))[row, block].flatten(0, 1) # (B * n, K, ...)
        behind = lambda t: torch.cat([t[:, T:T + Q][row, block].flatten(0, 1)[:, None], tokens(t)], dim=1) # the gist, then the block
        positions = torch.cat([torch.tensor([(K - 1) / 2]), torch.arange(K, 2 * K)])[None].to(targets.device)
        hidden = self.gpt.trunk(Entries(behind(entries.x), [behind(value) for value in entries.values]), positions, "causal")
        wanted = tokens(targets).clone()
        wanted[:, -1] = IGNORE # the next block's first token
        return self.gpt.loss(hidden[:, 1:], wanted, "sum"), (wanted != IGNORE).sum()

    def _read_plain(self, inputs, targets, docs, rows, labelled):
        return self.gpt(inputs, targets, "sum"), None, None

    def _read_gists(self, inputs, targets, docs, rows, labelled):
        o, K, (B, T) = self.options, self.block, inputs.shape
        docs = docs.repeat_interleave(FAN // K, dim=1) # documents start at multiples of 32, so smaller blocks do too
        entries = row_entries(self.gpt, self.gistnet, inputs, K)
        rngs = [np.random.default_rng([o.seed, row]) for row in rows.tolist()]
        table = torch.from_numpy(np.stack([draw_table(d, K, rng, o.tail) for d, rng in zip(docs.cpu().numpy(), rngs)])).to(inputs.device)
        asked = torch.tensor([K == FAN and rng.random() < o.asked for rng in rngs])
        if asked.any():
            table[asked] = opened_by(self.lensnet, inputs[asked], docs[asked], table[asked], K, o.opens, first_targets(targets[asked], K))
        read = RowRead() if labelled.any() else None
        hidden = self.gpt.trunk(entries, entry_positions(T, K, device=inputs.device), self.see(table, K), read)
        nats = self.gpt.loss(hidden[:, :T], targets, "sum")
        told = self._reconstruct(entries, targets, K, rows) if o.reconstruct_every else None
        if read is None:
            return nats, told, None
        some = Entries(entries.x[labelled].detach(), [value[labelled].detach() for value in entries.values])
        rngs = [rng for rng, wanted in zip(rngs, labelled.tolist()) if wanted]
        labels = measure(self.gpt, some, InFront(read, labelled.nonzero()[:, 0].to(inputs.device)), hidden[labelled].detach(), targets[labelled], table[labelled], K, rngs, o.readings(T), o.edits)
        return nats, told, self._lens_loss(inputs[labelled], docs[labelled], table[labelled], labels, K)

    def _lens_loss(self, ids, docs, table, labels, K):
        """Squared error of LensNet's scores against the labels, both centred over a reading's edits: only differences can be paid for."""
        scores = lens_scores(self.lensnet, ids, docs, table, labels.block, K, labels.now, doubt=False).gather(2, labels.entry.clamp(min=0))
        valid = labels.valid & (labels.valid.sum(-1, keepdim=True) > 1)
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        centre = lambda t: (t - (t * valid).sum(-1, keepdim=True) / count) * valid
        wanted, got = centre(labels.value), centre(scores)
        return dict(lens_squares=(got - wanted).square().sum(), label_squares=wanted.square().sum(), lens_products=(got * wanted).sum(),
                    score_squares=got.square().sum(), labels=valid.sum())


@torch.no_grad()
def opened_by(lensnet, ids, docs, table, K, count, now):
    """table (B, Q, Q) with the `count` gists that LensNet scores highest shown raw, for every block that reads. now: as in row_hits, of every block."""
    B, Q, _ = table.shape
    block = torch.arange(Q, device=table.device).expand(B, -1)
    scores = lens_scores(lensnet, ids, docs, table, block, K, now)[:, :, :Q].masked_fill(table != GIST, float("-inf"))
    best, chosen = scores.topk(min(count, Q), dim=-1)
    return table.scatter(2, chosen, torch.where(best.isfinite(), RAW, table.gather(2, chosen)))


def lens_scores(lensnet, ids, docs, table, block, K, now=None, doubt=True):
    """
    LensNet's scores for readings block (B, P) of rows ids (B, T) whose working contexts are table (B, Q, Q):
    (B, P, Q + G), zero where the entry is not in the reading's context. Column b < Q is block b (raw or gist), Q + n level-2 node n. now as in row_hits, doubt as in LensNet.
    """
    B, P = block.shape
    Q, device = docs.size(1), block.device
    T, G = Q * K, Q // FAN
    line = table.gather(1, block[:, :, None].expand(-1, -1, Q)) # (B, P, Q)
    node = line[:, :, :G * FAN:FAN] == NODE
    seen = torch.cat([(line == RAW) | (line == GIST), node], dim=2) # (B, P, E)
    levels = torch.cat([(line == GIST).long(), torch.full_like(node, 2, dtype=torch.long)], dim=2)
    centres = entry_positions(T, K, device=device)[0, T:] # (E,)
    now = block * K if now is None else now
    distances = (now[:, :, None] - centres).clamp(min=1)
    hits = row_hits(ids, docs, block, K, now) # (B, P, Q, KINDS, n)
    hits = torch.cat([hits, hits[:, :, :G * FAN].unflatten(2, (G, FAN)).any(3)], dim=2)
    order = centres.argsort() # the timeline's: a level-2 node stands before the blocks that follow it, as in a working context
    inputs = [t.flatten(0, 1)[:, order] for t in (hits, levels, distances, seen)]
    return lensnet(*inputs, doubt)[:, order.argsort()].view(B, P, -1)
