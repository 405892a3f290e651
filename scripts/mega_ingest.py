"""
Text into a memory on disk, without asking the model a question yet; or a look at one that is there.

python -m scripts.mega_ingest notes.txt src --tree ~/memory           # chat with it: python -m scripts.chat_cli --tree ~/memory
python -m scripts.mega_ingest new.txt --tree ~/memory --append        # after all that is there, conversations too
python -m scripts.mega_ingest --tree ~/memory --renew                 # another checkpoint, or damaged gists: the same tokens, all gists written again
python -m scripts.mega_ingest --tree ~/memory --stat                  # how much is in it, and its bytes, level by level
python -m scripts.mega_ingest --tree ~/memory --dump 2                # the nodes of level 2, each with the text it stands for
python -m scripts.mega_ingest --tree ~/memory --verify                # every checksum; like the two above it needs no model

A folder stands for all UTF-8 text below it, sorted by path, hidden files left out; what is not text, and links to folders or to nothing, are
named and counted. What is committed stays: a killed ingest is continued by the same command, which skips what is already there. So is a killed
--renew, by itself or by a plain ingest. --append skips what it has put at the end itself, and only as long as nothing has come behind it.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megacontext.ingest import NODES_AT_ONCE, catch_up, ingest
from megacontext.span import BLOCK
from megacontext.tree import MegaTree
from nanochat import report
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.cost import kv_bytes
from nanochat.documents import TextFile, slices
from nanochat.tokenizer import Tokenizer
from scripts.load import load_stage, open_tree, renew_tree

STRETCH = NODES_AT_ONCE * BLOCK # tokens between commits

parser = argparse.ArgumentParser(description="Put text into a memory tree, or look at one", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("paths", nargs="*", help="text files and folders of them, in the order in which they are to be remembered")
parser.add_argument("--tree", required=True, help="folder of the memory")
parser.add_argument("--stage", default="sft", help="whose GistNet writes: base, mid, sft or rl")
parser.add_argument("--tag", default="", help="tag of the checkpoint (empty = the newest)")
parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the last)")
parser.add_argument("--gist-dtype", default=None, choices=["bfloat16", "int8"], help="how gists are kept; chosen when a memory is made (default: bfloat16) or renewed")
parser.add_argument("--append", action="store_true", help="put these files after all that is there, as a document of their own")
parser.add_argument("--renew", action="store_true", help="keep the tokens and write all gists again with this checkpoint")
parser.add_argument("--device", default="")
parser.add_argument("--stat", action="store_true", help="print what the tree holds, and what it takes")
parser.add_argument("--dump", type=int, default=None, metavar="LEVEL", help="print the nodes of this level (0: blocks of tokens, with the unfinished one at the end)")
parser.add_argument("--verify", action="store_true", help="check every committed byte")


# ---------------------------------------------------------------------------------------------------------------------
# Looking

def stat(tree, loaded=None):
    """What a tree holds and takes; beside what a model's KV cache would take, where there is a model."""
    print0(f"{tree.length:,} tokens, gists written by model {tree.header.get('model', 'unknown')}, kept as {tree.header['gist_dtype']}")
    if not tree.whole:
        print0(f"gists of {tree.length // BLOCK - tree.count(1):,} of {tree.length // BLOCK:,} blocks are still to be written: name what to ingest, or use --renew")
    per_token = lambda size: f"{size / tree.length:,.3f}" if tree.length else "-"
    rows = [[what, f"{size:,}", per_token(size)] for what, size in tree.sizes().items()]
    for level in range(1, tree.levels):
        rows[level][0] += f": {tree.count(level):,} gists of {BLOCK ** level:,} tokens"
    files = sum(path.stat().st_size for path in tree.folder.iterdir()) # also the lock
    rows += [["in total", f"{sum(tree.sizes().values()):,}", per_token(sum(tree.sizes().values()))], ["its files on disk", f"{files:,}", per_token(files)],
             ["beside it: the ids alone", f"{4 * tree.length:,}", "4.000"]]
    if loaded:
        cache = kv_bytes(loaded.gpt.config)
        rows.append([f"a KV cache of {loaded.stage}/{loaded.tag} in bf16", f"{cache * tree.length:,}", f"{cache:,.3f}"])
    print0(report.table(["what", "bytes", "bytes a token"], rows))


def dump(tree, tokenizer, level):
    if not 0 <= level < tree.levels:
        raise UserError(f"no level {level}: this tree has levels 0..{tree.levels - 1}")
    width = BLOCK ** max(level, 1)
    for start in range(0, tree.length if level == 0 else tree.count(level) * width, width):
        text = tokenizer.decode(tree.tokens(start, min(start + width, tree.length)).tolist())
        shown = text if len(text) <= 100 else text[:48] + " ... " + text[-48:]
        print0(f"{start:>10} {shown!r}")


