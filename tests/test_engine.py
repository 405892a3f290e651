"""The engine: sampling, the calculator between tokens, what is fed and when, and batches that equal one at a time."""

import random
from types import SimpleNamespace

import pytest
import torch

import nanochat.engine as engine_module
from nanochat.decode import StaticDecode
from nanochat.engine import CalculatorTool, Engine, LeftPadded, PlainStream, Sampler, row_seed
from nanochat.gpt import GPT
from tests.fakes import ByteTokenizer, ScriptedStream, random_gpt

tokenizer = ByteTokenizer()
engine = Engine(tokenizer)
END, PY, PY_END = (tokenizer.special(f"<|{name}|>") for name in ("assistant_end", "python_start", "python_end"))
OUT, OUT_END = tokenizer.special("<|output_start|>"), tokenizer.special("<|output_end|>")
BOS = tokenizer.bos


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.parametrize("seed", range(30))
def test_a_draw_stays_in_the_nucleus_and_follows_the_probabilities(seed):
    """Against the slow obvious version: sort, cut, normalise, and count 4,000 evenly spaced draws."""
    rng = random.Random(seed)
    V = rng.randrange(2, 12)
    logits = torch.tensor([rng.gauss(0, 2) for _ in range(V)])
    temperature = rng.choice([0.3, 1.0, 2.5])
    top_k = rng.choice([None, 1, 3, V, V + 5])
    top_p = rng.choice([None, 0.1, 0.6, 0.95, 1.0])

    p = torch.softmax(logits.double() / temperature, 0).tolist()
    order = sorted(range(V), key=lambda i: -p[i])[:top_k or V]
    total, mass, nucleus = sum(p[i] for i in order), 0.0, []
    for i in order:
        if mass >= (top_p or 1.0):
            break
        nucleus.append(i)
        mass += p[i] / total
    truth = [p[i] / sum(p[j] for j in nucleus) if i in nucleus else 0.0 for i in range(V)]

    n = 4000
    drawn = Sampler(temperature, top_k, top_p).choose(logits.expand(n, V), [(i + 0.5) / n for i in range(n)])
    shares = [drawn.count(i) / n for i in range(V)]
    assert max(abs(a - b) for a, b in zip(shares, truth)) <= 2 / n, (shares, truth)


@pytest.mark.parametrize("top_k, top_p", [(None, None), (3, None), (None, 0.9), (3, 0.9)])
def test_no_draw_points_past_the_end_or_at_the_impossible(top_k, top_p):
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, 17], logits[0, 400] = 0.0, 1.0
    for draw in (0.0, 0.5, 1 - 2 ** -53):
        assert Sampler(1.0, top_k, top_p).choose(logits, [draw])[0] in (17, 400)
    uniform = torch.zeros(1, 32768) # a cumulative sum of many small numbers
    assert 0 <= Sampler(1.0, top_k, top_p).choose(uniform, [1 - 2 ** -53])[0] < 32768


def test_temperature_zero_is_the_likeliest():
    logits = torch.randn(50, 99, generator=torch.Generator().manual_seed(1))
    assert Sampler(0.0).choose(logits, [0.9] * 50) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_a_wrong_setting_is_told_before_anything_is_fed(bad):
    stream = ScriptedStream([END])
    with pytest.raises(ValueError, match="expected"):
        engine.generate(stream, [BOS], **bad)
    assert stream.feeds == []


def test_not_a_number_is_not_sampled():
    with pytest.raises(AssertionError, match="not numbers"):
        Sampler(1.0).choose(torch.full((1, 5), float("nan")), [0.5])


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def test_no_forward_is_wasted():
    """nanochat's engine ran the model once more after the last token. Here n tokens take n feeds, a forced one takes none."""
    stream = ScriptedStream(tokenizer.encode("abcdefgh"))
    assert list(engine.generate(stream, [BOS, 1, 2], max_tokens=3)) == tokenizer.encode("abc")
    assert stream.feeds == [[BOS, 1, 2], [97], [98]]
    stream = ScriptedStream(tokenizer.encode("ab") + [END])
    assert list(engine.generate(stream, [BOS])) == tokenizer.encode("ab")
    assert stream.feeds == [[BOS], [97], [98]]
    stream = ScriptedStream([END])
    assert list(engine.generate(stream, [BOS], max_tokens=0)) == [] and stream.feeds == []


@pytest.mark.parametrize("stop", [END, BOS])
def test_it_stops_at_the_end_of_a_turn(stop):
    assert list(engine.generate(ScriptedStream([65, stop, 66]), [BOS])) == [65]


def test_bos_alone_is_a_prompt():
    """nanochat refused a prompt of one token."""
    stream = PlainStream(random_gpt())
    assert len(list(engine.generate(stream, [BOS], max_tokens=5, temperature=0))) <= 5
    assert stream.length >= 1
    with pytest.raises(ValueError, match="at least one"):
        engine.generate(stream, [])


