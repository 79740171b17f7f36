"""Kernels that hash keys, fill the tables of queries and score keys; see `reference` for what they
compute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.cpu.row_io import KEY, QUERY, VALUE, load_rows
from racecore.ops.simd.elementary import sigmoids, tanh
from racecore.ops.simd.memory import clear_columns, matrices
from racecore.ops.simd.products import NO_PREFETCH, input_rows, padded, project
from racecore.ops.simd.vectors import address_of, float_of, lanes, load_lanes, splat, store_lanes
from racecore.ops.socket.layout import BLOCK_TOKENS, DIGIT_BITS, DIGIT_VALUES
from racecore.ops.socket.score.lookup_tile import score_tile
from racecore.runtime.jit import helper, kernel

__all__ = [
    "KINDS",
    "SCORE_KERNELS",
    "HashCall",
    "ScoreCall",
    "TableCall",
    "block_scorer",
    "fill_tables",
    "hash_blocks",
    "score_serially",
    "widen_norm16",
]

KINDS = {"soft": 0, "hamming": 1, "signed_jl": 2}  # of scorers
_SOFT, _HAMMING = np.int64(KINDS["soft"]), np.int64(KINDS["hamming"])


# Codes and norms of keys
# -------------------------------------------------------------------------------------------------


class HashCall(NamedTuple):
    """Arguments of `hash_blocks`; `table` holds addresses, see ops.cpu.row_io."""

    table: np.ndarray  # int64 [3, 6]
    # int64 [n, 4]: sequence, first and last of the new tokens, position of the first in the index
    tasks: np.ndarray
    planes: np.ndarray  # [G or 1, L*P, D] in the dtype of the arithmetic, D padded with zeros
    codes: np.ndarray  # see layout.HashedKeys
    n_tables: int
    high_bits: int
    head_dim: int
    value_dim: int
    weighs_keys: bool
    weighs_values: bool


@kernel
def hash_blocks(call: HashCall, norms: np.ndarray, first: int, last: int) -> None:
    """Write the codes of tasks first ... last - 1, and squares to norms [B, G, new tokens]."""
    dtype, n_rows, width = call.planes.dtype, call.planes.shape[1], call.planes.shape[2]
    k = matrices(1, TOKENS, width, dtype)[0]
    v = matrices(1, TOKENS, padded(call.value_dim), dtype)[0]
    u = matrices(1, n_rows, TOKENS, dtype)[0]  # projections [L*P, 32]
    keep = np.ones(BLOCK, np.float64)
    clear_columns(k, call.head_dim)
    for task in range(first, last):
        b, begin, end, position = call.tasks[task]
        for g in range(call.codes.shape[1]):
            planes = call.planes[g if call.planes.shape[0] > 1 else 0]
            for t in range(begin, end, BLOCK):
                n = min(BLOCK, end - t)
                load_rows(call.table, KEY, (b, t, g), n, call.head_dim, k, keep)
                project(planes, input_rows(k), n_rows, n, u, NO_PREFETCH)
                start = position + t - begin
                _write_codes(u, n, start, call.n_tables, call.high_bits, call.codes[b, g])
                for i in range(n):
                    norms[b, g, t + i] = 1
                if call.weighs_keys:
                    _multiply_squares(k, n, call.head_dim, norms[b, g, t : t + n])
                if call.weighs_values:
                    load_rows(call.table, VALUE, (b, t, g), n, call.value_dim, v, keep)
                    _multiply_squares(v, n, call.value_dim, norms[b, g, t : t + n])


@helper
def _write_codes(
    u: np.ndarray, n: int, start: int, n_tables: int, high_bits: int, codes: np.ndarray
) -> None:
    """Write the signs of u [L*P, n] as codes of tokens start ... start + n - 1.

    codes [blocks, rows, 64] is that of a key/value head, see `layout`.
    """
    n_planes = u.shape[0] // n_tables
    code = np.empty(BLOCK, np.uint16)
    for table in range(n_tables):
        for i in range(n):
            code[i] = 0
        for p in range(n_planes):
            row = u[table * n_planes + p]
            for i in range(n):
                code[i] = np.uint16(2 * code[i] + (1 if row[i] >= 0 else 0))
        bit = table * high_bits
        for i in range(n):
            block, lane = (start + i) // BLOCK_TOKENS, (start + i) % BLOCK_TOKENS
            codes[block, table, lane] = np.uint8(code[i] & 0xFF)
            if high_bits > 0:
                row_above = n_tables + bit // 8
                before = codes[block, row_above, lane] if bit % 8 > 0 else np.uint8(0)
                codes[block, row_above, lane] = np.uint8(before | (code[i] >> 8) << (bit % 8))


@helper
def _multiply_squares(x: np.ndarray, n: int, width: int, squares: np.ndarray) -> None:
    """squares[i] *= |x[i, :width]|^2, in float64: float32 overflows where a norm need not."""
    for i in range(n):
        total = 0.0
        for d in range(width):
            total += np.float64(x[i, d]) * np.float64(x[i, d])
        squares[i] *= total


# Tables of queries
# -------------------------------------------------------------------------------------------------


class TableCall(NamedTuple):
    """Arguments of `fill_tables`; `table` holds addresses, see ops.cpu.row_io."""

    table: np.ndarray  # int64 [1, 6]
    planes: np.ndarray  # as in HashCall
    n_tables: int
    n_kv_heads: int
    head_dim: int
    kind: int  # one of KINDS
    factor: float  # 2 / (sqrt(D) * tau)


@kernel
def fill_tables(call: TableCall, tables: np.ndarray, first: int, last: int) -> None:
    """Write tables [B, H, L, N, 16]; a task is a key/value head of a sequence."""
    dtype, n_rows, width = call.planes.dtype, call.planes.shape[1], call.planes.shape[2]
    group = tables.shape[1] // call.n_kv_heads
    q = matrices(1, min(group, TOKENS), width, dtype)[0]
    # [3, heads, L*P]: projections, entries of set bits, entries of unset bits
    u = matrices(3, min(group, TOKENS), padded(n_rows), dtype)
    keep = np.ones(BLOCK, np.float64)
    clear_columns(q, call.head_dim)
    for task in range(first, last):
        b, g = task // call.n_kv_heads, task % call.n_kv_heads
        planes = input_rows(call.planes[g if call.planes.shape[0] > 1 else 0])
        for h0 in range(g * group, (g + 1) * group, BLOCK):
            n = min(BLOCK, (g + 1) * group - h0)
            for i in range(n):
                load_rows(call.table, QUERY, (b, 0, h0 + i), 1, call.head_dim, q[i : i + 1], keep)
            project(q, planes, n, n_rows, u[0], NO_PREFETCH)
            _fill_bit_entries(u, n, n_rows, call.kind, dtype.type(call.factor))
            for i in range(n):
                _fill_digits(u[1, i, :n_rows], u[2, i, :n_rows], call.kind, tables[b, h0 + i])


@helper
def _fill_bit_entries(u: np.ndarray, n: int, n_rows: int, kind: int, factor: Any) -> None:
    """Write to u[1] the entries of set bits and to u[2] those of unset ones.

    u[0] are projections [n, L*P].
    """
    one = splat(u.dtype.type(1))
    for i in range(n):
        if kind == _SOFT:
            for c in range(0, n_rows, lanes(u)):
                high, low = sigmoids(tanh(load_lanes(u[0], i, c)) * splat(factor), one)
                store_lanes(u[1], i, c, high)
                store_lanes(u[2], i, c, low)
        else:
            for r in range(n_rows):
                x = u[0, i, r]
                if kind == _HAMMING:
                    u[1, i, r] = 1 if x >= 0 else 0
                    u[2, i, r] = 1 if x < 0 else 0
                else:
                    u[1, i, r], u[2, i, r] = x, -x


@helper
def _fill_digits(one: np.ndarray, zero: np.ndarray, kind: int, tables: np.ndarray) -> None:
    """Fill tables [L, N, 16] of a query from the entries of set and unset bits [L*P].

    Bits beyond P have no effect: the table repeats.
    """
    n_tables, n_digits = tables.shape[0], tables.shape[1]
    n_planes = one.shape[0] // n_tables
    multiplies = kind == _SOFT
    for table in range(n_tables):
        for n in range(n_digits):
            entries = tables[table, n]
            entries[0] = 1 if multiplies else 0
            size = 1  # entries of the bits so far; the next bit doubles them
            for bit in range(DIGIT_BITS * n, DIGIT_BITS * (n + 1)):
                row = table * n_planes + n_planes - 1 - bit  # bit 0 is the last plane
                for j in range(size):
                    if bit >= n_planes:
                        entries[j + size] = entries[j]
                    elif multiplies:
                        entries[j + size] = entries[j] * one[row]
                        entries[j] = entries[j] * zero[row]
                    else:
                        entries[j + size] = entries[j] + one[row]
                        entries[j] = entries[j] + zero[row]
                size *= 2


# Scores
# -------------------------------------------------------------------------------------------------


class ScoreCall(NamedTuple):
    """Arguments of the kernels that score."""

    tables: np.ndarray  # [B, H, L, N, 16]
    codes: np.ndarray  # this and the next: see layout.HashedKeys
    norms: np.ndarray
    # int64 [n, 5]: sequence, key/value head, first and last block, row of the group's first head
    tasks: np.ndarray
    n_tables: int
    high_bits: int
    multiplies: bool


def block_scorer(n_digits: int, multiplies: bool) -> Any:
    """Return the function that scores 64 keys, for codes of so many digits, which are multiplied or
    added.
    """
    # four heads at once share the digits of a key, and their 16 sums of 16 lanes fit registers
    four, one = score_tile(4, n_digits, multiplies), score_tile(1, n_digits, multiplies)

    @helper
    def score_block(codes, norms, tables, group, head, sizes, out, out_row):
        """Write scores of the heads of a group to rows of 64 numbers.

        All arrays are addresses; sizes = (L, high bits); `head` is the size of a head's tables and
        `out_row` the distance of rows of `out`, in numbers.
        """
        for h in range(0, group - 3, 4):
            four(codes, norms, tables + 4 * h * head, head, *sizes, out + 4 * h * out_row, out_row)
        for h in range(group // 4 * 4, group):
            one(codes, norms, tables + 4 * h * head, head, *sizes, out + 4 * h * out_row, out_row)

    return score_block


def _score_kernel(n_digits: int, multiplies: bool) -> Any:
    """Return the kernel for codes of so many digits, which are multiplied or added."""
    score_block = block_scorer(n_digits, multiplies)

    def score(call: ScoreCall, out: np.ndarray, first: int, last: int) -> None:
        """Write float32 scores to rows of out [rows, tokens], whole blocks of 64."""
        group, sizes = call.tables.shape[1] // call.codes.shape[1], (call.n_tables, call.high_bits)
        head = call.tables.strides[1] // 4
        for task in range(first, last):
            b, g, begin, end, row = call.tasks[task]
            tables = call.tables[b, g * group].ctypes.data
            for block in range(begin, end):
                codes = call.codes[b, g, block].ctypes.data
                norms = call.norms[b, g, block * BLOCK_TOKENS :].ctypes.data
                scores = address_of(out, row, block * BLOCK_TOKENS)
                score_block(codes, norms, tables, group, head, sizes, scores, out.shape[1])

    return kernel(score, f"{n_digits}_digits_{'multiplied' if multiplies else 'added'}")


SCORE_KERNELS = {
    (n, multiplies): _score_kernel(n, multiplies) for n in (2, 3, 4) for multiplies in (False, True)
}


@kernel
def score_serially(call: ScoreCall, out: np.ndarray, first: int, last: int) -> None:
    """Write scores as SCORE_KERNELS do, without vectors, in the dtype of the tables (float64)."""
    group, n_digits = call.tables.shape[1] // call.codes.shape[1], call.tables.shape[3]
    for task in range(first, last):
        b, g, begin, end, row = call.tasks[task]
        for h in range(group):
            tables = call.tables[b, g * group + h]
            for t in range(begin * BLOCK_TOKENS, end * BLOCK_TOKENS):
                codes = call.codes[b, g, t // BLOCK_TOKENS, :, t % BLOCK_TOKENS]
                total = out.dtype.type(0)
                for table in range(call.n_tables):
                    bit = table * call.high_bits
                    code = np.int64(codes[table])
                    if call.high_bits > 0:
                        code |= (np.int64(codes[call.n_tables + bit // 8]) >> (bit % 8)) << 8
                    value = tables[table, 0, code & (DIGIT_VALUES - 1)]
                    for n in range(1, n_digits):
                        entry = tables[table, n, code >> (DIGIT_BITS * n) & (DIGIT_VALUES - 1)]
                        value = value * entry if call.multiplies else value + entry
                    total += value
                out[row + h, t] = total * widen_norm16(call.norms[b, g, t])


@helper
def widen_norm16(norm: int) -> Any:
    """Return the float32 number of a 16-bit norm; the plain twin is layout.from_norm16."""
    if norm == 0:
        return np.float32(0)
    return float_of((np.int64(norm) << 13) + ((127 - 32) << 23))
