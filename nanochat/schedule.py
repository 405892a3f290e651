"""
From one dial, --depth, to a whole training run; and what changes from step to step. Pure functions, no torch.

In:  depth, vocabulary, and whatever the user set by hand. Out: a Plan (shape, batch, horizon, learning rate and decay
multipliers), and three curves over the steps: learning rate, Muon momentum, weight decay.

The idea (nanochat, Jan-Mar 2026; its "miniseries" of models d12..d28): tune every constant once at depth 12, and carry
it to another depth by rules fitted or derived there. B = batch in tokens, D = horizon in tokens, N = scaling parameters.
"""

import math
from dataclasses import dataclass

from nanochat.common import UserError

HEAD_WIDTH = 128      # wider heads use matrix units better than 64, at no loss (nanochat LOG)
TOKENS_PER_PARAM = 12 # D / N of a compute-optimal run on this recipe; value tables are not in N
REF_DEPTH, REF_BATCH = 12, 2**19
LEAST_STEPS = 64      # of a run cut short by hand: fewer learn less than a smaller batch does (LOG.md, 2026-11-21)


# ---------------------------------------------------------------------------------------------------------------------
# What is derived from depth

@dataclass(frozen=True)
class Plan:
    """Everything that --depth decides. Fields a user sets by hand are replaced, and what hangs on them follows."""
    depth: int
    width: int
    heads: int
    seq_len: int
    vocab_size: int
    scaling_params: int      # N: transformer matrices + lm_head
    batch_tokens: int        # B, all ranks and micro-batches together
    steps: int
    lr_mult: float           # multiplies every learning rate
    weight_decay_mult: float # multiplies Muon's weight decay

    @property
    def tokens(self):
        return self.steps * self.batch_tokens


