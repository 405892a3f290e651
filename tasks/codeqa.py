"""
Questions about a real source tree, answered from the definition itself, which stands far back in a long text.

In:  texts of Python source (others are filler only). `ast` finds the definitions; nothing is imported or run.
Out: CodeQuestions: "Which arguments does copyfile take?" -> "src, dst", "Which class does Handler inherit from?",
     "What is the default of mode in open_file?", "What does fileno return?"
     TopicShift: one conversation about two classes in two files, as in the coding session of the project's first notes: show
     class A, ask about it; switch to class B, ask about it; come back to A. What was left in between must still be there.

A question is asked only about a name that is defined once in all texts, so that it has one answer. Answers are copied
from the source: a few tokens.
"""

import ast
import re
import warnings
from collections import Counter
from dataclasses import dataclass

from nanochat.common import UserError
from tasks.haystack import Ask, LongTask

DEFINITION = re.compile(r"\b(?:def|class)[ \t]+(\w+)")
KINDS = ("arguments", "base", "default", "returns")
LONGEST = 40 # characters of an answer
WINDOW = 4000 # characters of its own file that are shown around a definition, at most


@dataclass(frozen=True)
class Fact:
    """Something a definition says. The answer can be read off text[start:end]."""
    kind: str
    name: str
    owner: str # the class of a method, else ""
    answer: str
    start: int
    end: int
    at: int            # where the answer's line begins
    argument: str = "" # of a "default"

    def question(self, qualified=False):
        name = f"{self.owner}.{self.name}" if qualified and self.owner else self.name
        return {"arguments": f"Which arguments does {name} take?",
                "base": f"Which class does {name} inherit from?",
                "default": f"What is the default of {self.argument} in {name}?",
                "returns": f"What does {name} return?"}[self.kind]


@dataclass(frozen=True)
class ClassSource:
    name: str
    header: str # "class Handler(Filterer):"
    start: int
    end: int


# ---------------------------------------------------------------------------------------------------------------------
# Reading source

def read_source(text):
    """Python source -> (facts, classes) in the order of the text; empty for anything that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore") # old escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError): # not Python, null bytes, absurdly nested
        return [], []
    lines = text.split("\n") # not splitlines(): ast does not count a form feed as a line's end
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    facts, classes = [], []
    for node, owner in definitions(tree):
        if isinstance(node, ast.ClassDef):
            classes += class_source(node, lines, starts)
            facts += base_fact(node, starts)
        elif not node.name.startswith("__"):
            facts += function_facts(node, owner, lines, starts)
    return facts, classes


def definitions(tree):
    """(node, name of the class it stands in) of top-level classes and functions and of methods."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, ""
        elif isinstance(node, ast.ClassDef):
            yield node, ""
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield member, node.name


def class_source(node, lines, starts):
    header = lines[node.lineno - 1].strip()
    if not header.endswith(":") or len(header) > 2 * LONGEST:
        return []
    return [ClassSource(node.name, header, starts[node.lineno - 1], min(starts[node.end_lineno], starts[-1] - 1))]


def base_fact(node, starts):
    if len(node.bases) != 1 or node.keywords or not isinstance(node.bases[0], (ast.Name, ast.Attribute)):
        return []
    answer, start = ast.unparse(node.bases[0]), starts[node.lineno - 1]
    return [Fact("base", node.name, "", answer, start, starts[node.bases[0].end_lineno] - 1, start)]


def function_facts(node, owner, lines, starts):
    """What one function or method says about its arguments, their defaults and what it returns."""
    facts = []
    start, end = starts[node.lineno - 1], starts[max(node.body[0].lineno - 1, node.lineno)] - 1
    if node.body[0].lineno == node.lineno:
        return facts # all on one line: nothing to look for
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    names = argument_names(node.args)[1 if owner and not static else 0:]
    answer = ", ".join(names)
    if names and len(answer) <= LONGEST:
        facts.append(Fact("arguments", node.name, owner, answer, start, end, start))
    for name, value in defaults(node.args):
        if isinstance(value, ast.Constant) and len(repr(value.value)) <= LONGEST // 2:
            facts.append(Fact("default", node.name, owner, repr(value.value), start, end, start, name))
    returns = [inner for inner in ast.walk(node) if isinstance(inner, (ast.Return, ast.Yield, ast.YieldFrom, ast.Lambda))
               or isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)) and inner is not node]
    if len(returns) == 1 and isinstance(returns[0], ast.Return) and returns[0] is node.body[-1] and returns[0].value:
        value = returns[0].value
        if value.lineno == value.end_lineno:
            line = lines[value.lineno - 1].encode()
            answer = line[value.col_offset:value.end_col_offset].decode()
            if len(answer) <= LONGEST:
                at = starts[value.lineno - 1]
                facts.append(Fact("returns", node.name, owner, answer, start, at + len(lines[value.lineno - 1]), at))
    return facts


def argument_names(args):
    """Names as they are written in a call's documentation: a, b, *rest, key, **options."""
    names = [arg.arg for arg in args.posonlyargs + args.args]
    names += [f"*{args.vararg.arg}"] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    return names + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def defaults(args):
    """(name, expression) of every argument that has a default."""
    plain = args.posonlyargs + args.args
    last = len(plain) - len(args.defaults)
    pairs = [(arg.arg, value) for arg, value in zip(plain[last:], args.defaults)]
    return pairs + [(arg.arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults) if value]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks

