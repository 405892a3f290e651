"""
The plan of a run and the way its stages are run. The laws: what is done is never done twice, what a changed command would
replace is set aside and never mixed in, everything that reads the work of a repeated stage is repeated, and every command of every
tier is one that its script takes. The slow twin of the runner is a list of what it should have run.
"""
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from nanochat import cost, hardware, tiers
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from scripts import mixtures, plan, speedrun
from scripts.plan import Stage, Wishes, keys

ROOT = Path(__file__).resolve().parent.parent
RECIPES = [tiers.CPU, tiers.NODE, *(recipe for _, recipe in tiers.CARDS)]
G = 2**30


def found(gpus=0, vram=0.0, gpu="GPU", disk=1000.0):
    return tiers.Found(gpus, gpu if gpus else "", vram, 2, 16.0, disk)


# ---------------------------------------------------------------------------------------------------------------------
# Machine -> tier

@pytest.mark.parametrize("gpus, vram, tier, depth", [
    (0, 0, "cpu", 4), (1, 4, "cpu", 4), (1, 8, "1gpu", 8), (1, 11.99, "1gpu", 12), (1, 24, "1gpu", 12), (1, 39.4, "1gpu", 16),
    (7, 79.6, "1gpu", 20), (8, 79.6, "8gpu", 20), (16, 141, "8gpu", 20)])
def test_a_machine_gets_its_tier(gpus, vram, tier, depth):
    recipe, reason = tiers.choose(found(gpus, vram))
    assert (recipe.tier, recipe.depth) == (tier, depth) and reason


def test_more_memory_never_means_a_smaller_run():
    """Random cards: depth x tokens grows with memory, and each card is at least as large as its row of the table asks."""
    rng = random.Random(0)
    sizes = sorted(rng.uniform(tiers.CARDS[-1][0], 200) for _ in range(300))
    flops = [tiers.base_plan(recipe).tokens * cost.train_flops(tiers.shape(recipe)) for recipe in (tiers.choose(found(1, size))[0] for size in sizes)]
    assert flops == sorted(flops)


@pytest.mark.parametrize("least, recipe", tiers.CARDS)
def test_each_card_holds_its_model(least, recipe):
    """A row of mid-training, the longest there is, fits into the smallest card of the class by the arithmetic of nanochat/hardware.py."""
    import torch
    machine = hardware.Machine("cuda", recipe.card, 1, 8, 64 * G, int(least * G), int(0.97 * least * G), 10**12, recipe.peak, (8, 0))
    config = GPTConfig.from_depth(recipe.depth, recipe.vocab_size, recipe.long_len)
    rows, _ = hardware.device_rows(machine, config, cost.parameter_counts(config), torch.bfloat16)
    assert rows >= 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.card or recipe.tier)
def test_the_plan_counts_the_parameters_of_the_model(recipe):
    assert cost.parameter_counts(tiers.shape(recipe)) == cost.parameter_counts(GPTConfig.from_depth(recipe.depth, recipe.vocab_size, recipe.seq_len))


@pytest.mark.parametrize("asked, here, says", [("9gpu", found(), "8gpu, 1gpu, cpu"), ("CPU", found(), "cpu"), ("1gpu", found(1, 4), "TIER=cpu")])
def test_a_tier_that_cannot_be_says_so(asked, here, says):
    with pytest.raises(UserError, match=says):
        tiers.choose(here, asked)


def test_a_plan_is_for_any_machine_but_a_run_is_not(base):
    for tier in ("1gpu", "8gpu"):
        recipe, _ = tiers.choose(found(), tier)
        with pytest.raises(UserError, match="--plan"):
            tiers.check_machine(found(), recipe, 1)
    tiers.check_machine(found(), tiers.CPU, 1)
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        tiers.check_machine(found(disk=1.0), tiers.CPU, 2)


@pytest.mark.parametrize("output, code, visible, gpus, vram", [
    ("NVIDIA H100 80GB HBM3, 81559\n" * 8, 0, None, 8, 79.6), ("NVIDIA H100 80GB HBM3, 81559\n" * 8, 0, "2,5", 2, 79.6),
    ("A, 8192\nB, 24576\n", 0, "1", 1, 24.0), ("A, 8192\nB, 24576\n", 0, None, 2, 8.0), ("A, 8192\nB, 8192\n", 0, "GPU-1f2e", 1, 8.0),
    ("A, 8192\n", 0, "", 0, 0.0), ("A, 8192\n", 0, "-1", 0, 0.0), ("", 0, None, 0, 0.0),
    ("Failed to initialize NVML", 9, None, 0, 0.0), ("NVIDIA GB10, [N/A]\n", 0, None, 0, 0.0)])
