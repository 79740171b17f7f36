"""The three small matrix products that everything else is made of.

Inside a block of tokens all work is one of these, on C-contiguous scratch arrays that stay in the nearest caches:

    project     C = M @ X.T      projections on planes, gradients of weights           [K, n]
    expand      X += C.T @ M     outputs from states, rows from their coefficients      [n, D]
    accumulate  M += C @ X       sums over the tokens of a block                        [K, D]

K counts planes or buckets, n tokens, D columns of a row. Coefficients are stored with the token as the last axis, so that
element-wise work on them is vector code too. The plain twins are the NumPy expressions above. Here matrices are covered
with the register tiles of `ops.tiles`; widths that are no multiple of a vector leave columns to plain loops, so scratch
arrays are padded (`padded`) with columns of zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from racecore.jit import helper
from racecore.ops import tiles

__all__ = ["accumulate", "accumulate_triangular", "expand", "expand_causal", "padded", "project"]

_VECTOR_BYTES = 64
_PADDING = 16  # columns: a vector of float32, two of float64


@helper
def padded(width: int) -> int:
    """Return the width rounded up to whole vectors."""
    return -(-width // _PADDING) * _PADDING


@helper
def project(m: np.ndarray, x: np.ndarray, n_rows: int, n: int, c: np.ndarray) -> None:
    """c[k, i] = <m[k], x[i]> for k < n_rows and i < n."""
    size, width, like = m.itemsize, m.shape[1], m[0, 0]
    m_row, x_row, c_row = m.shape[1], x.shape[1], c.shape[1]
    count = width * size // _VECTOR_BYTES
    k = 0
    while k < n_rows:
        i = 0
        mk = m.ctypes.data + size * k * m_row
        while i < n:
            xi = x.ctypes.data + size * i * x_row
            ci = c.ctypes.data + size * (k * c_row + i)
            if k + 4 <= n_rows and i + 4 <= n:
                tiles.dot_4x4(mk, m_row, xi, x_row, ci, c_row, count, like)
            elif k + 4 <= n_rows:
                tiles.dot_4x1(mk, m_row, xi, x_row, ci, c_row, count, like)
            elif i + 4 <= n:
                tiles.dot_1x4(mk, m_row, xi, x_row, ci, c_row, count, like)
            else:
                tiles.dot_1x1(mk, m_row, xi, x_row, ci, c_row, count, like)
            i += 4 if i + 4 <= n else 1
        k += 4 if k + 4 <= n_rows else 1
    for d in range(count * _VECTOR_BYTES // size, width):
        for k in range(n_rows):
            for i in range(n):
                c[k, i] += m[k, d] * x[i, d]


class _Operand(NamedTuple):
    """A matrix as the tiles take it: address of its first number, strides of rows and columns in elements."""

    address: int
    row: int
    column: int


@helper
def _plain(m: np.ndarray) -> _Operand:
    return _Operand(m.ctypes.data, m.shape[1], 1)


@helper
def _transposed(m: np.ndarray) -> _Operand:
    return _Operand(m.ctypes.data, 1, m.shape[1])


@helper
def _from_row(m: _Operand, row: int, size: int) -> _Operand:
    return _Operand(m.address + size * row * m.row, m.row, m.column)


@helper
def expand(c: np.ndarray, m: np.ndarray, n_rows: int, n: int, x: np.ndarray) -> None:
    """x[i] += sum_k c[k, i] * m[k] over k < n_rows, for every i < n."""
    whole = _add_product(_transposed(c), _plain(m), _plain(x), n, n_rows, m)
    for d in range(whole, m.shape[1]):
        for i in range(n):
            for k in range(n_rows):
                x[i, d] += c[k, i] * m[k, d]


@helper
def accumulate(c: np.ndarray, x: np.ndarray, n_rows: int, n: int, m: np.ndarray) -> None:
    """m[k] += sum_i c[k, i] * x[i] over i < n, for every k < n_rows."""
    whole = _add_product(_plain(c), _plain(x), _plain(m), n_rows, n, x)
    for d in range(whole, m.shape[1]):
        for k in range(n_rows):
            for i in range(n):
                m[k, d] += c[k, i] * x[i, d]


@helper
def expand_causal(c: np.ndarray, m: np.ndarray, n: int, x: np.ndarray) -> None:
    """x[i] += sum_{k <= i} c[k, i] * m[k], for every i < n; c[k, i] must be 0 for k > i.

    Rows of m behind token i never reach x[i], not even as NaN: where m is not finite, plain loops stop at k = i.
    """
    size = m.itemsize
    if m.shape[1] * size % _VECTOR_BYTES == 0 and _is_finite(m, n, m.shape[1]):
        for i in range(0, n, 8):
            rows = min(8, n - i)
            _add_product(
                _from_row(_transposed(c), i, size), _plain(m), _from_row(_plain(x), i, size), rows, i + rows, m
            )  # fmt: skip
        return
    for i in range(n):
        for k in range(i + 1):
            for d in range(m.shape[1]):
                x[i, d] += c[k, i] * m[k, d]


@helper
def accumulate_triangular(c: np.ndarray, x: np.ndarray, n_rows: int, n: int, m: np.ndarray) -> None:
    """m[k] += sum_i c[k, i] * x[i] over i < n, where a zero of c or x means that token i has no part in the sum.

    So 0 times NaN is 0 here: a token that is not finite does not reach those that never met it.
    """
    if _is_finite(c, n_rows, n) and _is_finite(x, n, x.shape[1]):
        accumulate(c, x, n_rows, n, m)
        return
    for k in range(n_rows):
        for i in range(n):
            for d in range(x.shape[1]):
                if c[k, i] != 0 and x[i, d] != 0:
                    m[k, d] += c[k, i] * x[i, d]


@helper
def _is_finite(m: np.ndarray, n_rows: int, n_columns: int) -> bool:
    """Tell whether the first rows and columns hold neither NaN nor infinity."""
    zero = m.dtype.type(0)
    total = zero
    for i in range(n_rows):
        row = m[i]
        for d in range(n_columns):
            total += row[d] * zero
    return total == zero


@helper
def _add_product(a: _Operand, b: _Operand, c: _Operand, n_rows: int, count: int, like: np.ndarray) -> int:
    """c[r, d] += sum_k a[r, k] * b[k, d] for r < n_rows, k < count and d in whole vectors of a row of `like`.

    Returns how many columns those are.
    """
    size, number = like.itemsize, like[0, 0]
    lanes = _VECTOR_BYTES // size
    width = like.shape[1] // lanes * lanes
    d = 0
    while d < width:
        b_address, r = b.address + size * d, 0
        two = d + 2 * lanes <= width
        while r < n_rows:
            left = n_rows - r
            a_address, c_address = a.address + size * r * a.row, c.address + size * (r * c.row + d)
            tile = (a_address, a.row, a.column, b_address, b.row, c_address, c.row, count, number)
            if left >= 8:
                if two:
                    tiles.outer_8x2(*tile)
                else:
                    tiles.outer_8x1(*tile)
                r += 8
            elif left >= 4:
                if two:
                    tiles.outer_4x2(*tile)
                else:
                    tiles.outer_4x1(*tile)
                r += 4
            else:
                if two:
                    tiles.outer_1x2(*tile)
                else:
                    tiles.outer_1x1(*tile)
                r += 1
        d += 2 * lanes if two else lanes
    return width
