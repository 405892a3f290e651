"""What the GPT has in front of it, against slow twins: a view made from nothing, an attention written out, positions one by one."""
import numpy as np
import pytest
import torch

from megacontext.allocator import Focus
from megacontext.positions import POLICIES
from megacontext.runtime import Session
from megacontext.shown import Shown
from megacontext.span import BLOCK
from megacontext.working_context import cost
from tests.test_runtime import session, some_ids
from tests.tiny import tiny_networks


def by_place(memory):
    """{place on the timeline: what the cache holds there, keys as they are turned now, and values}, in the order of the timeline."""
    shown = memory.shown
    return {shown.places[i]: torch.stack([shown.cache.k[:, 0, :, i], shown.cache.v[:, 0, :, i]]) for i in np.argsort(shown.places[:shown.cache.length])}


@pytest.mark.parametrize("length", [2016, 2017, 2030])
def test_the_cache_holds_the_context_after_the_end_of_a_prompt_was_read_again(length):
    """
    The re-reading once went two blocks back whatever stood there: at a small budget the block before the last can be a gist, and
    its entry and 31 others were overwritten. After a prompt, the cache must be what a fresh splice of the context gives.
    """
    memory = session(budget=192)
    memory.feed(some_ids(length - 40))
    memory.score = lambda found=None: ([-9.0 if span is memory.spans[-2] else 5.0 if span.level == 1 else -1.0 for span in memory.spans], [])
    memory.focus = Focus()
    memory.feed(some_ids(40, seed=1))
    assert memory.stats["edits"] and (length % BLOCK or memory.spans[-2].level == 1), "the case must have edits, and a gist before the last block"
    memory._read_again(None)
    before, n = by_place(memory), memory.shown.cache.length
    assert n == cost(memory.spans)
    state = memory.mark()
    memory.shown = Shown(memory.gpt, memory.budget)
    memory._restore(state)
    after = by_place(memory)
    assert list(before) == list(after) and all(torch.allclose(before[place], after[place], atol=1e-4) for place in before)


class FromNothing(Session):
    """The slow twin of splicing: at every tick, everything in view is taken out and put in again, turned to the positions of now."""

    def _splice(self, now=False):
        for span, (k, v) in self.shown.remove(set(self.shown.spans)).items():
            self.store.put(span, k, v)
        return super()._splice(now)


@pytest.mark.parametrize("seed", range(3))
def test_splicing_is_putting_everything_in_again(seed):
    """Entries are moved, kept and appended in any order; the logits and what stands where must be those of a view made from nothing."""
    networks, rng = tiny_networks(seed, seq_len=512), np.random.default_rng(seed)
    fast, slow = (session(networks, budget=224, margin=0.02, kept=1000, kind=kind) for kind in (Session, FromNothing)) # nothing is ever forgotten
    for _ in range(40):
        ids = some_ids(int(rng.choice([1, 1, 3, 33, 90, 600])), int(rng.integers(1 << 30)))
        assert torch.allclose(fast.feed(ids), slow.feed(ids), atol=1e-3)
        assert fast.spans == slow.spans and fast.shown.frame == slow.shown.frame
        here, there = by_place(fast), by_place(slow)
        assert list(here) == list(there) and all(torch.allclose(here[place], there[place], atol=1e-3) for place in here)
    assert fast.stats["edits"] > 10 and fast.length > 5 * 512, "the case must edit, and go far past the trained range"


class AtOnce(Session):
    """The slow twin of waiting: what a tick opens is read at once, in a forward of its own."""

    def refocus(self, found=None, wait=False):
        return super().refocus(found)


def test_what_a_tick_opens_is_read_along_with_the_next_token(monkeypatch):
    """The logits are those of a forward of its own, which is spared."""
    networks, forwards, spared = tiny_networks(seq_len=512), [], 0
    trunk = networks[0].trunk
    monkeypatch.setattr(networks[0], "trunk", lambda *inputs, **named: forwards.append(1) or trunk(*inputs, **named))
    fast, slow = (session(networks, budget=224, margin=0.02, kind=kind) for kind in (Session, AtOnce))
    fast.feed(some_ids(2000)), slow.feed(some_ids(2000))
    for t in some_ids(300, seed=1):
        before, tokens = len(forwards), fast.stats["read_tokens"]
        read = fast.feed([t])
        took, before, opened = len(forwards) - before, len(forwards), fast.stats["read_tokens"] - tokens > 1
        assert torch.allclose(read, slow.feed([t]), atol=1e-3) and took == len(forwards) - before - opened
        assert fast.spans == slow.spans and not fast.waiting and not slow.waiting
        spared += opened
    for _ in range(12): # and prompts, whose search may open more
        ids = some_ids(12, fast.length)
        assert torch.allclose(fast.feed(ids), slow.feed(ids), atol=1e-3) and fast.spans == slow.spans
    assert spared > 5 and fast.stats["read_tokens"] == slow.stats["read_tokens"]


