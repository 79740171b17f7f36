"""A vector of numbers as a value in compiled code: load it, calculate with it, store it.

Why: left to itself the compiler turns about half of the element-wise loops of a block into vector
code, and that at a half or a quarter of the width. With this type the loops say what they mean:
``store_lanes(a, r, i, load_lanes(b, r, i) * load_lanes(c, r, i))`` works on 64 bytes at once. Everything element-wise
in the kernels is written with it; the products are in `ops.simd.tiles`.

How: `Vector` is a Numba type over an LLVM vector of 16 float32 or 8 float64; each operation below
is an intrinsic of one or a few LLVM instructions. LLVM splits the vectors where registers are
narrower, so this is right on every processor. Multiply and add may fuse, nothing is reordered.

Matrices are C-contiguous scratch arrays whose rows are whole vectors (`lanes` numbers); positions
are not checked.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from racecore.ops.simd.emitter import VECTOR_BYTES
from racecore.runtime.jit import helper, inlined

__all__ = [
    "VECTOR_BYTES",
    "Vector",
    "absolute",
    "add_at",
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
    "load_rounded",
    "load_vector",
    "maximum",
    "power_of_two",
    "scale_add",
    "second_interleaved",
    "select",
    "size_of",
    "splat",
    "splat_ir",
    "store_lanes",
    "store_number",
    "store_vector",
    "tanh_by_lanes",
    "total",
    "widen_add",
]

_FUSE = ("contract",)  # lets multiply and add fuse, and nothing else


class Vector(types.Type):
    """The Numba type of a vector of `element`, float32 or float64."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES // (element.bitwidth // 8)
        super().__init__(name=f"Vector({element})")


class Condition(types.Type):
    """The Numba type of what comparing two vectors gives: a bit per lane."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES // (element.bitwidth // 8)
        super().__init__(name=f"Condition({element})")


def _element(vector: Vector) -> Any:
    return ir.DoubleType() if vector.element == types.float64 else ir.FloatType()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_element(kind), kind.lanes))


@register_model(Condition)
class _ConditionModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Condition) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), kind.lanes))


# Loading and storing
# -------------------------------------------------------------------------------------------------


@intrinsic
def load_vector(typing_context, address, like):
    """Return the vector at an address, of numbers of the type of `like`."""
    kind = Vector(like)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())
        return builder.load(pointer, align=_element(kind).get_abi_size(context.target_data))

    return kind(types.int64, like), code


@intrinsic
def store_vector(typing_context, value, address):
    """Write a vector to an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[1], arguments[0].type.as_pointer())
        builder.store(
            arguments[0],
            pointer,
            align=_element(signature.args[0]).get_abi_size(context.target_data),
        )
        return context.get_dummy_value()

    return types.void(value, types.int64), code


