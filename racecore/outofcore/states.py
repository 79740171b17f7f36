"""States that tasks leave behind, in a file with a place for every task: for passes back, and to
resume from.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from racecore.outofcore import crash_points
from racecore.outofcore.positioned import read_at, write_at

__all__ = ["States"]


class States:
    """An open file of states.

    Parameters
    ----------
    numbers : int
        float64 numbers of the largest state.
    path : str or None
        Where they outlive the process; None means a file without a name, which is gone when the
        process is.
    folder : str or None
        Where a file without a name lies; None means the system's folder for temporary files.
    """

    def __init__(self, numbers: int, path: str | None = None, folder: str | None = None) -> None:
        self._place_bytes = 8 * numbers
        self._path = path
        self._owner: Any = None
        if path is None:
            self._owner = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, closed by `close`
            self._file: int = self._owner.fileno()
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def put(self, task: int, first: int, state: np.ndarray) -> int:
        """Keep what a task left, a contiguous float64 array, from number `first` of its place on;
        return its checksum.
        """
        write_at(self._file, task * self._place_bytes + 8 * first, state)
        crash_points.reached("state written")
        return _checksum(state)

    def get(self, task: int, first: int, numbers: int) -> np.ndarray:
        """Return some numbers of what a task left."""
        state = np.empty(numbers, np.float64)
        read_at(
            self._file,
            task * self._place_bytes + 8 * first,
            state,
            self._path or "the temporary file of states",
        )
        return state

    def holds(self, task: int, first: int, numbers: int, expected: int) -> bool:
        """Tell whether what a task left is as its checksum says."""
        try:
            return _checksum(self.get(task, first, numbers)) == expected
        except OSError:  # the file ends before
            return False

    def close(self) -> None:
        """Let go of the file."""
        if self._owner is not None:
            self._owner.close()
        elif self._file >= 0:
            os.close(self._file)
        self._file = -1

    def remove(self) -> None:
        """Remove the file, and let go of it."""
        self.close()
        if self._path is not None:
            os.unlink(self._path)


def _checksum(state: np.ndarray) -> int:
    from racecore.outofcore import loops

    return int(loops.checksum(state.view(np.uint64), 0))
