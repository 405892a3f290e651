"""
SmolTalk (Allal et al. 2025): general conversations, the bulk of a chat model's training. Rows: messages.
The smaller set made for small models; trained on, not graded.
"""

from nanochat.common import UserError
from tasks.common import Task, check_conversation
from tasks.rows import listed, load_rows


class SmolTalk(Task):
    name = "smoltalk"

    def __init__(self, split="train", **kwargs):
        super().__init__(**kwargs)
        if split not in ("train", "test"):
            raise ValueError(f"expected the split train or test, got {split!r}")
        self.rows = load_rows("HuggingFaceTB/smol-smoltalk", None, split, name="smoltalk", fields=("messages",))

    def count(self):
        return len(self.rows)

    def example(self, index):
        messages = listed(self.rows[index]["messages"], f"smoltalk, row {index}")
        conversation = {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
        if problem := check_conversation(conversation):
            raise UserError(f"smoltalk, row {index}: {problem}")
        return conversation

    def evaluate(self, conversation, answer_text):
        raise NotImplementedError("SmolTalk has no right answers: train on it, grade on another task")
