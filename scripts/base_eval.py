"""
What a model knows of text: bits per byte on train and val, a few continuations, and CORE.

python -m scripts.base_eval --stage base --tag d4 --source stdlib --tokens 262144
python -m scripts.base_eval --core download                        # fetch the public bundle of the 22 tasks, once

On 8 GPUs:

torchrun --standalone --nproc_per_node=8 -m scripts.base_eval --source climbmix --tokens 41943040 --core download

All of it is plain reading, without gists, but for the continuations: those are shown with memory too where there is one.
Writes the section `base` of the report; several stages stand there side by side.
"""
import argparse
import os
import time
from pathlib import Path

import torch

from nanochat import core_eval, hardware, report
from nanochat.common import STAGES, UserError, all_or_none, cleanup, print0, run_main, setup
from nanochat.dataloader import val_loader
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.engine import Engine
from nanochat.loss_eval import bits_per_byte
from nanochat.run import duration, short
from scripts.load import load_stage, open_stream

parser = argparse.ArgumentParser(description="Evaluate a model on text", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="base", help="base, mid, sft or rl")
parser.add_argument("--tag", default="", help="name of the checkpoint folder (empty = the newest)")
parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the last)")
parser.add_argument("--source", default="stdlib", help="text to read: stdlib, dir:PATH, climbmix, or a mix")
parser.add_argument("--tokens", type=int, default=262144, help="tokens of each split for bits per byte")
parser.add_argument("--device-batch", type=int, default=8, help="rows a forward; halve it when memory runs out")
parser.add_argument("--samples", type=int, default=32, help="tokens of each continuation (0 = none)")
parser.add_argument("--budget", type=int, default=None, help="entries that the memory reads at once, for the continuations (default: half its longest row)")
parser.add_argument("--core", default="", help="a folder with the files of the 22 tasks, `download`, or `off` (empty = NANOCHAT_DATA_DIR/icl where it is)")
parser.add_argument("--core-max-per-task", type=int, default=-1, help="questions of each task (-1 = all)")
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
parser.add_argument("--dtype", default="auto", help="auto, bf16 or fp32")
add_data_dir(parser)

PROMPTS = ("The capital of France is", "If yesterday was Friday, then tomorrow will be", "import os\nimport sys\n\n\ndef main(", "class Stack:\n    def __init__(self):")
SHOWN = 200 # characters of a long text that are shown before its continuation


