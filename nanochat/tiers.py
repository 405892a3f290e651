"""
From a machine to a recipe: how large a model speedrun.sh trains here, on how many tokens, and what that takes.

In:  what the machine has (look), and which tier the user asks for, if any.
Out: a Recipe, and estimates of its hours and gigabytes. scripts/plan.py turns it into commands.
The idea: every number that a tier stands for is in CPU, GPU, NODE or CARDS below, once. Plain Python without packages, so that a
plan can be read before anything is installed.
"""
import os
import shutil
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

from nanochat import cost, schedule
from nanochat.common import UserError, base_dir

G = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Recipe:
    """What a tier trains. -1 leaves a number to nanochat/schedule.py."""
    tier: str
    depth: int
    vocab_size: int
    seq_len: int            # tokens of a row in base training
    long_len: int           # and in mid-training and fine-tuning
    tokens: int             # of base training (-1 = tokens_per_param for each scaling parameter)
    batch_tokens: int       # of a step (-1 = from the depth)
    mid_steps: int          # -1 = a tenth of base training
    sft_steps: int          # -1 = a sixteenth
    save_every: int         # steps between checkpoints: what a kill can cost
    eval_tokens: int        # validation tokens at the end of a training stage
    source: str             # text of the tokenizer and of base training
    long_source: str        # of mid-training and of questions about texts: some of it long, some of it code
    memory_source: str      # of mega_eval and recall_eval: documents longer than a row
    tokenizer_chars: int    # most characters that the tokenizer learns from
    chat_flags: tuple       # of chat_eval
    memory_flags: tuple     # of mega_eval
    recall_flags: tuple     # of recall_eval
    core: str               # the 22 tasks of CORE: "off" or "download"
    device: str
    processes: int = 1
    lr: float = -1          # times the rates that batch and horizon ask for (-1 = 1)
    tokens_per_param: int = schedule.TOKENS_PER_PARAM
    minutes: float = None   # of the whole run, the sum of measured stages; None = worked out from the card
    card: str = ""          # the time is for this card
    peak: float = None      # its bf16 FLOPs/s


CPU = Recipe(
    tier="cpu", device="cpu", depth=4, vocab_size=4096, seq_len=1024, long_len=2048, tokens=1_474_560, batch_tokens=4096, mid_steps=150, sft_steps=700,
    source="stdlib", long_source="stdlib", memory_source="stdlib", tokenizer_chars=20_000_000, lr=2, save_every=50, eval_tokens=65536,
    chat_flags=("--seconds", "2"), memory_flags=("--documents", "16", "--measured-rows", "6"),
    recall_flags=("--recall-tasks", "multikey,passkey", "--recall-lengths", "8192,131072", "--recall-budget", "2048", "--recall-problems", "1"), core="off", minutes=60)

GPU = dict(
    device="cuda", vocab_size=32768, seq_len=2048, tokens=-1, batch_tokens=-1, mid_steps=-1, sft_steps=-1,
    source="climbmix", long_source="climbmix:0.8,stdlib:0.2", memory_source="stdlib", tokenizer_chars=2_000_000_000, save_every=250, eval_tokens=10 * 2**20,
    chat_flags=("--tasks", "chatcore,arithmetic,spelling,passkey,multikey,codeqa,topicshift,passkey@8x,multikey@8x,codeqa@8x", "--max-problems", "200"),
    memory_flags=("--documents", "48", "--measured-rows", "16"),
    recall_flags=("--recall-lengths", "32768,131072,1048576", "--recall-budget", "2048"), core="download")

NODE = Recipe(tier="8gpu", depth=20, long_len=4096, processes=8, card="8 x H100", peak=8 * 989e12, **GPU)

