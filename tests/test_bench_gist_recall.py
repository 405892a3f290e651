"""bench/gist_recall.py: rows hold the facts that are asked about, questions see the gists of their row and nothing else, and wrong sizes are told."""
import json

import pytest
import torch

from bench import gist_recall
from bench.gist_recall import NOISE, VALUES, Toy, parser, run, settle
from nanochat.common import UserError

ARGS = parser.parse_args(["--layers", "1", "--width", "64", "--curriculum", "4x8:2,8x32:2", "--groups", "2,8", "--group-steps", "2", "--asked", "8", "--seeds", "0"])


def toy():
    made = Toy(ARGS, 8, seed=0)
    for p in [*made.gpt.parameters(), *made.gistnet.parameters()]:
        if not p.any(): # as it starts, a layer writes nothing and every answer is alike
            torch.nn.init.normal_(p, std=0.1)
    return made


def test_a_row_holds_each_fact_once_and_what_is_asked():
    ids, asked, wanted = toy().rows(3, 6, 8, 20)
    assert ids.shape == (3, 48) and asked.shape == wanted.shape == (3, 20)
    for row, keys, values in zip(ids.tolist(), asked.tolist(), wanted.tolist()):
        assert sum(t >= NOISE + VALUES for t in row) == sum(NOISE <= t < NOISE + VALUES for t in row) == 6
        for key, value in zip(keys, values):
            assert row.count(key) == 1 and row[row.index(key) + 1] == value and row.index(key) // 8 == (row.index(key) + 1) // 8


@pytest.mark.parametrize("group", [1, 4])
def test_a_question_sees_the_vectors_of_its_row_and_no_other_question(group):
    made = toy()
    ids, asked, _ = made.rows(2, 4, 8, 5)
    with torch.no_grad():
        logits = made.answers(ids, asked, 8, group)
        alone = made.answers(ids, asked[:, 2:3], 8, group)
        assert torch.allclose(logits[:, 2:3], alone, atol=1e-5)
        assert torch.allclose(made.answers(ids, asked, 8, group, swapped=True)[0], made.answers(ids[[1, 0]], asked, 8, group)[0], atol=1e-5)
        ids[:, -1] = (ids[:, -1] + 1) % NOISE # only the last vector knows
        assert not torch.allclose(made.answers(ids, asked, 8, group), logits, atol=1e-5)


def test_every_stage_is_measured(capsys, monkeypatch):
    stages, groups, _ = settle(ARGS)
    told = run(ARGS, stages, groups, 0, lambda line: None)
    assert list(told)[::2] == ["4 blocks of 8: 32 tokens", "8 blocks of 32: 256 tokens", "one vector for 64 tokens", "one vector for 256 tokens"]
    assert all(0 <= share <= 1 for share in told.values())
    monkeypatch.setattr(gist_recall, "parser", type("", (), dict(parse_args=staticmethod(lambda: ARGS))))
    gist_recall.main()
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["found"][0] == told


def test_facts_are_learnt():
    """Blocks of four tokens with one fact each, from weights that know nothing, beside the gists of another row."""
    made = Toy(parser.parse_args(["--layers", "2", "--width", "64"]), 4, seed=0)
    made.learn(150, 4, 4, 1, 256)
    assert made.right(4, 4, 1, 200) > 0.9 and made.right(4, 4, 1, 200, swapped=True) < 0.4


@pytest.mark.parametrize("flags", [["--curriculum", "8x9:10"], ["--curriculum", "8:10"], ["--curriculum", "8x8"], ["--groups", "3"], ["--groups", "1"], ["--seeds", ""]])
def test_wrong_sizes_are_told(flags):
    with pytest.raises(UserError, match="expected"):
        settle(parser.parse_args(flags))
