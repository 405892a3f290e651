"""
How often to refocus, by what a session then reads: nats a token of text beside a sliding window of as many entries.

python -m bench.refocus --checkpoint base/d4                                     (rows of 1,024, W = 192; a quarter of an hour of one thread)
python -m bench.refocus --checkpoint mid/d4 --seq-len 2048 --budget 256 --rows 8

A session takes in the beginning of a row as the history it finds, then reads the last --read tokens one by one, in every setting of --settings, which are
tokens between refocuses : margin : edits a refocus : ticks a node rests. 0 edits is recency alone. With --read-history it has read the beginning one by one too, as in a
chat, so that what it opens again was read in front of its own past and not for the first time, behind gists; --kept says how much of that it keeps. Beside it, on the same tokens:
    window      the newest W tokens at every token, as a KV cache has them that drops the oldest: it has read all of the row
    full        all of the row
    bm25, lens  the newest blocks and older ones that BM25 or LensNet finds, one or half of the raw blocks, chosen anew every so many tokens, of which the first is known, as to a session's tick; no gists
In nats a token better than the window, with the share of the way from the window to full attention. Rows of one document are not independent, so +- is the standard
deviation, and the brackets hold 95%, of what comes out when documents are drawn anew, with replacement (bootstrap); where a draw may have no way to full attention at all,
the brackets are wide and say so little. The last line is JSON.
"""
import argparse
import json
from unittest.mock import patch

import numpy as np
import torch

from megacontext import runtime
from megacontext.contexts import bag, best, bm25, retrieved_table
from megacontext.evaluate import Networks, Rows
from megacontext.ingest import ingest
from megacontext.layout import HIDDEN, RAW, shown
from megacontext.losses import lens_scores
from megacontext.reread import Reading
from megacontext.span import BLOCK
from megacontext.tree import MegaTree, make_header
from nanochat.common import UserError, print0, run_main
from nanochat.dataset import add_data_dir, open_source, use_data_dir
from nanochat.report import table
from scripts.load import load_stage
from scripts.mega_eval import long_documents, sample_rows

KEPT = 12 # of a session by default: 4 on the device and 8 in RAM

