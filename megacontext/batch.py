"""
Sessions that are answering at the same time read their next tokens in one forward.

Each answer is written in a thread of its own, and each session keeps its tree, its cache and its ticks. What they share is the forward: the weights are fetched
once for all of them, only attention is everyone's own. Whoever comes last reads for all. Those who read the last time are waited for no longer than that took,
so an answer that has ended, a hang-up, a prompt or a long tick holds the others up once and for a moment, and nobody has to say that they come or go.

B = sessions, V = vocabulary
"""
import threading
import time
from math import inf

import torch


class Together:
    """Sessions of one GPT that read together when their answers are written at the same time."""

    def __init__(self):
        self.change = threading.Condition()
        self.came = []    # turns that wait for the next forward
        self.last = set() # sessions of the newest forward, by id: one that is forgotten is not kept here
        self.took = 0.0   # seconds of the newest forward that is done
        self.until = 0.0  # when those who came wait no longer; inf = several are being read

    def stream(self, session):
        """What the engine feeds instead of a session: the tokens of its answer are read together with others'."""
        return Joined(session, self)

    @torch.no_grad()
    def feed(self, session, token):
        """
        One token of an answer -> logits (V,) of the token that follows. Nobody is waited for where nobody else is answering: the session reads alone, as always.
        What fails in a common forward fails for all who came; then their tokens are in their trees, nothing is in view, and every session can go on.
        """
        turn = Turn(session, token)
        if group := self._alone(turn):
            self._read(group)
            self._fail(turn)
            return turn.logits
        with session.changing(): # from the tree to the view: what comes between, its ticks' telemetry too, must not part them
            take(session, token)
            turn.taken = True
            if group := self._meet(turn):
                self._read(group)
            self._fail(turn)
            keep(session, token, turn.seconds)
        return turn.logits

    def _fail(self, turn):
        """Raise what failed where the turn was read."""
        error, turn.error = turn.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error # its traceback holds this frame, which would hold it: what failed for want of memory must give it back at once

    def _alone(self, turn):
        """[turn] if there is nobody to wait for, else []."""
        with self.change:
            if self.came or not self._here(turn):
                return []
            self.came.append(turn)
            return self._take()

    def _meet(self, turn):
        """Wait for the others. Returns the turns that this thread is to read, [] when another has read its own."""
        with self.change:
            self.came.append(turn)
            while turn in self.came and not self._here():
                self.change.wait(min(self.until - time.perf_counter(), threading.TIMEOUT_MAX))
            if turn in self.came:
                return self._take()
            self.change.wait_for(lambda: turn.done)
            return []

    def _here(self, *more):
        """Have all come who are waited for, or is it too late?"""
        return self.last <= {id(turn.session) for turn in (*self.came, *more)} or time.perf_counter() >= self.until

    def _take(self):
        """All who came are read by this thread now."""
        group, self.came = self.came, []
        self.last = {id(turn.session) for turn in group}
        self.until = inf if len(group) > 1 else time.perf_counter() + 2 * self.took # one alone reads with its tick, which may be long: others go ahead then
        return group

    def _read(self, group):
        """The forward, and its outcome to all of the group."""
        start, logits, error = time.perf_counter(), [None] * len(group), None
        sessions, tokens = [turn.session for turn in group], [turn.token for turn in group]
        try:
            logits = read(sessions, tokens) if group[0].taken else [sessions[0].feed(tokens)]
            if logits[0].is_cuda:
                torch.cuda.synchronize(logits[0].device) # else `took` would not be what it takes
        except BaseException as failure: # all who wait must hear of it
            error = failure
        with self.change:
            self.took = time.perf_counter() - start
            for turn, row in zip(group, logits):
                turn.logits, turn.error, turn.seconds, turn.done = row, error, self.took / len(group), True
            if len(group) > 1:
                self.until = time.perf_counter() + self.took
                self.change.notify_all()
        del error, group, turn # as in feed()


class Turn:
    """A token of one session, until it was read: by the session, with all that belongs to it, or, once it is `taken`, with others', for keep()."""

    def __init__(self, session, token):
        self.session, self.token = session, token
        self.logits, self.error, self.taken, self.seconds, self.done = None, None, False, 0.0, False


class Joined:
    """A session as a stream whose single tokens go to a Together; all else is the session's own."""

    def __init__(self, session, together):
        self.session, self.together = session, together

    def feed(self, ids, prompt=True):
        return self.session.feed(ids, prompt) if prompt or len(ids) != 1 else self.together.feed(self.session, ids[0])

    def __getattr__(self, name):
        return getattr(self.session, name)


# ----------------------------------------------------------------------------------------------------------------------
# The forward

def take(session, token):
    """A session takes the token that it reads next, with the tick that may be due, and reads the blocks that wait."""
    session.ready()
    session.take([token])
    start = time.perf_counter()
    session.read_waiting()
    session._count("read", start)


def read(sessions, tokens):
    """One token for each session of one GPT, which took it and has no blocks that wait -> logits (B, V). Their keys and values are in the caches then, and it is for keep() to say so."""
    gpt, shown = sessions[0].gpt, [session.shown for session in sessions]
    ids = torch.tensor(tokens, device=gpt.device)[:, None]
    entries = gpt.embed(ids, torch.tensor([session.before() for session in sessions], device=gpt.device))
    positions = torch.cat([session.shown.mapped_token(session.length - 1) for session in sessions])
    return gpt.head(gpt.trunk(entries, positions, [one.weighed("all") for one in shown], Caches([one.cache for one in shown]))[:, -1])


def keep(session, token, seconds):
    """A token that was read is in the view of its session now. seconds: its share of the forward."""
    session.shown.note(session.shown.cache.length, [session.length - 1])
    session.shown.cache.advance(1)
    session._count("read", time.perf_counter() - seconds, read_tokens=1)
    session.grown([token])


class Caches:
    """What the trunk asks of a cache, of several: each row of a batch has its own, of its own length."""

    def __init__(self, caches):
        self.caches = caches

    def append(self, layer, k, v):
        """Write k and v (B, H, 1, d), a row to each cache; return two lists, all keys and all values of each row, (1, H, length+1, d)."""
        return zip(*(cache.append(layer, k[row:row + 1], v[row:row + 1]) for row, cache in enumerate(self.caches)))

    def advance(self, n):
        """A cache has grown when its session keeps the token."""
