"""
The tokenizer: every text and every byte string survives, nobody can type a special token, a damaged file says so, and a
conversation's mask covers what the assistant speaks and nothing else.
"""

import json
import os
import random
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import documents
from nanochat import tokenizer as module
from nanochat.common import UserError
from nanochat.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from scripts import tok_eval
from scripts import tok_train as tok_train_script

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def read(*names):
    return [(LIBRARY / name).read_text(encoding="utf-8") for name in names]


TOKENIZER = Tokenizer.train(read("argparse.py", "ast.py", "typing.py") + ["Grüße, 世界! " * 9], 1024)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture
def tokenizer():
    return TOKENIZER


# ---------------------------------------------------------------------------------------------------------------------
# Text

@settings(max_examples=300, deadline=None)
@given(UNICODE)
def test_every_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode_bytes(ids) == text.encode() and TOKENIZER.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.binary())
def test_every_byte_string_has_a_spelling(data):
    """Id b spells byte b, so every string of bytes can be spelt; broken UTF-8 reads as U+FFFD and not as an error."""
    assert TOKENIZER.decode_bytes(list(data)) == data
    assert TOKENIZER.decode(list(data)) == data.decode("utf-8", errors="replace")


def slow_encode(tokenizer, text):
    """The definition: within each piece, join the pair whose joint token is the oldest, leftmost first, until none is left."""
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    ids = []
    for piece in regex.findall(PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joints = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not joints:
                break
            _, i = min(joints)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


SLOW = tiktoken.Encoding("by PATTERN itself", pat_str=PATTERN, mergeable_ranks={token: i for i, token in enumerate(TOKENIZER.tokens)}, special_tokens={})
TRICKY = [" ", " ", "  ", "\t", "\n", "\r", "\r\n", "\xa0", "\u3000", "\x85", "a", "bc", "Z", "é", "中", "1", "23", "½", "🎉", ".", "-", "_", "'", "'s", "'S", "'ſ", "'ll", "'Ve"]


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(TRICKY), max_size=30).map("".join), UNICODE))
def test_the_quick_pattern_is_the_pattern(text):
    """By tiktoken's engine in tokens, and by another engine in pieces."""
    assert TOKENIZER.encode(text) == SLOW.encode_ordinary(text)
    assert regex.findall(module.QUICK, text) == regex.findall(PATTERN, text)


def test_the_quick_pattern_is_the_pattern_on_real_text(tokenizer):
    for text in read("argparse.py", "inspect.py", "this.py"):
        assert tokenizer.encode(text) == SLOW.encode_ordinary(text)


def test_encoding_is_the_definition(tokenizer):
    for text in ["", "a", "I'll pay $1234,\n\n  don'T", *read("this.py", "bisect.py"), "Grüße, 世界!"]:
        assert tokenizer.encode(text) == slow_encode(tokenizer, text)


def test_by_hand():
    """ab is made first, then ab+ab; three letters leave one over. Nine specials follow, <|bos|> first."""
    tiny = Tokenizer.train(["abab abab"], 256 + 2 + 9)
    assert tiny.tokens[256:] == [b"ab", b"abab"] and tiny.vocab_size == 267 and tiny.bos == 258
    assert tiny.encode("ababa") == [257, 97] and tiny.special("<|output_end|>") == 266


@pytest.mark.parametrize("text, place", [("\ud800", 0), ("fine so far \udcff", 12), ("é\udfff\ud800", 1)])
def test_a_lone_surrogate_is_named(tokenizer, text, place):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match=f"character {place} of the text is the lone surrogate U\\+D"):
            encode(text)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_batch_is_each_of_its_texts(tokenizer, threads):
    texts = ["", *read("this.py", "bisect.py", "heapq.py")] * 5
    assert tokenizer.encode_batch(texts, threads=threads) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "x" + "\t" * 1_000_000, "\n \n" * 400_000, "\u3000" * 1_000_000])
