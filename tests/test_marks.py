"""Sessions that are saved and opened again, marked and rewound, forked: the next tokens are those that followed, or it is refused."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacontext.positions import POLICIES
from megacontext.runtime import Session
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import Pins, cost
from nanochat.common import UserError
from tests.test_runtime import session, some_ids
from tests.tiny import tiny_networks

ROOT = Path(__file__).resolve().parent.parent


def test_saved_closed_and_reopened_the_next_tokens_are_the_same(tmp_path):
    networks, ids = tiny_networks(), some_ids(3000)
    header = make_header(32, 0, model="m")
    tree = MegaTree.create(tmp_path / "tree", header)
    memory = Session(*networks, tree, 192)
    memory.feed(ids)
    memory.save(tmp_path)
    after = [memory.feed([t]) for t in ids[:70]]
    tree.close()

    tree = MegaTree.open(tmp_path / "tree", model="m")
    tree.truncate(3000) # the 70 tokens above were committed too: back to the save
    again = Session.open(tmp_path, *networks, tree)
    for t, expected in zip(ids[:70], after):
        assert torch.allclose(again.feed([t]), expected, atol=1e-5)
    tree.close()


ELSEWHERE = """
import sys
import torch
from megacontext.runtime import Session
from megacontext.tree import MegaTree
from tests.tiny import tiny_networks

folder, ids = sys.argv[1], [int(id) for id in sys.argv[2:]]
with MegaTree.open(f"{folder}/tree", model="m") as tree:
    session = Session.open(folder, *tiny_networks(), tree)
    torch.save(torch.stack([session.feed([id]) for id in ids]), f"{folder}/logits.pt")