def test_the_calculator_answers_in_between():
    said = [*tokenizer.encode("so "), PY, *tokenizer.encode("12*12"), PY_END]
    forced = [OUT, *tokenizer.encode("144"), OUT_END]
    script = said + forced + tokenizer.encode(" ok") + [END] # the model would never say 144 by itself: those entries are skipped
    stream = ScriptedStream(script)
    assert list(engine.generate(stream, [BOS], temperature=0)) == said + forced + tokenizer.encode(" ok")
    assert [PY_END] + forced in stream.feeds, "what the calculator forces goes in with one feed"
    assert stream.length == 1 + len(said) + len(forced) + 3


@pytest.mark.parametrize("inside", ["1/0", "import os", "", "2**99"])
def test_what_the_calculator_refuses_gets_no_output(inside):
    said = [PY, *tokenizer.encode(inside), PY_END, 65]
    assert list(engine.generate(ScriptedStream(said + [END]), [BOS], temperature=0)) == said


def test_the_calculator_survives_a_careless_model():
    tool = CalculatorTool(tokenizer)
    assert [tool.answer(t) for t in (PY_END, PY, 49, PY, 50)] == [[]] * 5 # an end without a start; a start inside
    assert tool.answer(PY_END) == [OUT, 50, OUT_END]
    assert tool.answer(PY_END) == []


@pytest.mark.parametrize("walked_away_after", range(1, 12))
def test_length_says_what_still_waits(walked_away_after):
    """A reader may leave at any token, also in the middle of a forced answer: what was not fed is told by stream.length."""
    script = [65, PY, *tokenizer.encode("6*7"), PY_END, OUT, *tokenizer.encode("42"), OUT_END, 66, END]
    stream = ScriptedStream(script)
    prompt, said = [BOS, 1, 2], []
    for token in engine.generate(stream, prompt, temperature=0):
        said.append(token)
        if len(said) == walked_away_after:
            break
    fed = [token for feed in stream.feeds for token in feed]
    assert stream.length == len(fed)
    assert fed == (prompt + said)[:stream.length]
    assert len(prompt + said) > stream.length, "the last token is never fed"


def test_a_seed_repeats_itself():
    gpt = random_gpt()
    def say(seed):
        return list(engine.generate(PlainStream(gpt), [BOS, 5], max_tokens=30, temperature=1.0, seed=seed))
    assert say(1) == say(1)
    assert len({tuple(say(seed)) for seed in range(8)}) > 4
    assert len({tuple(say(None)) for seed in range(8)}) > 4


def test_a_tokenizer_of_another_model_is_refused():
    stream = PlainStream(random_gpt(vocab_size=100))
    with pytest.raises(ValueError, match="do not belong together"):
        list(engine.generate(stream, [5], max_tokens=1))


def test_ids_past_the_tokenizer_are_never_drawn():
    """A model may pad its vocabulary; no text belongs to those ids."""
    gpt = random_gpt(vocab_size=tokenizer.vocab_size + 500)
    tokens = list(engine.generate(PlainStream(gpt), [BOS], max_tokens=60, temperature=100.0))
    assert tokens and max(tokens) < tokenizer.vocab_size


# ---------------------------------------------------------------------------------------------------------------------
# The plain stream

@torch.no_grad()
def reread(gpt, ids):
    """The slow twin of the cache: read everything again."""
    return gpt(torch.tensor([ids]))[0, -1]


@pytest.mark.parametrize("seed", range(6))
def test_pieces_equal_the_whole(seed):
    """nanochat's cache gave other logits when a prompt came in chunks, which is what every second turn of a chat is."""
    rng = random.Random(seed)
    gpt = random_gpt(seed=seed, bos=BOS if seed % 2 else -1)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
    stream, at = PlainStream(gpt), 0
    while at < len(ids):
        n = rng.choice([1, 1, 2, 7, 20])
        logits = stream.feed(ids[at:at + n])
        at += n
        torch.testing.assert_close(logits, reread(gpt, ids[:at]), atol=1e-4, rtol=1e-4)
    assert stream.length == len(ids) and stream.dropped == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
