"""
Which tricks of the recipe pay: the same small GPT trained with one of them taken out, at the same tokens.

python -m bench.ablate                                   # every trick, an hour or two on one CPU thread
python -m bench.ablate --seeds 0,1,2,3 --only "no softcap,no x0"     # these, beside the whole recipe

A variant is a patch on the model or the optimizer that lasts for one run. All variants of a seed start from the same weights where they have
them, and read the same rows in the same order, so a difference is paired: its spread over seeds says how sure it is. A trick pays where
taking it out costs more than twice the standard error of the mean. The last line is one JSON object.
"""
import argparse
import json
import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import PropertyMock, patch

import numpy as np
import torch
import torch.nn.functional as F

from nanochat import gpt as model
from nanochat import cross_entropy, hardware, muon, schedule
from nanochat.common import UserError, print0, run_main
from nanochat.dataloader import Loader, val_loader
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.optim import make_optimizer
from nanochat.report import table
from nanochat.tokenizer import Tokenizer
from nanochat.train import Curves


def add_flags(parser, seq_len, eval_tokens):
    """The flags of a bench that trains the same small model once for each variant and seed."""
    parser.add_argument("--source", default="stdlib", help="text to train on")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="in heads of 64")
    parser.add_argument("--max-seq-len", type=int, default=seq_len)
    parser.add_argument("--num-tokens", type=int, default=400_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=1.0, help="times the rates that follow from batch and horizon")
    parser.add_argument("--eval-tokens", type=int, default=eval_tokens)
    parser.add_argument("--seeds", default="0,1,2", help="comma list")
    parser.add_argument("--only", default="", help="comma list of variants (empty = all)")
    add_dtype(parser)
    add_data_dir(parser)


def add_dtype(parser):
    parser.add_argument("--dtype", default="auto", help="of training on the CPU: auto (bf16 where it multiplies that), bf16 or fp32; what is judged is read in fp32")


def mixed(asked):
    """A function whose context trains on the CPU in the format of --dtype, as base_train does there; and the format's name."""
    dtype, _ = hardware.pick_dtype(hardware.describe(torch.device("cpu")), asked)
    return (lambda: torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)), str(dtype).removeprefix("torch.")


def settle(args, variants):
    """What the flags ask for: (names of variants, the first of `variants` in front, seeds, tokenizer, GPTConfig, training text, validation text)."""
    use_data_dir(args.data_dir)
    names = [name.strip() for name in args.only.split(",")] if args.only else list(variants)
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise UserError(f"--only names no variant: {', '.join(unknown)}. There are: {', '.join(variants)}")
    if args.width % 64 or args.batch_tokens % args.max_seq_len:
        raise UserError(f"--width {args.width} must be a multiple of 64, and --batch-tokens {args.batch_tokens} of --max-seq-len {args.max_seq_len}")
    first, tokenizer, heads = next(iter(variants)), Tokenizer.load(), args.width // 64
    config = GPTConfig(tokenizer.vocab_size, args.max_seq_len, args.layers, heads, heads, args.width, tokenizer.bos)
    names = [first] + [name for name in names if name != first]
    return names, [int(seed) for seed in args.seeds.split(",")], tokenizer, config, open_source(args.source, "train"), open_source(args.source, "val")


