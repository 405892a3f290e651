"""
One row, many working contexts: which entry sees which, in training and in evaluation.

A row holds T raw tokens in Q = T / K blocks, then one level-1 gist a block, then one level-2 gist for every 32 blocks, then
(when counterfactuals are measured) copies of some blocks. Every block q reads the past through a working context of its own,
a line of a small table:

    table[q, b] = HIDDEN  block b is not visible to block q (another document, or given up)
                  RAW     its tokens are
                  GIST    its level-1 gist is
                  NODE    it is covered by its level-2 gist (all 32 siblings are, or none)

Tokens of a block see each other causally. A gist sees itself only: its keys and values are then a function of the gist alone,
never of the working context, so they can be computed once and cached for ever. A copy is the same K tokens read through
another line of the table; nobody sees a copy, so one edit's price is the difference of two losses of one forward.

B = rows, T = tokens, K = block, Q = blocks, G = level-2 gists, M = copies, N = T + Q + G + M*K entries
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from nanochat.attention import Stretches

HIDDEN, RAW, GIST, NODE = 0, 1, 2, 3
FAN = 32 # children of a level-2 gist
STRETCH = 256 # tokens that look at their past together where a mask says what they see
TILE = 128 # FlexAttention's: it skips tiles of so many by so many that nobody sees


@dataclass
class Copies:
    """M more readings in a row: block[m] read through the working context table[m]. Row by row, (B, M) and (B, M, Q)."""
    block: torch.Tensor
    table: torch.Tensor


def entry_positions(T, K, copies=None, device=None):
    """Positions (1 or B, N) of all entries: a token at its index, a gist at the centre of its span."""
    Q = T // K
    tokens = torch.arange(T, device=device, dtype=torch.float32)
    gists = torch.arange(Q, device=device) * K + (K - 1) / 2
    nodes = torch.arange(Q // FAN, device=device) * K * FAN + (K * FAN - 1) / 2
    positions = torch.cat([tokens, gists, nodes])[None]
    if copies is None:
        return positions
    B, M = copies.block.shape
    inside = torch.arange(K, device=device)
    copied = (copies.block[:, :, None] * K + inside).view(B, M * K).float()
    return torch.cat([positions.expand(B, -1), copied], dim=1)


def visibility(table, K, copies=None):
    """table (B, Q, Q) -> bool mask (B, 1, N, N), True where the row's entry may look at the column's."""
    B, Q, _ = table.shape
    device, T, G = table.device, Q * K, Q // FAN
    M = 0 if copies is None else copies.block.size(1)
    start = T + Q + G # of the copies
    see = torch.zeros(B, start + M * K, start + M * K, dtype=torch.bool, device=device)
    see[:, :T, :start] = past(table, K)
    see[:, :T, :T] |= own_blocks(Q, K, device)
    lane = torch.arange(T, start, device=device)
    see[:, lane, lane] = True
    if M:
        see[:, start:, :start] = past(copies.table, K)
        see[:, start:, start:] = own_blocks(M, K, device)
    return see[:, None]


def past(lines, K, raw=None):
    """Which of the tokens and gists do readings see through lines (B, n, Q), K tokens a line: (B, n * K, T + Q + G). raw: of the first so many blocks' tokens only."""
    wide, G = lines.repeat_interleave(K, dim=1), lines.size(2) // FAN # (B, n*K, Q)
    return torch.cat([(wide[..., :raw] == RAW).repeat_interleave(K, dim=2), wide == GIST, wide[..., :G * FAN:FAN] == NODE], dim=2)


