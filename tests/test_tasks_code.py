"""Code questions: what is taught as the answer is what Python itself says about the definition, and it is said only once."""

import ast
import inspect
import random
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest

from nanochat.common import UserError
from tasks.codeqa import CodeQuestions, Sources, TopicShift, read_source
from tasks.common import check_conversation, turns

STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = ["ast", "argparse", "bdb", "calendar", "cmd", "codeop", "configparser", "copy", "csv", "dataclasses", "difflib", "filecmp",
         "fileinput", "ftplib", "functools", "gzip", "heapq", "inspect", "ipaddress", "locale", "mailbox", "netrc", "pathlib", "queue",
         "random", "shutil", "smtplib", "socketserver", "statistics", "string", "tarfile", "textwrap", "threading", "trace", "weakref"]
TEXTS = [(STDLIB / f"{name}.py").read_text() for name in MODULES if (STDLIB / f"{name}.py").exists()]
FILES = Sources(TEXTS)

SOURCE = '''
import os

class Store(dict):
    """Keeps things."""

    def __init__(self, path):
        self.path = path

    def put(self, key,
            value=None):
        return value

    def get(self, key, default=None, *, strict=True):
        if strict:
            raise KeyError(key)
        return default

    def size(self): return 3

    @staticmethod
    def join(*parts, **options):
        x = "é"
        return os.path.join(*parts) if x else ""

    def both(self):
        if self:
            return 1
        return 2

class Two(dict, object):
    pass

async def fetch(url="é", timeout=1.50, mode=0o7, reader=lambda: 0):
    def inner():
        return 1
    return inner
'''


def test_facts_by_hand():
    facts, classes = read_source(SOURCE)
    said = {(fact.question(qualified=True), fact.answer) for fact in facts}
    assert said == { # nothing of put, whose first line goes on in the next
        ("Which class does Store inherit from?", "dict"),
        ("Which arguments does Store.get take?", "key, default, strict"),
        ("What is the default of default in Store.get?", "None"),
        ("What is the default of strict in Store.get?", "True"),
        ("What does Store.get return?", "default"),
        ("Which arguments does Store.join take?", "*parts, **options"),
        ("What does Store.join return?", 'os.path.join(*parts) if x else ""'),
        ("Which arguments does fetch take?", "url, timeout, mode, reader"),
        ("What is the default of url in fetch?", '"é"'),
        ("What is the default of timeout in fetch?", "1.50"),
        ("What is the default of mode in fetch?", "0o7"),
    }
    assert [item.header for item in classes] == ["class Store(dict):", "class Two(dict, object):"]
    assert SOURCE[classes[1].start:classes[1].end] == "class Two(dict, object):\n    pass\n"
    for fact in facts:
        assert SOURCE[fact.start:].startswith(("class", "    def", "async def"))
        first = SOURCE[fact.start:].split("\n")[0].strip()
        if fact.kind == "returns":
            assert SOURCE[fact.at:fact.end].strip() == f"return {fact.answer}" and fact.says == f"{first} return {fact.answer}"
        else:
            assert fact.says == first[:-1] and (fact.kind == "arguments" or fact.answer in fact.says)


@pytest.mark.parametrize("text", ["", "not python at all", "def f(:\n", "x = 1\n", "\0", "class A: pass", "def f(): return 1", "(" * 3000])
def test_text_that_defines_nothing_gives_nothing(text):
    assert read_source(text)[0] == []


def test_facts_agree_with_inspect():
    """The slow obvious twin: import the module and ask Python."""
    import difflib
    import shutil
    import statistics
    checked = 0
    for module in (shutil, difflib, statistics):
        for fact in read_source(inspect.getsource(module))[0]:
            thing = getattr(getattr(module, fact.owner) if fact.owner else module, fact.name)
            if fact.kind == "base":
                assert fact.answer.split(".")[-1] == thing.__base__.__name__
            elif fact.kind in ("arguments", "default") and inspect.unwrap(thing) is thing and inspect.isfunction(thing):
                parameters = list(inspect.signature(thing).parameters.values())[1 if fact.owner else 0:]
                stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
                if fact.kind == "arguments":
                    assert fact.answer == ", ".join(stars.get(p.kind, "") + p.name for p in parameters)
                else:
                    assert ast.literal_eval(fact.answer) == ({p.name: p.default for p in parameters}[fact.argument])
            else:
                continue
            checked += 1
    assert checked > 100