@intrinsic
def load_number(typing_context, address, like):
    """Return the number at an address, of the type of `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], arguments[1].type.as_pointer()))

    return like(types.int64, like), code


@intrinsic
def store_number(typing_context, value, address, like):
    """Write a number to an address, as one of the type of `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.cast(builder, arguments[0], value, like)
        builder.store(number, builder.inttoptr(arguments[1], number.type.as_pointer()))
        return context.get_dummy_value()

    return types.void(value, types.int64, like), code


@intrinsic
def float_of(typing_context, bits):
    """Return the float32 of the lowest 32 bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), code


@intrinsic
def bits_of(typing_context, number):
    """Return the bits of a float32, with its sign."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), code


@intrinsic
def size_of(typing_context, like):
    """Return the bytes of a number of the type of `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(ir.IntType(64), like.bitwidth // 8)

    return types.int64(like), code


@intrinsic
def splat(typing_context, number):
    """Return a vector with the same number in every lane."""
    kind = Vector(number)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat_ir(builder, arguments[0], context.get_value_type(kind))

    return kind(number), code


def splat_ir(builder: Any, number: Any, kind: Any) -> Any:
    """Return LLVM's vector of a kind with the same number in every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return _picked(builder, one, undefined, [0] * kind.count)


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
    """Return the vector that begins at an element."""
    return load_vector(address_of(m, row, column), m.dtype.type(0))


@inlined
def store_lanes(m: Any, row: int, column: int, value: Any) -> None:
    """Write a vector from an element on."""
    store_vector(value, address_of(m, row, column))


@helper
def copy(source: Any, target: Any) -> None:
    """Copy a matrix whose rows are whole vectors."""
    for r in range(source.shape[0]):
        for c in range(0, source.shape[1], lanes(source)):
            store_lanes(target, r, c, load_lanes(source, r, c))


# Arithmetic
# ----------------------------------------------------------------------------------------------------------


def _binary(name: str) -> Any:
    """Return an intrinsic that applies an LLVM instruction lane by lane to two vectors."""

    @intrinsic
    def apply(typing_context, a, b):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments, flags=_FUSE)

        return a(a, b), code

    return apply


_add, _subtract, _multiply, _divide = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


def _overload_operator(function: Any, apply: Any) -> None:
    """Let compiled code write `function` of two vectors as an operator."""

    @overload(function)
    def typed(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: apply(a, b)
        return None


_overload_operator(operator.add, _add)
_overload_operator(operator.sub, _subtract)
_overload_operator(operator.mul, _multiply)
_overload_operator(operator.truediv, _divide)


def _by_intrinsic(name: str, n_arguments: int) -> Any:
    """Return an intrinsic that calls llvm.`name` on vectors."""

    def typed(typing_context, *vectors):
        kind = vectors[0]

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = context.get_value_type(kind)
            full_name = f"llvm.{name}.v{kind.lanes}f{kind.element.bitwidth}"
            signature = ir.FunctionType(value, [value] * n_arguments)
            return builder.call(
                cgutils.get_or_insert_function(builder.module, signature, full_name), arguments
            )

        return kind(*vectors), code

    if n_arguments == 1:
        return intrinsic(lambda typing_context, a: typed(typing_context, a))
    return intrinsic(lambda typing_context, a, b, c: typed(typing_context, a, b, c))


absolute = _by_intrinsic("fabs", 1)
floor = _by_intrinsic("floor", 1)
exp_by_lanes = _by_intrinsic("exp", 1)  # calls the C library's, lane by lane
tanh_by_lanes = _by_intrinsic("tanh", 1)
fma = _by_intrinsic("fma", 3)  # a * b + c, rounded once


@intrinsic
def at_least(typing_context, a, b):
    """Return the lanes where a >= b; false where either is NaN."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fcmp_ordered(">=", *arguments)

    return Condition(a.element)(a, b), code


@intrinsic
def select(typing_context, condition, yes, no):
    """Return `yes` in the lanes of `condition` and `no` in the others."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return yes(condition, yes, no), code


@inlined
def maximum(a: Any, b: Any) -> Any:
    """Return the larger of two, `a` where it is NaN."""
    return select(at_least(b, a), b, a)


@intrinsic
def power_of_two(typing_context, n):
    """Return 2^n of whole numbers -126 <= n <= 127 in a vector of float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = ir.VectorType(ir.IntType(32), n.lanes)
        biased = builder.add(
            builder.fptosi(arguments[0], words), ir.Constant(words, [127] * n.lanes)
        )
        return builder.bitcast(
            builder.shl(biased, ir.Constant(words, [23] * n.lanes)), arguments[0].type
        )

    return n(n), code


# Across lanes and dtypes
# ---------------------------------------------------------------------------------------------


def _picked(builder: Any, a: Any, b: Any, picks: list[int]) -> Any:
    """Return a shuffle of two vectors."""
    return builder.shuffle_vector(
        a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(picks)), picks)
    )


