"""
Talk to a trained model in the terminal, with its memory on:
python -m scripts.chat_cli

One question, one answer; or a question about a long text:
python -m scripts.chat_cli -p "What is 12*34?"
python -m scripts.chat_cli --file mylib.py -p "Which arguments does open_tree take?"

A memory that is still there tomorrow (the folder is made if it does not exist, and written after every answer):
python -m scripts.chat_cli --tree ~/memories/work
"""

import argparse
import signal
import sys
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import replace

from nanochat import hardware
from nanochat.common import UserError, run_main, setup
from nanochat.conversation import Conversation, Progress
from nanochat.engine import Engine, Sampler
from scripts.load import add_flags, load_stage, open_stream, room, telemetry_maker

TURNS = 20 # that /back can go back: each keeps what the model had in view

HELP = """/read FILE   put a text file in front of your next message
/memory      the working context: how many entries of each level, where
/pin A B     keep tokens A up to B of the history in view as tokens (/memory tells places)
/never A B   show tokens A up to B as tokens no more, at most as part of a gist
/unpin       let go of all that is pinned or never shown
/back        forget your last message and its answer, and have pinned what was pinned then; what was said before this start stays
/new         forget this conversation and start another
/help        this list
/quit        leave (so does Ctrl-D; Ctrl-C stops an answer)"""

