"""
From documents to rows of T tokens: a stream cuts documents into pieces, a lane packs the pieces of its streams into rows.

In:  items (str, BigText, or a rendered conversation (ids, mask)) by number, and a tokenizer
Out: rows: lists of (start, piece)
The ideas:
- Every document is [BOS] + tokens + [BOS]: each token but the last is an input, each but the first a target, so that a
  document also learns where it ends. It is cut every T inputs, and a full piece is a row at once: a long document keeps
  its order and stays anchored at its BOS however long it is, and only one slice of it is ever tokenized at a time.
- Short pieces (short documents, the tails of long ones) wait, up to WAITING of them, and are packed best-fit: the
  longest that fits, again and again. When none fits, the shortest is cropped to fill the row (nanochat's rule, kept to
  keep every document's start in sight) and the loss is counted; a conversation is never cropped: the row is padded.
- With align=32 a piece starts at a multiple of 32 in its row, and gaps are padded: no block of 32 mixes two documents.
- A piece has an address (document, place of its slice, tokens to skip): a lane is saved as addresses, not as tokens.
A conversation longer than a row is cut: it keeps its first T tokens, a sound, shorter conversation, and the others count as
cropped. Where the assistant does not speak within them there is nothing to learn: the conversation is skipped. See `fate`.

T = seq_len
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from nanochat.common import UserError
from nanochat.documents import SLICE, BigText, near, slices

WAITING = 128  # short pieces per lane; bench/loader.py shows what is cropped with other numbers
STATS = ("documents", "empty", "rows", "tokens", "padded", "cropped", "cut", "skipped")


@dataclass(slots=True, eq=False)
class Piece:
    inputs: np.ndarray   # (n,) int32, n <= T
    targets: np.ndarray  # (n,) int32, -1 = no loss
    text: bool           # plain text may be cropped, a conversation may not
    part: int            # which of the mixed sources it came from
    doc: int             # its document: number doc % cycle of epoch doc // cycle
    at: int              # its slice within the document
    skip: int            # tokens of that slice before it
    serial: int = -1     # order of arrival among the short pieces of its lane

    @property
    def address(self):
        return [self.part, self.doc, self.at, self.skip, len(self.inputs), self.serial]


@dataclass(slots=True, eq=False)
class Slice:
    doc: int
    at: int
    first: bool  # of its document
    last: bool
    text: str    # "" for a conversation
    ids: list = None     # tokens, once encoded
    mask: list = None    # of a conversation


def cycle(documents, lanes):
    """
    After how many numbers the documents come again: as many as there are, or a few more (numbers without a document), so
    that it shares no factor with the number of lanes. Then every lane meets every document sooner or later, whereas
    lane 0 of 8 would see only every eighth of 64, for ever, and starve if those happen to be empty.
    """
    return next(size for size in range(documents, documents + lanes + 1) if gcd(size, lanes) == 1)


def first_documents(documents, lanes):
    """For each lane the number of the first document that it meets."""
    length = cycle(documents, lanes)
    return [next(number for number in range(lane, lanes * (length + 1), lanes) if number % length < documents)
            for lane in range(lanes)]


def fate(mask, seq_len):
    """What becomes of a conversation whose tokens have this mask: it is "whole", "cut" at the row's end, or "skipped"."""
    if not any(mask[1:seq_len + 1]): # the first token is never predicted
        return "skipped"
    return "cut" if len(mask) - 1 > seq_len else "whole"


