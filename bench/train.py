"""
How fast a model of a given depth trains, on made-up tokens, so that neither tokenizer nor text is needed:
python -m bench.train --depth 4 --max-seq-len 512 --steps 20
python -m bench.train --depth 20 --batch-tokens 131072            (one GPU's share of the batch of eight)
python -m bench.train --depth 20 --batch-tokens 131072 --plain    (without memory: what the other is compared with)

The steps are those of scripts/base_train.py: its flags, its objective, its optimizer, its loop; one warm run, then --steps of them, as
often as the curriculum has stages, each with blocks of one size. Ids follow a Zipf distribution; every row is one document.
    step_ms     milliseconds a step, mean over the steps; over the stages by their share of a run
    tokens_s    tokens a second
    mfu         FLOPs of the GPT alone (cost.train_flops) over the peak rate of the data sheet: gists cost time and count nothing. None where no
                peak is known, as on every CPU
    memory_gib  cuda: the most that was allocated; elsewhere: the most that was resident, of the whole process
The last line is JSON.
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import torch

from megacontext.losses import parse_curriculum
from nanochat import cost, schedule
from nanochat.common import UserError, cleanup, run_main
from nanochat.dataloader import Batch
from nanochat.gpt import GPTConfig
from nanochat.hardware import peak_memory
from nanochat.run import Log, Progress
from nanochat.train import Curves, fit
from scripts.base_train import parser as training
from scripts.load import build
from scripts.stage import add_step_flags, equip, given, start

parser = argparse.ArgumentParser(description="Tokens per second, MFU and memory of training steps", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--depth", type=int, default=4, help="layers of the model; everything else follows")
parser.add_argument("--vocab-size", type=int, default=32768)
parser.add_argument("--plain", action="store_true", help="no gists: the plain GPT on the same rows")
parser.add_argument("--steps", type=int, default=20, help="steps measured, of each stage of the curriculum")
parser.add_argument("--warm", type=int, default=3, help="steps before them that are not")
add_step_flags(parser, curriculum=training.get_default("curriculum"), **{flag: training.get_default(flag) for flag in ("plain_every", "labels_every", "reconstruct_every")})


class Rows:
    """Endless batches of `rows` rows of made-up text, numbered as a run of one process numbers them."""

    def __init__(self, vocab_size, rows, T, seed):
        share = 1 / np.arange(1, vocab_size + 1)
        ids = np.random.default_rng(seed).choice(vocab_size, (4 * rows, T + 1), p=share / share.sum())
        self.ids, self.rows, self.T, self.read = torch.from_numpy(ids), rows, T, 0

    def __iter__(self):
        while True:
            numbers = torch.arange(self.read, self.read + self.rows)
            ids = self.ids[numbers % len(self.ids)]
            self.read += self.rows
            yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros(self.rows, self.T // 32, dtype=torch.long), numbers)


class Kept(Log):
    """A log that writes nothing and remembers the last line."""

    def write(self, step, show=True, **metrics):
        self.last = metrics


def main():
    args = parser.parse_args()
    if min(args.steps, args.warm) < 1:
        raise UserError(f"--steps {args.steps} --warm {args.warm}: expected at least 1 of each")
    place = start(args)
    if place.dist.world > 1:
        raise UserError(f"bench.train measures one process, and torchrun started {place.dist.world}: start it with python")
    plan = schedule.plan(args.depth, args.vocab_size, args.max_seq_len, steps=args.steps, batch_tokens=given(args.batch_tokens))
    networks = build(GPTConfig.from_depth(args.depth, args.vocab_size, args.max_seq_len), memory=not args.plain)
    objective, optimizer, scale, rows, accumulate = equip(args, place, networks, plan)
    config = networks[0].config
    print(f"step        {accumulate} x {rows} rows x {args.max_seq_len} tokens", flush=True)
    told = []
    for block, share in [(None, 1.0)] if args.plain else shares(args.curriculum):
        if block is not None:
            objective.options = replace(objective.options, curriculum=((block, 1.0),))
        batches = Rows(config.vocab_size, rows, args.max_seq_len, args.seed)
        told.append(dict(block=block, share=share) | measure(objective, optimizer, scale, batches, args, place, plan, config, accumulate))
    step_ms = sum(stage["share"] * stage["step_ms"] for stage in told)
    tokens_s = 1000 * plan.batch_tokens / step_ms
    peak = place.machine.peak_flops
    result = dict(bench="train", machine=place.machine.name, torch=torch.__version__, depth=args.depth, plain=args.plain, seq_len=args.max_seq_len, vocab_size=args.vocab_size,
                  dtype=str(place.amp or torch.float32), flags={name: value for name, value in vars(args).items() if value is True}, rows=rows, accumulate=accumulate,
                  batch_tokens=plan.batch_tokens, steps=args.steps, step_ms=step_ms, tokens_s=tokens_s, mfu=peak and tokens_s * cost.train_flops(config) / peak,
                  memory_gib=peak_memory(place.device) / 2**30, stages=told)
    mfu = "no peak is known, so no MFU" if result["mfu"] is None else f"mfu {result['mfu']:.1%}"
    print(f"d{args.depth} {'plain' if args.plain else 'with memory'}: {step_ms:.1f} ms a step, {tokens_s:,.0f} tokens/s, {mfu}, {result['memory_gib']:.2f} GiB")
    print(json.dumps(result))
    cleanup()


def shares(curriculum):
    """The stages of a curriculum with their share of a run: "8:0.3,16:0.55,32:1" -> [(8, 0.3), (16, 0.25), (32, 0.45)]"""
    stages, done = [], 0.0
    for block, until in parse_curriculum(curriculum):
        stages.append((block, until - done))
        done = until
    return stages


def measure(objective, optimizer, scale, batches, args, place, plan, config, accumulate):
    """Train for --warm steps, then for --steps more against the clock: {step_ms, loss}."""
    log = Kept(None)
    common = dict(log=log, dist=place.dist, device=place.device, accumulate=accumulate, amp=place.amp, scale=scale)
    for steps in (args.warm, args.steps):
        progress = Progress(steps, plan.batch_tokens, cost.train_flops(config), place.machine.peak_flops, warm=0)
        fit(objective, optimizer, batches, Curves(steps), progress=progress, log_every=steps, **common) # told once, at the end: nothing waits in between
    return dict(step_ms=1000 * progress.seconds_per_step, loss=log.last["loss"])


if __name__ == "__main__":
    run_main(main)
