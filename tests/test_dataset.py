"""Laws of the sources: the splits part the files, order never changes, slices lose nothing, bad input is named."""

import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st

from nanochat import dataset, documents
from nanochat.common import UserError
from nanochat.dataset import Mix, Sample, Source, data_dir, main, notes, open_source, parse_spec, use_data_dir
from nanochat.documents import BigText, JsonLines, ParquetFile, TextFile, slices
from nanochat.folders import name_hash, split_names

SHARED = os.environ.get("NANOCHAT_SHARED_DATA", os.path.join(os.path.dirname(__file__), "..", "..", "shared", "data"))


def texts(source):
    return list(source.documents())


def parquet(path, rows, group=1000, name="text"):
    pq.write_table(pa.table({name: pa.array(rows, pa.string())}), path, row_group_size=group)


def lines(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# Slices

def check_slices(document, whole):
    """The slices tile the document, none is too long, and any of their starts is a place to go on from."""
    found = list(slices(document))
    assert "".join(text for _, _, text in found) == whole
    assert all(0 < len(text) <= documents.SLICE for _, _, text in found)
    at = 0
    for start, after, _ in found:
        assert start == at
        at = after
    assert at == len(document)
    for i, (start, _, _) in enumerate(found):
        assert list(slices(document, start)) == found[i:]
    return [text for _, _, text in found]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \n\t.é漢😀"), max_size=400), st.integers(4, 40), st.integers(4, 9))
def test_slices_of_a_str_and_of_a_file_are_the_same(tmp_path_factory, text, size, read):
    """`read` is how much comes from disk at a time: it must not show, whichever characters it cuts in two."""
    path = tmp_path_factory.mktemp("slices") / "text.txt"
    path.write_bytes(b"junk" + text.encode() + b"junk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", size)
        patch.setattr(documents, "READ", read)
        big = BigText(path, 4, 4 + len(text.encode()))
        assert check_slices(text, text) == check_slices(big, text)


def test_slices_end_at_a_line_end_then_at_a_lone_space_then_anywhere(monkeypatch):
    monkeypatch.setattr(documents, "SLICE", 10)
    def cut(text):
        return [piece for _, _, piece in slices(text)]
    assert cut("one\ntwo\n\nthree four") == ["one\ntwo\n\n", "three four"]  # not between the two line ends
    assert cut("aaaa bbb  cccc") == ["aaaa bbb  ", "cccc"]  # two spaces are no border: the second belongs to the word
    assert cut("abcdef\ng\n  xyz") == ["abcdef\n", "g\n  xyz"]  # the later line end has more space after it
    assert cut("aaaaa bbbbbb") == ["aaaaa", " bbbbbb"]
    assert cut("a" * 25) == ["a" * 10, "a" * 10, "a" * 5]
    assert cut("") == []


def test_slices_give_the_tokens_of_the_whole_text(monkeypatch):
    """The split pattern has a border wherever we cut, so a giant document is tokenized as if it were one text."""
    import tiktoken
    from nanochat.tokenizer import PATTERN
    words = [bytes([i]) for i in range(256)] + [b"th", b"the", b"    ", b"  ", b"\n\n", b" a", b"er", b"in", b"self", b"re"]
    encoding = tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks={w: i for i, w in enumerate(words)}, special_tokens={})
    source, compared = open_source("stdlib", "val"), 0
    for size in (200, 1000):
        monkeypatch.setattr(documents, "SLICE", size)
        for i in range(0, len(source), 5):
            text = source[i][:20_000]
            pieces = [piece for _, _, piece in slices(text)]
            if any(len(piece) == size for piece in pieces[:-1]):
                continue # it may hold half a slice without a border: tables of data in code do
            assert [token for piece in pieces for token in encoding.encode_ordinary(piece)] == encoding.encode_ordinary(text)
            compared += len(pieces) - 1
    assert compared > 100


# ---------------------------------------------------------------------------------------------------------------------
# Splits and orders

