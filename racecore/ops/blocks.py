"""Rows of the caller's arrays into scratch and back, whatever their layout and dtype.

Kernels never see the arrays of a caller. They get a table with one line per array, `describe` makes it: address, strides
in elements, and a code for the dtype. `load` widens a block of rows to the dtype of the arithmetic, `store` rounds it
back. So there is one compiled kernel per dtype of the arithmetic, not one per layout and storage dtype, and all 64-bit
offset arithmetic stands here. The 16-bit formats are converted with integer operations, exactly on the way in and to
nearest, ties to even, on the way out; the plain twin is `array.astype`.

Whoever passes addresses keeps the arrays alive: see `cpu_call.Call`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from racecore import arrays
from racecore.jit import exact_helper, helper
from racecore.ops import tiles
from racecore.ops.elementary import bits_of, float_of_bits
from racecore.plan import BLOCK

__all__ = ["D_KEY", "D_OUT", "D_QUERY", "D_VALUE", "KEY", "OUT", "QUERY", "VALUE", "describe", "load", "store"]

QUERY, KEY, VALUE, OUT, D_OUT, D_QUERY, D_KEY, D_VALUE = range(8)  # lines of the table
_FLOAT32, _FLOAT64, _FLOAT16, _BFLOAT16 = range(4)
_LINE = 64  # bytes of a cache line, and of a vector
_CODE = 5  # column of the dtype's code; the address is in column 0, strides of b, t, h, d in 1 to 4


def describe(*tensors: np.ndarray | None) -> np.ndarray:
    """Return the table, int64 [8, 6], of 4-D arrays in the order of the constants above; None for those not there."""
    table = np.zeros((len(tensors), 6), np.int64)
    for line, tensor in zip(table, tensors, strict=True):
        if tensor is None:
            line[_CODE] = -1
            continue
        size = tensor.dtype.itemsize
        line[0] = tensor.ctypes.data
        line[1:5] = [stride // size for stride in tensor.strides]
        line[_CODE] = _BFLOAT16 if arrays.is_bfloat16(tensor.dtype) else {4: _FLOAT32, 8: _FLOAT64, 2: _FLOAT16}[size]
    return table


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """Turn an address into a pointer."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


@helper
def _item(address: int, dtype: Any) -> Any:
    """Return the one-element array at an address."""
    return carray(_pointer(address), (1,), dtype)


@exact_helper
def _from_half(h: np.uint16) -> np.float32:
    bits = np.uint32(np.uint32(h & np.uint32(0x7FFF)) << np.uint32(13))
    value = float_of_bits(bits) * np.float32(5.192296858534828e33)  # 2^112 moves the exponent's bias; exact
    if (h & np.uint32(0x7C00)) == np.uint32(0x7C00):
        value = float_of_bits(np.uint32(bits | np.uint32(0x7F800000)))
    return -value if h & np.uint32(0x8000) else value


@exact_helper
def _to_half(x: np.float32) -> np.uint16:
    bits = bits_of(x)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    a = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if a > np.uint32(0x7F800000):
        h = np.uint32(0x7E00)  # NaN
    elif a >= np.uint32(0x477FF000):  # 65,520 and above round to infinity
        h = np.uint32(0x7C00)
    elif a < np.uint32(0x38800000):  # below 2^-14: adding 0.5 rounds at the last bit of a subnormal half
        h = np.uint32(bits_of(float_of_bits(a) + np.float32(0.5)) - np.uint32(0x3F000000))
    else:
        odd = np.uint32((a >> np.uint32(13)) & np.uint32(1))
        h = np.uint32((a - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    return np.uint16(h | sign)


@exact_helper
def _from_bfloat16(h: np.uint16) -> np.float32:
    return float_of_bits(np.uint32(np.uint32(h) << np.uint32(16)))


@exact_helper
def _to_bfloat16(x: np.float32) -> np.uint16:
    bits = bits_of(x)
    if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@helper
def _load_row(address: int, step: int, code: int, row: np.ndarray) -> None:
    """Fill `row` from elements `step` apart; unit steps become vector loads."""
    width = row.shape[0]
    if code == _FLOAT32:
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
    elif step == 1:
        halves = carray(_pointer(address), (width,), np.uint16)
        if code == _FLOAT16:
            for d in range(width):
                row[d] = _from_half(halves[d])
        else:
            for d in range(width):
                row[d] = _from_bfloat16(halves[d])
    else:
        for d in range(width):
            half = _item(address + 2 * d * step, np.uint16)[0]
            row[d] = _from_half(half) if code == _FLOAT16 else _from_bfloat16(half)


@helper
def _store_row(address: int, step: int, code: int, row: np.ndarray) -> None:
    """Write `row` to elements `step` apart."""
    width = row.shape[0]
    if code == _FLOAT32:
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
        for d in range(width):
            x = np.float32(row[d])
            half = _to_half(x) if code == _FLOAT16 else _to_bfloat16(x)
            _item(address + 2 * d * step, np.uint16)[0] = half


@helper
def _size(code: int) -> int:
    return 4 if code == _FLOAT32 else (8 if code == _FLOAT64 else 2)


@helper
def load(table: np.ndarray, line: int, place: Any, n: int, width: int, block: np.ndarray, keep: np.ndarray) -> None:
    """Fill block[:n, :width] with rows (b, t ... t + n - 1, h) of an array, place = (b, t, h).

    Rows that `keep` marks 0 become zeros, unread. The rows of the next block are asked for meanwhile.
    """
    b, t, h = place
    code, step = table[line, _CODE], table[line, 4]
    size = _size(code)
    row_step = size * table[line, 2]
    address = table[line, 0] + size * (b * table[line, 1] + t * table[line, 2] + h * table[line, 3])
    as_it_is = step == 1 and size == block.itemsize and width * size % _LINE == 0
    for i in range(n):
        if step == 1:
            for ahead in range(0, width * size, _LINE):
                tiles.prefetch(address + BLOCK * row_step + ahead)
        if keep[i] == 0:
            block[i, :width] = 0
        elif as_it_is:
            tiles.copy_row(block.ctypes.data + i * block.strides[0], address, width * size // _LINE)
        else:
            _load_row(address, step, code, block[i, :width])
        address += row_step


@helper
def store(table: np.ndarray, line: int, place: Any, n: int, width: int, block: np.ndarray) -> None:
    """Write block[:n, :width] to rows (b, t ... t + n - 1, h) of an array; nothing where the array is absent.

    Rows that fill cache lines are written around the caches: nobody reads them soon.
    """
    b, t, h = place
    code, step = table[line, _CODE], table[line, 4]
    if code < 0:
        return
    size = _size(code)
    row_step = size * table[line, 2]
    address = table[line, 0] + size * (b * table[line, 1] + t * table[line, 2] + h * table[line, 3])
    as_it_is = step == 1 and size == block.itemsize and width * size % _LINE == 0
    fills_lines = as_it_is and address % _LINE == 0 and row_step % _LINE == 0
    for i in range(n):
        if fills_lines:
            tiles.stream_row(address, block.ctypes.data + i * block.strides[0], width * size // _LINE)
        elif as_it_is:
            tiles.copy_row(address, block.ctypes.data + i * block.strides[0], width * size // _LINE)
        else:
            _store_row(address, step, code, block[i, :width])
        address += row_step
    if fills_lines:
        tiles.fence()