MAKE = {"codeqa": CodeQuestions, "three": lambda texts, **kw: CodeQuestions(texts, questions=3, **kw), "topicshift": TopicShift}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("length", [1500, 4000, 50_000])
def test_the_text_has_its_length_and_the_answers_stand_where_they_are_said_to(name, length):
    task = MAKE[name](FILES, length=length, size=20)
    for conversation in task:
        assert check_conversation(conversation) is None
        size = sum(len(message["content"]) for message in conversation["messages"])
        assert 0.9 * length - 120 <= size <= length
        text = conversation["messages"][0]["content"]
        for turn in turns(conversation):
            at = round(turn["depth"] * len(text))
            seen = text[max(0, at - 8):at + 1200] # an argument list may run over lines
            last = re.split(r"[ .]+", turn["answer"].rstrip(":)"))[-1].strip("*") # a list may break between its words
            assert last in seen, f"{turn['answer']!r} is not at {turn['depth']} of the text"
            assert task.evaluate(turn, turn["answer"]) and not task.evaluate(turn, turn["answer"] + ", more")


@pytest.mark.parametrize("name", MAKE)
def test_what_is_said_begins_with_a_line_of_the_text_and_the_evidence_holds_the_answer(name):
    for conversation in MAKE[name](FILES, length=8000, size=20):
        text, said = conversation["messages"][0]["content"], [message["content"] for message in conversation["messages"][1::2]]
        lines = {line.strip() for line in text.split("\n")}
        for turn, words in zip(turns(conversation), said, strict=True):
            [[start, stop]] = turn["evidence"]
            first, _, returned = words.partition(": return ")
            assert first in lines or first + ":" in lines
            assert text[start:stop].strip().removesuffix(":") == (f"return {returned}" if returned else first.removesuffix(":"))


@pytest.mark.parametrize("length", [3000, 200_000])
def test_what_is_asked_about_is_defined_once_in_the_whole_text(length):
    for conversation in CodeQuestions(FILES, length=length, size=30):
        question = conversation["messages"][-2]["content"].rsplit("\n", 1)[-1]
        name = re.search(r"(?:does|in) (\w+)(?: take| inherit| return|\?)", question)[1]
        assert len(re.findall(rf"\b(?:def|class) +{name}\b", conversation["messages"][0]["content"])) == 1


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_depth_is_that_of_the_definition_asked_about(depth):
    for name, make in MAKE.items():
        for conversation in make(FILES, length=100_000, depth=depth, size=4):
            place = conversation["turns"][0] if name == "topicshift" else conversation # of a class: where it begins
            assert abs(place["depth"] - depth) < 0.06


def test_a_topic_shift_leaves_and_comes_back():
    for conversation in TopicShift(FILES, length=8000, size=10):
        asked = [message["content"] for message in conversation["messages"][0::2]]
        first, second = conversation["topics"]
        assert asked[0].endswith(f"\nShow me class {first}.") and f" {first}." in asked[1]
        assert asked[2] == f"Now show me class {second} instead." and f" {second}." in asked[3]
        assert asked[4].startswith("Back to the first class. ") and f" {first}." in asked[4]
        assert asked[4].removeprefix("Back to the first class. ") != asked[1]
        near = [turn["depth"] for turn in conversation["turns"]]
        assert near[0] <= min(near[1], near[4]) and near[2] <= near[3]


