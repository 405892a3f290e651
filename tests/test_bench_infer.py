"""The inference bench: its table adds up, and its last line is JSON."""

import json
import sys

import pytest

import bench.infer as infer
from nanochat.common import UserError


@pytest.mark.parametrize("steps", ["eager", "static"])
def test_the_last_line_is_json_and_adds_up(monkeypatch, capsys, steps):
    monkeypatch.setattr(infer, "copy_rate", lambda device: 1e12)
    monkeypatch.setattr(infer, "product_rate", lambda device, dtype: 1e13)
    monkeypatch.setattr(sys, "argv", ["infer", "--device", "cpu", "--depth", "1", "--vocab-size", "512", "--prompt", "8", "--new", "4", "--batches", "1,3",
                                      "--repeats", "1", "--steps", steps])
    infer.main()
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert [row["batch"] for row in told["rows"]] == [1, 3] and told["steps"] == steps
    for row, line in zip(told["rows"], lines[-3:-1]):
        assert row["tokens_s"] == pytest.approx(1000 * row["batch"] / row["tpot_ms"])
        assert 0 < row["mbu"] < 1 and 0 < row["mfu"] < 1 and row["ttft_ms"] > 0
        assert line.split()[0] == str(row["batch"])
    # by hand: 1 layer of 12 * 128^2 + 12 for the gate, 128^2 for the token before, head 512 * 128: 278,540 matmul parameters;
    # and 4 * 128 for each of the 8 + 4/2 entries that the middle token sees
    flops = 2 * 278_540 + 4 * 128 * 10
    assert told["rows"][0]["mfu"] == pytest.approx(flops / (told["rows"][0]["tpot_ms"] / 1000) / 1e13)


@pytest.mark.parametrize("flags", [["--batches", "1,x"], ["--batches", "0"], ["--new", "1"], ["--prompt", "0"], ["--dtype", "int8"]])
def test_mistakes_are_told(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["infer", "--device", "cpu", *flags])
    with pytest.raises(UserError):
        infer.main()
