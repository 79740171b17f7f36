"""The one room that knows CuPy: whether a GPU can be used and why not, kernels compiled on first
use, arrays on the device.

Kernels are written in `.cu` and `.cuh` files beside the Python of their operation. NVRTC, through
`cupy.RawModule`, compiles a file once per dtype and number of columns per lane; CuPy keeps the
binaries in its cache folder. Includes are pasted here, so that this cache notices when one of them
changes. Work goes to CuPy's current stream and memory comes from its pool.
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
    """Tell whether `x` is a CuPy array, without importing CuPy."""
    module = sys.modules.get("cupy")
    return module is not None and isinstance(x, module.ndarray)


def reason_unavailable() -> str | None:
    """Return why nothing can be computed on a GPU here, or None where it can."""
    try:
        library = cupy()
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return "CuPy is not installed: pip install 'racecore[cuda13]', or [cuda12] for a driver of CUDA 12"
        return f"CuPy is installed but cannot be imported: {error}"
    try:
        count = library.cuda.runtime.getDeviceCount()
    except Exception as error:  # CUDARuntimeError: no driver, or one too old for this CuPy
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
    """Tell whether the current device has tensor cores that multiply bfloat16."""
    return int(cupy().cuda.Device().compute_capability) >= 80


def most_shared_bytes() -> int:
    """Return how much shared memory a block of the current device can have if it asks."""
    return _most_shared_bytes(cupy(), cupy().cuda.Device().id)


@cache
def _most_shared_bytes(library: ModuleType, device: int) -> int:
    return int(library.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def options(dtype: np.dtype, columns: int, tensor_cores: bool = False) -> tuple[str, ...]:
    """Return what a file is compiled with for arrays stored as `dtype`, `columns` of a row for each
    lane.
    """
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
    """Return a C-contiguous copy on the device; an array that is there already stays as it is."""
    library = cupy()
    return library.ascontiguousarray(
        library.asarray(array if dtype is None else array.astype(dtype))
    )


def empty_pinned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Return an uninitialised array in host memory that is locked, so that copies need not wait for
    the processor.
    """
    dtype = np.dtype(dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    return (
        np.frombuffer(cupy().cuda.alloc_pinned_memory(max(n_bytes, 1)), np.uint8, n_bytes)
        .view(dtype)
        .reshape(shape)
    )


def addresses(array: Any) -> tuple[int, ...]:
    """Return the address and the strides in elements of an array, zeros for None; four strides."""
    if array is None:
        return (0, 0, 0, 0, 0)
    return (array.data.ptr, *(stride // array.itemsize for stride in array.strides))


def shadow(array: Any) -> np.ndarray:
    """Return a NumPy array over the addresses of a device array: for questions of overlap, never to
    be read.
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
    """Return a C structure of 64-bit integers and addresses, shape [1], as a kernel takes it by
    value.
    """
    named = list(fields)
    record = np.zeros(1, [(name, np.int64) for name, _ in named])  # refuses a name that comes twice
    for name, value in named:
        record[name] = value
    return record
