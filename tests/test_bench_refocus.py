"""bench/refocus.py: each way of reading sees what it says, at the places where it says so."""
import sys

import numpy as np
import pytest
import torch

from bench import refocus
from megacontext import runtime
from megacontext.evaluate import Networks
from megacontext.span import BLOCK
from nanochat.common import UserError

from tests.tiny_run import make_run, make_text
from tiny import tiny_gpt, tiny_networks

READ = 2 * BLOCK


def networks():
    return Networks(*tiny_networks())


def a_row(T):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 60, T + 1))


def test_the_window_is_that_of_each_token():
    """Of one layer: another token in front changes what follows for the W tokens that can see it, or its trace in the embeddings of the three behind it, and for nobody else."""
    gpt, row, W, at = tiny_gpt(layers=1), a_row(320), 40, 320 - READ - 20
    other = row.clone()
    other[at] = (row[at] + 1) % 60
    changed = np.flatnonzero(np.abs(refocus.window(gpt, other, W, READ) - refocus.window(gpt, row, W, READ)) > 1e-6) + 320 - READ
    assert changed.min() == 320 - READ and at + W - 1 <= changed.max() < at + W + 3
    whole = gpt(row[None, :-1], row[None, 1:], "none")[0, -READ:].detach().numpy()
    assert refocus.window(gpt, row, 320, READ) == pytest.approx(whole, abs=1e-4)


@torch.no_grad()
def test_retrieval_with_room_for_everything_reads_the_row_as_it_stands():
    some, row = networks(), a_row(320)
    whole = some.gpt(row[None, :-1], row[None, 1:], "none")[0, -READ:].numpy()
    for every in (32, 8):
        for nats in refocus.retrieved(some, row, 320 + BLOCK, READ, every).values():
            assert nats == pytest.approx(whole, abs=1e-4)


def test_retrieval_is_asked_anew_within_a_block(monkeypatch):
    """BM25 is asked with the tokens before each choice and the one that is read first behind it, as a session's tick is, and LensNet at that place."""
    asked, row = {"bm25": [], "lens": []}, a_row(320)
    bm25, lens = refocus.bm25, refocus.lens_scores
    monkeypatch.setattr(refocus, "bm25", lambda *args: asked["bm25"].append(args[-1]) or bm25(*args))
    monkeypatch.setattr(refocus, "lens_scores", lambda *args: asked["lens"].append(args[-1].item()) or lens(*args))
    refocus.retrieved(networks(), row, 192, READ, 16)
    assert asked["bm25"] == asked["lens"] == [257, 273, 289, 305]


def test_a_session_is_run_as_the_setting_says(monkeypatch):
    some, row, seen = networks(), a_row(1024), []
    torch.nn.init.normal_(some.lensnet.score.weight)
    plan = runtime.refocus
    monkeypatch.setattr(runtime, "refocus", lambda *args, **settings: seen.append(settings) or plan(*args, **settings))
    _, quiet = refocus.session(some, row, 192, READ, 32, 1.0, 0, 0)
    recency = len(seen)
    nats, busy = refocus.session(some, row, 192, READ, 8, 0.0, 4, 3)
    ticks = [settings for settings in seen[recency:] if "room" in settings] # not what assembles
    assert len(ticks) == READ // 8 and all((settings["margin"], settings["n_diff"], settings["cooldown"]) == (0.0, 4, 3) for settings in ticks)
    assert nats.shape == (READ,) and np.isfinite(nats).all() and busy["edits"] > quiet["edits"] and runtime.COOLDOWN == 0


def test_a_history_is_read_or_taken_in(monkeypatch):
    """Read, every token of the row passes through the GPT, once or again, with a tick every few of them; what is counted is of the last tokens alone, and these are those of decoding one by one."""
    some, row, ticks = networks(), a_row(512), []
    torch.nn.init.normal_(some.lensnet.score.weight)
    plan, read = runtime.refocus, runtime.Session._read
    monkeypatch.setattr(runtime, "refocus", lambda *args, **settings: ticks.append(1) or plan(*args, **settings))
    tokens = []
    monkeypatch.setattr(runtime.Session, "_read", lambda self, ids, length: tokens.extend(ids) or read(self, ids, length))
    nats, count = refocus.session(some, row, 192, READ, 8, 0.0, 4, 0, read_history=True)
    assert tokens == row[:512].tolist() and len(ticks) == 512 // 8 - 1, "there is none before the first token"
    assert nats.shape == (READ,) and 0 <= count["edits"] <= 4 * 4 and 0 <= count["again"] < 4 * BLOCK, "the history's own 448 tokens would be 224 a block"
    ingested, _ = refocus.session(some, row, 192, READ, 8, 0.0, 4, 0)
    assert not np.allclose(nats, ingested)
    memory, ids = runtime.Session(some.gpt, some.gistnet, some.lensnet, refocus.MegaTree.in_memory(refocus.make_header(some.gpt.config.width, 0)), 192, margin=0.0, refocus_every=8), row.tolist()
    one_by_one = [-memory.feed([now]).float().log_softmax(-1)[then].item() for now, then in zip(ids[:-1], ids[1:])]
    assert nats == pytest.approx(one_by_one[-READ:], abs=1e-4)


