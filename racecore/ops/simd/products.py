"""The small matrix products inside a block of tokens.

All of a block's work but the element-wise is one of these, on C-contiguous scratch arrays that stay
in the nearest caches:

    project         C = M @ X.T       projections on planes                               [K, n]
    project_wide    C.T = X @ M.T     the same from a transposed M: better for many rows  [n, K]
    expand          X = C.T @ M       outputs from states, rows from their coefficients   [n, D]
    accumulate      M += C @ X        sums over the tokens of a block                     [K, D]

K counts planes or buckets, n tokens, D columns of a row. Coefficients C are stored with the token
as the last axis, so that element-wise work on them is vector code too. The plain twins are the
NumPy expressions above. Here matrices are covered with the register tiles of `ops.simd.tiles`;
scratch arrays are padded (`padded`) to whole vectors, with zeros where it matters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from racecore.ops.simd import tiles
from racecore.ops.simd.vectors import VECTOR_BYTES, lanes
from racecore.runtime.jit import helper

__all__ = [
    "NO_PREFETCH",
    "InputRows",
    "OutputRows",
    "PrefetchRows",
    "accumulate",
    "expand",
    "input_rows",
    "is_wide",
    "output_rows",
    "padded",
    "prefetch_rows",
    "project",
    "project_wide",
    "transpose",
]

# Columns: a vector of float32, two of float64.
_PADDING = 16
# The narrowest tile of `project_wide`: half a vector of float32.
_HALF = 8


@register_jitable
def padded(width: int) -> int:
    """Return the width rounded up to whole vectors."""
    return -(-width // _PADDING) * _PADDING


@register_jitable
def is_wide(n_rows: int) -> bool:
    """Return whether `project_wide` beats `project` for so many rows of M.

    It needs no sums across lanes, but rounds rows up to half vectors: it pays while the padding is
    less than half of the rows.
    """
    return n_rows >= _HALF and -n_rows % _HALF * 2 < n_rows


class InputRows(NamedTuple):
    """Rows that a product reads: scratch, or an input in place."""

    address: Any  # of the first row, int64
    row: int  # from a row to the next, in elements
    size: int  # bytes of an element; 2, bfloat16, only where a product allows it


@helper
def input_rows(x: np.ndarray) -> InputRows:
    """Return the rows of a scratch array, to be read."""
    return InputRows(np.int64(x.ctypes.data), x.shape[1], x.itemsize)


class PrefetchRows(NamedTuple):
    """Rows of an input that the next block of tokens will read.

    A core has few requests to memory under way at a time, so prefetching all of them at once would
    stall it. Products prefetch a few rows between their tiles: then memory works while the core
    calculates.
    """

    address: int  # of the first row
    row: int  # bytes from a row to the next
    lines: int  # cache lines of a row; 0: nothing to prefetch


NO_PREFETCH = PrefetchRows(0, 0, 0)


@helper
def prefetch_rows(next_rows: PrefetchRows, first: int, last: int) -> None:
    """Prefetch rows first ... last - 1."""
    for i in range(first, last):
        for line in range(next_rows.lines):
            tiles.prefetch(next_rows.address + i * next_rows.row + line * VECTOR_BYTES)


@helper
def project(
    m: np.ndarray, x: InputRows, n_rows: int, n: int, c: np.ndarray, next_rows: PrefetchRows
) -> None:
    """c[k, i] = <m[k], x[i]> for k < n_rows and i < n.

    Rows x may be bfloat16 if both n_rows and n are multiples of 4.
    """
    size, like = m.itemsize, m.dtype.type(0)
    m_row, c_row = m.shape[1], c.shape[1]
    count = m.shape[1] * size // VECTOR_BYTES  # vectors of a row
    k = 0
    while k < n_rows:
        i = 0
        mk = m.ctypes.data + size * k * m_row
        while i < n:
            xi = x.address + x.size * i * x.row
            ci = c.ctypes.data + size * (k * c_row + i)
            if x.size < size:
                tiles.dot_4x4_bfloat16(mk, m_row, xi, x.row, ci, c_row, count, like)
            elif k + 4 <= n_rows and i + 4 <= n:
                tiles.dot_4x4(mk, m_row, xi, x.row, ci, c_row, count, like)
            elif k + 4 <= n_rows:
                tiles.dot_4x1(mk, m_row, xi, x.row, ci, c_row, count, like)
            elif i + 4 <= n:
                tiles.dot_1x4(mk, m_row, xi, x.row, ci, c_row, count, like)
            else:
                tiles.dot_1x1(mk, m_row, xi, x.row, ci, c_row, count, like)
            step = 4 if i + 4 <= n else 1
            # the rows x are read once for every four rows of m; one pass prefetches all the next
            if k == 0:
                prefetch_rows(next_rows, i, i + step)
            i += step
        k += 4 if k + 4 <= n_rows else 1


@helper
def project_wide(
    m_t: np.ndarray, x: InputRows, n_rows: int, n: int, c_t: np.ndarray, next_rows: PrefetchRows
) -> None:
    """c_t[i, k] = <x[i], m_t[:, k]> for k < n_rows and i < n.

    Columns up to the next half vector and tokens up to a multiple of 8 are computed too: scratch
    has memory for them. Rows of an input are read in place only in blocks of a multiple of 8
    tokens: beyond its last row there may be no memory at all.
    """
    size, like = m_t.itemsize, m_t.dtype.type(0)
    half = lanes(m_t) // 2
    m_row, c_row, count = m_t.shape[1], c_t.shape[1], m_t.shape[0]
    k = 0
    while k < n_rows:
        left = -(-(n_rows - k) // half)  # half vectors
        mk = m_t.ctypes.data + size * k
        for i in range(0, n, 8):
            if k == 0:
                prefetch_rows(next_rows, i, min(i + 8, n))
            xi = x.address + size * i * x.row
            ci = c_t.ctypes.data + size * (i * c_row + k)
            if left >= 4:
                tiles.outer_8x2(xi, x.row, 1, mk, m_row, ci, c_row, count, tiles.OVERWRITE, like)
            elif left >= 2:
                tiles.outer_8x1(xi, x.row, 1, mk, m_row, ci, c_row, count, tiles.OVERWRITE, like)
            else:
                tiles.outer_8xhalf(xi, x.row, 1, mk, m_row, ci, c_row, count, tiles.OVERWRITE, like)
        k += half * (4 if left >= 4 else (2 if left >= 2 else 1))


@helper
def transpose(source: np.ndarray, n_rows: int, n_columns: int, target: np.ndarray) -> None:
    """target = source.T, by squares of a vector's lanes: both have memory for whole squares."""
    size, like, step = source.itemsize, source.dtype.type(0), lanes(source)
    row, target_row = source.shape[1], target.shape[1]
    for r in range(0, n_rows, step):
        for c in range(0, n_columns, step):
            tiles.transpose(
                source.ctypes.data + size * (r * row + c),
                row,
                target.ctypes.data + size * (c * target_row + r),
                target_row,
                like,
            )


