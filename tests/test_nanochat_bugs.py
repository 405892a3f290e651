"""
The bugs of nanochat's trunk (July 2026) that are known to us, each with a test that fails if we have it too.

B1   FLOPs and MFU counted by the class of a layer: an fp8 model lost 11 of 12  test_costs_come_from_the_shape_whatever_class_the_layers_are_of (here)
                                                                               test_common.py::test_costs_do_not_depend_on_the_class_of_a_layer
B2   a chunk read behind a cache forgot the token before it                    test_engine.py::test_pieces_equal_the_whole
                                                                               test_gpt.py::test_reading_in_chunks_is_reading_at_once
                                                                               test_conversation.py::test_a_second_turn_over_a_real_cache_equals_one_long_prompt
B3   fine-tuning cut every conversation at 2,048 tokens                        test_a_conversation_is_as_long_as_its_row (here)
                                                                               test_packing.py::test_the_rule_for_a_conversation_longer_than_its_row_by_hand
B4   a prompt of one token failed                                              test_engine.py::test_bos_alone_is_a_prompt
B5   a forward after the last token, rows decoded past their end,              test_engine.py::test_no_forward_is_wasted
     the device waited for in every step                                       test_engine.py::test_a_batch_runs_no_forward_for_rows_that_are_done
                                                                               test_a_decoding_step_waits_for_nothing (here)
B6   without a limit generation overran the cache                              test_engine.py::test_overflow_keeps_the_first_and_the_latest
                                                                               test_engine.py::test_generation_without_a_limit_outlives_the_context
                                                                               test_engine.py::test_a_batch_that_cannot_be_is_refused
B7   a script read a line of the log that was no longer printed                test_no_shell_script_reads_what_we_print (here)
                                                                               test_common.py::test_the_log_says_the_same_to_the_file_and_the_terminal
                                                                               test_training.py::test_two_processes_and_a_resumed_one_give_the_losses_of_one
B8   the first token of a document heard of the one before it                  test_gpt.py::test_an_embedding_knows_the_tokens_before_it_of_its_own_document
B9   a run resumed only on as many processes, and lost the loader's buffer     test_distributed.py::test_any_number_of_processes_makes_the_same_run_and_resumes_any_other
                                                                               test_loader_ranks.py::test_killed_and_resumed_with_other_ranks_the_rows_go_on
                                                                               test_training.py::test_four_processes_and_a_run_that_goes_on_with_another_number_give_the_losses_of_one
B10  a kill while saving left a "last" checkpoint that was none                test_checkpoint.py::test_a_kill_at_any_instant_leaves_the_last_complete_checkpoint
                                                                               test_checkpoint.py::test_a_stop_after_every_single_operation
B11  docs said other numbers than the code                                     test_what_the_docs_say_is_what_the_code_does (here)
                                                                               test_plan.py::test_the_readme_tells_what_a_tier_costs
"""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megacontext import ingest, matches, runtime, telemetry, working_context
from megacontext.span import BLOCK
from nanochat import attention, cost, cross_entropy, dataloader, gpt, schedule, tiers
from nanochat.dataloader import Loader, lanes_for
from nanochat.engine import LeftPadded, PlainStream, Sampler
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Progress
from scripts import chat_sft
from tests.fakes import random_gpt
from tests.tiny_run import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def test_every_bug_has_a_test_that_is_there():
    rows = [(line[:4].strip(), name) for line in __doc__.splitlines() for name in re.findall(r"(\S*\btest_\w+)(?: \(here\)|$)", line)]
    named = ["B1"]
    for bug, name in rows:
        named.append(bug or named[-1])
        file, _, function = name.rpartition("::")
        source = ast.parse((ROOT / "tests" / (file or "test_nanochat_bugs.py")).read_text())
        assert function in [node.name for node in source.body if isinstance(node, ast.FunctionDef)], f"{bug}: there is no test {name}"
    assert sorted(set(named), key=lambda bug: int(bug[1:])) == [f"B{n}" for n in range(1, 12)]
    assert len(rows) > 20


# ---------------------------------------------------------------------------------------------------------------------
# B1

class OtherLinear(torch.nn.Linear):
    """As an fp8 layer is: a linear, by inheritance too, but not the class that a model was built of."""


