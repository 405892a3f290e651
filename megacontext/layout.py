"""
One row, many working contexts: which entry sees which, in training and in evaluation.

A row holds T raw tokens in Q = T / K blocks, then one level-1 gist a block, then one level-2 gist for every 32 blocks. Every block q
reads the past through a working context of its own, a line of a small table:

    table[q, b] = HIDDEN  block b is not visible to block q (another document, or given up)
                  RAW     its tokens are
                  GIST    its level-1 gist is
                  NODE    it is covered by its level-2 gist (all 32 siblings are, or none)

Tokens of a block see each other causally. A gist sees itself only: its keys and values are then a function of the gist alone,
never of the working context, so they can be computed once and cached for ever.

B = rows, T = tokens, K = block, Q = blocks, G = level-2 gists, N = T + Q + G entries
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from nanochat.attention import Stretches

HIDDEN, RAW, GIST, NODE = 0, 1, 2, 3
FAN = 32 # children of a level-2 gist
TAIL = (0, 512) # smallest and largest raw tail in tokens; up to 256 reads worse by 0.003 to 0.004 bits per byte (LOG.md, 2026-11-30)
STRETCH = 256 # tokens that look at their past together where a mask says what they see
TILE = 128 # FlexAttention's: it skips tiles of so many by so many that nobody sees


def entry_positions(T, K, device=None):
    """Positions (1, N) of all entries: a token at its index, a gist at the centre of its span."""
    Q = T // K
    tokens = torch.arange(T, device=device, dtype=torch.float32)
    gists = torch.arange(Q, device=device) * K + (K - 1) / 2
    nodes = torch.arange(Q // FAN, device=device) * K * FAN + (K * FAN - 1) / 2
    return torch.cat([tokens, gists, nodes])[None]


def visibility(table, K):
    """table (B, Q, Q) -> bool mask (B, 1, N, N), True where the row's entry may look at the column's."""
    B, Q, _ = table.shape
    device, T, N = table.device, Q * K, Q * K + Q + Q // FAN
    see = torch.zeros(B, N, N, dtype=torch.bool, device=device)
    see[:, :T] = past(table, K)
    see[:, :T, :T] |= own_blocks(Q, K, device)
    lane = torch.arange(T, N, device=device)
    see[:, lane, lane] = True
    return see[:, None]


def shown(lines, K, raw=None):
    """Lines (..., Q) -> bool (..., T + Q + G), the entries of the row that each shows. raw: of the first so many blocks' tokens only."""
    G = lines.size(-1) // FAN
    return torch.cat([(lines[..., :raw] == RAW).repeat_interleave(K, dim=-1), lines == GIST, lines[..., :G * FAN:FAN] == NODE], dim=-1)


def past(lines, K, raw=None):
    """The same for each of the K tokens that read through a line: (B, n, Q) -> (B, n * K, T + Q + G)."""
    return shown(lines, K, raw).repeat_interleave(K, dim=1)


def own_blocks(n, K, device):
    """Tokens of n blocks, each of which sees those of its own up to itself: bool (n * K, n * K)."""
    place = torch.arange(n * K, device=device)
    return (place[:, None] // K == place // K) & (place <= place[:, None])


def stretches(table, K):
    """
    The same rule as Stretches: nobody looks at tokens that come later, so STRETCH tokens at a time need the columns up to their own, as causal attention does,
    and gists, which see themselves only, need none.
    """
    Q, device = table.size(1), table.device
    T, step = Q * K, STRETCH // K
    gists, pieces = slice(T, T + Q + Q // FAN), []
    for a in range(0, Q, step):
        b = min(Q, a + step)
        see = past(table[:, a:b], K, b)
        see[:, :, a * K:b * K] |= own_blocks(b - a, K, device)
        pieces.append((slice(a * K, b * K), (slice(0, b * K), gists), see[:, None]))
    return Stretches([*pieces, (gists, (), None)])


def visibility_rule(table, K):
    """The same rule as a FlexAttention mask function: may query i look at key j?"""
    B, Q, _ = table.shape
    T, lines = Q * K, with_gists(table)

    def sees(b, h, i, j):
        line = torch.where(i < T, i // K, Q)
        column = torch.where(j < T, j // K, torch.where(j < T + Q, j - T, (j - T - Q) * FAN)).clamp(max=Q - 1)
        kind = torch.where(j < T, RAW, torch.where(j < T + Q, GIST, NODE))
        own = (i == j) | (i < T) & (j // K == line) & (j <= i)
        return own | (lines[b, line, column] == kind)

    return sees


def with_gists(table):
    """The table with a last line for gists, which see nothing: (B, Q + 1, Q)."""
    return torch.cat([table, torch.full_like(table[:, :1], HIDDEN)], dim=1)


def block_mask(table, K):
    """
    The same rule as a BlockMask: visibility_rule, and which tiles it leaves empty or full. The entries of a block read the same line, so
    tiles are counted per line, and nothing of size N x N is built, only N x N / TILE.
    """
    B, Q, _ = table.shape
    device, T = table.device, Q * K
    lines, N = with_gists(table), T + Q + Q // FAN
    n = -(-N // TILE)
    entry = torch.arange(N, device=device)
    line = torch.where(entry < T, entry // K, Q) # (N,)

    per_line = F.pad(shown(lines, K), (0, n * TILE - N)).unflatten(2, (n, TILE)).sum(-1) # (B, lines, n) visible keys of each tile
    pairs = F.pad(per_line[:, line], (0, 0, 0, n * TILE - N)).unflatten(1, (n, TILE)).sum(2) # (B, n, n) visible pairs of each tile, own blocks apart
    full = pairs == TILE * TILE
    some = (pairs > 0) & ~full
    first = torch.where(entry < T, entry - entry % K, entry) # of the own block
    some[:, entry // TILE, entry // TILE] = True # an own block lies in one tile, or across two
    some[:, entry // TILE, first // TILE] = True
    return BlockMask.from_kv_blocks(*as_blocks(some), *as_blocks(full), BLOCK_SIZE=TILE, mask_mod=visibility_rule(table, K), seq_lengths=(N, N))


def as_blocks(tiles):
    """tiles (B, n, n) bool -> how many are set in each row of tiles, and their columns, those first: (B, 1, n) and (B, 1, n, n) int32."""
    columns = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


def trial_masks(device, K=16, Q=83):
    """A small row as (BlockMask, bool mask), for nanochat.backend to try FlexAttention on. It does not end with a tile: the harder case."""
    table = torch.from_numpy(draw_table(np.zeros(Q, dtype=np.int64), K, np.random.default_rng(0), gists=1, nodes=1))[None].to(device)
    return block_mask(table, K), visibility(table, K)


def full_table(docs):
    """Every block reads all of its document raw: docs (B, Q) -> (B, Q, Q). This is the plain GPT."""
    Q = docs.size(1)
    earlier = torch.ones(Q, Q, dtype=torch.bool, device=docs.device).tril(-1)
    return torch.where(earlier & (docs[:, :, None] == docs[:, None]), RAW, HIDDEN)


def draw_table(docs, K, rng, tail=TAIL, gists=0.9, opened=2, nodes=0.5):
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
