"""
Text into a memory on disk, without asking the model a question yet; or a look at one that is there.

python -m scripts.mega_ingest notes.txt src/*.py --tree ~/memory      # chat with it: python -m scripts.chat_cli --tree ~/memory
python -m scripts.mega_ingest --tree ~/memory --stat                  # how much is in it, level by level
python -m scripts.mega_ingest --tree ~/memory --dump 2                # the nodes of level 2, each with the text it stands for
python -m scripts.mega_ingest --tree ~/memory --verify                # every checksum

What is committed stays: a killed ingest is continued by the same command, which skips what is already there.
"""
import argparse
from pathlib import Path

from tqdm import tqdm

from megacontext.ingest import ingest
from megacontext.span import BLOCK
from nanochat.common import UserError, pick_device_type, print0, run_main
from nanochat.documents import slices
from scripts.load import load_stage, open_tree

parser = argparse.ArgumentParser(description="Put text into a memory tree, or look at one", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("files", nargs="*", help="text files, in the order in which they are to be remembered")
parser.add_argument("--tree", required=True, help="folder of the memory")
parser.add_argument("--stage", default="sft", help="whose GistNet writes: base, mid or sft")
parser.add_argument("--tag", default="", help="tag of the checkpoint (empty = the newest)")
parser.add_argument("--device", default="")
parser.add_argument("--stat", action="store_true", help="print what the tree holds")
parser.add_argument("--dump", type=int, default=-1, help="print the nodes of this level")
parser.add_argument("--verify", action="store_true", help="check every committed byte")


def read(path):
    """A text file as str, or one clear line about why not."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first, or leave it out") from None


def stat(tree, tokenizer):
    print0(f"tokens {tree.length:,}, made by model {tree.header['model']}, gists as {tree.header['gist_dtype']}")
    for level in range(1, tree.levels):
        print0(f"level {level}: {tree.count(level):,} gists of {BLOCK ** level:,} tokens")


def dump(tree, tokenizer, level):
    if not 0 <= level < tree.levels:
        raise UserError(f"no level {level}: this tree has levels 0..{tree.levels - 1}")
    width = BLOCK ** max(level, 1)
    for i in range(tree.length // width):
        text = tokenizer.decode(tree.tokens(i * width, (i + 1) * width).tolist())
        shown = text if len(text) <= 100 else text[:48] + " ... " + text[-48:]
        print0(f"{i * width:>10} {shown!r}")


def main():
    args = parser.parse_args()
    loaded = load_stage(args.stage, args.tag or None, device=args.device or pick_device_type())
    if loaded.gistnet is None:
        raise UserError(f"{args.stage}/{loaded.tag} was trained without memory: it has no GistNet to write with")
    tokenizer, folder = loaded.tokenizer, Path(args.tree)
    looking = args.stat or args.verify or args.dump >= 0
    if looking and not (folder / "tree").exists():
        raise UserError(f"no memory in {folder}: ingest something first")
    with open_tree(loaded, folder / "tree", mode="r" if looking else "a") as tree:
        if args.verify:
            print0(f"verified {tree.verify():,} bytes")
        if args.stat:
            stat(tree, tokenizer)
        if args.dump >= 0:
            dump(tree, tokenizer, args.dump)
        if looking:
            return
        if not args.files:
            raise UserError("nothing to ingest: name some text files, or ask for --stat")
        at = 0 # place in the history at which the next file belongs
        for path in args.files:
            ids = [tokenizer.bos] if at == 0 else []
            for _, _, part in slices(read(path)):
                ids += tokenizer.encode(part)
            have = tree.tokens(at, min(at + len(ids), tree.length)).tolist() if at < tree.length else []
            if have != ids[:len(have)]:
                raise UserError(f"{path} is not what stands at token {at} of {folder}: name the files in the order of the first time, or start a new --tree")
            at += len(ids)
            if len(have) == len(ids):
                print0(f"{path}: already there")
                continue
            with tqdm(total=len(ids), initial=len(have), unit="tok", desc=Path(path).name) as bar:
                ingest(loaded.gpt, loaded.gistnet, tree, ids[len(have):], lambda done: bar.update(done + len(have) - bar.n))
        stat(tree, tokenizer)


if __name__ == "__main__":
    run_main(main)
