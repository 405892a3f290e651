"""CORE: batched and shared equals one text at a time, and each rule of the prompts by hand."""

import gzip
import json
import math
import os
import random
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import scripts.base_eval as base_eval
from nanochat import core_eval, report
from nanochat.common import Dist, UserError
from nanochat.core_eval import CoreTask, crop, evaluate, evaluate_task, make_row, read_items, read_rows, right, sequences_of, shots_of, texts_of
from nanochat.dataloader import val_loader
from nanochat.dataset import open_source
from nanochat.gpt import Entries
from scripts.load import load_stage
from tests.fakes import ByteTokenizer, random_gpt
from tests.tiny_run import make_run, make_text, tiny_tokenizer


class Bytes(ByteTokenizer):
    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


tokenizer = Bytes()
CHOICE = CoreTask("choice", "a/choice.jsonl", "multiple_choice", 2, "\nAnswer: ", 50.0)
SCHEMA = CoreTask("schema", "a/schema.jsonl", "schema", 1, " ", 50.0)
LANGUAGE = CoreTask("language", "b/language.jsonl", "language_modeling", 2, " ", 0.0)
TASKS = (CHOICE, SCHEMA, LANGUAGE)


def words(rng, least=1, most=6):
    return " ".join(rng.choice(["a", "blue", "cat", "dog", "éel", "sat", "on"]) for _ in range(rng.randint(least, most)))


def make_items(task, count, seed=0):
    rng = random.Random(f"{task.label}/{seed}")
    items = []
    for _ in range(count):
        options = [words(rng) for _ in range(rng.randint(2, 4))]
        gold = rng.randrange(len(options))
        items.append({"multiple_choice": dict(query=words(rng), choices=options, gold=gold),
                      "schema": dict(context_options=options, continuation=words(rng), gold=gold),
                      "language_modeling": dict(context=f"  {words(rng)} ", continuation=words(rng, 1, 2))}[task.kind])
    return items


def one_at_a_time(gpt, sequences):
    """The slow obvious version: each text alone through the plain GPT."""
    out = []
    for ids, start in sequences:
        logits = gpt(torch.tensor([ids[:-1]]))[0, start - 1:, :tokenizer.vocab_size]
        wanted = torch.tensor(ids[start:])
        out.append((F.cross_entropy(logits, wanted).item(), bool((logits.argmax(-1) == wanted).all())))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.label)
@pytest.mark.parametrize("seq_len", [512, 48]) # 48: most prompts are cropped
@torch.no_grad()
def test_rows_in_a_batch_equal_each_text_alone(task, seq_len):
    gpt, items = random_gpt(seq_len=seq_len), make_items(task, 24)
    everything = [crop(sequences_of(task, items, i, tokenizer), seq_len) for i in range(len(items))]
    assert any(cropped for _, cropped in everything) == (seq_len == 48)
    rows = [make_row(sequences, 0) for sequences, _ in everything]
    got = read_rows(gpt, rows, tokenizer.vocab_size)
    assert len({len(row.ids) for row in rows}) > 1, "rows of different lengths share a batch"
    for (sequences, _), results in zip(everything, got, strict=True):
        slow = one_at_a_time(gpt, sequences)
        torch.testing.assert_close(torch.tensor([nats for nats, _ in results]), torch.tensor([nats for nats, _ in slow]), atol=2e-4, rtol=1e-4)
        assert [hit for _, hit in results] == [hit for _, hit in slow]


def test_the_shared_beginning_is_read_once_and_the_last_token_never():
    row = make_row([([9, 1, 2, 3, 4], 3), ([9, 1, 2, 5, 6, 7], 3)], gold=1)
    assert row.ids == [9, 1, 2, 3, 5, 6]
    assert row.parent == [-1, 0, 1, 2, 2, 4] # 5 follows 2, though 3 stands beside it
    assert row.positions == [0, 1, 2, 3, 3, 4]
    assert row.branch == [0, 0, 0, 1, 2, 2]
    assert row.scored == [([2, 3], [3, 4]), ([2, 4, 5], [5, 6, 7])]
    letters = make_row([([9, 1, 2, 3], 3), ([9, 1, 2, 4], 3)], gold=0)
    assert letters.ids == [9, 1, 2] and letters.scored == [([2], [3]), ([2], [4])], "choices of one token cost nothing more"


