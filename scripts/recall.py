"""
Questions about what was said far back, asked of sessions and of a window.
A question is put to five ways of remembering at the same budget, on the same tokens:
    lensnet   the session as it talks: gists, and what LensNet opens
    told      a session with nothing opened but the blocks where the answer stands, pinned: what LensNet could bring at best
    recency   a session without LensNet: the newest blocks raw, gists of the rest
    gists     a session that sees nothing raw of what came before its tail: gists only, LensNet may open gists of gists
    window    the plain model on the newest tokens, behind the very first one
and of the first it is told how often all of the answer's tokens were raw in view when it began to speak (`found`): whether LensNet fails, or the GPT.
GistNet reads the text once, for the sessions together.
"""
import time
from itertools import islice

import numpy as np

from megacontext.ingest import ingest
from megacontext.runtime import STAGES, Session, raw_tail
from megacontext.span import BLOCK
from megacontext.telemetry import Telemetry
from megacontext.working_context import Pins
from nanochat import report
from nanochat.common import UserError, print0
from nanochat.engine import PlainStream
from scripts.load import open_tree
from scripts.mixtures import texts_of
from tasks.codeqa import CodeQuestions, Sources
from tasks.haystack import Filler
from tasks.needle import MultiKey, Passkey
from tasks.ruler import VariableTracking

SESSIONS = ("lensnet", "told", "recency", "gists")
WAYS = (*SESSIONS, "window")
COLUMNS = (*WAYS, "found")
TASKS = {"passkey": (Passkey, 32), "multikey": (MultiKey, 32), "variables": (VariableTracking, 32), "codeqa": (CodeQuestions, 40)} # most tokens of an answer


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
    pins = dict(gists=Pins(never=((0, head),)), told=Pins(raw=tuple((start, stop) for start, stop in evidence if stop <= head))) if head else {}
    for way in SESSIONS:
        session = Session(loaded.gpt, loaded.gistnet, loaded.lensnet, tree, budget, n_diff=4 if way in ("lensnet", "gists") else 0, telemetry=telemetry[way], pins=pins.get(way, Pins()))
        if way in pins:
            session.refocus() # opens and closes what is pinned before anything is read behind it
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
    rows = [[f"{name}, {length} tokens, {way}", *[f"{100 * table[depth][way]['mean']:.0f}%" for depth in depths]]
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