def test_stdlib_splits_part_the_files_and_stay():
    train, val = open_source("stdlib", "train"), open_source("stdlib", "val")
    names = [{str(file.path) for file in source.files} for source in (train, val)]
    assert not names[0] & names[1]
    assert 0.02 < len(names[1]) / (len(names[0]) + len(names[1])) < 0.1
    assert not any("site-packages" in name for name in names[0] | names[1])
    assert max(len(val[i]) for i in range(len(val))) > 50_000, "validation needs long documents"
    assert open_source("stdlib", "val").fingerprint == val.fingerprint != train.fingerprint
    assert texts(val) == texts(val) == [val[i] for i in range(len(val))]
    order = [file.path for file in train.files]
    assert order != sorted(order), "neighbours in a folder are alike: they should not be neighbours in training"


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text("abc./", min_size=1, max_size=6), min_size=2, max_size=60))
def test_split_names_parts_them_and_leaves_none_empty(names):
    train, val = (split_names(sorted(names), split) for split in ("train", "val"))
    assert train and val and sorted(train + val) == sorted(names)
    if len(names) > 20:
        assert len(val) <= len(names) // 2
    more = split_names(sorted(names | {"new"}), "train")
    low = [name for name in names if name_hash(name) >= 0.05]
    assert set(more) >= set(low) - {min(names, key=name_hash)}, "a new file must not move the others to val"


def test_even_if_all_names_hash_low_there_is_training_text():
    low = [f"n{i}" for i in range(1000) if name_hash(f"n{i}") < dataset.VAL_SHARE]
    assert len(low) > 10 and len(split_names(low, "train")) == 1 and len(split_names(low[:2], "val")) == 1


def test_shards_have_their_last_by_name_as_val(tmp_path):
    for i in (3, 0, 7):
        parquet(tmp_path / f"shard_{i:05d}.parquet", [f"{i}.{row}" for row in range(5)], group=2)
    (tmp_path / "README.md").write_text("not training text")
    assert texts(open_source(f"dir:{tmp_path}")) == [f"{i}.{row}" for i in (0, 3) for row in range(5)]
    assert texts(open_source(f"dir:{tmp_path}", "val")) == [f"7.{row}" for row in range(5)]


def test_a_folder_of_many_kinds(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "b.md").write_text("b")
    (tmp_path / "deep" / "er" / "c.py").write_text("c")
    lines(tmp_path / "d.jsonl", ["d0", "d1"])
    parquet(tmp_path / "deep" / "e.parquet", ["e0", "e1", "e2"])
    (tmp_path / "picture.png").write_bytes(b"\x89")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git" / "x.txt").write_text("no")
    both = [texts(open_source(f"dir:{tmp_path}", split)) for split in ("train", "val")]
    assert sorted(both[0] + both[1]) == ["a", "b", "c", "d0", "d1", "e0", "e1", "e2"]
    assert all(both)


@pytest.mark.parametrize("count", [2, 10, 19, 20, 200])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_file_of_rows_gives_its_last_documents(tmp_path, count, kind):
    rows = [f"row {i}" for i in range(count)]
    (lines if kind == "jsonl" else parquet)(tmp_path / f"a.{kind}", rows)
    train, val = (texts(open_source(f"dir:{tmp_path}", split)) for split in ("train", "val"))
    assert train + val == rows and len(val) == max(1, round(count / 20))


@pytest.mark.parametrize("text", ["".join(f"line {i} é\n" for i in range(1000)), "a\nb", "x" * 1000 + "\ny", "y\n" + "x" * 1000,
                                  "x\n" * 50 + "z" * 100])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_document_gives_its_last_lines(tmp_path, kind, text):
    write = {"txt": lambda path, rows: path.write_text(rows[0]), "jsonl": lines, "parquet": parquet}[kind]
    write(tmp_path / f"a.{kind}", [text])
    train, val = (texts(open_source(f"dir:{tmp_path}", split)) for split in ("train", "val"))
    assert len(train) == len(val) == 1 and train[0] + val[0] == text
    assert train[0].endswith("\n") and val[0]
    if len(text.split("\n")) > 500:
        assert 0.04 < len(val[0]) / len(text) < 0.05


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_one_line_cannot_be_split(tmp_path, kind):
    write = {"txt": lambda path, rows: path.write_text(rows[0]), "jsonl": lines, "parquet": parquet}[kind]
    write(tmp_path / f"a.{kind}", ["one line"])
    with pytest.raises(UserError, match="single line"):
        texts(open_source(f"dir:{tmp_path}"))


