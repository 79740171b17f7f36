"""Rows of the caller's arrays into scratch and back, whatever their layout and dtype.

Kernels never see the arrays of a caller. They get a table with one line per array, `describe` makes
it: address, strides in elements, and a code for the dtype. `load` widens a block of rows to the
dtype of the arithmetic, `store` rounds it back. So there is one compiled kernel per dtype of the
arithmetic, not one per layout and storage dtype, and all 64-bit offset arithmetic stands here. The
plain twin is `array.astype`.

Whoever passes addresses keeps the arrays alive: see `cpu_call.Call`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from racecore.chunking import BLOCK
from racecore.ops.simd import tiles
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
from racecore.ops.simd.products import InputRows, OutputRows, PrefetchRows, input_rows, output_rows
from racecore.ops.simd.vectors import load_number, load_vector, store_number, store_vector
from racecore.runtime import arrays
from racecore.runtime.jit import helper

__all__ = [
    "ANY_IN_PLACE",
    "COPY",
    "D_KEY",
    "D_OUT",
    "D_QUERY",
    "D_VALUE",
    "IN_PLACE",
    "KEY",
    "OUT",
    "QUERY",
    "VALUE",
    "WIDENED",
    "can_gather_rows",
    "describe",
    "first_row",
    "is_bfloat16",
    "load",
    "load_scattered",
    "prefetch_row",
    "read",
    "row_bytes",
    "rows_to_prefetch",
    "rows_to_write",
    "store",
    "write_row_addresses",
]

# Lines of the table. Not literals: Numba would compile every function once for each.
QUERY, KEY, VALUE, OUT, D_OUT, D_QUERY, D_KEY, D_VALUE = (np.int64(i) for i in range(8))
_FLOAT32, _FLOAT64, _FLOAT16, _BFLOAT16 = range(4)
_CODES = {4: _FLOAT32, 8: _FLOAT64, 2: _FLOAT16}
# Whether a product may read rows of an input where they are: if they need no conversion, if they
# are bfloat16, or both.
COPY, IN_PLACE, WIDENED, ANY_IN_PLACE = (np.int64(i) for i in range(4))
_LINE = 64  # bytes of a cache line, and of a vector
_CODE = 5  # column of the dtype's code; the address is in column 0, strides of b, t, h, d in 1 to 4


def describe(*tensors: np.ndarray | None) -> np.ndarray:
    """Return the table, int64 [8, 6], of 4-D arrays in the order of the constants above; None for
    those not there.
    """
    # of plain integers: filling an array bit by bit takes longer than a call for one token may
    lines = []
    for tensor in tensors:
        if tensor is None:
            lines.append((0, 0, 0, 0, 0, -1))
            continue
        size = tensor.itemsize
        b, t, h, d = tensor.strides
        code = _CODES[size] if size != 2 or not arrays.is_bfloat16(tensor.dtype) else _BFLOAT16
        lines.append((tensor.ctypes.data, b // size, t // size, h // size, d // size, code))
    return np.array(lines, np.int64)


@codegen(types.voidptr)
def _pointer(emit: Emitter, address: Any) -> Any:
    """Turn an address into a pointer."""
    return emit.builder.inttoptr(address, ir.IntType(8).as_pointer())


@helper
def _item(address: int, dtype: Any) -> Any:
    """Return the one-element array at an address."""
    return carray(_pointer(address), (1,), dtype)


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
def _size(code: int) -> int:
    return 4 if code == _FLOAT32 else (8 if code == _FLOAT64 else 2)


@helper
def load(
    table: np.ndarray,
    line: int,
    place: Any,
    n: int,
    width: int,
    block: np.ndarray,
    keep: np.ndarray,
) -> None:
    """Fill block[:n, :width] with rows (b, t ... t + n - 1, h) of an array, place = (b, t, h).

    Rows that `keep` marks 0 become zeros, unread.
    """
    code, step = table[line, _CODE], table[line, 4]
    size = _size(code)
    row_step = size * table[line, 2]
    address = _address(table, line, place)
    as_it_is = step == 1 and size == block.itemsize and width * size % _LINE == 0
    widens = step == 1 and code == _BFLOAT16 and block.itemsize == 4 and width % LANES == 0
    for i in range(n):
        if keep[i] == 0:
            for d in range(width):
                block[i, d] = 0
        elif as_it_is:
            tiles.copy_row(block.ctypes.data + i * block.strides[0], address, width * size // _LINE)
        elif widens:
            tiles.widen_row(block.ctypes.data + i * block.strides[0], address, width // LANES)
        else:
            _load_row(address, step, code, block[i, :width])
        address += row_step


@helper
def load_scattered(
    table: np.ndarray,
    line: int,
    b: int,
    g: int,
    tokens: np.ndarray,
    first: int,
    n: int,
    width: int,
    block: np.ndarray,
) -> None:
    """Fill block[:n, :width] with rows (b, tokens[first + i], g) of an array, and ask for those of
    the next block.

    Rows anywhere in a large array are beyond what a core guesses, and each is some cache lines: so
    it is told, one row of the next block for each that it loads.
    """
    code, step = table[line, _CODE], table[line, 4]
    size = _size(code)
    widens = step == 1 and code == _BFLOAT16 and block.itemsize == 4 and width % LANES == 0
    for i in range(n):
        if step == 1 and first + i + BLOCK < tokens.shape[0] and tokens[first + i + BLOCK] >= 0:
            prefetch_row(_address(table, line, (b, tokens[first + i + BLOCK], g)), width * size)
        address = _address(table, line, (b, tokens[first + i], g))
        if widens:
            tiles.widen_row(block.ctypes.data + i * block.strides[0], address, width // LANES)
        else:
            _load_row(address, step, code, block[i, :width])


@helper
def prefetch_row(address: int, n_bytes: int) -> None:
    """Ask for all cache lines of a row, which need not begin with one: those of NumPy's arrays do
    not.
    """
    for line in range(address // _LINE * _LINE, address + n_bytes, _LINE):
        tiles.prefetch(line)


@helper
def write_row_addresses(start: int, step: int, tokens: int, n: int, room: int, rows: int) -> None:
    """Write the addresses of n rows to the list at address `rows`: start + step * i, or start +
    step * tokens[i].

    Tokens are int64 at an address, 0: there are none. The last row is repeated, so that the list is
    full.
    """
    like, whole = np.int64(0), n // LANES * LANES if tokens != 0 else 0
    for i in range(0, whole, LANES):
        tiles.scale_words(tokens + 8 * i, step, start, rows + 8 * i)
    for i in range(whole, n):
        token = load_number(tokens + 8 * i, like) if tokens != 0 else i
        store_number(start + step * token, rows + 8 * i, like)
    for i in range(n, room):
        store_number(load_number(rows + 8 * (n - 1), like), rows + 8 * i, like)


@helper
def first_row(table: np.ndarray, line: int, b: int, h: int) -> int:
    """Return the address of row (b, 0, h)."""
    return _address(table, line, (b, 0, h))


@helper
def row_bytes(table: np.ndarray, line: int) -> int:
    """Return the bytes from a token to the next."""
    return _size(table[line, _CODE]) * table[line, 2]


@helper
def can_gather_rows(table: np.ndarray, line: int, width: int, block: np.ndarray) -> bool:
    """Tell whether a product can read rows where they are: whole vectors of float32, or pairs of
    them of bfloat16.
    """
    whole = table[line, 4] == 1 and width == block.shape[1] and block.itemsize == 4
    return whole and (
        table[line, _CODE] == _FLOAT32 or (table[line, _CODE] == _BFLOAT16 and width % 32 == 0)
    )


@helper
def is_bfloat16(table: np.ndarray, line: int) -> bool:
    """Tell whether an array is bfloat16."""
    return table[line, _CODE] == _BFLOAT16


@helper
def read(
    table: np.ndarray,
    line: int,
    place: Any,
    n: int,
    width: int,
    block: np.ndarray,
    keep: np.ndarray,
    read_mode: int,
) -> InputRows:
    """Return where a product reads rows of an input, which are loaded into `block` unless it can
    read them `read_mode`.

    It can if they need no conversion and no padding. That pays where it reads them once: copies
    cost more than they save.
    """
    code, whole = table[line, _CODE], table[line, 4] == 1 and width == block.shape[1]
    as_it_is = read_mode & IN_PLACE != 0 and _size(code) == block.itemsize
    widens = (
        read_mode & WIDENED != 0
        and code == _BFLOAT16
        and block.itemsize == 4
        and n == BLOCK
        and width % 32 == 0
    )
    if whole and (as_it_is or widens):
        return InputRows(_address(table, line, place), table[line, 2], _size(code))
    load(table, line, place, n, width, block, keep)
    return input_rows(block)


@helper
def rows_to_prefetch(table: np.ndarray, line: int, place: Any, width: int) -> PrefetchRows:
    """Return the rows of a block that will be loaded soon, for a product to ask for."""
    size = _size(table[line, _CODE])
    lines = -(-width * size // _LINE) if table[line, 4] == 1 else 0
    return PrefetchRows(_address(table, line, place), size * table[line, 2], lines)


@helper
def rows_to_write(
    table: np.ndarray, line: int, place: Any, width: int, block: np.ndarray, alone: bool, add: bool
) -> OutputRows:
    """Return where a product writes the rows of an output; `store` finishes them.

    A product that is `alone` goes straight to the output, around the caches, if rows are whole
    cache lines there: nobody reads them soon. Otherwise several can `add` up in `block`.
    """
    if alone and _fills_lines(table, line, place, width, block):
        size = _size(table[line, _CODE])
        return OutputRows(
            _address(table, line, place),
            table[line, 2],
            tiles.STREAM if size == block.itemsize else tiles.STREAM_BFLOAT16,
            size,
        )
    return output_rows(block, add)


@helper
def _address(table: np.ndarray, line: int, place: Any) -> int:
    """Return the address of row (b, t, h)."""
    b, t, h = place
    size = _size(table[line, _CODE])
    return table[line, 0] + size * (b * table[line, 1] + t * table[line, 2] + h * table[line, 3])


@helper
def _fills_lines(table: np.ndarray, line: int, place: Any, width: int, block: np.ndarray) -> bool:
    """Tell whether the rows of an output are whole cache lines, and as they are or bfloat16."""
    code, size = table[line, _CODE], _size(table[line, _CODE])
    has_bfloat16 = code == _BFLOAT16 and block.itemsize == 4 and width % 32 == 0
    fits = (
        code >= 0
        and table[line, 4] == 1
        and (size == block.itemsize or has_bfloat16)
        and width == block.shape[1]
    )
    return fits and _address(table, line, place) % _LINE == 0 and size * table[line, 2] % _LINE == 0


@helper
def store(
    table: np.ndarray,
    line: int,
    place: Any,
    n: int,
    width: int,
    block: np.ndarray,
    written: OutputRows,
) -> None:
    """Write block[:n, :width] to rows (b, t ... t + n - 1, h) of an array, unless they are
    `written` there already.

    Nothing happens where the array is absent. A kernel ends with `tiles.fence` before another
    thread may look.
    """
    code, step = table[line, _CODE], table[line, 4]
    if code < 0 or written.mode >= tiles.STREAM:
        return
    row_step = _size(code) * table[line, 2]
    address = _address(table, line, place)
    as_it_is = step == 1 and _size(code) == block.itemsize and width * block.itemsize % _LINE == 0
    fills_lines = _fills_lines(table, line, place, width, block)
    for i in range(n):
        if fills_lines and code == _BFLOAT16:
            tiles.stream_bfloat16_row(
                address, block.ctypes.data + i * block.strides[0], width // 32
            )
        elif fills_lines:
            tiles.stream_row(
                address, block.ctypes.data + i * block.strides[0], width * block.itemsize // _LINE
            )
        elif as_it_is:
            tiles.copy_row(
                address, block.ctypes.data + i * block.strides[0], width * block.itemsize // _LINE
            )
        else:
            _store_row(address, step, code, block[i, :width])
        address += row_step
