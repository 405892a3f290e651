"""
Questions about what was said far back, asked of sessions and of a window.
A question is put to five ways of remembering at the same budget, on the same tokens:
    lensnet   the session as it talks: gists, and what LensNet opens
    told      a session with nothing opened but the blocks where the answer stands, pinned: what LensNet could bring at best
    recency   a session without LensNet: the newest blocks raw, gists of the rest
    gists     a session that sees nothing raw of what came before its tail: gists only, which are finest where they are newest
    window    the plain model on the newest tokens, behind the very first one
and of the first it is told how often all of the answer's tokens were raw in view when it began to speak (`found`): whether LensNet fails, or the GPT.
GistNet reads the text once, for the sessions together.
"""
import time
from itertools import islice

import numpy as np

from megacontext.ingest import ingest
from megacontext.runtime import STAGES, Session
from megacontext.span import BLOCK
from megacontext.telemetry import Telemetry
from megacontext.working_context import LEAST_BUDGET, Pins, raw_tail
from nanochat import plots, report
from nanochat.common import UserError, print0
from nanochat.engine import Engine, PlainStream
from scripts.load import open_tree
from scripts.mixtures import texts_of
from tasks.codeqa import CodeQuestions, Sources
from tasks.haystack import Filler
from tasks.needle import MultiKey, Passkey
from tasks.ruler import VariableTracking

SESSIONS = ("lensnet", "told", "recency", "gists")
WAYS = (*SESSIONS, "window")
COLUMNS = (*WAYS, "found")
TASKS = {"passkey": (Passkey, 32), "multikey": (MultiKey, 32), "variables": (VariableTracking, 32), "codeqa": (CodeQuestions, 64)} # most tokens of an answer


# ---------------------------------------------------------------------------------------------------------------------
# Settings

def add_recall_flags(parser):
    """The flags of what asks these questions."""
    parser.add_argument("--recall-tasks", default=",".join(TASKS), help="comma list")
    parser.add_argument("--recall-lengths", default="1024,8192", help="tokens of history, comma list; empty = no recall table")
    parser.add_argument("--recall-depths", default="0,0.5,0.9", help="of the fact that is asked about, comma list, 0 = oldest")
    parser.add_argument("--recall-problems", type=int, default=2, help="questions for each task, length, depth and seed")
    parser.add_argument("--recall-budget", type=int, default=-1, help="visible entries (-1 = a quarter of the row, or the least that a session takes)")


