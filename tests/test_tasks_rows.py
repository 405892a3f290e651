"""Public sets from local copies in every format, from the hub, or one clear error; then each task's reading of its rows."""

import csv
import gzip
import json
import os
import random
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.calculator import calculate
from nanochat.common import UserError
from tasks import rows
from tasks.arc import ARC
from tasks.common import TaskMixture, check_conversation, dialogue, turns
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, final_number, with_tools
from tasks.humaneval import HumanEval, program
from tasks.mmlu import MMLU
from tasks.rows import load_rows
from tasks.smoltalk import SmolTalk
from tests.tiny_run import tiny_tokenizer

SHARED = Path(os.environ.get("NANOCHAT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no folder of real data at {SHARED} (NANOCHAT_SHARED_DATA)")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """An empty folder of local copies, and a hub that nobody can reach."""
    def unreachable(*args, **kwargs):
        raise ConnectionError("the hub is not there")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    monkeypatch.setattr(rows, "hub_trouble", lambda: "")
    return tmp_path


def write(path, rows):
    """Rows to a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if "csv" in path.name:
            out = csv.DictWriter(file, rows[0])
            out.writeheader()
            out.writerows({key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in row.items()} for row in rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


FORMATS = [".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz"]
QUESTIONS = [{"question": f"Which is {n}, \"as is\"?\nSay.", "subject": "counting", "choices": [str((n + k) % 9) for k in range(4)], "answer": n % 4}
             for n in range(7)]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_conversations(data, kind):
    write(data / "mmlu" / f"test{kind}", QUESTIONS)
    task = MMLU("test")
    assert len(task) == 7
    for n, conversation in enumerate(task):
        assert check_conversation(conversation) is None
        assert conversation["letters"] == ["A", "B", "C", "D"] and conversation["answer"] == "ABCD"[n % 4]
        question = conversation["messages"][0]["content"]
        assert question.startswith(f'Which is {n}, "as is"?\nSay.\nA: {n}\nB: ') and conversation["messages"][1]["content"] == "ABCD"[n % 4]


@pytest.mark.parametrize("kind", FORMATS)
def test_parts_of_a_split_are_one_list_in_order(data, kind):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(10)]
    for part, (start, end) in enumerate([(0, 3), (3, 4), (4, 10)]):
        write(data / "gsm8k" / "main" / f"train-{part:05}-of-00003{kind}", rows[start:end])
    task = GSM8K("train")
    assert [c["messages"][0]["content"] for c in task] == [f"q{n}" for n in range(10)]
    order = random.Random(0).sample(range(10), 10)
    assert [task[n]["answer"] for n in order] == [str(n) for n in order]


def test_the_hub_is_asked_when_there_is_no_local_copy(monkeypatch):
    asked = []
    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [{"question": "q", "answer": "#### 5"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert GSM8K("test")[0]["answer"] == "5"
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_without_both_the_error_says_both_ways_out(data, monkeypatch):
    with pytest.raises(UserError, match=r"put mmlu/all/dev.jsonl .* into .*, or give this machine network .*cais/mmlu, all.*hub is not there"):
        MMLU("dev")
    monkeypatch.delenv("NANOCHAT_DATA_DIR")
    with pytest.raises(UserError, match="mmlu/dev.jsonl .* set NANOCHAT_DATA_DIR"):
        MMLU("dev")
    monkeypatch.setitem(sys.modules, "datasets", None) # not installed
    with pytest.raises(UserError, match="datasets"):
        MMLU("dev")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(data / "nowhere"))
    with pytest.raises(UserError, match="expected a folder of data sets"):
        MMLU("dev")


def test_without_a_network_the_cache_is_asked_and_nothing_else(monkeypatch):
    """What was fetched last week is still there on a machine that is offline today; what was not is told with the reason."""
    config, cached = types.SimpleNamespace(HF_HUB_OFFLINE=False), [{"question": "q", "answer": "#### 5"}]
    def load_dataset(name, config_name, split):
        assert config.HF_HUB_OFFLINE
        if split != "test":
            raise ConnectionError("offline mode is enabled")
        return cached
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, config=config))
    monkeypatch.setattr(rows, "hub_trouble", lambda: "no answer from the hub")
    assert GSM8K("test")[0]["answer"] == "5"
    with pytest.raises(UserError, match=r"put gsm8k/main/train.jsonl .*\(openai/gsm8k, main\): no answer from the hub"):
        GSM8K("train")


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_that_cannot_be_reached_is_told_in_seconds(tmp_path, silent):
    """The real client, and a port that refuses or accepts and says nothing: each absent set used to take 24 seconds, and sixty here."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen() if silent else None
        program = """
import time
from nanochat.common import UserError
from tasks import rows
import datasets
rows.PATIENCE, began = 0.5, time.perf_counter()
for split in ("train", "test"):
    try:
        rows.load_rows("openai/gsm8k", "main", split, {"question": str})
    except UserError as error:
        print(error)
print(time.perf_counter() - began)
"""
        env = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()} | dict(
            HF_ENDPOINT=f"http://127.0.0.1:{listener.getsockname()[1]}", HF_HOME=str(tmp_path), NANOCHAT_DATA_DIR="")
        said = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 3 and all(f"no answer from {env['HF_ENDPOINT']}" in line for line in said[:2])
    assert float(said[2]) < 10


