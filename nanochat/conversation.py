"""
A conversation over a stream: messages in, pieces of the answer out, and nothing is ever fed twice.

    conversation = Conversation(engine, PlainStream(gpt))
    for piece in conversation.reply("What is 6*7?", max_tokens=256): print(piece.text, end="")

What the stream has read in earlier turns stays there; a new turn feeds the new tokens only. All together the stream is given
exactly what Tokenizer.render_prompt writes for the whole conversation. A long message is first offered to its skim(ids), a generator:
a stream that remembers more than it reads takes in the beginning there, and yields how many tokens of it so far, so that a reader sees
where it is and may stop it. feed() is given the rest, in one go, as a prompt: a stream with memory is asked for all of its history by that, and by nothing that is said in an answer.
A reader may stop at any piece: what was said and not yet fed waits for the next turn, which closes the broken-off answer first.
"""

import codecs
from contextlib import closing
from typing import NamedTuple

from nanochat.tokenizer import turns


class Progress(NamedTuple):
    """A long message is being taken in: `done` of `total` tokens."""
    done: int
    total: int


class Piece(NamedTuple):
    """
    What one token added. kind: "text", "python" (asked of the calculator) or "output" (its answer).
    text is empty while a character is incomplete, and for tokens that only mark a change of kind.
    """
    kind: str
    text: str


class Speech:
    """Token ids to pieces. Characters of several tokens are held back until they are whole."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.kinds = {tokenizer.special(f"<|{name}|>"): kind for name, kind in
                      [("python_start", "python"), ("python_end", "text"), ("output_start", "output"), ("output_end", "text")]}
        self.kind, self.decoder = "text", codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, token):
        if token in self.kinds:
            rest = self.end()
            self.kind = self.kinds[token]
            return rest
        return Piece(self.kind, self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def end(self):
        """What was held back, now that nothing follows it."""
        return Piece(self.kind, self.decoder.decode(b"", final=True))


class Conversation:
    def __init__(self, engine, stream):
        """A stream that has read something already is continued: it is taken to end where finish() leaves it."""
        self.engine, self.stream = engine, stream
        self.waiting = []        # ids that were said but not fed
        self.unfinished = False  # the assistant's last turn has no assistant_end yet
        self.turns = 0           # answers asked for so far
        self.ended = None        # why the last answer ended: "stop" (the model's word), "length" (max_tokens), "broken off"

    def render(self, messages):
        """The ids that messages (the last is the user's) add to what was said before."""
        special, encode = self.engine.tokenizer.special, self.engine.tokenizer.encode
        messages = turns({"messages": messages})
        if messages[-1]["role"] != "user":
            raise ValueError(f"the last message is by {messages[-1]['role']!r}: expected the user's, which is to be answered")
        ids = [] if self.stream.length or self.waiting else [self.engine.tokenizer.bos]
        if self.unfinished:
            ids.append(special("<|assistant_end|>"))
        for message in messages:
            role, content = message["role"], message["content"]
            if not isinstance(content, str):
                raise ValueError(f"a message by {role!r} has content of type {type(content).__name__}: expected str")
            ids += [special(f"<|{role}_start|>"), *encode(content), special(f"<|{role}_end|>")]
        return ids + [special("<|assistant_start|>")]

    def reply(self, messages, max_tokens=None, **settings):
        """
        Yield Progress while a long message is taken in, then a Piece for every token of the answer, and one more if it ends inside a character.
        messages: str, or a list of messages of which the last is the user's. settings: as of Engine.generate.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        self.waiting = self.waiting + self.render(messages)
        self.unfinished, self.ended, self.turns = True, "broken off", self.turns + 1
        return self._reply(max_tokens, settings)

    def _reply(self, max_tokens, settings):
        speech, start, said = Speech(self.engine.tokenizer), self.stream.length, []
        ids, done = self.waiting, 0
        try:
            with closing(self.stream.skim(ids)) as taken:
                for done in taken:
                    yield Progress(done, len(ids))
            for token in self.engine.generate(self.stream, ids[done:], max_tokens, **settings):
                said.append(token)
                yield speech.take(token)
            self.ended = "length" if len(said) == max_tokens else "stop"
        finally: # also when the reader walks away, or the stream fails
            self.waiting = (ids + said)[self.stream.length - start:]
        rest = speech.end()
        if rest.text:
            yield rest

    def finish(self):
        """Feed what still waits and close the answer, so that the stream can be saved and continued by another Conversation."""
        if self.unfinished:
            self.waiting = self.waiting + [self.engine.tokenizer.special("<|assistant_end|>")]
            self.unfinished = False
        if self.waiting:
            start, ids = self.stream.length, self.waiting
            try:
                self.stream.feed(ids, prompt=False)
            finally: # a stream that failed half-way has fed what it grew by
                self.waiting = ids[self.stream.length - start:]

    def mark(self):
        """This moment, for rewind(): before a message is said, say."""
        return self.stream.mark(), list(self.waiting), self.unfinished, self.turns

    def rewind(self, mark):
        """Back to a mark: what was said since then was never said."""
        state, waiting, unfinished, turns = mark
        self.stream.rewind(state) # first: it may refuse the mark
        self.waiting, self.unfinished, self.turns = list(waiting), unfinished, turns
