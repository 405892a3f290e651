"""What the tests put into a tree, as functions of where it stands: so any tree, however it came about, can be checked in full."""

import numpy as np

from megacontext.span import BLOCK
from megacontext.tree import make_header

D, K = 24, 8
HEADER = make_header(width=D, key_width=K, model="gpt-1", tokenizer="tok-1", gistnet="gist-1")


def vectors(level, a, b, width, salt=0):
    """What node a..b of a level holds in these tests, a function of its name, exact in bfloat16."""
    nodes = np.arange(a, b, dtype=np.int64)[:, None] * 31 + np.arange(width) * 7 + level * 3 + salt
    return (nodes % 251 - 125).astype(np.float32)


def ids(a, b, salt=0):
    p = np.arange(a, b, dtype=np.int64)
    return (p * 2654435761 + salt * 97) % (2 ** 31)


def ingest(tree, n, salt=0, gists=True):
    tree.append_tokens(ids(tree.length, tree.length + n, salt))
    level = 1
    while gists:
        a, b = tree.pending(level)
        if b == 0:
            return
        tree.append_gists(level, vectors(level, a, b, D, salt), vectors(level, a, b, K, salt + 1))
        level += 1


def check_tree(tree, length=None, salt=0):
    """Everything in it is what these tests put in."""
    assert length is None or tree.length == length
    np.testing.assert_array_equal(tree.tokens(0, tree.length), ids(0, tree.length, salt))
    for level in range(1, tree.levels + 1):
        n = tree.count(level)
        assert n == tree.length // BLOCK ** level
        np.testing.assert_array_equal(tree.gists(level, 0, n), vectors(level, 0, n, D, salt))
        np.testing.assert_array_equal(tree.keys(level, 0, n), vectors(level, 0, n, K, salt + 1))