def test_padding_of_the_vocabulary_is_no_token():
    """A model may know more ids than the tokenizer; they can be neither the likeliest nor take any probability."""
    gpt, wide = random_gpt(seq_len=128), random_gpt(seq_len=128, vocab_size=tokenizer.vocab_size + 7)
    for name, p in wide.named_parameters():
        mine = dict(gpt.named_parameters())[name]
        p.data = torch.cat([mine, torch.full((7, mine.size(1)), 3.0)]) if mine.shape != p.shape else mine.clone()
    rows = [make_row(sequences_of(LANGUAGE, make_items(LANGUAGE, 5), 0, tokenizer), 0)]
    with torch.no_grad():
        (mine, hit), (other, other_hit) = read_rows(gpt, rows, tokenizer.vocab_size)[0][0], read_rows(wide, rows, tokenizer.vocab_size)[0][0]
    assert mine == pytest.approx(other) and hit == other_hit


@pytest.mark.parametrize("seed", range(30))
def test_crop_keeps_the_bos_the_end_and_what_is_scored(seed):
    rng = random.Random(seed)
    room, shared = rng.randint(8, 40), rng.randint(1, 60)
    begin = [256] + [rng.randrange(256) for _ in range(shared)]
    sequences = [(begin + [rng.randrange(256) for _ in range(rng.randint(1, 12))], len(begin)) for _ in range(3)]
    got, cropped = crop(sequences, room)
    assert cropped == any(len(ids) > room for ids, _ in sequences)
    for (ids, start), (old, old_start) in zip(got, sequences):
        assert len(ids) <= room and ids[0] == 256 and ids[1:] == old[len(old) - len(ids) + 1:]
        assert 1 <= start < len(ids) and ids[start:] == old[old_start:][-(len(ids) - start):]
        assert len(ids) - start == min(len(old) - old_start, room - 1), "no scored token is lost that fits"


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, by hand

def test_prompts_by_hand():
    choice = [dict(query="Q0", choices=["a", "b"], gold=1), dict(query="Q1", choices=["c", "d"], gold=0)]
    one = CoreTask("t", "t.jsonl", "multiple_choice", 1, "\nAnswer: ", 50.0)
    assert texts_of(one, choice, 1) == ["Q0\nAnswer: b\n\nQ1\nAnswer: c", "Q0\nAnswer: b\n\nQ1\nAnswer: d"]
    schema = [dict(context_options=["he", "she"], continuation="ran.", gold=0), dict(context_options=["it", "we"], continuation="sat.", gold=1)]
    assert texts_of(SCHEMA, schema, 0) == ["we sat.\n\nhe ran.", "we sat.\n\nshe ran."]
    language = [dict(context=" 1 2 ", continuation="3"), dict(context="x y", continuation="z")]
    one = CoreTask("t", "t.jsonl", "language_modeling", 1, " ", 0.0)
    assert texts_of(one, language, 1) == ["1 2 3\n\nx y", "1 2 3\n\nx y z"]


def test_what_is_scored_by_hand():
    (ids, start), (other, _) = sequences_of(CoreTask("t", "t", "multiple_choice", 0, " ", 50.0), [dict(query="Q", choices=["no", "nay"], gold=0)], 0, tokenizer)
    assert tokenizer.decode(ids[start:]) == "o" and tokenizer.decode(other[start:]) == "ay" # from the first token that differs
    (ids, start), (other, second) = sequences_of(CoreTask("t", "t", "schema", 0, " ", 50.0), [dict(context_options=["ax", "bcy"], continuation="ran", gold=0)], 0, tokenizer)
    assert tokenizer.decode(ids[start:]) == tokenizer.decode(other[second:]) == " ran"
    [(ids, start)] = sequences_of(CoreTask("t", "t", "language_modeling", 0, " ", 0.0), [dict(context="a ", continuation="bc")], 0, tokenizer)
    assert tokenizer.decode(ids[start:]) == " bc"


