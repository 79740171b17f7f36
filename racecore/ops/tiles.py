"""The one room where vector code is written by hand: register tiles for the small products in `ops.products`.

Why: the compiler's own vector loops reach a third of what a core can do, because they load and store every sum at every
step. A tile keeps its sums in registers while the contraction runs past them. What a tile does is said in plain Python
beside it; `ops.products` puts tiles together.

How: each `_..._tile(...)` below is a factory; it returns a Numba intrinsic whose body is LLVM code for one size of tile.
The code uses generic vectors of 64 bytes, so it is right on every processor: LLVM splits them where registers are
narrower. Sums are fused multiply-adds in a fixed order, so results keep their bits.

Tiles take addresses and strides instead of arrays, since an array argument is seven words and a tile a few nanoseconds.
Strides count elements.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.ops.narrow import LANES, has_subnormal, load_widened, narrow_pair
from racecore.ops.vectors import in_every_lane

__all__ = [
    "ADD",
    "NARROW",
    "OVERWRITE",
    "STREAM",
    "Emitter",
    "copy_row",
    "dot_1x1",
    "dot_1x4",
    "dot_4x1",
    "dot_4x4",
    "dot_4x4_narrow",
    "fence",
    "narrow_row",
    "outer_1x1",
    "outer_1x2",
    "outer_4x1",
    "outer_4x2",
    "outer_4x2_narrow",
    "outer_8x1",
    "outer_8x2",
    "outer_8x2_narrow",
    "outer_8xhalf",
    "prefetch",
    "scale_words",
    "store_totals",
    "stream_row",
    "transpose",
    "widen_row",
]

_VECTOR_BYTES = 64
# What a tile does with its sums. STREAM writes whole vectors around the caches, and NARROW whole cache lines of bfloat16.
OVERWRITE, ADD, STREAM, NARROW = 0, 1, 2, 3
_FLAGS = ("contract",)  # lets multiply and add fuse, and nothing else


class Emitter:
    """LLVM code for one tile: typed loads and stores at addresses, and a counted loop that carries the sums."""

    def __init__(self, builder: Any, element: Any) -> None:
        self.builder = builder
        self.element = element
        self.size = 8 if isinstance(element, ir.DoubleType) else 4
        self.lanes = _VECTOR_BYTES // self.size
        self.vector = ir.VectorType(element, self.lanes)
        self.word = ir.IntType(64)

    def address(self, base: Any, *offsets: Any) -> Any:
        """Return base + itemsize * sum of the offsets, each a value or a Python int."""
        for offset in offsets:
            if isinstance(offset, int):
                scaled = ir.Constant(self.word, offset * self.size)
            else:
                scaled = self.builder.mul(offset, ir.Constant(self.word, self.size))
            base = self.builder.add(base, scaled)
        return base

    def times(self, stride: Any, factor: int) -> Any:
        return self.builder.mul(stride, ir.Constant(self.word, factor))

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=self.size)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=self.size)

    def stream(self, value: Any, address: Any) -> None:
        """Store a whole vector around the caches, at an address on a cache line."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        instruction = self.builder.store(value, pointer, align=_VECTOR_BYTES)
        one = self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        instruction.set_metadata("nontemporal", one)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at an address to be brought into the second-level cache."""
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        read, second_level, data = (ir.Constant(word, value) for value in (0, 2, 1))
        self.builder.call(function, [self.builder.inttoptr(address, pointer), read, second_level, data])

    def load_row(self, base: Any, offset: int, kind: Any, narrow: bool) -> Any:
        """Load numbers of a row from an element on; `narrow` rows are bfloat16, and widened (in float64 there are none)."""
        if not narrow or self.size == 8:
            return self.load(self.address(base, offset), kind)
        return load_widened(self.builder, self.builder.add(base, ir.Constant(self.word, 2 * offset)))

    def store_rows(self, rows: list[list[Any]], base: Any, stride: Any, mode: Any) -> None:
        """Store rows of vectors from an address on, `stride` elements of the target apart."""
        builder = self.builder
        stream, narrow = (builder.icmp_signed("==", mode, ir.Constant(self.word, m)) for m in (STREAM, NARROW))

        def write(how: Any) -> None:
            for r, row in enumerate(rows):
                for v, value in enumerate(row):
                    how(value, self.address(base, self.times(stride, r), v * self.lanes))

        with builder.if_else(stream) as (streams, otherwise):
            with streams:
                write(self.stream)
            with otherwise, builder.if_else(narrow) as (narrows, stays):
                with narrows:
                    if self.size == 4 and len(rows[0]) == 2:
                        self.narrow_rows(rows, base, stride)
                with stays:
                    write(self.store)

    def narrow_rows(self, rows: list[list[Any]], base: Any, stride: Any) -> None:
        """Store rows of two vectors as cache lines of bfloat16."""
        builder = self.builder

        def write(by_instruction: bool) -> None:
            for r, row in enumerate(rows):
                line = narrow_pair(builder, row[0], row[1], by_instruction)
                self.stream(line, builder.add(base, self.times(stride, 2 * r)))

        is_special = has_subnormal(builder, [value for row in rows for value in row])
        if is_special is None:
            write(False)
            return
        with builder.if_else(is_special) as (exactly, quickly):
            with exactly:
                write(False)
            with quickly:
                write(True)

    def kept(self, keep: Any, value: Any) -> Any:
        """Return `value` where the number `keep` is ADD, else zero."""
        zero = ir.Constant(value.type, [0.0] * value.type.count)
        return self.builder.select(self.builder.icmp_signed("==", keep, ir.Constant(self.word, ADD)), value, zero)

    def kept_at(self, mode: Any, address: Any, elsewhere: Any, kind: Any) -> Any:
        """Return what is at an address if `mode` is ADD, else zero; NARROW rows are shorter: it looks `elsewhere`."""
        narrows = self.builder.icmp_signed("==", mode, ir.Constant(self.word, NARROW))
        return self.kept(mode, self.load(self.builder.select(narrows, elsewhere, address), kind))

    def splat(self, number: Any, kind: Any = None) -> Any:
        return in_every_lane(self.builder, number, kind or self.vector)

    def fma(self, a: Any, b: Any, total: Any) -> Any:
        product = self.builder.fmul(a, b, flags=_FLAGS)
        return self.builder.fadd(product, total, flags=_FLAGS)

    def loop(self, count: Any, start: list[Any], addresses: list[Any], steps: list[Any], body: Any) -> list[Any]:
        """Run `body(addresses, sums) -> sums` `count` times, addresses growing by `steps`; return the last sums."""
        builder = self.builder
        before = builder.block
        head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(self.word)
        moving = [builder.phi(self.word) for _ in addresses]
        sums = [builder.phi(value.type) for value in start]
        index.add_incoming(ir.Constant(self.word, 0), before)
        for phi, value in zip(moving + sums, addresses + start, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        new_sums = body(moving, sums)
        new_addresses = [builder.add(address, step) for address, step in zip(moving, steps, strict=True)]
        end = builder.block
        index.add_incoming(builder.add(index, ir.Constant(self.word, 1)), end)
        for phi, value in zip(moving + sums, new_addresses + new_sums, strict=True):
            phi.add_incoming(value, end)
        builder.branch(head)
        builder.position_at_end(after)
        return sums


def _outer_tile(n_rows: int, n_halves: int, narrow: bool = False) -> Any:
    """Return a tile that adds a product to n_rows x (n_halves * lanes / 2) numbers; n_halves is 1 or even.

    The rows of b are bfloat16 if `narrow`. In plain Python, for every row r and column d of the tile::

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
                emit.address(c, emit.times(c_row, r), v * emit.lanes) for r in range(n_rows) for v in range(n_vectors)
            ]

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                row = [emit.load_row(addresses[1], v * emit.lanes, kind, narrow) for v in range(n_vectors)]
                new = []
                for r in range(n_rows):
                    factor = emit.splat(emit.load(emit.address(addresses[0], emit.times(a_row, r)), emit.element), kind)
                    new += [emit.fma(factor, row[v], sums[r * n_vectors + v]) for v in range(n_vectors)]
                return new

            start = [ir.Constant(kind, [0.0] * kind.count)] * len(places)
            steps = [emit.times(a_step, emit.size), emit.times(b_step, 2 if narrow else emit.size)]
            sums = emit.loop(count, start, [a, b], steps, step)
            # what was there is added last: shorter chains of additions lose less
            sums = [builder.fadd(emit.kept_at(mode, p, b, kind), s) for p, s in zip(places, sums, strict=True)]
            if n_halves > 1:
                rows = [sums[r * n_vectors : (r + 1) * n_vectors] for r in range(n_rows)]
                emit.store_rows(rows, c, c_row, mode)
            else:
                for value, place in zip(sums, places, strict=True):
                    emit.store(value, place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9, like), code

    return tile


