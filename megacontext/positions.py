"""
Where an entry stands for the GPT: timeline positions in, positions within the trained range out.
Nobody's model reads positions beyond those it was trained on, and an unbounded timeline must not ask it to.
`compressed` is the policy; `absolute` and `clamped` are here to be compared with it.

Distance d counts back from the next token, which stands at `length` on the timeline:
    d <= trained/2    kept exactly, so what is near is read as in any plain context
    beyond            d0 + log(1 + k (d - d0)) / k, with d0 = trained/2
k is chosen so that the oldest token lands on 0. The slope is 1 at d0, so nothing jumps there, and falls off as 1/d: a log-like
fisheye. A history no longer than `trained` is left alone: there the model is exactly the plain GPT.

Takes a number, a float64 numpy array or a float64 torch tensor, gives the same back. float32 cannot tell neighbours apart
beyond 2**24 tokens: map in float64, narrow the result.
"""

from functools import lru_cache
from math import log1p

import numpy as np


def compressed(positions, length, trained):
    """True distances near, log-like far; monotone; 0 maps to 0 and `length` to `trained` (to rounding, about 1e-9)."""
    _check(positions, length, trained)
    if length <= trained:
        return positions
    d0 = trained // 2
    k = _rate(length - d0, trained - d0)
    distance = length - positions
    beyond = distance - d0
    beyond = (abs(beyond) + beyond) / 2  # max(beyond, 0), exact, and the same words for floats, numpy and torch
    return trained - (distance - beyond + _log1p(k * beyond) / k)


def absolute(positions, length, trained):
    """The timeline as it is: leaves the trained range as soon as the history does."""
    _check(positions, length, trained)
    return positions


def clamped(positions, length, trained):
    """True distances within the trained range; everything older is piled up at 0."""
    _check(positions, length, trained)
    shifted = positions - max(length - trained, 0)
    return (abs(shifted) + shifted) / 2


POLICIES = {"compressed": compressed, "absolute": absolute, "clamped": clamped}
map_positions = compressed


def _check(positions, length, trained):
    dtype = str(getattr(positions, "dtype", "float64"))
    if not dtype.endswith("float64"):
        raise ValueError(f"positions must be mapped in float64 and narrowed afterwards, got {dtype}")
    if trained < 2 or length < 0:
        raise ValueError(f"expected trained >= 2 and length >= 0 tokens, got trained={trained}, length={length}")


def _log1p(x):
    return x.log1p() if hasattr(x, "log1p") else np.log1p(x)


@lru_cache(maxsize=64)
def _rate(far, room):
    """
    The k > 0 with log(1 + k far) / k = room: `far` tokens of distance fit in `room` positions, slope 1 at the near end.
    h(k) = log(1 + k far) - room k is concave, 0 at 0 and rising there since far > room: one more root, to the right of its
    top. log(1 + y) <= sqrt(y) puts that root at or left of far / room**2, and from there Newton only ever steps left.
    """
    assert far > room > 0, f"nothing to compress: {far} tokens into {room} positions"
    k = far / room ** 2
    for _ in range(200):
        step = (log1p(k * far) - room * k) / (far / (1 + k * far) - room)
        if not step > k * 1e-15:  # not even one ulp to the left: this is the root
            return k
        k -= step
    raise AssertionError(f"no rate found for {far} tokens into {room} positions after 200 steps")
