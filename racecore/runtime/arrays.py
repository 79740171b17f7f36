"""Arrays of any library in, NumPy or CuPy arrays inside, the caller's library out; the dtypes.

Arrays in host memory become NumPy arrays, arrays on a GPU CuPy arrays, both without a copy.
`resolve` makes one record of a caller's array: its device, its dtype, the way back.

Storage dtypes are float16, bfloat16, float32 and float64. Arithmetic is float32, or float64 for
float64 storage. Strides of any kind are legal and kept; only a foreign byte order, or addresses and
strides that are no multiple of the item size, cost a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from racecore.runtime import cuda, dlpack

__all__ = [
    "DTYPE_NAMES",
    "CallerArray",
    "as_array",
    "as_numpy",
    "compute_dtype",
    "copied",
    "dtype_of",
    "empty",
    "is_bfloat16",
    "is_supported",
    "resolve",
    "result_itself",
    "to_device",
    "to_host",
    "zeros",
]

DTYPE_NAMES = "float16, bfloat16 (ml_dtypes), float32 or float64"
_ALIGNMENT = 64  # one cache line, and the widest vector store


def empty(shape: tuple[int, ...], dtype: DTypeLike, on_device: bool = False) -> Any:
    """Return an uninitialised C-contiguous array whose data starts on a cache line."""
    return cuda.cupy().empty(shape, dtype) if on_device else _aligned(np.empty, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, on_device: bool = False) -> Any:
    """Return an array of zeros, aligned like those of `empty`."""
    # large ones come from the system already zero and cost nothing until touched
    return cuda.cupy().zeros(shape, dtype) if on_device else _aligned(np.zeros, shape, dtype)


def _aligned(
    new: Callable[..., np.ndarray], shape: tuple[int, ...], dtype: DTypeLike
) -> np.ndarray:
    dtype = np.dtype(dtype)
    buffer = new(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, buffer, -buffer.ctypes.data % _ALIGNMENT)


def copied(array: Any) -> Any:
    """Return a C-contiguous copy on the array's device, aligned like those of `empty`."""
    new = empty(array.shape, array.dtype, cuda.is_array(array))
    new[...] = array
    return new


def to_device(array: Any, on_device: bool) -> Any:
    """Return an array on the GPU, or in host memory; a copy only if it is on the other device."""
    if cuda.is_array(array) == on_device:
        return array
    return cuda.cupy().asarray(array) if on_device else cuda.cupy().asnumpy(array)


def to_host(array: Any, name: str) -> np.ndarray:
    """Return an array of any library as a NumPy array; one on a GPU is copied."""
    return to_device(as_array(array, name), False)


class CallerArray(NamedTuple):
    """An array that a caller passed, resolved once.

    Attributes
    ----------
    source : array
        The array as it was passed, of any library.
    array : numpy.ndarray or cupy.ndarray
        The same numbers on the device of the computation.
    on_device : bool
        Whether `source` is on a GPU.
    """

    source: Any
    array: Any
    on_device: bool

    @property
    def dtype(self) -> np.dtype:
        """The storage dtype."""
        return self.array.dtype

    @property
    def had_batch(self) -> bool:
        """Whether there is a batch axis: [B, T, heads, dim], not [T, heads, dim]."""
        return self.array.ndim == 4

    def way_back(self) -> Callable[[Any], Any]:
        """Return the function that turns a result into an array of the library and on the device of
        `source`.

        Results are fresh, writable and C-contiguous, so DLPack can export them and copies nothing.
        Only results on a GPU for arrays in host memory are copied.

        Raises
        ------
        TypeError
            The library can export arrays and not import them.
        """
        source = self.source
        if isinstance(source, np.ndarray):
            return _result_in_host_memory
        if cuda.is_array(source):
            return result_itself
        export = dlpack.exporter(source)
        return export if self.on_device else lambda result: export(to_device(result, False))


def resolve(on_device: bool | None, **named: Any) -> list[CallerArray]:
    """Resolve the arrays of one computation.

    Parameters
    ----------
    on_device : bool or None
        Whether to compute on a GPU; arrays elsewhere are copied. None: on the device of the arrays.
    **named : array
        Of any library, by the names that messages use.

    Raises
    ------
    TypeError
        As for `as_numpy`.
    ValueError
        `on_device` is None, and some arrays are on a GPU and others are not.
    """
    found = []
    for name, source in named.items():
        array = as_array(source, name)
        found.append(CallerArray(source, array, not isinstance(array, np.ndarray)))
    if on_device is not None:
        return [x._replace(array=to_device(x.array, on_device)) for x in found]
    for x in found:
        if x.on_device is not found[0].on_device:
            text = ", ".join(
                f"{name} {'on a GPU' if x.on_device else 'in host memory'}"
                for name, x in zip(named, found, strict=True)
            )
            raise ValueError(
                f"the arrays must be on one device, got {text}; move them with cupy.asarray or "
                "cupy.asnumpy"
            )
    return found


def is_bfloat16(dtype: np.dtype) -> bool:
    """Return whether `dtype` is ml_dtypes.bfloat16, without importing ml_dtypes."""
    # 2: registered by a package. It is checked first, because the name of a dtype is slow.
    return dtype.isbuiltin == 2 and dtype.name == "bfloat16"


def is_supported(dtype: np.dtype) -> bool:
    """Return whether kernels read `dtype`, in either byte order."""
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
    """View an array of any library as a CuPy array if it is on a GPU, else as `as_numpy` does."""
    if not cuda.is_array(array):
        if isinstance(array, np.ndarray) or not dlpack.is_on_device(array):
            return as_numpy(array, name)
        array = dlpack.import_on_device(array, name)
    return array if _has_whole_strides(array) else array.copy()


def as_numpy(array: Any, name: str) -> np.ndarray:
    """View an array of any library as a NumPy array that the kernels can address.

    Parameters
    ----------
    array : array
        A NumPy array, or anything in host memory that speaks DLPack.
    name : str
        The argument's name, for messages.

    Returns
    -------
    numpy.ndarray
        Native byte order, aligned, any strides. Shares memory with `array` wherever that is
        possible.

    Raises
    ------
    TypeError
        For anything else; the message names its type.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array; pass its .data, and the mask as key_mask (True = take part)"
        )
    if not isinstance(array, np.ndarray):
        array = dlpack.import_in_host_memory(array, name)
    array = np.asarray(array)
    dtype = array.dtype
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
    return array if _has_whole_strides(array) and array.flags.aligned else array.copy(order="C")


def _has_whole_strides(array: Any) -> bool:
    """Return whether the strides are multiples of the item size."""
    itemsize = array.itemsize
    # `any` of a generator takes 0.5 us, this loop 0.2: a step of one token comes here three times
    for stride in array.strides:  # noqa: SIM110
        if stride % itemsize:
            return False
    return True


def result_itself(result: Any) -> Any:
    """Return a result unchanged: the way back of an array that needs none."""
    return result


def _result_in_host_memory(result: Any) -> np.ndarray:
    return to_device(result, False)
