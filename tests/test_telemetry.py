"""Telemetry counts what happened, cheaply, and never grows."""

import argparse
import json
import random
import re
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megacontext.allocator import Edit, Focus, refocus
from megacontext.span import BLOCK, Span
from megacontext.telemetry import METRICS, NODES, OLDEST, Histogram, Telemetry, page, summaries
from megacontext.working_context import advance, assemble, cost
from nanochat.common import UserError
from scripts.load import telemetry_maker


def test_one_tick_by_hand(tmp_path):
    telemetry = Telemetry(tmp_path / "ticks.jsonl")
    spans = [Span(2, 0), Span(1, 32), Span(0, 33), Span(0, 34, live=3)]
    line = telemetry.tick(1091, spans, 74, [Edit("expand", Span(1, 33))], {"refocus": 2.0, "read": 0.5})
    assert line["entries"] == cost(spans) == 37 and line["budget_use"] == 0.5 and line["swap_rate"] == 0.25
    assert line["residency"] == {0: 35, 1: 1, 2: 1} and (line["edits"], line["opened"], line["closed"]) == (1, [[1, 33]], [])
    for _ in range(4):
        telemetry.tick(1091, spans, 74, [], {"refocus": 4.0})
    telemetry.tick(1091, spans, 74, [Edit("collapse", Span(1, 33)), Edit("collapse", Span(1, 34))], {"refocus": 4.0})
    telemetry.close()
    summary = telemetry.summary()
    assert summary["edits"] == {"collapse 1": 2, "expand 1": 1} and summary["edits_per_tick"] == 0.5
    assert summary["stayed_ticks"][1]["count"] == 1 and summary["stayed_ticks"][1]["max"] == 5  # opened at tick 1, closed at tick 6
    assert summary["most_accessed"] == [[1, 33, 1]]
    lines = [json.loads(line) for line in (tmp_path / "ticks.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0] == json.loads(json.dumps(line))
    assert summary["swap_rate"] == (0.25 + 0.5) / 6 and summary["budget_use"] == 0.5 and summary["residency"] == {0: 35, 1: 1, 2: 1}
    assert lines[-1]["opened"] == [] and lines[-1]["closed"] == [[1, 33], [1, 34]]
    json.dumps(summary)


def test_a_file_of_ticks_gives_the_summaries_of_its_sessions(tmp_path):
    """Two sessions share it; all that each of them knew at its end is in it: who asks later needs neither of them."""
    path, rng, known = tmp_path / "ticks.jsonl", random.Random(0), [Telemetry(tmp_path / "ticks.jsonl") for _ in range(2)]
    contexts = [(assemble(100_000, 1000), Focus()) for _ in known]
    for i in range(60):
        for n, telemetry in enumerate(known):
            spans, edits, focus = refocus(contexts[n][0], [rng.uniform(-1, 1) for _ in contexts[n][0]], 1000, contexts[n][1])
            contexts[n] = advance(spans, 100_000 + BLOCK * (i + 1), 1000), focus
            telemetry.tick(100_000 + BLOCK * i, spans, 1000, edits, {"refocus": rng.random(), "read": 3.0})
    told, left_out = summaries(path)
    assert not left_out and list(told) == [telemetry.session for telemetry in known]
    for telemetry in known:
        assert told[telemetry.session] == telemetry.summary() and telemetry.summary()["stayed_ticks"] and telemetry.summary()["most_accessed"][0][2] > 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_ends_the_file_and_nothing_else():
    """Every tick was an OSError, out of the middle of the session that told of it."""
    lines = []
    telemetry = Telemetry("/dev/full", lines.append)
    with pytest.warns(UserWarning, match="no longer written to /dev/full .No space left on device."):
        telemetry.tick(32, [Span(0, 0)], 64, [], {"read": 1.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telemetry.tick(64, [Span(0, 0), Span(0, 1)], 64, [], {"read": 1.5})
        telemetry.close()
    assert telemetry.summary()["ticks"] == len(lines) == 2


@pytest.mark.parametrize("text, told", [(b"{\n", "line 1 .* is no tick"), (b"\xff\n", "line 1 .* is no tick"), (b"7\n", "is no tick"), (b'{"session": "a", "residency": {}}\n', "no tick .*'length'"),
                                        (None, "cannot read")])
def test_a_file_of_something_else_is_told(tmp_path, text, told):
    path = tmp_path / "ticks.jsonl"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=told):
        summaries(path)


def test_a_line_that_was_cut_costs_itself_and_no_other(tmp_path):
    """A kill in the middle of a line, and then another session: its first line stood behind the torn one, and the whole file was refused. Nor does a line of something else count by half."""
    path, contexts = tmp_path / "ticks.jsonl", ([Span(0, 0)], [Edit("expand", Span(1, 0))])
    first = Telemetry(path)
    for n in range(3):
        first.tick(32 * n, contexts[0], 64, contexts[1], {"read": 1.5})
    first.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    second = Telemetry(path)
    second.tick(32, *contexts[:1], 64, contexts[1], {"read": 1.5})
    told, left_out = summaries(path)
    assert left_out == 1 and {session: summary["ticks"] for session, summary in told.items()} == {first.session: 2, second.session: 1} and told[second.session] == second.summary()
    for wrong in (dict(opened=[[1, 0], 7]), dict(ms={"read": -1.0}), dict(ms={"read": float("inf")}), dict(session=[])):
        path.write_bytes(whole + json.dumps(json.loads(whole.splitlines()[0]) | wrong).encode() + b"\n")
        assert summaries(path) == ({first.session: first.summary()}, 1)
    path.write_bytes(whole[:-1]) # whole but for its end
    Telemetry(path).close()
    assert path.read_bytes() == whole
    path.touch()
    Telemetry(path).close()
    assert path.read_bytes() == whole, "an end is added where there is none"


def test_sessions_that_share_a_file_can_be_told_apart(tmp_path):
    """The second session's node of the same number is another node: it did not stay open since the first one's time."""
    telemetry = Telemetry(tmp_path / "ticks.jsonl")
    telemetry.tick(64, [Span(0, 0), Span(0, 1)], 64, [Edit("expand", Span(1, 0))], {})
    telemetry.next_session()
    telemetry.tick(64, [Span(1, 0), Span(0, 1)], 64, [Edit("collapse", Span(1, 0))], {})
    other = Telemetry(tmp_path / "ticks.jsonl")
    other.tick(32, [Span(0, 0)], 64, [], {})
    first, second, third = [json.loads(line)["session"] for line in (tmp_path / "ticks.jsonl").read_text().splitlines()]
    assert len({first, second, third}) == 3
    assert telemetry.summary()["ticks"] == 2 and telemetry.summary()["stayed_ticks"] == {} and telemetry.summary()["residency"] == {0: 48, 1: 0.5}
    with pytest.raises(UserError, match="cannot write telemetry to .*nowhere"):
        Telemetry(tmp_path / "nowhere" / "ticks.jsonl")


def test_sessions_of_one_program_share_a_wandb_run(tmp_path, monkeypatch):
    """A stand-in for wandb, which refuses a step that is lower than the last: ticks are counted over all sessions."""
    logged, runs = [], []
    fake = SimpleNamespace(init=lambda **settings: runs.append(settings) or SimpleNamespace(log=lambda metrics, step: logged.append((step, metrics))))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = argparse.Namespace(no_memory=False, telemetry=str(tmp_path / "ticks.jsonl"), run="talk")
    make = telemetry_maker(args)
    first, second = make(), make()
    for telemetry in (first, second, first):
        telemetry.tick(32, [Span(0, 0)], 64, [], {"read": 1.5})
    assert len(runs) == 1 and runs[0]["name"] == "talk"
    assert [step for step, _ in logged] == [1, 2, 3] and [line["session"] for _, line in logged] == [first.session, second.session, first.session]
    lines = (tmp_path / "ticks.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps([line for _, line in logged])) and logged[0][1]["ms"] == {"read": 1.5}
    args.run, args.no_memory = "", True
    with pytest.raises(UserError, match="--no-memory has none"):
        telemetry_maker(args)
    args.telemetry = None
    assert telemetry_maker(args)() is None


@pytest.mark.parametrize("seed", range(10))
def test_a_histogram_is_right_to_a_fifth(seed):
    rng = np.random.default_rng(seed)
    numbers = np.exp(rng.normal(1, 2, 5000))
    histogram = Histogram()
    for x in numbers:
        histogram.add(x)
    for q in (0.1, 0.5, 0.9, 0.99):
        true = np.quantile(numbers, q, method="inverted_cdf")
        assert true <= histogram.quantile(q) <= true * 1.2
    assert histogram.count == 5000 and histogram.sum == pytest.approx(numbers.sum()) and histogram.max == numbers.max()
    for extreme in (0, 1e-9, 1e12):
        histogram.add(extreme)
    assert Histogram().quantile(0.5) == 0


def test_memory_is_bounded_and_the_busiest_nodes_are_found():
    """6,000 ticks over a million nodes; three of them are opened again and again."""
    telemetry, rng = Telemetry(), random.Random(0)
    busy = [Span(1, 7), Span(1, 70), Span(2, 700)]
    spans = [Span(0, 0)]
    for i in range(6_000):
        node = busy[i % 3] if i % 4 == 0 else Span(1, rng.randrange(10 ** 6))
        telemetry.tick(i, spans, 64, [Edit("expand", node)], {"refocus": 1.0})
    assert len(telemetry.accessed) <= NODES and len(telemetry.opened) <= OLDEST
    assert {tuple(entry[:2]) for entry in telemetry.summary()["most_accessed"][:3]} == {(1, 7), (1, 70), (2, 700)}
    assert sum(len(h.buckets) for h in telemetry.stages.values()) < 200


def test_a_node_that_becomes_busy_late_is_found_too():
    """The places are all taken by nodes of count 3; a newcomer that takes one over takes its count, so the next one evicts another."""
    telemetry, late = Telemetry(), Span(2, 5)
    for _ in range(3):
        telemetry.tick(0, [], 64, [Edit("expand", Span(1, i)) for i in range(NODES)], {})
    for i in range(200):
        telemetry.tick(0, [], 64, [Edit("expand", late), Edit("expand", Span(1, NODES + i))], {})
    assert telemetry.summary()["most_accessed"][0][:2] == [2, 5]
    assert 200 <= telemetry.accessed[2, 5] <= 203


@pytest.mark.parametrize("sessions", [0, 1, 3])
def test_prometheus_page_follows_the_text_format(sessions):
    """One HELP and one TYPE for each metric, before its samples, whatever the number of sessions; no sample twice."""
    told, rng = [], random.Random(0)
    for _ in range(sessions):
        telemetry, spans, focus = Telemetry(), assemble(100_000, 1000), Focus()
        for i in range(30):
            spans, edits, focus = refocus(spans, [rng.uniform(-1, 1) for _ in spans], 1000, focus)
            spans = advance(spans, 100_000 + BLOCK * (i + 1), 1000)
            telemetry.tick(spans[-1].stop, spans, 1000, edits, {"refocus": rng.random(), "read": 3.0})
        told.append(telemetry)
    text = page([telemetry.metrics() for telemetry in told])
    sample = re.compile(r'(megacontext_[a-z_]+\{session="[0-9a-f]{8}"(,[a-z]+="[^"]*")*\}) -?[0-9.e+-]+')
    described, seen = [], []
    for line in text.splitlines():
        if line.startswith("# "):
            described += [line.split()[2]] if line.startswith("# HELP") else []
        else:
            seen.append(sample.fullmatch(line)[1])
            name = line.split("{")[0]
            assert described[-1] in (name, name.removesuffix("_sum").removesuffix("_count")), "samples stand under their own head"
    assert described == [f"megacontext_{name}" for name in METRICS] and len(seen) == len(set(seen)) and bool(seen) == bool(sessions)
    for telemetry in told:
        assert f'megacontext_stage_ms{{session="{telemetry.session}",stage="read",quantile="0.5"}} 3\n' in text
        assert f'megacontext_ticks_total{{session="{telemetry.session}"}} 30\n' in text
        level, index, n = telemetry.summary()["most_accessed"][0]
        assert f'megacontext_opened{{session="{telemetry.session}",level="{level}",index="{index}"}} {n}\n' in text
        assert f'megacontext_history_tokens{{session="{telemetry.session}"}} 100960\n' in text
    assert text.endswith("\n")


def test_a_tick_is_cheap():
    """Under 5 ms with 5,000 spans on any machine (measured: 0.5), of some 100 ms that 32 tokens take."""
    telemetry, spans = Telemetry(), assemble(10 ** 6, 8192)
    edits = [Edit("expand", Span(1, i)) for i in range(4)]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        telemetry.tick(10 ** 6, spans, 8192, edits, {"refocus": 1.0, "read": 90.0})
        times.append(time.perf_counter() - start)
    assert sorted(times)[10] < 0.005