def test_damaged_copies_are_named(data):
    folder = data / "gsm8k"
    write(folder / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
    with open(folder / "train.jsonl", "a") as file:
        file.write("\n{broken\n[1]\n" + json.dumps({"question": "only"}) + "\n")
    rows = load_rows("openai/gsm8k", "main", "train", {"question": str, "answer": str})
    assert len(rows) == 4 and rows[0]["question"] == "q"
    for i, wrong in ((1, r"line 3: expected JSON, got '\{broken'"), (2, r"line 4: expected the fields question, answer, got \[1\]"),
                     (3, "line 5: expected the fields question, answer, got only question")):
        with pytest.raises(UserError, match=f"train.jsonl, {wrong}"):
            rows[i]
    write(folder / "train.csv", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(UserError, match="expected one copy of gsm8k/train, got train.jsonl, train.csv"):
        GSM8K("train")
    broken = bytearray(gzip.compress(b"text " * 99))
    broken[20] ^= 255
    for name, content, match in (("test.parquet", b"\xff\xfe\xfa", "expected a parquet file"), ("test.jsonl.gz", b"\xff\xfe\xfa", "expected gzipped UTF-8"),
                                 ("test.jsonl.gz", broken, "expected gzipped UTF-8"), ("test.jsonl", b"\xff\xfe\xfa", "expected UTF-8"),
                                 ("test.csv", b"question,answer\n", r"test.csv\): expected at least one row, got none")):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=match):
            GSM8K("test")
        (folder / name).unlink()


def write_parquet(path, text):
    """A parquet file whose strings are no UTF-8: the format does not look."""
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = pyarrow.array([b"fine", text], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": ["#### 1", "#### 2"]}), path)


HUB_ARC = {"question": "Hot?", "choices": {"text": ["ice", "sun"], "label": ["A", "B"]}, "answerKey": "B"}
DCLM_ARC = {"query": "Hot?", "choices": ["ice", "sun"], "gold": 1}
HELLO = {"messages": dialogue("hi", "hello")}
MMLU_ROW = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
ADD = {"task_id": "0", "prompt": 'import math\n\ndef add(a, b):\n    """Sum."""\n', "entry_point": "add",
       "canonical_solution": "    return a + b\n", "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n"}
GSM = (lambda: GSM8K("test"), "gsm8k/test.jsonl", {"question": "q", "answer": "#### 1"})
CHOICE = (lambda: MMLU("test"), "mmlu/test.jsonl", MMLU_ROW)
EASY = (lambda: ARC("easy", "test"), "arc/test.jsonl", HUB_ARC)
DCLM = (lambda: ARC("easy", "test"), "arc/test.jsonl", DCLM_ARC)
CODE = (HumanEval, "humaneval/test.jsonl", ADD)
TALK = (SmolTalk, "smoltalk/train.jsonl", HELLO)


@pytest.mark.parametrize("task, change, problem", [
    (GSM, dict(answer=None), "expected the fields question, answer, got only question"), (GSM, dict(question=None), "got only answer"),
    (GSM, dict(answer=3), "field answer: expected text, got 3"), (GSM, dict(answer="3"), "expected an answer that ends in '#### number'"),
    (GSM, dict(question="half \ud83d"), "field question: character 5 of the text is the lone surrogate"),
    (CHOICE, dict(answer=None), "got only choices, question"), (CHOICE, dict(answer="B"), "field answer: expected JSON, got 'B'"),
    (CHOICE, dict(answer=2.0), "field answer: expected a whole number, got 2.0"), (CHOICE, dict(answer=True), "expected a whole number, got True"),
    (CHOICE, dict(answer=2), "expected the number of the right choice, 0 to 1, got 2"), (CHOICE, dict(choices=["a", None]), "2 to 26 choices, each a text"),
    (CHOICE, dict(choices={"text": []}), "field choices: expected a list"), (CHOICE, dict(choices=["a"]), "2 to 26 choices"),
    (CHOICE, dict(choices=["a", "\udc00"]), "message 0: character 15 of the text is the lone surrogate"),
    (EASY, dict(answerKey=None), "expected the fields question, choices, answerKey, or query, choices, gold, got only choices, question"),
    (EASY, dict(choices=["ice", "sun"]), "field choices: expected an object"), (EASY, dict(choices={"text": ["ice", "sun"]}), "as many labels as texts"),
    (EASY, dict(choices={"text": ["ice", "sun"], "label": ["A"]}), "as many labels as texts"), (EASY, dict(answerKey="C"), "expected an answerKey among"),
    (DCLM, dict(query=None), "got only choices, gold"), (DCLM, dict(gold="x"), "field gold: expected JSON, got 'x'"), (DCLM, dict(gold=-1), "the number of the right choice"),
    (CODE, dict(prompt="import math\n"), "expected a prompt that defines its entry_point 'add'"), (CODE, dict(entry_point=""), "entry_point ''"),
    (CODE, dict(entry_point="ad"), "entry_point 'ad'"), (CODE, dict(test=None), "expected the fields prompt"),
    (TALK, dict(messages=None), "expected the fields messages, got only nulls"), (TALK, dict(messages=["hi"]), "message 0: expected {\"role\""),
    (TALK, dict(messages=[{"content": "hi"}]), "message 0: expected {\"role\""), (TALK, dict(messages=[]), "at least two messages"),
    (TALK, dict(messages=dialogue("hi", None)), "message 1: expected text or a list of parts, got None"), (TALK, dict(messages="hi"), "field messages: expected JSON"),
], ids=lambda value: " ".join(f"{field}={item!r}" for field, item in value.items())[:50] if isinstance(value, dict) else "")
def test_an_odd_row_is_told_with_its_file_and_line(data, task, change, problem):
    """Each of these ended a run hours old in a KeyError, a TypeError, an IndexError or a ValueError that named neither."""
    make, name, row = task
    write(data / name, [row, {**row, **change}])
    made = make()
    assert check_conversation(made[0]) is None
    with pytest.raises(UserError) as error:
        made[1]
    assert f"{data / name}, line 2" in str(error.value) and problem in str(error.value)


@pytest.mark.parametrize("text, problem", [
    ('question,answer\nq,#### 1\n"open,#### 2\n', "line 3: unexpected end of data"), ('question,answer\n"q"x,#### 1\n', "line 2: ',' expected after '\"'"),
    ("question,answer\nq,#### 1\nq\n", "line 3: expected 2 columns as in the first line, got 1"), ("question,answer\nq,#### 1,more\n", "line 2: expected 2 columns"),
    ('question,answer\n"two\nlines"\n', "line 3: expected 2 columns"), ("question,reply\nq,#### 1\n", "line 2: expected the fields question, answer, got only question, reply"),
])
def test_a_broken_csv_is_told_with_its_line(data, text, problem):
    (data / "gsm8k").mkdir()
    (data / "gsm8k" / "test.csv").write_text(text)
    with pytest.raises(UserError) as error:
        GSM8K("test")[0]
    assert f"test.csv, {problem}" in str(error.value)


def test_a_long_field_of_a_csv_is_read(data):
    """Python's reader refuses fields of more than 131,072 characters unless it is told otherwise."""
    write(data / "gsm8k" / "test.csv", [{"question": "q" * 200_000, "answer": "#### 1"}])
    assert len(GSM8K("test")[0]["messages"][0]["content"]) == 200_000


def test_text_in_a_parquet_file_that_is_not_utf8_is_told_with_its_row(data):
    write_parquet(data / "gsm8k" / "test.parquet", b"caf\xe9")
    assert GSM8K("test")[0]["answer"] == "1"
    with pytest.raises(UserError, match="test.parquet, row 1: expected UTF-8 text"):
        GSM8K("test")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Each task

def test_arc_reads_letters_and_numbers_as_labels(data):
    rows = [{"question": "Hot?", "choices": {"text": ["ice", "sun", "rain"], "label": ["1", "2", "3"]}, "answerKey": "2"},
            {"question": "Wet?", "choices": {"text": ["sand", "fire", "wind", "sun", "sea"], "label": list("ABCDE")}, "answerKey": "E"},
            {"question": "Odd?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}]
    write(data / "arc" / "ARC-Easy" / "train.parquet", rows)
    task = ARC("easy", "train")
    assert task[0]["task"] == "arc_easy" and task.kind == "choice"
    assert task[0]["messages"][0]["content"] == "Hot?\nA: ice\nB: sun\nC: rain\nAnswer with the letter only."
    assert (task[0]["answer"], task[0]["letters"]) == ("B", ["A", "B", "C"]) and task[1]["answer"] == "E"
    assert all(task.evaluate(task[0], said) for said in ("B", "b", "B.", "B: sun", "B<|assistant_end|>"))
    assert not any(task.evaluate(task[0], said) for said in ("A", "", "Because", "2", "sun"))
    with pytest.raises(UserError, match="train.parquet, row 2: expected an answerKey among"):
        task[2]
    with pytest.raises(ValueError, match="expected easy or challenge"):
        ARC("hard")


def test_mmlu_refuses_an_answer_that_is_no_choice(data):
    write(data / "mmlu" / "dev.jsonl", [{**QUESTIONS[0], "answer": answer} for answer in (4, -1, "B")])
    for i in range(3):
        with pytest.raises(UserError, match=f"dev.jsonl, line {i + 1}[:,].* expected"):
            MMLU("dev")[i]


def test_gsm8k_by_hand():
    parts = with_tools("It takes 2/2=<<2/2=1>>1 bolt.\nSo 2+1=<<2+1=3>>3\n#### 3")
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "It takes 2/2="), ("python", "2/2"), ("python_output", "1"), ("text", "1 bolt.\nSo 2+1="),
        ("python", "2+1"), ("python_output", "3"), ("text", "3\n#### 3")]


@pytest.mark.parametrize("text, number", [("#### 18", "18"), ("#### 1,000", "1000"), ("x #### $-3.50.", "-3.5"), ("#### 1\n#### 2", "2"), ("18", None),
                                          ("####", None), ("#### 1.2.3", None), ("####7", "7")])
def test_gsm8k_grades_by_value(text, number):
    assert (None if number is None else float(number)) == (None if (got := final_number(text)) is None else float(got))
    assert GSM8K.evaluate(None, {"answer": "18"}, text) is (number == "18")


def test_smoltalk_checks_what_it_hands_on(data):
    good = {"messages": [{"role": "system", "content": "be kind"}, *dialogue("hi", "hello")], "source": "x"}
    write(data / "smoltalk" / "train.jsonl", [good, {"messages": dialogue("hi", "hello")[::-1]}])
    task = SmolTalk()
    assert task[0]["messages"] == good["messages"] and check_conversation(task[0]) is None
    with pytest.raises(UserError, match="train.jsonl, line 2: message 0: expected the user to speak"):
        task[1]


@pytest.mark.parametrize("messages", [dialogue("hi", ""), dialogue("", "hello"), dialogue("hi", [{"type": "text", "text": ""}])])
def test_a_message_that_says_nothing_does_not_stop_smoltalk(data, messages):
    """One such row among the hub's half a million would have ended a mid-training on eight GPUs. In one's own file it is a mistake."""
    write(data / "smoltalk" / "train.jsonl", [{"messages": messages}])
    assert SmolTalk()[0]["messages"] == messages
    ids, mask = tiny_tokenizer().render(SmolTalk()[0])
    assert mask[-1] == 1 and len(ids) == len(mask), "that the turn ends is still learnt"
    (data / "mine.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match="expected some text"):
        CustomJSON(data / "mine.jsonl")


def test_humaneval_finds_the_code_in_what_was_said(data):
    write(data / "humaneval" / "HumanEval.jsonl.gz", [ADD])
    task = HumanEval()
    whole = "def add(a, b):\n    return math.floor(a + b)\n"
    for said in (ADD["canonical_solution"], ADD["prompt"] + ADD["canonical_solution"], whole, f"Here it is:\n```python\n{whole}```\nDone.",
                 f"```\n{whole}", whole + "<|assistant_end|>junk("):
        scope = {}
        exec(program(task[0], said), scope)
        assert scope["add"](1, 1) == 2
    with pytest.raises(AssertionError):
        exec(program(task[0], "    return a - b\n"), {})


def test_a_helper_whose_name_begins_like_the_function_stays_in_front_of_it(data):
    """The place of "def add" in the prompt was that of "def add_one" before it, which was then left out."""
    row = {**ADD, "prompt": 'def add_one(a):\n    return a + 1\n\ndef add(a, b):\n    """Sum."""\n'}
    write(data / "humaneval" / "test.jsonl", [row])
    scope = {}
    exec(program(HumanEval()[0], "def add(a, b):\n    return add_one(a) + b - 1\n"), scope)
    assert scope["add"](1, 1) == 2


def test_humaneval_is_graded_in_the_sandbox(data):
    pytest.importorskip("nanochat.execution")
    write(data / "humaneval" / "test.jsonl", [ADD])
    task = HumanEval(timeout=20)
    assert task.evaluate(task[0], ADD["canonical_solution"])
    assert not task.evaluate(task[0], "    return a - b\n") and not task.evaluate(task[0], "    return (\n")


@pytest.mark.parametrize("timeout, trouble", [(0.001, "did not start in 0.01 s"), (20, r"did not start \(exit code 3\) no room for Python")])
def test_a_sandbox_that_does_not_start_is_no_wrong_answer(data, monkeypatch, timeout, trouble):
    """It counted as one: where no sandbox could start, a good model was told to have 0%, and nothing said why."""
    write(data / "humaneval" / "test.jsonl", [ADD])
    task = HumanEval(timeout=timeout)
    if timeout > 1:
        began = subprocess.Popen
        monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: began([command[0], "-c", "import sys; print('no room\\nfor Python', file=sys.stderr); sys.exit(3)"], **kwargs))
    with pytest.raises(UserError, match=f"HumanEval cannot be graded: sandbox: it {trouble}"):
        task.evaluate(task[0], ADD["canonical_solution"])


def test_a_sandbox_that_starts_late_is_given_time_once_more(data, monkeypatch):
    """A busy machine ended a whole evaluation."""
    write(data / "humaneval" / "test.jsonl", [ADD])
    task, run, asked = HumanEval(timeout=3), execution.run_code, []
    monkeypatch.setattr(execution, "run_code", lambda code, timeout: asked.append(timeout) or run(code, timeout=1e-4 if len(asked) == 1 else 20))
    assert task.evaluate(task[0], ADD["canonical_solution"]) and asked == [3, 30]


def test_customjson_reads_both_shapes_and_nothing_but_their_messages(tmp_path):
    """
    Other fields were handed on once: one called `turns`, `task` or `answer` was then taken for the task's own, and grading turn by turn
    ended in a TypeError.
    """
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"messages": dialogue("hi", "Hello."), "turns": 1, "task": 5, "answer": {}, "who": "me"}) + "\n\n" + json.dumps(dialogue("a", "b", "c")) + "\n")
    task = CustomJSON(path)
    assert len(task) == 2 and task[0] == {"messages": dialogue("hi", "Hello."), "task": "customjson"} and turns(task[0]) == [task[0]]
    assert task[1]["messages"] == dialogue("a", "b") and task.unanswered == 1
    assert task.evaluate(task[0], "hello") and not task.evaluate(task[0], "bye")


