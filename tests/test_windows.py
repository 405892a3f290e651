"""Layers that look back a short way: the same answer as a dense mask wherever the plain GPT runs, without the mask's memory and work."""
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanochat import checkpoint, cost
from nanochat.attention import Recent, attend, in_window
from nanochat.common import UserError
from nanochat.core_eval import make_row, read_rows
from nanochat.decode import StaticDecode
from nanochat.engine import LeftPadded, PlainStream
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from scripts.load import build, describe, load_stage, open_stream
from tests.fakes import ByteTokenizer, random_gpt
from tests.tiny_run import make_run

VOCAB, BOS = ByteTokenizer.vocab_size, ByteTokenizer().bos
WINDOW = 7


def windowed(seed=0, seq_len=64):
    """Layers S, S, L, S, L: the third is long by the pattern, the last because it is the last."""
    return random_gpt(seq_len, seed, layers=5, bos=BOS, windows="SSL", short_window=WINDOW)


def slow_logits(gpt, ids):
    """ids (1, N), every layer through a dense mask of its own, one pair of places at a time."""
    N, short = ids.size(1), [0, 1, 3]
    masks = [torch.tensor([[j <= i and (layer not in short or i - j < WINDOW) for j in range(N)] for i in range(N)])[None, None] for layer in range(5)]
    gpt.views = lambda see, positions, cache: masks
    try:
        return gpt(ids)
    finally:
        del gpt.views


def draw(B, heads, n, d=16):
    return torch.randn(B, heads, n, d, requires_grad=True)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

