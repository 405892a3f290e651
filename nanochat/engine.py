"""
The engine: token ids in, token ids out, one at a time, with the calculator in between.

    engine = Engine(tokenizer)
    for token in engine.generate(PlainStream(gpt), tokenizer.render_prompt(conversation), max_tokens=256): ...

A *stream* is whatever remembers: `feed(ids, prompt) -> logits (V,)` of the token that follows, and `length`, the tokens fed so far. prompt says
whether they ask something (default), or are only what was said: one with long memory then looks nothing up.
PlainStream below is a KV cache; a session of the long memory is another. The engine never asks which one it has.

The idea: a token is fed only when the one after it is wanted. So nothing is computed after the last token, tokens that the
calculator forces cost no forward of their own, and whoever continues (the next turn) feeds what is still waiting. How much
that is, `stream.length` says, also when a reader walks away in the middle.

B = rows of a batch, P = prompts, N = tokens, V = vocabulary
"""

import random
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.decode import StaticDecode
from nanochat.kv_cache import KVCache


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a token

@dataclass(frozen=True)
class Sampler:
    """
    How a token is chosen from logits: divide by temperature, keep the top_k likeliest, then the fewest of them that
    hold top_p of the mass, draw one. Temperature 0 takes the likeliest. One uniform number decides a draw, and the
    caller brings it: a seed means the same text on any device and in any batch.
    """
    temperature: float = 1.0
    top_k: int | None = None   # None = all
    top_p: float | None = None # None = all

    def __post_init__(self):
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature is {self.temperature}: expected 0 (always the likeliest token) up to 100")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: expected 1 or more, or None for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected more than 0 and at most 1, or None for everything")

    def choose(self, logits, draws):
        """logits (B, V), draws a list of B numbers in [0, 1) -> list of B token ids."""
        if self.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        logits = logits.float()
        ids = None # None = logits are in the order of the vocabulary
        if self.top_k is not None and self.top_k < logits.size(-1):
            logits, ids = logits.topk(self.top_k, dim=-1) # sorted, likeliest first
        elif self.top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(logits / self.temperature, dim=-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0.0) # the mass before a token says whether it is needed
        mass = p.cumsum(dim=-1)
        aim = sent(draws, mass.device).to(mass.dtype)[:, None] * mass[:, -1:]
        # right=True: the first token whose mass reaches past the aim, so never one of probability 0. In fp32 a draw can round
        # up to the whole mass, and would then point past the end
        place = torch.searchsorted(mass, aim, right=True)
        place = torch.minimum(place, (mass < mass[:, -1:]).sum(dim=-1, keepdim=True))
        tokens = (place if ids is None else ids.gather(-1, place)).squeeze(-1)
        tokens = tokens.masked_fill(~mass[:, -1].isfinite(), -1).tolist() # all that is asked of the device in one answer
        assert min(tokens) >= 0, "the model gave logits that are not numbers"
        return tokens


