"""
Text to learn from: a spec such as "dir:books:0.7,stdlib:0.3" becomes documents in a fixed order, with a train and a val split.

In:  stdlib      the .py files of the Python that runs us: real text, on every machine, without a network
     dir:PATH    a folder of .txt .md .py (a document each), .jsonl and .parquet (a document per row, in the field `text`)
     climbmix    the reference shards (see nanochat/download.py): python -m nanochat.dataset -n 8
     a mix       several of these with weights, "dir:books:0.7,stdlib:0.3"; the weights are shares of the text
Out: a `Source`: len(source), source[i] -> a document, source.documents() -> every document once, as str.
The idea: any document can be fetched by its number, so that a reader's place in a terabyte is one integer, and eight
readers can share a source by taking every eighth number.
The splits are by file: shards named shard_*.parquet have their last one by name as val (after nanochat); other folders
send the ~5% of files to val whose name hashes lowest; a folder of one file gives its last 5% of documents, and a
folder of one document gives its last 5%, cut at a line end.
"""

import argparse
import mmap
import os
import shlex
import sysconfig
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from nanochat.common import UserError, base_dir, run_main
from nanochat.documents import TABLES, Part, TextFile, excerpt, open_bytes, open_file, slices, suffix
from nanochat.download import CLIMBMIX, Shards, download
from nanochat.folders import SPLITS, VAL_SHARE, find_text, fingerprint, some, split_folder, split_names, split_notes

FAIR = 10_000  # characters that a document may give to a Sample before others had their turn


def data_dir(folder=None) -> Path:
    """Where data lives: the argument, else NANOCHAT_DATA_DIR, else base_dir()/data."""
    folder = folder or os.environ.get("NANOCHAT_DATA_DIR")
    return Path(os.path.expanduser(folder)) if folder else base_dir() / "data"


def add_data_dir(parser):
    """The flag of every script that opens text; its main() hands the value to use_data_dir()."""
    parser.add_argument("--data-dir", default="", help="where downloads and relative sources are (empty = NANOCHAT_DATA_DIR, else data/ in the base)")


def use_data_dir(folder):
    """What --data-dir says holds for all that this process opens, sources and tasks alike, as if the environment had said it."""
    if folder:
        os.environ["NANOCHAT_DATA_DIR"] = str(data_dir(folder).absolute())


# ---------------------------------------------------------------------------------------------------------------------
# Sources

