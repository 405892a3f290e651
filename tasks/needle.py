"""
Find again what was said far back: the smallest tests of a memory.

Passkey   one fact in filler: "The passkey is 7391." (the passkey test of Landmark Attention; RULER calls it niah_single)
MultiKey  many such facts with a key each, one (or several in turn) asked: "What is the key of amber?" The others are
          distractors: knowing that a number was said is not enough (RULER's niah_multikey and niah_multiquery)
KeyValue  a JSON object of random identifiers and the value of one of them (Lost in the Middle, Liu et al. 2023)

Digits stand together: our tokenizer takes two at a time, so that a number of four is copied in two tokens, and the second has few numbers to be
confused with (LOG.md, 2026-11-22). The answer is given in the sentence that stands in the text; the value alone is right too.
"""

import itertools

from tasks.common import dialogue
from tasks.haystack import Ask, LongTask, bucket
from tasks.words import NAMES, VALUES


class Passkey(LongTask):
    name = "passkey"

    def __init__(self, texts, digits=4, **kwargs):
        super().__init__(texts, **kwargs)
        self.digits = digits

    def lacking(self):
        fact, ask = self.say("0" * self.digits)
        return self.too_long([fact], [ask])

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        fact, ask = self.say(digits(rng, self.digits))
        return self.recall(rng, length, [(depth, fact)], [ask])

    @staticmethod
    def say(key):
        """(what the text says, what is asked)"""
        fact = f"The passkey is {key}."
        return fact, Ask("What is the passkey?", key, says=fact)


class MultiKey(LongTask):
    """
    pairs      facts in the text
    questions  how many are asked, one turn each, of different facts as far as there are so many; the one at the wanted depth is asked last
    words      values are words ("lotus") instead of digits
    """

    name = "multikey"

    def __init__(self, texts, pairs=8, questions=1, digits=4, words=False, **kwargs):
        super().__init__(texts, **kwargs)
        if not 1 <= pairs <= len(NAMES) * (len(NAMES) - 1) or questions < 1:
            raise ValueError(f"expected at least one pair and one question, and names for all pairs, got {questions} questions on {pairs} pairs")
        self.pairs, self.questions, self.digits, self.words = pairs, questions, digits, words

    def lacking(self):
        measure = self.filler.measure
        key = max(NAMES, key=lambda name: measure(f" {name}"))
        value = max(VALUES, key=lambda word: measure(f" {word}")) if self.words else "0" * self.digits
        fact, ask = self.say(key if self.pairs <= len(NAMES) else f"{key} {key}", value)
        return self.too_long([fact] * self.pairs, [ask] * self.questions)

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        keys = names(rng, self.pairs)
        values = [rng.choice(VALUES) if self.words else digits(rng, self.digits) for _ in keys]
        depths = [rng.random() for _ in keys[1:]] + [depth]
        said = [self.say(key, value, n) for n, (key, value) in enumerate(zip(keys, values))]
        again = rng.choices(said, k=max(0, self.questions - self.pairs))
        return self.recall(rng, length, [(depth, fact) for depth, (fact, _) in zip(depths, said)], [ask for _, ask in again + said[-self.questions:]])

    @staticmethod
    def say(key, value, n=0):
        """(what the text says, what is asked)"""
        fact = f"The key of {key} is {value}."
        return fact, Ask(f"What is the key of {key}?", value, n, says=fact)


class KeyValue(LongTask):
    """short: six hexadecimal digits instead of a uuid's 32, for small models. The text is the object alone, so no texts."""

    name = "keyvalue"

    def __init__(self, short=False, **kwargs):
        super().__init__(["{}"], **kwargs)
        self.short = short

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        measure = self.filler.measure
        sample = self.pair(rng)
        room = length - measure("{\n}\n\n" + self.question(sample[0]) + "\n" + sample[1])
        count = room // measure(self.line(sample)) # a first guess; exact when characters are counted
        if count < 1:
            raise ValueError(f"{self.name}: a length of {length} has no room for one pair. Ask for a longer text")
        pairs = dict(self.pair(rng) for _ in range(count))
        while True:
            target = min(int(depth * len(pairs)), len(pairs) - 1)
            key, value = next(itertools.islice(pairs.items(), target, None))
            text = "{\n" + "".join(map(self.line, pairs.items()))[:-2] + "\n}\n\n" + self.question(key)
            over = measure(text + "\n" + value) - length
            if over <= 0:
                break
            for _ in range(max(1, len(pairs) * over // length)):
                pairs.popitem()
            assert pairs, f"no pair fits a length of {length}"
        at, said = text.index(f'"{key}": '), f'"{key}": "{value}"'
        return {"messages": dialogue(text, value), "answer": value, "bucket": bucket(length), "depth": round(at / len(text), 4), "evidence": [[at, at + len(said)]]}

    def pair(self, rng):
        return self.identifier(rng), self.identifier(rng)

    def identifier(self, rng):
        if self.short:
            return f"{rng.getrandbits(24):06x}"
        text = f"{rng.getrandbits(128):032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    @staticmethod
    def line(pair):
        return f'"{pair[0]}": "{pair[1]}",\n'

    @staticmethod
    def question(key):
        return f'What is the value of "{key}"?'


def digits(rng, count):
    return "".join(rng.choices("0123456789", k=count))


def names(rng, count):
    """Distinct names: single words while they last, else pairs of words."""
    if count <= len(NAMES):
        return rng.sample(NAMES, count)
    pairs = range(len(NAMES) * (len(NAMES) - 1))
    return [" ".join(two(n)) for n in rng.sample(pairs, count)]


def two(n):
    """Number n of all ordered pairs of different names."""
    first, second = divmod(n, len(NAMES) - 1)
    return NAMES[first], NAMES[second + (second >= first)]
