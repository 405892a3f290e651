"""rustbpe as Python sees it: the merges of the definition, whatever the threads; interruptible, lean, and clear about bad input."""

import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import PATTERN

assert hasattr(rustbpe, "split_text"), "these tests are about the trainer in this repository: pip install ./rustbpe"

TRICKY = [" ", " ", "\t", "\n", "\r", "\xa0", "\u3000", "\x85", "a", "b", "Z", "é", "中", "1", "2", "½", "🎉", ".", "-", "_",
          "'", "s", "S", "ſ", "ll", "Ve", "re", "\0"]


def slow_train(texts, merges):
    """The definition: count all pairs of all pieces, join the most frequent (of equals the smallest), start again."""
    words = [list(piece.encode()) for text in texts for piece in regex.findall(PATTERN, text)]
    done = []
    while len(done) < merges:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        token = 256 + len(done)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [token]
                i += 1
        done.append(best)
    return done


def stdlib_texts(most):
    """About `most` characters of the Python sources this interpreter came with."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        most -= len(texts[-1])
        if most < 0:
            break
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Exactness

@pytest.mark.parametrize("seed", range(60))
def test_merges_are_the_definition(seed):
    """Two letters make ties and overlaps (aaa) the rule; the tricky ones meet every corner of the pattern."""
    rng = random.Random(seed)
    alphabet = rng.choice([["a"], ["a", "b"], ["a", "b", " "], TRICKY])
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(80))) for _ in range(rng.randrange(1, 6))]
    assert rustbpe.train(texts, 30, threads=rng.randrange(1, 4)) == slow_train(texts, 30)


def test_merges_by_hand():
    """ab and ba stand twice each: the smaller pair (97, 98) wins, though (98, 97) came first. Then [ba..] has only b [ab]."""
    assert rustbpe.train(["bab", "bab"], 5) == [(97, 98), (98, 256)]


def test_merges_of_real_text():
    texts = stdlib_texts(60_000)
    assert rustbpe.train(texts, 60) == slow_train(texts, 60)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from("".join(TRICKY)), st.characters(exclude_categories=["Cs", "Cn"])), max_size=40))
def test_split_is_the_pattern(text):
    """The pattern as Python's regex module reads it; unassigned characters, on which tables of different age differ, are left to cargo's tests."""
    newer = {c for c in text if regex.match(r"\p{Cn}", c)}
    if not newer:
        assert rustbpe.split_text(text) == regex.findall(PATTERN, text)
    assert "".join(rustbpe.split_text(text)) == text


def test_threads_and_chopping_change_nothing():
    """
    Several MiB, so that the internal batches of one are in play: one giant text (cut inside, where no piece notices),
    and the same text handed over piece by piece, by 1, 2 and 5 threads.
    """
    giant = "\n".join(stdlib_texts(1_500_000) * 2)
    assert len(giant) > 2 << 20
    expected = rustbpe.train([giant], 500, threads=1)
    assert len(expected) == 500
    for threads in (2, 5):
        assert rustbpe.train([giant], 500, threads=threads) == expected
    assert rustbpe.train(iter(rustbpe.split_text(giant)), 500, threads=2) == expected


def test_no_piece_crosses_texts():
    """Each str is a text of its own: "ab" in one is a pair, "a" and "b" in two are none."""
    assert rustbpe.train(["ab"], 1) == [(97, 98)]
    assert rustbpe.train(["a", "b"] * 1000, 1) == []


def test_nothing_to_learn():
    assert rustbpe.train([], 10) == []
    assert rustbpe.train(["", "", "a"], 10) == []
    assert rustbpe.train(["aa"], 10) == [(97, 97)]  # fewer than asked for: pairs ran out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"text 2 holds a lone surrogate at character 3.*errors="):
        rustbpe.train(["fine", "also", "abc\ud800"], 10)


@pytest.mark.parametrize("texts, message", [
    (["a", 3], "text 1 is of type int, expected str"),
    ([b"bytes"], "text 0 is of type bytes, expected str"),
    ("one str", "texts is one str, expected an iterator"),
    (7, "not iterable"),
])
def test_what_is_no_text_is_refused(texts, message):
    with pytest.raises(TypeError, match=message):
        rustbpe.train(texts, 10)


def test_no_threads_is_refused():
    with pytest.raises(ValueError, match="threads is 0"):
        rustbpe.train(["text"], 10, threads=0)


def outcome(code):
    """What a process of its own prints: it may well be killed by what it tries."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr[-300:]


