"""
Text to token ids and back: a byte-level BPE with nine special tokens, and the rendering of conversations.

In:  str (anything without lone surrogates), or a conversation {"messages": [{"role", "content"}, ...]}.
Out: lists of token ids; for a conversation also the mask of what the assistant speaks (1 = has loss).
The idea: 256 byte tokens can spell every text, merges make it short, and specials live at the end of the vocabulary where
no text can reach them: `encode` only ever makes ordinary tokens, so nobody can type <|assistant_start|> into being.
Merges are learnt by `rustbpe` (in this repository) and applied by tiktoken. The split pattern is GPT-4's with digits
taken at most two at a time, and the specials are nanochat's, after github.com/karpathy/nanochat.

The file, `tokenizer.json`, is plain JSON:
    format   "nanochat-tokenizer"
    version  1
    pattern  the regular expression that splits a text into pieces; no token crosses a piece
    tokens   the bytes of every ordinary token in base64, in the order of their ids, which is the order of their merges
    specials the names of the special tokens; their ids follow the ordinary ones
    sha256   over all of the above (see `fingerprint`): a damaged file says so when it is opened

V = size of the vocabulary, specials included
"""

import base64
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.common import UserError, base_dir, check_unicode

PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")

# The same pieces in half the time. What PATTERN matches possessively could not be given back anyway, and with the look-ahead outside
# of the group tiktoken's engine takes the whole group for one expression without backtracking (LOG.md, 2026-11-21).
QUICK = (r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n])|\s+(?!\S)|\s+")

SPECIAL_TOKENS = [
    "<|bos|>",  # starts every document and every conversation, and thereby ends the one before it
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the assistant calls the calculator
    "<|output_start|>", "<|output_end|>",  # what the calculator answered
]

FORMAT, VERSION = "nanochat-tokenizer", 1
STRETCH = 1 << 16  # characters, see stretches()


class TooLittleText(ValueError):
    """There are fewer pairs in the text than merges were asked for."""


