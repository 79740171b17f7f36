"""float64 numbers in memory that vectors are added to or scaled from: sums of states, of softmaxes.

Why: sums over tokens are float32 within a segment and float64 across segments. The arithmetic of a
kernel is that of its vectors; what it adds to stays in memory in its own precision.

How: each intrinsic converts 16 float32 to 16 float64, two vectors' worth, in one LLVM value; LLVM
makes two registers of it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from racecore.ops.simd.emitter import Emitter, codegen
from racecore.ops.simd.vectors import Vector

__all__ = ["add_at", "load_rounded", "scale_add", "widen_add"]

_FUSE = ("contract",)  # multiply and add may fuse; no other freedom with the bits


def _widened(emit: Emitter, value: Any) -> Any:
    """Return a vector as float64."""
    wide = ir.VectorType(ir.DoubleType(), value.type.count)
    return value if value.type == wide else emit.builder.fpext(value, wide)


def _converted(emit: Emitter, value: Any, kind: Any) -> Any:
    """Return a vector as one of a type of float32 or float64 lanes."""
    if value.type == kind:
        return value
    is_wider = isinstance(kind.element, ir.DoubleType)
    return emit.builder.fpext(value, kind) if is_wider else emit.builder.fptrunc(value, kind)


@codegen(lambda like: Vector(like))
def load_rounded(emit: Emitter, address: Any, like: Any) -> Any:
    """Return the float64 numbers from an address on, rounded to the type of `like`."""
    wide = ir.VectorType(ir.DoubleType(), emit.lanes)
    return _converted(emit, emit.load(address, wide, align=8), emit.vector)


@codegen(a=Vector)
def widen_add(emit: Emitter, a: Any, address: Any) -> None:
    """Add the lanes, as float64, to the float64 numbers from an address on."""
    wide = _widened(emit, a)
    # rows of a state begin at any float64: 8 bytes are all the alignment there is
    old = emit.load(address, wide.type, align=8)
    emit.store(emit.builder.fadd(old, wide), address, align=8)


@codegen(past=types.float64, a=Vector, present=types.float64)
def scale_add(emit: Emitter, address: Any, past: Any, a: Any, present: Any) -> None:
    """sum = past * sum + present * a, for the float64 sums from an address on."""
    builder = emit.builder
    wide = _widened(emit, a)
    old = emit.load(address, wide.type, align=8)
    old = builder.fmul(old, emit.splat(past, wide.type), flags=_FUSE)
    new = builder.fmul(wide, emit.splat(present, wide.type), flags=_FUSE)
    emit.store(builder.fadd(old, new, flags=_FUSE), address, align=8)


@codegen(lambda a: a, a=Vector)
def add_at(emit: Emitter, a: Any, address: Any, like: Any) -> Any:
    """Add the lanes to the numbers of the type of `like` from an address on; return the sums as
    stored, in the type of `a`.

    Sums are float64, and rounded once where the numbers are float32.
    """
    # as many numbers as a has lanes, of either type
    stored = ir.VectorType(like.type, a.type.count)
    old = _widened(emit, emit.load(address, stored))
    value = _converted(emit, emit.builder.fadd(old, _widened(emit, a)), stored)
    emit.store(value, address)
    return _converted(emit, value, a.type)