@pytest.mark.parametrize("queries, keys, window", [(300, 300, 64), (64, 64, 64), (100, 100, 200), (65, 65, 64), (1, 300, 64), (1, 5, 64), (7, 300, 64), (150, 300, 64), (130, 131, 1)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_window_pieces_are_the_dense_mask(queries, keys, window, kv_heads):
    q, k, v = draw(2, 4, queries), draw(2, kv_heads, keys), draw(2, kv_heads, keys)
    see = in_window(torch.arange(keys - queries, keys), torch.arange(keys), window)[None, None]
    fast, slow = attend(q, k, v, Recent(window)), attend(q, k, v, see)
    torch.testing.assert_close(fast, slow)
    ahead = torch.randn_like(fast)
    torch.testing.assert_close(torch.autograd.grad(fast, (q, k, v), ahead), torch.autograd.grad(slow, (q, k, v), ahead), atol=1e-4, rtol=1e-4)


def test_a_window_by_hand():
    """Equal keys, so a query averages the values it sees: with a window of 2, its own and the one before."""
    q, v = torch.zeros(1, 1, 4, 16), torch.tensor([1.0, 2, 4, 8])[None, None, :, None].expand(1, 1, 4, 16)
    assert attend(q, q, v, Recent(2))[0, 0, :, 0].tolist() == [1, 1.5, 3, 6]


class Largest(TorchDispatchMode):
    """The most elements of any tensor made, masks and scores included."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_windows_save_memory_and_work():
    """Elsewhere a windowed layer built a mask over all of the row, and computed all of it: the window cost more than it saved."""
    T, W, d = 2048, 128, 16
    q = torch.randn(1, 1, T, d)
    with torch.no_grad(), Largest() as largest, FlopCounterMode(display=False) as flops:
        attend(q, q, q, Recent(W))
    assert largest.elements == T * d < T * T // 100
    half = W // 2 # a piece of queries, and the keys before it: none for the first, half a window for the second, then a window
    assert flops.get_total_flops() == 4 * d * half * (half + W + (T // half - 2) * (W + half)) < 0.1 * 4 * d * T * T


# ---------------------------------------------------------------------------------------------------------------------
# The GPT

@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_the_dense_mask(seed):
    gpt, ids = windowed(seed), torch.randint(VOCAB, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids), slow_logits(gpt, ids), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(gpt(ids), random_gpt(64, seed, layers=5, bos=BOS)(ids), atol=1e-2), "the window must matter in this test"


@pytest.mark.parametrize("cuts", [[60], [1] * 60, [7, 1, 30, 22], [59, 1], [1, 40, 19]])
def test_reading_in_chunks_is_reading_at_once(cuts):
    gpt, ids, at = windowed(), torch.randint(VOCAB, (2, 60)), 0
    whole, cache = torch.cat([slow_logits(gpt, row[None]) for row in ids]), KVCache(gpt.config, 2, 60)
    for n in cuts:
        logits = gpt.extend(ids[:, at:at + n], cache)
        at += n
        torch.testing.assert_close(logits, whole[:, at - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
def test_a_stream_with_overflows_is_a_row_read_anew(static):
    rng, gpt = random.Random(0), windowed()
    stream = PlainStream(gpt, 48, static)
    for _ in range(40):
        logits = stream.feed([rng.randrange(VOCAB) for _ in range(rng.choice([1, 1, 1, 5, 12]))])
        torch.testing.assert_close(logits, slow_logits(gpt, torch.tensor([stream.kept]))[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lengths", [(30, 4, 17), (12, 12)])
def test_padded_rows_are_rows_alone(lengths, static):
    gpt = windowed()
    rows = [[BOS, *torch.randint(VOCAB - 1, (n - 1,)).tolist()] for n in lengths]
    alone = lambda: torch.cat([slow_logits(gpt, torch.tensor([row]))[:, -1] for row in rows])
    with torch.no_grad():
        batch = LeftPadded(gpt, rows, 20)
        torch.testing.assert_close(batch.read(), alone(), atol=1e-4, rtol=1e-4)
        decode = StaticDecode(gpt, batch.cache, batch.pad)
        for step in range(12):
            tokens = [3 + step + n for n in range(len(rows))]
            for row, token in zip(rows, tokens):
                row.append(token)
            logits = decode.step(torch.tensor(tokens)[:, None]) if static else batch.step(tokens)
            torch.testing.assert_close(logits, alone(), atol=1e-4, rtol=1e-4)


def test_endings_that_share_a_beginning_are_rows_alone():
    """Here columns are no distances: the second ending stands far behind the beginning that it continues."""
    gpt, start = windowed(), [BOS, *range(20)]
    sequences = [(start + ending, len(start)) for ending in ([30, 31, 32, 33], [40, 41], [50, 51, 52])]
    with torch.no_grad():
        got = read_rows(gpt, [make_row(sequences, 0)], VOCAB)[0]
        for (ids, first), (nats, _) in zip(sequences, got):
            losses = -torch.log_softmax(slow_logits(gpt, torch.tensor([ids[:-1]]))[0], -1)[range(first - 1, len(ids) - 1), ids[first:]]
            assert nats == pytest.approx(losses.mean().item(), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The setting

def test_windows_by_pattern():
    config = GPTConfig.from_depth(12, 64, windows="SSSL")
    assert config.short_layers == [0, 1, 2, 4, 5, 6, 8, 9, 10] and config.short_window == 512
    assert GPTConfig.from_depth(5, 64, windows="SSSL").short_layers == [0, 1, 2], "the last layer is long by the pattern already"
    assert GPTConfig.from_depth(6, 64, 600, windows="S").short_layers == [0, 1, 2, 3, 4] # and here because it is the last
    assert GPTConfig.from_depth(6, 64, 600, windows="S").short_window == 256 and GPTConfig.from_depth(6, 64, 64, windows="S").short_window == 128
    for wrong in ("", "SSX", "sssl"):
        with pytest.raises(UserError, match="SSSL"):
            GPTConfig.from_depth(4, 64, windows=wrong)


def test_longer_rows_keep_the_window(base):
    """Mid-training may read rows twice as long: the window that base training taught stays."""
    make_run("base", memory=False, windows="SL")
    assert load_stage("base").gpt.config.short_window == 128
    longer = load_stage("base", seq_len=2048).gpt.config
    assert (longer.seq_len, longer.short_window, longer.windows) == (2048, 128, "SL")


def test_checkpoints_from_before_windows(base):
    """They have no such field: they load as long throughout, and a run that is resumed from one is the same run."""
    old = dict(vocab_size=64, seq_len=128, layers=4, heads=2, kv_heads=2, width=32, bos=-1, previous=3)
    config = GPTConfig(**old)
    assert config.windows == "L" and config.short_layers == [] and config.to_dict() == old
    checkpoint.check_match(dict(gpt=old), gpt=GPTConfig(**old, windows="L").to_dict())
    with pytest.raises(UserError, match="windows"):
        checkpoint.check_match(dict(gpt=old), gpt=GPTConfig(**old, windows="SSSL").to_dict())
    short = GPTConfig(**old, windows="SSSL")
    assert GPTConfig(**short.to_dict()) == short


def test_memory_and_short_windows_are_refused_together(base):
    with pytest.raises(UserError, match="gists are read in every layer.*--plain"):
        build(GPTConfig.from_depth(4, 64, windows="SSSL"), memory=True)
    make_run("sft", memory=False, windows="SL")
    loaded = load_stage("sft")
    with pytest.raises(UserError, match=r"short windows \(SL\).*--no-memory") as told:
        open_stream(loaded)
    assert "\n" not in str(told.value)
    ids = [5 + i % 100 for i in range(400)]
    with torch.no_grad():
        torch.testing.assert_close(open_stream(loaded, memory=False).feed(ids), loaded.gpt(torch.tensor([ids]))[0, -1], atol=1e-4, rtol=1e-4)
    assert describe(*loaded.modules.values(), None, None, loaded.tokenizer)["gpt"]["windows"] == "SL"


def test_costs_count_the_windows():
    """d4 with SSSL over rows of 2048: three layers read 512 entries, one reads 2048."""
    long, short = GPTConfig.from_depth(4, 64), GPTConfig.from_depth(4, 64, windows="SSSL")
    assert cost.entries_seen(short, 2048) == 3 * 512 + 2048 and cost.entries_seen(long, 2048) == 4 * 2048
    assert cost.entries_seen(short, 100) == 400, "a window is no longer than what is there"
    assert cost.train_flops(long) - cost.train_flops(short) == 3 * 4 * 256 * 3 * (2048 - 512)
    assert cost.decode_bytes(long, 2, 2048) - cost.decode_bytes(short, 2, 2048) == 2 * 3 * (2048 - 512) * 2 * 256 * 2
    assert cost.parameter_counts(long) == cost.parameter_counts(short) == cost.count_by_role(GPT(short))
