"""
GSM8K (Cobbe et al. 2021): grade-school word problems. Rows: question, answer.

The authors' answers call a calculator inline, "2/2=<<2/2=1>>1 bolt", and end in "#### 3". Here each <<expression=result>>
becomes a call of our own calculator: a python part, its output, and the text goes on. Graded on the number after the
last "####", by value: 1,000 is 1000.00.
"""

import re
from decimal import Decimal, InvalidOperation

from nanochat.common import UserError
from tasks.common import clip, dialogue
from tasks.rows import RowTask, load_rows

CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
FINAL = re.compile(r"####\s*([-+$]*[0-9.,]*[0-9])")


class GSM8K(RowTask):
    name = "gsm8k"

    def __init__(self, split="train", **kwargs):
        if split not in ("train", "test"):
            raise ValueError(f"expected the split train or test, got {split!r}")
        super().__init__(load_rows("openai/gsm8k", "main", split, {"question": str, "answer": str}, name="gsm8k"), **kwargs)

    def read(self, row, where):
        number = final_number(row["answer"])
        if number is None:
            raise UserError(f"{where}: expected an answer that ends in '#### number', got {clip(row['answer'])}")
        return {"messages": dialogue(row["question"], with_tools(row["answer"])), "answer": str(number)}

    def evaluate(self, conversation, answer_text):
        said = final_number(answer_text)
        return said is not None and said == Decimal(conversation["answer"])


def with_tools(answer):
    """ "2/2=<<2/2=1>>1 bolt" -> text "2/2=", python "2/2", python_output "1", text "1 bolt" """
    parts, done = [], 0
    for call in CALL.finditer(answer):
        parts += [("text", answer[done:call.start()]), ("python", call[1].strip()), ("python_output", call[2].strip())]
        done = call.end()
    parts.append(("text", answer[done:]))
    return [{"type": kind, "text": text} for kind, text in parts if text]


def final_number(text):
    """The number after the last "####", or None."""
    found = FINAL.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except InvalidOperation: # "1.2.3"
        return None
