"""
What a model that chats can do, task by task, with its memory and without:

python -m scripts.chat_eval --stage sft --both                       # tasks that need no data: sums, spelling, recall, code
python -m scripts.chat_eval --stage sft --both --seconds 3           # the same on a laptop, in about a minute
python -m scripts.chat_eval --stage sft --tasks chatcore             # ARC, MMLU, GSM8K, HumanEval, SpellingBee
python -m scripts.chat_eval --tasks passkey@8x,codeqa@64x            # in a text of 8 and of 64 times the longest training row
python -m scripts.chat_eval --tasks keyvalue,variables@8x,frequent@8x,babi1@8x,babi2@8x,babi3@8x    # more of the sort, left out above for time

On 8 GPUs: torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval --tasks chatcore

A multiple-choice question is answered by the letter with the highest logit, every other one by what the model says at temperature 0
before it ends its turn. Of a conversation of several turns the last answer counts, after the right ones. Each question starts
with an empty memory. A text longer than the row overflows the plain model by the rule of nanochat.engine.PlainStream.
Writes the section `chat` of the report; several stages stand there side by side.
"""
import argparse
import re
import time
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as td
from tqdm import tqdm

from nanochat import hardware, report
from nanochat.common import STAGES, UserError, all_or_none, cleanup, print0, run_main, setup
from nanochat.dataset import add_data_dir, use_data_dir
from nanochat.engine import Engine, LeftPadded
from nanochat.run import duration, short
from scripts.load import load_stage, open_stream
from scripts.mixtures import SPARE, texts_of
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.babi import Babi
from tasks.codeqa import CodeQuestions, Sources, TopicShift
from tasks.common import Task, clip, final_text
from tasks.gsm8k import GSM8K
from tasks.haystack import Filler
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.needle import KeyValue, MultiKey, Passkey
from tasks.ruler import FrequentWords, VariableTracking
from tasks.spellingbee import SimpleSpelling, SpellingBee

OFFLINE = "arithmetic,spelling,spellingbee,passkey,multikey,codeqa,topicshift,passkey@8x,multikey@8x,codeqa@8x"
CHATCORE = "arc_easy,arc_challenge,mmlu,gsm8k,humaneval,spellingbee"

parser = argparse.ArgumentParser(description="Evaluate a model that chats", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--stage", default="sft", help="mid, sft or rl")
parser.add_argument("--tag", default="", help="name of the checkpoint folder (empty = the newest)")
parser.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the last)")
parser.add_argument("--tasks", default=OFFLINE, help="comma list; chatcore stands for six of them; NAME@8x asks in a text of 8 rows")
parser.add_argument("--max-problems", type=int, default=50, help="questions of each task (-1 = all)")
parser.add_argument("--seconds", type=float, default=-1, help="begin no further question of a task after so long, with memory and without (-1 = no limit)")
parser.add_argument("--no-memory", action="store_true", help="the plain model only")
parser.add_argument("--both", action="store_true", help="with memory and without (default: with, where there is one)")
parser.add_argument("--budget", type=int, default=None, help="entries that the memory reads at once (default: half its longest row)")
parser.add_argument("--source", default="stdlib", help="long texts that facts are hidden in and questions are asked about")
parser.add_argument("--device-batch", type=int, default=8, help="questions answered at once without memory; halve it when memory runs out")
parser.add_argument("--seed", type=int, default=0, help="of the generated questions")
parser.add_argument("--device", default="", help="cuda, mps or cpu (empty = the best there is)")
parser.add_argument("--dtype", default="auto", help="of the weights: auto, bf16 or fp32")
add_data_dir(parser)


# ---------------------------------------------------------------------------------------------------------------------
# Exams

@dataclass
class Exam:
    name: str
    task: Task
    max_tokens: int     # of an answer
    guess: float = 0.0  # share right by chance