def text_bpb(loaded, source, split, args, device, dist):
    """Bits per byte of one split: one pass over its first tokens, packed as in training."""
    seq_len = loaded.gpt.config.seq_len
    rows = val_loader(open_source(source, split), loaded.tokenizer, args.device_batch, seq_len, align=32, rank=dist.rank, world=dist.world,
                      max_rows=max(1, args.tokens // seq_len))
    batches = (batch.to(device) for batch in rows)
    return bits_per_byte(lambda batch: loaded.gpt(batch.inputs, batch.targets, "none"), batches, loaded.tokenizer.token_bytes(), dist.world, device)


def long_text(source, tokenizer, length):
    """The start of the first validation document that is longer than `length` tokens, as ids; None where there is none."""
    for text in open_source(source, "val").documents():
        if len(text) > length: # a token is at least a byte, most often several
            ids = tokenizer.encode(text[:20 * length])
            if len(ids) > length:
                return ids[:length]
    return None


def continuations(loaded, source, length, budget=None):
    """[(what was read, how its end looks, {"plain": text, "memory": text})], at temperature 0."""
    tokenizer, engine = loaded.tokenizer, Engine(loaded.tokenizer)
    asked = [("a prompt", prompt, tokenizer.encode(prompt)) for prompt in PROMPTS]
    if ids := long_text(source, tokenizer, 2 * loaded.gpt.config.seq_len):
        asked.append((f"{len(ids):,} tokens of a validation document, twice a training row", "..." + tokenizer.decode(ids)[-SHOWN:], ids))
    shown = []
    for what, end, ids in asked:
        said = {}
        for name in ["plain"] + ["memory"] * (loaded.gistnet is not None):
            stream = open_stream(loaded, memory=name == "memory", budget=budget)
            said[name] = tokenizer.decode(list(engine.generate(stream, [tokenizer.bos, *ids], length, temperature=0)))
        shown.append((what, end, said))
    return shown


def run_core(loaded, args, dist, tokens):
    """(what core_eval.evaluate gives, None), or (None, why CORE was not measured)."""
    local = os.environ.get("NANOCHAT_DATA_DIR")
    if args.core == "off":
        return None, "turned off by --core off"
    if args.core == "download":
        folder, why = all_or_none(core_eval.download_bundle, dist)
        if why is not None:
            return None, f"needs the network or a local folder of the 22 tasks (--core FOLDER): {why}"
    elif args.core:
        folder = Path(args.core)
        if not folder.is_dir():
            raise UserError(f"--core {args.core}: expected a folder with the files of the 22 tasks, there is none")
    elif local and (Path(local).expanduser() / "icl").is_dir():
        folder = Path(local).expanduser() / "icl"
    else:
        return None, "needs the files of the 22 tasks: --core FOLDER, --core download, or a folder icl in NANOCHAT_DATA_DIR"
    found = core_eval.evaluate(loaded.gpt, loaded.tokenizer, folder, args.core_max_per_task, tokens, dist,
                               show=lambda r: print0(f"core        {r['label']:32} {100 * r['accuracy']:5.1f}% of {r['n']:,}, centered {r['centered']:+.3f} | {duration(r['seconds'])}"))
    return (found, None) if found["tasks"] else (None, f"needs the files of the 22 tasks, and there is none of them in {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# The section

def core_parts(stage, entry):
    """Markdown of CORE for one stage."""
    core = entry["core"]
    if core is None:
        return [f"CORE: not measured, {entry['core_missing']}"]
    rows = [[task["label"], task["n"], 100 * task["accuracy"], task["centered"], f"{100 * task['cropped']:.0f}%"] for task in core["tasks"]]
    verdict = f"CORE of {stage}: **{core['core']:.4f}**" if core["core"] is not None else f"CORE: not measured, missing are {', '.join(core['missing'])}"
    if entry["core_most"] > 0:
        verdict += f" (of the first {entry['core_most']} questions a task only)"
    return [verdict, report.table(("task", "questions", "% right", "centered", "prompts cropped"), rows)]


def parts(entries):
    """The section of all stages measured so far, as Markdown."""
    columns = ("stage", "checkpoint", "source", "tokens a split", "train bpb", "val bpb", "CORE")
    rows = [[stage, f"{e['tag']}, step {e['step']}", e["source"], e["tokens"], e["train_bpb"], e["val_bpb"], e["core"] and e["core"]["core"]] for stage, e in entries.items()]
    out = ["Bits per byte of text, read plainly (lower is better).", report.table(columns, rows)]
    for stage, entry in entries.items():
        out += [f"### {stage}", *core_parts(stage, entry)]
        for what, end, said in entry["samples"]:
            out.append(f"Continued at temperature 0 from {what}:")
            same = len(set(said.values())) == 1 and len(said) > 1
            said = {" and ".join(said): next(iter(said.values()))} if same else said
            out.append(report.fence("\n".join([end] + [f"[{name}]\n{text}" for name, text in said.items()])))
    return out


def results(entries):
    found = []
    for stage, entry in entries.items():
        for measure, value in [("train bpb on text", entry["train_bpb"]), ("val bpb on text", entry["val_bpb"]), ("CORE", entry["core"] and entry["core"]["core"])]:
            if value is not None:
                found.append(dict(measure=measure, stage=stage, memory=False, value=value))
    return found


@torch.no_grad()
def main():
    args = parser.parse_args()
    for flag in ("tokens", "device_batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")
    if args.core_max_per_task == 0:
        raise UserError("--core-max-per-task 0: expected at least 1, or -1 for all. Without CORE: --core off")
    use_data_dir(args.data_dir)
    began = time.perf_counter()
    device, dist = setup(args.device)
    dtype, _ = hardware.pick_dtype(hardware.describe(device), args.dtype)
    loaded = load_stage(args.stage, args.tag or None, args.step, device)
    if args.samples > 0 and loaded.gistnet is not None:
        open_stream(loaded, budget=args.budget) # a budget that is too small is told now, not after CORE
    print0(f"model       {loaded.stage} {loaded.tag}, step {loaded.meta['step']}")
    entry = dict(tag=loaded.tag, step=loaded.meta["step"], source=args.source, tokens=args.tokens, core=None, core_missing=None, core_most=args.core_max_per_task, samples=[])
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with hardware.out_of_memory_told("while text was read", "Lower --device-batch"), autocast:
        for split in ("train", "val"):
            entry[f"{split}_bpb"] = text_bpb(loaded, args.source, split, args, device, dist)
            print0(f"{split:11} {entry[f'{split}_bpb']:.4f} bits per byte")
        entry["core"], entry["core_missing"] = run_core(loaded, args, dist, args.device_batch * loaded.gpt.config.seq_len)
    if entry["core"] is None:
        print0(f"CORE        not measured, {entry['core_missing']}")
    if dist.main:
        if args.samples > 0:
            with hardware.out_of_memory_told("while a text was continued", "Lower --budget, or leave it out with --samples 0"), autocast:
                entry["samples"] = continuations(loaded, args.source, args.samples, args.budget)
        entries = report.read_data("base") | {args.stage: entry}
        entries = {stage: entries[stage] for stage in STAGES if stage in entries}
        entry["seconds"] = time.perf_counter() - began
        for what, end, said in entry["samples"]:
            print0("\n".join([f"--- {what}: {end!r}"] + [f"{name:11} {text!r}" for name, text in said.items()]))
        path = report.write_section("base", "Reading text", *parts(entries), data=entries, results=results(entries), seconds=sum(e["seconds"] for e in entries.values()))
        core = entry["core"] and entry["core"]["core"]
        print0(f"summary stage={args.stage} tag={loaded.tag} train_bpb={entry['train_bpb']:.6f} val_bpb={entry['val_bpb']:.6f} core={'not_measured' if core is None else f'{core:.6f}'} "
               f"seconds={entry['seconds']:.1f} report={short(path)}")
    cleanup()


if __name__ == "__main__":
    run_main(main)