def numbers(text, kind=int):
    """ "1,2" -> [1, 2]; UserError for anything else."""
    try:
        return [kind(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise UserError(f"expected numbers with commas between them, got {text!r}") from None


def settle_recall(args, T):
    """Fill in what was left to a model with rows of T tokens; UserError for what cannot be asked."""
    args.recall_budget = args.recall_budget if args.recall_budget > 0 else max(LEAST_BUDGET, T // 4)
    args.recall_lengths, args.recall_depths = numbers(args.recall_lengths), numbers(args.recall_depths, float)
    args.recall_tasks = [name for name in args.recall_tasks.split(",") if name]
    if min(args.seeds, args.recall_problems) < 1 or set(args.recall_tasks) - set(TASKS) or not args.recall_depths or not all(0 <= depth <= 1 for depth in args.recall_depths):
        raise UserError(f"expected --seeds and --recall-problems of at least 1, --recall-tasks among {', '.join(TASKS)} and depths from 0 to 1, "
                        f"got {args.seeds}, {args.recall_problems}, {', '.join(args.recall_tasks)} and {args.recall_depths}")


# ---------------------------------------------------------------------------------------------------------------------
# Asking

class Questions:
    """Tasks by name over the texts of a source, which are read and parsed when a task first needs them."""

    def __init__(self, source, tokenizer):
        self.source, self.measure, self.held = source, lambda text: len(tokenizer.encode(text)), {}

    def task(self, name, **settings):
        """Raises ValueError or UserError where the texts do not hold what it takes."""
        make = TASKS[name][0]
        hold = Sources if make is CodeQuestions else Filler
        if hold not in self.held:
            self.held[hold] = hold(texts_of(self.source, "val"), self.measure)
        task = make(self.held[hold], split="val", **settings)
        task[0] # some tasks find only here that they have no room
        return task


def answers(loaded, engine, conversation, budget, most, telemetry):
    """{way: what it says}, and whether all tokens that answer were raw in view of the session as it talks. telemetry: {way: Telemetry} of the sessions."""
    prompt, tokenizer = loaded.tokenizer.render_prompt({"messages": conversation["messages"][:-1]}), loaded.tokenizer
    evidence = token_ranges(tokenizer, conversation)
    said, found, tree = {}, False, open_tree(loaded)
    head = max(0, (len(prompt) - raw_tail(budget)) // BLOCK * BLOCK)
    if head:
        ingest(loaded.gpt, loaded.gistnet, tree, prompt[:head])
    pins = dict(gists=Pins(never=((0, head),)), told=Pins(raw=tuple((start, min(stop, head)) for start, stop in evidence if start < head))) if head else {}
    for way in SESSIONS:
        session = Session(loaded.gpt, loaded.gistnet, loaded.lensnet, tree, budget, n_diff=4 if way in ("lensnet", "gists") else 0, telemetry=telemetry[way], pins=pins.get(way, Pins()),
                          longest=len(prompt) + most)
        answer = iter(engine.generate(session, prompt[head:], max_tokens=most, temperature=0))
        first = list(islice(answer, 1))
        if way == "lensnet":
            raw = {span.index for span in session.spans if span.level == 0}
            found = all(block in raw for start, stop in evidence for block in range(start // BLOCK, (stop - 1) // BLOCK + 1))
        said[way] = tokenizer.decode([*first, *answer])
        telemetry[way].next_session()
        tree.truncate(head)
    newest = min(budget, loaded.gpt.config.seq_len) - most
    window = prompt if len(prompt) <= newest else prompt[:1] + prompt[1 - newest:]
    said["window"] = tokenizer.decode(list(engine.generate(PlainStream(loaded.gpt), window, max_tokens=most, temperature=0)))
    return said, found


def token_ranges(tokenizer, conversation):
    """Where the evidence stands in the rendered conversation: [(start, stop), ...] in tokens, whole tokens where one spans an edge."""
    text = conversation["messages"][0]["content"]
    ids = tokenizer.encode(text)
    ends = np.cumsum(tokenizer.token_bytes()[ids]) # of each token, in bytes
    size = lambda stop: len(text[:stop].encode())
    opening = tokenizer.render_prompt({"messages": [dict(role="user", content="")]}).index(tokenizer.special("<|user_end|>")) # tokens in front of the text
    return [(opening + int(np.searchsorted(ends, size(start), "right")), opening + int(np.searchsorted(ends, size(stop), "left")) + 1) for start, stop in conversation["evidence"]]


def recall(loaded, engine, names, source, lengths, depths, problems, seeds, budget, began):
    """
    Every task at every length and depth, `problems` questions for each of `seeds` seeds.
    Returns ({task: {length: {depth: {way, or found: [share, one a seed]}}}}, {task/length: why it was not asked}, {way/length: summary of the telemetry}).
    """
    questions, data, missing, summaries = Questions(source, loaded.tokenizer), {}, {}, {}
    for length in lengths:
        telemetry = {way: Telemetry() for way in SESSIONS}
        for name in names:
            try:
                tasks = {depth: [questions.task(name, length=length, depth=depth, seed=seed, size=problems) for seed in range(seeds)] for depth in depths}
            except (UserError, ValueError) as error:
                missing[f"{name}/{length}"] = str(error)
                print0(f"recall {name} in {length} tokens: not asked, {error}")
                continue
            table = data.setdefault(name, {})[length] = {}
            for depth in depths:
                shares = table[depth] = {column: [] for column in COLUMNS}
                for task in tasks[depth]:
                    right = dict.fromkeys(COLUMNS, 0)
                    for i in range(len(task)):
                        said, found = answers(loaded, engine, task[i], budget, TASKS[name][1], telemetry)
                        for way, text in said.items():
                            right[way] += task.evaluate(task[i], text)
                        right["found"] += found
                    for column in COLUMNS:
                        shares[column].append(right[column] / len(task))
            told = ", ".join(f"{column} {mean([share for depth in depths for share in table[depth][column]]):.2f}" for column in COLUMNS)
            print0(f"recall {name} in {length} tokens: {told} ({time.time() - began:.0f} s)")
        summaries |= {f"{way}/{length}": told.summary() for way, told in telemetry.items() if any(length in table for table in data.values())}
    return data, missing, summaries


def mean(values):
    return sum(values) / len(values)


def recall_table(data, depths):
    """data: {task: {length: {depth: {way, or found: dict(mean, spread)}}}} -> Markdown, in percent."""
    rows = [[f"{name}, {length} tokens, {way}", *[percent(table[depth][way]) for depth in depths]]
            for name, lengths in data.items() for length, table in lengths.items() for way in COLUMNS]
    return report.table(["question, history, way", *[f"depth {depth}" for depth in depths]], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry of the sessions

def telemetry_numbers(summaries):
    """What a dashboard plots of them, by names such as "lensnet/8192/swap_rate"."""
    return {f"{name}/{key}": value for name, told in summaries.items()
            for key, value in dict(swap_rate=told["swap_rate"], budget_use=told["budget_use"], **{f"{stage}_ms": told["ms"][stage]["p50"] for stage in STAGES}).items()}


def telemetry_table(summaries):
    """summaries: {"way/length": Telemetry.summary()}"""
    by_level = lambda numbers: ", ".join(f"{level}: {n}" for level, n in numbers.items()) or "none"
    rows = []
    for name, told in summaries.items():
        way, length = name.split("/")
        opened = {kind.removeprefix("expand "): n for kind, n in told["edits"].items() if kind.startswith("expand")}
        entries = {level: f"{n:.1f}" for level, n in told["residency"].items()}
        ms = [f"{told['ms'][stage]['p50']:.2f}, {told['ms'][stage]['p99']:.2f}" for stage in STAGES]
        rows.append([f"{length} tokens, {way}", f"{told['ticks']}", f"{told['swap_rate']:.4f}", f"{100 * told['budget_use']:.0f}%", by_level(entries), by_level(opened), *ms])
    return report.table(["history", "ticks", "edits a span", "budget in use", "entries by level", "opened by level", *[f"{stage} ms" for stage in STAGES]], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures

def picture(name, text):
    return f"![{text}]({name})"


def spread(values):
    """mean and standard deviation over seeds."""
    return dict(mean=float(np.mean(values)), spread=float(np.std(values, ddof=1)) if len(values) > 1 else None)


def percent(share):
    """A share, as spread() has it, in words."""
    return f"{100 * share['mean']:.0f}%" + ("" if share["spread"] is None else f" +- {100 * share['spread']:.0f}%")


def recall_tables(loaded, data, args, began, drawn):
    """Ask, and tell: a list of Markdown. The numbers go into data, the picture into the file `drawn` beside the report."""
    found, missing, data["telemetry"] = recall(loaded, Engine(loaded.tokenizer), args.recall_tasks, args.source, args.recall_lengths, args.recall_depths, args.recall_problems,
                                               args.seeds, args.recall_budget, began)
    data["recall"] = {name: {length: {depth: {way: spread(shares) for way, shares in ways.items()} for depth, ways in depths.items()} for length, depths in lengths.items()}
                      for name, lengths in found.items()}
    data |= dict(recall_missing=missing, recall_budget=args.recall_budget)
    asked = args.recall_problems * args.seeds
    tables = [f"Recall with {args.recall_budget} entries in view: share of {asked} questions answered, by length of the history and depth (0 = oldest); +- is the standard deviation over seeds.", recall_table(data["recall"], args.recall_depths)]
    if missing:
        tables.append("\n".join(f"- not asked: {name}, {reason}" for name, reason in missing.items()))
    if data["recall"]:
        panels = {name: {way: {length: {depth: table[depth][way]["mean"] for depth in args.recall_depths} for length, table in lengths.items()} for way in WAYS}
                  for name, lengths in data["recall"].items()}
        plots.heat_maps(report.folder() / drawn, panels, "tokens of history", "depth")
        tables += [picture(drawn, "recall by depth and length"), "Telemetry of these sessions, means over their ticks; milliseconds since the tick before, median and 99th percentile.",
                   telemetry_table(data["telemetry"])]
    return tables
