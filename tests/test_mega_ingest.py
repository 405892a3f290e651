"""Files into a memory, gists written again by another model, and the accounts: what a kill leaves is gone on with, bit by bit."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

import megacontext.ingest as ingest_file
import scripts.mega_ingest as script
from megacontext.column import CHUNK, row_bytes
from megacontext.ingest import catch_up, ingest
from megacontext.tree import MegaTree, make_header
from nanochat.common import UserError
from scripts.load import load_stage, open_stream
from tests import tiny_run
from tests.tiny import VOCAB, tiny_networks
from tests.tiny_run import make_run, make_text, tiny_tokenizer


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mega_ingest", *map(str, arguments), "--device", "cpu"])
    script.main()
    return capsys.readouterr().out


def contents(folder):
    """Everything that counts in a tree on disk: header, ids, and the bytes of every gist."""
    with MegaTree.open(folder, mode="r") as tree:
        tree.verify()
        return [tree.header, tree.tokens(0, tree.length).tolist()] + [tree._read(level, "gists", 0, tree.count(level)).tobytes() for level in range(1, tree.levels)]


# ----------------------------------------------------------------------------------------------------------------------
# Gists by another model

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_killed_before_any_write_of_a_renewal_it_ends_as_a_fresh_ingest(tmp_path, monkeypatch, dtype):
    """2,500 tokens in stretches of 256, two levels. A copy of the folder before each write of gists is what a kill there leaves."""
    monkeypatch.setattr(ingest_file, "NODES_AT_ONCE", 8)
    ids = torch.randint(VOCAB, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    old, new = tiny_networks(seed=1)[:2], tiny_networks(seed=2)[:2]
    for name, networks in (("fresh", new), ("t", old)):
        with MegaTree.create(tmp_path / name, make_header(32, 0, dtype, model=name)) as tree:
            ingest(*networks, tree, ids)
    append, copies, done = MegaTree.append_gists, [], []

    def killed_here(tree, level, gists):
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(tmp_path / "t", copies[-1])
        append(tree, level, gists)

    with MegaTree.open(tmp_path / "t") as tree:
        tree.reset_gists(model="fresh")
        with monkeypatch.context() as patch:
            patch.setattr(MegaTree, "append_gists", killed_here)
            catch_up(*new, tree, done.append)
    expected = contents(tmp_path / "fresh")
    assert len(copies) == 12 and done == [*range(256, 2500, 256), 78 * 32] and len(expected) == 4
    left = []
    for copy in copies:
        with MegaTree.open(copy, model="fresh") as tree:
            left.append(tree.pending(1))
            assert not tree.whole
            catch_up(*new, tree)
            assert tree.whole
        assert contents(copy) == expected
    assert contents(tmp_path / "t") == expected
    assert sorted(set(left)) == [(count, 78) for count in range(0, 78, 8)], "every stretch that was done is kept"


class Killed(BaseException):
    """Nobody catches it, like a signal; the tree is let go of without a commit."""


class Bar:
    """A progress bar that dies when it is told of its second step."""

    def __init__(self, **settings):
        self.n, self.told = settings.get("initial", 0), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n):
        self.n, self.told = self.n + n, self.told + 1
        if self.told == 2:
            raise Killed


@pytest.mark.parametrize("width, go_on", [(32, ["--renew"]), (32, ["text"]), (48, ["--renew"])])
def test_a_memory_goes_to_another_model_and_a_kill_half_way_is_gone_on_with(base, tmp_path, monkeypatch, capsys, width, go_on):
    """By the same command or a plain ingest, and to a model of another size too. A saved session keeps its budget; what it had read is read again."""
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text", files=85)
    make_run("sft", seed=1)
    run(monkeypatch, capsys, "text", "--tree", "memory")
    stream = open_stream(load_stage("sft"), budget=224, tree="memory")
    stream.save("memory")
    stream.tree.close()

    make_run("sft", seed=2, width=width)
    for refused in (lambda: open_stream(load_stage("sft"), tree="memory"), lambda: run(monkeypatch, capsys, "text", "--tree", "memory")):
        with pytest.raises(UserError, match="another model wrote the gists.*--tree memory --renew --stage sft --tag t"):
            refused()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "tqdm", Bar)
        run(monkeypatch, capsys, "--tree", "memory", "--renew")
    with MegaTree.open("memory/tree", mode="r") as tree:
        assert tree.length > 3 * 8192 and tree.count(1) == 512, "two stretches of more than three were committed"
    with pytest.raises(UserError, match="not all written.*--renew"):
        open_stream(load_stage("sft"), tree="memory")
    assert "still to be written" in run(monkeypatch, capsys, "--tree", "memory", "--stat")

    out = run(monkeypatch, capsys, *go_on, "--tree", "memory")
    assert "still to be written" not in out and f"written by model {load_stage('sft').identity}" in out
    run(monkeypatch, capsys, "text", "--tree", "fresh")
    assert contents("memory/tree") == contents("fresh/tree")
    renewed, fresh = open_stream(load_stage("sft"), tree="memory"), open_stream(load_stage("sft"), budget=224, tree="fresh")
    assert renewed.budget == 224 and torch.allclose(renewed.feed([7]), fresh.feed([7]), atol=1e-5)
    renewed.tree.close()
    fresh.tree.close()
    make_run("sft", seed=1)
    with pytest.raises(UserError, match="another model"):
        run(monkeypatch, capsys, "text", "--tree", "memory")


def test_a_renewal_keeps_what_is_already_its_own(base, tmp_path, monkeypatch, capsys):
    """--renew of a memory that this model wrote does nothing, to the last byte; with another dtype it writes the gists again."""
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text", files=5)
    make_run("sft")
    run(monkeypatch, capsys, "text", "--tree", "memory")
    before = contents("memory/tree")
    with monkeypatch.context() as patch:
        patch.setattr(MegaTree, "append_gists", lambda *_: pytest.fail("gists were written"))
        run(monkeypatch, capsys, "--tree", "memory", "--renew")
    assert contents("memory/tree") == before

    with pytest.raises(UserError, match="as bfloat16, not as int8.*--renew.*--gist-dtype int8"):
        run(monkeypatch, capsys, "text", "--tree", "memory", "--gist-dtype", "int8")
    run(monkeypatch, capsys, "--tree", "memory", "--renew", "--gist-dtype", "int8")
    run(monkeypatch, capsys, "text", "--tree", "int8", "--gist-dtype", "int8")
    assert contents("memory/tree") == contents("int8/tree") != before
    assert contents("memory/tree")[0]["gist_dtype"] == "int8" and "int8" in run(monkeypatch, capsys, "--tree", "memory", "--stat")


def flip(at):
    def change(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    return change


GONE, SHORT, FIRST, LAST = lambda path: path.unlink(), lambda path: os.truncate(path, 100), flip(5), flip(-5)


def test_damaged_gists_are_made_anew_from_the_tokens(base, tmp_path, monkeypatch, capsys):
    """All tokens were there and nothing could be done: --renew did nothing where the first chunk was damaged, and where the last one was, or a file had gone, it was refused."""
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text", files=120)
    make_run("sft")
    run(monkeypatch, capsys, "text", "--tree", "whole")
    expected, tree = contents("whole/tree"), tmp_path / "memory/tree"
    assert (tmp_path / "whole/tree/level1.gists").stat().st_size > CHUNK
    for names, change in ((["level1.gists"], FIRST), (["level1.gists"], LAST), (["level2.gists"], FIRST), (["level1.gists"], SHORT), (["level2.gists"], GONE), (["level1.gists", "level2.gists"], GONE)):
        shutil.rmtree("memory", ignore_errors=True)
        shutil.copytree("whole", "memory")
        for name in names:
            change(tree / name)
        with pytest.raises(UserError, match=f"{names[0]}.* Make all gists anew from the tokens, .*: python -m scripts.mega_ingest --tree memory --renew"):
            run(monkeypatch, capsys, "--tree", "memory", "--verify")
        assert f"damaged, so made anew from the tokens: {', '.join(names)}\n" in run(monkeypatch, capsys, "--tree", "memory", "--renew")
        assert contents(tree) == expected
        assert "damaged" not in run(monkeypatch, capsys, "--tree", "memory", "--renew")


def test_damaged_tokens_are_refused_and_their_gists_are_kept(base, tmp_path, monkeypatch, capsys):
    """Nobody can guess them, so no gists are forgotten for them either, by another model's --renew as little as by their own."""
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path / "text", files=60)
    make_run("sft", seed=1)
    run(monkeypatch, capsys, "text", "--tree", "whole")
    for seed in (1, 2):
        make_run("sft", seed=seed)
        for change in (FIRST, LAST, GONE, SHORT):
            shutil.rmtree("memory", ignore_errors=True)
            shutil.copytree("whole", "memory")
            change(tmp_path / "memory/tree/level0.ids")
            FIRST(tmp_path / "memory/tree/level1.gists")
            before = {path.name: path.read_bytes() for path in (tmp_path / "memory/tree").iterdir() if path.name != "lock"}
            with pytest.raises(UserError, match="level0.ids.* Restore the tree from a copy"):
                run(monkeypatch, capsys, "--tree", "memory", "--renew")
            assert {path.name: path.read_bytes() for path in (tmp_path / "memory/tree").iterdir() if path.name != "lock"} == before


