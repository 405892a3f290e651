"""
A long text with facts hidden in it: what all long-context tasks are built from.

In:  texts to hide facts in (say, the documents of a data source), facts with a depth each, a length, a random generator.
Out: one text of at most that length, and where in it each fact really stands.

length is in the unit of `measure`, a function from text to a number: `len` counts characters, and
`lambda text: len(tokenizer.encode(text))` counts tokens. The length covers the whole text handed back, so a training row of
1,000 tokens and an evaluation at a million come from the same lines. depth 0 is the start of the text, 1 its end.

The texts are cut once into pieces of whole lines; a haystack is a run of consecutive pieces from a random place, so that
it reads as real text, and wraps round (repeating itself) only when it is longer than all texts together.
"""

import bisect
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tasks.common import GeneratedTask, dialogue, digest, final_text, same_words

PIECE = 1000  # characters: small enough to come close to a length, large enough that a million tokens are few pieces


class Filler:
    """Texts as pieces of whole lines. Pieces are measured when first used, so that a large source costs nothing up front."""

    def __init__(self, texts, measure=len):
        self.texts = [texts] if isinstance(texts, str) else list(texts)
        self.measure = measure
        self.pieces = [(number, start, end) for number, text in enumerate(self.texts) for start, end in cut(text, PIECE)]
        if not self.pieces:
            raise ValueError(f"expected texts to hide facts in, got {len(self.texts)} texts without a line of text")
        self.used = {number for number, _, _ in self.pieces} # texts that are not empty
        self.sizes = np.full(len(self.pieces), -1, dtype=np.int64)

    @cached_property
    def fingerprint(self):
        """Changes when the texts do."""
        return digest(*(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in self.texts))

    def piece(self, n):
        number, start, end = self.pieces[n % len(self.pieces)]
        return self.texts[number][start:end]

    def size(self, n):
        n %= len(self.pieces)
        if self.sizes[n] < 0:
            self.sizes[n] = self.measure(self.piece(n))
        return int(self.sizes[n])

    def take(self, rng, room, avoid=()):
        """
        Consecutive text from a random place, of at most `room` by the sum of its pieces; "" if there is none.
        Texts whose numbers are in `avoid` are left out: they hold the answer.
        """
        assert len(self.used - set(avoid)) > 0 or not avoid, "every text is to be avoided: nothing left to fill with"
        n, out = rng.randrange(len(self.pieces)), []
        while room > 0:
            if self.pieces[n % len(self.pieces)][0] in avoid:
                n += 1
                continue
            size = self.size(n)
            if size > room:
                out.append(shorten(self.piece(n), room, self.measure))
                break
            out.append(self.piece(n))
            room -= size
            n += 1
        return "".join(out)


def cut(text, size):
    """(start, end) of pieces that tile `text`, each at most `size` long and ending at a line, else a sentence, else a word."""
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else break_before(text, start, start + size)
        yield start, end
        start = end


def break_before(text, start, end):
    """The best place in (start, end] to cut: after a line, a sentence, a word; `end` itself if it is one long word."""
    for mark in ("\n", ". ", " "):
        at = text.rfind(mark, start, end)
        if at >= 0:
            return at + len(mark)
    return end


def break_after(text, start, reach=400):
    """Where a line can go in, at or after `start`: after a line or at the end, else after a sentence, else after a word."""
    if start == 0 or text[start - 1] == "\n":
        return start
    line = text.find("\n", start, start + reach)
    if line >= 0:
        return line + 1
    if len(text) - start <= reach:
        return len(text)
    for mark in (". ", " "):
        at = text.find(mark, start, start + reach)
        if at >= 0:
            return at + len(mark)
    return start


def shorten(text, room, measure):
    """The longest run of whole lines (or sentences, or words) from the start of `text` that measures at most `room`."""
    ends = [end for _, end in cut(text, 80)]
    fits = bisect.bisect_right(ends, room, key=lambda end: measure(text[:end]))
    return text[:ends[fits - 1]] if fits else ""


def insert(text, facts):
    """
    Put each fact on a line of its own at its depth. facts: list of (depth, fact) -> the new text and where each fact
    begins in it, in the order given. Facts that meet at one place keep the order of their depths.
    """
    order = sorted(range(len(facts)), key=lambda n: facts[n][0])
    total = len(text) + sum(len(fact) for _, fact in facts)
    out, offsets, done, length = [], [0] * len(facts), 0, 0
    for n in order:
        depth, fact = facts[n]
        assert 0 <= depth <= 1, f"depth {depth} of a fact is outside 0..1"
        # the share of all text that comes before, less the facts that are already in it
        at = min(len(text), max(done, round(depth * total) - (length - done)))
        at = max(done, break_after(text, at))
        before = text[done:at]
        if (before or out) and not (before or out[-1]).endswith("\n"):
            before += "\n"
        offsets[n] = length + len(before)
        out += [before, fact + "\n"]
        length = offsets[n] + len(fact) + 1
        done = at
    out.append(text[done:])
    return "".join(out), offsets


def needed(measure, facts, question, said=""):
    """The length that facts and questions take without any filler."""
    return measure("\n".join([*facts, "", question, said])) + len(facts) + 2  # line ends we may add


