"""Online softmax: the largest logit, the sum of weights relative to it, and the weighted sum of
values, row by row.

Within a segment the sums have the dtype of the arithmetic; `add_segment` adds them to float64 sums
[R, 2 + V]: peak, weight, values. So a long sequence loses no more precision than a segment does.

Functions that run for every block take addresses, for the reason that `decode` gives. `like` is any
number of the dtype of the arithmetic. Rows are whole vectors.
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

__all__ = ["RowSums", "add_segment", "clear_sums", "weigh_row"]


class RowSums(NamedTuple):
    """Addresses of the sums of a row."""

    peak: int
    weight: int
    values: int
    width: int  # numbers of `values`, padded to whole vectors


@helper
def clear_sums(out: np.ndarray) -> None:
    """Set float64 sums [R, 2 + V] to those of no token."""
    for r in range(out.shape[0]):
        out[r, 0] = -np.inf
        for d in range(1, out.shape[1]):
            out[r, d] = 0


@helper
def weigh_row(logits: int, n: int, n_padded: int, sums: RowSums, like: Any) -> None:
    """Turn n logits of a row into weights exp(logit - peak), and add them to the row's weight.

    The peak is the largest logit so far. Weights n ... n_padded - 1 become 0.
    """
    end = logits + size_of(like) * n_padded
    for i in range(n, n_padded):
        store_number(-np.inf, logits + size_of(like) * i, like)
    # the peak, and the sums rescaled if it rises
    best = load_vector(logits, like)
    for address in range(logits + VECTOR_BYTES, end, VECTOR_BYTES):
        best = maximum(best, load_vector(address, like))
    block_peak = highest(best)
    peak = load_number(sums.peak, like)
    if not block_peak <= peak:  # also if it is NaN, which must stay visible
        _raise_peak(block_peak, peak, sums, like)
        peak = block_peak
    # the weights
    base = splat(peak)
    added = base - base
    for address in range(logits, end, VECTOR_BYTES):
        weights = exp_of_nonpositive(load_vector(address, like) - base)
        store_vector(weights, address)
        added = added + weights
    if n < n_padded:  # exp of -inf is the smallest normal number here, not 0
        added = base - base
        for i in range(n, n_padded):
            store_number(0, logits + size_of(like) * i, like)
        for address in range(logits, end, VECTOR_BYTES):
            added = added + load_vector(address, like)
    store_number(load_number(sums.weight, like) + total(added), sums.weight, like)


@helper
def _raise_peak(new: Any, old: Any, sums: RowSums, like: Any) -> None:
    """Rescale the sums of a row from the old largest logit to a new one."""
    weight = load_number(sums.weight, like)
    if weight > 0:
        factor = math.exp(old - new)
        store_number(weight * factor, sums.weight, like)
        end = sums.values + size_of(like) * sums.width
        for address in range(sums.values, end, VECTOR_BYTES):
            store_vector(load_vector(address, like) * splat(factor), address)
    store_number(new, sums.peak, like)


@helper
def add_segment(
    n_rows: int,
    width: int,
    is_paired: bool,
    peak: np.ndarray,
    weight: np.ndarray,
    sums: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add a segment, peak [R], weight [R] and sums [R, V], to the float64 sums out [R, 2 + V].

    If `is_paired`, columns of `sums` are in paired order, see `gathered_products`.
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