class Tokenizer:
    """
    tokens    bytes of every ordinary token in the order of ids
    specials  names of the special tokens, whose ids follow
    """

    def __init__(self, tokens, pattern=PATTERN, specials=SPECIAL_TOKENS):
        self.tokens, self.pattern, self.specials = list(tokens), pattern, list(specials)
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        if len(ranks) != len(self.tokens):
            raise ValueError(f"{len(self.tokens) - len(ranks)} of {len(self.tokens)} tokens are there twice: every "
                             f"token needs bytes of its own")
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"{len(missing)} of the 256 single bytes are not tokens (first: {missing[0]}): some texts "
                             f"could not be encoded")
        self._special_ids = {name: len(self.tokens) + i for i, name in enumerate(self.specials)}
        self._encoding = tiktoken.Encoding("nanochat", pat_str=QUICK if pattern == PATTERN else pattern, mergeable_ranks=ranks,
                                           special_tokens=self._special_ids)
        self.vocab_size = len(self.tokens) + len(self.specials)
        self.bos = self.special("<|bos|>")

    # -----------------------------------------------------------------------------------------------------------------
    # Make, save, load

    @classmethod
    def train(cls, texts, vocab_size, threads=None, progress=None):
        """
        Learn merges from an iterator of str, each one text of its own: no piece crosses from one to the next.

        vocab_size  size of the result, the nine specials and the 256 bytes included
        threads     for counting (None = every core); the result does not depend on it
        progress    called as progress(stage, done, total) a few times a second; total is None where nobody knows it
        """
        import rustbpe
        if not hasattr(rustbpe, "train"): # the folder of its sources, or the package of that name on PyPI
            raise ImportError(f"the rustbpe found at {list(rustbpe.__path__)} is not ours: pip install ./rustbpe")
        ordinary = vocab_size - len(SPECIAL_TOKENS)
        if ordinary < 256:
            raise ValueError(f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(SPECIAL_TOKENS)} special "
                             f"tokens: ask for at least {256 + len(SPECIAL_TOKENS)}")
        merges = rustbpe.train(texts, ordinary - 256, threads=threads, progress=progress)
        if len(merges) < ordinary - 256:
            raise TooLittleText(f"the text ran out of pairs after {len(merges)} of {ordinary - 256} merges: bring more text, "
                                f"or ask for a vocabulary of {256 + len(merges) + len(SPECIAL_TOKENS)}")
        tokens = [bytes([byte]) for byte in range(256)]
        for left, right in merges:
            tokens.append(tokens[left] + tokens[right])
        return cls(tokens)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hex of everything that decides ids: two tokenizers with one fingerprint read every text alike."""
        digest = hashlib.sha256()
        for part in (FORMAT, str(VERSION), self.pattern, *self.tokens, "", *self.specials):
            part = part.encode() if isinstance(part, str) else part
            digest.update(len(part).to_bytes(4, "little") + part)
        return digest.hexdigest()

    def save(self, folder=None) -> Path:
        """Write folder/tokenizer.json (default: base_dir()/tokenizer), whole or not at all. Returns its path."""
        folder = Path(folder) if folder is not None else base_dir() / "tokenizer"
        folder.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "version": VERSION, "pattern": self.pattern,
                "tokens": [base64.b64encode(token).decode() for token in self.tokens],
                "specials": self.specials, "sha256": self.fingerprint}
        path, draft = folder / "tokenizer.json", folder / f"tokenizer.json.{os.getpid()}.tmp"
        with open(draft, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        return path

    @classmethod
    def load(cls, folder=None) -> "Tokenizer":
        """Read what save() wrote. A file that is absent, foreign or damaged is a UserError that says which."""
        path = (Path(folder) if folder is not None else base_dir() / "tokenizer") / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: train one with `python -m scripts.tok_train`")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            kind = (data["format"], data["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a tokenizer file or is damaged ({error}): restore it or train it again")
        if kind != (FORMAT, VERSION):
            raise UserError(f"{path} is of format {kind[0]!r} version {kind[1]!r}, expected {FORMAT!r} version {VERSION}: "
                            f"train it again with this version of the project")
        try:
            tokens = [base64.b64decode(token, validate=True) for token in data["tokens"]]
            tokenizer = cls(tokens, data["pattern"], data["specials"])
            sound = tokenizer.fingerprint == data["sha256"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it or train it again")
        if not sound:
            raise UserError(f"{path} is damaged: its contents hash to {tokenizer.fingerprint[:12]}..., it was saved with "
                            f"{str(data['sha256'])[:12]}... Restore it or train it again")
        return tokenizer

    # -----------------------------------------------------------------------------------------------------------------
    # Text

    def special(self, name) -> int:
        """The id of a special token by its name."""
        if name not in self._special_ids:
            raise ValueError(f"no special token called {name!r}: there are {' '.join(self.specials)}")
        return self._special_ids[name]

    def encode(self, text) -> list:
        """str -> ids. Ordinary tokens only: the text "<|bos|>" becomes the bytes somebody typed, never the token."""
        check_unicode(text)
        return [token for part in stretches(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts, threads=2) -> list:
        """A list of str -> a list of lists of ids, the same as encode() on each."""
        return list(workers(threads).map(self.encode, texts))

    def decode_bytes(self, ids) -> bytes:
        """ids -> the exact bytes they spell; a special token spells its name."""
        return self._encoding.decode_bytes(ids)

    def decode(self, ids) -> str:
        """ids -> str. Ids need not end at a character's edge: a broken character reads as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: how many bytes of text each id stands for. A special stands for none: bits per byte skip them."""
        return np.array([len(token) for token in self.tokens] + [0] * len(self.specials), dtype=np.int64)

    # -----------------------------------------------------------------------------------------------------------------
    # Conversations

    def render(self, conversation):
        """
        Conversation -> (ids, mask), two lists of one length. mask 1 = the assistant speaks this token, it has loss:
        its text, its tool calls, and the <|assistant_end|> that hands the turn back. What the tool answered has none.
        All of it, however long: what does not fit into a row is nanochat/packing.py's business.
        """
        ids, mask = [self.bos], [0]

        def add(tokens, speaks):
            ids.extend(tokens)
            mask.extend([speaks] * len(tokens))

        for message in turns(conversation):
            role, content = message["role"], message["content"]
            if role == "user":
                add([self.special("<|user_start|>"), *self.encode(content), self.special("<|user_end|>")], 0)
                continue
            add([self.special("<|assistant_start|>")], 0)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                tokens = self.encode(part["text"])
                if part["type"] == "text":
                    add(tokens, 1)
                elif part["type"] == "python":
                    add([self.special("<|python_start|>"), *tokens, self.special("<|python_end|>")], 1)
                else:
                    add([self.special("<|output_start|>"), *tokens, self.special("<|output_end|>")], 0)
            add([self.special("<|assistant_end|>")], 1)
        return ids, mask

    def render_prompt(self, conversation) -> list:
        """
        Conversation -> the ids after which the assistant speaks: they end in <|assistant_start|>. A last message that
        is the assistant's is the one to be written, and is left out.
        """
        messages = turns(conversation)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        ids, _ = self.render({"messages": messages})
        return ids + [self.special("<|assistant_start|>")]

    def show(self, ids, mask) -> str:
        """A rendered conversation for the eye: one run of equal mask per line, `+` what has loss, `.` what has none."""
        lines, start = [], 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or mask[i] != mask[start]:
                lines.append(f"{'+' if mask[start] else '.'} {self.decode(ids[start:i])!r}")
                start = i
        return "\n".join(lines)


