"""CuPy behind one module: availability of a GPU, compilation of kernels, arrays on the device.

Kernels are `.cu` and `.cuh` files beside the Python of their operation. NVRTC, through
`cupy.RawModule`, compiles a file once per dtype and number of columns per lane, at first use; CuPy
keeps the binaries in its cache folder. Includes are pasted into the source here, so that a change
of one of them invalidates that cache. Work goes to CuPy's current stream, memory comes from its
pool.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

__all__ = [
    "LANES",
    "addresses",
    "cupy",
    "empty_pinned",
    "has_bfloat16_products",
    "is_array",
    "kernel",
    "most_shared_bytes",
    "reason_unavailable",
    "shadow",
    "source",
    "structure",
    "to_device",
]

LANES = 32  # threads of a warp, see ops/cuda/warp.cuh
_OPS = Path(__file__).parent.parent / "ops"
_STORAGE = {"float16": "Half", "bfloat16": "Bfloat", "float32": "float", "float64": "double"}
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)


def cupy() -> ModuleType:
    """Import CuPy."""
    return importlib.import_module("cupy")


def is_array(x: Any) -> bool:
    """Return whether `x` is a CuPy array, without importing CuPy."""
    module = sys.modules.get("cupy")
    return module is not None and isinstance(x, module.ndarray)


def reason_unavailable() -> str | None:
    """Return the reason why no GPU can be used, or None if one can."""
    try:
        library = cupy()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return (
                "CuPy is not installed: pip install 'racecore[cuda13]', or [cuda12] for a driver "
                "of CUDA 12"
            )
        return f"CuPy is installed but cannot be imported: {error}"
    try:
        count = library.cuda.runtime.getDeviceCount()
    # CUDARuntimeError: no driver, or one too old for this CuPy
    except Exception as error:
        return f"CuPy {library.__version__} finds no usable driver: {error}"
    if count == 0:
        return f"CuPy {library.__version__} finds no CUDA device"
    capability = str(library.cuda.Device().compute_capability)
    if int(capability) < 70:
        return f"the GPU has compute capability {capability}; 70 or newer is needed"
    return _reason_not_compiling(library)


def _reason_not_compiling(library: ModuleType) -> str | None:
    try:
        library.RawModule(code='extern "C" __global__ void nothing() {}').get_function("nothing")
    except Exception as error:
        return f"CuPy {library.__version__} cannot compile kernels: {error}"
    return None


@cache
def source(file: str) -> str:
    """Return the text of a file under `racecore/ops` with its includes pasted, each once."""
    return _pasted(file, set())


def _pasted(file: str, seen: set[str]) -> str:
    def paste(match: re.Match[str]) -> str:
        """Return the text of an included file, or nothing the second time."""
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return _pasted(name, seen)

    text = (_OPS / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(paste, text)


def has_bfloat16_products() -> bool:
    """Return whether the current device has tensor cores for bfloat16."""
    return int(cupy().cuda.Device().compute_capability) >= 80


def most_shared_bytes() -> int:
    """Return the largest shared memory of a block of the current device, with opting in."""
    return _most_shared_bytes(cupy(), cupy().cuda.Device().id)


@cache
def _most_shared_bytes(library: ModuleType, device: int) -> int:
    return int(library.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def options(dtype: np.dtype, columns: int, tensor_cores: bool = False) -> tuple[str, ...]:
    """Return the compiler options for arrays stored as `dtype`, `columns` columns per lane."""
    real = "double" if dtype.name == "float64" else "float"
    defines = {
        "STORAGE": _STORAGE[dtype.name],
        "REAL": real,
        "COLUMNS": columns,
        "TENSOR_CORES": int(tensor_cores),
    }
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))


_modules: dict[tuple[Any, ...], Any] = {}


def kernel(file: str, name: str, dtype: np.dtype, columns: int, tensor_cores: bool = False) -> Any:
    """Return a kernel for the current device, compiled now if this is its first use."""
    library = cupy()
    key = (library, library.cuda.Device().id, file, dtype.name, columns, tensor_cores)
    if key not in _modules:
        _modules[key] = library.RawModule(
            code=source(file), options=options(dtype, columns, tensor_cores)
        )
    return _modules[key].get_function(name)


def to_device(array: Any, dtype: DTypeLike | None = None) -> Any:
    """Return a C-contiguous array on the device, without a copy if it already is one."""
    library = cupy()
    return library.ascontiguousarray(
        library.asarray(array if dtype is None else array.astype(dtype))
    )


def empty_pinned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Return an uninitialised array in pinned host memory, for asynchronous copies."""
    dtype = np.dtype(dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    return (
        np.frombuffer(cupy().cuda.alloc_pinned_memory(max(n_bytes, 1)), np.uint8, n_bytes)
        .view(dtype)
        .reshape(shape)
    )


def addresses(array: Any) -> tuple[int, ...]:
    """Return the address and the four strides (in elements) of an array; zeros for None."""
    if array is None:
        return (0, 0, 0, 0, 0)
    return (array.data.ptr, *(stride // array.itemsize for stride in array.strides))


def shadow(array: Any) -> np.ndarray:
    """Return a NumPy array over the addresses of a device array, to test for overlap.

    Its data must never be read.
    """

    interface = {
        "version": 3,
        "data": (array.data.ptr, True),
        "shape": array.shape,
        "strides": array.strides,
        "typestr": f"|V{array.itemsize}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def structure(fields: Iterable[tuple[str, int]]) -> np.ndarray:
    """Return a C structure of 64-bit integers and addresses, shape [1], to pass by value."""
    named = list(fields)
    # a structured dtype refuses duplicate names
    record = np.zeros(1, [(name, np.int64) for name, _ in named])
    for name, value in named:
        record[name] = value
    return record