def test_what_nvidia_smi_says(tmp_path, monkeypatch, base, output, code, visible, gpus, vram):
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "says").write_text(output)
    tool.write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'says'))}\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = tiers.look()
    assert here.gpus == gpus and here.vram == pytest.approx(vram, abs=0.1)
    assert bool(here.trouble) == (code != 0 or "N/A" in output)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.card or recipe.tier)
def test_the_readme_tells_what_a_tier_costs(recipe):
    shards = plan.downloads(recipe, plan.stages(recipe, Wishes()))
    hours, disk, tokens = tiers.hours(recipe, True, shards), tiers.disk(recipe, shards), tiers.base_plan(recipe).tokens / 1e6
    time = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.0f} hours"
    row = f"| `{recipe.tier}` | {recipe.card or '2 cores'} | d{recipe.depth} | {tokens:,.1f}M | {time} | {disk:.{0 if disk > 2 else 1}f} GB |"
    assert row in (ROOT / "README.md").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Recipe -> commands

def parser_of(module):
    """The argument parser of a script, or None where it is made inside main()."""
    return getattr(__import__(module, fromlist=["parser"]), "parser", None)


@pytest.mark.parametrize("recipe, memory", list(product(RECIPES, (True, False))), ids=lambda value: getattr(value, "card", "") or getattr(value, "tier", str(value)))
def test_every_command_is_one_that_its_script_takes(recipe, memory):
    wishes = Wishes(memory=memory, run="try", conversations="mine.jsonl")
    for stage in plan.stages(recipe, wishes):
        words = shlex.split(stage.line)
        assert words[0] in ("python", "torchrun")
        at = words.index("-m")
        parser = parser_of(words[at + 1])
        if parser is not None:
            parser.parse_args(words[at + 2:])


def test_with_and_without_memory_differ_where_they_must():
    with_memory, plain = plan.stages(tiers.CPU, Wishes()), plan.stages(tiers.CPU, Wishes(memory=False))
    assert [stage.name for stage in with_memory if stage.name not in ("mega_eval", "recall_eval")] == [stage.name for stage in plain]
    assert not {folder for stage in with_memory for folder in stage.makes} & {folder for stage in plain for folder in stage.makes} - {"tokenizer"}
    lines = {stage.name: stage.line for stage in plain}
    assert "--plain" in lines["base_train"] and "--no-memory" in lines["chat_eval"]


def test_the_order_of_the_commands():
    """Every stage comes after those that it needs, but the note of the start, which is first and only names what follows."""
    for recipe in RECIPES:
        run = plan.stages(recipe, Wishes())
        names = [stage.name for stage in run]
        assert names[0] == "report_start" and names[-1] == "report" and len(set(names)) == len(names)
        for i, stage in enumerate(run[1:], 1):
            assert all(need in names[:i] or need == "download" for need in stage.needs)


def test_own_text_needs_no_download():
    names = lambda **wishes: [stage.name for stage in plan.stages(tiers.NODE, Wishes(**wishes))]
    assert "download" in names() and "download" in names(source="climbmix:0.5,dir:/x:0.5") and "download" not in names(source="dir:/x")


def test_the_name_of_a_wandb_run_does_not_train_anew():
    assert keys(plan.stages(tiers.CPU, Wishes(run="a"))) == keys(plan.stages(tiers.CPU, Wishes()))


def test_a_change_reaches_what_hangs_on_it_and_nothing_else():
    before = keys(plan.stages(tiers.CPU, Wishes()))
    changed = lambda recipe: {name for name, key in keys(plan.stages(recipe, Wishes())).items() if key != before[name]}
    evaluations = {"report_start", "tok_eval", "base_eval", "mid_eval", "mid_chat_eval", "sft_eval", "chat_eval", "mega_eval", "recall_eval"}
    assert changed(replace(tiers.CPU, sft_steps=41)) == {"chat_sft"} | evaluations
    assert changed(replace(tiers.CPU, mid_steps=61)) == {"mid_train", "chat_sft"} | evaluations
    assert changed(replace(tiers.CPU, vocab_size=5000)) == {"tok_train", "base_train", "mid_train", "chat_sft"} | evaluations
    assert changed(replace(tiers.CPU, memory_flags=("--documents", "7"))) == {"mega_eval"}


