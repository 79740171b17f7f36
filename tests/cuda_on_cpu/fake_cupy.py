"""The subset of CuPy that racecore uses, in host memory: kernels run on the CPU.

`install` replaces the module `cupy`. Its arrays are not NumPy arrays and refuse the same implicit
conversions as CuPy's, so code that would copy to the host or fail on a GPU fails here too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from cuda_on_cpu.loader import Module
from racecore import backends

__all__ = ["install"]


class _Pointer:
    """The type of `ndarray.data`: an address, and the array that owns the memory."""

    def __init__(self, owner: np.ndarray, ptr: int) -> None:
        self.owner = owner
        self.ptr = ptr

    def __add__(self, n_bytes: int) -> _Pointer:
        return _Pointer(self.owner, self.ptr + n_bytes)


class ndarray:
    """An array on the device."""

    __array_ufunc__ = None

    def __init__(self, shape: Any, dtype: Any, memptr: _Pointer, strides: Any) -> None:
        first = memptr.owner.__array_interface__["data"][0]
        reach = [(n - 1) * s for n, s in zip(shape, strides, strict=True) if n > 1 and s < 0]
        # NumPy takes no offset before the first element's: start at the lowest address
        flipped = tuple(slice(None, None, -1 if s < 0 else 1) for s in strides)
        low = memptr.ptr - first + sum(reach)
        values = np.ndarray(shape, dtype, memptr.owner, low, tuple(map(abs, strides)))
        self._values = values[flipped]

    data = property(
        lambda self: _Pointer(self._values, self._values.__array_interface__["data"][0])
    )

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    strides = property(lambda self: self._values.strides)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> ndarray:
        return _wrapped(self._values[_inner(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._values[_inner(index)] = _inner(value)

    def __add__(self, other: Any) -> ndarray:
        return _wrapped(self._values + _inner(other))

    def __iadd__(self, other: Any) -> ndarray:
        self._values += _inner(other)
        return self

    def get(self, stream: Any = None, out: np.ndarray | None = None) -> np.ndarray:
        if out is None:
            return self._values.copy()
        if not out.flags.c_contiguous or out.dtype != self.dtype:
            raise RuntimeError("Only C- or F-contiguous numpy.ndarray supported")
        out[...] = self._values
        return out

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        if not values.flags.c_contiguous or (values.shape, values.dtype) != (
            self.shape,
            self.dtype,
        ):
            raise ValueError("set takes a contiguous array of the same shape and dtype")
        self._values[...] = values

    def copy(self, order: str = "C") -> ndarray:
        return _of(self._values.copy(order))

    def astype(self, dtype: Any) -> ndarray:
        return _of(self._values.astype(dtype))

    def view(self, dtype: Any) -> ndarray:
        return _of(self._values.view(dtype))

    def reshape(self, *shape: Any) -> ndarray:
        return _of(self._values.reshape(*shape))

    def sum(self, axis: Any = None) -> ndarray:
        return _wrapped(self._values.sum(axis=axis))

    def max(self) -> ndarray:
        return _wrapped(self._values.max())

    def __ge__(self, other: Any) -> ndarray:
        return _wrapped(self._values >= _inner(other))

    def __int__(self) -> int:
        return int(self._values)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def _of(values: np.ndarray) -> ndarray:
    array = ndarray.__new__(ndarray)
    array._values = values
    return array


def _wrapped(values: Any) -> ndarray:
    return _of(values if isinstance(values, np.ndarray) else np.array(values))


def _inner(value: Any) -> Any:
    """Return a NumPy operand; NumPy arrays do not mix with arrays on the device."""
    if isinstance(value, ndarray):
        return value._values
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value


def empty(shape: Any, dtype: Any = float) -> ndarray:
    """Return an array filled with NaN, or with the smallest integer."""
    values = np.empty(shape, dtype)
    values.fill(np.iinfo(values.dtype).min if values.dtype.kind in "iu" else np.nan)
    return _of(values)


class _Stream:
    """A stream without asynchronous work: a call returns when its work is done."""

    def __init__(self, non_blocking: bool = False) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _module() -> ModuleType:
    module = ModuleType("cupy")
    module.__version__ = "on the CPU"  # type: ignore[attr-defined]
    functions = {
        "ndarray": ndarray,
        "RawModule": Module,
        "empty": empty,
        "zeros": lambda shape, dtype=float: _of(np.zeros(shape, dtype)),
        "asarray": lambda x: x if isinstance(x, ndarray) else _of(np.array(x)),
        "ascontiguousarray": lambda x: _of(np.ascontiguousarray(x._values)),
        "asnumpy": lambda x: x.get() if isinstance(x, ndarray) else np.asarray(x),
        "cuda": SimpleNamespace(
            runtime=SimpleNamespace(getDeviceCount=lambda: 1),
            Stream=_Stream,
            get_current_stream=_Stream,
            alloc_pinned_memory=bytearray,
            Device=lambda device=0: SimpleNamespace(
                id=device,
                compute_capability="90",
                attributes={"MaxSharedMemoryPerBlockOptin": 232448},
            ),
        ),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


_MODULE = _module()


@contextmanager
def install() -> Iterator[ModuleType]:
    """Replace `cupy` in `sys.modules` by this module within the block."""
    before = sys.modules.get("cupy")
    sys.modules["cupy"] = _MODULE
    try:
        yield _MODULE
    finally:
        backends._load.cache_clear()
        if before is None:
            del sys.modules["cupy"]
        else:
            sys.modules["cupy"] = before
