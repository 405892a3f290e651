"""
Batches for training and evaluation, tokenized and packed ahead of the model by a thread.

In:  a source of text (nanochat/dataset.py), or any sequence of conversations: {"messages": ...} or rendered (ids, mask)
Out: Batch after Batch of rows, as nanochat/packing.py makes them, and a state that continues them bit for bit
The idea: documents are dealt to `lanes` independent streams (document i to lane i % lanes), and row n of the run is the
next row of lane n % lanes. Rank r of w takes the rows n with n % w == r, so the rows of a run do not depend on the number
of ranks: w only has to divide `lanes`. lanes_for(w) is LANES where it can be, so 1, 2, 4 and 8 ranks make the same run.
A source of fewer documents than lanes repeats sooner in some; none starves.
A state holds the place of every lane. It is small: addresses of pieces, no tokens.

To resume: every rank calls gather_state(loader) and rank 0 saves the result; later each rank, of any number of ranks
that divides `lanes`, gives it to its Loader. The number of rows per rank may change as well; seq_len, align, lanes, seed,
the documents and the tokenizer may not, and a state that does not match says which differs.

B = rows of this rank, T = seq_len
"""

import hashlib
import math
import queue
import threading
import weakref
from dataclasses import dataclass, fields

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.packing import STATS, Lane, Stream, cycle

BLOCK = 32   # tokens under one gist
LANES = 8    # of a run that a number of ranks begins which divides it
FORMAT = 1


@dataclass
class Batch:
    inputs: torch.Tensor   # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = no loss
    docs: torch.Tensor     # (B, T // 32) int64: which document of its row owns the whole block; -1 = padding, or a mix
    rows: torch.Tensor     # (B,) int64: number of the row in the run; -1 = an empty row that fills up the last batch

    def to(self, device):
        return Batch(*(getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)))

    def pin(self):
        """Page-locked, so that to() need not wait."""
        return Batch(*(getattr(self, item.name).pin_memory() for item in fields(self)))