class Exams:
    """Exams by name. The long texts are read and parsed when the first exam needs them, and shared: they remember what was measured."""

    def __init__(self, tokenizer, source, seq_len, seed):
        self.source, self.seq_len, self.seed = source, seq_len, seed
        self.measure = lambda text: len(tokenizer.encode(text))

    @cached_property
    def texts(self):
        return texts_of(self.source, "val")

    @cached_property
    def filler(self):
        return Filler(self.texts, self.measure)

    @cached_property
    def sources(self):
        return Sources(self.texts, self.measure)

    def build(self, name):
        """The exam of a name such as passkey or passkey@8x. Raises UserError or ValueError when its data is not there, or rows are too short for what is asked."""
        base, rows = split_name(name)
        settings = dict(seed=self.seed, split="test")
        if base in SHORT:
            make, max_tokens = SHORT[base]
            exam = Exam(name, make(settings), max_tokens, guess=0.25 if base in ("arc_easy", "arc_challenge", "mmlu") else 0.0)
        else:
            make, max_tokens = LONG[base]
            exam = Exam(name, make(self, settings | dict(length=self.seq_len - SPARE if rows is None else self.seq_len * rows)), max_tokens)
        exam.task[0] # some tasks find only here that their texts do not hold what they ask about
        return exam


# name -> (how the task is made from its settings, most tokens of an answer)
SHORT = {"arithmetic": (lambda generated: Arithmetic(**generated), 64), "spelling": (lambda generated: SimpleSpelling(**generated), 48),
         "spellingbee": (lambda generated: SpellingBee(**generated), 96), "gsm8k": (lambda _: GSM8K("test"), 256), "humaneval": (lambda _: HumanEval(), 512),
         "arc_easy": (lambda _: ARC("easy", "test"), 1), "arc_challenge": (lambda _: ARC("challenge", "test"), 1), "mmlu": (lambda _: MMLU("test"), 1)}
LONG = {"passkey": (lambda held, long: Passkey(held.filler, **long), 32), "multikey": (lambda held, long: MultiKey(held.filler, **long), 32),
        "keyvalue": (lambda held, long: KeyValue(short=True, measure=held.measure, **long), 16), "variables": (lambda held, long: VariableTracking(held.filler, **long), 32),
        "frequent": (lambda held, long: FrequentWords(measure=held.measure, **long), 32), "codeqa": (lambda held, long: CodeQuestions(held.sources, **long), 64),
        "topicshift": (lambda held, long: TopicShift(held.sources, **long), 64),
        **{f"babi{n}": (lambda held, long, n=n: Babi(held.filler, task=n, **long), 16) for n in (1, 2, 3)}}


def split_name(name):
    """passkey -> ("passkey", None), passkey@8x -> ("passkey", 8)"""
    found = re.fullmatch(r"([a-z0-9_]+)(?:@([1-9]\d*)x)?", name)
    if found is None or found[1] not in (LONG if found[2] else SHORT | LONG):
        raise UserError(f"no task {name!r}: expected some of {', '.join([*SHORT, *LONG])}, chatcore, or one of {', '.join(LONG)} with @8x after it")
    return found[1], int(found[2]) if found[2] else None


def names_of(tasks):
    """The comma list with chatcore written out, each name once; UserError for a name that is none."""
    names = []
    for name in tasks.replace(" ", "").split(","):
        names += CHATCORE.split(",") if name == "chatcore" else [name]
    for name in names:
        split_name(name)
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def letters(loaded, engine, conversations, memory, budget):
    """The letter with the highest logit, for each question."""
    tokenizer, prompts = loaded.tokenizer, [loaded.tokenizer.render_prompt(c) for c in conversations]
    if memory or max(map(len, prompts)) > loaded.gpt.config.seq_len:
        logits = [engine.check(open_stream(loaded, memory, budget).feed(prompt)) for prompt in prompts]
    else:
        logits = engine.check(LeftPadded(loaded.gpt, prompts, 0).read())
    out = []
    for row, conversation in zip(logits, conversations):
        ids = [tokenizer.encode(letter) for letter in conversation["letters"]]
        assert all(len(one) == 1 for one in ids), "a letter is one byte, and so one token"
        out.append(conversation["letters"][row[[one[0] for one in ids]].argmax().item()])
    return out