def test_a_choice_that_begins_another_still_has_a_loss():
    """A mean over no token is NaN, and NaN is never the lowest: such an example could not have been right."""
    sequences = sequences_of(CoreTask("t", "t", "multiple_choice", 0, " ", 50.0), [dict(query="Q", choices=["10", "100"], gold=0)], 0, tokenizer)
    assert [tokenizer.decode(ids[start:]) for ids, start in sequences] == ["0", "00"]


@pytest.mark.parametrize("seed", range(20))
def test_worked_examples_are_never_the_question_and_always_the_same(seed):
    items = make_items(CHOICE, 12, seed)
    for index in range(len(items)):
        others = [item for n, item in enumerate(items) if n != index]
        slow = random.Random(1234 + index).sample(others, CHOICE.shots) # as nanochat draws them
        assert shots_of(CHOICE, items, index) == slow and items[index] not in slow


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy

class Bigram:
    """Speaks as a GPT does, and always follows one letter with the next of its text."""

    def __init__(self, text, seq_len=512):
        self.config, self.device = type("Config", (), dict(seq_len=seq_len, previous=1)), "cpu"
        self.table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
        for a, b in zip(text.encode(), text.encode()[1:]):
            self.table[a, b] = 9.0

    def embed(self, ids, before=None):
        return Entries(F.one_hot(ids, tokenizer.vocab_size).float(), [])

    def trunk(self, entries, positions, see):
        return entries.x

    def head(self, hidden):
        return hidden @ self.table


def test_accuracy_counts_right_answers_and_is_centered_on_guessing():
    yes, no = dict(query="Q", choices=["yes", "nil"], gold=0), dict(query="Q", choices=["yes", "nil"], gold=1)
    task = CoreTask("t", "t", "multiple_choice", 0, " ", 50.0)
    for items, accuracy, centered in [([yes] * 4, 1.0, 1.0), ([no] * 4, 0.0, -1.0), ([yes, yes, no, no], 0.5, 0.0), ([yes, yes, yes, no], 0.75, 0.5)]:
        result = evaluate_task(Bigram(" yes"), tokenizer, task, items)
        assert (result["n"], result["accuracy"], result["centered"]) == (4, accuracy, centered)


def test_language_modeling_wants_every_token():
    task = CoreTask("t", "t", "language_modeling", 0, " ", 0.0)
    items = [dict(context="Q", continuation="yes"), dict(context="Q", continuation="yet")]
    assert evaluate_task(Bigram("Q yes"), tokenizer, task, items)["accuracy"] == 0.5
    assert right(task, [(9.0, True)], 0) and not right(task, [(0.1, False)], 0)


def test_a_schema_takes_the_context_that_makes_the_ending_likely():
    task = CoreTask("t", "t", "schema", 0, "", 50.0)
    assert evaluate_task(Bigram("ab"), tokenizer, task, [dict(context_options=["xc", "xa"], continuation="b", gold=1)])["accuracy"] == 1.0


def test_fewer_questions_than_worked_examples():
    """Crash of nanochat's (its issue 550): the worked examples were drawn from the few that were to be asked."""
    task = CoreTask("t", "t", "multiple_choice", 10, " ", 50.0)
    assert evaluate_task(random_gpt(seq_len=512), tokenizer, task, make_items(CHOICE, 12), most=3)["n"] == 3


