"""
Sharded optimizer states, ours (nanochat/optim.py, as in ZeRO-2) beside PyTorch's own FSDP2, by the clock:

torchrun --standalone --nproc_per_node=2 -m bench.sharding                     (two processes on the CPU)
torchrun --standalone --nproc_per_node=8 -m bench.sharding --depth 20 --vocab-size 32768 --rows 16

The same plain GPT, made-up ids, learning rates and Muon and AdamW steps. FSDP2 cuts every parameter along its first dimension and gathers it for each forward and
backward. A Muon step needs whole matrices: their gradients are gathered, each rank steps its share of the matrices, and the results are gathered again. (The matrices are gathered for it
too, which a leaner step could do without: the optimizer has a column of its own.)
    ours            parameters whole on every rank; gradients reduced, states sharded, parameters gathered
    fsdp2           parameters sharded too, gathered once a step
    fsdp2 reshard   given back after the forward, and gathered anew for the backward
Medians over --steps steps. The last line is JSON.
"""
import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.distributed as td
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nanochat.common import UserError, cleanup, print0, run_main, setup
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import muon_dtype, muon_step, variance_dim
from nanochat.optim import make_optimizer, param_groups
from nanochat.report import table

parser = argparse.ArgumentParser(description="Our sharding beside FSDP2", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--depth", type=int, default=4)
parser.add_argument("--vocab-size", type=int, default=4096)
parser.add_argument("--max-seq-len", type=int, default=512)
parser.add_argument("--rows", type=int, default=2, help="rows a step on each rank")
parser.add_argument("--steps", type=int, default=12, help="steps measured, after two that are not")
parser.add_argument("--device", default="")

WAYS = ("ours", "fsdp2", "fsdp2 reshard")


def cut(whole, rank, world):
    """A rank's part of a tensor, as fully_shard() cuts it along dimension 0: equal parts, of which the last are shorter, or empty."""
    n = -(-len(whole) // world)
    return whole[rank * n:(rank + 1) * n]


class Sharded:
    """MuonAdamW's steps for a GPT under fully_shard(), whose parameters and gradients are DTensors cut along dimension 0."""

    def __init__(self, gpt, dist):
        self.gpt, self.dist, self.buckets, adam = gpt, dist, [], []
        for group in param_groups(gpt):
            if group["kind"] == "adamw":
                adam.append({key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")})
                continue
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                params = [p for p in group["params"] if p.shape == shape]
                c, (m, n) = -(-len(params) // dist.world), shape
                state = [torch.zeros(c, *size, device=gpt.device) for size in ((m, n), (m, 1) if variance_dim(m, n) == -1 else (1, n))]
                self.buckets.append((group, params, c, state))
        self.adam = torch.optim.AdamW(adam, fused=True)

    @torch.no_grad()
    def step(self):
        rank, world = self.dist.rank, self.dist.world
        for group, params, c, state in self.buckets:
            mine = lambda whole: torch.stack([*whole, *[torch.zeros_like(whole[0])] * (c * world - len(whole))])[rank * c:(rank + 1) * c]
            stepped = mine([p.full_tensor() for p in params])
            muon_step(stepped, mine([p.grad.full_tensor() for p in params]), *state, group["lr"], group["momentum"], group["beta2"], group["weight_decay"], muon_dtype(self.gpt.device))
            gathered = stepped.new_empty((c * world, *stepped.shape[1:]))
            td.all_gather_into_tensor(gathered, stepped)
            for p, whole in zip(params, gathered):
                p.to_local().copy_(cut(whole, rank, world))
        self.adam.step()

    def zero_grad(self):
        for p in self.gpt.parameters():
            p.grad = None


def build(way, args, dist, device):
    """(GPT, optimizer) of the same weights, whichever the way."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.from_depth(args.depth, args.vocab_size, args.max_seq_len)).to(device).train()
    if way == "ours":
        return gpt, make_optimizer(gpt, dist=dist)
    mesh = init_device_mesh(device.type, (dist.world,))
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=way == "fsdp2 reshard")
    fully_shard(gpt, mesh=mesh)
    return gpt, Sharded(gpt, dist)


def measure(way, args, dist, device):
    """{"both", "read", "step": seconds a step, of which forward and backward, and the optimizer's; "loss": the last}"""
    gpt, optimizer = build(way, args, dist, device)
    ids = torch.from_numpy(np.random.default_rng(dist.rank).integers(0, args.vocab_size, (args.rows, args.max_seq_len + 1))).to(device)
    clock, seconds = lambda: (td.barrier(), time.perf_counter())[1], []
    for _ in range(2 + args.steps):
        began = clock()
        loss = gpt(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), "sum") / ids[:, 1:].numel()
        loss.backward()
        read = clock()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append((clock() - began, read - began))
    both, read = (statistics.median(column) for column in zip(*seconds[2:]))
    return dict(both=both, read=read, step=both - read, loss=loss.item())


def main():
    args = parser.parse_args()
    if min(args.depth, args.vocab_size, args.max_seq_len, args.rows, args.steps) < 1:
        raise UserError("expected numbers of at least 1")
    device, dist = setup(args.device, 0)
    if dist.world == 1:
        raise UserError("one process shards nothing: start it with torchrun --standalone --nproc_per_node=2 -m bench.sharding")
    found = {way: measure(way, args, dist, device) for way in WAYS}
    print0(f"d{args.depth}, {dist.world} processes, {args.rows} rows of {args.max_seq_len} tokens each; milliseconds\n")
    print0(table(["way", "step in all", "forward and backward", "optimizer", "last loss of rank 0"], [[way, *(f"{1000 * row[key]:.0f}" for key in ("both", "read", "step")), f"{row['loss']:.4f}"] for way, row in found.items()]))
    print0(json.dumps(dict(vars(args), world=dist.world, found=found)))
    cleanup()


if __name__ == "__main__":
    run_main(main)