def test_what_is_kept_is_what_was_asked_for(monkeypatch):
    """All that a session keeps out of view is on its device, and by default as much as a chat keeps in both places."""
    some, row, stores = networks(), a_row(512), []
    store = runtime.KVStore
    monkeypatch.setattr(runtime, "KVStore", lambda device, kept, in_ram: stores.append((kept, in_ram)) or store(device, kept, in_ram))
    refocus.session(some, row, 192, READ, 8, 0.0, 4, 0, kept=0)
    refocus.session(some, row, 192, READ, 8, 0.0, 4, 0)
    runtime.Session(some.gpt, some.gistnet, some.lensnet, refocus.MegaTree.in_memory(refocus.make_header(some.gpt.config.width, 0)), 192)
    assert stores[:2] == [(0, 0), (sum(stores[2]), 0)]


@pytest.mark.parametrize("flags, words, reached", [([], "history taken in", (False, 12, 0)), (["--read-history", "--kept", "3", "--first-seed", "7"], "history read", (True, 3, 7))])
def test_flags_reach_the_sessions_the_rows_and_the_headline(base, tmp_path, monkeypatch, capsys, flags, words, reached):
    make_run("base", seq_len=256)
    asked, drawn, sample = [], [], refocus.sample_rows
    monkeypatch.setattr(refocus, "session", lambda *args: asked.append(args[-2:]) or (np.ones(READ), dict(edits=0.0, again=0.0)))
    monkeypatch.setattr(refocus, "sample_rows", lambda *args: drawn.append(args[-1].bit_generator.seed_seq.entropy) or sample(*args))
    monkeypatch.setattr(sys, "argv", ["refocus", "--checkpoint", "base/t", "--source", make_text(tmp_path / "text"), "--seq-len", "256", "--read", str(READ), "--rows", "2", "--seeds", "1",
                                      "--settings", "8:1:4:0", "--every", "", *flags])
    with torch.no_grad(): # which main() leaves off
        refocus.main()
    assert asked == [reached[:2]] * 2 and drawn == [[reached[2]]] and f"192 entries in view, {words}, base/t" in capsys.readouterr().out
    monkeypatch.setattr(refocus, "sample_rows", lambda *args: (sample(*args)[0], np.zeros(2, dtype=int)))
    with torch.no_grad(), pytest.raises(UserError, match="all 2 rows are of one document"):
        refocus.main()


def test_a_row_of_the_table_is_paired():
    """Four draws of two documents, one of them with two rows: the means are 0.6, 0.1 and 0.35 + 0.0833, twice, and the gap is 0.5 in every row."""
    weights = np.array([[2, 2, 0], [0, 0, 2], [1, 1, 1], [1, 1, 1]])
    cells, numbers = refocus.told("x", [1.0, 0.8, 2.5], [1.6, 1.4, 2.6], [1.1, 0.9, 2.1], weights, dict(edits=2.0, again=3.0))
    means = [0.6, 0.1, 1.3 / 3, 1.3 / 3]
    assert numbers["better"] == pytest.approx(1.3 / 3) and numbers["error"] == pytest.approx(np.std(means, ddof=1)) and numbers["share"] == pytest.approx(1.3 / 1.5)
    assert numbers["share_95"] == pytest.approx(np.percentile(np.array(means) / 0.5, (2.5, 97.5)))
    assert cells == ["x", f"+0.4333 +- {np.std(means, ddof=1):.4f}", f"0.87 ({numbers['share_95'][0]:.2f} - {numbers['share_95'][1]:.2f})", "2.0", "3.0"]
    assert "share" not in refocus.told("x", [1.0] * 3, [1.0] * 3, [1.0] * 3, weights, {})[1], "no way to go a share of"


def test_documents_are_drawn_and_not_rows():
    """Rows of one document come together, and a draw holds as many documents as there are."""
    weights = refocus.redrawn([5, 9, 5, 7], draws=500)
    assert weights.shape == (500, 4) and (weights[:, 0] == weights[:, 2]).all() and (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert np.abs(weights.mean(0) - 1).max() < 0.1 and weights.std(0).min() > 0.5


@pytest.mark.parametrize("flags", ["--settings 8:1:4", "--settings x:1:4:0", "--settings 8:1:4:0,1:1:4:0", "--settings 5:1:4:0", "--every 0", "--read 100", "--seq-len 1000", "--budget 900", "--rows 1 --seeds 1", "--every 12", "--kept -1", "--first-seed -1"])
def test_mistakes_are_told(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["refocus", *flags.split()])
    with pytest.raises(UserError):
        refocus.main()
