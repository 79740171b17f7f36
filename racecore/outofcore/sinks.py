"""Sinks: destinations of rows of tokens, with digests independent of order and chunks."""

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
from racecore.outofcore.sources import token_slices

__all__ = ["Sink", "checksum", "open_sink"]

# Bytes read at once when written rows are verified.
_READ_BYTES = 1 << 22


class Sink(Protocol):
    """The destination of an array; tokens are numbered along the flattened token axes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    # Of all rows written so far, modulo 2^64.
    checksum: int

    def memory_of(self, begin: int, end: int) -> np.ndarray | None:
        """Return the memory of tokens begin ... end - 1 to compute into, None if there is none."""
        ...

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Write tokens begin ... end - 1; return their checksum."""
        ...

    def matches(self, begin: int, end: int, expected: int) -> bool:
        """Return whether tokens begin ... end - 1 are stored with the expected checksum."""
        ...

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        ...

    def finish(self) -> None:
        """Give the complete result its name."""
        ...

    def close(self) -> None:
        """Close it, finished or not."""
        ...

    def discard(self) -> None:
        """Close it and remove what was written."""
        ...


def open_sink(
    sink: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sources: list[tuple[str, Any]],
    resumes: bool = False,
) -> Sink:
    """Open a sink.

    Parameters
    ----------
    sink : path of an .npy file, array, anything that accepts assignment to slices, or None
    name : str
        Name of the parameter, for messages.
    shape, dtype
        Of the result.
    sources : list of (name, array)
        Arrays that must not be overwritten.
    resumes : bool
        Keep what an earlier run wrote to the file.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run is writing the file.
    OSError
        The disk has no space for the file, or there is no such folder.
    ValueError, TypeError
        An array of another shape or dtype, or `sink` is none of these.
    """
    if sink is None:
        return _DigestSink(name, shape, dtype)
    if isinstance(sink, (str, os.PathLike)):
        return _NpySink(os.fspath(sink), name, shape, dtype, resumes)
    if isinstance(sink, np.ndarray):
        return _ArraySink(outputs.check_out(sink, name, shape, dtype, sources, False), name)
    # zarr, h5py and the like.
    if all(hasattr(sink, x) for x in ("shape", "dtype", "__setitem__")):
        if tuple(sink.shape) != shape or np.dtype(sink.dtype) != dtype:
            raise ValueError(
                f"{name} must have shape {shape} and dtype {dtype}, got {sink.shape} and "
                f"{sink.dtype}"
            )
        return _ArraySink(sink, name)
    raise TypeError(f"{name} must be a path, an array, or None; got {type(sink).__qualname__}")


class _DigestSink:
    """Keeps the checksum only."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.name, self.shape, self.dtype, self.checksum = name, shape, dtype, 0

    def memory_of(self, begin: int, end: int) -> np.ndarray | None:
        """Return None."""
        return None

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Return the checksum of rows, and add it to that of the array."""
        found = checksum(rows, begin)
        self.checksum = (self.checksum + found) % 2**64
        return found

    def matches(self, begin: int, end: int, expected: int) -> bool:
        """Return True: nothing is stored that could have changed."""
        return True

    def sync(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Do nothing."""


class _ArraySink(_DigestSink):
    """An array, or an object that accepts assignment to slices."""

    def __init__(self, array: Any, name: str) -> None:
        super().__init__(name, tuple(array.shape), np.dtype(array.dtype))
        self._array, self._n_axes = array, len(array.shape) - 2

    def memory_of(self, begin: int, end: int) -> np.ndarray | None:
        """Return a view of the rows, None if they cross a row of the batch or are not in memory."""
        parts = list(token_slices(self.shape, begin, end, self._n_axes))
        if not isinstance(self._array, np.ndarray) or len(parts) != 1:
            return None
        return self._array[parts[0][0]]

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Copy rows into the array, unless they were computed in it."""
        for index, first, last in token_slices(self.shape, begin, end, self._n_axes):
            part = rows[first - begin : last - begin]
            if not isinstance(self._array, np.ndarray) or not np.may_share_memory(
                self._array[index], part
            ):
                self._array[index] = part
        return super().write(begin, end, rows)


class _NpySink(_DigestSink):
    """An .npy file that is called `<path>.partial` until it is complete."""

    def __init__(
        self, path: str, name: str, shape: tuple[int, ...], dtype: np.dtype, resumes: bool
    ) -> None:
        super().__init__(name, shape, dtype)
        # Write to the target of a symbolic link, which the rename would replace otherwise.
        self._path = os.path.realpath(path)
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
                self.discard()
            raise

    def write(self, begin: int, end: int, rows: np.ndarray) -> int:
        """Write rows at their offset in the file."""
        write_at(self._file, self._offset + begin * self._row_bytes, rows)
        return super().write(begin, end, rows)

    def matches(self, begin: int, end: int, expected: int) -> bool:
        """Read rows back, and compare their checksum."""
        step = max(1, _READ_BYTES // max(1, self._row_bytes))
        found = 0
        # In parts, so that the check takes little memory beside the buffers.
        for first in range(begin, end, step):
            rows = np.empty((min(step, end - first), *self.shape[-2:]), self.dtype)
            read_at(self._file, self._offset + first * self._row_bytes, rows, self._partial)
            found += checksum(rows, first)
        return found % 2**64 == expected

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fsync(self._file)

    def finish(self) -> None:
        """Rename the complete file."""
        os.replace(self._partial, self._path)
        _sync_folder(os.path.dirname(self._path))
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def discard(self) -> None:
        """Close and remove the file."""
        # Removed while still locked: afterwards the name may belong to another run.
        if self._file >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._partial)
        self.close()


def _sync_folder(folder: str) -> None:
    """Wait until the names in a folder are on the disk, where the system supports that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def checksum(rows: np.ndarray, begin: int) -> int:
    """Return the checksum of whole rows that start at token `begin`.

    It is summed over words of 8 bytes where the rows are a multiple of that, else over items.
    """
    from racecore.outofcore import loops

    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    size = 8 if row_bytes % 8 == 0 else rows.dtype.itemsize
    words = np.ascontiguousarray(rows).reshape(-1).view(f"u{size}")
    return int(loops.checksum(words, begin * (row_bytes // size))) if words.size else 0
