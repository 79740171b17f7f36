"""What a source held when a run began, in a few words: a run is resumed only with the same inputs.

A file, also one that is mapped, is known by its size and the time of its last change; a made-up
array by its parameters; an array in memory by the checksum of all its bytes; anything else by some
of its rows.
"""

from __future__ import annotations

import datetime
import math
import mmap
import os
from typing import Any

import numpy as np

from racecore.outofcore.sinks import checksum
from racecore.outofcore.sources import Source
from racecore.outofcore.synthetic import Synthetic, SyntheticHead
from racecore.runtime import arrays

__all__ = ["stamp", "stamp_file"]

_N_SAMPLES = 16
_PIECE = 1 << 22  # bytes that are read at once


def stamp(given: Any, source: Source) -> str:
    """Describe what is read.

    Parameters
    ----------
    given : path, array, or what else a caller passes
    source : Source
        The same, open.
    """
    if isinstance(given, (Synthetic, SyntheticHead)):
        return repr(given)
    what = f"{source.dtype.name} {source.shape}"
    if isinstance(given, (str, os.PathLike)):
        return f"{what} in a file of {stamp_file(os.fspath(given))}"
    mapped = _mapped_file(given)
    if mapped is not None:
        return f"{what} {mapped}"
    if isinstance(given, np.ndarray) or hasattr(given, "__dlpack__"):
        return f"{what} of checksum {_checksum(source):016x}"
    return f"{what} with rows of checksum {_checksum_of_some(source):016x}"


def stamp_file(path: str) -> str:
    """Describe a file by size and time of change."""
    status = os.stat(path)
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{status.st_size:,} bytes, changed {time}.{nanoseconds:09d} UTC"


def _mapped_file(array: Any) -> str | None:
    """Describe the part of a file that an array maps, None if it does not."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return None
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or not isinstance(root.base, mmap.mmap):
        return None
    first = root.offset + array.ctypes.data - root.ctypes.data
    return f"from byte {first:,} of a file of {stamp_file(os.fspath(array.filename))}, strides {array.strides}"


def _checksum(source: Source) -> int:
    row_bytes = max(1, math.prod(source.shape[_n_axes(source) :]) * source.dtype.itemsize)
    step = max(1, _PIECE // row_bytes)
    return (
        sum(_checksum_rows(source, begin, step) for begin in range(0, _n_tokens(source), step))
        % 2**64
    )


def _checksum_of_some(source: Source) -> int:
    places = np.unique(
        np.linspace(0, max(0, _n_tokens(source) - 1), _N_SAMPLES).astype(np.int64)
    ).tolist()
    return sum(_checksum_rows(source, place, 1) for place in places) % 2**64


def _checksum_rows(source: Source, begin: int, n: int) -> int:
    end = min(_n_tokens(source), begin + n)
    buffer = arrays.empty((end - begin, *source.shape[_n_axes(source) :]), source.dtype)
    return checksum(source.read(begin, end, buffer), begin)


def _n_axes(source: Source) -> int:
    return len(source.shape) - (0 if source.dtype == np.bool_ else 2)


def _n_tokens(source: Source) -> int:
    return math.prod(source.shape[: _n_axes(source)])