def test_another_tokenizer_is_refused_and_nothing_is_lost(base, tmp_path, monkeypatch, capsys):
    make_run("sft")
    with MegaTree.create(tmp_path / "m/tree", make_header(32, 0, model="x", tokenizer="of somebody else")) as tree:
        tree.append_tokens(range(100))
        tree.append_gists(1, np.ones((3, 32)))
    before = contents(tmp_path / "m/tree")
    with pytest.raises(UserError, match="another tokenizer"):
        run(monkeypatch, capsys, "--tree", tmp_path / "m", "--renew")
    assert contents(tmp_path / "m/tree") == before


# ----------------------------------------------------------------------------------------------------------------------
# Files and folders

def folder_of_all_kinds(root):
    """Returns the text that must be remembered, in order."""
    texts = {"b/z.txt": "last of b\n", "b/a.md": "# first of b", "a.py": "x = 1\n", "c.weird": "no known ending, yet text é\n", "empty.txt": ""}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "b/image.png").write_bytes(bytes(range(256)))
    (root / "b/dead").symlink_to("nowhere")
    (root / "b/round").symlink_to("round")
    (root / "linked").symlink_to(root / "b")
    os.mkfifo(root / "b/pipe")
    for hidden in (".git/config", "b/.secret"):
        (root / hidden).parent.mkdir(exist_ok=True)
        (root / hidden).write_text("HIDDEN")
    return [texts[name] for name in ("a.py", "b/a.md", "b/z.txt", "c.weird")]


