"""What the tests of the loader share: a tokenizer of bytes, rows by their numbers, the slow and obvious way to cut a document, random texts."""
import gc
import random
import threading

import pytest
from hypothesis import strategies as st

BOS = 300


class Bytes:
    """A token a byte. `log` notes the texts it was given."""
    bos, vocab_size = BOS, 301

    def __init__(self):
        self.log = []

    def encode_batch(self, texts, threads=2):
        self.log += texts
        return [list(text.encode()) for text in texts]

    def render(self, conversation):
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            text = message["content"].encode()
            ids += text
            mask += [int(message["role"] == "assistant")] * len(text)
        return ids, mask


def take(loader, count):
    with loader:
        return [batch for _, batch in zip(range(count), loader)] # range first: zip must not take one batch too many


def by_row(batches):
    """{number of the row: (inputs, targets, docs)} of many batches, of any rank."""
    found = {}
    for batch in batches:
        for inputs, targets, docs, row in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.docs.tolist(),
                                              batch.rows.tolist()):
            if row >= 0:
                assert row not in found, f"row {row} came twice"
                found[row] = inputs, targets, docs
    return found


def sequence(text):
    return [BOS, *text.encode(), BOS]


def pieces_of(text, T):
    """The pieces of one document as the loader's docstring says, the slow and obvious way: [(inputs, targets)]."""
    ids = sequence(text)
    inputs, targets = ids[:-1], ids[1:]
    return [(inputs[i:i + T], targets[i:i + T]) for i in range(0, len(inputs), T)] if text else []


def random_texts(seed, count, longest):
    rng = random.Random(seed)
    words = ["a", "bb", "ccc ", "d\n", "é", "\n\n", "x y "]
    def text():
        return "".join(rng.choice(words) for _ in range(rng.choice([0, 1, 5, 20, longest]) * rng.randrange(1, 3) // 2))
    texts = [text() for _ in range(count)]
    return texts if any(texts) else ["something"]


class Parts:
    """Several sequences with weights, as nanochat.dataset.Mix has them."""

    def __init__(self, *parts):
        self.parts = list(parts)


shapes = st.fixed_dictionaries({"seed": st.integers(0, 10**6), "count": st.integers(1, 30), "longest": st.sampled_from([30, 300]),
                                "align": st.sampled_from([1, 32]), "blocks": st.integers(1, 4), "size": st.sampled_from([7, 50, 10**5]),
                                "waiting": st.sampled_from([1, 3, 128])})


@pytest.fixture(autouse=True)
def leave_no_threads():
    yield
    def alive():
        return [thread for thread in threading.enumerate() if thread.name == "loader"]
    if alive():
        gc.collect() # slow, and only for loaders that a test built and did not close
    assert not alive()