CARDS = [ # at least so many GiB on the card, and what to train on it; peaks are those of nanochat/hardware.py
    (76, Recipe(tier="1gpu", depth=20, long_len=4096, card="H100 80GB", peak=989e12, **GPU)),
    (38, Recipe(tier="1gpu", depth=16, long_len=4096, card="A100 40GB", peak=312e12, **GPU)),
    (22, Recipe(tier="1gpu", depth=12, long_len=4096, card="RTX 4090", peak=165e12, **GPU)),
    (11, Recipe(tier="1gpu", depth=12, long_len=2048, card="RTX 4070", peak=58e12, tokens_per_param=6, **GPU)),
    (7, Recipe(tier="1gpu", depth=8, long_len=2048, card="RTX 4060", peak=30e12, **GPU)),
]
TIERS = ("8gpu", "1gpu", "cpu")

# What the estimates lean on. Shares of the peak published for models of this kind are 0.40-0.60, compiled (nanochat's
# leaderboard and LOG); ours is compiled on GPUs too, but no run has measured it yet, so less is assumed until one does.
MFU = 0.30
COTRAIN = 1.25            # time of a step with the memory's networks over one without (DESIGN's limit)
EVALUATION_H = 0.5        # all evaluations on a GPU tier
DOWNLOAD_MB_S = 30        # of the shards
SHARD_CHARS, SHARD_MB = 250e6, 100     # of the reference shards (nanochat, dataset.py)
CHARS_PER_TOKEN = 4.8     # web text with 32,768 tokens
SPARE_SHARDS = 1.2        # packing leaves some text out


# ---------------------------------------------------------------------------------------------------------------------
# The machine

@dataclass(frozen=True)
class Found:
    """What is here, as far as it can be known without any package."""
    gpus: int = 0
    gpu: str = ""        # name of the first
    vram: float = 0.0    # GiB of the smallest
    cores: int = 1
    ram: float = 0.0     # GiB (0 = unknown)
    disk: float = 0.0    # GB free in base_dir()
    trouble: str = ""    # why GPUs that are there cannot be used


