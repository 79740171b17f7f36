"""The name of the machine, its free memory, and the memory of this process. Linux only."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
from typing import Any

__all__ = [
    "describe",
    "free_memory",
    "limit_memory",
    "peak_memory",
    "reset_peak",
    "resident_memory",
]

_PACKAGES = ("racecore", "numpy", "numba", "torch", "ml_dtypes")


def describe() -> dict[str, Any]:
    """Return the processor's name, how many of it may be used, memory, versions and the date."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "processor": names[0] if names else platform.machine(),
        "wide_vectors": "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "",
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": _kilobytes("/proc/meminfo", "MemTotal"),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def free_memory() -> int:
    """Return the bytes that can still be allocated: of the machine, or of the control group if that
    has a limit.
    """
    free = _kilobytes("/proc/meminfo", "MemAvailable")
    limit, used = (
        pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current")
    )
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def resident_memory() -> int:
    """Return the bytes of this process that are in memory now."""
    return _kilobytes("/proc/self/status", "VmRSS")


def reset_peak() -> None:
    """Reset the peak if the kernel allows it; else `peak_memory` covers the whole process."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most bytes of this process that were in memory since `reset_peak`.

    Like ru_maxrss of getrusage, which would also count the memory of the parent before it started
    this process.
    """
    return _kilobytes("/proc/self/status", "VmHWM")


def limit_memory(n_bytes: int) -> None:
    """Let allocations of more than `n_bytes` fail before the machine runs out of memory."""
    now = _kilobytes("/proc/self/status", "VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = now + n_bytes
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
    )


def _kilobytes(path: str, name: str) -> int:
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line {name}; this needs Linux")
