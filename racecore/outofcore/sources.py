"""Sources: whatever rows of tokens can be read from, behind one small interface.

Tokens are numbered along the flattened token axes: token t of row b of a batch is b*T + t. A `read`
may be called from another thread than the one that computes, but never from two at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from racecore.outofcore import npy
from racecore.outofcore.positioned import read_at
from racecore.outofcore.synthetic import Synthetic, SyntheticHead
from racecore.runtime import arrays

__all__ = ["Source", "open_source", "pieces"]


class Source(Protocol):
    """Rows of tokens: [T, heads, dim] or [B, T, heads, dim], of a native dtype; or [T] or [B, T] of
    bool, a mask.
    """

    name: str  # what the caller calls it
    shape: tuple[int, ...]
    dtype: np.dtype
    is_made_up: bool  # of finite numbers, that is: no need to look

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Return tokens begin ... end - 1: in `buffer`, which has just their shape, or a view where
        they lie.
        """
        ...

    def close(self) -> None:
        """Give back what was opened."""
        ...


def open_source(source: Any, name: str, dtype: np.dtype | None = None) -> Source:
    """Open a source.

    Parameters
    ----------
    source : path of an .npy file, array, memory map, Synthetic, or anything with shape and dtype that can be sliced
    name : str
        What the caller calls it, for messages.
    dtype : dtype, optional
        How to read an .npy file whose entries are untyped bytes, as NumPy stores
        ml_dtypes.bfloat16.

    Raises
    ------
    OSError
        A file cannot be read.
    ValueError, TypeError
        A file is not what its header says, or `source` is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_npy(os.fspath(source), name, dtype)
    if isinstance(source, (Synthetic, SyntheticHead)):
        return _SyntheticRows(source, name)
    if isinstance(source, np.ndarray):
        return _ArrayRows(source, name)
    if not hasattr(source, "__dlpack__") and all(
        hasattr(source, x) for x in ("shape", "dtype", "__getitem__")
    ):
        return _ArrayRows(source, name)
    return _ArrayRows(arrays.as_numpy(source, name), name)


def pieces(
    shape: tuple[int, ...], begin: int, end: int, n_axes: int
) -> Iterator[tuple[Any, int, int]]:
    """Yield (index into an array of this shape, begin, end) for flattened tokens, row by row of the
    batch.
    """
    if n_axes == 1:
        yield slice(begin, end), begin, end
        return
    n_tokens = shape[1]
    while begin < end:
        row, first = divmod(begin, n_tokens)
        last = min(n_tokens, first + end - begin)
        yield (row, slice(first, last)), begin, begin + last - first
        begin += last - first


class _ArrayRows:
    """An array in memory, a memory map, or something that gives arrays for slices."""

    is_made_up = False

    def __init__(self, array: Any, name: str) -> None:
        self.name, self._array = name, array
        self.shape, stored = tuple(array.shape), np.dtype(array.dtype)
        self.dtype = stored.newbyteorder("=")
        self._n_axes = _token_axes(self.shape, self.dtype, name)
        is_plain = isinstance(array, np.ndarray) and array.flags.aligned and stored.isnative
        self._lends = is_plain and not any(s % stored.itemsize for s in array.strides)

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Return rows of the array themselves if they are in one piece, else copied to the buffer."""
        parts = list(pieces(self.shape, begin, end, self._n_axes))
        if self._lends and len(parts) == 1:
            return self._array[parts[0][0]]
        for index, first, last in parts:
            buffer[first - begin : last - begin] = self._array[index]
        return buffer

    def close(self) -> None:
        """Do nothing: the array is the caller's."""


class _SyntheticRows:
    """Numbers that are made up."""

    is_made_up = True

    def __init__(self, array: Synthetic | SyntheticHead, name: str) -> None:
        self.name, self._array = name, array
        self.shape, self.dtype = array.shape, array.dtype
        self._row = math.prod(self.shape[-2:])

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Make rows up in the buffer."""
        self._array.fill(buffer, begin * self._row)
        return buffer

    def close(self) -> None:
        """Do nothing."""


class _NpyRows:
    """An .npy file, read into buffers: a memory map would keep all that was read of it resident.

    If the file is cut short meanwhile that is an OSError; for a map it would be the end of the
    process.
    """

    is_made_up = False

    def __init__(self, path: str, name: str, header: npy.Header, dtype: np.dtype) -> None:
        self.name, self._path, self._stored = name, path, dtype
        self.shape, self.dtype = header.shape, dtype.newbyteorder("=")
        n_axes = _token_axes(self.shape, self.dtype, path)
        self._row_bytes = math.prod(self.shape[n_axes:]) * dtype.itemsize
        self._offset = header.offset
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Read rows of the file into the buffer, and bring their bytes into this machine's order."""
        read_at(self._file, self._offset + begin * self._row_bytes, buffer, self._path)
        if not self._stored.isnative:
            buffer.byteswap(inplace=True)
        return buffer

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _open_npy(path: str, name: str, dtype: np.dtype | None) -> Source:
    header = npy.read_header(path)
    stored = header.dtype
    if stored == np.dtype("V2"):
        if dtype is None or not arrays.is_bfloat16(dtype):
            raise ValueError(
                f"{path} holds entries of two untyped bytes. If they are bfloat16 (NumPy stores "
                "ml_dtypes.bfloat16 so), "
                "say so: dtype='bfloat16' (racecore attend --dtype bfloat16)"
            )
        stored = dtype
    elif dtype is not None and stored.newbyteorder("=") != dtype and stored != np.bool_:
        raise ValueError(
            f"{path} ({name}) holds {stored}, not {dtype}; leave out dtype, or convert the file"
        )
    if header.fortran_order:
        return _ArrayRows(
            np.memmap(path, stored, "r", header.offset, header.shape, order="F"), name
        )
    return _NpyRows(path, name, header, stored)


def _token_axes(shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
    """Return how many axes count tokens: the first, or batch and tokens."""
    if dtype == np.bool_:
        if len(shape) not in (1, 2):
            raise ValueError(
                f"{name} has shape {shape}; expected [tokens] or [batch, tokens] of bools"
            )
        return len(shape)
    if not arrays.is_supported(dtype):
        raise TypeError(
            f"{name} holds {dtype}; expected {arrays.DTYPE_NAMES}: convert it with "
            ".astype(numpy.float32)"
        )
    if len(shape) not in (3, 4):
        raise ValueError(
            f"{name} has shape {shape}; expected [tokens, heads, dim] or [batch, tokens, heads, "
            "dim]"
        )
    return len(shape) - 2
