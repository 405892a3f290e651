"""Reinforcement: the gradient is the policy gradient, it flows through what the model chose and nothing else, and a run leaves a checkpoint."""

import json
import math
import shutil

import pytest
import torch

import scripts.chat_rl as chat_rl
from nanochat import checkpoint, report
from nanochat.common import UserError, checkpoint_dir
from nanochat.engine import Engine, Reply
from nanochat.gpt import IGNORE
from nanochat.optim import MuonAdamW, make_optimizer
from scripts.chat_rl import batches, make_rows, policy_loss, sample
from scripts.load import load_stage
from tasks.common import Task
from tests.fakes import ByteTokenizer, random_gpt
from tests.tiny_run import STEP, make_run

tokenizer = ByteTokenizer()
END = tokenizer.special("<|assistant_end|>")
QUESTION = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}


class First(Task):
    """Worth 1 when the first byte that is said is one of `wanted`."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = set(wanted)

    def evaluate(self, conversation, text):
        return bool(text) and text.encode()[0] in self.wanted


def settings(**changed):
    return dict(max_tokens=6, temperature=1.0, top_k=None) | changed


def groups_of(gpt, seed=0, samples=6, questions=3, batch=64, **changed):
    asked = [{"messages": [{"role": "user", "content": "?" * (1 + 4 * n)}]} for n in range(questions)]
    return list(sample(Engine(tokenizer), gpt, First(range(128)), asked, samples, batch, settings(**changed), seed))


# ---------------------------------------------------------------------------------------------------------------------
# What is learned from

def test_rows_by_hand():
    """The forced tokens 7 8 and the prompt have no target; the end of the turn has one; the second group teaches nothing."""
    answers = [Reply([5, 7, 8, 6], [1, 0, 0, 1], END), Reply([9], [1], None)]
    groups = [([1, 2, 3], answers, torch.tensor([1.0, 0.0])), ([1], answers, torch.tensor([1.0, 1.0]))]
    rows, tokens = make_rows(groups)
    assert rows == [([1, 2, 3, 5, 7, 8, 6], [IGNORE, IGNORE, 5, IGNORE, IGNORE, 6, END], 0.5), ([1, 2, 3], [IGNORE, IGNORE, 9], -0.5)]
    assert tokens == 2 * (3 + 1)


@pytest.mark.parametrize("seed", range(10))
def test_targets_are_the_chosen_tokens_in_their_order_and_advantages_cancel(seed):
    groups = groups_of(random_gpt(seed=seed), seed)
    rows, tokens = make_rows(groups)
    assert tokens == sum(sum(reply.mask) + (reply.stop is not None) for _, replies, _ in groups for reply in replies)
    expected = []
    for prompt, replies, rewards in groups:
        for reply, reward in zip(replies, rewards):
            end = [] if reply.stop is None else [reply.stop]
            if reward != rewards.mean():
                expected.append((prompt + reply.ids + end, [token for token, mine in zip(reply.ids, reply.mask) if mine] + end))
    for (ids, targets, _), (full, chosen) in zip(rows, expected, strict=True):
        assert ids == full[:-1] and [target for target in targets if target != IGNORE] == chosen
        assert all(target in (IGNORE, after) for target, after in zip(targets, full[1:], strict=True)), "a target is the next token"
    assert abs(sum(advantage for _, _, advantage in rows)) < 1e-5


@pytest.mark.parametrize("batch, rows", [(1, [1] * 18), (4, [4, 2] * 3), (6, [6] * 3), (13, [12, 6]), (64, [18])])
def test_no_forward_has_more_answers_than_asked_and_they_are_the_same(monkeypatch, batch, rows):
    """A question was always answered at once: 64, 16, 8 and 4 all drew 16 rows, and halving the flag freed no memory."""
    gpt, drawn = random_gpt(seed=2), []
    whole = groups_of(gpt, batch=18)
    choose = Engine.generate_batch
    monkeypatch.setattr(Engine, "generate_batch", lambda self, gpt, prompts, samples, **more: drawn.append(len(prompts) * samples) or choose(self, gpt, prompts, samples, **more))
    cut = groups_of(gpt, batch=batch)
    assert drawn == rows
    assert [(prompt, replies, rewards.tolist()) for prompt, replies, rewards in cut] == [(prompt, replies, rewards.tolist()) for prompt, replies, rewards in whole]
    assert len({tuple(reply.ids) for _, replies, _ in cut for reply in replies}) > 12, "each has a draw of its own"


def test_the_loss_of_batches_is_the_sum_over_answers_one_at_a_time():
    gpt = random_gpt()
    groups = groups_of(gpt)
    rows, tokens = make_rows(groups)
    assert len({len(ids) for ids, _, _ in rows}) > 2, "answers of different lengths share a batch"
    for size in (1, 4, 100):
        total = sum(policy_loss(gpt, *batch, tokens).item() for batch in batches(rows, size, "cpu"))
        slow = 0.0
        for prompt, replies, rewards in groups:
            for reply, reward in zip(replies, rewards):
                said, mask = reply.ids + [reply.stop] * (reply.stop is not None), reply.mask + [1] * (reply.stop is not None)
                for n, (token, mine) in enumerate(zip(said, mask)):
                    logp = torch.log_softmax(gpt(torch.tensor([prompt + said[:n]]))[0, -1], dim=-1)[token].item()
                    slow -= mine * (reward - rewards.mean()).item() * logp / tokens
        assert total == pytest.approx(slow, abs=1e-4)


def test_gradients_flow_through_sampled_tokens_only():
    gpt, logits = random_gpt(), []
    rows, tokens = make_rows(groups_of(gpt))
    [batch] = batches(rows, 100, "cpu")
    head = gpt.head

    def watched(hidden):
        logits.append(head(hidden))
        logits[0].retain_grad()
        return logits[0]
    gpt.head = watched
    policy_loss(gpt, *batch, tokens).backward()
    grad, sampled = logits[0].grad.view(*batch[1].shape, -1), batch[1] != IGNORE
    assert torch.isfinite(grad).all()
    assert (grad[~sampled] == 0).all() and (grad[sampled].abs().sum(dim=-1) > 0).all()


def test_the_gradient_points_where_the_exact_policy_gradient_points():
    """
    With answers of one token the expected reward has an exact gradient: sum over tokens of p x reward x grad log p. Drawing answers estimates it,
    shrunk by (n - 1) / n because an answer is part of its own baseline. An end of the turn is drawn too, and left out would bias it.
    """
    gpt, task, n = random_gpt(seed=3), First(range(0, 128, 2)), 4000
    prompt = tokenizer.render_prompt(QUESTION)
    p = torch.softmax(gpt(torch.tensor([prompt]))[0, -1], dim=-1)
    worth = torch.tensor([float(i in task.wanted) for i in range(tokenizer.vocab_size)])
    exact = torch.autograd.grad((p * worth).sum(), gpt.lm_head.weight)[0]
    groups = list(sample(Engine(tokenizer), gpt, task, [QUESTION], n, n, settings(max_tokens=1), 0))
    assert any(reply.stop is not None for reply in groups[0][1]), "some answers end at once"
    rows, tokens = make_rows(groups)
    assert tokens == n
    estimate = -torch.autograd.grad(sum(policy_loss(gpt, *batch, tokens) for batch in batches(rows, 1000, "cpu")), gpt.lm_head.weight)[0]
    assert torch.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.97
    assert (estimate.norm() / exact.norm()).item() == pytest.approx(1, abs=0.1)


def test_rewards_rise():
    """A few steps on a task that chance solves half the time: the model learns to solve it nearly always."""
    gpt, engine, task = random_gpt(seed=1), Engine(tokenizer), First(range(0, 128, 2))
    optimizer = make_optimizer(gpt, {}, lr_scale=0.1, weight_decay=0.0)
    means = []
    for step in range(12):
        groups = list(sample(engine, gpt, task, [QUESTION], 64, 64, settings(max_tokens=2), step))
        rows, tokens = make_rows(groups)
        means.append(groups[0][2].mean().item())
        for batch in batches(rows, 64, "cpu"):
            policy_loss(gpt, *batch, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0.1 < means[0] < 0.75 and sum(means[-3:]) / 3 > 0.9, means


# ---------------------------------------------------------------------------------------------------------------------
# The whole script

TINY = ["--task", "arithmetic", "--digits", "1", "--num-steps", "3", "--examples", "2", "--samples", "4", "--max-tokens", "8", "--eval-examples", "4",
        "--eval-samples", "2", "--dtype", "fp32"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["chat_rl", *arguments])
    chat_rl.main()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_on_sums(base, monkeypatch, capsys, dtype):
    """Rewards are made frequent (any digit counts), so that three steps have something to learn."""
    before = dict(gpt=make_run("sft")[0].state_dict())
    monkeypatch.setattr(chat_rl.Arithmetic, "evaluate", lambda self, conversation, text: any(c.isalpha() for c in text[:3]))
    run(monkeypatch, *TINY, "--dtype", dtype)
    out = capsys.readouterr().out
    assert "summary stage=rl tag=t pass@1=" in out
    loaded = load_stage("rl", "t")
    assert loaded.meta["step"] == 3 and loaded.meta["start"] == f"sft/t step {STEP}" and loaded.gistnet is not None
    saved = checkpoint.load(checkpoint_dir("rl", "t"))
    assert any(not torch.equal(saved.tensors["gpt"][name], tensor) for name, tensor in before["gpt"].items()), "nothing was learned"
    lines = [json.loads(line) for line in (checkpoint_dir("rl", "t") / "log.jsonl").read_text().split("\n") if line]
    steps = [line for line in lines if "reward" in line]
    assert len(steps) == 3 and all(math.isfinite(line[key]) for line in steps for key in ("reward", "loss", "grad_norm")) and any(line["mixed"] > 0 for line in steps)
    assert [line["lr"] for line in steps] == pytest.approx([1, 2 / 3, 1 / 3])
    assert report.last_run("rl")["steps"] == 3 and "rl training, with memory (t)" in report.assemble()


@pytest.mark.parametrize("keep, steps", [("1", [3]), ("2", [2, 3]), ("-1", [1, 2, 3])])
def test_as_many_checkpoints_stay_as_asked(base, monkeypatch, keep, steps):
    make_run("sft")
    run(monkeypatch, *TINY, "--save-every", "1", "--keep", keep)
    assert checkpoint.steps(checkpoint_dir("rl", "t")) == steps


def test_a_new_run_sets_the_old_one_aside(base, monkeypatch, capsys):
    """Three steps over a run of ten: the old step 10 stayed, and was what talked."""
    make_run("sft", "rl")
    folder = checkpoint_dir("rl", "t")
    (folder / f"step_{STEP:06d}").rename(folder / "step_000010")
    run(monkeypatch, *TINY)
    assert "set aside" in capsys.readouterr().out and checkpoint.steps(folder) == [3]
    [aside] = folder.parent.glob("t.before-*")
    assert checkpoint.steps(aside) == [10]


def test_memory_networks_go_along_unchanged(base, monkeypatch):
    _, gistnet, lensnet = make_run("sft")
    run(monkeypatch, *TINY)
    saved = checkpoint.load(checkpoint_dir("rl", "t")).tensors
    for name, module in (("gistnet", gistnet), ("lensnet", lensnet)):
        assert all(torch.equal(saved[name][key], tensor) for key, tensor in module.state_dict().items())


def test_a_killed_run_goes_on_bit_for_bit_and_with_the_same_flags(base, monkeypatch):
    """It kept no optimizer and had no --resume: hours of sampling were lost with the process."""
    make_run("sft")
    monkeypatch.setattr(chat_rl.Arithmetic, "evaluate", lambda self, conversation, text: any(c.isalpha() for c in text[:3]))
    flags = [*TINY, "--num-steps", "4", "--save-every", "2"]
    run(monkeypatch, *flags)
    whole, folder = checkpoint.load(checkpoint_dir("rl", "t")), checkpoint_dir("rl", "killed")
    shutil.copytree(checkpoint_dir("rl", "t") / "step_000002", folder / "step_000002") # what a kill after step 3 leaves
    for changed in (["--lr", "0.5"], ["--num-steps", "5"], ["--seed", "1"]):
        with pytest.raises(UserError, match=f"{changed[0].removeprefix('--num').strip('-')}: the checkpoint has .*, this run has {changed[1]}"):
            run(monkeypatch, *flags, "--tag", "killed", "--resume", *changed)
    run(monkeypatch, *flags, "--tag", "killed", "--resume")
    again = checkpoint.load(folder)
    assert again.step == 4 and all(torch.equal(again.tensors["gpt"][name], tensor) for name, tensor in whole.tensors["gpt"].items())
    told = [json.loads((checkpoint_dir("rl", tag) / "log.jsonl").read_text().splitlines()[-1])["summary"] for tag in ("t", "killed")]
    assert told[0]["tokens"] == told[1]["tokens"] and told[0]["pass@1"] == told[1]["pass@1"]
    run(monkeypatch, *flags, "--tag", "killed", "--resume") # it had ended: its numbers are told again
    assert checkpoint.steps(folder) == [2, 4]


@pytest.mark.parametrize("arguments, told", [(["--samples", "1"], "beside its siblings"), (["--task", "chess"], "expected gsm8k or arithmetic"), (["--examples", "0"], "at least 1")])
def test_a_wrong_flag_is_one_clear_line(base, monkeypatch, arguments, told):
    make_run("sft")
    with pytest.raises(UserError, match=told):
        run(monkeypatch, *TINY, *arguments)


def overflows(monkeypatch, at):
    """Call number `at` of the loss is a number and its gradient is none. Every answer with a letter pays, so that each step has one."""
    real, calls = chat_rl.policy_loss, []

    def policy_loss(*args):
        loss = real(*args)
        calls.append(1)
        if len(calls) == at:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss
    monkeypatch.setattr(chat_rl, "policy_loss", policy_loss)
    monkeypatch.setattr(chat_rl.Arithmetic, "evaluate", lambda self, conversation, text: any(c.isalpha() for c in text[:3]))


def test_a_step_whose_gradient_is_no_number_is_skipped_and_counted(base, monkeypatch):
    make_run("sft")
    overflows(monkeypatch, at=2)
    run(monkeypatch, *TINY, "--save-every", "2")
    lines = [json.loads(line) for line in (checkpoint_dir("rl", "t") / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    assert [line["skipped"] for line in steps] == [0, 1, 1] and steps[1]["grad_norm"] in ("inf", "nan") and lines[-1]["summary"]["skipped_steps"] == 1
    shutil.rmtree(checkpoint_dir("rl", "t") / "step_000003")
    run(monkeypatch, *TINY, "--resume")
    assert json.loads((checkpoint_dir("rl", "t") / "log.jsonl").read_text().splitlines()[-1])["summary"]["skipped_steps"] == 1, "a run that goes on counts them too"


def test_weights_that_are_no_numbers_are_not_saved(base, monkeypatch):
    """On a GPU steps are not checked one by one: a gradient of NaN under a loss that is a number was stepped, and saved as the last checkpoint."""
    make_run("sft")
    overflows(monkeypatch, at=3)
    step = MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self, norm, check: step(self, norm=norm))
    with pytest.raises(UserError, match="the gradient's norm is (inf|nan) at step 3; the checkpoint of step 2 is kept. Lower --lr"):
        run(monkeypatch, *TINY, "--save-every", "1")
    assert checkpoint.steps(checkpoint_dir("rl", "t")) == [1, 2]


@pytest.mark.parametrize("place, call, told", [
    ("sample", 1, "in the test after step 0; no checkpoint was written yet: --save-every"), ("sample", 2, "while answers were drawn in step 1; no checkpoint was written yet"),
    ("sample", 4, "while answers were drawn in step 3; the checkpoint of step 2 is kept"), ("sample", 5, "in the test after step 3; the checkpoint of step 3 is kept"),
    ("make_optimizer", 1, "while the device took the optimizer and the networks to draw answers with, before any step"), ("policy_loss", 1, "while answers were learned from in step 1; no checkpoint was written yet")])
def test_out_of_memory_names_the_flags_and_keeps_what_was_saved(base, monkeypatch, place, call, told):
    """It ended the run in a traceback, which says neither what to lower nor what is left."""
    make_run("sft")
    monkeypatch.setattr(chat_rl.Arithmetic, "evaluate", lambda self, conversation, text: any(c.isalpha() for c in text[:3]))
    real, calls = getattr(chat_rl, place), []

    def full(*args, **settings):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*args, **settings)
    monkeypatch.setattr(chat_rl, place, full)
    helps = "train a smaller model" if place == "make_optimizer" else "Lower --device-batch or --max-tokens "
    with pytest.raises(UserError, match=f"memory ran out {told}.*{helps}"):
        run(monkeypatch, *TINY, "--save-every", "2")


def test_an_answer_that_does_not_fit_behind_its_question_is_told_before_the_first_step(base, monkeypatch):
    """GSM8K has long questions: some hundred steps on, one of them ended the run in a traceback."""
    make_run("sft", seq_len=64)
    run(monkeypatch, *TINY)
    with pytest.raises(UserError, match=r"--max-tokens 60: the longest question of arithmetic has \d+ tokens and the model reads rows of 64, expected at most \d+"):
        run(monkeypatch, *TINY, "--max-tokens", "60")
