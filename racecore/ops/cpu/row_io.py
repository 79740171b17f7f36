"""Rows of the caller's arrays into scratch and back, whatever their layout and dtype.

Kernels never see the arrays of a caller. They get a table of them, see `describe`: addresses,
strides in elements, and codes for the dtypes. `load_rows` widens a block of rows to the dtype of
the arithmetic, `store_rows` rounds it back. So there is one compiled kernel per dtype of the
arithmetic, not one per layout and storage dtype, and all 64-bit offset arithmetic stands here. The
plain twin is `array.astype`.

The caller of a kernel keeps the arrays alive as long as it runs: see `call.Call`.
"""

from __future__ import annotations

import numpy as np

from racecore.chunking import BLOCK
from racecore.ops.cpu.row_conversions import (
    BFLOAT16,
    FLOAT32,
    code_of,
    item_bytes,
    load_row,
    store_row,
)
from racecore.ops.simd import tiles
from racecore.ops.simd.half_precision import LANES
from racecore.ops.simd.products import InputRows, OutputRows, PrefetchRows, input_rows, output_rows
from racecore.ops.simd.vectors import load_number, store_number
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
    "load_rows",
    "load_scattered",
    "prefetch_row",
    "read",
    "row_bytes",
    "rows_to_prefetch",
    "rows_to_read",
    "rows_to_write",
    "store_rows",
    "write_row_addresses",
]

# Indices of arrays in the table. Not literals: Numba would compile every function once for each.
QUERY, KEY, VALUE, OUT, D_OUT, D_QUERY, D_KEY, D_VALUE = (np.int64(i) for i in range(8))
# Read modes, as bits: whether a product may read rows of an input in place, if they have the dtype
# of the arithmetic, if they are bfloat16, or both. `read_modes` decides.
COPY, IN_PLACE, WIDENED, ANY_IN_PLACE = (np.int64(i) for i in range(4))
_LINE = 64  # bytes of a cache line, and of a vector
_PAIR = 2 * LANES  # bfloat16 numbers of a cache line: tiles take two vectors of them at once
_ADDRESS, _B, _T, _H, _D, _CODE = range(6)  # columns of the table: strides are in _B ... _D


