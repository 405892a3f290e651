"""
What all tasks share: a task is a numbered list of conversations, and a rule that says whether an answer is right.

In:  rows of a data set (a local folder or the hub), or a seed for tasks that generate their own text.
Out: conversations {"messages": [{"role", "content"}, ...]}, ready for the tokenizer, plus extras for the evaluation:
     "task"    name of the task the conversation comes from
     "answer"  what is right: a letter for a "choice" task, the expected text (or a list of words) for the others
     "letters" the letters to choose from ("choice" only)
     "bucket", "depth"  length asked for ("4k") and place of the fact, 0 = oldest .. 1 = newest (long-context tasks)
     "evidence"  the characters of the first message that answer the question, [[start, stop], ...] (tasks with facts in a long text)

The last message is the assistant's and holds the right answer: training reads all of it, evaluation cuts it off, and
compares. A task neither tokenizes nor talks to a model, so it needs nothing but the standard library.
"""

import hashlib
import random

import numpy as np

from nanochat.common import check_unicode

ROLES = ("system", "user", "assistant")
PARTS = ("text", "python", "python_output")


def digest(*facts):
    """A short hash of plain values."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class Task:
    """
    A list of conversations. A subclass gives `count()` and `example(index)`; slicing, length and iteration come from here.
    start, stop, step choose a part of it with the meaning of a Python slice.
    """

    name = "task"
    kind = "generate"  # or "choice": the answer is one of conversation["letters"]

    def __init__(self, start=0, stop=None, step=1):
        self.slice = slice(start, stop, step)

    def count(self):
        """Number of conversations before slicing."""
        raise NotImplementedError(f"{type(self).__name__} must say how many conversations it has")

    def example(self, index):
        """Conversation number `index` of the unsliced list."""
        raise NotImplementedError(f"{type(self).__name__} must make its conversations")

    @property
    def fingerprint(self):
        """Changes when the conversations change, as far as one can tell without making them all: a run that is continued checks it."""
        return digest(self.name, self.count(), self.slice)

    def __len__(self):
        return len(range(*self.slice.indices(self.count())))

    def __getitem__(self, i):
        indices = range(*self.slice.indices(self.count()))
        if not -len(indices) <= i < len(indices):
            raise IndexError(f"{self.name} has {len(indices)} conversations, there is no number {i}")
        conversation = self.example(indices[i])
        conversation.setdefault("task", self.name)
        return conversation

    def evaluate(self, conversation, answer_text):
        """Is the generated text right? `answer_text` is what the model said, special tokens spelt out or removed."""
        return same_words(final_text(answer_text), conversation["answer"])

    def reward(self, conversation, answer_text):
        """The number that reinforcement learning maximises."""
        return float(self.evaluate(conversation, answer_text))


class GeneratedTask(Task):
    """
    A task that writes its own conversations: number i of (name, split, seed) is the same everywhere and needs no download.
    size only bounds the length of the list; a larger one costs nothing. Splits are separate streams of random numbers, so
    a small space of questions (7 + 5) can meet again in another split.
    """

    def __init__(self, size=10_000, seed=0, split="train", start=0, stop=None, step=1):
        super().__init__(start, stop, step)
        if size < 1:
            raise ValueError(f"{self.name}: expected a size of at least 1, got {size}")
        self.size, self.seed, self.split = size, seed, split

    @property
    def fingerprint(self):
        return digest(super().fingerprint, self.seed, self.split)

    def count(self):
        return self.size

    def rng(self, index):
        return random.Random(f"{self.name}/{self.split}/{self.seed}/{index}")


# ---------------------------------------------------------------------------------------------------------------------
# Several tasks as one

class TaskSequence(Task):
    """Tasks one after the other, each in its own order: a curriculum."""

    name = "sequence"

    def __init__(self, tasks, start=0, stop=None, step=1):
        super().__init__(start, stop, step)
        self.tasks = list(tasks)
        if not self.tasks:
            raise ValueError("expected at least one task, got an empty list")
        self.ends = np.cumsum([len(task) for task in self.tasks])

    @property
    def fingerprint(self):
        return digest(super().fingerprint, [task.fingerprint for task in self.tasks])

    def count(self):
        return int(self.ends[-1])

    def example(self, index):
        task = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[task - 1]) if task else 0
        return self.tasks[task][index - before]


class TaskMixture(TaskSequence):
    """Tasks shuffled together, the same way for the same seed. To show a task twice as often, name it twice."""

    name = "mixture"

    def __init__(self, tasks, seed=0, start=0, stop=None, step=1):
        super().__init__(tasks, start, stop, step)
        self.seed, self.order = seed, np.arange(super().count())
        random.Random(seed).shuffle(self.order)

    @property
    def fingerprint(self):
        return digest(super().fingerprint, self.seed)

    def example(self, index):
        return super().example(int(self.order[index]))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

def dialogue(*turns):
    """dialogue(question, answer, question, answer, ...) -> messages"""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": turn} for n, turn in enumerate(turns)]


def tool_answer(expression, result, text):
    """An assistant's content that works something out with the calculator and then says it."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": result},
            {"type": "text", "text": text}]


