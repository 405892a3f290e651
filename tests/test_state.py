"""A session on disk: what is read is what was written, or it is refused in one line; a write that fails leaves what was there."""
import json
import random
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megacontext import state as state_file
from megacontext.positions import POLICIES
from megacontext.runtime import Session
from megacontext.state import FILE, load_state, save_state, saved
from megacontext.working_context import Pins
from nanochat.common import UserError
from tests.test_runtime import session, some_ids
from tests.tiny import tiny_networks


@pytest.fixture(scope="module")
def state():
    """A session in the middle of a block, with gists, after edits."""
    memory = session(budget=192, pins=Pins(raw=((40, 50),), never=((300, 310),)), longest=2000, margin=0.0)
    memory.feed(some_ids(1210))
    for t in some_ids(100):
        memory.feed([t])
    assert memory.stats["edits"] and memory.focus.edited
    return memory.mark()


def same(a, b):
    """Whether two States are equal, their tensors bit by bit."""
    tensors = [(*one.kv.values(), one.loose) for one in (a, b)]
    return (list(a.kv) == list(b.kv) and replace(a, kv={}, loose=()) == replace(b, kv={}, loose=())
            and all(torch.equal(x, y) and x.dtype == y.dtype for one, two in zip(*tensors) for x, y in zip(one, two)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_was_written(state, tmp_path, dtype):
    written = replace(state, exact=True, positions=POLICIES["clamped"], kv={span: (k.to(dtype), v.to(dtype)) for span, (k, v) in state.kv.items()})
    save_state(written, tmp_path / "new" / "folder")
    assert same(load_state(tmp_path / "new" / "folder"), written)
    assert saved(tmp_path) is None and saved(tmp_path / "new" / "folder")["length"] == 1310


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_goes_on_with_its_own_policy_and_mode(tmp_path, policy):
    """Every session that was opened again mapped positions as `compressed` does and was not exact, whatever it had been."""
    networks = tiny_networks(seq_len=512)
    memory = session(networks, budget=192, exact=True, positions=POLICIES[policy])
    memory.feed(some_ids(1500))
    memory.save(tmp_path)
    again = Session.open(tmp_path, *networks, memory.tree.fork())
    assert again.exact and again.shown.policy is POLICIES[policy]
    for t in some_ids(40):
        assert torch.allclose(again.feed([t]), memory.feed([t]), atol=1e-4)


def test_a_session_goes_on_with_other_settings_and_another_budget(tmp_path):
    """The budget among them was a TypeError. Its context is the one that a session with that budget assembles, its pins those that were saved, and they have to fit."""
    networks = tiny_networks()
    memory = session(networks, budget=512, n_diff=2, pins=Pins(raw=((40, 150),)))
    memory.feed(some_ids(1500))
    memory.save(tmp_path)
    assert Session.open(tmp_path, *networks, memory.tree.fork(), budget=512, n_diff=0).spans == memory.spans
    again = Session.open(tmp_path, *networks, memory.tree.fork(), budget=640)
    twin = Session(*networks, memory.tree.fork(), 640, n_diff=2, pins=memory.pins)
    assert (again.budget, again.n_diff, again.pins, again.spans) == (640, 2, memory.pins, twin.spans) and torch.allclose(again.feed([1]), twin.feed([1]), atol=1e-5)
    with pytest.raises(UserError, match="do not fit a budget of 256"):
        Session.open(tmp_path, *networks, memory.tree.fork(), budget=256)


@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "x0_scale"])
def test_a_session_that_another_gpt_saved_is_refused(tmp_path, name):
    """Only who wrote the gists was compared: a GPT that was trained on, or any other, went on from keys and values that were not its own. In another number format it is the same."""
    networks = tiny_networks(seq_len=512)
    memory = session(networks, budget=192)
    memory.feed(some_ids(1500))
    memory.save(tmp_path)
    Session.open(tmp_path, networks[0].bfloat16(), *networks[1:], memory.tree.fork())
    gpt, *others = tiny_networks(seq_len=512)
    Session.open(tmp_path, gpt, *others, memory.tree.fork())
    with torch.no_grad():
        gpt.get_parameter(name).mul_(1.01) # a step of training
    for gpt in (gpt, tiny_networks(seed=9, seq_len=512)[0]):
        with pytest.raises(UserError, match="another GPT wrote the keys and values .* Delete it"):
            Session.open(tmp_path, gpt, *others, memory.tree.fork())


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found(state, tmp_path, seed):
    """One bit of a value once moved the logits by 2.7, many made them NaN, one in a name ended in a KeyError. Bits all over the file, half of them in its header."""
    save_state(state, tmp_path)
    path, rng = tmp_path / FILE, random.Random(seed)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    found = 0
    for n in range(150):
        at = rng.randrange(header) if n % 2 else rng.randrange(header, len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:])
        try:
            read = load_state(tmp_path)
        except UserError as error:
            assert str(path) in str(error) and "Delete it" in str(error)
            found += 1
        else: # a space of the padding, say
            assert same(read, state)
    assert found > 100


def test_what_is_no_session_is_refused(state, tmp_path):
    """A foreign file ended in a TypeError. What was written before there were checksums has no format."""
    path = tmp_path / FILE
    save_state(state, tmp_path)
    data = path.read_bytes()
    for wrong in (b"", b"hello", data[:-1], data + b"x", data[:len(data) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match="damaged: expected a saved session, found what cannot be read .* Delete it"):
            saved(tmp_path)
    for metadata, said in ((None, "found None"), ({"session": json.dumps(dict(length=3))}, "found None"), ({"format": "megacontext-session 1"}, "found 'megacontext-session 1'")):
        save_file({"k": torch.zeros(3)}, path, metadata)
        with pytest.raises(UserError, match=f"expected the format 'megacontext-session 2', {said}.* Delete it"):
            load_state(tmp_path)


def test_a_full_disk_is_told_and_leaves_what_was_saved(state, tmp_path):
    """The kernel itself says no, in the middle of the file: that was a SafetensorError and a traceback."""
    save_state(state, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE).stat().st_size // 2, hard))
    try:
        with pytest.raises(UserError, match="could not be written to .*File too large.* make room there and save again"):
            save_state(replace(state, length=1311), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(load_state(tmp_path), state) and [path.name for path in tmp_path.iterdir()] == [FILE]
    with pytest.raises(UserError, match="could not be written to .*make room there"):
        save_state(state, tmp_path / FILE)


def test_the_bytes_are_on_the_disk_before_the_name(state, tmp_path, monkeypatch):
    """A name that reaches the disk before its bytes is an empty session after a power failure."""
    calls, move = [], Path.replace
    monkeypatch.setattr(state_file, "flush", lambda path: calls.append(("flush", path.name)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (calls.append(("replace", target.name)), move(self, target)))
    save_state(state, tmp_path / "t")
    assert calls == [("flush", FILE + ".new"), ("replace", FILE), ("flush", "t")]
