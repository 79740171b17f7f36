"""Running sums of a softmax: the largest logit, the sum of weights relative to it, and the weighted
sum of values, by row.

Within a segment they are of the dtype of the arithmetic, and `flush` adds them to float64 sums [R,
2 + V]: peak, weight, values.

What is done for every block takes addresses: an array as an argument has its references counted,
which takes longer than a row of a block does. `like` is any number of the dtype of the arithmetic;
rows are whole vectors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from racecore.ops.simd.accumulators import scale_add
from racecore.ops.simd.elementary import exp_of_nonpositive
from racecore.ops.simd.vectors import (
    VECTOR_BYTES,
    first_interleaved,
    highest,
    load_number,
    load_vector,
    maximum,
    second_interleaved,
    size_of,
    splat,
    store_number,
    store_vector,
    total,
)
from racecore.runtime.jit import helper

__all__ = ["RowSums", "clear", "flush", "weigh_row"]


class RowSums(NamedTuple):
    """Addresses of the sums of a row."""

    peak: Any
    weight: Any
    values: Any
    width: Any  # of the values, padded


@helper
def clear(out: np.ndarray) -> None:
    """Let sums [R, 2 + V] be those of no token."""
    for r in range(out.shape[0]):
        out[r, 0] = -np.inf
        for d in range(1, out.shape[1]):
            out[r, d] = 0


@helper
def weigh_row(c: int, n: int, room: int, sums: RowSums, like: Any) -> None:
    """Turn n logits into weights relative to the largest one so far, and add those to the row's
    weight.

    Of the `room` of the block, what is behind the logits becomes 0.
    """
    end = c + size_of(like) * room
    for i in range(n, room):
        store_number(-np.inf, c + size_of(like) * i, like)
    best = load_vector(c, like)
    for place in range(c + VECTOR_BYTES, end, VECTOR_BYTES):
        best = maximum(best, load_vector(place, like))
    top, peak = highest(best), load_number(sums.peak, like)
    if not top <= peak:
        _raise_peak(top, peak, sums, like)
        peak = top
    base = splat(peak)
    added = base - base
    for place in range(c, end, VECTOR_BYTES):
        share = exp_of_nonpositive(load_vector(place, like) - base)
        store_vector(share, place)
        added = added + share
    if n < room:
        added = base - base
        for i in range(n, room):
            store_number(0, c + size_of(like) * i, like)
        for place in range(c, end, VECTOR_BYTES):
            added = added + load_vector(place, like)
    store_number(load_number(sums.weight, like) + total(added), sums.weight, like)


@helper
def _raise_peak(top: Any, peak: Any, sums: RowSums, like: Any) -> None:
    """Let what a row has been summed to be relative to a new largest logit."""
    weight = load_number(sums.weight, like)
    if weight > 0:
        factor = math.exp(peak - top)
        store_number(weight * factor, sums.weight, like)
        for place in range(sums.values, sums.values + size_of(like) * sums.width, VECTOR_BYTES):
            store_vector(load_vector(place, like) * splat(factor), place)
    store_number(top, sums.peak, like)


@helper
def flush(n_rows, width, is_paired, peak, weight, sums, out):
    """Add a segment to the float64 sums out [R, 2 + V]. If `is_paired`, columns of `sums` are in
    paired order, see `listed`.
    """
    like, whole = sums.dtype.type(0), VECTOR_BYTES // sums.itemsize
    for r in range(n_rows):
        if weight[r] == 0:
            continue
        old, new = out[r, 0], np.float64(peak[r])
        top = old if old >= new else new
        past = math.exp(old - top) if out[r, 1] != 0 else 0.0
        present = math.exp(new - top)
        out[r, 0] = top
        out[r, 1] = out[r, 1] * past + np.float64(weight[r]) * present
        source, target, d = sums[r].ctypes.data, out[r, 2:].ctypes.data, 0
        while is_paired and d < width:
            even, odd = load_vector(source, like), load_vector(source + VECTOR_BYTES, like)
            scale_add(target, past, first_interleaved(even, odd), present)
            scale_add(target + 8 * whole, past, second_interleaved(even, odd), present)
            source, target, d = source + 2 * VECTOR_BYTES, target + 16 * whole, d + 2 * whole
        while d + whole <= width:
            scale_add(target, past, load_vector(source, like), present)
            source, target, d = source + VECTOR_BYTES, target + 8 * whole, d + whole
        for i in range(d, width):
            out[r, 2 + i] = out[r, 2 + i] * past + np.float64(sums[r, i]) * present