def texts(loaded, engine, conversations, memory, budget, max_tokens):
    """What is said at temperature 0, for each question."""
    prompts = [loaded.tokenizer.render_prompt(c) for c in conversations]
    fit = [not memory and len(prompt) + max_tokens <= loaded.gpt.config.seq_len for prompt in prompts]
    said = [None if ok else list(engine.generate(open_stream(loaded, memory, budget), prompt, max_tokens, temperature=0)) for prompt, ok in zip(prompts, fit)]
    if any(fit):
        together = iter(engine.generate_batch(loaded.gpt, [prompt for prompt, ok in zip(prompts, fit) if ok], 1, max_tokens, temperature=0))
        said = [next(together)[0].ids if ok else ids for ids, ok in zip(said, fit)]
    return [loaded.tokenizer.decode(ids) for ids in said]


@torch.no_grad()
def sit(loaded, engine, exam, memory, args, dist):
    """
    One exam, with memory or without; ranks share the questions.
    Returns dict(n, right, accuracy, low, high, centered, seconds, example), the same counts on every rank.
    """
    began, total = time.perf_counter(), len(exam.task) if args.max_problems < 0 else min(args.max_problems, len(exam.task))
    mine, step, counts, example = range(dist.rank, total, dist.world), 1 if memory else args.device_batch, torch.zeros(2, dtype=torch.int64), None
    with tqdm(total=len(mine), desc=f"{exam.name:16} {'memory' if memory else 'plain':6}", unit="q", disable=None if dist.main else True, leave=False) as bar:
        for first in range(0, len(mine), step):
            asked = [exam.task[i] for i in mine[first:first + step]]
            if exam.task.kind == "choice":
                said = letters(loaded, engine, asked, memory, args.budget)
            else:
                said = texts(loaded, engine, asked, memory, args.budget, exam.max_tokens)
            counts += torch.tensor([sum(exam.task.evaluate(c, text) for c, text in zip(asked, said)), len(asked)])
            example = example or dict(wanted=asked[0]["answer"], said=final_text(said[0]))
            bar.update(len(asked))
            bar.set_postfix_str(f"{counts[0]} right")
            if 0 <= args.seconds <= time.perf_counter() - began:
                break
    if dist.world > 1:
        td.all_reduce(counts) # a CPU tensor: by gloo, whatever the device
    right, n = counts.tolist()
    low, high = report.wilson(right, n)
    return dict(n=n, right=right, accuracy=right / n, low=low, high=high, centered=(right / n - exam.guess) / (1 - exam.guess), seconds=time.perf_counter() - began, example=example)


def chatcore(exams, column):
    """Mean centered accuracy of the six tasks; None unless all six were measured: a mean over some of them is another number."""
    names = CHATCORE.split(",")
    if any(column not in exams.get(name, {}) for name in names):
        return None
    return sum(exams[name][column]["centered"] for name in names) / len(names)


# ---------------------------------------------------------------------------------------------------------------------
# The section

COLUMNS = ("plain", "memory")


def parts(entries):
    """The section of all stages measured so far, as Markdown."""
    out = ["Share of right answers in percent, its 95% interval (Wilson) and the number of questions; - is what was not asked for. NAME@8x: in a text of 8 times "
           "the longest training row, of which the plain model sees the end only."]
    for stage, entry in entries.items():
        rows = []
        for name, exam in entry["exams"].items():
            got = [exam.get(column) for column in COLUMNS]
            cells = [r and f"{100 * r['accuracy']:.1f} ({100 * r['low']:.0f}-{100 * r['high']:.0f}), n={r['n']}" for r in got]
            examples = [r["example"] for r in got if r]
            rows.append([name, *cells, *([clip(examples[-1][key], 40) for key in ("wanted", "said")] if examples else [None, None])])
        out += [f"### {stage} ({entry['tag']}, step {entry['step']})", report.table(("task", "plain", "with memory", "wanted, for one", "said"), rows)]
        scores = {column: entry["chatcore"][column] for column in COLUMNS if entry["chatcore"][column] is not None}
        out.append("\n".join(f"ChatCORE, {column}: **{score:.4f}**" for column, score in scores.items()) or f"ChatCORE: not measured, needs {CHATCORE.replace(',', ', ')}")
        missing = [f"- {name}: not measured, {exam['missing']}" for name, exam in entry["exams"].items() if "missing" in exam]
        out.append("\n".join(missing))
    return out


