"""A vector of numbers as a value in compiled code: load it, calculate with it, store it.

Why: left to itself the compiler turns about half of the element-wise loops of a block into vector
code, and that at a half or a quarter of the width. With this type the loops say what they mean:
``store_lanes(a, r, i, load_lanes(b, r, i) * load_lanes(c, r, i))`` works on 64 bytes at once.
Everything element-wise in the kernels is written with it; the products are in `ops.simd.tiles`, the
float64 sums of states in `ops.simd.accumulators`.

How: `Vector` is a Numba type over an LLVM vector of 16 float32 or 8 float64; each operation below
is an intrinsic of one or a few LLVM instructions. LLVM splits the vectors where registers are
smaller, so this is right on every processor. Multiply and add may fuse, nothing is reordered.

Matrices are C-contiguous scratch arrays whose rows are whole vectors (`lanes` numbers); indices are
not checked.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.datamodel import models
from numba.extending import overload, register_model

from racecore.ops.simd.emitter import VECTOR_BYTES, Emitter, codegen
from racecore.runtime.jit import helper, inlined

__all__ = [
    "VECTOR_BYTES",
    "Condition",
    "Vector",
    "absolute",
    "address_of",
    "at_least",
    "bits_of",
    "copy",
    "exp_by_lanes",
    "first_interleaved",
    "float_of",
    "floor",
    "fma",
    "highest",
    "lanes",
    "load_lanes",
    "load_number",
    "load_vector",
    "maximum",
    "power_of_two",
    "second_interleaved",
    "select",
    "size_of",
    "splat",
    "store_lanes",
    "store_number",
    "store_vector",
    "tanh_by_lanes",
    "total",
]

_FUSE = ("contract",)  # multiply and add may fuse; no other freedom with the bits


class Vector(types.Type):
    """The Numba type of a vector of `element`, float32 or float64."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES // (element.bitwidth // 8)
        super().__init__(name=f"Vector({element})")


class Condition(types.Type):
    """The Numba type of a comparison of two vectors of `element`: a bit per lane."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES // (element.bitwidth // 8)
        super().__init__(name=f"Condition({element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        element = ir.DoubleType() if kind.element == types.float64 else ir.FloatType()
        super().__init__(manager, kind, ir.VectorType(element, kind.lanes))


@register_model(Condition)
class _ConditionModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Condition) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


# Loads and stores
# -------------------------------------------------------------------------------------------------
# Addresses need only the alignment of an element: rows of callers begin anywhere.


@codegen(lambda like: Vector(like))
def load_vector(emit: Emitter, address: Any, like: Any) -> Any:
    """Return the vector at an address, of numbers of the type of `like`."""
    return emit.load(address, emit.vector)


@codegen(value=Vector)
def store_vector(emit: Emitter, value: Any, address: Any) -> None:
    """Write a vector to an address."""
    emit.store(value, address)


@codegen(lambda like: like)
def load_number(emit: Emitter, address: Any, like: Any) -> Any:
    """Return the number at an address, of the type of `like`."""
    return emit.load(address, like.type)


@codegen(value=types.Number)
def store_number(emit: Emitter, value: Any, address: Any, like: Any) -> None:
    """Write a number to an address, cast to the type of `like`."""
    emit.store(emit.cast(value, emit.types["value"], emit.types["like"]), address)


@codegen(types.float32)
def float_of(emit: Emitter, bits: Any) -> Any:
    """Return the float32 of the lowest 32 bits."""
    return emit.builder.bitcast(emit.builder.trunc(bits, ir.IntType(32)), ir.FloatType())


@codegen(types.int64, number=types.float32)
def bits_of(emit: Emitter, number: Any) -> Any:
    """Return the bits of a float32 as an int64 of the same sign."""
    return emit.builder.sext(emit.builder.bitcast(number, ir.IntType(32)), emit.word)


@codegen(types.int64)
def size_of(emit: Emitter, like: Any) -> Any:
    """Return the bytes of a number of the type of `like`."""
    return emit.constant(emit.size)


@codegen(lambda number: Vector(number), number=types.Float)
def splat(emit: Emitter, number: Any) -> Any:
    """Broadcast a number to all lanes of a vector."""
    return emit.splat(number)


@inlined
def lanes(m: Any) -> int:
    """Return how many numbers of the dtype of an array a vector holds."""
    return VECTOR_BYTES // m.itemsize


@inlined
def address_of(m: Any, row: int, column: int) -> int:
    """Return the address of an element of a C-contiguous matrix."""
    return m.ctypes.data + m.itemsize * (row * m.shape[1] + column)


@inlined
def load_lanes(m: Any, row: int, column: int) -> Any:
    """Return the vector m[row, column : column + lanes]."""
    return load_vector(address_of(m, row, column), m.dtype.type(0))


@inlined
def store_lanes(m: Any, row: int, column: int, value: Any) -> None:
    """m[row, column : column + lanes] = value, a vector."""
    store_vector(value, address_of(m, row, column))


@helper
def copy(source: Any, target: Any) -> None:
    """Copy a matrix whose rows are whole vectors."""
    for r in range(source.shape[0]):
        for c in range(0, source.shape[1], lanes(source)):
            store_lanes(target, r, c, load_lanes(source, r, c))


# Arithmetic
# -------------------------------------------------------------------------------------------------


def _binary(instruction: str) -> Any:
    """Return an intrinsic that applies an LLVM instruction lane by lane to two vectors."""

    @codegen(lambda a: a, name=instruction, a=Vector, b=Vector)
    def apply(emit: Emitter, a: Any, b: Any) -> Any:
        return getattr(emit.builder, instruction)(a, b, flags=_FUSE)

    return apply


def _overload_operator(function: Any, apply: Any) -> None:
    """Let compiled code write `function` of two vectors as an operator."""

    @overload(function)
    def typed(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: apply(a, b)
        return None


_overload_operator(operator.add, _binary("fadd"))
_overload_operator(operator.sub, _binary("fsub"))
_overload_operator(operator.mul, _binary("fmul"))
_overload_operator(operator.truediv, _binary("fdiv"))


def _of_each_lane(name: str) -> Any:
    """Return an intrinsic that calls llvm.`name` on a vector."""

    @codegen(lambda a: a, name=name, a=Vector)
    def apply(emit: Emitter, a: Any) -> Any:
        return emit.call(_full_name(emit, name), a.type, [a])

    return apply


def _full_name(emit: Emitter, name: str) -> str:
    return f"llvm.{name}.v{emit.lanes}f{8 * emit.size}"


absolute = _of_each_lane("fabs")
floor = _of_each_lane("floor")
exp_by_lanes = _of_each_lane("exp")  # calls the C library's, lane by lane
tanh_by_lanes = _of_each_lane("tanh")


@codegen(lambda a: a, a=Vector, b=Vector, c=Vector)
def fma(emit: Emitter, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once on every processor."""
    return emit.call(_full_name(emit, "fma"), a.type, [a, b, c])


