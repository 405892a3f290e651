"""The inference bench: its table adds up, and its last line is JSON."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import bench.infer as infer
from nanochat.common import UserError


@pytest.mark.parametrize("steps", ["eager", "static"])
def test_the_last_line_is_json_and_adds_up(monkeypatch, capsys, steps):
    monkeypatch.setattr(infer, "copy_rate", lambda device: 1e12)
    monkeypatch.setattr(infer.hardware, "describe", lambda device, describe=infer.hardware.describe: replace(describe(device), peak_flops=1e13)) # a GPU's
    monkeypatch.setattr(sys, "argv", ["infer", "--device", "cpu", "--depth", "1", "--vocab-size", "512", "--prompt", "8", "--new", "4", "--batches", "1,3",
                                      "--repeats", "1", "--steps", steps, "--dtype", "bf16"])
    infer.main()
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert [row["batch"] for row in told["rows"]] == [1, 3] and told["steps"] == steps
    for row, line in zip(told["rows"], lines[-3:-1]):
        assert row["tokens_s"] == pytest.approx(1000 * row["batch"] / row["tpot_ms"])
        assert 0 < row["mbu"] < 1 and 0 < row["mfu"] < 1 and row["ttft_ms"] > 0
        assert line.split()[0] == str(row["batch"])
    # by hand: 1 layer of 12 * 128^2 + 12 for the gate, 3 * 128^2 for the tokens before, head 512 * 128: 311,308 matmul parameters;
    # and 4 * 128 for each of the 8 + 4/2 entries that the middle token sees
    flops = 2 * 311_308 + 4 * 128 * 10
    assert told["rows"][0]["mfu"] == pytest.approx(flops / (told["rows"][0]["tpot_ms"] / 1000) / 1e13)


@pytest.mark.parametrize("flags", [["--batches", "1,x"], ["--batches", "0"], ["--new", "1"], ["--prompt", "0"], ["--dtype", "int8"]])
def test_mistakes_are_told(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["infer", "--device", "cpu", *flags])
    with pytest.raises(UserError):
        infer.main()


@pytest.mark.parametrize("dtype, peak", [("bf16", None), ("fp32", 1e13)])
def test_without_a_peak_there_is_no_mfu(monkeypatch, capsys, dtype, peak):
    """A CPU's MFU was once told against a product measured on the spot: a rate of its own making. The sheet's peak is of bf16, so fp32 has none."""
    monkeypatch.setattr(infer, "copy_rate", lambda device: 1e12)
    monkeypatch.setattr(infer.hardware, "describe", lambda device, describe=infer.hardware.describe: replace(describe(device), peak_flops=peak))
    monkeypatch.setattr(sys, "argv", ["infer", "--device", "cpu", "--depth", "1", "--vocab-size", "64", "--prompt", "4", "--new", "2", "--batches", "1", "--repeats", "1", "--dtype", dtype])
    infer.main()
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["peak"] is None and told["rows"][0]["mfu"] is None and told["bandwidth_from"] == "measured by a copy"
    assert lines[-2].split()[-2] == "-" and "no peak is known, so no MFU" in lines[2]


def test_a_gpu_is_known_by_its_name_and_talks_in_bf16(base):
    h100 = replace(infer.hardware.describe("cpu"), device="cuda", name="NVIDIA H100 80GB HBM3", capability=(9, 0), peak_flops=989e12)
    assert infer.memory_bandwidth(h100, "cuda") == (3.35e12, "data sheet")
    assert infer.memory_bandwidth(replace(h100, name="NVIDIA H100 PCIe"), "cuda") == (2.0e12, "data sheet")
    assert infer.hardware.pick_dtype(h100)[0] == torch.bfloat16
