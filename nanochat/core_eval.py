"""
CORE: 22 tasks that a base model can be asked without knowing how to chat, each a question with a few worked examples before it.

In:  a GPT, a tokenizer, a folder of the tasks' examples. Out: accuracy of each task, and CORE, the mean of their centered
accuracies, where 0 is guessing and 1 is perfect: (accuracy - guess) / (1 - guess).
From: DataComp-LM (Li et al. 2024); prompts, seeds and rules are those of nanochat, so that numbers may be laid side by side.

    multiple_choice     one context, several endings: the ending whose tokens have the lowest mean loss is the answer
    schema              several contexts, one ending: the context after which the ending has the lowest mean loss
    language_modeling   right when every token of the ending is the likeliest one

The idea: the endings of one example share their long beginning, so it is read once. A row holds the shared beginning and then all endings
side by side; each is at the position, beside the predecessor and with the view that it would have alone.

    row         b e g i n n i n g   y e s   n o
    position    0 1 2 ...       8   9 ...   9 ...
    sees        what is before it in the beginning, and in its own ending

A prompt longer than the model's row loses its oldest tokens (the first examples), never its bos; how many did is counted.

B = rows of a batch, N = entries of a row, S = scored tokens of a batch
"""

import gzip
import json
import random
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import torch.distributed as td
import torch.nn.functional as F
from filelock import FileLock
from tqdm import tqdm

from nanochat.common import Dist, UserError, base_dir, check_unicode
from nanochat.download import disk, fetch

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip" # nanochat's copy of DataComp-LM's files
FIELDS = {"multiple_choice": {"query": str, "choices": list, "gold": int}, "schema": {"context_options": list, "continuation": str, "gold": int},
          "language_modeling": {"context": str, "continuation": str}}
WINDOW = 512       # examples that are sorted by length together
HEAD_ROWS = 1024   # scored tokens whose logits are held at once


@dataclass(frozen=True)
class CoreTask:
    label: str
    file: str        # below the folder; .gz may follow
    kind: str
    shots: int       # worked examples before the question
    delimiter: str   # between a question and its answer
    guess: float     # percent right by chance


