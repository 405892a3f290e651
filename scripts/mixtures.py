"""
What mid-training and fine-tuning talk about.

Offline conversations are written by the project itself: sums with the calculator, spelling, questions whose answer stands far
back in a long text of the corpus (which arguments does a function take, a passkey, one of many keys, a change of topic and back), and
conversations of nothing but facts or definitions and questions about them, with filler and without.
The GPU tiers add SmolTalk, MMLU and GSM8K from the data hub, or from NANOCHAT_DATA_DIR.
"""
from itertools import islice, product

from nanochat.common import UserError, print0
from nanochat.dataset import SPLITS, open_source, parse_spec
from tasks.arithmetic import Arithmetic
from tasks.codeqa import CodeQuestions, Sources, TopicShift, read_source
from tasks.common import TaskMixture, digest
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.haystack import Filler
from tasks.mmlu import MMLU
from tasks.needle import MultiKey, Passkey
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

SHORTEST = 400         # tokens of a long-context conversation
SHORTEST_SHIFT = 512   # of one about two classes
LEAST_PYTHON = 10      # files; a source of other text is not asked about code
FACTS = (2, 4, 8, 12, 16) # facts of a conversation that is about nothing else, without filler and among it: what is looked up over some hundred tokens only is not
                       # found over a thousand (LOG.md, 2026-11-22)
FAR = (800, 1200)      # tokens that such a conversation with filler has at least: the first that all of its facts and questions fit
ASKED = (12, 6)        # questions about them, as many as a row has room for: facts that are asked about again and again teach looking up, each of 12 asked about once
                       # taught nothing in 230 steps (LOG.md, 2026-11-21)
CODE = (4, 8, 12)      # questions about as many definitions, in conversations that are about little else
DEFINITION = 128       # tokens of such a conversation for each of them, at least
SHARES = (0.15, 0.15, 0.45, 0.25) # of the tokens: short conversations, long texts, facts, definitions. Facts once had 0.6 and definitions nothing: keys 100%, code 0% (LOG.md, 2026-11-22)
SPARE = 64             # tokens of a row left to the special tokens of a few turns
TEXTS = 400            # documents that questions are asked about: enough not to be learnt by heart, few enough to parse in seconds


class Everything:
    """Conversations in which every token has a loss: mid-training reads them as text."""

    def __init__(self, task, tokenizer):
        self.task, self.tokenizer, self.name, self.fingerprint = task, tokenizer, task.name, task.fingerprint

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        ids, _ = self.tokenizer.render(self.task[i])
        return ids, [1] * len(ids)


class Parts:
    """Several sources as one, (items, weight) each; weights are shares of the tokens, and what has none is left out. A source that is a mix itself is taken apart."""

    def __init__(self, parts):
        self.parts = []
        for items, weight in filter(lambda part: part[1], parts):
            inner = getattr(items, "parts", None) or [(items, 1.0)]
            whole = sum(share for _, share in inner)
            self.parts += [(item, weight * share / whole) for item, share in inner]


def texts_of(source, split):
    """Some documents of a source, to hide facts in and to ask about."""
    return some_texts(open_source(source, split))


def some_texts(opened):
    """The first documents of an open source that are not empty; a source without any cannot be opened."""
    return list(islice(filter(None, opened.documents()), TEXTS))


def hub_tasks(split):
    """What the data hub, or NANOCHAT_DATA_DIR, adds to the conversations."""
    train = split == "train"
    chat = [SmolTalk(split="train" if train else "test"), MMLU(split="auxiliary_train" if train else "test", stop=100_000 if train else 1000)]
    return chat + [GSM8K(split="train" if train else "test")] * (4 if train else 1)


def own_data(sources, conversations):
    """
    Open everything that a run reads, so that what is missing or broken ends it before anything is trained.
    sources  specs of text, where the reference shards may still have to be fetched;  conversations  a file of one's own, or ""
    Returns fingerprints (of text, of conversations) of what is the user's own: a stage that has read something else is not done.
    """
    text = []
    for name in sorted({name for spec in sources for name, _ in parse_spec(spec)} - {"climbmix"}):
        for split in SPLITS:
            opened = open_source(name, split)
            some_texts(opened)
            text += [opened.fingerprint] if name.startswith("dir:") else []
    return digest(*text) if text else "", CustomJSON(conversations).fingerprint if conversations else ""


def long_tasks(source, split, tokenizer, seq_len, seed):
    """
    Tasks about long texts of a source, each from the shortest length on at which every conversation can be made: what cannot be made must
    show before the first step, not in the middle of the run. What is left out is told.
    Returns (tasks, tasks about nothing but facts, tasks about little but definitions).
    """
    high = seq_len - SPARE
    if high < SHORTEST:
        raise UserError(f"rows of {seq_len} tokens are too short for questions about long texts: expected --max-seq-len of at least {SHORTEST + SPARE}")
    measure = lambda text: len(tokenizer.encode(text))
    texts = texts_of(source, split)
    filler, python = Filler(texts, measure), [text for text in texts if read_source(text)[0]] # files that define something with an answer
    tasks, facts, definitions = [], [], []
    wanted = [(Passkey, filler, SHORTEST, dict(size=500)), (MultiKey, filler, SHORTEST, dict(size=1500, questions=4))]
    if len(python) >= LEAST_PYTHON:
        code = Sources(python, measure)
        wanted += [(CodeQuestions, code, SHORTEST, dict(size=1500, questions=3)), (TopicShift, code, SHORTEST_SHIFT, dict(size=500))]
        several = (CodeQuestions(code, length=(DEFINITION * n, high), questions=n, size=4000, seed=seed, split=split) for n in CODE if DEFINITION * n <= high and n < len(code.used))
        definitions = [task for task in several if not task.lacking()]
    else:
        print0(f"left out    {split}: questions about code, {len(python)} of the texts are Python files that define something, it takes {LEAST_PYTHON}")
    for make, held, low, settings in wanted:
        lacks = f"rows of {seq_len} tokens are too short"
        while low <= high and (lacks := (task := make(held, length=(low, high), seed=seed, split=split, **settings)).lacking()):
            low *= 2
        if lacks:
            print0(f"left out    {split}: {make.name}, {lacks}")
        else:
            tasks.append(task)
    near, far = range(SPARE, high + 1, SPARE // 2), [(low, high) for low in FAR if low <= high]
    for pairs, lengths in product(FACTS, (near, far)):
        several = (MultiKey(filler, length=length, pairs=pairs, questions=questions, size=4000, seed=seed, split=split) for questions in ASKED for length in lengths)
        facts += [task for task in several if not task.lacking()][:1]
    return tasks, facts, definitions


def conversations(source, split, tokenizer, seq_len, hub, seed=0):
    """
    What rows of seq_len tokens talk about: (items, share of the tokens) pairs. Short conversations get as many tokens as long ones:
    dealt by number, a sum of twenty tokens would drown among texts of a thousand, and hardly anything the assistant says would be trained.
    source   where the long texts come from;  hub   also SmolTalk, MMLU and GSM8K
    """
    short = [task(size=4000, seed=seed, split=split) for task in (Arithmetic, SimpleSpelling, SpellingBee)]
    groups = [short, *long_tasks(source, split, tokenizer, seq_len, seed)]
    parts = [(TaskMixture(tasks, seed=seed), share) for tasks, share in zip(groups, SHARES, strict=True) if tasks]
    if hub:
        parts = [(items, 0.3 * weight) for items, weight in parts] + [(TaskMixture(hub_tasks(split), seed=seed), 0.7)]
    return Parts(parts)