def test_more_merges_than_memory_has_room_for():
    """A vocabulary of a billion was given its room at once, 80 GB of it: no error but the end of Python (SIGABRT)."""
    assert outcome("import rustbpe; print(rustbpe.train(['aa'], 2**31 - 1))") == "[(97, 97)]\n"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_more_threads_than_the_system_starts():
    """5,000 of them in a GB of addresses: a PanicException, which no `except Exception` catches, came out of it. Those that had started are gone, too."""
    code = """if True:
        import resource, rustbpe, threading, time
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        try:
            rustbpe.train(["text"] * 9, 10, threads=5000)
        except OSError as error:
            print(error)
        tasks, patience = Path("/proc/self/task"), time.monotonic() + 10
        while len(list(tasks.iterdir())) > 1 and time.monotonic() < patience:
            time.sleep(0.01)
        print(len(list(tasks.iterdir())), rustbpe.train(["aa"], 1, threads=2))
    """
    said = outcome(code)
    assert re.match(r"the system starts no more than \d+ of 5000 threads \(.*\): ask for fewer\n1 \[\(97, 97\)\]\n$", said), said


def test_an_error_of_the_iterator_comes_through():
    def texts():
        yield "some text " * 300_000
        raise OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        rustbpe.train(texts(), 10)


# ---------------------------------------------------------------------------------------------------------------------
# Manners: progress, Ctrl-C, the GIL, memory

def test_progress_tells_both_stages():
    calls = []
    texts = stdlib_texts(400_000)
    rustbpe.train(texts, 300, progress=lambda *call: calls.append(call))
    size = sum(len(text.encode()) for text in texts)
    assert ("count", size, size) in calls and calls[-1] == ("merge", 300, 300)
    for stage in ("count", "merge"):
        done = [call[1] for call in calls if call[0] == stage]
        assert done == sorted(done)


def test_an_error_of_progress_comes_through():
    def progress(stage, done, total):
        raise RuntimeError(f"no more after {stage}")
    with pytest.raises(RuntimeError, match="no more after count"):
        rustbpe.train(["text"], 10, progress=progress)


INTERRUPTED = {
    # repeat() runs no Python code, so nobody but rustbpe can notice the signal
    "count": "texts = itertools.repeat('a few words over and over ' * 1000); merges = 10",
    "merge": "texts = [''.join(random.choices('abcdefghijklmnopqrstuvwxyz', k=3_000_000))]; merges = 2_000_000",
}


@pytest.mark.parametrize("stage", INTERRUPTED)
def test_ctrl_c_interrupts(stage):
    code = f"""if True:
        import itertools, random, rustbpe
        def progress(stage, done, total):
            if stage == {stage!r} and total != done: print("in it", flush=True)
        {INTERRUPTED[stage]}
        try:
            rustbpe.train(texts, merges, threads=2, progress=progress)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in it\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and out.endswith("interrupted\n")


def test_others_run_while_it_works():
    """A thread that only wants the GIL for a moment now and then gets it during the merges, which hold none."""
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.wait(0.002):
            ticks.append(time.perf_counter())

    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=600_000))
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    rustbpe.train([text], 20_000, threads=1)
    end = time.perf_counter()
    stop.set()
    thread.join()
    gaps = [b - a for a, b in zip([start, *ticks], [*ticks, end]) if a >= start]
    assert max(gaps) < 0.5 * (end - start), "somebody had to wait for most of the training"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_stream():
    """64 MB in texts of 64 KB, drawn from a generator that makes each anew: only distinct pieces and a few batches stay."""
    code = """if True:
        import rustbpe
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
        rustbpe.split_text("x")
        before = peak()
        rustbpe.train((("word%d some more words in a line\\n" % (i % 50)) * 2048 for i in range(1000)), 50, threads=2)
        print(peak() - before)
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 24, f"64 MB of text raised the peak by {float(out):.0f} MB"