parser = argparse.ArgumentParser(description="Take one trick at a time out of the recipe", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
add_flags(parser, seq_len=512, eval_tokens=131072)


def frozen(name, value):
    """A parameter that stays where it is put."""
    def apply(gpt):
        parameter = getattr(gpt, name)
        with torch.no_grad():
            (parameter.weight if isinstance(parameter, torch.nn.Module) else parameter).fill_(value)
        parameter.requires_grad_(False)
    return apply


def one_before(gpt):
    """An embedding that knows one token before it."""
    gpt.config = replace(gpt.config, previous=1)
    gpt.previous = torch.nn.Linear(gpt.config.width, gpt.config.width, bias=False)
    torch.nn.init.zeros_(gpt.previous.weight)


def identity(update, *_):
    return update


NO_QK_GAIN, NO_SOFTCAP = patch.object(model, "QK_GAIN", 1.0), patch.object(cross_entropy, "SOFTCAP", 1e4) # so wide that it bends nothing
NO_MUON_PLUS, NO_NORMUON = patch.object(muon, "snap_norm", identity), patch.object(muon, "normalize_variance", identity)


def no_scales(gpt):
    frozen("x0_scale", 0.0)(gpt)
    frozen("resid_scale", 1.0)(gpt)


# name: (patches that last for the run, what is done to the new model, settings of the optimizer, settings of the schedule)
VARIANTS = {
    "the whole recipe": ((), None, {}, {}),
    "no value embeddings": ((patch.object(GPTConfig, "value_layers", PropertyMock(return_value=[])),), None, {}, {}),
    "no tokens before": ((), frozen("previous", 0.0), {}, {}),
    "one token before": ((), one_before, {}, {}),
    "no x0": ((), frozen("x0_scale", 0.0), {}, {}),
    "nanochat's rate for x0": ((), None, dict(x0_lr=0.5), {}),
    "no residual scales": ((), frozen("resid_scale", 1.0), {}, {}),
    "no QK gain": ((NO_QK_GAIN,), None, {}, {}),
    "no softcap": ((NO_SOFTCAP,), None, {}, {}),
    "GELU": ((patch.object(model.MLP, "forward", lambda self, x: self.down(F.gelu(self.up(x)))),), None, {}, {}),
    "no Muon+": ((NO_MUON_PLUS,), None, {}, {}),
    "no NorMuon": ((NO_NORMUON,), None, {}, {}),
    "no weight decay": ((), None, dict(weight_decay=0.0), {}),
    "neither x0 nor residual scales": ((), no_scales, {}, {}), # each of these pairs does what the other half could do for it
    "neither Muon+ nor NorMuon": ((NO_MUON_PLUS, NO_NORMUON), None, {}, {}),
    "neither QK gain nor softcap": ((NO_QK_GAIN, NO_SOFTCAP), None, {}, {}),
    "none of these six": ((NO_QK_GAIN, NO_SOFTCAP, NO_MUON_PLUS, NO_NORMUON), no_scales, {}, {}),
    "warmdown 0.2": ((), None, {}, dict(warmdown_ratio=0.2)),
}


@contextmanager
def without(variant, config, seed, **settings):
    """A new model and its optimizer as the variant has them, while the block lasts -> (gpt, optimizer, settings of its schedule)."""
    patches, change, own, curve = VARIANTS[variant]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        torch.manual_seed(seed)
        gpt = GPT(config)
        if change is not None:
            change(gpt)
        yield gpt, make_optimizer(gpt, **settings | own), curve


def train(config, items, val_items, tokenizer, args, seed, variant):
    """-> (bits per byte on validation text, seconds)"""
    plan = schedule.plan(config.layers, config.vocab_size, config.seq_len, tokens=args.num_tokens, batch_tokens=args.batch_tokens)
    began, rows, (amp, _) = time.perf_counter(), args.batch_tokens // config.seq_len, mixed(args.dtype)
    with without(variant, config, seed, lr_scale=plan.lr_mult * args.lr * schedule.short_run(plan), weight_decay=0.28 * plan.weight_decay_mult) as (gpt, optimizer, curve):
        curves = Curves(plan.steps, **curve)
        with Loader(items, tokenizer, rows, config.seq_len, align=32, seed=seed) as loader:
            for step, batch in zip(range(plan.steps), loader):
                curves.apply(optimizer, step)
                with amp():
                    loss = gpt(batch.inputs, batch.targets, "sum") / batch.inputs.numel()
                loss.backward()
                optimizer.step(check=True)
                optimizer.zero_grad()
        gpt.eval()
        val = val_loader(val_items, tokenizer, rows, config.seq_len, align=32, max_rows=args.eval_tokens // config.seq_len)
        bpb = bits_per_byte(lambda batch: gpt(batch.inputs, batch.targets, "none"), val, tokenizer.token_bytes())
    return bpb, time.perf_counter() - began


def rows_of(found):
    """{variant: [bpb of each seed]} -> rows of the table and {variant: numbers}; a cost is paired with the whole recipe of the same seed."""
    whole = np.array(found["the whole recipe"])
    numbers = {}
    for name, values in found.items():
        cost = np.array(values) - whole[:len(values)]
        error = cost.std(ddof=1) / math.sqrt(len(cost)) if len(cost) > 1 else math.nan
        numbers[name] = dict(bpb=float(np.mean(values)), spread=float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                             cost=float(cost.mean()), standard_error=float(error))
    rows = [[name, f"{n['bpb']:.4f} +- {n['spread']:.4f}", "" if name == "the whole recipe" else f"{n['cost']:+.4f} +- {n['standard_error']:.4f}"] for name, n in numbers.items()]
    return rows, numbers


def main():
    args = parser.parse_args()
    names, seeds, tokenizer, config, items, val_items = settle(args, VARIANTS)
    found = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            bpb, seconds = train(config, items, val_items, tokenizer, args, seed, name)
            found[name].append(bpb)
            print0(f"seed {seed} {name:24s} {bpb:.4f} ({seconds:.0f} s)")
    rows, numbers = rows_of(found)
    print0(f"\n{args.layers} layers of {args.width}, rows of {args.max_seq_len}, {args.num_tokens} tokens of {args.source}, {mixed(args.dtype)[1]}, seeds {args.seeds}: bits per byte, and what taking the trick out costs (+- standard error)\n")
    print0(table(["variant", "bits per byte", "costs"], rows))
    print0(json.dumps(dict(source=args.source, dtype=mixed(args.dtype)[1], tokens=args.num_tokens, seeds=seeds, layers=args.layers, width=args.width, variants=numbers)))


if __name__ == "__main__":
    run_main(main)