@codegen(lambda a: Condition(a.element), a=Vector, b=Vector)
def at_least(emit: Emitter, a: Any, b: Any) -> Any:
    """Return a >= b for each lane; false where either is NaN."""
    return emit.builder.fcmp_ordered(">=", a, b)


@codegen(lambda yes: yes, condition=Condition, yes=Vector, no=Vector)
def select(emit: Emitter, condition: Any, yes: Any, no: Any) -> Any:
    """Return the lanes of `yes` where the condition is true and those of `no` elsewhere."""
    return emit.builder.select(condition, yes, no)


@inlined
def maximum(a: Any, b: Any) -> Any:
    """Return the larger of two, `a` where it is NaN."""
    return select(at_least(b, a), b, a)


@codegen(lambda n: n, n=Vector)
def power_of_two(emit: Emitter, n: Any) -> Any:
    """Return 2^n of whole numbers -126 <= n <= 127 in a vector of float32."""
    words = ir.VectorType(ir.IntType(32), n.type.count)
    # a float32 is 2^(exponent - 127), with the exponent from bit 23 on
    bias, shift = (ir.Constant(words, [number] * n.type.count) for number in (127, 23))
    biased = emit.builder.add(emit.builder.fptosi(n, words), bias)
    return emit.builder.bitcast(emit.builder.shl(biased, shift), n.type)


# Across lanes
# -------------------------------------------------------------------------------------------------


def _reduced(emit: Emitter, value: Any, combine: Any) -> Any:
    """Return one number of a vector: its halves combined, then halves of that, ..., so that the
    order of the operations is the same on every processor.
    """
    n = value.type.count
    while n > 1:
        n //= 2
        low, high = (emit.shuffle(value, value, range(first, first + n)) for first in (0, n))
        value = combine(low, high)
    return emit.builder.extract_element(value, ir.Constant(ir.IntType(32), 0))


@codegen(lambda a: a.element, a=Vector)
def total(emit: Emitter, a: Any) -> Any:
    """Return the sum of all lanes."""
    return _reduced(emit, a, emit.builder.fadd)


@codegen(lambda a: a.element, a=Vector)
def highest(emit: Emitter, a: Any) -> Any:
    """Return the largest of all lanes; where lanes are NaN, that or any other of them."""

    def larger(low: Any, high: Any) -> Any:
        is_higher = emit.builder.fcmp_ordered(">", high, low)
        return emit.builder.select(is_higher, high, low)

    return _reduced(emit, a, larger)


def _interleaved(name: str, half: int) -> Any:
    """Return an intrinsic for a half of even[0], odd[0], even[1], odd[1], ..., two vectors long."""

    @codegen(lambda even: even, name=name, even=Vector, odd=Vector)
    def interleaved(emit: Emitter, even: Any, odd: Any) -> Any:
        n = even.type.count
        picks = [n // 2 * half + i // 2 + n * (i % 2) for i in range(n)]
        return emit.shuffle(even, odd, picks)

    return interleaved


first_interleaved = _interleaved("first_interleaved", 0)
second_interleaved = _interleaved("second_interleaved", 1)
