"""
Which parts of co-training pay: the same small GPT, GistNet and LensNet trained with one thing changed, at the same tokens.

python -m bench.recipe                                          # every variant
python -m bench.recipe --seeds 0,1,2 --only "no curriculum,two rounds"
python -m bench.recipe --checkpoint base/d4 --num-tokens 245760 --lr 0.5    # the same trained networks go on, where gists carry something already
python -m bench.recipe --checkpoint base/d4 --new-memory --num-tokens 245760 --lr 0.5    # a trained GPT goes on with new GistNet and LensNet: gists carry something soon

All variants of a seed start from the same weights where they have them and read the same rows in the same order; all are judged on the same
validation rows, so differences are paired. In nats per token over the last quarter of rows that are read within an eighth of their length, but for the first:
    bpb         bits per byte of plain reading, which the memory must not hurt
    window      what recency with gists is better by than a sliding window
    none        ... than the same without its gists
    swapped     ... than the same with gists of another document
    raw         what the choice of LensNet is better by than recency
    sinks       what a window is better by with one of its blocks given to the row's first
    decoded     what a token of a block costs behind nothing, less what it costs behind the block's gist
Positive is good everywhere but in bpb. The last line is one JSON object.
"""
import argparse
import json
import math
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch

from bench.ablate import add_flags, mixed, settle
from megacontext import losses, probes
from megacontext.evaluate import Networks, Rows, swapped
from megacontext.contexts import chosen_table, recency_table, window_table
from megacontext.gistnet import GistConfig, GistNet
from megacontext.layout import HIDDEN
from megacontext.lensnet import LensConfig, LensNet
from megacontext.losses import CoTraining, CoTrainingOptions
from nanochat import schedule
from nanochat.common import UserError, print0, run_main
from nanochat.dataloader import Loader, val_loader
from nanochat.gpt import GPT
from nanochat.loss_eval import bits_per_byte
from nanochat.optim import make_optimizer
from nanochat.report import table
from nanochat.train import Curves
from scripts.base_train import parser as training
from scripts.load import load_stage
from scripts.mega_eval import long_documents, parts, sample_rows

