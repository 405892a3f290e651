"""
Reinforcement learning on questions with a checkable answer: sample some answers to each, and make those that did better than their
siblings more likely.

python -m scripts.chat_rl                                               # GSM8K, one GPU
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl
python -m scripts.chat_rl --task arithmetic --digits 1 --num-steps 20 --examples 4 --samples 8 --max-tokens 32     # offline, on a laptop

nanochat's recipe: REINFORCE, on policy, so without ratios or clipping; no KL to the model it came from; the advantage of an answer is its reward
less the mean of its question's answers (GRPO without the division by sigma); every sampled token of the step weighs the same (DAPO).

    loss = -sum over sampled tokens of advantage x log p(token) / number of sampled tokens

Sampled are the tokens that the model chose, the one that ends its turn included: not the prompt, not what the calculator answered.
Answers are drawn from the top_k likeliest tokens, and log p is that of the whole vocabulary, as in nanochat. The gists are not read here, and
GistNet and LensNet go into the new checkpoint as they were. Killed? The same command with --resume goes on from the last checkpoint.
"""
import argparse
import copy
import math
import time

import torch
import torch.distributed as td
from tqdm import tqdm

from nanochat import checkpoint, hardware, schedule
from nanochat.common import UserError, checkpoint_dir, cleanup, print0, run_main, setup
from nanochat.engine import Engine
from nanochat.gpt import IGNORE
from nanochat.optim import make_optimizer
from nanochat.run import Log
from nanochat.train import kept
from scripts.load import describe, load_stage
from scripts.stage import SMALLER, begin_folder, check_numbers, given
from tasks.arithmetic import Arithmetic
from tasks.gsm8k import GSM8K

parser = argparse.ArgumentParser(description="Reinforcement learning on checkable answers", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="stage of the checkpoint to start from")
parser.add_argument("--sft-tag", default="", help="its tag (empty = the newest)")
parser.add_argument("--tag", default="", help="tag of the result (empty = the same)")
parser.add_argument("--task", default="gsm8k", help="gsm8k, or arithmetic (generated, offline)")
parser.add_argument("--digits", type=int, default=2, help="of the numbers of arithmetic")
parser.add_argument("--num-steps", type=int, default=-1, help="optimizer steps (-1 = each training question once)")
parser.add_argument("--examples", type=int, default=16, help="questions a step, over all processes")
parser.add_argument("--samples", type=int, default=16, help="answers to each")
parser.add_argument("--max-tokens", type=int, default=256, help="longest answer")
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--top-k", type=int, default=50, help="draw from the K likeliest tokens (-1 = all)")
parser.add_argument("--lr", type=float, default=0.05, help="times the base run's learning rates; falls linearly to 0")
parser.add_argument("--device-batch", type=int, default=64, help="most answers in a forward on one device, drawn or learned from; halve it when memory runs out, the answers stay the same")
parser.add_argument("--eval-every", type=int, default=60, help="test every N steps (-1 = at the start and the end only)")
parser.add_argument("--eval-examples", type=int, default=400, help="questions of the test split")
parser.add_argument("--eval-samples", type=int, default=8, help="answers to each: pass@1 is their mean, pass@K whether one of K is right")
parser.add_argument("--save-every", type=int, default=-1, help="checkpoint every N steps (-1 = at the end only)")
parser.add_argument("--keep", type=int, default=2, help="checkpoints of this run that stay, the newest N (-1 = all)")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this tag, if there is one; without it, what an earlier run left under this tag is set aside under another name")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
parser.add_argument("--dtype", default="auto", help="auto, bf16 or fp32")
parser.add_argument("--run", default="", help="name of a wandb run (empty = no wandb)")


# ---------------------------------------------------------------------------------------------------------------------
# Answers and their worth

