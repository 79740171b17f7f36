"""The one room where vector code is written by hand: register tiles for the small products in
`ops.simd.products`.

Why: the compiler's own vector loops reach a third of what a core can do, because they load and
store every sum at every step. A tile keeps its sums in registers while the contraction runs past
them. What a tile does is said in plain Python beside it; `ops.simd.products` puts tiles together.

How: each `_..._tile(...)` below is a factory; it returns a Numba intrinsic whose body is LLVM code
for one size of tile. The code uses generic vectors of 64 bytes, so it is right on every processor:
LLVM splits them where registers are narrower. Sums are fused multiply-adds in a fixed order, so
results keep their bits. `emitter` has what it is written with.

Tiles take addresses and strides instead of arrays, since an array argument is seven words and a
tile a few nanoseconds. Strides count elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.ops.simd.emitter import VECTOR_BYTES, Emitter
from racecore.ops.simd.half_precision import LANES
from racecore.ops.simd.tile_sums import (
    ADD,
    OVERWRITE,
    STREAM,
    STREAM_BFLOAT16,
    kept_at,
    load_row,
    store_bfloat16_rows,
    store_rows,
    store_totals,
)

__all__ = [
    "ADD",
    "OVERWRITE",
    "STREAM",
    "STREAM_BFLOAT16",
    "copy_row",
    "dot_1x1",
    "dot_1x4",
    "dot_4x1",
    "dot_4x4",
    "dot_4x4_bfloat16",
    "fence",
    "outer_1x1",
    "outer_1x2",
    "outer_4x1",
    "outer_4x2",
    "outer_4x2_bfloat16",
    "outer_8x1",
    "outer_8x2",
    "outer_8x2_bfloat16",
    "outer_8xhalf",
    "prefetch",
    "scale_words",
    "stream_bfloat16_row",
    "stream_row",
    "transpose",
    "widen_row",
]


def _outer_tile(n_rows: int, n_halves: int, is_bfloat16: bool = False) -> Any:
    """Return a tile that adds a product to n_rows x (n_halves * lanes / 2) numbers; n_halves is 1
    or even.

    The rows of b are bfloat16 if `is_bfloat16`. In plain Python, for every row r and column d of the
    tile::

        total = sum(a[r * a_row + k * a_step] * b[k * b_step + d] for k in range(count))
        c[r * c_row + d] = (c[r * c_row + d] if mode == ADD else 0) + total
    """

    @intrinsic
    def tile(typing_context, a, a_row, a_step, b, b_step, c, c_row, count, mode, like):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a, a_row, a_step, b, b_step, c, c_row, count, mode, _ = arguments
            emit = Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())
            kind = emit.vector if n_halves > 1 else ir.VectorType(emit.element, emit.lanes // 2)
            n_vectors = max(1, n_halves // 2)
            places = [
                emit.address(c, emit.times(c_row, r), v * emit.lanes)
                for r in range(n_rows)
                for v in range(n_vectors)
            ]

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                row = [
                    load_row(emit, addresses[1], v * emit.lanes, kind, is_bfloat16)
                    for v in range(n_vectors)
                ]
                new = []
                for r in range(n_rows):
                    factor = emit.splat(
                        emit.load(emit.address(addresses[0], emit.times(a_row, r)), emit.element),
                        kind,
                    )
                    new += [
                        emit.fma(factor, row[v], sums[r * n_vectors + v]) for v in range(n_vectors)
                    ]
                return new

            start = [ir.Constant(kind, [0.0] * kind.count)] * len(places)
            steps = [
                emit.times(a_step, emit.size),
                emit.times(b_step, 2 if is_bfloat16 else emit.size),
            ]
            sums = emit.loop(count, start, [a, b], steps, step)
            # what was there is added last: shorter chains of additions lose less
            sums = [
                builder.fadd(kept_at(emit, mode, p, b, kind), s)
                for p, s in zip(places, sums, strict=True)
            ]
            if n_halves > 1:
                rows = [sums[r * n_vectors : (r + 1) * n_vectors] for r in range(n_rows)]
                store_rows(emit, rows, c, c_row, mode)
            else:
                for value, place in zip(sums, places, strict=True):
                    emit.store(value, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9, like), code

    return tile


def _dot_tile(n_rows: int, n_columns: int, is_bfloat16: bool = False) -> Any:
    """Return a tile of n_rows x n_columns dot products of rows, over whole vectors.

    The rows x are bfloat16 if `is_bfloat16`. In plain Python, for every row r and column i of the tile::

        c[r * c_row + i] = sum(m[r * m_row + d] * x[i * x_row + d] for d in range(count * lanes))
    """

    @intrinsic
    def tile(typing_context, m, m_row, x, x_row, c, c_row, count, like):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            m, m_row, x, x_row, c, c_row, count, _ = arguments
            emit = Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                rows = [
                    emit.load(emit.address(addresses[0], emit.times(m_row, r)), emit.vector)
                    for r in range(n_rows)
                ]
                new = list(sums)
                for i in range(n_columns):
                    start = builder.add(
                        addresses[1], emit.times(x_row, i * (2 if is_bfloat16 else emit.size))
                    )
                    column = load_row(emit, start, 0, emit.vector, is_bfloat16)
                    for r in range(n_rows):
                        new[r * n_columns + i] = emit.fma(rows[r], column, sums[r * n_columns + i])
                return new

            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            steps = [
                ir.Constant(emit.word, size)
                for size in (VECTOR_BYTES, VECTOR_BYTES // (2 if is_bfloat16 else 1))
            ]
            sums = emit.loop(count, [zero] * (n_rows * n_columns), [m, x], steps, step)
            store_totals(emit, sums, n_columns, c, c_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, like), code

    return tile


@intrinsic
def scale_words(typing_context, words, factor, offset, out):
    """Write LANES int64 of `is_bfloat16`, offset + factor * words[i], to an address, given that of the
    words.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, factor, offset, out = arguments
        emit = Emitter(builder, ir.FloatType())
        kind = ir.VectorType(emit.word, LANES)
        value = builder.mul(
            builder.load(builder.inttoptr(words, kind.as_pointer()), align=8),
            emit.splat(factor, kind),
        )
        builder.store(
            builder.add(value, emit.splat(offset, kind)),
            builder.inttoptr(out, kind.as_pointer()),
            align=8,
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@intrinsic
def transpose(typing_context, source, source_row, target, target_row, like):
    """Write a square of lanes x lanes numbers transposed: target[j * target_row + i] = source[i *
    source_row + j].
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_row, target, target_row, _ = arguments
        emit = Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())
        rows = [
            emit.load(emit.address(source, emit.times(source_row, i)), emit.vector)
            for i in range(emit.lanes)
        ]
        step = 1
        while step < emit.lanes:  # swap off-diagonal squares of step x step numbers
            for i in range(emit.lanes):
                if i & step == 0:
                    rows[i], rows[i + step] = _swap_squares(emit, rows[i], rows[i + step], step)
            step *= 2
        for j, row in enumerate(rows):
            emit.store(row, emit.address(target, emit.times(target_row, j)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, like), code


def _swap_squares(emit: Emitter, a: Any, b: Any, step: int) -> tuple[Any, Any]:
    """Exchange the odd runs of `step` lanes of a with the even ones of b."""
    n, index = emit.lanes, ir.VectorType(ir.IntType(32), emit.lanes)
    first = [i if i & step == 0 else n + i - step for i in range(n)]
    second = [i + step if i & step == 0 else n + i for i in range(n)]
    return tuple(
        emit.builder.shuffle_vector(a, b, ir.Constant(index, picks)) for picks in (first, second)
    )


def _row_copy(mode: int, widen: bool = False) -> Any:
    """Return a copy of `count` whole cache lines of the target, by a `mode` as above; `widen` reads
    bfloat16.

    Streaming saves reading the target first. Follow the last one with `fence` before another thread
    may look.
    """
    vectors_per_line = 2 if mode == STREAM_BFLOAT16 else 1

    @intrinsic
    def copy(typing_context, target, source, count):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, source, count = arguments
            emit = Emitter(builder, ir.FloatType())

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                values = [
                    load_row(emit, addresses[1], v * emit.lanes, emit.vector, widen)
                    for v in range(vectors_per_line)
                ]
                if mode == STREAM_BFLOAT16:
                    store_bfloat16_rows(emit, [values], addresses[0], ir.Constant(emit.word, 0))
                elif mode == STREAM:
                    emit.stream(values[0], addresses[0])
                else:
                    emit.store(values[0], addresses[0])
                return sums

            source_step = VECTOR_BYTES * vectors_per_line // (2 if widen else 1)
            steps = [ir.Constant(emit.word, VECTOR_BYTES), ir.Constant(emit.word, source_step)]
            emit.loop(count, [], [target, source], steps, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), code

    return copy


@intrinsic
def fence(typing_context):
    """Make streamed rows visible to other threads before anything that follows."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line at an address to be brought into the second-level cache. Any address
    is legal.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Emitter(builder, ir.FloatType()).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), code


copy_row, stream_row = _row_copy(OVERWRITE), _row_copy(STREAM)
widen_row, stream_bfloat16_row = _row_copy(OVERWRITE, widen=True), _row_copy(STREAM_BFLOAT16)

# Rows x vectors of sums that fit the registers: 8 x 2 leaves room for one row and a factor.
outer_8x2, outer_4x2, outer_1x2 = (_outer_tile(rows, 4) for rows in (8, 4, 1))
outer_8x1, outer_4x1, outer_1x1 = (_outer_tile(rows, 2) for rows in (8, 4, 1))
outer_8xhalf, outer_8x2_bfloat16, outer_4x2_bfloat16 = (
    _outer_tile(8, 1),
    _outer_tile(8, 4, True),
    _outer_tile(4, 4, True),
)
dot_4x4, dot_1x4, dot_4x1, dot_1x1 = (
    _dot_tile(4, 4),
    _dot_tile(1, 4),
    _dot_tile(4, 1),
    _dot_tile(1, 1),
)
dot_4x4_bfloat16 = _dot_tile(4, 4, is_bfloat16=True)
