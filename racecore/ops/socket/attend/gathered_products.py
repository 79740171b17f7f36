"""Products with rows that lie anywhere in memory: keys and values of a cache, read where they are.

Why: a row that is read once should not be copied first. With one query head for a row there is so
little arithmetic that the copy would take longer than all of it. And rows that are far apart are
beyond what a core guesses: while a tile calculates with some rows, it asks for those that come a
block later. What the products compute is what `products.project` and `products.accumulate` do.

How: rows come as a list of addresses, with a list of those to ask for. Two factories of register
tiles, as in `ops.simd.tiles`, read float32 rows or widen bfloat16. The latter takes even and odd
columns apart, since that costs half as much: queries and sums then have their columns in *paired
order*, of every 32 columns first the even ones, then the odd; see `paired_column`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.ops.simd.emitter import VECTOR_BYTES, Emitter
from racecore.ops.simd.half_precision import load_widened_pairs
from racecore.ops.simd.tile_sums import store_totals
from racecore.runtime import processor
from racecore.runtime.jit import helper

__all__ = [
    "CAN_DOT",
    "Lists",
    "Matrix",
    "accumulate_gathered",
    "dot_gathered",
    "paired_column",
    "project_gathered",
]

_AT_ONCE = np.int64(4)  # rows of a tile of dot products


@helper
def paired_column(d: int) -> int:
    """Return the column of an array whose number stands at place d of a row in paired order."""
    return d // 32 * 32 + d % 16 * 2 + d // 16 % 2


def _load_line(emit: Emitter, address: Any, is_bfloat16: bool) -> list[Any]:
    """Return the numbers of a cache line of a row: 16 of float32, or 32 of bfloat16 in paired
    order.
    """
    return (
        list(load_widened_pairs(emit, address))
        if is_bfloat16
        else [emit.load(address, emit.vector)]
    )


def _four(emit: Emitter, addresses: Any, base: Any) -> list[Any]:
    """Return four listed addresses."""
    places = [emit.builder.add(addresses, ir.Constant(emit.word, 8 * i)) for i in range(4)]
    return [emit.builder.add(base, emit.load(place, emit.word)) for place in places]


def _ask_for_ends(emit: Emitter, starts: list[Any], lines: Any) -> None:
    """Ask for the last bytes of rows of so many lines: in NumPy's large arrays rows begin within a
    line, and end in one more.
    """
    last = emit.builder.sub(
        emit.builder.mul(lines, ir.Constant(emit.word, VECTOR_BYTES)), ir.Constant(emit.word, 1)
    )
    for start in starts:
        emit.prefetch(emit.builder.add(start, last))


def _dot_tile(n_queries: int, is_bfloat16: bool) -> Any:
    """Return a tile of dot products of `n_queries` float32 rows with four listed rows. In plain
    Python::

        c[r * c_row + i] = sum(q[r * q_row + d] * row(base + rows[i])[d] for d in range(64 // itemsize * lines))

    It asks for the same columns of the rows `next_rows`, and for the line in which they end.
    """
    per_line = 2 if is_bfloat16 else 1  # vectors

    @intrinsic
    def tile(typing_context, q, q_row, rows, base, next_rows, next_base, c, c_row, lines):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, q_row, rows, base, next_rows, next_base, c, c_row, lines = arguments
            emit = Emitter(builder, ir.FloatType())

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                weights = [
                    [
                        emit.load(
                            emit.address(addresses[0], emit.times(q_row, r), v * emit.lanes),
                            emit.vector,
                        )
                        for v in range(per_line)
                    ]
                    for r in range(n_queries)
                ]
                new = list(sums)
                for i in range(4):
                    emit.prefetch(addresses[5 + i])
                    for v, row in enumerate(_load_line(emit, addresses[1 + i], is_bfloat16)):
                        for r in range(n_queries):
                            new[r * 4 + i] = emit.fma(weights[r][v], row, new[r * 4 + i])
                return new

            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            line = ir.Constant(emit.word, VECTOR_BYTES)
            steps = [ir.Constant(emit.word, VECTOR_BYTES * per_line)] + [line] * 8
            starts = [*_four(emit, rows, base), *_four(emit, next_rows, next_base)]
            _ask_for_ends(emit, starts[4:], lines)
            sums = emit.loop(lines, [zero] * (4 * n_queries), [q, *starts], steps, step)
            store_totals(emit, sums, 4, c, c_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), code

    return tile


def _bfloat16_dot_tile(n_queries: int) -> Any:
    """Return the same tile for queries that are bfloat16 too, with the instruction for that; sums
    come times `scale`.

    It adds the products of neighbouring columns in float32, and takes subnormal numbers for zero.
    """

    @intrinsic
    def tile(typing_context, q, q_row, rows, base, next_rows, next_base, c, c_row, lines, scale):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, q_row, rows, base, next_rows, next_base, c, c_row, lines, scale = arguments
            emit = Emitter(builder, ir.FloatType())
            words = ir.VectorType(ir.IntType(32), emit.lanes)
            kind = ir.FunctionType(emit.vector, [emit.vector, words, words])

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                weights = [
                    emit.load(emit.address(addresses[0], emit.times(q_row, r)), words)
                    for r in range(n_queries)
                ]
                new = list(sums)
                for i in range(4):
                    emit.prefetch(addresses[5 + i])
                    row = emit.load(addresses[1 + i], words)
                    for r in range(n_queries):
                        j = r * 4 + i
                        new[j] = builder.asm(
                            kind,
                            "vdpbf16ps $3, $2, $0",
                            "=v,0,v,v",
                            [sums[j], weights[r], row],
                            False,
                        )
                return new

            starts = [*_four(emit, rows, base), *_four(emit, next_rows, next_base)]
            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            line = ir.Constant(emit.word, VECTOR_BYTES)
            _ask_for_ends(emit, starts[4:], lines)
            sums = emit.loop(lines, [zero] * (4 * n_queries), [q, *starts], [line] * 9, step)
            store_totals(emit, sums, 4, c, c_row, scale)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9, types.float32), code

    return tile


def _outer_tile(n_queries: int, n_vectors: int, is_bfloat16: bool) -> Any:
    """Return a tile that adds weighted listed rows to n_queries x (16 * n_vectors) sums. In plain
    Python::

        m[r * m_row + d] += sum(c[r * c_row + i] * row(base + rows[i])[first + d] for i in range(count))

    It asks for the same columns of the rows `next_rows`, and for the line in which they end.
    """
    lines = n_vectors // 2 if is_bfloat16 else n_vectors

    @intrinsic
    def tile(typing_context, c, c_row, rows, base, next_rows, next_base, first, m, m_row, count):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            c, c_row, rows, base, next_rows, next_base, first, m, m_row, count = arguments
            emit = Emitter(builder, ir.FloatType())
            offset = builder.mul(first, ir.Constant(emit.word, 2 if is_bfloat16 else 4))

            def lines_of(address: Any, base: Any) -> list[Any]:
                start = builder.add(emit.load(address, emit.word), builder.add(base, offset))
                return [
                    builder.add(start, ir.Constant(emit.word, VECTOR_BYTES * i))
                    for i in range(lines)
                ]

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                row = [
                    vector
                    for line in lines_of(addresses[1], base)
                    for vector in _load_line(emit, line, is_bfloat16)
                ]
                asked = lines_of(addresses[2], next_base)
                for line in asked:
                    emit.prefetch(line)
                _ask_for_ends(emit, asked[-1:], ir.Constant(emit.word, 1))
                new = []
                for r in range(n_queries):
                    factor = emit.splat(
                        emit.load(emit.address(addresses[0], emit.times(c_row, r)), emit.element)
                    )
                    new += [
                        emit.fma(factor, row[v], sums[r * n_vectors + v]) for v in range(n_vectors)
                    ]
                return new

            places = [
                emit.address(m, emit.times(m_row, r), v * emit.lanes)
                for r in range(n_queries)
                for v in range(n_vectors)
            ]
            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            steps = [
                ir.Constant(emit.word, 4),
                ir.Constant(emit.word, 8),
                ir.Constant(emit.word, 8),
            ]
            sums = emit.loop(count, [zero] * len(places), [c, rows, next_rows], steps, step)
            for value, place in zip(sums, places, strict=True):
                emit.store(builder.fadd(emit.load(place, emit.vector), value), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), code

    return tile


_dot_4, _dot_1, _dot_4_widening, _dot_1_widening = (
    _dot_tile(n, is_bfloat16) for is_bfloat16 in (False, True) for n in (4, 1)
)
_outer_4x4, _outer_1x8, _outer_1x2, _outer_1x1 = (
    _outer_tile(n, v, False) for n, v in ((4, 4), (1, 8), (1, 2), (1, 1))
)
_outer_4x4_bfloat16, _outer_1x8_bfloat16, _outer_1x2_bfloat16 = (
    _outer_tile(n, v, True) for n, v in ((4, 4), (1, 8), (1, 2))
)


_dot_4_bfloat16, _dot_1_bfloat16 = _bfloat16_dot_tile(4), _bfloat16_dot_tile(1)
CAN_DOT = processor.has("avx512bf16")


class Matrix(NamedTuple):
    """Rows of scratch, float32: an address and the numbers from a row to the next."""

    address: Any
    row: Any


class Lists(NamedTuple):
    """Addresses of two lists of addresses, each less a base: rows, and those to ask for meanwhile."""

    rows: Any
    base: Any
    next_rows: Any
    next_base: Any
    is_bfloat16: bool  # rows are bfloat16


@helper
def dot_gathered(q: Matrix, lists: Lists, n_queries: int, n: int, c: Matrix, scale: Any) -> None:
    """c[r, i] = <q[r], rows[i]> * scale of rows of bfloat16, and queries whose bits of bfloat16
    begin each row of q.
    """
    if CAN_DOT:  # else nobody comes here, and the tile could not be compiled
        lines = q.row * 2 // VECTOR_BYTES
        for i in range(0, n, _AT_ONCE):
            rows, next_rows, r = (
                (lists.rows + 8 * i, lists.base),
                (lists.next_rows + 8 * i, lists.next_base),
                0,
            )
            while r < n_queries:
                qr, cr = q.address + 4 * r * q.row, c.address + 4 * (r * c.row + i)
                if r + 4 <= n_queries:
                    _dot_4_bfloat16(qr, q.row, *rows, *next_rows, cr, c.row, lines, scale)
                    r += 4
                else:
                    _dot_1_bfloat16(qr, q.row, *rows, *next_rows, cr, c.row, lines, scale)
                    r += 1


@helper
def project_gathered(q: Matrix, lists: Lists, n_queries: int, n: int, c: Matrix) -> None:
    """c[r, i] = <q[r], rows[i]> for r < n_queries and i < n, float32. Lists go on to a multiple of
    four.
    """
    lines = q.row * (2 if lists.is_bfloat16 else 4) // VECTOR_BYTES
    for i in range(0, n, _AT_ONCE):
        rows, next_rows, r = (
            (lists.rows + 8 * i, lists.base),
            (lists.next_rows + 8 * i, lists.next_base),
            0,
        )
        while r < n_queries:
            qr, cr = q.address + 4 * r * q.row, c.address + 4 * (r * c.row + i)
            if r + 4 <= n_queries:
                if lists.is_bfloat16:
                    _dot_4_widening(qr, q.row, *rows, *next_rows, cr, c.row, lines)
                else:
                    _dot_4(qr, q.row, *rows, *next_rows, cr, c.row, lines)
                r += 4
            else:
                if lists.is_bfloat16:
                    _dot_1_widening(qr, q.row, *rows, *next_rows, cr, c.row, lines)
                else:
                    _dot_1(qr, q.row, *rows, *next_rows, cr, c.row, lines)
                r += 1


@helper
def accumulate_gathered(c: Matrix, lists: Lists, n_queries: int, n: int, m: Matrix) -> None:
    """m[r] += sum_i c[r, i] * rows[i] over i < n, for r < n_queries; float32, m.row columns."""
    width, r = m.row, 0
    rows, next_rows = (lists.rows, lists.base), (lists.next_rows, lists.next_base)
    while r < n_queries:
        d, four, cr = 0, r + 4 <= n_queries and width % 64 == 0, c.address + 4 * r * c.row
        while d < width:
            mr = m.address + 4 * (r * width + d)
            if four:
                if lists.is_bfloat16:
                    _outer_4x4_bfloat16(cr, c.row, *rows, *next_rows, d, mr, width, n)
                else:
                    _outer_4x4(cr, c.row, *rows, *next_rows, d, mr, width, n)
                d += 64
            elif d + 128 <= width:
                if lists.is_bfloat16:
                    _outer_1x8_bfloat16(cr, c.row, *rows, *next_rows, d, mr, width, n)
                else:
                    _outer_1x8(cr, c.row, *rows, *next_rows, d, mr, width, n)
                d += 128
            elif d + 32 <= width:
                if lists.is_bfloat16:
                    _outer_1x2_bfloat16(cr, c.row, *rows, *next_rows, d, mr, width, n)
                else:
                    _outer_1x2(cr, c.row, *rows, *next_rows, d, mr, width, n)
                d += 32
            else:
                _outer_1x1(cr, c.row, *rows, *next_rows, d, mr, width, n)
                d += 16
        r += 4 if four else 1
