"""The terminal: what it prints, what it keeps, and one clear line for each mistake."""

import io
import json
import os
import random
import signal
import sys
import weakref

import pytest
import torch

import scripts.chat_cli as cli
from megacontext import runtime
from megacontext.allocator import Focus, refocus
from megacontext.ingest import ingest
from megacontext.runtime import STAGES
from megacontext.span import BLOCK
from megacontext.working_context import Pins, advance, assemble, check, check_pins, coarsest, raw_tail
from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.engine import Engine
from scripts import mega_eval
from scripts.load import load_stage, open_stream
from tests.fakes import ByteTokenizer, FakeLoaded, FakeMemory, ScriptedStream
from tests.tiny_run import make_run

tokenizer = ByteTokenizer()
PY, PY_END, END = (tokenizer.special(f"<|{name}|>") for name in ("python_start", "python_end", "assistant_end"))


def said(stream, **settings):
    out = io.StringIO()
    cli.answer(Conversation(Engine(tokenizer), stream), "hi", dict(temperature=0) | settings, out)
    return out.getvalue()


def test_the_calculator_is_shown_in_brackets():
    forced = len(tokenizer.encode("42")) + 2
    script = [*tokenizer.encode("it is "), PY, *tokenizer.encode("6*7"), PY_END, *[0] * forced, *tokenizer.encode(" ok€"), END]
    assert said(ScriptedStream(script)) == "it is [6*7 = 42] ok€\n"


def test_ctrl_c_stops_the_answer_and_not_the_program():
    class Presses(ScriptedStream):
        def feed(self, ids, prompt=True):
            if len(self.feeds) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().feed(ids)
    handler = signal.getsignal(signal.SIGINT)
    stream = Presses(tokenizer.encode("abcdefgh") + [END])
    assert said(stream) == "abcd (stopped)\n"
    assert len(stream.feeds) == 4, "the forward in which it was pressed ends in peace, and is the last"
    assert signal.getsignal(signal.SIGINT) is handler


def run(monkeypatch, capsys, *flags, lines=(), streams=None):
    """One run of the script with a fake model. Returns (stdout, the streams that were opened)."""
    opened, lines = [], iter(lines)

    def open_stream(loaded, memory, budget, tree, telemetry):
        stream = FakeMemory("ok") if streams is None else streams(tree)
        stream.opened_with, stream.telemetry = (memory, budget, tree), telemetry
        opened.append(stream)
        return stream

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(cli, "load_stage", lambda *_: FakeLoaded())
    monkeypatch.setattr(cli, "open_stream", open_stream)
    monkeypatch.setattr(cli, "input", typed, raising=False)
    monkeypatch.setattr(sys, "argv", ["chat_cli", "--device", "cpu", "--temperature", "0", *flags])
    cli.main()
    return capsys.readouterr().out, opened