def look(folder, args):
    """What needs no model: checksums, nodes, counts."""
    tokenizer = Tokenizer.load() if args.dump is not None else None
    with MegaTree.open(folder / "tree", "r", **(dict(tokenizer=tokenizer.fingerprint[:16]) if tokenizer else {})) as tree:
        if args.verify:
            print0(f"verified {tree.verify():,} bytes")
        if args.dump is not None:
            dump(tree, tokenizer, args.dump)
        if args.stat:
            stat(tree)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def text_files(paths, tree_folder):
    """The files to read, in order. Those of a folder that are not text are told and counted; one that was named must be text."""
    files, refused = [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        if not path.is_dir():
            check_file(path)
            check_text(path)
            files.append(path)
            continue
        below = [file for file in sorted(path.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        found = len(files)
        for file in below:
            folder = file.is_dir() and not file.is_symlink() # rglob has been in it
            if folder or tree_folder.resolve() in Path(os.path.realpath(file)).parents: # the memory itself may lie in the folder
                continue
            try:
                check_file(file)
                check_text(file)
                files.append(file)
            except UserError as error:
                print0(f"left out: {error}")
                refused += 1
        if len(files) == found:
            raise UserError(f"no text in {path}: expected UTF-8 files in it or below it")
    if refused:
        print0(f"{refused} files were left out, {len(files)} are read")
    return files


def check_file(path):
    """UserError unless this is a file. Below a folder, a link to a folder is not followed, for it may lead round in circles."""
    if path.is_dir():
        raise UserError(f"{path} is a link to a folder: name it, to have it read")
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device, expected a regular file: save what it gives in one" if path.exists() else f"{path} is a link to nothing")


def check_text(path):
    """UserError unless all of a file can be read as UTF-8 text."""
    try:
        for _ in slices(TextFile(path)[0]):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def pieces(tokenizer, files):
    """(number of the file, text, ids) for each slice of the files. They are one stream, which begins with bos."""
    begin = [tokenizer.bos]
    for n, path in enumerate(files):
        for _, _, text in slices(TextFile(path)[0]):
            yield n, text, begin + tokenizer.encode(text)
            begin = []


def stands(tree, at, ids):
    """Whether these ids stand at a token of the tree, as far as it goes."""
    here = tree.tokens(min(at, tree.length), min(at + len(ids), tree.length)).tolist()
    return here == ids[:len(here)]


def place_behind(tree, tokenizer, files):
    """The token at which files begin that are put after all that is there: the last bos if they are what stands there up to the end (a kill left that), else the end."""
    start = tree.length
    for stop in range(tree.length, 0, -2 ** 20):
        found = np.flatnonzero(tree.tokens(max(0, stop - 2 ** 20), stop) == tokenizer.bos)
        if len(found):
            start = max(0, stop - 2 ** 20) + int(found[-1])
            break
    at = start
    for _, _, ids in pieces(tokenizer, files):
        if not stands(tree, at, ids):
            return tree.length
        at += len(ids)
        if at >= tree.length:
            return start
    return tree.length # something came behind them


def remember(loaded, tree, files, append=False):
    """Put in what is not there yet. Files are one stream, so that small ones share a forward and a commit. Returns how many were all there, and how many hold no text."""
    at = place_behind(tree, loaded.tokenizer, files) if append else 0 # the place in the history at which the next slice belongs
    waiting, read, new = [], set(), set() # ids that make no whole stretch yet; numbers of the files that hold text, and of those that were not all there

    def take(n):
        ingest(loaded.gpt, loaded.gistnet, tree, waiting[:n])
        del waiting[:n]

    with tqdm(total=sum(TextFile(path).stop for path in files), unit="B", unit_scale=True) as bar:
        for n, text, ids in pieces(loaded.tokenizer, files):
            have = max(0, min(len(ids), tree.length - at))
            if not stands(tree, at, ids):
                raise UserError(f"{files[n]} is not what stands at token {at} of {tree.folder}, which is other text or a conversation: name the files in the order of the "
                                "first time, or only new ones and --append to put them after all that is there, or start a new --tree")
            waiting += ids[have:]
            at += len(ids)
            read.add(n)
            if have < len(ids):
                new.add(n)
            whole = (tree.length + len(waiting)) // STRETCH * STRETCH - tree.length
            if whole > 0:
                take(whole)
            bar.update(len(text.encode()))
        take(len(waiting))
    return len(read - new), len(files) - len(read)


def write(loaded, folder, files, args):
    """Everything that changes a memory: first the gists that are missing, then the files."""
    if args.renew:
        wrong = renew_tree(loaded, folder, args.gist_dtype)
        if wrong:
            print0(f"damaged, so made anew from the tokens: {', '.join(wrong)}")
    with open_tree(loaded, folder / "tree", gist_dtype=args.gist_dtype) as tree:
        if not tree.whole:
            with tqdm(total=tree.length, initial=tree.count(1) * BLOCK, unit="tok", desc="gists") as bar:
                catch_up(loaded.gpt, loaded.gistnet, tree, lambda done: bar.update(done - bar.n))
        if files:
            known, empty = remember(loaded, tree, files, args.append)
            print0(f"{len(files)} files, {known} of them already there" + (f", {empty} empty" if empty else ""))


def main():
    args = parser.parse_args()
    folder = Path(args.tree)
    looking = args.stat or args.verify or args.dump is not None
    if looking and (args.paths or args.renew or args.append or args.gist_dtype):
        raise UserError("--stat, --dump and --verify look at a memory and change nothing: ingest or --renew in a command of its own")
    if not (looking or args.paths or args.renew) or args.append and not args.paths:
        raise UserError("nothing to ingest: name text files or folders, or ask for --stat")
    if (looking or args.renew) and not MegaTree.exists(folder / "tree"):
        raise UserError(f"no memory in {folder}: ingest something first")
    if looking:
        try:
            look(folder, args)
        except BrokenPipeError: # whoever read along has seen enough, as head has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()) # for what Python flushes when it ends
        return
    files = text_files(args.paths, folder)
    loaded = load_stage(args.stage, args.tag or None, args.step, device=args.device or pick_device_type())
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: it has no GistNet to write with")
    write(loaded, folder, files, args)
    with open_tree(loaded, folder / "tree", "r", args.gist_dtype) as tree:
        stat(tree, loaded)


if __name__ == "__main__":
    run_main(main)