def own_blocks(n, K, device):
    """Tokens of n blocks, each of which sees those of its own up to itself: bool (n * K, n * K)."""
    place = torch.arange(n * K, device=device)
    return (place[:, None] // K == place // K) & (place <= place[:, None])


def stretches(table, K, copies=None):
    """
    The same rule as Stretches: nobody looks at tokens that come later, so STRETCH tokens at a time need the columns up to their own, as causal attention does,
    and gists, which see themselves only, need none.
    """
    Q, device = table.size(1), table.device
    T, step = Q * K, STRETCH // K
    start, pieces = T + Q + Q // FAN, []
    for a in range(0, Q, step):
        b = min(Q, a + step)
        see = past(table[:, a:b], K, b)
        see[:, :, a * K:b * K] |= own_blocks(b - a, K, device)
        pieces.append((slice(a * K, b * K), (slice(0, b * K), slice(T, start)), see[:, None]))
    pieces.append((slice(T, start), (), None))
    if copies is not None:
        M = copies.block.size(1)
        see = torch.cat([past(copies.table, K), own_blocks(M, K, device).expand(len(table), -1, -1)], dim=2)
        pieces.append((slice(start, start + M * K), (slice(0, start + M * K),), see[:, None]))
    return Stretches(pieces)


def visibility_rule(table, K, copies=None):
    """The same rule as a FlexAttention mask function: may query i look at key j?"""
    B, Q, _ = table.shape
    T, G = Q * K, Q // FAN
    start = T + Q + G # of the copies
    lines = with_lines(table, copies)
    none = lines.size(1) - 1

    def sees(b, h, i, j):
        line = torch.where(i < T, i // K, torch.where(i < start, none, Q + (i - start) // K)).clamp(max=none)
        column = torch.where(j < T, j // K, torch.where(j < T + Q, j - T, (j - T - Q) * FAN)).clamp(max=Q - 1)
        kind = torch.where(j < T, RAW, torch.where(j < T + Q, GIST, torch.where(j < start, NODE, -1)))
        mine = torch.where(j < T, j // K, torch.where(j < start, none, Q + (j - start) // K)) == line
        own = (i == j) | mine & (line < none) & (j <= i)
        return own | (lines[b, line, column] == kind)

    return sees


def with_lines(table, copies):
    """Every line that something reads the past through: (B, Q + M + 1, Q). The last is what gists read, nothing."""
    parts = [table] if copies is None else [table, copies.table]
    return torch.cat([*parts, torch.full_like(table[:, :1], HIDDEN)], dim=1)


def block_mask(table, K, copies=None):
    """
    The same rule as a BlockMask: visibility_rule, and which tiles it leaves empty or full. The entries of a block read the same line, so
    tiles are counted per line, and nothing of size N x N is built, only N x N / TILE.
    """
    B, Q, _ = table.shape
    device, T, G = table.device, Q * K, Q // FAN
    lines, M = with_lines(table, copies), 0 if copies is None else copies.block.size(1)
    N, none = T + Q + G + M * K, Q + M
    n = -(-N // TILE)
    entry = torch.arange(N, device=device)
    line = torch.cat([entry[:T] // K, torch.full((Q + G,), none, device=device), Q + torch.arange(M * K, device=device) // K]) # (N,)

    keys = torch.cat([(lines == RAW).repeat_interleave(K, dim=2), lines == GIST, lines[:, :, :G * FAN:FAN] == NODE], dim=2) # (B, lines, T + Q + G)
    per_line = F.pad(keys, (0, n * TILE - keys.size(2))).unflatten(2, (n, TILE)).sum(-1) # (B, lines, n) visible keys of each tile
    pairs = F.pad(per_line[:, line], (0, 0, 0, n * TILE - N)).unflatten(1, (n, TILE)).sum(2) # (B, n, n) visible pairs of each tile, own blocks apart
    full = pairs == TILE * TILE
    some = (pairs > 0) & ~full
    first = torch.where(line < none, entry - torch.where(entry < T, entry, entry - T - Q - G) % K, entry) # of the own block
    some[:, entry // TILE, entry // TILE] = True # an own block lies in one tile, or across two
    some[:, entry // TILE, first // TILE] = True
    return BlockMask.from_kv_blocks(*as_blocks(some), *as_blocks(full), BLOCK_SIZE=TILE, mask_mod=visibility_rule(table, K, copies), seq_lengths=(N, N))


def as_blocks(tiles):
    """tiles (B, n, n) bool -> how many are set in each row of tiles, and their columns, those first: (B, 1, n) and (B, 1, n, n) int32."""
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


def trial_masks(device, K=16, Q=80):
    """A small row with two copies as (BlockMask, bool mask), for nanochat.backend to try FlexAttention on."""
    table = torch.from_numpy(draw_table(np.zeros(Q, dtype=np.int64), K, np.random.default_rng(0), gists=1, nodes=1))[None].to(device)
    block = torch.tensor([[Q // 2, Q - 1]], device=device)
    copies = Copies(block, table[0][block])
    return block_mask(table, K, copies), visibility(table, K, copies)


def full_table(docs):
    """Every block reads all of its document raw: docs (B, Q) -> (B, Q, Q). This is the plain GPT."""
    Q = docs.size(1)
    earlier = torch.ones(Q, Q, dtype=torch.bool, device=docs.device).tril(-1)
    return torch.where(earlier & (docs[:, :, None] == docs[:, None]), RAW, HIDDEN)


def draw_table(docs, K, rng, tail=(0, 256), gists=0.9, opened=2, nodes=0.5):
    """
    A random legal working context for every block of one row; docs is a numpy array (Q,). Returns (Q, Q) int64.

    tail    smallest and largest raw tail in tokens, uniform: short, because where raw tokens are within reach gists are ignored
    gists   share of rows that see gists; the rest see their raw tail alone, so that a plain window stays readable too
    opened  up to this many older blocks are raw
    nodes   share of blocks whose far past is read through level-2 gists
    """
    Q = len(docs)
    table = np.zeros((Q, Q), dtype=np.int64)
    with_gists = rng.random() < gists
    tails = rng.integers(tail[0] // K, tail[1] // K + 1, size=Q)
    first = np.zeros(Q, dtype=np.int64) # first block of each block's document
    for q in range(1, Q):
        first[q] = first[q - 1] if docs[q] == docs[q - 1] else q
    for q in range(Q):
        near = max(first[q], q - tails[q])
        table[q, near:q] = RAW
        if not with_gists or near == first[q]:
            continue
        table[q, first[q]:near] = GIST
        for b in rng.integers(first[q], near, size=rng.integers(0, opened + 1)):
            table[q, b] = RAW
        if rng.random() < nodes:
            far = rng.integers(first[q], near + 1) # blocks before this one go to level 2, where a whole node can
            for node in range(-(-first[q] // FAN), far // FAN):
                table[q, node * FAN:(node + 1) * FAN] = NODE
    return table
