"""Arrays of any library in, NumPy or CuPy arrays inside, the caller's library out; and the dtype
policy.

Arrays in host memory become NumPy arrays, arrays on a GPU CuPy arrays, both without a copy.

Storage dtypes are float16, bfloat16, float32 and float64. Arithmetic is float32, or float64 where
the storage is float64. Strides of any kind are legal and stay as they are; only a foreign byte
order, or addresses and strides that are no multiple of the item size, cost a copy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from racecore.runtime import cuda

__all__ = [
    "as_array",
    "as_numpy",
    "compute_dtype",
    "copied",
    "empty",
    "is_bfloat16",
    "is_on_device",
    "is_supported",
    "restorer",
    "to_device",
    "zeros",
]

DTYPE_NAMES = "float16, bfloat16 (ml_dtypes), float32 or float64"
_ALIGNMENT = 64  # one cache line, and the widest vector store
_HOST, _HOST_PINNED, _DEVICE, _DEVICE_MANAGED = (
    1,
    3,
    2,
    13,
)  # DLPack's device types: CPU, CUDAHost, CUDA, CUDAManaged


def empty(shape: tuple[int, ...], dtype: DTypeLike, on_device: bool = False) -> Any:
    """Return an uninitialised C-contiguous array whose data starts on a cache line."""
    return cuda.cupy().empty(shape, dtype) if on_device else _aligned(np.empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, on_device: bool = False) -> Any:
    """Return the same filled with zeros. Large ones come from the system already zero and cost
    nothing until touched.
    """
    return cuda.cupy().zeros(shape, dtype) if on_device else _aligned(np.zeros, shape, dtype)


def _aligned(
    new: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: DTypeLike
) -> np.ndarray:
    dtype = np.dtype(dtype)
    buffer = new(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, buffer, -buffer.ctypes.data % _ALIGNMENT)


def copied(array: Any) -> Any:
    """Return a copy as `empty` makes arrays, where the array is."""
    new = empty(array.shape, array.dtype, cuda.is_array(array))
    new[...] = array
    return new


def to_device(array: Any, on_device: bool) -> Any:
    """Return an array on the GPU, or in host memory; a copy only where it is on the other side."""
    if cuda.is_array(array) == on_device:
        return array
    return cuda.cupy().asarray(array) if on_device else cuda.cupy().asnumpy(array)


def is_bfloat16(dtype: np.dtype) -> bool:
    """Tell whether `dtype` is ml_dtypes.bfloat16, without importing ml_dtypes."""
    return (
        dtype.isbuiltin == 2 and dtype.name == "bfloat16"
    )  # 2: registered by a package; spelling a name is slow


def is_supported(dtype: np.dtype) -> bool:
    """Tell whether `dtype`, in either byte order, is one that the kernels can read."""
    return (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)) or is_bfloat16(dtype)


def dtype_of(name: str) -> np.dtype:
    """Return the dtype of a name, also of "bfloat16".

    Raises
    ------
    ValueError
        For bfloat16 without the package ml_dtypes.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError(
            "dtype='bfloat16' needs the package ml_dtypes: pip install 'racecore[bf16]'"
        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of the arithmetic for inputs stored as `dtype`."""
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def as_array(array: Any, name: str) -> Any:
    """View an array of any library as a CuPy array if it is on a GPU, else as a NumPy array; see
    `as_numpy`.
    """
    if not cuda.is_array(array):
        if isinstance(array, np.ndarray) or not is_on_device(array):
            return as_numpy(array, name)
        array = _import_from_device(array, name)
    return array.copy() if any(stride % array.itemsize for stride in array.strides) else array


def is_on_device(array: Any) -> bool:
    """Tell whether an array of any library is on a GPU."""
    if cuda.is_array(array):
        return True
    if _library(array) == "jax" and _is_jax_array_in_pieces(array):
        return False
    return hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in (
        _DEVICE,
        _DEVICE_MANAGED,
    )


def _import_from_device(array: Any, name: str) -> Any:
    """Bring an array of another library in through DLPack, on the GPU where it is."""
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
        return cupy.from_dlpack(array.view(sys.modules["torch"].int16)).view(dtype_of("bfloat16"))
    return cupy.from_dlpack(array)


def _is_jax_array_in_pieces(array: Any) -> bool:
    """Tell whether an array of JAX is spread over devices, which DLPack does not know; NumPy gets
    it gathered.

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


def as_numpy(array: Any, name: str) -> np.ndarray:
    """View an array of any library as a NumPy array that the kernels can address.

    Parameters
    ----------
    array : array
        A NumPy array, or anything in host memory that speaks DLPack.
    name : str
        What the caller calls it; used in messages.

    Returns
    -------
    numpy.ndarray
        Native byte order, aligned, any strides. Shares memory with `array` wherever that is
        possible.

    Raises
    ------
    TypeError
        For anything else, naming what came.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array; pass its .data, and the mask as key_mask (True = take part)"
        )
    if not isinstance(array, np.ndarray):
        array = _import(array, name)
    array = np.asarray(array)
    dtype = array.dtype
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    if not array.flags.aligned or any(s % dtype.itemsize for s in array.strides):
        array = array.copy(order="C")
    return array


def _import(array: Any, name: str) -> np.ndarray:
    """Bring an array of another library in through DLPack."""
    if _library(array) == "jax" and _is_jax_array_in_pieces(array):
        return np.asarray(array)
    if not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{name} must be a NumPy array or an array that speaks DLPack, got "
            f"{type(array).__module__}."
            f"{type(array).__qualname__}; convert it with numpy.asarray first"
        )
    _refuse_gradients(array, name)
    device = int(array.__dlpack_device__()[0])
    if device in (_DEVICE, _DEVICE_MANAGED):
        raise TypeError(
            f"{name} is on a GPU, and here host memory is needed; copy it to the host first"
        )
    if device not in (_HOST, _HOST_PINNED):
        raise TypeError(
            f"{name} lives on a device (DLPack device type {device}) that racecore does not "
            "compute on; copy it to the "
            "host first"
        )
    if "bfloat16" in str(array.dtype):
        return _import_bfloat16(array, name)
    return np.from_dlpack(array)


def _import_bfloat16(array: Any, name: str) -> np.ndarray:
    """NumPy's DLPack refuses bfloat16: exchange the same bits as 16-bit integers."""
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name} is bfloat16, which needs the ml_dtypes package: pip install 'racecore[bf16]'"
        ) from None
    library = _library(array)
    if library == "torch":
        bits = np.from_dlpack(array.view(sys.modules["torch"].int16))
    elif library == "jax":
        return np.asarray(array)  # jax gives ml_dtypes.bfloat16 without a copy
    else:
        raise TypeError(
            f"{name}: bfloat16 from {library} is not supported; view it as uint16 and then as "
            "ml_dtypes.bfloat16"
        )
    return bits.view(ml_dtypes.bfloat16)


