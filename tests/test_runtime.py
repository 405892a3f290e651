"""The session against slow twins: the plain GPT, the training layout, the exact re-reading; and histories far beyond the budget. Its view: test_shown.py."""
import random

import numpy as np
import pytest
import torch

from megacontext import matches, runtime, search
from megacontext.allocator import Focus
from megacontext.gist_reading import value_means
from megacontext.layout import GIST, HIDDEN, NODE, RAW, entry_positions, visibility
from megacontext.losses import lens_scores, row_entries
from megacontext.matches import Matches
from megacontext.runtime import Session
from megacontext.search import BEAM, looked_into
from megacontext.shown import Shown
from megacontext.span import BLOCK, Span
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import Pins, check, cost
from nanochat.common import UserError
from nanochat.engine import PlainStream
from tests.test_matches import held_by, set_of, watch_ids
from tests.tiny import VOCAB, tiny_networks


def session(networks=None, budget=256, kind=Session, **settings):
    networks = networks or tiny_networks()
    return kind(*networks, MegaTree.in_memory(make_header(32, 0, gist_dtype="float32")), budget, **settings)


def some_ids(n, seed=0):
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_history_within_the_budget_is_the_plain_gpt():
    """Law 8, identity, through the whole runtime: ticks, splices and all."""
    networks, ids = tiny_networks(), some_ids(230)
    memory, plain = session(networks, budget=288), PlainStream(networks[0])
    for chunk in (ids[:1], ids[1:100], *[[t] for t in ids[100:]]):
        assert torch.allclose(memory.feed(chunk), plain.feed(chunk), atol=1e-4)
    assert all(span.level == 0 for span in memory.spans)


