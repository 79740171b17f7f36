"""Sinks: where rows of tokens are written, each with a digest that does not depend on order or chunks."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, Protocol

import numpy as np

from racecore import inputs
from racecore.outofcore import npy
from racecore.outofcore.positioned import write_at
from racecore.outofcore.sources import pieces

__all__ = ["Sink", "open_sink"]


class Sink(Protocol):
    """Where an array of known shape and dtype goes, tokens numbered along the flattened token axes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    checksum: int  # of all that was written, modulo 2^64

    def place(self, begin: int, end: int) -> np.ndarray | None:
        """Return where tokens begin ... end - 1 may be computed into, if that is in memory."""
        ...

    def write(self, begin: int, end: int, rows: np.ndarray) -> None:
        """Take tokens begin ... end - 1."""
        ...

    def finish(self) -> None:
        """All is written: give the result its name."""
        ...

    def abandon(self) -> None:
        """Something went wrong: leave nothing behind that looks like a result."""
        ...


def open_sink(sink: Any, name: str, shape: tuple[int, ...], dtype: np.dtype, sources: list[tuple[str, Any]]) -> Sink:
    """Open a sink: a path of an .npy file, an array or something that slices can be assigned to, or None.

    Parameters
    ----------
    sources : list of (name, array)
        What must not be overwritten.

    Raises
    ------
    OSError
        There is no room for a file, or no folder.
    ValueError, TypeError
        An array of another shape or dtype, or `sink` is none of these.
    """
    if sink is None:
        return _DigestOnly(name, shape, dtype)
    if isinstance(sink, (str, os.PathLike)):
        return _NpyFile(os.fspath(sink), name, shape, dtype)
    if isinstance(sink, np.ndarray):
        return _InArray(inputs.check_out(sink, name, shape, dtype, sources), name)
    if all(hasattr(sink, x) for x in ("shape", "dtype", "__setitem__")):
        if tuple(sink.shape) != shape or np.dtype(sink.dtype) != dtype:
            raise ValueError(f"{name} must have shape {shape} and dtype {dtype}, got {sink.shape} and {sink.dtype}")
        return _InArray(sink, name)
    raise TypeError(f"{name} must be a path, an array, or None; got {type(sink).__qualname__}")


class _DigestOnly:
    """Nothing is kept but the checksum."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.name, self.shape, self.dtype, self.checksum = name, shape, dtype, 0

    def place(self, begin: int, end: int) -> np.ndarray | None:
        return None

    def write(self, begin: int, end: int, rows: np.ndarray) -> None:
        self.checksum = (self.checksum + _checksum(rows, begin)) % 2**64

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _InArray(_DigestOnly):
    """An array, or something like it."""

    def __init__(self, array: Any, name: str) -> None:
        super().__init__(name, tuple(array.shape), np.dtype(array.dtype))
        self._array, self._n_axes = array, len(array.shape) - 2

    def place(self, begin: int, end: int) -> np.ndarray | None:
        parts = list(pieces(self.shape, begin, end, self._n_axes))
        if not isinstance(self._array, np.ndarray) or len(parts) != 1:
            return None
        return self._array[parts[0][0]]

    def write(self, begin: int, end: int, rows: np.ndarray) -> None:
        for index, first, last in pieces(self.shape, begin, end, self._n_axes):
            part = rows[first - begin : last - begin]
            if not isinstance(self._array, np.ndarray) or not np.may_share_memory(self._array[index], part):
                self._array[index] = part
        super().write(begin, end, rows)


class _NpyFile(_DigestOnly):
    """An .npy file that is called `<path>.partial` until it is complete."""

    def __init__(self, path: str, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        super().__init__(name, shape, dtype)
        self._path = os.path.realpath(path)  # a link stays one
        self._partial = f"{self._path}.partial"
        if not os.path.isdir(os.path.dirname(self._path)):
            raise FileNotFoundError(f"there is no folder {os.path.dirname(self._path)} to write {name} to")
        self._row_bytes = math.prod(shape[-2:]) * dtype.itemsize
        try:
            self._offset = npy.reserve(self._partial, shape, dtype)
        except BaseException:
            _remove(self._partial)
            raise
        self._file = os.open(self._partial, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, begin: int, end: int, rows: np.ndarray) -> None:
        write_at(self._file, self._offset + begin * self._row_bytes, rows)
        super().write(begin, end, rows)

    def finish(self) -> None:
        os.fsync(self._file)
        self._close()
        os.replace(self._partial, self._path)

    def abandon(self) -> None:
        self._close()
        _remove(self._partial)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _checksum(rows: np.ndarray, begin: int) -> int:
    """Return the checksum of whole rows that start at token `begin`; in words of 8 bytes where rows are so long."""
    from racecore.outofcore import loops

    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    size = 8 if row_bytes % 8 == 0 else rows.dtype.itemsize
    words = np.ascontiguousarray(rows).reshape(-1).view(f"u{size}")
    return int(loops.checksum(words, begin * (row_bytes // size))) if words.size else 0
