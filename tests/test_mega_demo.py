"""The demo's page on a tiny run: its arithmetic adds up, its yes is a yes, its places are the places, and its own check can fail."""

import random
import re
import sys

import numpy as np
import pytest

import scripts.mega_demo as demo
from megacontext.runtime import Session
from megacontext.span import BLOCK, width_of
from nanochat.common import UserError
from scripts.code_base import CodeBase, take_files
from scripts.load import load_stage, open_tree
from tests.tiny_run import make_run, make_text, tiny_tokenizer


def number(text):
    return int(text.replace(",", ""))


def numbers(pattern, text):
    return [number(one) for one in re.search(pattern, text).groups()]


@pytest.fixture
def page(base, tmp_path, monkeypatch, capsys):
    """page(*flags) -> what the demo prints about a folder of small files."""
    make_run("sft")
    make_text(tmp_path / "code")
    monkeypatch.setattr(demo, "RUNS", 10_000)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["mega_demo", "--code", str(tmp_path / "code"), "--device", "cpu", "--max-tokens", "12", *flags])
        demo.main()
        return capsys.readouterr().out
    return run


def check_turn(text, budget):
    """One turn of the page: the tree, the context line, the runs of spans and the fate of the answer agree. Returns (opened, rank)."""
    length, = numbers(r"edits +\d+ at ([\d,]+) tokens", text)
    counts = [number(one) for one in re.findall(r"L\d ([\d,]+) gists", re.search(r"^tree .*", text, re.M)[0])]
    assert 0 <= length // BLOCK - counts[0] <= 8, "the blocks of the raw tail get their gists later"
    assert counts[1:] == [counts[0] // BLOCK ** level for level in range(1, len(counts))] and counts[-1] < BLOCK

    context = re.search(r"^context .*", text, re.M)[0]
    gists = {int(level): int(n) for n, level in re.findall(r"(\d+) gists of L(\d)", context)}
    raw, used, most = numbers(r"(\d+) raw tokens = (\d+) of (\d+) entries", context)
    assert sum(gists.values()) + raw == used <= most == budget

    at, seen = 0, {}
    for name, start, last, n, width in re.findall(r"^ +(L\d|raw|laid) +([\d,]+)\.\.([\d,]+) +(\d+) x ([\d,]+) ", text, re.M):
        level, n, covered = int(name[1]) if name[0] == "L" else 0, int(n), number(last) + 1 - number(start)
        if name == "laid":
            assert number(last) < at and covered == n * number(width) == n * BLOCK
            seen[0] = seen.get(0, 0) + covered
            continue
        assert number(start) == at, "the runs tile the timeline"
        assert number(width) == width_of(level) or number(last) + 1 == length
        assert covered == n * width_of(level) or level == 0 and number(last) + 1 == length and (n - 1) * BLOCK < covered < n * BLOCK
        seen[level], at = seen.get(level, 0) + (n if level else covered), at + covered
    assert at == length and seen == {0: raw, **gists}

    opened, rank, scored = re.search(r"opened: (yes|no); rank (\d+) of (\d+) by score", text).groups()
    assert (opened == "yes") == (", raw after the refocus" in text)
    assert 1 <= int(rank) <= int(scored) == numbers(r"scores +(\d+) spans", text)[0]
    return opened == "yes", int(rank)


@pytest.mark.parametrize("budget", [192, 512])
def test_the_page_adds_up(page, budget):
    text = page("--tokens", "12000", "--budget", str(budget))
    turns = text.split("\n--- ")[1:]
    assert len(turns) == 6 and all(turn.startswith(f"turn {n}: ") for n, turn in enumerate(turns[:5], 1))
    fates = [check_turn(turn, budget) for turn in turns[:5]]
    assert f"opened {sum(opened for opened, _ in fates)} of 5" in turns[5]
    assert [int(rank) for rank in re.findall(r"(\d+)/\d+", turns[5])] == [rank for _, rank in fates]
    fed, = numbers(r"opens to its tokens, of the ([\d,]+) that were fed", turns[5])
    peak, most = numbers(r"([\d,]+) of ([\d,]+) entries at most", turns[5])
    assert fed > 12000 and peak <= most == budget
    assert max(map(len, text.splitlines())) <= demo.WIDTH


def test_the_same_seed_gives_the_same_page(page):
    same = lambda text: re.sub(r"(?m)^time .*|in [\d,]+ ms|[\d.]+ ms a token|ms a tick.*", "", text)
    first, again, other = page("--tokens", "4000"), page("--tokens", "4000"), page("--tokens", "4000", "--seed", "1")
    assert same(first) == same(again) != same(other)


@pytest.fixture
def tell_lensnet(monkeypatch):
    """LensNet is told which blocks hold the answers, once they are known: after the first turn."""
    made = []
    scenario = demo.scenario
    monkeypatch.setattr(demo, "scenario", lambda code, seed: made.append((code, scenario(code, seed))) or made[0][1])

    def score(self, found=None):
        (code, turns), = made
        wanted = {block for turn in turns for block in code.blocks(turn.first, turn.last - 1)} if len(code.token_at) else set()
        return [0.0 if span.live else 5.0 if any(span.start <= block * BLOCK < span.stop for block in wanted) else -1.0 for span in self.spans], []

    monkeypatch.setattr(Session, "score", score)


def test_a_lensnet_that_knows_the_answer_opens_it(page, tell_lensnet):
    """The demo says "opened: yes" where it is so."""
    fates = [check_turn(turn, 448) for turn in page("--tokens", "8000", "--budget", "448").split("\n--- ")[1:6]]
    assert not fates[0][0] and fates[4][0] and all(rank == 1 for _, rank in fates[1:])


def test_the_edits_that_a_question_made_are_listed(page, tell_lensnet, monkeypatch):
    """It listed those of the last refocus, which by then has nothing left to edit: every turn said that there were none. `session.edits` has them all."""
    asked, settle, told = [], Session._settle, Session.score
    monkeypatch.setattr(Session, "score", lambda self, found=None: told(self, found) if found is not None else ([0.0] * len(self.spans), [])) # else a tick before it opens all
    monkeypatch.setattr(Session, "_settle", lambda self: (settle(self), asked.append(self.edits))[0])
    turns = page("--tokens", "8000", "--budget", "448").split("\n--- ")[1:6]
    assert len(asked) == 5 and sum(map(len, asked)) > 0
    for turn, edits in zip(turns, asked):
        assert numbers(r"edits +([\d,]+) at [\d,]+ tokens", turn) == [len(edits)]
        listed = re.findall(r"^ +(expand|collapse) +L(\d) +([\d,]+)\.\.([\d,]+) ", turn, re.M)
        assert [(kind, int(level), number(start), number(last)) for kind, level, start, last in listed] == [
            (edit.kind, edit.node.level, edit.node.start, edit.node.stop - 1) for edit in edits]


def test_a_token_has_the_place_that_counting_gives():
    """Against a slow twin: decode all that comes before, count its lines."""
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    line = lambda: rng.choice(["", "    ", "def f(x):", "    return 'é€'", "x = 1"])
    files = [(name, "\n".join(line() for _ in range(rng.randrange(1, 30))) + "\nend") for name in ("a.py", "b/c.py", "d.py")]
    code = CodeBase(files)
    ids = [tokenizer.bos, *tokenizer.encode("before\n"), *tokenizer.encode(code.text.decode()), *tokenizer.encode("\nafter")]
    code.lay(tokenizer, ids)
    assert code.place(len(ids) - 1) == code.place(len(ids) + 5) == ("conversation", "")
    truth = [(name, n, text.strip()) for name, body in files for n, text in enumerate([f"# {name}", *body.split("\n")])]
    head = len(tokenizer.decode_bytes([tokenizer.bos])) + len("before\n")
    for i in range(len(ids)):
        before = len(tokenizer.decode_bytes(ids[:i])) - head
        if 0 <= before < len(code.text):
            rest = truth[code.text[:before].count(b"\n"):]
            name, n, text = next(line for line in rest if line[2])
            assert code.place(i) == (f"{name}:{n}" if n else name, text)
    for file, (_, body) in enumerate(files):
        first = code.byte(file, body.index("end"))
        assert code.text[first:].startswith(b"end\n")
        assert b"end" in tokenizer.decode_bytes(ids[code.blocks(first, first + 2)[0] * BLOCK:][:2 * BLOCK])


def test_the_check_at_the_end_can_fail(base):
    make_run("sft")
    loaded = load_stage("sft")
    session = demo.Watched(loaded.gpt, loaded.gistnet, loaded.lensnet, open_tree(loaded), 224)
    session.feed(np.random.default_rng(0).integers(0, 300, 1500).tolist())
    demo.check_laws(session)
    session.peak = 225
    with pytest.raises(AssertionError, match="225 entries"):
        demo.check_laws(session)
    session.peak = 224
    session.fed[700] += 1
    with pytest.raises(AssertionError, match="does not open to the tokens"):
        demo.check_laws(session)


@pytest.mark.parametrize("flags, message", [
    (["--code", "/nowhere/at/all"], "no folder at /nowhere/at/all: expected one with Python files"), (["--tokens", "0"], "at least 1"),
    (["--max-tokens", "0"], "at least 1"), (["--no-memory"], "leave --no-memory out"),
])
def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch, flags, message):
    monkeypatch.setattr(demo, "load_stage", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["mega_demo", *flags])
    with pytest.raises(UserError, match=message):
        demo.main()


