"""Laws of the small things under everything: exits, places, ranks, the log, the clock, the cost of a model, the machine."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megacontext.cost import training_bytes
from megacontext.gistnet import GistConfig
from megacontext.losses import CoTraining, CoTrainingOptions
from nanochat import common, cost, hardware
from nanochat.common import UserError
from nanochat.cross_entropy import piece_tokens
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.run import Log, Progress, duration
from nanochat.train import PlainObjective
from scripts.load import build


# ---------------------------------------------------------------------------------------------------------------------
# Exits and places

@pytest.mark.parametrize("raises, code, said", [
    ("UserError('lower --depth')", 2, "error: lower --depth"), ("KeyboardInterrupt", 130, "interrupted"),
    ("ValueError('ours')", 1, "Traceback")])
def test_how_a_script_ends(raises, code, said):
    """A user's mistake is one line and code 2; ours keeps its traceback."""
    program = f"from nanochat.common import *\ndef main(): raise {raises}\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == code and said in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_places(base):
    assert common.base_dir() == base and base.is_dir()
    assert common.checkpoint_dir("sft", "d12") == base / "sft_checkpoints" / "d12"
    assert not (base / "sft_checkpoints").exists()
    with pytest.raises(UserError, match="base, mid, sft, rl"):
        common.checkpoint_dir("pre", "d12")


