"""
The commands of a whole run, in order, and what to tell people about it before it starts.

In:  a Recipe (nanochat/tiers.py), and the user's wishes from the environment: MC, RUN, TAG, SOURCE, CONVERSATIONS.
Out: a list of Stages for scripts/speedrun.py, and the plan as text.
"""
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from nanochat import cost, tiers
from nanochat.common import UserError, base_dir


@dataclass(frozen=True)
class Wishes:
    """What the environment asks for."""
    memory: bool = True       # MC: 1 with memory, 0 the plain model
    run: str = ""             # RUN: name of the wandb runs
    tag: str = ""             # TAG: name of the checkpoint folders
    source: str = ""          # SOURCE: text to train on
    conversations: str = ""   # CONVERSATIONS: a JSONL file of one's own

    @classmethod
    def of(cls, environment):
        mc, tag = environment.get("MC", "1"), environment.get("TAG", "")
        if mc not in ("0", "1"):
            raise UserError(f"MC={mc}: expected 1 (with memory) or 0 (the plain model)")
        if "/" in tag or tag.startswith((".", "-")):
            raise UserError(f"TAG={tag}: expected the name of a folder, without / and not beginning with . or -")
        return cls(mc == "1", environment.get("RUN", ""), tag, environment.get("SOURCE", ""), environment.get("CONVERSATIONS", ""))

    def check_files(self):
        """What can be seen without any package: is the file there?"""
        path = Path(self.conversations).expanduser()
        if self.conversations and not path.is_file():
            raise UserError(f"CONVERSATIONS={self.conversations}: expected a file with one conversation a line, there is none at {path.absolute()}")

    def told(self, tier, **more):
        """The environment that asks for this, as one types it: what changes the result, and more."""
        named = dict(TIER=tier, MC="" if self.memory else "0", TAG=self.tag, SOURCE=self.source, CONVERSATIONS=self.conversations, **more)
        return " ".join(f"{name}={shlex.quote(value)}" for name, value in named.items() if value)


@dataclass(frozen=True)
class Stage:
    """
    name      what it is called
    command   words
    needs     names of stages whose work it reads: when one of them is done anew, so is this
    reads     fingerprints of the user's own files that it reads: when they change, it is done anew
    makes     folders below base_dir() that are there when it is done, and are set aside before it makes something else
    extra     words after the command that change nothing in what it makes
    always    cheap enough to do every time
    """
    name: str
    command: tuple
    needs: tuple = ()
    makes: tuple = ()
    extra: tuple = ()
    always: bool = False
    reads: tuple = ()

    @property
    def line(self):
        return shlex.join(self.command + self.extra)

    @property
    def stamp(self):
        """File that says whether it is done: one for each tag where the tag has a folder of its own."""
        return "-".join([self.name, *(folder.partition("/")[2] for folder in self.makes if "/" in folder)])


def keys(stages):
    """{name: fingerprint of a stage's command, of what is the user's own among what it reads, and of the same of everything it needs}."""
    by_name, found = {stage.name: stage for stage in stages}, {}

    def key(name):
        if name not in found:
            needed = [key(need) for need in by_name[name].needs if need in by_name]
            found[name] = hashlib.sha256(repr((by_name[name].command, *by_name[name].reads, needed)).encode()).hexdigest()[:16]
        return found[name]

    return {name: key(name) for name in by_name}


def flag(name, value):
    """A flag and its value, or nothing where -1 or "" leaves it to the script."""
    return () if value in (-1, "") else (name, str(value))


def sources(recipe, wishes):
    """Every source of text that the run reads."""
    return {wishes.source} if wishes.source else {recipe.source, recipe.long_source, recipe.memory_source}


def hub(recipe):
    """Does the run take conversations from the data hub?"""
    return recipe.device == "cuda"