def test_changed_files_of_the_users_reach_what_hangs_on_them_and_nothing_else():
    """An edited mine.jsonl, or another text under the old name of a folder, was "done before": the key was of the commands alone."""
    wishes = Wishes(source="dir:/texts", conversations="mine.jsonl")
    make = lambda **prints: keys(plan.stages(tiers.CPU, wishes, **prints))
    before, evaluations = make(own_text="a", own_talk="a"), {"report_start", "tok_eval", "base_eval", "mid_eval", "mid_chat_eval", "sft_eval", "chat_eval", "mega_eval", "recall_eval"}
    changed = lambda **prints: {name for name, key in make(**prints).items() if key != before[name]}
    assert changed(own_text="a", own_talk="b") == {"chat_sft"} | evaluations
    assert changed(own_text="b", own_talk="a") == {"tok_train", "base_train", "mid_train", "chat_sft"} | evaluations
    assert make() == keys(plan.stages(tiers.CPU, wishes)), "nothing of one's own: the command says it all"
    assert plan.sources(tiers.CPU, wishes) == {"dir:/texts"} and plan.sources(tiers.NODE, Wishes()) == {"climbmix", "climbmix:0.8,stdlib:0.2", "stdlib"}


@pytest.mark.parametrize("environment", [{"MC": "yes"}, {"MC": ""}, {"TAG": "a/b"}, {"TAG": "../x"}, {"TAG": "-x"}])
def test_a_wish_that_cannot_be_says_so(environment):
    with pytest.raises(UserError, match="expected"):
        Wishes.of(environment)


