"""
What mid-training and fine-tuning talk about.

Offline conversations are written by the project itself: sums with the calculator, spelling, and questions whose answer stands far
back in a long text of the corpus (which arguments does a function take, a passkey, one of many keys, a change of topic and back).
The GPU tiers add SmolTalk, MMLU and GSM8K from the data hub, or from NANOCHAT_DATA_DIR.
"""
from nanochat.dataset import open_source
from tasks.arithmetic import Arithmetic
from tasks.codeqa import CodeQuestions, Sources, TopicShift, read_source
from tasks.common import TaskMixture
from tasks.gsm8k import GSM8K
from tasks.haystack import Filler
from tasks.mmlu import MMLU
from tasks.needle import MultiKey, Passkey
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

SHORTEST = 320   # tokens of a long-context conversation
SHORTEST_SHIFT = 1024 # rows that can hold two classes and the questions about them
LEAST_PYTHON = 10      # files; a source of other text is not asked about code
SPARE = 64       # tokens of a row left to the special tokens of a few turns
TEXTS = 400      # documents that questions are asked about: enough not to be learnt by heart, few enough to parse in seconds


class Everything:
    """Conversations in which every token has a loss: mid-training reads them as text."""

    def __init__(self, task, tokenizer):
        self.task, self.tokenizer, self.name = task, tokenizer, task.name

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        ids, _ = self.tokenizer.render(self.task[i])
        return ids, [1] * len(ids)


class Parts:
    """Several sources as one, (items, weight) each; weights are shares of the tokens. A source that is a mix itself is taken apart."""

    def __init__(self, parts):
        self.parts = []
        for items, weight in parts:
            inner = getattr(items, "parts", None) or [(items, 1.0)]
            whole = sum(share for _, share in inner)
            self.parts += [(item, weight * share / whole) for item, share in inner]


def texts_of(source, split):
    """Some documents of a source, to hide facts in and to ask about."""
    texts = []
    for text in open_source(source, split).documents():
        texts.append(text)
        if len(texts) == TEXTS:
            break
    return texts


def conversations(source, split, tokenizer, seq_len, hub, seed=0):
    """
    What rows of seq_len tokens talk about: (items, share of the tokens) pairs. Short conversations get as many tokens as long ones:
    dealt by number, a sum of twenty tokens would drown among texts of a thousand, and hardly anything the assistant says would be trained.
    source   where the long texts come from;  hub   also SmolTalk, MMLU and GSM8K
    """
    measure = lambda text: len(tokenizer.encode(text))
    texts = texts_of(source, split)
    settings = dict(length=(SHORTEST, seq_len - SPARE), seed=seed, split=split)
    filler = Filler(texts, measure)
    short = [task(size=4000, seed=seed, split=split) for task in (Arithmetic, SimpleSpelling, SpellingBee)]
    long = [Passkey(filler, size=500, **settings), MultiKey(filler, size=1500, questions=4, **settings)]
    python = [text for text in texts if read_source(text)[0]] # files that define something with an answer
    if len(python) >= LEAST_PYTHON:
        code = Sources(python, measure)
        long.append(CodeQuestions(code, size=1500, questions=3, **settings))
        if seq_len >= SHORTEST_SHIFT:
            long.append(TopicShift(code, size=500, **settings | dict(length=(SHORTEST_SHIFT // 2, seq_len - SPARE))))
    parts = [(TaskMixture(short, seed=seed), 0.5), (TaskMixture(long, seed=seed), 0.5)]
    if hub:
        train = split == "train"
        chat = [SmolTalk(split="train" if train else "test"), MMLU(split="auxiliary_train" if train else "test", stop=100_000 if train else 1000)]
        chat += [GSM8K(split="train" if train else "test")] * (4 if train else 1)
        parts = [(items, 0.15) for items, _ in parts] + [(TaskMixture(chat, seed=seed), 0.7)]
    return Parts(parts)
