"""mega_eval on tiny networks: its tables and pictures stand in the report, and its last line has all the numbers, the sessions' telemetry too."""

import json
import shlex
import sys

import numpy as np
import pytest
import torch

import scripts.mega_eval as mega_eval
from megacontext.evaluate import METHODS, WAYS, swapped
from megacontext.runtime import Session
from megacontext.search import block_scores
from megacontext.telemetry import Telemetry
from megacontext.tree import MegaTree, make_header
from nanochat import report
from nanochat.common import UserError
from nanochat.gpt import Entries
from scripts import asked, recall, recall_eval
from scripts.asked import answer_rows
from scripts.load import load_stage
from tests.tiny_run import make_run, make_text, tiny_tokenizer


def test_the_tables_and_the_json_tell_what_the_sessions_did(base, tmp_path, monkeypatch, capsys):
    make_run("sft", seq_len=512)
    source = make_text(tmp_path / "text", files=120)
    eager = lambda *args, **settings: Session(*args, **settings, margin=0.0) # networks that learnt nothing promise little: here they need not promise more
    monkeypatch.setattr(mega_eval, "long_documents", lambda source, tokenizer, T: [list(range(1, 60)) * 10, list(range(60, 1, -1)) * 10])
    monkeypatch.setattr(recall, "Session", eager)
    monkeypatch.setattr(sys, "argv", ["mega_eval", "--checkpoint", "sft/t", "--source", source, "--device", "cpu", "--budget", "192", "--documents", "2", "--measured-rows", "2",
                                      "--seeds", "2", "--recall-tasks", "passkey,codeqa", "--recall-lengths", "700", "--recall-depths", "0,0.9", "--recall-problems", "1"])
    mega_eval.main()
    out = capsys.readouterr().out
    data, section = json.loads(out.splitlines()[-1]), (report.folder() / "mega.md").read_text()
    assert data == report.read_data("mega") and (data["stage"], data["tag"], data["seq_len"], data["lengths"]) == ("sft", "t", 512, [128, 256, 512])

    assert set(data["trailing"]) == {"128", "256", "512"} and all(set(row) == set(METHODS) for row in data["trailing"].values())
    window = data["trailing"]["512"]["window"]
    assert window["better_than_window"]["mean"] == window["above_window"]["mean"] == 0 and all(set(numbers) == {"mean", "spread"} for numbers in window.values())
    assert set(data["dnll"]) == {"1", "1 newest"} and set(data["dnll"]["1"]) == {"32", "64", "128"} and data["reconstruction"]["1"]["own"]["mean"] > 0
    assert "nothing was trained" not in section and "better than the window by, over the last 32, 64, 128 tokens" in section
    below = data["dnll"]["1"]["32"]["below_0.1_a_token"]
    assert f"| {100 * below['mean']:.0f}% +- {100 * below['spread']:.0f}% |" in section
    assert data["diversity"]["trained"]["1"]["n"]["mean"] == 2 * 16, "rows of 16 blocks have no level-2 gist"
    assert set(data["lens"]["gain"]) == set(WAYS) and data["lens"]["regret"]["oracle"] == dict(mean=0.0, spread=0.0)
    assert set(data["lens"]["signs"]) == set(WAYS) and data["lens"]["signs"]["oracle"]["mean"] == 1 and 0 <= data["lens"]["positive"]["mean"] <= 1 and "| choice | gain | regret | correlation | signs right |" in section
    answers = data["lens_asked"]["passkey"]
    assert set(answers["gain"]) == set(WAYS) and answers["regret"]["oracle"]["mean"] == 0 and "| passkey | lensnet |" in section
    assert set(data["recall"]["passkey"]["700"]["0.9"]) == set(recall.COLUMNS) and set(data["recall"]) | {name.split("/")[0] for name in data["recall_missing"]} == {"passkey", "codeqa"}

    assert "| passkey, 700 tokens, window | 0% +- 0% | 0% +- 0% |" in section
    for name in ("mega_context", "mega_lens", "mega_recall"):
        assert f"]({name}.png)" in section and (report.folder() / f"{name}.png").stat().st_size > 1000

    told = data["telemetry"]
    assert list(told) == ["lensnet/700", "told/700", "recency/700", "gists/700"]
    for name, summary in told.items():
        assert summary["ticks"] >= 1 and 0 < summary["budget_use"] <= 1 and set(summary["ms"]) == set(recall.STAGES)
        assert sum(summary["residency"].values()) == pytest.approx(192 * summary["budget_use"])
        assert summary["ms"]["splice"]["count"] == summary["ticks"]
    assert told["lensnet/700"]["edits"]["expand 1"] > 0 and told["lensnet/700"]["swap_rate"] > 0
    for name in ("recency", "gists"):
        assert not any(kind.startswith("expand") for kind in told[f"{name}/700"]["edits"]), "without LensNet, or where nothing raw is allowed, blocks are only closed"
    line = [line for line in out.splitlines() if line.startswith("| 700 tokens, lensnet |")][-1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == str(told["lensnet/700"]["ticks"]) and cells[4].startswith("0: ")
    assert line in section and "| 700 tokens, recency |" in out
    numbers = dict(pair.split("=") for pair in shlex.split(next(line for line in out.splitlines() if line.startswith("summary "))) if "=" in pair)
    assert float(numbers["lensnet/700/budget_use"]) == pytest.approx(told["lensnet/700"]["budget_use"], rel=1e-4) and float(numbers["loss_window"]) > 0


@pytest.mark.parametrize("flags, said", [
    (["--seeds", "1"], "--seeds of at least 2"), (["--measured-rows", "1"], "--measured-rows from 2"), (["--lengths", "100"], "multiples of 128"), (["--lengths", "a"], "numbers with commas"),
    (["--seq-len", "128"], "--seq-len of at least 512"), (["--seq-len", "1024"], "trained on rows of 512"), (["--recall-tasks", "poetry"], "--recall-tasks among passkey"), (["--recall-depths", "2"], "depths from 0 to 1"), (["--budget", "40"], "raise --budget")])
def test_what_cannot_be_measured_is_said_before_anything_is(base, tmp_path, monkeypatch, flags, said):
    make_run("sft", seq_len=512)
    monkeypatch.setattr(mega_eval, "long_documents", lambda source, tokenizer, T: [list(range(1, 60)) * 10] * 2)
    monkeypatch.setattr(sys, "argv", ["mega_eval", "--source", make_text(tmp_path / "text", files=40), "--device", "cpu", *flags])
    with pytest.raises(UserError, match=said):
        mega_eval.main()


@pytest.mark.parametrize("flags, said", [
    (["--stage", "base", "--recall-tasks", "passkey", "--recall-lengths", "700"], "^--recall-tasks, --recall-lengths: expected .* got base"),
    (["--checkpoint", "base/t", "--recall-problems", "2"], "^--recall-problems: expected .* got base"), # the default, and given all the same
    (["--checkpoint", "sft/t", "--recall-lengths", "", "--recall-depths", "0.5", "--recall-budget", "192"], "^--recall-depths, --recall-budget: expected --recall-lengths")])
def test_a_flag_of_recall_that_would_change_nothing_is_refused(base, monkeypatch, flags, said):
    """A base model is asked no questions: with the flags that say which, mega_eval measured for an hour and had no table of them."""
    monkeypatch.setattr(mega_eval, "load_stage", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["mega_eval", *flags])
    with pytest.raises(UserError, match=said):
        mega_eval.main()


@pytest.mark.parametrize("flags", [["--stage", "base"], ["--stage", "base", "--recall-lengths", ""], ["--stage", "sft", "--recall-lengths", "", "--recall-tasks", "passkey"], ["--stage", "mid", "--recall-depths", "0.5"]])
def test_what_has_its_effect_is_not_refused(base, monkeypatch, flags):
    """No table of recall is what an empty --recall-lengths asks for; --recall-tasks are also those that LensNet is asked at the end of a row."""
    monkeypatch.setattr(sys, "argv", ["mega_eval", *flags])
    with pytest.raises(UserError, match="^no checkpoint of stage"):
        mega_eval.main()


def test_what_one_sign_for_all_would_get_right_is_told():
    """One edit in ten is worth more than the mean: who never says so has 90% of the signs right, and LensNet's 70% are no merit."""
    told = lambda mean: dict(mean=mean, spread=0.1)
    assert "always saying no gets 90% right" in mega_eval.above_noise(dict(positive=told(0.1), above_noise=told(0.3)))
    assert "always saying yes gets 75% right" in mega_eval.above_noise(dict(positive=told(0.75), above_noise=told(0.3)))
    assert "No edit's utility" in mega_eval.above_noise(dict(above_noise=told(0.0)))


@pytest.mark.parametrize("documents, count", [(2, 5), (3, 4), (3, 7), (6, 7), (6, 20)])
def test_swapped_gists_are_of_another_document_however_few_there_are(documents, count):
    """Six books, seven rows: the first row had the gists of the last, which is of the same book, and the control was none."""
    long = [[n] * 1000 for n in range(documents)]
    for size in (2, 4):
        for part in mega_eval.parts(mega_eval.sample_rows(long, 320, count, np.random.default_rng(0))[0], size):
            x = part[:, :321, None].float()
            own, other = x[:, -1, 0], swapped(Entries(x, []), 320).x[:, -1, 0]
            assert (own != other).all()


# ----------------------------------------------------------------------------------------------------------------------
# Asked at the end of a row

class Told:
    """Conversations about one apple each, at a place of its own."""

    def __init__(self, sizes, at=5):
        self.made = []
        for n in sizes:
            said = [f"{i} pears" for i in range(n)]
            said.insert(at, "The apple is red.")
            text = ", ".join(said)
            self.made.append({"messages": [dict(role="user", content=text + "\nHow is the apple?"), dict(role="assistant", content="The apple is red.")],
                              "evidence": [[text.index("The apple"), text.index(" is red") + 7]]})

    def __len__(self):
        return len(self.made)

    def __getitem__(self, i):
        return self.made[i]


def test_a_row_ends_in_its_answer():
    """The last block's targets begin with the answer; what it asks for stands before; a conversation that is too short, or lost its evidence, is passed over."""
    tokenizer, T = tiny_tokenizer(), 512
    rows, sizes = answer_rows(tokenizer, Told([40, 300, 64, 68], at=30), T, 2)
    for row, size in zip(rows.tolist(), sizes):
        answer = row[T - 32:]
        assert answer[0] == tokenizer.special("<|assistant_start|>") and tokenizer.decode(answer[1:size]) == "The apple is red." and size > 5
        assert answer[size] == tokenizer.special("<|assistant_end|>") and set(answer[size + 1:]) == {tokenizer.bos} and "The apple is red." in tokenizer.decode(row[:T - 32])
    with pytest.raises(ValueError, match="2 of 4 conversations fill a row of 512 tokens"):
        answer_rows(tokenizer, Told([40, 300, 64, 68], at=30), T, 3)


def test_what_follows_an_answer_counts_for_nobody(base):
    """LensNet's scores are those of a search behind the question, and only the answer's tokens gain."""
    networks = mega_eval.Networks(*make_run("sft", seq_len=512))
    rows, sizes = answer_rows(tiny_tokenizer(), Told([64, 68], at=30), 512, 2)
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asked, "lens_quality", lambda some, found: kept.append((some, found)))
        asked.ask(networks, rows, sizes, 192, np.random.default_rng(0))
    (some, (one,)), = kept
    assert one.q == 15 and (one.gain[0, :, sizes[0]:] == 0).all() and (one.gain[:, :, :min(sizes)] != 0).any()
    tree = MegaTree.in_memory(make_header(32, 0))
    tree.append_tokens(rows[1, :480].tolist())
    wanted = block_scores(networks.lensnet, tree, lambda centres: torch.as_tensor(480 - centres, dtype=torch.float32))
    assert np.array_equal(some.scores["lensnet"][1, 15, :15], wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Ways of remembering

def test_the_ways_of_remembering_see_what_they_may(base):
    """
    What is read behind: gists only has nothing raw before its tail; recency opens nothing; who is told has the answer's block raw all the time; a window is
    the plain model on the newest tokens behind the first. All sessions start from one tree, and leave it as they found it.
    """
    make_run("sft", seq_len=512)
    loaded, seen, windows = load_stage("sft", "t", device="cpu"), {}, []

    class Watched(Session):
        def _forward(self, entries, start):
            seen.setdefault((self.n_diff, bool(self.pins.never), bool(self.pins.raw)), []).append(([span for span in self.spans if span.level == 0], self.tree.length))
            return super()._forward(entries, start)

    class Said:
        def generate(self, stream, ids, max_tokens, temperature):
            if isinstance(stream, Session):
                stream.feed(ids)
            else:
                windows.append(ids)
            return []

    text = " ".join(f"{n} apples" for n in range(400))
    at = text.index("50 apples")
    conversation = {"messages": [dict(role="user", content=text), dict(role="assistant", content="yes")], "evidence": [[at, at + 9]]}
    prompt = loaded.tokenizer.render_prompt({"messages": conversation["messages"][:1]})
    assert len(prompt) > 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "Session", Watched)
        said, found = recall.answers(loaded, Said(), conversation, 192, 16, {way: Telemetry() for way in recall.SESSIONS})
    assert set(said) == set(recall.WAYS) and set(seen) == {(4, False, False), (0, False, True), (0, False, False), (4, True, False)}
    head = (len(prompt) - 32) // 32 * 32 # a budget of 192 has a raw tail of 32 tokens
    assert windows == [prompt[:1] + prompt[1 - (192 - 16):]]
    for spans, length in seen[4, True, False]:
        assert all(span.start >= head for span in spans), "gists only, yet an old block is raw"
    assert any(span.start < head for spans, _ in seen[0, False, False] for span in spans), "recency keeps raw what the budget has room for"
    (start, stop), = recall.token_ranges(loaded.tokenizer, conversation)
    assert loaded.tokenizer.decode(prompt[start:stop]).strip() == "50 apples"
    blocks = set(range(start // 32, (stop - 1) // 32 + 1))
    assert all(blocks <= {span.index for span in spans} for spans, _ in seen[0, False, True])
    assert not any(blocks <= {span.index for span in spans} for spans, _ in seen[0, False, False])


@pytest.mark.parametrize("fact, wanted", [("Ünïcode 字 is here.", "Ünïcode 字 is here."), ("three words stand", "three words stand")])
def test_evidence_is_found_among_tokens(base, fact, wanted):
    """Characters of the text become tokens of the rendered conversation, whatever bytes and merges lie between."""
    make_run("sft", seq_len=512)
    tokenizer = load_stage("sft", "t", device="cpu").tokenizer
    text = "Ä line before.\n" * 7 + fact + "\nAnd ß after."
    conversation = {"messages": [dict(role="user", content=text)], "evidence": [[text.index(fact), text.index(fact) + len(fact)]]}
    (start, stop), = recall.token_ranges(tokenizer, conversation)
    assert tokenizer.decode(tokenizer.render_prompt(conversation)[start:stop]).strip() == wanted


def test_recall_is_a_command_of_its_own(base, tmp_path, monkeypatch, capsys):
    """The same tables without the rest, its JSON last; a model without a memory has none."""
    make_run("sft", seq_len=512)
    source = make_text(tmp_path / "text", files=40)
    flags = ["--source", source, "--device", "cpu", "--seeds", "1", "--recall-tasks", "passkey", "--recall-lengths", "700", "--recall-depths", "0.5", "--recall-problems", "1"]
    monkeypatch.setattr(sys, "argv", ["recall_eval", *flags])
    recall_eval.main()
    out = capsys.readouterr().out
    data = json.loads(out.splitlines()[-1])
    assert set(data["recall"]["passkey"]["700"]["0.5"]) == set(recall.COLUMNS) and data["recall_budget"] == 192 and "passkey, 700 tokens, found" in out
    assert report.read_data("recall") == data and (report.folder() / "recall.png").read_bytes().startswith(b"\x89PNG") and "recall.png" in (report.folder() / "recall.md").read_text()
    make_run("sft", seq_len=512, memory=False)
    with pytest.raises(UserError, match="trained without memory"):
        recall_eval.main()