def test_answers_that_can_be_guessed_are_not_asked_for():
    """
    In a source tree with its tests, unittest.TestCase was the answer to one question in four, and None to one in twenty:
    a model that reads nothing would have scored.
    """
    many = ["".join(f"class C{n}{k}(Base):\n    pass\n\n" for k in range(3)) for n in range(4)]
    lone = "class Lone(Other):\n    pass\n\ndef f(a=None, b=True, c=7):\n    return None\n"
    facts = [fact for n in range(5) for fact, _, _ in Sources([*many, lone]).read(n)[0]]
    assert [(fact.kind, fact.answer) for fact in facts] == [("base", "Other"), ("arguments", "a, b, c"), ("default", "7")]
    counts = Counter(turn["answer"] for c in CodeQuestions(FILES, questions=4, length=4000, size=300) for turn in turns(c))
    assert counts.most_common(1)[0][1] <= 0.07 * counts.total() # of only 35 files


def test_every_question_is_about_another_file():
    for conversation in CodeQuestions(FILES, questions=4, length=4000, size=10):
        assert len(conversation["turns"]) == 4 and conversation["depth"] == conversation["turns"][-1]["depth"]
        asked = [message["content"].rsplit("\n", 1)[-1] for message in conversation["messages"][::2]]
        assert len(set(asked)) == 4


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("seed", range(12))
def test_what_lacks_nothing_can_always_be_made(name, seed):
    """
    A few files, any length, any depth: a task that says it lacks nothing makes every conversation. A kind of question was once drawn
    that no file had, or none that short, and training ended there.
    """
    rng = random.Random(seed)
    measure = rng.choice([len, lambda text: len(re.findall(r"\w{1,4}| ?[^\w\s]+|\s+", text))]) # the second is not additive, as no tokenizer is
    sources, low, made = Sources(rng.sample(TEXTS, 5), measure), rng.randrange(300, 900), 0
    while not made:
        task = MAKE[name](sources, length=(low, low + 200), size=40, seed=seed)
        if not task.lacking():
            made = sum(check_conversation(conversation) is None for conversation in task)
            assert made == 40
        low *= 2


def test_a_kind_that_no_file_has_gives_way_to_one_that_some_have():
    functions = [f"def step{n}(left, right):\n    return left * {n}\n" for n in range(8)]
    asked = {conversation["messages"][-2]["content"].rsplit("\n", 1)[-1].split()[0:2][1] for conversation in CodeQuestions(functions, length=400, size=40)}
    assert asked == {"arguments", "does"} # "Which arguments does step1 take?", "What does step1 return?"
    assert CodeQuestions(functions, kinds=["base"], length=400).lacking() and not CodeQuestions(functions, length=400).lacking()
    with pytest.raises(UserError, match="none of 8 texts has a definition"):
        CodeQuestions(functions, kinds=["base"], length=400)[0]


def test_kinds_can_be_chosen():
    for conversation in CodeQuestions(FILES, kinds=["base"], size=10):
        assert "inherit from?" in conversation["messages"][0]["content"].rsplit("\n", 1)[1]
    with pytest.raises(ValueError, match="expected kinds among"):
        CodeQuestions(FILES, kinds=["colour"])


def test_text_without_python_is_a_users_mistake():
    with pytest.raises(UserError, match="none of 2 texts has a definition"):
        CodeQuestions(["Once upon a time.\n" * 9, "The end.\n" * 9], length=2000)[0]
    with pytest.raises(UserError, match="expected at least 2 files .*got 1"):
        CodeQuestions([SOURCE])
    with pytest.raises(UserError, match="has another class with two facts that fits a length of 4000"):
        TopicShift([SOURCE, "x = 1\n" * 99], length=4000)[0]


def test_same_seed_same_question_whatever_was_read_before():
    fresh, used = CodeQuestions(TEXTS, seed=4), CodeQuestions(FILES, seed=4)
    order = list(range(12))
    random.Random(0).shuffle(order)
    seen = {i: used[i] for i in order}
    assert [fresh[i] for i in range(12)] == [seen[i] for i in range(12)]


def test_a_million_tokens_of_code_take_seconds():
    task = CodeQuestions(TEXTS, length=4_000_000, depth=0.1)
    start = time.perf_counter()
    assert len(task[0]["messages"][0]["content"]) > 3_600_000
    assert time.perf_counter() - start < 5
