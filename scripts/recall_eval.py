"""
Questions about what was said far back, by length and depth: the tables of recall that mega_eval shows among others, alone (scripts/recall.py says
what they hold). They go to the report, and the last line is one JSON object.

python -m scripts.recall_eval --checkpoint sft/d4 --recall-tasks multikey --recall-lengths 32768,131072,1048576 --recall-budget 2048
"""
import argparse
import json
import time

import torch

from nanochat import report
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.dataset import add_data_dir, use_data_dir
from scripts.load import load_stage
from scripts.recall import add_recall_flags, recall_tables, settle_recall

parser = argparse.ArgumentParser(description="Questions about what was said far back", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--checkpoint", default="sft", help="stage/tag, or a stage: its newest")
parser.add_argument("--source", default="stdlib", help="text that the facts are hidden in")
parser.add_argument("--seeds", type=int, default=3, help="samples of questions; the spread is over them")
parser.add_argument("--device", default="")
add_data_dir(parser)
add_recall_flags(parser)


def main():
    args = parser.parse_args()
    use_data_dir(args.data_dir)
    began, (stage, _, tag) = time.time(), args.checkpoint.partition("/")
    loaded = load_stage(stage, tag or None, device=torch.device(args.device or pick_device_type()))
    if loaded.gistnet is None:
        raise UserError(f"{args.checkpoint} was trained without memory: there is nothing to ask")
    settle_recall(args, loaded.gpt.config.seq_len)
    if not args.recall_lengths or not args.recall_tasks:
        raise UserError("nothing to ask: expected --recall-lengths and --recall-tasks of at least one")
    data = dict(vars(args), step=loaded.meta["step"])
    tables = recall_tables(loaded, data, args, began, "recall.png")
    report.write_section("recall", f"Recall ({stage})", *tables, data=data, seconds=time.time() - began)
    for table in tables:
        print0(table + "\n")
    print0(json.dumps(data))


if __name__ == "__main__":
    run_main(main)