def hide(filler, rng, facts, length, question, said="", avoid=()):
    """
    Filler with the facts in it and the question at the end; with `said`, the answer and what may follow it, at most `length`
    long by the filler's measure.
    facts: list of (depth, fact) -> (text, offsets): where in the text each fact begins.
    """
    measure = filler.measure
    needs = needed(measure, [fact for _, fact in facts], question, said)
    room = length - needs
    if room < 0:
        raise ValueError(f"{len(facts)} facts and their questions take {needs}, more than the length of {length}. "
                         "Ask for a longer text or for fewer facts")
    hay = filler.take(rng, room, avoid)
    while True:
        text, offsets = insert(hay, facts)
        if not text.endswith("\n"):
            text += "\n"
        text += "\n" + question
        over = measure(f"{text}\n{said}") - length
        if over <= 0:
            return text, offsets
        # subtle: tokens are not quite additive (a piece cut from its neighbours tokenizes differently); cut and look again
        assert hay, f"{len(facts)} facts alone are {over} longer than {length}"
        keep = max(0, len(hay) - max(1, len(hay) * over // length) - 80)
        hay = hay[:break_before(hay, 0, keep)] if keep else ""


def bucket(length):
    """The label of a length in tables, by the nearest power of two: 500 -> "512", 4000 -> "4k", 1_000_000 -> "1M"."""
    power = max(0, round(math.log2(length)))
    for unit, bits in (("M", 20), ("k", 10)):
        if power >= bits:
            return f"{2 ** (power - bits)}{unit}"
    return str(2 ** power)


@dataclass(frozen=True)
class Ask:
    """
    A question, its answer, and where the answer stands: in fact number `fact`, from character `at` on to `stop` (0 = to its end); it takes the facts `also` as well.
    says: the sentence that the answer is given in, "" = the answer alone. One that repeats what was asked puts the same words in front of the
    answer as stand in front of it in the text, which a small model learns to continue long before it learns to look up (LOG.md, 2026-11-21).
    """
    question: str
    answer: str
    fact: int = 0
    at: int = 0
    stop: int = 0
    says: str = ""
    also: tuple = ()

    @property
    def reply(self):
        return self.says or self.answer

    def evidence(self, facts, offsets):
        """[[start, stop], ...]: the characters that answer it, of a text that holds each of facts [(depth, fact), ...] from its offset on."""
        places = [(self.fact, self.at, self.stop or len(facts[self.fact][1]))] + [(n, 0, len(facts[n][1])) for n in self.also]
        return [[offsets[n] + start, offsets[n] + stop] for n, start, stop in places]


def following(questions):
    """All that is said after the first question."""
    return "\n".join([questions[0].reply] + [text for ask in questions[1:] for text in (ask.question, ask.reply)])


class LongTask(GeneratedTask):
    """
    A generated task over a long text.

    texts    list of texts to hide facts in, or a Filler (share one between tasks: it remembers what it measured)
    length   of the text with its questions and answers, in units of the filler's measure (a chat's special tokens, five a turn,
             come on top); a pair (low, high) draws one for each conversation, evenly in the logarithm: a training mix
    depth    of the fact that is asked about, 0 = oldest .. 1 = newest; None draws one for each conversation
    measure  what length counts, see above
    """

    def __init__(self, texts, length=4000, depth=None, measure=len, **kwargs):
        super().__init__(**kwargs)
        self.filler = texts if isinstance(texts, Filler) else Filler(texts, measure)
        self.low, self.high = length if isinstance(length, (tuple, list)) else (length, length)
        if not 0 < self.low <= self.high:
            raise ValueError(f"{self.name}: expected a length or a pair (low, high) above 0, got {length}")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"{self.name}: expected a depth from 0 (oldest) to 1 (newest) or None, got {depth}")
        self.depth = depth

    @property
    def fingerprint(self):
        return digest(super().fingerprint, self.low, self.high, self.depth, self.filler.fingerprint)

    def too_long(self, facts, questions):
        """What a task that is trained on says in lacking() if this is the most that a conversation can hold: "" if the shortest length has room."""
        needs = needed(self.filler.measure, facts, questions[0].question, following(questions))
        return "" if needs <= self.low else f"the facts and questions of a conversation take up to {needs} of {self.low} tokens"

    def draw(self, rng):
        """(length, depth) of one conversation."""
        length = self.low if self.low == self.high else round(math.exp(rng.uniform(*map(math.log, (self.low, self.high)))))
        return length, rng.random() if self.depth is None else self.depth

    def recall(self, rng, length, facts, questions, avoid=()):
        """
        Hide `facts`, a list of (depth, text), and ask `questions`, a list of Ask, one after the other. -> conversation,
        whose extras are those of the last question.
        """
        text, offsets = hide(self.filler, rng, facts, length, questions[0].question, following(questions), avoid)
        spoken = dialogue(text, questions[0].reply, *[part for ask in questions[1:] for part in (ask.question, ask.reply)])
        extras = [{"answer": ask.answer, "depth": round((offsets[ask.fact] + ask.at) / len(text), 4), "evidence": ask.evidence(facts, offsets)} for ask in questions]
        out = {"messages": spoken, "bucket": bucket(length), **extras[-1]}
        return out if len(questions) == 1 else {**out, "turns": extras}

    def evaluate(self, conversation, answer_text):
        """Right is the answer, alone or in the sentence that is taught."""
        said = final_text(answer_text)
        return same_words(said, conversation["answer"]) or same_words(said, conversation["messages"][-1]["content"])
