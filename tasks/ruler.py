"""
Two tasks after RULER (Hsieh et al. 2024) that ask for more than one place in a long text; their definitions, our wording.

VariableTracking  assignments hidden in filler, "VAR amber = 4 1" ... "VAR cedar = VAR amber" ...; which variables hold 41? A
                  chain must be followed from its value on; other chains with other values are there to mislead.
FrequentWords     a text of nothing but words, whose counts fall as rank^-alpha; which three are the most frequent? No single
                  place holds the answer.
(RULER's passkey and many-key tasks are in needle.py.)
"""

from tasks.common import dialogue
from tasks.haystack import Ask, LongTask, bucket
from tasks.words import NAMES


class VariableTracking(LongTask):
    """
    hops    assignments after the first in each chain;  chains  how many, one of which is asked about
    value   ask for the value of a chain's last variable instead of for all its variables: an easier question, one answer
    depth is that of the chain's first assignment; the others follow after it.
    """

    name = "variables"

    def __init__(self, texts, hops=2, chains=2, value=False, **kwargs):
        super().__init__(texts, **kwargs)
        if hops < 1 or chains < 1 or chains * (hops + 1) > len(NAMES):
            raise ValueError(f"expected hops and chains of at least 1 and at most {len(NAMES)} variables in all, "
                             f"got {hops} hops and {chains} chains")
        self.hops, self.chains, self.value = hops, chains, value

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        names = rng.sample(NAMES, self.chains * (self.hops + 1))
        values = [" ".join(f"{number:02}") for number in rng.sample(range(100), self.chains)]
        facts = []
        for n, value in enumerate(values):
            chain = names[n * (self.hops + 1):(n + 1) * (self.hops + 1)]
            first = depth if n == 0 else rng.random()
            places = [first] + sorted(rng.uniform(first, 1) for _ in range(self.hops))
            lines = [f"VAR {chain[0]} = {value}"] + [f"VAR {new} = VAR {old}" for old, new in zip(chain, chain[1:])]
            facts += zip(places, lines)
        chain, others = names[:self.hops + 1], tuple(range(1, self.hops + 1))
        if self.value:
            return self.recall(rng, length, facts, [Ask(f"What is VAR {chain[-1]}?", values[0], also=others)])
        conversation = self.recall(rng, length, facts, [Ask(f"Which variables are {values[0]}?", " ".join(chain), also=others)])
        return {**conversation, "answer": chain} # as a list: any order is right


class FrequentWords(LongTask):
    """alpha: how fast counts fall with rank (RULER: 2.0); words: how many different ones; top: how many are asked for."""

    name = "frequent"

    def __init__(self, alpha=2.0, words=40, top=3, **kwargs):
        super().__init__(["-"], **kwargs)
        if not 1 <= top < words <= len(NAMES) or alpha <= 0:
            raise ValueError(f"expected 1 <= top < words <= {len(NAMES)} and alpha > 0, got {top}, {words} and {alpha}")
        self.alpha, self.words, self.top = alpha, words, top

    def example(self, index):
        rng = self.rng(index)
        length, _ = self.draw(rng)
        names = rng.sample(NAMES, self.words)
        answer = names[:self.top]
        question = f"\n\nWhich {self.top} words are the most frequent?"
        measure = self.filler.measure
        room = length - measure(question + "\n" + " ".join(answer))
        size = measure(" ".join(names)) / self.words # of one word, a first guess
        count = int(room / size)
        for _ in range(20):
            if count < self.least():
                raise ValueError(f"{self.name}: a length of {length} has no room for {self.words} different words with clear "
                                 f"counts. Ask for a longer text or fewer words")
            text = self.write(names, count, rng) + question
            used = measure(text + "\n" + " ".join(answer))
            if 0.95 * length <= used <= length:
                break
            aim = int(count * 0.98 * length / used) # frequent words weigh more or less than the guess knew
            count = min(count - 1, aim) if used > length else max(count + 1, aim) # short texts move in steps of a word
        else:
            raise AssertionError(f"no count of words comes within 5% of a length of {length}")
        return {"messages": dialogue(text, " ".join(answer)), "answer": answer, "bucket": bucket(length), "depth": None}

    def least(self):
        return self.words * 2

    def write(self, names, count, rng):
        """About `count` words, each name as often as its rank says and at least once, the top ones strictly ahead."""
        weights = [rank ** -self.alpha for rank in range(1, self.words + 1)]
        share = count / sum(weights)
        counts = [max(1, round(weight * share)) for weight in weights]
        for n in range(self.top - 1, -1, -1):
            counts[n] = max(counts[n], counts[n + 1] + 1)
        out = [name for name, often in zip(names, counts) for _ in range(often)]
        rng.shuffle(out)
        return " ".join(out)


