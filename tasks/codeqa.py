"""
Questions about a real source tree, answered from the definition itself, which stands far back in a long text.

In:  texts of Python source (others are filler only). `ast` finds the definitions; nothing is imported or run.
Out: CodeQuestions: "Which arguments does copyfile take?" -> "src, dst", "Which class does Handler inherit from?",
     "What is the default of mode in open_file?", "What does fileno return?"
     TopicShift: one conversation about two classes in two files, as in the coding session of the project's first notes: show
     class A, ask about it; switch to class B, ask about it; come back to A. What was left in between must still be there.

A question is asked only about a name that is defined once in all texts, so that it has one answer. Answers are copied
from the source: a few tokens. Answers that are good guesses without reading (None, a base class that half the tree has) are
left out: this is a test of memory.
"""

import ast
import re
import warnings
from collections import Counter
from dataclasses import dataclass

from nanochat.common import UserError
from tasks.haystack import Ask, Filler, LongTask

DEFINITION = re.compile(r"\b(?:def|class)[ \t]+(\w+)")
BASE = re.compile(r"\bclass[ \t]+\w+\(([\w.]+)\)")
COMMON = 5 # a base class with more children than this in all texts is a good guess without reading
GUESSES = ("None", "True", "False", "0", "1", "-1", "''", "()", "self", "result") # so are these
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
        answer = written(value, lines)
        if isinstance(value, ast.Constant) and answer and len(answer) <= LONGEST // 2:
            facts.append(Fact("default", node.name, owner, answer, start, end, start, name))
    last = node.body[-1]
    if isinstance(last, ast.Return) and last.value and leaves_once(node):
        answer, at = written(last.value, lines), starts[last.value.lineno - 1]
        if answer and len(answer) <= LONGEST:
            facts.append(Fact("returns", node.name, owner, answer, start, starts[last.value.end_lineno] - 1, at))
    return facts


def written(node, lines):
    """An expression as it stands in the source (0o666 rather than 438); "" if it runs over lines."""
    if node.lineno != node.end_lineno:
        return ""
    return lines[node.lineno - 1].encode()[node.col_offset:node.end_col_offset].decode() # ast counts bytes


def leaves_once(node):
    """Is there one return in the function, and nothing (a generator, a function inside) that makes "returns" ambiguous?"""
    doubtful = (ast.Return, ast.Yield, ast.YieldFrom, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(isinstance(inner, doubtful) for inner in ast.walk(node)) == 2 # the function itself and its return


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

class Sources(Filler):
    """A filler that also knows what its texts define. Files are parsed when first asked for; share one between tasks."""

    def __init__(self, texts, measure=len):
        super().__init__(texts, measure)
        self.known = {} # number of a text -> ([(fact, size)], [(class, size)])
        self.counts = self.children = None # how often each name is defined, and inherited from, in all texts

    def read(self, number):
        if number not in self.known:
            text = self.texts[number]
            facts, classes = read_source(text)
            self.known[number] = ([(fact, self.measure(text[fact.start:fact.end])) for fact in facts
                                   if self.once(fact.owner or fact.name) and not self.guessable(fact)],
                                  [(item, self.measure(text[item.start:item.end])) for item in classes if self.once(item.name)])
        return self.known[number]

    def count(self):
        if self.counts is None:
            self.counts = Counter(name for text in self.texts for name in DEFINITION.findall(text))
            self.children = Counter(name for text in self.texts for name in BASE.findall(text))

    def once(self, name):
        self.count()
        return self.counts[name] == 1

    def guessable(self, fact):
        """Would a model that has not read the text often be right? Then the question says nothing about its memory."""
        self.count()
        return self.children[fact.answer] > COMMON if fact.kind == "base" else fact.answer in GUESSES


class CodeTask(LongTask):
    """texts: a list of files, or Sources."""

    def __init__(self, texts, measure=len, **kwargs):
        super().__init__(texts if isinstance(texts, Sources) else Sources(texts, measure), **kwargs)

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
    """
    kinds      what is asked, a selection of KINDS
    questions  how many are asked, each about another file; the one at the wanted depth comes last. One training row of several
               questions learns from all of them
    """

    name = "codeqa"

    def __init__(self, texts, kinds=KINDS, questions=1, **kwargs):
        super().__init__(texts, **kwargs)
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"expected kinds among {', '.join(KINDS)}, got {kinds}")
        self.kinds, self.questions = sorted(kinds), questions
        if len(self.filler.used) <= questions:
            raise UserError(f"codeqa: expected at least {questions + 1} files ({questions} to ask about, others to fill with), "
                            f"got {len(self.filler.used)}")

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        longest = length / (self.questions + 3) # of a definition and what is shown around it
        used, facts, asks = set(), [], []
        for n in range(self.questions):
            kind = rng.choice(self.kinds) # kinds evenly: most definitions have arguments
            number, found = self.search(rng, lambda n: n not in used and self.askable(n, kind, longest),
                                        f"a definition ({kind}) that fits a length of {length}")
            used.add(number)
            fact = rng.choice(found)
            start, end = self.window(self.filler.texts[number], fact, longest)
            place = depth if n == self.questions - 1 else rng.random()
            facts.append((place, f"\n{self.filler.texts[number][start:end]}\n"))
            asks.append(Ask(fact.question(), fact.answer, n, 1 + fact.at - start))
        return self.recall(rng, length, facts, asks, avoid=used)

    def askable(self, number, kind, longest):
        return [fact for fact, size in self.filler.read(number)[0]
                if fact.kind == kind and size <= longest and self.filler.once(fact.name)]

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
        facts, classes = self.filler.read(number)
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
