"""Sources: anything that rows of tokens can be read from, behind one small interface.

Tokens are numbered along the flattened token axes: token t of row b of a batch is b*T + t. `read`
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

__all__ = ["TokenSource", "open_source", "token_slices"]


class TokenSource(Protocol):
    """Rows of tokens: [T, heads, dim] or [B, T, heads, dim], of a native dtype; or a mask, [T] or
    [B, T] of bool.
    """

    # The name of the caller's parameter.
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    # Generated numbers are finite and need no check.
    is_synthetic: bool

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Return tokens begin ... end - 1: in `buffer`, which has their shape, or as a view."""
        ...

    def close(self) -> None:
        """Close what was opened."""
        ...


def open_source(source: Any, name: str, dtype: np.dtype | None = None) -> TokenSource:
    """Open a source.

    Parameters
    ----------
    source : path, array, memory map, Synthetic, or a sliceable object
        A path is that of an .npy file; a sliceable object has shape and dtype.
    name : str
        Name of the parameter, for messages.
    dtype : dtype, optional
        How to read an .npy file whose entries are untyped bytes, as NumPy stores
        ml_dtypes.bfloat16.

    Raises
    ------
    OSError
        A file cannot be read.
    ValueError, TypeError
        A file does not match its header, or `source` is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_npy(os.fspath(source), name, dtype)
    if isinstance(source, (Synthetic, SyntheticHead)):
        return _SyntheticSource(source, name)
    if isinstance(source, np.ndarray):
        return _ArraySource(source, name)
    # zarr, h5py and the like; tensors of frameworks are converted as a whole.
    if not hasattr(source, "__dlpack__") and all(
        hasattr(source, x) for x in ("shape", "dtype", "__getitem__")
    ):
        return _ArraySource(source, name)
    return _ArraySource(arrays.as_numpy(source, name), name)


def token_slices(
    shape: tuple[int, ...], begin: int, end: int, n_axes: int
) -> Iterator[tuple[Any, int, int]]:
    """Yield (index into an array of this shape, begin, end) for a range of flattened tokens, one
    for each row of the batch.
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


class _ArraySource:
    """An array in memory, a memory map, or an object that returns arrays for slices."""

    is_synthetic = False

    def __init__(self, array: Any, name: str) -> None:
        self.name, self._array = name, array
        self.shape = tuple(array.shape)
        stored = np.dtype(array.dtype)
        self.dtype = stored.newbyteorder("=")
        self._n_axes = _token_axes(self.shape, self.dtype, name)
        # Kernels read aligned items in native byte order at strides of whole items.
        is_readable = isinstance(array, np.ndarray) and array.flags.aligned and stored.isnative
        self._returns_views = is_readable and not any(s % stored.itemsize for s in array.strides)

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Return a view if the rows are in one row of the batch, else a copy in the buffer."""
        parts = list(token_slices(self.shape, begin, end, self._n_axes))
        if self._returns_views and len(parts) == 1:
            return self._array[parts[0][0]]
        for index, first, last in parts:
            buffer[first - begin : last - begin] = self._array[index]
        return buffer

    def close(self) -> None:
        """Do nothing: the array belongs to the caller."""


class _SyntheticSource:
    """Numbers that are generated when they are read."""

    is_synthetic = True

    def __init__(self, array: Synthetic | SyntheticHead, name: str) -> None:
        self.name, self._array = name, array
        self.shape, self.dtype = array.shape, array.dtype
        self._row_size = math.prod(self.shape[-2:])

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Generate rows in the buffer."""
        self._array.fill(buffer, begin * self._row_size)
        return buffer

    def close(self) -> None:
        """Do nothing."""


class _NpySource:
    """An .npy file, read into buffers: all that was read of a memory map would stay resident.

    A file that is cut short meanwhile raises OSError; with a memory map it would kill the process.
    """

    is_synthetic = False

    def __init__(self, path: str, name: str, header: npy.Header, dtype: np.dtype) -> None:
        self.name, self._path, self._stored = name, path, dtype
        self.shape, self.dtype = header.shape, dtype.newbyteorder("=")
        n_axes = _token_axes(self.shape, self.dtype, path)
        self._row_bytes = math.prod(self.shape[n_axes:]) * dtype.itemsize
        self._offset = header.offset
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, begin: int, end: int, buffer: np.ndarray) -> np.ndarray:
        """Read rows of the file into the buffer, and convert them to native byte order."""
        read_at(self._file, self._offset + begin * self._row_bytes, buffer, self._path)
        if not self._stored.isnative:
            buffer.byteswap(inplace=True)
        return buffer

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _open_npy(path: str, name: str, dtype: np.dtype | None) -> TokenSource:
    header = npy.read_header(path)
    stored = header.dtype
    # NumPy does not know bfloat16 and stores it as two untyped bytes.
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
    # Tokens of an array in Fortran order are not contiguous in the file: map it.
    if header.fortran_order:
        mapped = np.memmap(path, stored, "r", header.offset, header.shape, order="F")
        return _ArraySource(mapped, name)
    return _NpySource(path, name, header, stored)


def _token_axes(shape: tuple[int, ...], dtype: np.dtype, name: str) -> int:
    """Return the number of axes that count tokens: 1, or 2 with a batch axis."""
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