class Source:
    """
    Documents by number, in an order that never changes.

    name         the spec it was opened with
    files        objects with len() and [i], see nanochat/documents.py
    fingerprint  tells sets of documents apart, as folders.fingerprint says; where the folder lies does not matter
    notes        lines that the user should see before anything is learnt from it
    """

    def __init__(self, name, files, fingerprint, notes=()):
        self.name, self.files, self.fingerprint, self.notes = name, files, fingerprint, list(notes)
        self.starts = [0, *accumulate(len(file) for file in files)]
        self.parts = [(self, 1.0)]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, i):
        """Document i: a str, or a BigText where that would be larger than BIG."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {self.name}, which has {len(self)}")
        f = bisect_right(self.starts, i) - 1
        return self.files[f][i - self.starts[f]]

    def documents(self):
        """Every document once, as str, in order. (A BigText comes as its slices, one str each.)"""
        for i in range(len(self)):
            yield from excerpt(self[i])


class Mix:
    """Several sources with weights. The loader mixes `parts` by tokens; here they are mixed by characters."""

    def __init__(self, name, parts):
        self.name, self.parts = name, parts
        self.fingerprint = "+".join(f"{source.fingerprint}*{weight:g}" for source, weight in parts)

    def documents(self):
        """Every document of every part once, as by_weight() mixes them."""
        return by_weight([(source.documents(), weight) for source, weight in self.parts])


def by_weight(streams):
    """
    Texts of several (iterator, weight) as one stream. The next one comes from the iterator that is furthest behind its share of
    the characters so far; those that have ended no longer take part, so the end of a pass may be off the weights.
    """
    given, alive = [0] * len(streams), list(range(len(streams)))
    while alive:
        i = min(alive, key=lambda i: given[i] / streams[i][1])
        text = next(streams[i][0], None)
        if text is None:
            alive.remove(i)
        else:
            given[i] += len(text)
            yield text


class Sample:
    """
    Some of a source's text, for those who cannot take all of it: at most max_chars characters, in the weights of a mix, from as many
    documents as there are. First comes the beginning of each, its equal share of what is wanted or FAIR characters if that is
    more; then, as short documents leave room, as much again of those that have it, then twice as much, and so on.

    max_chars  None = the whole source
    doc_cap    most characters of one document, in one round (None = the rule above)
    Iterate it once; afterwards `documents` and `chars` say how many there were.
    """

    def __init__(self, source, max_chars=None, doc_cap=None):
        self.source, self.max_chars, self.doc_cap = source, max_chars, doc_cap
        self.documents = self.chars = 0

    def __iter__(self):
        whole = sum(weight for _, weight in self.source.parts)
        for text in by_weight([(self._of(source, weight / whole), weight) for source, weight in self.source.parts]):
            text = text if self.max_chars is None else text[:self.max_chars - self.chars]
            self.chars += len(text)
            if text:
                yield text
            if self.chars == self.max_chars:
                return

    def _of(self, source, share):
        """Texts of one part of the source, which is to give this share of the characters."""
        if self.doc_cap is not None or self.max_chars is None:
            yield from self._round(source, 0, self.doc_cap)
            return
        start, stop = 0, max(FAIR, int(share * self.max_chars) // len(source))
        while (yield from self._round(source, start, stop)):
            start, stop = stop, 2 * stop

    def _round(self, source, start, stop):
        """Characters [start, stop) of every document, as far as it has them; returns whether any may have more."""
        more = False
        for i in range(len(source)):
            self.documents += start == 0
            given = 0
            for text in excerpt(source[i], start, stop):
                given += len(text)
                yield text
            more = more or stop is not None and given == stop - start
        return more


def notes(items):
    """Lines that the user should see before anything is learnt from a source, or from several with weights."""
    return [f"{part.name}: {note}" for part, _ in items.parts for note in getattr(part, "notes", ())]


class Lines:
    """The one document of a file of rows, up to (train) or from (val) the line end that split_file would choose."""

    def __init__(self, file, split):
        self.file, self.split = file, split

    def __len__(self):
        return 1

    def __getitem__(self, i):
        text = self.file[0]
        border = last_lines(self.file.path, text, "\n")
        return text[:border] if self.split == "train" else text[border:]


def last_lines(path, text, end):
    """Where the last 5% of a str, or of the bytes of a file, begin: after the line end that follows, else precedes, 95%."""
    size, goal = len(text), int((1 - VAL_SHARE) * len(text))
    border = text.find(end, goal) + 1
    if border in (0, size):
        border = text.rfind(end, 0, goal) + 1
    if border == 0:
        raise UserError(f"{path} is a single document of a single line, so it cannot be split into train and val: "
                        f"add a second document, or line ends")
    return border


def split_file(path, split):
    """The only file of a folder: its last 5% of documents are val; a single document gives its last 5%, from a line end."""
    file = open_file(path)
    if suffix(path) in TABLES:
        if len(file) < 2:
            return Lines(file, split) if len(file) else file
        border = len(file) - max(1, round(VAL_SHARE * len(file)))
        return Part(file, 0, border) if split == "train" else Part(file, border, len(file))
    with open_bytes(path) as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
        border, size = last_lines(path, text, b"\n"), len(text)
    return TextFile(path, 0, border) if split == "train" else TextFile(path, border, size)


def make_source(name, root, names, split, notes=(), files=None):
    """A Source of the named files under root, each a document or a table of them, or of `files`, which are parts of these."""
    files = files or [open_file(root / file) for file in names]
    source = Source(name, files, fingerprint(split, root, names), notes)
    if not any(len(source[i]) for i in range(len(source))):
        raise UserError(f"{name} has no text in its {split} split ({some(names)}): add text, or choose another source")
    return source


def open_stdlib(split):
    """The standard library of the running interpreter: its .py files that hold UTF-8 text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__"}
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for file in files:
            path = Path(folder) / file
            if suffix(path) == ".py" and is_text(path):
                names.append(path.relative_to(root).as_posix())
    if len(names) < 2:
        raise UserError(f"this Python keeps no .py files in {root}: use another source, such as dir:PATH")
    return make_source("stdlib", root, split_names(names, split), split)


def is_text(path):
    """Not empty, and UTF-8: the library's own tests hold files in other encodings on purpose."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return bool(data)


def open_dir(path, split, data):
    """A folder of one's own text. A relative path is looked up here first, then in the data folder."""
    here = Path(os.path.expanduser(path))
    places = [here] if here.is_absolute() else [here.absolute(), data / here]
    root = next((place for place in places if os.path.isdir(place)), None)
    kinds = ".txt, .md, .py, .jsonl or .parquet files"
    if root is None:
        raise UserError(f"no folder at {' nor at '.join(map(str, places))}: expected one with {kinds}")
    folder, name = find_text(root), f"dir:{path}"
    if not folder.sizes:
        raise UserError("; ".join([f"{root} holds no text: expected {kinds} in it or below it", *folder.notes]))
    if len(folder.sizes) == 1:
        names = list(folder.sizes)
        return make_source(name, root, names, split, folder.notes, [split_file(root / names[0], split)])
    return make_source(name, root, split_folder(folder, split), split, folder.notes + split_notes(folder))


