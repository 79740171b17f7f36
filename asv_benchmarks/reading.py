"""Read arrays with all cores, as fast as they can: what takes less time than this has not read them.

For whoever only reads this is the ceiling, and not `ceilings`' triad: a third of the triad's bytes are written, and travel to the
memory beside those that come from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = ["reader"]

_PIECES = 4  # for each core, drawn by whoever is free
_LEAST = 1 << 22  # bytes of a piece: handing one over takes tens of microseconds


def reader() -> Callable[..., None]:
    """Return a function that reads every byte of its arguments, C-contiguous arrays of whole 64-bit words."""
    import numba

    @numba.njit(nogil=True)
    def add(words: np.ndarray) -> int:
        total = np.uint64(0)
        for word in words:
            total += word
        return total

    n_cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(n_cores)
    add(np.zeros(1, np.uint64))  # compiles

    def read(*arrays: np.ndarray) -> None:
        pieces = []
        for array in arrays:
            n_pieces = max(1, min(n_cores * _PIECES, array.nbytes // _LEAST))
            pieces += np.array_split(array.reshape(-1).view(np.uint64), n_pieces)
        for _ in pool.map(add, pieces):
            pass

    return read