def test_the_session_is_the_training_layout():
    """
    What is trained is what runs: with recency alone, every token's logits are those of one training row in which each block
    reads through the working context that the session had.
    """
    networks, length, K = tiny_networks(seq_len=8192), 136 * BLOCK, BLOCK
    ids, Q = some_ids(length), length // BLOCK
    memory, got, table = session(networks, budget=192, n_diff=0), [], np.full((Q, Q), HIDDEN)
    for i, token in enumerate(ids):
        got.append(memory.feed([token]))
        if i % K == 0:
            for span in memory.spans[:-1]: # the context that block i // K reads through, its first token included
                first, last = span.start // K, span.stop // K
                table[i // K, first:last] = {0: RAW, 1: GIST, 2: NODE}[span.level]
    assert {RAW, GIST, NODE} <= set(np.unique(table)), "the case must show every level"
    entries = row_entries(*networks[:2], torch.tensor([ids]), K)
    hidden = networks[0].trunk(entries, entry_positions(length, K), visibility(torch.from_numpy(table)[None], K))
    assert torch.allclose(torch.stack(got), networks[0].head(hidden[0, :length]), atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_laws_hold_on_a_history_a_hundred_times_the_budget(seed):
    """Prompts of all lengths and single tokens; after each, the context tiles the history within its budget and the cache holds just it."""
    memory = session(tiny_networks(seed, seq_len=512), budget=192)
    rng = np.random.default_rng(seed)
    fed = []
    while len(fed) < 100 * 192:
        n = int(rng.choice([1, 1, 1, 5, 40, 300, 3000]))
        ids = some_ids(n, int(rng.integers(1 << 30)))
        logits = memory.feed(ids)
        fed += ids
        assert torch.isfinite(logits).all()
        check(memory.spans, len(fed), 192)
        assert memory.shown.cache.length == cost(memory.spans) and not memory.waiting and memory.length == len(fed)
    assert memory.tree.tokens(0, len(fed)).tolist() == fed, "law 7, lossless"
    assert max(span.level for span in memory.spans) >= 2


def test_refocus_opens_what_lensnet_wants_at_a_full_budget():
    """Elsewhere a full budget meant that nothing was ever expanded. Here LensNet asks for one old block, and gets it, paid for."""
    memory = session(budget=192)
    memory.feed(some_ids(2000))
    wanted = next(span for span in memory.spans if span.level == 1)
    memory.focus = Focus() # nothing rests
    memory.score = lambda found=None: ([5.0 if span == wanted else -1.0 for span in memory.spans], [])
    memory.refocus()
    assert Span(0, wanted.index) in memory.spans and cost(memory.spans) <= 192
    assert Span(0, wanted.index) in memory.shown.spans and memory.shown.cache.length == cost(memory.spans)


def test_a_reopened_block_is_read_as_in_the_training_layout():
    """The one batched forward of opened blocks, against a row in which those blocks read what stands before them in the context."""
    networks, Q = tiny_networks(), 12
    ids = some_ids(Q * BLOCK)
    memory = session(networks, budget=192, n_diff=0)
    memory.feed(ids)
    opened = [span for span in memory.spans if span.level == 1][:2]
    memory.spans = sorted([span for span in memory.spans if span not in opened] + [Span(0, span.index) for span in opened], key=lambda s: s.start)
    for span in opened:
        memory.store.drop(Span(0, span.index))
    memory.shown = Shown(networks[0], 300) # the two are not paid for here: only the reading matters
    memory.waiting = memory._splice(now=True)
    memory.read_waiting()
    table = np.full((Q, Q), HIDDEN)
    for span in memory.spans:
        table[span.index + 1:, span.index] = RAW if span.level == 0 else GIST # everybody reads through this one context
    entries = row_entries(*networks[:2], torch.tensor([ids]), BLOCK)
    from nanochat.kv_cache import KVCache
    room = KVCache(networks[0].config, 1, entries.x.size(1))
    networks[0].trunk(entries, entry_positions(Q * BLOCK, BLOCK), visibility(torch.from_numpy(table)[None], BLOCK), room)
    shown = memory.shown.pairs()
    for span in opened:
        at = span.index * BLOCK
        k = memory.shown.turned(shown[Span(0, span.index)][0], np.arange(at, at + BLOCK))
        assert torch.allclose(k, room.k[:, 0, :, at:at + BLOCK], atol=1e-3)


def test_a_block_that_is_laid_does_not_see_what_it_is_laid_on():
    """The gist holds the block itself, and what came after it: read again, a block sees what lies before it and nothing else, wherever the gist's centre stands."""
    def read(*spans):
        memory.store.clear()
        memory.shown, memory.edits, memory.spans = Shown(memory.gpt, 300), [], list(spans)
        memory.waiting = memory._splice(now=True)
        memory.read_waiting()
        return memory.shown.pairs()[Span(0, 60)]

    memory = session(budget=192)
    memory.feed(some_ids(70 * BLOCK))
    older, bed, block = Span(2, 0), Span(2, 1), Span(0, 60) # behind the centre of its gist, before its end
    alone, laid, after = read(block), read(bed, block), read(older, bed, block)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone, laid)) and not torch.allclose(alone[0], after[0], atol=1e-5)


