"""
HumanEval (Chen et al. 2021): 164 Python functions to complete, graded by running their tests.
Rows: task_id, prompt (signature and docstring), entry_point, canonical_solution, test.

What the model wrote may be the body alone (it continued the prompt), the whole function, or either of them inside a ``` fence.
The program runs in the sandbox of nanochat.execution; code that does not finish in time is wrong.
"""

import re

from tasks.common import Task, dialogue, final_text
from tasks.rows import load_rows

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S | re.I)


class HumanEval(Task):
    name = "humaneval"

    def __init__(self, split="test", timeout=5, **kwargs):
        super().__init__(**kwargs)
        if split != "test":
            raise ValueError(f"HumanEval has the split test only, got {split!r}")
        self.timeout = timeout
        self.rows = load_rows("openai/openai_humaneval", None, split, name="humaneval",
                              fields=("prompt", "entry_point", "canonical_solution", "test"), also=["humaneval/HumanEval"])

    def count(self):
        return len(self.rows)

    def example(self, index):
        row = self.rows[index]
        prompt, solution = row["prompt"], row["canonical_solution"]
        return {"messages": dialogue(prompt, prompt + solution), "answer": solution, "prompt": prompt,
                "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation, answer_text):
        from nanochat.execution import run_code # only grading needs the sandbox
        result = run_code(program(conversation, answer_text), timeout=self.timeout)
        return result.ok


def program(conversation, answer_text):
    """The model's code, made whole, and the tests that call it."""
    text = answer_text.split("<|assistant_end|>", 1)[0]
    fenced = FENCE.search(text)
    code = fenced[1] if fenced else text
    prompt, name = conversation["prompt"], conversation["entry_point"]
    if re.search(rf"^def {name}\b", code, re.M): # the whole function: its prompt's imports and helpers may be left out
        before = prompt[:prompt.index(f"def {name}")]
        code = f"{before}\n{code}"
    else:
        code = prompt + code
    return f"{code}\n\n{conversation['test']}\n\ncheck({name})\n"
