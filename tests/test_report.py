"""The report: what was measured stands where it belongs, and what was not is named, never filled in."""

import json
import os
import random

import pytest

from nanochat import plots, report
from nanochat.common import STAGES


def summary(folder, stage="base", tag="d4", **more):
    """A finished run's log, as nanochat.run.Log writes it."""
    path = folder / f"{stage}_checkpoints" / tag / "log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = dict(stage=stage, tag=tag, val_bpb=1.5, steps=10, tokens=20480, params=1000, peak_mb=900.0, gists=1, mfu=None, tokens_per_s=3561.8, train_s=65.0) | more
    with open(path, "a") as file:
        file.write(json.dumps({"step": 10, "loss": 3.0}) + "\n" + json.dumps({"summary": line}) + "\n")
    return path


def rows_of(text):
    """Cells of all table rows of a Markdown text, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


# ---------------------------------------------------------------------------------------------------------------------
# The interval

def test_wilson_by_hand():
    low, high = report.wilson(5, 10)
    assert (round(low, 4), round(high, 4)) == (0.2366, 0.7634) # Brown, Cai & DasGupta 2001 give 0.237 and 0.763
    assert report.wilson(0, 10)[0] == 0.0 and report.wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize("seed", range(40))
def test_wilson_holds_the_shares_that_are_less_than_1_96_deviations_away(seed):
    """The slow version: try every share p, and keep those whose own spread explains what was seen."""
    rng = random.Random(seed)
    n = rng.randint(1, 300)
    right = rng.randint(0, n)
    low, high = report.wilson(right, n)
    grid = [i / 20000 for i in range(20001)]
    kept = [p for p in grid if abs(right / n - p) <= 1.96 * (p * (1 - p) / n) ** 0.5 + 1e-12]
    assert 0 <= low <= right / n <= high <= 1
    assert abs(low - kept[0]) < 1e-3 and abs(high - kept[-1]) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Sections and the page

def test_an_empty_run_names_everything_as_missing(base):
    text = report.assemble()
    for stage in report.EXPECTED_STAGES:
        assert f"- {stage} training: no finished run" in text
    for name, command in report.SECTIONS.items():
        assert f"- {name}: not measured (`{command}`)" in text
    assert "No stage was measured yet." in text


def test_a_section_is_read_back_and_stands_in_the_page_in_order(base):
    report.write_section("mega", "Memory", "far", data={"x": [1, 2.5]})
    report.write_section("base", "Base model", "near", report.table(("a", "b"), [["x|y", None], ["z", 0.5]]), data={"base": {"bpb": 1.25}}, seconds=61.0)
    report.write_section("zebra", "Something else", "last")
    assert report.read_data("base") == {"base": {"bpb": 1.25}} and report.read_data("mega") == {"x": [1, 2.5]}
    assert report.read_data("chat") == {}
    text = report.assemble()
    places = [text.index(f"## {title}\n") for title in ("Base model", "Memory", "Something else")]
    assert places == sorted(places)
    assert "- base: not measured" not in text and "- chat: not measured" in text
    assert "| x\\|y | - |" in text and "| z | 0.5000 |" in text
    assert rows_of(text)["base evaluation"][-1] == "1m01s"


def test_markdown_without_numbers_is_a_section_too(base):
    """The tokenizer's section is written by its own script, without JSON."""
    report.folder().mkdir(parents=True)
    (report.folder() / "tokenizer.md").write_text("## Tokenizer\n\nbytes per token\n")
    text = report.assemble()
    assert "bytes per token" in text and "- tokenizer: not measured" not in text


@pytest.mark.parametrize("seed", range(20))
def test_every_cell_of_the_results_was_measured_and_every_measurement_has_its_cell(base, seed):
    rng = random.Random(seed)
    results = {}
    for _ in range(rng.randint(1, 25)):
        key = (rng.choice(["passkey", "arithmetic", "CORE"]), rng.choice(STAGES), rng.random() < 0.5)
        results[key] = rng.random()
    chosen = [dict(measure=m, stage=s, memory=memory, value=value) for (m, s, memory), value in results.items()]
    half = len(chosen) // 2
    report.write_section("base", "Base", results=chosen[:half])
    report.write_section("chat", "Chat", results=chosen[half:])
    part = report.assemble().split("## Results")[1].split("## ")[0]
    rows = rows_of(part)
    columns = rows.pop("measure")
    rows.pop("---")
    seen = {}
    for measure, cells in rows.items():
        for column, cell in zip(columns, cells, strict=True):
            if cell != "-":
                seen[measure, column.split(",")[0], "with memory" in column] = cell
    assert seen == {key: f"{value:.4f}" for key, value in results.items()}
    assert all(any(cells[i] != "-" for cells in rows.values()) for i in range(len(columns))), "a column that nobody measured"


def test_a_share_has_its_interval(base):
    low, high = report.wilson(5, 10)
    report.write_section("chat", "Chat", results=[dict(measure="passkey", stage="sft", memory=True, value=0.5, n=10, low=low, high=high)])
    assert rows_of(report.assemble())["passkey"] == ["50.0% (24-76)"]


def test_the_last_finished_run_of_each_stage(base):
    """An unfinished run has no summary; a line cut short by a kill is no line; of two runs in one log the later counts."""
    old = summary(base, "base", "d2", train_s=1.0, val_bpb=3.0)
    os.utime(old, (1, 1))
    summary(base, "base", "d4", train_s=100.0, val_bpb=2.0)
    log = summary(base, "base", "d4", train_s=65.0, val_bpb=1.75)
    with open(log, "a") as file:
        file.write('{"summary": {"stage": "base", "tag"')
    mid = base / "mid_checkpoints" / "d4" / "log.jsonl"
    mid.parent.mkdir(parents=True)
    mid.write_text('{"step": 10, "loss": 2.0}\n')
    text = report.assemble()
    assert rows_of(text)["base training, with memory (d4)"] == ["1,000", "10", "20,480", "3,562", "-", "900", "1m05s"]
    assert rows_of(text)["val bpb on the stage's own rows"] == ["1.7500"]
    assert "- mid training: no finished run" in text and "- base training" not in text
    assert report.last_run("base", "d2")["val_bpb"] == 3.0