@cache
def workers(threads):
    """Threads that stay: tiktoken keeps a regular expression for each thread it meets, and that of a new one is slow at first."""
    return ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")


def stretches(text):
    """
    A text in parts that tiktoken survives: its regular expressions overflow their stack on a run of a million white-space
    characters, and anybody may type one. A cut is made after every STRETCH characters, counted from the start, that are
    white space throughout, so only a run longer than that is ever cut.
    """
    start = 0
    for i in range(0, len(text) - STRETCH + 1, STRETCH):
        if text[i:i + STRETCH].isspace():
            yield text[start:i + STRETCH]
            start = i + STRETCH
    yield text[start:]


def turns(conversation):
    """
    The messages of a conversation, checked: user and assistant in turn, the user first. A system message may come
    before them; there is no token for it, so its text opens the first user message.
    """
    messages = list(conversation["messages"])
    if not messages:
        raise ValueError("a conversation needs at least one message of the user, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"the fields {sorted(message)}" if isinstance(message, dict) else f"the type {type(message).__name__}"
            raise ValueError(f"message {i} has {found}, expected a dict with role and content")
    if messages[0]["role"] == "system":
        messages = [open_with_system(*messages[:2]), *messages[2:]]
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(f"message {i} is by {role!r}, expected {expected!r}: user and assistant speak in turn")
        if isinstance(content, str):
            continue
        if role == "user" or not isinstance(content, list):
            raise ValueError(f"message {i} by {role!r} has content of type {type(content).__name__}, expected str"
                             + (" or a list of parts" if role == "assistant" else ""))
        for part in content:
            if not is_part(part):
                raise ValueError(f"message {i} has the part {part!r}, expected "
                                 '{"type": "text", "python" or "python_output", "text": str}')
    return messages


def open_with_system(system, user=None):
    if user is None or user["role"] != "user":
        raise ValueError("a system message stands before the first user message, but there is no user message after it")
    for message in (system, user):
        if not isinstance(message["content"], str):
            raise ValueError(f"the {message['role']} message has content of type {type(message['content']).__name__}, expected str")
    return {**user, "content": f"{system['content']}\n\n{user['content']}"}


def is_part(part):
    return (isinstance(part, dict) and part.get("type") in ("text", "python", "python_output")
            and isinstance(part.get("text"), str))
