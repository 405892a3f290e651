"""Identity where it counts: on a GPU too, a context of tokens only is the plain GPT. The same on the CPU, so that these tests are known to work."""

import pytest
import torch

from megacontext.layout import entry_positions, full_table, visibility
from megacontext.losses import row_entries
from megacontext.runtime import Session
from megacontext.tree import MegaTree, make_header
from nanochat.engine import PlainStream
from tests.tiny import VOCAB, tiny_networks

PLACES = [pytest.param("cpu", torch.float32, id="cpu"), pytest.param("cuda", torch.float32, id="fp32", marks=pytest.mark.gpu),
          pytest.param("cuda", torch.bfloat16, id="bf16", marks=pytest.mark.gpu)]


def networks_at(device, dtype):
    """The same small networks as every other test's; LensNet works in fp32 throughout, as scripts/load.py has it."""
    gpt, gistnet, lensnet = tiny_networks()
    return gpt.to(device, dtype).eval(), gistnet.to(device, dtype).eval(), lensnet.to(device).eval()


@torch.no_grad()
def truth(ids):
    """Logits (N, V) of the plain GPT in fp32 on the CPU."""
    return tiny_networks()[0](torch.tensor([ids]))[0]


def assert_as_good(got, plain, true, dtype):
    """In fp32 the same numbers; in bf16 both round, and one no worse than the other."""
    got, plain = got.float().cpu(), plain.float().cpu()
    if dtype == torch.float32:
        torch.testing.assert_close(got, plain, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got, true, atol=1e-3, rtol=1e-3)
    else:
        assert (got - true).norm() < 1.5 * (plain - true).norm() < 0.1 * true.norm()


@torch.no_grad()
@pytest.mark.parametrize("device, dtype", PLACES)
def test_a_session_within_its_budget_is_the_plain_gpt(device, dtype):
    networks = networks_at(device, dtype)
    ids = torch.randint(VOCAB, (230,), generator=torch.Generator().manual_seed(0)).tolist()
    memory, plain = Session(*networks, MegaTree.in_memory(make_header(32, 0, gist_dtype="float32")), 288), PlainStream(networks[0])
    chunks = [ids[:100], *[[token] for token in ids[100:]]]
    got, beside = (torch.stack([stream.feed(chunk) for chunk in chunks]) for stream in (memory, plain))
    assert memory.stats["ticks"] > 2 and all(span.level == 0 for span in memory.spans)
    assert_as_good(got, beside, truth(ids)[99:], dtype)


@torch.no_grad()
@pytest.mark.parametrize("device, dtype", PLACES)
def test_a_training_row_of_raw_contexts_is_the_plain_gpt(device, dtype):
    gpt, gistnet, _ = networks_at(device, dtype)
    K, Q = 32, 12
    ids, docs = torch.randint(VOCAB, (1, Q * K), generator=torch.Generator().manual_seed(0)).to(device), torch.zeros(1, Q, dtype=torch.long, device=device)
    hidden = gpt.trunk(row_entries(gpt, gistnet, ids, K), entry_positions(Q * K, K, device=device), visibility(full_table(docs), K))
    assert_as_good(gpt.head(hidden[0, :Q * K]), gpt(ids)[0], truth(ids[0].tolist()), dtype)
