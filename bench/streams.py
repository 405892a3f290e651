"""
How fast a chat talks: the stream and the engine that scripts/chat_cli.py has, weights at random, an id for a word, so that neither checkpoint nor
tokenizer is needed:
python -m bench.streams                                                (the plain GPT; on a GPU its steps are recorded)
python -m bench.streams --depth 12 --memory --prompt 8192              (a session with memory)
python -m bench.streams --memory --prompt 2048 --answers 1,2,4,8       (so many answers at the same time, as chat_web.py writes them)

Each repeat is a stream of its own, greedy, that no token ends:
    ttft_ms     from an empty stream to the first token behind the prompt
    second_ms   the next one; on a GPU the plain stream records its step here
    tokens_s    tokens a second after these two, the way to Python, and a session's ticks, included
The median of the repeats. With --answers instead, drawn at a temperature of 0.8, tokens a second of all, from when each has its first token: in_turn one answer after the other, apart each in a
thread of its own, together in threads that read in one forward (megacontext/batch.py), and how many times in_turn that is, the median of the ratios within a repeat.
The last line is JSON.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

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
parser.add_argument("--answers", default="", help="numbers of answers at the same time, such as 1,2,4,8; with --memory")
parser.add_argument("--repeats", type=int, default=3, help="streams measured, after one that is not")
parser.add_argument("--cpu-time", action="store_true", help="--answers by the CPU time of all threads instead of the wall clock's, for a machine that others use too; time spent waiting is not in it")
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
    counts = numbers(args)
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
    told = several(loaded, args, counts) if counts else one(loaded, args)
    print(json.dumps(dict(bench="streams", machine=machine.name, depth=args.depth, dtype=str(dtype), memory=args.memory, prompt=args.prompt, new=args.new, threads=torch.get_num_threads(),
                          torch=torch.__version__, **told)))


def numbers(args):
    """--answers as a list, [] where there are none."""
    try:
        counts = [int(word) for word in args.answers.split(",")] if args.answers else []
    except ValueError:
        counts = [0]
    if min(counts, default=1) < 1 or counts and not args.memory:
        raise UserError(f"--answers {args.answers}: expected numbers of at least 1, separated by commas, and --memory: only sessions read together")
    if args.cpu_time and not counts:
        raise UserError("--cpu-time is for several answers: expected --answers with it. Leave it out")
    return counts


def one(loaded, args):
    runs = [once(loaded, args) for _ in range(1 + args.repeats)][1:] # the first one warms up
    told = {name: statistics.median(run[name] for run in runs) for name in ("ttft_ms", "second_ms", "tokens_s")}
    print(f"first token {told['ttft_ms']:.1f} ms, second {told['second_ms']:.1f} ms, then {told['tokens_s']:,.1f} tokens/s")
    return told


def once(loaded, args):
    """One stream: {ttft_ms, second_ms, tokens_s}."""
    prompt = torch.randint(args.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    stream, times = open_stream(loaded, args.memory, args.budget), [time.perf_counter()]
    for _ in Engine(loaded.tokenizer).generate(stream, prompt, args.new, temperature=0):
        times.append(time.perf_counter())
    assert len(times) == 1 + args.new, "no token ends this"
    return dict(ttft_ms=1000 * (times[1] - times[0]), second_ms=1000 * (times[2] - times[1]), tokens_s=(args.new - 2) / (times[-1] - times[2]))


# ---------------------------------------------------------------------------------------------------------------------
# Several answers

WAYS = ("in_turn", "apart", "together")


def several(loaded, args, counts):
    """{clock, rows: [{answers, tokens a second each way, times}]}"""
    print(f"\ntokens a second of all answers, by {'the CPU time of all threads' if args.cpu_time else 'the clock'}\n{'answers':>9}{''.join(f'{way:>11}' for way in WAYS)}{'times':>9}")
    rows = []
    for count in counts:
        runs = [{way: written(loaded, args, count, way) for way in WAYS} for _ in range(1 + args.repeats)][1:]
        rows.append(dict(answers=count, **{way: statistics.median(run[way] for run in runs) for way in WAYS}, times=statistics.median(run["together"] / run["in_turn"] for run in runs)))
        print(f"{count:>9}{''.join(f'{rows[-1][way]:>11,.1f}' for way in WAYS)}{rows[-1]['times']:>9.2f}", flush=True)
    return dict(clock="cpu" if args.cpu_time else "wall", rows=rows)


def written(loaded, args, count, way):
    """Tokens a second of `count` answers to prompts of several lengths, written in one of WAYS."""
    from megacontext.batch import Together
    together, answers, clock = Together(), [], time.process_time if args.cpu_time else time.perf_counter
    for i in range(count):
        stream = open_stream(loaded, True, args.budget)
        prompt = torch.randint(args.vocab_size, (args.prompt + 37 * i,), generator=torch.Generator().manual_seed(i)).tolist()
        answers.append(Engine(loaded.tokenizer).generate(together.stream(stream) if way == "together" else stream, prompt, args.new, temperature=0.8, top_k=50))
        next(answers[-1])
    begin = Barrier(1 if way == "in_turn" else count)

    def rest(answer):
        begin.wait()
        return sum(1 for _ in answer)

    with ThreadPoolExecutor(begin.parties) as pool:
        start = clock()
        tokens = sum(pool.map(rest, answers))
    return tokens / (clock() - start)


if __name__ == "__main__":
    run_main(main)