def sample(engine, gpt, task, conversations, samples, batch, settings, seed):
    """
    Answers to each question, one question after the other: yields (prompt, [Reply], rewards (samples,)).
    batch      most answers in a forward: whole questions together, or a part of one; the answers are the same
    settings   max_tokens, temperature, top_k
    """
    tokenizer, together = engine.tokenizer, max(1, batch // samples)
    for first in range(0, len(conversations), together):
        asked = conversations[first:first + together]
        prompts = [tokenizer.render_prompt(conversation) for conversation in asked]
        groups = [[] for _ in asked]
        for begun in range(0, samples, batch):
            for replies, more in zip(groups, engine.generate_batch(gpt, prompts, min(batch, samples - begun), seed=seed, first=(first, begun), **settings)):
                replies += more
        for conversation, prompt, replies in zip(asked, prompts, groups):
            rewards = [task.reward(conversation, tokenizer.decode(reply.ids)) for reply in replies]
            yield prompt, replies, torch.tensor(rewards)


def make_rows(groups):
    """
    Groups of answers -> [(ids, targets, advantage)] of the answers that teach something, and the number of all sampled tokens.
    targets[i] is what follows ids[i] where the model chose it, else -1. Where all answers of a question did equally well, the advantage is
    0 and so is the gradient: their rows are left out, their tokens count.
    """
    rows, tokens = [], 0
    for prompt, replies, rewards in groups:
        for reply, advantage in zip(replies, (rewards - rewards.mean()).tolist()):
            ended = reply.stop is not None
            said = reply.ids + [reply.stop] * ended # to stop was a choice too
            chosen = reply.mask + [1] * ended
            tokens += sum(chosen)
            if advantage != 0 and any(chosen):
                ids = prompt + said
                rows.append((ids[:-1], [IGNORE] * (len(prompt) - 1) + [token if mine else IGNORE for token, mine in zip(said, chosen)], advantage))
    return rows, tokens


def batches(rows, batch, device):
    """Rows of like lengths together, as tensors ids (B, N), targets (B, N), advantages (B, 1)."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    for first in range(0, len(rows), batch):
        part = rows[first:first + batch]
        N = len(part[-1][0])
        fill = lambda values, pad: values + [pad] * (N - len(values)) # on the right: nothing that counts looks there
        yield (torch.tensor([fill(ids, 0) for ids, _, _ in part], device=device), torch.tensor([fill(targets, IGNORE) for _, targets, _ in part], device=device),
               torch.tensor([[advantage] for _, _, advantage in part], device=device))


def policy_loss(gpt, ids, targets, advantages, tokens):
    """-sum of advantage x log p over the sampled tokens of some rows, over `tokens`, those of the whole step."""
    return (gpt(ids, targets, "none") * advantages).sum() / tokens # nats are -log p, and 0 where nothing was sampled


def learn(gpt, optimizer, rows, tokens, batch, dtype, dist):
    """A step towards what paid, from the rows of this rank and `tokens`, the sampled ones of all ranks -> (loss, norm of the gradient)."""
    device, loss = gpt.device, 0.0
    for ids, targets, advantages in batches(rows, batch, device):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            part = policy_loss(gpt, ids, targets, advantages, tokens / dist.world) # the optimizer takes the mean over ranks
        part.backward()
        loss += part.item() / dist.world
    norm = optimizer.step(norm=True, check=device.type == "cpu")
    optimizer.zero_grad()
    return added([loss], dist)[0], norm


def added(numbers, dist):
    """Sums over all ranks."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.world > 1:
        td.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Main

def make_task(args, split):
    if args.task == "gsm8k":
        return GSM8K(split)
    if args.task == "arithmetic":
        return Arithmetic(digits=args.digits, terms=2, size=10_000, seed=args.seed, split=split)
    raise UserError(f"--task {args.task}: expected gsm8k or arithmetic")


def check_room(questions, tokenizer, seq_len, args):
    """Refuse an answer that would not fit into the row behind the longest of the questions; in the middle of a run it would be too late."""
    longest = max(len(tokenizer.render_prompt(question)) for question in questions)
    if longest + args.max_tokens > seq_len:
        raise UserError(f"--max-tokens {args.max_tokens}: the longest question of {args.task} has {longest} tokens and the model reads rows of {seq_len}, expected at most "
                        f"{seq_len - longest}. Lower it, or fine-tune on longer rows (chat_sft --max-seq-len)")


@torch.no_grad()
def evaluate(engine, gpt, task, args, settings, dist):
    """pass@1 and pass@K on the test split, the ranks together."""
    most = min(args.eval_examples, len(task))
    mine, hits, solved, n = range(dist.rank, most, dist.world), 0.0, 0.0, 0
    answered = sample(engine, gpt, task, [task[i] for i in mine], args.eval_samples, args.device_batch, settings, f"test/{args.seed}/{dist.rank}")
    for _, _, rewards in tqdm(answered, total=len(mine), desc="test", unit="question", disable=None if dist.main else True, leave=False):
        hits, solved, n = hits + rewards.mean().item(), solved + (rewards.max() > 0).item(), n + 1
    hits, solved, n = added([hits, solved, n], dist)
    return {"pass@1": hits / n, f"pass@{args.eval_samples}": solved / n}


LESS = "Lower --device-batch or --max-tokens" # when memory runs out
SAME = ("task", "digits", "examples", "samples", "max_tokens", "temperature", "top_k", "lr", "seed") # flags that whoever resumes a run gives again


def resume(folder, loaded, optimizer, meta):
    """
    Bring networks and optimizer to the last checkpoint of a folder. Returns (its step, tokens sampled until there). What a step draws follows from
    its number, so there is nothing else to restore: with another --device-batch the same, with another number of processes other answers.
    """
    saved = checkpoint.load(folder)
    told = lambda meta: meta | {flag: meta["args"].get(flag) for flag in SAME}
    have, want = told(saved.meta), told(meta)
    checkpoint.check_match(have, **{name: want[name] for name in ("networks", "start", "steps", *SAME)})
    for name, module in loaded.modules.items():
        module.load_state_dict(saved.tensors[name])
    optimizer.load_state_dict(saved.optimizer)
    optimizer.skipped = saved.meta.get("skipped", 0)
    print0(f"resume      from step {saved.step} of {folder}")
    return saved.step, saved.meta["sampled"]


def main():
    args = parser.parse_args()
    check_numbers(args)
    if args.device_batch < 1:
        raise UserError(f"--device-batch {args.device_batch}: expected at least 1")
    if args.samples == 1:
        raise UserError("--samples 1: expected at least 2, an answer is judged beside its siblings")
    device, dist = setup(args.device, args.seed)
    if args.examples % dist.world:
        raise UserError(f"--examples {args.examples} does not divide among {dist.world} processes: change it so that it does")
    if args.dtype == "fp16":
        raise UserError("--dtype fp16: reinforcement learning does not scale its loss, and fp16 gradients need it. Use auto, bf16 or fp32")
    dtype, why = hardware.pick_dtype(hardware.describe(device), args.dtype)
    task, test = make_task(args, "train"), make_task(args, "test")
    loaded = load_stage(args.stage, args.sft_tag or None, device=device)
    gpt, tokenizer, engine = loaded.gpt, loaded.tokenizer, Engine(loaded.tokenizer)
    settings = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=given(args.top_k))
    steps = given(args.num_steps) or len(task) // args.examples
    for questions, count in ((task, steps * args.examples), (test, args.eval_examples)):
        check_room([questions[i] for i in range(min(count, len(questions)))], tokenizer, gpt.config.seq_len, args)
    base = schedule.plan(gpt.config.layers, tokenizer.vocab_size, gpt.config.seq_len, steps=steps, batch_tokens=loaded.meta["batch_tokens"])
    folder = checkpoint_dir("rl", args.tag or loaded.tag)
    about = describe(gpt, loaded.gistnet, loaded.lensnet, tokenizer)
    meta = dict(networks=about, args=vars(args), batch_tokens=loaded.meta["batch_tokens"], steps=steps, start=f"{loaded.stage}/{loaded.tag} step {loaded.meta['step']}")
    if dist.world > 1:
        td.barrier() # with --stage rl, all have read what is now set aside
    begin, before = 0, 0
    with hardware.out_of_memory_told("while the device took the optimizer and the networks to draw answers with, before any step", SMALLER):
        optimizer = make_optimizer(gpt, {}, dist, lr_scale=base.lr_mult * args.lr, weight_decay=0.0)
        if args.resume and checkpoint.steps(folder):
            begin, before = resume(folder, loaded, optimizer, meta)
        speaker = gpt if dtype == torch.float32 else copy.deepcopy(gpt).to(dtype) # sampling reads half the bytes
    if not args.resume:
        begin_folder(folder, dist)
    log = Log(folder, wandb_project="nanochat-rl", run=args.run, config=vars(args), main=dist.main)
    print0(f"model       {meta['start']}; {why}")
    print0(f"plan        {steps} steps x {args.examples} questions x {args.samples} answers of {args.task}; output in {folder}")

    def tested(step):
        with hardware.out_of_memory_told(f"in the test after step {step}{kept(saved)}", LESS):
            metrics = evaluate(engine, speaker, test, args, settings, dist)
        log.write(step, **metrics)
        return metrics

    saved = begin
    last, sampled, began = tested(begin), before, time.perf_counter()
    for step in range(begin, steps):
        start, done = time.perf_counter(), step + 1
        first = step * args.examples
        asked = [task[i % len(task)] for i in range(first + dist.rank, first + args.examples, dist.world)]
        with hardware.out_of_memory_told(f"while answers were drawn in step {done}{kept(saved)}", LESS):
            groups = list(sample(engine, speaker, task, asked, args.samples, args.device_batch, settings, f"{args.seed}/{step}/{dist.rank}"))
        rows, tokens = make_rows(groups)
        rewards = torch.stack([rewards for _, _, rewards in groups]) # (questions, samples)
        mixed = (rewards.max(dim=1).values > rewards.min(dim=1).values).sum().item()
        total, tokens, mixed, reward = added([rewards.numel(), tokens, mixed, rewards.sum().item()], dist)
        lr, skipped = 1 - step / steps, optimizer.skipped
        optimizer.set_schedule(lr, weight_decay=0.0)
        with hardware.out_of_memory_told(f"while answers were learned from in step {done}{kept(saved)}", LESS):
            loss, norm = learn(gpt, optimizer, rows, tokens, args.device_batch, dtype, dist)
        then = f"at step {done}{kept(saved)}. Lower --lr"
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} {then}")
        if optimizer.skipped == skipped and not math.isfinite(norm): # its step was taken: the weights are not numbers any more
            raise UserError(f"the gradient's norm is {norm} {then}")
        if speaker is not gpt:
            speaker.load_state_dict(gpt.state_dict())
        sampled += tokens
        log.write(done, reward=reward / total, mixed=mixed / args.examples, loss=loss, answer_tokens=tokens / total, grad_norm=norm, skipped=optimizer.skipped, lr=lr, dt=time.perf_counter() - start)
        if done == steps or args.save_every > 0 and done % args.save_every == 0:
            checkpoint.save(folder, done, loaded.modules, optimizer, meta | dict(sampled=sampled, skipped=optimizer.skipped), keep=given(args.keep), main=dist.main)
            saved = done
        if done == steps or args.eval_every > 0 and done % args.eval_every == 0:
            last = tested(done)
    seconds = time.perf_counter() - began
    log.summary(stage="rl", tag=args.tag or loaded.tag, **last, steps=steps, tokens=int(sampled), tokens_per_s=(sampled - before) / seconds, train_s=seconds, gists=int(loaded.gistnet is not None),
                params=sum(p.numel() for module in loaded.modules.values() for p in module.parameters()), peak_mb=hardware.peak_memory(device) / 2**20, seed=args.seed,
                skipped_steps=optimizer.skipped)
    log.close()
    cleanup()


if __name__ == "__main__":
    run_main(main)
