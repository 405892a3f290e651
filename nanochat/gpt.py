"""
The GPT. It reads entries (a vector, a position, a rule of who sees whom), so that anything which lives in the space of token
embeddings can stand in the place of tokens. Plain text is the case where every entry is a token.

    ids -> embed -> entries -> trunk -> hidden -> head -> logits

The recipe is nanochat's: rotary positions, RMS norm without parameters (also after the embedding), QK-norm with a gain of 1.2,
ReLU^2, untied head, logit soft-cap 15, learned residual and x0 scales, value embeddings on alternate layers. Left out: backout.
Instead of the smear, which mixes a token's neighbour in the row into the residual stream, the embedding of a token is a function of
its id and of the three ids before it: the same whichever way the row is cut, and known when a text is ingested.

B = batch, N = entries, D = width, H = heads, V = vocabulary, P = tokens before
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from nanochat.attention import Recent, attend, in_window, norm, rope_angles, rotate
from nanochat.common import UserError
from nanochat.cost import PREVIOUS
from nanochat.cross_entropy import IGNORE, TotalNats, nats_and_slope_, piece_tokens, softcap, token_nats
from nanochat.lora import adapt

QK_GAIN = 1.2         # sharper attention than unit-norm q and k allow
GATE_CHANNELS = 12    # the value gate reads the first channels of the residual stream


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    seq_len: int = 2048   # longest row it is trained on: no position beyond it
    layers: int = 4
    heads: int = 2
    kv_heads: int = 2
    width: int = 256
    bos: int = -1         # id that starts a document: it has no token before it (-1 = there is no such id)
    windows: str = "L"    # how far layers look back, repeated over them: L = to the start, S = short_window. The last is always L
    short_window: int = 0 # tokens, the own one included (0 = a quarter of seq_len in whole 128s: nanochat's 512 of 2048)
    previous: int = PREVIOUS # tokens before it that an embedding knows: with three, looking up is learnt in half of the steps it takes with one (LOG.md, 2026-11-21)
    lora: int = 0         # rank of what is learnt beside its matrices while they stay (nanochat/lora.py; 0 = nothing is)

    def __post_init__(self):
        if not self.windows or set(self.windows) - {"S", "L"}:
            raise UserError(f"windows {self.windows!r}: expected a pattern of S (short) and L (long), one letter a layer and then repeated, such as SSSL")
        if self.short_layers and not self.short_window:
            object.__setattr__(self, "short_window", -(-self.seq_len // 512) * 128) # kept from here on: a later stage may read longer rows

    @classmethod
    def from_depth(cls, depth, vocab_size, seq_len=2048, bos=-1, head_width=128, windows="L"):
        """The one dial: width is 64 a layer, rounded up to whole heads."""
        heads = -(-depth * 64 // head_width)
        return cls(vocab_size, seq_len, depth, heads, heads, heads * head_width, bos, windows)

    @property
    def head_width(self):
        return self.width // self.heads

    @property
    def value_width(self):
        return self.kv_heads * self.head_width

    @property
    def value_layers(self):
        """Layers with value embeddings: every other one, and always the last."""
        return [i for i in range(self.layers) if i % 2 == (self.layers - 1) % 2]

    @property
    def short_layers(self):
        return [i for i in range(self.layers - 1) if self.windows[i % len(self.windows)] == "S"]

    def to_dict(self):
        """Without the windows and the rank where there is none, as in checkpoints from before there were any."""
        unsaid = [*["windows", "short_window"] * (not self.short_layers), *["lora"] * (not self.lora)]
        return {name: value for name, value in asdict(self).items() if name not in unsaid}


@dataclass
class Entries:
    """What the trunk reads: x (B, N, D), and for each layer of config.value_layers a value embedding (B, N, value_width)."""
    x: torch.Tensor
    values: list


class Attention(nn.Module):
    def __init__(self, config, has_value):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.q = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.k = nn.Linear(config.width, config.value_width, bias=False)
        self.v = nn.Linear(config.width, config.value_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.gate = nn.Linear(GATE_CHANNELS, config.kv_heads, bias=False) if has_value else None

    def forward(self, x, value, rope, see, layer, cache, last=False):
        B, N, D = x.shape
        asking, turn = (x[:, -1:], [angle[:, :, -1:] for angle in rope]) if last else (x, rope)
        q = self.q(asking).view(B, -1, self.heads, self.head_width)
        k = self.k(x).view(B, N, self.kv_heads, self.head_width)
        v = self.v(x).view(B, N, self.kv_heads, self.head_width)
        if self.gate is not None:
            gate = 3 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])) # (B, N, kv_heads), in (0, 3)
            v = v + gate.unsqueeze(-1) * value.view_as(v).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2) # (B, H, N, d)
        q, k = rotate(norm(q) * QK_GAIN, *turn), rotate(norm(k) * QK_GAIN, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, see)
        return self.out(y.transpose(1, 2).reshape(B, -1, D))


class ReluSquared(torch.autograd.Function):
    """relu(x)^2, whose derivative is 2 relu(x): two passes over memory in backward where autograd's own chain takes five."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, outside):
        [positive] = ctx.saved_tensors
        return (outside * positive).mul_(2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x):
        return self.down(ReluSquared.apply(self.up(x)))