@pytest.mark.parametrize("seed", range(6))
def test_steps_of_fixed_shape_equal_the_plain_ones(seed, device):
    """Through prompts, single tokens and overflows; on a GPU the steps are a replayed graph."""
    rng = random.Random(seed)
    gpt = random_gpt(seq_len=64, seed=seed, bos=BOS if seed % 2 else -1).to(device)
    plain, static = PlainStream(gpt, 48), PlainStream(gpt, 48, static=True)
    for _ in range(120):
        new = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.choice([1, 1, 1, 1, 5]))]
        torch.testing.assert_close(static.feed(new), plain.feed(new), atol=1e-4, rtol=1e-4)
    assert static.kept == plain.kept


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
def test_a_step_of_fixed_shape_under_autocast(device):
    """The cache is fp32 and autocast's keys are bf16: evaluating a base model on a GPU ended in its first continuation."""
    gpt = random_gpt(bos=BOS).to(device)
    plain, static = PlainStream(gpt, 48), PlainStream(gpt, 48, static=True)
    for new in ([BOS, 1, 2], [3], [4], [5]):
        with torch.autocast(device, dtype=torch.bfloat16): # what one block has converted is gone in the next
            torch.testing.assert_close(static.feed(new), plain.feed(new), atol=0.05, rtol=0.05)


