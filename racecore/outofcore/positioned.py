"""Read and write whole arrays at an offset of a file, from several threads at once."""

from __future__ import annotations

import os

import numpy as np

from racecore.errors import InputChangedError

__all__ = ["read_at", "write_at"]


def read_at(file: int, offset: int, array: np.ndarray, path: str) -> None:
    """Fill a contiguous array with the bytes of a file from `offset` on.

    Parameters
    ----------
    file : int
        File descriptor.
    offset : int
        In bytes.
    array : contiguous array
    path : str
        For messages.

    Raises
    ------
    racecore.errors.InputChangedError
        The file ends before the array is full.
    """
    target = array.reshape(-1).view(np.uint8).data
    # The system may return less than was requested, for instance at 2 GB.
    while len(target):
        n = os.preadv(file, [target], offset)
        if n == 0:
            raise InputChangedError(
                f"{path} was cut short while it was being read: it ends before byte {offset + 1:,}"
            )
        target = target[n:]
        offset += n


def write_at(file: int, offset: int, array: np.ndarray) -> None:
    """Write the bytes of a contiguous array to a file from `offset` on."""
    source = array.reshape(-1).view(np.uint8).data
    while len(source):
        n = os.pwrite(file, source, offset)
        source = source[n:]
        offset += n
