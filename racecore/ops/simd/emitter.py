"""LLVM code inside Numba kernels: the decorator that makes an intrinsic of it, and what it is
written with.

Why: Numba asks for a typing function whose arguments are types and, inside it, a function
``(context, builder, signature, arguments)`` that emits the code. Written out, every list of
arguments stands three times. `codegen` derives both from one function with named arguments.

How to use it::

    @codegen(types.void)                                 # a tile: void is also the default
    def tile(emit, m, m_row, out, like):                 # int64 but for `like`, any number
        row = emit.load(m, emit.vector)                  # emit.element is the type of `like`
        emit.store(row, emit.address(out, m_row))

    @codegen(lambda a: a.element, a=Vector)              # result: computed from the type of a
    def total(emit, a): ...

    @codegen(types.float32, number=types.float32)        # other types by name; number is cast
    def next_above(emit, number): ...

Vectors are generic LLVM vectors of 64 bytes; LLVM splits them where registers are smaller.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["VECTOR_BYTES", "Emitter", "codegen"]

# One AVX-512 register, one cache line. On AVX2 LLVM makes two registers of it, on NEON four.
VECTOR_BYTES = 64
_FUSE = ("contract",)  # multiply and add may fuse; no other freedom with the bits


def codegen(returns: Any = types.void, /, *, name: str = "", **declared: Any) -> Any:
    """Make a Numba intrinsic of a function that emits LLVM code for it.

    Parameters
    ----------
    returns : Numba type or function
        The type of the result. A function takes, by their names, types of arguments.
    name : str
        The name in Numba's messages, for what a factory makes; by default that of the function.
    **declared : Numba type or class of Numba types, by the name of an argument
        A type is what the argument is cast to. A class, such as `types.Float`, accepts all its
        instances as they come; other types are refused. Without a declaration `like` is any number
        and everything else int64: an address, a stride or a count.

    Returns
    -------
    decorator
        For a function (emit, *arguments) of an `Emitter` and LLVM values, one for each argument;
        it returns the LLVM value of the result, None for void.
    """

    def decorate(emit_code: Callable[..., Any]) -> Any:
        names = list(inspect.signature(emit_code).parameters)[1:]
        defaults = {"like": types.Number}
        kinds = [declared.get(each, defaults.get(each, types.int64)) for each in names]

        # Numba reads names and arity off the signature, which `wraps` makes that of emit_code.
        @functools.wraps(emit_code)
        def typing_function(typing_context: Any, *given: Any) -> Any:
            accepted = []
            for kind, argument in zip(kinds, given, strict=True):
                if isinstance(kind, types.Type):
                    accepted.append(kind)
                elif isinstance(argument, kind):
                    accepted.append(argument)
                else:
                    return None  # Numba then reports the types that came
            by_name = dict(zip(names, accepted, strict=True))
            result = _result_type(returns, by_name)

            def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                emit = Emitter(builder, _element(names, arguments), context, by_name)
                value = emit_code(emit, *arguments)
                return context.get_dummy_value() if result == types.void else value

            return result(*accepted), code

        typing_function.__name__ = name or emit_code.__name__
        return intrinsic(typing_function)

    return decorate


def _result_type(returns: Any, by_name: dict[str, Any]) -> Any:
    if isinstance(returns, types.Type):
        return returns
    return returns(*(by_name[argument] for argument in inspect.signature(returns).parameters))


def _element(names: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Return the element type to emit code for: that of `like`, else of the first vector, else of
    the first floating-point number, else float32.
    """
    kinds = [value.type for value in arguments]
    if "like" in names:
        return kinds[names.index("like")]
    elements = [kind.element for kind in kinds if isinstance(kind, ir.VectorType)]
    numbers = [kind for kind in kinds if isinstance(kind, (ir.FloatType, ir.DoubleType))]
    return [*elements, *numbers, ir.FloatType()][0]


