"""
nanochat's own trainer and ours on the same text, tokenizer, shape, tokens, batch and validation text. With a checkout of nanochat at PATH:

python -m scripts.tok_train --source dir:books --vocab-size 4096
python -m bench.against_nanochat PATH --source dir:books --cut --depth 4 --max-seq-len 512 --num-tokens 500000 --seeds 0,1,2

One folder (--out) is the base folder of both trainers: our tokenizer as tokenizer.json, and as the tokenizer.pkl and token_bytes.pt that nanochat
reads; documents of the source's train split in one shard, of its val split in the last. The checkout is run, never edited. Each trainer
derives its rates from the batch by its own rule and cuts rows with its own loader.

val_bpb is what each trainer prints: of its own rows. Theirs hold beginnings of documents, ours whole documents, so that two columns more
score every model, in fp32 and by one function, on the rows of nanochat's loader and on ours. tokens/s leaves out the first ten steps (or half,
if there are fewer than twenty). Runs: nanochat (compiled, as it ships), eager (nanochat with TORCHDYNAMO_DISABLE=1), plain and memory (ours).
The last line is JSON. Measure with nothing else running, or with --cpu-time: then tokens/s are of a second of the processes' CPU time, and OMP_NUM_THREADS=1 makes
that what the wall clock of a quiet machine would say. OMP_NUM_THREADS sets the threads of both, NANOCHAT_DTYPE the precision of theirs.
"""

import argparse
import json
import os
import pickle
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.loader import short_documents
from nanochat import schedule
from nanochat.common import UserError, run_main
from nanochat.dataloader import val_loader
from nanochat.dataset import open_source
from nanochat.loss_eval import bits_per_byte
from nanochat.run import short
from nanochat.tokenizer import Tokenizer
from scripts.load import load_stage

ROOT = Path(__file__).resolve().parent.parent
SIDE = ROOT / "bench/nanochat_side.py"
RUNS = ("nanochat", "eager", "plain", "memory")
SHARDS = "base_data_climbmix"  # the folder that nanochat reads; base_data in older versions
CPU_CLOCK = "import runpy, sys, time; time.perf_counter = time.process_time; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"

