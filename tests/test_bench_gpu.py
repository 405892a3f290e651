"""The benches that a GPU is for, small on a CPU, and what runs them all: no section takes another down, and none that failed passes for one that did not."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import bench.flex as flex
import bench.gpu_check as gpu_check
import bench.streams as streams
import bench.train as train
import megacontext.batch as batch
from bench.gpu_check import Section
from megacontext.layout import FAN
from megacontext.runtime import Session
from nanochat import cost, hardware, schedule
from nanochat.common import UserError
from nanochat.engine import PlainStream
from nanochat.gpt import GPTConfig
from scripts.base_train import parser as training
from scripts.load import open_stream

TINY = ["--depth", "1", "--vocab-size", "256", "--max-seq-len", "128", "--batch-tokens", "1024", "--device-batch", "4", "--steps", "2", "--warm", "1", "--device", "cpu"]


def run(monkeypatch, capsys, module, *flags):
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), lines


# ---------------------------------------------------------------------------------------------------------------------
# bench.train

@pytest.mark.parametrize("memory", [False, True])
def test_training_steps_add_up(monkeypatch, capsys, base, memory):
    monkeypatch.setattr(hardware, "describe", lambda device, describe=hardware.describe: replace(describe(device), peak_flops=1e12)) # a GPU's
    told, lines = run(monkeypatch, capsys, train, *TINY, *([] if memory else ["--plain"]))
    assert (told["rows"], told["accumulate"], told["batch_tokens"], told["plain"]) == (4, 2, 1024, not memory)
    blocks, shares = ([8, 16, 32], [0.3, 0.25, 0.45]) if memory else ([None], [1.0])
    assert [stage["block"] for stage in told["stages"]] == blocks and [stage["share"] for stage in told["stages"]] == pytest.approx(shares)
    assert told["step_ms"] == pytest.approx(sum(share * stage["step_ms"] for share, stage in zip(shares, told["stages"])))
    assert told["tokens_s"] == pytest.approx(1024 * 1000 / told["step_ms"])
    config = GPTConfig.from_depth(1, 256, 128)
    assert told["mfu"] == pytest.approx(told["tokens_s"] * cost.train_flops(config) / 1e12), "of the GPT alone, with memory too"
    assert all(0 < stage["loss"] < 6 for stage in told["stages"]) and told["memory_gib"] > 0.01
    assert any("mfu" in line and "tokens/s" in line for line in lines)


def test_rows_of_made_up_text_are_numbered_as_a_run_numbers_them():
    batches = iter(train.Rows(100, 4, 64, seed=1))
    for n in range(6):
        batch = next(batches)
        assert batch.rows.tolist() == list(range(4 * n, 4 * n + 4)) and batch.docs.shape == (4, 2) and batch.inputs.shape == batch.targets.shape == (4, 64)
        assert (batch.inputs[:, 1:] == batch.targets[:, :-1]).all() and 0 <= batch.inputs.min() and batch.targets.max() < 100


def test_without_a_flag_steps_are_those_of_base_training():
    for flag in ("--max-seq-len", "--batch-tokens", "--device-batch", "--curriculum", "--plain-every", "--labels-every", "--dtype"):
        assert train.parser._option_string_actions[flag].default == training._option_string_actions[flag].default
    assert train.shares(train.parser.get_default("curriculum"))[-1][0] == FAN


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--warm", "0"], ["--max-seq-len", "100"], ["--batch-tokens", "1000"]])
def test_a_bench_of_nothing_is_refused(monkeypatch, base, flags):
    monkeypatch.setattr(sys, "argv", ["train", *TINY, *flags])
    with pytest.raises(UserError):
        train.main()


# ---------------------------------------------------------------------------------------------------------------------
# bench.flex

def test_flex_is_its_twin(monkeypatch, capsys, base):
    told, lines = run(monkeypatch, capsys, flex, "--tokens", "544", "--rows", "1", "--heads", "1", "--repeats", "1", "--device", "cpu")
    assert told["entries"] == 544 + 17 + 0 and 0 < told["worst"] < 3 and not told["backward"]
    assert set(told["SDPA"]["errors"]) == set(told["FlexAttention"]["errors"]) == {"y"}
    assert max(told[name]["errors"]["y"] for name in ("SDPA", "FlexAttention")) < 0.02


def test_flex_beside_another_rule_is_told(monkeypatch, capsys, base):
    """The error would say so if the two forms of the rule ever differed."""
    see = flex.block_mask

    def wrong(table, K):
        mask = see(table, K)
        rule = mask.mask_mod
        mask.mask_mod = lambda b, h, i, j: rule(b, h, i, j) & (j % 7 > 0) | (i == j)
        return mask
    monkeypatch.setattr(flex, "block_mask", wrong)
    told, _ = run(monkeypatch, capsys, flex, "--tokens", "256", "--heads", "1", "--repeats", "1", "--device", "cpu")
    assert told["worst"] > 10


# ---------------------------------------------------------------------------------------------------------------------
# bench.streams

@pytest.mark.parametrize("memory", [False, True])
def test_a_chat_without_words(monkeypatch, capsys, base, memory):
    """Whatever id is the likeliest, it ends nothing and calls nothing; and the stream is the one that a chat opens."""
    opened = []
    monkeypatch.setattr(streams, "open_stream", lambda *args: opened.append(open_stream(*args)) or opened[-1])
    told, lines = run(monkeypatch, capsys, streams, "--depth", "1", "--vocab-size", "256", "--prompt", "300", "--new", "40", "--repeats", "2", "--device", "cpu",
                      *(["--memory", "--budget", "192"] if memory else []))
    assert told["memory"] == memory and len(opened) == 3 and all(stream.length == 339 for stream in opened)
    assert {type(stream) for stream in opened} == {Session if memory else PlainStream}
    assert told["ttft_ms"] > 0 and told["second_ms"] > 0 and told["tokens_s"] > 0 and f"{told['tokens_s']:,.1f} tokens/s" in lines[-2]
    monkeypatch.setattr(sys, "argv", ["streams", "--new", "2"])
    with pytest.raises(UserError, match="expected at least 1, 1 and 3"):
        streams.main()


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_several_answers_at_the_same_time(monkeypatch, capsys, base, clock):
    sizes, read = [], batch.read
    monkeypatch.setattr(batch, "read", lambda sessions, tokens: sizes.append(len(sessions)) or read(sessions, tokens))
    told, lines = run(monkeypatch, capsys, streams, "--depth", "1", "--vocab-size", "256", "--memory", "--budget", "192", "--prompt", "300", "--new", "30", "--repeats", "1", "--device", "cpu",
                      "--answers", "1,3", *(["--cpu-time"] if clock == "cpu" else []))
    assert [row["answers"] for row in told["rows"]] == [1, 3] and told["clock"] == clock and {1, 2, 3} >= set(sizes) and max(sizes) > 1
    for row, line in zip(told["rows"], lines[-3:-1]):
        assert row["times"] == pytest.approx(row["together"] / row["in_turn"]) and row["apart"] > 0
        assert line.split() == [str(row["answers"]), *(f"{row[way]:,.1f}" for way in streams.WAYS), f"{row['times']:.2f}"]


@pytest.mark.parametrize("flags", [["--answers", "2"], ["--memory", "--answers", "0,2"], ["--memory", "--answers", "two"], ["--memory", "--cpu-time"]])
def test_what_cannot_be_asked_of_answers(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["streams", *flags])
    with pytest.raises(UserError, match="expected"):
        streams.main()


# ---------------------------------------------------------------------------------------------------------------------
# bench.gpu_check

def program(tmp_path, name, text):
    """A module that a section can run."""
    (tmp_path / f"{name}.py").write_text(text)
    return (name,)


def test_sections_stand_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    chosen = [Section("good", 60, program(tmp_path, "good", "print('words')\nprint('{\"x\": 1}')")),
              Section("raises", 60, program(tmp_path, "raises", "raise ValueError('no such thing')")),
              Section("hangs", 3, program(tmp_path, "hangs", "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)")),
              Section("talks", 60, program(tmp_path, "talks", "print('no JSON')")), Section("silent", 60, program(tmp_path, "silent", "")),
              Section("plain", 60, program(tmp_path, "plain", "print('3 passed')"), json=False)]
    start = time.monotonic()
    lines = {line["section"]: line for line in gpu_check.run_all(chosen, tmp_path, minutes=5)}
    assert time.monotonic() - start < 40, "what hangs is ended, with what it started"
    assert [name for name, line in lines.items() if line["ok"]] == ["good", "plain"]
    assert lines["good"]["result"] == {"x": 1} and lines["plain"]["result"] == {"passed": True}
    for name, says in dict(raises="exit code 1: ValueError: no such thing", hangs="longer than 3 s", talks="no JSON", silent="not JSON").items():
        assert says in lines[name]["error"] and lines[name]["result"] is None
    assert [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()] == list(lines.values())
    assert "no such thing" in (tmp_path / "gpu_check.txt").read_text()


@pytest.mark.parametrize("good, code", [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_a_section_failed(tmp_path, monkeypatch, capsys, good, code):
    """A bar that is missed is a result; a section that failed is none."""
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    flex = Section("flex", 60, program(tmp_path, "told", "print('{\"worst\": 5}')"))
    broken = Section("tests", 60, program(tmp_path, "broken", "" if good else "raise SystemExit(3)"), json=False)
    monkeypatch.setattr(gpu_check, "sections", lambda tiny: [broken, flex])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--tiny", "--out", str(tmp_path)])
    if good:
        gpu_check.main()
    else:
        with pytest.raises(SystemExit, match=str(code)):
            gpu_check.main()
    said = capsys.readouterr().out
    assert "5.00  MISSED" in said and ("exit code 3" in said) == (not good)


def test_when_the_time_is_over_the_rest_is_told_as_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    slow = program(tmp_path, "slow", "import time; time.sleep(60)")
    first, second = gpu_check.run_all([Section("first", 60, slow), Section("second", 60, slow)], tmp_path, minutes=1 / 60)
    assert not first["ok"] and "longer than 1 s" in first["error"] and second == first | dict(section="second", seconds=0.0, error="not run: the time was over")


@pytest.mark.parametrize("tiny", [True, False])
def test_every_command_is_one_that_its_bench_takes(tiny):
    """A bench renames a flag: the section must not be the one that finds out, on a rented machine."""
    found = gpu_check.sections(tiny)
    assert len({section.name for section in found}) == len(found)
    for section in found:
        if section.command and section.command[0] != "pytest":
            args = importlib.import_module(section.command[0]).parser.parse_args(section.command[1:])
            assert not tiny or args.device == "cpu"
            if section.name.startswith("train") and not tiny:
                plan = schedule.plan(args.depth, args.vocab_size, args.max_seq_len)
                assert args.batch_tokens == plan.batch_tokens // 8 and args.plain == ("memory" not in section.name) and f"d{args.depth} " in section.name
    names = [name for line in gpu_check.bars([]) for name in line[:1]]
    assert len(names) == len(set(names)) > 7
    trained = {f"train d{depth} {precision}{memory}" for depth in (12, 20) for precision in ("bf16", "fp8") for memory in ("", " memory")}
    first = {section.name for section in found[:8]}
    assert trained < {section.name for section in found} and {"train d20 bf16 memory", "chat d12", "chat d12 memory", "tests"} < first
    assert sum(section.limit for section in found[:8]) <= 570, "the sections that matter most fit into the time even at their limits"


def test_files_with_tests_for_a_gpu_are_found():
    words = gpu_check.tests(tiny=False)
    assert words[:2] == ("-m", "gpu") and {"tests/test_gpu.py", "tests/test_engine.py", "tests/test_optim.py"} <= set(words) and "tests/test_house.py" not in words


def line(section, **result):
    return dict(section=section, ok=True, seconds=1.0, error=None, result=result)


def test_bars_by_hand():
    lines = [line("train d20 bf16", mfu=0.51, step_ms=100.0, tokens_s=1000.0), line("train d20 bf16 memory", step_ms=130.0, stages=[dict(step_ms=150.0), dict(step_ms=110.0)]),
             line("train d20 fp8 memory", stages=[dict(step_ms=100.0)]), line("train d12 bf16", step_ms=10.0),
             dict(section="train d12 bf16 memory", ok=False, seconds=1.0, error="exit code 1", result=None), line("train d20 fp8", tokens_s=1200.0),
             line("chat d12", tokens_s=700.0), line("infer d12 static", rows=[dict(batch=8, tokens_s=9000.0), dict(batch=1, tokens_s=799.0)]), line("tests", passed=True), line("flex", worst=1.1),
             line("runtime d12", overhead=0.02, flatness=1.2)]
    assert [met for *_, met in gpu_check.bars(lines)] == [True, None, False, True, True, False, False, True, True, True, False]
    assert all((measured, met) == ("not measured", None) for _, _, measured, met in gpu_check.bars([]))
    with pytest.raises(KeyError): # a bench that no longer tells what a bar needs is our mistake, not "not measured"
        gpu_check.bars([line("flex")])


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "pick_device_type", lambda: "cpu")
    for flags, says in ((["--out", str(tmp_path)], "--tiny"), (["--tiny", "--only", "nonsense", "--out", str(tmp_path)], "infer d12 static")):
        monkeypatch.setattr(sys, "argv", ["gpu_check", *flags])
        with pytest.raises(UserError, match=says):
            gpu_check.main()


@pytest.mark.slow
def test_the_whole_check_small_on_a_cpu(tmp_path):
    done = subprocess.run(["bash", "runs/gpu_check.sh", "--tiny"], cwd=gpu_check.ROOT, env=os.environ | dict(OUT=str(tmp_path / "out"), PYTHON=sys.executable, OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == [section.name for section in gpu_check.sections(True)] and all(line["ok"] for line in lines)
    unmeasured = [what for what, _, measured, _ in gpu_check.bars(lines) if measured == "not measured"]
    assert all("MFU" in what for what in unmeasured), unmeasured
    assert len(re.findall(r"  (?:met|MISSED)$", done.stdout, re.M)) == len(gpu_check.bars(lines)) - len(unmeasured)