def open_climbmix(split, data):
    """The reference shards that were downloaded. The last of all 6,543 is val, whichever others are here."""
    root, val = data / "climbmix", CLIMBMIX.shard(CLIMBMIX.shards - 1)
    here = sorted(shard.name for shard in root.glob("shard_*.parquet"))
    train = [shard for shard in here if shard != val]
    if val not in here or not train:
        raise UserError(f"expected {val} and at least one other shard in {root}, found {len(here)} file(s): "
                        f"run python -m nanochat.dataset -n 8")
    return make_source("climbmix", root, [val] if split == "val" else train, split)


def parse_spec(spec):
    """"dir:books:0.7,stdlib:0.3" -> [("dir:books", 0.7), ("stdlib", 0.3)]; a weight not given is 1."""
    parts = []
    for item in spec.split(","):
        name, weight = item.strip(), 1.0
        head, _, tail = name.rpartition(":")
        try:
            if head and head != "dir":
                name, weight = head, float(tail)
        except ValueError:
            pass # the tail is the end of a path
        if not (name in ("stdlib", "climbmix") or name.startswith("dir:") and len(name) > 4):
            raise UserError(f"no source called {name!r} in {spec!r}: expected stdlib, dir:PATH, climbmix, "
                            f"or a mix such as dir:books:0.7,stdlib:0.3")
        if not 0 < weight < float("inf"):
            raise UserError(f"weight {weight} of {name} in {spec!r}: expected a number above 0")
        parts.append((name, weight))
    return parts


def open_source(spec, split="train", data=None):
    """
    spec   see the top of this file
    split  "train" or "val"
    data   the data folder (default: data_dir())
    Returns a Source, or a Mix of them.
    """
    if split not in SPLITS:
        raise UserError(f"no split called {split!r}: expected one of {', '.join(SPLITS)}")
    data, parts = data_dir(data), []
    for name, weight in parse_spec(spec):
        if name == "stdlib":
            source = open_stdlib(split)
        elif name == "climbmix":
            source = open_climbmix(split, data)
        else:
            source = open_dir(name[len("dir:"):], split, data)
        parts.append((source, weight))
    return parts[0][0] if len(parts) == 1 else Mix(spec, parts)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def check(spec):
    """Read every document of both splits, so that a broken file shows now and not in the middle of a run."""
    sources = [open_source(spec, split) for split in SPLITS]
    for note in notes(sources[0]):
        print(note)
    for split, whole in zip(SPLITS, sources):
        for source, _ in whole.parts:
            sizes = [sum(len(text) for _, _, text in slices(source[i])) for i in range(len(source))]
            print(f"{source.name} ({split}): {len(sizes):,} documents, {sizes.count(0):,} of them empty; "
                  f"{sum(sizes):,} characters, {max(sizes):,} in the longest")


def main():
    parser = argparse.ArgumentParser(prog="python -m nanochat.dataset",
                                     description="Download the reference shards, or check a source of text")
    parser.add_argument("-n", type=int, default=0, help="shards to have for training (-1 = all); the validation shard is added")
    parser.add_argument("-w", type=int, default=4, help="shards to fetch at the same time")
    parser.add_argument("--url", default=CLIMBMIX.url, help="where the shards are")
    parser.add_argument("--check", metavar="SOURCE", default="", help="read all of a source, such as dir:PATH, and report")
    add_data_dir(parser)
    args = parser.parse_args()
    use_data_dir(args.data_dir)
    last = CLIMBMIX.shards - 1
    if not args.n and not args.check:
        raise UserError("nothing to do: give -n SHARDS to download, or --check SOURCE")
    if args.n < -1 or args.n > last or args.w < 1:
        raise UserError(f"expected -n of -1 to {last} and -w of at least 1, got -n {args.n} -w {args.w}")
    if args.n:
        count, folder = last if args.n == -1 else args.n, data_dir() / "climbmix"
        paths = download([*range(count), last], folder, Shards(args.url, CLIMBMIX.shards), args.w)
        print(f"{len(paths)} shards in {folder}")
        if args.data_dir:
            where = shlex.quote(str(data_dir()))
            print(f"to learn from them: --source climbmix --data-dir {where}, or NANOCHAT_DATA_DIR={where} in the environment")
    if args.check:
        check(args.check)


if __name__ == "__main__":
    run_main(main)