# What DataComp-LM's eval/ folder says of the 22 tasks, in its order. A folder may bring its own list, see read_tasks.
TASKS = [CoreTask(*fields) for fields in [
    ("hellaswag_zeroshot", "language_understanding/hellaswag.jsonl", "multiple_choice", 0, " ", 25.0),
    ("jeopardy", "world_knowledge/jeopardy_all.jsonl", "language_modeling", 10, "\nAnswer: ", 0.0),
    ("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata.jsonl", "language_modeling", 10, " ", 0.0),
    ("arc_easy", "world_knowledge/arc_easy.jsonl", "multiple_choice", 10, "\nAnswer: ", 25.0),
    ("arc_challenge", "world_knowledge/arc_challenge.jsonl", "multiple_choice", 10, "\nAnswer: ", 25.0),
    ("copa", "commonsense_reasoning/copa.jsonl", "multiple_choice", 0, " ", 50.0),
    ("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl", "multiple_choice", 10, " ", 40.3),
    ("piqa", "commonsense_reasoning/piqa.jsonl", "multiple_choice", 10, "\nAnswer: ", 50.0),
    ("openbook_qa", "commonsense_reasoning/openbook_qa.jsonl", "multiple_choice", 0, " ", 25.0),
    ("lambada_openai", "language_understanding/lambada_openai.jsonl", "language_modeling", 0, " ", 0.0),
    ("hellaswag", "language_understanding/hellaswag.jsonl", "multiple_choice", 10, " ", 25.0),
    ("winograd", "language_understanding/winograd_wsc.jsonl", "schema", 0, " ", 50.0),
    ("winogrande", "language_understanding/winogrande.jsonl", "schema", 0, " ", 50.0),
    ("bigbench_dyck_languages", "symbolic_problem_solving/bigbench_dyck_languages.jsonl", "language_modeling", 10, " ", 0.0),
    ("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl", "multiple_choice", 3, " ", 25.0),
    ("bigbench_cs_algorithms", "symbolic_problem_solving/bigbench_cs_algorithms.jsonl", "language_modeling", 10, " ", 0.0),
    ("bigbench_operators", "symbolic_problem_solving/bigbench_operators.jsonl", "language_modeling", 10, " ", 0.0),
    ("bigbench_repeat_copy_logic", "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl", "language_modeling", 10, " ", 0.0),
    ("squad", "reading_comprehension/squad.jsonl", "language_modeling", 10, " ", 0.0),
    ("coqa", "reading_comprehension/coqa.jsonl", "language_modeling", 0, " ", 0.0),
    ("boolq", "reading_comprehension/boolq.jsonl", "multiple_choice", 10, "\nAnswer: ", 62.0),
    ("bigbench_language_identification", "language_understanding/bigbench_language_identification.jsonl", "multiple_choice", 10, " ", 25.0),
]]


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_tasks(folder):
    """The folder's own list, core_tasks.jsonl (label, file, task_type, num_fewshot, continuation_delimiter, random_baseline), else the 22."""
    listed = Path(folder) / "core_tasks.jsonl"
    if not listed.exists():
        return TASKS
    tasks = []
    for n, line in enumerate(filter(str.strip, listed.read_text(encoding="utf-8").split("\n")), 1):
        try:
            entry = json.loads(line)
            task = CoreTask(entry["label"], entry["file"], entry["task_type"], int(entry["num_fewshot"]), entry["continuation_delimiter"],
                            float(entry["random_baseline"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{listed}, entry {n}: expected a task with label, file, task_type, num_fewshot, continuation_delimiter and "
                            f"random_baseline, got {line[:80]!r} ({error!r})") from error
        if task.kind not in FIELDS:
            raise UserError(f"{listed}, entry {n}: expected a task_type of {', '.join(FIELDS)}, got {task.kind!r}")
        tasks.append(task)
    return tasks


def find_file(folder, task):
    """The task's file, plain or gzipped, or None."""
    stem = Path(folder) / task.file.removesuffix(".gz")
    return next((path for path in (stem, stem.with_name(stem.name + ".gz")) if path.is_file()), None)


def read_items(path, task):
    """The examples of a file, checked, in the fixed random order from which a subset is taken."""
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").split("\n")
        items = [json.loads(line) for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected one JSON object a line, got {error}") from error
    for n, item in enumerate(items, 1):
        if not is_sound(item, FIELDS[task.kind]):
            raise UserError(f"{path}, example {n}: expected {', '.join(FIELDS[task.kind])} of a {task.kind} task (texts, a list of texts, the number of one of "
                            f"them), got {str(item)[:80]}")
    if len(items) <= task.shots:
        raise UserError(f"{path}: {task.label} shows {task.shots} examples and asks another, so at least {task.shots + 1} are needed, got {len(items)}")
    random.Random(1337).shuffle(items) # files are often sorted
    return items


def is_sound(item, fields):
    """Is each field there and of its type, a list one of texts, `gold` the number of one of them, and every text one that can be encoded?"""
    if not isinstance(item, dict) or not all(type(item.get(field)) is kind for field, kind in fields.items()):
        return False
    options = [option for field, kind in fields.items() if kind is list for option in item[field]]
    if not all(isinstance(option, str) for option in options):
        return False
    try:
        for text in options + [item[field] for field, kind in fields.items() if kind is str]:
            check_unicode(text)
    except ValueError: # half a character
        return False
    return "gold" not in fields or 0 <= item["gold"] < len(options)


def download_bundle():
    """The public bundle in base_dir()/eval_bundle, fetched and unpacked once, whoever else wants it. Returns the folder that read_tasks takes."""
    root = base_dir() / "eval_bundle"
    with disk(root), FileLock(str(root) + ".lock"): # every rank of torchrun comes here at once
        if not root.is_dir():
            unpack_bundle(root)
    return root / "eval_data" if (root / "eval_data").is_dir() else root


def unpack_bundle(root):
    """Fetch the bundle and unpack it beside `root`, which appears when all of it is there."""
    archive, part = root.with_name("eval_bundle.zip"), root.with_name("eval_bundle.part")
    with httpx.Client(timeout=30) as client, tqdm(unit="B", unit_scale=True, desc="CORE bundle") as bar:
        fetch(client, BUNDLE, archive, lambda have: bar.update(have - bar.n))
    try:
        with zipfile.ZipFile(archive) as packed: # reading checks every file's CRC
            packed.extractall(part)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise UserError(f"{BUNDLE} arrived broken ({error}) and was thrown away: run again") from error
    inner = part / "eval_bundle"
    (inner if inner.is_dir() else part).rename(root)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

def shots_of(task, items, index):
    """The worked examples that are shown before example `index`: never itself."""
    drawn = random.Random(1234 + index).sample(range(len(items) - 1), task.shots)
    return [items[j + (j >= index)] for j in drawn]


def texts_of(task, items, index):
    """The whole texts that example `index` compares; for language_modeling (without the ending, with it)."""
    item, gap = items[index], task.delimiter
    shots = shots_of(task, items, index)
    if task.kind == "multiple_choice":
        before = "".join(f"{shot['query']}{gap}{shot['choices'][shot['gold']]}\n\n" for shot in shots)
        return [f"{before}{item['query']}{gap}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        before = "".join(f"{shot['context_options'][shot['gold']]}{gap}{shot['continuation']}\n\n" for shot in shots)
        return [f"{before}{context}{gap}{item['continuation']}" for context in item["context_options"]]
    before = "".join(f"{shot['context'].strip()}{gap}{shot['continuation']}\n\n" for shot in shots)
    asked = f"{before}{item['context'].strip()}{gap}"
    # the space before a word is part of its first token, so the question alone ends before that space
    return [asked.strip(), asked + item["continuation"]]


def common(sequences):
    """How many first elements all sequences share."""
    for n, column in enumerate(zip(*sequences)):
        if any(other != column[0] for other in column[1:]):
            return n
    return min(map(len, sequences))


def sequences_of(task, items, index, tokenizer):
    """[(ids, start)]: what is compared, bos first; the loss counts from token `start` on."""
    ids = [[tokenizer.bos, *tokens] for tokens in tokenizer.encode_batch(texts_of(task, items, index))]
    if task.kind == "language_modeling":
        return [(ids[1], min(common(ids), len(ids[1]) - 1))]
    if task.kind == "multiple_choice":
        start = min(common(ids), min(map(len, ids)) - 1) # a choice that begins another one has one token of its own all the same
        return [(sequence, start) for sequence in ids]
    ending = min(common([sequence[::-1] for sequence in ids]), min(map(len, ids)) - 1)
    return [(sequence, len(sequence) - ending) for sequence in ids]


def crop(sequences, room):
    """
    Sequences of at most `room` tokens: each loses its oldest ones, but for the bos. All lose equally many where that leaves what is
    scored, so that they go on sharing their beginning. Returns (sequences, were any cropped).
    """
    drops = [max(0, len(ids) - room) for ids, _ in sequences]
    most = max(drops)
    if all(most < start for _, start in sequences):
        drops = [most] * len(drops)
    return [(ids[:1] + ids[1 + drop:], max(1, start - drop)) for (ids, start), drop in zip(sequences, drops)], most > 0


# ---------------------------------------------------------------------------------------------------------------------
# Rows: the shared beginning once, then the endings

@dataclass
class Row:
    """Entries of one example, and of each of its sequences the columns that predict its scored tokens, and those tokens."""
    ids: list
    parent: list     # the column of the token before each in its own sequence; -1 = there is none
    positions: list
    branch: list     # 0 = shared beginning, 1.. = ending
    scored: list     # [(columns, targets)], one pair a sequence
    gold: int


def make_row(sequences, gold):
    """The last token of a sequence is only ever predicted, so it is not read."""
    inputs = [ids[:-1] for ids, _ in sequences]
    shared = common(inputs)
    first = inputs[0]
    row = Row(first[:shared], list(range(-1, shared - 1)), list(range(shared)), [0] * shared, [], gold)
    assert shared, "sequences share at least their bos"
    for n, ((ids, start), mine) in enumerate(zip(sequences, inputs), 1):
        shift = len(row.ids) - shared
        row.ids += mine[shared:]
        row.parent += [t + shift - 1 if t > shared else shared - 1 for t in range(shared, len(mine))]
        row.positions += range(shared, len(mine))
        row.branch += [n] * (len(mine) - shared)
        row.scored.append(([t if t < shared else t + shift for t in range(start - 1, len(mine))], ids[start:]))
    return row


def read_rows(gpt, rows, vocab_size):
    """Rows in one forward -> for each row [(mean nats, every token was the likeliest)], one pair a sequence."""
    B, N, device = len(rows), max(len(row.ids) for row in rows), gpt.device
    fill = lambda name, pad: torch.tensor([getattr(row, name) + [pad] * (N - len(row.ids)) for row in rows], device=device) # (B, N)
    ids, parent, positions, branch = fill("ids", 0), fill("parent", -1), fill("positions", 0), fill("branch", -1)
    if all(len(row.scored) == 1 for row in rows):
        see = "causal" # padding comes last, where nobody looks back from
    else:
        own = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
        see = (own & torch.ones(N, N, dtype=torch.bool, device=device).tril())[:, None]
    before, column, of = [], parent, lambda values, column: values.gather(1, column.clamp(min=0)).masked_fill(column < 0, -1)
    for _ in range(gpt.config.previous): # each token behind those of its own sequence
        before.insert(0, of(ids, column))
        column = of(parent, column)
    entries = gpt.embed(ids.reshape(-1, 1), torch.stack(before, dim=-1).flatten(0, 1))
    entries.x, entries.values = entries.x.view(B, N, -1), [value.view(B, N, -1) for value in entries.values]
    hidden = gpt.trunk(entries, positions, see)

    scored = [(b, column, target) for b, row in enumerate(rows) for columns, targets in row.scored for column, target in zip(columns, targets)]
    place, column, target = torch.tensor(scored, device=device).T # (S,) each
    nats, hits = [], []
    for some, wanted in zip(hidden[place, column].split(HEAD_ROWS), target.split(HEAD_ROWS)):
        logits = gpt.head(some)[:, :vocab_size]
        nats += F.cross_entropy(logits, wanted, reduction="none").tolist()
        hits += (logits.argmax(dim=-1) == wanted).tolist()
    out, at = [], 0
    for row in rows:
        out.append([])
        for _, targets in row.scored:
            n = len(targets)
            out[-1].append((sum(nats[at:at + n]) / n, all(hits[at:at + n])))
            at += n
    return out


def right(task, results, gold):
    if task.kind == "language_modeling":
        return results[0][1]
    losses = [nats for nats, _ in results]
    return losses.index(min(losses)) == gold


def batches(rows, tokens):
    """Rows of like lengths together, at most `tokens` entries a batch with the padding (one row may have more)."""
    batch = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate_task(gpt, tokenizer, task, items, most=-1, tokens=8192, dist=Dist()):
    """
    Ask the first `most` examples (-1 = all); the worked ones are drawn from all of them. Ranks share the examples.
    tokens  entries in one forward
    Returns dict(label, n, accuracy, centered, cropped, seconds), the same on every rank; cropped is a share of n.
    """
    began = time.perf_counter()
    total = len(items) if most < 0 else min(most, len(items))
    mine = range(dist.rank, total, dist.world)
    counts = torch.zeros(3, dtype=torch.int64) # right, asked, cropped
    with tqdm(total=len(mine), desc=f"{task.label:32}", unit="q", disable=None if dist.main else True, leave=False) as bar:
        for first in range(0, len(mine), WINDOW):
            rows = []
            for index in mine[first:first + WINDOW]:
                sequences, cropped = crop(sequences_of(task, items, index, tokenizer), gpt.config.seq_len)
                rows.append(make_row(sequences, items[index].get("gold", 0)))
                counts[2] += cropped
            for batch in batches(rows, tokens):
                for row, results in zip(batch, read_rows(gpt, batch, tokenizer.vocab_size)):
                    counts += torch.tensor([right(task, results, row.gold), 1, 0])
                bar.update(len(batch))
    if dist.world > 1:
        td.all_reduce(counts) # a CPU tensor: by gloo, whatever the device
    hits, n, cropped = counts.tolist()
    accuracy, guess = hits / n, task.guess / 100
    return dict(label=task.label, n=n, accuracy=accuracy, centered=(accuracy - guess) / (1 - guess), cropped=cropped / n, seconds=time.perf_counter() - began)


def evaluate(gpt, tokenizer, folder, most=-1, tokens=8192, dist=Dist(), show=lambda result: None):
    """
    All tasks of a folder. Returns dict(core, tasks, missing): core is None when a task's file is missing, a mean over some
    of the tasks would not be CORE. show(result) is called after each task.
    """
    tasks = read_tasks(folder)
    missing = [task.file for task in tasks if find_file(folder, task) is None]
    results = []
    for task in tasks:
        path = find_file(folder, task)
        if path is not None:
            results.append(evaluate_task(gpt, tokenizer, task, read_items(path, task), most, tokens, dist))
            show(results[-1])
    core = sum(result["centered"] for result in results) / len(results) if results and not missing else None
    return dict(core=core, tasks=results, missing=sorted(set(missing)))
