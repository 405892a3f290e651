"""
What a session did, in numbers that stay small: one call per tick in; JSON lines, a function told of each, a summary and samples for a Prometheus page out.
All aggregates are made from the lines, so that a file of them gives the same summary as the session that wrote it (summaries). Memory is bounded whatever the length of the session: counters and histograms of fixed size, and for single nodes the most
accessed NODES of them (the Space-Saving sketch of Metwally et al., 2005: a newcomer takes the place and the count of the rarest).

swap_rate   edits of a tick per span in view
budget_use  entries in view per entry of budget
residency   entries in view by level; and for how many ticks an opened node stayed open
access      how often a node was opened: each line names the nodes, as [level, index]

What an edit is worth in nats is not among them: it takes the tokens that follow, read with the edit and without. megacontext/probes.py and labels.py measure that.
"""

import json
import uuid
import warnings
from collections import Counter
from contextlib import suppress
from math import ceil, log2
from os import SEEK_END
from pathlib import Path

from nanochat.common import UserError

NODES = 1024
OLDEST = 1024  # open nodes whose time of opening is remembered
METRICS = {    # of the Prometheus page: name -> (type, help)
    "ticks_total": ("counter", "Refocus ticks."),
    "history_tokens": ("gauge", "Tokens of history."),
    "budget_use": ("gauge", "Entries in view per entry of budget."),
    "swap_rate": ("gauge", "Edits of the last tick per span in view."),
    "entries": ("gauge", "Entries in view by level."),
    "edits_total": ("counter", "Edits by kind and level of the gist."),
    "stage_ms": ("summary", "Milliseconds per stage."),
    "stayed_ticks": ("summary", "Ticks from opening to closing."),
    "opened": ("gauge", "Times that a node was opened, of those opened most."),
}
MOST = 10      # nodes that a summary and a page tell of


class Histogram:
    """Counts of positive numbers in buckets a quarter of an octave wide (19%), from 2**-10 to 2**20; also their sum and the largest."""
    LOW, HIGH, STEPS = -10, 20, 4

    def __init__(self):
        self.buckets = [0] * ((self.HIGH - self.LOW) * self.STEPS + 1)
        self.count, self.sum, self.max = 0, 0.0, 0.0

    def add(self, x):
        assert x >= 0, f"a duration or a count cannot be negative, got {x}"
        place = ceil((log2(x) - self.LOW) * self.STEPS) if x > 0 else 0
        self.buckets[min(max(place, 0), len(self.buckets) - 1)] += 1
        self.count, self.sum, self.max = self.count + 1, self.sum + x, max(self.max, x)

    def quantile(self, q):
        """The upper edge of the bucket that holds quantile q (never above the largest number seen); 0 if there is none."""
        seen = 0
        for place, n in enumerate(self.buckets):
            seen += n
            if n and seen >= q * self.count:
                return min(2 ** (self.LOW + place / self.STEPS), self.max)
        return 0.0

    def summary(self):
        return {"count": self.count, "mean": self.sum / max(self.count, 1), "p50": self.quantile(0.5), "p99": self.quantile(0.99), "max": self.max}