@pytest.mark.parametrize("tokens", [1, 300, 5000])
def test_the_size_of_a_batch_changes_nothing(tokens):
    gpt, items = random_gpt(seq_len=512), make_items(CHOICE, 15)
    result, alone = (evaluate_task(gpt, tokenizer, CHOICE, items, tokens=size) for size in (tokens, 100_000))
    assert (result["n"], result["accuracy"]) == (alone["n"], alone["accuracy"])


def _share_of_a_rank(dist, file):
    result = evaluate_task(random_gpt(seq_len=512), tokenizer, CHOICE, make_items(CHOICE, 9), dist=dist)
    if dist.main:
        file.write_text(json.dumps(result))


def test_two_processes_ask_each_question_once(spawn, tmp_path):
    spawn(_share_of_a_rank, 2, tmp_path / "result.json")
    got, alone = json.loads((tmp_path / "result.json").read_text()), evaluate_task(random_gpt(seq_len=512), tokenizer, CHOICE, make_items(CHOICE, 9), dist=Dist())
    assert {**got, "seconds": 0} == {**alone, "seconds": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_folder(folder, tasks=TASKS, count=6):
    folder.mkdir()
    lines = []
    for task in tasks:
        path = folder / task.file
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in make_items(task, count)))
        lines.append(dict(label=task.label, file=task.file, task_type=task.kind, num_fewshot=task.shots, continuation_delimiter=task.delimiter, random_baseline=task.guess))
    (folder / "core_tasks.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_core_is_the_mean_of_all_tasks_or_nothing(tmp_path):
    folder, gpt, seen = write_folder(tmp_path / "icl"), random_gpt(seq_len=512), []
    found = evaluate(gpt, tokenizer, folder, show=seen.append)
    assert [result["label"] for result in found["tasks"]] == [task.label for task in TASKS] and found["tasks"] == seen and found["missing"] == []
    assert found["core"] == pytest.approx(sum(result["centered"] for result in seen) / 3)
    (folder / SCHEMA.file).unlink()
    found = evaluate(gpt, tokenizer, folder)
    assert found["core"] is None and found["missing"] == [SCHEMA.file] and len(found["tasks"]) == 2


def test_gzipped_files_read_the_same(tmp_path):
    folder = write_folder(tmp_path / "icl")
    path = core_eval.find_file(folder, CHOICE)
    plain = read_items(path, CHOICE)
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert read_items(core_eval.find_file(folder, CHOICE), CHOICE) == plain
    assert sorted(map(str, plain)) == sorted(map(str, make_items(CHOICE, 6))) and plain != make_items(CHOICE, 6), "shuffled, nothing lost"


def test_without_a_list_the_folder_holds_the_22_tasks(tmp_path):
    assert len(core_eval.read_tasks(tmp_path)) == len({task.label for task in core_eval.TASKS}) == 22
    assert len(evaluate(None, tokenizer, tmp_path)["missing"]) == 21 # hellaswag twice


@pytest.mark.parametrize("line, told", [
    ("{", "expected one JSON object a line"),
    ('{"query": "Q", "choices": ["a"]}', "choice.jsonl, example 1: expected query, choices, gold"),
    ('{"query": "Q", "choices": ["a"], "gold": 1}', "choice.jsonl, example 1: expected query, choices, gold"),
    *((json.dumps(dict(query="Q", choices=["a", "b"], gold=0) | change), "choice.jsonl, example 1: expected query, choices, gold of a multiple_choice task") for change in
      (dict(gold="1"), dict(gold=None), dict(gold=0.0), dict(gold=True), dict(gold=-1), dict(choices="ab"), dict(choices=["a", 2]), dict(query=None), dict(query="\ud83d"))),
    ("[" * 200_000, "expected one JSON object a line"),
    ('{"query": "Q", "choices": ["a", "b"], "gold": 1}', "shows 2 examples and asks another, so at least 3 are needed, got 1"),
])
def test_a_broken_file_is_one_clear_line(tmp_path, line, told):
    """A gold that is no number used to end in a TypeError, a choice that is no text in an AttributeError in the middle of the evaluation."""
    path = tmp_path / "choice.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=told):
        read_items(path, CHOICE)


def test_a_broken_list_is_one_clear_line(tmp_path):
    for line, told in [("[]", "entry 1: expected a task with label"), (json.dumps(dict(label="t", file="t", task_type="essay", num_fewshot=0, continuation_delimiter=" ", random_baseline=0)), "got 'essay'")]:
        (tmp_path / "core_tasks.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=told):
            core_eval.read_tasks(tmp_path)


def test_the_bundle_is_fetched_once_and_a_broken_one_is_thrown_away(base, tmp_path, monkeypatch):
    fetched = []

    def fetch(client, url, path, progress):
        fetched.append(url)
        if len(fetched) == 1:
            path.write_bytes(b"PK\x03\x04 half of a zip")
            return
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("eval_bundle/eval_data/a/choice.jsonl", "{}\n")
        progress(10)
    monkeypatch.setattr(core_eval, "fetch", fetch)
    with pytest.raises(UserError, match="arrived broken"):
        core_eval.download_bundle()
    folder = core_eval.download_bundle()
    assert (folder / "a" / "choice.jsonl").read_text() == "{}\n"
    assert core_eval.download_bundle() == folder and len(fetched) == 2


def test_several_processes_want_the_bundle_at_once(base, monkeypatch):
    """Only the fetch had a lock: under torchrun all ranks unpacked, one renamed, and the others ended with "Directory not empty"."""
    fetched = []

    def fetch(client, url, path, progress):
        fetched.append(url)
        time.sleep(0.1) # all have looked by then
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("eval_bundle/eval_data/a/choice.jsonl", "{}\n")
    monkeypatch.setattr(core_eval, "fetch", fetch)
    with ThreadPoolExecutor(4) as pool:
        folders = {future.result() for future in [pool.submit(core_eval.download_bundle) for _ in range(4)]}
    assert len(folders) == len(fetched) == 1 and (folders.pop() / "a" / "choice.jsonl").is_file()


def test_a_bundle_that_one_process_lacks_is_measured_by_none(base, monkeypatch):
    """The other ranks would go on to the first task and wait there for the one that gave up."""
    monkeypatch.setattr(core_eval, "download_bundle", lambda: Path("here"))
    monkeypatch.setattr(core_eval, "evaluate", lambda gpt, tokenizer, folder, *_, **__: dict(tasks=[folder]))
    run_core = lambda dist: base_eval.run_core(SimpleNamespace(gpt=None, tokenizer=None), SimpleNamespace(core="download", core_max_per_task=-1), dist, 1)
    assert run_core(Dist()) == (dict(tasks=[Path("here")]), None)
    for other, why in (("no way out", "needs the network or a local folder of the 22 tasks (--core FOLDER): no way out"), (None, None)):
        monkeypatch.setattr("torch.distributed.all_gather_object", lambda told, mine: told.__setitem__(slice(None), [mine, other]))
        assert run_core(Dist(world=2)) == (None if why else dict(tasks=[Path("here")]), why)


# ---------------------------------------------------------------------------------------------------------------------
# scripts.base_eval

def run_base_eval(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["base_eval", *arguments])
    base_eval.main()


def test_base_eval_writes_its_section_and_a_second_stage_joins_it(base, tmp_path, monkeypatch, capsys):
    gpt, _, _ = make_run("base", "sft")
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    common = ["--source", make_text(tmp_path / "text"), "--tokens", "2048", "--samples", "4", "--dtype", "fp32"]
    run_base_eval(monkeypatch, "--stage", "sft", *common)
    assert "core=not_measured" in capsys.readouterr().out
    run_base_eval(monkeypatch, "--stage", "base", "--core", str(write_folder(tmp_path / "icl")), *common)
    data = report.read_data("base")
    assert list(data) == ["base", "sft"] and data["base"]["val_bpb"] == data["sft"]["val_bpb"], "the same networks under two names"
    assert data["sft"]["core"] is None and len(data["base"]["core"]["tasks"]) == 3
    assert data["base"]["samples"][0][2].keys() == {"plain", "memory"}
    page = report.assemble()
    assert "CORE: not measured, needs the files of the 22 tasks" in page and f"CORE of base: **{data['base']['core']['core']:.4f}**" in page

    token_bytes, nats, count = tiny_tokenizer().token_bytes(), 0.0, 0 # bits per byte, the slow way
    for batch in val_loader(open_source(common[1], "val"), tiny_tokenizer(), 1, gpt.config.seq_len, align=32, max_rows=4):
        for ids, target, loss in zip(batch.inputs[0], batch.targets[0], gpt(batch.inputs, batch.targets, "none")[0].tolist()):
            if target >= 0 and token_bytes[target]:
                nats, count = nats + loss, count + token_bytes[target]
    assert data["base"]["val_bpb"] == pytest.approx(nats / math.log(2) / count, rel=1e-4)


@pytest.mark.parametrize("core, told", [("off", "turned off"), ("download", "needs the network or a local folder"), ("", "NANOCHAT_DATA_DIR")])
def test_why_core_was_not_measured(base, tmp_path, monkeypatch, core, told):
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)

    def offline(*_):
        raise UserError("no way out")
    monkeypatch.setattr(core_eval, "fetch", offline)
    found, why = base_eval.run_core(None, base_eval.parser.parse_args(["--core", core]), Dist(), 100)
    assert found is None and told in why


def test_no_question_at_all_is_refused(monkeypatch):
    """It ended in a division by zero, after bits per byte had been measured."""
    with pytest.raises(UserError, match="expected at least 1, or -1 for all"):
        run_base_eval(monkeypatch, "--core-max-per-task", "0")


@pytest.mark.parametrize("where, told", [("run_core", "Lower --device-batch"), ("continuations", "Lower --budget")])
def test_memory_that_runs_out_names_the_flag_that_helps(base, tmp_path, monkeypatch, where, told):
    make_run("base")
    monkeypatch.setattr(base_eval, where, lambda *_: torch.empty(2**58))
    with pytest.raises(UserError, match=f"memory ran out.*{told}"):
        run_base_eval(monkeypatch, "--source", make_text(tmp_path / "text"), "--tokens", "2048", "--core", "off")


def test_a_core_folder_that_is_not_there_is_a_mistake(base, tmp_path):
    with pytest.raises(UserError, match="expected a folder"):
        base_eval.run_core(None, base_eval.parser.parse_args(["--core", str(tmp_path / "none")]), Dist(), 100)


def test_core_files_are_found_in_the_data_folder(base, tmp_path, monkeypatch):
    write_folder(tmp_path / "icl")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    make_run("base")
    found, why = base_eval.run_core(load_stage("base", "t"), base_eval.parser.parse_args(["--core-max-per-task", "2"]), Dist(), 4000)
    assert why is None and [task["n"] for task in found["tasks"]] == [2, 2, 2]


def test_the_real_files(base):
    """All 22 tasks as they are published: every file is read, every prompt is made, cropped prompts are counted."""
    folder = Path(os.environ.get("NANOCHAT_SHARED_DATA", Path(__file__).parent.parent.parent / "shared" / "data")) / "icl"
    if not folder.is_dir():
        pytest.skip(f"needs the files of the 22 tasks in {folder} (NANOCHAT_SHARED_DATA names the folder above)")
    gpt, _, _ = make_run()
    found = evaluate(gpt, tiny_tokenizer(), folder, most=2)
    assert len(found["tasks"]) == 22 and found["missing"] == [] and math.isfinite(found["core"])
    cropped = {task["label"]: task["cropped"] for task in found["tasks"]}
    assert cropped["copa"] == 0 and cropped["boolq"] == 1, "one short question; ten passages in a row of 512 tokens"
