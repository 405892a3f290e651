"""
Text into a memory on disk, without asking the model a question yet; or a look at one that is there.

python -m scripts.mega_ingest notes.txt src --tree ~/memory           # chat with it: python -m scripts.chat_cli --tree ~/memory
python -m scripts.mega_ingest --tree ~/memory --renew                 # another checkpoint: the same tokens, all gists written again
python -m scripts.mega_ingest --tree ~/memory --stat                  # how much is in it, and its bytes, level by level
python -m scripts.mega_ingest --tree ~/memory --dump 2                # the nodes of level 2, each with the text it stands for
python -m scripts.mega_ingest --tree ~/memory --verify                # every checksum

A folder stands for all UTF-8 text below it, sorted by path, hidden files left out; what is not text is named and counted.
What is committed stays: a killed ingest is continued by the same command, which skips what is already there. So is a killed --renew, by
itself or by a plain ingest.
"""
import argparse
from pathlib import Path

from tqdm import tqdm

from megacontext.ingest import NODES_AT_ONCE, catch_up, ingest
from megacontext.span import BLOCK
from nanochat import report
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.cost import kv_bytes
from nanochat.documents import TextFile, slices
from scripts.load import load_stage, open_tree, renew_tree

STRETCH = NODES_AT_ONCE * BLOCK # tokens between commits

