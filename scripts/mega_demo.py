"""
The coding session of the project's first notes, replayed on a real source tree: a code base is pasted, a method of a class is asked about,
the talk turns to another class, and comes back. After each turn it prints the tree, LensNet's scores, the edits, the working context within
its budget, whether the blocks that hold the answer were opened, the time, and what the model said.

python -m scripts.mega_demo                                  # 100,000 tokens of Python's own library
python -m scripts.mega_demo --code ~/src/project --seed 1
python -m scripts.mega_demo --stage mid --tokens 1000000 --budget 512

The notes' class UserAuth, its login method and the database schema become classes and methods drawn by --seed among those whose names are
defined once. Questions and right answers are read off the source (tasks/codeqa.py), none is chosen by hand. At the end the demo checks the
laws itself. Everything but the times is the same again with the same --seed.
"""

import argparse
import random
import time
from collections import Counter
from dataclasses import dataclass
from math import inf
from textwrap import wrap
from typing import NamedTuple

import numpy as np

from megacontext.runtime import STAGES, Session
from megacontext.span import BLOCK
from megacontext.working_context import LEAST_BUDGET, check, cost, end_of, find, laid
from nanochat import hardware
from nanochat.common import UserError, run_main, setup
from nanochat.conversation import Conversation, Piece
from nanochat.engine import Engine
from scripts.code_base import CodeBase, python_files, shuffled, take_files
from scripts.load import add_flags, load_stage, open_tree, telemetry_maker
from tasks.codeqa import Sources, TopicShift
from tasks.common import same_words

WIDTH = 120  # of the page
STRIP = 100  # characters that stand for the whole timeline
RUNS = 12    # lines of the working context
SHOWN = 4    # highest scores, and lowest
FAR = 0.75   # share of the text that questions are asked about: the newest is raw whatever is asked

