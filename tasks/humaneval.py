"""
HumanEval (Chen et al. 2021): 164 Python functions to complete, graded by running their tests.
Rows: prompt (signature and docstring), entry_point, canonical_solution, test.

What the model wrote may be the body alone (it continued the prompt), the whole function, or either of them inside a ``` fence.
The program runs in the sandbox of nanochat.execution; code that does not finish in time is wrong, a sandbox that does not start is an error.
"""

import re

from nanochat.common import UserError
from tasks.common import clip, dialogue
from tasks.rows import RowTask, load_rows

SHAPE = {"prompt": str, "entry_point": str, "canonical_solution": str, "test": str}
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.S | re.I)


class HumanEval(RowTask):
    name = "humaneval"

    def __init__(self, split="test", timeout=5, **kwargs):
        if split != "test":
            raise ValueError(f"HumanEval has the split test only, got {split!r}")
        self.timeout = timeout
        super().__init__(load_rows("openai/openai_humaneval", None, split, SHAPE, name="humaneval", also=["humaneval/HumanEval"]), **kwargs)

    def read(self, row, where):
        prompt, solution, name = row["prompt"], row["canonical_solution"], row["entry_point"]
        if not name.isidentifier() or definition(name, prompt) is None:
            raise UserError(f"{where}: expected a prompt that defines its entry_point {clip(name)}, got {clip(prompt)}")
        return {"messages": dialogue(prompt, prompt + solution), "answer": solution, "prompt": prompt, "entry_point": name, "test": row["test"]}

    def evaluate(self, conversation, answer_text):
        from nanochat.execution import run_code # only grading needs the sandbox
        result = run_code(program(conversation, answer_text), timeout=self.timeout)
        if not result.guards: # a busy machine may have taken longer than that to start it
            result = run_code(program(conversation, answer_text), timeout=10 * self.timeout)
        if not result.guards:
            raise UserError(f"HumanEval cannot be graded: {result.error}. If the machine is short of memory or processors, free some; else leave humaneval out of --tasks")
        return result.ok


def definition(name, code):
    """Where the function of that name begins, or None."""
    found = re.search(rf"^def {re.escape(name)}\b", code, re.M)
    return found and found.start()


def program(conversation, answer_text):
    """The model's code, made whole, and the tests that call it."""
    text = answer_text.split("<|assistant_end|>", 1)[0]
    fenced = FENCE.search(text)
    code = fenced[1] if fenced else text
    prompt, name = conversation["prompt"], conversation["entry_point"]
    if definition(name, code) is not None: # the whole function: its prompt's imports and helpers may be left out
        code = f"{prompt[:definition(name, prompt)]}\n{code}"
    else:
        code = prompt + code
    return f"{code}\n\n{conversation['test']}\n\ncheck({name})\n"