def test_one_question_one_answer(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("long text")
    out, (stream,) = run(monkeypatch, capsys, "-p", "what?", "--file", str(tmp_path / "a.txt"), "--budget", "512")
    assert out == "ok\n" and stream.opened_with == (True, 512, None)
    assert tokenizer.decode(stream.fed).startswith("<|bos|><|user_start|>long text\n\nwhat?<|user_end|><|assistant_start|>")


def test_a_conversation_feeds_each_turn_once(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("FILE")
    out, (first, second) = run(monkeypatch, capsys, lines=["one", "", f"/read {tmp_path / 'a.txt'}", "/read nowhere", "/memory", "/what", "/help",
                                                           "two", "/new", "three", "/quit", "never"])
    spoken = tokenizer.decode(first.fed)
    assert spoken.count("<|bos|>") == 1 and spoken.count("one") == 1
    assert "<|user_start|>one<|user_end|><|assistant_start|>ok<|assistant_end|><|user_start|>FILE\n\ntwo<|user_end|>" in spoken
    assert "three" in tokenizer.decode(second.fed) and "FILE" not in tokenizer.decode(second.fed)
    assert out.count("model: ok") == 3
    for line in ("cannot read nowhere", "tokens of history", "no command /what", "/quit"):
        assert line in out


class Full(FakeMemory):
    """Has no room for one word."""
    held = None

    def feed(self, ids, prompt=True):
        if "two" in tokenizer.decode(ids):
            activations = Full("what the forward holds")
            self.held = weakref.ref(activations)
            self.fed += ids[:3] # it may fail half-way
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().feed(ids, prompt)

    def rewind(self, state):
        assert self.held() is None, "what failed is still held: there may be no room to go back"
        super().rewind(state)


def test_a_message_for_which_memory_runs_out_is_forgotten_and_the_conversation_goes_on(monkeypatch, capsys, tmp_path):
    """It ended in a traceback, and a conversation that nobody keeps was lost with it. A file in front of the message is forgotten too: it may be what was too long."""
    (tmp_path / "a.txt").write_text("FILE")
    out, (stream,) = run(monkeypatch, capsys, "--tree", str(tmp_path / "memory"), lines=["one", f"/read {tmp_path / 'a.txt'}", "two", "three"], streams=lambda tree: Full("ok"))
    assert "memory ran out in this answer. Lower --budget, or use --dtype bf16, or take a smaller model (CUDA out of memory. Tried to allocate 2.00 GiB)\nYour message, with" in out
    spoken = tokenizer.decode(stream.fed)
    assert out.count("model: ok") == 2 and len(stream.saved) == 2 and "<|user_start|>one<|user_end|>" in spoken and "<|assistant_end|><|user_start|>three<|user_end|>" in spoken
    with pytest.raises(UserError, match="memory ran out .a memory that --tree keeps is as it was after the last answer.. Say less at once"):
        run(monkeypatch, capsys, "-p", "two", "--no-memory", streams=lambda tree: Full("ok"))


def test_memory_that_runs_out_beside_an_answer_is_told_in_a_line(monkeypatch, capsys):
    """What a message may be taken back to is a copy of all that is in view."""
    class Stream(FakeMemory):
        def mark(self):
            raise MemoryError
    with pytest.raises(UserError, match="memory ran out .a memory that --tree keeps.*Lower --budget"):
        run(monkeypatch, capsys, lines=["one"], streams=lambda tree: Stream("ok"))


def test_a_kept_memory_is_written_after_every_answer(monkeypatch, capsys, tmp_path):
    tree = str(tmp_path / "memory")
    _, (stream,) = run(monkeypatch, capsys, "--tree", tree, lines=["one", "two"])
    assert stream.saved == [tree, tree] and stream.opened_with == (True, None, tree)
    assert stream.fed[-1] == END, "a saved memory ends with a finished answer"


def test_back_takes_the_last_message_back(monkeypatch, capsys, tmp_path):
    tree = str(tmp_path / "memory")
    out, (stream,) = run(monkeypatch, capsys, "--tree", tree, lines=["/back", "one", "two", "/back", "three", "/back", "/back", "/back", "four"])
    spoken = tokenizer.decode(stream.fed)
    assert "four" in spoken and not any(word in spoken for word in ("one", "two", "three"))
    assert spoken.count("<|bos|>") == 1 and out.count("nothing to go back to") == 2
    assert len(stream.saved) == 4 + 3, "what was taken back is taken back on disk too"


def test_back_says_that_it_does_not_go_behind_a_restart(monkeypatch, capsys, tmp_path):
    """A memory that was continued has messages, yet /back said that none was said; its marks are of this start only."""
    memory = FakeMemory("ok")
    memory.fed = [*tokenizer.encode("what was said yesterday")]
    out, _ = run(monkeypatch, capsys, "--tree", str(tmp_path / "memory"), lines=["one", "/back", "/back"], streams=lambda tree: memory)
    assert "back to 23 tokens" in out and "no message was said here yet. The 23 tokens in memory are from before this start, and stay\n" in out
    out, _ = run(monkeypatch, capsys, lines=["/back"])
    assert "no message was said here yet\n" in out


def test_every_tick_is_a_line_of_the_telemetry_file(base, monkeypatch, capsys, tmp_path):
    """A real session: 3,000 characters read, then another conversation in the same process. mega_eval sums the file up, without a checkpoint."""
    make_run("sft")
    (tmp_path / "a.txt").write_text("def f(x): return x + 1\n" * 130)
    lines = iter([f"/read {tmp_path / 'a.txt'}", "what?", "/new", f"/read {tmp_path / 'a.txt'}", "and now?", "/quit"])
    monkeypatch.setattr(cli, "input", lambda prompt: next(lines), raising=False)
    monkeypatch.setattr(sys, "argv", ["chat_cli", "--device", "cpu", "--dtype", "fp32", "--max-tokens", "40", "--telemetry", str(tmp_path / "ticks.jsonl")])
    cli.main()
    ticks = [json.loads(line) for line in (tmp_path / "ticks.jsonl").read_text().splitlines()]
    sessions = list(dict.fromkeys(tick["session"] for tick in ticks))
    assert len(sessions) == 2 and capsys.readouterr().out.count("model:") == 2
    for name in sessions:
        lengths = [tick["length"] for tick in ticks if tick["session"] == name]
        assert len(lengths) > 2 and lengths == sorted(lengths) and lengths[0] > 400
    assert all(0 < tick["budget_use"] <= 1 and set(tick["ms"]) == set(STAGES) for tick in ticks)

    monkeypatch.setattr(mega_eval, "load_stage", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["mega_eval", "--telemetry", str(tmp_path / "ticks.jsonl")])
    mega_eval.main()
    *table, _, numbers = capsys.readouterr().out.splitlines()
    told = json.loads(numbers)
    assert list(told) == sessions and len(table) == 2 + len(sessions)
    for row, name in zip(table[2:], sessions):
        mine = [tick for tick in ticks if tick["session"] == name]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[:2] == [f"{mine[-1]['length']} tokens, {name}", f"{len(mine)}"] and len(cells) == 6 + len(STAGES)
        assert told[name]["swap_rate"] == pytest.approx(sum(tick["swap_rate"] for tick in mine) / len(mine))
        assert told[name]["edits"].get("expand 1", 0) == sum(level == 1 for tick in mine for level, _ in tick["opened"])
    with open(tmp_path / "ticks.jsonl", "a") as file:
        file.write('{"session": "cut')
    mega_eval.main()
    *again, _, left_out, _, numbers = capsys.readouterr().out.splitlines()
    assert again == table and left_out.endswith("are left out: 1") and json.loads(numbers) == told
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setattr(sys, "argv", ["mega_eval", "--telemetry", str(tmp_path / "empty.jsonl")])
    with pytest.raises(UserError, match="has no ticks"):
        mega_eval.main()


def test_a_long_paste_is_searched_for_once(base, monkeypatch, capsys, tmp_path):
    """
    It was fed in pieces of 8,192 tokens, and each piece, having several tokens, was taken for a prompt: all of the history was searched for what it asks,
    again and again. Now the script does exactly what a session does that is given the whole prompt.
    """
    make_run("sft")
    text, searches, opened = "def f(x): return x + 1\n" * 1800, [], []
    (tmp_path / "a.txt").write_text(text)
    search, begin = runtime.block_scores, cli.open_stream
    monkeypatch.setattr(runtime, "block_scores", lambda lensnet, tree, *rest: searches.append(tree.length) or search(lensnet, tree, *rest))
    monkeypatch.setattr(cli, "open_stream", lambda *args: opened.append(begin(*args)) or opened[-1])
    monkeypatch.setattr(sys, "argv", ["chat_cli", "--device", "cpu", "--dtype", "fp32", "--max-tokens", "1", "--file", str(tmp_path / "a.txt"), "-p", "what?"])
    cli.main()
    (session,), loaded = opened, load_stage("sft")
    assert searches == [session.length] and session.length > 3 * 8192
    twin = begin(loaded)
    twin.feed(loaded.tokenizer.render_prompt({"messages": [dict(role="user", content=f"{text}\n\nwhat?")]}))
    counts = ("ticks", "edits", "read_tokens", "ingested_tokens")
    assert session.spans == twin.spans and [session.stats[name] for name in counts] == [twin.stats[name] for name in counts]


def test_ctrl_c_is_heard_while_a_long_paste_is_read(base, monkeypatch, capsys, tmp_path):
    """After the first of several stretches of 8,192 tokens: they are in the history, and the rest waits for the next message."""
    make_run("sft")
    loaded, searches = load_stage("sft"), []
    session = open_stream(loaded, budget=192)
    conversation = Conversation(Engine(loaded.tokenizer), session)
    monkeypatch.setattr(runtime, "ingest", lambda *args: os.kill(os.getpid(), signal.SIGINT) or ingest(*args))
    search = runtime.block_scores
    monkeypatch.setattr(runtime, "block_scores", lambda lensnet, tree, *rest: searches.append(tree.length) or search(lensnet, tree, *rest))
    text, out = "x = [1, 2, 3]\n" * 2000, io.StringIO()
    cli.answer(conversation, text, dict(max_tokens=3, temperature=0), out)
    assert out.getvalue() == " (stopped)\n" and session.length == 8192 and not searches
    monkeypatch.setattr(runtime, "ingest", ingest)
    cli.answer(conversation, "and?", dict(max_tokens=3, temperature=0), out)
    special = loaded.tokenizer.special
    prompt = loaded.tokenizer.render_prompt({"messages": [dict(role="user", content=text)]})
    asked = [*prompt, special("<|assistant_end|>"), *loaded.tokenizer.render_prompt({"messages": [dict(role="user", content="and?")]})[1:]]
    assert session.tree.tokens(0, len(asked)).tolist() == asked and searches == [len(asked)]
    check(session.spans, session.length, 192)


def test_without_memory_nothing_is_pinned(monkeypatch, capsys):
    out, (stream,) = run(monkeypatch, capsys, "--no-memory", lines=["one", "/pin 0 1", "/never 0 1", "/unpin"])
    assert out.count("--no-memory has nothing to pin") == 3 and not hasattr(stream, "pins")


@pytest.mark.parametrize("seed", range(10))
def test_what_may_be_pinned_fits_whatever_the_history_becomes(seed):
    """As much as /pin takes, at any places, under a LensNet of random mind: no later tick is without room, which would end the program in the middle of an answer."""
    rng = random.Random(seed)
    budget, length = rng.choice([512, 1024, 2048]), int(10 ** rng.uniform(4, 7))
    tail = raw_tail(budget)
    class Pinned: # a Session, as far as /pin looks
        pins = property(lambda self: self.kept, lambda self, pins: (check_pins(pins, budget, length), setattr(self, "kept", pins)))
        refocus = lambda self: None

    session = Pinned()
    session.length, session.kept = length, Pins()
    for _ in range(30):
        start = rng.randrange(length - 1)
        try:
            cli.pin(session, "/pin", f"{start} {rng.randrange(start + 1, min(length, start + 300) + 1)}")
        except UserError:
            pass
    assert session.pins.raw
    while length < 14_000_000:
        spans, focus = assemble(length, budget - BLOCK, tail=tail), Focus()
        for _ in range(20):
            scores = [0.0 if span.live else rng.uniform(-5, 5) for span in spans]
            spans, _, focus = refocus(spans, scores, budget, focus, margin=0.25, tail=tail, pins=session.pins, top=coarsest(length, budget), room=BLOCK - length % BLOCK)
            length = (length // BLOCK + 1) * BLOCK
            spans = advance(spans, length, budget)
            check(spans, length, budget)
        length *= rng.choice([2, 3, 10])


def test_what_is_never_shown_stays_out_of_sight_until_it_is_let_go(base, monkeypatch, capsys, tmp_path):
    """No command reached it. In a real session: a block of the raw tail goes at once, stays away over a restart, and may not be pinned raw beside it."""
    make_run("sft")
    (tmp_path / "a.txt").write_text("def f(x): return x + 1\n" * 60)
    opened, levels, begin, answer = [], [], cli.open_stream, cli.answer
    level = lambda: next(span.level for span in opened[-1].spans if span.start <= 860 < span.stop)
    monkeypatch.setattr(cli, "open_stream", lambda *args: opened.append(begin(*args)) or opened[-1])
    monkeypatch.setattr(cli, "answer", lambda *args: (answer(*args), levels.append(level()))[0])

    def talk(*lines):
        lines = iter([*lines, "/quit"])
        monkeypatch.setattr(cli, "input", lambda prompt: next(lines), raising=False)
        monkeypatch.setattr(sys, "argv", ["chat_cli", "--device", "cpu", "--dtype", "fp32", "--budget", "512", "--max-tokens", "10", "--tree", str(tmp_path / "memory")])
        cli.main()
        opened[-1].tree.close()
        return capsys.readouterr().out

    out = talk(f"/read {tmp_path / 'a.txt'}", "what?", "/never", "/never 860 9999", "/pin 100 110", "/never 860 870", "/pin 865 866", "and?")
    for line in ("expected /never A B, two places in the history, got ''", "expected /never A B with A below B, and B at most", "pinned: 100 to 110; never shown: 860 to 870\n", "they share a block: drop one"):
        assert line in out
    assert levels == [0, 1]
    talk("still?", "/unpin")
    assert opened[1].pins == Pins() and levels == [0, 1, 1]


def test_what_is_pinned_stays_raw_until_it_is_let_go(base, monkeypatch, capsys, tmp_path):
    """Far back in a real session, over many ticks and a restart; what cannot be pinned is a line, and changes nothing."""
    make_run("sft")
    (tmp_path / "a.txt").write_text("def f(x): return x + 1\n" * 600)
    flags = ["chat_cli", "--device", "cpu", "--dtype", "fp32", "--budget", "512", "--max-tokens", "70", "--tree", str(tmp_path / "memory")]
    raw, opened, begin, answer = [], [], cli.open_stream, cli.answer
    shown = lambda: any(span.level == 0 and span.index == 31 for span in opened[-1].spans)
    monkeypatch.setattr(cli, "open_stream", lambda *args: opened.append(begin(*args)) or opened[-1])
    monkeypatch.setattr(cli, "answer", lambda *args: (answer(*args), raw.append(shown()))[0])

    def talk(*lines):
        lines = iter([*lines, "/quit"])
        monkeypatch.setattr(cli, "input", lambda prompt: next(lines), raising=False)
        monkeypatch.setattr(sys, "argv", flags)
        cli.main()
        opened[-1].tree.close()
        return capsys.readouterr().out

    out = talk(f"/read {tmp_path / 'a.txt'}", "what?", "/pin", "/pin 10 x", "/pin 50 50", "/pin 0 10000000", "/pin 0 3,000", "/pin 1,000 1,020", "/pin 2040 2500",
                f"/read {tmp_path / 'a.txt'}", "and?")
    for line in ("expected /pin A B, two places in the history, got ''", "got '10 x'", "got 50 and 50", "where the history ends, got 0 and 10000000", "94 blocks of 32 tokens pinned raw do not fit a budget of 512",
                 "17 blocks of 32 tokens pinned raw do not fit a budget of 512", "Unpin some, or raise the budget", "pinned: 1,000 to 1,020\n"):
        assert line in out
    assert opened[0].pins.raw == ((1000, 1020),) and raw == [False, True]
    talk("still?", "/unpin")
    assert raw == [False, True, True] and not opened[1].pins.raw
    talk("/memory")
    assert not opened[2].pins.raw


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "-1"], "temperature"), (["--top-k", "0"], "top_k"), (["--top-p", "2"], "top_p"), (["--file", "/nowhere"], "cannot read"),
    (["--no-memory", "--tree", "x"], "--tree"), (["--no-memory", "--telemetry", "x"], "--telemetry"), (["--telemetry", "/nowhere/x"], "cannot write telemetry"),
])
def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch, flags, message):
    monkeypatch.setattr(cli, "load_stage", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["chat_cli", *flags])
    with pytest.raises(UserError, match=message):
        cli.main()


def test_a_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 text .byte 2"):
        cli.read_text(tmp_path / "x")
    with pytest.raises(UserError, match="cannot read"):
        cli.read_text(tmp_path)
