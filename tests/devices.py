"""The backends that tests go through, and arrays where each of them computes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from racecore.runtime import cuda

__all__ = ["BACKENDS", "Gpu", "fetch", "put"]


class Gpu(str):
    """The backend "cuda" on a real GPU. The plain string means its kernels on the CPU, see
    `cuda_on_cpu`.
    """


BACKENDS = ("reference", "cpu", "cuda", pytest.param(Gpu("cuda"), marks=pytest.mark.gpu, id="gpu"))


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