class CodeTask(LongTask):
    """Reads files as they are needed and remembers what they define."""

    def __init__(self, texts, **kwargs):
        super().__init__(texts, **kwargs)
        self.known = {} # number of a text -> ([(fact, size)], [(class, size)])
        self.counts = None # how often each name is defined in all texts

    def read(self, number):
        if self.counts is None:
            self.counts = Counter(name for text in self.filler.texts for name in DEFINITION.findall(text))
        if number not in self.known:
            text, measure = self.filler.texts[number], self.filler.measure
            facts, classes = read_source(text)
            self.known[number] = ([(fact, measure(text[fact.start:fact.end])) for fact in facts
                                   if self.once(fact.owner or fact.name)],
                                  [(item, measure(text[item.start:item.end])) for item in classes if self.once(item.name)])
        return self.known[number]

    def once(self, name):
        return self.counts[name] == 1

    def search(self, rng, wanted, what):
        """The first text from a random one on for which wanted(number) is not empty -> (number, wanted(number))."""
        texts = len(self.filler.texts)
        first = rng.randrange(texts)
        for number in (n % texts for n in range(first, first + texts)):
            if found := wanted(number):
                return number, found
        raise UserError(f"{self.name}: none of {texts} texts has {what}. Give it Python source (--source stdlib) "
                        "or a greater length")


class CodeQuestions(CodeTask):
    """kinds: what is asked, a selection of KINDS. questions: how many about the same file, the one at the wanted depth last."""

    name = "codeqa"

    def __init__(self, texts, kinds=KINDS, questions=1, **kwargs):
        super().__init__(texts, **kwargs)
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"expected kinds among {', '.join(KINDS)}, got {kinds}")
        self.kinds, self.questions = set(kinds), questions
        if len(self.filler.used) < 2:
            raise UserError("codeqa: expected at least two files (one to ask about, others to fill with), got one")

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        longest = length / 4 # of the definition
        number, facts = self.search(rng, lambda n: self.askable(n, longest), f"a definition that fits a length of {length}")
        text = self.filler.texts[number]
        kind = rng.choice(sorted({fact.kind for fact in facts})) # kinds evenly: most definitions have arguments
        target = rng.choice([fact for fact in facts if fact.kind == kind])
        start, end = self.window(text, target, longest)
        inside = [fact for fact in facts if start <= fact.start and fact.end <= end and fact != target]
        asked = rng.sample(inside, min(self.questions - 1, len(inside))) + [target]
        asks = [Ask(fact.question(), fact.answer, 0, 1 + fact.at - start) for fact in asked]
        return self.recall(rng, length, [(depth, f"\n{text[start:end]}\n")], asks, avoid={number})

    def askable(self, number, longest):
        return [fact for fact, size in self.read(number)[0]
                if size <= longest and fact.kind in self.kinds and self.once(fact.name)]

    def window(self, text, fact, longest):
        """(start, end) of whole lines around the definition, at most `longest` unless the definition itself is longer."""
        room = WINDOW - (fact.end - fact.start)
        while room > 0:
            start = text.rfind("\n", 0, max(0, fact.start - room // 2)) + 1
            end = text.find("\n", min(len(text), fact.end + room // 2))
            end = len(text) if end < 0 else end
            if self.filler.measure(text[start:end]) <= longest:
                return start, end
            room //= 2
        return fact.start, fact.end


class TopicShift(CodeTask):
    """Five turns; "turns" holds answer and depth of each. depth is that of class A, to which the last question returns."""

    name = "topicshift"

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        longest = length / 4 # of a class
        what = f"two classes with two facts each that fit a length of {length}"
        first, found = self.search(rng, lambda n: self.classes(n, longest), what)
        a, about_a = rng.choice(found)
        second, found = self.search(rng, lambda n: n != first and self.classes(n, longest), what)
        b, about_b = rng.choice(found)
        shown = [f"\n{self.filler.texts[number][item.start:item.end]}\n" for number, item in ((first, a), (second, b))]
        before, after = rng.sample(about_a, 2)
        aside = rng.choice(about_b)
        asks = [Ask(f"Show me class {a.name}.", a.header, 0, 1), self.ask(before, 0, a),
                Ask(f"Now show me class {b.name} instead.", b.header, 1, 1), self.ask(aside, 1, b),
                self.ask(after, 0, a, "Back to the first class. ")]
        away = rng.uniform(0, depth) if rng.random() < depth else rng.uniform(depth, 1)
        out = self.recall(rng, length, [(depth, shown[0]), (away, shown[1])], asks, avoid={first, second})
        out["topics"] = [a.name, b.name]
        return out

    def classes(self, number, longest):
        """[(class, what can be asked about it)] of one text."""
        facts, classes = self.read(number)
        out = []
        for item, size in classes:
            about = [fact for fact, _ in facts if fact.owner == item.name and item.start <= fact.start and fact.end <= item.end]
            # a property's setter has its getter's name: ask only about what is said once
            said = Counter((fact.kind, fact.name, fact.argument) for fact in about)
            about = [fact for fact in about if said[fact.kind, fact.name, fact.argument] == 1]
            if len(about) >= 2 and size <= longest:
                out.append((item, about))
        return out

    @staticmethod
    def ask(fact, number, item, lead=""):
        return Ask(lead + fact.question(qualified=True), fact.answer, number, 1 + fact.at - item.start)