parser = argparse.ArgumentParser(description="Change one thing at a time in co-training", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
add_flags(parser, seq_len=1024, eval_tokens=65536)
parser.add_argument("--documents", type=int, default=16, help="validation rows that the memory is judged on")
parser.add_argument("--checkpoint", default="", help="stage/tag of a checkpoint with memory that every variant goes on from, with gists of 32 tokens: its shape instead of --layers and --width, and --lr times its rates (empty = new networks)")
parser.add_argument("--new-memory", action="store_true", help="with --checkpoint: only its GPT goes on; GistNet and LensNet are new, and begin with the curriculum")


class FromEmptySlot(GistNet):
    """A gist that is what the slot found, without the mean of its children."""

    def __init__(self, config):
        super().__init__(config)
        torch.nn.init.normal_(self.widen.weight, std=config.inner ** -0.5)

    def begin(self, children):
        return torch.zeros_like(children[:, 0])


class LateGists(CoTraining):
    """No row with gists before a fifth of the steps."""
    begin = 0.2

    def start_step(self, step, total):
        super().start_step(step, total)
        self.options = replace(self.options, plain_every=1 if step < self.begin * total else CoTrainingOptions().plain_every)


class LaterGists(LateGists):
    """... before half of them."""
    begin = 0.5


# name: (settings of GistConfig, settings of CoTrainingOptions, classes in place of GistNet and CoTraining, patches while it lasts)
VARIANTS = {
    "as it is": ({}, {}, {}, ()),
    "no curriculum": ({}, dict(curriculum=((32, 1.0),)), {}, ()),
    "curriculum from 4": ({}, dict(curriculum=((4, 0.15), (8, 0.3), (16, 0.5), (32, 1.0))), {}, ()),
    "two rounds": (dict(layers=2), {}, {}, ()),
    "from an empty slot": ({}, {}, dict(GistNet=FromEmptySlot), ()),
    "raw tail up to 256": ({}, dict(tail=(0, 256)), {}, ()),
    "raw tail up to 1,024": ({}, dict(tail=(0, 1024)), {}, ()),
    "no reconstruction": ({}, dict(reconstruct_every=0), {}, ()),
    "one block in four reconstructed": ({}, dict(reconstruct_every=4), {}, ()),
    "one block in sixteen reconstructed": ({}, dict(reconstruct_every=16), {}, ()),
    "half of the rows plain": ({}, dict(plain_every=2), {}, ()),
    "gists after a fifth": ({}, {}, dict(CoTraining=LateGists), ()),
    "gists after a half": ({}, {}, dict(CoTraining=LaterGists), ()),
    "twice as many labels": ({}, dict(reading_tokens=256), {}, ()),
    "half as many labels": ({}, dict(labels_every=4), {}, ()),
    "LensNet opens nothing": ({}, dict(asked=0.0), {}, ()),
    "LensNet opens five": ({}, dict(opens=5), {}, ()),
    "LensNet opens five in every row": ({}, dict(asked=1.0, opens=5), {}, ()),
    "no values for gists": ({}, {}, {}, (patch.object(losses, "pool_values", lambda values, fan: torch.zeros_like(values[:, ::fan][:, :values.size(1) // fan])),)),
}


def goes_on(variant):
    """Whether networks that are trained already can go on with a variant: it changes neither them nor how gists begin."""
    gist, options, classes, _ = VARIANTS[variant]
    return not gist and "curriculum" not in options and "GistNet" not in classes and not issubclass(classes.get("CoTraining", CoTraining), LateGists)


@contextmanager
def changed(variant, config, seed, checkpoint="", new_memory=False):
    """The objective with networks as the variant has them, new ones or a checkpoint's, while the block lasts."""
    gist, options, classes, patches = VARIANTS[variant]
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        torch.manual_seed(seed)
        loaded = load(checkpoint, config.seq_len) if checkpoint else None
        gpt = loaded.gpt.train() if loaded else GPT(config)
        if loaded and not new_memory:
            networks, options = (gpt, loaded.gistnet.train(), loaded.lensnet.train()), dict(curriculum=((32, 1.0),)) | options
        else:
            torch.manual_seed(seed)
            networks = gpt, classes.get("GistNet", GistNet)(replace(GistConfig.for_gpt(config), **gist)), LensNet(LensConfig())
        yield classes.get("CoTraining", CoTraining)(*networks, CoTrainingOptions(seed=seed, **dict(reconstruct_every=training.get_default("reconstruct_every")) | options))


def load(checkpoint, seq_len):
    """The networks of "stage/tag", for rows of seq_len; UserError where it has no memory."""
    stage, _, tag = checkpoint.partition("/")
    loaded = load_stage(stage, tag or None, seq_len=seq_len)
    if loaded.gistnet is None:
        raise UserError(f"--checkpoint {checkpoint}: expected one with memory, this one was trained with --plain")
    return loaded


def train(config, items, val_items, texts, tokenizer, args, seed, variant):
    """-> ({column: number}, seconds)"""
    plan = schedule.plan(config.layers, config.vocab_size, config.seq_len, tokens=args.num_tokens, batch_tokens=args.batch_tokens)
    began, rows, (amp, _) = time.perf_counter(), args.batch_tokens // config.seq_len, mixed(args.dtype)
    with changed(variant, config, seed, args.checkpoint, args.new_memory) as objective:
        gpt, gistnet, lensnet = objective.gpt, objective.gistnet, objective.lensnet
        optimizer = make_optimizer(gpt, dict(gistnet=gistnet, lensnet=lensnet), lr_scale=plan.lr_mult * args.lr * (args.rates or schedule.short_run(plan)), weight_decay=0.28 * plan.weight_decay_mult)
        curves = Curves(plan.steps, **dict(warmdown_ratio=1.0, final=0.1) if args.checkpoint else {}) # as mid-training goes on
        with Loader(items, tokenizer, rows, config.seq_len, align=32, seed=seed) as loader:
            for step, batch in zip(range(plan.steps), loader):
                curves.apply(optimizer, step)
                objective.start_step(step, plan.steps)
                with amp():
                    loss, _ = objective(batch)
                loss.backward()
                optimizer.step(check=True)
                optimizer.zero_grad()
        val = val_loader(val_items, tokenizer, rows, config.seq_len, align=32, max_rows=args.eval_tokens // config.seq_len)
        found = dict(bpb=bits_per_byte(lambda batch: gpt(batch.inputs, batch.targets, "none"), val, tokenizer.token_bytes()))
        found |= judge(Networks(gpt, gistnet, lensnet), sample_rows(texts, config.seq_len, args.documents, np.random.default_rng(seed))[0])
    return found, time.perf_counter() - began


@torch.no_grad()
def judge(networks, rows):
    """{column: number} of validation rows (B, T + 1), read within T / 8 entries."""
    found = {}
    for part in parts(rows, 4):
        some = Rows(networks, part, (rows.size(1) - 1) // 8, np.random.default_rng(0))
        tail, near = some.T // 4, recency_table(some.Q, some.W)
        nats = lambda *view: some.nats(*view).mean(dim=1)
        own = nats(near, tail)
        views = dict(window=(window_table(some.Q, some.W), tail), none=(recency_table(some.Q, some.W, older=HIDDEN), tail), swapped=(near, tail, swapped(some.entries, some.T)))
        for name, view in views.items():
            found.setdefault(name, []).append(nats(*view) - own)
        found.setdefault("raw", []).append(own - nats(some.tables(chosen_table, some.scores["lensnet"]), tail))
        found.setdefault("sinks", []).append(nats(window_table(some.Q, some.W), tail) - nats(window_table(some.Q, some.W, sinks=True), tail))
        decoded = probes.reconstruction(some)[1]
        found.setdefault("decoded", []).append(torch.tensor(decoded["nothing"]) - torch.tensor(decoded["own"]))
    return {name: torch.cat(values).mean().item() for name, values in found.items()}


def told(name, found, first):
    """A row of the table: the means over seeds, and the standard errors of the difference to the first variant of the same seeds."""
    cells = []
    for column in first[0]:
        values, base = (np.array([one[column] for one in runs]) for runs in (found, first))
        error = (values - base[:len(values)]).std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 and found is not first else math.nan
        cells.append(f"{values.mean():.4f}" + ("" if math.isnan(error) else f" +- {error:.4f}"))
    return [name, *cells]


def main():
    args = parser.parse_args()
    names, seeds, tokenizer, config, items, val_items = settle(args, VARIANTS)
    args.rates = None # of a run from nothing they follow from its length
    if args.new_memory and not args.checkpoint:
        raise UserError("--new-memory: expected --checkpoint beside it, whose GPT goes on; without one all networks are new anyway")
    if args.checkpoint:
        loaded = load(args.checkpoint, args.max_seq_len)
        config, args.rates = loaded.gpt.config, loaded.meta["lr"]
        args.layers, args.width = config.layers, config.width
        late = [] if args.new_memory else [name for name in names if not goes_on(name)]
        if args.only and late:
            raise UserError(f"--only {','.join(late)}: a variant that changes the networks, or how gists begin, cannot go on from --checkpoint; leave one of the two out, or add --new-memory")
        names = [name for name in names if name not in late]
    first = names[0]
    texts = long_documents(val_items, tokenizer, args.max_seq_len)
    found = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            numbers, seconds = train(config, items, val_items, texts, tokenizer, args, seed, name)
            found[name].append(numbers)
            print0(f"seed {seed} {name:24s} " + " ".join(f"{key} {value:.4f}" for key, value in numbers.items()) + f" ({seconds:.0f} s)")
    print0(f"\n{args.layers} layers of {args.width}{f' of {args.checkpoint}' * bool(args.checkpoint)}{', GistNet and LensNet new' * args.new_memory}, rows of {args.max_seq_len}, {args.num_tokens} tokens of {args.source}, {mixed(args.dtype)[1]}, seeds {args.seeds}; +- is the standard error of the difference to the first line\n")
    print0(table(["variant", *found[first][0]], [told(name, runs, found[first]) for name, runs in found.items()]))
    print0(json.dumps(dict(vars(args), dtype=mixed(args.dtype)[1], variants=found)))


if __name__ == "__main__":
    run_main(main)
