"""Compiled kernels on disk: one file per kernel and signature, with a checksum, that can only help.

Numba's own cache goes stale when an edited function lives in another module than the kernel that
calls it, and one truncated index file makes every later run fail. This one names a file after
everything the machine code depends on (sources of all kernels, signature, processor, versions of
Python and Numba, Numba's settings), writes it whole or not at all, and treats whatever it cannot
read as absent. It plugs into the dispatcher where Numba's own cache would sit; should a future
Numba move that place, kernels are compiled afresh in every process and `describe` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import secrets
import sys
import threading
import time
from functools import cache
from typing import Any

__all__ = ["attach", "describe", "folder", "identity"]

_log = logging.getLogger("racecore")
_SOURCES = (
    "ops/**/*.py",
    "outofcore/loops.py",
    "chunking.py",
    "problem.py",
    "runtime/jit.py",
    "runtime/kernel_cache.py",
    "runtime/processor.py",
)
_DIGEST_BYTES = 32
_KEEP_SECONDS = 30 * 24 * 3600
_announce_lock = threading.Lock()
_announced = False
_problems: list[str] = []


def folder() -> pathlib.Path:
    """Return where compiled kernels are kept: under NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache."""
    base = (
        os.environ.get("NUMBA_CACHE_DIR")
        or os.environ.get("XDG_CACHE_HOME")
        or os.path.expanduser("~/.cache")
    )
    return pathlib.Path(base) / "racecore"


def describe() -> dict[str, Any]:
    """Tell about the cache: folder, number and size of files, whether it can be written, what went
    wrong.
    """
    path = folder()
    files = list(path.glob("*.kernel")) if path.is_dir() else []
    parent = next((p for p in (path, *path.parents) if p.exists()), path)
    return {
        "folder": str(path),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "writable": os.access(parent, os.W_OK),
        "problems": list(_problems),
    }


def attach(dispatcher: Any) -> Any:
    """Give a Numba dispatcher this cache; return the dispatcher."""
    if hasattr(dispatcher, "_cache"):
        _source_digest()  # now, while the sources are those that are being imported
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    else:
        _note("this version of Numba has no place for a cache")
    return dispatcher


class _KernelCache:
    """What a Numba dispatcher expects of a cache: load_overload and save_overload."""

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        """The folder, as Numba's statistics show it."""
        return str(folder())

    def enable(self) -> None:
        """Do nothing: this cache is always on."""

    def disable(self) -> None:
        """Do nothing: this cache is always on."""

    def flush(self) -> None:
        """Do nothing: files of older sources have other names and are never read."""

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None where there is none that can be used."""
        from numba.core.compiler import CompileResult

        try:
            target_context.refresh()
            content = self._file(signature, target_context.codegen()).read_bytes()
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() == digest:
                import pickle

                return CompileResult._rebuild(target_context, *pickle.loads(payload))
            _note(f"the cached kernel {self._name} is damaged and was compiled again")
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever is wrong with a cache, compiling is the remedy
            _note(
                f"the cached kernel {self._name} could not be loaded and was compiled again: "
                f"{error!r}"
            )
        _announce()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Write the compiled kernel; a failure costs only the next process some seconds."""
        try:
            if compiled.library.has_dynamic_globals or any(
                not lifted.can_cache for lifted in compiled.lifted
            ):
                return
            from numba.core.serialize import dumps

            payload = dumps(compiled._reduce())
            path = self._file(signature, compiled.codegen)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
            try:
                partial.write_bytes(hashlib.sha256(payload).digest() + payload)
                os.replace(partial, path)
                self._forget_old_ones()
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink()
        except Exception as error:
            _note(f"compiled kernels cannot be kept in {folder()}: {error!r}")

    def _forget_old_ones(self) -> None:
        """Remove files of this kernel that nobody has written for a month: those of older sources
        and versions.
        """
        for file in folder().glob(f"{self._name}-*"):
            if time.time() - file.stat().st_mtime > _KEEP_SECONDS:
                file.unlink(missing_ok=True)

    def _file(self, signature: Any, codegen: Any) -> pathlib.Path:
        key = repr(
            (self._name, str(signature), codegen.magic_tuple(), _source_digest(), _versions())
        )
        return folder() / f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.kernel"


def identity() -> str:
    """Return what the bits of results depend on: the sources of all kernels, processor, versions of
    Numba and Python.
    """
    from numba.core.registry import cpu_target

    key = repr((cpu_target.target_context.codegen().magic_tuple(), _source_digest(), _versions()))
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@cache
def _source_digest() -> str:
    """Return the digest of all sources that kernels are made from."""
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    import llvmlite
    import numba
    import numpy

    settings = sorted(
        f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_")
    )
    settings = [setting for setting in settings if not setting.startswith("NUMBA_CACHE_DIR")]
    return (
        sys.version,
        platform.machine(),
        numba.__version__,
        llvmlite.__version__,
        numpy.__version__,
        *settings,
    )


def _announce() -> None:
    """Say once that kernels are being compiled, so that nobody wonders about the first call."""
    global _announced
    with _announce_lock:
        if _announced:
            return
        _announced = True
    _log.warning(
        "racecore: compiling kernels for their first use here (some seconds, once); kept in %s",
        folder(),
    )


def _note(problem: str) -> None:
    if problem not in _problems:
        _problems.append(problem)
        _log.info("racecore: %s", problem)
