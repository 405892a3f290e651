"""
Questions about a real source tree, answered from the definition itself, which stands far back in a long text.

In:  texts of Python source (others are filler only). `ast` finds the definitions; nothing is imported or run.
Out: CodeQuestions: "Which arguments does copyfile take?" -> "src, dst", "Which class does Handler inherit from?",
     "What is the default of mode in open_file?", "What does fileno return?"
     TopicShift: one conversation about two classes in two files, as in the coding session of the project's first notes: show
     class A, ask about it; switch to class B, ask about it; come back to A. What was left in between must still be there.

A question is asked only about a name that is defined once in all texts, so that it has one answer. Answers are copied
from the source: a few tokens. They are given in the definition's own first line ("def copyfile(src, dst, *, follow_symlinks=True)"), so that the words
of the question stand in front of them as in the source (haystack.Ask). Answers that are good guesses without reading (None, a base class that half the
tree has) are left out: this is a test of memory.
"""

import ast
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import islice

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
    says: str          # the definition's first line, and of "returns" what it returns: what the assistant says
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
            facts += base_fact(node, lines, starts)
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


def first_line(node, lines):
    """A definition's first line; "" if it goes on in the next, ends in something else, or is too long to be said."""
    line = lines[node.lineno - 1].strip()
    return line if line.endswith(":") and node.body[0].lineno > node.lineno and len(line) <= 2 * LONGEST else ""


def class_source(node, lines, starts):
    header = first_line(node, lines)
    return [ClassSource(node.name, header, starts[node.lineno - 1], min(starts[node.end_lineno], starts[-1] - 1))] if header else []


def base_fact(node, lines, starts):
    header = first_line(node, lines)
    if not header or len(node.bases) != 1 or node.keywords or not isinstance(node.bases[0], (ast.Name, ast.Attribute)):
        return []
    answer, start = ast.unparse(node.bases[0]), starts[node.lineno - 1]
    return [Fact("base", node.name, "", answer, start, starts[node.lineno] - 1, start, header[:-1])]


def function_facts(node, owner, lines, starts):
    """What one function or method says about its arguments, their defaults and what it returns."""
    facts, header = [], first_line(node, lines)
    if not header:
        return facts
    start, end, says = starts[node.lineno - 1], starts[node.lineno] - 1, header[:-1]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    names = argument_names(node.args)[1 if owner and not static else 0:]
    answer = ", ".join(names)
    if names and len(answer) <= LONGEST:
        facts.append(Fact("arguments", node.name, owner, answer, start, end, start, says))
    for name, value in defaults(node.args):
        answer = written(value, lines)
        if isinstance(value, ast.Constant) and answer and len(answer) <= LONGEST // 2:
            facts.append(Fact("default", node.name, owner, answer, start, end, start, says, name))
    last = node.body[-1]
    if isinstance(last, ast.Return) and last.value and leaves_once(node):
        answer, at = written(last.value, lines), starts[last.value.lineno - 1]
        if answer and len(answer) <= LONGEST:
            facts.append(Fact("returns", node.name, owner, answer, start, starts[last.value.end_lineno] - 1, at, f"{header} return {answer}"))
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
        self.known = {} # number of a text -> ([(fact, size, said)], [(class, size, said)])
        self.counts = self.children = None # how often each name is defined, and inherited from, in all texts

    def read(self, number):
        """([(fact, size, said)], [(class, size, said)]) of a text: the size of the definition, and of its question with the answer."""
        if number not in self.known:
            text, size = self.texts[number], lambda item: self.measure(text[item.start:item.end])
            facts, classes = read_source(text)
            self.known[number] = ([(fact, size(fact), self.measure(f"{fact.question(qualified=True)}\n{fact.says}")) for fact in facts
                                   if self.once(fact.owner or fact.name) and not self.guessable(fact)],
                                  [(item, size(item), self.measure(f"Show me class {item.name}.\n{item.header}")) for item in classes if self.once(item.name)])
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

    def search(self, rng, wanted):
        """The first text from a random one on for which wanted(number) is not empty -> (number, wanted(number)), or None."""
        texts = len(self.filler.texts)
        first = rng.randrange(texts)
        for number in (n % texts for n in range(first, first + texts)):
            if found := wanted(number):
                return number, found
        return None

    def nothing(self, what):
        return UserError(f"{self.name}: none of {len(self.filler.texts)} texts has {what}. Give it Python source (--source stdlib) or a greater length")

    def with_some(self, wanted, least):
        """Are there `least` texts for which wanted(number) is not empty?"""
        found = (number for number in range(len(self.filler.texts)) if wanted(number))
        return len(list(islice(found, least))) == least


