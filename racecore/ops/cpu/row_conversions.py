"""One row between the caller's memory and scratch, of any dtype and stride; blocks: `row_io`.

Each dtype has a code, since kernels see addresses only: one compiled kernel serves all of them. The
plain twin is `array.astype`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from racecore.ops.simd.emitter import Emitter, codegen
from racecore.ops.simd.half_precision import (
    LANES,
    from_bfloat16,
    from_half,
    load_bfloat16,
    load_half,
    store_bfloat16,
    store_half,
    to_bfloat16,
    to_half,
)
from racecore.ops.simd.vectors import load_vector, store_vector
from racecore.runtime import arrays
from racecore.runtime.jit import helper

__all__ = ["BFLOAT16", "FLOAT32", "code_of", "item_bytes", "load_row", "store_row"]

FLOAT32, _FLOAT64, _FLOAT16, BFLOAT16 = range(4)
_CODES = {4: FLOAT32, 8: _FLOAT64, 2: _FLOAT16}  # by the bytes of an element


def code_of(array: np.ndarray) -> int:
    """Return the code of an array's dtype."""
    size = array.itemsize
    # bfloat16 is looked for only where it can be: a call for one token must not take long
    return BFLOAT16 if size == 2 and arrays.is_bfloat16(array.dtype) else _CODES[size]


@codegen(types.voidptr)
def _pointer(emit: Emitter, address: Any) -> Any:
    """Turn an address into a pointer."""
    return emit.builder.inttoptr(address, ir.IntType(8).as_pointer())


@helper
def _item(address: int, dtype: Any) -> Any:
    """Return the one-element array at an address."""
    return carray(_pointer(address), (1,), dtype)


@helper
def load_row(address: int, step: int, code: int, row: np.ndarray) -> None:
    """Fill `row` from elements `step` apart; unit steps become vector loads."""
    width = row.shape[0]
    if code == FLOAT32:
        if step == 1:
            source = carray(_pointer(address), (width,), np.float32)
            for d in range(width):
                row[d] = source[d]
        else:
            for d in range(width):
                row[d] = _item(address + 4 * d * step, np.float32)[0]
    elif code == _FLOAT64:
        for d in range(width):
            row[d] = _item(address + 8 * d * step, np.float64)[0]
    else:
        whole = width // LANES * LANES if step == 1 and row.itemsize == 4 else 0
        for d in range(0, whole, LANES):
            if code == _FLOAT16:
                store_vector(load_half(address + 2 * d), row.ctypes.data + 4 * d)
            else:
                store_vector(load_bfloat16(address + 2 * d), row.ctypes.data + 4 * d)
        for d in range(whole, width):
            half = _item(address + 2 * d * step, np.uint16)[0]
            row[d] = from_half(half) if code == _FLOAT16 else from_bfloat16(half)


@helper
def store_row(address: int, step: int, code: int, row: np.ndarray) -> None:
    """Write `row` to elements `step` apart."""
    width = row.shape[0]
    if code == FLOAT32:
        if step == 1:
            target = carray(_pointer(address), (width,), np.float32)
            for d in range(width):
                target[d] = np.float32(row[d])
        else:
            for d in range(width):
                _item(address + 4 * d * step, np.float32)[0] = np.float32(row[d])
    elif code == _FLOAT64:
        for d in range(width):
            _item(address + 8 * d * step, np.float64)[0] = row[d]
    else:
        _store_half_row(address, step, code, row)


@helper
def _store_half_row(address: int, step: int, code: int, row: np.ndarray) -> None:
    """Write `row` as 16-bit numbers."""
    width = row.shape[0]
    whole = width // LANES * LANES if step == 1 and row.itemsize == 4 else 0
    for d in range(0, whole, LANES):
        value = load_vector(row.ctypes.data + 4 * d, np.float32(0))
        if code == _FLOAT16:
            store_half(value, address + 2 * d)
        else:
            store_bfloat16(value, address + 2 * d)
    for d in range(whole, width):
        x = np.float32(row[d])
        _item(address + 2 * d * step, np.uint16)[0] = (
            to_half(x) if code == _FLOAT16 else to_bfloat16(x)
        )


@helper
def item_bytes(code: int) -> int:
    """Return the bytes of an element."""
    return 4 if code == FLOAT32 else (8 if code == _FLOAT64 else 2)
