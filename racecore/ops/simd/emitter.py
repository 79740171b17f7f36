"""What LLVM code for tiles is written with: loads and stores at addresses, counted loops, totals of
lanes.

Why it is a module: `tiles`, `walks`, and SOCKET's `listed`, `lookup` and `coarse` all write such
code. Vectors are generic, of 64 bytes; LLVM splits them where registers are narrower.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from racecore.ops.simd.half_precision import has_subnormal, load_widened, round_pair_to_bfloat16
from racecore.ops.simd.vectors import VECTOR_BYTES, splat_ir

__all__ = ["ADD", "OVERWRITE", "STREAM", "STREAM_BFLOAT16", "Emitter", "store_totals"]

# What a tile does with its sums. STREAM writes whole vectors around the caches, and NARROW whole
# cache lines of bfloat16.
OVERWRITE, ADD, STREAM, STREAM_BFLOAT16 = 0, 1, 2, 3
_FLAGS = ("contract",)  # lets multiply and add fuse, and nothing else


class Emitter:
    """LLVM code for one tile: typed loads and stores at addresses, and a counted loop that carries
    the sums.
    """

    def __init__(self, builder: Any, element: Any) -> None:
        self.builder = builder
        self.element = element
        self.size = 8 if isinstance(element, ir.DoubleType) else 4
        self.lanes = VECTOR_BYTES // self.size
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
        self.builder.store(
            value, self.builder.inttoptr(address, value.type.as_pointer()), align=self.size
        )

    def stream(self, value: Any, address: Any) -> None:
        """Store a whole vector around the caches, at an address on a cache line."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        instruction = self.builder.store(value, pointer, align=VECTOR_BYTES)
        one = self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        instruction.set_metadata("nontemporal", one)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at an address to be brought into the second-level cache."""
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        read, second_level, data = (ir.Constant(word, value) for value in (0, 2, 1))
        self.builder.call(
            function, [self.builder.inttoptr(address, pointer), read, second_level, data]
        )

    def load_row(self, base: Any, offset: int, kind: Any, is_bfloat16: bool) -> Any:
        """Load numbers of a row from an element on; `is_bfloat16` rows are bfloat16, and widened (in
        float64 there are none).
        """
        if not is_bfloat16 or self.size == 8:
            return self.load(self.address(base, offset), kind)
        return load_widened(
            self.builder, self.builder.add(base, ir.Constant(self.word, 2 * offset))
        )

    def store_rows(self, rows: list[list[Any]], base: Any, stride: Any, mode: Any) -> None:
        """Store rows of vectors from an address on, `stride` elements of the target apart."""
        builder = self.builder
        stream, is_bfloat16 = (
            builder.icmp_signed("==", mode, ir.Constant(self.word, m))
            for m in (STREAM, STREAM_BFLOAT16)
        )

        def write(how: Any) -> None:
            for r, row in enumerate(rows):
                for v, value in enumerate(row):
                    how(value, self.address(base, self.times(stride, r), v * self.lanes))

        with builder.if_else(stream) as (streams, otherwise):
            with streams:
                write(self.stream)
            with otherwise, builder.if_else(is_bfloat16) as (streams_bfloat16, stays):
                with streams_bfloat16:
                    if self.size == 4 and len(rows[0]) == 2:
                        self.store_bfloat16_rows(rows, base, stride)
                with stays:
                    write(self.store)

    def store_bfloat16_rows(self, rows: list[list[Any]], base: Any, stride: Any) -> None:
        """Store rows of two vectors as cache lines of bfloat16."""
        builder = self.builder

        def write(by_instruction: bool) -> None:
            for r, row in enumerate(rows):
                line = round_pair_to_bfloat16(builder, row[0], row[1], by_instruction)
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
        return self.builder.select(
            self.builder.icmp_signed("==", keep, ir.Constant(self.word, ADD)), value, zero
        )

    def kept_at(self, mode: Any, address: Any, elsewhere: Any, kind: Any) -> Any:
        """Return what is at an address if `mode` is ADD, else zero; NARROW rows are shorter: it
        looks `elsewhere`.
        """
        streams_bfloat16 = self.builder.icmp_signed(
            "==", mode, ir.Constant(self.word, STREAM_BFLOAT16)
        )
        return self.kept(
            mode, self.load(self.builder.select(streams_bfloat16, elsewhere, address), kind)
        )

    def splat(self, number: Any, kind: Any = None) -> Any:
        return splat_ir(self.builder, number, kind or self.vector)

    def fma(self, a: Any, b: Any, total: Any) -> Any:
        product = self.builder.fmul(a, b, flags=_FLAGS)
        return self.builder.fadd(product, total, flags=_FLAGS)

    def loop(
        self, count: Any, start: list[Any], addresses: list[Any], steps: list[Any], body: Any
    ) -> list[Any]:
        """Run `body(addresses, sums) -> sums` `count` times, addresses growing by `steps`; return
        the last sums.
        """
        builder = self.builder
        before = builder.block
        head, inside, after = (
            builder.append_basic_block(name) for name in ("head", "inside", "after")
        )
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
        new_addresses = [
            builder.add(address, step) for address, step in zip(moving, steps, strict=True)
        ]
        end = builder.block
        index.add_incoming(builder.add(index, ir.Constant(self.word, 1)), end)
        for phi, value in zip(moving + sums, new_addresses + new_sums, strict=True):
            phi.add_incoming(value, end)
        builder.branch(head)
        builder.position_at_end(after)
        return sums


def store_totals(
    emit: Emitter, sums: list[Any], n_columns: int, c: Any, c_row: Any, scale: Any = None
) -> None:
    """Store the totals of vectors, `n_columns` in a row, to c[r * c_row + i], times `scale` if
    there is one.
    """
    at_once = max(n_columns, min(len(sums), emit.lanes))
    for start in range(0, len(sums), at_once):
        values = totals(emit, sums[start : start + at_once])
        values = (
            values if scale is None else emit.builder.fmul(values, emit.splat(scale, values.type))
        )
        for i in range(0, at_once, n_columns):
            part = ir.Constant(
                ir.VectorType(ir.IntType(32), n_columns), list(range(i, i + n_columns))
            )
            row = emit.times(c_row, (start + i) // n_columns)
            emit.store(emit.builder.shuffle_vector(values, values, part), emit.address(c, row))


def totals(emit: Emitter, vectors: list[Any]) -> Any:
    """Add up the lanes of each of 1, 2, 4, ... vectors, at most as many as lanes; return the totals
    as one vector.

    Neighbours are added first, then their sums, ..., however many vectors there are: a total has
    the same bits in every size of tile. Two vectors become one while there are two. As long as
    there are, the first rounds stay within 128 bits, since shuffles that do not leave those cost
    least; the others move whole ones.
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
    parts = [
        emit.builder.shuffle_vector(a, a if b is None else b, ir.Constant(index, lanes))
        for lanes in (even, odd)
    ]
    return emit.builder.fadd(*parts)
