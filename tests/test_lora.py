"""LoRA: thin matrices learn beside those of a GPT that stays, which take them in at the end."""
import copy

import pytest
import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.lora import adapt, merge
from nanochat.optim import make_optimizer
from scripts import mid_train
from tests.tiny import VOCAB, stir


def gpts(rank=4):
    """A GPT, and the same one that learns beside its matrices."""
    torch.manual_seed(0)
    gpt = stir(GPT(GPTConfig(VOCAB, 64, layers=2, heads=2, kv_heads=2, width=64)))
    adapted = copy.deepcopy(gpt)
    adapt(adapted, rank)
    return gpt, adapted


def test_at_first_nothing_has_changed_and_only_what_is_beside_learns():
    gpt, adapted = gpts()
    ids = torch.randint(VOCAB, (2, 20))
    assert torch.allclose(gpt(ids), adapted(ids), atol=1e-5)
    learns = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learns == {f"blocks.{i}.{where}.lora_{way}" for i in range(2) for where in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.up", "mlp.down") for way in ("up", "down")}
    assert all(adapted.get_parameter(name).shape == ((4, 64) if name.endswith("q.lora_down") else (64, 4)) for name in learns if ".q." in name)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapted(ids[:, :-1], ids[:, 1:]).backward()
    make_optimizer(adapted).step()
    assert all(value.isfinite().all() for value in adapted.state_dict().values())
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in learns if name.endswith("up")} <= moved <= learns


def test_merged_it_is_the_plain_gpt_that_gives_the_same():
    gpt, adapted = gpts()
    for name, p in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(VOCAB, (2, 20))
    logits = adapted(ids)
    merge(adapted)
    assert not torch.allclose(gpt(ids), logits, atol=0.1) and torch.allclose(adapted(ids), logits, atol=1e-4)
    assert adapted.config == gpt.config and adapted.state_dict().keys() == gpt.state_dict().keys() and all(p.requires_grad for p in adapted.parameters())


def test_a_checkpoint_of_one_is_loaded_merged_and_built_again_to_go_on():
    gpt, adapted = gpts()
    again = GPT(GPTConfig(**adapted.config.to_dict()))
    again.load_state_dict(adapted.state_dict())
    ids = torch.randint(VOCAB, (2, 20))
    assert torch.equal(again(ids), adapted(ids)) and {name for name, p in again.named_parameters() if p.requires_grad} == {name for name, p in adapted.named_parameters() if p.requires_grad} != set()


@pytest.mark.parametrize("rank", [0, 64, 1000])
def test_a_rank_that_spares_nothing_is_refused(rank):
    with pytest.raises(UserError, match=f"a rank of {rank} beside matrices of 64 and more: expected 1 to 63"):
        gpts(rank)


def test_a_rank_without_a_frozen_base_is_refused(monkeypatch):
    for flags in (["--lora", "8"], ["--lora", "-1", "--freeze-base"]):
        monkeypatch.setattr("sys.argv", ["mid_train", *flags])
        with pytest.raises(UserError, match="--lora -?[18]: expected a rank from 1 up, with --freeze-base"):
            mid_train.main()
    monkeypatch.setattr("sys.argv", ["mid_train", "--lora", "8", "--freeze-base", "--fp8"])
    with pytest.raises(UserError, match="--lora with --fp8"):
        mid_train.main()
