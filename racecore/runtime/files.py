"""Small result files: .npz archives with a kind, a version and a checksum, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import zipfile
import zlib
from typing import Any

import numpy as np

from racecore.errors import CorruptFileError

__all__ = ["load", "replace_when_done", "save"]


def save(path: str | os.PathLike[str], kind: str, version: int, **arrays: np.ndarray) -> None:
    """Write named arrays with their kind, version and SHA-256."""
    header = {
        "kind": np.array(kind),
        "version": np.array(version),
        "sha256": np.array(_digest(kind, version, arrays)),
    }
    with replace_when_done(path) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **header, **arrays)
        file.flush()
        os.fsync(file.fileno())


def load(
    path: str | os.PathLike[str], kind: str, version: int, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Read a file of `save`; `names` are its arrays.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    racecore.errors.CorruptFileError
        It is not such a file, comes from a newer version, or fails its checksum.
    """
    wrong = f"{os.fspath(path)} is not a {kind} file"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            content: dict[str, Any] = {name: archive[name] for name in archive.files}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except TypeError as error:
        raise CorruptFileError(f"{wrong}: it is a plain array (.npy), not an archive") from error
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise CorruptFileError(f"{wrong}, or it is damaged: {error}") from error
    if str(content.get("kind")) != kind:
        raise CorruptFileError(
            f"{wrong}: it says it is {str(content.get('kind', 'something else'))!r}"
        )
    found = int(content["version"]) if "version" in content else 0
    if found > version:
        raise CorruptFileError(
            f"{os.fspath(path)} has version {found}; this racecore reads up to {version}: upgrade "
            "it"
        )
    missing = [name for name in names if name not in content]
    if missing:
        raise CorruptFileError(f"{wrong}: it lacks {', '.join(missing)}")
    arrays = {name: content[name] for name in names}
    if str(content.get("sha256")) != _digest(kind, found, arrays):
        raise CorruptFileError(
            f"{os.fspath(path)} is damaged: its content does not match its checksum"
        )
    return arrays


def _digest(kind: str, version: int, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{kind} {version}".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {arrays[name].shape}".encode())
        # a view, not a copy: an index may fill half of the memory
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextlib.contextmanager
def replace_when_done(path: str | os.PathLike[str]) -> Any:
    """Yield the path of a temporary file beside `path`: renamed on success, removed on an error."""
    # a symbolic link stays one: its target is replaced
    target = os.path.realpath(os.fsdecode(path))
    if not os.path.isdir(os.path.dirname(target)):
        raise FileNotFoundError(
            f"there is no folder {os.path.dirname(target)} to write {os.path.basename(target)} to"
        )
    partial = (
        f"{os.path.dirname(target)}/.{os.path.basename(target)}.{secrets.token_hex(4)}.partial"
    )
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
