"""The account of FLOPs is what PyTorch counts on the real networks."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megacontext import cost
from megacontext.gistnet import GistConfig, GistNet
from megacontext.ingest import complete
from megacontext.lensnet import LensConfig, LensNet
from megacontext.matches import KINDS, NEWEST
from megacontext.runtime import Session
from megacontext.span import BLOCK
from megacontext.tree import MegaTree, make_header
from nanochat.gpt import GPT, GPTConfig, Entries
from nanochat.kv_cache import KVCache

from tiny import tiny_networks

torch.set_num_threads(1)


@torch.no_grad()
def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", [GistConfig(256), GistConfig(96, inner=48, heads=2, layers=1), GistConfig.for_gpt(GPTConfig.from_depth(12, 64))])
def test_a_gist(config):
    gistnet, children = GistNet(config), torch.randn(3, BLOCK, config.width)
    for level in (1, 2):
        assert counted(lambda: gistnet(children, level)) == 3 * cost.gist_flops(config)


def test_a_gist_by_hand():
    """D = 2, w = 1, one layer: 33 x 2 multiply-adds at the ends, k and v of 33 entries, 10 weights for the slot, its 33 scores and as many values."""
    assert cost.gist_flops(GistConfig(2, inner=1, heads=1, layers=1)) == 2 * (33 * 2 + 33 * 2 + 10 + 33 * 2)


@pytest.mark.parametrize("entries", [1, 37])
def test_a_scoring(entries):
    config = LensConfig(hidden=8)
    hits = torch.zeros(1, entries, KINDS, NEWEST, dtype=torch.bool)
    work = lambda: LensNet(config)(hits, torch.ones(1, entries, dtype=torch.long), torch.ones(1, entries))
    assert counted(work) == cost.score_flops(config, entries)


def test_a_gist_in_the_lane():
    config = GPTConfig.from_depth(4, 64)
    gpt = GPT(config)
    gists = Entries(torch.randn(5, 1, config.width), [torch.randn(5, 1, config.value_width) for _ in config.value_layers])
    work = lambda: gpt.trunk(gists, torch.zeros(1, 1), "all", KVCache(config, 5, 1))
    assert counted(work) == pytest.approx(5 * (BLOCK - 1) * cost.lane_flops(config))


def test_ingest_and_scoring_embed_as_many_tokens_as_the_account_says():
    gpt, gistnet, lensnet = tiny_networks()
    tree = MegaTree.in_memory(make_header(gpt.config.width, 0))
    session = Session(gpt, gistnet, lensnet, tree, budget=256)
    session.feed(list(range(40)) * 32) # 1,280 tokens
    for token in range(BLOCK):
        session.feed([token]) # a tick, after which the newest tokens are known as they were read
    scored, scorer = [], session.scorer
    session.scorer = lambda hits, levels, distances: scored.append(levels) or scorer(hits, levels, distances)
    family, = (span for span in session.spans if span.level == 2)
    laid = sum(family.start <= span.start < family.stop and span.level == 0 for span in session.spans)
    entries = len(session.spans) - 1 - laid + BLOCK # the blocks under the one gist of gists in its place
    assert counted(session.score) == 0 and [len(levels) for levels in scored] == [entries], "each entry once, in numpy, and no product of PyTorch"
    complete(gpt, gistnet, tree)
    tree.append_tokens([1] * BLOCK) # a block that completes no upper node
    one = counted(lambda: complete(gpt, gistnet, tree))
    assert one == cost.gist_flops(gistnet.config) + BLOCK * cost.embed_flops(gpt.config)


def test_the_levels_add_up():
    """Bulk ingest of 32 x 32 x 32 tokens: every gist of every level counted one by one."""
    config = GistConfig(8, inner=4, heads=1, layers=1)
    n = BLOCK ** 3
    each = (n // BLOCK + n // BLOCK ** 2 + n // BLOCK ** 3) * cost.gist_flops(config)
    assert cost.ingest_flops(config) * n == pytest.approx(each, rel=1e-4) # the account goes on to the levels above
