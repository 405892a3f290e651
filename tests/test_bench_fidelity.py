"""The fidelity bench: its numbers are those of sessions, its variants read the same places, and its last line is JSON."""

import json
import math
import sys

import pytest
import torch

import bench.fidelity as fidelity
from nanochat.common import UserError
from scripts.load import load_stage
from tests.tiny_run import make_run, make_text


def run(monkeypatch, capsys, source, *flags):
    monkeypatch.setattr(sys, "argv", ["fidelity", "--device", "cpu", "--source", source, "--history", "1100", "--budget", "192", "--next", "40", "--read", "70",
                                      "--places", "2", "--seeds", "3", *flags])
    fidelity.main()
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_the_tables_say_what_the_json_says(base, tmp_path, monkeypatch, capsys):
    make_run("sft")
    source = make_text(tmp_path / "text", files=200)
    out, told = run(monkeypatch, capsys, source)
    formats, spliced = told["gist_dtype"], told["splicing"]
    assert [formats[name]["gist_bytes"] for name in ("fp32", "bf16", "int8")] == [4 * 32, 2 * 32, 4 + 32]
    for name in ("fp32", "bf16", "int8"):
        assert f"| {name} | {formats[name]['gist_bytes']} | {fidelity.pm(formats[name]['nats'])} | {fidelity.pm(formats[name]['more_than_fp32'])} |" in out
        assert formats[name]["more_than_fp32"]["mean"] == pytest.approx(formats[name]["nats"]["mean"] - formats["fp32"]["nats"]["mean"], abs=1e-9)
    assert formats["fp32"]["more_than_fp32"] == {"mean": 0, "spread": 0} and formats["int8"]["more_than_fp32"]["mean"] != 0, "stirred networks read their gists"
    assert formats["int8_more_than_bf16"]["mean"] == pytest.approx(formats["int8"]["nats"]["mean"] - formats["bf16"]["nats"]["mean"], abs=1e-9)
    assert spliced["kl"]["mean"] > 0 and 0 <= spliced["agree"]["mean"] <= 1 and 0 < spliced["tokens"] <= 3 * 2 * 69 and spliced["edits"] > 0
    control = formats[fidelity.CONTROL]
    size = lambda told: max(abs(told["more_than_fp32"]["mean"]), told["more_than_fp32"]["spread"]) # either may be near zero by chance
    assert size(control) > 5 * size(formats["int8"]), "wrong gists are another thing than rounded ones"
    assert f"| {fidelity.CONTROL} | - | {fidelity.pm(control['nats'])} |" in out
    assert f"| KL(exact, fast), nats per token | {fidelity.pm(spliced['kl'])} |" in out and told["budget"] == 192


def test_by_hand_where_nothing_is_compressed(base, tmp_path, monkeypatch):
    """No history and all of it raw: the nats are the plain GPT's on the same tokens, whatever the format of gists that nobody reads."""
    make_run("sft")
    loaded = load_stage("sft")
    args = fidelity.parser.parse_args(["--history", "0", "--budget", "256", "--next", "100", "--places", "2", "--seeds", "1"])
    ids = [loaded.tokenizer.bos, *loaded.tokenizer.encode("def f(x):\n    return x * 37 + 1\n" * 10)][:101]
    _, data = fidelity.gist_dtypes(loaded, ids, args)
    with torch.no_grad():
        plain = loaded.gpt(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), "none").mean().item()
    for name in ("fp32", "bf16", "int8", fidelity.CONTROL):
        assert data[name]["nats"]["mean"] == pytest.approx(plain, abs=1e-4) and data[name]["nats"]["spread"] is None
    assert math.isfinite(plain)


def test_exact_beside_itself_is_no_distance(base, tmp_path, monkeypatch, capsys):
    make_run("sft")
    source = make_text(tmp_path / "text", files=200)
    once = fidelity.session
    monkeypatch.setattr(fidelity, "session", lambda loaded, tree, args, exact=False: once(loaded, tree, args, exact=True))
    _, told = run(monkeypatch, capsys, source)
    assert told["splicing"]["kl"]["mean"] == pytest.approx(0, abs=1e-9) and told["splicing"]["agree"]["mean"] == 1 and told["splicing"]["more_nats"]["mean"] == 0


@pytest.mark.parametrize("flags, message", [(["--seeds", "0"], "at least 1"), (["--places", "1"], "--places at least 2"), (["--history", "100000000"], "tokens, expected at least"), (["--budget", "64"], "at least 192")])
def test_mistakes_are_told(base, tmp_path, monkeypatch, capsys, flags, message):
    make_run("sft")
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, make_text(tmp_path / "text", files=200), *flags)
