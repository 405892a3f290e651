"""A memory on disk is continued as it was, or with the budget that is asked for (the flag was once ignored), in any number format."""
import pytest
import torch

from megacontext.runtime import Session
from megacontext.working_context import Pins
from nanochat import checkpoint
from nanochat.common import UserError, checkpoint_dir
from nanochat.gpt import GPT, GPTConfig
from scripts.load import describe, load_stage, open_stream
from tests.tiny_run import make_run, tiny_tokenizer


@pytest.mark.parametrize("asked, opened, same", [(None, 224, True), (224, 224, True), (320, 320, False)])
def test_the_budget_of_a_saved_memory(base, tmp_path, asked, opened, same):
    make_run("sft")
    loaded = load_stage("sft")
    ids = [5 + i % 100 for i in range(1500)]
    stream = open_stream(loaded, budget=224, tree=tmp_path / "memory")
    stream.feed(ids)
    stream.pins = Pins(never=((0, 40),))
    stream.refocus()
    stream.save(tmp_path / "memory")
    spans = stream.spans
    stream.tree.close()

    again = open_stream(loaded, budget=asked, tree=tmp_path / "memory")
    assert (again.budget, again.length, again.pins) == (opened, 1500, stream.pins)
    assert (again.spans == spans) == same
    again.tree.close()


def test_a_memory_of_a_gpt_that_was_trained_on_is_assembled_anew(base, tmp_path):
    """Its gists were the same, so keys and values of the GPT as it had been stood before the new one's tokens."""
    make_run("sft")
    loaded = load_stage("sft")
    stream = open_stream(loaded, budget=224, tree=tmp_path / "memory")
    stream.feed([5 + i % 100 for i in range(1500)])
    stream.save(tmp_path / "memory")
    stream.tree.close()
    with torch.no_grad():
        loaded.gpt.blocks[0].attn.q.weight.mul_(1.5)
    again = open_stream(loaded, tree=tmp_path / "memory")
    fresh = Session(loaded.gpt, loaded.gistnet, loaded.lensnet, again.tree.fork(), 224)
    assert (again.budget, again.length) == (224, 1500) and torch.allclose(again.feed([7]), fresh.feed([7]), atol=1e-5)
    again.tree.close()


def test_a_memory_whose_making_was_broken_off_is_made(base, tmp_path):
    """A kill after the folder was made once left one that no command would go on with. A file in its place was a traceback."""
    make_run("sft")
    (tmp_path / "memory/tree").mkdir(parents=True)
    (tmp_path / "memory/tree/level0.ids").touch()
    stream = open_stream(load_stage("sft"), tree=tmp_path / "memory")
    stream.feed([5, 6, 7])
    stream.save(tmp_path / "memory")
    stream.tree.close()
    again = open_stream(load_stage("sft"), tree=tmp_path / "memory")
    assert again.length == 3
    again.tree.close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/tree .Not a directory.: expected a folder"):
        open_stream(load_stage("sft"), tree=tmp_path / "file")


def test_a_model_in_bf16_is_the_same_model(base, tmp_path):
    """mega_ingest reads the weights in fp32, chat in what the machine is best at; each once took the other's memory for another model's."""
    make_run("sft")
    stream = open_stream(load_stage("sft"), tree=tmp_path / "memory")
    stream.feed([5 + i % 100 for i in range(300)])
    stream.save(tmp_path / "memory")
    stream.tree.close()

    half = load_stage("sft", dtype=torch.bfloat16)
    again = open_stream(half, tree=tmp_path / "memory")
    assert half.gpt.dtype == torch.bfloat16 and again.length == 300 and torch.isfinite(again.feed([7])).all()
    again.tree.close()


def test_networks_of_another_version_are_told(base):
    """LensNet once had a width: its checkpoints ended in a traceback."""
    make_run("sft")
    path = next(path for path in base.rglob("*.json") if '"lensnet"' in path.read_text())
    path.write_text(path.read_text().replace('"lensnet": {', '"lensnet": {"width": 64, ', 1))
    with pytest.raises(UserError, match="another version.*LensConfig of hidden, found hidden, width"):
        load_stage("sft")


@pytest.mark.parametrize("device, dtype, helps", [("cuda", torch.float32, "Free .*, or use --dtype bf16, or use --device cpu, or take"), ("cuda", torch.bfloat16, "Free [^-]*, or use --device cpu, or take"), ("cpu", None, "Free [^-]*, or take")])
def test_networks_that_do_not_fit_are_told_in_a_line(base, monkeypatch, device, dtype, helps):
    """Chat and evaluation ended in a traceback on a GPU that was too small or taken. Only flags that help are named."""
    make_run("sft")

    def to(self, **where):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(GPT, "to", to)
    with pytest.raises(UserError, match=f"memory ran out while {device} took the networks of sft/t. {helps} a smaller model .CUDA"):
        load_stage("sft", device=device, dtype=dtype)


def test_a_checkpoint_from_when_embeddings_knew_one_token_before(base):
    """It does not say how many they knew, and is the same model still."""
    make_run("sft") # saves the tokenizer
    tokenizer = tiny_tokenizer()
    gpt = GPT(GPTConfig(tokenizer.vocab_size, 512, layers=2, heads=2, kv_heads=2, width=32, bos=tokenizer.bos, previous=1)).eval()
    torch.nn.init.normal_(gpt.previous.weight)
    about = describe(gpt, None, None, tokenizer)
    del about["gpt"]["previous"]
    checkpoint.save(checkpoint_dir("sft", "old"), 1, dict(gpt=gpt), None, dict(networks=about, batch_tokens=1024, lr=1.0))
    ids = torch.arange(5, 40)[None]
    assert torch.equal(load_stage("sft", "old", device="cpu").gpt(ids), gpt(ids))