def results(entries):
    found = []
    for stage, entry in entries.items():
        for column in COLUMNS:
            where = dict(stage=stage, memory=column == "memory")
            found += [dict(measure=name, value=exam[column]["accuracy"], **{key: exam[column][key] for key in ("n", "low", "high")}, **where)
                      for name, exam in entry["exams"].items() if column in exam]
            if entry["chatcore"][column] is not None:
                found.append(dict(measure="ChatCORE", value=entry["chatcore"][column], **where))
    return found


def main():
    args = parser.parse_args()
    if args.max_problems == 0 or args.device_batch < 1:
        raise UserError(f"expected --max-problems of at least 1 or -1 and --device-batch of at least 1, got {args.max_problems} and {args.device_batch}")
    if args.both and args.no_memory:
        raise UserError("--both asks with memory and without, --no-memory without: use one of them")
    use_data_dir(args.data_dir)
    names, began = names_of(args.tasks), time.perf_counter()
    device, dist = setup(args.device, args.seed)
    dtype, _ = hardware.pick_dtype(hardware.describe(device), args.dtype)
    loaded = load_stage(args.stage, args.tag or None, args.step, device, dtype)
    columns = COLUMNS if args.both else ("plain",) if args.no_memory or loaded.gistnet is None else ("memory",)
    if "memory" in columns:
        open_stream(loaded, budget=args.budget) # no memory, or a budget that is too small: told before anything is asked
    engine, builder = Engine(loaded.tokenizer), Exams(loaded.tokenizer, args.source, loaded.gpt.config.seq_len, args.seed)
    print0(f"model       {loaded.stage} {loaded.tag}, step {loaded.meta['step']}")
    exams = {}
    for name in names:
        exams[name] = {}
        exam, missing = all_or_none(lambda: builder.build(name), dist)
        if missing is not None:
            exams[name]["missing"] = missing
            print0(f"{name:16} not measured, {missing}")
            continue
        for column in columns:
            with hardware.out_of_memory_told(f"in {name}, {column}", "Lower --device-batch" if column == "plain" else "Lower --budget"):
                result = exams[name][column] = sit(loaded, engine, exam, column == "memory", args, dist)
            print0(f"{name:16} {column:6} {100 * result['accuracy']:5.1f}% ({100 * result['low']:.0f}-{100 * result['high']:.0f}) of {result['n']:4} | {duration(result['seconds'])}")
    scores = {column: chatcore(exams, column) for column in COLUMNS}
    entry = dict(tag=loaded.tag, step=loaded.meta["step"], budget=args.budget, seed=args.seed, exams=exams, chatcore=scores, seconds=time.perf_counter() - began)
    if dist.main:
        entries = report.read_data("chat") | {args.stage: entry}
        entries = {stage: entries[stage] for stage in STAGES if stage in entries}
        path = report.write_section("chat", "Tasks", *parts(entries), data=entries, results=results(entries), seconds=sum(e["seconds"] for e in entries.values()))
        means = [f"mean_{column}={sum(e[column]['accuracy'] for e in exams.values() if column in e) / max(1, sum(column in e for e in exams.values())):.4f}" for column in columns]
        cores = [f"chatcore_{column}={score:.4f}" for column, score in scores.items() if score is not None]
        print0(" ".join([f"summary stage={args.stage} tag={loaded.tag}", *means, *cores, f"seconds={entry['seconds']:.1f} report={short(path)}"]))
    cleanup()


if __name__ == "__main__":
    run_main(main)
