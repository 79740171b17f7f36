"""Arrays of other libraries, imported and exported through DLPack without a copy.

Libraries are recognised by the module of an array's type, and never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from racecore.runtime import cuda

__all__ = ["exporter", "import_in_host_memory", "import_on_device", "is_on_device"]

# DLPack's device types: CPU, CUDAHost; CUDA, CUDAManaged
_HOST_TYPES = (1, 3)
_DEVICE_TYPES = (2, 13)


def is_on_device(array: Any) -> bool:
    """Return whether an array of any library is on a GPU."""
    if cuda.is_array(array):
        return True
    if _library(array) == "jax" and _is_sharded_jax_array(array):
        return False
    if not hasattr(array, "__dlpack_device__"):
        return False
    return int(array.__dlpack_device__()[0]) in _DEVICE_TYPES


def import_on_device(array: Any, name: str) -> Any:
    """Import an array of another library through DLPack, on its GPU."""
    _refuse_gradients(array, name)
    try:
        cupy = cuda.cupy()
    except ImportError:
        raise TypeError(
            f"{name} is on a GPU, where racecore computes with CuPy, and that cannot be imported: "
            "pip install "
            "'racecore[cuda13]' (or [cuda12]), or copy the array to the host; `racecore doctor` "
            "says more"
        ) from None
    if "bfloat16" in str(array.dtype) and _library(array) == "torch":
        return cupy.from_dlpack(array.view(sys.modules["torch"].int16)).view(_bfloat16(name))
    return cupy.from_dlpack(array)


def _is_sharded_jax_array(array: Any) -> bool:
    """Return whether an array of JAX is sharded over devices.

    DLPack cannot export such an array; `numpy.asarray` gathers it.

    Raises
    ------
    TypeError
        There is no array, as its function is being traced.
    """
    if isinstance(array, sys.modules["jax"].core.Tracer):
        raise TypeError(
            "an array is traced by JAX (under jit, grad or vmap), and racecore needs its values: "
            "use race_attention of "
            "racecore.adapters.jax there, which has gradients too"
        )
    return len(array.devices()) > 1


def _refuse_gradients(array: Any, name: str) -> None:
    if getattr(array, "requires_grad", False):
        raise TypeError(
            f"{name} is a tensor that requires a gradient, and gradients do not pass through "
            "DLPack: "
            "pass the result of .detach() and call attention_backward yourself"
        )


def import_in_host_memory(array: Any, name: str) -> np.ndarray:
    """Import an array of another library in host memory through DLPack."""
    if _library(array) == "jax" and _is_sharded_jax_array(array):
        return np.asarray(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array or an array that speaks DLPack, got "
            f"{type(array).__module__}."
            f"{type(array).__qualname__}; convert it with numpy.asarray first"
        )
    _refuse_gradients(array, name)
    device = int(array.__dlpack_device__()[0])
    if device in _DEVICE_TYPES:
        raise TypeError(
            f"{name} is on a GPU, and here host memory is needed; copy it to the host first"
        )
    if device not in _HOST_TYPES:
        raise TypeError(
            f"{name} lives on a device (DLPack device type {device}) that racecore does not "
            "compute on; copy it to the "
            "host first"
        )
    if "bfloat16" in str(array.dtype):
        return _import_bfloat16(array, name)
    return np.from_dlpack(array)


def _import_bfloat16(array: Any, name: str) -> np.ndarray:
    """Import bfloat16, which NumPy's DLPack refuses, as 16-bit integers of the same bits."""
    dtype = _bfloat16(name)
    library = _library(array)
    if library == "torch":
        bits = np.from_dlpack(array.view(sys.modules["torch"].int16))
    elif library == "jax":
        # JAX exports ml_dtypes.bfloat16, without a copy
        return np.asarray(array)
    else:
        raise TypeError(
            f"{name}: bfloat16 from {library} is not supported; view it as uint16 and then as "
            "ml_dtypes.bfloat16"
        )
    return bits.view(dtype)


def _bfloat16(name: str) -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} is bfloat16, which needs the ml_dtypes package: pip install 'racecore[bf16]'"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def _library(array: Any) -> str:
    """Name the package that defines the type of `array` (jaxlib's arrays belong to jax)."""
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def exporter(array: Any) -> Callable[[Any], Any]:
    """Return the function from an array of NumPy or CuPy to one of the library of `array`."""
    library = _library(array)
    if library == "jax":
        return _to_jax
    if library == "torch":
        return _to_torch
    from_dlpack = getattr(sys.modules.get(library), "from_dlpack", None)
    if from_dlpack is None and hasattr(array, "__array_namespace__"):
        from_dlpack = array.__array_namespace__().from_dlpack
    if from_dlpack is None:
        raise TypeError(
            f"arrays of {library} can be read but not made: it has no from_dlpack; pass NumPy "
            "arrays"
        )
    return from_dlpack


def _to_torch(result: Any) -> Any:
    torch = sys.modules["torch"]
    # bfloat16, the only supported dtype that is not NumPy's
    if result.dtype.kind == "V":
        return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _to_jax(result: Any) -> Any:
    jax = sys.modules["jax"]
    if cuda.is_array(result):
        return jax.numpy.from_dlpack(result)
    if result.dtype.itemsize < 8:
        return jax.numpy.asarray(result)
    # a float64 result of float64 inputs: without x64, JAX would silently make it float32
    with jax.enable_x64(True):
        return jax.numpy.asarray(result)
