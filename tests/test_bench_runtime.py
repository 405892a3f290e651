"""The runtime bench: its tables add up, its last line is JSON and holds what is asked of it, and what it measures is what it says."""

import json
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

from bench import measure, runtime
from megacontext.gistnet import GistConfig
from megacontext.lensnet import LensConfig
from megacontext.runtime import Session
from megacontext.span import BLOCK
from megacontext.tree import MegaTree, make_header
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.kv_cache import KVCache

from tiny import tiny_networks

torch.set_num_threads(1)
LENGTHS = [256, 1024, 4096]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def told(scratch):
    """The JSON line of a tiny run, and all lines before it."""
    flags = "--depth 1 --vocab-size 64 --budget 192 --lengths 256,1k,4k --prompts 96,1k --tokens 64 --rounds 3".split()
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(tempfile, "tempdir", str(scratch))
        patch.setattr(measure, "LARGE", 50_000)
        for name, tokens in dict(SLICE=BLOCK, WARM_UP=2 * BLOCK, PROFILE=2 * BLOCK).items():
            patch.setattr(measure, name, tokens)
        patch.setattr(sys, "argv", ["runtime", *flags])
        patch.setattr("builtins.print", lambda *words, **settings: lines.append(" ".join(map(str, words))))
        runtime.main()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_the_last_line_tells_all_that_is_asked(told):
    line, text = told
    for name in ("flatness", "overhead", "ingest_speedup", "rss_bytes_per_token", "disk_bytes_per_token", "gistnet_flops_share", "lensnet_flops_share",
                 "open_10m_seconds", "open_10m_rss_mb"):
        assert isinstance(line[name], float), name
    assert [row["length"] for row in line["rows"]] == LENGTHS and (line["reference"], line["longest"]) == (256, 4096)
    assert [row["prompt"] for row in line["ttft"]] == [96, 1024] and line["open_10m_tokens"] == 50_000
    assert [row["model"] for row in line["flops"]] == ["this", "d12", "d20"]
    for row in line["rows"]:
        assert f"{row['length']:,d}" in text and f"{row['mean_ms']:.3f}" in text and f"{row['splice_ms']:.2f}" in text


def test_the_numbers_add_up(told):
    line, _ = told
    for row in line["rows"]:
        assert row["median_ms"] <= row["p99_ms"] <= row["max_ms"] and row["mean_ms"] > 0 and row["full_ms"] > 0
        assert row["read_ms"] + row["ingest_ms"] + row["lens_ms"] + row["allocator_ms"] + row["splice_ms"] == pytest.approx(row["block_ms"])
        assert min(row["read_ms"], row["ingest_ms"], row["lens_ms"], row["allocator_ms"], row["splice_ms"]) > 0
        assert row["refocus_ms"] == pytest.approx(row["lens_ms"] + row["allocator_ms"] + row["splice_ms"])
        assert row["ingest_share"] + row["lens_share"] + row["allocator_share"] + row["splice_share"] < 1
        assert row["visible"] <= 192 and 1 < row["spans"] <= 192 and row["asked"] >= 0.75 * row["spans"] / 4 and row["ingest_tokens_s"] > 0 # LensNet is asked of all spans, every 4 tokens
        assert 0 < row["edits"] and 0 <= row["again"] <= 16 * BLOCK # LensNet's last layer is not zero here
        assert 0 < row["rss_anon_mb"] < row["rss_mb"]
        assert 0 < row["search_ms"] < row["question_ms"]
        assert sorted(row["rounds_ms"])[1] == row["mean_ms"] and len(row["rounds_ms"]) == 3
        assert row["overhead"] == pytest.approx(np.median(np.divide(row["rounds_ms"], line["plain_rounds_ms"])) - 1)
    first, last = line["rows"][0], line["rows"][-1]
    assert first["exact_ms"] > 0 and line["overhead"] == first["overhead"]
    assert line["flatness"] == pytest.approx(np.median(np.divide(last["rounds_ms"], first["rounds_ms"])))
    assert line["rss_bytes_per_token"] == pytest.approx((last["rss_mb"] - first["rss_mb"]) * 2 ** 20 / (4096 - 256))
    assert line["held_ratio"] == last["held_mb"] / first["held_mb"]
    prompt = line["ttft"][-1]
    assert line["ingest_speedup"] == prompt["prefill_s"] / prompt["ingest_s"] and line["speedup_prompt"] == 1024
    # ids, and 1/32 of a gist of 128 bf16 numbers; then whole blocks of the disk, and the record
    assert 4 + 2 * 128 / 31 < last["disk_bytes_per_token"] < 4 + 2 * 128 / 31 + 64 * 1024 / 4096


