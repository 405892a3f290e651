"""Sessions that read their next tokens in one forward, each answer in a thread of its own: what is said is what each says alone, whoever comes, goes or fails."""
import gc
import random
import threading
import time
import weakref
from functools import partial

import pytest
import torch

import megacontext.batch as batch
from bench.streams import Ids
from megacontext.batch import Caches, Together, keep, read, take
from megacontext.runtime import Session
from megacontext.span import BLOCK
from megacontext.telemetry import Telemetry
from nanochat.engine import Engine
from tests.test_runtime import session, some_ids
from tests.test_session_fails import on_a_tree_that_fails
from tests.tiny import VOCAB, tiny_networks

engine = Engine(Ids(VOCAB)) # no token ends an answer


def spread(networks, lengths=(0, 5, 300, 4000), budgets=(192, 256, 192, 224)):
    """Sessions of different histories and budgets."""
    sessions = [session(networks, budget=budget) for budget in budgets]
    for memory, length in zip(sessions, lengths):
        if length:
            memory.feed(some_ids(length, seed=length))
    return sessions


@pytest.fixture
def groups(monkeypatch):
    """How many sessions each common forward had."""
    sizes, whole = [], batch.read
    monkeypatch.setattr(batch, "read", lambda sessions, tokens: sizes.append(len(sessions)) or whole(sessions, tokens))
    return sizes


@torch.no_grad()
def test_a_common_forward_is_each_sessions_own():
    """Sessions of different lengths and budgets, one of them empty, some of them not there: each row says what its session alone says."""
    networks, rng = tiny_networks(seq_len=512), random.Random(0)
    alone, together = spread(networks), spread(networks)
    assert [memory.shown.crowded for memory in together] == [False, False, False, True], "the case must have gists that weigh less"
    for step in range(100):
        rows = sorted(rng.sample(range(4), rng.randint(2, 4)))
        tokens = [rng.randrange(VOCAB) for _ in rows]
        for row, token in zip(rows, tokens):
            take(together[row], token)
        logits = read([together[row] for row in rows], tokens)
        for row, token, told in zip(rows, tokens, logits):
            keep(together[row], token, 0.0)
            assert torch.allclose(told, alone[row].feed([token]), atol=1e-3), f"step {step}, session {row}"
    ids = some_ids(90)
    for a, b in zip(alone, together):
        assert a.spans == b.spans and a.tree.tokens(0, a.length).tolist() == b.tree.tokens(0, b.length).tolist() and a.stats["read_tokens"] == b.stats["read_tokens"]
        assert torch.allclose(a.feed(ids), b.feed(ids), atol=1e-3), "it still reads alone"


def expecting(together, sessions, seconds=60.0):
    """The next forward is of all these sessions, as if their last one had been: they wait for each other so long."""
    together.last, together.until = {id(memory) for memory in sessions}, time.perf_counter() + seconds


class Patient(Together):
    """Waits long enough for a thread that a busy machine holds up: whether guests meet is not left to the clock."""
    took = property(lambda self: 0.25, lambda self, seconds: None)