# ----------------------------------------------------------------------------------------------------------------------
# More gists than a trained row shows

def by_hand(memory):
    """attend() as the softmax is defined, the weights taken from the working context: of each query, exp(score) times weight over their sum."""
    def attend(q, k, v, see):
        shown = memory.shown
        gists = [span.level > 0 for span in shown.spans for _ in range(span.cost)]
        weights = torch.ones(k.size(2))
        weights[:len(gists)][torch.tensor(gists)] = min(1, shown.gpt.config.seq_len / BLOCK / sum(gists))
        ahead = torch.ones(q.size(2), k.size(2)).tril(k.size(2) - q.size(2)) # the new entries are the last, in their order
        share = (q @ k.transpose(2, 3) / q.size(3) ** 0.5).exp() * weights * ahead
        return share / share.sum(-1, keepdim=True) @ v
    return attend


@pytest.mark.parametrize("length,crowded", [(400, False), (20000, True)])
def test_gists_weigh_no_more_than_a_trained_row_of_them(length, crowded, monkeypatch):
    """A thousand gists drowned what stood open in plain sight. Those beyond the usual number share its weight; up to it they are left alone."""
    memory = session(tiny_networks(seq_len=512), budget=224)
    memory.feed(some_ids(length // BLOCK * BLOCK + 3))
    assert any(span.level for span in memory.spans) and memory.shown.crowded == crowded
    for ids in (some_ids(1), some_ids(9)):
        twin = memory.fork()
        with monkeypatch.context() as patch:
            patch.setattr("nanochat.gpt.attend", by_hand(twin))
            expected = twin._read(ids, twin.length)
        assert torch.allclose(memory._read(ids, memory.length), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Positions

def test_positions_stay_within_the_trained_range_between_two_frames():
    memory = session(tiny_networks(seq_len=512), budget=224)
    memory.feed(some_ids(3000))
    frames = set()
    for t in some_ids(200):
        memory.feed([t])
        here = memory.shown.mapped(memory.shown.places[:memory.shown.cache.length])
        assert 0 <= here.min() and here.max() < 512
        frames.add(memory.shown.frame)
    assert 1 < len(frames) <= 200 // memory.shown.hold + 2


@torch.no_grad()
def test_loose_entries_are_turned_to_where_a_frame_has_moved():
    """They leave as they were read in one frame and come back in another: other keys, and the same ones once unturned. In the same frame they come back bit for bit."""
    memory = session(tiny_networks(seq_len=512), budget=224)
    memory.feed(some_ids(2000))
    for t in some_ids(5):
        memory.feed([t])
    shown = memory.shown
    keys = lambda: shown.cache.k[:, 0, :, shown.settled:shown.cache.length].clone()
    assert shown.loose == 2005 % BLOCK
    here, (unturned, values) = keys(), shown.loose_pair()
    shown.lay(*shown.lift())
    assert torch.equal(keys(), here)
    loose = shown.lift()
    shown.reframe(shown.frame + 4000, now=True)
    shown.lay(*loose)
    assert not torch.allclose(keys(), here, atol=1e-3)
    assert torch.allclose(shown.loose_pair()[0], unturned, atol=1e-4) and torch.equal(shown.loose_pair()[1], values)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_one_token_is_mapped_as_many_are(policy):
    """What decoding uses, against the policy itself, at a length where float32 cannot tell neighbours apart."""
    shown = Shown(tiny_networks(seq_len=512)[0], 224, policy)
    for length in (0, 100, 5000, 2 ** 24 + 1000):
        shown.set_frame(length)
        for place in range(length, length + shown.hold + BLOCK):
            assert abs(shown.mapped_token(place).item() - shown.mapped(place)) <= max(1e-3, 2e-7 * abs(shown.mapped(place)))
