"""
From a checkpoint to something that talks: the networks, the tokenizer, and a stream to feed.
What every script that uses a trained model shares. megacontext/ is imported only where memory is asked for: without that folder the
plain model still trains and talks.
"""
import hashlib
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from threading import Lock

import torch

from nanochat import checkpoint, hardware
from nanochat.common import ASIDE, UserError, checkpoint_dir
from nanochat.engine import PlainStream
from nanochat.gpt import GPT, GPTConfig
from nanochat.lora import merge
from nanochat.run import Log
from nanochat.tokenizer import Tokenizer


@dataclass
class Loaded:
    gpt: GPT
    gistnet: torch.nn.Module | None   # None: trained without memory
    lensnet: torch.nn.Module | None
    tokenizer: Tokenizer
    meta: dict
    stage: str
    tag: str
    identity: str = ""                # which gists are its own; "" where there is no GistNet

    @property
    def modules(self):
        """The networks by the names they have in a checkpoint."""
        return modules(self.gpt, self.gistnet, self.lensnet)


def fingerprint(gpt, gistnet):
    """Of everything that gists depend on: a tree made by other networks must not be read."""
    digest = hashlib.sha256()
    parts = [("embed", gpt.embed_table.weight), ("previous", gpt.previous.weight), *gistnet.named_parameters()]
    for name, tensor in parts:
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def room(device, dtype, first="Free what other programs hold of it"):
    """What to do where a device has no room for networks of a dtype (None = as saved), for an error: only what helps."""
    return ", or ".join([first, *["use --dtype bf16"] * (dtype == torch.float32), *["use --device cpu"] * (torch.device(device).type != "cpu"), "take a smaller model"])


def add_flags(parser):
    """The flags of every script that talks: which model, and how much it reads at once."""
    # the model
    parser.add_argument("--stage", default="sft", help="base, mid, sft or rl")
    parser.add_argument("--tag", default=None, help="name of the checkpoint folder (default: the newest)")
    parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the last)")
    parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, bf16, fp16 or fp32")
    # memory
    parser.add_argument("--no-memory", action="store_true", help="the plain model: it forgets what does not fit into its context")
    parser.add_argument("--budget", type=int, default=None, help="most entries, tokens and gists alike, that the model reads at once (default: as it was saved, else half its longest row)")
    parser.add_argument("--telemetry", default=None, help="a file that gets a line of JSON for every tick of the memory, appended")
    parser.add_argument("--run", default="", help="name of a wandb run that gets the numbers of every tick of the memory (empty = no wandb)")


def modules(gpt, gistnet=None, lensnet=None):
    return {"gpt": gpt} | ({"gistnet": gistnet, "lensnet": lensnet} if gistnet is not None else {})


def build(config, memory, gist_config=None, lens_config=None):
    """A GPT and, with memory, the GistNet and LensNet that fit it; their configs as dicts or None. Returns (gpt, gistnet, lensnet)."""
    if memory and config.short_layers:
        raise UserError(f"windows {config.windows} and memory do not go together: gists are read in every layer, and layers that see the last {config.short_window} "
                        "entries only would miss them. Use --plain, or leave --windows out")
    gpt = GPT(config)
    if not memory:
        return gpt, None, None
    from megacontext.gistnet import GistConfig, GistNet
    from megacontext.lensnet import LensConfig, LensNet
    gist_config = configured(GistConfig, gist_config) if gist_config else GistConfig.for_gpt(config)
    return gpt, GistNet(gist_config), LensNet(configured(LensConfig, lens_config or {}))


def configured(kind, values):
    """A network's config from what a checkpoint says of it; what another version of the code wrote is told in a line."""
    known = {field.name for field in fields(kind)}
    if not known.issuperset(values):
        raise UserError(f"the checkpoint was trained by another version of this code: expected a {kind.__name__} of {', '.join(sorted(known))}, "
                        f"found {', '.join(sorted(values))}. Train it again")
    return kind(**values)


