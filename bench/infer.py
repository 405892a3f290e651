"""
How fast a model of a given depth talks, without memory:
python -m bench.infer                                         (a small one, on whatever there is)
python -m bench.infer --depth 12 --batches 1,8,32,128         (a GPU)
python -m bench.infer --depth 12 --steps static               (decoding steps recorded as a CUDA graph: nanochat/decode.py)

For every batch size, all prompts of one length, greedy, weights at random (speed does not depend on them):
    ttft_ms     from the prompts to the first token of each: one forward over all of them
    tpot_ms     time per output token after that: one decoding step for every row, sampling and the way to Python included
    tokens_s    rows / tpot: new tokens a second, all rows together
    mbu         bytes that one step has to move (cost.decode_bytes), over tpot, over the memory's bandwidth
    mfu         FLOPs of one step (cost.forward_flops), over tpot, over the peak rate of the data sheet; none where there is no such rate: on a
                CPU, on a GPU that nanochat/hardware.py does not know, in another format than bf16
    memory_gib  cuda: the most that was allocated; elsewhere: weights and cache, by arithmetic
The median of the repeats, in each the mean over all steps. GPU bandwidths are the makers'; where there is none in the table, and on a CPU,
the bandwidth is measured first, by a long copy, and the table says so. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch

from nanochat import cost, hardware
from nanochat.common import UserError, run_main, setup
from nanochat.decode import StaticDecode
from nanochat.engine import LeftPadded, Sampler
from nanochat.gpt import GPT, GPTConfig

# Bytes per second of device memory, from the makers' data sheets; the longest name that occurs in the device name wins.
BANDWIDTH = {"H100": 3.35e12, "H100 PCIe": 2.0e12, "H100 NVL": 3.9e12, "H200": 4.8e12, "H800": 3.35e12, "GH200": 4.0e12, "B200": 8.0e12,
             "A100": 2.04e12, "A40": 0.696e12, "A10": 0.6e12, "L40S": 0.864e12, "L4": 0.3e12, "RTX 4090": 1.008e12, "RTX 3090": 0.936e12,
             "RTX 5090": 1.792e12, "MI300X": 5.3e12}

parser = argparse.ArgumentParser(description="Time to first token, time per token, MBU, MFU and memory of plain inference", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--depth", type=int, default=4, help="layers of the model; everything else follows")
parser.add_argument("--vocab-size", type=int, default=32768)
parser.add_argument("--batches", default="1,8,32", help="numbers of rows, separated by commas")
parser.add_argument("--prompt", type=int, default=-1, help="tokens of each prompt (-1 = 1792 on cuda, 128 elsewhere)")
parser.add_argument("--new", type=int, default=-1, help="tokens that follow (-1 = 256 on cuda, 32 elsewhere)")
parser.add_argument("--steps", default="eager", choices=["eager", "static"], help="how to decode; static = fixed shape, a CUDA graph on cuda")
parser.add_argument("--repeats", type=int, default=3, help="runs measured, after one that is not")
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
parser.add_argument("--dtype", default="auto", help="of the weights: auto, bf16, fp16 or fp32")


def main():
    args = parser.parse_args()
    try:
        batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches {args.batches}: expected numbers separated by commas, such as 1,8,32") from None
    device, _ = setup(args.device)
    cuda = device.type == "cuda"
    prompt = args.prompt if args.prompt != -1 else 1792 if cuda else 128
    new = args.new if args.new != -1 else 256 if cuda else 32
    if min(*batches, prompt, args.repeats) < 1 or new < 2:
        raise UserError("batches, --prompt and --repeats must be at least 1, --new at least 2")
    machine = hardware.describe(device)
    dtype, reason = hardware.pick_dtype(machine, args.dtype)
    config = GPTConfig.from_depth(args.depth, args.vocab_size, seq_len=prompt + new)
    gpt = GPT(config).to(device, dtype).eval()
    bandwidth, source = memory_bandwidth(machine, device)
    peak = machine.peak_flops if dtype == torch.bfloat16 else None
    print(machine)
    print(f"d{args.depth}, {cost.parameter_counts(config)['total'] / 1e6:.1f}M parameters in {str(dtype).removeprefix('torch.')} ({reason}), "
          f"{prompt} + {new} tokens, {args.steps} steps, {torch.get_num_threads()} threads")
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s ({source}), " + ("no peak is known, so no MFU" if peak is None else f"peak {peak / 1e12:.0f} TFLOPs"))
    print(f"{'batch':>6} {'ttft_ms':>10} {'tpot_ms':>10} {'tokens_s':>10} {'mbu':>8} {'mfu':>8} {'memory_gib':>11}")
    rows = []
    for batch in batches:
        row = measure(gpt, batch, prompt, new, args.steps == "static", args.repeats, bandwidth, peak)
        rows.append(row)
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.2%}"
        print(f"{batch:6} {row['ttft_ms']:10.2f} {row['tpot_ms']:10.3f} {row['tokens_s']:10.1f} {row['mbu']:8.1%} {mfu:>8} {row['memory_gib']:11.3f}", flush=True)
    print(json.dumps(dict(bench="infer", machine=machine.name, depth=args.depth, dtype=str(dtype), prompt=prompt, new=new, steps=args.steps,
                          bandwidth=bandwidth, bandwidth_from=source, peak=peak, torch=torch.__version__, rows=rows)))


@torch.no_grad()
def measure(gpt, batch, prompt, new, static, repeats, bandwidth, peak):
    """One row of the table."""
    config, itemsize = gpt.config, gpt.dtype.itemsize
    if gpt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = [once(gpt, batch, prompt, new, static) for _ in range(1 + repeats)][1:] # the first one warms up
    ttft, tpot = (statistics.median(times) for times in zip(*runs))
    length = prompt + new / 2 # seen by the middle one of the steps
    moved, done = cost.decode_bytes(config, batch, length, itemsize), batch * cost.forward_flops(config, length)
    if gpt.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = itemsize * cost.parameter_counts(config)["total"] + batch * (prompt + new) * cost.kv_bytes(config, itemsize)
    return dict(batch=batch, ttft_ms=1000 * ttft, tpot_ms=1000 * tpot, tokens_s=batch / tpot, mbu=moved / tpot / bandwidth, mfu=peak and done / tpot / peak,
                memory_gib=memory / 2**30)


def once(gpt, batch, prompt, new, static):
    """Seconds to the first token, and seconds per token after it. Every token comes to Python, as it must for whoever reads it."""
    generator = torch.Generator().manual_seed(batch)
    prompts = torch.randint(gpt.config.vocab_size, (batch, prompt), generator=generator).tolist()
    sampler, draws = Sampler(temperature=0.0), [0.5] * batch
    padded = LeftPadded(gpt, prompts, new)
    decode = StaticDecode(gpt, padded.cache) if static else None
    start = time.perf_counter()
    tokens = sampler.choose(padded.read(), draws)
    first = time.perf_counter()
    if decode is not None: # recording happens once in a process that serves: it is not part of a token's time
        decode.step(torch.tensor(tokens, device=gpt.device)[:, None])
        padded.cache.rewind(prompt)
    begin = time.perf_counter()
    for _ in range(new - 1):
        logits = padded.step(tokens) if decode is None else decode.step(torch.tensor(tokens, device=gpt.device)[:, None])
        tokens = sampler.choose(logits, draws)
    return first - start, (time.perf_counter() - begin) / (new - 1)


def memory_bandwidth(machine, device):
    """(bytes a second, where from) of this machine."""
    words = lambda name: set(name.lower().replace("-", " ").split()) # whole words: A10 is not found in A100
    known = [name for name in BANDWIDTH if words(name) <= words(machine.name)]
    return (BANDWIDTH[max(known, key=len)], "data sheet") if known and machine.device == "cuda" else (copy_rate(device), "measured by a copy")


def best_of(work, device, times=5):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def copy_rate(device, size=2**28):
    """Bytes a second read and written by a copy far larger than the caches."""
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.zeros_like(a)
    return 2 * size / best_of(lambda: b.copy_(a), device)


if __name__ == "__main__":
    run_main(main)
