"""
The seeds' worked example, a long coding session (seeds/000, "Example 1"), with its arithmetic put right.

The scenario is theirs: a code base of 100,000 tokens, a question about logging in, a change of mind to the database schema,
and back. Three of their sums do not add up; each is said where it is met:
- turn 1 covers 1,500 + 100 * 32 + 50 * 1,024 = 55,900 of the 100,000 tokens
- turn 2 opens two regions, closes two, and yet grows from 1,650 to 2,232
- turn 3 charges 1,023 for opening a level-2 gist (its 1,024 tokens are laid on it for as many; the ten blocks that are wanted cost 320), and pays 620 for edits worth 785
"""

import numpy as np
import pytest

from megacontext.allocator import Edit, Focus, refocus
from megacontext.span import GAIN, Span
from megacontext.tree import MegaTree, make_header
from megacontext.working_context import advance, assemble, check, cost, find
from tests.test_laws import expand

CODEBASE = 100_000
W_MAX = 8_192

# Where things are in the code base. Blocks and level-1 gists share their numbers: node n covers tokens 32 n .. 32 n + 31.
SCHEMA = 40               # schema.sql is the level-2 gist 40: tokens 40,960..41,983
SCHEMA_DETAIL = range(1285, 1295)  # ten blocks of it, the table definitions
DATABASE = range(3000, 3015)       # database.py, fifteen blocks that are gists at first
LOGIN, TWO_FACTOR = 3050, 3060     # the login method, the 2FA helper: gists at first
OLD = (3078, 3079)                 # the end of another database file and an old session module, raw at first
USER_AUTH = range(3080, 3125)      # UserAuth.py, raw: the most recent file
PROTECTED = 0                      # the example protects no tail


@pytest.fixture(scope="module")
def tree():
    """The code base, ingested: real token ids, and gists that say who they are."""
    tree = MegaTree.in_memory(make_header(width=2, key_width=0, gist_dtype="float32"))
    tree.append_tokens(np.random.default_rng(0).integers(0, 50_000, CODEBASE))
    for level in range(1, 5):
        a, b = tree.pending(level)
        if b > a:
            tree.append_gists(level, np.stack([np.full(b - a, level), np.arange(a, b)], axis=1))
    return tree


def loaded():
    """Turn 1: the newest file raw, related files at level 1, the rest at level 2."""
    return [Span(2, i) for i in range(93)] + [Span(1, i) for i in range(2976, 3078)] + [Span(0, i) for i in range(3078, 3125)]


def settle(spans, wanted, budget, focus, top=2):
    """Ticks with scores that `wanted(span)` gives, of the schema's blocks too, until nothing moves any more: (spans, edits of each tick, focus)."""
    history = []
    for _ in range(60):
        beneath = [(Span(1, b), wanted(Span(1, b))) for b in range(SCHEMA * 32, SCHEMA * 32 + 32) if Span(0, b) not in spans]
        result = refocus(spans, [wanted(span) for span in spans], budget, focus, beneath=beneath, room=0, tail=PROTECTED, top=top)
        spans, focus = result.spans, result.focus
        check(spans, CODEBASE, budget, top)
        assert len(result.edits) <= 4
        if not result.edits:
            return spans, history, focus
        history.append(result.edits)
    raise AssertionError("the focus never settled")


def test_the_session_starts_with_its_system_prompt_raw():
    assert advance([], 24, W_MAX) == assemble(24, W_MAX) == [Span(0, 0, live=24)]


def test_the_tree_of_turn_1(tree):
    """100k tokens; 3,125 gists; 97 gists of gists, and 21 level-1 gists that wait for their family. And, here, level 3."""
    assert [tree.count(level) for level in range(5)] == [100_000, 3_125, 97, 3, 0]
    assert 3_125 - 97 * 32 == 21


def test_turn_1_tiles_the_code_base(tree):
    assert 1_500 + 100 * 32 + 50 * 1_024 == 55_900  # the seeds' numbers leave 44,100 tokens uncovered
    spans = loaded()
    check(spans, CODEBASE, W_MAX, top=2)
    raw, related, distant = (sum(span.level == level for span in spans) for level in (0, 1, 2))
    assert (raw * 32, related, distant) == (1_504, 102, 93)
    assert 1_504 + 102 * 32 + 93 * 1_024 == CODEBASE
    assert cost(spans) == 1_504 + 102 + 93 == 1_699
    # nothing forces level 2 here: 8,192 entries hold every block as a gist and the newest 5,216 tokens raw
    finest = assemble(CODEBASE, W_MAX)
    check(finest, CODEBASE, W_MAX, top=1)
    assert (cost(finest), sum(span.level == 0 for span in finest)) == (8_178, 163)


def turn_2(budget=1_699):
    def wanted(span):
        if span.level == 1:
            return 0.8 if span.index == LOGIN else 0.7 if span.index == TWO_FACTOR else 0.2
        if span.level == 0:
            return -0.5 if span.index in OLD else 0.2
        return -0.1
    return refocus(loaded(), [wanted(span) for span in loaded()], budget, Focus(), room=0, tail=PROTECTED, top=2)