parser = argparse.ArgumentParser(description="Put text into a memory tree, or look at one", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("paths", nargs="*", help="text files and folders of them, in the order in which they are to be remembered")
parser.add_argument("--tree", required=True, help="folder of the memory")
parser.add_argument("--stage", default="sft", help="whose GistNet writes: base, mid or sft")
parser.add_argument("--tag", default="", help="tag of the checkpoint (empty = the newest)")
parser.add_argument("--gist-dtype", default=None, choices=["bfloat16", "int8"], help="how gists are kept; chosen when a memory is made (default: bfloat16) or renewed")
parser.add_argument("--renew", action="store_true", help="keep the tokens and write all gists again with this checkpoint")
parser.add_argument("--device", default="")
parser.add_argument("--stat", action="store_true", help="print what the tree holds, and what it takes")
parser.add_argument("--dump", type=int, default=-1, help="print the nodes of this level")
parser.add_argument("--verify", action="store_true", help="check every committed byte")


# ---------------------------------------------------------------------------------------------------------------------
# Looking

def stat(tree, loaded):
    print0(f"{tree.length:,} tokens, gists written by model {tree.header['model']}, kept as {tree.header['gist_dtype']}")
    if not tree.whole:
        print0(f"gists of {tree.length // BLOCK - tree.count(1):,} of {tree.length // BLOCK:,} blocks are still to be written: name what to ingest, or use --renew")
    per_token = lambda size: f"{size / tree.length:,.3f}" if tree.length else "-"
    rows = [[what, f"{size:,}", per_token(size)] for what, size in tree.sizes().items()]
    for level in range(1, tree.levels):
        rows[level][0] += f": {tree.count(level):,} gists of {BLOCK ** level:,} tokens"
    files = sum(path.stat().st_size for path in tree.folder.iterdir()) # also the lock, and what SQLite shares between those who have the tree open
    cache = kv_bytes(loaded.gpt.config)
    rows += [["in total", f"{sum(tree.sizes().values()):,}", per_token(sum(tree.sizes().values()))], ["its files on disk", f"{files:,}", per_token(files)],
             ["beside it: the ids alone", f"{4 * tree.length:,}", "4.000"], [f"a KV cache of {loaded.stage}/{loaded.tag} in bf16", f"{cache * tree.length:,}", f"{cache:,.3f}"]]
    print0(report.table(["what", "bytes", "bytes a token"], rows))


def dump(tree, tokenizer, level):
    if not 0 <= level < tree.levels:
        raise UserError(f"no level {level}: this tree has levels 0..{tree.levels - 1}")
    width = BLOCK ** max(level, 1)
    for i in range(tree.length // width):
        text = tokenizer.decode(tree.tokens(i * width, (i + 1) * width).tolist())
        shown = text if len(text) <= 100 else text[:48] + " ... " + text[-48:]
        print0(f"{i * width:>10} {shown!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def text_files(paths, tree_folder):
    """The files to read, in order. Those of a folder that are not text are told and counted; one that was named must be text."""
    files, refused = [], 0
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        if not path.is_dir():
            check_text(path)
            files.append(path)
            continue
        below = [file for file in sorted(path.rglob("*")) if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)]
        found = len(files)
        for file in below:
            if tree_folder.resolve() in file.resolve().parents: # the memory itself may lie in the folder
                continue
            try:
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


def check_text(path):
    """UserError unless all of a file can be read as UTF-8 text."""
    try:
        for _ in slices(TextFile(path)[0]):
            pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def remember(loaded, tree, files):
    """Append what is not there yet. Files are one stream, so that small ones share a forward and a commit. Returns how many were all there."""
    at, waiting, known = 0, [], 0 # the place in the history at which the next slice belongs; ids that make no whole stretch yet

    def take(n):
        ingest(loaded.gpt, loaded.gistnet, tree, waiting[:n])
        del waiting[:n]

    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True) as bar:
        for path in files:
            new = 0
            for _, _, text in slices(TextFile(path)[0]):
                ids = ([loaded.tokenizer.bos] if at == 0 else []) + loaded.tokenizer.encode(text)
                have = tree.tokens(at, min(at + len(ids), tree.length)).tolist() if at < tree.length else []
                if have != ids[:len(have)]:
                    raise UserError(f"{path} is not what stands at token {at} of {tree.folder}: name the files in the order of the first time, or start a new --tree")
                waiting += ids[len(have):]
                at, new = at + len(ids), new + len(ids) - len(have)
                whole = (tree.length + len(waiting)) // STRETCH * STRETCH - tree.length
                if whole > 0:
                    take(whole)
                bar.update(len(text.encode()))
            known += not new
        take(len(waiting))
    return known


def write(loaded, folder, files, args):
    """Everything that changes a memory: first the gists that are missing, then the files."""
    if args.renew:
        renew_tree(loaded, folder, args.gist_dtype)
    with open_tree(loaded, folder / "tree", gist_dtype=args.gist_dtype) as tree:
        if not tree.whole:
            with tqdm(total=tree.length, initial=tree.count(1) * BLOCK, unit="tok", desc="gists") as bar:
                catch_up(loaded.gpt, loaded.gistnet, tree, lambda done: bar.update(done - bar.n))
        if files:
            known = remember(loaded, tree, files)
            print0(f"{len(files)} files, {known} of them already there")


def main():
    args = parser.parse_args()
    folder = Path(args.tree)
    looking = args.stat or args.verify or args.dump >= 0
    if looking and (args.paths or args.renew):
        raise UserError("--stat, --dump and --verify look at a memory and change nothing: ingest or --renew in a command of its own")
    if not (looking or args.paths or args.renew):
        raise UserError("nothing to ingest: name text files or folders, or ask for --stat")
    if (looking or args.renew) and not (folder / "tree").exists():
        raise UserError(f"no memory in {folder}: ingest something first")
    files = text_files(args.paths, folder)
    loaded = load_stage(args.stage, args.tag or None, device=args.device or pick_device_type())
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: it has no GistNet to write with")
    if not looking:
        write(loaded, folder, files, args)
    with open_tree(loaded, folder / "tree", "r", args.gist_dtype) as tree:
        if args.verify:
            print0(f"verified {tree.verify():,} bytes")
        if args.dump >= 0:
            dump(tree, loaded.tokenizer, args.dump)
        if args.stat or not looking:
            stat(tree, loaded)


if __name__ == "__main__":
    run_main(main)
