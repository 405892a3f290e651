"""
Run every stage of a recipe, once: what speedrun.sh does after set-up.

python -m scripts.speedrun --plan      # what would be done: needs no package, works before set-up
python -m scripts.speedrun             # do it

The environment says what is wanted: TIER (8gpu, 1gpu, cpu), MC=0, RUN, TAG, SOURCE, CONVERSATIONS, NANOCHAT_BASE_DIR (README.md).
The idea: base_dir()/stages holds a small file for each stage: its key (its command, what is the user's own among the files that it
reads, and the same of all stages that it needs) and whether it is done. A stage whose key is done is skipped; one that was killed
runs again and goes on from its last checkpoint; one that would make something else than what lies there first sets that aside, so
nothing old is mixed in or lost. What the run will read is opened before its first stage.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

from nanochat import tiers
from nanochat.common import UserError, base_dir, run_main, set_aside
from nanochat.run import duration
from scripts.plan import TALK, Wishes, downloads, hub, keys, sources, stages, told

parser = argparse.ArgumentParser(prog="speedrun.sh", description="Train, evaluate and report, from nothing to a model that talks",
                                 epilog="Environment: TIER=8gpu|1gpu|cpu, MC=0|1, RUN=name, TAG=name, SOURCE=text, CONVERSATIONS=file.jsonl, "
                                        "NANOCHAT_BASE_DIR=folder; README.md says more.")
parser.add_argument("--plan", action="store_true", help="print the plan with all commands, and do nothing")
parser.add_argument("--brief", action="store_true", help="print the plan without the commands, and do nothing")


# ---------------------------------------------------------------------------------------------------------------------
# What is done already

def read_stamp(folder, stage):
    """{"key", "command", "done", "seconds"} of the last time that the stage was begun; {} if it never was."""
    path = folder / f"{stage.stamp}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_stamp(folder, stage, **stamp):
    path = folder / f"{stage.stamp}.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(stamp, indent=1) + "\n")
    os.replace(new, path)


def is_done(stamp, stage, key, base):
    """Done with this very key, and what it made is still there."""
    return not stage.always and bool(stamp.get("done")) and stamp["key"] == key and all((base / folder).exists() for folder in stage.makes)


def clear(stage, base):
    """Set aside what an earlier command made."""
    for folder in stage.makes:
        if (base / folder).exists():
            print(f"{stage.name} is to make something else than the last time: the old {folder} is now {set_aside(base / folder).relative_to(base)} (in {base})", flush=True)


@contextmanager
def alone(folder):
    """One run at a time in a base folder."""
    try:
        import fcntl
    except ModuleNotFoundError: # Windows: nor are there all signals that a stage is told to end by
        raise UserError(f"no run here: expected a system with flock (Linux, macOS), found {sys.platform}. Use Linux, for instance in WSL; --plan tells the commands") from None
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another speedrun is at work in {base_dir()}: wait for it, or set NANOCHAT_BASE_DIR to another folder") from None
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Running

class Stop(Exception):
    """We were told to end: the number of the signal."""


def run_command(words):
    """
    Run a command to its end; a signal to us is passed on to it, and we wait until it is gone.
    Returns its exit code, negative for the signal that ended it; raises Stop(signal) where we were the ones told to end.
    """
    told = []
    child = subprocess.Popen(words)

    def pass_on(number, frame):
        told.append(number)
        if number != signal.SIGINT: # the terminal sends that one to the whole group itself
            child.send_signal(number)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN] # nohup ignores one
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise Stop(told[0])
    return code


def why(code):
    if code >= 0:
        return f"exit code {code}, its reason is above"
    name = signal.Signals(-code).name
    return f"{name}" + (", most often because memory ran out" if code == -signal.SIGKILL else "")


def run_stages(found, folder, base, again):
    """
    found    list of Stage;  folder  where the stamps are;  base  where the stages write;  again  the command that goes on
    Returns the seconds of the stages that were run. Raises UserError at the first that fails.
    """
    wanted, began = keys(found), time.monotonic()
    for number, stage in enumerate(found, 1):
        stamp, title = read_stamp(folder, stage), f"[{number}/{len(found)}] {stage.name}"
        if is_done(stamp, stage, wanted[stage.name], base):
            print(f"{title}: done before, in {duration(stamp['seconds'])}", flush=True)
            continue
        if stamp and stamp["key"] != wanted[stage.name]:
            clear(stage, base)
        print(f"\n{'-' * 100}\n{title}, {duration(time.monotonic() - began)} since the start\n{stage.line}\n", flush=True)
        write_stamp(folder, stage, key=wanted[stage.name], command=stage.line, done=False)
        start = time.monotonic()
        try:
            code = run_command([*stage.command, *stage.extra])
        except FileNotFoundError:
            raise UserError(f"stage {stage.name}: there is no command {stage.command[0]}. Start with bash speedrun.sh, which does the set-up") from None
        except Stop as stop:
            raise UserError(f"stopped by {signal.Signals(stop.args[0]).name} in stage {stage.name}. To go on: {again}") from None
        seconds = time.monotonic() - start
        if code:
            raise UserError(f"stage {stage.name} failed after {duration(seconds)}: {why(code)}. To go on from there: {again}")
        missing = [name for name in stage.makes if not (base / name).exists()]
        assert not missing, f"stage {stage.name} ended well but made no {', '.join(missing)} in {base}"
        write_stamp(folder, stage, key=wanted[stage.name], command=stage.line, done=True, seconds=seconds)
        print(f"\n{stage.name} took {duration(seconds)}", flush=True)
    return time.monotonic() - began


def ready(recipe, wishes, folder, base):
    """The stages of the run, after a look at all that they will read. Raises UserError for what is missing or broken: nothing is trained yet."""
    try:
        from scripts import mixtures
    except ImportError as error:
        raise UserError(f"a package is missing ({error}). Start with bash speedrun.sh, which does the set-up") from error
    run = stages(recipe, wishes, *mixtures.own_data(sources(recipe, wishes), wishes.conversations))
    wanted = keys(run)
    if hub(recipe) and not all(is_done(read_stamp(folder, stage), stage, wanted[stage.name], base) for stage in run if stage.name in ("mid_train", "chat_sft")):
        for split in ("train", "val"):
            mixtures.hub_tasks(split)
    return run


def main():
    args = parser.parse_args()
    wishes, found = Wishes.of(os.environ), tiers.look()
    wishes.check_files()
    recipe, reason = tiers.choose(found, os.environ.get("TIER", ""))
    if args.plan or args.brief:
        print(told(found, recipe, reason, wishes, commands=args.plan))
        return
    folder = base_dir() / "stages"
    folder.mkdir(exist_ok=True)
    with alone(folder):
        run = stages(recipe, wishes)
        begun = any(read_stamp(folder, stage) for stage in run) # then part of what it needs is there already
        tiers.check_machine(found, recipe, 0 if begun else tiers.disk(recipe, downloads(recipe, run)))
        run = ready(recipe, wishes, folder, base_dir())
        again = wishes.told(recipe.tier, RUN=wishes.run, NANOCHAT_BASE_DIR=os.environ.get("NANOCHAT_BASE_DIR", ""))
        seconds = run_stages(run, folder, base_dir(), f"{again} bash speedrun.sh")
    print(f"\nDone in {duration(seconds)}. The report is report.md. Talk to the model:\n  source .venv/bin/activate\n" + "\n".join(f"  {line}" for line in TALK))


if __name__ == "__main__":
    run_main(main)
