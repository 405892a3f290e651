"""
Does LensNet know what a question asks for? Rows that end in the answer to one, read as all rows are read (megacontext/evaluate.py), so that every way of
choosing is compared at equal edits with the measured gains. LensNet is asked as a session asks it after a prompt: megacontext/search.py.

T = tokens of a row, Q = blocks, n = rows
"""
import torch

from megacontext.evaluate import Rows, lens_quality, opened
from megacontext.search import block_scores
from megacontext.span import BLOCK
from megacontext.tree import MegaTree, make_header
from scripts.recall import token_ranges

SLACK = 128 # tokens of a conversation beyond those of a row: what is too much falls away at its start


def answer_rows(tokenizer, task, T, n):
    """
    n of a task's conversations as (rows (n, T + 1), tokens of each answer): the last block of a row is the answer's, the blocks before it are what the question and
    the text before it fill, and hold all of the evidence. Raises ValueError if the task has not so many of them.
    """
    rows, sizes = [], []
    for i in range(len(task)):
        if len(rows) == n:
            break
        conversation = task[i]
        ids, prompt = tokenizer.render(conversation)[0], tokenizer.render_prompt({"messages": conversation["messages"][:-1]})
        gone, answer = len(prompt) - 1 - (T - BLOCK), ids[len(prompt):][:BLOCK] # the row's last block begins with <|assistant_start|>, which says the first token
        if gone < 0 or any(start < gone for start, _ in token_ranges(tokenizer, conversation)):
            continue
        row = prompt[gone:] + answer
        rows.append(row + [tokenizer.bos] * (T + 1 - len(row)))
        sizes.append(len(answer))
    if len(rows) < n:
        raise ValueError(f"{len(rows)} of {len(task)} conversations fill a row of {T} tokens and keep what they ask for, expected {n}")
    return torch.tensor(rows), sizes


def ask(networks, rows, sizes, W, rng):
    """lens_quality of reading the answers, of so many tokens each, at the end of these rows within W entries."""
    some = Rows(networks, rows, W, rng)
    now = some.T - BLOCK # where the answers begin
    for i, row in enumerate(rows.tolist()):
        tree = MegaTree.in_memory(make_header(networks.gpt.config.width, 0))
        tree.append_tokens(row[:now])
        some.scores["lensnet"][i, -1, :-1] = block_scores(networks.lensnet, tree, lambda centres: now - centres, some.device)
    last, = opened(some, BLOCK)
    for i, size in enumerate(sizes):
        last.gain[i, :, size:] = 0 # what follows an answer is nobody's
    return lens_quality(some, [last])