def _dot_tile(n_rows: int, n_columns: int, narrow: bool = False) -> Any:
    """Return a tile of n_rows x n_columns dot products of rows, over whole vectors.

    The rows x are bfloat16 if `narrow`. In plain Python, for every row r and column i of the tile::

        c[r * c_row + i] = sum(m[r * m_row + d] * x[i * x_row + d] for d in range(count * lanes))
    """

    @intrinsic
    def tile(typing_context, m, m_row, x, x_row, c, c_row, count, like):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            m, m_row, x, x_row, c, c_row, count, _ = arguments
            emit = Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                rows = [emit.load(emit.address(addresses[0], emit.times(m_row, r)), emit.vector) for r in range(n_rows)]
                new = list(sums)
                for i in range(n_columns):
                    start = builder.add(addresses[1], emit.times(x_row, i * (2 if narrow else emit.size)))
                    column = emit.load_row(start, 0, emit.vector, narrow)
                    for r in range(n_rows):
                        new[r * n_columns + i] = emit.fma(rows[r], column, sums[r * n_columns + i])
                return new

            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            steps = [ir.Constant(emit.word, size) for size in (_VECTOR_BYTES, _VECTOR_BYTES // (2 if narrow else 1))]
            sums = emit.loop(count, [zero] * (n_rows * n_columns), [m, x], steps, step)
            store_totals(emit, sums, n_columns, c, c_row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, like), code

    return tile


def store_totals(emit: Emitter, sums: list[Any], n_columns: int, c: Any, c_row: Any, scale: Any = None) -> None:
    """Store the totals of vectors, `n_columns` in a row, to c[r * c_row + i], times `scale` if there is one."""
    at_once = max(n_columns, min(len(sums), emit.lanes))
    for start in range(0, len(sums), at_once):
        values = totals(emit, sums[start : start + at_once])
        values = values if scale is None else emit.builder.fmul(values, emit.splat(scale, values.type))
        for i in range(0, at_once, n_columns):
            part = ir.Constant(ir.VectorType(ir.IntType(32), n_columns), list(range(i, i + n_columns)))
            row = emit.times(c_row, (start + i) // n_columns)
            emit.store(emit.builder.shuffle_vector(values, values, part), emit.address(c, row))


def totals(emit: Emitter, vectors: list[Any]) -> Any:
    """Add up the lanes of each of 1, 2, 4, ... vectors, at most as many as lanes; return the totals as one vector.

    Neighbours are added first, then their sums, ..., however many vectors there are: a total has the same bits in every size of
    tile. Two vectors become one while there are two. As long as there are, the first rounds stay within 128 bits, since shuffles
    that do not leave those cost least; the others move whole ones.
    """
    near, added, n = 16 // emit.size, 1, len(vectors)
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
    index = ir.VectorType(ir.IntType(32), len(even))
    parts = [emit.builder.shuffle_vector(a, a if b is None else b, ir.Constant(index, lanes)) for lanes in (even, odd)]
    return emit.builder.fadd(*parts)


@intrinsic
def scale_words(typing_context, words, factor, offset, out):
    """Write LANES int64 of `narrow`, offset + factor * words[i], to an address, given that of the words."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, factor, offset, out = arguments
        emit = Emitter(builder, ir.FloatType())
        kind = ir.VectorType(emit.word, LANES)
        value = builder.mul(builder.load(builder.inttoptr(words, kind.as_pointer()), align=8), emit.splat(factor, kind))
        builder.store(builder.add(value, emit.splat(offset, kind)), builder.inttoptr(out, kind.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


@intrinsic
def transpose(typing_context, source, source_row, target, target_row, like):
    """Write a square of lanes x lanes numbers transposed: target[j * target_row + i] = source[i * source_row + j]."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, source_row, target, target_row, _ = arguments
        emit = Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())
        rows = [emit.load(emit.address(source, emit.times(source_row, i)), emit.vector) for i in range(emit.lanes)]
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
    return tuple(emit.builder.shuffle_vector(a, b, ir.Constant(index, picks)) for picks in (first, second))


def _row_copy(mode: int, widen: bool = False) -> Any:
    """Return a copy of `count` whole cache lines of the target, by a `mode` as above; `widen` reads bfloat16.

    Streaming saves reading the target first. Follow the last one with `fence` before another thread may look.
    """
    vectors_per_line = 2 if mode == NARROW else 1

    @intrinsic
    def copy(typing_context, target, source, count):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            target, source, count = arguments
            emit = Emitter(builder, ir.FloatType())

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                values = [
                    emit.load_row(addresses[1], v * emit.lanes, emit.vector, widen) for v in range(vectors_per_line)
                ]
                if mode == NARROW:
                    emit.narrow_rows([values], addresses[0], ir.Constant(emit.word, 0))
                elif mode == STREAM:
                    emit.stream(values[0], addresses[0])
                else:
                    emit.store(values[0], addresses[0])
                return sums

            source_step = _VECTOR_BYTES * vectors_per_line // (2 if widen else 1)
            steps = [ir.Constant(emit.word, _VECTOR_BYTES), ir.Constant(emit.word, source_step)]
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
    """Ask for the cache line at an address to be brought into the second-level cache. Any address is legal."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Emitter(builder, ir.FloatType()).prefetch(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), code


copy_row, stream_row = _row_copy(OVERWRITE), _row_copy(STREAM)
widen_row, narrow_row = _row_copy(OVERWRITE, widen=True), _row_copy(NARROW)

# Rows x vectors of sums that fit the registers: 8 x 2 leaves room for one row and a factor.
outer_8x2, outer_4x2, outer_1x2 = (_outer_tile(rows, 4) for rows in (8, 4, 1))
outer_8x1, outer_4x1, outer_1x1 = (_outer_tile(rows, 2) for rows in (8, 4, 1))
outer_8xhalf, outer_8x2_narrow, outer_4x2_narrow = _outer_tile(8, 1), _outer_tile(8, 4, True), _outer_tile(4, 4, True)
dot_4x4, dot_1x4, dot_4x1, dot_1x1 = _dot_tile(4, 4), _dot_tile(1, 4), _dot_tile(4, 1), _dot_tile(1, 1)
dot_4x4_narrow = _dot_tile(4, 4, narrow=True)
