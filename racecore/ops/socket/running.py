"""Running sums of a softmax: the largest logit, the sum of weights relative to it, and the weighted sum of values, by row.

Within a segment they are of the dtype of the arithmetic, and `flush` adds them to float64 sums [R, 2 + V]: peak, weight, values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from racecore.jit import helper
from racecore.ops.elementary import exp_of_nonpositive
from racecore.ops.socket.listed import paired_column
from racecore.ops.vectors import highest, lanes, load, maximum, spread, store, total

__all__ = ["clear", "flush", "highest_logit", "raise_peak", "turn_into_weights"]


@helper
def clear(out: np.ndarray) -> None:
    """Let sums [R, 2 + V] be those of no token."""
    for r in range(out.shape[0]):
        out[r, 0] = -np.inf
        for d in range(1, out.shape[1]):
            out[r, d] = 0


@helper
def highest_logit(c: np.ndarray, r: int, n: int) -> Any:
    """Return the largest of c[r, :n]; the rest of the block becomes minus infinity."""
    for i in range(n, c.shape[1]):
        c[r, i] = -np.inf
    best = load(c, r, 0)
    for i in range(lanes(c), c.shape[1], lanes(c)):
        best = maximum(best, load(c, r, i))
    return highest(best)


@helper
def turn_into_weights(c: np.ndarray, r: int, n: int, peak: Any) -> Any:
    """Turn logits c[r, :n] into weights relative to a peak, the rest of the block into 0; return their sum."""
    base = spread(peak)
    added = base - base
    for i in range(0, c.shape[1], lanes(c)):
        share = exp_of_nonpositive(load(c, r, i) - base)
        store(c, r, i, share)
        added = added + share
    if n < c.shape[1]:
        added = base - base
        for i in range(n, c.shape[1]):
            c[r, i] = 0
        for i in range(0, c.shape[1], lanes(c)):
            added = added + load(c, r, i)
    return total(added)


@helper
def raise_peak(r: int, top: Any, peak: np.ndarray, weight: np.ndarray, sums: np.ndarray) -> None:
    """Let what row r has been summed to be relative to a new largest logit."""
    if weight[r] > 0:
        factor = sums.dtype.type(math.exp(peak[r] - top))
        weight[r] *= factor
        for d in range(sums.shape[1]):
            sums[r, d] *= factor
    peak[r] = top


@helper
def flush(n_rows, width, is_paired, peak, weight, sums, out):
    """Add a segment to the float64 sums out [R, 2 + V]. If `is_paired`, columns of `sums` are in paired order, see `listed`."""
    for r in range(n_rows):
        if weight[r] == 0:
            continue
        old, new = out[r, 0], np.float64(peak[r])
        top = old if old >= new else new
        past = math.exp(old - top) if out[r, 1] != 0 else 0.0
        present = math.exp(new - top)
        out[r, 0] = top
        out[r, 1] = out[r, 1] * past + np.float64(weight[r]) * present
        for d in range(width):
            column = 2 + (paired_column(d) if is_paired else d)
            out[r, column] = out[r, column] * past + np.float64(sums[r, d]) * present
