"""Paths of a run: no output may be the same file as an input or another output."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["check_paths", "file_of", "folder_of", "identity_of", "is_path"]


def is_path(x: Any) -> bool:
    """Return whether an argument names a file."""
    return isinstance(x, (str, os.PathLike))


def check_paths(sources: list[tuple[str, Any]], targets: dict[str, Any]) -> None:
    """Raise an error if an output is the same file as an input or another output, under any name.

    Raises
    ------
    ValueError
        Names both.
    """
    # By device and inode, so that hard links and other spellings of a path are found too.
    seen = {identity_of(x): name for name, x in sources if file_of(x) is not None}
    for name, target in targets.items():
        if (
            file_of(target) is not None
            and (other := seen.setdefault(identity_of(target), name)) != name
        ):
            raise ValueError(
                f"{name} is the same file as {other} ({file_of(target)}); give it a file of its own"
            )


def file_of(x: Any) -> str | None:
    """Return the path of a file, or of the file that an array maps; None for anything else."""
    if is_path(x):
        return os.fspath(x)
    filename = getattr(x, "filename", None) if isinstance(x, np.memmap) else None
    return None if filename is None else os.fspath(filename)


def folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder that a file is or will be in.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    """
    folder = os.path.dirname(os.path.realpath(os.fspath(path)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"there is no folder {folder} to write {os.path.basename(os.fspath(path))} to"
        )
    return folder


def identity_of(x: Any) -> tuple[object, ...]:
    """Return a value that is equal for all names of one file: device and inode, or the resolved
    path of a file that does not exist yet.
    """
    path = file_of(x) or ""
    try:
        status = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return status.st_dev, status.st_ino
