"""The file of states, one record a task: the backward pass and resumed runs start from them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from racecore.outofcore import crash_points
from racecore.outofcore.positioned import read_at, write_at

__all__ = ["StateFile"]


class StateFile:
    """An open file of states.

    Parameters
    ----------
    record_size : int
        float64 numbers of one record: those of the largest state.
    path : str or None
        A file that outlives the process; None means an unnamed file, which does not.
    folder : str or None
        Folder of an unnamed file; None means the system's folder for temporary files.
    """

    def __init__(
        self, record_size: int, path: str | None = None, folder: str | None = None
    ) -> None:
        self._record_bytes = 8 * record_size
        self._path = path
        # The object that closes an unnamed file, None for a named one.
        self._unnamed: Any = None
        if path is None:
            # Unbuffered: all reads and writes use the descriptor.
            self._unnamed = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            self._file: int = self._unnamed.fileno()
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, task: int, first: int, state: np.ndarray) -> int:
        """Write the state after a task, a contiguous float64 array, from number `first` of its
        record on; return its checksum.
        """
        write_at(self._file, self._offset(task, first), state)
        crash_points.reached("state written")
        return _checksum(state)

    def read(self, task: int, first: int, count: int) -> np.ndarray:
        """Return `count` numbers of a task's record, from number `first` on."""
        state = np.empty(count, np.float64)
        name = self._path or "the temporary file of states"
        read_at(self._file, self._offset(task, first), state, name)
        return state

    def matches(self, task: int, first: int, count: int, expected: int) -> bool:
        """Return whether numbers of a task's record have the expected checksum."""
        try:
            return _checksum(self.read(task, first, count)) == expected
        except OSError:
            # The file ends before: it was lost, or the system had not written it yet.
            return False

    def close(self) -> None:
        """Close the file."""
        if self._unnamed is not None:
            self._unnamed.close()
        elif self._file >= 0:
            os.close(self._file)
        self._file = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        if self._path is not None:
            os.unlink(self._path)

    def _offset(self, task: int, first: int) -> int:
        """Return the offset in bytes of a number in a task's record."""
        return task * self._record_bytes + 8 * first


def _checksum(state: np.ndarray) -> int:
    from racecore.outofcore import loops

    return int(loops.checksum(state.view(np.uint64), 0))
