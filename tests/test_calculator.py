"""The calculator: right by exact arithmetic, deaf to everything that is not arithmetic, and never slow."""

import ast
import random
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from nanochat import calculator
from nanochat.calculator import MAX_CHARS, MAX_DEPTH, MAX_DIGITS, calculate


@pytest.mark.parametrize("expression, value", [
    ("1+2", "3"), (" 12 * (3 + 4) ", "84"), ("48/2", "24"), ("7/2", "3.5"), ("0.1+0.2", "0.3"), ("1,000+1", "1001"),
    ("1,234,567.5*2", "2469135"), ("-7//2", "-4"), ("-7%3", "2"), ("7%-3", "-2"), ("5.5//2", "2"), ("2-3-4", "-5"),
    ("100/5/2", "10"), ("2+3*4", "14"), ("--3", "3"), ("-(2+1)", "-3"), (".5*4", "2"), ("5.", "5"), ("10/3", "3.33333333333333"),
    ("1/3000", "0.000333333333333333"), ("-2/3", "-0.666666666666667"), ("0.00", "0"), ("007", "7"), ("1-1", "0"),
    ("'strawberry'.count('r')", "3"), ('"it\'s".count("\'")', "1"), ('"aaa".count("aa")', "1"), ('"ab".count("")', "3"),
    ("'a b'.count(' ')+1", "2"), ('2*"xx".count("x")', "4"), ("'Größe'.count('ß')", "1"),
])
def test_values_by_hand(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", [
    "", " ", "2**9", "9**9**9**9", "1/0", "1%0", "1//0", "5%(3-3)", "1+", "(1", "1)", "1 2", "2,3", "1,00", "12,345,6", "1..2", "1.2.3",
    "a+1", "__import__('os')", "'a'.upper()", "'a'", "'a'.count(1)", "1.count('a')", "'a'.count('a','b')", "'a\\n'.count('n')",
    "'a'*3", "'a'.count('a').real", "0x10", "1e5", "1_000", "1j", "True", "[1]", "lambda:1", "1;2", "1\n+2;", "٣+٤", "²", "1<<9",
    "'a'.count('a'", "'a'.__class__", "f'{1}'.count('1')", "b'a'.count('a')", "'a''a'.count('a')", "3 = 3", "sum(1,2)", "1,,000",
])
def test_what_is_not_arithmetic_has_no_value(expression):
    assert calculate(expression) is None


def random_expression(rng, depth=0):
    kind = rng.random()
    if depth > 4 or kind < 0.3:
        return rng.choice([str(rng.randrange(1000)), f"{rng.randrange(100)}.{rng.randrange(1, 99)}", f".{rng.randrange(1, 99)}"])
    if kind < 0.4:
        return "-" + random_expression(rng, depth + 1)
    if kind < 0.6:
        return "( " + random_expression(rng, depth + 1) + ")"
    return random_expression(rng, depth + 1) + rng.choice(["+", "-", " * ", "/", "//", "%"]) + random_expression(rng, depth + 1)


@pytest.mark.parametrize("seed", range(10))
def test_it_agrees_with_python_on_random_arithmetic(seed):
    """The slow obvious twin: Python's own parser on Fractions, on expressions that we wrote ourselves."""
    import re
    rng = random.Random(seed)
    valued = 0
    for _ in range(100):
        text = random_expression(rng)
        exact = re.sub(r"[0-9]*\.?[0-9]+", lambda m: f"Fraction('{m[0]}')", text)
        try:
            truth = Fraction(eval(exact, {"Fraction": Fraction}))
        except ZeroDivisionError:
            assert calculate(text) is None, text
            continue
        got = calculate(text)
        if got is None: # only ever for its size
            assert len(text) > 60, text
            continue
        valued += 1
        assert abs(Fraction(got) - truth) <= abs(truth) * Fraction(1, 10 ** 14), (text, got, float(truth))
        assert "." not in got if truth.denominator == 1 else True
    assert valued > 50


def test_hostile_text_is_refused_fast():
    hostile = [
        "9" * (MAX_DIGITS + 1), "*".join(["9" * MAX_DIGITS] * 20), "(" * (MAX_DEPTH + 2) + "1" + ")" * (MAX_DEPTH + 2), "-" * 500 + "1",
        "1" * MAX_CHARS, "1+" * MAX_CHARS, "'" + "a" * (MAX_CHARS * 5000) + "'.count('a')", "/".join(["1.0000001"] * 90), "(" * MAX_CHARS,
        "," * 900, "1," * 400, "'" * 999, "." * 999, " " * 999 + "x",
    ]
    start = time.perf_counter()
    assert [calculate(text) for text in hostile] == [None] * len(hostile)
    assert time.perf_counter() - start < 2.0


def test_the_bounds_are_where_they_are_said_to_be():
    assert calculate("9" * MAX_DIGITS) == "9" * MAX_DIGITS
    assert calculate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == "1"
    assert calculate("+".join(["1"] * 500)) == "500"
    tiny = "." + "0" * (MAX_DIGITS - 2) + "1"
    assert calculate(f"9//{tiny}") == "9" + "0" * (MAX_DIGITS - 1)
    for sign in ("/", "//"): # // was past the bound: 79 digits
        assert calculate(f"{'9' * MAX_DIGITS}{sign}{tiny}") is None


def test_it_needs_no_clock_of_the_system_and_evaluates_nothing():
    """What it may import says what it can do: no signal (Windows has no SIGALRM), no thread or process of its own, and no call of eval or exec."""
    tree = ast.parse(Path(calculator.__file__).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"re", "fractions"}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__", "getattr", "globals"}


def test_it_runs_in_any_thread():
    """nanochat's timer was a Unix signal, which only a main thread may set: in a server's worker it raised instead of computing."""
    answers = [None] * 8
    def work(i):
        answers[i] = [calculate(f"{i}*{n}") for n in range(200)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert answers == [[str(i * n) for n in range(200)] for i in range(8)]