parser = argparse.ArgumentParser(description="How often to refocus", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--checkpoint", default="base", help="stage/tag, or a stage: its newest")
parser.add_argument("--source", default="stdlib", help="long validation documents")
parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a row, no more than the checkpoint was trained on")
parser.add_argument("--budget", type=int, default=192, help="visible entries")
parser.add_argument("--read", type=int, default=256, help="tokens at the end of a row that are read one by one")
parser.add_argument("--read-history", action="store_true", help="the session reads the beginning of the row too, instead of taking it in unread")
parser.add_argument("--kept", type=int, default=KEPT, help="budgets of keys and values that a session keeps when they leave the view; by default as many as a chat has")
parser.add_argument("--rows", type=int, default=16, help="for each seed")
parser.add_argument("--seeds", type=int, default=3, help="samples of rows")
parser.add_argument("--first-seed", type=int, default=0, help="of the samples: what was chosen on some rows is reported on others")
parser.add_argument("--settings", default="4:0.5:0:0,4:0.5:4:0,8:0.5:4:0,32:0.5:4:0", help="of sessions: every:margin:edits:rest, comma list")
parser.add_argument("--every", default="4", help="tokens between two choices of bm25 and lens, comma list (empty = leave them out)")
add_data_dir(parser)


@torch.no_grad()
def window(gpt, row, W, read):
    """Nats (read,) of the last tokens of row (T + 1,), where every token of the row reads the newest W, itself included."""
    ids, targets = row[None, :-1], row[None, -read:]
    place = torch.arange(ids.size(1))
    see = (place[:, None] >= place) & (place[:, None] - place < W)
    hidden = gpt.trunk(gpt.embed(ids), place[None].float(), see[None, None])
    return gpt.loss(hidden[:, -read:], targets, "none")[0].numpy()


def session(networks, row, W, read, every, margin, n_diff, rest, read_history=False, kept=KEPT):
    """Nats (read,) of the same tokens from a session that finds the row's beginning in its tree, or has read it, and {edits, read again} a block."""
    ids, tree = row.tolist(), MegaTree.in_memory(make_header(networks.gpt.config.width, 0))
    history = len(ids) - 1 - read
    if not read_history:
        ingest(networks.gpt, networks.gistnet, tree, ids[:history])
    with patch.object(runtime, "COOLDOWN", rest):
        memory = runtime.Session(networks.gpt, networks.gistnet, networks.lensnet, tree, W, n_diff=n_diff, margin=margin, refocus_every=every, kept=kept, kept_in_ram=0)
        for at in range(0, history if read_history else 0, BLOCK): # so few at a time that none are only taken in
            memory.feed(ids[at:min(at + BLOCK, history)], prompt=False)
        before = dict(memory.stats)
        nats = [-memory.feed([now]).float().log_softmax(-1)[then].item() for now, then in zip(ids[history:-1], ids[history + 1:])]
    a_block = lambda name: BLOCK * (memory.stats[name] - before[name]) / read
    return np.array(nats), dict(edits=a_block("edits"), again=a_block("read_tokens") - BLOCK)


@torch.no_grad()
def retrieved(networks, row, W, read, every):
    """{"bm25, 1 of 5": nats (read,)} of the same tokens behind the newest blocks and so many older ones that BM25 or LensNet finds, chosen anew every so many tokens."""
    some = Rows(networks, row[None], W, np.random.default_rng(0))
    docs, spared, ids = torch.zeros(1, some.Q, dtype=torch.long), some.batch(some.spared), some.inputs[0].tolist()
    reading = Reading(some.gpt, some.entries, some.targets, some.batch(some.tables(retrieved_table, some.scores["lensnet"])))
    n, nats, bags = (W - BLOCK) // BLOCK, {}, [bag(ids, block) for block in range(some.Q)]
    for now in range(some.T - read, some.T, every):
        q = now // BLOCK
        known = now + 1 # with the token that is read first, as a session's tick knows it
        scores = dict(bm25=bm25(ids, bags[:q], known), lens=lens_scores(networks.lensnet, some.inputs, docs, spared, torch.tensor([[q]]), BLOCK, torch.tensor([[known]]))[0, 0].numpy())
        asked = [(name, count) for name in scores for count in sorted({1, n // 2})]
        lines = np.full((len(asked), some.Q), HIDDEN)
        for line, (name, count) in zip(lines, asked):
            older = np.arange(q - min(q, n - count))
            line[len(older):q] = RAW
            line[best(older, scores[name][older], count)] = RAW
        seen = shown(torch.from_numpy(lines), BLOCK).clone()
        seen[:, q * BLOCK:now] = True
        for (name, count), found in zip(asked, reading.again(now, every, seen)[0].numpy()):
            nats.setdefault(f"{name}, {count} of {n}", []).append(found)
    return {name: np.concatenate(parts) for name, parts in nats.items()}


def parse(text):
    """ "8:1:4:0" -> (tokens between refocuses, margin, edits, rest) """
    try:
        every, margin, n_diff, rest = text.split(":")
        return int(every), float(margin), int(n_diff), int(rest)
    except ValueError:
        raise UserError(f"--settings {text}: expected every:margin:edits:rest, such as 8:1:4:0") from None


def settle(args):
    """(settings, intervals of retrieval); UserError for what cannot be measured."""
    settings = [(text, parse(text)) for text in args.settings.split(",") if text]
    every = [int(word) for word in args.every.split(",") if word]
    if args.read % BLOCK or args.seq_len % BLOCK or args.read < BLOCK or args.seq_len - args.read < args.budget or args.rows * args.seeds < 2 or args.kept < 0 or args.first_seed < 0 or any(n < 1 or BLOCK % n for n in every) or any(n < 2 or BLOCK % n for _, (n, *_) in settings):
        raise UserError(f"--seq-len {args.seq_len} --read {args.read} --budget {args.budget} --rows {args.rows} --seeds {args.seeds} --every {args.every} --settings {args.settings}: expected whole blocks of {BLOCK} "
                        "tokens, a budget that is less than the history, two rows, and divisors of a block, for sessions at least 2; --kept and --first-seed are 0 or more")
    return settings, every


def redrawn(documents, draws=2000):
    """Weights (draws, rows) of a bootstrap that draws as many documents as there are, with replacement: how often each row is in a draw."""
    names, of = np.unique(documents, return_inverse=True)
    return np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)[:, of]


def told(name, nats, window, full, weights, more):
    """A row of the table, and its numbers. nats, window, full: a number a row; weights as of redrawn()."""
    better, gap = np.array(window) - np.array(nats), np.array(window) - np.array(full)
    means = (weights @ better) / weights.sum(1)
    numbers = dict(better=float(better.mean()), error=float(means.std(ddof=1)))
    if gap.mean() > 0:
        numbers |= dict(share=float(better.mean() / gap.mean()), share_95=np.percentile((weights @ better) / (weights @ gap), (2.5, 97.5)).tolist())
    share = f"{numbers['share']:.2f} ({numbers['share_95'][0]:.2f} - {numbers['share_95'][1]:.2f})" if "share" in numbers else ""
    return [name, f"{numbers['better']:+.4f} +- {numbers['error']:.4f}", share, *(f"{more[key]:.1f}" if key in more else "" for key in ("edits", "again"))], numbers | more


def main():
    args = parser.parse_args()
    settings, every = settle(args)
    use_data_dir(args.data_dir)
    stage, _, tag = args.checkpoint.partition("/")
    loaded = load_stage(stage, tag or None)
    if loaded.gistnet is None or args.seq_len > loaded.gpt.config.seq_len:
        raise UserError(f"{args.checkpoint}: expected a checkpoint with memory, trained on rows of at least {args.seq_len} tokens, found rows of {loaded.gpt.config.seq_len}")
    networks, texts = Networks(loaded.gpt, loaded.gistnet, loaded.lensnet), long_documents(open_source(args.source, "val"), loaded.tokenizer, args.seq_len)
    nats, counts, documents = {}, {}, []
    torch.set_grad_enabled(False)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        rows, of = sample_rows(texts, args.seq_len, args.rows, np.random.default_rng([seed]))
        documents += of.tolist()
        for row in rows:
            add = lambda name, found: nats.setdefault(name, []).append(float(found.mean()))
            add("window", window(loaded.gpt, row, args.budget, args.read))
            add("full", loaded.gpt(row[None, :-1], row[None, 1:], "none")[0, -args.read:].numpy())
            for n in every:
                for name, found in retrieved(networks, row, args.budget, args.read, n).items():
                    add(f"{name}, every {n}", found)
            for text, setting in settings:
                found, count = session(networks, row, args.budget, args.read, *setting, args.read_history, args.kept)
                add(f"session {text}", found)
                for key, value in count.items():
                    counts.setdefault(f"session {text}", {}).setdefault(key, []).append(value)
        print0(f"seed {seed}: " + " ".join(f"{name} {np.mean(values[-args.rows:]):.4f}" for name, values in nats.items()))
    if len(set(documents)) < 2:
        raise UserError(f"all {len(documents)} rows are of one document, which says nothing of others: give more --rows or another --source")
    weights = redrawn(documents)
    rows, numbers = zip(*(told(name, values, nats["window"], nats["full"], weights, {key: float(np.mean(value)) for key, value in counts.get(name, {}).items()}) for name, values in nats.items()))
    print0(f"\n{len(documents)} rows of {args.seq_len} tokens, of {len(set(documents))} documents of {args.source}, the last {args.read}, {args.budget} entries in view, history "
           f"{'read' if args.read_history else 'taken in'}, {args.checkpoint} of step {loaded.meta['step']}\n")
    print0(table(["read", "better than the window by", "share of the way to full", "edits a block", "tokens read again a block"], rows))
    print0(json.dumps(dict(vars(args), found=dict(zip(nats, numbers)), nats=nats, documents=documents)))


if __name__ == "__main__":
    run_main(main)
