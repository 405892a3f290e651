"""Exams: the right answer counts and no other, plain and batched equals one at a time, and the page says what was not measured."""

import os
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import scripts.chat_eval as chat_eval
from nanochat import report
from nanochat.common import Dist, UserError
from nanochat.engine import Engine, PlainStream
from scripts.chat_eval import Exam, Exams, chatcore, letters, names_of, sit, split_name, texts
from scripts.load import load_stage, open_stream
from tasks.arithmetic import Arithmetic
from tasks.common import GeneratedTask, dialogue
from tests.fakes import ByteTokenizer, FakeLoaded, random_gpt
from tests.tiny_run import make_run, make_text

tokenizer = ByteTokenizer()


class Letters(GeneratedTask):
    """Questions of different lengths with a random right letter."""
    name, kind = "letters", "choice"

    def example(self, index):
        rng = self.rng(index)
        options = "ABCD"[:rng.randint(2, 4)]
        right = rng.choice(options)
        return {"messages": dialogue("x" * rng.randint(1, 30), right), "letters": list(options), "answer": right}

    def evaluate(self, conversation, text):
        return text == conversation["answer"]


def flags(**changed):
    return SimpleNamespace(**dict(max_problems=-1, seconds=-1, device_batch=4, budget=None) | changed)


# ---------------------------------------------------------------------------------------------------------------------
# Answers

@torch.no_grad()
def test_letters_of_a_batch_are_those_of_each_question_alone():
    loaded = FakeLoaded(random_gpt(seq_len=64))
    engine, asked = Engine(tokenizer), [Letters()[i] for i in range(20)]
    got = letters(loaded, engine, asked, memory=False, budget=None)
    for conversation, letter in zip(asked, got):
        logits = PlainStream(loaded.gpt).feed(tokenizer.render_prompt(conversation))
        assert letter == max(conversation["letters"], key=lambda one: logits[ord(one)])
    assert len(set(got)) > 1


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [128, 24]) # 24: only some questions fit beside their answers, others only overflowing
def test_texts_of_a_batch_are_those_of_each_question_alone(seq_len):
    loaded = FakeLoaded(random_gpt(seq_len=seq_len))
    engine, rng = Engine(tokenizer), random.Random(0)
    asked = [{"messages": dialogue("y" * rng.randint(1, 30), "z")} for _ in range(10)]
    got = texts(loaded, engine, asked, memory=False, budget=None, max_tokens=10)
    for conversation, text in zip(asked, got):
        alone = list(engine.generate(PlainStream(loaded.gpt), tokenizer.render_prompt(conversation), 10, temperature=0))
        assert text == tokenizer.decode(alone)


@torch.no_grad()
def test_with_memory_every_question_starts_empty(base):
    """The answers are those of a session of its own each, in whatever order they are asked."""
    make_run("sft")
    loaded = load_stage("sft", "t")
    engine, asked = Engine(loaded.tokenizer), [Arithmetic(split="test")[i] for i in range(3)]
    got = texts(loaded, engine, asked, memory=True, budget=None, max_tokens=6)
    back = texts(loaded, engine, asked[::-1], memory=True, budget=None, max_tokens=6)
    assert got == back[::-1]
    alone = list(engine.generate(open_stream(loaded), loaded.tokenizer.render_prompt(asked[0]), 6, temperature=0))
    assert got[0] == loaded.tokenizer.decode(alone)
    choices = [Letters()[i] for i in range(3)]
    assert letters(loaded, engine, choices, memory=True, budget=None) == letters(loaded, engine, choices, memory=False, budget=None), "short enough: the same text is in view"


# ---------------------------------------------------------------------------------------------------------------------
# Counting

def oracle(share):
    """Stands in for texts(): right on the first `share` of each 4 questions."""
    def speak(loaded, engine, conversations, *_):
        return [c["answer"] if n % 4 < share else "none" for n, c in enumerate(conversations)]
    return speak


@pytest.mark.parametrize("share", range(5))
def test_accuracy_is_the_share_of_right_answers(monkeypatch, share):
    monkeypatch.setattr(chat_eval, "texts", oracle(share))
    result = sit(None, None, Exam("arithmetic", Arithmetic(size=40), 8, guess=0.25), False, flags(), Dist())
    assert (result["n"], result["right"], result["accuracy"]) == (40, 10 * share, share / 4)
    assert (result["low"], result["high"]) == report.wilson(10 * share, 40)
    assert result["centered"] == pytest.approx((share / 4 - 0.25) / 0.75)