def turns(conversation):
    """
    One conversation per answer of the assistant, each ending there: how a conversation of many turns is graded turn by
    turn. Tasks that ask several questions keep a list of dicts under "turns" (answer, depth, ...): they replace the extras.
    """
    extras = conversation.get("turns")
    ends = [n for n, message in enumerate(conversation["messages"], 1) if message["role"] == "assistant"]
    assert extras is None or len(extras) == len(ends), f"{len(extras)} extras for {len(ends)} answers"
    out = []
    for n, end in enumerate(ends):
        part = {**conversation, "messages": conversation["messages"][:end], **(extras[n] if extras else {})}
        part.pop("turns", None)
        out.append(part)
    return out


def check_conversation(conversation, empty=False):
    """
    None if the shape is right, else one phrase: what was expected and what came. Used where other people bring the text.
    empty  a message may say nothing
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'expected {"messages": [...]} with at least two messages, got ' + clip(conversation)
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f'message {n}: expected {{"role": ..., "content": ...}}, got {clip(message)}'
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return f"message {n}: expected a role of {', '.join(ROLES)}, got {clip(role)}"
        if problem := check_content(role, content, empty):
            return f"message {n}: {problem}"
    spoken = [message["role"] for message in messages]
    if "system" in spoken[1:]:
        return f"message {spoken.index('system', 1)}: a system message may only stand first"
    spoken = spoken[1:] if spoken[0] == "system" else spoken
    for n, role in enumerate(spoken):
        wanted = ("user", "assistant")[n % 2]
        if role != wanted:
            return f"message {n + len(messages) - len(spoken)}: expected the {wanted} to speak, got the {role}"
    if len(spoken) < 2:
        return "expected a user's message and an assistant's answer, got one message only"
    return None


def check_content(role, content, empty):
    """None, or what is wrong with what one message says."""
    if isinstance(content, str):
        texts = [content]
    elif role != "assistant":
        return f"expected the {role}'s content to be text, got {clip(content)}"
    elif not isinstance(content, list) or not content:
        return f"expected text or a list of parts, got {clip(content)}"
    else:
        for part in content:
            if not (isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)):
                return f'expected a part {{"type": one of {", ".join(PARTS)}, "text": ...}}, got {clip(part)}'
        texts = [part["text"] for part in content]
    if not empty and not any(text.strip() for text in texts):
        return "expected some text, got an empty one"
    try:
        for text in texts:
            check_unicode(text)
    except ValueError as error:
        return str(error)
    return None


def clip(value, width=80):
    text = repr(value)
    return text if len(text) <= width else text[:width - 3] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def final_text(answer_text):
    """
    What was said after the last tool result, without special tokens:
    "<|python_start|>3*4<|python_end|><|output_start|>12<|output_end|>12<|assistant_end|>" -> "12"
    """
    text = answer_text.rsplit("<|output_end|>", 1)[-1]
    return text.split("<|assistant_end|>", 1)[0].split("<|bos|>", 1)[0].strip()


def same_words(said, wanted):
    """
    Equal but for case, spacing and a full stop at the end. `wanted` as a list means: these words, in any order, separated by
    spaces or commas. Strict on purpose: an answer that merely contains the right words also passes when it lists everything.
    """
    if isinstance(wanted, str):
        return " ".join(said.lower().split()).rstrip(". ") == " ".join(wanted.lower().split()).rstrip(". ")
    return sorted(said.lower().replace(",", " ").rstrip(". ").split()) == sorted(word.lower() for word in wanted)
