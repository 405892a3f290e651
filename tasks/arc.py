"""
ARC (Clark et al. 2018): grade-school science questions with three to five choices; Easy, and Challenge, which simple retrieval
gets wrong. And how every task here puts a multiple-choice question, MMLU included.

A choice is shown as "A: text" on a line of its own, so that the letter is the same token there and in the answer; a small
model can then copy it (nanochat found this to matter). Rows: question, choices {"text", "label"}, answerKey, or those of the
DCLM evaluation files: query, choices, gold.
"""

from nanochat.common import UserError
from tasks.common import Task, clip, dialogue, final_text
from tasks.rows import listed, load_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBSETS = {"easy": "ARC-Easy", "challenge": "ARC-Challenge"}


class ChoiceTask(Task):
    """A task whose answer is one of a few letters."""

    kind = "choice"

    def evaluate(self, conversation, answer_text):
        """For a letter that was written rather than picked by its probability: "B", "B." and "B: the sun" all say B."""
        said = final_text(answer_text)
        return said[:1].upper() == conversation["answer"] and not said[1:2].isalnum()


class ARC(ChoiceTask):
    def __init__(self, subset="easy", split="train", **kwargs):
        super().__init__(**kwargs)
        if subset not in SUBSETS or split not in ("train", "validation", "test"):
            raise ValueError(f"expected easy or challenge, and train, validation or test; got {subset!r} and {split!r}")
        self.name = f"arc_{subset}"
        self.rows = load_rows("allenai/ai2_arc", SUBSETS[subset], split, name="arc", fields=("choices",),
                              also=[f"icl/world_knowledge/arc_{subset}"] if split == "test" else [])

    def count(self):
        return len(self.rows)

    def example(self, index):
        row, where = self.rows[index], f"{self.name}, row {index}"
        choices = listed(row["choices"], where)
        if "gold" in row:
            return choice_conversation(row["query"].removeprefix("Question: "), choices, int(row["gold"]), where)
        texts, labels = list(choices["text"]), list(choices["label"]) # labels are A, B, C or 1, 2, 3
        if row["answerKey"] not in labels:
            raise UserError(f"{where}: expected an answerKey among {labels}, got {row['answerKey']!r}")
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]), where)


def choice_conversation(question, choices, right, where):
    """A question, the list of choices and the number of the right one -> conversation."""
    if not isinstance(choices, list) or len(choices) < 2 or not 0 <= right < len(choices) <= len(LETTERS):
        raise UserError(f"{where}: expected at least two choices and the number of the right one, "
                        f"got {clip(choices)} and {right}")
    letters = list(LETTERS[:len(choices)])
    lines = "\n".join(f"{letter}: {choice}" for letter, choice in zip(letters, choices))
    text = f"{question}\n{lines}\nAnswer with the letter only."
    return {"messages": dialogue(text, letters[right]), "letters": letters, "answer": letters[right]}
