"""
The part of bench/against_nanochat.py that runs under a nanochat checkout's own packages, and so imports nothing of ours. Started by it with
the checkout as the working directory:

python bench/nanochat_side.py train SEED CLOCK [flags of its base_train]   its trainer as it ships, from another seed, by time.CLOCK: time or process_time
python bench/nanochat_side.py rows SEQ_LEN COUNT OUT                 {"inputs", "targets"} (COUNT, SEQ_LEN) of its validation loader
python bench/nanochat_side.py score CHECKPOINTS ROWS OUT             {name: nats of each target} of the newest model, for {name: rows}
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch

sys.path[0] = os.getcwd()  # `nanochat` and `scripts` are the checkout's


def train(seed, clock, *flags):
    """compute_init seeds with a constant: replace the number, leave the code alone. Its steps are timed by time.time()."""
    seed_all = torch.manual_seed
    torch.manual_seed = lambda constant: seed_all(int(seed))
    time.time = getattr(time, clock)
    sys.argv = ["base_train", *flags]
    runpy.run_module("scripts.base_train", run_name="__main__", alter_sys=True)


def rows(seq_len, count, out):
    from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
    from nanochat.tokenizer import get_tokenizer
    loader = tokenizing_distributed_data_loader_bos_bestfit(get_tokenizer(), int(count), int(seq_len), split="val", device="cpu")
    inputs, targets = next(loader)
    torch.save(dict(inputs=inputs, targets=targets), out)


@torch.no_grad()
def score(folder, rows, out, at_once=8):
    from nanochat.gpt import GPT, GPTConfig
    weights = max(Path(folder).glob("model_*.pt"))
    config = json.loads((weights.parent / weights.name.replace("model", "meta")).with_suffix(".json").read_text())["model_config"]
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))
    model.to_empty(device="cpu")
    model.init_weights()  # its rotary tables are not in the checkpoint
    model.load_state_dict(torch.load(weights, map_location="cpu"), strict=True, assign=True)
    model.eval()
    nats = {}
    for name, part in torch.load(rows).items():
        pairs = zip(part["inputs"].split(at_once), part["targets"].split(at_once))
        nats[name] = torch.cat([model(inputs, targets, loss_reduction="none").view_as(targets) for inputs, targets in pairs])
    torch.save(nats, out)


if __name__ == "__main__":
    {"train": train, "rows": rows, "score": score}[sys.argv[1]](*sys.argv[2:])