@pytest.mark.parametrize("limits, n", [(dict(max_problems=7), 7), (dict(max_problems=-1), 40), (dict(max_problems=99), 40), (dict(seconds=0), 4), (dict(seconds=0, device_batch=3), 3)])
def test_limits_on_questions_and_on_time(monkeypatch, limits, n):
    """At no time left, the one batch that was begun is still asked: a table never divides by zero."""
    monkeypatch.setattr(chat_eval, "texts", oracle(4))
    result = sit(None, None, Exam("arithmetic", Arithmetic(size=40), 8), False, flags(**limits), Dist())
    assert result["n"] == result["right"] == n


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_share_the_questions(monkeypatch, world):
    """Each question is asked once; a process that has none still takes part in the sum."""
    asked, sums = [], []
    monkeypatch.setattr(chat_eval, "texts", lambda loaded, engine, conversations, *_: asked.extend(c["messages"][0]["content"] for c in conversations) or ["1"] * len(conversations))
    monkeypatch.setattr(chat_eval.td, "all_reduce", lambda counts: sums.append(counts.clone()) or counts.add_(1))
    task = Letters(size=5)
    task.kind = "generate"
    for rank in range(world):
        sit(None, None, Exam("letters", task, 8), False, flags(), Dist(rank, rank, world))
    assert sorted(asked) == sorted(task[i]["messages"][0]["content"] for i in range(5))
    assert sum(counts[1] for counts in sums) == 5 and len(sums) == world


def test_chatcore_is_the_mean_of_all_six_or_nothing():
    exams = {name: dict(plain=dict(centered=n / 10)) for n, name in enumerate(chat_eval.CHATCORE.split(","))}
    assert chatcore(exams, "plain") == pytest.approx(0.25) and chatcore(exams, "memory") is None
    exams["mmlu"] = dict(missing="no data")
    assert chatcore(exams, "plain") is None


# ---------------------------------------------------------------------------------------------------------------------
# Exams by name

def test_names():
    assert names_of("passkey, chatcore,passkey,mmlu") == ["passkey", *chat_eval.CHATCORE.split(",")]
    assert split_name("codeqa@64x") == ("codeqa", 64) and split_name("gsm8k") == ("gsm8k", None)
    assert names_of(chat_eval.OFFLINE) == chat_eval.OFFLINE.split(",")
    assert split_name("variables@8x") == ("variables", 8) and split_name("babi3") == ("babi3", None)
    for wrong in ("gsm", "gsm8k@8x", "passkey@0x", "passkey@x", "passkey@8", ""):
        with pytest.raises(UserError, match=f"no task {wrong!r}"):
            names_of(f"arithmetic,{wrong}")


def test_long_texts_have_the_asked_length(tmp_path):
    """At the row's length question and answer fit into it; at 8x the text is 8 rows long, to a few percent."""
    source, row = make_text(tmp_path / "text"), 1500
    exams = Exams(tokenizer, source, row, seed=0)
    assert set(chat_eval.LONG) == {"passkey", "multikey", "keyvalue", "variables", "frequent", "babi1", "babi2", "babi3", "codeqa", "topicshift"}
    for name in chat_eval.LONG:
        short, long = exams.build(name), exams.build(f"{name}@8x")
        assert short.task.name == long.task.name == name
        for i in range(3):
            prompt = tokenizer.render_prompt({"messages": short.task[i]["messages"][:-1]})
            assert 0.5 * row < len(prompt) <= row - short.max_tokens, f"{name}: {len(prompt)} tokens"
            said = short.task[i]["messages"][-1]["content"]
            assert len(tokenizer.encode(said)) < short.max_tokens or name == "codeqa"
            assert 7.5 * row < len(tokenizer.render_prompt({"messages": long.task[i]["messages"][:-1]})) <= 8.1 * row


# ---------------------------------------------------------------------------------------------------------------------
# The whole script

def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["chat_eval", *arguments])
    chat_eval.main()


def test_a_run_writes_its_section_and_a_second_stage_joins_it(base, tmp_path, monkeypatch, capsys):
    make_run("mid", "sft")
    source = make_text(tmp_path / "text")
    common = ["--source", source, "--max-problems", "3", "--device-batch", "2"]
    run(monkeypatch, "--stage", "sft", "--both", "--tasks", "arithmetic,passkey,passkey@4x,codeqa", *common)
    out = capsys.readouterr().out
    assert "summary stage=sft tag=t mean_plain=" in out
    run(monkeypatch, "--stage", "mid", "--no-memory", "--tasks", "arithmetic", *common)
    data = report.read_data("chat")
    assert list(data) == ["mid", "sft"] and set(data["sft"]["exams"]) == {"arithmetic", "passkey", "passkey@4x", "codeqa"}
    assert all(set(exam) == {"plain", "memory"} and exam["memory"]["n"] == 3 for exam in data["sft"]["exams"].values())
    assert set(data["mid"]["exams"]["arithmetic"]) == {"plain"}
    page = report.assemble()
    assert "### sft (t, step 3)" in page and "### mid (t, step 3)" in page
    assert "| measure | mid | sft | sft, with memory |" in page and "ChatCORE: not measured" in page


