"""mega_eval on tiny networks: its tables stand in the report, and its last line has all the numbers, the sessions' telemetry too."""

import json
import shlex
import sys

import pytest

import scripts.mega_eval as mega_eval
from nanochat import report
from tests.tiny_run import make_run, make_text


def test_the_tables_and_the_json_tell_what_the_sessions_did(base, tmp_path, monkeypatch, capsys):
    make_run("sft", seq_len=512)
    source = make_text(tmp_path / "text", files=120)
    monkeypatch.setattr(mega_eval, "long_documents", lambda source, tokenizer, T: [list(range(1, 60)) * 10] * 2)
    open_stream = mega_eval.open_stream

    def eager(*args, **settings): # networks that learnt nothing promise little: here they need not promise more
        stream = open_stream(*args, **settings)
        stream.margin = 0.0
        return stream

    monkeypatch.setattr(mega_eval, "open_stream", eager)
    monkeypatch.setattr(sys, "argv", ["mega_eval", "--source", source, "--device", "cpu", "--budget", "192", "--documents", "2", "--seeds", "2",
                                      "--recall-lengths", "700", "--recall-problems", "2"])
    mega_eval.main()
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])["telemetry"]
    assert list(told) == ["lensnet/700", "recency/700"]
    for name, summary in told.items():
        assert summary["ticks"] >= 6 and 0 < summary["budget_use"] <= 1 and set(summary["ms"]) == set(mega_eval.STAGES)
        assert sum(summary["residency"].values()) == pytest.approx(192 * summary["budget_use"])
        assert summary["ms"]["splice"]["count"] == summary["ticks"]
    assert told["lensnet/700"]["edits"]["expand 1"] > 0 and told["lensnet/700"]["swap_rate"] > 0
    assert not any(kind.startswith("expand") for kind in told["recency/700"]["edits"]), "by recency alone nothing is opened, only closed to make room"
    line = [line for line in out.splitlines() if line.startswith("| 700 tokens, lensnet |")][-1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == str(told["lensnet/700"]["ticks"]) and cells[4].startswith("0: ")
    assert line in (report.folder() / "mega.md").read_text() and "| 700 tokens, recency |" in out
    numbers = dict(pair.split("=") for pair in shlex.split(next(line for line in out.splitlines() if line.startswith("summary "))) if "=" in pair)
    assert float(numbers["lensnet/700/budget_use"]) == pytest.approx(told["lensnet/700"]["budget_use"], rel=1e-4) and float(numbers["loss_window"]) > 0