def test_what_is_told_can_be_typed_again(tmp_path):
    wishes = Wishes(memory=False, tag="a b", source="dir:/my texts:0.5,stdlib", conversations="it's.jsonl")
    typed = subprocess.run(["bash", "-c", wishes.told("cpu") + " env"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True).stdout
    assert Wishes.of(dict(line.split("=", 1) for line in typed.splitlines() if "=" in line)) == wishes


# ---------------------------------------------------------------------------------------------------------------------
# Running

WORK = """
import os, pathlib, sys
name, out, fails = sys.argv[1:4]
with open("ran", "a") as file: file.write(name + "\\n")
if out: pathlib.Path(out).mkdir(parents=True, exist_ok=True)
sys.exit(int(fails))
"""


class Runs:
    """A miniature: stages in a folder, each of which notes its name in the file `ran`."""

    def __init__(self, folder, monkeypatch):
        self.base = folder
        self.stamps = folder / "stages"
        self.stamps.mkdir(parents=True)
        monkeypatch.chdir(folder)

    def stage(self, name, needs=(), out="", fails=0, version=0, **more):
        return Stage(name, (sys.executable, "-S", "-c", WORK, name, out, str(fails), str(version)), needs, (out,) if out else (), **more)

    def __call__(self, stages):
        """Names of the stages that were run."""
        (self.base / "ran").write_text("")
        try:
            speedrun.run_stages(stages, self.stamps, self.base, "bash speedrun.sh")
        finally:
            self.ran = (self.base / "ran").read_text().split()
        return self.ran


@pytest.fixture
def runs(tmp_path, monkeypatch):
    return Runs(tmp_path / "base dir", monkeypatch)


def test_by_hand(runs, capsys):
    """a; b needs a; c needs a; d needs b; report always. Then again; then b changes; then c's folder is deleted."""
    def make(b=0):
        return [runs.stage("a", out="made/a"), runs.stage("b", ("a",), "made/b", version=b), runs.stage("c", ("a",), "made/c"), runs.stage("d", ("b",)),
                runs.stage("report", always=True)]
    assert runs(make()) == ["a", "b", "c", "d", "report"]
    assert runs(make()) == ["report"]
    assert "done before" in capsys.readouterr().out
    assert runs(make(b=1)) == ["b", "d", "report"]
    asides = [path.name for path in (runs.base / "made").iterdir() if "before" in path.name]
    assert len(asides) == 1 and asides[0].startswith("b.before-")
    (runs.base / "made/c").rmdir()
    assert runs(make(b=1)) == ["c", "report"]


def test_a_failed_stage_stops_the_run_and_is_where_the_next_one_begins(runs):
    b = "import os, sys\nopen('ran', 'a').write('b\\n')\nsys.exit(0 if os.path.exists('mended') else 3)"
    stages = [runs.stage("a"), Stage("b", (sys.executable, "-S", "-c", b)), runs.stage("c")]
    with pytest.raises(UserError, match="stage b failed .*exit code 3.*To go on from there: bash speedrun.sh"):
        runs(stages)
    assert runs.ran == ["a", "b"]
    (runs.base / "mended").write_text("")
    assert runs(stages) == ["b", "c"]


def test_a_killed_stage_is_told_and_keeps_what_it_made(runs):
    """Its checkpoints are what it goes on from: the second attempt finds them in place, not set aside."""
    work = "import os\nif os.path.exists('out'): raise SystemExit(0)\nos.mkdir('out')\nos.kill(os.getpid(), 9)"
    killed = Stage("train", (sys.executable, "-S", "-c", work), makes=("out",))
    with pytest.raises(UserError, match="SIGKILL, most often because memory ran out"):
        runs([killed])
    runs([killed])
    assert [path.name for path in runs.base.glob("out*")] == ["out"]


def test_a_stage_that_lies_is_our_mistake(runs):
    with pytest.raises(AssertionError, match="made no other"):
        runs([replace(runs.stage("a", out="this"), makes=("other",))])


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_against_the_slow_twin(runs, seed):
    """
    Random graphs, random changes, random failures. The twin keeps for every stage the whole tree of commands that it was last done
    with, as nested tuples, and says what has to run; it knows of no keys, files or folders.
    """
    rng = random.Random(seed)
    names = "abcdef"
    needs = {name: tuple(other for other in names[:i] if rng.random() < 0.4) for i, name in enumerate(names)}
    versions, done = dict.fromkeys(names, 0), {}
    tree = lambda name: (name, versions[name], tuple(tree(need) for need in needs[name]))
    for _ in range(4):
        for name in rng.sample(names, rng.randrange(3)):
            versions[name] = rng.randrange(3)
        fails = rng.choice([None, None, *names])
        expected = []
        for name in names:
            if done.get(name) == tree(name):
                continue
            expected.append(name)
            if name == fails:
                done.pop(name, None)
                break
            done[name] = tree(name)
        # failing is no part of a command's words: a file says who fails
        (runs.base / "fails").write_text(fails or "")
        work = "import sys\nopen('ran', 'a').write(sys.argv[1] + '\\n')\nsys.exit(open('fails').read() == sys.argv[1])"
        run = [Stage(name, (sys.executable, "-S", "-c", work, name, str(versions[name])), needs[name]) for name in names]
        if fails in expected:
            with pytest.raises(UserError, match=f"stage {fails} failed"):
                runs(run)
        else:
            runs(run)
        assert runs.ran == expected


def test_two_tags_keep_their_models(runs):
    """Training under another tag and coming back repeats only what the tags share: the report's own stages."""
    def make(tag):
        return [Stage("note", (sys.executable, "-S", "-c", WORK, "note", "", "0", tag), ("train",)), runs.stage("train", out=f"models/{tag}")]
    assert runs(make("one")) == ["note", "train"]
    assert runs(make("two")) == ["note", "train"]
    assert runs(make("one")) == ["note"]
    assert sorted(path.name for path in (runs.base / "models").iterdir()) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [True, False])