def test_a_folder_is_all_its_text_in_order_and_the_rest_is_told(base, tmp_path, monkeypatch, capsys):
    make_run("sft")
    tokenizer, expected = tiny_tokenizer(), folder_of_all_kinds(tmp_path / "f")
    (tmp_path / "named").write_text("named first\n")
    arguments = [tmp_path / "named", tmp_path / "f", "--tree", tmp_path / "f" / "memory"] # the memory lies in the folder: not remembered itself
    for _ in range(2):
        out = run(monkeypatch, capsys, *arguments)
        assert [line.split(" (")[0].split(":")[1] for line in out.splitlines() if line.startswith("left out")] == [
            f" {tmp_path}/f/b/dead is a link to nothing", f" {tmp_path}/f/b/image.png is not UTF-8 text", f" {tmp_path}/f/b/pipe is a pipe or a device, expected a regular file",
            f" {tmp_path}/f/b/round is a link to nothing",
            f" {tmp_path}/f/latin.txt is not UTF-8 text", f" {tmp_path}/f/linked is a link to a folder"]
        assert "6 files were left out, 6 are read" in out
    assert "6 files, 5 of them already there, 1 empty" in out
    with MegaTree.open(tmp_path / "f/memory/tree", mode="r") as tree:
        ids = [tokenizer.bos] + [token for text in ["named first\n", *expected] for token in tokenizer.encode(text)]
        assert tree.tokens(0, tree.length).tolist() == ids