def test_a_folder_that_cannot_hold_the_session_is_told(page, tmp_path):
    with pytest.raises(UserError, match="no Python files"):
        page("--code", str(tmp_path / "base"))
    (tmp_path / "base" / "one.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="1 files do not hold the session"):
        page("--code", str(tmp_path / "base"))
    with pytest.raises(UserError, match="each of 1 files has more than a quarter of --tokens 4"):
        page("--code", str(tmp_path / "base"), "--tokens", "4")


def test_files_are_taken_until_there_are_enough(tmp_path):
    for n, size in enumerate((30, 10, 20, 26, 24, 0)):
        (tmp_path / f"{n}.py").write_text("x" * size)
    orders = set()
    for seed in range(20):
        files, large = take_files(tmp_path, 100, random.Random(seed), len)
        sizes = [len(text) for _, text in files]
        assert files == sorted(files) and max(sizes) <= 25 and sum(sizes) == 54 and large == 2, "all there are: an empty one is none"
        files, large = take_files(tmp_path, 80, random.Random(seed), len)
        assert sum(len(text) for _, text in files) == 30 and large == 3
        orders.add(tuple(name for name, _ in take_files(None, 3000, random.Random(seed), lambda text: len(text) // 40)[0]))
    assert len(orders) > 10
    (tmp_path / "bad.py").write_bytes(b"\xff")
    assert "bad.py" not in [name for name, _ in take_files(tmp_path, 100, random.Random(0), len)[0]]