def test_all_tasks_on_long_texts_can_be_asked(base, tmp_path, monkeypatch):
    """Variable tracking, frequent words and the stories were there, tested, and could not be asked by any script."""
    make_run("sft", seq_len=1024)
    names = [*chat_eval.LONG, "variables@2x", "frequent@2x", "babi1@2x", "babi2@2x", "babi3@2x"]
    run(monkeypatch, "--no-memory", "--tasks", ",".join(names), "--source", make_text(tmp_path / "text"), "--max-problems", "1")
    exams = report.read_data("chat")["sft"]["exams"]
    assert list(exams) == names and all(exam["plain"]["n"] == 1 for exam in exams.values()) # none is missing


def test_data_that_is_not_there_is_named_and_the_rest_is_measured(base, tmp_path, monkeypatch):
    make_run("sft")
    prose = tmp_path / "prose"
    prose.mkdir()
    for n in range(100):
        (prose / f"{n}.txt").write_text("Nothing to ask about code here.\n" * 200)
    run(monkeypatch, "--tasks", "codeqa,spelling", "--source", f"dir:{prose}", "--max-problems", "2")
    exams = report.read_data("chat")["sft"]["exams"]
    assert "missing" in exams["codeqa"] and exams["spelling"]["memory"]["n"] == 2
    assert "- codeqa: not measured, codeqa: none of" in report.assemble()


def sit_without(dist, base):
    """A run in which the last rank cannot reach the data of one task."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    real = Exams.build

    def build(self, name):
        if name == "spellingbee" and dist.rank == dist.world - 1:
            raise UserError("no answer from the hub")
        return real(self, name)
    Exams.build, chat_eval.cleanup = build, lambda: None # the processes are left by who started them
    sys.argv = ["chat_eval", "--device", "cpu", "--no-memory", "--tasks", "spellingbee,spelling,arithmetic", "--max-problems", "5"]
    chat_eval.main()


def test_data_that_one_process_lacks_is_measured_by_none(base, spawn):
    """A request to the hub timed out on one rank of two: it went on to the next task, its counts were added to those of this one ("20 of 70"), and the other ended with a lost connection."""
    make_run("sft")
    spawn(sit_without, 2, base)
    exams = report.read_data("chat")["sft"]["exams"]
    assert exams["spellingbee"] == dict(missing="no answer from the hub")
    assert exams["spelling"]["plain"]["n"] == exams["arithmetic"]["plain"]["n"] == 5


@pytest.mark.parametrize("arguments, told", [
    (["--tasks", "pass"], "no task 'pass'"), (["--both", "--no-memory"], "use one of them"), (["--max-problems", "0"], "--max-problems"),
    (["--budget", "64"], "too small"), (["--stage", "rl"], "no checkpoint of stage rl"),
])
def test_a_wrong_flag_is_told_before_anything_is_asked(base, monkeypatch, arguments, told):
    make_run("sft")
    monkeypatch.setattr(chat_eval, "sit", lambda *_: pytest.fail("asked all the same"))
    with pytest.raises(UserError, match=told):
        run(monkeypatch, *arguments)


@pytest.mark.parametrize("arguments, told", [(["--no-memory"], "in spelling, plain. Lower --device-batch"), ([], "in spelling, memory. Lower --budget")])
def test_memory_that_runs_out_names_the_flag_that_helps(base, monkeypatch, arguments, told):
    """It ended in PyTorch's own words, under a page of traceback."""
    make_run("sft")
    monkeypatch.setattr(chat_eval, "texts", lambda *_: torch.empty(2**58))
    with pytest.raises(UserError, match=told):
        run(monkeypatch, "--tasks", "spelling", *arguments)


def test_a_plain_checkpoint_is_asked_plainly(base, monkeypatch):
    make_run("sft", memory=False)
    run(monkeypatch, "--tasks", "spelling", "--max-problems", "2")
    assert set(report.read_data("chat")["sft"]["exams"]["spelling"]) == {"plain"}
    with pytest.raises(UserError, match="trained without memory"):
        run(monkeypatch, "--tasks", "spelling", "--both")


def test_rows_too_short_for_a_question_are_named_as_such(base, tmp_path, monkeypatch):
    make_run("sft", seq_len=128)
    run(monkeypatch, "--tasks", "multikey,spelling", "--no-memory", "--source", make_text(tmp_path / "text"), "--max-problems", "2")
    exams = report.read_data("chat")["sft"]["exams"]
    assert "Ask for a longer text" in exams["multikey"]["missing"] and exams["spelling"]["plain"]["n"] == 2