@pytest.mark.parametrize("make, message", [
    (lambda f: f, "no file or folder"), (lambda f: os.mkfifo(f) or f, "expected a regular file"), (lambda f: f.mkdir() or f, "no text in"), (lambda f: f.write_bytes(b"ab\xff") and f, "not UTF-8 text .byte 2")])
def test_what_cannot_be_read_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, make, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, make(tmp_path / "f"), "--tree", tmp_path / "m")


def test_an_empty_file_and_one_that_goes_away_are_told(base, tmp_path, monkeypatch, capsys):
    """The first was 'already there', the second, gone while the model was loaded, a traceback."""
    make_run("sft")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Some text. ")
    assert "1 files, 0 of them already there, 1 empty\n" in run(monkeypatch, capsys, tmp_path / "empty", "--tree", tmp_path / "m")
    for known in (0, 1):
        assert f"2 files, {known} of them already there, 1 empty\n" in run(monkeypatch, capsys, tmp_path / "text", tmp_path / "empty", "--tree", tmp_path / "m")
    load = script.load_stage
    for number, flags in enumerate([(), ("--append",)]):
        gone = tmp_path / f"gone{number}"
        gone.write_text("Some text.")
        monkeypatch.setattr(script, "load_stage", lambda *args, **settings: (gone.unlink(), load(*args, **settings))[1])
        with pytest.raises(UserError, match=f"{gone} cannot be opened .No such file"):
            run(monkeypatch, capsys, gone, "--tree", tmp_path / "m", *flags)


@pytest.mark.parametrize("arguments, message", [([], "nothing to ingest"), (["--renew"], "no memory in"), (["--stat"], "no memory in"), (["--stat", "--renew"], "command of its own"),
                                                (["--append"], "nothing to ingest"), (["--dump", "-3"], "no memory in")])
def test_a_command_that_makes_no_sense_is_told(tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, *arguments, "--tree", tmp_path / "m")


def test_many_small_files_are_one_stream(base, tmp_path, monkeypatch, capsys):
    """A commit a stretch, and not a file; and a file that has changed since is named."""
    make_text(tmp_path / "text", files=85)
    make_run("sft")
    commits, commit = [], MegaTree.commit
    monkeypatch.setattr(MegaTree, "commit", lambda tree: (commits.append(tree.length), commit(tree)))
    run(monkeypatch, capsys, tmp_path / "text", "--tree", tmp_path / "m")
    length = commits[-1]
    assert length > 3 * 8192 and sorted(set(commits)) == [*range(8192, length, 8192), length] and len(commits) < 10
    (tmp_path / "text/module_10.py").write_text("changed since")
    with pytest.raises(UserError, match="module_10.py is not what stands at token"):
        run(monkeypatch, capsys, tmp_path / "text", "--tree", tmp_path / "m")


