"""A Python function as a custom call of XLA on the CPU, on NumPy views of XLA's own buffers.

`jax.pure_callback` copies every argument and every result; for attention, whose arrays are large
and whose work is linear in their size, these copies take longer than the work. XLA's foreign
function interface passes addresses and copies nothing. It is a stable C ABI (its structures carry
their sizes, registration compares versions); the structures below are those of
`xla/ffi/api/c_api.h`, which jaxlib ships, under their names there without `XLA_FFI_`.
"""

from __future__ import annotations

import _thread
import ctypes
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from racecore.runtime import arrays

__all__ = ["register"]

Function = Callable[[str, list[np.ndarray], list[np.ndarray]], None]

_VERSION = (0, 1)  # of the ABI; XLA checks whether it is still supported
_METADATA = 1  # extension type of a call that queries the handler
_EXECUTE = 3  # stage
_INTERNAL = 13  # error code
_DTYPES = {
    1: "bool",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "uint8",
    7: "uint16",
    8: "uint32",
    9: "uint64",
    10: "float16",
    11: "float32",
    12: "float64",
    16: "bfloat16",
}

_HEAD: Any = (
    ("struct_size", ctypes.c_size_t),
    ("extension", ctypes.c_void_p),
)  # of most structures


class _Version(ctypes.Structure):
    _fields_ = (*_HEAD, ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("api_version", _Version),
        ("traits", ctypes.c_uint32),
    )


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),
    )


class _ErrorCreateArgs(ctypes.Structure):
    _fields_ = (*_HEAD, ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Api(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("api_version", _Version),
        ("internal_api", ctypes.c_void_p),
        ("error_create", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorCreateArgs))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    """XLA_FFI_Args and XLA_FFI_Rets."""

    _fields_ = (
        *_HEAD,
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ByteSpan(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Attrs(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("values", ctypes.POINTER(ctypes.POINTER(_ByteSpan))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("args", _Buffers),
        ("rets", _Buffers),
        ("attrs", _Attrs),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
_MANY_BYTES = 4 << 20  # from this size on, large pages are faster
# XLA may call these as long as the process lives
_registered: list[Any] = []


def register(name: str, function: Function) -> None:
    """Register a function as the target of `jax.ffi.ffi_call(name, ...)(*arguments, task=text)` on
    the CPU.

    Parameters
    ----------
    name : str
        The target's name in the compiled program.
    function : callable
        ``function(task, arguments, results)``: read-only NumPy arrays, and arrays to fill. It is
        called on threads of XLA, several at once if need be, and must not call JAX. Its exceptions
        become JAX's errors.

    Raises
    ------
    RuntimeError
        XLA has an ABI that is not known here; nothing is registered.
    """

    def handle(frame: Any) -> int | None:
        """Answer one call of XLA: describe the handler, or do a task."""
        call = frame.contents
        try:
            if call.extension and call.extension.contents.type == _METADATA:
                _describe(call)
            elif call.stage == _EXECUTE:
                task = call.attrs.values[0].contents
                text = ctypes.string_at(task.data, task.length).decode()
                function(text, _views(call.args, False), _views(call.rets, True))
        except KeyboardInterrupt:
            # The computation was on the main thread, where the interrupt is raised again.
            _thread.interrupt_main()
            return _error(call, "KeyboardInterrupt")
        except BaseException as error:
            return _error(call, f"{type(error).__name__}: {error}")
        return None

    handler = _Handler(handle)
    _registered.append(handler)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")


def _describe(call: _CallFrame) -> None:
    """Answer the query of a registration with the version of the ABI; XLA refuses an old one."""
    metadata = call.extension.contents.metadata.contents
    metadata.api_version.major, metadata.api_version.minor = _VERSION
    metadata.traits = 0


def _error(call: _CallFrame, message: str) -> int:
    args = _ErrorCreateArgs(ctypes.sizeof(_ErrorCreateArgs), None, message.encode(), _INTERNAL)
    return call.api.contents.error_create(ctypes.byref(args))


def _views(buffers: _Buffers, are_writable: bool) -> list[np.ndarray]:
    return [_view(buffers.buffers[i].contents, are_writable) for i in range(buffers.size)]


def _view(buffer: _Buffer, is_writable: bool) -> np.ndarray:
    shape: Sequence[int] = buffer.dims[: buffer.rank]
    dtype = arrays.dtype_of(_DTYPES[buffer.dtype])
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes == 0:
        return np.empty(shape, dtype)
    if is_writable and n_bytes >= _MANY_BYTES:
        _advise_large_pages(buffer.data, n_bytes)
    memory: Any = (ctypes.c_char * n_bytes).from_address(buffer.data)
    view = np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)
    view.flags.writeable = is_writable
    return view


def _advise_large_pages(address: int, n_bytes: int) -> None:
    """Advise the system to use large pages for a result of XLA, as NumPy does for its arrays."""
    # Fresh memory costs a fault per page of 4 kB, or of 2 MB. Measured over 2^16 tokens of 4 heads
    # of 128: forward 1.5 times as fast, forward and backward 1.6 times.
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    # the return value is ignored: without large pages everything works
    libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