class Emitter:
    """LLVM code for numbers of one type: typed loads and stores at addresses, vectors, loops.

    `element` is that type, `size` its bytes, `lanes` how many of them a vector holds, and `vector`
    the type of a vector. `word` is the type of addresses. `context` and `types`, the Numba types of
    the arguments by name, are for what only Numba can do, such as casts between any two types.
    """

    def __init__(
        self, builder: Any, element: Any, context: Any = None, types: dict[str, Any] | None = None
    ) -> None:
        self.builder = builder
        self.element = element
        self.context = context
        self.types = types or {}
        self.size = _bytes_of(element)
        self.lanes = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(element, self.lanes)
        self.word = ir.IntType(64)

    def constant(self, value: int) -> Any:
        """Return an int64, such as a number of bytes."""
        return ir.Constant(self.word, value)

    def zeros(self, kind: Any = None) -> Any:
        """Return a vector of zeros, of floating point."""
        kind = kind or self.vector
        return ir.Constant(kind, [0.0] * kind.count)

    def address(self, base: Any, *offsets: Any) -> Any:
        """Return base + itemsize * sum of the offsets, each a value or a Python int."""
        for offset in offsets:
            if isinstance(offset, int):
                scaled = self.constant(offset * self.size)
            else:
                scaled = self.builder.mul(offset, self.constant(self.size))
            base = self.builder.add(base, scaled)
        return base

    def cast(self, value: Any, source: Any, target: Any) -> Any:
        """Return a number of one Numba type as one of another."""
        return self.context.cast(self.builder, value, source, target)

    def times(self, stride: Any, factor: int) -> Any:
        return self.builder.mul(stride, self.constant(factor))

    def load(self, address: Any, kind: Any, align: int = 0) -> Any:
        """Return the number or vector of a type at an address, aligned to `align` bytes or, by
        default, to an element.
        """
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return self.builder.load(pointer, align=align or self.size)

    def store(self, value: Any, address: Any, align: int = 0) -> None:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer, align=align or self.size)

    def stream(self, value: Any, address: Any) -> None:
        """Store a whole vector around the caches, at an address on a cache line."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        instruction = self.builder.store(value, pointer, align=VECTOR_BYTES)
        one = self.builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        instruction.set_metadata("nontemporal", one)

    def prefetch(self, address: Any) -> None:
        """Prefetch the cache line at an address, which may be any, to the second-level cache."""
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = self.builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        # locality 2 of 0 ... 3: the first level is left to the operands of the tiles
        read, second_level, data = (ir.Constant(word, value) for value in (0, 2, 1))
        self.builder.call(
            function, [self.builder.inttoptr(address, pointer), read, second_level, data]
        )

    def call(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """Call an LLVM intrinsic by its full name, as in ``llvm.fma.v16f32``."""
        module = self.builder.module
        kind = ir.FunctionType(result, [value.type for value in arguments])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(function, arguments)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Return a vector of lanes of a, and of b, whose lanes are counted from len(a) on."""
        index = ir.VectorType(ir.IntType(32), len(lanes))
        return self.builder.shuffle_vector(a, b, ir.Constant(index, list(lanes)))

    def splat(self, number: Any, kind: Any = None) -> Any:
        """Broadcast a number to all lanes of a vector."""
        kind = kind or self.vector
        undefined = ir.Constant(kind, ir.Undefined)
        one = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(one, undefined, [0] * kind.count)

    def fma(self, a: Any, b: Any, total: Any) -> Any:
        """Return a * b + total, rounded once on processors that can fuse the two."""
        product = self.builder.fmul(a, b, flags=_FUSE)
        return self.builder.fadd(product, total, flags=_FUSE)

    def loop(
        self, count: Any, start: list[Any], addresses: list[Any], steps: list[Any], body: Any
    ) -> list[Any]:
        """Emit a loop that carries sums in registers.

        Parameters
        ----------
        count : int64
            Iterations; none if it is not positive.
        start : list
            The sums before the first iteration.
        addresses, steps : list of int64
            Addresses in the first iteration, and the bytes by which each then grows.
        body : function (addresses, sums) -> sums
            Emits one iteration.

        Returns
        -------
        list
            The sums after the last iteration.
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
        index.add_incoming(self.constant(0), before)
        for phi, value in zip(moving + sums, addresses + start, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        new_sums = body(moving, sums)
        new_addresses = [
            builder.add(address, step) for address, step in zip(moving, steps, strict=True)
        ]
        # the body may have branched: what is carried comes from where it ended
        end = builder.block
        index.add_incoming(builder.add(index, self.constant(1)), end)
        for phi, value in zip(moving + sums, new_addresses + new_sums, strict=True):
            phi.add_incoming(value, end)
        builder.branch(head)
        builder.position_at_end(after)
        return sums


def _bytes_of(element: Any) -> int:
    if isinstance(element, ir.IntType):
        return max(element.width // 8, 1)
    return 8 if isinstance(element, ir.DoubleType) else 4