"""


def test_in_another_process_the_next_tokens_are_the_same(tmp_path):
    """From the middle of a block, past the next tick, with nothing in common but the files."""
    memory, ids = Session(*tiny_networks(), MegaTree.create(tmp_path / "tree", make_header(32, 0, model="m")), 192), some_ids(40, seed=1)
    memory.feed(some_ids(1300))
    for t in some_ids(30, seed=2):
        memory.feed([t])
    memory.save(tmp_path)
    twin = memory.fork()
    memory.tree.close()
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path), *map(str, ids)], cwd=ROOT, check=True, timeout=120)
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(logits, torch.stack([twin.feed([t]) for t in ids]), atol=1e-5)


def test_rewound_to_a_mark_the_next_tokens_are_the_same():
    """An earlier turn comes back whole, from the middle of a block, whatever was read since; and again after that."""
    memory, ids = session(budget=192), some_ids(1500)
    memory.feed(ids)
    memory.feed(some_ids(45, seed=1))
    mark, after = memory.mark(), some_ids(70, seed=2)
    expected = [memory.feed([t]) for t in after]
    for seed in (3, 4):
        memory.feed(some_ids(700, seed))
        memory.rewind(mark)
        assert memory.length == 1545
        for t, logits in zip(after, expected):
            assert torch.allclose(memory.feed([t]), logits, atol=1e-4)
    with pytest.raises(UserError, match="cannot rewind to 1545"):
        memory.rewind(mark)
        memory.tree.truncate(1000)
        memory.rewind(mark)


def test_a_block_that_comes_back_after_a_mark_is_read_as_it_was_the_first_time():
    """What was kept of it at the mark was read in an older context, and a rewound session has nothing kept."""
    memory, after = session(budget=320, margin=0.0), some_ids(200, seed=2)
    memory.feed(some_ids(1500))
    for t in some_ids(100, seed=1):
        memory.feed([t])
    mark = memory.mark()
    expected = [memory.feed([t]) for t in after]
    memory.rewind(mark)
    edits = memory.stats["edits"]
    assert all(torch.allclose(memory.feed([t]), logits, atol=1e-4) for t, logits in zip(after, expected))
    assert memory.stats["edits"] > edits + 10, "blocks must come and go"


def test_a_rewind_whose_commit_fails_leaves_no_pin_of_what_is_forgotten(monkeypatch):
    memory = session(budget=320, longest=3000)
    memory.feed(some_ids(1000))
    mark = memory.mark()
    memory.feed(some_ids(600, seed=1))
    memory.pins = Pins(raw=((1500, 1510),))
    memory.refocus()
    with monkeypatch.context() as patch:
        patch.setattr(memory.tree, "commit", lambda: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            memory.rewind(mark)
    memory.feed([1])
    assert memory.length == 1001 and memory.pins == Pins()


def test_a_mark_of_tokens_that_were_replaced_is_refused():
    """
    Only lengths were compared: a mark taken before an earlier rewind was accepted, and its keys and values stood for tokens that the tree no longer had.
    The same tokens read again make it good again. What is refused changes nothing.
    """
    memory, ids = session(budget=192), some_ids(1500)
    memory.feed(ids[:1000])
    early = memory.mark()
    memory.feed(ids[1000:])
    late, expected = memory.mark(), memory.feed([1])
    memory.rewind(early)
    memory.feed(some_ids(600, seed=1))
    spans = memory.spans
    with pytest.raises(UserError, match="mark of 1500 tokens: .* other tokens"):
        memory.rewind(late)
    assert memory.length == 1600 and memory.spans == spans
    memory.rewind(early)
    memory.feed(ids[1000:] + [9])
    memory.rewind(late)
    assert torch.allclose(memory.feed([1]), expected, atol=1e-4)


def test_a_saved_session_and_a_tree_of_other_tokens_are_refused(tmp_path):
    networks, memory = tiny_networks(), session(budget=192)
    memory.feed(some_ids(500))
    memory.save(tmp_path)
    memory.tree.truncate(300)
    memory.feed(some_ids(200, seed=1))
    with pytest.raises(UserError, match="do not belong together: expected model None, 500 tokens .* Delete it"):
        Session.open(tmp_path, *networks, memory.tree)


def test_a_mark_of_another_budget_is_refused():
    """It ended in a broken law, with nothing in view. What is refused changes nothing."""
    memory = session(budget=256)
    memory.feed(some_ids(1500))
    other = Session(*tiny_networks(), memory.tree.fork(), 192)
    spans = other.spans
    with pytest.raises(UserError, match="with a budget of 256: this one has 192"):
        other.rewind(memory.mark())
    assert other.spans == spans and other.shown.cache.length == cost(spans)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_fork_goes_its_own_way(on_disk, tmp_path):
    memory = session(budget=192)
    memory.feed(some_ids(1500))
    other = memory.fork(tmp_path / "fork" if on_disk else None)
    assert (tmp_path / "fork").exists() == on_disk
    one, two = some_ids(70, seed=1), some_ids(70, seed=2)
    for t in two:
        other.feed([t])
    twin = memory.fork()
    for t in one: # the fork has read other tokens meanwhile
        assert torch.allclose(memory.feed([t]), twin.feed([t]), atol=1e-4)
    assert memory.tree.tokens(1500, 1570).tolist() == one and other.tree.tokens(1500, 1570).tolist() == two
    other.tree.close()


def test_a_fork_is_made_with_the_settings_of_its_session():
    """A fork had a store of the usual size, whatever its session was given: four budgets of keys and values for each fork, where memory was scarce."""
    memory = session(budget=192, n_diff=2, margin=1.0, pins=Pins(raw=((0, 9),)), longest=2000, exact=True, positions=POLICIES["clamped"], kept=0.5, kept_in_ram=2)
    other, settings = memory.fork(), ("budget", "n_diff", "margin", "pins", "longest", "exact", "kept", "kept_in_ram")
    assert [getattr(other, name) for name in settings] == [getattr(memory, name) for name in settings]
    assert other.store.near.size == 96 and other.shown.policy is POLICIES["clamped"]
