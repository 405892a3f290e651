"""
Sums worked out with the calculator, generated: the smallest task in which using a tool pays.

"What is 47 * 86?" -> python part "47*86", its output "4042", then the answer "4042". A chain of two operations and
divisions (always exact, so that the answer is a whole number) come in from the difficulty of the numbers alone.
The question is put in several ways, so that it is the operation which is learnt and not the sentence.
"""

from tasks.common import GeneratedTask, dialogue, final_text, tool_answer

ASK = ("What is {}?", "{} = ?", "Calculate {}.", "How much is {}?")


class Arithmetic(GeneratedTask):
    """digits bounds the numbers, terms the numbers in one question (2 .. terms)."""

    name = "arithmetic"

    def __init__(self, digits=3, terms=3, **kwargs):
        super().__init__(**kwargs)
        if digits < 1 or terms < 2:
            raise ValueError(f"expected digits >= 1 and terms >= 2, got {digits} and {terms}")
        self.digits, self.terms = digits, terms

    def example(self, index):
        rng = self.rng(index)
        expression, value = self.expression(rng)
        answer = str(value)
        question = rng.choice(ASK).format(expression)
        content = tool_answer(expression.replace(" ", ""), answer, answer)
        return {"messages": dialogue(question, content), "answer": answer}

    def expression(self, rng):
        """A text such as "12 * (7 + 3)" and its value, a whole number."""
        a, b = self.number(rng), self.number(rng)
        sign = rng.choice("+-*/")
        if sign == "/":
            a, b = a * (b or 1), b or 1
        text, value = f"{a} {sign} {b}", apply(a, sign, b)
        for _ in range(rng.randint(0, self.terms - 2)):
            c, sign = self.number(rng), rng.choice("+-*")
            text = f"({text}) * {c}" if sign == "*" else f"{text} {sign} {c}"
            value = apply(value, sign, c)
        return text, value

    def number(self, rng):
        return rng.randrange(10 ** rng.randint(1, self.digits))  # every number of digits equally often

    def evaluate(self, conversation, answer_text):
        return same_number(final_text(answer_text), conversation["answer"])


def apply(a, sign, b):
    if sign == "/":
        assert a % b == 0, f"{a} / {b} is not whole"
        return a // b
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def same_number(said, wanted):
    """4,042 and 4042.0 are the number 4042; "4042 apples" is not only a number, and is wrong."""
    try:
        return float(said.replace(",", "").rstrip(". ")) == float(wanted)
    except ValueError:
        return False