class Stream:
    """
    The pieces of one source that belong to one lane: documents lane, lane + lanes, lane + 2 lanes, ... of a source that
    repeats for ever (or ends, with one_pass).

    Of fewer documents than lanes, some lanes start with the same one, and would give the same rows. So the second of two
    lanes starts half way through it, for this once, as if the document began there; and so on for more.

    place  (document, slice, tokens to skip) of the next piece
    ahead  characters to read and tokenize in one go
    """

    def __init__(self, items, part, first, step, seq_len, tokenizer, shift=0, one_pass=False, place=None, ahead=SLICE):
        self.items, self.part, self.step, self.T, self.tokenizer = items, part, step, seq_len, tokenizer
        self.shift, self.one_pass, self.ahead, self.cycle = shift, one_pass, ahead, cycle(len(items), step)
        numbers = [] if one_pass or len(items) >= step else first_documents(len(items), step)
        twins = [lane for lane in range(len(numbers)) if (numbers[lane] - numbers[first]) % self.cycle == 0]
        self.head, self.share = (numbers[first], twins.index(first) / len(twins)) if twins else (first, 0)
        self.head_start = 0  # place in document `head` where it begins for us
        self.place = tuple(place) if place is not None else (first, 0, 0)
        self.skip = self.place[2]         # tokens to drop from the very next slice; only after a restart
        self.reader = self._read(*self.place[:2])
        self.ready = deque()              # slices that were read and encoded
        self.pieces = deque()             # pieces of the slice that was cut last
        self.rest = np.empty(0, np.int32) # at most T tokens that wait for the next slice of their document
        self.after = self.place           # where the rest starts, or else the next slice
        self.empty_run = 0
        self.stats = dict.fromkeys(("documents", "empty", "cropped", "cut", "skipped"), 0)

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, doc, at):
        """Slices from a place on."""
        while not (self.one_pass and doc >= len(self.items)):
            number = doc % self.cycle
            if number >= len(self.items):
                doc += self.step
                continue
            item = self.items[(number + self.shift) % len(self.items)]
            if isinstance(item, dict):
                item = self.tokenizer.render(item)
            if isinstance(item, (str, BigText)):
                if doc == self.head and self.share:
                    self.head_start = near(item, self.share)
                start, end = self.begin(doc), len(item)
                for at, after, text in slices(item, max(at, start)):
                    yield Slice(doc, at, at == start, after == end, text)
                if end == 0:
                    yield Slice(doc, 0, True, True, "", ids=[])
            else:
                ids, mask = item
                assert len(ids) == len(mask), f"a conversation of {len(ids)} ids has a mask of {len(mask)}"
                yield Slice(doc, 0, True, True, "", ids=ids, mask=mask)
            doc, at = doc + self.step, 0

    def begin(self, doc):
        return self.head_start if doc == self.head else 0

    def fetch(self):
        """Read slices worth about `ahead` characters; returns those that need the tokenizer."""
        done, new = 0, []
        while done < self.ahead and (piece := next(self.reader, None)) is not None:
            self.ready.append(piece)
            done += len(piece.text) + 4 * len(piece.ids or ()) + 200  # a conversation, rendered already, and an empty document are work too
            if piece.ids is None:
                new.append(piece)
        return new

    # -- cutting ------------------------------------------------------------------------------------------------------

    def next_piece(self, encode_ahead):
        """The next piece, or None at the end of the pass. `encode_ahead(stream)` is asked for more slices."""
        while not self.pieces:
            if not self.ready:
                encode_ahead(self)
                if not self.ready:
                    return None
            piece = self.ready.popleft()
            self.cut_conversation(piece) if piece.mask is not None else self.cut_text(piece)
        piece = self.pieces.popleft()
        self.place = (self.pieces[0].doc, self.pieces[0].at, self.pieces[0].skip) if self.pieces else self.after
        self.stats["documents"] += piece.at == self.begin(piece.doc) and piece.skip == 0
        return piece

    def cut_text(self, piece):
        """Pieces of exactly T inputs as far as the slice goes; what is left waits, or ends the document."""
        skip, self.skip = self.skip, 0
        if not piece.ids:
            self.nothing(piece, "empty")
            return
        bos = [self.tokenizer.bos]
        tokens = np.array(bos * piece.first + piece.ids + bos * piece.last, np.int32)[skip:]
        whole, T = np.concatenate([self.rest, tokens]), self.T
        shift = skip - len(self.rest)  # token i of `whole` is token i + shift of the slice, if it is not of the rest
        count = (len(whole) - 1) // T  # a piece also needs the token after it, as its last target
        starts = list(range(0, count * T, T))
        if piece.last and count * T + 1 < len(whole):
            starts.append(count * T)
        for i in starts:
            at, before = self.after[1:] if i == 0 and len(self.rest) else (piece.at, i + shift)
            part = whole[i:i + T + 1]
            part = part.copy() if len(part) <= T else part  # short ones wait: do not keep the slice alive
            self.pieces.append(Piece(part[:-1], part[1:], True, self.part, piece.doc, at, before))
        if piece.last:
            self.rest, self.after = self.rest[:0], (piece.doc + self.step, 0, 0)
        elif count or not len(self.rest):
            self.rest, self.after = whole[count * T:].copy(), (piece.doc, piece.at, count * T + shift)
        else:
            self.rest = whole
        self.empty_run = 0

    def cut_conversation(self, piece):
        ids, mask, T = piece.ids, piece.mask, self.T
        becomes = fate(mask, T)
        if becomes == "skipped":
            self.stats["cropped"] += max(0, len(ids) - 1)
            self.nothing(piece, "skipped")
            return
        self.stats["cropped"] += max(0, len(ids) - 1 - T)
        self.stats["cut"] += becomes == "cut"
        ids, mask = np.asarray(ids[:T + 1], np.int32), np.asarray(mask[:T + 1])
        self.pieces.append(Piece(ids[:-1], np.where(mask[1:], ids[1:], -1), False, self.part, piece.doc, 0, 0))
        self.after = (piece.doc + self.step, 0, 0)
        self.empty_run = 0

    def nothing(self, piece, why):
        """A document that gives no piece is counted; a source of nothing else would keep us here for ever."""
        self.stats[why] += 1
        self.stats["documents"] += 1
        self.place = self.after = (piece.doc + self.step, 0, 0)
        self.empty_run += 1
        if self.empty_run > len(self.items):
            raise UserError(f"{getattr(self.items, 'name', 'the data')} has nothing to learn from: of its "
                            f"{len(self.items)} documents, {self.empty_run} in a row were {why}")


