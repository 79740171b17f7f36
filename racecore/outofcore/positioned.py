"""Whole arrays from and to a place in a file, without moving its position: several threads may do
so at once.
"""

from __future__ import annotations

import os

import numpy as np

from racecore.errors import InputChangedError

__all__ = ["read_at", "write_at"]


def read_at(file: int, place: int, array: np.ndarray, path: str) -> None:
    """Fill a contiguous array with the bytes from `place` on.

    Raises
    ------
    racecore.errors.InputChangedError
        The file ends before.
    """
    target = array.reshape(-1).view(np.uint8).data
    while len(target):
        n = os.preadv(file, [target], place)
        if n == 0:
            raise InputChangedError(
                f"{path} was cut short while it was being read: it ends before byte {place + 1:,}"
            )
        target, place = target[n:], place + n


def write_at(file: int, place: int, array: np.ndarray) -> None:
    """Write the bytes of a contiguous array to `place`."""
    source = array.reshape(-1).view(np.uint8).data
    while len(source):
        n = os.pwrite(file, source, place)
        source, place = source[n:], place + n
