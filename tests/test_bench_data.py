"""The benches of the loader and of the tokenizer end in one JSON object that holds the bars, and its numbers are the ones that were measured."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench.loader as loader
import bench.tokenizer as tokenizer
from nanochat.common import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def text(tmp_path):
    """A folder of a few files of words."""
    (tmp_path / "text").mkdir()
    for i in range(5):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"line {n} of file {i}, not like line {n * i} at all\n" for n in range(300)))
    return tmp_path / "text"


# ---------------------------------------------------------------------------------------------------------------------
# bench.loader

def run_loader(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["loader", *flags])
    loader.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_loader_bench(text, monkeypatch, capsys):
    """The best of the runs counts: one sample of a busy machine told the neighbours' load, not the loader's speed."""
    speeds = iter([50.0, 30.0, 70.0, 60.0, 20.0, 80.0, 40.0, 10.0, 90.0]) # three loads in turn, three times
    measure = loader.measure
    monkeypatch.setattr(loader, "measure", lambda *args: (next(speeds), measure(*args)[1]))
    monkeypatch.setattr(loader, "packing_table", partial(loader.packing_table, tokens=1024))
    monkeypatch.setattr(loader, "training_speed", partial(loader.training_speed, steps=1, rows=1, seq_len=32, vocab_size=64))
    told = run_loader(monkeypatch, capsys, "--source", f"dir:{text}", "--vocab-size", "300", "--seconds", "0.02", "--batch", "2", "--seq-len", "128", "--threads", "1")
    assert next(speeds, None) is None
    assert (told["tokens_per_second"], told["whole_documents_tokens_per_second"], told["one_document_tokens_per_second"]) == (60, 30, 90)
    assert told["long_doc_tokens_per_second"] == 30, "the slower of the two"
    assert told["cpu_training_tokens_per_second"] > 0 and told["resume_seconds"] >= 0
    assert set(told["packing"]) == {"32", "128", "512"} and told["repeats"] == 3


def test_the_loader_bench_measures(text, monkeypatch, capsys):
    monkeypatch.setattr(loader, "packing_table", lambda *_: {})
    monkeypatch.setattr(loader, "training_speed", lambda threads: 100.0)
    told = run_loader(monkeypatch, capsys, "--source", f"dir:{text}", "--vocab-size", "300", "--seconds", "0.05", "--repeats", "1", "--batch", "2", "--seq-len", "128")
    speeds = [told[f"{name}tokens_per_second"] for name in ("", "whole_documents_", "one_document_")]
    assert min(speeds) > 1000 and told["times_cpu_training"] == pytest.approx(min(speeds) / 100, abs=0.1)


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--threads", "0"], ["--vocab-size", "30000"]])
def test_mistakes_are_told(text, monkeypatch, capsys, flags):
    with pytest.raises(UserError):
        run_loader(monkeypatch, capsys, "--source", f"dir:{text}", *flags)


# ---------------------------------------------------------------------------------------------------------------------
# bench/tokenizer.py, with rivals that are the definition of BPE in a few lines

SLOW = '''
import regex
from collections import Counter

def tokens(texts, vocab_size, pattern):
    words = [list(piece.encode()) for text in texts for piece in regex.findall(pattern, text)]
    found = [bytes([byte]) for byte in range(256)]
    while len(found) < vocab_size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [len(found)]
                i += 1
        found.append(found[best[0]] + found[best[1]])
    return found
'''
PYPI = SLOW + '''
class Tokenizer:
    def train_from_iterator(self, texts, vocab_size, pattern):
        self.found = tokens(texts, vocab_size, pattern)

    def get_mergeable_ranks(self):
        return [(list(token), rank) for rank, token in reversed(list(enumerate(self.found)))]
'''
HF = SLOW + '''
from types import SimpleNamespace

class Tokenizer:
    def __init__(self, model):
        pass

    def train_from_iterator(self, texts, trainer):
        found = tokens(texts, trainer.vocab_size, self.pre_tokenizer)
        found[-1], found[-2] = found[-2], found[-1]  # ties fall otherwise than ours
        letters = dict(enumerate(trainer.special_tokens))
        self.vocabulary = {"".join(letters[byte] for byte in token): rank for rank, token in enumerate(found)}

    def get_vocab(self):
        return self.vocabulary

Regex = str
models = SimpleNamespace(BPE=lambda: None)
decoders = SimpleNamespace(ByteLevel=lambda: None)
pre_tokenizers = SimpleNamespace(Split=lambda pattern, how: pattern, ByteLevel=lambda **_: None, Sequence=lambda parts: parts[0])
trainers = SimpleNamespace(BpeTrainer=lambda **settings: SimpleNamespace(**settings))
'''


def test_the_tokenizer_bench(text, tmp_path):
    for module, source in (("rustbpe", PYPI), ("tokenizers", HF)):
        (tmp_path / "rivals" / module).mkdir(parents=True)
        (tmp_path / "rivals" / module / "__init__.py").write_text(source)
    command = [sys.executable, str(ROOT / "bench" / "tokenizer.py"), str(text), "--rivals", str(tmp_path / "rivals"), "--vocab-size", "280", "--threads", "1", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in ("ours", "pypi", "hf", "read"):
        assert told[name]["seconds"] >= 0 and told[name]["peak_mb"] > 1 and told["by_threads"][f"{name}_1"] == told[name]
    assert told["same_order"] == {"pypi": True, "hf": False} and told["shared"] == {"pypi": 1.0, "hf": 1.0} and told["vocab_agrees"] is False
    assert told["speedup_vs_best"] == pytest.approx(min(told["pypi"]["seconds"], told["hf"]["seconds"]) / told["ours"]["seconds"], rel=0.2)
    assert told["memory_vs_best"] == pytest.approx(told["ours"]["peak_mb"] / min(told["pypi"]["peak_mb"], told["hf"]["peak_mb"]), rel=0.01)
    assert told["bytes"] == sum(path.stat().st_size for path in text.iterdir()) and told["threads_agree"] is True


def test_the_tokenizer_bench_without_text(tmp_path):
    (tmp_path / "rustbpe").mkdir()
    (tmp_path / "tokenizers").mkdir()
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "tokenizer.py"), str(tmp_path / "nowhere"), "--rivals", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: no .parquet, .py or .txt text under")


def test_the_peak_of_a_process_is_told_by_every_system(monkeypatch):
    """By /proc, by the module resource where there is no /proc, and on Windows, which has neither."""
    by_proc = tokenizer.peak_bytes()
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert by_proc > 2**24 and tokenizer.peak_bytes() > 2**24
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123)))
    monkeypatch.setattr(sys, "platform", "win32")
    assert tokenizer.peak_bytes() == 123
