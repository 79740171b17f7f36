"""Which files a run reads and writes: none of them twice, whatever names they go by."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["check_paths", "file_of", "folder_of", "identity_of", "is_path"]


def is_path(x: Any) -> bool:
    """Tell whether something names a file."""
    return isinstance(x, (str, os.PathLike))


def check_paths(sources: list[tuple[str, Any]], targets: dict[str, Any]) -> None:
    """Refuse a file that is to be written and is also something else here, under whatever name.

    Raises
    ------
    ValueError
        Names both.
    """
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
    """Return the path of a file, or of the file that an array maps."""
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
    """Return what two names of one file have in common: device and inode, or the resolved name of a
    file to be.
    """
    path = file_of(x) or ""
    try:
        status = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return status.st_dev, status.st_ino
