"""The backends that tests go through, and arrays where each of them computes."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np
import pytest

from racecore.runtime import cuda

__all__ = ["BACKENDS", "Gpu", "cpu_seconds", "fetch", "put", "reason_without_gpu", "wants_gpu"]


class Gpu(str):
    """The backend "cuda" on a real GPU. The plain string means its kernels on the CPU, see
    `cuda_on_cpu`.
    """


@functools.cache
def reason_without_gpu() -> str | None:
    """Return why no test can run on a GPU here, None where it can."""
    try:
        import cupy  # type: ignore[import-not-found]

        return None if cupy.cuda.runtime.getDeviceCount() else "CuPy finds no CUDA device"
    except Exception as error:  # no CuPy, no driver, a driver too old: all of them are reasons
        return f"{type(error).__name__}: {error}"


def wants_gpu() -> bool:
    """Return whether tests of a GPU are collected: where there is one, or where one is required."""
    return os.environ.get("RACECORE_REQUIRE_GPU") == "1" or reason_without_gpu() is None


# g++ compiles the CUDA kernels for the CPU: `toolchain`.
_ON_CPU = pytest.param("cuda", marks=pytest.mark.toolchain, id="cuda")
_ON_GPU = pytest.param(Gpu("cuda"), marks=pytest.mark.gpu, id="gpu")
BACKENDS = ("reference", "cpu", _ON_CPU, *([_ON_GPU] if wants_gpu() else []))


def put(array: Any, backend: str) -> Any:
    """Return an array where a backend computes, in the same layout where that can be; None stays
    None.
    """
    if array is None or backend != "cuda":
        return array
    cupy = cuda.cupy()
    native = (
        array
        if array.dtype.isnative and array.flags.aligned
        else array.astype(array.dtype.newbyteorder("="))
    )
    low, high = np.lib.array_utils.byte_bounds(native)
    memory = cupy.asarray(np.frombuffer(ctypes.string_at(low, high - low), np.uint8))
    return cupy.ndarray(
        native.shape, native.dtype, memory.data + (native.ctypes.data - low), native.strides
    )


def fetch(array: Any) -> np.ndarray:
    """Return a result in host memory."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has taken, which no other process changes."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
