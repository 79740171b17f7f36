"""The register tile that scores keys: digits of codes look numbers up in registers.

Why: a key has L codes of two digits or more, and every query head asks for an entry of its own
table for each. From memory that is a load per digit, key and head. A table of 16 float32 is one
register, and processors can pick from a register by 16 digits at once. What the tile does is said
in plain Python beside it, and once more in `reference.scores`.

How: as in `ops.simd.tiles`, a factory returns a Numba intrinsic whose body is LLVM code. Where
there is neither AVX-512 nor AVX2, LLVM picks one by one: slow, and right.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.ops.simd.emitter import Emitter
from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.runtime import processor

__all__ = ["norms_of", "score_tile"]

_LANES = 16
_VECTORS = BLOCK_TOKENS // _LANES
_WORDS = ir.VectorType(ir.IntType(32), _LANES)
_INDEX = ir.IntType(32)


def _constant(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * _LANES)


def _codes(builder: Any, address: Any, bits: int = 8) -> list[Any]:
    """Return the 64 integers of a row as vectors of words."""
    kind = ir.VectorType(ir.IntType(bits), _LANES)
    size = _LANES * bits // 8
    loads = []
    for v in range(_VECTORS):
        start = builder.add(address, ir.Constant(ir.IntType(64), v * size))
        loads.append(builder.load(builder.inttoptr(start, kind.as_pointer()), align=1))
    return [builder.zext(value, _WORDS) for value in loads]


def _shifted(builder: Any, words: list[Any], by: Any) -> list[Any]:
    return [builder.lshr(word, by) for word in words]


def _halves(builder: Any, value: Any) -> list[Any]:
    picks = (list(range(8)), list(range(8, 16)))
    return [
        builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_INDEX, 8), pick))
        for pick in picks
    ]


def _lookup(builder: Any, table: Any, digits: Any) -> Any:
    """Return table[digit & 15] for 16 digits; `table` has 16 numbers."""
    if processor.has("avx512f"):
        kind = ir.FunctionType(table.type, [table.type, _WORDS])
        name = "llvm.x86.avx512.permvar.sf.512"
        return builder.call(
            builder.module.globals.get(name) or ir.Function(builder.module, kind, name),
            [table, digits],
        )
    if processor.has("avx2"):
        return _lookup_by_halves(builder, table, digits)
    result = ir.Constant(table.type, ir.Undefined)
    for i in range(_LANES):
        place = ir.Constant(_INDEX, i)
        digit = builder.and_(builder.extract_element(digits, place), ir.Constant(_INDEX, 15))
        result = builder.insert_element(result, builder.extract_element(table, digit), place)
    return result


def _lookup_by_halves(builder: Any, table: Any, digits: Any) -> Any:
    """Do the same where a register holds 8 numbers: look up in both halves of the table, choose by
    the digit's top bit.
    """
    eight, words = ir.VectorType(ir.FloatType(), 8), ir.VectorType(_INDEX, 8)
    name = "llvm.x86.avx2.permps"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(eight, [eight, words]), name
    )
    low, high = _halves(builder, table)
    parts = []
    for part in _halves(builder, digits):
        is_high = builder.icmp_unsigned(
            "!=", builder.and_(part, ir.Constant(words, [8] * 8)), ir.Constant(words, [0] * 8)
        )
        parts.append(
            builder.select(
                is_high, builder.call(function, [high, part]), builder.call(function, [low, part])
            )
        )
    return builder.shuffle_vector(*parts, ir.Constant(_WORDS, list(range(_LANES))))


def norms_of(builder: Any, address: Any) -> list[Any]:
    """Return 64 norms as vectors of float32; see `layout.from_norm16`."""
    vectors = []
    for word in _codes(builder, address, 16):
        bits = builder.add(builder.shl(word, _constant(13)), _constant((127 - 32) << 23))
        bits = builder.select(builder.icmp_unsigned("==", word, _constant(0)), _constant(0), bits)
        vectors.append(builder.bitcast(bits, ir.VectorType(ir.FloatType(), _LANES)))
    return vectors


def score_tile(n_heads: int, n_digits: int, multiplies: bool) -> Any:
    """Return a tile that scores a block of 64 keys for `n_heads` queries. In plain Python::

        for h in range(n_heads):
            for i in range(64):
                total = 0
                for l in range(count):
                    code = codes[64 * l + i]
                    if n_digits > 2:
                        code |= (codes[64 * (count + l * width // 8) + i] >> l * width % 8) << 8
                    worth = [tables[h * table_head + 16 * (l * n_digits + n) + (code >> 4 * n & 15)] for n in range(n_digits)]
                    total += prod(worth) if multiplies else sum(worth)
                out[h * out_head + i] = total * from_norm16(norms[i])

    Digits beyond the `width` bits above a byte may be anything: their tables repeat.
    """

    @intrinsic
    def tile(typing_context, codes, norms, tables, table_head, count, width, out, out_head):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, norms, tables, table_head, count, width, out, out_head = arguments
            emit = Emitter(builder, ir.FloatType())
            word = emit.word

            def above(index: Any) -> list[Any]:
                bit = builder.mul(index, width)
                row = builder.add(count, builder.lshr(bit, ir.Constant(word, 3)))
                shift = builder.trunc(builder.and_(bit, ir.Constant(word, 7)), _INDEX)
                address = builder.add(codes, builder.mul(row, ir.Constant(word, BLOCK_TOKENS)))
                return _shifted(builder, _codes(builder, address), emit.splat(shift, _WORDS))

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                index, totals = sums[0], sums[1:]
                digits = [_codes(builder, addresses[0])]
                digits.append(_shifted(builder, digits[0], _constant(4)))
                if n_digits > 2:
                    digits.append(above(index))
                if n_digits > 3:
                    digits.append(_shifted(builder, digits[2], _constant(4)))
                new = []
                for h in range(n_heads):
                    start = emit.address(addresses[1], emit.times(table_head, h))
                    table = [
                        emit.load(emit.address(start, n * _LANES), emit.vector)
                        for n in range(n_digits)
                    ]
                    for v in range(_VECTORS):
                        worth = [_lookup(builder, table[n], digits[n][v]) for n in range(n_digits)]
                        new.append(_joined(emit, worth, totals[h * _VECTORS + v], multiplies))
                return [builder.add(index, ir.Constant(word, 1)), *new]

            zero = ir.Constant(emit.vector, [0.0] * _LANES)
            start = [ir.Constant(word, 0)] + [zero] * (n_heads * _VECTORS)
            steps = [ir.Constant(word, BLOCK_TOKENS), ir.Constant(word, n_digits * _LANES * 4)]
            _, *totals = emit.loop(count, start, [codes, tables], steps, step)
            norm = norms_of(builder, norms)
            for h in range(n_heads):
                for v in range(_VECTORS):
                    place = emit.address(out, emit.times(out_head, h), v * _LANES)
                    emit.store(builder.fmul(totals[h * _VECTORS + v], norm[v]), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), code

    return tile


def _joined(emit: Emitter, worth: list[Any], total: Any, multiplies: bool) -> Any:
    """Return the total with the digits of one more table."""
    *first, last = worth
    value = first[0]
    for more in first[1:]:
        value = emit.builder.fmul(value, more) if multiplies else emit.builder.fadd(value, more)
    if multiplies:
        return emit.fma(value, last, total)
    return emit.builder.fadd(total, emit.builder.fadd(value, last))