def describe(*tensors: np.ndarray | None) -> np.ndarray:
    """Return the table, int64 [8, 6], of 4-D arrays in the order of the constants above.

    A row has an array's address, its strides in elements and the code of its dtype, which is -1 for
    None.
    """
    # of plain integers: filling an array number by number takes longer than a call for one token
    rows = []
    for tensor in tensors:
        if tensor is None:
            rows.append((0, 0, 0, 0, 0, -1))
            continue
        size = tensor.itemsize
        b, t, h, d = tensor.strides
        rows.append(
            (tensor.ctypes.data, b // size, t // size, h // size, d // size, code_of(tensor))
        )
    return np.array(rows, np.int64)


@helper
def _address(table: np.ndarray, array: int, position: tuple[int, int, int]) -> int:
    """Return the address of row (b, t, h)."""
    b, t, h = position
    size = item_bytes(table[array, _CODE])
    return table[array, _ADDRESS] + size * (
        b * table[array, _B] + t * table[array, _T] + h * table[array, _H]
    )


@helper
def first_row(table: np.ndarray, array: int, b: int, h: int) -> int:
    """Return the address of row (b, 0, h)."""
    return _address(table, array, (b, 0, h))


@helper
def row_bytes(table: np.ndarray, array: int) -> int:
    """Return the bytes from a token to the next."""
    return item_bytes(table[array, _CODE]) * table[array, _T]


@helper
def is_bfloat16(table: np.ndarray, array: int) -> bool:
    """Return whether an array is bfloat16."""
    return table[array, _CODE] == BFLOAT16


# Whole blocks
# ------------


@helper
def load_rows(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    n: int,
    width: int,
    block: np.ndarray,
    keep: np.ndarray,
) -> None:
    """Fill block[:n, :width] with rows (b, t ... t + n - 1, h) of an array, position = (b, t, h).

    Rows that `keep` marks 0 become zeros, unread.
    """
    code, step = table[array, _CODE], table[array, _D]
    size = item_bytes(code)
    row_step = size * table[array, _T]
    address = _address(table, array, position)
    # two frequent cases by whole vectors, without a loop over columns
    copies = step == 1 and size == block.itemsize and width * size % _LINE == 0
    widens = step == 1 and code == BFLOAT16 and block.itemsize == 4 and width % LANES == 0
    for i in range(n):
        target = block.ctypes.data + i * block.strides[0]
        if keep[i] == 0:
            for d in range(width):
                block[i, d] = 0
        elif copies:
            tiles.copy_row(target, address, width * size // _LINE)
        elif widens:
            tiles.widen_row(target, address, width // LANES)
        else:
            load_row(address, step, code, block[i, :width])
        address += row_step


@helper
def store_rows(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    n: int,
    width: int,
    block: np.ndarray,
    written: OutputRows,
) -> None:
    """Write block[:n, :width] to rows (b, t ... t + n - 1, h) of an array.

    Nothing happens where the array is absent, or where a product has `written` the rows there
    itself. A kernel ends with `tiles.fence` before another thread may read them.
    """
    code, step = table[array, _CODE], table[array, _D]
    if code < 0 or written.mode >= tiles.STREAM:
        return
    row_step = item_bytes(code) * table[array, _T]
    address = _address(table, array, position)
    n_lines = width * block.itemsize // _LINE
    copies = (
        step == 1 and item_bytes(code) == block.itemsize and width * block.itemsize % _LINE == 0
    )
    fills_lines = _fills_lines(table, array, position, width, block)
    for i in range(n):
        source = block.ctypes.data + i * block.strides[0]
        if fills_lines and code == BFLOAT16:
            tiles.stream_bfloat16_row(address, source, width // _PAIR)
        elif fills_lines:
            tiles.stream_row(address, source, n_lines)
        elif copies:
            tiles.copy_row(address, source, n_lines)
        else:
            store_row(address, step, code, block[i, :width])
        address += row_step


@helper
def _fills_lines(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    width: int,
    block: np.ndarray,
) -> bool:
    """Return whether the rows of an output are whole cache lines, with the dtype of `block` or
    bfloat16.
    """
    code, size = table[array, _CODE], item_bytes(table[array, _CODE])
    has_bfloat16 = code == BFLOAT16 and block.itemsize == 4 and width % _PAIR == 0
    fits = (
        code >= 0
        and table[array, _D] == 1
        and (size == block.itemsize or has_bfloat16)
        and width == block.shape[1]
    )
    aligned = _address(table, array, position) % _LINE == 0 and size * table[array, _T] % _LINE == 0
    return fits and aligned


# Rows for a product: to read, to write, to prefetch
# --------------------------------------------------


@helper
def rows_to_read(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    n: int,
    width: int,
    block: np.ndarray,
    keep: np.ndarray,
    mode: int,
    load: bool,
) -> InputRows:
    """Return n rows of an input for a product, in place if it can read them there in this mode.

    It can if they need no padding, and no conversion that its tiles cannot do. Else they are read
    from `block`, and are loaded there first if `load`; if not, they have been.
    """
    code, whole = table[array, _CODE], table[array, _D] == 1 and width == block.shape[1]
    same = mode & IN_PLACE != 0 and item_bytes(code) == block.itemsize
    # tiles that widen bfloat16 have no remainders: only whole blocks of whole cache lines
    widens = (
        mode & WIDENED != 0
        and code == BFLOAT16
        and block.itemsize == 4
        and n == BLOCK
        and width % _PAIR == 0
    )
    if whole and (same or widens):
        return InputRows(_address(table, array, position), table[array, _T], item_bytes(code))
    if load:
        load_rows(table, array, position, n, width, block, keep)
    return input_rows(block)


@helper
def read(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    n: int,
    width: int,
    block: np.ndarray,
    keep: np.ndarray,
    mode: int,
) -> InputRows:
    """Return n rows of an input for a product, in place or loaded into `block`: `rows_to_read`."""
    return rows_to_read(table, array, position, n, width, block, keep, mode, True)


@helper
def rows_to_write(
    table: np.ndarray,
    array: int,
    position: tuple[int, int, int],
    width: int,
    block: np.ndarray,
    alone: bool,
    add: bool,
) -> OutputRows:
    """Return where a product writes the rows of an output; `store_rows` completes them.

    A product that is `alone` writes to the output itself, around the caches, if rows are whole
    cache lines there: they are not read soon. Otherwise several can `add` up in `block`.
    """
    if alone and _fills_lines(table, array, position, width, block):
        size = item_bytes(table[array, _CODE])
        return OutputRows(
            _address(table, array, position),
            table[array, _T],
            tiles.STREAM if size == block.itemsize else tiles.STREAM_BFLOAT16,
            size,
        )
    return output_rows(block, add)


@helper
def rows_to_prefetch(
    table: np.ndarray, array: int, position: tuple[int, int, int], width: int
) -> PrefetchRows:
    """Return the rows of a block that will be loaded soon, for a product to prefetch."""
    size = item_bytes(table[array, _CODE])
    lines = -(-width * size // _LINE) if table[array, _D] == 1 else 0
    return PrefetchRows(_address(table, array, position), size * table[array, _T], lines)


# Rows at any tokens, for sparse decoding
# ---------------------------------------


@helper
def load_scattered(
    table: np.ndarray,
    array: int,
    b: int,
    g: int,
    tokens: np.ndarray,
    first: int,
    n: int,
    width: int,
    block: np.ndarray,
) -> None:
    """Fill block[:n, :width] with rows (b, tokens[first + i], g) of an array, and prefetch those of
    the next block.

    Rows anywhere in a large array are beyond what a core predicts, and each is some cache lines: so
    one row of the next block is prefetched for each that is loaded.
    """
    code, step = table[array, _CODE], table[array, _D]
    size = item_bytes(code)
    widens = step == 1 and code == BFLOAT16 and block.itemsize == 4 and width % LANES == 0
    for i in range(n):
        later = first + i + BLOCK
        if step == 1 and later < tokens.shape[0] and tokens[later] >= 0:
            prefetch_row(_address(table, array, (b, tokens[later], g)), width * size)
        address = _address(table, array, (b, tokens[first + i], g))
        if widens:
            tiles.widen_row(block.ctypes.data + i * block.strides[0], address, width // LANES)
        else:
            load_row(address, step, code, block[i, :width])


@helper
def prefetch_row(address: int, n_bytes: int) -> None:
    """Prefetch all cache lines of a row, which need not begin with one: NumPy's arrays do not."""
    for line in range(address // _LINE * _LINE, address + n_bytes, _LINE):
        tiles.prefetch(line)


@helper
def write_row_addresses(
    start: int, step: int, tokens: int, n: int, capacity: int, addresses: int
) -> None:
    """Write the addresses of n rows to the buffer at `addresses`: start + step * i, or start +
    step * tokens[i].

    `tokens` is the address of int64 numbers, 0 for none. The last row is repeated up to the
    buffer's capacity, so that tiles without remainders can read it.
    """
    like, whole = np.int64(0), n // LANES * LANES if tokens != 0 else 0
    for i in range(0, whole, LANES):
        tiles.scale_words(tokens + 8 * i, step, start, addresses + 8 * i)
    for i in range(whole, n):
        token = load_number(tokens + 8 * i, like) if tokens != 0 else i
        store_number(start + step * token, addresses + 8 * i, like)
    for i in range(n, capacity):
        store_number(load_number(addresses + 8 * (n - 1), like), addresses + 8 * i, like)


@helper
def can_gather_rows(table: np.ndarray, array: int, width: int, block: np.ndarray) -> bool:
    """Return whether a product can read gathered rows in place: whole vectors of float32, or pairs
    of them of bfloat16.
    """
    code = table[array, _CODE]
    whole = table[array, _D] == 1 and width == block.shape[1] and block.itemsize == 4
    return whole and (code == FLOAT32 or (code == BFLOAT16 and width % _PAIR == 0))
