"""
The calculator behind <|python_start|> ... <|python_end|>: a line of arithmetic in, its value as text out.

calculate("12 * (3 + 4)") -> "84"      calculate("7/2") -> "3.5"      calculate('"strawberry".count("r")') -> "3"
calculate("1,000/3") -> "333.333333333333"      calculate("2**9") -> None      calculate("1/0") -> None

What it reads: numbers (1, 2.5, .5, 1,000), + - * / // % with Python's precedence and floor rules, signs, parentheses,
and "text".count("x"). Anything else, and anything past the bounds below, is None: the model then simply gets no output.

A parser of our own, and nothing like eval: no names, no attributes, no powers, so there is nothing to break out of and
no work that grows faster than the text. It keeps no state and needs no signal or timer, so it runs in any thread and on
any system. Arithmetic is exact (fractions), so 0.1 + 0.2 is 0.3, and 6/2 is 3 rather than 3.0: what GSM8K's own
calculator notes write.
"""

import re
from fractions import Fraction

MAX_CHARS = 1000 # of the expression
MAX_DEPTH = 32   # of parentheses and signs inside each other
MAX_DIGITS = 40  # of a whole number, written or computed; and of what a fraction may hold above and below its line
PLACES = 15      # significant digits of a value that is not a whole number

TOKEN = re.compile(r"""\s*(?:
    (?P<number> [0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?(?![0-9,.]) | [0-9]+(?:\.[0-9]*)?(?![0-9,.]) | \.[0-9]+(?![0-9,.]) )
  | (?P<count>  \.\s*count\b )
  | (?P<text>   "[^"\\\n]*" | '[^'\\\n]*' )
  | (?P<sign>   \*\* | // | [-+*/%()] )
)""", re.VERBOSE)


class Refused(Exception):
    """This text is not ours to compute; never leaves this file."""


def calculate(expression):
    """The value of `expression` as text, or None if it is not arithmetic, has no value or is out of bounds."""
    if len(expression) > MAX_CHARS:
        return None
    try:
        parser = Parser(tokens_of(expression))
        value = parser.sum(depth=0)
        parser.take("end")
        return written(value)
    except (Refused, ZeroDivisionError):
        return None


def tokens_of(expression):
    """"3*.5" -> [("number", "3"), ("sign", "*"), ("number", ".5")]"""
    expression = expression.rstrip()
    tokens, at = [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if match is None:
            raise Refused(f"cannot read {expression[at:at + 10]!r}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return tokens


class Parser:
    """Recursive descent: sum -> product -> signed -> atom, each returns a Fraction."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.at = 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, kind, text=None):
        token = self.peek()
        if token[0] != kind or (text is not None and token[1] != text):
            raise Refused(f"expected {text or kind}, got {token}")
        self.at += 1
        return token[1]

    def sum(self, depth):
        value = self.product(depth)
        while self.peek() in (("sign", "+"), ("sign", "-")):
            right = self.product(depth) if self.take("sign") == "+" else -self.product(depth)
            value = bounded(value + right)
        return value

    def product(self, depth):
        value = self.signed(depth)
        while self.peek() in (("sign", "*"), ("sign", "/"), ("sign", "//"), ("sign", "%")):
            sign = self.take("sign")
            right = self.signed(depth)
            if sign == "*":
                value = bounded(value * right)
            elif sign == "/":
                value = bounded(value / right)
            elif sign == "//":
                value = bounded(Fraction(value // right))
            else:
                value = bounded(value % right)
        return value

    def signed(self, depth):
        if depth > MAX_DEPTH:
            raise Refused("nested too deep")
        if self.peek() in (("sign", "+"), ("sign", "-")):
            return self.signed(depth + 1) if self.take("sign") == "+" else -self.signed(depth + 1)
        return self.atom(depth)

    def atom(self, depth):
        kind, text = self.peek()
        if kind == "number":
            self.take("number")
            return bounded(Fraction(text.replace(",", "").rstrip(".")))
        if kind == "text":
            whole = self.take("text")[1:-1]
            self.take("count")
            self.take("sign", "(")
            part = self.take("text")[1:-1]
            self.take("sign", ")")
            return bounded(Fraction(whole.count(part)))
        self.take("sign", "(")
        value = self.sum(depth + 1)
        self.take("sign", ")")
        return value


def bounded(value):
    limit = 10 ** MAX_DIGITS
    if abs(value.numerator) >= limit or value.denominator >= limit:
        raise Refused("too many digits")
    return value


def written(value):
    """A whole number in full; anything else rounded to PLACES significant digits, without exponent or idle zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole = size.numerator // size.denominator
    shift = PLACES - len(str(whole)) if whole else PLACES - 1 + leading_zeros(size) + 1
    if shift <= 0:
        return sign + str(round(size))
    digits = str(round(size * 10 ** shift)).rjust(shift + 1, "0")
    text = f"{digits[:-shift]}.{digits[-shift:]}".rstrip("0").rstrip(".")
    return sign + text


def leading_zeros(size):
    """Zeros between the point and the first digit of 0 < size < 1: 0.05 -> 1."""
    zeros = 0
    while size * 10 ** (zeros + 1) < 1:
        zeros += 1
    return zeros