def test_a_big_file_is_one_document_that_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BIG", 1000)
    monkeypatch.setattr(documents, "SLICE", 300)
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "big.txt").write_text(text)
    train, val = (open_source(f"dir:{tmp_path}", split) for split in ("train", "val"))
    assert isinstance(train[0], BigText) and len(train) == 1
    assert "".join(texts(train)) + "".join(texts(val)) == text


# ---------------------------------------------------------------------------------------------------------------------
# Parquet and JSON lines by number

@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=5) | st.none(), max_size=30), st.integers(1, 7))
def test_rows_are_found_whatever_the_row_groups(tmp_path_factory, rows, group):
    path = tmp_path_factory.mktemp("rows") / "a.parquet"
    parquet(path, rows, group)
    file = ParquetFile(path)
    assert len(file) == len(rows)
    assert [file[i] for i in reversed(range(len(rows)))] == [row or "" for row in reversed(rows)]


def test_row_groups_are_decoded_once_and_memory_is_bounded(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet", ["x" * 1000] * 100, group=10)
    cache = documents.RowGroups(limit=25_000)
    monkeypatch.setattr(documents, "row_groups", cache)
    file, reads = ParquetFile(tmp_path / "a.parquet"), []
    read = file._read
    file._read = lambda group: reads.append(group) or read(group)
    for start in range(0, 100, 4): # four readers near each other
        for i in range(start, start + 4):
            file[i]
    assert reads == list(range(10))
    assert 0 < sum(group.nbytes for group in cache.groups.values()) <= 25_000


@pytest.mark.parametrize("damage", ["cut", "scrambled", "text", "column", "type"])
def test_a_broken_parquet_file_is_named(tmp_path, damage):
    good, bad = tmp_path / "shard_00000.parquet", tmp_path / "shard_00001.parquet"
    for path in (good, bad, tmp_path / "shard_00002.parquet"):
        parquet(path, ["some text " * 10 + str(i) for i in range(1000)])
    data = bad.read_bytes()
    if damage == "cut":
        bad.write_bytes(data[:len(data) // 2])
    elif damage == "scrambled": # the footer is sound, the data is not
        bad.write_bytes(data[:4] + b"\xff" * (len(data) // 4) + data[4 + len(data) // 4:])
    elif damage == "text":
        bad.write_text("<html>404</html>")
    elif damage == "column":
        parquet(bad, ["x"], name="content")
    else:
        pq.write_table(pa.table({"text": [1, 2]}), bad)
    with pytest.raises(UserError, match="shard_00001.parquet"):
        texts(open_source(f"dir:{tmp_path}"))


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    column = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    file = ParquetFile(tmp_path / "a.parquet")
    assert file[0] == "fine"
    with pytest.raises(UserError, match="a.parquet, row 1: not UTF-8"):
        file[1]


@pytest.mark.parametrize("line, words", [
    (b"{broken", "line 3: expected a JSON object"), (b"[1]", "line 3: expected an object with a field `text`, got a list"),
    (b'{"content": "x"}', r"line 3.*fields \['content'\]"), (b'{"text": 5}', "line 3.*got a int"),
    (b'{"text": "\xff"}', "line 3: not UTF-8"), (b'{"text": "\\ud800"}', "line 3.*surrogate"),
    pytest.param(b"[" * 200_000, "line 3: expected a JSON object.*recursion", id="deep"), # json gives up with a RecursionError
    pytest.param(b'{"text": "x", "more": ' + b'{"a":' * 100_000, "line 3: expected a JSON object", id="deeper")])
def test_a_bad_line_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": null}\n{"text": "\xc3\xa9"}')
    file = JsonLines(path)
    assert len(file) == 4 and file[0] == "one" and file[2] == "" and file[3] == "é"
    with pytest.raises(UserError, match=words):
        file[1]


@pytest.mark.parametrize("big", [False, True])
def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path, monkeypatch, big):
    if big:
        monkeypatch.setattr(documents, "BIG", 10)
        monkeypatch.setattr(documents, "READ", 7)
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode() * 100 + "é".encode("latin-1") + b"abc" * 10)
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 text \(byte 200\)"):
        list(slices(TextFile(path)[0]))
    path.write_bytes(b"x" * 30 + "é".encode()[:1]) # ends within a character
    with pytest.raises(UserError, match=r"byte 30\)"):
        list(slices(TextFile(path)[0]))


@pytest.mark.parametrize("kind, big", [("txt", False), ("txt", True), ("jsonl", False), ("parquet", False)])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, kind, big):
    """
    Some editors begin a file with U+FEFF. A .txt was learnt from with it, a .jsonl was refused for it. It is part of no text, but
    one inside a text is what somebody wrote.
    """
    if big:
        monkeypatch.setattr(documents, "BIG", 10)
    text, path = "one\n\ufefftwo\n" + "three\n" * 40, tmp_path / f"a.{kind}"
    write = {"txt": lambda path, rows: path.write_text(rows[0]), "jsonl": lines, "parquet": parquet}[kind]
    write(path, [text])
    clean = [texts(open_source(f"dir:{tmp_path}", split)) for split in ("train", "val")]
    if kind != "parquet": # which has its own beginning
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = [texts(open_source(f"dir:{tmp_path}", split)) for split in ("train", "val")]
    assert marked == clean and "".join(marked[0] + marked[1]) == text
    assert isinstance(documents.open_file(path)[0], BigText if big else str)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("some text")
    source = open_source(f"dir:{tmp_path}")
    for i in range(3):
        (tmp_path / f"{i}.txt").unlink()
    with pytest.raises(UserError, match=r"\d.txt cannot be opened \(No such file"):
        texts(source)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \n.é"), max_size=100), st.integers(0, 110), st.none() | st.integers(0, 110))
def test_an_excerpt_is_those_characters(tmp_path_factory, text, start, stop):
    path = tmp_path_factory.mktemp("excerpt") / "text.txt"
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", 12)
        parts = list(documents.excerpt(BigText(path, 0, len(text.encode())), start, stop))
        assert all(parts) and "".join(parts) == text[start:stop] == "".join(documents.excerpt(text, start, stop))


# ---------------------------------------------------------------------------------------------------------------------
# Samples

@pytest.mark.parametrize("big", [False, True])
def test_a_sample_of_one_book_is_the_book(tmp_path, monkeypatch, big):
    """A cap of 10,000 characters a document left that much of a whole book, and the tokenizer's training asked for more text."""
    if big:
        monkeypatch.setattr(documents, "BIG", 1000)
        monkeypatch.setattr(documents, "SLICE", 3000)
    text = "".join(f"line {i} of a book\n" for i in range(5000))
    (tmp_path / "book.txt").write_text(text)
    source = open_source(f"dir:{tmp_path}")
    whole = "".join(texts(source))
    for max_chars, doc_cap, size in ((None, None, len(whole)), (10**9, None, len(whole)), (50_001, None, 50_001), (10**9, 5001, 5001), (300, 5001, 300)):
        sample = Sample(source, max_chars, doc_cap)
        assert "".join(sample) == whole[:size] and (sample.documents, sample.chars) == (1, size), "slices of a document are one document"


def test_a_sample_by_hand(monkeypatch):
    """
    Of 4 documents and 60 characters each may give 15. The short ones have but 3, so 36 are taken: a second round brings up to 15 more of
    each, which is 1 and 15, and a third up to 30 more, of which 8 are still wanted.
    """
    monkeypatch.setattr(dataset, "FAIR", 5)
    source = Source("by hand", [["A" * 16], ["bbb", "ccc"], ["D" * 99]], "")
    sample = Sample(source, 60)
    assert list(sample) == ["A" * 15, "bbb", "ccc", "D" * 15, "A", "D" * 15, "D" * 8] and (sample.documents, sample.chars) == (4, 60)
    assert list(Sample(source, 12)) == ["A" * 5, "bbb", "ccc", "D"], "5 are fair, though a quarter of 12 is less"
    assert list(Sample(source, 40, doc_cap=4)) == ["A" * 4, "bbb", "ccc", "D" * 4], "a cap is a cap"
    assert "".join(Sample(source)) == "".join(source.documents())
    assert sorted("".join(Sample(source, 999))) == sorted("".join(source.documents())), "and there it ends"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 400), st.integers(1, 30))