class Maker:
    """Makes the batches of one rank, one after the other, in whichever thread asks."""

    def __init__(self, items, tokenizer, batch, seq_len, align, rank, world, lanes, seed, state, one_pass, max_rows,
                 threads):
        check_shape(batch, seq_len, align, rank, world, lanes)
        self.tokenizer, self.batch, self.T, self.align, self.threads = tokenizer, batch, seq_len, align, threads
        self.rank, self.world, self.count, self.one_pass, self.max_rows = rank, world, lanes, one_pass, max_rows
        self.parts = list(getattr(items, "parts", None) or [(items, 1.0)])
        for part, _ in self.parts:
            if not len(part):
                raise UserError(f"{getattr(part, 'name', 'the data')} is empty: there is nothing to load")
        self.pad = tokenizer.bos if tokenizer is not None else int(self.parts[0][0][0][0][0])  # conversations start with BOS
        self.settings = {"seq_len": seq_len, "align": align, "lanes": lanes, "seed": seed,
                         "documents": [[getattr(part, "fingerprint", ""), len(part), weight] for part, weight in self.parts],
                         "tokenizer": getattr(tokenizer, "fingerprint", "")}
        self.shifts = [start_document(seed, len(part)) for part, _ in self.parts]
        self.row = 0
        if state is not None:
            assert not one_pass, "a pass starts at its start"
            self.row = check_state(state, self.settings, needed=range(rank, lanes, world))
        self.lanes = {number: self._lane(number, state) for number in range(rank, lanes, world)}

    # -- lanes --------------------------------------------------------------------------------------------------------

    def _stream(self, part, lane, **place):
        return Stream(self.parts[part][0], part, lane, self.count, self.T, self.tokenizer, self.shifts[part],
                      self.one_pass, **place)

    def _lane(self, number, state):
        weights, crop = [weight for _, weight in self.parts], self.align == 1 and not self.one_pass
        shape = (weights, self.T, self.align, crop, self._encode_ahead)
        if state is None:
            return Lane(number, [self._stream(part, number) for part in range(len(self.parts))], *shape)
        saved = state["lanes"][str(number)]
        streams = [self._stream(part, number, place=place) for part, place in enumerate(saved["places"])]
        lane = Lane(number, streams, *shape, rows=saved["rows"], serial=saved["serial"], tally=list(saved["tally"]))
        places = [self._stream(part, number, place=place, ahead=1) for part, *place, _, _ in saved["waiting"]]
        self._encode(*places)
        for stream, (_, doc, _, _, length, serial) in zip(places, saved["waiting"]):
            piece = stream.next_piece(self._encode)
            if len(piece.inputs) != length:
                raise UserError(f"a piece of document {doc} was of {length} tokens when the state was saved and now is of "
                                f"{len(piece.inputs)}: the text or the tokenizer changed, start the data afresh")
            piece.serial = serial
            lane._wait(piece)
        lane.stats = dict(saved["stats"])
        return lane

    def _encode_ahead(self, stream):
        """Tokenize for all lanes at once, so that several threads have something to do."""
        self._encode(*(stream for lane in self.lanes.values() for stream in lane.streams if not stream.ready))

    def _encode(self, *streams):
        new = [piece for stream in streams for piece in stream.fetch()]
        if new:
            for piece, ids in zip(new, self.tokenizer.encode_batch([piece.text for piece in new], threads=self.threads)):
                piece.ids = ids

    # -- batches ------------------------------------------------------------------------------------------------------

    def rows(self):
        """(number, row) of this rank, in order; a lane that has ended (in one pass) is passed over."""
        number = self.row + (self.rank - self.row) % self.world
        ended = set()
        while len(ended) < len(self.lanes) and (self.max_rows is None or number < self.max_rows):
            lane = self.lanes[number % self.count]
            row = lane.next_row()
            if row is None:
                ended.add(lane.number)
            else:
                yield number, row
            number += self.world

    def batches(self):
        """(Batch, snapshot) without end, or to the end of the pass; its last batch is filled up with empty rows."""
        rows = []
        for row in self.rows():
            rows.append(row)
            if len(rows) == self.batch:
                self.row += self.batch * self.world
                yield self._batch(rows), self.snapshot()
                rows = []
        if rows:
            yield self._batch(rows), self.snapshot()

    def _batch(self, rows):
        B, T = self.batch, self.T
        inputs, targets = np.full((B, T), self.pad, np.int64), np.full((B, T), -1, np.int64)
        docs, numbers = np.full((B, T // BLOCK), -1, np.int64), np.full(B, -1, np.int64)
        for b, (number, row) in enumerate(rows):
            numbers[b] = number
            for i, (at, piece) in enumerate(row):
                end = at + len(piece.inputs)
                inputs[b, at:end], targets[b, at:end] = piece.inputs, piece.targets
                first = -(-at // BLOCK)
                last = end // BLOCK if self.align % BLOCK else -(-end // BLOCK)
                docs[b, first:max(first, last)] = i
        return Batch(*map(torch.from_numpy, (inputs, targets, docs, numbers)))

    def snapshot(self):
        return self.row, {number: lane.snapshot() for number, lane in self.lanes.items()}


def check_shape(batch, seq_len, align, rank, world, lanes):
    if batch < 1 or seq_len < 1 or align < 1 or lanes < 1:
        raise UserError(f"expected batch, seq_len, align and lanes of at least 1, got {batch}, {seq_len}, {align}, {lanes}")
    if seq_len % align:
        raise UserError(f"rows of {seq_len} tokens cannot be aligned to {align}: choose a multiple of {align}")
    if lanes % world:
        able = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise UserError(f"{world} ranks cannot share {lanes} lanes evenly: a run that was begun with {lanes} lanes goes on with {able} processes. Start one of these "
                        f"numbers, or a new run under another tag: begun by {world} processes it has {lanes_for(world)} lanes")
    assert 0 <= rank < world, f"rank {rank} of {world}"


def lanes_for(world):
    """Lanes of a run that `world` ranks begin: it goes on with any number of ranks that divides them, and with no other."""
    return math.lcm(LANES, world)


def start_document(seed, count):
    """Where a run of this seed begins in the order of documents; seed 0 begins at the start."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") % count if seed else 0


# ---------------------------------------------------------------------------------------------------------------------
# States

def check_state(state, settings, needed):
    """Raise what does not fit between a saved state and this run, in words; returns the number of the next row."""
    if state.get("format") != FORMAT:
        raise UserError(f"the loader's state is of format {state.get('format')!r}, expected {FORMAT}: it was saved by "
                        f"another version of the project")
    for name, value in settings.items():
        if state["settings"][name] != value:
            raise UserError(f"the saved position in the data was made with {name} {state['settings'][name]}, this run has "
                            f"{value}: give it the same, or start the data afresh")
    missing = [number for number in needed if str(number) not in state["lanes"]]
    if missing:
        raise UserError(f"the state has no lanes {missing}: it is of one rank only. Save what gather_state() returns")
    for number in needed:
        due = len(range(number, state["row"], settings["lanes"]))
        rows = state["lanes"][str(number)]["rows"]
        assert rows == due, f"lane {number} gave {rows} rows before row {state['row']}, expected {due}"
    return state["row"]


def merge_states(states):
    """One state of all lanes from those of all ranks, taken after the same step."""
    first = states[0]
    for state in states[1:]:
        assert (state["row"], state["settings"]) == (first["row"], first["settings"]), "states of different steps or runs"
    return {**first, "lanes": {number: lane for state in states for number, lane in state["lanes"].items()}}


def gather_state(loader):
    """The state of all ranks. With several ranks every one of them must call this, after the same number of batches."""
    if loader.world == 1:
        return loader.state()
    states = [None] * loader.world
    torch.distributed.all_gather_object(states, loader.state())
    return merge_states(states)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders

END = object()


def work(maker, results, stop):
    """Run ahead of the consumer by as many batches as the queue holds; an error is handed over and raised there."""
    def put(result):
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                return
            except queue.Full:
                continue

    try:
        for result in maker.batches():
            put(result)
            if stop.is_set():
                return
        put(END)
    except BaseException as error: # not swallowed: raised again by next()
        put(error)


def shut(thread, results, stop):
    """End the thread and wait for it: a thread caught in the middle by the end of the program can crash it."""
    stop.set()
    while thread.is_alive() and thread is not threading.current_thread(): # the garbage collector may run anywhere
        try:
            results.get(timeout=0.01) # it may be waiting for room
        except queue.Empty:
            pass


class Loader:
    """
    An iterator over batches, without end (epoch after epoch), or over one pass with one_pass.

    items      a Source or Mix of text, or a sequence of conversations: dicts for tokenizer.render, or (ids, mask)
    tokenizer  may be None for (ids, mask)
    batch      rows per rank
    align      1, or 32 to keep every block of 32 tokens within one document
    lanes      independent streams; more lanes mix long documents better and keep more short pieces waiting
    seed       chooses the document to start from
    state      what gather_state() or state() returned, to continue there
    one_pass   every document once; rows are padded rather than cropped, so that every target is seen exactly once
    max_rows   end after the first rows of the run, over all ranks
    ahead      batches made before they are asked for
    pin        page-locked batches, for a copy to the GPU that does not wait
    """

    def __init__(self, items, tokenizer, batch, seq_len, align=1, rank=0, world=1, lanes=8, seed=0, state=None,
                 one_pass=False, max_rows=None, threads=2, ahead=4, pin=False):
        maker = Maker(items, tokenizer, batch, seq_len, align, rank, world, lanes, seed, state, one_pass, max_rows,
                      threads)
        self.world, self.settings, self.pin = world, maker.settings, pin
        self._snapshot, self._error = maker.snapshot(), None
        self._results, self._stop = queue.Queue(maxsize=ahead), threading.Event()
        thread = threading.Thread(target=work, args=(maker, self._results, self._stop), name="loader", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, shut, thread, self._results, self._stop)  # or by garbage collection

    def __iter__(self):
        return self

    def __next__(self):
        if self._error is not None:
            raise self._error
        assert not self._stop.is_set(), "the loader was closed"
        result = self._results.get()
        if result is END or isinstance(result, BaseException):
            self._error = StopIteration() if result is END else result
            raise self._error
        batch, self._snapshot = result
        return batch.pin() if self.pin else batch  # here, not in the thread: that one would pin for GPU 0 in every rank

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def state(self):
        """Where the batches handed out so far end, for JSON. Of this rank's lanes only: see gather_state."""
        row, lanes = self._snapshot
        return {"format": FORMAT, "row": row, "settings": self.settings,
                "lanes": {str(number): Lane.as_json(lane) for number, lane in lanes.items()}}

    @property
    def stats(self):
        """
        Of this rank, over the whole run, up to the batches handed out so far:
        documents begun, of these empty; rows; tokens in them, padded, and cropped (lost); conversations cut and skipped;
        epochs: how often each mixed source has been read (over all ranks, taking this one's lanes for theirs).
        tokens + padded = rows * seq_len, always.
        """
        lanes = self._snapshot[1].values()
        total = {name: sum(lane[-1][name] for lane in lanes) for name in STATS}
        count = self.settings["lanes"]
        dealt = [sum((lane[3][part][0] - number) // count for number, lane in self._snapshot[1].items())
                 for part in range(len(self.settings["documents"]))]
        total["epochs"] = [done * self.world / cycle(size, count)
                           for done, (_, size, _) in zip(dealt, self.settings["documents"])]
        return total


class Pass:
    """The same finite pass every time it is iterated."""

    def __init__(self, *args, **settings):
        self.args, self.settings = args, settings

    def __iter__(self):
        with Loader(*self.args, one_pass=True, **self.settings) as loader:
            yield from loader


def val_loader(items, tokenizer, batch, seq_len, align=1, rank=0, world=1, max_rows=None, **settings):
    """
    For evaluation: iterate it as often as you like, each time it gives the same rows, each document once, nothing
    cropped. Ranks may get different numbers of batches (even none), so sum up first and reduce at the end.
    """
    return Pass(items, tokenizer, batch, seq_len, align=align, rank=rank, world=world, max_rows=max_rows, **settings)
