"""bench/gist_words.py: a block is read behind its own gist and nothing else, what it learns is in the gist, and wrong sizes are told."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import gist_words
from bench.gist_words import block_nats, judge, learn, parser, settle
from megacontext import probes
from megacontext.evaluate import Networks, Rows
from megacontext.gistnet import GistConfig, GistNet
from megacontext.span import BLOCK
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from tests.tiny import VOCAB, tiny_networks
from tests.tiny_run import make_text, tiny_tokenizer


def batch_of(ids):
    return SimpleNamespace(inputs=ids[:, :-1], targets=ids[:, 1:], docs=torch.zeros(len(ids), ids.size(1) // BLOCK, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("view", gist_words.VIEWS)
def test_what_is_learnt_is_what_the_probe_measures(view):
    gpt, gistnet, lensnet = tiny_networks(0)
    ids = torch.randint(VOCAB, (3, 6 * BLOCK + 1), generator=torch.Generator().manual_seed(0))
    told = probes.reconstruction(Rows(Networks(gpt, gistnet, lensnet), ids, 6 * BLOCK, np.random.default_rng(0)))[1][view]
    nats = block_nats(gpt, gistnet, batch_of(ids), BLOCK, view, "none").unflatten(1, (-1, BLOCK))
    assert not nats[:, :, -1].any() and nats[:, :, :-1].mean(dim=(1, 2)).tolist() == pytest.approx(told, abs=1e-5)


def test_a_block_is_learnt_by_its_gist():
    """Blocks of eight tokens, each one of four words again and again behind the first: only the gist knows which."""
    torch.manual_seed(0)
    config = GPTConfig(16, 64, 2, 1, 1, 64)
    gpt, gistnet, rng = GPT(config), GistNet(GistConfig(64, 32)), np.random.default_rng(0)

    def batches():
        while True:
            ids = rng.integers(4, 16, (8, 2, BLOCK))
            ids[:, :, 9::2] = rng.integers(0, 4, (8, 2, 1)) # of no block of eight tokens the first
            yield batch_of(torch.from_numpy(np.concatenate([ids.reshape(8, -1), ids[:, 0, :1]], axis=1)))

    learn(gpt, gistnet, batches(), 120, 1.0)
    told = judge(gpt, gistnet, [next(batches()) for _ in range(4)])
    assert told["own"] < 1.7 < 1.85 < min(told["other"], told["nothing"]) # 1.37, 2.03, 1.99 as written


def test_the_whole_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gist_words.Tokenizer, "load", tiny_tokenizer)
    args = parser.parse_args(["--source", make_text(tmp_path / "text"), "--widths", "64", "--steps", "2,4", "--layers", "1", "--rows", "2", "--max-seq-len", "64", "--eval-rows", "4"])
    monkeypatch.setattr(gist_words, "parser", SimpleNamespace(parse_args=lambda: args))
    gist_words.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
    assert [(one["width"], one["steps"]) for one in found] == [(64, 2), (64, 4)]
    assert all(set(told) == set(gist_words.VIEWS) and min(told.values()) > 0 for one in found for told in one["seeds"])


@pytest.mark.parametrize("flags", [["--widths", ""], ["--widths", "x"], ["--widths", "64,100"], ["--widths", "0"], ["--steps", "0"], ["--seeds", ""], ["--rows", "1"], ["--rows", "3"],
                                   ["--eval-rows", "0"], ["--max-seq-len", "48"], ["--inner", "7"]])
def test_wrong_sizes_are_told(flags):
    with pytest.raises(UserError, match="expected"):
        settle(parser.parse_args(flags))


def test_one_row_cannot_be_judged():
    gpt, gistnet, _ = tiny_networks(0)
    with pytest.raises(UserError, match="does not fill two rows"):
        judge(gpt, gistnet, [batch_of(torch.zeros(1, 2 * BLOCK + 1, dtype=torch.long))])