parser = argparse.ArgumentParser(description="Talk to a trained model in the terminal", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
# what is said
parser.add_argument("-p", "--prompt", default=None, help="answer this and leave (- = read it from standard input)")
parser.add_argument("--file", default=None, help="a text file in front of the first message")
add_flags(parser)
parser.add_argument("--tree", default=None, help="a folder that keeps the memory; an existing one is continued")
# how it speaks
parser.add_argument("--temperature", type=float, default=0.6, help="0 = always the likeliest token")
parser.add_argument("--top-k", type=int, default=50, help="choose among the K likeliest tokens (-1 = all)")
parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest tokens that hold this mass (1 = all)")
parser.add_argument("--max-tokens", type=int, default=512, help="longest answer (-1 = no limit)")
parser.add_argument("--seed", type=int, default=-1, help="the same seed says the same (-1 = other words each time)")


def settings_of(args):
    """What Engine.generate takes, from flags; a wrong one is told before a model is loaded."""
    top_k, top_p = None if args.top_k == -1 else args.top_k, None if args.top_p == 1.0 else args.top_p
    try:
        Sampler(args.temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    return dict(max_tokens=None if args.max_tokens == -1 else args.max_tokens, temperature=args.temperature, top_k=top_k, top_p=top_p,
                seed=None if args.seed == -1 else args.seed)


def read_text(path):
    """A file as text, for people: absent, a folder or not UTF-8 are each one clear line."""
    try:
        with open(path, encoding="utf-8-sig") as file: # a byte-order mark is no part of a text, as in nanochat/documents.py
            return file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


@contextmanager
def ctrl_c():
    """Ctrl-C as a flag to look at between tokens: as an exception inside a forward it would leave the memory half-written."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


BRACKETS = {"text": ("", ""), "python": ("[", ""), "output": (" = ", "]")} # [12*3 = 36]: what the calculator was asked and said


def answer(conversation, message, settings, out):
    """Say the answer as it comes; how far a long text is read goes to stderr. Returns the number of tokens said."""
    kind, count, shown = "text", 0, sys.stderr.isatty()
    with ctrl_c() as pressed:
        for piece in conversation.reply(message, **settings):
            if isinstance(piece, Progress):
                if shown:
                    print(f"\rreading: {piece.done:,} of {piece.total:,} tokens ", end="", file=sys.stderr, flush=True)
            else:
                count += 1
                if piece.text:
                    out.write((BRACKETS[kind][1] + BRACKETS[piece.kind][0] if piece.kind != kind else "") + piece.text)
                    out.flush()
                    kind = piece.kind
            if pressed.is_set():
                out.write(" (stopped)")
                break
    out.write(BRACKETS[kind][1] + "\n")
    out.flush()
    return count


def summary(view):
    """A view of the memory (see Session.view) as lines of text."""
    lines = [f"{view['tokens']:,} tokens of history, read through {view['used']:,} of {view['budget']:,} entries"]
    for level in sorted({span["level"] for span in view["spans"]}):
        spans = [span for span in view["spans"] if span["level"] == level]
        covered = sum(span["stop"] - span["start"] for span in spans)
        name = "raw blocks" if level == 0 else f"gists of level {level}"
        lines.append(f"  {len(spans):5} {name}, {covered:,} tokens between {spans[0]['start']:,} and {spans[-1]['stop']:,}")
    return "\n".join(lines)


PINS = {"/pin": "raw", "/never": "never"} # command -> field of Pins


def pin(session, command, text):
    """
    Keep a range of the history, "A B", raw or never raw, beside those that are. UserError where it is none, is both, or the budget could not keep it raw whatever
    the history becomes.
    """
    words = text.replace(",", "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise UserError(f"expected {command} A B, two places in the history, got {text!r}")
    start, stop = map(int, words)
    if not start < stop <= session.length:
        raise UserError(f"expected {command} A B with A below B, and B at most {session.length}, where the history ends, got {start} and {stop}")
    kind = PINS[command]
    session.pins = replace(session.pins, **{kind: (*getattr(session.pins, kind), (start, stop))})
    session.refocus()


def change_pins(session, command, text):
    """What /pin, /never or /unpin does, told in a line."""
    if command == "/unpin":
        session.pins = replace(session.pins, raw=(), never=())
        return "nothing is pinned any more"
    try:
        pin(session, command, text)
    except UserError as error:
        return str(error)
    named = (("pinned", session.pins.raw), ("never shown", session.pins.never))
    return "; ".join(f"{name}: " + ", ".join(f"{start:,} to {stop:,}" for start, stop in ranges) for name, ranges in named if ranges)


def no_way_back(conversation):
    """Why there is no message that /back could take back."""
    if conversation.turns:
        return f"the last {TURNS} messages are gone: no further back"
    older = conversation.stream.length
    return "nothing to go back to: no message was said here yet" + (f". The {older:,} tokens in memory are from before this start, and stay" if older else "")


def main():
    args = parser.parse_args()
    settings = settings_of(args)
    before = "" if args.file is None else read_text(args.file) + "\n\n"
    if args.no_memory and args.tree is not None:
        raise UserError("--tree keeps the memory and --no-memory has none: use one of them")
    telemetry = telemetry_maker(args)()
    device, _ = setup(args.device)
    dtype, _ = hardware.pick_dtype(hardware.describe(device), args.dtype)
    loaded = load_stage(args.stage, args.tag, args.step, device, dtype)
    if args.stage == "base":
        print("note: a base model was never taught to answer, it continues text", file=sys.stderr)
    helps = room(device, dtype, "Say less at once" if args.no_memory else "Lower --budget")
    with hardware.out_of_memory_told("(a memory that --tree keeps is as it was after the last answer)", helps):
        talk(args, loaded, settings, before, telemetry, helps)


def talk(args, loaded, settings, before, telemetry, helps):
    """One question, or all that is typed. before: text that stands in front of the first message; helps: what to do where memory runs out."""
    engine = Engine(loaded.tokenizer)

    def begin():
        return Conversation(engine, open_stream(loaded, not args.no_memory, args.budget, args.tree, telemetry))

    def keep(conversation):
        if args.tree is not None:
            conversation.finish()
            conversation.stream.save(args.tree)

    conversation, marks = begin(), deque(maxlen=TURNS)
    if args.prompt is not None:
        answer(conversation, before + (sys.stdin.read() if args.prompt == "-" else args.prompt), settings, sys.stdout)
        keep(conversation)
        return
    memory = "no memory" if args.no_memory else f"{conversation.stream.length:,} tokens in memory"
    print(f"{loaded.stage}/{loaded.tag}, step {loaded.meta['step']}, {memory}. /help lists the commands")
    while True:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return
        elif command == "/help":
            print(HELP)
        elif command == "/memory":
            print(summary(conversation.stream.view()))
        elif command == "/new":
            if args.tree is not None:
                print(f"the memory in {args.tree} goes on: leave, and start with another --tree")
            else:
                if telemetry is not None:
                    telemetry.next_session()
                conversation, before = begin(), ""
                marks.clear()
        elif command == "/back":
            if marks:
                conversation.rewind(marks.pop())
                keep(conversation)
                print(f"back to {conversation.stream.length:,} tokens")
            else:
                print(no_way_back(conversation))
        elif command in (*PINS, "/unpin"):
            print("--no-memory has nothing to pin" if args.no_memory else change_pins(conversation.stream, command, rest))
            keep(conversation)
        elif command == "/read":
            try:
                before += read_text(rest.strip()) + "\n\n"
                print(f"{len(before):,} characters will stand in front of your next message")
            except UserError as error:
                print(error)
        elif line.startswith("/"):
            print(f"no command {command}: /help lists them")
        elif line:
            print("\nmodel: ", end="", flush=True)
            marks.append(conversation.mark())
            told = None
            try:
                with hardware.out_of_memory_told("in this answer", helps):
                    answer(conversation, before + line, settings, sys.stdout)
            except UserError as error:
                told = str(error) # the error itself holds what the failed forward held
            before = ""
            if told is None:
                keep(conversation)
            else:
                conversation.rewind(marks.pop())
                print(f"\n{told}\nYour message, with what stood in front of it, is forgotten; what was said before is not")


if __name__ == "__main__":
    run_main(main)
