"""
How well a block's own words can be read off its gist, if the networks learn nothing else: the best case of reconstruction, by width and training.

python -m bench.gist_words                                        # widths of 128 and 256, 250 and 1,000 steps, an hour or two of one CPU thread
python -m bench.gist_words --widths 256 --steps 1000 --seeds 0,1,2

The GPT, GistNet and optimizer as everywhere, from scratch on real text. A block's tokens are read as if they were said anew right behind its span: they see its
gist and each other, causally, and nothing else, and the loss is that of tokens 2 to 32. megacontext/probes.py measures the same of networks that
learnt to read. Blocks grow from 8 tokens to 32, as in co-training; each length of training is a run of its own, whose rates fall to zero.

In nats a token of validation text: behind the block's gist, behind that of another row, behind nothing. The last line is one JSON object.
"""
import argparse
import json
import time
from contextlib import nullcontext

import numpy as np
import torch

from bench.ablate import add_dtype, mixed
from megacontext.evaluate import swapped
from megacontext.gistnet import GistConfig, GistNet
from megacontext.layout import FAN, GIST, HIDDEN, entry_positions, stretches
from megacontext.losses import CoTrainingOptions, row_entries
from nanochat.common import UserError, print0, run_main
from nanochat.dataloader import Loader, val_loader
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.gpt import GPT, IGNORE, GPTConfig
from nanochat.optim import make_optimizer
from nanochat.report import table
from nanochat.tokenizer import Tokenizer
from scripts.recall import numbers

VIEWS = ("own", "other", "nothing") # gists

parser = argparse.ArgumentParser(description="Reconstruction of a block from its gist, by width and training", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--source", default="stdlib", help="text to train on")
parser.add_argument("--widths", default="128,256", help="of the GPT and its gists, in heads of 64, comma list")
parser.add_argument("--steps", default="250,1000", help="of training, comma list")
parser.add_argument("--inner", type=int, default=-1, help="width inside GistNet (-1 = as it follows from the GPT's)")
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--rows", type=int, default=16, help="of a step")
parser.add_argument("--max-seq-len", type=int, default=256)
parser.add_argument("--lr", type=float, default=0.5, help="times the reference rates")
parser.add_argument("--eval-rows", type=int, default=128)
parser.add_argument("--seeds", default="0", help="comma list")
add_dtype(parser)
add_data_dir(parser)


def block_nats(gpt, gistnet, batch, K, view, reduction="mean"):
    """Nats of tokens 2 to K of each block of a batch, read behind a gist: "mean", or "none" for (B, T) with zeros elsewhere. view: one of VIEWS."""
    (B, T), device = batch.inputs.shape, batch.inputs.device
    entries = row_entries(gpt, gistnet, batch.inputs, K)
    if view == "other":
        entries = swapped(entries, T)
    own = torch.eye(T // K, dtype=torch.long, device=device) * GIST if view != "nothing" else torch.full((T // K, T // K), HIDDEN, device=device)
    place, positions = torch.arange(T, device=device), entry_positions(T, K, device=device).clone()
    positions[0, :T] = (place // K + 1) * K + place % K # where the gist's span ends
    hidden = gpt.trunk(entries, positions, stretches(own.expand(B, -1, -1), K))
    return gpt.loss(hidden[:, :T], batch.targets.masked_fill(place % K == K - 1, IGNORE), reduction) # the last target is the next block's


def learn(gpt, gistnet, batches, steps, lr, amp=nullcontext):
    """Rates rise over the first tenth of the steps and fall over the last third. amp: the context of a forward."""
    optimizer = make_optimizer(gpt, dict(gistnet=gistnet), lr_scale=lr)
    for step, batch in zip(range(steps), batches):
        optimizer.set_schedule(min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.33 * steps)))
        K = next(block for block, share in CoTrainingOptions().curriculum if step < share * steps)
        with amp():
            loss = block_nats(gpt, gistnet, batch, K, "own")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def judge(gpt, gistnet, batches):
    """{view: nats a token} of blocks of 32, of the batches that have another row's gist to offer."""
    sums, count = dict.fromkeys(VIEWS, 0.0), 0
    for batch in batches:
        if len(batch.inputs) < 2:
            continue
        for view in VIEWS:
            sums[view] += block_nats(gpt, gistnet, batch, FAN, view, "none").sum().item()
        last = torch.arange(batch.targets.size(1), device=batch.targets.device) % FAN == FAN - 1
        count += ((batch.targets != IGNORE) & ~last).sum().item()
    if not count:
        raise UserError("the validation text does not fill two rows: name a larger --source, or shorten them (--max-seq-len)")
    return {view: total / count for view, total in sums.items()}


def settle(args):
    """(widths, lengths of training, seeds) of the flags; UserError for what cannot be run."""
    widths, lengths, seeds = (numbers(text) for text in (args.widths, args.steps, args.seeds))
    if not (widths and lengths and seeds) or any(width < 64 or width % 64 for width in widths) or min(lengths) < 1:
        raise UserError(f"--widths {args.widths} --steps {args.steps} --seeds {args.seeds}: expected multiples of 64, at least one step, and a seed")
    if args.max_seq_len < FAN or args.max_seq_len % FAN or args.rows < 2 or args.eval_rows < args.rows or args.eval_rows % args.rows or args.inner != -1 and (args.inner < 8 or args.inner % 8):
        raise UserError(f"--max-seq-len {args.max_seq_len} --rows {args.rows} --eval-rows {args.eval_rows} --inner {args.inner}: expected whole blocks of {FAN} tokens, at least two rows "
                        "(another gist is that of the next row), whole batches to judge by, and a multiple of 8 or -1")
    return widths, lengths, seeds


def main():
    args = parser.parse_args()
    widths, lengths, seeds = settle(args)
    use_data_dir(args.data_dir)
    tokenizer, items, val_items = Tokenizer.load(), open_source(args.source, "train"), open_source(args.source, "val")
    (amp, args.dtype), found, began = mixed(args.dtype), {}, time.perf_counter()
    for width in widths:
        config = GPTConfig(tokenizer.vocab_size, args.max_seq_len, args.layers, width // 64, width // 64, width, tokenizer.bos)
        inner = GistConfig.for_gpt(config).inner if args.inner == -1 else args.inner
        for steps in lengths:
            for seed in seeds:
                torch.manual_seed(seed)
                gpt, gistnet = GPT(config), GistNet(GistConfig(width, inner))
                with Loader(items, tokenizer, args.rows, config.seq_len, align=FAN, seed=seed) as loader:
                    learn(gpt, gistnet, loader, steps, args.lr, amp)
                val = val_loader(val_items, tokenizer, args.rows, config.seq_len, align=FAN, max_rows=args.eval_rows)
                told = judge(gpt, gistnet, val)
                found.setdefault((width, steps), []).append(told)
                print0(f"width {width} inner {inner} steps {steps} seed {seed} " + " ".join(f"{view} {nats:.3f}" for view, nats in told.items()) + f" ({time.perf_counter() - began:.0f} s)")
    cell = lambda runs, view: f"{np.mean([told[view] for told in runs]):.3f}" + (f" +- {np.std([told[view] for told in runs], ddof=1):.3f}" if len(runs) > 1 else "")
    print0("\n" + table(["width", "steps", *VIEWS], [[str(width), str(steps), *(cell(runs, view) for view in VIEWS)] for (width, steps), runs in found.items()]))
    print0(json.dumps(dict(vars(args), found=[dict(width=width, steps=steps, seeds=runs) for (width, steps), runs in found.items()])))


if __name__ == "__main__":
    run_main(main)