class Block(nn.Module):
    def __init__(self, config, has_value):
        super().__init__()
        self.attn = Attention(config, has_value)
        self.mlp = MLP(config)

    def forward(self, x, value, rope, see, layer, cache, last=False):
        x = (x[:, -1:] if last else x) + self.attn(norm(x), value, rope, see, layer, cache, last)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.width % config.heads == 0 and config.head_width % 2 == 0, f"width {config.width} does not split into {config.heads} even heads"
        self.config = config
        self.flash = None # FlashAttention 3, where nanochat/backend.py finds that it runs
        self.embed_table = nn.Embedding(config.vocab_size, config.width)
        self.previous = nn.Linear(config.previous * config.width, config.width, bias=False)
        self.value_tables = nn.ModuleList([nn.Embedding(config.vocab_size, config.value_width) for _ in config.value_layers])
        self.blocks = nn.ModuleList([Block(config, i in config.value_layers) for i in range(config.layers)])
        self.resid_scale = nn.Parameter(torch.ones(config.layers))
        self.x0_scale = nn.Parameter(torch.zeros(config.layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.checkpoint_activations = False    # keep only each layer's input, and compute the layer again in backward
        self.nats_and_slope_ = nats_and_slope_ # compiled where the rest is
        self.init_weights()
        if config.lora:
            adapt(self, config.lora)

    @torch.no_grad()
    def init_weights(self):
        """Every number is nanochat's. Output projections start at zero, so at first a block changes nothing."""
        spread = (3 / self.config.width) ** 0.5 # uniform in +-spread has a standard deviation of 1/sqrt(D)
        nn.init.normal_(self.embed_table.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        nn.init.zeros_(self.previous.weight)
        for table in self.value_tables:
            nn.init.uniform_(table.weight, -spread, spread)
        for block in self.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v):
                nn.init.uniform_(linear.weight, -spread, spread)
            nn.init.uniform_(block.mlp.up.weight, -0.4 * spread, 0.4 * spread)
            nn.init.zeros_(block.attn.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
            if block.attn.gate is not None:
                nn.init.uniform_(block.attn.gate.weight, 0.0, 0.02)
        self.resid_scale.copy_(torch.linspace(1.15, 1.05, self.config.layers))
        self.x0_scale.copy_(torch.linspace(0.20, 0.05, self.config.layers))

    @property
    def device(self):
        return self.embed_table.weight.device

    @property
    def dtype(self):
        return self.blocks[0].attn.q.weight.dtype

    def embed(self, ids, before=None):
        """
        ids (B, N) -> Entries. A token is embedded in the light of those before it, so that one look back finds what followed last time;
        before (B, P) are the ids in front of the first, None = there are none. -1 is no token: nothing, or padding. bos starts anew, and
        what stands before it is not looked at. The norm puts tokens on the unit-RMS sphere where gists live too.
        """
        N, P = ids.size(1), self.config.previous
        known = torch.cat([ids.new_full((len(ids), P), -1), *([] if before is None else [before]), ids], dim=1)[:, -P - N:]
        x = norm(self.embed_table(known.clamp(min=0)).to(self.dtype)).masked_fill((known < 0)[:, :, None], 0.0) # (B, P + N, D)
        bos = known == self.config.bos
        cut, earlier = bos[:, P:], [] # cut (B, N): a document begins between the token and the one that is asked for
        for back in range(1, P + 1):
            earlier.append(x[:, P - back:P - back + N].masked_fill(cut[:, :, None], 0.0))
            cut = cut | bos[:, P - back:P - back + N]
        return Entries(norm(x[:, P:] + self.previous(torch.cat(earlier, dim=-1))), [table(ids.clamp(min=0)) for table in self.value_tables])

    def trunk(self, entries, positions, see, cache=None, last=False):
        """
        Entries at positions (B or 1, N) -> hidden states (B, N, D), normed. With a cache, `see` covers cache + new entries.
        last: only the newest entry's is wanted, (B, 1, D). Then the last layer spares the others all but their keys and values.
        """
        rope = rope_angles(positions, self.config.head_width)
        values = dict(zip(self.config.value_layers, entries.values))
        x = x0 = entries.x
        views = self.views(see, positions, cache)
        last = last and x.size(1) > 1
        if last:
            assert isinstance(see, (str, torch.Tensor)), f"the newest entry's row is asked of 'causal', 'all' or a mask, got {see!r}"
            views[-1] = "all" if isinstance(see, str) else see[..., -1:, :]
        for i in range(self.config.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(self._layer, i, x, x0, values.get(i), rope, views[i], cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._layer(i, x, x0, values.get(i), rope, views[i], cache, last and i == self.config.layers - 1)
        if cache is not None:
            cache.advance(entries.x.size(1))
        return norm(x)

    def _layer(self, i, x, x0, value, rope, see, cache, last=False):
        return self.blocks[i](self.resid_scale[i] * x + self.x0_scale[i] * x0, value, rope, see, i, cache, last)

    def views(self, see, positions, cache):
        """What each layer sees: `see`, or the newest of it in a layer with a short window."""
        config, named = self.config, isinstance(see, str) # "causal", or "all" of a cache for one new token
        flash = self.flash if named and see == "causal" else None
        long = see if flash is None else Recent(None, flash)
        if not config.short_layers:
            return [long] * config.layers
        if named:
            short = Recent(config.short_window, flash)
        else:
            assert isinstance(see, torch.Tensor), "gists are read in every layer, so a model with memory has no short windows"
            keys = positions if cache is None else positions[:, :1] - cache.length + torch.arange(see.size(-1), device=positions.device)
            short = see & in_window(positions, keys, config.short_window)[:, None]
        return [short if i in config.short_layers else long for i in range(config.layers)]

    def head(self, hidden):
        """(..., D) -> logits (..., V) in fp32, softly capped at +-15."""
        return softcap(self.lm_head(hidden))

    def loss(self, hidden, targets, reduction="mean"):
        """
        Next-token loss in nats of hidden (B, N, D) against targets (B, N), where -1 counts nothing; a piece of the logits at a time.
        reduction "none" gives (B, N) with zeros where there is no target; "mean" over no target at all is 0, not NaN.
        """
        flat, piece = hidden.flatten(0, 1), piece_tokens(hidden.device.type, self.config.vocab_size)
        if reduction == "none" or not torch.is_grad_enabled():
            nats = token_nats(self.head, flat, targets.flatten(), piece).view_as(targets)
            if reduction == "none":
                return nats
            nats = nats.sum()
        else:
            nats = TotalNats.apply(flat, self.lm_head.weight, targets.flatten(), piece, self.nats_and_slope_)
        return nats if reduction == "sum" else nats / (targets != IGNORE).sum().clamp(min=1)

    def forward(self, ids, targets=None, reduction="mean"):
        """Plain text: ids (B, N) -> logits (B, N, V), or the loss against targets."""
        positions = torch.arange(ids.size(1), device=ids.device)[None]
        hidden = self.trunk(self.embed(ids), positions, "causal")
        return self.head(hidden) if targets is None else self.loss(hidden, targets, reduction)

    @torch.no_grad()
    def extend(self, ids, cache):
        """Read ids (B, n) after what the cache holds; logits (B, V) of the token that follows. Chunks equal one long read."""
        n, start = ids.size(1), cache.length
        positions = torch.arange(start, start + n, device=ids.device)[None]
        see = "all" if n == 1 else "causal" if start == 0 else causal_after(start, n, ids.device)
        entries = self.embed(ids, cache.remember(ids))
        return self.head(self.trunk(entries, positions, see, cache, last=True)[:, -1])


def causal_after(start, n, device):
    """Bool mask (1, 1, n, start + n): n new entries see everything before them."""
    return torch.ones(n, start + n, dtype=torch.bool, device=device).tril(start)[None, None]