def test_padded_rows_of_fixed_shape_equal_the_plain_ones():
    gpt, prompts = random_gpt(bos=BOS), [[BOS, 1, 2, 3], [BOS, 4]]
    plain, other = LeftPadded(gpt, prompts, 10), LeftPadded(gpt, prompts, 10)
    with torch.no_grad():
        torch.testing.assert_close(plain.read(), other.read())
        decode = StaticDecode(gpt, other.cache, other.pad)
        for tokens in ([5, 6], [BOS, 7], [8, 9]):
            torch.testing.assert_close(decode.step(torch.tensor(tokens)[:, None]), plain.step(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_overflow_keeps_the_first_and_the_latest(seed):
    """nanochat's cache was overrun when no max_tokens was given. Here any length goes, by the rule that PlainStream states."""
    rng = random.Random(seed)
    gpt = random_gpt(seq_len=64)
    stream = PlainStream(gpt, capacity=rng.choice([4, 5, 16, 31, 64]))
    fed = []
    while len(fed) < 300:
        new = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.choice([1, 1, 3, 40, 200]))]
        fed += new
        logits = stream.feed(new)
        kept = stream.kept
        assert len(kept) <= stream.capacity and stream.cache.length == len(kept)
        assert len(kept) >= min(len(fed), stream.capacity - stream.capacity // 4)
        assert kept[0] == fed[0] and kept[1:] == fed[len(fed) - len(kept) + 1:]
        assert (stream.length, stream.dropped) == (len(fed), len(fed) - len(kept))
        torch.testing.assert_close(logits, reread(gpt, kept), atol=1e-4, rtol=1e-4)


def test_generation_without_a_limit_outlives_the_context():
    gpt = random_gpt(seq_len=16)
    with torch.no_grad():
        gpt.lm_head.weight[END] = gpt.lm_head.weight[BOS] = 0 # logits of 0: unlikely under temperature 0
    tokens = engine.generate(PlainStream(gpt), [BOS], temperature=0)
    assert len([next(tokens) for _ in range(100)]) == 100


def test_an_interrupted_feed_leaves_the_count_right():
    gpt = random_gpt()
    stream = PlainStream(gpt)
    stream.feed([BOS, 1, 2])
    with pytest.raises(IndexError):
        stream.feed([3, 10 ** 6]) # no such token
    assert stream.length == 3
    torch.testing.assert_close(stream.feed([3]), reread(gpt, [BOS, 1, 2, 3]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("capacity", [0, 3, 65])
def test_a_capacity_the_model_was_not_trained_for_is_refused(capacity):
    with pytest.raises(ValueError, match="4 to 64"):
        PlainStream(random_gpt(seq_len=64), capacity)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def talkative_gpt(seed):
    """Random weights with a taste for digits, the calculator and short answers, so that the rows of a batch part ways."""
    gpt = random_gpt(seq_len=96, seed=seed, bos=BOS if seed % 3 else -1)
    taste = torch.zeros(tokenizer.vocab_size)
    taste[[PY, PY_END, 49, 50, 43]] = 7.0
    taste[END] = 5.0
    head = gpt.head
    gpt.head = lambda hidden: 0.3 * head(hidden) + taste
    return gpt


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_batch_equals_one_at_a_time(seed, static):
    """Static: on a GPU batches were decoded step by step, a launch a kernel, where single texts were replayed."""
    rng = random.Random(seed)
    gpt = talkative_gpt(seed)
    prompts = [[BOS] + [rng.randrange(256) for _ in range(rng.choice([0, 1, 5, 30]))] for _ in range(rng.randrange(1, 6))]
    if seed % 2:
        prompts = [prompts[0]] * 3 # no padding at all: another road through the code
    settings = dict(max_tokens=40, temperature=rng.choice([0.0, 0.7, 1.0]), top_k=rng.choice([None, 40]), top_p=rng.choice([None, 0.98]))
    num_samples = rng.choice([1, 3])
    batch = engine.generate_batch(gpt, prompts, num_samples, seed=seed, static=static, **settings)
    assert len(batch) == len(prompts) and all(len(replies) == num_samples for replies in batch)
    for p, prompt in enumerate(prompts):
        for s in range(num_samples):
            alone = list(engine.generate(PlainStream(gpt), prompt, seed=row_seed(seed, p, s), **settings))
            assert batch[p][s].ids == alone, (p, s)
            assert (batch[p][s].stop is None) == (len(alone) == settings["max_tokens"])


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_batch_say_what_the_whole_says(seed):
    gpt, prompts, settings = talkative_gpt(seed), [[BOS], [BOS, 7, 7], [BOS] * 9], dict(max_tokens=30, seed=seed)
    whole = engine.generate_batch(gpt, prompts, 5, **settings)
    for p, s, samples in ((0, 0, 3), (0, 3, 2), (1, 2, 1), (2, 1, 4)):
        assert engine.generate_batch(gpt, prompts[p:], samples, first=(p, s), **settings) == [replies[s:s + samples] for replies in whole[p:]]


def test_batches_on_a_gpu_are_recorded_once_for_each_choice_of_rows(monkeypatch):
    made = []
    monkeypatch.setattr(engine_module, "StaticDecode", lambda gpt, cache, pad: made.append(cache.k.size(1)) or StaticDecode(gpt, cache, pad))
    gpt = talkative_gpt(3)
    plain = engine.generate_batch(gpt, [[BOS]], 64, max_tokens=60)
    assert not made, "not on a CPU, where it would only read more"
    assert engine.generate_batch(gpt, [[BOS]], 64, max_tokens=60, static=True) == plain
    assert made[0] == 64 and len(made) > 2 and all(after <= before // 2 for before, after in zip(made, made[1:]))

    def told(gpt, prompts, room, static):
        raise RuntimeError(f"{gpt.device} {static}")
    monkeypatch.setattr(engine_module, "LeftPadded", told)
    for says in ("cuda True", "cpu False"):
        with pytest.raises(RuntimeError, match=says):
            engine.generate_batch(SimpleNamespace(device=torch.device(says.split()[0]), config=gpt.config), [[BOS]], max_tokens=60)


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [[[BOS, 1, 2], [BOS]], [[BOS, 5]] * 3], ids=["ragged", "even"])
def test_a_recorded_batch_says_what_a_plain_one_does(prompts):
    gpt = random_gpt(seq_len=96, bos=BOS).to("cuda")
    settings = dict(num_samples=4, max_tokens=40, temperature=0.7)
    assert engine.generate_batch(gpt, prompts, **settings) == engine.generate_batch(gpt, prompts, static=False, **settings)


def test_rows_of_a_batch_use_the_calculator_and_say_what_was_forced():
    """The law above means little if no row ever computes or ends early."""
    replies = engine.generate_batch(talkative_gpt(0), [[BOS], [BOS, 7, 7]], 64, max_tokens=60)
    replies = replies[0] + replies[1]
    assert len({len(reply.ids) for reply in replies}) > 5, "rows end at different times"
    computed = [reply for reply in replies if OUT in reply.ids and 0 in reply.mask]
    assert computed, "no row used the calculator"
    for reply in replies:
        assert len(reply.ids) == len(reply.mask)
        forced = [i for i, chosen in enumerate(reply.mask) if not chosen]
        for i in forced:
            assert i - 1 in forced or reply.ids[i - 1] == PY_END
        assert not {END, BOS} & set(reply.ids)


def test_a_batch_runs_no_forward_for_rows_that_are_done(monkeypatch):
    """nanochat went on decoding finished rows. Rows are thrown out as soon as half of a batch is done."""
    seen = []
    forward = GPT.trunk
    monkeypatch.setattr(GPT, "trunk", lambda self, entries, *rest, **named: seen.append(entries.x.shape[:2]) or forward(self, entries, *rest, **named))
    replies = engine.generate_batch(talkative_gpt(3), [[BOS]], 64, max_tokens=60)[0]
    lengths = sorted((len(reply.ids) + (reply.stop is not None) for reply in replies), reverse=True)
    assert seen[0] == (1, 1), "a prompt is read once, whatever the number of samples"
    assert len(seen) == lengths[0], "no forward after the last token"
    for count, (rows, n) in enumerate(seen[1:], start=1):
        alive = sum(length > count for length in lengths)
        assert n == 1 and alive <= rows < 2 * alive + 1, (count, rows, alive)


@pytest.mark.parametrize("prompts, options, message", [
    ([], {}, "nothing to do"), ([[]], {}, "nothing to do"), ([[BOS], []], {}, "nothing to do"), ([[BOS]], dict(num_samples=0), "nothing to do"),
    ([[BOS] * 60], dict(max_tokens=5), "reads 64"),
])
def test_a_batch_that_cannot_be_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate_batch(random_gpt(seq_len=64), prompts, **options)
