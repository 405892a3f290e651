"""
What a session did, in numbers that stay small: one call per tick in; JSON lines, a summary and a Prometheus page out.
Memory is bounded whatever the length of the session: counters and histograms of fixed size, and for single nodes the most
accessed NODES of them (the Space-Saving sketch of Metwally et al., 2005: a newcomer takes the place and the count of the rarest).

swap_rate   edits of a tick per span in view
budget_use  entries in view per entry of budget
residency   entries in view by level; and for how many ticks an opened node stayed open
access      how often a node of a level was opened
"""

import json
from collections import Counter
from math import ceil, log2

NODES = 1024
OLDEST = 1024  # open nodes whose time of opening is remembered


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
    path  a file that gets one JSON object per tick, appended; None = keep only the aggregates
    """

    def __init__(self, path=None):
        self.file = open(path, "a") if path else None
        self.ticks, self.length = 0, 0
        self.edits = Counter()       # (kind, level of the node) -> edits
        self.accessed = Counter()    # node -> times opened, at most NODES of them
        self.opened = {}             # node -> tick of its opening, for the OLDEST newest that are open
        self.stayed = {}             # level -> Histogram of ticks from opening to closing
        self.stages = {}             # stage -> Histogram of ms
        self.measured = {}           # name -> (count, sum, newest), e.g. delta_nll
        self.newest = {}             # the last tick's line

    def tick(self, length, spans, budget, edits, ms, **measured):
        """
        One tick. length: tokens of history; spans, edits: as refocus gave them; ms: {stage: milliseconds}; measured: numbers
        that are known at some ticks only (delta_nll=...). Returns the line that was written.
        """
        levels = Counter([span.level for span in spans])
        raw = sum(span.cost for span in spans if span.level == 0)
        used = len(spans) - levels[0] + raw
        self.ticks, self.length = self.ticks + 1, length
        for kind, node in edits:
            self.edits[kind, node.level] += 1
            self._open(node) if kind == "expand" else self._close(node)
        for stage, x in ms.items():
            self.stages.setdefault(stage, Histogram()).add(x)
        for name, x in measured.items():
            n, total, _ = self.measured.get(name, (0, 0.0, 0.0))
            self.measured[name] = n + 1, total + x, x
        self.newest = {"tick": self.ticks, "length": length, "entries": used, "budget_use": used / budget,
                       "swap_rate": len(edits) / max(len(spans), 1), "edits": len(edits),
                       "residency": {level: raw if level == 0 else n for level, n in sorted(levels.items())},
                       "ms": {stage: round(x, 4) for stage, x in ms.items()}, **measured}
        if self.file:
            self.file.write(json.dumps(self.newest) + "\n")
            self.file.flush()
        return self.newest

    def summary(self):
        """Everything so far, as one JSON-able dict."""
        return {
            "ticks": self.ticks, "length": self.length, "newest": self.newest,
            "edits_per_tick": sum(self.edits.values()) / max(self.ticks, 1),
            "edits": {f"{kind} {level}": n for (kind, level), n in sorted(self.edits.items())},
            "stayed_ticks": {level: histogram.summary() for level, histogram in sorted(self.stayed.items())},
            "ms": {stage: histogram.summary() for stage, histogram in self.stages.items()},
            "measured": {name: {"count": n, "mean": total / n, "newest": newest} for name, (n, total, newest) in self.measured.items()},
            "most_accessed": [[node.level, node.index, n] for node, n in self.accessed.most_common(10)],
        }

    def prometheus(self):
        """The state as a page in Prometheus' text format."""
        page = []

        def metric(name, kind, text, samples):
            page.extend([f"# HELP megacontext_{name} {text}", f"# TYPE megacontext_{name} {kind}"])
            page.extend(f"megacontext_{name}{suffix} {value:g}" for suffix, value in samples)

        metric("ticks_total", "counter", "Refocus ticks.", [("", self.ticks)])
        metric("history_tokens", "gauge", "Tokens of history.", [("", self.length)])
        metric("budget_use", "gauge", "Entries in view per entry of budget.", [("", self.newest.get("budget_use", 0))])
        metric("swap_rate", "gauge", "Edits of the last tick per span in view.", [("", self.newest.get("swap_rate", 0))])
        metric("entries", "gauge", "Entries in view by level.", [(f'{{level="{level}"}}', n) for level, n in self.newest.get("residency", {}).items()])
        metric("edits_total", "counter", "Edits by kind and level of the gist.",
               [(f'{{kind="{kind}",level="{level}"}}', n) for (kind, level), n in sorted(self.edits.items())])
        for name, text, label, histograms in (("stage_ms", "Milliseconds per stage.", "stage", self.stages),
                                              ("stayed_ticks", "Ticks from opening to closing.", "level", self.stayed)):
            samples = []
            for key, h in histograms.items():
                samples += [(f'{{{label}="{key}",quantile="{q}"}}', h.quantile(q)) for q in (0.5, 0.99)]
                samples += [(f'_sum{{{label}="{key}"}}', h.sum), (f'_count{{{label}="{key}"}}', h.count)]
            metric(name, "summary", text, samples)
        metric("measured", "gauge", "Numbers measured now and then, newest.", [(f'{{name="{name}"}}', newest) for name, (_, _, newest) in self.measured.items()])
        return "\n".join(page) + "\n"

    def close(self):
        if self.file:
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
            self.stayed.setdefault(node.level, Histogram()).add(self.ticks - self.opened.pop(node))
