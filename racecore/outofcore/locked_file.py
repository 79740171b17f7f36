"""Files that one run at a time may have open. The system holds the lock and releases it when the
process ends for any reason.
"""

from __future__ import annotations

import errno
import fcntl
import os

from racecore.errors import OutputInUseError

__all__ = ["open_locked"]


def open_locked(path: str) -> int:
    """Open and lock a file for reading and writing, creating it if need be; return its descriptor.

    Raises
    ------
    racecore.errors.OutputInUseError
        Another run has locked it.
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
        # The run that held the lock has finished meanwhile and renamed or removed the file: this
        # descriptor belongs to its result. Open the name again.
        os.close(file)


def _is_at(file: int, path: str) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