@intrinsic
def total(typing_context, a):
    """Return the sum of all lanes, halves added to halves."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, n = arguments[0], a.lanes
        while n > 1:
            n //= 2
            low, high = (
                _picked(builder, value, value, list(range(first, first + n))) for first in (0, n)
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.element(a), code


@intrinsic
def highest(typing_context, a):
    """Return the largest of all lanes; where lanes are NaN, that or any other of them."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, n = arguments[0], a.lanes
        while n > 1:
            n //= 2
            low, high = (
                _picked(builder, value, value, list(range(first, first + n))) for first in (0, n)
            )
            value = builder.select(builder.fcmp_ordered(">", high, low), high, low)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return a.element(a), code


@intrinsic
def load_rounded(typing_context, address, like):
    """Return the float64 numbers from an address on, rounded to the type of `like`."""
    kind = Vector(like)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.VectorType(ir.DoubleType(), kind.lanes)
        value = builder.load(builder.inttoptr(arguments[0], wide.as_pointer()), align=8)
        return (
            builder.fptrunc(value, context.get_value_type(kind)) if like == types.float32 else value
        )

    return kind(types.int64, like), code


@intrinsic
def widen_add(typing_context, a, address):
    """Add the lanes, as float64, to the float64 numbers from an address on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(ir.DoubleType(), a.lanes)
        pointer = builder.inttoptr(arguments[1], kind.as_pointer())
        wide = builder.fpext(arguments[0], kind) if a.element == types.float32 else arguments[0]
        builder.store(builder.fadd(builder.load(pointer, align=8), wide), pointer, align=8)
        return context.get_dummy_value()

    return types.void(a, types.int64), code


@intrinsic
def scale_add(typing_context, address, past, a, present):
    """Let the float64 numbers from an address on be `past` times what they are, plus `present`
    times the lanes.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, past, value, present = arguments
        kind = ir.VectorType(ir.DoubleType(), a.lanes)
        pointer = builder.inttoptr(address, kind.as_pointer())
        wide = builder.fpext(value, kind) if a.element == types.float32 else value
        old = builder.fmul(
            builder.load(pointer, align=8), splat_ir(builder, past, kind), flags=_FUSE
        )
        new = builder.fmul(wide, splat_ir(builder, present, kind), flags=_FUSE)
        added = builder.fadd(old, new, flags=_FUSE)
        builder.store(added, pointer, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float64, a, types.float64), code


def _interleaved(half: int) -> Any:
    """Return an intrinsic for the first or the second lanes of two vectors: even[0], odd[0],
    even[1], ...
    """

    @intrinsic
    def interleaved(typing_context, even, odd):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            n = even.lanes
            return _picked(
                builder,
                arguments[0],
                arguments[1],
                [n // 2 * half + i // 2 + n * (i % 2) for i in range(n)],
            )

        return even(even, odd), code

    return interleaved


first_interleaved, second_interleaved = _interleaved(0), _interleaved(1)


@intrinsic
def add_at(typing_context, a, address, like):
    """Add the lanes to the numbers of the type of `like` from an address on; return the sums as
    stored, as `a` has them.

    Sums are float64, and rounded once where the numbers are float32.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.VectorType(ir.DoubleType(), a.lanes)
        stored = ir.VectorType(
            ir.DoubleType() if like == types.float64 else ir.FloatType(), a.lanes
        )
        pointer, align = builder.inttoptr(arguments[1], stored.as_pointer()), like.bitwidth // 8

        def widened(value: Any) -> Any:
            return value if value.type == wide else builder.fpext(value, wide)

        value = builder.fadd(widened(builder.load(pointer, align=align)), widened(arguments[0]))
        value = value if stored == wide else builder.fptrunc(value, stored)
        builder.store(value, pointer, align=align)
        target = context.get_value_type(a)
        if value.type == target:
            return value
        return (
            builder.fptrunc(value, target)
            if a.element == types.float32
            else builder.fpext(value, target)
        )

    return a(a, types.int64, like), code