@pytest.mark.parametrize("more", [0, 5])
def test_the_newest_is_read_again_wherever_the_last_block_is_laid(more):
    """It took a block that was laid far back, as the last span before the live block, and read everything from there on."""
    memory, wanted = session(budget=192, pins=Pins(never=((7900, 10 ** 7),))), Span(1, 230)

    def score(found=None):
        """The newest family closes, and then this one block of it is wanted, and some of the first."""
        cold = lambda span: 0.0 if span.live else 8.0 if span.level == 0 else -9.0 if span.level == 1 and span.index >= 224 else -1.0
        beneath = [(node, 9.0 if node == wanted else 5.0) for node in [wanted, *Span(2, 0).children()[:3]] if Span(2, node.index // 32) in memory.spans and Span(0, node.index) not in memory.spans]
        return [cold(span) for span in memory.spans], beneath

    memory.feed(some_ids(8192 + more - 40))
    memory.score = score
    memory.feed(some_ids(40, seed=7))
    check(memory.spans, 8192 + more, 192)
    assert Span(0, 230) in memory.spans and Span(2, 7) in memory.spans and all(span.level for span in memory.spans if span.start > 7900 and not span.live)
    assert memory.shown.cache.length == cost(memory.spans) and torch.isfinite(memory.feed([1])).all()


def test_exact_mode_has_read_every_raw_block_in_the_context_of_now():
    """
    The reference against its slow twin: after an edit before all raw blocks, forgetting what they were and reading them all again changes
    nothing in exact mode. In fast mode it does: there, blocks keep what they were when they were read. Without edits both are the same.
    """
    networks, ids = tiny_networks(), some_ids(700)
    fast, exact = session(networks, budget=192, n_diff=0), session(networks, budget=192, n_diff=0, exact=True)
    for t in ids[:130]:
        a, b = fast.feed([t]), exact.feed([t])
    assert not fast.stats["edits"] and torch.allclose(a, b, atol=1e-4)

    @torch.no_grad()
    def read_anew(memory):
        before, loose = memory.shown.pairs(), memory.shown.lift()
        memory.shown.remove({span for span in memory.spans if span.level == 0})
        memory.edits = []
        memory.waiting = memory._splice()
        memory.shown.lay(*loose)
        memory.read_waiting()
        after = memory.shown.pairs()
        return all(torch.allclose(before[span][0], after[span][0], atol=1e-3) for span in before)

    for t in ids[130:]:
        fast.feed([t]), exact.feed([t])
        raw = [span.start for span in exact.spans if span.level == 0]
        if exact.length % BLOCK == 1 and exact.edits and min(edit.node.start for edit in exact.edits) < raw[0]:
            break
    assert exact.edits and fast.spans == exact.spans, "the case must end right after an edit"
    assert read_anew(exact) and not read_anew(fast)


def test_in_pieces_or_at_once_the_tree_is_the_same():
    """Law 9: incremental ingest equals bulk ingest."""
    networks, ids = tiny_networks(), some_ids(40 * BLOCK + 7)
    bulk, slow = session(networks), session(networks)
    bulk.feed(ids)
    for t in ids:
        slow.feed([t])
    assert 0 < slow.tree.pending(1)[1] - slow.tree.pending(1)[0] <= slow.tail // BLOCK, "the tail's gists are written later, together"
    bulk.flush(), slow.flush()
    for level in (1, 2):
        n = bulk.tree.count(level)
        assert n == slow.tree.count(level) == len(ids) // BLOCK ** level
        assert np.allclose(bulk.tree.gists(level, 0, n), slow.tree.gists(level, 0, n), atol=1e-5)


def test_a_budget_too_small_and_a_foreign_session_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 192"):
        session(budget=160)
    with pytest.raises(UserError, match="session.safetensors"):
        Session.open(tmp_path, *tiny_networks(), None)


def test_half_precision_weights_do():
    """What chat loads on a machine with bf16: GPT and GistNet in bf16, LensNet in fp32."""
    gpt, gistnet, lensnet = tiny_networks(seq_len=512)
    memory = session((gpt.bfloat16(), gistnet.bfloat16(), lensnet), budget=192)
    memory.feed(some_ids(1500))
    assert memory.shown.crowded, "the case must have gists that weigh less"
    for t in some_ids(70):
        assert torch.isfinite(memory.feed([t])).all()
    check(memory.spans, 1570, 192)


def test_a_session_on_a_history_keeps_no_graph():
    """
    A session that opened a tree read its first context with gradients on: the cache then held all activations of that reading, and what it
    held was never freed, some hundred MB a session.
    """
    memory = session(budget=192)
    memory.feed(some_ids(3000))
    again = Session(*tiny_networks(), memory.tree, 192)
    again.feed([1])
    assert not again.shown.cache.k.requires_grad and not again.shown.unturned.requires_grad
    assert not any(k.requires_grad or v.requires_grad for k, v in [*again.shown.pairs().values(), *again.store.near.held.values()])


def test_a_gist_of_many_tokens_looks_at_some_of_them():
    """At a million tokens the first gist of level 4 once stopped a session for two seconds, to average a million rows."""
    memory = session(budget=256)
    memory.feed(some_ids(40_000))
    tables, ids = memory.gpt.value_tables, memory.tree.tokens(0, 32 ** 3)
    for level, seen in ((1, ids[:32]), (2, ids[:1024]), (3, ids[::32])):
        for table, means in zip(tables, value_means(memory.gpt, memory.tree, [Span(1, 7), Span(level, 0)])):
            assert torch.allclose(means[1], table.weight[torch.as_tensor(seen, dtype=torch.long)].mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("beam", [1, BEAM])
@pytest.mark.parametrize("more", [0, 8, 24])
def test_the_session_scores_as_rows_do(more, beam, monkeypatch):
    """
    The same context, once as a session scores it and once as a row of the training layout does: raw blocks, gists and gists of gists, of which it looks into some; where a block
    begins, and at its ticks.
    """
    monkeypatch.setattr(search, "BEAM", beam)
    monkeypatch.setattr(Matches, "hits", lambda self, tree, spans: held_by(tree.tokens(0, tree.length).tolist(), spans)) # where a set may say yes too often
    networks, Q = tiny_networks(seq_len=8192), 104 # more than half of the budget, so that there are gists of gists
    memory, ids = session(networks, budget=192), some_ids(Q * BLOCK + more)
    for t in ids:
        memory.feed([t])
    assert {span.level for span in memory.spans} == {0, 1, 2}
    docs, rows = torch.zeros(1, Q + 1, dtype=torch.long), torch.tensor([ids + [0] * (BLOCK - more)])

    def ask(spans):
        line = np.full((Q + 1, Q + 1), HIDDEN)
        for span in spans:
            line[Q, span.start // BLOCK:span.stop // BLOCK] = (RAW, GIST, NODE)[span.level]
        assert all(line[Q, 32 * span.index] == NODE for span in spans if span.level == 2), "a row shows a gist of gists by its first block"
        scores = lens_scores(networks[2], rows, docs, torch.from_numpy(line)[None], torch.tensor([[Q]]), BLOCK, torch.tensor([[len(ids)]]))[0, 0]
        return np.array([scores[Q + 1 + span.index if span.level == 2 else span.index].item() for span in spans])

    expected, beneath = looked_into([span for span in memory.spans if not span.live], ask)
    scores, found = memory.score()
    assert np.allclose(scores[:len(expected)], expected, atol=1e-3)
    assert [node for node, _ in found] == [node for node, _ in beneath] and len(found) > 20
    assert np.allclose([score for _, score in found], [score for _, score in beneath], atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_said_several_tokens_at_once_is_as_said_one_by_one(seed, monkeypatch):
    """The calculator's answer is fed at once. It was taken for a prompt: each made a search through the whole history, and moved the context."""
    rng, networks = random.Random(seed), tiny_networks()
    at_once, one_by_one = (session(networks, budget=192, margin=0.0) for _ in range(2))
    for memory in (at_once, one_by_one):
        memory.feed(some_ids(3000, seed))
    monkeypatch.setattr(runtime, "block_scores", lambda *_: pytest.fail("the history was searched"))
    for n in [rng.choice([1, 2, 6, 9, 40]) for _ in range(20)]:
        ids = some_ids(n, rng.randrange(1 << 30))
        logits = at_once.feed(ids, prompt=False)
        for token in ids:
            expected = one_by_one.feed([token])
        assert torch.allclose(logits, expected, atol=1e-3) and at_once.spans == one_by_one.spans and at_once.stats["ticks"] == one_by_one.stats["ticks"]
    with pytest.raises(pytest.fail.Exception, match="searched"):
        at_once.feed(some_ids(5), prompt=True)


def test_a_store_that_is_too_small_costs_forwards_and_nothing_else():
    """
    Gists that a context wanted were once pushed out of the store by others read for the same context. With room for next to nothing,
    the context must still be shown whole.
    """
    memory, rng = session(tiny_networks(seq_len=512), budget=192, kept=0.2), np.random.default_rng(0)
    while memory.length < 12000:
        memory.feed(some_ids(int(rng.choice([1, 5, 40, 300, 3000])), int(rng.integers(1 << 30))))
        assert set(memory.shown.spans) == {span for span in memory.spans if not span.live}
        assert memory.shown.loose == (memory.spans[-1].live if memory.spans else 0) and memory.store.entries[0] <= 0.2 * 192


def test_a_prompt_opens_what_it_asks_for_however_deep_it_lies(monkeypatch):
    """
    A level is opened at a time, and a short question once brought one refocus: what lay under a gist of level 2 came too late for the answer. Nor did
    anything open that ticks had edited shortly before the question: it was resting.
    """
    memory = session(tiny_networks(seq_len=8192), budget=320, n_diff=8)
    memory.feed(some_ids(9000))
    wanted = next(span.start for span in memory.spans if span.level == 2) // BLOCK + 5
    memory.focus = Focus(9, {span: 9 for span in memory.spans if span.level} | {Span(1, wanted): 9})
    monkeypatch.setattr(runtime, "block_scores", lambda lensnet, tree, *_: np.where(np.arange(tree.length // BLOCK) == wanted, 9.0, -1.0))
    memory.feed(some_ids(10, seed=1))
    assert Span(0, wanted) in memory.spans and memory.shown.cache.length == cost(memory.spans)
    check(memory.spans, memory.length, 320)


def test_what_a_question_opened_rests_for_a_block(monkeypatch):
    """A passkey at a million tokens was found and then closed in the middle of its answer, for blocks that hold the answer's own words: 7 of 9 were answered, and 9 since it rests."""
    memory = session(budget=320)
    memory.feed(some_ids(9000))
    wanted = next(span.start for span in memory.spans if span.level == 2) // BLOCK + 5
    monkeypatch.setattr(runtime, "block_scores", lambda lensnet, tree, *_: np.where(np.arange(tree.length // BLOCK) == wanted, 9.0, -1.0))
    memory.feed(some_ids(10, seed=1))
    monkeypatch.setattr(memory, "score", lambda found=None: ([-9.0 if span == Span(0, wanted) else 5.0 * (span.level == 1) for span in memory.spans], []))
    held = []
    for t in some_ids(60, seed=2):
        memory.feed([t])
        held.append(Span(0, wanted) in memory.spans)
    assert all(held[:BLOCK - memory.refocus_every]) and not any(held[BLOCK + memory.refocus_every:])


def test_what_a_session_keeps_for_its_questions_is_bounded(monkeypatch):
    """A set of bits for each entry that was ever in view would grow with the history."""
    monkeypatch.setattr(matches, "LEAST", 8)
    memory = session(budget=192)
    for t in some_ids(1500):
        memory.feed([t])
        assert memory.matches.fine.columns <= 2 * 192 and len(memory.matches.coarse.held) <= 192


def test_a_million_tokens_that_collapse_are_not_looked_at_again(monkeypatch):
    """
    The tick after 32 gists of level 3 became one hashed the ids of all that they stand for, and stopped the session for a tenth of a second. Their sets
    are still there then: the tick that closes them has asked them before.
    """
    rng, tree = np.random.default_rng(0), MegaTree.in_memory(make_header(32, 0, gist_dtype="float32"))
    tree.append_tokens(rng.integers(0, VOCAB, BLOCK ** 4 + 4 * BLOCK ** 3))
    for level in range(1, 5):
        tree.append_gists(level, rng.normal(size=(tree.pending(level)[1], 32)).astype(np.float32))
    memory, node = Session(*tiny_networks(seq_len=512), tree, 192), Span(4, 0)
    assert set(node.children()) <= set(memory.spans)
    monkeypatch.setattr(memory, "score", lambda found=None: Session.score(memory) and ([{2: 9.0, 3: -9.0}.get(span.level, 0.0) for span in memory.spans], []))
    while node not in memory.spans:
        assert memory.length < BLOCK ** 4 + 5 * BLOCK ** 3, "the case must close them"
        memory.feed([1])
    assert (4, 0) not in memory.matches.coarse.held
    asked, fresh = watch_ids(tree, monkeypatch), Matches()
    while (4, 0) not in memory.matches.coarse.held:
        memory.feed([1])
    assert max(asked) < BLOCK ** 3
    fresh.hits(tree, [node])
    assert np.array_equal(set_of(memory.matches, node), set_of(fresh, node))