def sent(numbers, device):
    """A tensor of them on a device. Python does not wait until a GPU has come so far: that takes memory which cannot be moved."""
    tensor = torch.tensor(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def row_seed(seed, prompt, sample):
    """The seed under which generate() gives the same tokens as sample number `sample` of prompt number `prompt` in a batch."""
    return f"{seed}/{prompt}/{sample}"


# ---------------------------------------------------------------------------------------------------------------------
# The calculator, as the model sees it

class CalculatorTool:
    """Watches the tokens that the model chose; after python_start ... python_end it answers with tokens to force."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.special("<|python_start|>"), tokenizer.special("<|python_end|>")
        self.before, self.after = tokenizer.special("<|output_start|>"), tokenizer.special("<|output_end|>")
        self.expression = None # ids since python_start; None = not inside

    def answer(self, token):
        """The tokens to force after this one, most often none."""
        if token == self.start:
            self.expression = []
        elif self.expression is not None and token != self.end:
            self.expression.append(token)
        elif self.expression is not None:
            value = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if value is not None:
                return [self.before, *self.tokenizer.encode(value), self.after]
        return []


# ---------------------------------------------------------------------------------------------------------------------
# A stream without memory beyond the context

class PlainStream:
    """
    A GPT behind one KV cache. Feeding in pieces equals feeding at once.

    When it overflows: once the fed tokens no longer fit into `capacity`, it forgets the oldest ones, keeps the very first
    token (the bos that all of training had in front) and the latest ones, up to three quarters of the capacity, and reads
    those again from position 0. `dropped` says how many tokens are forgotten, `length` still counts them.
    Keeping the first: attention sinks, Xiao et al., 2023.
    """

    def __init__(self, gpt, capacity=None, static=False):
        """static: decode in steps of fixed shape (decode.py), recorded once and replayed on CUDA; elsewhere slower."""
        capacity = gpt.config.seq_len if capacity is None else capacity
        if not 4 <= capacity <= gpt.config.seq_len:
            raise ValueError(f"capacity is {capacity}: expected 4 to {gpt.config.seq_len}, the longest row this model was trained on")
        self.gpt, self.capacity = gpt, capacity
        self.cache = KVCache(gpt.config, 1, capacity, gpt.device, gpt.dtype)
        self.decode = StaticDecode(gpt, self.cache) if static else None
        self.kept = []  # the ids in the cache
        self.length = 0 # tokens fed so far

    @property
    def dropped(self):
        return self.length - len(self.kept)

    def view(self):
        """What a person wants to see: the stretch of history that the model reads now."""
        spans = [dict(level=0, start=self.dropped, stop=self.length, score=0.0)] if self.length else []
        return dict(spans=spans, tokens=self.length, budget=self.capacity, used=len(self.kept))

    def skim(self, ids):
        """What of a prompt need not be read is taken in before feed() has the rest; here that is nothing: what is not read is not known."""
        yield from ()

    @torch.no_grad()
    def feed(self, ids, prompt=True):
        """ids, at least one -> logits (V,) of the token that follows. A prompt is read like anything else here."""
        if len(ids) == 0:
            raise ValueError("nothing to feed: expected at least one token id")
        kept = self.kept + list(ids)
        new = kept[len(self.kept):]
        if len(kept) > self.capacity:
            keep = self.capacity - self.capacity // 4
            kept = new = kept[:1] + kept[1 - keep:]
            self.cache.rewind(0)
            self.kept = [] # as the cache, should what follows be interrupted
        new = sent([new], self.gpt.device)
        decoding = self.decode is not None and new.size(1) == 1 and self.cache.length > 0
        logits = self.decode.step(new)[0] if decoding else self.gpt.extend(new, self.cache)[0]
        self.kept = kept
        self.length += len(ids)
        return logits

    def mark(self):
        """This moment, for rewind()."""
        return list(self.kept), self.length

    def rewind(self, mark):
        """Back to a mark. What was forgotten since then is read again; costs nothing if nothing was."""
        kept, length = mark
        same = self.kept[:len(kept)] == kept
        self.kept, self.length = list(kept), length
        self.cache.rewind(len(kept) if same else 0)
        if kept and not same:
            with torch.no_grad():
                self.gpt.extend(torch.tensor([kept], device=self.gpt.device), self.cache)


class LeftPadded:
    """
    Prompts of different lengths in one KV cache. Short ones are pushed right, so that all end in the same column; what
    stands to their left is seen by nobody, and positions count from each row's own first token.
    """

    def __init__(self, gpt, prompts, room, static=False):
        """
        prompts: P lists of ids, read when `read()` is called; room: tokens that may follow the longest one; static: steps of fixed shape, as in
        PlainStream, recorded anew for each choice of rows.
        """
        self.gpt, self.static, self.decode = gpt, static, None
        self.width = max(len(prompt) for prompt in prompts)
        self.pad = torch.tensor([self.width - len(prompt) for prompt in prompts], device=gpt.device) # (B,)
        self.ids = torch.tensor([[-1] * (self.width - len(prompt)) + list(prompt) for prompt in prompts], device=gpt.device)
        self.ragged = len({len(prompt) for prompt in prompts}) > 1
        self.cache = KVCache(gpt.config, len(prompts), self.width + room, gpt.device, gpt.dtype)

    def read(self):
        """All prompts in one forward -> logits (B, V)."""
        place = torch.arange(self.width, device=self.gpt.device)
        seen = (place[None, :] >= self.pad[:, None])[:, None, None, :] & (place[:, None] >= place[None, :])
        seen = seen | torch.eye(self.width, dtype=torch.bool, device=self.gpt.device) # padding sees itself: no empty softmax
        return self._forward(self.ids, place, seen if self.ragged else "causal")

    def step(self, tokens):
        """One token for each row -> logits (B, V)."""
        ids = sent(tokens, self.gpt.device)[:, None]
        if self.static:
            self.decode = self.decode or StaticDecode(self.gpt, self.cache, self.pad)
            return self.decode.step(ids)
        place = torch.arange(self.cache.length + 1, device=self.gpt.device)
        seen = (place[None, :] >= self.pad[:, None])[:, None, None, :]
        return self._forward(ids, place[-1:], seen if self.ragged else "all")

    def _forward(self, ids, place, see):
        entries = self.gpt.embed(ids, self.cache.remember(ids))
        positions = place[None, :] - self.pad[:, None] # (B, N); the padding stands below zero
        return self.gpt.head(self.gpt.trunk(entries, positions, see, self.cache, last=True)[:, -1])

    def rows(self, rows):
        """Go on with these rows only; a row may be named more than once."""
        rows, cache = torch.tensor(rows, device=self.gpt.device), self.cache
        self.pad, cache.ids = self.pad[rows], cache.ids[rows]
        cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]
        self.decode = None # it has the shape and the memory of the rows before


# ---------------------------------------------------------------------------------------------------------------------
# The engine

@dataclass
class Reply:
    """One sample of a batch."""
    ids: list = field(default_factory=list)  # what came after the prompt, without the stop token
    mask: list = field(default_factory=list) # 1 = the model chose it, 0 = the calculator forced it
    stop: int | None = None                  # the token that ended it; None = max_tokens did


class Engine:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stops = {tokenizer.special("<|assistant_end|>"), tokenizer.bos}

    def check(self, logits):
        """Logits of the tokens that exist: a model's vocabulary may be padded, never smaller than the tokenizer's."""
        have, need = logits.size(-1), self.tokenizer.vocab_size
        if have < need:
            raise ValueError(f"the model knows {have} tokens and the tokenizer {need}: they do not belong together")
        return logits[..., :need]

    def generate(self, stream, ids, max_tokens=None, temperature=1.0, top_k=None, top_p=None, seed=0):
        """
        Feed ids, then yield token after token, those of the calculator included, until assistant_end or bos (not yielded)
        or max_tokens of them (None = no limit; the stream says what happens when it is full). seed None = another text each time.
        """
        sampler = Sampler(temperature, top_k, top_p)
        if len(ids) == 0:
            raise ValueError("nothing to continue: expected at least one token id, such as the bos")
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens}: expected 0 or more, or None for no limit")
        return self._generate(stream, list(ids), max_tokens, sampler, random.Random(seed))

    def _generate(self, stream, waiting, max_tokens, sampler, rng):
        tool, forced, count = CalculatorTool(self.tokenizer), deque(), 0
        while max_tokens is None or count < max_tokens:
            if forced:
                token = forced.popleft()
            else:
                logits = self.check(stream.feed(waiting, prompt=count == 0)) # later it is what was said, and what the calculator forced
                waiting = []
                token = sampler.choose(logits[None], [rng.random()])[0]
                if token in self.stops:
                    return
                forced.extend(tool.answer(token))
            waiting.append(token)
            count += 1
            yield token

    @torch.no_grad()
    def generate_batch(self, gpt, prompts, num_samples=1, max_tokens=256, temperature=1.0, top_k=None, top_p=None, seed=0, first=(0, 0), static=None):
        """
        Every prompt num_samples times, all in lock-step -> for each prompt a list of num_samples Reply.
        The same tokens as generate() over a PlainStream, one by one, with row_seed(seed, prompt number, sample number).
        There is no overflow here: prompt and max_tokens together must fit into the model's context.
        first: the numbers that count from here, where this is a piece of a larger batch and is to say what that would say.
        static: decode in steps of fixed shape (None = on CUDA, where they are recorded; elsewhere they are slower).
        """
        sampler, P = Sampler(temperature, top_k, top_p), len(prompts)
        longest = max((len(prompt) for prompt in prompts), default=0)
        if P == 0 or num_samples < 1 or max_tokens < 1 or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError(f"nothing to do: expected prompts of at least one token, num_samples and max_tokens of at least 1, "
                             f"got {P} prompts, {num_samples} samples, {max_tokens} tokens")
        if longest + max_tokens > gpt.config.seq_len:
            raise ValueError(f"the longest prompt has {longest} tokens and {max_tokens} may follow, but the model reads "
                             f"{gpt.config.seq_len}: shorten the prompts or lower max_tokens")
        rows = [Row(self, random.Random(row_seed(seed, first[0] + p, first[1] + s))) for p in range(P) for s in range(num_samples)]
        batch = LeftPadded(gpt, prompts, max_tokens, gpt.device.type == "cuda" if static is None else static)
        spread = [p for p in range(P) for _ in range(num_samples)]
        logits = self.check(batch.read())[spread] # a prompt is read once, however many samples it has
        if num_samples > 1:
            batch.rows(spread)
        live = rows # the rows of the batch; some may be done already
        for count in range(1, max_tokens + 1):
            tokens = sampler.choose(logits, [row.rng.random() if not row.wants else 0.5 for row in live])
            tokens = [row.take(token) for row, token in zip(live, tokens)]
            going = [i for i, row in enumerate(live) if not row.done]
            if not going or count == max_tokens:
                break
            if len(going) <= len(live) // 2: # the done ones are thrown out when they are half: the copy is paid back
                batch.rows(going)
                live, tokens = [live[i] for i in going], [tokens[i] for i in going]
            logits = self.check(batch.step(tokens))
        replies = [row.reply for row in rows]
        return [replies[p * num_samples:(p + 1) * num_samples] for p in range(P)]


class Row:
    """One row of a batch: its own calculator, its own chance, its own end."""

    def __init__(self, engine, rng):
        self.stops, self.rng, self.tool = engine.stops, rng, CalculatorTool(engine.tokenizer)
        self.wants = deque() # tokens that the calculator forces
        self.reply, self.done = Reply(), False

    def take(self, token):
        """The token that really comes next, given the one that was drawn. After the end: any, nobody looks."""
        if self.done:
            return token
        chosen = not self.wants
        if not chosen:
            token = self.wants.popleft()
        elif token in self.stops:
            self.reply.stop, self.done = token, True
            return token
        else:
            self.wants.extend(self.tool.answer(token))
        self.reply.ids.append(token)
        self.reply.mask.append(int(chosen))
        return token
