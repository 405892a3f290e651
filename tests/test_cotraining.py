"""The co-training objective: honest targets, every network learns, and the number of processes changes nothing."""
import copy
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch

from bench.gist_words import block_nats
from megacontext import losses
from megacontext.layout import GIST, RAW, block_mask, draw_table, stretches, visibility
from megacontext.labels import first_targets
from megacontext.lensnet import Scorer
from megacontext.losses import CoTraining, CoTrainingOptions, opened_by, parse_curriculum
from megacontext.matches import KINDS
from nanochat import checkpoint
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.gpt import IGNORE
from nanochat.optim import make_optimizer
from nanochat.train import PlainObjective
from tests.tiny import VOCAB, tiny_networks

T = 1280 # long enough for a level-2 gist of full blocks to be readable


def batch(rows, seed=0, T=T, ids=None):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (len(rows), T + 1), generator=g) if ids is None else ids
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros(len(rows), T // 32, dtype=torch.long), torch.tensor(rows))


def objective(seed=0, **options):
    return CoTraining(*tiny_networks(seed), CoTrainingOptions(**{"tail": (0, 96), **options}))


def test_random_tokens_cannot_be_predicted():
    """
    Fresh random tokens every step: no model may get below ln V. Elsewhere targets were the inputs themselves, and within 40 steps
    the loss on random tokens was 0.4 where 5.5 is the floor.
    """
    o = objective(curriculum=((8, 0.5), (32, 1.0)))
    optimizer = make_optimizer(o.gpt, dict(gistnet=o.gistnet, lensnet=o.lensnet))
    losses = []
    for step in range(24):
        o.start_step(step, 24)
        loss, sums = o(batch(list(range(4 * step, 4 * step + 4)), seed=step, T=256))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(o.report({name: float(sums.get(name, 0)) for name in o.SUMS})["loss"])
    assert min(losses) > math.log(VOCAB) - 0.03, losses
    assert losses[-1] < losses[0], "it did learn that there is nothing to know"


def test_every_parameter_has_a_gradient_a_slot_and_a_key_and_moves(tmp_path):
    """Elsewhere GistNet and LensNet were in no optimizer and in no checkpoint: 0 of 41 tensors."""
    o = objective()
    networks = dict(gpt=o.gpt, gistnet=o.gistnet, lensnet=o.lensnet)
    before = {name: copy.deepcopy(module.state_dict()) for name, module in networks.items()}
    optimizer = make_optimizer(o.gpt, dict(gistnet=o.gistnet, lensnet=o.lensnet))
    for rows in ([0, 1], [8, 9, 10, 11]): # a plain round and a labelled one
        loss, _ = o(batch(rows))
        loss.backward()
    for name, module in networks.items():
        for key, p in module.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, f"{name}.{key} gets no gradient"
    optimizer.step()
    state = optimizer.state_dict()
    checkpoint.save(tmp_path, 1, networks, optimizer, {})
    saved = checkpoint.load(tmp_path)
    for name, module in networks.items():
        for key, p in module.named_parameters():
            assert any(slot.startswith(f"{name}.{key}.") for slot in state), f"{name}.{key} has no optimizer slot"
            assert torch.equal(saved.tensors[name][key], p), f"{name}.{key} is not in the checkpoint"
            assert not torch.equal(before[name][key], p), f"{name}.{key} did not move"


def test_lensnet_does_not_train_the_others_and_they_do_not_cheat_for_it():
    o = objective()
    entries_grad = torch.autograd.grad(_lens_part(o), [*o.gpt.parameters(), *o.gistnet.parameters()], allow_unused=True)
    assert all(g is None for g in entries_grad)


def _lens_part(o):
    _, _, labels = o._read_gists(*[getattr(batch([8, 10]), name) for name in ("inputs", "targets", "docs", "rows")], torch.tensor([True, True]))
    return labels["lens_squares"]


@pytest.mark.parametrize("K", [8, 32])
def test_reconstruction_reads_a_block_behind_its_own_gist_and_nothing_else(K):
    """Of every block, beside bench.gist_words, which reads them all in one row with a mask; a part of the blocks costs a part of that; and nothing else of the loss changes."""
    rows, whole, some, none = batch([8, 9]), *(objective(reconstruct_every=every, tail=(0, 0)) for every in (1, 4, 0))
    for o in (whole, some, none):
        o.block = K
    read = lambda o: o._read_gists(rows.inputs, rows.targets, rows.docs, rows.rows, torch.tensor([True, False]))
    (total, (told, count), labels), (total_some, (told_some, _), _), (total_none, told_none, labels_none) = map(read, (whole, some, none))
    assert told.item() == pytest.approx(block_nats(whole.gpt, whole.gistnet, rows, K, "own", "none").sum().item(), rel=1e-4)
    assert 0.2 < (told_some / told).item() < 0.3 and told_none is None
    assert total == total_some == total_none and all(torch.equal(labels[name], labels_none[name]) for name in labels)
    found = torch.autograd.grad(told, [*whole.gistnet.parameters()], allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for g in found), "GistNet is taught by it"
    assert count == 2 * T // K * (K - 1)
    loss, sums = whole(rows)
    assert loss > none(rows)[0] and whole.report(dict.fromkeys(whole.SUMS, 0.0) | {name: float(value) for name, value in sums.items()})["loss_told"] == pytest.approx(told.item() / count.item(), rel=1e-4)


def test_the_loss_is_the_same_however_rows_are_dealt():
    """One process with four rows, or two with two: the sum over ranks is the loss of the whole, to rounding."""
    o = objective(reconstruct_every=8)
    for rows in ([0, 1, 2, 3], [8, 9, 10, 11], [6, 7, 8, 9]):
        whole = batch(rows)
        part = lambda pick: Batch(*(getattr(whole, name)[pick] for name in ("inputs", "targets", "docs", "rows")))
        together, sums = o(whole)
        halves = [o(part(slice(r, None, 2))) for r in range(2)]
        assert torch.allclose(together, sum(loss for loss, _ in halves) / 2, atol=1e-4)
        for name, value in sums.items():
            assert torch.allclose(value.float(), sum(s[name] for _, s in halves if name in s).float(), rtol=1e-3, atol=1e-2), name


def test_plain_rounds_are_the_plain_graph():
    o = objective()
    rows = batch([0, 1])
    assert torch.equal(o(rows)[0], PlainObjective(o.gpt)(rows)[0])


@pytest.mark.parametrize("plain_every", [0, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("labels_every", [2, 3, 4, 6, 7])
def test_one_round_in_labels_every_is_labelled_and_none_of_them_is_plain(plain_every, labels_every):
    """With labels every 3 rounds and every second round plain, half of the labels were due on plain rounds, which have no gists, and so were never measured."""
    options = CoTrainingOptions(plain_every=plain_every, labels_every=labels_every)
    rounds = np.arange(labels_every * max(1, plain_every) * 4)
    plain, labelled = options.plain(rounds), options.labelled(rounds)
    due = rounds % labels_every == 1
    assert plain.tolist() == [plain_every > 0 and n % plain_every == 0 for n in rounds.tolist()]
    assert labelled.sum() == len(rounds) / labels_every and not (labelled & plain).any()
    assert (labelled | plain)[due].all() and labelled[due & ~plain].all(), "only what cannot be measured is moved"
    if (plain_every, labels_every) in ((4, 2), (2, 2), (2, 4), (0, 2)): # base, mid, fine-tuning, mid with a frozen base
        assert (labelled == due).all()


def test_labels_due_on_a_plain_round_are_the_next_rounds():
    """By hand: every second round is plain, labels are due on rounds 1, 4, 7 and 10, and 4 and 10 are plain."""
    o = objective(curriculum=((32, 1.0),), plain_every=2, labels_every=3)
    told = [set(o(batch([8 * n], T=256))[1]) for n in range(12)]
    assert [n for n in range(12) if "labels" in told[n]] == [1, 5, 7, 11]
    assert [n for n in range(12) if "plain_nats" in told[n]] == [0, 2, 4, 6, 8, 10]


def no_hits(M, E, n=16):
    return torch.zeros(M, E, KINDS, n, dtype=torch.bool)


def test_lensnet_learns_a_rule_that_can_be_learnt():
    """Labels that follow from distance alone: the unexplained share falls below a half. (A loss stuck at 1 would be a dead net.)"""
    o = objective()
    optimizer = torch.optim.Adam(o.lensnet.parameters(), lr=3e-3)
    M, E = 8, 20
    g = torch.Generator().manual_seed(0)
    for step in range(150):
        distances = torch.randint(32, 2000, (M, E), generator=g)
        wanted = -torch.log(distances.float())
        wanted = wanted - wanted.mean(1, keepdim=True)
        got = o.lensnet(torch.rand(M, E, KINDS, 16, generator=g) < 0.1, torch.ones(M, E, dtype=torch.long), distances)
        loss = (got - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_lensnet_learns_that_a_rare_match_matters_and_a_common_one_does_not():
    """One entry holds a pair that no other holds, and all hold the other tokens: after a few steps that entry is asked for, wherever it stands."""
    _, _, lensnet = tiny_networks()
    optimizer = torch.optim.Adam(lensnet.parameters(), lr=1e-2)
    M, E = 16, 30
    g = torch.Generator().manual_seed(0)
    for step in range(120):
        hits = no_hits(M, E)
        hits[:, :, 0, 3:9] = True # everywhere
        where = torch.randint(E, (M,), generator=g)
        hits[torch.arange(M), where, 1, 15] = True
        distances = torch.arange(E, 0, -1)[None].expand(M, -1) * 32
        wanted = torch.nn.functional.one_hot(where, E) * 5.0
        got = lensnet(hits, torch.ones(M, E, dtype=torch.long), distances)
        right = (got.argmax(1) == where).float().mean()
        optimizer.zero_grad()
        (got - wanted + wanted.mean(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    assert right == 1


def test_scores_balance_and_ignore_who_is_not_there():
    """The budget's net zero: scores add up to nothing. An entry that is not seen has no score and no influence; a mask of all is no mask."""
    _, _, lensnet = tiny_networks()
    hits, levels, distances = torch.rand(1, 9, KINDS, 5) < 0.3, torch.ones(1, 9, dtype=torch.long), torch.arange(10, 100, 10)[None]
    seen = torch.arange(9)[None] < 7
    scores = lensnet(hits, levels, distances, seen)
    other = hits.clone()
    other[:, 7:] = ~other[:, 7:]
    assert abs(scores.sum()) < 1e-4 and (scores[:, 7:] == 0).all() and torch.allclose(scores, lensnet(other, levels, distances, seen))
    assert torch.allclose(scores[:, :7], lensnet(hits[:, :7], levels[:, :7], distances[:, :7]), atol=1e-5)


def test_what_lensnet_has_hardly_seen_is_doubted():
    """Beyond the longest rows that the head tells apart, an entry twice as far is worth one nat less, whatever it holds; within 512 tokens nothing is doubted."""
    _, _, lensnet = tiny_networks()
    torch.nn.init.normal_(lensnet.score.weight)
    distances, hits = torch.tensor([[8192, 4096, 2048, 1024, 500, 60]]), torch.ones(1, 6, KINDS, 5, dtype=torch.bool)
    worth = lambda at: lensnet.worth(hits[:, :1].float(), torch.ones(1, 1, dtype=torch.long), at, torch.ones(1, KINDS, 5), torch.tensor([9.0])).item()
    scores = [worth(distances[:, i:i + 1]) for i in range(6)]
    assert np.diff(scores[:4]) == pytest.approx([1, 1, 1], abs=1e-4)
    with patch("megacontext.lensnet.DOUBT", 0.0):
        undoubted = [worth(distances[:, i:i + 1]) for i in range(6)]
    assert undoubted[4:] == scores[4:] and undoubted[3] == pytest.approx(scores[3] + 1, abs=1e-4)


@pytest.mark.parametrize("entries, newest, levels", [(1, 64, 2), (7, 1, 2), (7, 2, 2), (10, 64, 2), (3, 5, 7), (40, 33, 7), (200, 64, 7)])
def test_one_reading_in_numpy_is_scored_as_in_torch(entries, newest, levels):
    """
    What a session asks at a tick, and in an evaluation in bf16 too: of fewer blocks than a row of training has and of millions, at distances and behind numbers of
    tokens that training never shows. One entry alone is worth 0.
    """
    _, _, lensnet = tiny_networks()
    torch.nn.init.normal_(lensnet.score.weight)
    g = torch.Generator().manual_seed(entries)
    hits = torch.rand(1, entries, KINDS, newest, generator=g) < 0.2
    levels, distances = torch.randint(0, levels, (1, entries), generator=g), 1 + 1e5 * torch.rand(1, entries, generator=g) ** 4
    with torch.no_grad():
        expected = lensnet(hits, levels, distances)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = Scorer(lensnet)(hits[0].numpy(), levels[0].numpy(), distances[0].double().numpy())
    assert got.shape == (entries,) and got.dtype == np.float32 and np.allclose(got, expected, atol=2e-5) and (entries == 1 or expected.std() > 0.1)


def test_labels_teach_without_doubt():
    """What it learns is what the labels say, as far as it is told; only what it chooses is doubted. A head that learnt the doubt too would learn it away."""
    def learnt(doubt):
        o = objective(asked=0.0, labels_every=2)
        torch.nn.init.normal_(o.lensnet.score.weight)
        with patch("megacontext.lensnet.DOUBT", doubt):
            _, sums = o(batch([8, 9]))
        return sums["lens_squares"]

    torch.manual_seed(0)
    first = learnt(0.0)
    torch.manual_seed(0)
    assert first > 0 and learnt(5.0) == first


def test_the_features_by_hand():
    """Three entries, three newest tokens. The last token is in one of them, log(4 / 1.5) nats; the one before it in all, log(4 / 3.5) nats."""
    _, _, lensnet = tiny_networks()
    seen = {}
    lensnet.up.register_forward_pre_hook(lambda module, args: seen.update(features=args[0]))
    hits = no_hits(1, 3, 3)
    hits[0, :, 0, 1] = hits[0, 1, 0, 2] = True
    lensnet(hits, torch.ones(1, 3, dtype=torch.long), torch.tensor([[90.0, 70.0, 50.0]]))
    rare, common = math.log(4 / 1.5), math.log(4 / 3.5)
    own = seen["features"][0, :, :10] # by itself: means over the newest 2, 8, 16, 32, 64, then the best of them
    expected = [[(first + last) / k for k in (2, 8, 16, 32, 64)] + [max(first, last)] * 5 for first, last in ((common, 0), (common, rare), (common, 0))]
    assert torch.allclose(own, torch.tensor(expected), atol=1e-5)
    assert torch.equal(seen["features"][0, :, 20:30], torch.cat([torch.zeros(1, 10), own[:2]])), "what the entry before has"


@patch("megacontext.lensnet.DOUBT", 0.0)
def test_to_the_head_what_is_far_is_just_far():
    _, _, lensnet = tiny_networks()
    torch.nn.init.normal_(lensnet.score.weight)
    hits = torch.rand(1, 6, KINDS, 5) < 0.3
    near, far = torch.tensor([[5e3, 4e3, 3e3, 2e3, 50, 40]]), torch.tensor([[5e6, 4e5, 3e4, 2e3, 50, 40]])
    assert torch.equal(lensnet(hits, torch.tensor([[1] * 6]), near), lensnet(hits, torch.tensor([[1] * 6]), far)) # as no row of training says how far is far
    assert torch.equal(lensnet(hits, torch.tensor([[4] * 6]), near), lensnet(hits, torch.tensor([[7] * 6]), near))
    assert not torch.allclose(lensnet(hits, torch.tensor([[1] * 6]), near), lensnet(hits, torch.tensor([[1, 1, 1, 1, 1, 0]]), near))


def test_a_match_is_rarer_in_a_block_than_in_a_thousand_tokens():
    """
    A gist of 32 blocks, three blocks: 35 blocks in all. A word that the gist and one block hold stands in 2.5 of 36 of them, so a block holds it
    by chance with probability 2.5 / 36, and 32 blocks with probability 1 - (1 - 2.5 / 36) ** 32. With ten gists more there are 355 blocks, and
    rarities are scaled to what 64 blocks have.
    """
    _, _, lensnet = tiny_networks()
    seen = {}
    lensnet.up.register_forward_pre_hook(lambda module, args: seen.update(features=args[0]))
    for more, scale in ((0, 1), (10, math.log(64) / math.log(355))):
        hits, n = no_hits(1, 5 + more, 1), 36 + 32 * more
        hits[0, [0, 3], 0, 0] = True
        lensnet(hits, torch.tensor([[2, 1, 1, 0, 1] + [2] * more]), torch.full((1, 5 + more), 50.0), torch.tensor([[True] * 4 + [False] + [True] * more]))
        expected = scale * torch.tensor([-math.log(1 - (1 - 2.5 / n) ** 32), 0, 0, -math.log(2.5 / n), 0] + [0] * more)
        assert torch.allclose(seen["features"][0, :, 5], expected, atol=1e-5), "the best of the newest two"


def test_lensnet_is_not_causal():
    """An old entry must see what is asked now, and who else holds it: elsewhere its score did not depend on anything newer, so it could not."""
    _, _, lensnet = tiny_networks()
    hits, levels, distances = no_hits(1, 9, 5), torch.ones(1, 9, dtype=torch.long), torch.arange(100, 10, -10)[None]
    hits[0, 0, 0, -1] = True
    alone = lensnet(hits, levels, distances)[0, 0]
    hits[0, 8, 0, -1] = True
    assert not torch.isclose(alone, lensnet(hits, levels, distances)[0, 0])
    hits[0, :, 0, -1] = False
    assert not torch.isclose(alone, lensnet(hits, levels, distances)[0, 0])


def test_lensnet_opens_what_it_scores_highest():
    """For every block that reads, its two best gists become raw, and nothing else changes: not what is raw, hidden or covered by a level-2 gist."""
    lensnet, Q = tiny_networks()[2], 40
    ids = torch.randint(VOCAB, (2, Q * 32))
    table = torch.from_numpy(np.stack([draw_table(np.zeros(Q, dtype=int), 32, np.random.default_rng(seed), (0, 96)) for seed in (0, 1)]))
    wanted = torch.randint(0, Q, (2, Q, 2))
    wanted[..., 1] = (wanted[..., 0] + 1) % Q
    scores = torch.zeros(2, Q, Q + 1).scatter(2, wanted, torch.tensor([2.0, 1.0]).expand_as(wanted))
    with patch.object(losses, "lens_scores", lambda *_, **__: scores):
        opened = opened_by(lensnet, ids, torch.zeros(2, Q, dtype=torch.long), table, 32, 2, None)
    changed = opened != table
    assert ((table == GIST) & (opened == RAW))[changed].all()
    both = table.gather(2, wanted) == GIST
    assert both.any() and (opened.gather(2, wanted)[both] == RAW).all()
    assert (changed.sum(-1) == (table == GIST).sum(-1).clamp(max=2)).all(), "of gists that are wanted less, as many as are missing"


def test_lensnet_is_asked_where_an_answer_begins_and_at_the_ticks_of_a_block():
    """
    The question stands right before the answer, most often in the block of the answer: asked where that block begins, LensNet never saw it, and learnt
    nothing from conversations. What is opened for a block is opened where it begins; what LensNet learns from is any tick at which tokens are left to gain.
    """
    targets = torch.full((1, 96), IGNORE)
    targets[0, 5:9], targets[0, 64:] = 1, 1
    assert first_targets(targets, 32).tolist() == [[5, 32, 64]], "the second block has none: it begins at 32"
    o, rows = objective(curriculum=((32, 1.0),), asked=1.0, labels_every=2, plain_every=2), batch(list(range(8, 16)), T=256)
    Q = 256 // 32
    some = Batch(rows.inputs, rows.targets.clone(), rows.docs, rows.rows)
    some.targets[:, :-40] = IGNORE # the answer begins 8 tokens before the last block
    seen, hits = [], losses.row_hits
    with patch.object(losses, "row_hits", lambda ids, docs, block, K, now: seen.append((block, now)) or hits(ids, docs, block, K, now)):
        for first in range(8, 64, 16): # rounds with labels
            o(Batch(some.inputs, some.targets, some.docs, torch.arange(first, first + 8)))
    begins = torch.where(torch.arange(Q) == Q - 2, 256 - 40, torch.arange(Q) * 32)
    assert len(seen) == 8, "one to open what LensNet asks for, one to learn"
    for block, now in seen[::2]:
        assert torch.equal(now, begins[block])
    block, now = (torch.cat(drawn).flatten() for drawn in zip(*seen[1::2]))
    assert set(block.tolist()) - {0} == {Q - 2, Q - 1}, "the only blocks with targets; 0 where a row has nothing to edit"
    assert set(now[block == Q - 2].tolist()) == {256 - 40}, "the answer begins in the block's last quarter"
    assert set(now[block == Q - 1].tolist()) == set(range(256 - 32, 256, 8))


def test_curricula():
    assert parse_curriculum("8:0.3,32:1") == ((8, 0.3), (32, 1.0))
    for wrong in ("8", "7:0.3,32:1", "8:0.5", "", "8:0.5,16:0.3,32:1", "8:0,32:1", "0:0.5,32:1"): # of shares that do not grow, a stage would never come
        with pytest.raises(UserError):
            parse_curriculum(wrong)


def test_how_a_rule_is_computed_changes_nothing():
    """The objective on FlexAttention, on stretches and on a dense mask: the same loss, the same labels. (Uncompiled here, and forward only: all that a CPU has.)"""
    networks, results = tiny_networks(), []
    for see in (visibility, stretches, block_mask):
        o = CoTraining(*networks, CoTrainingOptions(tail=(0, 96), reading_tokens=64, edits=3), see)
        with torch.no_grad():
            loss, sums = o(batch([8, 9, 10, 11]))
        results.append([loss, *(sums[name].float() for name in ("gist_nats", "lens_squares", "label_squares", "lens_products"))])
    assert results[0][3] > 0, "edits were priced"
    for dense, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, dense, atol=1e-3, rtol=1e-3)
