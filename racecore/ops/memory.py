"""Scratch memory inside kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.jit import helper

__all__ = ["matrices"]

_LINE = 64  # bytes
_SLACK = 16  # rows past the end: a transposition reads and writes whole squares of a vector's lanes


@helper
def matrices(count: int, rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Return uninitialised matrices [count, rows, columns] that begin on a cache line, so that no vector crosses one.

    The memory goes on for some rows past the last matrix.
    """
    size = count * rows * columns
    room = np.empty(size + _SLACK * columns + _LINE, dtype)
    first = -room.ctypes.data % _LINE // room.itemsize
    return room[first : first + size].reshape((count, rows, columns))
