"""Tasks are lists: slices, mixtures and sequences lose nothing and repeat nothing; answers are compared as stated."""

import itertools
import random
import re
from pathlib import Path

import pytest

import tasks
from tasks.common import (GeneratedTask, Task, TaskMixture, TaskSequence, check_conversation, dialogue, final_text, same_words,
                          tool_answer, turns)
from tasks.needle import Passkey


class Numbers(Task):
    """Conversation i holds the number base + i."""
    name = "numbers"

    def __init__(self, size, base=0, **kwargs):
        super().__init__(**kwargs)
        self.size, self.base = size, base

    def count(self):
        return self.size

    def example(self, index):
        assert 0 <= index < self.size
        return {"messages": dialogue("?", str(self.base + index)), "answer": str(self.base + index)}


def values(task):
    return [int(conversation["answer"]) for conversation in task]


@pytest.mark.parametrize("seed", range(30))
def test_a_slice_of_a_task_is_the_slice_of_its_list(seed):
    rng = random.Random(seed)
    size = rng.randrange(20)
    start, stop = rng.randrange(25), rng.choice([None, rng.randrange(25), -rng.randrange(1, 9)])
    step = rng.choice([1, 2, 3])
    wanted = list(range(size))[start:stop:step]
    task = Numbers(size, start=start, stop=stop, step=step)
    assert values(task) == wanted and len(task) == len(wanted)
    assert [int(task[i]["answer"]) for i in range(-len(wanted), 0)] == wanted
    for outside in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError, match="numbers has"):
            task[outside]


@pytest.mark.parametrize("seed", range(10))
def test_a_mixture_is_a_shuffle_of_all_and_a_sequence_their_concatenation(seed):
    rng = random.Random(seed)
    sizes = [rng.randrange(12) for _ in range(4)] + [1]
    tasks = [Numbers(size, 100 * n) for n, size in enumerate(sizes)]
    all_values = list(itertools.chain(*map(values, tasks)))
    assert values(TaskSequence(tasks)) == all_values
    mixed = values(TaskMixture(tasks, seed=seed))
    assert sorted(mixed) == sorted(all_values)
    assert mixed == values(TaskMixture(tasks, seed=seed))
    assert values(TaskMixture(tasks, seed=seed, start=1, step=2)) == mixed[1::2]