@pytest.mark.parametrize("killed", [0, 8192])
def test_files_come_after_a_conversation(base, tmp_path, monkeypatch, capsys, killed):
    """A conversation once shut a memory to files: those behind it were 'not what stands at token 20', and nothing said what to do. Again after a kill, nothing is there twice."""
    make_run("sft")
    tokenizer, (a, b, c) = tiny_tokenizer(), (tmp_path / name for name in "abc")
    a.write_text("Where it began. ")
    b.write_text("".join(f"Line {i} of {i * i % 97}.\n" for i in range(5000)))
    c.write_text("The end. ")
    run(monkeypatch, capsys, a, "--tree", tmp_path / "m")
    stream = open_stream(load_stage("sft"), tree=tmp_path / "m")
    stream.feed([5, 6, 7])
    stream.tree.close()
    with pytest.raises(UserError, match="b is not what stands at token .* or a conversation.* --append"):
        run(monkeypatch, capsys, a, b, "--tree", tmp_path / "m")
    first = [tokenizer.bos, *tokenizer.encode(a.read_text()), 5, 6, 7]
    expected = first + [tokenizer.bos, *tokenizer.encode(b.read_text()), *tokenizer.encode(c.read_text())]
    if killed:
        with MegaTree.open(tmp_path / "m/tree") as tree:
            tree.append_tokens(expected[len(first):killed])
    for there in (0, 2):
        assert f"2 files, {there} of them already there" in run(monkeypatch, capsys, b, c, "--tree", tmp_path / "m", "--append")
        assert contents(tmp_path / "m/tree")[1] == expected
    with MegaTree.open(tmp_path / "m/tree") as tree:
        tree.append_tokens([8])
    run(monkeypatch, capsys, c, "--tree", tmp_path / "m", "--append")
    assert contents(tmp_path / "m/tree")[1] == expected + [8, tokenizer.bos, *tokenizer.encode(c.read_text())]


def test_the_checkpoint_of_a_step_writes_its_gists_again(base, tmp_path, monkeypatch, capsys):
    """Whoever talks to --step 1 was told to renew with a command that took the last step: the next --step 1 was refused again."""
    make_run("sft", seed=1)
    make_text(tmp_path / "text", files=1)
    run(monkeypatch, capsys, tmp_path / "text", "--tree", tmp_path / "m")
    step = tiny_run.STEP
    monkeypatch.setattr(tiny_run, "STEP", step + 1)
    make_run("sft", seed=2)
    run(monkeypatch, capsys, "--tree", tmp_path / "m", "--renew")
    with pytest.raises(UserError, match="another model") as refused:
        open_stream(load_stage("sft", step=step), tree=tmp_path / "m")
    run(monkeypatch, capsys, *str(refused.value).split("mega_ingest ")[1].split())
    open_stream(load_stage("sft", step=step), tree=tmp_path / "m").tree.close()


@pytest.mark.parametrize("kill", [1, 2, 3])
def test_a_killed_ingest_is_continued_by_the_same_command(base, tmp_path, monkeypatch, capsys, kill):
    """A second, large file after one that ended anywhere. Killed after some commits, the same command ends with the same tree, bit by bit."""
    make_run("sft")
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Where it began. " * 300)
    second.write_text("".join(f"Line {i} of {i * i % 97}.\n" for i in range(5000)))
    for name in ("whole", "killed"):
        run(monkeypatch, capsys, first, "--tree", tmp_path / name)
    run(monkeypatch, capsys, first, second, "--tree", tmp_path / "whole")
    commit, left = MegaTree.commit, [kill]

    def dies(tree):
        commit(tree)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MegaTree, "commit", dies)
        run(monkeypatch, capsys, first, second, "--tree", tmp_path / "killed")
    with MegaTree.open(tmp_path / "killed/tree", mode="r") as tree:
        assert tree.length == kill * 8192
    run(monkeypatch, capsys, first, second, "--tree", tmp_path / "killed")
    assert contents(tmp_path / "killed/tree") == contents(tmp_path / "whole/tree")


# ----------------------------------------------------------------------------------------------------------------------
# Looks