def test_turn_2_opens_the_login_method_and_pays_for_it():
    """Two regions open (+62), two close (-62), in one tick of N_diff = 4. The budget is what the context already costs."""
    result = turn_2()
    assert result.edits == [Edit("collapse", Span(1, 3078)), Edit("expand", Span(1, LOGIN)),
                            Edit("collapse", Span(1, 3079)), Edit("expand", Span(1, TWO_FACTOR))]
    check(result.spans, CODEBASE, 1_699, top=2)
    assert cost(result.spans) == 1_699 + 2 * GAIN - 2 * GAIN == 1_699
    levels = [sum(span.level == level for span in result.spans) for level in (0, 1, 2)]
    assert levels == [47, 102, 93]
    assert set(loaded()) - set(result.spans) == {Span(1, LOGIN), Span(1, TWO_FACTOR), Span(0, 3078), Span(0, 3079)}


def turn_3(spans, focus):
    """"Actually, show me the database schema instead." """
    def wanted(span):
        if span.level == 2:
            return -0.1
        if span.index in DATABASE:
            return 0.9
        if span.index in SCHEMA_DETAIL:
            return 0.7
        return -0.6 if span.level == 0 else -0.2
    return settle(spans, wanted, 1_699, focus)


def test_turn_3_refocuses_on_the_schema_within_the_same_budget():
    """
    15 blocks of database.py, in the place of their gists, and 10 blocks of schema.sql, laid on its gist: 25 expansions, 785 entries (the seeds' 20
    collapses free 620). So 26 blocks of authentication code close, two swaps a tick but where a block's 32 entries take two payers.
    """
    assert 15 * GAIN + 10 * 32 == 785 and 25 * GAIN < 785 <= 26 * GAIN and 20 * GAIN == 620
    tick = turn_2()
    spans, history, _ = turn_3(tick.spans, tick.focus)
    edits = [edit for tick in history for edit in tick]
    opened = [edit.node for edit in edits if edit.kind == "expand"]
    closed = [edit.node for edit in edits if edit.kind == "collapse"]
    assert opened == [Span(1, i) for i in [*DATABASE, *SCHEMA_DETAIL]], "the hottest first"
    assert len(closed) == 26 and all(node.level == 1 for node in closed)
    assert all(node.index in USER_AUTH or node.index in (LOGIN, TWO_FACTOR) for node in closed)
    assert [len(tick) for tick in history] == [4] * 7 + [2] + [3] + [4] * 4 + [2]
    check(spans, CODEBASE, 1_699, top=2)
    assert Span(2, SCHEMA) in spans and cost(spans) == 1_699 + 785 - 806
    assert all(spans[find(spans, 32 * i)].level == 0 for i in [*DATABASE, *SCHEMA_DETAIL])


def test_a_block_under_a_level_2_gist_costs_32_not_1023():
    spans = loaded()
    opened = expand(spans, Span(1, SCHEMA * 32))
    check(opened, CODEBASE, W_MAX, top=2)
    assert cost(opened) - cost(spans) == 32
    everything = opened
    for i in range(SCHEMA * 32 + 1, SCHEMA * 32 + 32):
        everything = expand(everything, Span(1, i))
    assert cost(everything) - cost(spans) == 1_024 # of all 1,024 tokens, 32 expansions later


def test_back_to_authentication_nothing_was_lost(tree):
    """Login code closed in turn 3 opens again, and its tokens are the ones that were ingested, exactly."""
    truth = np.random.default_rng(0).integers(0, 50_000, CODEBASE)
    tick = turn_2()
    spans, _, focus = turn_3(tick.spans, tick.focus)
    closed = [span for span in spans if span.level == 1 and span.index in USER_AUTH]
    assert len(closed) >= 24
    spans, _, _ = settle(spans, lambda span: 0.9 if span.index in USER_AUTH and span.level < 2 else -0.5, 1_699, focus)
    assert all(spans[find(spans, 32 * i)] == Span(0, i) for i in USER_AUTH)
    for span in spans:
        if span.level == 0:
            assert (tree.tokens(span.start, span.stop) == truth[span.start:span.stop]).all()
        else:
            assert tree.gists(span.level, span.index, span.index + 1).tolist() == [[span.level, span.index]]


def test_the_conversation_goes_on_in_the_same_context():
    """Question and answer tokens arrive one by one; the live block becomes a block, and makes its own room."""
    spans, focus, budget = loaded(), Focus(), 1_760
    for length in range(CODEBASE + 1, CODEBASE + 321):
        spans = advance(spans, length, budget)
        check(spans, length, budget)
        if length % 32 == 0:
            scores = [-0.1 if span.level == 2 else 0.1 for span in spans]
            spans, edits, focus = refocus(spans, scores, budget, focus, tail=320)
            check(spans, length, budget - 32)
    assert [span for span in spans if span.start >= CODEBASE] == [Span(0, i) for i in range(3125, 3135)]
    assert spans[:2] == [Span(3, 0), Span(3, 1)]  # the coldest paid: 64 level-2 gists became the first two of level 3
