"""
One stage of training, from networks and data to a checkpoint folder: what base_train, mid_train and chat_sft share.

Resume, loader, log, validation, saving and the last line of the run live here; what a stage trains on, and how much of it, is
its script's business. The flags that all three take are here too.
"""
import argparse
from dataclasses import dataclass

import torch

from nanochat import backend, checkpoint, cost, fp8, hardware, schedule
from nanochat.common import UserError, checkpoint_dir, cleanup, print0, set_aside, setup
from nanochat.cross_entropy import piece_tokens
from nanochat.dataloader import Loader, gather_state, lanes_for, val_loader
from nanochat.dataset import add_data_dir, notes, use_data_dir
from nanochat.loss_eval import bits_per_byte
from nanochat.optim import make_optimizer
from nanochat.run import Log, Progress
from nanochat.train import Curves, LossScale, PlainObjective, added, compile_gpt, fit
from scripts.load import describe, modules


def add_step_flags(parser, curriculum, plain_every, labels_every, reconstruct_every=0, asked=0.5, opens=2):
    """The flags that decide what a training step is; bench/train.py takes them too."""
    parser.add_argument("--max-seq-len", type=int, default=2048, help="tokens a row; a multiple of 32")
    parser.add_argument("--batch-tokens", type=int, default=-1, help="tokens a step, over all processes (-1 = from depth and horizon, or as in the stage before; in whole rows for each process)")
    parser.add_argument("--device-batch", type=int, default=-1, help="rows a forward on one device; halve it when memory runs out (-1 = what fits, in a resumed run as many as before)")
    parser.add_argument("--curriculum", default=curriculum, help="children a gist : up to which share of the steps")
    parser.add_argument("--plain-every", type=int, default=plain_every, help="one round of eight rows in so many is read without gists, as a model without a memory reads")
    parser.add_argument("--labels-every", type=int, default=labels_every, help="one round of eight rows in so many is measured for LensNet, once gists are of 32 tokens: what opening one is worth; where that one is read without gists, the next")
    parser.add_argument("--reconstruct-every", type=int, default=reconstruct_every, help="one block in so many, of the rows with gists, is also read behind its own gist and nothing else (0 = none)")
    parser.add_argument("--asked", type=float, default=asked, help="share of the rows with gists of 32 tokens in which LensNet opens blocks for every block that reads, as in a session, besides those opened by chance")
    parser.add_argument("--opens", type=int, default=opens, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, bf16, fp32, or fp16 on a GPU (its loss is scaled, and a step that overflows is skipped); a resumed run may go on in another one")
    parser.add_argument("--fp8", action="store_true", help="products of the large layers in 8 bits: GPUs of compute capability 8.9 or more")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="compile the networks and the optimizer (default: on a GPU; on a CPU it takes minutes and brings nothing)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="keep one vector a layer and token, and compute the layers again in backward: less memory, a third more time")


def add_flags(parser, **step):
    """The flags of every stage. step: as in add_step_flags()."""
    add_step_flags(parser, **step)
    parser.add_argument("--run", default="", help="name of a wandb run (empty = no wandb)")
    parser.add_argument("--eval-every", type=int, default=-1, help="validate every N steps (-1 = at the end only)")
    parser.add_argument("--eval-tokens", type=int, default=262144, help="validation tokens")
    parser.add_argument("--save-every", type=int, default=-1, help="checkpoint every N steps (-1 = at the end only)")
    parser.add_argument("--keep", type=int, default=2, help="checkpoints of this run that stay, the newest N (-1 = all)")
    parser.add_argument("--log-every", type=int, default=10, help="a line every N steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this tag, if there is one; without it, what an earlier run left under this tag is set aside under another name")
    add_data_dir(parser)


@dataclass
class Place:
    """Where a stage runs."""
    device: torch.device
    dist: object
    machine: object
    amp: object    # dtype of mixed precision, or None
    compile: bool


def check_numbers(args):
    """Refuse numbers that no run can mean, before anything is built or read. Flags that a script does not have are passed over."""
    def check(flag, able, expected):
        if hasattr(args, flag) and not able(getattr(args, flag)):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {expected}")
    for flag in ("num_tokens", "num_steps", "batch_tokens", "eval_every", "save_every", "keep", "top_k"):
        check(flag, lambda value: value == -1 or value >= 1, "at least 1, or -1 for what --help says")
    for flag in ("log_every", "eval_tokens", "digits", "examples", "samples", "max_tokens", "eval_examples", "eval_samples"):
        check(flag, lambda value: value >= 1, "at least 1")
    check("lr", lambda value: 0 < value < float("inf"), "a number above 0, it multiplies the learning rates")
    check("temperature", lambda value: 0 < value <= 100, "a number above 0, up to 100")
    for flag in ("reconstruct_every", "opens"):
        check(flag, lambda value: value >= 0, "0 or more")
    check("asked", lambda value: 0 <= value <= 1, "a share from 0 to 1")
    check("seed", lambda value: 0 <= value < 2**63, "0 or more, below 2^63")


def start(args):
    """Device, processes and precision. Called before any network is built or text opened."""
    check_numbers(args)
    if args.device_batch != -1 and args.device_batch < 1:
        raise UserError(f"--device-batch {args.device_batch}: expected at least 1, or -1 for what fits")
    if args.max_seq_len % 32 or args.max_seq_len < 64:
        raise UserError(f"--max-seq-len {args.max_seq_len}: expected a multiple of 32, the block of the memory tree, and at least 64")
    if args.plain_every < 2:
        raise UserError(f"--plain-every {args.plain_every}: expected at least 2, or every row is read without gists; base_train --plain trains without a memory")
    if args.labels_every < 2: # more than every second round, and some of them would be plain
        raise UserError(f"--labels-every {args.labels_every}: expected at least 2, every second round of rows")
    use_data_dir(getattr(args, "data_dir", "")) # a bench opens no text
    device, dist = setup(args.device, args.seed)
    machine = hardware.describe(device)
    dtype, why = hardware.pick_dtype(machine, args.dtype)
    if args.fp8:
        fp8.check(machine, dtype)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    print0(f"machine     {machine.name}, {dist.world} process(es); {str(dtype)[6:]}, {why}{'; fp8 products' * args.fp8}; {'compiled' if compiled else 'not compiled'}")
    return Place(device, dist, machine, None if dtype == torch.float32 else dtype, compiled)


def given(value):
    """A flag's value, or None where -1 stands for 'you decide'."""
    return None if value == -1 else value


SMALLER = "Free what other programs hold of it, take a device with more, or train a smaller model (base_train --depth)" # where fewer rows do not help


@hardware.out_of_memory_told("while the device took the networks and their optimizer, before any step", SMALLER)
def equip(args, place, networks, plan, rates=1.0, before=None):
    """
    Bring the networks to the device in the formats that the flags ask for, pick what computes attention there, find what steps them:
    (objective, optimizer, loss scale or None, rows a forward, forwards a step). plan, rates: as in train(); before: as in most_rows().
    """
    gpt, gistnet, lensnet = (network and network.to(place.device).train() for network in networks)
    config, world, dtype = gpt.config, place.dist.world, place.amp or torch.float32
    gpt.checkpoint_activations = args.checkpoint_activations
    if args.fp8:
        print0(f"fp8         {fp8.convert(gpt)} layers")
    most, why = most_rows(place, args, config, gistnet, before)
    print0(f"memory      {why}")
    rows = schedule.fit_rows(plan.batch_tokens, most, args.max_seq_len, world)
    accumulate = schedule.accumulation(plan.batch_tokens, rows, args.max_seq_len, world)
    extra = {name: module for name, module in modules(gpt, gistnet, lensnet).items() if name != "gpt"}
    optimizer = make_optimizer(gpt, extra, place.dist, compile=place.compile, dtype=place.amp, lr_scale=plan.lr_mult * rates, weight_decay=0.28 * plan.weight_decay_mult)
    pick_attention(gpt, place.machine, dtype)
    objective = PlainObjective(gpt) if gistnet is None else co_training(gpt, gistnet, lensnet, args, place.machine, dtype)
    if place.compile:
        compile_gpt(gpt)
    return objective, optimizer, LossScale() if place.amp == torch.float16 else None, rows, accumulate


def train(stage, tag, args, place, networks, tokenizer, plan, items, val_items, *, identity, final=0.05, rates=1.0, warmdown=0.65, first_optimizer=None):
    """
    networks         (gpt, gistnet, lensnet), the last two None for a plain run
    plan             nanochat.schedule.Plan: steps, batch_tokens, lr_mult, weight_decay_mult
    items, val_items what nanochat.dataloader.Loader takes
    identity         what a checkpoint must agree on to be resumed, besides the networks: {"source": ...}
    rates            multiplies every learning rate
    first_optimizer  optimizer state of the stage before, to start warm
    Returns the metrics of the last validation.
    """
    device, dist, folder = place.device, place.dist, checkpoint_dir(stage, tag)
    before = checkpoint.read_meta(checkpoint.find(folder)) if args.resume and checkpoint.steps(folder) else None
    objective, optimizer, scale, rows, accumulate = equip(args, place, networks, plan, rates, before)
    gpt, gistnet, lensnet = networks
    named = modules(gpt, gistnet, lensnet)
    about = describe(gpt, gistnet, lensnet, tokenizer)
    config = gpt.config
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in named.items()}
    print0(f"model       d{config.layers}: " + ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items()) + " parameters")
    print0(f"plan        {plan.steps} steps x {plan.batch_tokens} tokens = {plan.tokens / 1e6:.2f}M; {accumulate} x {rows} rows x {args.max_seq_len} tokens on each process")
    for note in notes(items):
        print0(f"text        {note}")

    identity = dict(identity, batch_tokens=plan.batch_tokens, steps=plan.steps, seed=args.seed)
    begin, loader_state, lanes = 0, None, lanes_for(dist.world)
    if before:
        saved = resume(folder, named, optimizer, about, identity, args)
        begin, loader_state, lanes = saved["step"], saved["loader"], saved["loader"]["settings"]["lanes"]
        if scale is not None and saved.get("loss_scale"):
            scale = LossScale(**saved["loss_scale"])
    elif first_optimizer is not None:
        with hardware.out_of_memory_told("while the optimizer of the stage before was read, before any step", SMALLER):
            optimizer.load_state_dict(first_optimizer, partial=True)
    deal = dict(align=32, rank=dist.rank, world=dist.world, lanes=lanes, pin=device.type == "cuda") # a copy to the GPU need not wait then
    loader = Loader(items, tokenizer, rows, args.max_seq_len, seed=args.seed, state=loader_state, **deal)
    val = val_loader(val_items, tokenizer, rows, args.max_seq_len, max_rows=max(1, args.eval_tokens // args.max_seq_len), **deal)
    if not args.resume:
        begin_folder(folder, dist)
    log = Log(folder, wandb_project=f"nanochat-{stage}", run=args.run, config=vars(args), main=dist.main)
    print0(f"output      checkpoints and log.jsonl in {folder}")

    def evaluate(step):
        gpt.eval()
        with torch.autocast(device.type, dtype=place.amp, enabled=place.amp is not None):
            bpb = bits_per_byte(lambda batch: gpt(batch.inputs, batch.targets, "none"), (batch.to(device) for batch in val), tokenizer.token_bytes(), dist.world, device)
        gpt.train()
        last.update(val_bpb=bpb)
        return last

    def save(step):
        meta = dict(identity, networks=about, args=vars(args), rows=rows, world=dist.world, loader=gather_state(loader), rng=checkpoint.rng_state(), skipped=optimizer.skipped, loss_scale=scale and scale.state())
        checkpoint.save(folder, step, named, optimizer, meta, keep=given(args.keep), main=dist.main)

    last = {}
    progress = Progress(plan.steps, plan.batch_tokens, cost.train_flops(config), place.machine.peak_flops and place.machine.peak_flops * dist.world, start=begin)
    if begin < plan.steps:
        fit(objective, optimizer, loader, Curves(plan.steps, warmdown_ratio=warmdown, final=final), log=log, progress=progress, dist=dist, device=device, start=begin,
            accumulate=accumulate, amp=place.amp, scale=scale, evaluate=evaluate, eval_every=args.eval_every, save=save, save_every=args.save_every, log_every=args.log_every)
    else:
        with hardware.out_of_memory_told(f"in the validation; the checkpoint of step {begin} is kept"):
            evaluate(begin) # everything was trained and saved before the last run ended; its numbers are still owed
    log.summary(stage=stage, tag=tag, **last, steps=plan.steps, tokens=plan.tokens, flops=cost.train_flops(config) * plan.tokens, peak_mb=hardware.peak_memory(device) / 2**20,
                params=sum(counts.values()), gists=int(gistnet is not None), seed=args.seed, skipped_steps=optimizer.skipped, **read(loader, dist), **progress.summary())
    log.close()
    loader.close()
    cleanup()
    return last


@hardware.out_of_memory_told("while the last checkpoint was read, which stays as it is", SMALLER)
def resume(folder, named, optimizer, about, identity, args):
    """Bring networks, optimizer and generators to the last checkpoint of a folder; returns its meta."""
    saved, same = checkpoint.load(folder), same_flags(args)
    told = dict(asked=0.5, opens=2) | saved.meta["args"] # what every run had before there were such flags
    checkpoint.check_match(saved.meta | {flag: told.get(flag) for flag in same}, networks=about, **identity | same)
    for name, module in named.items():
        module.load_state_dict(saved.tensors[name])
    optimizer.load_state_dict(saved.optimizer)
    optimizer.skipped = saved.meta.get("skipped", 0)
    checkpoint.set_rng_state(saved.meta["rng"])
    print0(f"resume      from step {saved.step} of {folder}")
    return saved.meta


def same_flags(args):
    """Flags that decide what a run learns and that nothing else in a checkpoint tells of: whoever resumes it gives the same. {flag: value}"""
    flags = ("lr", "fp8", "documents") + (() if getattr(args, "plain", False) else ("curriculum", "plain_every", "labels_every", "reconstruct_every", "asked", "opens"))
    return {flag: getattr(args, flag) for flag in flags if hasattr(args, flag)}


def begin_folder(folder, dist):
    """Set aside what an earlier run left where a new one will write: its checkpoints of higher steps would outlive the new ones, and its log go on in the new one's."""
    if dist.main and folder.exists():
        print0(f"set aside   {folder} of an earlier run, now {set_aside(folder).name}")


def pick_attention(gpt, machine, dtype):
    """Give the GPT what computes plain attention here, and print which and why."""
    config = gpt.config
    kernel = backend.pick_causal(machine, gpt.device, dtype, config.heads, config.kv_heads, config.head_width)
    gpt.flash = kernel.run
    print0(f"attention   {kernel}" + (f"; windows {config.windows}, S = {config.short_window} tokens" if config.short_layers else ""))


def co_training(gpt, gistnet, lensnet, args, machine, dtype):
    """The objective of a run with memory; prints what computes attention in its rows with gists."""
    from megacontext.layout import block_mask, stretches, trial_masks # only where memory is asked for
    from megacontext.losses import CoTraining, CoTrainingOptions, parse_curriculum
    config = gpt.config
    kernel = backend.pick_masked(machine, gpt.device, dtype, config.heads, config.kv_heads, config.head_width, trial_masks)
    print0(f"            for rows with gists {kernel}")
    options = CoTrainingOptions(seed=args.seed, curriculum=parse_curriculum(args.curriculum), plain_every=args.plain_every, labels_every=args.labels_every,
                                reconstruct_every=args.reconstruct_every, asked=args.asked, opens=args.opens)
    return CoTraining(gpt, gistnet, lensnet, options, block_mask if kernel.name == "FlexAttention" else stretches)


def read(loader, dist):
    """What was read and what of it was lost, over the whole run and all ranks; the loader says what each means."""
    names = ("documents", "empty", "cropped", "cut", "skipped", "padded")
    return {name: int(count) for name, count in added({name: loader.stats[name] for name in names}, dist).items()}


def most_rows(place, args, config, gistnet, before=None):
    """
    (most rows of a forward on one device, why). before: meta of the checkpoint that the run goes on from, or None. Its rows are taken again where they
    still fit, whatever more there is room for now: others add up the same numbers in another order.
    """
    if given(args.device_batch):
        return args.device_batch, f"at most {args.device_batch} rows per device, as --device-batch asks"
    dtype, beside = place.amp or torch.float32, 0
    if gistnet is not None:
        from megacontext.cost import training_bytes
        from megacontext.losses import parse_curriculum
        beside = max(training_bytes(gistnet.config, config, block, hardware.SAVED_BYTES[dtype], args.reconstruct_every) for block, _ in parse_curriculum(args.curriculum))
    most, why = hardware.device_rows(place.machine, config, cost.parameter_counts(config), dtype, place.dist.world,
                                     piece_tokens(place.device.type, config.vocab_size), args.checkpoint_activations, beside)
    rows = before.get("rows") if before and before.get("world") == place.dist.world else None # an older checkpoint does not say
    if rows is None:
        return most, why
    return (rows, f"{rows} rows per device, as before; {why}") if rows <= most else (most, f"{why}; it was {rows} rows before, so losses are the same to rounding only")