def describe(gpt, gistnet, lensnet, tokenizer):
    """What a checkpoint's meta says of the networks: enough to build them again, and to refuse a mismatch."""
    return dict(gpt=gpt.config.to_dict(), gistnet=gistnet and gistnet.config.to_dict(), lensnet=lensnet and lensnet.config.to_dict(), tokenizer=tokenizer.fingerprint)


def newest_tag(stage):
    """The tag of the stage's checkpoint that was written last."""
    root = checkpoint_dir(stage, "any").parent
    tags = [folder for folder in root.glob("*") if ASIDE not in folder.name and checkpoint.steps(folder)] # what was set aside is asked for by its name
    if not tags:
        raise UserError(f"no checkpoint of stage {stage} in {root}: train one first (bash speedrun.sh), or set NANOCHAT_BASE_DIR to where it is")
    return max(tags, key=lambda folder: max(path.stat().st_mtime for path in folder.glob("step_*"))).name


def load_stage(stage, tag=None, step=None, device="cpu", dtype=None, seq_len=None):
    """
    The networks of a checkpoint, in eval mode. tag None = the newest, step None = the last; dtype None = as saved (fp32).
    seq_len overrides the longest row: the next stage of training may read longer ones.
    """
    tag = tag or newest_tag(stage)
    with hardware.out_of_memory_told(f"while {device} took the networks of {stage}/{tag}", room(device, dtype)):
        saved = checkpoint.load(checkpoint_dir(stage, tag), step, device="cpu", optimizer=False)
        networks = saved.meta["networks"]
        config = GPTConfig(**({"previous": 1} | networks["gpt"] | ({"seq_len": seq_len} if seq_len else {}))) # where nothing is said, an embedding knew one token before it
        gpt, gistnet, lensnet = build(config, networks["gistnet"] is not None, networks["gistnet"], networks["lensnet"])
        tokenizer = Tokenizer.load()
        checkpoint.check_match(networks, tokenizer=tokenizer.fingerprint)
        for name, module in modules(gpt, gistnet, lensnet).items():
            module.load_state_dict(saved.tensors[name])
        if config.lora:
            merge(gpt)
        identity = fingerprint(gpt, gistnet) if gistnet is not None else "" # before rounding: in bf16 it is still the same model
        for name, module in modules(gpt, gistnet, lensnet).items():
            module.to(device=device, dtype=None if name == "lensnet" else dtype).eval() # LensNet is tiny and works in fp32 throughout
    return Loaded(gpt, gistnet, lensnet, tokenizer, saved.meta | {"step": saved.step}, stage, tag, identity)


def open_tree(loaded, path=None, mode="a", gist_dtype=None):
    """
    A tree in memory, or the one on disk at path, made if it is not there yet. One whose gists other networks wrote is refused.
    gist_dtype None = as it is, bfloat16 in a new one.
    """
    from megacontext.tree import MegaTree, make_header
    if path is None or not MegaTree.exists(path):
        header = make_header(loaded.gpt.config.width, 0, gist_dtype or "bfloat16", model=loaded.identity, tokenizer=loaded.tokenizer.fingerprint[:16])
        return MegaTree.in_memory(header) if path is None else MegaTree.create(path, header)
    tree = MegaTree.open(path, mode, tokenizer=loaded.tokenizer.fingerprint[:16])
    model, kept, wrong = tree.header.get("model"), tree.header["gist_dtype"], None
    again = f"write them again: {renew_command(loaded, Path(path).parent)}"
    if model != loaded.identity:
        wrong = f"another model wrote the gists of {path}: expected {loaded.identity} ({loaded.stage}/{loaded.tag}), found {model}. Use the checkpoint that wrote them, or {again}"
    elif gist_dtype not in (None, kept):
        wrong = f"{path} keeps its gists as {kept}, not as {gist_dtype}. Leave --gist-dtype out, or {again} --gist-dtype {gist_dtype}"
    if wrong:
        tree.close(commit=False)
        raise UserError(wrong)
    return tree


def renew_command(loaded, folder):
    """What to type for the gists of the memory in a folder to be written by these networks, and no others."""
    return f"python -m scripts.mega_ingest --tree {folder} --renew --stage {loaded.stage} --tag {loaded.tag} --step {loaded.meta['step']}"