def at_once(*works):
    """Each in a thread of its own -> what it returned, or raised. A thread that hangs does not keep the others' outcome back."""
    told = [None] * len(works)

    def tell(row):
        try:
            told[row] = works[row]()
        except Exception as error:
            told[row] = error

    threads = [threading.Thread(target=tell, args=(row,), daemon=True) for row in range(len(works))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return told


# ----------------------------------------------------------------------------------------------------------------------
# The same tokens

TURNS = [[(60, 90), (7, 20)], [(700, 40), (300, 60)], [(3, 70)], [(30, 1), (30, 50), (5, 9)]] # of each guest, for each answer: tokens of the prompt, and of the answer


def guest(i, stream, temperature, pause=0.0):
    """All tokens that a guest is told."""
    time.sleep(i * pause)
    return [list(engine.generate(stream, some_ids(prompt, seed=10 * i + turn), new, temperature, top_k=20, seed=i)) for turn, (prompt, new) in enumerate(TURNS[i])]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_written_together_are_those_written_alone(temperature, groups):
    """Greedy, and drawn with a seed; they come and go at different times."""
    networks, together = tiny_networks(seq_len=512), Patient()
    expected = [guest(i, memory, temperature) for i, memory in enumerate(spread(networks))]
    assert not groups
    assert at_once(*(partial(guest, i, together.stream(memory), temperature, pause=0.05) for i, memory in enumerate(spread(networks)))) == expected
    assert len(groups) > 10, "they hardly met"


def test_a_rewind_is_the_sessions_own(groups):
    """A session once lived in a row of a common cache, and one that was rewound left it: its row went on with what had been there before."""
    networks, together = tiny_networks(), Together()
    sessions = spread(networks, (1500, 1500), (192, 192))
    streams = [together.stream(memory) for memory in sessions]

    def both(ids):
        told = []
        for t in ids:
            expecting(together, sessions)
            told.append(at_once(*(partial(stream.feed, [t], prompt=False) for stream in streams)))
        return told

    mark, ids = streams[1].mark(), some_ids(40, seed=1)
    expected = both(ids)
    assert not any(logits.requires_grad for row in expected for logits in row), "a thread has no_grad of its own"
    both(some_ids(30, seed=2))
    streams[1].rewind(mark)
    assert all(torch.allclose(logits[1], before[1], atol=1e-4) for logits, before in zip(both(ids), expected))
    assert groups == [2] * 110


# ----------------------------------------------------------------------------------------------------------------------
# Nobody holds the others

def test_who_is_alone_never_waits(groups, monkeypatch):
    networks, together = tiny_networks(), Together()
    [memory], [twin] = (spread(networks, (300,), (192,)) for _ in range(2))
    monkeypatch.setattr(together.change, "wait", lambda *_: pytest.fail("waited for nobody"))
    stream = together.stream(memory)
    for t in some_ids(70):
        assert torch.equal(stream.feed([t], prompt=False), twin.feed([t])), "the plain path, bit for bit"
    assert not groups


def test_who_has_left_is_waited_for_once(monkeypatch):
    together, sessions = Together(), spread(tiny_networks(), (300, 300), (192, 192))
    waits, wait = [], together.change.wait
    monkeypatch.setattr(together.change, "wait", lambda timeout: waits.append(timeout) or wait(timeout))
    expecting(together, sessions, 0.1)
    for t in some_ids(20):
        together.feed(sessions[0], t)
    assert len(waits) <= 2 and sum(waits) < 0.11, "one wake-up may come a little early"


@pytest.mark.parametrize("where", ["alone", "its tick", "a prompt"])
def test_who_takes_long_holds_nobody(where, monkeypatch):
    """One reads with a tick that does not end until the other has had twenty tokens."""
    together, sessions = Together(), spread(tiny_networks(), (300, 300), (192, 192))
    slow, quick = (together.stream(memory) for memory in sessions)
    begun, ended, together.took = threading.Event(), threading.Event(), 0.05
    refocus = sessions[0].refocus
    monkeypatch.setattr(sessions[0], "refocus", lambda *found, **wait: begun.set() or ended.wait(60) and refocus(*found, **wait))
    if where == "its tick":
        expecting(together, sessions, 0.5)

    def hurry():
        if where == "its tick":
            quick.feed([5], prompt=False)
        begun.wait(60)
        for t in some_ids(20):
            quick.feed([t], prompt=False)
        assert not ended.is_set()
        ended.set()
        return sessions[1].length

    told = at_once(lambda: slow.feed([5] * (1 + 9 * (where == "a prompt")), prompt=where == "a prompt"), hurry)
    assert told[0].shape == (VOCAB,) and told[1] == 320 + (where == "its tick")


# ----------------------------------------------------------------------------------------------------------------------
# Failures

def check_they_go_on(together, sessions, twins):
    for step in range(40):
        expecting(together, sessions)
        for row, logits in enumerate(at_once(*(partial(together.feed, memory, 5 + row) for row, memory in enumerate(sessions)))):
            assert torch.allclose(logits, twins[row].feed([5 + row]), atol=1e-3), f"step {step}, row {row}"


def test_a_forward_that_fails_fails_for_all_and_all_go_on(monkeypatch):
    """Half of the layers were read, of one session in the middle of a block and of two at the end of one."""
    networks, together = tiny_networks(), Together()
    sessions = spread(networks, (1279, 1247, 90), (192, 192, 192))
    append = Caches.append
    expecting(together, sessions)
    with monkeypatch.context() as patch:
        patch.setattr(Caches, "append", lambda caches, layer, k, v: append(caches, layer, k, v) if layer < 2 else 1 / 0)
        told = at_once(*(partial(together.feed, memory, 3) for memory in sessions))
    assert [type(error) for error in told] == [ZeroDivisionError] * 3
    assert [memory.length for memory in sessions] == [1280, 1248, 91], "their tokens are in their trees"
    check_they_go_on(together, sessions, [Session(*networks, memory.tree.fork(), 192, margin=memory.margin) for memory in sessions])


def test_a_session_that_fails_in_its_tick_fails_alone(monkeypatch):
    """Two of three tick, one fails in it, and does not come: the others read without it. Its token is in its tree all the same."""
    networks, together = tiny_networks(), Together()
    sessions = [on_a_tree_that_fails(networks, some_ids(n, seed=n)) for n in (1280, 1248, 90)]
    for t in some_ids(BLOCK):
        sessions[1].feed([t]) # so that the next token makes a tick that has to collapse something
    expecting(together, sessions, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(sessions[1], "_splice", lambda: 1 / 0)
        told = at_once(*(partial(together.feed, memory, 1 + row) for row, memory in enumerate(sessions)))
    assert [type(outcome) for outcome in told] == [torch.Tensor, ZeroDivisionError, torch.Tensor]
    assert [memory.length for memory in sessions] == [1281, 1281, 91]
    twins = [Session(*networks, sessions[1].tree.fork(), 192, margin=sessions[1].margin) if row == 1 else memory.fork() for row, memory in enumerate(sessions)]
    check_they_go_on(together, sessions, twins)


def test_telemetry_that_fails_costs_an_answer_nothing():
    """It was told between the tree and the view: the token of its tick was in the tree, and never read."""
    networks = tiny_networks()

    def lost(line):
        raise ConnectionError("nobody listens")

    loud, other, twin = (on_a_tree_that_fails(networks, some_ids(1250), telemetry=telemetry) for telemetry in (Telemetry(tell=lost), None, None))
    together, heard = Together(), 0
    for t in some_ids(2 * BLOCK):
        expecting(together, [loud, other], 0.01)
        try:
            together.feed(loud, t)
        except ConnectionError:
            heard += 1
        twin.feed([t])
        assert loud.length == twin.length and loud.shown.cache.length == twin.shown.cache.length
    assert heard > 10
    loud.telemetry.tell = None
    assert torch.allclose(loud.feed(some_ids(1)), twin.feed(some_ids(1)), atol=1e-3)


def test_any_number_come_and_go_and_fail(groups, monkeypatch):
    """Six threads, each with one guest after another: tokens, prompts, pauses, hang-ups, forwards that fail. It ends, and each is told what it is told alone."""
    networks, together, whole, chance = tiny_networks(seq_len=512), Together(), batch.read, random.Random(0)
    monkeypatch.setattr(batch, "read", lambda sessions, tokens: whole(sessions, tokens) if chance.random() < 0.9 else 1 / 0)

    def guests(seed):
        rng, failed = random.Random(seed), 0
        for _ in range(4):
            memory = session(networks, budget=rng.choice((192, 224)))
            memory.feed(some_ids(rng.choice((1, 40, 900)), seed))
            stream, twin = together.stream(memory), memory.fork()
            for _ in range(rng.randrange(60)):
                ids, length = some_ids(rng.choice((1, 1, 1, 1, 1, 1, 1, 5)), rng.randrange(1 << 30)), memory.length
                try:
                    logits = stream.feed(ids, prompt=False)
                except ZeroDivisionError:
                    assert memory.length == length + 1
                    failed, twin = failed + 1, memory.fork()
                    continue
                assert torch.allclose(logits, twin.feed(ids, prompt=False), atol=1e-3)
                if rng.random() < 0.05:
                    time.sleep(rng.random() * 0.02)
        return failed

    told = at_once(*(partial(guests, seed) for seed in range(6)))
    assert all(isinstance(failed, int) for failed in told), told
    assert sum(told) > 0 < len(groups) and not together.came


def test_what_failed_gives_back_its_memory_at_once(monkeypatch):
    """An error holds the frames it came through: one that was kept would keep a forward's tensors, and the next might fail for want of them."""
    together, sessions, gone = Together(), spread(tiny_networks(), (300, 300), (192, 192)), []

    def failing(sessions, tokens):
        tensor = torch.zeros(8)
        gone.append(weakref.ref(tensor))
        raise MemoryError("no room")

    def fails(together, memory): # and keeps nothing of the error
        try:
            together.feed(memory, 5)
        except MemoryError:
            return True

    monkeypatch.setattr(batch, "read", failing)
    monkeypatch.setattr(Session, "feed", lambda self, ids: failing([self], ids))
    gc.disable() # no collection may come to the rescue
    try:
        expecting(together, sessions)
        assert at_once(*(partial(fails, together, memory) for memory in sessions)) == [True, True]
        assert fails(Together(), sessions[0]) and [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
