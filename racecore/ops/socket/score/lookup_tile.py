"""The register tile that scores keys: digits of codes look numbers up in registers.

Why: a key has L codes of two digits or more, and every query head looks up an entry of its own
table for each. From memory that is a load per digit, key and head. A table of 16 float32 is one
register, and processors can pick from a register by 16 digits at once. The plain Python of the tile
stands beside it, and once more in `reference.scores`.

How: as in `ops.simd.tiles`, a factory returns a Numba intrinsic whose body is LLVM code. Where
there is neither AVX-512 nor AVX2, LLVM picks one by one: slow, and right.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from racecore.ops.simd.emitter import Emitter, codegen
from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.runtime import processor

__all__ = ["norms_of", "score_tile"]

_LANES = 16  # float32 of a vector; digits have 4 bits, so a table of a digit is one vector
_VECTORS = BLOCK_TOKENS // _LANES
_INDEX = ir.IntType(32)
_WORDS = ir.VectorType(_INDEX, _LANES)


def _constant(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * _LANES)


def _codes(emit: Emitter, address: Any, bits: int = 8) -> list[Any]:
    """Return the 64 integers of a row, of so many bits, as 4 vectors of words."""
    kind = ir.VectorType(ir.IntType(bits), _LANES)
    size = _LANES * bits // 8
    loads = []
    for v in range(_VECTORS):
        start = emit.builder.add(address, emit.constant(v * size))
        loads.append(emit.load(start, kind, align=1))
    return [emit.builder.zext(value, _WORDS) for value in loads]


def _shifted(emit: Emitter, words: list[Any], by: Any) -> list[Any]:
    return [emit.builder.lshr(word, by) for word in words]


def _lookup(emit: Emitter, table: Any, digits: Any) -> Any:
    """Return table[digit & 15] for 16 digits; `table` has 16 numbers."""
    builder = emit.builder
    if processor.has("avx512f"):
        return emit.call("llvm.x86.avx512.permvar.sf.512", table.type, [table, digits])
    if processor.has("avx2"):
        return _lookup_by_halves(emit, table, digits)
    # no table lookup in registers: one lane after the other
    result = ir.Constant(table.type, ir.Undefined)
    for i in range(_LANES):
        lane = ir.Constant(_INDEX, i)
        digit = builder.and_(builder.extract_element(digits, lane), ir.Constant(_INDEX, 15))
        result = builder.insert_element(result, builder.extract_element(table, digit), lane)
    return result


def _lookup_by_halves(emit: Emitter, table: Any, digits: Any) -> Any:
    """Return the same with registers of 8 numbers: look up in both halves of the table, choose by
    the digit's top bit.
    """
    builder = emit.builder
    eight, words = ir.VectorType(ir.FloatType(), 8), ir.VectorType(_INDEX, 8)
    low, high = _halves(emit, table)
    parts = []
    for part in _halves(emit, digits):
        top_bit = builder.and_(part, ir.Constant(words, [8] * 8))
        is_high = builder.icmp_unsigned("!=", top_bit, ir.Constant(words, [0] * 8))
        # permps reads the lowest three bits of an index, so the top one need not be cleared
        from_high, from_low = (
            emit.call("llvm.x86.avx2.permps", eight, [half, part]) for half in (high, low)
        )
        parts.append(builder.select(is_high, from_high, from_low))
    return emit.shuffle(parts[0], parts[1], range(_LANES))


def _halves(emit: Emitter, value: Any) -> list[Any]:
    return [emit.shuffle(value, value, range(first, first + 8)) for first in (0, 8)]


def norms_of(emit: Emitter, address: Any) -> list[Any]:
    """Return 64 norms as vectors of float32; see `layout.from_norm16`."""
    builder = emit.builder
    vectors = []
    for word in _codes(emit, address, 16):
        # 6 bits of exponent and 10 of fraction, moved to where a float32 has them; 32 is the bias
        bits = builder.add(builder.shl(word, _constant(13)), _constant((127 - 32) << 23))
        bits = builder.select(builder.icmp_unsigned("==", word, _constant(0)), _constant(0), bits)
        vectors.append(builder.bitcast(bits, emit.vector))
    return vectors


def score_tile(n_heads: int, n_digits: int, multiplies: bool) -> Any:
    """Return a tile that scores a block of 64 keys for `n_heads` queries. In plain Python::

        for h in range(n_heads):
            for i in range(64):
                total = 0
                for l in range(count):
                    code = codes[64 * l + i]
                    if n_digits > 2:
                        above = codes[64 * (count + l * width // 8) + i]
                        code |= (above >> l * width % 8) << 8
                    table = tables[h * table_head + 16 * l * n_digits :]
                    numbers = [table[16 * n + (code >> 4 * n & 15)] for n in range(n_digits)]
                    total += prod(numbers) if multiplies else sum(numbers)
                out[h * out_head + i] = total * from_norm16(norms[i])

    Digits beyond the `width` bits above a byte may be anything: their tables repeat.
    """
    operation = "product" if multiplies else "sum"

    @codegen(name=f"score_{n_heads}_heads_{n_digits}_digits_{operation}")
    def tile(
        emit: Emitter,
        codes: Any,
        norms: Any,
        tables: Any,
        table_head: Any,
        count: Any,
        width: Any,
        out: Any,
        out_head: Any,
    ) -> None:
        builder = emit.builder

        def codes_above(index: Any) -> list[Any]:
            """Return the bits above the lowest byte of a table's codes: `width` bits a table, table
            after table, in rows of a byte a key.
            """
            bit = builder.mul(index, width)
            row = builder.add(count, builder.lshr(bit, emit.constant(3)))
            shift = builder.trunc(builder.and_(bit, emit.constant(7)), _INDEX)
            address = builder.add(codes, builder.mul(row, emit.constant(BLOCK_TOKENS)))
            return _shifted(emit, _codes(emit, address), emit.splat(shift, _WORDS))

        def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
            index, totals = sums[0], sums[1:]
            # digits[n][v]: of 16 keys, in the lowest four bits of words; what is above is ignored
            digits = [_codes(emit, addresses[0])]
            digits.append(_shifted(emit, digits[0], _constant(4)))
            if n_digits > 2:
                digits.append(codes_above(index))
            if n_digits > 3:
                digits.append(_shifted(emit, digits[2], _constant(4)))
            new = []  # [n_heads, 4] vectors of 16 keys
            # digits are prepared once for all heads
            for h in range(n_heads):
                start = emit.address(addresses[1], emit.times(table_head, h))
                table = [
                    emit.load(emit.address(start, n * _LANES), emit.vector) for n in range(n_digits)
                ]
                for v in range(_VECTORS):
                    numbers = [_lookup(emit, table[n], digits[n][v]) for n in range(n_digits)]
                    new.append(_added(emit, numbers, totals[h * _VECTORS + v], multiplies))
            return [builder.add(index, emit.constant(1)), *new]

        start = [emit.constant(0)] + [emit.zeros()] * (n_heads * _VECTORS)
        steps = [emit.constant(BLOCK_TOKENS), emit.constant(n_digits * _LANES * 4)]
        _, *totals = emit.loop(count, start, [codes, tables], steps, step)
        norm = norms_of(emit, norms)
        for h in range(n_heads):
            for v in range(_VECTORS):
                target = emit.address(out, emit.times(out_head, h), v * _LANES)
                emit.store(builder.fmul(totals[h * _VECTORS + v], norm[v]), target)

    return tile


def _added(emit: Emitter, numbers: list[Any], total: Any, multiplies: bool) -> Any:
    """Return the total plus the product or the sum of the numbers of a table's digits."""
    *first, last = numbers
    value = first[0]
    for more in first[1:]:
        value = emit.builder.fmul(value, more) if multiplies else emit.builder.fadd(value, more)
    if multiplies:
        return emit.fma(value, last, total)
    return emit.builder.fadd(total, emit.builder.fadd(value, last))
