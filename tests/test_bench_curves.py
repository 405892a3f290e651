"""bench/curves.py: what the logs of finished runs say stands in the table and in the picture, at the tokens where it was so."""
import json

import pytest

from bench import curves
from nanochat import plots
from nanochat.common import UserError

MEMORY = [ # killed after step 3, resumed from 2; of step 3 no row was read plainly then. Killed again in its last validation, which the summary alone tells
    dict(step=1, loss=8.5, loss_plain=8.0, loss_gist=9.0), dict(step=2, loss=6.5, loss_plain=6.0, loss_gist=7.0), dict(step=2, val_bpb=3.0),
    dict(step=3, loss=99.0, loss_plain=99.0, loss_gist=99.0, lens_loss=99.0), dict(step=3, val_bpb=99.0),
    dict(step=3, loss=5.0, loss_gist=5.0, lens_loss=1.2), dict(step=4, loss=2.5, loss_plain=2.0, loss_gist=3.0, lens_loss=0.6),
    dict(summary=dict(steps=4, tokens=4000, gists=1, seed=7, val_bpb=1.5))]
PLAIN = [dict(step=1, loss=7.0), dict(step=2, loss=5.0), dict(step=2, val_bpb=2.5), dict(summary=dict(steps=2, tokens=2000, gists=0, seed=7, val_bpb=2.5))]


def leave(base, tag, lines):
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr("sys.argv", ["curves", *map(str, flags)])
    curves.main()
    return capsys.readouterr().out


def test_two_runs_by_hand(base, tmp_path, monkeypatch, capsys):
    """Means are over two lines that tell the key: of the plain rows' 8, 6, 2 they are 8, 7, 4. The plain run is half as long, so it has nothing to say of the second half."""
    leave(base, "d4", MEMORY)
    leave(base, "plain", PLAIN)
    drawn = []
    monkeypatch.setattr(plots, "lines", lambda path, panels, x: drawn.append((path, {title: curves for title, _, curves in panels}, x)))
    out = run(monkeypatch, capsys, "base/d4", "base/plain", "--labels", "with memory, plain", "--points", 2, "--smooth", 2, "--png", tmp_path / "a.png")

    [(path, panels, x)] = drawn
    assert path == tmp_path / "a.png" and x == "million tokens"
    assert panels["validation, read plainly"] == {"with memory": [(0.002, 3.0, 0), (0.004, 1.5, 0)], "plain": [(0.002, 2.5, 0)]}
    assert panels["training rows, means of 2 lines of the log"] == {
        "with memory": [(0.001, 8.0, 0), (0.002, 7.0, 0), (0.004, 4.0, 0)], "plain": [(0.001, 7.0, 0), (0.002, 6.0, 0)],
        "with memory, rows with gists": [(0.001, 9.0, 0), (0.002, 8.0, 0), (0.003, 6.0, 0), (0.004, 4.0, 0)]}
    assert panels["LensNet"] == {"with memory": [(0.003, pytest.approx(-0.2), 0), (0.004, pytest.approx(0.1), 0)]}

    assert [line for line in out.splitlines() if line.startswith("|")][2:] == [
        "| with memory | 2,000 | 3.0000 | 7.0000 | 8.0000 | - |", "| plain | 2,000 | 2.5000 | 6.0000 | - | - |",
        "| with memory | 4,000 | 1.5000 | 4.0000 | 4.0000 | 0.1000 |", "| plain | 4,000 | - | - | - | - |"]
    assert "with memory: base/d4, with memory, 4 steps of 1,000 tokens, seed 7" in out
    told = json.loads(out.splitlines()[-1])
    assert told["runs"]["with memory"]["points"][0] == dict(tokens=2000, val_bpb=3.0, loss_plain=7.0, loss_gist=8.0, lens_explained=None)
    assert {key: told["runs"]["plain"][key] for key in ("checkpoint", "gists", "seed", "steps", "tokens")} == dict(checkpoint="base/plain", gists=0, seed=7, steps=2, tokens=2000)


def test_plain_runs_alone_are_a_picture_without_lensnet(base, tmp_path, monkeypatch, capsys):
    """Drawn in earnest: a panel with nothing in it could not be."""
    leave(base, "plain", PLAIN)
    held, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: held.append(figure) or save(figure, path))
    run(monkeypatch, capsys, "base/plain", "--png", tmp_path / "a.png")
    assert [axes.get_legend_handles_labels()[1] for axes in held[0].axes] == [["base/plain"], ["base/plain"]] and (tmp_path / "a.png").exists()


def without(key):
    return [{name: value for name, value in line.items() if name != key} for line in MEMORY]


@pytest.mark.parametrize("lines, message", [
    (MEMORY[:-1], "not finished: .* no summary behind step 4"),
    (MEMORY + MEMORY[:2], "not finished: .* no summary behind step 2"), # begun anew in the same log
    (MEMORY[:-1] + [dict(summary=dict(steps=4, seed=7, gists=1))], "has no tokens, val_bpb"),
    (without("loss_plain"), "no step in .* tells loss_plain"), (without("lens_loss"), "tells lens_loss.* LensNet has labels once"),
    (MEMORY[:6] + [MEMORY[6] | dict(lens_loss="nan"), MEMORY[7]], "step 4: lens_loss is 'nan', expected a number")])
def test_a_log_that_says_too_little_is_named(base, lines, message):
    leave(base, "d4", lines)
    with pytest.raises(UserError, match=message):
        curves.read("base/d4", 2)


def test_a_run_that_is_not_there_is_named(base):
    leave(base, "d4", MEMORY)
    (base / "base_checkpoints" / "empty").mkdir()
    for checkpoint, message in (("base", "expected stage/tag"), ("bare/d4", "no stage called"), ("base/d5", "no .*d5. Tags of base that have a log: d4. Train it"), ("base/empty", "no .*log.jsonl. Tags")):
        with pytest.raises(UserError, match=message):
            curves.read(checkpoint, 2)


@pytest.mark.parametrize("flags", [["base/d4", "base/d4"], ["base/d4", "--labels", "a,b"], ["base/d4", "base/d5", "--labels", "a,a"], ["base/d4", "base/d5", "--labels", "a,"],
                                   ["base/d4", "--points", "0"], ["base/d4", "--smooth", "0"], ["base/d4", "--png", "a.pdf"]])
def test_what_cannot_be_told_or_drawn_is_refused(flags):
    with pytest.raises(UserError, match="expected"):
        curves.settle(curves.parser.parse_args(flags))