def test_a_mixture_depends_on_its_seed_and_really_mixes():
    tasks = [Numbers(50), Numbers(50, 100)]
    one, two = values(TaskMixture(tasks, seed=1)), values(TaskMixture(tasks, seed=2))
    assert one != two
    assert {value // 100 for value in one[:20]} == {0, 1}
    with pytest.raises(ValueError, match="at least one task"):
        TaskMixture([])


def test_a_conversation_of_a_mixture_names_its_task():
    assert TaskMixture([Numbers(1)])[0]["task"] == "numbers"


class Dice(GeneratedTask):
    name = "dice"

    def example(self, index):
        return {"messages": dialogue("roll", str(self.rng(index).random()))}


def test_generated_conversations_depend_on_seed_split_and_index_alone():
    rolls = {(seed, split, i): Dice(seed=seed, split=split)[i]["messages"][1]["content"]
             for seed in (0, 1) for split in ("train", "test") for i in range(3)}
    assert len(set(rolls.values())) == len(rolls)
    assert Dice(size=10 ** 12)[2]["messages"][1]["content"] == rolls[0, "train", 2] # any size, in any order
    with pytest.raises(ValueError, match="size of at least 1"):
        Dice(size=0)


def test_fingerprints_tell_tasks_apart_and_the_same_ones_alike():
    """The loader compares them when a run goes on; a memory address or a set in one would refuse every resume."""
    make = [lambda: Dice(), lambda: Dice(seed=1), lambda: Dice(split="test"), lambda: Dice(size=7), lambda: Dice(start=1), lambda: Numbers(10_000),
            lambda: TaskSequence([Dice(), Numbers(5)]), lambda: TaskSequence([Numbers(5), Dice()]), lambda: TaskMixture([Dice(), Numbers(5)]),
            lambda: TaskMixture([Dice(), Numbers(5)], seed=1), lambda: TaskMixture([Dice(seed=1), Numbers(5)]), lambda: Passkey(["a text\n"]), lambda: Passkey(["b text\n"]),
            lambda: Passkey(["a text\n"], length=50), lambda: Passkey(["a text\n"], depth=0.5)]
    prints = [one().fingerprint for one in make]
    assert len(set(prints)) == len(make) and prints == [one().fingerprint for one in make]


def test_turns_cut_a_conversation_after_each_answer():
    conversation = {"messages": dialogue("a", "b", "c", "d"), "answer": "d", "bucket": "1k",
                    "turns": [{"answer": "b", "depth": 0.1}, {"answer": "d", "depth": 0.2}]}
    first, second = turns(conversation)
    assert first == {"messages": dialogue("a", "b"), "answer": "b", "bucket": "1k", "depth": 0.1}
    assert second == {"messages": dialogue("a", "b", "c", "d"), "answer": "d", "bucket": "1k", "depth": 0.2}
    assert turns({"messages": dialogue("a", "b"), "answer": "b"}) == [{"messages": dialogue("a", "b"), "answer": "b"}]


@pytest.mark.parametrize("said, wanted, right", [
    ("Self, mode.", "self, mode", True), (" 7 3  9 1", "7 3 9 1", True), ("7 3 9", "7 3 9 1", False), ("7 3 9 1 2", "7 3 9 1", False),
    ("", "7", False), ("b a", ["a", "b"], True), ("a, B.", ["a", "b"], True), ("a a b", ["a", "b"], False), ("a", ["a", "b"], False),
])
def test_same_words(said, wanted, right):
    assert same_words(said, wanted) is right


def test_final_text_drops_tools_and_what_follows_the_answer():
    assert final_text("<|python_start|>3*4<|python_end|><|output_start|>12<|output_end|> 12 <|assistant_end|><|bos|>x") == "12"
    assert final_text("plain") == "plain"


@pytest.mark.parametrize("conversation, problem", [
    ([], "expected {\"messages\""),
    ({"messages": []}, "expected {\"messages\""),
    ({"messages": [{"role": "user"}]}, "message 0"),
    ({"messages": dialogue("a", "b", "c") + dialogue("d", "e")}, "message 3: expected the assistant to speak, got the user"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "expected a role of system, user, assistant, got 'robot'"),
    ({"messages": dialogue("a", "b") + [{"role": "system", "content": "x"}]}, "message 2: a system message may only stand first"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "message 0: expected the user to speak"),
    ({"messages": dialogue("a")}, "one message only"),
    ({"messages": dialogue("a", "  ")}, "message 1: expected some text"),
    ({"messages": dialogue([{"type": "text", "text": "a"}], "b")}, "message 0: expected the user's content to be text"),
    ({"messages": dialogue("a", [{"type": "image", "text": "b"}])}, "message 1: expected a part"),
    ({"messages": dialogue("a", 3)}, "message 1: expected text or a list of parts"),
])
def test_a_wrong_conversation_is_told_what_is_wrong(conversation, problem):
    assert problem in check_conversation(conversation)


def test_right_conversations_pass():
    system = [{"role": "system", "content": "be brief"}]
    assert check_conversation({"messages": system + dialogue("a", tool_answer("1+1", "2", "2"), "c")}) is None


def test_a_file_imports_only_from_files_above_it_in_the_readme():
    folder = Path(tasks.__file__).parent
    order = re.findall(r"^\| `(\w+)\.py` \|", (folder / "README.md").read_text(), re.M)
    assert sorted(order) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    for n, name in enumerate(order):
        for package, module in re.findall(r"^ *(?:from|import) (nanochat|megacontext|scripts|tasks)\.?(\w*)", (folder / f"{name}.py").read_text(), re.M):
            allowed = order[:n] if package == "tasks" else ["common", "execution"] if package == "nanochat" else []
            assert module in allowed, f"{name}.py imports {package}.{module}"
