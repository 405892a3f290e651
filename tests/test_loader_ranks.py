"""The rows of a run depend neither on the number of ranks nor on being killed and resumed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat import documents, packing
from nanochat.common import UserError
from nanochat.dataloader import Loader, gather_state, lanes_for, merge_states
from tests.loading import Bytes, Parts, by_row, leave_no_threads, random_texts, shapes, take


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3))
def test_rows_do_not_depend_on_the_number_of_ranks(shape, world, seed):
    T = 32 * shape["blocks"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    settings = dict(align=shape["align"], lanes=12, seed=seed)
    one = by_row(take(Loader(texts, Bytes(), 12, T, **settings), 4))
    many = by_row(batch for rank in range(world)
                  for batch in take(Loader(texts, Bytes(), 12 // world, T, rank=rank, world=world, **settings), 4))
    assert many == one and sorted(one) == list(range(48))


@settings(max_examples=30, deadline=None)
@given(shapes, st.lists(st.tuples(st.sampled_from([1, 2, 3, 6]), st.integers(1, 3), st.integers(0, 4)), min_size=2, max_size=4),
       st.booleans())
def test_killed_and_resumed_with_other_ranks_the_rows_go_on(shape, runs, mixed):
    """runs: (number of ranks, rows per rank, steps before it is killed). Bit for bit, and the statistics too."""
    T, align = 32 * shape["blocks"], shape["align"]
    texts = random_texts(shape["seed"], shape["count"], shape["longest"])
    items = Parts((texts, 2.0), (random_texts(shape["seed"] + 1, 5, 300), 1.0)) if mixed else texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", shape["size"])
        patch.setattr(packing, "WAITING", shape["waiting"])
        state, found, settings = None, [], dict(align=align, lanes=6, seed=1)
        for world, batch, steps in runs:
            loaders = [Loader(items, Bytes(), batch, T, rank=rank, world=world, state=state, **settings) for rank in range(world)]
            found += [batch for loader in loaders for batch in take(loader, steps)]
            state = json.loads(json.dumps(merge_states([loader.state() for loader in loaders])))
        rows = by_row(found)
        total = sum(world * batch * steps for world, batch, steps in runs)
        assert sorted(rows) == list(range(total)) and state["row"] == total
        if total:
            straight = Loader(items, Bytes(), total, T, **settings)
            assert by_row(take(straight, 1)) == rows
            assert straight.state()["lanes"] == state["lanes"]


def test_a_state_is_of_what_was_handed_out_not_of_what_was_made_ahead():
    texts = random_texts(0, 20, 300)
    loader = Loader(texts, Bytes(), 2, 64, ahead=5)
    with loader:
        batch = next(loader)
        while loader._results.qsize() < 5:
            pass
        state = loader.state()
        following = next(loader)
    again = take(Loader(texts, Bytes(), 2, 64, state=state), 1)[0]
    assert state["row"] == 2 and batch.rows.tolist() == [0, 1]
    assert torch.equal(again.inputs, following.inputs) and again.rows.tolist() == [2, 3]


def test_a_state_is_small_and_resuming_reads_little():
    """In the middle of a document of a million characters, the start of it is not tokenized again."""
    texts = ["word " * 200_000, "short", "word " * 300_000]
    loader = Loader(texts, Bytes(), 64, 512, lanes=2)
    take(loader, 20)
    state, tokenizer = loader.state(), Bytes()
    assert len(json.dumps(state)) < 3000
    take(Loader(texts, tokenizer, 1, 512, lanes=2, state=state, ahead=1), 1)
    assert sum(map(len, tokenizer.log)) < 8 * documents.SLICE


@pytest.mark.parametrize("change, words", [(dict(seq_len=96), "seq_len 64, this run has 96"), (dict(align=32), "align 1"),
                                           (dict(lanes=4), "lanes 8"), (dict(seed=3), "seed 0"),
                                           (dict(items=["other"] * 7), "documents"), (dict(tokenizer="x"), "tokenizer")])
def test_a_state_of_another_run_is_refused(change, words):
    settings = dict(items=["some text"] * 9, tokenizer="", batch=1, seq_len=64)
    def make(state=None, **change):
        both = {**settings, **change}
        tokenizer = Bytes()
        tokenizer.fingerprint = both.pop("tokenizer")
        return Loader(both.pop("items"), tokenizer, both.pop("batch"), both.pop("seq_len"), state=state, **both)
    loader = make()
    take(loader, 1)
    with pytest.raises(UserError, match=words):
        make(loader.state(), **change)


@pytest.mark.parametrize("world", [16, 3])
def test_what_another_number_of_ranks_begins_one_can_end(world):
    """16 ranks have 16 lanes, 3 have 24: as many ranks as divide these go on with their run, and others are told which."""
    texts = [f"document {n} " * (1 + n % 7) for n in range(60)]
    loaders = [Loader(texts, Bytes(), 1, 64, rank=rank, world=world, lanes=lanes_for(world)) for rank in range(world)]
    begun = [batch for loader in loaders for batch in take(loader, 2)]
    state = merge_states([loader.state() for loader in loaders])
    for fewer in (1, 8):
        rest = [batch for rank in range(fewer) for batch in take(Loader(texts, Bytes(), 8 // fewer, 64, rank=rank, world=fewer, lanes=lanes_for(world), state=state), 1)]
        straight = Loader(texts, Bytes(), 2 * world + 8, 64, lanes=lanes_for(world))
        assert by_row([*begun, *rest]) == by_row(take(straight, 1))
    single = Loader(texts, Bytes(), 1, 64)
    take(single, 1)
    with pytest.raises(UserError, match=rf"begun with 8 lanes goes on with 1, 2, 4, 8 processes.*begun by {world} processes it has {lanes_for(world)} lanes"):
        Loader(texts, Bytes(), 1, 64, rank=0, world=world, state=single.state())


def test_a_state_of_one_rank_only_is_refused_and_gathering_needs_the_others():
    loader = Loader(["text"] * 9, Bytes(), 1, 64, rank=0, world=2)
    take(loader, 1)
    with pytest.raises(UserError, match=r"no lanes \[1, 3, 5, 7\].*gather_state"):
        Loader(["text"] * 9, Bytes(), 1, 64, state=loader.state())
    other = Loader(["text"] * 9, Bytes(), 1, 64, rank=1, world=2)
    with other, pytest.raises(AssertionError, match="different steps"):
        merge_states([loader.state(), other.state()])
    single = Loader(["text"] * 9, Bytes(), 1, 64)
    take(single, 1)
    assert gather_state(single) == single.state()


def test_text_that_changed_behind_a_state_is_noticed():
    texts = ["some text of a length", "another"] * 5
    loader = Loader(texts, Bytes(), 1, 64)
    take(loader, 1)
    with pytest.raises(UserError, match="the text or the tokenizer changed"):
        Loader(["shorter", "x"] * 5, Bytes(), 1, 64, state=loader.state())


@pytest.mark.parametrize("change, words", [(dict(world=3), "3 ranks cannot share 8 lanes"), (dict(align=32, seq_len=100), "multiple of 32"),
                                           (dict(batch=0), "at least 1"), (dict(items=[]), "empty")])
def test_settings_that_cannot_be(change, words):
    settings = {"items": ["text"], "tokenizer": Bytes(), "batch": 1, "seq_len": 64, **change}
    with pytest.raises(UserError, match=words):
        Loader(**settings)


@pytest.mark.slow
def test_two_real_processes_gather_one_state(tmp_path):
    """Two gloo ranks, then one: the rows go on."""
    script = tmp_path / "run.py"
    script.write_text("""
import json, sys, torch
import torch.distributed as td
sys.path[:0] = [%r, %r]
from nanochat.dataloader import Loader, gather_state
from loading import Bytes, random_texts
td.init_process_group("gloo")
loader = Loader(random_texts(5, 30, 300), Bytes(), 3, 64, rank=td.get_rank(), world=2)
for _ in range(4):
    next(loader)
state = gather_state(loader)
loader.close()
json.dump(state, open(%r + str(td.get_rank()), "w"))
td.destroy_process_group()
""" % (str(Path(__file__).parents[1]), str(Path(__file__).parent), str(tmp_path / "state")))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    states = [json.loads((tmp_path / f"state{rank}").read_text()) for rank in (0, 1)]
    assert states[0] == states[1] and states[0]["row"] == 24
    texts = random_texts(5, 30, 300)
    rest = take(Loader(texts, Bytes(), 6, 64, state=states[0]), 2)
    straight = take(Loader(texts, Bytes(), 6, 64), 6)[4:]
    assert by_row(rest) == by_row(straight)
