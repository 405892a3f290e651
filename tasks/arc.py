"""
ARC (Clark et al. 2018): grade-school science questions with three to five choices; Easy, and Challenge, which simple retrieval
gets wrong. And how every task here puts a multiple-choice question, MMLU included.

A choice is shown as "A: text" on a line of its own, so that the letter is the same token there and in the answer; a small
model can then copy it (nanochat found this to matter). Rows: question, choices {"text", "label"}, answerKey, or those of the
DCLM evaluation files: query, choices, gold.
"""

from nanochat.common import UserError
from tasks.common import clip, dialogue, final_text
from tasks.rows import RowTask, load_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUBSETS = {"easy": "ARC-Easy", "challenge": "ARC-Challenge"}
SHAPES = ({"question": str, "choices": dict, "answerKey": str}, {"query": str, "choices": list, "gold": int}) # the hub's, DCLM's


class ChoiceTask(RowTask):
    """A task whose answer is one of a few letters."""

    kind = "choice"

    def evaluate(self, conversation, answer_text):
        """For a letter that was written rather than picked by its probability: "B", "B." and "B: the sun" all say B."""
        said = final_text(answer_text)
        return said[:1].upper() == conversation["answer"] and not said[1:2].isalnum()


class ARC(ChoiceTask):
    def __init__(self, subset="easy", split="train", **kwargs):
        if subset not in SUBSETS or split not in ("train", "validation", "test"):
            raise ValueError(f"expected easy or challenge, and train, validation or test; got {subset!r} and {split!r}")
        self.name = f"arc_{subset}"
        super().__init__(load_rows("allenai/ai2_arc", SUBSETS[subset], split, *SHAPES, name="arc",
                                   also=[f"icl/world_knowledge/arc_{subset}"] if split == "test" else []), **kwargs)

    def read(self, row, where):
        if "gold" in row:
            return choice_conversation(row["query"].removeprefix("Question: "), row["choices"], row["gold"], where)
        texts, labels = row["choices"].get("text"), row["choices"].get("label") # labels are A, B, C or 1, 2, 3
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise UserError(f"{where}: expected choices with as many labels as texts, got {clip(row['choices'])}")
        if row["answerKey"] not in labels:
            raise UserError(f"{where}: expected an answerKey among {clip(labels)}, got {clip(row['answerKey'])}")
        return choice_conversation(row["question"], texts, labels.index(row["answerKey"]), where)


def choice_conversation(question, choices, right, where):
    """A question, the list of choices and the number of the right one -> conversation."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{where}: expected 2 to {len(LETTERS)} choices, each a text, got {clip(choices)}")
    if not 0 <= right < len(choices):
        raise UserError(f"{where}: expected the number of the right choice, 0 to {len(choices) - 1}, got {right}")
    letters = list(LETTERS[:len(choices)])
    lines = "\n".join(f"{letter}: {choice}" for letter, choice in zip(letters, choices))
    text = f"{question}\n{lines}\nAnswer with the letter only."
    return {"messages": dialogue(text, letters[right]), "letters": letters, "answer": letters[right]}