def test_a_sample_takes_all_it_may_and_from_everyone(sizes, most, fair):
    source = Source("sizes", [[chr(65 + i) * size for i, size in enumerate(sizes)]], "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "FAIR", fair)
        sample = Sample(source, most)
        taken = "".join(sample)
    assert len(taken) == sample.chars == min(most, sum(sizes)), "never less than is there"
    given = [taken.count(chr(65 + i)) for i in range(len(sizes))]
    share = max(fair, most // len(sizes))
    while most >= sum(min(size, share) for size in sizes) and share < max(sizes):
        share *= 2
    assert max(given) <= share, "nobody gives more than the round allows in which it ends"
    assert all(got >= min(size, share // 2) for got, size in zip(given, sizes)) or share == max(fair, most // len(sizes)), "and the one before it is complete"


def test_a_sample_of_a_mix_keeps_the_weights(tmp_path):
    """A few books at 0.7 beside many short files: with one share for all documents the books gave a tenth of the text."""
    for name, count, size in (("books", 3, 40_000), ("notes", 400, 100)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.txt").write_text(name[0] * size)
    mix = open_source(f"dir:{tmp_path}/books:0.7,dir:{tmp_path}/notes:0.3")
    taken = "".join(Sample(mix, 60_000))
    assert abs(taken.count("b") - 42_000) <= 100 and len(taken) == 60_000
    assert [note.count("validation is") for note in notes(mix)] == [1], "both parts are asked; three books of one size are split as one and two"


# ---------------------------------------------------------------------------------------------------------------------
# Specs, mixes, folders

def test_specs():
    assert parse_spec("stdlib") == [("stdlib", 1.0)]
    assert parse_spec("dir:books:0.7, stdlib:0.3") == [("dir:books", 0.7), ("stdlib", 0.3)]
    assert parse_spec("dir:/a:b/c") == [("dir:/a:b/c", 1.0)]
    assert parse_spec("dir:x:2,climbmix") == [("dir:x", 2.0), ("climbmix", 1.0)]
    for bad in ("", "books", "dir:", "stdlib:0", "stdlib:-1", "dir:a:nan", "dir:a:inf", "stdlib,", "stdlib:0.5:0.5"):
        with pytest.raises(UserError):
            parse_spec(bad)
    with pytest.raises(UserError, match="no split"):
        open_source("stdlib", "test")


def test_a_mix_keeps_its_weights_and_loses_nothing(tmp_path):
    for name, size in (("a", 1000), ("b", 10)):
        (tmp_path / name).mkdir()
        lines(tmp_path / name / "x.jsonl", [name * size] * (200 if name == "a" else 10_000))
    mix = open_source(f"dir:{tmp_path}/a:3,dir:{tmp_path}/b:1")
    assert isinstance(mix, Mix)
    found = texts(mix)
    assert len(found) == 190 + 9500 and texts(mix) == found
    given = {"a": 0, "b": 0}
    for text in found:
        given[text[0]] += len(text)
        if given["b"] < 60_000: # both still run
            assert abs(given["a"] - 3 * given["b"]) <= 3 * 1000


def test_folders_come_from_the_flag_then_the_environment_then_the_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    assert data_dir() == tmp_path / "base" / "data"
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "env"))
    assert data_dir() == tmp_path / "env"
    assert data_dir(tmp_path / "flag") == tmp_path / "flag"
    (tmp_path / "env" / "books").mkdir(parents=True)
    lines(tmp_path / "env" / "books" / "a.jsonl", ["x", "y"])
    monkeypatch.chdir(tmp_path)
    assert texts(open_source("dir:books")) == ["x"]
    with pytest.raises(UserError, match=f"no folder at {tmp_path}/nowhere nor at {tmp_path}/env/nowhere:"):
        open_source("dir:nowhere")
    (tmp_path / "books").mkdir()
    with pytest.raises(UserError, match="holds no text"): # the folder here comes first
        open_source("dir:books")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_an_empty_source_says_so(tmp_path, kind):
    path = tmp_path / f"only.{kind}"
    path.write_text("")
    with pytest.raises(UserError, match=rf"holds no text.*1 empty file \(only.{kind}\)"):
        open_source(f"dir:{tmp_path}")
    path.write_text("\n" if kind == "jsonl" else "\ufeff")
    with pytest.raises(UserError, match="no text in its train split|single line"):
        open_source(f"dir:{tmp_path}")


def test_a_folder_that_is_not_there_is_named_as_it_was_looked_for(tmp_path, monkeypatch):
    """dir:~/nope was said to be missing at <here>/~/nope; a name too long for any disk was a traceback."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"no folder at {tmp_path}/nope: expected"):
        open_source("dir:~/nope")
    for path in ("x" * 300, "/" + "x" * 300, "~nobody-of-that-name/x", str(tmp_path / "file" / "below")):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="no folder at "):
            open_source(f"dir:{path}")
    (tmp_path / "home").mkdir()
    lines(tmp_path / "home" / "a.jsonl", ["x", "y"])
    assert texts(open_source("dir:~/home")) == ["x"]


def test_the_flag_is_the_environment(tmp_path, monkeypatch):
    """Tasks and mixtures look where NANOCHAT_DATA_DIR says, so that is what --data-dir sets; empty, it changes nothing."""
    monkeypatch.setenv("NANOCHAT_DATA_DIR", "as it was")
    use_data_dir("")
    assert os.environ["NANOCHAT_DATA_DIR"] == "as it was"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "books").mkdir(parents=True)
    lines(tmp_path / "texts" / "books" / "a.jsonl", ["x", "y"])
    use_data_dir("texts")
    monkeypatch.chdir("/")
    assert texts(open_source("dir:books")) == ["x"] and os.environ["NANOCHAT_DATA_DIR"] == str(tmp_path / "texts")


def test_climbmix_needs_its_last_shard(tmp_path):
    (tmp_path / "climbmix").mkdir()
    parquet(tmp_path / "climbmix" / "shard_00000.parquet", ["a"])
    with pytest.raises(UserError, match="shard_06542.parquet.*nanochat.dataset -n 8"):
        open_source("climbmix", data=tmp_path)
    parquet(tmp_path / "climbmix" / "shard_06542.parquet", ["z"])
    assert texts(open_source("climbmix", "train", tmp_path)) == ["a"]
    assert texts(open_source("climbmix", "val", tmp_path)) == ["z"]


def test_check_reads_everything(tmp_path, monkeypatch, capsys):
    lines(tmp_path / "a.jsonl", ["long text", "", "x"])
    monkeypatch.setattr(sys, "argv", ["dataset", "--check", f"dir:{tmp_path}"])
    main()
    out = capsys.readouterr().out
    assert "(train): 2 documents, 1 of them empty; 9 characters, 9 in the longest" in out
    assert "(val): 1 documents" in out
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match="line 4"):
        main()
    monkeypatch.setattr(sys, "argv", ["dataset"])
    with pytest.raises(UserError, match="nothing to do"):
        main()


@pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, "books")), reason="no books in NANOCHAT_SHARED_DATA")
def test_real_books():
    train, val = (open_source(f"dir:{SHARED}/books", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (72, 6)
    assert max(len(val[i]) for i in range(6)) > 1_000_000
    assert dataset.SPLITS == ("train", "val")