def test_a_base_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    """NANOCHAT_BASE_DIR below a file: a NotADirectoryError of nobody's making."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"cannot make the folder .*/file/below \(Not a directory\): set NANOCHAT_BASE_DIR"):
        common.base_dir()


def test_ranks_come_from_torchrun_or_not_at_all(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert common.dist_info() == common.Dist(0, 0, 1)
    for name, value in zip(names, "314"):
        monkeypatch.setenv(name, value)
    assert common.dist_info() == common.Dist(3, 1, 4) and not common.dist_info().main
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        common.dist_info()


def test_setup_refuses_what_is_not_there():
    with pytest.raises(UserError, match="expected cuda, mps or cpu"):
        common.setup("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            common.setup("cuda")
    device, dist = common.setup("cpu", seed=7)
    first = torch.rand(3)
    common.setup("cpu", seed=7)
    assert device.type == "cpu" and dist.world == 1 and torch.equal(torch.rand(3), first)


# ---------------------------------------------------------------------------------------------------------------------
# Log and clock

def test_the_log_says_the_same_to_the_file_and_the_terminal(tmp_path, capsys):
    log = Log(tmp_path / "new", "train")
    log.write(3, loss=torch.tensor(2.5), note="two words", bad=float("nan"))
    log.close()
    log = Log(tmp_path / "new", "train")  # a resumed run appends
    log.write(4, show=False, loss=2.25)
    log.summary(val_bpb=0.123456789, steps=5, source="dir:/my books/it's")
    log.close()
    lines = [json.loads(line) for line in open(tmp_path / "new" / "train.jsonl")]
    assert lines == [{"step": 3, "loss": 2.5, "note": "two words", "bad": "nan"}, {"step": 4, "loss": 2.25},
                     {"summary": {"val_bpb": 0.123456789, "steps": 5, "source": "dir:/my books/it's"}}]
    step, summary = capsys.readouterr().out.splitlines()
    assert step == "step 3 | loss=2.5 note='two words' bad=nan"
    assert shlex.split(summary) == ["summary", "val_bpb=0.12345679", "steps=5", "source=dir:/my books/it's"], "a path with spaces is still that path"


def test_other_ranks_log_nothing(tmp_path, capsys):
    log = Log(tmp_path, main=False)
    log.write(1, loss=1.0)
    log.summary(loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_clock_leaves_out_the_warmup_and_the_pauses():
    now = [0.0]
    progress = Progress(100, tokens_per_step=1000, flops_per_token=2e6, peak_flops=1e10, warm=2, clock=lambda: now[0])
    for step, seconds in enumerate([30, 10, 0.5, 0.5]):
        now[0] += seconds
        metrics, line = progress.tick(step, loss=3.0, lr=0.5)
    now[0] += 1000  # an evaluation
    progress.left_out(1000)
    now[0] += 0.5
    metrics, line = progress.tick(4, loss=3.0, lr=0.5, bpb=1.25)
    assert metrics["tokens_per_s"] == 2000 and metrics["mfu"] == pytest.approx(0.4) and metrics["bpb"] == 1.25
    assert line == "004/100 | loss 3.0000 | lr 0.50 | bpb 1.25 | 0.50 s | 2,000 tok/s | mfu 40.0% | 0m41s + 0m47s"
    assert progress.summary() == pytest.approx(dict(tokens_per_s=2000, train_s=41.5, mfu=0.4))


def test_an_unknown_peak_is_no_mfu(tmp_path, capsys):
    """It is told as none, and null in JSON: left out, it read like a summary that another version had written."""
    progress = Progress(10, 1000, 1e6, None)
    metrics, line = progress.tick(0, 1.0)
    assert metrics["mfu"] is None and " | mfu none | " in line
    log = Log(tmp_path)
    log.summary(**progress.summary())
    log.close()
    assert capsys.readouterr().out.endswith(" mfu=none\n") and json.loads((tmp_path / "log.jsonl").read_text())["summary"]["mfu"] is None


def test_durations():
    assert [duration(s) for s in (0, 61, 3671)] == ["0m00s", "1m01s", "1h01m"]


# ---------------------------------------------------------------------------------------------------------------------
# Cost

@pytest.mark.parametrize("config", [GPTConfig.from_depth(4, 512, 64), GPTConfig.from_depth(5, 96, 64), GPTConfig(500, 64, 3, 4, 2, 128)])
def test_counts_are_the_models(config):
    gpt = GPT(config)
    assert cost.parameter_counts(config) == cost.count_by_role(gpt)
    assert cost.parameter_counts(config)["total"] == sum(p.numel() for p in gpt.parameters())


def test_costs_do_not_depend_on_the_class_of_a_layer():
    """
    nanochat counted FLOPs by isinstance of its own Linear. The fp8 linear was another class: d24 lost 92% of its FLOPs,
    MFU and --target-flops went wrong with it. Here a model of foreign linears counts the same.
    """
    class Float8Linear(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = linear.weight

    gpt = GPT(GPTConfig(500, 64, 3, 4, 2, 128))
    before = cost.count_by_role(gpt)
    for block in gpt.blocks:
        block.mlp.up, block.mlp.down = Float8Linear(block.mlp.up), Float8Linear(block.mlp.down)
    assert cost.count_by_role(gpt) == before


def test_costs_by_hand():
    """d12 at vocabulary 32768: the published 286.3M parameters and the 1.77M of gpt.previous, 36864 bytes of cache per token; and a FLOP count on paper."""
    config = GPTConfig.from_depth(12, 32768)
    assert cost.parameter_counts(config)["total"] / 1e6 == pytest.approx(286.3 + 1.77, abs=0.05)
    assert cost.kv_bytes(config) == 36864
    tiny = SimpleNamespace(vocab_size=10, seq_len=8, layers=1, heads=2, kv_heads=1, width=4, short_layers=(), short_window=0, previous=1)
    # q 16, out 16, k 8, v 8, mlp 128, gate 12, previous 16, head 40 = 244 multiply-adds; attention 2 x 8 entries x 4 wide = 64 more
    assert cost.forward_flops(tiny, visible=8) == 2 * (244 + 64)
    assert cost.train_flops(tiny) == 6 * (244 + 64)
    assert cost.decode_bytes(tiny, batch=3, length=5, itemsize=2) == 2 * (244 + 3 * (4 + 2)) + 3 * 5 * 8


def test_flops_are_what_pytorch_counts():
    """PyTorch's own counter on a forward pass, which sees every product that runs, whatever calls it."""
    from torch.utils.flop_counter import FlopCounterMode
    config = GPTConfig.from_depth(4, 512, 64)
    gpt = GPT(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        gpt(torch.zeros(2, 64, dtype=torch.long))
    assert counter.get_total_flops() == pytest.approx(2 * 64 * cost.forward_flops(config, visible=64), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The machine

@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10", 125e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2e12),
    ("NVIDIA GeForce RTX 3090", 71.2e12), ("NVIDIA GeForce RTX 5090", 209.5e12),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None), ("AMD EPYC", None)])
