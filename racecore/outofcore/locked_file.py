"""Files that one run at a time may have open. The lock is the system's: it goes when the process
does, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os

from racecore.errors import OutputInUseError

__all__ = ["open_locked"]


def open_locked(path: str) -> int:
    """Open a file for reading and writing, making it if need be, and lock it; return its
    descriptor.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run has it.
    OSError
        It cannot be opened.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            os.close(file)
            raise OutputInUseError(
                errno.EBUSY, "another run is writing it; wait for it, or stop it", path
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(
            file
            # the run that had it has just finished and renamed or removed it: now there is room for a
            # new one
        )


def _is_at(file: int, path: str) -> bool:
    """Tell whether an open file is the one that a name stands for."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