def renew_tree(loaded, folder, gist_dtype=None):
    """
    Give the memory in a folder to these networks, for megacontext.ingest.catch_up to write its gists: the tokens stay, the gists go, and a saved
    session is assembled anew, because its keys and values are the old model's. Nothing happens if it is theirs and none of it is damaged: returns
    the files of gists that were. Damaged tokens are refused, nobody can make them anew. gist_dtype None = as it was.
    """
    from megacontext.tree import MegaTree
    tree = MegaTree.open(Path(folder) / "tree", gists=False, tokenizer=loaded.tokenizer.fingerprint[:16])
    try:
        wrong = tree.damage()
        lost = [wrong[file] for file in ("tree.db", "level0.ids") if file in wrong]
        if lost:
            raise UserError("\n".join(lost))
        wanted = dict(model=loaded.identity, width=loaded.gpt.config.width, gist_dtype=gist_dtype or tree.header["gist_dtype"])
        if wrong or wanted.items() - tree.header.items():
            tree.reset_gists(**wanted)
    finally:
        tree.close(commit=False) # what reset_gists did is committed; else the gists are still there
    return sorted(wrong)


def telemetry_maker(args):
    """A function () -> what a new session of a script with add_flags tells of its ticks to, None without memory. All tell the same file and the same wandb run."""
    if args.no_memory:
        if args.telemetry is not None or args.run:
            raise UserError("--telemetry and --run tell what the memory does and --no-memory has none: use one of them")
        return lambda: None
    from megacontext.telemetry import Telemetry
    log, ticks = Log(None, wandb_project="nanochat-memory", run=args.run, config=vars(args)), count(1)
    lock = Lock() # sessions may run in several threads, and wandb drops a step that is lower than the last

    def tell(line):
        with lock:
            log.write(next(ticks), show=False, **line)
    return lambda: Telemetry(args.telemetry, tell if log.wandb else None)


def open_stream(loaded, memory=True, budget=None, tree=None, telemetry=None):
    """
    What the engine feeds: a session with unbounded memory, or the plain GPT behind a KV cache of one row.
    budget None = as it was saved, else half of the longest row that was trained on, or the least that a session takes.
    tree = a folder that keeps, or already holds, the session. One that was not saved after its last tokens, had another budget or another GPT, or
    whose gists were written again is assembled anew from its tree, which has them all.
    telemetry = a megacontext.telemetry.Telemetry that is told of every tick (default: one that keeps to memory).
    """
    if not memory:
        return PlainStream(loaded.gpt, static=loaded.gpt.device.type == "cuda") # a recorded step there; elsewhere it would only read more
    if loaded.gistnet is None:
        config = loaded.gpt.config
        windows = f" and with short windows ({config.windows}), which cannot have one" if config.short_layers else ""
        raise UserError(f"the checkpoint {loaded.stage}/{loaded.tag} was trained without memory{windows}: use --no-memory, or train with MC=1")
    from megacontext.ingest import NODES_AT_ONCE
    from megacontext.runtime import Session
    from megacontext.state import saved as saved_in, weights
    from megacontext.working_context import LEAST_BUDGET
    held = open_tree(loaded, None if tree is None else Path(tree) / "tree")
    first, last = held.pending(1) # a session that was killed leaves the blocks of its raw tail, and the next one writes their gists
    if last - first > NODES_AT_ONCE:
        held.close(commit=False)
        raise UserError(f"the gists in {tree} are not all written, a --renew was interrupted. Go on with it: {renew_command(loaded, tree)}")
    saved = tree and saved_in(tree)
    if saved and saved["model"] == held.header["model"] and saved["length"] == held.length and saved["gpt"] == weights(loaded.gpt):
        return Session.open(tree, loaded.gpt, loaded.gistnet, loaded.lensnet, held, telemetry=telemetry, **dict(budget=budget) if budget else {})
    budget = budget or (saved or {}).get("budget") or max(LEAST_BUDGET, loaded.gpt.config.seq_len // 2)
    return Session(loaded.gpt, loaded.gistnet, loaded.lensnet, held, budget, telemetry=telemetry)