def test_peaks_by_name(name, peak):
    assert hardware.peak_flops(name) == peak


def machine(**change):
    return hardware.Machine(**(dict(device="cuda", name="test", devices=1, cores=4, ram=2**36, memory=80 * 2**30,
                                    free_memory=79 * 2**30, disk_free=2**40, peak_flops=None, capability=(9, 0)) | change))


def test_this_machine_is_described(base):
    here = hardware.describe("cpu")
    assert here.tier == "cpu" and here.peak_flops is None and 0 < here.free_memory <= here.memory and here.cores >= 1
    assert "no MFU" in str(here)


def test_without_the_module_resource_it_loads_and_windows_tells_its_own_peak(monkeypatch):
    """Windows has no such module: importing it at the top of hardware.py stopped every script there, a chat too."""
    subprocess.run([sys.executable, "-c", "import sys\nsys.modules['resource'] = None\nimport scripts.chat_cli"], cwd=Path(__file__).parent.parent, check=True)
    assert hardware.peak_memory(torch.device("cpu")) > 2**24, "of this process, in bytes"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123)))
    assert hardware.peak_memory(torch.device("cpu")) == 123


def test_tiers_and_formats():
    assert [machine(devices=n).tier for n in (1, 4, 8)] == ["1gpu", "1gpu", "8gpu"]
    assert hardware.pick_dtype(machine())[0] == torch.bfloat16
    assert hardware.pick_dtype(machine(capability=(7, 5)))[0] == torch.float32
    assert hardware.pick_dtype(machine(), "fp16")[0] == torch.float16
    with pytest.raises(UserError, match="fp16"):
        hardware.pick_dtype(machine(device="cpu", capability=None), "fp16")
    with pytest.raises(UserError, match="auto, bf16"):
        hardware.pick_dtype(machine(), "fp4")


@pytest.mark.parametrize("gigabytes", [8, 12, 24, 80, 141])
@pytest.mark.parametrize("depth", [4, 12, 20])
def test_rows_fill_the_memory_and_no_more(gigabytes, depth):
    config = GPTConfig.from_depth(depth, 32768)
    counts = cost.parameter_counts(config)
    free = gigabytes * 2**30
    setting = dict(logit_tokens=4096, checkpointing=True)
    if hardware.memory_needed(config, counts, 1, torch.bfloat16, **setting) > 0.9 * free:
        with pytest.raises(UserError, match="--depth"):
            hardware.device_rows(machine(free_memory=free), config, counts, torch.bfloat16, **setting)
        return
    rows, reason = hardware.device_rows(machine(free_memory=free), config, counts, torch.bfloat16, **setting)
    need = lambda rows: hardware.memory_needed(config, counts, rows, torch.bfloat16, **setting)
    assert need(rows) <= 0.9 * free and (rows == 64 or need(2 * rows) > 0.9 * free)
    assert f"{rows} rows" in reason


def test_more_ranks_checkpointing_and_pieces_need_less():
    config = GPTConfig.from_depth(12, 32768)
    counts = cost.parameter_counts(config)
    need = lambda **setting: hardware.memory_needed(config, counts, 8, torch.bfloat16, **setting)
    assert need(world=8) < need(world=2)
    assert need(checkpointing=True) < need() and need(logit_tokens=1024) < need() < need(beside=10_000)