def test_costs_come_from_the_shape_whatever_class_the_layers_are_of():
    """
    nanochat summed the parameters of its own Linear class. --fp8 swaps each for a subclass of PyTorch's, and then only the few that fp8 cannot
    take were counted: d24 at 0.4 GFLOPs a token instead of 4.8, MFU 12 times too low, --target-flops 12 times too long a run. If it came
    back here, the swapped model would count less, or the log of a swapped run show another mfu at the same speed.
    """
    config = GPTConfig.from_depth(4, 512, 64)
    model = GPT(config)
    plain = cost.count_by_role(model), cost.train_flops(model.config)
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, OtherLinear(child.in_features, child.out_features, bias=False))
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert (cost.count_by_role(model), cost.train_flops(model.config)) == plain
    assert plain[1] == 6 * products + 3 * 4 * config.layers * config.width * config.seq_len

    clock = iter(range(100)).__next__
    progress = Progress(4, tokens_per_step=1000, flops_per_token=cost.train_flops(model.config), peak_flops=1e12, clock=clock)
    for step in range(4):
        metrics, _ = progress.tick(step, 1.0)
    assert metrics["mfu"] == pytest.approx(1000 * plain[1] / 1e12)


# ---------------------------------------------------------------------------------------------------------------------
# B3

def test_a_conversation_is_as_long_as_its_row():
    """
    nanochat's render_conversation had max_tokens=2048, and fine-tuning never passed another number: with longer rows a conversation still ended
    at 2,048, without a word. Here rendering knows no length, and a row of 8,192 learns from a conversation's last token.
    """
    tokenizer = tiny_tokenizer()
    messages = [dict(role=role, content=f"{n} " * 300) for n, role in enumerate(["user", "assistant"] * 3)]
    ids, mask = tokenizer.render({"messages": messages})
    assert 3000 < len(ids) < 8192 and ids[-1] == tokenizer.special("<|assistant_end|>") and mask[-1] == 1
    with Loader([(ids, mask)], None, 1, 8192, lanes=1, one_pass=True) as loader:
        [batch] = list(loader)
    assert (batch.targets >= 0).sum() == sum(mask) and batch.targets[0, len(ids) - 2] == ids[-1]
    assert loader.stats["cut"] == loader.stats["skipped"] == 0
    assert "--max-seq-len" in chat_sft.parser._option_string_actions, "how long a row of fine-tuning is, is the user's choice"


# ---------------------------------------------------------------------------------------------------------------------
# B5

