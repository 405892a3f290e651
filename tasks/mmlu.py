"""
MMLU (Hendrycks et al. 2021): 57 subjects, four choices. Rows: question, choices, answer (0..3).
"auxiliary_train" is the training set that its authors gathered from other question sets; "dev", "validation" and "test"
are MMLU itself.
"""

from tasks.arc import ChoiceTask, choice_conversation
from tasks.rows import load_rows

SPLITS = ("auxiliary_train", "dev", "validation", "test")
SHAPE = {"question": str, "choices": list, "answer": int}


class MMLU(ChoiceTask):
    name = "mmlu"

    def __init__(self, split="test", **kwargs):
        if split not in SPLITS:
            raise ValueError(f"expected a split of {', '.join(SPLITS)}, got {split!r}")
        super().__init__(load_rows("cais/mmlu", "all", split, SHAPE, name="mmlu"), **kwargs)

    def read(self, row, where):
        return choice_conversation(row["question"], row["choices"], row["answer"], where)
