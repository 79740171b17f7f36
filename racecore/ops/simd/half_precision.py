"""The 16-bit formats: float16 and bfloat16 to float32 and back, as vectors and one by one.

Widening is exact; narrowing rounds to nearest, ties to even. Integer operations do both, so this
needs no special instructions and no rounding mode. The plain twin is `array.astype`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.ops.simd.vectors import Vector
from racecore.runtime import processor

__all__ = [
    "LANES",
    "from_bfloat16",
    "from_half",
    "has_subnormal",
    "load_bfloat16",
    "load_half",
    "load_widened",
    "load_widened_pairs",
    "round_pair_to_bfloat16",
    "store_bfloat16",
    "store_half",
    "to_bfloat16",
    "to_half",
]

LANES = 16  # numbers that a vector operation of this module converts


class _Words:
    """LLVM code on 32-bit words, `n` of them at once."""

    def __init__(self, builder: Any, n: int) -> None:
        self.builder = builder
        self.n = n
        self.words = ir.VectorType(ir.IntType(32), n)
        self.halves = ir.VectorType(ir.IntType(16), n)
        self.floats = ir.VectorType(ir.FloatType(), n)

    def constant(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.n)

    def real(self, value: float) -> Any:
        return ir.Constant(self.floats, [float(np.float32(value))] * self.n)

    def both(self, a: Any, mask: int) -> Any:
        return self.builder.and_(a, self.constant(mask))

    def above(self, a: Any, limit: int) -> Any:
        return self.builder.icmp_unsigned(">", a, self.constant(limit))

    def right(self, a: Any, bits: int) -> Any:
        return self.builder.lshr(a, self.constant(bits))

    def left(self, a: Any, bits: int) -> Any:
        return self.builder.shl(a, self.constant(bits))

    def plus(self, a: Any, value: int) -> Any:
        return self.builder.add(a, self.constant(value & 0xFFFFFFFF))

    def as_float(self, a: Any) -> Any:
        return self.builder.bitcast(a, self.floats)

    def as_words(self, a: Any) -> Any:
        return self.builder.bitcast(a, self.words)


def has_subnormal(builder: Any, vectors: list[Any]) -> Any | None:
    """Return LLVM code for whether any float32 of some vectors is subnormal; None unless
    `round_pair_to_bfloat16` has its instruction.
    """
    if not processor.has("avx512bf16"):
        return None
    kind = ir.FunctionType(ir.IntType(16), [vectors[0].type])
    masks = [
        builder.asm(kind, "vfpclassps $$0x20, $1, $0", "=k,v", [vector], False)
        for vector in vectors
    ]
    found = masks[0]
    for mask in masks[1:]:
        found = builder.or_(found, mask)
    return builder.icmp_unsigned("!=", found, ir.Constant(ir.IntType(16), 0))


def round_pair_to_bfloat16(builder: Any, first: Any, second: Any, by_instruction: bool) -> Any:
    """Return LLVM code for two vectors of float32 rounded to bfloat16: the bits of 32 numbers, a
    whole cache line.

    The one instruction for it, AVX512-BF16, takes subnormal numbers for zero.
    """
    w = _Words(builder, LANES)
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    if by_instruction:
        kind = ir.FunctionType(halves, [w.floats, w.floats])
        return builder.asm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [first, second], False)
    high = [
        builder.bitcast(_round_bfloat16(w, w.as_words(value)), halves) for value in (first, second)
    ]
    index = ir.VectorType(ir.IntType(32), 2 * LANES)
    return builder.shuffle_vector(*high, ir.Constant(index, list(range(1, 4 * LANES, 2))))


def _widen_bfloat16(w: _Words, bits: Any) -> Any:
    return w.as_float(w.left(bits, 16))


def load_widened(builder: Any, address: Any, widen: Any = _widen_bfloat16) -> Any:
    """Return LLVM code for 16 numbers from an address on, bfloat16 if nothing else is said, as
    float32.
    """
    w = _Words(builder, LANES)
    bits = builder.load(builder.inttoptr(address, w.halves.as_pointer()), align=2)
    return widen(w, builder.zext(bits, w.words))


def load_widened_pairs(builder: Any, address: Any) -> tuple[Any, Any]:
    """Return LLVM code for 32 bfloat16 numbers from an address on, as two vectors of float32: those
    of even places, then the odd.

    So a whole cache line takes two instructions; to keep the order of the numbers would take four.
    """
    w = _Words(builder, LANES)
    bits = builder.load(builder.inttoptr(address, w.words.as_pointer()), align=2)
    return _widen_bfloat16(w, bits), w.as_float(w.both(bits, 0xFFFF0000))


def _widen_half(w: _Words, bits: Any) -> Any:
    size = w.left(w.both(bits, 0x7FFF), 13)
    value = w.builder.fmul(w.as_float(size), w.real(2.0**112))  # moves the exponent's bias; exact
    special = w.above(w.both(bits, 0x7C00), 0x7BFF)  # infinity and NaN
    value = w.builder.select(
        special, w.builder.or_(size, w.constant(0x7F800000)), w.as_words(value)
    )
    return w.as_float(w.builder.or_(value, w.left(w.both(bits, 0x8000), 16)))


def _round_bfloat16(w: _Words, bits: Any) -> Any:
    """Return words whose upper halves are the bfloat16 numbers."""
    odd = w.both(w.right(bits, 16), 1)
    rounded = w.builder.add(w.plus(bits, 0x7FFF), odd)
    quiet = w.builder.or_(bits, w.constant(0x400000))
    value = w.as_float(bits)
    return w.builder.select(w.builder.fcmp_unordered("uno", value, value), quiet, rounded)


def _round_to_bfloat16_bits(w: _Words, bits: Any) -> Any:
    return w.right(_round_bfloat16(w, bits), 16)


def _round_to_half_bits(w: _Words, bits: Any) -> Any:
    size = w.both(bits, 0x7FFFFFFF)
    odd = w.both(w.right(size, 13), 1)
    normal = w.right(w.builder.add(w.plus(size, 0xFFF - 0x38000000), odd), 13)
    # below 2^-14: adding 0.5 rounds at the last bit of a subnormal half
    small = w.plus(w.as_words(w.builder.fadd(w.as_float(size), w.real(0.5))), -0x3F000000)
    result = w.builder.select(w.above(size, 0x387FFFFF), normal, small)
    result = w.builder.select(
        w.above(size, 0x477FEFFF), w.constant(0x7C00), result
    )  # from 65,520 on: infinity
    result = w.builder.select(w.above(size, 0x7F800000), w.constant(0x7E00), result)  # NaN
    return w.builder.or_(result, w.both(w.right(bits, 16), 0x8000))


def _loading(widen: Any) -> Any:
    """Return an intrinsic that widens the 16 numbers from an address on."""

    @intrinsic
    def load(typing_context, address):
        kind = Vector(types.float32)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return load_widened(builder, arguments[0], widen)

        return kind(types.int64), code

    return load


def _storing(is_bfloat16: Any) -> Any:
    """Return an intrinsic that narrows the 16 numbers of a vector of float32 and writes them from
    an address on.
    """

    @intrinsic
    def store(typing_context, value, address):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w = _Words(builder, LANES)
            bits = builder.trunc(is_bfloat16(w, w.as_words(arguments[0])), w.halves)
            builder.store(bits, builder.inttoptr(arguments[1], w.halves.as_pointer()), align=2)
            return context.get_dummy_value()

        return types.void(value, types.int64), code

    return store


def _loading_one(widen: Any) -> Any:
    """Return an intrinsic that widens one number, given as its bits."""

    @intrinsic
    def load(typing_context, bits):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w = _Words(builder, 1)
            word = builder.insert_element(
                ir.Constant(w.words, ir.Undefined),
                builder.zext(arguments[0], ir.IntType(32)),
                ir.Constant(ir.IntType(32), 0),
            )
            return builder.extract_element(widen(w, word), ir.Constant(ir.IntType(32), 0))

        return types.float32(types.uint16), code

    return load


def _storing_one(is_bfloat16: Any) -> Any:
    """Return an intrinsic that narrows one float32 to the bits of a 16-bit number."""

    @intrinsic
    def store(typing_context, value):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w = _Words(builder, 1)
            one = builder.insert_element(
                ir.Constant(w.floats, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0)
            )
            bits = builder.extract_element(
                is_bfloat16(w, w.as_words(one)), ir.Constant(ir.IntType(32), 0)
            )
            return builder.trunc(bits, ir.IntType(16))

        return types.uint16(types.float32), code

    return store


load_half, load_bfloat16 = _loading(_widen_half), _loading(_widen_bfloat16)
store_half, store_bfloat16 = _storing(_round_to_half_bits), _storing(_round_to_bfloat16_bits)
from_half, from_bfloat16 = _loading_one(_widen_half), _loading_one(_widen_bfloat16)
to_half, to_bfloat16 = _storing_one(_round_to_half_bits), _storing_one(_round_to_bfloat16_bits)
