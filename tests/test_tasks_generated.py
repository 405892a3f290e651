"""Arithmetic and spelling: what the assistant is taught to say is true, and only that is graded as right."""

import re

import pytest

from nanochat.calculator import calculate
from tasks import words
from tasks.arithmetic import Arithmetic
from tasks.common import check_conversation
from tasks.spellingbee import SimpleSpelling, SpellingBee

TASKS = [Arithmetic, SimpleSpelling, SpellingBee]


def spoken(parts):
    """The text a model says when it speaks these parts, as it comes out of a tokenizer."""
    marks = {"text": ("", ""), "python": ("<|python_start|>", "<|python_end|>"), "python_output": ("<|output_start|>", "<|output_end|>")}
    if isinstance(parts, str):
        return parts + "<|assistant_end|>"
    return "".join(marks[part["type"]][0] + part["text"] + marks[part["type"]][1] for part in parts) + "<|assistant_end|>"


@pytest.mark.parametrize("make", TASKS)
def test_the_right_answer_is_right_and_others_are_not(make):
    task = make(seed=3)
    for i in range(200):
        conversation = task[i]
        assert check_conversation(conversation) is None
        said = spoken(conversation["messages"][-1]["content"])
        assert task.evaluate(conversation, said) and task.reward(conversation, said) == 1.0
        other = next(task[j] for j in range(i + 1, i + 100) if task[j]["answer"] != conversation["answer"])
        assert not task.evaluate(conversation, spoken(other["messages"][-1]["content"]))
        assert not task.evaluate(conversation, "")


@pytest.mark.parametrize("make", [Arithmetic, SpellingBee])
def test_the_tool_really_gives_the_output_that_is_taught(make):
    for conversation in make(size=500, seed=1):
        parts = {part["type"]: part["text"] for part in conversation["messages"][1]["content"]}
        assert calculate(parts["python"]) == parts["python_output"] == conversation["answer"]


def test_the_sum_that_is_asked_is_the_sum_that_is_worked_out():
    for conversation in Arithmetic(size=300):
        question, parts = (message["content"] for message in conversation["messages"])
        asked = re.search(r"[-(0-9][-0-9+*/() ]*", question)[0]
        assert asked.replace(" ", "") == parts[0]["text"]


def test_arithmetic_knows_a_number_by_its_value():
    task = Arithmetic()
    assert all(task.evaluate({"answer": "4042"}, said) for said in ("4042", "4,042", "4042.0", " 4042. "))
    assert not any(task.evaluate({"answer": "4042"}, said) for said in ("4042 apples", "4043", "40 42", "-4042", "nan"))


def test_spelling_bee_by_hand():
    task = SpellingBee(words=["banana"])
    conversation = next(c for c in task if "'a'" in c["messages"][1]["content"][1]["text"])
    assert conversation["messages"][1]["content"] == [
        {"type": "text", "text": "banana: b a n a n a\n"}, {"type": "python", "text": "'banana'.count('a')"},
        {"type": "python_output", "text": "3"}, {"type": "text", "text": "3"}]
    assert task.evaluate(conversation, "banana: b a n a n a\n3") and not task.evaluate(conversation, "banana: b a n a n a\n")


def test_questions_differ_and_letters_are_not_always_there():
    assert len({c["messages"][0]["content"] for c in SpellingBee(size=300)}) > 290
    counts = {c["answer"] for c in SpellingBee(size=300)}
    assert {"0", "1", "2"} <= counts


def test_word_lists_have_no_doubles_and_no_key_is_also_a_value():
    for name in ("NAMES", "VALUES", "PEOPLE", "PLACES", "THINGS", "SPELL"):
        words_of = getattr(words, name)
        assert len(words_of) == len(set(words_of)) and all(word.isalpha() for word in words_of)
    assert not set(words.NAMES) & set(words.VALUES) and not set(words.PLACES) & set(words.THINGS)
