"""Compiled kernels on disk: one file per kernel and signature, with a checksum, that can only help.

Numba's own cache goes stale when an edited function lives in another module than the kernel that
calls it, and one truncated index file makes every later run fail. This one names a file after
everything the machine code depends on (syntax trees of the modules that kernels are made from,
signature, processor, versions of Python and Numba, Numba's settings), writes it whole or not at
all, and treats an unreadable file as absent. It plugs into the dispatcher in place of Numba's own
cache; should a future Numba have no such attribute, kernels are compiled in every process and
`describe` says so.

Syntax trees hold neither comments nor positions, and docstrings are left out: prose can be edited
without compiling anything. A new name of a module, function or variable counts as a change.
"""

from __future__ import annotations

import ast
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
from collections.abc import Callable
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
# Modules under ops/ that no kernel of the CPU is made from. A list of exceptions: a new module
# counts as a source of kernels until it is named here.
_NO_KERNELS = ("ops/**/reference.py", "ops/reference_rows.py", "ops/**/cuda.py", "ops/cuda/*.py")
_CUDA_SOURCES = ("ops/**/*.cu", "ops/**/*.cuh")
_DIGEST_BYTES = 32
_KEEP_SECONDS = 30 * 24 * 3600
_announce_lock = threading.Lock()
_announced = False
_problems: list[str] = []


def folder() -> pathlib.Path:
    """Return the folder of kernels: under NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache."""
    base = (
        os.environ.get("NUMBA_CACHE_DIR")
        or os.environ.get("XDG_CACHE_HOME")
        or os.path.expanduser("~/.cache")
    )
    return pathlib.Path(base) / "racecore"


def describe() -> dict[str, Any]:
    """Return folder, number and size of files, write permission and the problems so far."""
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
        # now, while the files are those that are being imported: they may be edited later
        _digest(kernel_sources)
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    else:
        _note("this version of Numba has no attribute for a cache")
    return dispatcher


class _KernelCache:
    """The interface of Numba's caches: load_overload and save_overload."""

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        """The folder, for Numba's statistics."""
        return str(folder())

    def enable(self) -> None:
        """Do nothing: this cache is always on."""

    def disable(self) -> None:
        """Do nothing: this cache is always on."""

    def flush(self) -> None:
        """Do nothing: files of older sources have other names and are never read."""

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if there is no valid file."""
        from numba.core.compiler import CompileResult

        try:
            # intrinsics that were defined since the context was made
            target_context.refresh()
            content = self._file(signature, target_context.codegen()).read_bytes()
            digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(payload).digest() == digest:
                import pickle

                return CompileResult._rebuild(target_context, *pickle.loads(payload))
            _note(f"the cached kernel {self._name} is damaged and was compiled again")
        except FileNotFoundError:
            pass
        # whatever is wrong with a cache, compiling is the remedy
        except Exception as error:
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
            # renamed when complete: readers see a whole file or none
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
        """Remove files of this kernel that are a month old: those of older sources and versions."""
        for file in folder().glob(f"{self._name}-*"):
            if time.time() - file.stat().st_mtime > _KEEP_SECONDS:
                file.unlink(missing_ok=True)

    def _file(self, signature: Any, codegen: Any) -> pathlib.Path:
        key = repr(
            (
                self._name,
                str(signature),
                codegen.magic_tuple(),
                _digest(kernel_sources),
                _versions(),
            )
        )
        return folder() / f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.kernel"


def identity() -> str:
    """Return a digest of everything the bits of results depend on: the sources of the operations in
    every backend, the processor, the versions of Numba and Python.
    """
    from numba.core.registry import cpu_target

    key = repr(
        (
            cpu_target.target_context.codegen().magic_tuple(),
            _digest(kernel_sources),
            _digest(other_sources),
            _versions(),
        )
    )
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def kernel_sources(package: pathlib.Path) -> set[pathlib.Path]:
    """Return the modules that kernels of the CPU are made from; `package` is racecore's folder."""
    return _found(package, _SOURCES) - _found(package, _NO_KERNELS)


def other_sources(package: pathlib.Path) -> set[pathlib.Path]:
    """Return the modules and the CUDA files of the other backends."""
    return _found(package, _NO_KERNELS) | _found(package, _CUDA_SOURCES)


def _found(package: pathlib.Path, patterns: tuple[str, ...]) -> set[pathlib.Path]:
    return {path for pattern in patterns for path in package.glob(pattern)}


@cache
def _digest(sources: Callable[[pathlib.Path], set[pathlib.Path]]) -> str:
    return source_digest(pathlib.Path(__file__).parent.parent, sources)


def source_digest(
    package: pathlib.Path, sources: Callable[[pathlib.Path], set[pathlib.Path]]
) -> str:
    """Return the digest of `kernel_sources` or `other_sources`; it takes a tenth of a second."""
    digest = hashlib.sha256()
    for path in sorted(sources(package)):
        content = path.read_bytes()
        if path.suffix == ".py":
            content = _without_prose(content).encode()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _without_prose(source: bytes) -> str:
    """Return a module's syntax tree as text, without comments, positions and docstrings."""
    tree = ast.parse(source)
    _drop_docstrings(tree.body)
    return ast.dump(tree)


def _drop_docstrings(body: list[ast.stmt]) -> None:
    """Remove strings that are statements by themselves, in nested blocks too."""
    body[:] = [
        statement
        for statement in body
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    ]
    for statement in body:
        for block in ("body", "orelse", "finalbody"):
            _drop_docstrings(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            _drop_docstrings(handler.body)


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
    """Log once that kernels are being compiled: the first call takes seconds."""
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