def test_a_million_spaces_survive(tokenizer, text):
    """Pasted into a chat, this brought tiktoken down: its regular expressions overflow their stack (a PanicException)."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_stretches_cut_long_runs_only(monkeypatch):
    monkeypatch.setattr(module, "STRETCH", 4)
    for seed in range(500):
        rng = random.Random(seed)
        text = "".join(rng.choices(" \n\tab", weights=[8, 1, 1, rng.random(), rng.random()], k=rng.randrange(40)))
        parts = list(module.stretches(text))
        assert "".join(parts) == text
        assert max(len(run) for part in parts for run in regex.findall(r"\s*", part)) < 3 * 4
        for i in range(1, len(parts)): # a cut has a whole stretch of white space before it
            assert len(parts[i - 1]) >= 4 and parts[i - 1][-4:].isspace()
    assert list(module.stretches("ab   cd")) == ["ab   cd"]


def test_token_bytes_are_the_bytes(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.dtype == np.int64 and sizes.shape == (tokenizer.vocab_size,)
    assert sizes[-9:].tolist() == [0] * 9 and sizes[:256].tolist() == [1] * 256
    text = "Grüße, 世界! " + read("this.py")[0]
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_training_asks_for_enough():
    with pytest.raises(ValueError, match="ran out of pairs after 1 of 5 merges.* vocabulary of 266"):
        Tokenizer.train(["ab"], 256 + 5 + 9)
    with pytest.raises(ValueError, match="at least 265"):
        Tokenizer.train(["ab"], 264)


def test_the_wrong_trainer_is_named(monkeypatch):
    """Without `pip install ./rustbpe`, Python takes the folder of its sources for an empty package."""
    import types
    stranger = types.ModuleType("rustbpe")
    stranger.__path__ = ["somewhere"]
    monkeypatch.setitem(sys.modules, "rustbpe", stranger)
    with pytest.raises(ImportError, match="pip install ./rustbpe"):
        Tokenizer.train(["ab"], 300)


# ---------------------------------------------------------------------------------------------------------------------
# Specials

def test_the_nine():
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == 9
    assert [TOKENIZER.special(name) for name in SPECIAL_TOKENS] == list(range(1015, 1024))
    assert TOKENIZER.decode([TOKENIZER.bos]) == "<|bos|>"
    with pytest.raises(ValueError, match="no special token called '<|eos|>'.*<|bos|>"):
        TOKENIZER.special("<|eos|>")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), UNICODE)).map("".join))
def test_nobody_can_type_a_special(text):
    ids = TOKENIZER.encode(text)
    assert all(token < 1015 for token in ids) and TOKENIZER.decode(ids) == text
    ids, mask = TOKENIZER.render({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]})
    framed = [token for token in ids if token >= 1015]
    assert [TOKENIZER.decode([token]) for token in framed] == [
        "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


# ---------------------------------------------------------------------------------------------------------------------
# The file

def test_save_and_load(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new" / "folder")
    again = Tokenizer.load(path.parent)
    assert again.tokens == tokenizer.tokens and again.fingerprint == tokenizer.fingerprint and again.specials == SPECIAL_TOKENS
    text = read("this.py")[0]
    assert again.encode(text) == tokenizer.encode(text)
    assert os.listdir(path.parent) == ["tokenizer.json"], "a draft was left behind"


def test_the_default_place(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="tok_train"):
        Tokenizer.load()
    assert tokenizer.save() == tmp_path / "tokenizer" / "tokenizer.json"
    assert Tokenizer.load().fingerprint == tokenizer.fingerprint


def test_the_fingerprint_tells_vocabularies_apart(tokenizer):
    tokens = tokenizer.tokens
    others = [Tokenizer(tokens[:-1]), Tokenizer(tokens[:-2] + tokens[:-3:-1]), Tokenizer(tokens, pattern=r"\w+|\W+"),
              Tokenizer(tokens, specials=SPECIAL_TOKENS[::-1])]
    prints = [tokenizer.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == 5 and Tokenizer(tokens).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("seed", range(120))
def test_a_damaged_file_says_so(tokenizer, tmp_path, seed):
    """One byte changed anywhere, or the end cut off: a clear error, unless the byte meant nothing (white space)."""
    path = tokenizer.save(tmp_path)
    data, rng = bytearray(path.read_bytes()), random.Random(seed)
    if seed % 4 == 0:
        data = data[:rng.randrange(len(data) - 1)]
    else:
        data[rng.randrange(len(data))] = rng.choice(b'AZaz09+/"\\,x \xff\x00')
    path.write_bytes(data)
    try:
        assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("change, message", [
    (dict(format="other"), "expected 'nanochat-tokenizer' version 1"),
    (dict(version=2), "version 2, expected"),
    (dict(sha256="0" * 64), "is damaged: its contents hash to"),
    (dict(pattern="(unbalanced"), "is damaged"),
    (dict(tokens=["QQ=="]), "255 of the 256 single bytes are not tokens"),
    (dict(specials=["<|eos|>"]), "is damaged"),
    (dict(specials=None), "is damaged"),
    (dict(tokens=7), "is damaged"),
])
def test_a_foreign_file_says_so(tokenizer, tmp_path, change, message):
    path = tokenizer.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations

TOOLS = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6*7? <|assistant_start|>"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "Let me see. "}, {"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
        {"type": "text", "text": "It is 42."}]},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "Any time."},
]}


def test_render_by_hand(tokenizer):
    """Printed too (pytest -s): `+` has loss, `.` has none."""
    ids, mask = tokenizer.render(TOOLS)
    shown = tokenizer.show(ids, mask)
    print("\n" + shown)
    assert shown.splitlines() == [
        ". '<|bos|><|user_start|>Be brief.\\n\\nWhat is 6*7? <|assistant_start|><|user_end|><|assistant_start|>'",
        "+ 'Let me see. <|python_start|>6*7<|python_end|>'",
        ". '<|output_start|>42<|output_end|>'",
        "+ 'It is 42.<|assistant_end|>'",
        ". '<|user_start|>Thanks!<|user_end|><|assistant_start|>'",
        "+ 'Any time.<|assistant_end|>'",
    ]
    assert len(ids) == len(mask) and ids.count(tokenizer.bos) == 1 and ids[0] == tokenizer.bos
    assert {token for token in ids if token >= 1015} == set(range(1015, 1024)), "all nine special tokens are in use"


def test_prompt_ends_where_the_assistant_begins(tokenizer):
    """A prompt is the beginning of the whole conversation, whether or not the answer to be written is given."""
    ids, _ = tokenizer.render(TOOLS)
    for messages in (TOOLS["messages"], TOOLS["messages"][:-1]):
        prompt = tokenizer.render_prompt({"messages": messages})
        assert prompt == ids[:len(prompt)] and prompt[-1] == tokenizer.special("<|assistant_start|>")
    assert TOOLS["messages"][-1]["content"] == "Any time.", "the conversation was changed by rendering it"


@pytest.mark.parametrize("messages, message", [
    ([], "at least one message"),
    ([{"role": "assistant", "content": "hi"}], "message 0 is by 'assistant', expected 'user'"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "message 1 is by 'user', expected 'assistant'"),
    ([{"role": "system", "content": "a"}], "no user message after it"),
    ([{"role": "tool", "content": "a"}], "message 0 is by 'tool'"),
    ([{"role": "user", "content": ["a"]}], "message 0 by 'user' has content of type list, expected str"),
    ([{"role": "user", "content": None}], "content of type NoneType, expected str"),
    ([{"role": "system", "content": None}, {"role": "user", "content": "a"}], "system message has content of type NoneType"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}], "expected str or a list of parts"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}], "has the part"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ["text"]}], "has the part 'text'"),
    ([{"role": "user"}], "message 0 has the fields"),
    (["hello"], "message 0 has"),
])
def test_a_broken_conversation_is_named(tokenizer, messages, message):
    for render in (tokenizer.render, tokenizer.render_prompt):
        with pytest.raises(ValueError, match=message):
            render({"messages": messages})


# ---------------------------------------------------------------------------------------------------------------------
# The scripts

def run(script, *flags, **environment):
    return subprocess.run([sys.executable, "-m", f"scripts.{script}", *flags], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=120)


def test_train_and_eval_from_the_shell(tmp_path):
    """The way of a user without a network: both scripts end in a summary, and GPT-4's column says why it is empty."""
    place = dict(NANOCHAT_BASE_DIR=str(tmp_path), TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"))
    done = run("tok_train", "--vocab-size", "600", "--max-chars", "300000", "--doc-cap", "5000", **place)
    assert done.returncode == 0, done.stderr
    summary = dict(pair.split("=") for pair in shlex.split(done.stdout.splitlines()[-1])[1:])
    assert summary["vocab_size"] == "600" and summary["chars"] == "300000"
    assert Tokenizer.load(tmp_path / "tokenizer").fingerprint.startswith(summary["fingerprint"])

    done = run("tok_eval", "--max-chars", "20000", **place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("summary ")
    report = (tmp_path / "report" / "tokenizer.md").read_text(encoding="utf-8")
    assert "GPT-2 and GPT-4: not available" in report and "| stdlib, val | " in report and "| Korean | " in report

    done = run("tok_train", "--vocab-size", "60000", "--max-chars", "3000", **place)
    assert done.returncode == 2 and "ran out of pairs" in done.stderr and "Traceback" not in done.stderr
    assert Tokenizer.load(tmp_path / "tokenizer").vocab_size == 600, "a failed training leaves the old tokenizer alone"


@pytest.fixture
def book(tmp_path):
    """The spec of a folder that holds one file of a megabyte."""
    text = "\n".join(read(*sorted(path.name for path in LIBRARY.glob("*.py"))[:60]))
    assert len(text) > 1_000_000
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "book.txt").write_text(text[:1_000_000], encoding="utf-8")
    return f"dir:{tmp_path}/books"


@pytest.fixture
def tok_train(base, monkeypatch, capsys):
    """The script in this process; returns {key: value} of its summary."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["tok_train", *flags])
        tok_train_script.main()
        return dict(pair.split("=", 1) for pair in shlex.split(capsys.readouterr().out.splitlines()[-1])[1:])
    return run


def test_one_book_is_enough(tok_train, book):
    """
    One novel as SOURCE, with the cpu tier's flags: of a document 10,000 characters were taken, whatever there was, and the first stage
    ended in "the text ran out of pairs after 1450 of 3831 merges: bring more text".
    """
    summary = tok_train("--source", book, "--vocab-size", "4096", "--max-chars", "20000000")
    assert summary["documents"] == "1" and 940_000 < int(summary["chars"]) < 960_000, "the book less what validation keeps"
    assert summary["source"] == book and Tokenizer.load().vocab_size == 4096


def test_a_book_beyond_big_is_one_document_with_one_cap(tok_train, book, monkeypatch):
    """A file of more than 16 MiB comes in slices: each had a cap of its own, and counted as a document."""
    monkeypatch.setattr(documents, "BIG", 500_000)
    summary = tok_train("--source", book, "--vocab-size", "600", "--doc-cap", "150000")
    assert (summary["documents"], summary["chars"]) == ("1", "150000")


@pytest.mark.parametrize("flags, kept", [(["--doc-cap", "5000"], "; --doc-cap 5000 kept more from it"), (["--max-chars", "6000"], "; --max-chars 6000 kept more from it"),
                                         (["--doc-cap", "7000", "--max-chars", "7000"], "; --doc-cap 7000 and --max-chars 7000 kept more from it")])
def test_too_little_text_says_which_flag_kept_it_back(tok_train, book, flags, kept):
    """"bring more text" is no advice to who has a megabyte of it."""
    with pytest.raises(UserError, match=rf"ran out of pairs.*It was shown {flags[-1][0]},000 characters of 1 document\(s\){kept}$"):
        tok_train("--source", book, "--vocab-size", "30000", *flags)


def test_all_of_the_text_may_be_too_little(tok_train, tmp_path):
    (tmp_path / "a.txt").write_text("a few words\nand a few more\n")
    with pytest.raises(UserError, match=r"ran out of pairs.*It was shown 12 characters of 1 document\(s\)$"):
        tok_train("--source", f"dir:{tmp_path}", "--vocab-size", str(10**9))


def test_more_threads_than_cores_are_refused(tok_train, book):
    with pytest.raises(UserError, match=rf"--threads 5000: expected at most {os.cpu_count()}"):
        tok_train("--source", book, "--threads", "5000")


def test_the_data_folder_by_flag(tok_train, book, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "elsewhere")) # the flag sets it
    monkeypatch.chdir("/")
    assert tok_train("--source", "dir:books", "--data-dir", str(tmp_path), "--vocab-size", "600")["documents"] == "1"
    monkeypatch.setattr(sys, "argv", ["tok_eval", "--source", "dir:books", "--data-dir", str(tmp_path), "--max-chars", "20000"])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "elsewhere"))
    tok_eval.main()
    assert "| dir:books, val | 20,000 | " in capsys.readouterr().out, "20,000 bytes of one book, two caps of old"


def test_other_encodings_stand_beside_ours_where_tiktoken_has_them(tokenizer, base, book, monkeypatch, capsys):
    """Only "not available" was ever seen in tests. The stand-ins are one token a byte, and one token for every two of them that are the same."""
    single = {bytes([byte]): byte for byte in range(256)}
    double = single | {bytes([byte, byte]): 256 + byte for byte in range(256)}
    have = {name: tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}) for name, ranks in (("gpt2", single), ("cl100k_base", double))}
    monkeypatch.setattr(tiktoken, "get_encoding", have.__getitem__)
    tokenizer.save()
    monkeypatch.setattr(sys, "argv", ["tok_eval", "--source", book, "--max-chars", "5000"])
    tok_eval.main()
    out = capsys.readouterr().out
    assert "not available" not in out and "| ours (1,024) | GPT-2 (256) | GPT-4 (512) | tokens vs GPT-2 | tokens vs GPT-4 |" in out
    (row,) = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| German |")]
    text = tok_eval.SAMPLES["German"]
    size, ours, pairs = len(text.encode()), len(tokenizer.encode(text)), len(have["cl100k_base"].encode(text))
    assert pairs < size and row == ["German", f"{size:,}", f"{size / ours:.2f}", "1.00", f"{size / pairs:.2f}", f"{ours / size - 1:+.1%}", f"{ours / pairs - 1:+.1%}"]


def test_eval_by_hand():
    """Ten bytes in four tokens are 2.50; the other needs five, so ours are 20% fewer."""
    row = tok_eval.table([("text", 10, {"ours": 4, "gpt2": 5, "cl100k_base": None})], {"ours": "ours", "gpt2": "GPT-2", "cl100k_base": "GPT-4"})
    assert row.splitlines()[-1] == "| text | 10 | 2.50 | 2.00 | not available | -20.0% |  |"