parser = argparse.ArgumentParser(description="Beside nanochat's own trainer", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("checkout", help="folder of a nanochat checkout")
parser.add_argument("--source", default="stdlib", help="text for both, as base_train takes it")
parser.add_argument("--cut", action="store_true", help="cut documents to the lengths of web text: nanochat's loader drops what a row cannot hold, nearly all of a book")
parser.add_argument("--chars", type=int, default=20_000_000, help="of the train split to use; a tenth of it from the val split")
parser.add_argument("--depth", type=int, default=4)
parser.add_argument("--max-seq-len", type=int, default=512)
parser.add_argument("--num-tokens", type=int, default=500_000, help="tokens to train on")
parser.add_argument("--batch-tokens", type=int, default=-1, help="tokens a step of both (-1 = each by its own rule)")
parser.add_argument("--device-batch", type=int, default=16, help="most rows a forward, of both")
parser.add_argument("--eval-tokens", type=int, default=131072, help="validation tokens")
parser.add_argument("--seeds", default="0,1,2")
parser.add_argument("--runs", default="nanochat,plain,memory", help=f"which of {', '.join(RUNS)}")
parser.add_argument("--dtype", default="auto", help="of ours, as base_train takes it")
parser.add_argument("--cpu-time", action="store_true", help="tokens a second of CPU time, of all threads, instead of the wall clock's")
parser.add_argument("--out", default="/tmp/against_nanochat", help="base folder of both, made or added to")


# ---------------------------------------------------------------------------------------------------------------------
# One base folder for both

def documents(source, chars, cut):
    """Documents of a source up to so many characters, shuffled as web shards are, and cut to the lengths of web text if asked for."""
    texts, size = [], 0
    for text in source.documents():
        texts.append(text[:chars - size])
        size += len(texts[-1])
        if size == chars:
            break
    texts = [text for text in (short_documents(texts) if cut else texts) if text]
    random.Random(0).shuffle(texts)
    return texts


def prepare(out, tokenizer, train, val):
    """The tokenizer in both forms and two shards, of which the last is validation to both trainers."""
    tokenizer.save(out / "tokenizer")
    (out / "tokenizer/tokenizer.pkl").write_bytes(pickle.dumps(tokenizer._encoding))
    torch.save(torch.from_numpy(tokenizer.token_bytes()).int(), out / "tokenizer/token_bytes.pt")
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate((train, val)):
        pq.write_table(pa.table({"text": texts}), out / SHARDS / f"shard_{number:05d}.parquet", row_group_size=1024)
    if not (out / "base_data").exists():
        (out / "base_data").symlink_to(SHARDS)


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def run(command, folder, **environment):
    """The output of a command; where it fails, its last lines as a UserError."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))} in {folder} ended with {done.returncode}:\n" + "\n".join(done.stdout.splitlines()[-15:]))
    return done.stdout


def steady(times):
    """Seconds a step without the first ten, or the first half of fewer than twenty."""
    return statistics.mean(times[min(10, len(times) // 2):])


def batches_of(args, vocab_size):
    """Tokens a step of (nanochat, ours): nanochat's rule looks at the depth only, ours at the tokens that the run really sees."""
    if args.batch_tokens > 0:
        return args.batch_tokens, args.batch_tokens
    plan = lambda **tokens: schedule.plan(args.depth, vocab_size, args.max_seq_len, **tokens).batch_tokens
    return plan(), plan(tokens=args.num_tokens)


def train_theirs(args, out, batch, seed, name):
    steps, tag = max(1, round(args.num_tokens / batch)), f"{name}-{seed}"
    flags = dict(depth=args.depth, max_seq_len=args.max_seq_len, num_iterations=steps, total_batch_size=batch, eval_every=steps, model_tag=tag,
                 device_batch_size=schedule.fit_rows(batch, args.device_batch, args.max_seq_len, 1), eval_tokens=args.eval_tokens,
                 core_metric_every=-1, sample_every=-1, save_every=-1)
    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    shutil.rmtree(out / "base_checkpoints" / tag, ignore_errors=True) # what an earlier call left: the newest model there is scored
    said = run([SIDE, "train", seed, "process_time" if args.cpu_time else "time", *flags], args.checkout, **({"TORCHDYNAMO_DISABLE": "1"} if name == "eager" else {}))
    times = [float(ms) / 1000 for ms in re.findall(r"dt: ([\d.]+)ms", said)]
    val_bpb = re.findall(r"Validation bpb: ([\d.]+)", said)
    if len(times) != steps or not val_bpb:
        raise UserError(f"{args.checkout} printed {len(times)} steps and {len(val_bpb)} evaluations, expected {steps} and at least one: is it another version?\n{said[-2000:]}")
    return dict(val_bpb=float(val_bpb[-1]), tokens_per_s=batch / steady(times), batch=batch, steps=steps), out / "base_checkpoints" / tag


def train_ours(args, out, batch, seed, name):
    tag = f"{name}-{seed}"
    shutil.rmtree(out / "base_checkpoints" / tag, ignore_errors=True)
    run([*(["-c", CPU_CLOCK] if args.cpu_time else ["-m"]), "scripts.base_train", "--depth", args.depth, "--max-seq-len", args.max_seq_len, "--source", f"dir:{out / SHARDS}", "--num-tokens", args.num_tokens,
         "--batch-tokens", batch, "--device-batch", args.device_batch, "--eval-tokens", args.eval_tokens, "--seed", seed, "--tag", tag, "--dtype", args.dtype,
         *["--plain"] * (name == "plain")], ROOT)
    last = json.loads((out / "base_checkpoints" / tag / "log.jsonl").read_text().splitlines()[-1])["summary"]
    return dict(val_bpb=last["val_bpb"], tokens_per_s=last["tokens_per_s"], batch=batch, steps=last["steps"]), tag


# ---------------------------------------------------------------------------------------------------------------------
# The same rows for all

def shared_rows(args, out, tokenizer):
    """{whose loader: rows} of the validation text, written where the other side finds them."""
    count, path = max(1, args.eval_tokens // args.max_seq_len), out / "rows.pt"
    run([SIDE, "rows", args.max_seq_len, count, path], args.checkout)
    ours = list(val_loader(open_source(f"dir:{out / SHARDS}", "val"), tokenizer, 8, args.max_seq_len, align=32, max_rows=count))
    rows = {"their rows": torch.load(path), "our rows": dict(inputs=torch.cat([batch.inputs for batch in ours]), targets=torch.cat([batch.targets for batch in ours]))}
    torch.save(rows, path)
    return rows


@torch.no_grad()
def nats_of_ours(tag, rows, at_once=8):
    gpt = load_stage("base", tag).gpt
    return {name: torch.cat([gpt(inputs, targets, "none") for inputs, targets in zip(part["inputs"].split(at_once), part["targets"].split(at_once))])
            for name, part in rows.items()}


def nats_of_theirs(folder, args, out):
    run([SIDE, "score", folder, out / "rows.pt", out / "nats.pt"], args.checkout, NANOCHAT_DTYPE="float32")
    return torch.load(out / "nats.pt")


def bits(nats, rows, tokenizer):
    """{rows: bits per byte} of the nats that one model gave the targets of all rows."""
    return {name: bits_per_byte(lambda part: part.nats, [SimpleNamespace(targets=rows[name]["targets"], nats=nats[name])], tokenizer.token_bytes()) for name in rows}


# ---------------------------------------------------------------------------------------------------------------------

def table(results):
    """Lines: for each run the mean over its seeds and the standard deviation."""
    keys = ["val_bpb", "their rows", "our rows", "tokens_per_s"]
    lines = [f"{'run':10} {'batch':>7} {'steps':>5} " + " ".join(f"{key:>18}" for key in keys)]
    for name, found in results.items():
        cells = []
        for key in keys:
            values = [one[key] for one in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):,.0f} +- {spread:,.0f}" if key == "tokens_per_s" else f"{statistics.mean(values):.4f} +- {spread:.4f}")
        lines.append(f"{name:10} {found[0]['batch']:7} {found[0]['steps']:5} " + " ".join(f"{cell:>18}" for cell in cells))
    return lines


def main():
    args = parser.parse_args()
    names, seeds, out = args.runs.split(","), [int(seed) for seed in args.seeds.split(",")], Path(args.out).absolute()
    args.checkout = Path(args.checkout).absolute()
    if set(names) - set(RUNS):
        raise UserError(f"--runs {args.runs}: expected some of {','.join(RUNS)}")
    if not (args.checkout / "scripts/base_train.py").is_file():
        raise UserError(f"no scripts/base_train.py in {args.checkout}: expected a checkout of nanochat")
    if args.eval_tokens < args.device_batch * args.max_seq_len:
        raise UserError(f"--eval-tokens {args.eval_tokens}: nanochat evaluates whole forwards, expected at least {args.device_batch} rows of {args.max_seq_len}")
    tokenizer = Tokenizer.load()
    train, val = (documents(open_source(args.source, split), chars, args.cut) for split, chars in (("train", args.chars), ("val", args.chars // 10)))
    prepare(out, tokenizer, train, val)
    os.environ["NANOCHAT_BASE_DIR"] = str(out)
    theirs, ours = batches_of(args, tokenizer.vocab_size)
    print(f"{len(train):,} and {len(val):,} documents of {args.source} in {out}; {args.num_tokens:,} tokens, {theirs:,} a step in nanochat and {ours:,} in ours", flush=True)
    rows, results = shared_rows(args, out, tokenizer), {name: [] for name in names}
    for seed in seeds:
        for name in names:
            if name in ("nanochat", "eager"):
                found, folder = train_theirs(args, out, theirs, seed, name)
                nats = nats_of_theirs(folder, args, out)
            else:
                found, tag = train_ours(args, out, ours, seed, name)
                nats = nats_of_ours(tag, rows)
            results[name].append(found | bits(nats, rows, tokenizer) | dict(seed=seed))
            print(f"{name} seed {seed}: " + " ".join(f"{key}={short(value)}" for key, value in results[name][-1].items()), flush=True)
    print("\n".join(table(results)))
    print(json.dumps(dict(vars(args), checkout=str(args.checkout), threads=os.environ.get("OMP_NUM_THREADS"), results=results)))


if __name__ == "__main__":
    run_main(main)