@pytest.mark.parametrize("depth", [4, 8, 12])
def test_a_card_of_8_gb_trains_what_fits(depth):
    """7.5 GiB free, vocabulary 32,768, co-training in every format that such a card may have: rows of 2,048, the largest model in fp32 with a flag."""
    config = GPTConfig.from_depth(depth, 32768)
    card, counts = machine(free_memory=int(7.5 * 2**30)), cost.parameter_counts(config)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        beside = training_bytes(GistConfig.for_gpt(config), config, 8, hardware.SAVED_BYTES[dtype])
        rows = lambda **more: hardware.device_rows(card, config, counts, dtype, logit_tokens=piece_tokens("cuda", 32768), beside=beside, **more)
        again, sentence = rows(checkpointing=True)
        assert "again" in sentence
        if depth == 12 and dtype == torch.float32:
            with pytest.raises(UserError, match="--checkpoint-activations"):
                rows()
        else:
            assert 1 <= rows()[0] <= again


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("memory, again", [(False, False), (False, True), (True, False)])
def test_the_estimate_is_what_backward_keeps(memory, again, block):
    """Storages that autograd saves in a forward of d4, weights not counted: the estimate is not below them, nor a third above."""
    torch.manual_seed(0)
    config = GPTConfig.from_depth(4, 64, 256)
    gpt, gistnet, lensnet = build(config, memory)
    gpt.checkpoint_activations, kept = again, {}
    objective = PlainObjective(gpt)
    if memory:
        objective = CoTraining(gpt, gistnet, lensnet, CoTrainingOptions())
        objective.block = block
    weights = {p.untyped_storage().data_ptr() for module in (gpt, gistnet, lensnet) if module is not None for p in module.parameters()}
    ids = torch.randint(64, (2, 257))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros(2, 8, dtype=torch.long), torch.tensor([16, 18])) # a round that reads gists and prices nothing

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        objective(batch)
    counted = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)
    beside = training_bytes(gistnet.config, config, block, 82) if memory else 0
    counts = cost.parameter_counts(config)
    one, two = (hardware.memory_needed(config, counts, rows, torch.float32, checkpointing=again, beside=beside, logit_tokens=1) for rows in (1, 2))
    estimate = 2 * (two - one) # without what does not depend on the rows
    estimate -= 2 * 256 * (config.width * 82 if again else 0) # the layer that is whole again is not kept in forward
    assert counted <= estimate <= 1.34 * counted, f"{counted / 512:.0f} bytes a token are kept, {estimate / 512:.0f} estimated"


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte

def test_bits_per_byte_by_hand():
    """A token of 1 byte at ln 2 nats and one of 3 bytes at 3 ln 2 nats: 4 bits for 4 bytes. Masked and special count nothing."""
    nat = math.log(2)
    batch = SimpleNamespace(targets=torch.tensor([[1, 2], [0, -1]]))
    losses = torch.tensor([[nat, 3 * nat], [100.0, float("nan")]])
    assert bits_per_byte(lambda _: losses, [batch], [0, 1, 3]) == pytest.approx(1.0)


def test_bits_per_byte_do_not_depend_on_the_cut():
    """The same nats on the same text, however the rows are cut into batches."""
    targets, losses = torch.randint(-1, 9, (12, 5)), torch.rand(12, 5)
    lengths = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    results = []
    for size in (1, 5, 12):
        parts = [SimpleNamespace(targets=t, losses=l) for t, l in zip(targets.split(size), losses.split(size))]
        results.append(bits_per_byte(lambda batch: batch.losses, iter(parts), lengths))
    assert results == pytest.approx([results[0]] * 3)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="wholly masked"):
        bits_per_byte(lambda batch: torch.zeros(1, 2), [SimpleNamespace(targets=torch.tensor([[-1, 0]]))], [0, 1])
