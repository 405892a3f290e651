"""A memory on disk is continued as it was, or with the budget that is asked for; the flag was once ignored."""
import pytest

from scripts.load import load_stage, open_stream
from tests.tiny_run import make_run


@pytest.mark.parametrize("asked, opened, same", [(None, 224, True), (224, 224, True), (320, 320, False)])
def test_the_budget_of_a_saved_memory(base, tmp_path, asked, opened, same):
    make_run("sft")
    loaded = load_stage("sft")
    ids = [5 + i % 100 for i in range(1500)]
    stream = open_stream(loaded, budget=224, tree=tmp_path / "memory")
    stream.feed(ids)
    stream.save(tmp_path / "memory")
    stream.tree.close()

    again = open_stream(loaded, budget=asked, tree=tmp_path / "memory")
    assert (again.budget, again.length) == (opened, 1500)
    assert (again.spans == stream.spans) == same
    again.tree.close()