@dataclass
class Lane:
    """
    One of the independent streams of rows that the documents are dealt to.

    streams  one per mixed source; the next piece comes from the one furthest behind its share of the tokens so far
    """
    number: int
    streams: list
    weights: list
    seq_len: int
    align: int
    crop: bool         # fill a row by cropping the shortest text, or else pad it
    encode_ahead: object
    rows: int = 0
    serial: int = 0
    tally: list = None # tokens drawn from each stream
    keys: list = field(default_factory=list)     # of the waiting pieces, ascending: by length, then the youngest first
    waiting: list = field(default_factory=list)
    stats: dict = field(default_factory=lambda: dict.fromkeys(("tokens", "padded", "cropped"), 0))

    def __post_init__(self):
        self.tally = self.tally or [0] * len(self.streams)
        self.alive = list(range(len(self.streams)))

    def next_row(self):
        """[(start, piece), ...], or None when all streams have ended and nothing waits."""
        while len(self.waiting) < WAITING:
            piece = self._draw()
            if piece is None:
                break
            if len(piece.inputs) == self.seq_len:
                return self._done([(0, piece)])
            self._wait(piece)
        return self._done(self._pack()) if self.waiting else None

    def _draw(self):
        while self.alive:
            i = min(self.alive, key=lambda i: self.tally[i] / self.weights[i])
            piece = self.streams[i].next_piece(self.encode_ahead)
            if piece is not None:
                self.tally[i] += len(piece.inputs)
                return piece
            self.alive.remove(i)

    def _wait(self, piece):
        if piece.serial < 0:
            piece.serial, self.serial = self.serial, self.serial + 1
        key = (len(piece.inputs) + 1 << 40) - 1 - piece.serial
        i = bisect_left(self.keys, key)
        self.keys.insert(i, key)
        self.waiting.insert(i, piece)

    def _pack(self):
        """Best fit: the longest piece that fits, the oldest of equals."""
        row, at = [], 0
        while at < self.seq_len and self.waiting:
            room = self.seq_len - at
            i = bisect_left(self.keys, room + 1 << 40) - 1
            if i < 0:
                i = next((i for i, piece in enumerate(self.waiting) if piece.text), None) if self.crop else None
                if i is None:
                    break
            del self.keys[i]
            piece = self.waiting.pop(i)
            if len(piece.inputs) > room:
                self.stats["cropped"] += len(piece.inputs) - room
                piece = Piece(piece.inputs[:room], piece.targets[:room], True, *piece.address[:4])
            row.append((at, piece))
            at += -(-len(piece.inputs) // self.align) * self.align
        return row

    def _done(self, row):
        used = sum(len(piece.inputs) for _, piece in row)
        self.stats["tokens"] += used
        self.stats["padded"] += self.seq_len - used
        self.rows += 1
        return row

    # -- saving -------------------------------------------------------------------------------------------------------

    def snapshot(self):
        """What state() needs, cheap enough to take at every batch."""
        return (self.rows, self.serial, list(self.tally), [stream.place for stream in self.streams], list(self.waiting),
                self.all_stats())

    def all_stats(self):
        total = {name: sum(stream.stats.get(name, 0) for stream in self.streams) + self.stats.get(name, 0)
                 for name in STATS}
        return {**total, "rows": self.rows}

    @staticmethod
    def as_json(snapshot):
        rows, serial, tally, places, waiting, stats = snapshot
        return {"rows": rows, "serial": serial, "tally": tally, "places": [list(place) for place in places],
                "waiting": [piece.address for piece in waiting], "stats": stats}