def test_a_whole_run_in_miniature(base, tmp_path, monkeypatch, memory):
    """The real commands, on next to nothing: every stage ends well, nothing is missing in the report, and a second run does nothing."""
    tiny = replace(tiers.CPU, depth=1, vocab_size=1024, seq_len=512, long_len=1024, tokens=20480, batch_tokens=1024, mid_steps=2, sft_steps=2, save_every=5, eval_tokens=4096,
                   chat_flags=("--seconds", "0.2"), memory_flags=("--budget", "192", "--documents", "2", "--measured-rows", "2"), recall_flags=("--recall-tasks", "multikey", "--recall-lengths", "512", "--recall-problems", "1"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    stamps, run = base / "stages", plan.stages(tiny, Wishes(memory=memory))
    stamps.mkdir(parents=True)
    speedrun.run_stages(run, stamps, base, "again")
    report = (tmp_path / "report.md").read_text()
    assert report.replace("](base/report/", "](") == (base / "report/report.md").read_text(), "the pictures stand in one place only"
    missing = [line for line in report.partition("## Missing")[2].partition("##")[0].splitlines() if line.startswith("- ")]
    assert all("mega" in line or "recall" in line for line in missing) and len(missing) == (0 if memory else 2)
    (tmp_path / "report.md").unlink()
    began = {path.name: path.stat().st_mtime_ns for path in stamps.iterdir()}
    speedrun.run_stages(run, stamps, base, "again")
    assert {path.name for path in stamps.iterdir() if path.stat().st_mtime_ns != began[path.name]} == {"report.json"}


def test_two_runs_do_not_share_a_folder(base, tmp_path):
    with speedrun.alone(tmp_path):
        with pytest.raises(UserError, match="another speedrun"):
            with speedrun.alone(tmp_path):
                pass
    with speedrun.alone(tmp_path):
        pass


def test_a_missing_command_is_one_line(runs):
    with pytest.raises(UserError, match="there is no command torchrun-of-nowhere"):
        runs([Stage("a", ("torchrun-of-nowhere",))])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_a_signal_reaches_the_stage_and_the_line_says_how_to_go_on(tmp_path, number, code):
    """The stage gets to clean up before the run ends: no orphan goes on training after Ctrl-C or a scheduler's SIGTERM."""
    child = ("import pathlib, signal, sys, time\ndef end(*_):\n    time.sleep(0.2); pathlib.Path('cleaned').write_text(''); sys.exit(1)\n"
             "signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end); pathlib.Path('ready').write_text(''); time.sleep(30)")
    main = (f"import sys, pathlib\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from nanochat.common import run_main\nfrom scripts.plan import Stage\nfrom scripts.speedrun import run_stages\n"
            f"train, here = Stage('train', (sys.executable, '-S', '-c', {child!r})), pathlib.Path('.')\n"
            "run_main(lambda: run_stages([train], here, here, 'bash speedrun.sh'))")
    process = subprocess.Popen([sys.executable, "-c", main], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == code and (tmp_path / "cleaned").exists()
    assert said.strip() == f"error: stopped by {number.name} in stage train. To go on: bash speedrun.sh"
    assert json.loads((tmp_path / "train.json").read_text())["done"] is False


# ---------------------------------------------------------------------------------------------------------------------
# The two scripts

def bash(*words, **environment):
    ours = ("TIER", "MC", "TAG", "RUN", "SOURCE", "CONVERSATIONS", "PYTHON", "RUSTBPE_WHEEL")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(["bash", *words], cwd=ROOT, env=clean | {"PYTHON": sys.executable} | environment, capture_output=True, text=True)


def test_speedrun_prints_its_plan_without_any_package(tmp_path):
    """python -S -I: not even site-packages. The plan must be readable before anything is installed."""
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -S \"$@\"\n")
    bare.chmod(0o755)
    for tier in tiers.TIERS:
        said = bash("speedrun.sh", "--plan", TIER=tier, PYTHON=str(bare), NANOCHAT_BASE_DIR=str(tmp_path))
        assert said.returncode == 0, said.stderr
        commands = re.findall(r"^(?:python|torchrun) .*$", said.stdout, re.M)
        assert len(commands) == len(plan.stages(tiers.choose(found(), tier)[0], Wishes())) + len(plan.TALK)
    assert not (tmp_path / "stages").exists()
    missing = bash("speedrun.sh", "--plan", CONVERSATIONS="/nope.jsonl", PYTHON=str(bare), NANOCHAT_BASE_DIR=str(tmp_path))
    assert missing.returncode == 2 and missing.stderr.startswith("error: CONVERSATIONS=/nope.jsonl") and not missing.stdout


@pytest.mark.parametrize("environment, says", [
    ({"TIER": "2gpu"}, "no tier called '2gpu'"), ({"MC": "maybe"}, "MC=maybe"), ({"CONVERSATIONS": "/nope.jsonl"}, "there is none at /nope.jsonl"), ({"PYTHON": "/nowhere/python"}, "PYTHON=/nowhere/python is no Python 3.10")])
def test_speedrun_ends_in_one_line_before_it_installs_anything(tmp_path, environment, says):
    said = bash("speedrun.sh", NANOCHAT_BASE_DIR=str(tmp_path), **environment)
    assert said.returncode != 0 and said.stderr.startswith("error: ") and says in said.stderr and said.stderr.count("\n") == 1


def test_a_run_looks_at_everything_it_will_read_before_its_first_stage(base, tmp_path, monkeypatch):
    """A typing mistake in a file of conversations, or data that the hub does not give, was found by fine-tuning, hours after the start."""
    text, mine = tmp_path / "text", tmp_path / "mine.jsonl"
    text.mkdir()
    for n in range(3):
        (text / f"{n}.txt").write_text("some text\n")
    mine.write_text('{"messages": []}\n')
    asked = []
    monkeypatch.setattr(mixtures, "hub_tasks", asked.append)
    (base / "stages").mkdir(parents=True)

    def ready(recipe=tiers.CPU, **wishes):
        return speedrun.ready(recipe, Wishes(**wishes), base / "stages", base)

    for wishes, told in [(dict(conversations=str(mine)), f"{mine}, line 1: expected"), (dict(source=f"dir:{text}/none"), "no folder at"),
                         (dict(source="dir"), "no source called")]:
        with pytest.raises(UserError, match=told):
            ready(**wishes)
    mine.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    wishes = dict(source=f"dir:{text}", conversations=str(mine))
    first = keys(ready(**wishes))
    mine.write_text(mine.read_text().replace('"b"', '"c"'))
    second = keys(ready(**wishes))
    assert second["mid_train"] == first["mid_train"] and second["chat_sft"] != first["chat_sft"]
    (text / "2.txt").write_text("another text\n")
    third = keys(ready(**wishes))
    assert third["tok_train"] != second["tok_train"] and third == keys(ready(**wishes))
    assert not asked, "the cpu tier needs no hub"
    gpu = tiers.CARDS[0][1]
    run = ready(gpu, **wishes)
    assert asked == ["train", "val"]
    for stage in run:
        for folder in stage.makes:
            (base / folder).mkdir(parents=True)
        speedrun.write_stamp(base / "stages", stage, key=keys(run)[stage.name], command=stage.line, done=True, seconds=1)
    ready(gpu, **wishes)
    assert asked == ["train", "val"], "what was trained already needs no hub any more"


def test_without_the_packages_a_run_says_how_to_get_them(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "scripts.mixtures", None)
    monkeypatch.delattr("scripts.mixtures")
    with pytest.raises(UserError, match="a package is missing .*bash speedrun.sh"):
        speedrun.ready(tiers.CPU, Wishes(), base, base)


def setup_with(tools, folder, call, **environment):
    """Run a function of runs/setup.sh in a shell where only some commands exist; tools = {name: script}."""
    folder.mkdir(exist_ok=True)
    for name in ("awk", "sed", "sort", "head", "cat", "df", "cksum", "uname", "sh"):
        if name not in tools:
            (folder / name).symlink_to(subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True).stdout.strip())
    for name, script in tools.items():
        (folder / name).write_text("#!/bin/sh\n" + script + "\n")
        (folder / name).chmod(0o755)
    return subprocess.run(["/bin/bash", "-c", f"source runs/setup.sh; {call}"], cwd=ROOT, env={"PATH": str(folder), **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("tools, says", [
    ({}, "Rust is missing"), ({"cargo": "exit 1"}, "Rust is missing"), ({"cargo": "echo cargo 99.1.0"}, "no linker"),
    ({"cargo": "echo cargo 1.70.0"}, "Rust 1.70.0 is too old"), ({"cargo": "echo cargo 1.9.0"}, "Rust 1.9.0 is too old")])
def test_without_a_rust_that_will_do_set_up_says_how_to_get_one(tmp_path, tools, says):
    said = setup_with(tools, tmp_path / "bin", 'find_rust || fail "$rust"')
    assert said.returncode == 1 and says in said.stderr and "rustup" in said.stderr and "RUSTBPE_WHEEL" in said.stderr and said.stderr.count("\n") == 1
    assert setup_with({"cargo": "echo cargo 99.1.0", "cc": ""}, tmp_path / "good", "find_rust").returncode == 0


def test_set_up_finds_a_python_or_says_which_one_it_wants(tmp_path):
    said = setup_with({"python3": "exit 1"}, tmp_path / "bin", "find_python")
    assert said.returncode == 1 and "no Python 3.10 or newer" in said.stderr and said.stderr.count("\n") == 1
    newer = setup_with({"python3": "exit 1", "python3.12": "exit 0"}, tmp_path / "newer", "find_python; echo $python")
    assert newer.stdout.strip() == "python3.12"


def test_set_up_says_how_much_disk_it_wants(tmp_path):
    full = "echo Filesystem 1024-blocks Used Available Capacity Mounted; echo /dev/x 100000000 95000000 5000000 95% /"
    said = setup_with({"df": full}, tmp_path / "bin", "need_disk 8")
    assert said.returncode == 1 and "needs 8 GB" in said.stderr and "4 GB are free" in said.stderr
    assert setup_with({"df": full}, tmp_path / "enough", "need_disk 4").returncode == 0
