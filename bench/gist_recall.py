"""
What gists alone can be asked about: facts among noise, one a block, and questions that see no raw token of them.

python -m bench.gist_recall                  # three seeds
python -m bench.gist_recall --quick          # one seed, a tenth of the steps: only that it runs

The same GPT, GistNet and optimizer as everywhere, small and from scratch. Every block holds one pair, key and value, in a random place among noise; a
question is a key, its answer the value behind it, and the GPT sees all gists of the row and nothing else. Blocks grow with the curriculum, then the row,
up to 256 blocks of 32 tokens each; this is told as recall by length of the history. From there, groups of level-1 gists are gisted again and only that
is shown: 2 of them in one vector of 64 tokens, and so on up to one vector for 1,024 tokens, which is a node of level 2. So this is the curve of what a
vector holds, and of what more vectors a node would buy: a node of 1,024 tokens with 4 vectors has one for 256.

`swapped` asks the gists of another row: chance is one in 16. The last line is one JSON object.
"""
import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F

from megacontext.gistnet import GistConfig, GistNet
from megacontext.losses import pool_values, row_entries
from megacontext.span import BLOCK
from nanochat.common import UserError, print0, run_main
from nanochat.gpt import GPT, Entries, GPTConfig
from nanochat.optim import make_optimizer
from nanochat.report import table

NOISE, VALUES = 8, 16 # tokens that stand between facts, tokens that are answers
QUESTIONS = 64        # a step, over all of its rows

parser = argparse.ArgumentParser(description="Recall through gists alone", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128, help="in heads of 64")
parser.add_argument("--curriculum", default="8x8:300,8x16:300,8x32:400,32x32:200,256x32:100", help="blocks a row x tokens a block : steps, one after the other")
parser.add_argument("--groups", default="2,4,8,16,32", help="level-1 gists in a vector, each learnt from the one before it, in rows of 32 blocks of the last stage of the curriculum")
parser.add_argument("--group-steps", type=int, default=200, help="steps of each of these")
parser.add_argument("--tokens", type=int, default=2048, help="of a step, at most; a longer row is a step by itself")
parser.add_argument("--lr", type=float, default=0.3, help="times the reference rates")
parser.add_argument("--asked", type=int, default=512, help="questions of a measurement")
parser.add_argument("--seeds", default="0,1,2", help="comma list")
parser.add_argument("--quick", action="store_true", help="one seed and a tenth of the steps")


