"""Pictures: each number that is handed in is drawn where it belongs, and the file is a picture."""
import pytest

from nanochat import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def kept(monkeypatch):
    """The figure that was saved last."""
    held, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: held.append(figure) or save(figure, path))
    return held


def test_lines(tmp_path, kept):
    curves = {"window": [(1024, 2.0, 0.1), (512, 3.0, None)], "full": [(512, 1.0, 0), (1024, 0.5, 0)]}
    plots.lines(tmp_path / "new" / "a.png", [("left", "nats", curves), ("right", "less", {"full": [(512, 7.0, None)]})], "tokens", log=True)
    axes, right = kept[0].axes
    assert (axes.get_title(), right.get_title(), right.get_ylabel()) == ("left", "right", "less") and right.lines[0].get_xydata().tolist() == [[512, 7.0]]
    assert [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2][0] == [[512, 3.0], [1024, 2.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["window", "full"] and [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024"]
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(PNG)


def test_a_name_has_one_colour_in_all_panels_and_stands_in_a_legend(tmp_path, kept):
    """The right panel drew its first curve in the first colour, which the only legend gave to another; names that were only there had none at all."""
    point = [(1, 2.0, 0)]
    plots.lines(tmp_path / "a.png", [("left", "nats", {"a": point, "b": point}), ("middle", "nats", {"b": point}), ("right", "nats", {"c": point, "a": point})], "tokens")
    first, middle, last = ({name: handle[0].get_color() for handle, name in zip(*axes.get_legend_handles_labels())} for axes in kept[0].axes)
    assert first["b"] == middle["b"] and first["a"] == last["a"] and len({first["a"], first["b"], last["c"]}) == 3
    legends = [axes.get_legend() and [text.get_text() for text in axes.get_legend().get_texts()] for axes in kept[0].axes]
    assert legends == [["a", "b"], None, ["c", "a"]]


def test_heat_maps(tmp_path, kept):
    """Depth runs down, length to the right, and the cell says the percent."""
    panels = {"passkey": {"lensnet": {1024: {0.0: 1.0, 0.5: 0.25}, 8192: {0.0: 0.0, 0.5: 0.5}}, "window": {1024: {0.0: 0, 0.5: 0}, 8192: {0.0: 0, 0.5: 0}}}}
    plots.heat_maps(tmp_path / "a.png", panels, "tokens", "depth")
    axes = kept[0].axes[0]
    assert axes.get_images()[0].get_array().tolist() == [[1.0, 0.0], [0.25, 0.5]]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "100", (0, 1): "25", (1, 0): "0", (1, 1): "50"}
    assert [one.get_title() for one in kept[0].axes] == ["passkey, lensnet", "passkey, window"] and (tmp_path / "a.png").read_bytes().startswith(PNG)


def test_scatter(tmp_path, kept):
    plots.scatter(tmp_path / "a.png", [(0.5, -1.0), (0.25, 2.0)], "score", "utility")
    assert kept[0].axes[0].collections[0].get_offsets().tolist() == [[0.5, -1.0], [0.25, 2.0]] and (tmp_path / "a.png").read_bytes().startswith(PNG)
