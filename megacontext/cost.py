"""
What the memory's networks cost, by arithmetic on their shapes. In: configs. Out: FLOPs, to stand beside nanochat.cost.forward_flops,
with its conventions: 2 for each multiply-add of a matrix product or of attention; norms, softmaxes, means and lookups are free.

D = model width, w = GistNet's inner width, K = children a node, E = entries scored, n = newest tokens
"""
from megacontext.lensnet import MATCHES, PLACES, RECENT
from megacontext.matches import KINDS, NEWEST
from megacontext.span import BLOCK
from nanochat.cost import parameter_counts


def gist_flops(config):
    """One gist."""
    D, w, n = config.width, config.inner, BLOCK + 1 # the children and the slot
    flops = 2 * D * w * n                           # children narrowed, the slot widened
    for i in range(config.layers):
        written = 1 if i == config.layers - 1 else n                          # of the last round only the slot goes on
        flops += 4 * w ** 2 * n + 20 * w ** 2 * written + 4 * w * n * written # k, v; q, out, up, down; attention
    return flops


def ingest_flops(config):
    """GistNet's share of one token of history: a gist for every K tokens, and one for every K gists, whatever their level."""
    return gist_flops(config) / (BLOCK - 1)


def score_flops(config, entries, newest=NEWEST):
    """LensNet scores so many entries once: the means of what each newest token's match is worth, and the head."""
    means = KINDS * newest * len(RECENT)
    head = (2 * MATCHES + PLACES) * config.hidden + config.hidden
    return 2 * entries * (means + head)


def embed_flops(config):
    """One token embedded, in a GPT of this config: its look at the tokens before it."""
    return 2 * config.previous * config.width ** 2


def lane_flops(config):
    """What one token of history costs the GPT in gists read once each for their keys and values: all but the head, seeing one entry."""
    counts = parameter_counts(config)
    once = 2 * counts["matrices"] - embed_flops(config) + 4 * config.layers * config.width # a gist has no tokens before it
    return once / (BLOCK - 1) # 1/K + 1/K^2 + ...


def training_bytes(config, gpt_config, block, saved_bytes, reconstruct_every=0):
    """
    What a training step keeps for backward beside the plain GPT, in bytes per token, with gists of `block` children; saved_bytes per unit of
    width and layer (nanochat.hardware.SAVED_BYTES); one block in reconstruct_every is read twice (0 = none). At d4 and d8 within 15% of what saved_tensors_hooks count.
    """
    D, w, L = gpt_config.width, config.inner, gpt_config.layers
    gists = 1 / block + 1 / (block * BLOCK)                             # entries beside each token
    again = (1 + 1 / block) / reconstruct_every if reconstruct_every else 0.0
    trunk = (gists + again) * L * D * saved_bytes
    rounds = (1 + gists) * config.layers * w * saved_bytes              # GistNet over children and slots
    rows = 4 * (D + len(gpt_config.value_layers) * gpt_config.value_width) # tokens and gists copied into one row
    edits = 72 * D if block == BLOCK else 0                             # edited blocks behind their rows' keys and values, a layer at a time (70 by the resident memory of d4, all rows labelled)
    return trunk + rounds + rows + edits