class CodeQuestions(CodeTask):
    """
    kinds      what is asked, a selection of KINDS
    questions  how many are asked, each about another file; the one at the wanted depth comes last. One training row of several
               questions learns from all of them
    A definition with what is shown around it, its question and its answer take at most `share` of the length, one part in
    questions + 1: so whatever is drawn, it fits, and the rest is filler.
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

    def lacking(self):
        enough = self.with_some(lambda n: self.askable(n, self.kinds, self.share(self.low)), self.questions)
        return "" if enough else f"fewer than {self.questions} files define something that one can ask about in {self.low} tokens"

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        used, facts, asks = set(), [], []
        for n in range(self.questions):
            number, (fact, _, said) = self.choose(rng, used, length)
            used.add(number)
            start, end = self.window(self.filler.texts[number], fact, self.share(length) - said)
            place = depth if n == self.questions - 1 else rng.random()
            facts.append((place, f"\n{self.filler.texts[number][start:end]}\n"))
            asks.append(Ask(fact.question(), fact.answer, n, 1 + fact.at - start, 1 + fact.end - start, fact.says))
        return self.recall(rng, length, facts, asks, avoid=used)

    def share(self, length):
        return length / (self.questions + 1)

    def choose(self, rng, used, length):
        """A text that is not in `used`, and something to ask about it: kinds evenly, as most definitions have arguments, but those that no text has."""
        for kind in rng.sample(self.kinds, len(self.kinds)):
            if found := self.search(rng, lambda n: n not in used and self.askable(n, [kind], self.share(length))):
                return found[0], rng.choice(found[1])
        raise self.nothing(f"{'another' if used else 'a'} definition that fits a length of {length}")

    def askable(self, number, kinds, share):
        return [(fact, size, said) for fact, size, said in self.filler.read(number)[0]
                if fact.kind in kinds and size + said <= share and self.filler.once(fact.name)]

    def window(self, text, fact, longest):
        """(start, end) of whole lines around the definition, at most `longest`."""
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
    """
    Five turns; "turns" holds answer and depth of each. depth is that of class A, to which the last question returns.
    A class takes at most a quarter of the length, a question with its answer an eleventh: two and five of them leave a little.
    """

    name = "topicshift"

    def lacking(self):
        enough = self.with_some(lambda n: self.classes(n, self.low), 2) and len(self.filler.used) > 2
        return "" if enough else f"fewer than 2 files have a class with two facts that one can ask about in {self.low} tokens"

    def example(self, index):
        rng = self.rng(index)
        length, depth = self.draw(rng)
        first, a, about_a = self.choose(rng, None, length)
        second, b, about_b = self.choose(rng, first, length)
        shown = [f"\n{self.filler.texts[number][item.start:item.end]}\n" for number, item in ((first, a), (second, b))]
        before, after = rng.sample(about_a, 2)
        aside = rng.choice(about_b)
        asks = [self.show("Show me class {}.", a, 0), self.ask(before, 0, a),
                self.show("Now show me class {} instead.", b, 1), self.ask(aside, 1, b),
                self.ask(after, 0, a, "Back to the first class. ")]
        away = rng.uniform(0, depth) if rng.random() < depth else rng.uniform(depth, 1)
        out = self.recall(rng, length, [(depth, shown[0]), (away, shown[1])], asks, avoid={first, second})
        out["topics"] = [a.name, b.name]
        return out

    def choose(self, rng, other, length):
        """A text that is not the other one, a class of it, and what can be asked about that."""
        if found := self.search(rng, lambda n: n != other and self.classes(n, length)):
            return found[0], *rng.choice(found[1])
        raise self.nothing(f"{'a' if other is None else 'another'} class with two facts that fits a length of {length}")

    def classes(self, number, length):
        """[(class, what can be asked about it)] of one text, as far as it fits a length."""
        facts, classes = self.filler.read(number)
        out = []
        for item, size, shown in classes:
            about = [(fact, said) for fact, _, said in facts if fact.owner == item.name and item.start <= fact.start and fact.end <= item.end]
            # a property's setter has its getter's name: ask only about what is said once
            often = Counter((fact.kind, fact.name, fact.argument) for fact, _ in about)
            about = [fact for fact, said in about if often[fact.kind, fact.name, fact.argument] == 1 and said <= length / 11]
            if len(about) >= 2 and size <= length / 4 and shown <= length / 11:
                out.append((item, about))
        return out

    @staticmethod
    def show(question, item, number):
        return Ask(question.format(item.name), item.header, number, 1, 1 + len(item.header))

    @staticmethod
    def ask(fact, number, item, lead=""):
        return Ask(lead + fact.question(qualified=True), fact.answer, number, 1 + fact.at - item.start, 1 + fact.end - item.start, fact.says)
