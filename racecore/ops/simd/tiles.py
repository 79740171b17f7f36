"""Register tiles for the small products in `ops.simd.products`: vector code written by hand.

Why: the compiler's own vector loops reach a third of what a core can do, because they load and
store every sum at every step. A tile keeps its sums in registers while the contraction runs past
them. The plain Python of each tile stands beside it; `ops.simd.products` puts tiles together.

How: each `_..._tile(...)` below is a factory; it returns a Numba intrinsic whose body is LLVM code
for one size of tile. The code uses generic vectors of 64 bytes, so it is right on every processor:
LLVM splits them where registers are smaller. Sums are fused multiply-adds in a fixed order, so
results keep their bits.

Tiles take addresses and strides instead of arrays, since an array argument is seven words and a
tile a few nanoseconds. Strides count elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from racecore.ops.simd.emitter import VECTOR_BYTES, Emitter, codegen
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

    The rows of b are bfloat16 if `is_bfloat16`. In plain Python, for every row r and column d of
    the tile::

        total = sum(a[r * a_row + k * a_step] * b[k * b_step + d] for k in range(count))
        c[r * c_row + d] = (c[r * c_row + d] if mode == ADD else 0) + total
    """
    n_vectors = max(1, n_halves // 2)

    @codegen(name=f"outer_{n_rows}x{n_halves}halves" + "_bfloat16" * is_bfloat16)
    def tile(
        emit: Emitter,
        a: Any,
        a_row: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        c: Any,
        c_row: Any,
        count: Any,
        mode: Any,
        like: Any,
    ) -> None:
        kind = emit.vector if n_halves > 1 else ir.VectorType(emit.element, emit.lanes // 2)
        # [n_rows, n_vectors] addresses, flattened, as all lists of sums here
        targets = [
            emit.address(c, emit.times(c_row, r), v * emit.lanes)
            for r in range(n_rows)
            for v in range(n_vectors)
        ]

        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            column_of_a, row_of_b = addresses
            row = [
                load_row(emit, row_of_b, v * emit.lanes, kind, is_bfloat16)
                for v in range(n_vectors)
            ]
            # one row of b serves n_rows sums, one number of a n_vectors of them
            new = []
            for r in range(n_rows):
                number = emit.load(emit.address(column_of_a, emit.times(a_row, r)), emit.element)
                factor = emit.splat(number, kind)
                new += [emit.fma(factor, row[v], sums[r * n_vectors + v]) for v in range(n_vectors)]
            return new

        b_size = 2 if is_bfloat16 else emit.size
        steps = [emit.times(a_step, emit.size), emit.times(b_step, b_size)]
        sums = emit.loop(count, [emit.zeros(kind)] * len(targets), [a, b], steps, step)
        # old numbers are added last: shorter chains of additions lose less
        sums = [
            emit.builder.fadd(kept_at(emit, mode, target, b, kind), value)
            for target, value in zip(targets, sums, strict=True)
        ]
        if n_halves > 1:
            rows = [sums[r * n_vectors : (r + 1) * n_vectors] for r in range(n_rows)]
            store_rows(emit, rows, c, c_row, mode)
        else:
            # half a vector is for scratch alone, never streamed
            for value, target in zip(sums, targets, strict=True):
                emit.store(value, target)

    return tile


def _dot_tile(n_rows: int, n_columns: int, is_bfloat16: bool = False) -> Any:
    """Return a tile of n_rows x n_columns dot products of rows, over whole vectors.

    The rows x are bfloat16 if `is_bfloat16`. In plain Python, for every row r and column i of the
    tile::

        c[r * c_row + i] = sum(m[r * m_row + d] * x[i * x_row + d] for d in range(count * lanes))
    """

    @codegen(name=f"dot_{n_rows}x{n_columns}" + "_bfloat16" * is_bfloat16)
    def tile(
        emit: Emitter,
        m: Any,
        m_row: Any,
        x: Any,
        x_row: Any,
        c: Any,
        c_row: Any,
        count: Any,
        like: Any,
    ) -> None:
        x_size = 2 if is_bfloat16 else emit.size

        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            rows = [
                emit.load(emit.address(addresses[0], emit.times(m_row, r)), emit.vector)
                for r in range(n_rows)
            ]
            new = list(sums)  # [n_rows, n_columns], each a vector whose lanes are added at the end
            for i in range(n_columns):
                start = emit.builder.add(addresses[1], emit.times(x_row, i * x_size))
                column = load_row(emit, start, 0, emit.vector, is_bfloat16)
                for r in range(n_rows):
                    new[r * n_columns + i] = emit.fma(rows[r], column, sums[r * n_columns + i])
            return new

        # a vector of x is 64 bytes, or 32 of bfloat16
        x_step = VECTOR_BYTES // (2 if is_bfloat16 else 1)
        steps = [emit.constant(VECTOR_BYTES), emit.constant(x_step)]
        sums = emit.loop(count, [emit.zeros()] * (n_rows * n_columns), [m, x], steps, step)
        store_totals(emit, sums, n_columns, c, c_row)

    return tile


@codegen()
def scale_words(emit: Emitter, words: Any, factor: Any, offset: Any, out: Any) -> None:
    """Write LANES int64, offset + factor * words[i], to the address `out`, given that of the
    words.
    """
    kind = ir.VectorType(emit.word, LANES)
    value = emit.builder.mul(emit.load(words, kind, align=8), emit.splat(factor, kind))
    emit.store(emit.builder.add(value, emit.splat(offset, kind)), out, align=8)


@codegen()
def transpose(
    emit: Emitter, source: Any, source_row: Any, target: Any, target_row: Any, like: Any
) -> None:
    """Write a square of lanes x lanes numbers transposed: target[j * target_row + i] = source[i *
    source_row + j].
    """
    rows = [
        emit.load(emit.address(source, emit.times(source_row, i)), emit.vector)
        for i in range(emit.lanes)
    ]
    # swap off-diagonal squares of 1 x 1 numbers, then 2 x 2, ...: log2(lanes) rounds
    step = 1
    while step < emit.lanes:
        for i in range(emit.lanes):
            if i & step == 0:
                rows[i], rows[i + step] = _swap_squares(emit, rows[i], rows[i + step], step)
        step *= 2
    for j, row in enumerate(rows):
        emit.store(row, emit.address(target, emit.times(target_row, j)))


def _swap_squares(emit: Emitter, a: Any, b: Any, step: int) -> tuple[Any, Any]:
    """Exchange the odd runs of `step` lanes of a with the even ones of b."""
    n = emit.lanes
    first = [i if i & step == 0 else n + i - step for i in range(n)]
    second = [i + step if i & step == 0 else n + i for i in range(n)]
    return emit.shuffle(a, b, first), emit.shuffle(a, b, second)


def _row_copy(name: str, mode: int, is_bfloat16: bool = False) -> Any:
    """Return a copy of `count` whole cache lines of the target, by a `mode` as above; `is_bfloat16`
    widens a source of bfloat16.

    Streaming saves reading the target first. `fence` must follow the last one before another thread
    may read it.
    """
    vectors_per_line = 2 if mode == STREAM_BFLOAT16 else 1
    source_step = VECTOR_BYTES * vectors_per_line // (2 if is_bfloat16 else 1)

    @codegen(name=name)
    def copy(emit: Emitter, target: Any, source: Any, count: Any) -> None:
        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            values = [
                load_row(emit, addresses[1], v * emit.lanes, emit.vector, is_bfloat16)
                for v in range(vectors_per_line)
            ]
            if mode == STREAM_BFLOAT16:
                store_bfloat16_rows(emit, [values], addresses[0], emit.constant(0))
            elif mode == STREAM:
                emit.stream(values[0], addresses[0])
            else:
                emit.store(values[0], addresses[0])
            return sums

        steps = [emit.constant(VECTOR_BYTES), emit.constant(source_step)]
        emit.loop(count, [], [target, source], steps, step)

    return copy


@codegen()
def fence(emit: Emitter) -> None:
    """Make streamed rows visible to other threads before anything that follows."""
    emit.builder.fence("seq_cst")


@codegen()
def prefetch(emit: Emitter, address: Any) -> None:
    """Prefetch the cache line at an address to the second-level cache. Any address is legal."""
    emit.prefetch(address)


copy_row = _row_copy("copy_row", OVERWRITE)
widen_row = _row_copy("widen_row", OVERWRITE, is_bfloat16=True)
stream_row = _row_copy("stream_row", STREAM)
stream_bfloat16_row = _row_copy("stream_bfloat16_row", STREAM_BFLOAT16)

# Rows x vectors of sums. 8 x 2 are 16 registers, a row and a factor three more; AVX-512 has 32.
outer_8x2, outer_4x2, outer_1x2 = (_outer_tile(rows, 4) for rows in (8, 4, 1))
outer_8x1, outer_4x1, outer_1x1 = (_outer_tile(rows, 2) for rows in (8, 4, 1))
outer_8xhalf = _outer_tile(8, 1)
outer_8x2_bfloat16 = _outer_tile(8, 4, is_bfloat16=True)
outer_4x2_bfloat16 = _outer_tile(4, 4, is_bfloat16=True)
# 4 x 4 sums are 16 registers, four rows and a column five more.
dot_4x4, dot_1x4 = _dot_tile(4, 4), _dot_tile(1, 4)
dot_4x1, dot_1x1 = _dot_tile(4, 1), _dot_tile(1, 1)
dot_4x4_bfloat16 = _dot_tile(4, 4, is_bfloat16=True)
