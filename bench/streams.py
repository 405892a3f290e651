"""
How fast a chat talks: the stream and the engine that scripts/chat_cli.py has, weights at random, an id for a word, so that neither checkpoint nor
tokenizer is needed:
python -m bench.streams                                                (the plain GPT; on a GPU its steps are recorded)
python -m bench.streams --depth 12 --memory --prompt 8192              (a session with memory)

Each repeat is a stream of its own, greedy, that no token ends:
    ttft_ms     from an empty stream to the first token behind the prompt
    second_ms   the next one; on a GPU the plain stream records its step here
    tokens_s    tokens a second after these two, the way to Python, and a session's ticks, included
The median of the repeats. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch

from nanochat import cost, hardware
from nanochat.common import UserError, run_main, setup
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from scripts.load import Loaded, build, open_stream

parser = argparse.ArgumentParser(description="Tokens per second of one chat, plain or with memory", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--depth", type=int, default=4, help="layers of the model; everything else follows")
parser.add_argument("--vocab-size", type=int, default=32768)
parser.add_argument("--memory", action="store_true", help="a session with memory instead of the plain GPT")
parser.add_argument("--budget", type=int, default=None, help="entries that the memory reads at once (default: half the longest row)")
parser.add_argument("--prompt", type=int, default=512, help="tokens fed at once")
parser.add_argument("--new", type=int, default=128, help="tokens that follow, at least 3")
parser.add_argument("--repeats", type=int, default=3, help="streams measured, after one that is not")
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
parser.add_argument("--dtype", default="auto", help="of the weights: auto, bf16, fp16 or fp32")


class Ids:
    """What the engine and a tree ask of a tokenizer, for a model whose words are ids: no word ends a turn, none calls the calculator."""
    fingerprint = "0" * 32

    def __init__(self, vocab_size):
        self.vocab_size = self.bos = vocab_size

    def special(self, name):
        return self.vocab_size


def main():
    args = parser.parse_args()
    if min(args.prompt, args.repeats) < 1 or args.new < 3:
        raise UserError(f"--prompt {args.prompt} --repeats {args.repeats} --new {args.new}: expected at least 1, 1 and 3")
    device, _ = setup(args.device)
    machine = hardware.describe(device)
    dtype, reason = hardware.pick_dtype(machine, args.dtype)
    gpt, gistnet, lensnet = build(GPTConfig.from_depth(args.depth, args.vocab_size), args.memory)
    for network in (gpt, gistnet):
        if network is not None:
            network.to(device, dtype).eval()
    if lensnet is not None:
        torch.nn.init.normal_(lensnet.score.weight) # as it is made it wants nothing, and a session without edits is too fast
        lensnet.to(device).eval()
    loaded = Loaded(gpt, gistnet, lensnet, Ids(args.vocab_size), {}, "", "", "random")
    print(machine)
    print(f"d{args.depth}, {cost.parameter_counts(gpt.config)['total'] / 1e6:.1f}M parameters in {str(dtype).removeprefix('torch.')} ({reason}), {args.prompt} + {args.new} tokens, "
          f"{'with memory' if args.memory else 'plain'}, {torch.get_num_threads()} threads")
    runs = [once(loaded, args) for _ in range(1 + args.repeats)][1:] # the first one warms up
    told = {name: statistics.median(run[name] for run in runs) for name in ("ttft_ms", "second_ms", "tokens_s")}
    print(f"first token {told['ttft_ms']:.1f} ms, second {told['second_ms']:.1f} ms, then {told['tokens_s']:,.1f} tokens/s")
    print(json.dumps(dict(bench="streams", machine=machine.name, depth=args.depth, dtype=str(dtype), memory=args.memory, prompt=args.prompt, new=args.new, torch=torch.__version__, **told)))


def once(loaded, args):
    """One stream: {ttft_ms, second_ms, tokens_s}."""
    prompt = torch.randint(args.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    stream, times = open_stream(loaded, args.memory, args.budget), [time.perf_counter()]
    for _ in Engine(loaded.tokenizer).generate(stream, prompt, args.new, temperature=0):
        times.append(time.perf_counter())
    assert len(times) == 1 + args.new, "no token ends this"
    return dict(ttft_ms=1000 * (times[1] - times[0]), second_ms=1000 * (times[2] - times[1]), tokens_s=(args.new - 2) / (times[-1] - times[2]))


if __name__ == "__main__":
    run_main(main)