def width_of(depth):
    """64 per layer, rounded up to whole heads."""
    return -(-depth * 64 // HEAD_WIDTH) * HEAD_WIDTH


def scaling_params(depth, vocab_size):
    """N, the parameters that loss scales with: block matrices and lm_head, no lookup tables (nanochat LOG, Jan 27 2026), nor what the tokens before add to an embedding: horizons are nanochat's."""
    D = width_of(depth)
    gates = (depth + 1) // 2 * 12 * (D // HEAD_WIDTH)  # value gates, on alternate layers
    return depth * 12 * D * D + gates + D * vocab_size


def plan(depth, vocab_size, seq_len=2048, *, tokens=None, steps=None, batch_tokens=None, world=1):
    """
    Derive a run from its depth. tokens, steps and batch_tokens override what the rules would choose; give tokens or
    steps, not both. world: processes, each of which reads a row at least.
    """
    if depth < 1 or vocab_size < 1 or seq_len < 1:
        raise UserError(f"depth, vocabulary and sequence length must be positive, got {depth}, {vocab_size}, {seq_len}")
    if tokens is not None and steps is not None:
        raise UserError(f"both tokens ({tokens}) and steps ({steps}) are given: give one, the other follows")
    for name, value in (("tokens", tokens), ("steps", steps), ("batch tokens", batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")

    # 1. Shape: width = 64 * depth in heads of 128, so that depth alone grows N about as depth^3.
    width = width_of(depth)
    N = scaling_params(depth, vocab_size)

    # 2. Horizon: D = 12 N. Chinchilla's 20 (arXiv 2203.15556) counts embeddings and another optimizer; 12 was measured.
    D_optimal = TOKENS_PER_PARAM * N
    D_ref = TOKENS_PER_PARAM * scaling_params(REF_DEPTH, vocab_size)

    # 3. Batch: B grows as D^0.383 (Power Lines, arXiv 2505.13738), from 2^19 at d12; nearest power of two, at least a row.
    #    A run cut short by hand gets the batch of the tokens that it really sees, and LEAST_STEPS steps. Rounded to whole rows for each process.
    D = tokens if tokens is not None else D_optimal
    if batch_tokens is None:
        power = round(math.log2(REF_BATCH * (D / D_ref) ** 0.383))
        batch_tokens = 2 ** min(power, math.floor(math.log2(max(1, D / LEAST_STEPS))))
        batch_tokens = whole_rows(batch_tokens, seq_len, world)
    if steps is None:
        steps = max(1, round(D / batch_tokens))

    # 4. Learning rate: with B as sqrt(B), the rule for adaptive optimizers (arXiv 2205.10287).
    lr_mult = math.sqrt(batch_tokens / REF_BATCH)

    # 5. Weight decay: keep B / (lr * wd * D) constant, the time scale of the weights' moving average (arXiv 2405.13698).
    #    lr goes as sqrt(B), so wd as sqrt(B) / D. D here is the horizon that suits N, not a horizon cut short by hand:
    #    1 / D of a two-minute run would decay the weights away within a few steps.
    weight_decay_mult = math.sqrt(batch_tokens / REF_BATCH) * D_ref / D_optimal
    return Plan(depth, width, width // HEAD_WIDTH, seq_len, vocab_size, N, batch_tokens, steps, lr_mult, weight_decay_mult)


def whole_rows(batch_tokens, seq_len, world=1):
    """The nearest batch that gives each of `world` processes the same number of rows, one at least."""
    return max(1, round(batch_tokens / (seq_len * world))) * seq_len * world


def short_run(plan):
    """
    What the rates of a run from nothing are multiplied by when it is cut short: with D instead of the D_opt that suits N, sqrt(D_opt / D), up to
    the rates that were tuned at the reference batch. The rules above hold for runs of many thousand steps; at 49 steps they reached 2.71 bits
    per byte where 11 times the rates reached 2.38 (LOG.md, 2026-11-21).
    """
    return max(1.0, min(math.sqrt(TOKENS_PER_PARAM * plan.scaling_params / plan.tokens), 1 / plan.lr_mult))


def accumulation(batch_tokens, rows, seq_len, world):
    """Micro-batches per step, so that rows x seq_len x world x micro-batches = batch_tokens exactly."""
    one = rows * seq_len * world
    if batch_tokens % one:
        raise UserError(f"a batch of {batch_tokens} tokens does not divide into micro-batches of {rows} rows x {seq_len} "
                        f"tokens x {world} ranks = {one}. Change --batch-tokens or --device-batch so that it does")
    return batch_tokens // one


def fit_rows(batch_tokens, most_rows, seq_len, world):
    """The most rows per device, up to most_rows, for which accumulation() comes out even."""
    for rows in range(most_rows, 0, -1):
        if batch_tokens % (rows * seq_len * world) == 0:
            return rows
    raise UserError(f"a batch of {batch_tokens} tokens does not divide among {world} ranks with rows of {seq_len} tokens: "
                    f"it must be a multiple of {seq_len * world}. Change --batch-tokens")


# ---------------------------------------------------------------------------------------------------------------------
# What changes from step to step. step counts from 0; total is the number of steps.

def warmdown_start(total, warmdown_ratio=0.65):
    return total - round(warmdown_ratio * total)


def lr_multiplier(step, total, warmup=40, warmdown_ratio=0.65, final=0.05):
    """Linear up, flat, linear down to `final` at step == total. Where a short run makes ramps overlap, the lower wins."""
    up = (step + 1) / warmup if warmup else 1.0
    start = warmdown_start(total, warmdown_ratio)
    down = 1.0 if step <= start else 1.0 - (1.0 - final) * (step - start) / (total - start)
    return min(up, 1.0, down)


def muon_momentum(step, total, warmup=400, warmdown_ratio=0.65, low=0.85, high=0.97, final=0.90):
    """0.85 -> 0.97 while directions still change fast, -> 0.90 along the learning rate's warmdown. The lower wins."""
    up = low + (high - low) * min(1.0, step / warmup)
    start = warmdown_start(total, warmdown_ratio)
    down = high if step <= start else high - (high - final) * (step - start) / (total - start)
    return min(up, down)


def weight_decay_multiplier(step, total):
    """Cosine from 1 to 0: late steps are small, and decay must not outlast them."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