@pytest.mark.parametrize("line, problem", [
    ("{", "expected JSON"), ('"text"', "expected {\"messages\""), ('{"messages": "hi"}', "expected {\"messages\""),
    (json.dumps(dialogue("hi")), "one message only"), (json.dumps(dialogue("hi", "")), "message 1: expected some text"),
    (json.dumps([{"role": "bot", "content": "hi"}]), "message 0: expected a role"), ("[]", "at least two messages"),
    (json.dumps(dialogue("a", "b") * 2 + dialogue("a", "b")[::-1]), "message 4: expected the user to speak, got the assistant"),
    (json.dumps(dialogue("hi", "half \ud83d")), "message 1: character 5 of the text is the lone surrogate U+D83D"),
    (json.dumps(dialogue("hi", [{"type": "python", "text": "\udc00"}])), "message 1: character 0 of the text is the lone surrogate"),
    (json.dumps(dialogue("hi", [{"type": "text", "text": " "}])), "message 1: expected some text"),
    ("[" * 200_000, "expected JSON"), ('{"messages": ' * 200_000, "expected JSON"), ("1" * 5000, "expected JSON"),
    *((f'{{"messages": [{"[" * deep}{"]" * deep}]}}', "expected") for deep in (900, 960, 980, 985, 990, 995)),
])
def test_customjson_names_file_and_line(tmp_path, line, problem):
    """Half a surrogate pair passed this check and ended training in a traceback without a line; nesting ended the check itself in one."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(dialogue("hi", "Hello.")) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as error:
        CustomJSON(path)
    assert f"{path}, line 3: " in str(error.value) and problem in str(error.value)


def test_customjson_without_a_file_or_text(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, match in (("empty.jsonl", "the file is empty"), ("none.jsonl", "there is none")):
        with pytest.raises(UserError, match=match):
            CustomJSON(tmp_path / name)


@pytest.mark.parametrize("make, path", [(lambda path: GSM8K("test"), "gsm8k/test.jsonl"), (lambda path: CustomJSON(path), "mine.jsonl"),
                                        (lambda path: TaskMixture([GSM8K("test"), CustomJSON(path.parents[1] / "other.jsonl")], seed=1), "gsm8k/test.jsonl")])
def test_a_task_is_known_by_its_file(data, make, path):
    """A file that was rewritten between a kill and the resume was taken for the old one as long as it had as many rows."""
    (data / "other.jsonl").write_text(json.dumps(HELLO))
    row = {"question": "q", "answer": "#### 1", **HELLO}
    write(data / path, [row] * 3)
    before = make(data / path).fingerprint
    assert before == make(data / path).fingerprint
    write(data / path, [row] * 2 + [row | {"question": "what?"}])
    assert make(data / path).fingerprint != before
    (data / "mine.jsonl").write_text(json.dumps(dialogue("hi", "Hello.")))
    hello = CustomJSON(data / "mine.jsonl").fingerprint
    (data / "mine.jsonl").write_text(json.dumps(dialogue("hi", "Howdy.")))
    assert CustomJSON(data / "mine.jsonl").fingerprint != hello, "as long as it was, and another"


# ---------------------------------------------------------------------------------------------------------------------
# Real data, where it is

@shared
def test_real_gsm8k(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(SHARED))
    task = GSM8K("test")
    assert len(task) == 1319
    agree = calls = 0
    for conversation in task:
        assert check_conversation(conversation) is None
        parts = conversation["messages"][1]["content"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        assert task.evaluate(conversation, text) and "<<" not in text
        for call, output in zip(parts, parts[1:]):
            if call["type"] == "python":
                ours, theirs = calculate(call["text"]), calculate(output["text"])
                agree += ours is not None and theirs is not None and abs(float(ours) - float(theirs)) < 0.02
                calls += 1
    assert agree > 0.97 * calls # the authors round, and slip now and then


@shared
@pytest.mark.parametrize("task, size", [(lambda: MMLU("dev"), 285), (lambda: ARC("easy", "test"), 2376), (lambda: ARC("challenge", "test"), 1172)])
def test_real_choices(monkeypatch, task, size):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(SHARED))
    task = task()
    assert len(task) == size
    for conversation in task:
        assert check_conversation(conversation) is None
        assert task.evaluate(conversation, conversation["answer"])
    assert len({conversation["answer"] for conversation in task}) >= 4


@shared
def test_real_humaneval(monkeypatch):
    pytest.importorskip("nanochat.execution")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(SHARED))
    task = HumanEval(timeout=20)
    assert len(task) == 164
    for i in (0, 32, 38, 50): # 32, 38 and 50 have helper functions in the prompt
        assert task.evaluate(task[i], task[i]["answer"])
        assert task.evaluate(task[i], f"```python\n{task[i]['prompt']}{task[i]['answer']}\n```")
        assert not task.evaluate(task[i], "    return None\n")


@shared
@pytest.mark.parametrize("name", ["seed_tasks.jsonl", "dolly_hhrlhf_small.jsonl.gz", "persona_chat_valid.jsonl.gz"])
def test_real_conversations(name):
    task = CustomJSON(SHARED / "instruct" / name)
    assert len(task) >= 175 and all(conversation["messages"][-1]["role"] == "assistant" for conversation in task)