class Calls(TorchFunctionMode):
    """What a tensor on the CPU answers without any operation, or is made of in one: to Python, to NumPy, to a GPU."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tolist", "cpu", "numpy") or name in ("tensor", "as_tensor") and "device" in (kwargs or {}):
            self.asked.append(name)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """
    What on a GPU stops Python until the device has answered: a tensor turned into numbers, a shape that depends on values, Python's numbers copied
    there. A tensor put through .to(device) is not seen.
    """
    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.asked = []
        self.calls = Calls(self.asked)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        by_mask = name in ("index", "index_put_") and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.ASKING or by_mask:
            self.asked.append(name)
        return function(*args, **(kwargs or {}))


def decoding_steps(bos, device="cpu"):
    """[a step of one kind of decoding]"""
    model = random_gpt(bos=bos).to(device)
    stream, replayed = PlainStream(model), PlainStream(model, static=True)
    replayed.feed([1, 2])
    padded, other = LeftPadded(model, [[1, 2, 3], [4]], 20), LeftPadded(model, [[1, 2, 3], [4]], 20, static=True)
    other.read()
    return [lambda: stream.feed([1, 2, 3]), lambda: stream.feed([4]), lambda: stream.feed([5, 6]), padded.read, lambda: padded.step([5, 6]),
            lambda: replayed.feed([7]), lambda: other.step([5, 6])]


@torch.no_grad()
@pytest.mark.parametrize("bos", [-1, 256])
def test_a_decoding_step_waits_for_nothing(bos):
    """
    nanochat's cache kept its length on the device and asked for it with .item() in every step, in the fallback without FlashAttention in every
    layer of every step: the launch of each kernel waited for the one before it. Here only the token itself comes back to Python.
    """
    for step in decoding_steps(bos):
        with Waits() as waits:
            step()
        assert waits.asked == []
    for sampler in (Sampler(0.0), Sampler(0.8), Sampler(0.8, 5, 0.9)):
        with Waits() as waits:
            sampler.choose(torch.randn(2, 256), [0.3, 0.6])
        assert waits.asked == ["tolist"], "the tokens, once"
    with Waits() as waits: # and the watcher does watch
        torch.ones(3)[torch.tensor([True, False, True])].sum().item()
        torch.tensor([1], device="cpu").cpu().numpy().tolist()
    assert waits.asked == ["index", "_local_scalar_dense", "tensor", "cpu", "numpy"]


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_cuda_itself_says_that_a_decoding_step_waits_for_nothing():
    """Ids were copied there from memory that the system may move, which waits for all that the device still does."""
    steps = decoding_steps(256, "cuda")
    for step in steps: # once to record and to tune
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps[:3] + steps[4:]:
            step()
        with pytest.raises(RuntimeError, match="synchroniz"): # and it does watch
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# B7

def test_no_shell_script_reads_what_we_print():
    """
    nanochat's miniseries.sh cut its results out of the log with grep; the line was reworded, and the table filled with nothing, under exit code 0.
    Here a shell script looks at tools of the system only (what is printed for people may be reworded), and whoever wants numbers reads the JSON.
    """
    ours = r"python|\.jsonl?\b|\.log\b|summary"
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("runs/*.sh")]:
        for line in path.read_text().splitlines():
            if re.search(r"\b(?:grep|awk|sed|cut|tail|head)\b", line.split("#")[0]):
                assert not re.search(ours, line.split("#")[0]), f"{path.name}: {line.strip()}"
    assert re.search(ours, 'val_bpb=$(grep "Validation bpb" train.log | tail -1)')


# ---------------------------------------------------------------------------------------------------------------------
# B11

def default(function, name):
    return function.__kwdefaults__[name]


SAID = [ # (file, words with {} where the number stands, the number)
    ("nanochat/gpt.py", "QK-norm with a gain of {},", gpt.QK_GAIN), ("nanochat/gpt.py", "logit soft-cap {},", int(cross_entropy.SOFTCAP)),
    ("nanochat/attention.py", "base {} as in nanochat", f"{attention.ROPE_BASE:.0e}".replace("+0", "")),
    ("nanochat/schedule.py", "Horizon: D = {} N", schedule.TOKENS_PER_PARAM), ("nanochat/schedule.py", "from 2^{} at", schedule.REF_BATCH.bit_length() - 1),
    ("scripts/base_train.py", "(-1 = {} per scaling parameter)", schedule.TOKENS_PER_PARAM), ("scripts/stage.py", "tokens a row; a multiple of {}", BLOCK),
    ("nanochat/dataloader.py", "1, 2, 4 and {} ranks make the same run", dataloader.LANES),
    ("runs/multinode.md", "torchrun --nnodes=2 --nproc_per_node={} ", tiers.NODE.processes), ("runs/multinode.md", "1, 2, 4 or 8 processes deal them to {} streams", lanes_for(8)),
    ("runs/multinode.md", "16 to {},", lanes_for(16)), ("runs/multinode.md", "3 to {}:", lanes_for(3)),
    ("README.md", "one vector for {} tokens", BLOCK), ("megacontext/README.md", "one vector for {} tokens or", BLOCK), ("megacontext/README.md", "Atomic swaps: all {} children", BLOCK),
    ("docs/RUNTIME.md", "Every {} tokens there is one tick", runtime.REFOCUS_EVERY), ("docs/RUNTIME.md", "newest {} tokens x one bit set", matches.NEWEST),
    ("docs/RUNTIME.md", "at most {} edits:", default(runtime.Session.__init__, "n_diff")), ("docs/RUNTIME.md", "that pays for it by {} nats over the rest of a block", runtime.MARGIN),
    ("docs/RUNTIME.md", "`cooldown` is {} here", runtime.COOLDOWN), ("docs/RUNTIME.md", "newest min({}, W/4) tokens", working_context.TAIL),
    ("docs/RUNTIME.md", "commits every {} tokens read", f"{runtime.COMMIT:,}"), ("docs/RUNTIME.md", "and every {} ingested", f"{ingest.NODES_AT_ONCE * BLOCK:,}"),
    ("docs/RUNTIME.md", "the {} most opened nodes", f"{telemetry.NODES:,}"),
    ("docs/RUNTIME.md", "at most {} W and", default(runtime.Session.__init__, "kept")), ("docs/RUNTIME.md", "W and {} W entries", default(runtime.Session.__init__, "kept_in_ram"))]


@pytest.mark.parametrize("file, words, number", SAID)
def test_what_the_docs_say_is_what_the_code_does(file, words, number):
    """
    nanochat's comments gave the short window as 768 and its help as half of the row while the code took 512, and another spread of the
    embeddings at the start than the code's. A number that is named where it lives cannot drift; these are said a second time, for a reader.
    """
    said = re.findall(re.escape(words).replace(r"\{\}", r"([\w.,+-]*\w)"), (ROOT / file).read_text())
    assert said == [str(number)], f"{file}: {words.format(number)}"