class Telemetry:
    """
    path     a file that gets one JSON object per tick, appended, until it cannot be written any more; None = keep only the aggregates
    tell     a function that gets the same object, e.g. to send it elsewhere
    session  what its lines and samples are marked with: a name at random, so that several may share a file or a page
    """

    def __init__(self, path=None, tell=None):
        self.tell = tell
        try:
            self.file = open(path, "a", encoding="utf-8") if path else None
            if path and cut(path):
                self.file.write("\n")
                self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write telemetry to {path}: {error.strerror}. Name another file") from None
        self.session = uuid.uuid4().hex[:8]
        self.ticks, self.length = 0, 0
        self.sums = Counter()        # "swap_rate", "budget_use" or a level -> its sum over all ticks
        self.edits = Counter()       # (kind, level of the node) -> edits
        self.accessed = Counter()    # node, as (level, index) -> times opened, at most NODES of them
        self.opened = {}             # node -> tick of its opening, for the OLDEST newest that are open
        self.stayed = {}             # level -> Histogram of ticks from opening to closing
        self.stages = {}             # stage -> Histogram of ms
        self.newest = {}             # the last tick's line

    def tick(self, length, spans, budget, edits, ms):
        """One tick. length: tokens of history; spans, edits: as refocus gave them; ms: {stage: milliseconds}. Returns the line that was written."""
        levels = Counter([span.level for span in spans])
        raw = sum(span.cost for span in spans if span.level == 0)
        used = len(spans) - levels[0] + raw
        opened, closed = ([[node.level, node.index] for kind, node in edits if kind == wanted] for wanted in ("expand", "collapse"))
        line = {"session": self.session, "tick": self.ticks + 1, "length": length, "entries": used, "budget_use": used / budget,
                "swap_rate": len(edits) / max(len(spans), 1), "edits": len(edits), "opened": opened, "closed": closed,
                "residency": {level: raw if level == 0 else n for level, n in sorted(levels.items())}, "ms": {stage: round(x, 4) for stage, x in ms.items()}}
        self.count(line)
        if self.file:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                warnings.warn(f"telemetry is no longer written to {self.file.name} ({error.strerror}); the session goes on. Make room, and start it again for more")
                self.close()
        if self.tell:
            self.tell(line)
        return line

    def count(self, line):
        """Add a tick's line to the aggregates."""
        self.ticks, self.length, self.newest = self.ticks + 1, line["length"], line
        for level, index in line["opened"]:
            self.edits["expand", level] += 1
            self._open((level, index))
        for level, index in line["closed"]:
            self.edits["collapse", level] += 1
            self._close((level, index))
        for stage, x in line["ms"].items():
            self.stages.setdefault(stage, Histogram()).add(x)
        self.sums.update({"budget_use": line["budget_use"], "swap_rate": line["swap_rate"]} | line["residency"])

    def next_session(self):
        """What follows belongs to another session: another name, and other nodes behind the same numbers. The aggregates go on."""
        self.session = uuid.uuid4().hex[:8]
        self.opened.clear()

    def summary(self):
        """Everything so far, as one JSON-able dict. swap_rate, budget_use and residency are means over the ticks."""
        mean = lambda name: self.sums[name] / max(self.ticks, 1)
        return {
            "ticks": self.ticks, "length": self.length, "newest": self.newest,
            "swap_rate": mean("swap_rate"), "budget_use": mean("budget_use"),
            "residency": {level: mean(level) for level in sorted(name for name in self.sums if isinstance(name, int))},
            "edits_per_tick": sum(self.edits.values()) / max(self.ticks, 1),
            "edits": {f"{kind} {level}": n for (kind, level), n in sorted(self.edits.items())},
            "stayed_ticks": {level: histogram.summary() for level, histogram in sorted(self.stayed.items())},
            "ms": {stage: histogram.summary() for stage, histogram in self.stages.items()},
            "most_accessed": [[*node, n] for node, n in self.accessed.most_common(MOST)],
        }

    def metrics(self):
        """The state as samples for page(): {name of METRICS: [(suffix, labels, value)]}."""
        samples = {
            "ticks_total": [("", {}, self.ticks)], "history_tokens": [("", {}, self.length)],
            "budget_use": [("", {}, self.newest.get("budget_use", 0))], "swap_rate": [("", {}, self.newest.get("swap_rate", 0))],
            "entries": [("", {"level": level}, n) for level, n in self.newest.get("residency", {}).items()],
            "edits_total": [("", {"kind": kind, "level": level}, n) for (kind, level), n in sorted(self.edits.items())],
            "opened": [("", {"level": level, "index": index}, n) for (level, index), n in self.accessed.most_common(MOST)],
        }
        for name, label, histograms in (("stage_ms", "stage", self.stages), ("stayed_ticks", "level", self.stayed)):
            samples[name] = []
            for key, h in histograms.items():
                samples[name] += [("", {label: key, "quantile": q}, h.quantile(q)) for q in (0.5, 0.99)]
                samples[name] += [("_sum", {label: key}, h.sum), ("_count", {label: key}, h.count)]
        return {name: [(suffix, {"session": self.session} | labels, value) for suffix, labels, value in rows] for name, rows in samples.items()}

    def close(self):
        if self.file:
            with suppress(OSError): # what did not fit before does not now
                self.file.close()
            self.file = None

    # ------------------------------------------------------------------------------------------------------------------

    def _open(self, node):
        if node not in self.accessed and len(self.accessed) >= NODES:
            rarest = min(self.accessed, key=self.accessed.get)
            self.accessed[node] = self.accessed.pop(rarest)
        self.accessed[node] += 1
        self.opened.pop(node, None)  # to the end: the dict is in order of opening
        self.opened[node] = self.ticks
        if len(self.opened) > OLDEST:
            del self.opened[next(iter(self.opened))]

    def _close(self, node):
        if node in self.opened:  # blocks that came in raw were never opened
            self.stayed.setdefault(node[0], Histogram()).add(self.ticks - self.opened.pop(node))


def cut(path):
    """Whether the last line of a file has no end: who wrote it was killed, or had no room."""
    if not Path(path).is_file(): # a pipe, say
        return False
    with open(path, "rb") as file:
        file.seek(max(file.seek(0, SEEK_END) - 1, 0))
        return file.read() not in (b"", b"\n")


def summaries(path):
    """
    A file of ticks, as `path` of Telemetry writes it -> {session: summary()}, in the order of their first lines, and how many lines are no ticks and were
    left out: a kill or a full disk leaves one that is cut. A file of nothing else is refused.
    """
    told, trial, wrong, left_out = {}, Telemetry(), None, 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for n, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    line["residency"] = {int(level): entries for level, entries in line["residency"].items()} # JSON has no numbers as keys
                    trial.count(line) # where half a count does no harm
                    told.setdefault(line["session"], Telemetry()).count(line)
                except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OverflowError) as error:
                    wrong = wrong or f"line {n} of {path} is no tick of a memory: expected the JSON that --telemetry of this version writes, got {text[:80]!r} ({error})"
                    left_out += 1
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if wrong and not told:
        raise UserError(wrong)
    return {session: telemetry.summary() for session, telemetry in told.items()}, left_out


def page(sessions):
    """What metrics() gave, of any number of sessions -> one page in Prometheus' text format."""
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP megacontext_{name} {text}", f"# TYPE megacontext_{name} {kind}"]
        for samples in sessions:
            for suffix, labels, value in samples[name]:
                marks = ",".join(f'{label}="{mark}"' for label, mark in labels.items())
                lines.append(f"megacontext_{name}{suffix}{{{marks}}} {value:.10g}")
    return "\n".join(lines) + "\n"
