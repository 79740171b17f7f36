"""Scratch memory of kernels, and rows of matrices cleared, copied and added.

These are loops and not assignments to slices, because Numba takes a tenth of a second to compile
each assignment.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.runtime.jit import helper

__all__ = ["add_rows", "clear_columns", "clear_rows", "cleared_matrices", "copy_rows", "matrices"]

# Bytes of a cache line, and of a vector.
_LINE = 64
# Rows past the end: a transposition reads and writes whole squares of a vector's lanes.
_SLACK = 16


@helper
def matrices(count: int, rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Return uninitialised matrices [count, rows, columns] that begin on a cache line.

    The memory extends for 16 rows past the last matrix.
    """
    size = count * rows * columns
    # aligned by hand: a vector that crosses a cache line costs two accesses
    buffer = np.empty(size + _SLACK * columns + _LINE, dtype)
    first = -buffer.ctypes.data % _LINE // buffer.itemsize
    return buffer[first : first + size].reshape((count, rows, columns))


@helper
def cleared_matrices(count: int, rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Return `matrices` of zeros."""
    result = matrices(count, rows, columns, dtype)
    for i in range(count):
        clear_rows(result[i], 0, rows)
    return result


@helper
def clear_rows(x: np.ndarray, first: int, last: int) -> None:
    """x[first:last] = 0."""
    for r in range(first, last):
        for c in range(x.shape[1]):
            x[r, c] = 0


@helper
def clear_columns(x: np.ndarray, first: int) -> None:
    """x[:, first:] = 0."""
    for r in range(x.shape[0]):
        for c in range(first, x.shape[1]):
            x[r, c] = 0


@helper
def copy_rows(x: np.ndarray, first: int, last: int, target: np.ndarray) -> None:
    """target[first:last] = x[first:last]."""
    for r in range(first, last):
        for c in range(x.shape[1]):
            target[r, c] = x[r, c]


@helper
def add_rows(x: np.ndarray, first: int, last: int, target: np.ndarray) -> None:
    """target[first:last] += x[: last - first]."""
    for r in range(first, last):
        for c in range(x.shape[1]):
            target[r, c] += x[r - first, c]
