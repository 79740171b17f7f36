"""Half precision, float16 and bfloat16: widened to float32 and rounded from it, as vectors and one
by one.

Widening is exact; rounding is to nearest, ties to even. Integer operations do both, so this needs
no special instructions and no rounding mode. The plain twin is `array.astype`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from racecore.ops.simd.emitter import Emitter, codegen
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

LANES = 16  # numbers that a vector operation of this module converts: a vector of float32


class _Words:
    """LLVM code on vectors of `n` 32-bit words, the bits of float32 numbers."""

    def __init__(self, emit: Emitter, n: int = LANES) -> None:
        self.builder = emit.builder
        self.n = n
        self.words = ir.VectorType(ir.IntType(32), n)
        self.halves = ir.VectorType(ir.IntType(16), n)
        self.floats = ir.VectorType(ir.FloatType(), n)

    def constant(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.n)

    def real(self, value: float) -> Any:
        return ir.Constant(self.floats, [float(np.float32(value))] * self.n)

    def masked(self, a: Any, mask: int) -> Any:
        return self.builder.and_(a, self.constant(mask))

    def above(self, a: Any, threshold: int) -> Any:
        return self.builder.icmp_unsigned(">", a, self.constant(threshold))

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


def has_subnormal(emit: Emitter, vectors: list[Any]) -> Any | None:
    """Return LLVM code for whether any float32 of some vectors is subnormal; None unless
    `round_pair_to_bfloat16` has its instruction.
    """
    if not processor.has("avx512bf16"):
        return None
    kind = ir.FunctionType(ir.IntType(16), [vectors[0].type])
    masks = [
        # 0x20: the class of subnormal numbers
        emit.builder.asm(kind, "vfpclassps $$0x20, $1, $0", "=k,v", [vector], False)
        for vector in vectors
    ]
    found = masks[0]
    for mask in masks[1:]:
        found = emit.builder.or_(found, mask)
    return emit.builder.icmp_unsigned("!=", found, ir.Constant(ir.IntType(16), 0))


def round_pair_to_bfloat16(emit: Emitter, first: Any, second: Any, by_instruction: bool) -> Any:
    """Return LLVM code for two vectors of float32 rounded to bfloat16: the bits of 32 numbers, a
    whole cache line.

    The one instruction for it, AVX512-BF16, takes subnormal numbers for zero.
    """
    w = _Words(emit)
    halves = ir.VectorType(ir.IntType(16), 2 * LANES)
    if by_instruction:
        kind = ir.FunctionType(halves, [w.floats, w.floats])
        return emit.builder.asm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [first, second], False)
    first, second = (
        emit.builder.bitcast(_round_bfloat16(w, w.as_words(value)), halves)
        for value in (first, second)
    )
    # little-endian: the upper halves of the words are the odd ones of the halves
    return emit.shuffle(first, second, range(1, 4 * LANES, 2))


def _widen_bfloat16(w: _Words, bits: Any) -> Any:
    """Return float32 numbers of words whose lower halves are bfloat16: its bits are the upper half
    of a float32.
    """
    return w.as_float(w.left(bits, 16))


def load_widened(emit: Emitter, address: Any, widen: Any = _widen_bfloat16) -> Any:
    """Return LLVM code for the 16 numbers from an address on as float32, bfloat16 by default."""
    w = _Words(emit)
    bits = emit.load(address, w.halves, align=2)
    return widen(w, emit.builder.zext(bits, w.words))


def load_widened_pairs(emit: Emitter, address: Any) -> tuple[Any, Any]:
    """Return LLVM code for the 32 bfloat16 numbers from an address on, as two vectors of float32:
    those at even positions, then the odd.

    So a whole cache line takes two instructions; to keep the order of the numbers would take four.
    """
    w = _Words(emit)
    bits = emit.load(address, w.words, align=2)
    return _widen_bfloat16(w, bits), w.as_float(w.masked(bits, 0xFFFF0000))


def _widen_half(w: _Words, bits: Any) -> Any:
    """Return float32 numbers of words whose lower halves are float16."""
    # exponent and fraction to their places in a float32; the product moves the exponent's bias,
    # exactly, and makes normal numbers of subnormal ones
    size = w.left(w.masked(bits, 0x7FFF), 13)
    value = w.builder.fmul(w.as_float(size), w.real(2.0**112))
    special = w.above(w.masked(bits, 0x7C00), 0x7BFF)  # infinity and NaN
    value = w.builder.select(
        special, w.builder.or_(size, w.constant(0x7F800000)), w.as_words(value)
    )
    sign = w.left(w.masked(bits, 0x8000), 16)
    return w.as_float(w.builder.or_(value, sign))


def _round_bfloat16(w: _Words, bits: Any) -> Any:
    """Return words whose upper halves are the float32 numbers of `bits`, rounded to bfloat16."""
    # adding half of the last bit kept, less one if that bit is even, carries to nearest even
    odd = w.masked(w.right(bits, 16), 1)
    rounded = w.builder.add(w.plus(bits, 0x7FFF), odd)
    quiet = w.builder.or_(bits, w.constant(0x400000))  # a carry could make infinity of a NaN
    value = w.as_float(bits)
    return w.builder.select(w.builder.fcmp_unordered("uno", value, value), quiet, rounded)


def _round_to_bfloat16_bits(w: _Words, bits: Any) -> Any:
    return w.right(_round_bfloat16(w, bits), 16)


def _round_to_half_bits(w: _Words, bits: Any) -> Any:
    """Return words whose lower halves are the float32 numbers of `bits`, rounded to float16."""
    size = w.masked(bits, 0x7FFFFFFF)
    odd = w.masked(w.right(size, 13), 1)
    # 13 bits fewer of the fraction; 0x38000000 is 112, the difference of the biases, as exponent
    normal = w.right(w.builder.add(w.plus(size, 0xFFF - 0x38000000), odd), 13)
    # below 2^-14: adding 0.5 rounds at the last bit of a subnormal half
    small = w.plus(w.as_words(w.builder.fadd(w.as_float(size), w.real(0.5))), -0x3F000000)
    result = w.builder.select(w.above(size, 0x387FFFFF), normal, small)
    # from 65,520 on: infinity
    result = w.builder.select(w.above(size, 0x477FEFFF), w.constant(0x7C00), result)
    result = w.builder.select(w.above(size, 0x7F800000), w.constant(0x7E00), result)  # NaN
    return w.builder.or_(result, w.masked(w.right(bits, 16), 0x8000))


def _load(name: str, widen: Any) -> Any:
    """Return an intrinsic that loads and widens the 16 numbers from an address on."""

    @codegen(Vector(types.float32), name=name)
    def load(emit: Emitter, address: Any) -> Any:
        return load_widened(emit, address, widen)

    return load


def _store(name: str, round_to_bits: Any) -> Any:
    """Return an intrinsic that rounds a vector of float32 and writes its 16 numbers to an
    address.
    """

    @codegen(name=name, value=Vector(types.float32))
    def store(emit: Emitter, value: Any, address: Any) -> None:
        w = _Words(emit)
        bits = emit.builder.trunc(round_to_bits(w, w.as_words(value)), w.halves)
        emit.store(bits, address, align=2)

    return store


def _from_bits(name: str, widen: Any) -> Any:
    """Return an intrinsic that widens one number, given as its bits."""

    @codegen(types.float32, name=name, bits=types.uint16)
    def from_bits(emit: Emitter, bits: Any) -> Any:
        w = _Words(emit, 1)
        word = _one_lane(emit, w.words, emit.builder.zext(bits, ir.IntType(32)))
        return _first_lane(emit, widen(w, word))

    return from_bits


def _to_bits(name: str, round_to_bits: Any) -> Any:
    """Return an intrinsic that rounds one float32 to the bits of a 16-bit number."""

    @codegen(types.uint16, name=name, number=types.float32)
    def to_bits(emit: Emitter, number: Any) -> Any:
        w = _Words(emit, 1)
        word = w.as_words(_one_lane(emit, w.floats, number))
        return emit.builder.trunc(_first_lane(emit, round_to_bits(w, word)), ir.IntType(16))

    return to_bits


def _one_lane(emit: Emitter, kind: Any, number: Any) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    return emit.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))


def _first_lane(emit: Emitter, vector: Any) -> Any:
    return emit.builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


load_half = _load("load_half", _widen_half)
load_bfloat16 = _load("load_bfloat16", _widen_bfloat16)
store_half = _store("store_half", _round_to_half_bits)
store_bfloat16 = _store("store_bfloat16", _round_to_bfloat16_bits)
from_half = _from_bits("from_half", _widen_half)
from_bfloat16 = _from_bits("from_bfloat16", _widen_bfloat16)
to_half = _to_bits("to_half", _round_to_half_bits)
to_bfloat16 = _to_bits("to_bfloat16", _round_to_bfloat16_bits)