class Toy:
    """Networks that read rows of facts: keys are as many as the longest row has blocks."""

    def __init__(self, args, keys, seed):
        torch.manual_seed(seed)
        self.keys, self.rng = keys, np.random.default_rng(seed)
        self.gpt = GPT(GPTConfig(vocab_size=NOISE + VALUES + keys, seq_len=keys * BLOCK, layers=args.layers, heads=args.width // 64, kv_heads=args.width // 64, width=args.width))
        self.gistnet = GistNet(GistConfig.for_gpt(self.gpt.config))
        self.optimizer = make_optimizer(self.gpt, dict(gistnet=self.gistnet), lr_scale=args.lr)

    def rows(self, B, blocks, K, questions):
        """ids (B, blocks * K), keys asked for (B, questions), the values behind them."""
        rng, at = self.rng, np.arange(B)[:, None]
        ids = rng.integers(0, NOISE, (B, blocks, K))
        keys = np.stack([rng.permutation(self.keys)[:blocks] for _ in range(B)])
        values, place = rng.integers(0, VALUES, (B, blocks)), rng.integers(0, K - 1, (B, blocks))
        ids[at, np.arange(blocks), place], ids[at, np.arange(blocks), place + 1] = NOISE + VALUES + keys, NOISE + values
        which = rng.integers(0, blocks, (B, questions))
        return [torch.from_numpy(part) for part in (ids.reshape(B, -1), NOISE + VALUES + keys[at, which], NOISE + values[at, which])]

    def answers(self, ids, asked, K, group=1, swapped=False):
        """Logits (B, questions, V) of what follows each key, given vectors of `group` blocks each. swapped: those of the next row."""
        B, T = ids.shape
        entries = row_entries(self.gpt, self.gistnet, ids, K)
        part = lambda t: t[:, T:T + T // K]
        x, values = part(entries.x), [part(value) for value in entries.values]
        if group > 1:
            x = self.gistnet(x.unflatten(1, (-1, group)).flatten(0, 1), 2).view(B, -1, x.size(2))
            values = [pool_values(value, group) for value in values]
        if swapped:
            x, values = x.roll(1, 0), [value.roll(1, 0) for value in values]
        n, width = x.size(1), K * group
        question = self.gpt.embed(asked.view(-1, 1)) # each alone: no token stands before it
        both = Entries(torch.cat([x, question.x.view(B, -1, x.size(2))], dim=1), [torch.cat([v, q.view(B, -1, v.size(2))], dim=1) for v, q in zip(values, question.values)])
        see = torch.eye(both.x.size(1), dtype=torch.bool)
        see[n:, :n] = True
        places = torch.cat([torch.arange(n) * width + (width - 1) / 2, torch.full((asked.size(1),), float(T))])
        return self.gpt.head(self.gpt.trunk(both, places[None], see[None, None])[:, n:])

    def learn(self, steps, blocks, K, group, tokens):
        """Steps at the given size; rates rise over the first tenth and fall over the last third."""
        B = max(1, tokens // (blocks * K))
        for step in range(steps):
            self.optimizer.set_schedule(min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.33 * steps)))
            ids, asked, wanted = self.rows(B, blocks, K, max(1, QUESTIONS // B))
            F.cross_entropy(self.answers(ids, asked, K, group).flatten(0, 1), wanted.flatten()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def right(self, blocks, K, group, questions, swapped=False):
        """Share of answers that are right, in new rows."""
        found = []
        while sum(map(len, found)) < questions:
            ids, asked, wanted = self.rows(4, blocks, K, 16)
            found.append((self.answers(ids, asked, K, group, swapped).argmax(-1) == wanted).float().flatten())
        return torch.cat(found).mean().item()


def run(args, stages, groups, seed, say):
    """{what was asked: share of right answers} of one seed."""
    toy, told = Toy(args, max([blocks for blocks, _, _ in stages] + [BLOCK] * bool(groups)), seed), {}

    def measure(name, *size):
        told[name] = toy.right(*size, args.asked)
        told[f"{name}, swapped"] = toy.right(*size, args.asked, swapped=True)
        say(f"{name}: {told[name]:.3f}, swapped {told[f'{name}, swapped']:.3f}")

    for blocks, K, steps in stages:
        toy.learn(steps, blocks, K, 1, args.tokens)
        measure(f"{blocks} blocks of {K}: {blocks * K} tokens", blocks, K, 1)
    for group in groups:
        toy.learn(args.group_steps, BLOCK, stages[-1][1], group, args.tokens)
        measure(f"one vector for {group * stages[-1][1]} tokens", BLOCK, stages[-1][1], group)
    return told


def settle(args):
    """The stages [(blocks, tokens a block, steps)] and the groups of the flags; UserError for what cannot be run."""
    try:
        stages = [(*map(int, size.split("x")), int(steps)) for size, steps in (stage.split(":") for stage in args.curriculum.split(","))]
        groups, seeds = ([int(number) for number in text.split(",") if number] for text in (args.groups, args.seeds))
    except ValueError:
        raise UserError(f"expected --curriculum like 8x8:400,8x32:300, --groups and --seeds like 2,4; got {args.curriculum!r}, {args.groups!r} and {args.seeds!r}") from None
    if not seeds or any(len(stage) != 3 or min(stage) < 1 or stage[1] < 2 or BLOCK % stage[1] for stage in stages) or any(group < 2 or BLOCK % group for group in groups):
        raise UserError(f"expected blocks whose tokens divide {BLOCK}, groups of 2 or more that divide {BLOCK}, and a seed; got {args.curriculum!r}, {args.groups!r} and {args.seeds!r}")
    if args.quick:
        stages, args.group_steps, seeds = [(*size, -(-steps // 10)) for *size, steps in stages], -(-args.group_steps // 10), seeds[:1]
    return stages, groups, seeds


def main():
    args = parser.parse_args()
    stages, groups, seeds = settle(args)
    began, found = time.perf_counter(), []
    for seed in seeds:
        found.append(run(args, stages, groups, seed, lambda line: print0(f"seed {seed} {line} ({time.perf_counter() - began:.0f} s)")))
    cell = lambda name: f"{np.mean([told[name] for told in found]):.1%} ({', '.join(f'{told[name]:.1%}' for told in found)})"
    names = [name for name in found[0] if not name.endswith("swapped")]
    print0("\n" + table(["what the gists are asked", f"right (seeds {', '.join(map(str, seeds))})", "of another row"], [[name, cell(name), cell(f"{name}, swapped")] for name in names]))
    print0(json.dumps(dict(vars(args), seconds=time.perf_counter() - began, found=found)))


if __name__ == "__main__":
    run_main(main)