def _library(array: Any) -> str:
    """Name the package that defines the type of `array` (jaxlib's arrays belong to jax)."""
    root = type(array).__module__.partition(".")[0]
    return "jax" if root == "jaxlib" else root


def restorer(array: Any) -> Callable[[Any], Any]:
    """Return the function that turns a result into an array of the library that `array` comes from.

    Results are fresh, writable and C-contiguous, so handing them over through DLPack is safe and
    copies nothing. Only one that was computed on a GPU for arrays in host memory is copied there.
    """
    if cuda.is_array(array):
        return lambda result: result
    if isinstance(array, np.ndarray):
        return lambda result: to_device(result, False)
    hand_over = _hand_over(array)
    return hand_over if is_on_device(array) else lambda result: hand_over(to_device(result, False))


def _hand_over(array: Any) -> Callable[[Any], Any]:
    library = _library(array)
    module = sys.modules.get(library)
    if library == "jax":
        return _to_jax
    if library == "torch":
        return _to_torch
    from_dlpack = getattr(module, "from_dlpack", None)
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
    if is_bfloat16(result.dtype):
        return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _to_jax(result: Any) -> Any:
    jax = sys.modules["jax"]
    if cuda.is_array(result):
        return jax.numpy.from_dlpack(result)
    if result.dtype.itemsize < 8:
        return jax.numpy.asarray(result)
    with jax.enable_x64(True):  # it came as float64; outside, JAX would narrow it without a word
        return jax.numpy.asarray(result)
