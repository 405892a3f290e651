"""
SmolTalk (Allal et al. 2025): general conversations, the bulk of a chat model's training. Rows: messages.
The smaller set made for small models; trained on, not graded. Among half a million of other people's conversations some have a
message that says nothing: it stays, as an answer without words. Any other odd row stops the run with its place.
"""

from tasks.rows import RowTask, load_rows


class SmolTalk(RowTask):
    name = "smoltalk"
    empty = True

    def __init__(self, split="train", **kwargs):
        if split not in ("train", "test"):
            raise ValueError(f"expected the split train or test, got {split!r}")
        super().__init__(load_rows("HuggingFaceTB/smol-smoltalk", None, split, {"messages": list}, name="smoltalk"), **kwargs)

    def read(self, row, where):
        return {"messages": row["messages"]}

    def evaluate(self, conversation, answer_text):
        raise NotImplementedError("SmolTalk has no right answers: train on it, grade on another task")