def look():
    """This machine."""
    gpus, trouble = ask_nvidia()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and gpus: # indices, or names of devices
        wanted = [item.strip() for item in visible.split(",") if item.strip() and item.strip() != "-1"]
        gpus = [gpus[int(item)] for item in wanted if int(item) < len(gpus)] if all(item.isdigit() for item in wanted) else gpus[:len(wanted)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if hasattr(os, "sysconf") else 0.0 # not on Windows
    return Found(len(gpus), gpus[0][0] if gpus else "", min((size for _, size in gpus), default=0.0), cores, ram, shutil.disk_usage(base_dir()).free / G, trouble)


def ask_nvidia():
    """([(name, GiB), ...], what is the matter)."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        return [], "nvidia-smi says: " + " ".join((asked.stdout + asked.stderr).split())[:120]
    gpus = []
    for line in asked.stdout.strip().splitlines():
        name, _, size = line.rpartition(",")
        if not size.strip().isdigit():
            return [], f"nvidia-smi tells no memory size: {line.strip()}"
        gpus.append((name.strip(), int(size) / 1024))
    return gpus, ""


def choose(found, asked=""):
    """The Recipe for a machine and why, as (recipe, reason). asked = what TIER says, empty = what suits."""
    if asked and asked not in TIERS:
        raise UserError(f"no tier called {asked!r}: expected TIER to be one of {', '.join(TIERS)}, or unset, which chooses by the machine")
    smallest = CARDS[-1][0]
    here = f"{found.gpus} x {found.gpu} of {found.vram:.0f} GiB" if found.gpus > 1 else f"{found.gpu} of {found.vram:.0f} GiB" if found.gpus else "no NVIDIA GPU here"
    tier, reason = asked, "TIER asks for it"
    if not asked:
        tier = "cpu" if not found.gpus or found.vram < smallest else "1gpu" if found.gpus < 8 else "8gpu"
        reason = here + (f", less than the {smallest} GiB that the GPU tiers start at" if found.gpus and found.vram < smallest else "")
    if tier == "cpu":
        return CPU, reason
    if tier == "8gpu":
        return NODE, reason
    if not found.gpus:
        return next(recipe for size, recipe in CARDS if recipe.card == "RTX 4090"), f"{reason}; no NVIDIA GPU here, so the plan is for an RTX 4090"
    fits = [recipe for size, recipe in CARDS if found.vram >= size]
    if not fits:
        raise UserError(f"tier 1gpu starts at {smallest} GiB of GPU memory, {found.gpu} has {found.vram:.1f}: use TIER=cpu")
    return fits[0], reason


# ---------------------------------------------------------------------------------------------------------------------
# What it takes

def horizon(recipe):
    """Tokens of base training that the recipe asks for; -1 = those that nanochat/schedule.py chooses for the depth."""
    if recipe.tokens == -1 and recipe.tokens_per_param != schedule.TOKENS_PER_PARAM:
        return recipe.tokens_per_param * schedule.scaling_params(recipe.depth, recipe.vocab_size)
    return recipe.tokens


def base_plan(recipe):
    """nanochat/schedule.py's Plan of base training."""
    given = lambda value: value if value > 0 else None
    return schedule.plan(recipe.depth, recipe.vocab_size, recipe.seq_len, tokens=given(horizon(recipe)), batch_tokens=given(recipe.batch_tokens))


def later_steps(recipe):
    """Steps of (mid-training, fine-tuning), each as long as a step of base training."""
    steps = base_plan(recipe).steps
    return (recipe.mid_steps if recipe.mid_steps > 0 else max(1, steps // 10), recipe.sft_steps if recipe.sft_steps > 0 else max(1, steps // 16))


def shards(recipe):
    """Reference shards that hold the text of base and mid-training."""
    plan = base_plan(recipe)
    chars = (plan.steps + later_steps(recipe)[0]) * plan.batch_tokens * CHARS_PER_TOKEN
    return max(8, round(chars * SPARE_SHARDS / SHARD_CHARS))


def shape(recipe):
    """What nanochat/cost.py takes."""
    plan = base_plan(recipe)
    return SimpleNamespace(vocab_size=recipe.vocab_size, seq_len=recipe.seq_len, layers=recipe.depth, heads=plan.heads, kv_heads=plan.heads, width=plan.width, short_layers=(), short_window=0, previous=cost.PREVIOUS)


def hours(recipe, memory, shards):
    """An estimate of the whole run; shards = how many are downloaded."""
    if recipe.minutes is not None:
        return recipe.minutes / 60
    plan = base_plan(recipe)
    tokens = (plan.steps + sum(later_steps(recipe))) * plan.batch_tokens
    rate = recipe.peak * MFU / cost.train_flops(shape(recipe)) / (COTRAIN if memory else 1)
    return tokens / rate / 3600 + shards * SHARD_MB / DOWNLOAD_MB_S / 3600 + EVALUATION_H


def disk(recipe, shards):
    """GB that the run leaves: two checkpoints (--keep) of each of three stages with their optimizer, one more being written, and the shards."""
    counts = cost.parameter_counts(shape(recipe))
    total, matrices = counts["total"], counts["matrices"]
    checkpoint = 4 * total + 4 * matrices + 8 * (total - matrices)  # weights; momentum of Muon, two moments of AdamW
    return 7 * 1.1 * checkpoint / G + shards * SHARD_MB / 1000 + 0.2


def check_machine(found, recipe, disk):
    """Refuse a run, not a plan, that this machine cannot do. disk = GB that the run needs."""
    if recipe.device == "cuda" and found.gpus < recipe.processes:
        trouble = f" ({found.trouble})" if found.trouble else ""
        raise UserError(f"tier {recipe.tier} needs {recipe.processes} GPU(s), this machine shows {found.gpus}{trouble}: use another TIER, or "
                        "add --plan to see the commands only")
    if found.disk < disk:
        raise UserError(f"the run needs about {disk:.0f} GB in {base_dir()}, {found.disk:.0f} GB are free: make room, or set NANOCHAT_BASE_DIR to a larger place")