class OutputRows(NamedTuple):
    """Rows that a product writes: scratch, or an output in place."""

    address: Any  # of the first row, int64
    row: int  # from a row to the next, in elements
    mode: int  # ADD, OVERWRITE, STREAM, or STREAM_BFLOAT16 if columns are a multiple of 32
    size: int  # bytes of an element


@helper
def output_rows(x: np.ndarray, add: bool) -> OutputRows:
    """Return the rows of a scratch array, to be added to or overwritten."""
    return OutputRows(
        np.int64(x.ctypes.data), x.shape[1], tiles.ADD if add else tiles.OVERWRITE, x.itemsize
    )


@helper
def expand(c: np.ndarray, m: np.ndarray, n_rows: int, n: int, x: OutputRows) -> None:
    """x[i] = sum_k c[k, i] * m[k] over k < n_rows, for every i < n."""
    a, b, y = (
        (c.ctypes.data, 1, c.shape[1]),
        (m.ctypes.data, m.shape[1], m.itemsize),
        (x.address, x.row, x.size),
    )
    _product(a, b, y, n, n_rows, m.shape[1], x.mode, m.dtype.type(0), m.itemsize, NO_PREFETCH)


@helper
def accumulate(
    c: np.ndarray, x: InputRows, n_rows: int, n: int, m: np.ndarray, next_rows: PrefetchRows
) -> None:
    """m[k] += sum_i c[k, i] * x[i] over i < n, for every k < n_rows.

    Rows x may be bfloat16 if there are a multiple of 4 rows k and of 32 columns.
    """
    a, b, y = (
        (c.ctypes.data, c.shape[1], 1),
        (x.address, x.row, x.size),
        (m.ctypes.data, m.shape[1], m.itemsize),
    )
    _product(a, b, y, n_rows, n, m.shape[1], tiles.ADD, m.dtype.type(0), m.itemsize, next_rows)


@helper
def _product(a, b, c, n_rows, count, width, mode, like, size, next_rows):
    """c[r, d] = sum_k a[r, k] * b[k, d] for r < n_rows, k < count, d < width, whole vectors; `mode`
    as for a tile.

    a is (address, row stride, column stride), b and c are (address, row stride, bytes of an
    element); strides count elements. Plain tuples, since named ones made 5 percent more
    instructions here.
    """
    step = VECTOR_BYTES // size
    r = 0
    # rows outside, columns inside: rows that are streamed leave whole
    while r < n_rows:
        left, d = n_rows - r, 0
        while d < width:
            two = d + 2 * step <= width  # vectors
            if r == 0:
                prefetch_rows(
                    next_rows, count * d // width, count * min(d + 2 * step, width) // width
                )
            tile = (
                a[0] + size * r * a[1],
                a[1],
                a[2],
                b[0] + b[2] * d,
                b[1],
                c[0] + c[2] * (r * c[1] + d),
                c[1],
                count,
                mode,
                like,
            )
            if left >= 8:
                if b[2] < size:
                    tiles.outer_8x2_bfloat16(*tile)
                elif two:
                    tiles.outer_8x2(*tile)
                else:
                    tiles.outer_8x1(*tile)
            elif left >= 4:
                if b[2] < size:
                    tiles.outer_4x2_bfloat16(*tile)
                elif two:
                    tiles.outer_4x2(*tile)
                else:
                    tiles.outer_4x1(*tile)
            elif two:
                tiles.outer_1x2(*tile)
            else:
                tiles.outer_1x1(*tile)
            d += 2 * step if two else step
        r += 8 if left >= 8 else (4 if left >= 4 else 1)