def test_nothing_is_left_behind(told, scratch):
    assert list(scratch.iterdir()) == []


def test_flops_by_hand():
    """d1 with 64 tokens: 1 layer of 12 x 128^2 + 12, 3 x 128^2 for the tokens before, head 64 x 128: 253,964 numbers; and 4 x 128 for an entry seen."""
    config = GPTConfig.from_depth(1, 64)
    account = measure.flops(config, GistConfig.for_gpt(config), LensConfig(), asked=10, budget=192)
    base = 2 * 253_964 + 4 * 128 * 192
    assert account["base_mflops"] == pytest.approx(base / 1e6)
    lens = 2 * 10 * (2 * 64 * 5 + (2 * 20 + 6) * 32 + 32) # ten entries a token, 64 tokens ask in two ways, five means; a head of 46 -> 32 -> 1
    assert account["lensnet_flops_share"] == pytest.approx(lens / base)


def test_the_plain_engine_reads_behind_as_many_entries_every_time():
    gpt, gistnet, lensnet = tiny_networks()
    step = measure.plain(measure.Rig(gpt, gistnet, lensnet, 192, np.zeros(1, np.int32)), 100)
    cache = KVCache(gpt.config, 1, 101)
    cache.k.fill_(0.1), cache.v.fill_(0.1)
    for id in (3, 5, 3):
        cache.length = 100
        torch.testing.assert_close(step(id), gpt.extend(torch.tensor([[id]]), cache)[0])


def test_held_counts_each_storage_once_and_no_network():
    gpt, gistnet, lensnet = tiny_networks()
    session = Session(gpt, gistnet, lensnet, MegaTree.in_memory(make_header(gpt.config.width, 0)), 192)
    empty = measure.held(session)
    assert empty >= 2 * session.shown.cache.k.numel() * 4
    session.mine = [torch.zeros(1000)]
    session.mine += [session.mine[0][:10], {"again": session.mine[0]}]
    assert measure.held(session) == empty + 4000


def test_a_large_tree_is_a_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LARGE", 70_001)
    gpt, gistnet, _ = tiny_networks()
    tree = MegaTree.in_memory(make_header(gpt.config.width, 0))
    measure.ingest(gpt, gistnet, tree, np.arange(2000) % 64)
    measure.large_tree(tree, tmp_path / "large")
    with MegaTree.open(tmp_path / "large") as large:
        assert [large.count(level) for level in range(5)] == [70_001, 2187, 68, 2, 0] and large.verify()
        assert (large.tokens(2000, 4000) == tree.tokens(0, 2000)).all()
        np.testing.assert_array_equal(large.gists(1, 62, 124), tree.gists(1, 0, 62))


@pytest.mark.parametrize("flags", ["--lengths 1k", "--lengths 8k,1k", "--lengths 1k,8k", "--lengths 100,1k", "--lengths 1k,x", "--lengths 1.5k,4k", "--prompts 0", "--tokens 100",
                                   "--rounds 0", "--threads 0", "--cpu-time --threads 2", "--budget 100", "--refocus-every 12", "--dtype int8"])
def test_mistakes_are_told(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["runtime", *flags.split()])
    with pytest.raises(UserError):
        runtime.main()


@pytest.mark.parametrize("flag, waits", [("--cpu-time", False), ("", True)])
def test_cpu_time_does_not_count_what_others_take(monkeypatch, capsys, flag, waits):
    """A quarter of a second in which this process does nothing."""
    def run(*args):
        start = time.perf_counter()
        time.sleep(0.25)
        return dict(took=time.perf_counter() - start)

    wall = time.perf_counter
    monkeypatch.setattr(runtime, "run", run)
    monkeypatch.setattr(sys, "argv", f"runtime --depth 1 --vocab-size 64 --budget 192 --lengths 256,1k --prompts 96 --device cpu {flag}".split())
    runtime.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["took"] >= 0.25) == waits and line["clock"] == ("wall" if waits else "cpu")
    assert time.perf_counter is wall


def test_sizes():
    assert runtime.sizes("--lengths", "96,1k,512k,1M") == [96, 1024, 2 ** 19, 2 ** 20]
