"""
What one gist carries, without any question of choosing:
    dNLL@H          what the next H tokens lose, in nats per token, when one thing is shown more coarsely and stays so for all of them
    reconstruction  a block's own tokens, read behind its gist and nothing else, beside nothing at all and the gist of another document
    diversity       how many directions the gists of many blocks take

B = rows, T = tokens, Q = blocks, H = horizon, N = gists, D = model width
"""
import numpy as np
import torch

from megacontext.evaluate import swapped
from megacontext.layout import FAN, GIST, HIDDEN, NODE, RAW, entry_positions, full_table, shown, stretches
from megacontext.reread import Reading
from megacontext.span import BLOCK

HORIZONS = (32, 64, 128)
COARSER = { # kind of edit -> what it says in a table
    "1": "32 tokens as one gist, anywhere before",
    "1 newest": "the newest 32 tokens as one gist",
    "2": "32 gists as one, the first 1,024 tokens",
    "2 from tokens": "the first 1,024 tokens as one gist",
}


# ----------------------------------------------------------------------------------------------------------------------
# dNLL@H

def price(rows, rng, readings=4, edits=4):
    """
    Everything raw but for one edit, and the difference to everything raw (kind "2": to the same with 32 level-1 gists).
    -> {kind: {H: nats per token that the H tokens lose, a list with one number an edit}}. Rows are too short for level 2 below 38 blocks.
    """
    longest = max(HORIZONS)
    reading = Reading(rows.gpt, rows.entries, rows.targets, full_table(torch.zeros(rows.B, rows.Q, dtype=torch.long, device=rows.device)))
    lowest, highest = 2, rows.Q - longest // BLOCK
    assert highest > lowest, f"rows of {rows.Q} blocks are too short for a horizon of {longest} tokens"
    found = {}
    for q in rng.integers(lowest, highest + 1, readings).tolist():
        kinds, against, lines = draw_lines(rows.Q, q, rng, edits)
        nats = reading.again(q * BLOCK, longest, shown(torch.from_numpy(lines).to(rows.device), BLOCK))
        for v, kind in enumerate(kinds):
            if kind:
                lost = (nats[:, v] - nats[:, against[v]]).float() # (B, longest)
                for H in HORIZONS:
                    found.setdefault(kind, {}).setdefault(H, []).extend(lost[:, :H].mean(dim=1).tolist())
    return found


def draw_lines(Q, q, rng, edits):
    """Edits of block q's context: (kind of each line or "", the line that each is compared with, lines (V, Q)). The first is everything raw."""
    raw = np.where(np.arange(Q) < q, RAW, HIDDEN)
    kinds, against, lines = [""], [0], [raw]

    def add(kind, line, other=0):
        kinds.append(kind)
        against.append(other)
        lines.append(line)

    for b in rng.choice(q - 1, size=min(edits, q - 1), replace=False):
        add("1", np.where(np.arange(Q) == b, GIST, raw))
    add("1 newest", np.where(np.arange(Q) == q - 1, GIST, raw))
    if q > FAN:
        first = np.arange(Q) < FAN
        add("", np.where(first, GIST, raw))
        add("2", np.where(first, NODE, raw), len(lines) - 1)
        add("2 from tokens", np.where(first, NODE, raw))
    return kinds, against, np.stack(lines)


def substitutability(lost, H):
    """
    Of a list of nats per token, lost over H tokens: their mean, the ratio of perplexities, and the share of spans that lose less than
    0.1 and 1 nat a token, and less than 0.1 and 1 nat over all H tokens.
    """
    lost = np.asarray(lost)
    return dict(dnll=float(lost.mean()), ppl_ratio=float(np.exp(lost.mean())), **{f"below_{x}_a_token": float((lost < x).mean()) for x in (0.1, 1)},
                **{f"below_{x}_in_all": float((lost * H < x).mean()) for x in (0.1, 1)})


# ----------------------------------------------------------------------------------------------------------------------
# Reconstruction

@torch.no_grad()
def reconstruction(rows):
    """
    {level: {"own", "other", "nothing": nats per token, one number a row}}. The 32 tokens of a block are read again as if they were said anew right behind the
    span of the gist: its own, that of another row, or no gist. They see it and each other causally, nothing else; the loss is that of
    tokens 2 to 32, since the first has nothing before it that is the block's. Level 2: the blocks of a whole node behind the node's gist.
    Training may have read some blocks of level 1 so (CoTrainingOptions.reconstruct_every), of level 2 none.
    """
    found, (T, Q) = {}, (rows.T, rows.Q)
    for level, view, fan in ((1, GIST, 1), (2, NODE, FAN)):
        whole = Q // fan * fan # blocks under a gist of this level
        if not whole:
            continue
        table, block = np.full((Q, Q), HIDDEN), np.arange(Q)
        table[(block[:, None] // fan == block // fan) & (block < whole)] = view
        positions = entry_positions(T, BLOCK, device=rows.device).clone()
        behind = (torch.arange(T, device=rows.device) // (fan * BLOCK) + 1) * fan * BLOCK # where the gist's span ends
        positions[0, :T] = behind + torch.arange(T, device=rows.device) % BLOCK
        readings = {"own": (rows.entries, table), "other": (swapped(rows.entries, T), table), "nothing": (rows.entries, np.full((Q, Q), HIDDEN))}
        found[level] = {}
        for name, (entries, lines) in readings.items():
            hidden = rows.gpt.trunk(entries, positions, stretches(rows.batch(lines), BLOCK))
            nats = rows.gpt.loss(hidden[:, :whole * BLOCK], rows.targets[:, :whole * BLOCK], "none")
            found[level][name] = nats.view(rows.B, whole, BLOCK)[:, :, :-1].mean(dim=(1, 2)).tolist() # the last target is the next block's first token
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Diversity

def diversity(gists):
    """
    Gists (N, D) -> dict(n, rank, cosine): the effective rank, e to the entropy of the singular values' shares (Roy and Vetterli, 2007), at most
    min(N, D), and the mean cosine of two different gists.
    """
    gists = gists.double()
    share = torch.linalg.svdvals(gists)
    share = share[share > 0] / share.sum()
    unit = gists / gists.norm(dim=1, keepdim=True)
    N = len(gists)
    cosine = ((unit.sum(dim=0).square().sum() - N) / (N * (N - 1))).item() # sum over all pairs, less those of a gist with itself
    return dict(n=N, rank=torch.exp(-(share * share.log()).sum()).item(), cosine=cosine)


def all_gists(entries, T):
    """{level: gists (N, D)} of entries that were read as rows of T tokens."""
    Q = T // BLOCK
    by_level = {1: entries.x[:, T:T + Q], 2: entries.x[:, T + Q:]}
    return {level: gists.flatten(0, 1) for level, gists in by_level.items() if gists.size(1)}
