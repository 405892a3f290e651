"""
MMLU (Hendrycks et al. 2021): 57 subjects, four choices. Rows: question, subject, choices, answer (0..3).
"auxiliary_train" is the training set that its authors gathered from other question sets; "dev", "validation" and "test"
are MMLU itself.
"""

from nanochat.common import UserError
from tasks.arc import ChoiceTask, choice_conversation
from tasks.rows import listed, load_rows

SPLITS = ("auxiliary_train", "dev", "validation", "test")


class MMLU(ChoiceTask):
    name = "mmlu"

    def __init__(self, split="test", **kwargs):
        super().__init__(**kwargs)
        if split not in SPLITS:
            raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
        self.rows = load_rows("cais/mmlu", "all", split, name="mmlu", fields=("question", "choices", "answer"))

    def count(self):
        return len(self.rows)

    def example(self, index):
        row, where = self.rows[index], f"mmlu, row {index}"
        try:
            right = int(row["answer"])
        except ValueError:
            raise UserError(f"{where}: expected the answer as a number from 0, got {row['answer']!r}") from None
        conversation = choice_conversation(row["question"], listed(row["choices"], where), right, where)
        return {**conversation, "subject": row.get("subject", "")}
