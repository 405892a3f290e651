"""Small stand-ins that tests share: a tokenizer of bytes, a GPT with random weights, a stream that speaks from a script."""

import math
import time

import torch

from megacontext.telemetry import Telemetry
from nanochat.gpt import GPT, GPTConfig

SPECIALS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>",
            "<|output_start|>", "<|output_end|>"]


class ByteTokenizer:
    """One token per byte of UTF-8, then the nine specials. Speaks as nanochat.tokenizer.Tokenizer does."""
    vocab_size = 256 + len(SPECIALS)
    bos = 256
    fingerprint = "bytes" * 10

    def special(self, name):
        return 256 + SPECIALS.index(name)

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode_bytes(self, ids):
        return b"".join(bytes([i]) if i < 256 else SPECIALS[i - 256].encode() for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_prompt(self, conversation):
        ids = [self.bos]
        for message in conversation["messages"]:
            ids += [self.special(f"<|{message['role']}_start|>"), *self.encode(message["content"]), self.special(f"<|{message['role']}_end|>")]
        return ids + [self.special("<|assistant_start|>")]


def random_gpt(seq_len=64, seed=0, vocab_size=ByteTokenizer.vocab_size, layers=3, width=32, bos=-1, windows="L", short_window=0):
    """A tiny GPT where every weight is random: a fresh one has zeros where a bug could hide."""
    gpt = GPT(GPTConfig(vocab_size, seq_len, layers=layers, heads=2, kv_heads=1, width=width, bos=bos, windows=windows, short_window=short_window)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if p.dim() > 1:
                scale = 1.0 if "embed_table" in name or "value_tables" in name else 2.0 if "lm_head" in name else 1.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale / (1.0 if "table" in name else p.size(1) ** 0.5))
    return gpt


class ScriptedStream:
    """
    A stream whose model has learned one text by heart: whatever is fed, the next token is the next of `script`.
    Keeps what it was fed, feed by feed, so that a test can see what each token cost; `asked` are the feeds that were a prompt.
    """

    def __init__(self, script, vocab_size=ByteTokenizer.vocab_size, prompt_length=None):
        self.script, self.vocab_size = list(script), vocab_size
        self.prompt_length = prompt_length # None: the first feed is the prompt
        self.feeds, self.asked, self.length = [], [], 0

    def skim(self, ids):
        yield from ()

    def feed(self, ids, prompt=True):
        self.feeds.append(list(ids))
        self.asked += [list(ids)] if prompt else []
        self.length += len(ids)
        if self.prompt_length is None:
            self.prompt_length = self.length
        logits = torch.full((self.vocab_size,), -10.0)
        logits[self.script[self.length - self.prompt_length]] = 10.0
        return logits


class FakeMemory:
    """
    A stream that looks like a session with long memory: it answers every turn with the same words, and has a view with levels
    and scores made up from its length. A prompt is taken in by stretches as long as there is more than one. `pause` seconds a stretch, and a feed,
    make it as slow as a test wants.
    """

    def __init__(self, answer, pause=0.0, budget=256, stretch=8192):
        tokenizer = ByteTokenizer()
        self.start, self.pause, self.budget, self.stretch = tokenizer.special("<|assistant_start|>"), pause, budget, stretch
        self.answer = [*tokenizer.encode(answer), tokenizer.special("<|assistant_end|>")]
        self.fed, self.saved, self.said, self.telemetry = [], [], 0, Telemetry()

    @property
    def length(self):
        return len(self.fed)

    def skim(self, ids):
        for done in range(self.stretch, len(ids), self.stretch):
            time.sleep(self.pause)
            self.fed += ids[done - self.stretch:done]
            yield done

    def feed(self, ids, prompt=True):
        time.sleep(self.pause)
        self.fed += ids
        self.said = 0 if ids[-1] == self.start else self.said + 1
        logits = torch.full((ByteTokenizer.vocab_size,), -10.0)
        logits[self.answer[min(self.said, len(self.answer) - 1)]] = 10.0
        return logits

    def view(self):
        """Level 2 for the far past, then level 1, then raw; some blocks in between opened."""
        spans, at, n = [], 0, self.length
        while at < n:
            left = n - at
            level = 2 if left > 4096 and at % 1024 == 0 else 1 if left > 192 and at // 32 % 9 != 4 and at % 32 == 0 else 0
            width = min(32 ** max(level, 1), left)
            spans.append(dict(level=level, start=at, stop=at + width, score=round(math.sin(at / 700) * 0.6, 3)))
            at += width
        used = sum(1 if span["level"] else span["stop"] - span["start"] for span in spans)
        return dict(spans=spans, tokens=n, budget=max(self.budget, used), used=used)

    def save(self, folder):
        self.saved.append(folder)

    def mark(self):
        return len(self.fed)

    def rewind(self, mark):
        del self.fed[mark:]


class FakeLoaded:
    """What scripts.load.load_stage returns, as far as the chat scripts look."""

    def __init__(self, gpt=None):
        self.gpt, self.tokenizer, self.meta, self.stage, self.tag = gpt, ByteTokenizer(), {"step": 7}, "sft", "tiny"
        self.gistnet = self.lensnet = None