def stages(recipe, wishes, own_text="", own_talk=""):
    """
    Every command of the run, in order.
    own_text, own_talk  fingerprints of the user's own text and conversations, "" for none
    """
    one = ("python", "-m")
    many = ("torchrun", "--standalone", f"--nproc_per_node={recipe.processes}", "-m") if recipe.processes > 1 else one
    tag = wishes.tag or f"d{recipe.depth}" + ("" if wishes.memory else "-plain")
    text, device = ("--source", wishes.source or recipe.source), ("--device", recipe.device)
    long_text = ("--source", wishes.source or recipe.long_source)
    from_hub = ("--hub",) if hub(recipe) else ()
    sft_steps = tiers.later_steps(recipe)[1]

    def train(name, *flags, needs, reads=()):
        flags += (*flag("--save-every", recipe.save_every), *flag("--eval-tokens", recipe.eval_tokens), *device, "--resume")
        folder = {"base_train": "base", "mid_train": "mid", "chat_sft": "sft"}[name] + f"_checkpoints/{tag}"
        return Stage(name, (*many, f"scripts.{name}", "--tag", tag, *flags), needs, (folder,), flag("--run", wishes.run), reads=reads)

    def read(name, stage, *flags):
        tokens = ("--tokens", str(recipe.eval_tokens))
        return Stage(name, (*many, "scripts.base_eval", "--stage", stage, "--tag", tag, *text, *tokens, *flags, *device), ("report_start",))

    def chat(name, stage):
        memory = "--both" if wishes.memory else "--no-memory"
        return Stage(name, (*many, "scripts.chat_eval", "--stage", stage, "--tag", tag, memory, *recipe.chat_flags, *long_text, *device), ("report_start",))

    run = [
        Stage("report_start", (*one, "nanochat.report", "--reset", "--tier", recipe.tier, "--arguments", wishes.told(recipe.tier)), ("chat_sft",)),
        Stage("download", (*one, "nanochat.dataset", "-n", str(tiers.shards(recipe)))),
        Stage("tok_train", (*one, "scripts.tok_train", *text, "--vocab-size", str(recipe.vocab_size), "--max-chars", str(recipe.tokenizer_chars)),
              ("download",), ("tokenizer",), reads=flag("text", own_text)), # and with it everything that follows
        Stage("tok_eval", (*one, "scripts.tok_eval", *text), ("report_start",)),
        train("base_train", "--depth", str(recipe.depth), *(() if wishes.memory else ("--plain",)), *text, "--max-seq-len", str(recipe.seq_len),
              *flag("--batch-tokens", recipe.batch_tokens), *flag("--num-tokens", tiers.horizon(recipe)), *flag("--lr", recipe.lr), needs=("tok_train",)),
        read("base_eval", "base", "--core", recipe.core),
        train("mid_train", "--base-tag", tag, *long_text, *from_hub, "--max-seq-len", str(recipe.long_len), *flag("--num-steps", recipe.mid_steps), needs=("base_train",)),
        read("mid_eval", "mid", "--core", "off", "--samples", "0"),
        chat("mid_chat_eval", "mid"),
        train("chat_sft", "--mid-tag", tag, *long_text, *from_hub, *flag("--conversations", wishes.conversations), "--max-seq-len", str(recipe.long_len),
              "--num-steps", str(sft_steps), needs=("mid_train",), reads=flag("conversations", own_talk)),
        read("sft_eval", "sft", "--core", "off", "--samples", "0"),
        chat("chat_eval", "sft"),
        Stage("mega_eval", (*one, "scripts.mega_eval", "--checkpoint", f"base/{tag}", "--source", wishes.source or recipe.memory_source, *recipe.memory_flags, *device), ("report_start",)),
        Stage("recall_eval", (*one, "scripts.recall_eval", "--checkpoint", f"sft/{tag}", "--source", wishes.source or recipe.memory_source, *recipe.recall_flags, *device), ("report_start",)),
        Stage("report", (*one, "nanochat.report", "--tag", tag), always=True),
    ]
    left_out = set() if wishes.memory else {"mega_eval", "recall_eval"}
    if "climbmix" not in text[1]:
        left_out.add("download")
    return [stage for stage in run if stage.name not in left_out]


def downloads(recipe, run):
    """Shards that a run fetches."""
    return tiers.shards(recipe) if any(stage.name == "download" for stage in run) else 0


def told(found, recipe, reason, wishes, commands=True):
    """The plan for people: what, on how much, how long, how large; and, with commands, every command."""
    plan, (mid, sft) = tiers.base_plan(recipe), tiers.later_steps(recipe)
    run = stages(recipe, wishes)
    shards = downloads(recipe, run)
    hours = tiers.hours(recipe, wishes.memory, shards)
    gpus = f"{found.gpus} x {found.gpu}, {found.vram:.0f} GiB each" if found.gpus else found.trouble or "no NVIDIA GPU"
    ram = f"{found.ram:.0f} GiB of RAM" if found.ram else "RAM unknown"
    time = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.0f} hours"
    where = f"on {recipe.card} (an estimate; it goes with the card's speed)" if recipe.card else "on 2 cores"
    counts = cost.parameter_counts(tiers.shape(recipe))
    lines = [
        ("machine", f"{gpus}; {found.cores} cores, {ram}, {found.disk:.0f} GB free in {base_dir()}"),
        ("tier", f"{recipe.tier} ({reason})"),
        ("model", f"d{recipe.depth}, {counts['total'] / 1e6:.0f}M parameters, vocabulary of {recipe.vocab_size:,}, " + ("with memory" if wishes.memory else "plain, without memory")),
        ("tokens", f"{plan.tokens / 1e6:,.1f}M: {plan.steps:,} steps of {plan.batch_tokens:,}; then {mid:,} steps of mid-training and {sft:,} of fine-tuning"),
        ("text", f"{wishes.source or recipe.source}" + (f", {shards} shards of {tiers.SHARD_MB} MB" if shards else ", no download")),
        ("time", f"about {time} {where}"),
        ("disk", f"about {tiers.disk(recipe, shards):.1f} GB, and the packages"),
    ]
    text = "\n".join(f"{name:8} {value}" for name, value in lines)
    if commands:
        text += "\n\n" + "\n".join(f"# {stage.name}\n{stage.line}" for stage in run) + "\n\n# then talk to it\n" + "\n".join(TALK)
    return text


TALK = ("python -m scripts.chat_web                  # in the browser", 'python -m scripts.chat_cli -p "What is 12*34?"  # in the terminal')
