"""
A user's own conversations: one JSON object (or list of messages) per line, the file plain or gzipped.

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]

Roles alternate, user first; one system message may stand before. A last message of the user's has no answer to learn from:
it is left out, and counted in `unanswered`. An assistant's content may be a list of parts, as in nanochat/tokenizer.py.
Other fields are ignored. The whole file is checked when it is opened: a training run should not find a broken line in its
third hour. Every error names the file and the line. `part` holds every 20th conversation out for validation.
"""

import copy
import hashlib
from pathlib import Path

from nanochat.common import UserError
from tasks.common import Task, check_conversation, digest, final_text, same_words
from tasks.rows import parse_json, read_text


HELD = 20 # one conversation of so many is held out


class CustomJSON(Task):
    name = "customjson"

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{self.path}: expected a file with one conversation per line, there is none")
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.conversations, self.unanswered = [], 0
        for number, line in enumerate(read_text(self.path).split("\n"), 1):
            if line.strip():
                messages = read_line(line, f"{self.path}, line {number}")
                if messages[-1]["role"] == "user":
                    messages = messages[:-1]
                    self.unanswered += 1
                self.conversations.append({"messages": messages})
        if not self.conversations:
            raise UserError(f"{self.path}: expected at least one conversation, the file is empty")

    @property
    def fingerprint(self):
        return digest(super().fingerprint, self.sha256)

    def part(self, split):
        """All but every 20th conversation ("train"), or those ("val"). A file of fewer can spare none: then both are all of it."""
        assert split in ("train", "val"), split
        out = copy.copy(self)
        if len(self.conversations) >= HELD:
            out.conversations = [conversation for n, conversation in enumerate(self.conversations, 1) if (n % HELD == 0) == (split == "val")]
        return out

    def count(self):
        return len(self.conversations)

    def example(self, index):
        return dict(self.conversations[index])

    def evaluate(self, conversation, answer_text):
        """Right is what the last assistant's message says."""
        wanted = conversation["messages"][-1]["content"]
        if not isinstance(wanted, str):
            wanted = "".join(part["text"] for part in wanted if part["type"] == "text")
        return same_words(final_text(answer_text), wanted)


def read_line(line, where):
    """The messages of a line."""
    value = parse_json(line, where)
    conversation = {"messages": value} if isinstance(value, list) else value
    if problem := check_conversation(conversation):
        raise UserError(f"{where}: {problem}")
    return conversation["messages"]
