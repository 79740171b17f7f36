"""Sinks: where rows of tokens are written, each with a digest that does not depend on order or
chunks.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any, Protocol

import numpy as np

from racecore import outputs
from racecore.outofcore import npy
from racecore.outofcore.locked_file import open_locked
from racecore.outofcore.positioned import read_at, write_at
from racecore.outofcore.sources import pieces

__all__ = ["Sink", "checksum", "open_sink"]

_PIECE = 1 << 22  # bytes that are read back at once


class Sink(Protocol):
    """Where an array of known shape and dtype goes, tokens numbered along the flattened token axes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    checksum: int  # of all that was written, modulo 2^64

    def place(self, begin: int, end: int) -> np.ndarray | None:
        """Return where tokens begin ... end - 1 may be computed into, if that is in memory."""
        ...

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Take tokens begin ... end - 1; return their checksum."""
        ...

    def holds(self, begin: int, end: int, expected: int) -> bool:
        """Tell whether tokens begin ... end - 1 are there as their checksum says."""
        ...

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        ...

    def finish(self) -> None:
        """All is written: give the result its name."""
        ...

    def close(self) -> None:
        """Let go of it, finished or not."""
        ...

    def abandon(self) -> None:
        """Let go of it and leave nothing behind that looks like a result."""
        ...


def open_sink(
    sink: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sources: list[tuple[str, Any]],
    resumes: bool = False,
) -> Sink:
    """Open a sink: a path of an .npy file, an array or something that slices can be assigned to, or
    None.

    Parameters
    ----------
    sources : list of (name, array)
        What must not be overwritten.
    resumes : bool
        Go on with what an earlier run left of a file.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run is writing the file.
    OSError
        There is no room for a file, or no folder.
    ValueError, TypeError
        An array of another shape or dtype, or `sink` is none of these.
    """
    if sink is None:
        return _DigestOnly(name, shape, dtype)
    if isinstance(sink, (str, os.PathLike)):
        return _NpyFile(os.fspath(sink), name, shape, dtype, resumes)
    if isinstance(sink, np.ndarray):
        return _InArray(outputs.check_out(sink, name, shape, dtype, sources, False), name)
    if all(hasattr(sink, x) for x in ("shape", "dtype", "__setitem__")):
        if tuple(sink.shape) != shape or np.dtype(sink.dtype) != dtype:
            raise ValueError(
                f"{name} must have shape {shape} and dtype {dtype}, got {sink.shape} and "
                f"{sink.dtype}"
            )
        return _InArray(sink, name)
    raise TypeError(f"{name} must be a path, an array, or None; got {type(sink).__qualname__}")


class _DigestOnly:
    """Nothing is kept but the checksum."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.name, self.shape, self.dtype, self.checksum = name, shape, dtype, 0

    def place(self, begin: int, end: int) -> np.ndarray | None:
        """Return None: there is no memory to lend."""
        return None

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Return the checksum of rows, and add it to that of all."""
        found = checksum(rows, begin)
        self.checksum = (self.checksum + found) % 2**64
        return found

    def holds(self, begin: int, end: int, expected: int) -> bool:
        """Return True: there is nothing that could have changed."""
        return True

    def sync(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def abandon(self) -> None:
        """Do nothing."""


class _InArray(_DigestOnly):
    """An array, or something like it."""

    def __init__(self, array: Any, name: str) -> None:
        super().__init__(name, tuple(array.shape), np.dtype(array.dtype))
        self._array, self._n_axes = array, len(array.shape) - 2

    def place(self, begin: int, end: int) -> np.ndarray | None:
        """Return the rows of the array themselves, if they are in one piece."""
        parts = list(pieces(self.shape, begin, end, self._n_axes))
        if not isinstance(self._array, np.ndarray) or len(parts) != 1:
            return None
        return self._array[parts[0][0]]

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Copy rows into the array, unless they are its own."""
        for index, first, last in pieces(self.shape, begin, end, self._n_axes):
            part = rows[first - begin : last - begin]
            if not isinstance(self._array, np.ndarray) or not np.may_share_memory(
                self._array[index], part
            ):
                self._array[index] = part
        return super().write(begin, end, rows)


class _NpyFile(_DigestOnly):
    """An .npy file that is called `<path>.partial` until it is complete."""

    def __init__(
        self, path: str, name: str, shape: tuple[int, ...], dtype: np.dtype, resumes: bool
    ) -> None:
        super().__init__(name, shape, dtype)
        self._path = os.path.realpath(path)  # a link stays one
        self._partial = f"{self._path}.partial"
        folder = os.path.dirname(self._path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"there is no folder {folder} to write {name} to")
        self._row_bytes = math.prod(shape[-2:]) * dtype.itemsize
        self._file = open_locked(self._partial)
        try:
            if not resumes:
                os.ftruncate(self._file, 0)
            self._offset = npy.reserve(self._file, self._partial, shape, dtype)
        except BaseException:
            if resumes:
                self.close()
            else:
                self.abandon()
            raise

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Write rows to their place in the file."""
        write_at(self._file, self._offset + begin * self._row_bytes, rows)
        return super().write(begin, end, rows)

    def holds(self, begin: int, end: int, expected: int) -> bool:
        """Read rows back, and compare their checksum."""
        step, found = max(1, _PIECE // max(1, self._row_bytes)), 0
        for first in range(begin, end, step):
            rows = np.empty((min(step, end - first), *self.shape[-2:]), self.dtype)
            read_at(self._file, self._offset + first * self._row_bytes, rows, self._partial)
            found += checksum(rows, first)
        return found % 2**64 == expected

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file)

    def finish(self) -> None:
        """Give the file its name: now it is complete."""
        os.replace(self._partial, self._path)
        _sync_folder(os.path.dirname(self._path))
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def abandon(self) -> None:
        """Remove the file."""
        if self._file >= 0:
            _remove(self._partial)
        self.close()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def checksum(rows: np.ndarray, begin: int) -> int:
    """Return the checksum of whole rows that start at token `begin`; in words of 8 bytes where rows
    are so long.
    """
    from racecore.outofcore import loops

    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    size = 8 if row_bytes % 8 == 0 else rows.dtype.itemsize
    words = np.ascontiguousarray(rows).reshape(-1).view(f"u{size}")
    return int(loops.checksum(words, begin * (row_bytes // size))) if words.size else 0
