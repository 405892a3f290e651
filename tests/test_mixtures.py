"""
What mid-training and fine-tuning talk about, with any text that somebody brings: every conversation of a mixture can be made and fits its
row, what cannot be made is left out and told before training, and changed data is not taken for the old.
"""
import json
import random
import shutil
from pathlib import Path

import pytest

import scripts.chat_sft as chat_sft
from nanochat import packing
from nanochat.common import UserError, checkpoint_dir
from nanochat.packing import fate
from nanochat.tokenizer import Tokenizer
from scripts.mixtures import Everything, conversations, own_data, texts_of
from tasks.common import dialogue
from tasks.customjson import CustomJSON
from tests.tiny_run import make_run, make_text, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def functions_only(folder):
    """Twelve files without a class, so without a base class to ask for."""
    folder.mkdir()
    for n in range(12):
        (folder / f"part{n}.py").write_text("".join(f"def step{n}_{m}(left, right, size={n + 20}):\n    return left * {m + 30}\n\n\n" for m in range(9)))
    return f"dir:{folder}"


def python_package(folder):
    """A package as people write them, long files and short ones, and one that is empty."""
    shutil.copytree(ROOT / "nanochat", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return f"dir:{folder}"


def write_conversations(path, count, said="Hello."):
    path.write_text("".join(json.dumps({"messages": dialogue(f"Question {n}?", said)}) + "\n" for n in range(count)))
    return path


def long_mixture(source, split, tokenizer, seq_len):
    return conversations(source, split, tokenizer, seq_len, hub=False).parts[1][0]


# ---------------------------------------------------------------------------------------------------------------------
# Questions about long texts

@pytest.mark.parametrize("seq_len", [512, 1024, 2048])
@pytest.mark.parametrize("make", [functions_only, python_package])
def test_every_conversation_can_be_made_and_fits_its_row(tmp_path, make, seq_len):
    """
    mid_train --source dir:nanochat ended, after base training was paid for, in "none of 24 texts has two classes with two facts each
    that fit a length of 616", and a folder of functions in "none of 284 texts has a definition (base)": a kind of question was drawn
    that the texts did not have, or a length too short for what they had.
    """
    tokenizer = tiny_tokenizer()
    _, (mixture, _), (facts, share), *rest = conversations(make(tmp_path / "text"), "train", tokenizer, seq_len, hub=False).parts
    definitions = [task for some, _ in rest for task in some.tasks]
    code = {512: [], 1024: [4], 2048: [4, 8, 12] if make is python_package else [4, 8]}[seq_len] # twelve files: one has to be left to fill with
    assert [task.questions for task in definitions] == code and [share for _, share in rest] == ([0.25] if code else [])
    assert share == 0.45 and [task.pairs for task in facts.tasks] == {512: [2, 4, 8], 1024: sorted(2 * [2, 4, 8, 12, 16]), 2048: sorted(2 * [2, 4, 8, 12, 16])}[seq_len]
    assert {"passkey", "multikey", "codeqa"} <= {task.name for task in mixture.tasks} # with 400 tokens, the least that anybody would train
    assert len({mixture[i]["task"] for i in range(100)}) == len(mixture.tasks)
    for task in [mixture, *mixture.tasks, *facts.tasks, *definitions]:
        for i in range(100 if task is mixture else 25):
            assert fate(tokenizer.render(task[i])[1], seq_len) == "whole"


def test_classes_are_asked_about_where_rows_have_room_for_two(tmp_path):
    names = lambda seq_len: {task.name for task in long_mixture(make_text(tmp_path / str(seq_len)), "train", tiny_tokenizer(), seq_len).tasks}
    assert names(2048) - names(512) == {"topicshift"}


def test_what_is_left_out_is_told(tmp_path, capsys):
    prose = tmp_path / "prose"
    prose.mkdir()
    for n in range(30):
        (prose / f"{n}.txt").write_text("Nothing to ask about code here.\n" * 50)
    long_mixture(f"dir:{prose}", "val", tiny_tokenizer(), 1024)
    assert "left out    val: questions about code, 0 of the texts are Python files that define something, it takes 10" in capsys.readouterr().out
    mixture = long_mixture(functions_only(tmp_path / "functions"), "train", tiny_tokenizer(), 2048)
    assert "left out    train: topicshift, fewer than 2 files have a class" in capsys.readouterr().out
    assert "topicshift" not in {task.name for task in mixture.tasks}


def test_another_language_has_longer_questions(tmp_path, capsys):
    """
    A tokenizer of Chinese text spells English in single bytes, so that eight keys and four questions take 400 tokens: a text of 320 was asked
    for, and mid-training ended in a ValueError.
    """
    rng, folder = random.Random(0), tmp_path / "text"
    folder.mkdir()
    for n in range(30):
        (folder / f"{n}.txt").write_text("".join(chr(rng.randrange(0x4E00, 0x4F00)) for _ in range(2000)) + "\n")
    tokenizer = Tokenizer.train([path.read_text() for path in folder.iterdir()], 600)
    mixture = long_mixture(f"dir:{folder}", "train", tokenizer, 1024)
    assert [(task.name, task.low) for task in mixture.tasks] == [("passkey", 400), ("multikey", 800)]
    assert all(fate(tokenizer.render(mixture[i])[1], 1024) == "whole" for i in range(100))
    assert [task.name for task in long_mixture(f"dir:{folder}", "train", tokenizer, 512).tasks] == ["passkey"]
    assert "left out    train: multikey, the facts and questions of a conversation take up to" in capsys.readouterr().out


def test_rows_and_texts_that_cannot_be_are_told(tmp_path):
    source = functions_only(tmp_path / "text")
    with pytest.raises(UserError, match="rows of 256 tokens are too short .* at least 464"):
        conversations(source, "train", tiny_tokenizer(), 256, hub=False)
    for path in (tmp_path / "text").iterdir():
        path.write_text("")
    with pytest.raises(UserError, match="holds no text"):
        texts_of(source, "val")


# ---------------------------------------------------------------------------------------------------------------------
# Changed data

def fingerprints(source, tokenizer, **more):
    return [getattr(items, "fingerprint", None) for items, _ in conversations(source, "train", tokenizer, 1024, hub=False, **more).parts]


def test_a_mixture_is_known_by_what_it_is_made_of(tmp_path):
    """A run that was killed went on with the conversations of another text, as long as there were as many of them."""
    source = functions_only(tmp_path / "text")
    before = fingerprints(source, tiny_tokenizer())
    assert None not in before and before == fingerprints(source, tiny_tokenizer()) != fingerprints(source, tiny_tokenizer(), seed=1)
    path = next(path for path in sorted((tmp_path / "text").iterdir()) if path.read_text() in texts_of(source, "train"))
    path.write_text(path.read_text().replace("left", "west")) # the name and the size stay
    after = fingerprints(source, tiny_tokenizer())
    assert after[0] == before[0] and after[1] != before[1]
    task = conversations(source, "train", tiny_tokenizer(), 1024, hub=False).parts[0][0]
    assert Everything(task, tiny_tokenizer()).fingerprint == task.fingerprint


def test_own_data_is_opened_and_known_before_anything_is_trained(tmp_path):
    source, mine = functions_only(tmp_path / "text"), write_conversations(tmp_path / "mine.jsonl", 30)
    before = own_data({source, f"{source}:0.5,stdlib:0.5"}, mine)
    assert all(before) and before == own_data({source}, mine)
    mine.write_text(mine.read_text().replace("Hello", "Howdy")) # as long as it was
    assert own_data({source}, mine)[0] == before[0] and own_data({source}, mine)[1] != before[1]
    (tmp_path / "text" / "more.py").write_text("x = 1\n")
    assert own_data({source}, "")[0] != before[0]
    assert own_data({"stdlib", "climbmix:0.8,stdlib:0.2"}, "") == ("", ""), "nothing of the user's own; the shards may come later"
    mine.write_text("{")
    for sources, conversations, told in [({f"dir:{tmp_path}/nowhere"}, "", "no folder at"), ({"books"}, "", "no source called"),
                                         ({source}, mine, "mine.jsonl, line 1: expected JSON"), ({source}, tmp_path / "none", "there is none")]:
        with pytest.raises(UserError, match=told):
            own_data(sources, conversations)


# ---------------------------------------------------------------------------------------------------------------------
# One's own conversations

@pytest.mark.parametrize("count, held", [(1, 0), (19, 0), (20, 1), (39, 1), (40, 2), (205, 10)])
def test_what_is_validated_on_was_not_trained_on(tmp_path, count, held):
    """Fine-tuning validated on the very conversations it trained on: learning them by heart looked like progress."""
    own = CustomJSON(write_conversations(tmp_path / "mine.jsonl", count))
    said = lambda task: [conversation["messages"][0]["content"] for conversation in task]
    train, val = own.part("train"), own.part("val")
    if held:
        assert not set(said(train)) & set(said(val)) and sorted(said(train) + said(val)) == sorted(said(own)) and len(val) == held
        assert said(val)[0] == "Question 19?" and train.fingerprint != val.fingerprint
    else:
        assert said(train) == said(val) == said(own)
    assert own.fingerprint == CustomJSON(tmp_path / "mine.jsonl").fingerprint


def test_fine_tuning_tells_what_it_makes_of_ones_own_conversations(base, tmp_path, monkeypatch, capsys):
    """
    Of nine conversations seven were never trained on, as their answers lay beyond the row, and nothing was said. The whole script, on next to
    nothing: what is told at the start is what is counted at the end, and the same file is needed to go on.
    """
    make_run("mid", memory=False)
    monkeypatch.setattr(packing, "WAITING", 16) # conversations that a lane draws before its first row
    mine = tmp_path / "mine.jsonl"
    long, talk = "Far too long a question. " * 99, [dialogue("Short?", "Yes.")] * 30
    talk += [dialogue(long, "Never read.")] * 7 + [dialogue("Short?", "A long answer. " * 99)] * 9 + [dialogue("Hi", "Hello.", "And?")]
    mine.write_text("".join(json.dumps(messages) + "\n" for messages in talk))
    source = make_text(tmp_path / "text", files=20)
    command = ["chat_sft", "--source", source, "--conversations", str(mine), "--num-steps", "2", "--max-seq-len", "512", "--batch-tokens", "1024", "--device-batch", "2",
               "--eval-tokens", "2048", "--device", "cpu", "--dtype", "fp32", "--save-every", "1"]
    monkeypatch.setattr("sys.argv", command)
    chat_sft.main()
    out = capsys.readouterr().out
    assert ("own         47 conversations: 9 longer than the row of 512 tokens and cut there, 7 without an answer within it and skipped, "
            "1 whose last message had no answer and was left out; 2 held out for validation") in out
    summary = dict(pair.split("=", 1) for pair in out.splitlines()[-1].split()[1:])
    assert int(summary["documents"]) > int(summary["skipped"]) > 0 == int(summary["empty"]) and int(summary["cut"]) > 0

    folder = checkpoint_dir("sft", "t")
    shutil.rmtree(folder / "step_000002") # what a kill after the first step leaves
    mine.write_text(mine.read_text().replace("Yes.", "Nay."))
    monkeypatch.setattr("sys.argv", [*command, "--resume"])
    with pytest.raises(UserError, match="conversations: the checkpoint has"):
        chat_sft.main()
    write_conversations(mine, 5)
    own = CustomJSON(mine)
    assert chat_sft.tell(own, tiny_tokenizer(), 512).endswith("validation is on the same ones, as they are fewer than 20")
