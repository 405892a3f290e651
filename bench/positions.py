"""
Where should far entries stand? The same tokens read after histories of growing length, under each policy of positions:
python -m bench.positions --stage sft --source stdlib
python -m bench.positions --stage base --source dir:books --times 1,8,64,512

    absolute     the timeline as it is: leaves the trained range as soon as the history does
    clamped      true distances within the trained range, everything older piled up at its end
    compressed   true distances up to half of the trained range, log-like beyond (megacontext/positions.py; what sessions use)
Each as it is, and damped: a gist stands for a stretch of the timeline, so its key is averaged over the turns of that stretch, which weakens
its fast pairs (a Gaussian of the stretch's standard deviation: the RoPE of a blurred position). The model was trained without it.

Told is the loss in nats per token of the --read tokens that follow the history, and how much more than `compressed` it is on the same tokens.
Histories are --times the trained length, all ending at the same place of a validation document; what lies before that document is
training text. +- is the standard deviation over seeds of the seeds' means. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from bench.fidelity import long_text, pm, remembered, spread
from megacontext.positions import POLICIES
from megacontext.runtime import Session
from megacontext.span import width_of
from megacontext.working_context import LEAST_BUDGET
from nanochat import report
from nanochat.attention import ROPE_BASE
from nanochat.common import UserError, pick_device_type, run_main
from scripts.load import load_stage

parser = argparse.ArgumentParser(description="Policies of positions, by length of the history", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="base, mid, sft or rl")
parser.add_argument("--tag", default=None, help="name of the checkpoint folder (default: the newest)")
parser.add_argument("--source", default="stdlib", help="text of the histories; what is read is its validation part")
parser.add_argument("--times", default="1,8,64", help="lengths of the histories, in trained lengths")
parser.add_argument("--budget", type=int, default=-1, help="entries in view (-1 = half the longest row that was trained on)")
parser.add_argument("--read", type=int, default=256, help="tokens read after each history")
parser.add_argument("--places", type=int, default=4, help="places for each seed")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")


class Damped(Session):
    """Keys of gists weakened pair by pair, as if averaged over the turns of all the positions that they stand for."""

    def _read_gists(self, spans):
        held = set(self.store.near.held)
        read = super()._read_gists(spans)
        half = self.gpt.config.head_width // 2
        rates = ROPE_BASE ** (-torch.arange(half, device=self.gpt.device, dtype=torch.float32) / half) # radians a position
        for span, k in [(span, k) for span, k, _ in read] + [(span, k) for span, (k, _) in self.store.near.held.items() if span not in held]:
            k *= torch.exp(-(rates * width_of(span.level)).square() / 24).repeat(2).to(k.dtype) # variance of a uniform stretch: width^2 / 12
        return read


def main():
    args = parser.parse_args()
    began = time.time()
    loaded = load_stage(args.stage, args.tag, device=args.device or pick_device_type())
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: there is nothing to measure")
    trained = loaded.gpt.config.seq_len
    lengths = [int(times) * trained for times in args.times.split(",")]
    budget = args.budget if args.budget != -1 else max(LEAST_BUDGET, trained // 2)
    far, near = long_text(args.source, loaded.tokenizer, "train", max(lengths)), long_text(args.source, loaded.tokenizer, "val")
    if len(near) < trained + args.read + 1:
        raise UserError(f"the validation part of {args.source} has {len(near):,} tokens, expected at least {trained + args.read + 1:,}: give another --source")
    far = np.resize(np.array(far), max(lengths)).tolist() # over and over if it is shorter
    print(f"{loaded.stage}/{loaded.tag} step {loaded.meta['step']}, trained on rows of {trained}, {budget} entries in view, {args.read} tokens read at "
          f"{args.places} places for each of {args.seeds} seeds", flush=True)
    names = [(policy, damped) for policy in POLICIES for damped in (False, True)]
    nats = {(length, *name): [[] for _ in range(args.seeds)] for length in lengths for name in names}
    for seed in range(args.seeds):
        for start in np.random.default_rng(seed).integers(0, len(near) - trained - args.read, args.places).tolist():
            stretch = near[start:start + trained + args.read + 1]
            for length in lengths:
                tree = remembered(loaded, far[len(far) - (length - trained):] + stretch[:trained])
                for policy, damped in names:
                    stream = (Damped if damped else Session)(loaded.gpt, loaded.gistnet, loaded.lensnet, tree, budget, positions=POLICIES[policy])
                    logits = torch.stack([stream.feed([token]) for token in stretch[trained:-1]]).float()
                    wanted = torch.tensor(stretch[trained + 1:], device=logits.device)
                    nats[length, policy, damped][seed].append(torch.nn.functional.cross_entropy(logits, wanted).item())
                    tree.truncate(length)
        print(f"seed {seed} read ({time.time() - began:.0f} s)", flush=True)
    data, rows = {}, []
    for (length, policy, damped), seeds in nats.items():
        means, best = [statistics.mean(seed) for seed in seeds], [statistics.mean(seed) for seed in nats[length, "compressed", False]]
        name = policy + (", damped" if damped else "")
        data[f"{name}/{length}"] = dict(nats=spread(means), more=spread([a - b for a, b in zip(means, best)]))
        rows.append([f"{length:,}", name, pm(data[f"{name}/{length}"]["nats"], 4), pm(data[f"{name}/{length}"]["more"], 4)])
    print(report.table(["history", "positions", "nats per token", "more than compressed"], rows))
    print(json.dumps(dict(bench="positions", stage=loaded.stage, tag=loaded.tag, step=loaded.meta["step"], source=args.source, trained=trained, budget=budget,
                          read=args.read, places=args.places, seeds=args.seeds, numbers=data)))


if __name__ == "__main__":
    run_main(main)
