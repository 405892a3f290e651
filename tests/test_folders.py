"""Laws of a folder of text: nothing in it is missed in silence, links come to an end, a name may be any bytes, an edit is noticed."""

import os
import random
import shutil
import sys

import pytest

from nanochat import folders
from nanochat.common import UserError
from nanochat.dataset import main, open_source
from nanochat.folders import find_text, fingerprint, kind
from tests.test_dataset import lines, parquet, texts


def both(folder):
    """The documents of both splits, sorted."""
    return sorted(text for split in ("train", "val") for text in texts(open_source(f"dir:{folder}", split)))


def fill(folder, **files):
    """fill(folder, a_txt="text"): a.txt holds text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Links, suffixes, what is left out

def test_links_are_followed_and_circles_end(tmp_path):
    """
    Text kept on another disk and linked to was missed without a word. With links followed, one that leads back up must not go round
    for ever, and a folder with two ways to it must not be read twice.
    """
    fill(tmp_path / "far" / "deep", c_txt="c", d_txt="d")
    home = fill(tmp_path / "home", a_txt="a")
    fill(home / "sub", b_txt="b")
    (home / "A_link").symlink_to(home / "sub") # comes first by name, but is not what the folder is called
    (home / "far").symlink_to(tmp_path / "far")
    (home / "up").symlink_to(home)
    (home / "sub" / "up").symlink_to("..")
    (tmp_path / "far" / "home").symlink_to(home)
    (home / "single.txt").symlink_to(tmp_path / "far" / "deep" / "c.txt") # a file that is linked to is a file
    folder = find_text(home)
    assert list(folder.sizes) == ["a.txt", "far/deep/c.txt", "far/deep/d.txt", "single.txt", "sub/b.txt"] and folder.notes == []
    assert both(home) == ["a", "b", "c", "c", "d"]


def test_what_is_left_out_is_told(tmp_path, monkeypatch, capsys):
    """.json, .jsonl.gz, dead links and closed folders were left out in silence: half of the text could be missing."""
    home = fill(tmp_path / "home", a_txt="some text\n" * 9, b_md="more text\n" * 9, c_json="{}", d_json="{}", e_jsonl_gz="", f_PDF="", Makefile="", g_txt="")
    (home / "dead.txt").symlink_to(home / "nowhere.txt")
    (home / "itself.txt").symlink_to("itself.txt")
    fill(home / "closed", x_txt="x")
    scandir = os.scandir
    def refuse(path):
        if str(path).endswith("closed"): # chmod stops nobody who runs the tests as root
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    told = ["left out: 5 files of other kinds (.json 2, .jsonl.gz 1, .pdf 1, no suffix 1)", "left out: 1 empty file (g.txt)",
            "left out: 2 dead links (dead.txt, itself.txt)", "left out: 1 unreadable folder (closed)"]
    assert find_text(home).notes == told
    monkeypatch.setattr(sys, "argv", ["dataset", "--check", f"dir:{home}"])
    main()
    out = capsys.readouterr().out
    assert all(out.count(line) == 1 for line in told), "once, not for each split"
    (home / "a.txt").unlink()
    (home / "b.md").unlink()
    with pytest.raises(UserError, match=r"holds no text.*left out: 5 files of other kinds"):
        open_source(f"dir:{home}")


def test_beside_shards_nothing_is_text_and_that_is_told(tmp_path):
    for i in range(3):
        parquet(tmp_path / f"shard_{i:05d}.parquet", [f"{i}"])
    fill(tmp_path / "more", a_txt="not read", b_txt="not read")
    assert find_text(tmp_path).notes == ["left out: 2 files beside the shards (.txt 2)"] and both(tmp_path) == ["0", "1", "2"]


def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path):
    fill(tmp_path, A_TXT="a", B_Md="b")
    lines(tmp_path / "C.JSONL", ["c0", "c1"])
    parquet(tmp_path / "D.Parquet", ["d0", "d1"])
    assert both(tmp_path) == ["a", "b", "c0", "c1", "d0", "d1"] and find_text(tmp_path).notes == []
    alone = tmp_path / "alone"
    alone.mkdir()
    lines(alone / "C.JSONL", ["c0", "c1"])
    assert both(alone) == ["c0", "c1"], "split between its lines, not cut like a text"


def test_kinds_by_hand():
    assert [kind(name) for name in ("a.json", "x/B.JSONL.GZ", "c.tar.xz", "notes", "v1.2/readme")] == [".json", ".jsonl.gz", ".tar.xz", "no suffix", "no suffix"]


# ---------------------------------------------------------------------------------------------------------------------
# Names

@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_name_may_be_any_bytes(tmp_path, suffix):
    """caf\\xe9.txt, of an old disk: its name is no UTF-8, and hashing it ended in a UnicodeEncodeError."""
    for i in range(3):
        path = tmp_path / f"{i}.{suffix}"
        {"txt": lambda path, rows: path.write_text(rows[0]), "jsonl": lines, "parquet": parquet}[suffix](path, [f"{i}"])
        os.rename(path, os.fsencode(tmp_path) + b"/caf\xe9%d.%s" % (i, suffix.encode()))
    assert both(tmp_path) == ["0", "1", "2"]
    os.symlink("nowhere", os.fsencode(tmp_path) + b"/caf\xe9.md")
    assert find_text(tmp_path).notes == ["left out: 1 dead link (caf\ufffd.md)"]


# ---------------------------------------------------------------------------------------------------------------------
# Splits

def test_a_file_without_bytes_is_no_document(tmp_path):
    """
    Twelve modules and an empty sub102/__init__.py, whose name hashes lowest: it was all of validation, and a run of hours ended in
    "no target stands for any byte", at every --resume anew.
    """
    names = [f"module{i}.py" for i in range(12)]
    assert min([*names, "sub102/__init__.py"], key=folders.name_hash) == "sub102/__init__.py"
    for name in names:
        (tmp_path / name).write_text(f"x = '{name}'\n" * 20)
    (tmp_path / "sub102").mkdir()
    (tmp_path / "sub102" / "__init__.py").touch()
    val = open_source(f"dir:{tmp_path}", "val")
    assert all(text.startswith("x = ") for text in texts(val))
    assert val.notes == ["left out: 1 empty file (sub102/__init__.py)"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_text_is_told_at_once(tmp_path, monkeypatch, split):
    """Rows may be empty though their file is not. `--check` printed "0 characters" and ended as if all were well."""
    names = ["a.jsonl", "b.jsonl"]
    (empty,) = folders.split_names(names, split)
    for name in names:
        lines(tmp_path / name, ["", "", ""] if name == empty else ["text", "", "more"])
    other = "val" if split == "train" else "train"
    assert texts(open_source(f"dir:{tmp_path}", other)) == ["text", "", "more"]
    with pytest.raises(UserError, match=rf"no text in its {split} split \({empty}\)"):
        open_source(f"dir:{tmp_path}", split)
    monkeypatch.setattr(sys, "argv", ["dataset", "--check", f"dir:{tmp_path}"])
    with pytest.raises(UserError, match="no text"):
        main()


def test_a_lopsided_split_is_told(tmp_path, capsys, monkeypatch):
    """A file of a megabyte and one of two bytes were split as 1,000,000 and 2 characters without a word."""
    (small,) = folders.split_names(["a.txt", "b.txt"], "val")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x\n" if name == small else "line\n" * 200_000)
    monkeypatch.setattr(sys, "argv", ["dataset", "--check", f"dir:{tmp_path}"])
    main()
    assert "validation is 2 of 1,000,002 bytes, 0.0% where some 5% are usual" in capsys.readouterr().out
    (tmp_path / small).write_text("line\n" * 20_000)
    assert open_source(f"dir:{tmp_path}").notes == [], "9% is near enough"


def test_a_shard_without_bytes_is_broken_not_empty(tmp_path):
    """What a copy that was interrupted leaves: leaving it out in silence would be to train on a part."""
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"[ab].parquet cannot be read as parquet"):
        open_source(f"dir:{tmp_path}")


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints

def test_an_edit_of_the_same_size_changes_the_fingerprint(tmp_path):
    """It was made of names and sizes: a corrected word of the same length let a run resume as if nothing had changed."""
    fill(tmp_path, a_txt="the cat sat\n" * 50, b_txt="on the mat\n" * 50)
    before = open_source(f"dir:{tmp_path}", "train").fingerprint, open_source(f"dir:{tmp_path}", "val").fingerprint
    for name in ("a.txt", "b.txt"):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(text[:300] + "#" + text[301:])
    after = open_source(f"dir:{tmp_path}", "train").fingerprint, open_source(f"dir:{tmp_path}", "val").fingerprint
    assert before[0] != after[0] and before[1] != after[1]


@pytest.mark.parametrize("seed", range(40))
def test_fingerprints(tmp_path, seed):
    """Moved, copied and touched it stays; any byte in PROBE bytes of an end, a name or a size changes it."""
    rng = random.Random(seed)
    home, size = tmp_path / "home", rng.choice([1, 100, folders.PROBE - 1, folders.PROBE, folders.PROBE + 1, 2 * folders.PROBE, 3 * folders.PROBE])
    fill(home, a_txt="other")
    data = bytearray(rng.randbytes(size))
    (home / "b.txt").write_bytes(data)
    names = ["a.txt", "b.txt"]
    before = fingerprint("train", home, names)
    shutil.copytree(home, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "b.txt", (1, 1))
    assert fingerprint("train", tmp_path / "copy", names) == before
    at = rng.choice([rng.randrange(min(size, folders.PROBE)), size - 1 - rng.randrange(min(size, folders.PROBE))])
    data[at] ^= 1
    (home / "b.txt").write_bytes(data)
    data[at] ^= 1
    (tmp_path / "copy" / "b.txt").write_bytes(data + b"x")
    (home / "c.txt").write_bytes(data)
    found = [before, fingerprint("train", home, names), fingerprint("train", tmp_path / "copy", names), fingerprint("train", home, ["a.txt", "c.txt"]),
             fingerprint("val", home, ["a.txt", "c.txt"]), fingerprint("train", home, names[:1])]
    assert len(set(found)) == len(found)
