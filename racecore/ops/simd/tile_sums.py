"""The sums of a register tile: rows they are made from, and how they are written.

`ops.simd.tiles`, `ops.causal.scan_tiles` and SOCKET's tiles share this. A tile writes its sums by a
mode, an int64 at run time: one compiled tile serves scratch arrays and outputs.
"""

from __future__ import annotations

from typing import Any

from racecore.ops.simd.emitter import Emitter
from racecore.ops.simd.half_precision import has_subnormal, load_widened, round_pair_to_bfloat16

__all__ = [
    "ADD",
    "OVERWRITE",
    "STREAM",
    "STREAM_BFLOAT16",
    "kept",
    "kept_at",
    "load_row",
    "store_bfloat16_rows",
    "store_rows",
    "store_totals",
]

# STREAM writes whole vectors around the caches, STREAM_BFLOAT16 whole cache lines of bfloat16:
# outputs that are not read again soon need not be read into the cache before they are written.
OVERWRITE, ADD, STREAM, STREAM_BFLOAT16 = 0, 1, 2, 3


def load_row(emit: Emitter, base: Any, offset: int, kind: Any, is_bfloat16: bool) -> Any:
    """Return the numbers of a row from element `offset` on; rows of bfloat16 are widened.

    In float64 tiles rows are never bfloat16, whatever `is_bfloat16` says.
    """
    if not is_bfloat16 or emit.size == 8:
        return emit.load(emit.address(base, offset), kind)
    return load_widened(emit, emit.builder.add(base, emit.constant(2 * offset)))


def store_rows(emit: Emitter, rows: list[list[Any]], base: Any, stride: Any, mode: Any) -> None:
    """Store rows of vectors from an address on, `stride` elements of the target apart."""
    builder = emit.builder
    stream, is_bfloat16 = (
        builder.icmp_signed("==", mode, emit.constant(m)) for m in (STREAM, STREAM_BFLOAT16)
    )

    def write(store: Any) -> None:
        for r, row in enumerate(rows):
            for v, value in enumerate(row):
                store(value, emit.address(base, emit.times(stride, r), v * emit.lanes))

    with builder.if_else(stream) as (streams, otherwise):
        with streams:
            write(emit.stream)
        with otherwise, builder.if_else(is_bfloat16) as (streams_bfloat16, stays):
            with streams_bfloat16:
                # a cache line of bfloat16 is two vectors of float32: other tiles never get the mode
                if emit.size == 4 and len(rows[0]) == 2:
                    store_bfloat16_rows(emit, rows, base, stride)
            with stays:
                write(emit.store)


def store_bfloat16_rows(emit: Emitter, rows: list[list[Any]], base: Any, stride: Any) -> None:
    """Store rows of two float32 vectors as cache lines of bfloat16, around the caches."""
    builder = emit.builder

    def write(by_instruction: bool) -> None:
        for r, row in enumerate(rows):
            line = round_pair_to_bfloat16(emit, row[0], row[1], by_instruction)
            emit.stream(line, builder.add(base, emit.times(stride, 2 * r)))

    # the instruction that rounds takes subnormal numbers for zero: with one, integers do it
    is_special = has_subnormal(emit, [value for row in rows for value in row])
    if is_special is None:
        write(False)
        return
    with builder.if_else(is_special) as (exactly, quickly):
        with exactly:
            write(False)
        with quickly:
            write(True)


def kept(emit: Emitter, mode: Any, value: Any) -> Any:
    """Return `value` if the mode is ADD, else zero."""
    adds = emit.builder.icmp_signed("==", mode, emit.constant(ADD))
    return emit.builder.select(adds, value, emit.zeros(value.type))


def kept_at(emit: Emitter, mode: Any, address: Any, elsewhere: Any, kind: Any) -> Any:
    """Return the vector at an address if the mode is ADD, else zero.

    Rows of bfloat16 are shorter than the tile: with STREAM_BFLOAT16 it reads `elsewhere`, any
    address of a vector, and not past the end of an output.
    """
    mode_is_bfloat16 = emit.builder.icmp_signed("==", mode, emit.constant(STREAM_BFLOAT16))
    readable = emit.builder.select(mode_is_bfloat16, elsewhere, address)
    return kept(emit, mode, emit.load(readable, kind))


def store_totals(
    emit: Emitter, sums: list[Any], n_columns: int, c: Any, c_row: Any, scale: Any = None
) -> None:
    """Store the totals of vectors, `n_columns` in a row, to c[r * c_row + i], times `scale` if
    given.
    """
    at_once = max(n_columns, min(len(sums), emit.lanes))
    for start in range(0, len(sums), at_once):
        values = _totals(emit, sums[start : start + at_once])
        if scale is not None:
            values = emit.builder.fmul(values, emit.splat(scale, values.type))
        for i in range(0, at_once, n_columns):
            row = emit.times(c_row, (start + i) // n_columns)
            part = emit.shuffle(values, values, range(i, i + n_columns))
            emit.store(part, emit.address(c, row))


def _totals(emit: Emitter, vectors: list[Any]) -> Any:
    """Return a vector of the totals of the lanes of 1, 2, 4, ... vectors, at most as many as lanes.

    Neighbours are added first, then their sums, ..., however many vectors there are: a total has
    the same bits in every size of tile. Each round makes one vector of two while there are two.
    The first rounds of several vectors shuffle within 128 bits, the cheapest shuffles; later ones
    across the whole vector.
    """
    near = 16 // emit.size  # lanes of 128 bits
    n = len(vectors)
    added = 1  # lanes that a lane is the sum of
    while added < emit.lanes:
        unit, chunk = (1, near) if added < near else (min(n, near), emit.lanes)
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_add_neighbours(emit, a, b, unit, chunk) for a, b in pairs]
        else:
            vectors = [_add_neighbours(emit, vectors[0], None, unit, vectors[0].type.count)]
        added *= 2
    return vectors[0]


def _add_neighbours(emit: Emitter, a: Any, b: Any | None, unit: int, chunk: int) -> Any:
    """Add, of every `chunk` lanes, even units to odd ones: those of a, then those of b."""
    n, sources = a.type.count, [0] if b is None else [0, a.type.count]
    even, odd = (
        [
            start + source + u + i
            for start in range(0, n, chunk)
            for source in sources
            for u in range(first, chunk, 2 * unit)
            for i in range(unit)
        ]
        for first in (0, unit)
    )
    other = a if b is None else b
    return emit.builder.fadd(emit.shuffle(a, other, even), emit.shuffle(a, other, odd))
