"""runs/gates.sh: every command is one that its script takes, and only what is asked for is run."""
import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def gates(*words, **environment):
    return subprocess.run(["bash", "runs/gates.sh", *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def commands(*words, **environment):
    done = gates("--plan", *words, **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_every_command_is_one_that_its_script_takes():
    told = commands(BASE="base/mine", MID="mid/mine", SFT="sft/mine")
    assert len(told) > 12 and len({tuple(words) for words in told}) == len(told), "nothing is measured twice"
    for python, m, module, *flags in told:
        assert (python, m) == ("python", "-m")
        importlib.import_module(module).parser.parse_args(flags)
    assert {words[words.index("--checkpoint") + 1] for words in told if "--checkpoint" in words} == {"base/mine", "mid/mine", "sft/mine", "mid/long"}


def test_only_what_is_asked_for():
    assert [words[2] for words in commands("5")] == ["scripts.recall_eval", "bench.gist_recall"]
    assert [words[2] for words in commands("6")] == ["bench.gist_recall", "scripts.mega_eval"]
    assert [words[2] for words in commands("1", "6")] == ["scripts.mega_eval", "bench.gist_words", "bench.gist_words", "bench.gist_recall"]


@pytest.mark.parametrize("word", ["7", "all", "-x"])
def test_a_gate_that_is_none_says_so(word):
    done = gates(word)
    assert done.returncode == 2 and done.stderr == f"error: {word}: expected gates from 1 to 6, or --plan\n" and not done.stdout


def test_a_command_that_fails_ends_it(tmp_path):
    """What it said is kept, and nothing runs after it."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "python").write_text("#!/bin/sh\necho \"$@\"\nexit 3\n")
    (fake / "python").chmod(0o755)
    script = (ROOT / "runs/gates.sh").read_text().replace("set_up\n", "").replace('cd "$(dirname "$0")/.."', f"cd {shlex.quote(str(ROOT))}")
    (tmp_path / "gates.sh").write_text(script)
    done = subprocess.run(["bash", tmp_path / "gates.sh", "5"], env=os.environ | dict(PATH=f"{fake}:{os.environ['PATH']}", OUT=str(tmp_path / "out")), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "bench.gist_recall" not in done.stdout
    assert (tmp_path / "out" / "recall.txt").read_text().startswith("-m scripts.recall_eval")