parser = argparse.ArgumentParser(description="Replay a long coding session", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
# the code base
parser.add_argument("--code", default=None, help="folder of Python files (default: Python's own library, what training kept out first)")
parser.add_argument("--tokens", type=int, default=100_000, help="take files, in an order drawn by --seed, until there are so many tokens")
add_flags(parser)
parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
parser.add_argument("--seed", type=int, default=0, help="which files, classes and questions")


# ---------------------------------------------------------------------------------------------------------------------
# The session that is replayed

@dataclass(frozen=True)
class Turn:
    title: str
    question: str
    answer: str
    says: str  # the sentence that it is given in
    first: int # bytes of the code base that hold the answer
    last: int


def scenario(code, seed):
    """The five turns of the notes' session, about two classes of two files."""
    task = TopicShift(Sources([text for _, text in code.files]))
    found = [(n, item, about) for n in range(len(code.files)) for item, about in task.classes(n, inf)
             if code.byte(n, item.end) <= FAR * len(code.text)]
    rng = random.Random(seed)
    found = shuffled(found, rng)
    others = [one for one in found if one[0] != found[0][0]]
    if not others:
        raise UserError(f"{len(code.files)} files do not hold the session: expected two, in the first {FAR:.0%} of the text, with a class whose "
                        "methods can be asked about. Name a larger --code, raise --tokens or change --seed")
    (file_a, a, about_a), (file_b, b, about_b) = found[0], others[0]
    login, after = rng.sample(about_a, 2)
    aside = rng.choice(about_b)

    def show(title, question, file, item):
        return Turn(title, question, item.header, item.header, code.byte(file, item.start), code.byte(file, item.start + len(item.header)))

    def ask(title, file, fact, lead=""):
        return Turn(title, lead + fact.question(qualified=True), fact.answer, fact.says, code.byte(file, fact.at), code.byte(file, fact.end))

    return [show("the code base is pasted (the notes' UserAuth)", f"Show me class {a.name}.", file_a, a),
            ask("a question about a method (the notes' login)", file_a, login),
            show("the topic changes (the notes' database schema)", f"Now show me class {b.name} instead.", file_b, b),
            ask("a question about a method there", file_b, aside),
            ask("back to the first class (the notes' authentication)", file_a, after, "Back to the first class. ")]


class Tick(NamedTuple):
    length: int  # tokens of history
    spans: list  # as they were scored, before the edits
    scores: list
    edits: list
    asked: bool  # by a search of the whole history for what a question asks, which is over when nothing is edited any more


class Watched(Session):
    """A session that keeps what the demo prints, and checks its own laws whenever something was read or edited."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.fed, self.ticks, self.took = [], [], [] # since the beginning; took: ms of each feed
        self.peak = self.watched = 0

    def skim(self, ids):
        for done in super().skim(ids):
            self.fed += ids[done - (self.length - len(self.fed)):done]
            yield done

    def feed(self, ids, prompt=True):
        start = time.perf_counter()
        logits = super().feed(ids, prompt)
        logits[0].item() # a GPU answers before it is done: wait
        self.took.append((time.perf_counter() - start) * 1000)
        self.fed += ids[len(ids) - (self.length - len(self.fed)):] # what skim() has not
        self.watch()
        return logits

    def score(self, found=None):
        scores, beneath = super().score(found)
        self.scored = list(self.spans), scores
        return scores, beneath

    def refocus(self, found=None, wait=False):
        edits = super().refocus(found, wait) # before a tick the token that it precedes may be one too many
        self.ticks.append(Tick(self.length, *self.scored, edits, found is not None))
        self.watch()
        return edits

    def watch(self):
        check(self.spans, self.length, self.budget)
        self.peak, self.watched = max(self.peak, cost(self.spans)), self.watched + 1


# ---------------------------------------------------------------------------------------------------------------------
# The page

def say(label, text=""):
    line = f"{label:<10}{text}"
    print(line if len(line) <= WIDTH else line[:WIDTH - 3] + "...")


def name_of(span, stop=None, on=False):
    """"L1  1,024..1,055"; with `stop`, of a run of spans that ends there; on: blocks laid on a gist."""
    level = f"L{span.level}" if span.level else "laid" if on else "raw"
    return f"{level:>4} {span.start:>9,}..{(stop or span.stop) - 1:<9,}"


def show_tree(tree):
    counts, sizes = [f"L{level} {tree.count(level):,} gists" for level in range(1, tree.levels)], tree.sizes()
    ids = sizes.pop("ids")
    say("tree", f"{', '.join([f'{tree.length:,} tokens'] + counts)}; {ids:,} bytes of ids, {sum(sizes.values()):,} of gists")


def show_scores(code, tick):
    """Highest and lowest of the scores of a tick."""
    order = sorted((i for i, span in enumerate(tick.spans) if not span.live), key=lambda i: -tick.scores[i])
    say("scores", f"{len(order)} spans, {sum(tick.scores[i] > 0 for i in order)} want detail; the {SHOWN} highest and the {SHOWN} lowest, in nats")
    for i in order[:SHOWN] + order[-SHOWN:]:
        place, text = code.place(tick.spans[i].start)
        say("", f"{tick.scores[i]:+8.4f}  {name_of(tick.spans[i])} {place:<33} {text}")


def counted(ticks):
    kinds = Counter(edit.kind for tick in ticks for edit in tick.edits)
    return f"{kinds['expand']} expand, {kinds['collapse']} collapse in {len(ticks)} ticks"


def show_edits(code, session, ticks):
    """The edits that the question made, when it was read, one by one in their order; those before it counted."""
    asked, before = ([tick for tick in ticks if tick.asked == kind] for kind in (True, False))
    edits = [edit for tick in asked for edit in tick.edits]
    say("edits", f"{len(edits)} at {session.length:,} tokens in {len(asked)} ticks, when the question was read"
                 + (f"; while reading it: {counted(before)}" if before else ""))
    for edit in edits:
        place, text = code.place(edit.node.start)
        say("", f"{edit.kind:<8}  {name_of(edit.node)} {place:<33} {text}")


def show_context(code, session, blocks):
    spans, length = session.spans, session.length
    count, raw = Counter(span.level for span in spans), sum(span.cost for span in spans if span.level == 0)
    parts = [f"{count[level]} gists of L{level}" for level in sorted(count, reverse=True) if level] + [f"{raw} raw tokens"]
    say("context", f"{' + '.join(parts)} = {cost(spans)} of {session.budget} entries, {cost(spans) / session.budget:.0%}")
    finest = [max(span.level for span in spans)] * STRIP
    for span in spans:
        for cell in range(span.start * STRIP // length, (span.stop - 1) * STRIP // length + 1):
            finest[cell] = min(finest[cell], span.level)
    marks = {block * BLOCK * STRIP // length for block in blocks}
    say("", "".join(str(level) if level else "." for level in finest))
    say("", "".join("^" if cell in marks else " " for cell in range(max(marks) + 1)) + " the answer")
    say("", f"(a character is {length / STRIP:,.0f} tokens at the finest level that any of them is shown at, . = raw)")
    runs = [] # [whether they are laid, neighbours of one level]
    for span, on in zip(spans, laid(spans)):
        if runs and runs[-1][0] == on and (runs[-1][-1].level, runs[-1][-1].stop) == (span.level, span.start):
            runs[-1].append(span)
        else:
            runs.append([on, span])
    hidden = range(RUNS // 2, len(runs) - RUNS // 2) if len(runs) > RUNS else range(0)
    for n, (on, *run) in enumerate(runs):
        if n not in hidden:
            places = [code.place(token)[0] for token in (run[0].start, run[-1].stop - 1)]
            say("", f"{name_of(run[0], run[-1].stop, on)} {len(run):>4} x {run[0].width:<6,} {' to '.join(places)}")
        elif n == hidden[0]:
            say("", f"... {len(hidden)} more runs of spans of one level ...")


def shown_as(spans, blocks):
    """How a working context shows some blocks: "raw", "L1", "L1+raw", ...; "not there" if it does not reach so far."""
    levels = {spans[find(spans, block * BLOCK)].level if block * BLOCK < end_of(spans) else None for block in blocks}
    return "+".join(sorted("not there" if level is None else f"L{level}" if level else "raw" for level in levels))


# ---------------------------------------------------------------------------------------------------------------------
# The conversation

class Outcome(NamedTuple):
    opened: bool
    rank: int        # of the answer's best block among the scores, 1 = highest
    scored: int      # spans that were
    right: bool
    answer_ms: list


def take_turn(n, turn, code, conversation, settings):
    """One turn of the conversation and its page: what the question did to the memory, then the answer."""
    session, tree = conversation.stream, conversation.stream.tree
    before, stats, ticks = session.spans, dict(session.stats), len(session.ticks)
    print(f"\n--- turn {n}: {turn.title}")
    say("user", repr(turn.question) + (f", after {len(code.text):,} bytes of code" if n == 1 else ""))
    said = conversation.reply(turn.question if n > 1 else f"{code.text.decode()}\n{turn.question}", **settings)
    start, pieces = time.perf_counter(), (piece for piece in said if isinstance(piece, Piece))
    first = next(pieces, None) # the question was read and refocused on, one token was chosen and not read yet
    total, feeds = 1000 * (time.perf_counter() - start), len(session.took)
    if n == 1:
        code.lay(conversation.engine.tokenizer, tree.tokens(0, tree.length).tolist())
    tick, heard, blocks = session.ticks[-1], session.spans, code.blocks(turn.first, turn.last - 1)
    show_tree(tree)
    show_scores(code, tick)
    show_edits(code, session, session.ticks[ticks:])
    show_context(code, session, blocks)
    spent = {stage: session.stats[f"{stage}_ms"] - stats[f"{stage}_ms"] for stage in STAGES}
    ticks = len(session.ticks)
    say("time", f"{total:,.0f} ms to the first token: {', '.join(f'{stage} {ms:,.0f}' for stage, ms in spent.items())}, "
                f"reading again {total - sum(spent.values()):,.0f}")

    said = "".join(piece.text for piece in ([first] if first else []) + list(pieces))
    answer_ms, right = session.took[feeds:], same_words(said, turn.answer) or same_words(said, turn.says)
    for line, text in enumerate(wrap(repr(said), WIDTH - 10, drop_whitespace=False)):
        say("" if line else "model", text)
    say("", f"{'right' if right else 'wrong'}, the source says {turn.says!r}")
    say("", f"{len(answer_ms)} tokens read in {sum(answer_ms):,.0f} ms; {counted(session.ticks[ticks:])}")
    name, number, text = code.line(turn.first)
    say("answer in", f"blocks {blocks[0]:,}..{blocks[-1]:,}, {name}:{number}: {text}")
    states = (("before", before), ("while reading", tick.spans), ("after the refocus", heard), ("at the end", session.spans))
    say("", "shown as " + ", ".join(f"{shown_as(spans, blocks)} {when}" for when, spans in states))
    scored = [score for span, score in zip(tick.spans, tick.scores) if not span.live]
    best = max(tick.scores[find(tick.spans, block * BLOCK)] for block in blocks)
    outcome = Outcome(shown_as(heard, blocks) == "raw", 1 + sum(score > best for score in scored), len(scored), right, answer_ms)
    say("", f"opened: {'yes' if outcome.opened else 'no'}; rank {outcome.rank} of {outcome.scored} by score ({best:+.4f})")
    return outcome


def tokens_under(tree, span):
    """The tokens that a span opens to, one level after the other."""
    if span.level == 0:
        return [tree.tokens(span.start, span.stop)]
    return [tokens for child in span.children() for tokens in tokens_under(tree, child)]


def check_laws(session):
    """Budget, tiling and losslessness as a reader would check them; raises if one is broken. What was fed is kept apart from the tree."""
    session.flush() # the newest blocks are raw and get their gists later, together
    check(session.spans, session.length, session.budget)
    assert session.peak <= session.budget, f"{session.peak} entries of a budget of {session.budget}"
    for span in session.spans:
        assert np.concatenate(tokens_under(session.tree, span)).tolist() == session.fed[span.start:span.stop], f"{span} does not open to the tokens that were fed"
    for level in range(1, session.tree.levels):
        assert session.tree.count(level) == session.tree.length // BLOCK ** level, f"level {level} has a gist too few or too many"
    say("laws", f"{session.watched:,} checks of tiling and budget, all held; {session.peak:,} of {session.budget:,} entries at most")
    say("", f"each of the {len(session.spans)} spans opens to its tokens, of the {len(session.fed):,} that were fed")


def main():
    args = parser.parse_args()
    if args.tokens < 1 or args.max_tokens < 1:
        raise UserError(f"expected --tokens and --max-tokens of at least 1, got {args.tokens} and {args.max_tokens}")
    if args.no_memory:
        raise UserError("the demo shows the memory: leave --no-memory out")
    telemetry = telemetry_maker(args)()
    if args.code is not None:
        python_files(args.code) # a wrong path is told before a model is loaded
    device, _ = setup(args.device, args.seed)
    machine = hardware.describe(device)
    dtype, _ = hardware.pick_dtype(machine, args.dtype)
    loaded = load_stage(args.stage, args.tag, args.step, device, dtype)
    if loaded.gistnet is None:
        raise UserError(f"the checkpoint {loaded.stage}/{loaded.tag} was trained without memory: name another --tag, or train with MC=1")
    tokenizer, shape = loaded.tokenizer, loaded.gpt.config
    files, large = take_files(args.code, args.tokens, random.Random(args.seed), lambda text: len(tokenizer.encode(text)))
    code = CodeBase(files)
    turns = scenario(code, args.seed)
    budget = max(LEAST_BUDGET, shape.seq_len // 2) if args.budget is None else args.budget
    session = Watched(loaded.gpt, loaded.gistnet, loaded.lensnet, open_tree(loaded), budget, telemetry=telemetry)

    say("model", f"{loaded.stage}/{loaded.tag} step {loaded.meta['step']}: {shape.layers} layers, width {shape.width}, rows of {shape.seq_len:,} "
                 f"tokens, {str(loaded.gpt.dtype).removeprefix('torch.')}; {machine.name}")
    say("memory", f"budget {budget} entries, newest {session.tail} tokens raw, at most {session.n_diff} edits a tick, a tick every {session.refocus_every} tokens")
    say("code", f"{len(code.files)} files, {len(code.text):,} bytes, {code.files[0][0]} to {code.files[-1][0]}")
    if large:
        say("", f"passed over: {large} with more than a quarter of --tokens each")
    conversation = Conversation(Engine(tokenizer), session)
    settings = dict(max_tokens=args.max_tokens, temperature=0)
    outcomes = [take_turn(n, turn, code, conversation, settings) for n, turn in enumerate(turns, 1)]

    print("\n--- after the session")
    check_laws(session)
    ms = [one for outcome in outcomes for one in outcome.answer_ms]
    say("summary", f"{len(turns)} turns, {session.length:,} tokens, {session.stats['ticks']} ticks, {session.stats['edits']} edits"
                   + (f", {np.median(ms):.1f} ms a token" if ms else ""))
    stages = session.telemetry.summary()["ms"]
    say("", "ms a tick (median): " + ", ".join(f"{name} {ms['p50']:.1f}" for name, ms in stages.items()))
    opened, right = sum(outcome.opened for outcome in outcomes), sum(outcome.right for outcome in outcomes)
    ranks = ", ".join(f"{outcome.rank}/{outcome.scored}" for outcome in outcomes)
    say("", f"opened {opened} of {len(turns)}, right {right} of {len(turns)}, ranks {ranks}")


if __name__ == "__main__":
    run_main(main)
