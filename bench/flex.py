"""
FlexAttention beside its slow twin, SDPA with a dense mask, on rows with gists in them, each token reading a working context of its own:
python -m bench.flex                                      (a GPU: forward and backward)
python -m bench.flex --tokens 256 --device cpu            (forward only, which is all that FlexAttention has on a CPU, uncompiled)

The rule comes from megacontext/layout.py in two forms, a BlockMask as in training and a dense mask. Both work in bf16; truth is
SDPA in fp32 on the same numbers.
    error       norm of the difference to the truth over the norm of the truth: of the output, and of the gradients of q, k and v
    worst       the largest of the four errors of FlexAttention over SDPA's: some 1 where both only round
    ms          forward and backward, mean of --repeats, after one that compiles
The last line is JSON.
"""

import argparse
import json
import time

import numpy as np
import torch
from torch.nn.attention.flex_attention import flex_attention

from megacontext.layout import block_mask, draw_table, visibility
from nanochat import hardware
from nanochat.attention import attend
from nanochat.common import UserError, run_main, setup
from nanochat.schedule import HEAD_WIDTH

K = 32

parser = argparse.ArgumentParser(description="FlexAttention beside SDPA on rows with gists", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--tokens", type=int, default=2048, help=f"of a row, a multiple of {K}")
parser.add_argument("--rows", type=int, default=2)
parser.add_argument("--heads", type=int, default=6)
parser.add_argument("--repeats", type=int, default=10)
parser.add_argument("--device", default="", help="cuda or cpu (empty = the best there is)")
parser.add_argument("--seed", type=int, default=0)


def main():
    args = parser.parse_args()
    if args.tokens < K or args.tokens % K or min(args.rows, args.heads, args.repeats) < 1:
        raise UserError(f"--tokens {args.tokens}: expected a multiple of {K}; and at least 1 of --rows, --heads and --repeats")
    device, _ = setup(args.device, args.seed)
    machine = hardware.describe(device)
    dtype = torch.bfloat16
    docs = np.zeros(args.tokens // K, dtype=np.int64)
    table = torch.from_numpy(np.stack([draw_table(docs, K, np.random.default_rng([args.seed, row])) for row in range(args.rows)])).to(device)
    dense = visibility(table, K)
    N = dense.size(-1)
    sparse = block_mask(table, K)
    backward = device.type == "cuda"
    draw = lambda: torch.randn(args.rows, args.heads, N, HEAD_WIDTH, device=device)
    q, k, v, ahead = (draw().to(dtype) for _ in range(4))
    flex = attend if backward else lambda q, k, v, see: flex_attention(q, k, v, block_mask=see)
    truth = read(attend, (q.float(), k.float(), v.float()), ahead.float(), dense, backward)
    rows = {}
    for name, how, see in (("FlexAttention", flex, sparse), ("SDPA", attend, dense)):
        work = lambda: read(how, (q, k, v), ahead, see, backward)
        found = work()
        errors = {part: ((got.float() - true).norm() / true.norm()).item() for part, got, true in zip(("y", "dq", "dk", "dv"), found, truth)}
        rows[name] = dict(errors=errors, ms=1000 * mean_seconds(work, args.repeats, device))
    worst = max(error / rows["SDPA"]["errors"][part] for part, error in rows["FlexAttention"]["errors"].items())
    print(f"{machine}\n{args.rows} rows of {args.tokens} tokens and {N - args.tokens} gists, {args.heads} heads; {dense.float().mean():.1%} of the mask is seen, "
          f"{sparse.sparsity():.0f}% of its tiles are skipped")
    for name, row in rows.items():
        print(f"{name:<14}{row['ms']:9.2f} ms   " + ", ".join(f"{part} {error:.2e}" for part, error in row["errors"].items()))
    print(json.dumps(dict(bench="flex", machine=machine.name, torch=torch.__version__, rows=args.rows, tokens=args.tokens, entries=N, heads=args.heads,
                          backward=backward, worst=worst, speedup=rows["SDPA"]["ms"] / rows["FlexAttention"]["ms"], **rows)))


def read(how, inputs, ahead, see, backward):
    """The output, and the gradients of q, k and v where they are asked for."""
    if not backward:
        with torch.no_grad():
            return [how(*inputs, see)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = how(*inputs, see)
    return [y.detach(), *torch.autograd.grad(y, inputs, ahead)]


def mean_seconds(work, repeats, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    run_main(main)