def test_an_older_log_is_read_too(base):
    """Its flag for gists was called memory, which reads like what peak_mb tells."""
    path = summary(base, "base", "d4")
    path.write_text(path.read_text().replace('"gists": 1', '"memory": 0'))
    assert "base training, plain (d4)" in rows_of(report.assemble())


def test_times_add_up(base):
    summary(base, "base", train_s=65.0)
    summary(base, "sft", train_s=60.0, gists=0)
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "log.jsonl").write_text(
        json.dumps({"summary": {"chars": 5, "mchars_per_second": 1.0, "seconds": 30.0}}) + "\n" + json.dumps({"summary": {"news_bytes_per_token": 4.0, "seconds": 999.0}}) + "\n")
    report.write_section("chat", "Chat", seconds=25.0)
    rows = rows_of(report.assemble())
    assert rows["sft training, plain (d4)"][-1] == "1m00s" and rows["tokenizer"][-1] == "0m30s"
    assert rows["all"][-1] == "3m00s"


def test_reset_forgets_the_run_before_and_notes_the_start(base, monkeypatch):
    report.write_section("chat", "Chat of yesterday", data={"sft": 1})
    (report.folder() / "keep.txt").write_text("not ours")
    report.reset("cpu", "--depth 4")
    text = report.assemble()
    assert "yesterday" not in text and report.read_data("chat") == {} and (report.folder() / "keep.txt").exists()
    rows = rows_of(text)
    assert rows["tier"] == ["cpu"] and rows["arguments"] == ["--depth 4"] and rows["time since the start"] == ["0m00s"]
    monkeypatch.setattr(report, "git_commit", lambda: "feed-dirty")
    assert "at the start, feed with uncommitted changes now" in report.assemble()


def test_the_page_is_written_here_and_in_the_base_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report"])
    report.write_section("chat", "Chat", "hello")
    for _ in range(2): # the second time the first page lies there, and is not a section
        report.main()
    page = (tmp_path / "report.md").read_text()
    assert page == (report.folder() / "report.md").read_text() and page.count("## Chat\n") == 1 and page.count("# Report\n") == 1


def test_generated_text_cannot_close_its_code_block():
    assert report.fence("a\n```\n# evil") == "````text\na\n```\n# evil\n````"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def steps_log(folder, tag, lines):
    path = summary(folder, "base", tag)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + path.read_text().split("\n", 1)[1]) # in place of its one step


def test_training_curves_are_drawn_where_both_runs_are(base, monkeypatch):
    """A killed run trained steps 20 twice: the later line counts. Without the plain run there is nothing to compare, and no picture."""
    drawn = []
    monkeypatch.setattr(plots, "lines", lambda path, panels, x: drawn.append((path.name, panels[0][2])))
    steps_log(base, "d4", [dict(step=20, loss=9.0, loss_plain=9.0), dict(step=20, loss=4.0, loss_plain=3.5, loss_gist=4.5), dict(step=20, val_bpb=1.0), dict(step=30, loss=3.0, loss_gist=3.25)])
    assert "training.png" not in report.assemble("d4") and not drawn
    steps_log(base, "d4-plain", [dict(step=20, loss=5.0), dict(step=30, loss=2.0)])
    for tag in ("d4", "d4-plain"):
        assert "](training.png)" in report.assemble(tag)
        name, curves = drawn.pop()
        assert name == "training.png" and curves["plain"][:2] == [(20, 5.0, 0), (30, 2.0, 0)]
        assert curves["with memory, rows read plainly"] == [(20, 3.5, 0)] and curves["with memory, rows read through gists"] == [(20, 4.5, 0), (30, 3.25, 0)]


@pytest.mark.parametrize("more", [[dict(step=40, loss=6.0)], []])
def test_what_was_trained_again_is_forgotten(base, more):
    """
    Resumed from 20, with other places to log and validate at: what the killed run said of 40 would stand behind the resumed one's 30, and its validation of 30
    as if the new weights had been measured.
    """
    lines = [dict(step=10, loss=9.0), dict(step=20, loss=8.0), dict(step=20, val_bpb=8.0), dict(step=30, loss=7.0), dict(step=30, val_bpb=7.0), *more, dict(step=30, loss=1.0)]
    steps_log(base, "d4", lines)
    assert report.steps(base / "base_checkpoints" / "d4" / "log.jsonl") == {10: dict(step=10, loss=9.0), 20: dict(step=20, loss=8.0, val_bpb=8.0), 30: dict(step=30, loss=1.0)}


def test_a_page_elsewhere_finds_its_pictures(base, tmp_path, monkeypatch):
    """report.md stands in two places, the pictures in one."""
    text = "![a b](mega_x.png) and [a page](other.md) and ![far](http://x/y.png)"
    assert report.with_pictures(text, report.folder()) == text
    assert report.with_pictures(text, tmp_path) == "![a b](base/report/mega_x.png) and [a page](other.md) and ![far](http://x/y.png)"


def test_a_new_run_forgets_the_pictures_too(base):
    report.folder().mkdir(parents=True)
    (report.folder() / "mega_x.png").write_bytes(b"old")
    report.reset()
    assert not list(report.folder().glob("*.png"))
