"""
What this machine is, and what fits on it: printed at the start of a run, so that a slow or refused run explains itself.

In:  the machine. Out: a Machine (names, sizes, peak rate, tier), the number format to train in, and the rows per device
that fit into its free memory. Nothing here is a guess in disguise: what cannot be known is None, and says so.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from nanochat.common import UserError, base_dir

# Dense bf16 FLOPs per second with fp32 accumulation, from the makers' data sheets. Sparse figures are twice these, and
# GeForce cards accumulate in fp32 at half the rate of their fp16 figure. The longest name that occurs in the device name wins.
PEAK_BF16 = {
    "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "B100": 1750e12, "GB200": 2500e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10": 125e12, "A10G": 70e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 6000 Ada": 364e12, "RTX A6000": 154.8e12, "RTX A5000": 111e12, "RTX PRO 6000": 504e12,
    "RTX 5090": 209.5e12, "RTX 5080": 112.6e12, "RTX 5070 Ti": 87.9e12, "RTX 5070": 61.7e12, "RTX 5060 Ti": 47.4e12,
    "RTX 4090": 165.2e12, "RTX 4080 SUPER": 104.4e12, "RTX 4080": 97.5e12, "RTX 4070 Ti SUPER": 88.2e12,
    "RTX 4070 Ti": 80.2e12, "RTX 4070 SUPER": 71e12, "RTX 4070": 58.3e12, "RTX 4060 Ti": 44.1e12, "RTX 4060": 30.2e12,
    "RTX 3090 Ti": 80e12, "RTX 3090": 71.2e12, "RTX 3080": 59.5e12, "RTX 3070": 40.6e12, "RTX 3060": 25.6e12,
    "MI300X": 1307e12, "MI325X": 1307e12, "MI250X": 383e12,
}


@dataclass(frozen=True)
class Machine:
    device: str            # cuda, mps, cpu
    name: str              # of the GPU, or of the CPU
    devices: int           # GPUs on this machine (1 for cpu and mps)
    cores: int             # CPU cores this process may use
    ram: int               # bytes
    memory: int            # bytes of one device; RAM on a cpu
    free_memory: int       # bytes of it that are free now
    disk_free: int         # bytes free where base_dir() is
    peak_flops: float      # bf16, one device; None where no data sheet is known (every CPU)
    capability: tuple      # CUDA compute capability, or None

    @property
    def tier(self):
        """Which recipe suits: "8gpu", "1gpu" or "cpu"."""
        if self.device != "cuda":
            return "cpu"
        return "8gpu" if self.devices >= 8 else "1gpu"

    def __str__(self):
        G = 2**30
        peak = "peak unknown, so no MFU" if self.peak_flops is None else f"{self.peak_flops / 1e12:.0f} TFLOPs bf16"
        many = f"{self.devices} x " if self.devices > 1 else ""
        memory = "" if self.device == "cpu" else f" | {self.free_memory / G:.1f} of {self.memory / G:.1f} GiB free"
        return (f"{many}{self.name}{memory} | {peak} | {self.cores} cores, {self.ram / G:.1f} GiB RAM | "
                f"{self.disk_free / G:.0f} GiB disk free | tier {self.tier}")


def peak_flops(name):
    """bf16 FLOPs/s of a GPU by the name its driver gives; None if it is not in the table."""
    if "laptop" in _words(name):
        return None  # the same names at a fraction of the power
    matches = [key for key in PEAK_BF16 if _words(key) <= _words(name)]
    return PEAK_BF16[max(matches, key=len)] if matches else None


def _words(name):
    """'NVIDIA H100 80GB HBM3' -> {nvidia, h100, 80gb, hbm3}: 'A10' must not be found in 'A100', nor 'L4' in 'L40S'."""
    return set(name.lower().replace("-", " ").split())


def describe(device):
    """The Machine that a torch.device belongs to."""
    device = torch.device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram, ram_free = _ram()
    common = dict(device=device.type, cores=cores, ram=ram, disk_free=shutil.disk_usage(base_dir()).free)
    if device.type == "cuda":
        free, memory = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return Machine(name=name, devices=torch.cuda.device_count(), memory=memory, free_memory=free,
                       peak_flops=peak_flops(name), capability=torch.cuda.get_device_capability(device), **common)
    name = "Apple GPU" if device.type == "mps" else _cpu_name()
    return Machine(name=name, devices=1, memory=ram, free_memory=ram_free, peak_flops=None, capability=None, **common)


def _cpu_name():
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    import platform
    return platform.processor() or platform.machine() or "CPU"


def _ram():
    """(all, available) bytes, of this container where one is a limit."""
    import psutil
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            limit, used = limit.read().strip(), int(used.read())
        if limit != "max":
            total, free = min(total, int(limit)), min(free, max(0, int(limit) - used))
    except FileNotFoundError:
        pass  # no cgroup v2 here: the machine's own numbers hold
    return total, free


# ---------------------------------------------------------------------------------------------------------------------
# Number format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(machine, asked="auto"):
    """
    The format of activations and matrix products; weights stay fp32. Returns (dtype, reason to print).
    auto: bf16 where the GPU or the CPU has units for it, fp32 elsewhere. fp16 (with a scaled loss) skips a step now and then, so it is
    only used when asked for.
    """
    if asked != "auto":
        if asked not in DTYPES:
            raise UserError(f"--dtype {asked} is not known: expected auto, {', '.join(DTYPES)}")
        if asked == "fp16" and machine.device == "cpu":
            raise UserError("--dtype fp16 needs a GPU: on a CPU use fp32 (or bf16)")
        return DTYPES[asked], "asked for"
    if machine.device == "cuda" and machine.capability >= (8, 0):
        return torch.bfloat16, f"compute capability {machine.capability[0]}.{machine.capability[1]} has bf16 matrix units"
    if machine.device == "cuda":
        return torch.float32, f"compute capability {machine.capability[0]}.{machine.capability[1]} has no bf16 matrix units"
    if machine.device == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "this CPU multiplies bf16 (AVX512-BF16 or AMX): twice the training speed of fp32"
    return torch.float32, f"no bf16 matrix units are known on this {machine.device}"


@lru_cache
def cpu_has_bf16():
    """Whether the CPU has bf16 products in hardware; emulated, they are slower than fp32. Known on Linux only."""
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


# ---------------------------------------------------------------------------------------------------------------------
# What fits

# Bytes that the backward pass keeps per token, layer and unit of width, counted with saved_tensors_hooks on the eager
# model; a compiled model and one in fp8 keep fewer, so the estimate is on the safe side. Checkpointing keeps a layer's input
# and value embedding only.
SAVED_BYTES = {torch.float32: 82, torch.bfloat16: 54, torch.float16: 54}
CHECKPOINTED_BYTES = 6
ENDS_BYTES = 32     # per token and unit of width: embedding with the three before it, and the last norm
LOGIT_BYTES = 12    # per token and vocabulary entry of a piece of the loss: in training 8, in evaluation 12
RESERVE = 0.10      # share of the memory left to the allocator's gaps, the CUDA context and kernels' workspaces
CPU_TOKENS = 8192   # on a CPU more tokens at a time bring no speed, only memory


def memory_needed(config, counts, rows, dtype, world=1, logit_tokens=None, checkpointing=False, beside=0):
    """
    Bytes of training with `rows` rows on one device:

      weights    4 N (fp32 masters), and their copies in 16 bits
      gradients  4 N, and the head's once more: the loss computes it ahead of backward
      optimizer  (4 per Muon parameter + 8 per AdamW parameter) / world, sharded
      copies     what the optimizer stacks: gradients, update and parameters of a third of the matrices (one rank works
                 shape by shape), of all of them with several ranks (reductions overlap)
      saved      rows x T x (layers x D x SAVED_BYTES + D x ENDS_BYTES + beside)
      logits     min(rows x T, logit_tokens) x V x LOGIT_BYTES

    counts         parameters by role, from cost.parameter_counts
    logit_tokens   tokens of a piece of the loss (cross_entropy.piece_tokens; None: all at once)
    beside         bytes per token of networks trained beside the GPT
    """
    N, muon = counts["total"], counts["matrices"]
    state = 8 * N + 4 * counts["head"] + (4 * muon + 8 * (N - muon)) // world
    state += 2 * counts["scaling"] if dtype.itemsize == 2 else 0
    copies = 4 * muon if world == 1 else 3 * 4 * muon
    tokens = rows * config.seq_len
    per_layer = config.width * (CHECKPOINTED_BYTES if checkpointing else SAVED_BYTES[dtype])
    layers = config.layers * per_layer + (config.width * SAVED_BYTES[dtype] if checkpointing else 0) # one layer at a time is whole again
    saved = tokens * int(layers + config.width * ENDS_BYTES + beside)
    logits = min(tokens, logit_tokens or tokens) * config.vocab_size * LOGIT_BYTES
    return state + copies + saved + logits


def device_rows(machine, config, counts, dtype, world=1, logit_tokens=None, checkpointing=False, beside=0, most=64):
    """
    The largest power of two of rows that fits into free memory, and a sentence that says how it came about.
    Raises UserError when not even one row fits, naming the flags that help.
    """
    room = machine.free_memory * (1 - RESERVE)
    need = lambda rows, again=checkpointing: memory_needed(config, counts, rows, dtype, world, logit_tokens, again, beside)
    G = 2**30
    if need(1) > room:
        helps = "turn on --checkpoint-activations, or lower" if need(1, True) <= room else "lower"
        raise UserError(f"one row of {config.seq_len} tokens needs about {need(1) / G:.1f} GiB, and {room / G:.1f} GiB of "
                        f"{machine.name} can be used: {helps} --max-seq-len or --depth")
    if machine.device == "cpu":
        most = max(1, min(most, CPU_TOKENS // config.seq_len))
    rows = 1
    while rows * 2 <= most and need(rows * 2) <= room:
        rows *= 2
    again = ", layers computed again in backward" if checkpointing else ""
    return rows, (f"up to {rows} rows x {config.seq_len} tokens per device: about {need(rows) / G:.1f} of {room / G:.1f} GiB usable{again}; "
                  f"logits of {min(rows * config.seq_len, logit_tokens or rows * config.seq_len)} tokens at a time")


# ---------------------------------------------------------------------------------------------------------------------
# What did not fit

@contextmanager
def out_of_memory_told(where, advice="Lower --device-batch, turn on --checkpoint-activations, or lower --max-seq-len or --depth"):
    """Turn the ways in which PyTorch and Python run out of memory into one line that names the flags; all else passes through."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"memory ran out {where}. {advice} ({first})") from error


def peak_memory(device):
    """Most bytes in use so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil
        return psutil.Process().memory_info().peak_wset
    import resource # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