def test_a_dump_has_all_tokens_and_needs_no_model(base, tmp_path, monkeypatch, capsys):
    """Ten tokens were dumped as nothing, level -3 was 'nothing to ingest', and all looks wanted the very checkpoint that wrote the gists."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(base / "tokenizer")
    ids = tokenizer.encode("A few words. " * 40)
    assert len(ids) % 32
    with MegaTree.create(tmp_path / "m/tree", make_header(32, 0, model="not here", tokenizer=tokenizer.fingerprint[:16])) as tree:
        tree.append_tokens(ids)
        tree.append_gists(1, np.ones((len(ids) // 32 - 1, 32)))
    lines = run(monkeypatch, capsys, "--tree", tmp_path / "m", "--dump", 0).splitlines()
    assert "".join(eval(line.split(None, 1)[1]) for line in lines) == "A few words. " * 40 and len(lines) == len(ids) // 32 + 1
    assert run(monkeypatch, capsys, "--tree", tmp_path / "m", "--dump", 1).splitlines() == lines[:-2], "gists that are there"
    assert f"{len(ids)} tokens, gists written by model not here" in run(monkeypatch, capsys, "--tree", tmp_path / "m", "--stat")
    assert f"verified {4 * len(ids) + 64 * (len(ids) // 32 - 1):,} bytes" in run(monkeypatch, capsys, "--tree", tmp_path / "m", "--verify")
    with pytest.raises(UserError, match="no level -3: this tree has levels 0..1"):
        run(monkeypatch, capsys, "--tree", tmp_path / "m", "--dump", -3)
    with pytest.raises(UserError, match="change nothing"):
        run(monkeypatch, capsys, "--tree", tmp_path / "m", "--stat", "--gist-dtype", "int8")


def test_a_tree_of_no_model_has_its_account(tmp_path, monkeypatch, capsys):
    """`make_header(width, key_width)` names no model: --stat ended in a traceback."""
    with MegaTree.create(tmp_path / "m/tree", make_header(32, 0)) as tree:
        tree.append_tokens([1, 2, 3])
    assert "3 tokens, gists written by model unknown, kept as bfloat16\n" in run(monkeypatch, capsys, "--tree", tmp_path / "m", "--stat")


def test_who_has_seen_enough_of_a_dump_ends_it(base, tmp_path, monkeypatch):
    """`--dump 0 | head -1` ended in a traceback. Here nobody reads at all."""
    tokenizer = tiny_tokenizer()
    tokenizer.save(base / "tokenizer")
    with MegaTree.create(tmp_path / "m/tree", make_header(32, 0, tokenizer=tokenizer.fingerprint[:16])) as tree:
        tree.append_tokens(tokenizer.encode("A few words. "))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "argv", ["mega_ingest", "--tree", str(tmp_path / "m"), "--dump", "0"])
        script.main()


# ----------------------------------------------------------------------------------------------------------------------
# The accounts

@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_stat_adds_up(base, tmp_path, monkeypatch, capsys, dtype):
    gpt, *_ = make_run("sft")
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 900)
    told = run(monkeypatch, capsys, tmp_path / "a.txt", "--tree", tmp_path / "m", "--gist-dtype", dtype)
    cache = int(re.search(r"^\| a KV cache of sft/t in bf16 \| [\d,]+ \| ([\d,]+).000 \|$", told, re.M)[1].replace(",", ""))
    out = run(monkeypatch, capsys, "--tree", tmp_path / "m", "--stat")
    rows = {cells[0]: (int(cells[1].replace(",", "")), float(cells[2].replace(",", ""))) for cells in re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d.,]+) \|$", out, re.M)}
    length = int(re.search(r"^([\d,]+) tokens", out, re.M)[1].replace(",", ""))
    assert length > 1024
    assert not any(name.startswith("a KV cache") for name in rows), "no model was named, so there is none to compare with"
    ids, one, two, record, total, files, alone = rows.values()
    row = row_bytes(32, dtype)
    assert (ids[0], one[0], two[0]) == (4 * length, length // 32 * row, length // 1024 * row) and [name[:7] for name in rows][1:3] == ["level 1", "level 2"]
    assert record[0] == sum((tmp_path / "m/tree" / name).stat().st_size for name in ("tree.db", "commits")) and total[0] == ids[0] + one[0] + two[0] + record[0]
    assert files[0] == total[0] + (tmp_path / "m/tree/lock").stat().st_size == sum(path.stat().st_size for path in (tmp_path / "m/tree").iterdir())
    assert alone == ids and cache == 2 * 2 * gpt.config.layers * 32  # a key and a value of 2 bytes for each of 32 channels a layer, by hand
    for size, per_token in rows.values():
        assert per_token == pytest.approx(size / length, abs=6e-4)
