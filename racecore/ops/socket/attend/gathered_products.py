"""Products with rows gathered from memory: keys and values of a cache, read in place by address.

Why: a row that is read once should not be copied first. With one query head for a row there is so
little arithmetic that the copy would take longer than all of it. And a processor cannot predict the
addresses of rows that are far apart: while a tile calculates with some rows, it prefetches those
that come a block later. What the products compute is what `products.project` and
`products.accumulate` do.

How: rows come as int64 addresses in memory, and so do the rows to prefetch (`GatheredRows`). Two
factories of register tiles, as in `ops.simd.tiles`, read float32 rows, widen bfloat16 or multiply
bfloat16 with bfloat16. Widening takes even and odd columns apart, since that costs half as much:
queries and sums then have their columns in *paired order*, of every 32 columns first the even ones,
then the odd; see `paired_column`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from racecore.ops.simd.emitter import VECTOR_BYTES, Emitter, codegen
from racecore.ops.simd.half_precision import load_widened_pairs
from racecore.ops.simd.tile_sums import store_totals
from racecore.runtime import processor
from racecore.runtime.jit import helper, piece

__all__ = [
    "CAN_DOT_BFLOAT16",
    "GatheredRows",
    "ScratchRows",
    "accumulate_gathered",
    "paired_column",
    "project_gathered",
]

# The instruction adds products of neighbouring columns in float32, and takes subnormal numbers for
# zero.
CAN_DOT_BFLOAT16 = processor.has("avx512bf16")
_KEYS = (
    4  # of a tile of dot products: with four queries, 16 sums and their operands in 32 registers
)
_KEYS_AT_ONCE = np.int64(_KEYS)


class ScratchRows(NamedTuple):
    """Rows of float32 scratch."""

    address: int  # of the first row
    step: int  # numbers from a row to the next


class GatheredRows(NamedTuple):
    """The keys or the values of a block, and the rows to prefetch meanwhile."""

    rows: int  # address of their addresses, int64, in a whole number of fours
    offset: int  # bytes that each of them lacks
    next_rows: int
    next_offset: int
    is_bfloat16: bool


@helper
def paired_column(d: int) -> int:
    """Return the column whose number is the d-th of a row in paired order."""
    return d // 32 * 32 + d % 16 * 2 + d // 16 % 2


# Register tiles
# -------------------------------------------------------------------------------------------------


def _gathered(emit: Emitter, addresses: Any, offset: Any) -> list[Any]:
    """Return the addresses of _KEYS rows."""
    slots = [emit.builder.add(addresses, emit.constant(8 * i)) for i in range(_KEYS)]
    return [emit.builder.add(offset, emit.load(slot, emit.word)) for slot in slots]


def _prefetch_ends(emit: Emitter, rows: list[Any], lines: Any) -> None:
    """Prefetch the last byte of rows that have so many cache lines.

    Large arrays of NumPy begin 16 bytes into a line, so such a row ends in one line more.
    """
    n_bytes = emit.builder.mul(lines, emit.constant(VECTOR_BYTES))
    last = emit.builder.sub(n_bytes, emit.constant(1))
    for row in rows:
        emit.prefetch(emit.builder.add(row, last))


def _load_line(emit: Emitter, address: Any, is_bfloat16: bool) -> list[Any]:
    """Return a cache line as vectors of float32: 16 numbers, or 32 widened ones in paired order."""
    if is_bfloat16:
        return list(load_widened_pairs(emit, address))
    return [emit.load(address, emit.vector)]


def _add_bfloat16_products(emit: Emitter, query: Any, key: Any, total: Any) -> Any:
    """Add to 16 sums the products of 32 bfloat16 numbers, two to each; they come as words."""
    kind = ir.FunctionType(emit.vector, [emit.vector, query.type, key.type])
    return emit.builder.asm(
        kind, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [total, query, key], side_effect=False
    )


def _dot_tile(n_queries: int, has_bfloat16_keys: bool, has_bfloat16_queries: bool) -> Any:
    """Return a tile of dot products of `n_queries` rows of scratch with four gathered keys.

    In plain Python, for a number of cache lines of a key::

        n = lines * (32 if has_bfloat16_keys else 16)
        for r in range(n_queries):
            for i in range(4):
                key = numbers_at(keys[i] + offset)
                c[r * c_row + i] = sum(q[r * q_row + d] * key[d] for d in range(n))
                if has_bfloat16_queries:
                    c[r * c_row + i] *= scale

    Queries are bfloat16 only if keys are, and the processor has an instruction for their products;
    they are scaled here, others before, when they were rounded to nothing less than float32. The
    tile prefetches the same columns of `next_keys`, and the line in which they end.
    """
    widens = has_bfloat16_keys and not has_bfloat16_queries
    n_parts = 2 if widens else 1  # vectors of a query for a cache line of a key

    @codegen(scale=types.float32)
    def tile(emit, q, q_row, keys, offset, next_keys, next_offset, c, c_row, lines, scale):
        words = ir.VectorType(ir.IntType(32), emit.lanes)
        operand = words if has_bfloat16_queries else emit.vector
        multiply_add = _add_bfloat16_products if has_bfloat16_queries else Emitter.fma

        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            query, rows, next_rows = addresses[0], addresses[1 : 1 + _KEYS], addresses[1 + _KEYS :]
            queries = [
                [
                    emit.load(emit.address(query, emit.times(q_row, r), v * emit.lanes), operand)
                    for v in range(n_parts)
                ]
                for r in range(n_queries)
            ]
            new = list(sums)
            for i in range(_KEYS):
                # spread over the arithmetic: a Zen 4 core drops requests that come faster than
                # memory delivers
                emit.prefetch(next_rows[i])
                if has_bfloat16_queries:
                    parts = [emit.load(rows[i], words)]
                else:
                    parts = _load_line(emit, rows[i], has_bfloat16_keys)
                for v, part in enumerate(parts):
                    for r in range(n_queries):
                        j = r * _KEYS + i
                        new[j] = multiply_add(emit, queries[r][v], part, new[j])
            return new

        rows, next_rows = _gathered(emit, keys, offset), _gathered(emit, next_keys, next_offset)
        _prefetch_ends(emit, next_rows, lines)
        line = emit.constant(VECTOR_BYTES)
        steps = [emit.constant(VECTOR_BYTES * n_parts)] + [line] * (2 * _KEYS)
        start = [emit.zeros()] * (_KEYS * n_queries)
        sums = emit.loop(lines, start, [q, *rows, *next_rows], steps, step)
        store_totals(emit, sums, _KEYS, c, c_row, scale if has_bfloat16_queries else None)

    return tile


def _outer_tile(n_queries: int, n_vectors: int, is_bfloat16: bool) -> Any:
    """Return a tile that adds weighted gathered rows to n_queries x (16 * n_vectors) sums.

    In plain Python, d being a column of the tile and `first` its first one::

        for i in range(count):
            value = numbers_at(values[i] + offset)
            m[r * m_row + d] += c[r * c_row + i] * value[first + d]

    It prefetches the same columns of the rows `next_values`, and the line in which they end.
    """
    n_lines = n_vectors // 2 if is_bfloat16 else n_vectors

    @codegen()
    def tile(emit, c, c_row, values, offset, next_values, next_offset, first, m, m_row, count):
        builder = emit.builder
        column_offset = emit.builder.mul(first, emit.constant(2 if is_bfloat16 else 4))

        def lines_of(slot: Any, offset: Any) -> list[Any]:
            start = builder.add(emit.load(slot, emit.word), builder.add(offset, column_offset))
            return [builder.add(start, emit.constant(VECTOR_BYTES * i)) for i in range(n_lines)]

        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            weight, value, next_value = addresses
            row = [
                vector
                for line in lines_of(value, offset)
                for vector in _load_line(emit, line, is_bfloat16)
            ]
            next_lines = lines_of(next_value, next_offset)
            for line in next_lines:
                emit.prefetch(line)
            _prefetch_ends(emit, next_lines[-1:], emit.constant(1))
            new = []
            for r in range(n_queries):
                number = emit.load(emit.address(weight, emit.times(c_row, r)), emit.element)
                factor = emit.splat(number)
                for v in range(n_vectors):
                    new.append(emit.fma(factor, row[v], sums[r * n_vectors + v]))
            return new

        targets = [
            emit.address(m, emit.times(m_row, r), v * emit.lanes)
            for r in range(n_queries)
            for v in range(n_vectors)
        ]
        steps = [emit.constant(4), emit.constant(8), emit.constant(8)]  # a weight, two addresses
        start = [emit.zeros()] * len(targets)
        sums = emit.loop(count, start, [c, values, next_values], steps, step)
        for value, target in zip(sums, targets, strict=True):
            emit.store(builder.fadd(emit.load(target, emit.vector), value), target)

    return tile


# Products of a block
# -------------------------------------------------------------------------------------------------


def _projection(has_bfloat16_keys: bool, has_bfloat16_queries: bool) -> Any:
    """Return the function that multiplies the queries of a tile with the keys of a block."""
    four = _dot_tile(4, has_bfloat16_keys, has_bfloat16_queries)
    one = _dot_tile(1, has_bfloat16_keys, has_bfloat16_queries)
    key_size = 2 if has_bfloat16_keys else 4

    @helper
    def project(q, keys, n_queries, n, c, scale):
        lines = q.step * key_size // VECTOR_BYTES
        for i in range(0, n, _KEYS_AT_ONCE):
            rows = (keys.rows + 8 * i, keys.offset, keys.next_rows + 8 * i, keys.next_offset)
            r = 0
            while r < n_queries:
                query, target = q.address + 4 * r * q.step, c.address + 4 * (r * c.step + i)
                if r + 4 <= n_queries:
                    four(query, q.step, *rows, target, c.step, lines, scale)
                    r += 4
                else:
                    one(query, q.step, *rows, target, c.step, lines, scale)
                    r += 1

    return project


_project_float32 = _projection(False, False)
_project_widened = _projection(True, False)
# elsewhere it is compiled, too, but never called: any function of the type will do
_project_bfloat16 = _projection(True, True) if CAN_DOT_BFLOAT16 else _project_widened


@piece
def project_gathered(
    q: ScratchRows,
    keys: GatheredRows,
    n_queries: int,
    n: int,
    c: ScratchRows,
    is_bfloat16: bool,
    scale: float,
) -> None:
    """c[r, i] = <q[r], keys[i]> for r < n_queries and i < n, up to a multiple of four.

    If `is_bfloat16`, each row of q begins with the bits of bfloat16 numbers, keys are bfloat16 as
    well, and products come times `scale`.
    """
    if is_bfloat16:
        _project_bfloat16(q, keys, n_queries, n, c, scale)
    elif keys.is_bfloat16:
        _project_widened(q, keys, n_queries, n, c, scale)
    else:
        _project_float32(q, keys, n_queries, n, c, scale)


def _accumulation(is_bfloat16: bool) -> Any:
    """Return the function that adds the weighted values of a block to the sums of a tile."""
    four_by_4, one_by_8, one_by_2 = (
        _outer_tile(n, v, is_bfloat16) for n, v in ((4, 4), (1, 8), (1, 2))
    )
    one_by_1 = _outer_tile(1, 1, False)  # rows of bfloat16 have a multiple of 32 columns

    @helper
    def accumulate(c, values, n_queries, n, m):
        width, r = m.step, 0
        rows = (values.rows, values.offset, values.next_rows, values.next_offset)
        while r < n_queries:
            takes_four = r + 4 <= n_queries and width % 64 == 0
            weights = c.address + 4 * r * c.step
            d = 0
            while d < width:
                target = m.address + 4 * (r * width + d)
                if takes_four:
                    four_by_4(weights, c.step, *rows, d, target, width, n)
                    d += 64
                elif d + 128 <= width:
                    one_by_8(weights, c.step, *rows, d, target, width, n)
                    d += 128
                elif d + 32 <= width:
                    one_by_2(weights, c.step, *rows, d, target, width, n)
                    d += 32
                else:
                    one_by_1(weights, c.step, *rows, d, target, width, n)
                    d += 16
            r += 4 if takes_four else 1

    return accumulate


_accumulate_float32, _accumulate_bfloat16 = _accumulation(False), _accumulation(True)


@piece
def accumulate_gathered(
    c: ScratchRows, values: GatheredRows, n_queries: int, n: int, m: ScratchRows
) -> None:
    """m[r] += sum_i c[r, i] * values[i] over i < n, for r < n_queries; m.step columns."""
    if values.is_bfloat16:
        _accumulate_bfloat16(c, values, n_queries, n, m)
    else:
        _accumulate_float32(c, values, n_queries, n, m)
