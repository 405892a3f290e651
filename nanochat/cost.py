"""
What a model costs, by arithmetic on its shape: parameters, FLOPs per token, bytes of KV cache, bytes read per new token.

In:  anything with vocab_size, seq_len, layers, heads, kv_heads, width, short_layers, short_window, previous (GPTConfig). Out: numbers.
The thin matrices that may learn beside a GPT's own (nanochat/lora.py) are not counted: they are gone once it is loaded.
The idea: count by the role that a parameter plays, never by the class of its module. A layer swapped for an fp8 one
costs the same FLOPs; a count by class lost 11 of 12 of them there (and MFU with it).

L = layers, D = width, V = vocabulary, T = sequence length
"""

GATE_INPUTS = 12  # channels that the gate of a value embedding reads
PREVIOUS = 3      # tokens before it that an embedding knows


def parameter_counts(config):
    """{role: parameters}. matrices: everything that Muon steps; scaling: what loss scales with (matrices + head)."""
    L, D, V = config.layers, config.width, config.vocab_size
    kv = config.kv_heads * (D // config.heads)
    value_layers = (L + 1) // 2                        # alternate layers, the last included
    attention = 2 * D * D + 2 * D * kv                 # q and out, k and v
    mlp = 8 * D * D                                    # up and down, 4 D wide
    counts = {
        "embed": V * D,
        "value_tables": value_layers * V * kv,
        "matrices": config.previous * D * D + L * (attention + mlp) + value_layers * GATE_INPUTS * config.kv_heads,
        "head": V * D,
        "scalars": 2 * L,                              # resid_scale, x0_scale
    }
    return counts | {"total": sum(counts.values()), "scaling": counts["matrices"] + counts["head"]}


def count_by_role(gpt):
    """The same numbers counted on a live model by the names of its parameters."""
    counts = dict.fromkeys(("embed", "value_tables", "matrices", "head", "scalars"), 0)
    for name, p in gpt.named_parameters():
        first = name.replace("_orig_mod.", "").split(".")[0]
        role = {"embed_table": "embed", "value_tables": "value_tables", "blocks": "matrices", "previous": "matrices", "lm_head": "head",
                "resid_scale": "scalars", "x0_scale": "scalars"}.get(first)
        assert role is not None, f"parameter {name} has no role: teach cost.count_by_role and cost.parameter_counts about it"
        counts[role] += p.numel()
    return counts | {"total": sum(counts.values()), "scaling": counts["matrices"] + counts["head"]}


def entries_seen(config, visible):
    """Entries that one query reads over all layers when `visible` are there: layers with a short window read no more than that."""
    short = len(config.short_layers)
    return (config.layers - short) * visible + short * min(visible, config.short_window)


def forward_flops(config, visible):
    """
    FLOPs of one token through the trunk and the head when `visible` entries are there for its query:
    2 per matmul parameter, and 2 x 2 x D per layer and entry read (scores, then values). Lookups are free.
    """
    return 2 * parameter_counts(config)["scaling"] + 4 * config.width * entries_seen(config, visible)


def train_flops(config, visible=None):
    """
    FLOPs per trained token, forward and backward (3 forwards). `visible` defaults to T, the convention of PaLM
    (arXiv 2204.02311, appendix B) and of nanochat, which does not halve for causality and counts a short window whole;
    so figures of MFU compare.
    Recomputation by activation checkpointing is not counted: MFU counts what the model needs, not what is spent.
    MFU is these FLOPs over the peak of bf16 (hardware.PEAK_BF16) in every format, so figures compare as speeds do: one of fp8 may pass 100%,
    one of fp32 stays far below.
    """
    return 3 * forward_flops(config, config.seq_len if visible is None else visible)


def kv_bytes(config, itemsize=2):
    """Bytes of KV cache per entry: a key and a value per layer and kv head."""
    return 2 * config.layers * config.kv_heads * (config.width // config.heads) * itemsize


def decode_bytes(config, batch, length, itemsize=2):
    """
    Bytes that must move from memory for one new token in each of `batch` streams of `length` entries: every matmul weight
    once, a row of each table per stream, and the cache as far as each layer reads it. Over bandwidth this is the fastest that decoding can be.
    """
    counts = parameter_counts(config)
    kv = config.kv_heads * (config.width // config.heads)
    rows = config.width + (config.layers + 1) // 2 * kv
    return itemsize * (counts["scaling"] + batch * rows) + batch * entries_seen(config, length) * (kv_bytes(config, itemsize) // config.layers)
