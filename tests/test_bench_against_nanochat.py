"""Beside nanochat: what it is given to read is what ours reads, in the forms that its files take. No checkout is needed."""
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

import bench.against_nanochat as against
from nanochat.common import UserError
from nanochat.dataset import open_source
from nanochat.tokenizer import Tokenizer

TEXTS = ["One two three. " * 300, "Vier fünf sechs\n" * 200, "x", "<|bos|> typed by hand"]


@pytest.fixture
def prepared(tmp_path):
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)] + [b"on", b"e "])
    against.prepare(tmp_path, tokenizer, TEXTS, ["held out", "and this"])
    return tmp_path, tokenizer


def test_the_pickled_tokenizer_gives_the_same_ids(prepared):
    """nanochat unpickles a tiktoken Encoding and asks it for n_vocab, the id of bos, and ordinary ids of a batch."""
    folder, tokenizer = prepared
    encoding = pickle.loads((folder / "tokenizer/tokenizer.pkl").read_bytes())
    assert encoding.n_vocab == tokenizer.vocab_size and encoding.encode_single_token("<|bos|>") == tokenizer.bos
    assert encoding.encode_ordinary_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert Tokenizer.load(folder / "tokenizer").fingerprint == tokenizer.fingerprint


def test_token_bytes_add_up_to_the_text(prepared):
    folder, tokenizer = prepared
    lengths = torch.load(folder / "tokenizer/token_bytes.pt")
    assert lengths.dtype == torch.int32 and lengths[tokenizer.bos] == 0 and len(lengths) == tokenizer.vocab_size
    assert lengths[torch.tensor(tokenizer.encode(TEXTS[1]))].sum() == len(TEXTS[1].encode())


def test_both_trainers_find_the_same_split(prepared):
    """nanochat takes the last shard by name for validation and all others for training, from either name of the folder."""
    folder, _ = prepared
    for name in (against.SHARDS, "base_data"):
        shards = sorted((folder / name).glob("*.parquet"))
        assert [pq.read_table(shard)["text"].to_pylist() for shard in shards] == [TEXTS, ["held out", "and this"]]
    for split, texts in (("train", TEXTS), ("val", ["held out", "and this"])):
        source = open_source(f"dir:{folder / against.SHARDS}", split)
        assert [source[i] for i in range(len(source))] == texts


@pytest.mark.parametrize("cut", [False, True])
def test_cutting_and_shuffling_lose_no_text(cut):
    texts = against.documents(SimpleNamespace(documents=lambda: iter(TEXTS)), 7000, cut)
    given = "".join(TEXTS)[:7000]
    assert sorted("".join(texts)) == sorted(given) and all(texts)
    assert cut or sorted(texts) == sorted([TEXTS[0], given[len(TEXTS[0]):]])


def test_the_first_ten_steps_are_not_timed():
    assert against.steady([9.0] * 10 + [1.0] * 30) == 1.0 and against.steady([9.0, 9.0, 1.0, 1.0]) == 1.0 and against.steady([2.0]) == 2.0


@pytest.mark.parametrize("tokens", [131072, 1_000_000, 100_000_000])
def test_nanochat_looks_at_the_depth_only(tokens):
    """By hand: 12 * 4 * 256^2 + 256 * 4096 = 4.2M scaling parameters at d4, 88M at d12, and 2^19 * (4.2 / 88)^0.383 is 163,000: 2^17 is nearest."""
    args = SimpleNamespace(batch_tokens=-1, depth=4, max_seq_len=512, num_tokens=tokens)
    theirs, ours = against.batches_of(args, 4096)
    assert theirs == 2**17 and ours == {131072: 2048, 1_000_000: 8192, 100_000_000: 262144}[tokens]
    assert against.batches_of(SimpleNamespace(batch_tokens=8192), 4096) == (8192, 8192)


FAKE = """
import sys, time, torch
torch.manual_seed(42)
assert sys.argv[1:] == ["--depth=4", "--run=x"] and __name__ == "__main__", sys.argv
print(torch.initial_seed(), sys.path[0], time.time is time.process_time)
"""


def test_a_checkout_is_seeded_from_outside(tmp_path):
    """Its own packages are found, not ours, and its constant seed and its clock are replaced."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/base_train.py").write_text(FAKE)
    for clock, told in (("time", "False"), ("process_time", "True")):
        said = against.run([against.SIDE, "train", 7, clock, "--depth=4", "--run=x"], tmp_path)
        assert said.split() == ["7", os.path.realpath(tmp_path), told]


def test_ours_is_timed_by_the_cpu_clock_too(tmp_path):
    """Progress takes its clock when nanochat.run is imported, so the clock is replaced before that; the module sees its own flags."""
    (tmp_path / "clocked.py").write_text("import sys, time; from nanochat.run import Progress; print(sys.argv[1:], Progress.__init__.__defaults__[-1] is time.process_time)")
    assert against.run(["-c", against.CPU_CLOCK, "clocked", "--tag", "a"], against.ROOT, PYTHONPATH=str(tmp_path)).split() == ["['--tag',", "'a']", "True"]


def test_a_failing_run_is_told(tmp_path):
    with pytest.raises(UserError, match="(?s)ended with 3.*the reason"):
        against.run(["-c", "import sys; print('the reason'); sys.exit(3)"], tmp_path)
    told = subprocess.run([sys.executable, "-m", "bench.against_nanochat", str(tmp_path)], cwd=against.ROOT, capture_output=True, text=True)
    assert told.returncode == 2 and "expected a checkout of nanochat" in told.stderr
