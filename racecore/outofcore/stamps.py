"""Stamps: short texts that identify the contents of inputs, since a run is resumed only with the
same inputs.

A file, also one that is mapped, is identified by its size and the time of its last change; a
synthetic array by its parameters; an array in memory by the checksum of all its bytes; anything
else by the checksum of some of its rows.
"""

from __future__ import annotations

import datetime
import math
import mmap
import os
from typing import Any

import numpy as np

from racecore.outofcore.sinks import checksum
from racecore.outofcore.sources import TokenSource
from racecore.outofcore.synthetic import Synthetic, SyntheticHead
from racecore.runtime import arrays

__all__ = ["stamp", "stamp_file"]

# Rows that identify an array which is neither a file nor in memory, evenly spaced.
_N_SAMPLES = 16
# Bytes read at once.
_READ_BYTES = 1 << 22


def stamp(given: Any, source: TokenSource) -> str:
    """Return the stamp of an input.

    Parameters
    ----------
    given : path, array, ...
        As the caller passed it.
    source : TokenSource
        The same, open.
    """
    if isinstance(given, (Synthetic, SyntheticHead)):
        return repr(given)
    kind = f"{source.dtype.name} {source.shape}"
    if isinstance(given, (str, os.PathLike)):
        return f"{kind} in a file of {stamp_file(os.fspath(given))}"
    mapped = _mapped_file(given)
    if mapped is not None:
        return f"{kind} {mapped}"
    if isinstance(given, np.ndarray) or hasattr(given, "__dlpack__"):
        return f"{kind} of checksum {_checksum(source):016x}"
    return f"{kind} with rows of checksum {_checksum_of_some(source):016x}"


def stamp_file(path: str) -> str:
    """Return the stamp of a file: its size and the time of its last change."""
    status = os.stat(path)
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{status.st_size:,} bytes, changed {time}.{nanoseconds:09d} UTC"


def _mapped_file(array: Any) -> str | None:
    """Return the stamp of the part of a file that an array maps, None if it maps none."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return None
    # A view of a map keeps the map's offset; the offset of the view follows from the addresses.
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    if not isinstance(root, np.memmap) or not isinstance(root.base, mmap.mmap):
        return None
    first = root.offset + array.ctypes.data - root.ctypes.data
    file = stamp_file(os.fspath(array.filename))
    return f"from byte {first:,} of a file of {file}, strides {array.strides}"


def _checksum(source: TokenSource) -> int:
    row_bytes = max(1, math.prod(source.shape[_n_axes(source) :]) * source.dtype.itemsize)
    step = max(1, _READ_BYTES // row_bytes)
    return (
        sum(_checksum_rows(source, begin, step) for begin in range(0, _n_tokens(source), step))
        % 2**64
    )


def _checksum_of_some(source: TokenSource) -> int:
    samples = np.linspace(0, max(0, _n_tokens(source) - 1), _N_SAMPLES)
    tokens = np.unique(samples.astype(np.int64)).tolist()
    return sum(_checksum_rows(source, token, 1) for token in tokens) % 2**64


def _checksum_rows(source: TokenSource, begin: int, n: int) -> int:
    end = min(_n_tokens(source), begin + n)
    buffer = arrays.empty((end - begin, *source.shape[_n_axes(source) :]), source.dtype)
    return checksum(source.read(begin, end, buffer), begin)


def _n_axes(source: TokenSource) -> int:
    return len(source.shape) - (0 if source.dtype == np.bool_ else 2)


def _n_tokens(source: TokenSource) -> int:
    return math.prod(source.shape[: _n_axes(source)])
