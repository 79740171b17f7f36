"""Running sums over tokens that never leave the registers: the heart of causal attention.

A state, a sum of outer products, moves over the tokens of a block, and every token asks it
something right after it was added:

    scan_rows      state += outer(a[:, i], x[i]);  y[i] = b[:, i] @ state          [S] weights in, a row [D] out
    scan_weights   state += outer(x[i], a[i]);     c[i] = y[i] @ state             a row [D] in, [S] weights out

for i from the first token of a block to the last, or back. Why it is written by hand: as two
products with the state, plus the corrections for pairs of tokens inside a block, this is half as
much work again, and where a block is short against the number of buckets several times. Here a tile
of the state (8 x 2 vectors) stays in registers while the tokens walk past it, and a token meets
only what came before it, by construction.

The plain twins are the two lines above. The second form has the state transposed, buckets in vector
lanes, so that its sums over D need no sum across lanes. Coefficients a, b of the first form are
stored [S, BLOCK], of the second [BLOCK, S].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.chunking import BLOCK
from racecore.ops.simd.emitter import Emitter
from racecore.ops.simd.products import InputRows, OutputRows, PrefetchRows, prefetch_rows
from racecore.ops.simd.tile_sums import ADD, OVERWRITE, kept, load_row, store_rows
from racecore.ops.simd.vectors import lanes
from racecore.runtime.jit import helper

__all__ = ["scan_rows", "scan_weights"]

_ROWS = 8  # rows of the state that a tile holds


def _emitter(builder: Any, like: Any) -> Emitter:
    return Emitter(builder, ir.DoubleType() if like == types.float64 else ir.FloatType())


class _Chains:
    """Sums over the rows of a tile, as two chains of additions each where rows are many: half the
    latency.
    """

    def __init__(self, emit: Emitter, start: list[Any], n_rows: int) -> None:
        self.emit = emit
        zero = ir.Constant(start[0].type, [0.0] * start[0].type.count)
        self.chains = [[value, zero] if n_rows >= 4 else [value] for value in start]

    def add(self, r: int, factor: Any, state: list[Any]) -> None:
        """Add factor times row r of the state."""
        for v, chain in enumerate(self.chains):
            i = r % len(chain)
            chain[i] = self.emit.fma(factor, state[r * len(self.chains) + v], chain[i])

    def sums(self) -> list[Any]:
        return [
            chain[0] if len(chain) == 1 else self.emit.builder.fadd(*chain) for chain in self.chains
        ]


def _rows_tile(n_rows: int, n_vectors: int, is_bfloat16: bool = False) -> Any:
    """Return the tile of `scan_rows` that holds n_rows buckets and n_vectors vectors of columns; x
    is bfloat16 if `is_bfloat16`.

    Strides count elements, but that of z bytes. The state is read at `source` and written to
    `target`. What the tokens ask is written to z, by the `mode` of the tiles of products, and y is
    added where `keep` is 1.
    """

    @intrinsic
    def tile(
        typing_context,
        source,
        target,
        state_row,
        a,
        b,
        a_step,
        x,
        x_step,
        y,
        y_step,
        z,
        z_step,
        count,
        keep,
        mode,
        like,
    ):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (
                source,
                target,
                state_row,
                a,
                b,
                a_step,
                x,
                x_step,
                y,
                y_step,
                z,
                z_step,
                count,
                keep,
                mode,
                _,
            ) = arguments
            emit = _emitter(builder, like)
            places = [(r, v) for r in range(n_rows) for v in range(n_vectors)]

            def place(base: Any, r: int, v: int) -> Any:
                return emit.address(base, emit.times(state_row, r), v * emit.lanes)

            def token(addresses: list[Any], state: list[Any]) -> list[Any]:
                a, b, x, y, z = addresses
                row = [
                    load_row(emit, x, v * emit.lanes, emit.vector, is_bfloat16)
                    for v in range(n_vectors)
                ]
                old = [
                    emit.load(emit.address(y, v * emit.lanes), emit.vector)
                    for v in range(n_vectors)
                ]
                state = list(state)
                chains = _Chains(emit, [kept(emit, keep, value) for value in old], n_rows)
                for r in range(n_rows):
                    weight = emit.splat(emit.load(emit.address(a, r * BLOCK), emit.element))
                    for v in range(n_vectors):
                        state[r * n_vectors + v] = emit.fma(
                            weight, row[v], state[r * n_vectors + v]
                        )
                    chains.add(
                        r, emit.splat(emit.load(emit.address(b, r * BLOCK), emit.element)), state
                    )
                store_rows(emit, [chains.sums()], z, z_step, mode)
                return state

            start = [emit.load(place(source, r, v), emit.vector) for r, v in places]
            steps = [emit.times(step, emit.size) for step in (a_step, a_step)]
            steps += [
                emit.times(x_step, 2 if is_bfloat16 else emit.size),
                emit.times(y_step, emit.size),
                z_step,
            ]
            end = emit.loop(count, start, [a, b, x, y, z], steps, token)
            for (r, v), value in zip(places, end, strict=True):
                emit.store(value, place(target, r, v))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 15, like), code

    return tile


def _weights_tile(n_halves: int) -> Any:
    """Return the tile of `scan_weights` that holds 8 columns and n_halves half vectors of buckets,
    1, 2 or 4.

    Strides count elements. The state is read at `source` and written to `target`; c is added to
    where `keep` is 1 and overwritten where it is 0.
    """

    @intrinsic
    def tile(
        typing_context,
        source,
        target,
        state_row,
        a,
        a_step,
        x,
        x_step,
        y,
        y_step,
        c,
        count,
        keep,
        like,
    ):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target, state_row, a, a_step, x, x_step, y, y_step, c, count, keep, _ = (
                arguments
            )
            emit = _emitter(builder, like)
            kind = emit.vector if n_halves > 1 else ir.VectorType(emit.element, emit.lanes // 2)
            n_vectors = max(1, n_halves // 2)
            places = [(r, v) for r in range(_ROWS) for v in range(n_vectors)]

            def place(base: Any, r: int, v: int) -> Any:
                return emit.address(base, emit.times(state_row, r), v * emit.lanes)

            def token(addresses: list[Any], state: list[Any]) -> list[Any]:
                a, x, y, c = addresses
                weights = [
                    emit.load(emit.address(a, v * emit.lanes), kind) for v in range(n_vectors)
                ]
                old = [emit.load(emit.address(c, v * emit.lanes), kind) for v in range(n_vectors)]
                state = list(state)
                chains = _Chains(emit, [kept(emit, keep, value) for value in old], _ROWS)
                for r in range(_ROWS):
                    added = emit.splat(emit.load(emit.address(x, r), emit.element), kind)
                    for v in range(n_vectors):
                        state[r * n_vectors + v] = emit.fma(
                            added, weights[v], state[r * n_vectors + v]
                        )
                    chains.add(
                        r, emit.splat(emit.load(emit.address(y, r), emit.element), kind), state
                    )
                for v, value in enumerate(chains.sums()):
                    emit.store(value, emit.address(c, v * emit.lanes))
                return state

            start = [emit.load(place(source, r, v), kind) for r, v in places]
            steps = [emit.times(step, emit.size) for step in (a_step, x_step, y_step, a_step)]
            end = emit.loop(count, start, [a, x, y, c], steps, token)
            for (r, v), value in zip(places, end, strict=True):
                emit.store(value, place(target, r, v))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12, like), code

    return tile


_rows_8x2, _rows_4x2, _rows_1x2 = (_rows_tile(rows, 2) for rows in (8, 4, 1))
_rows_8x2_bfloat16 = _rows_tile(8, 2, is_bfloat16=True)
_rows_8x1, _rows_4x1, _rows_1x1 = (_rows_tile(rows, 1) for rows in (8, 4, 1))
_weights_4, _weights_2, _weights_1 = (_weights_tile(halves) for halves in (4, 2, 1))


@helper
def scan_rows(
    source: np.ndarray,
    target: np.ndarray,
    a: np.ndarray,
    x: InputRows,
    b: np.ndarray,
    y: np.ndarray,
    written: OutputRows,
    n: int,
    backward: bool,
    next_rows: PrefetchRows,
) -> None:
    """Walk over n tokens: state [S, D] += outer(a[:, i], x[i]), y[i] = b[:, i] @ state, from
    `source` to `target`.

    a, b [S, BLOCK]; x, y [BLOCK, D], D whole vectors; x may be bfloat16 if S is 8 and D a multiple
    of 32. `backward` goes from the last token to the first. The rows y go to where `written` says;
    if that is elsewhere, y is for use meanwhile.
    """
    size, like = y.itemsize, y.dtype.type(0)
    step_d = lanes(y)
    n_rows, width, row = source.shape[0], y.shape[1], source.shape[1]
    first, step = (n - 1, -1) if backward else (0, 1)
    d = 0
    while d < width:
        two = d + 2 * step_d <= width
        prefetch_rows(next_rows, n * d // width, n * min(d + 2 * step_d, width) // width)
        xd, yd = (
            x.address + x.size * (first * x.row + d),
            y.ctypes.data + size * (first * width + d),
        )
        s = 0
        while s < n_rows:
            left = n_rows - s
            rows = 8 if left >= 8 else (4 if left >= 4 else 1)
            z, z_row, mode = yd, size * width, OVERWRITE
            if left == rows:
                z = written.address + written.size * (first * written.row + d)
                z_row, mode = written.size * written.row, written.mode
            offset, weight = size * (s * row + d), size * (s * BLOCK + first)
            arguments = (
                source.ctypes.data + offset,
                target.ctypes.data + offset,
                row,
                a.ctypes.data + weight,
                b.ctypes.data + weight,
                step,
                xd,
                step * x.row,
                yd,
                step * width,
                z,
                step * z_row,
                n,
                1 if s > 0 or written.mode == ADD else 0,
                mode,
                like,
            )
            if rows == 8:
                if x.size < size:
                    _rows_8x2_bfloat16(*arguments)
                elif two:
                    _rows_8x2(*arguments)
                else:
                    _rows_8x1(*arguments)
            elif rows == 4:
                if two:
                    _rows_4x2(*arguments)
                else:
                    _rows_4x1(*arguments)
            elif two:
                _rows_1x2(*arguments)
            else:
                _rows_1x1(*arguments)
            s += rows
        d += 2 * step_d if two else step_d


@helper
def scan_weights(
    source: np.ndarray,
    target: np.ndarray,
    a: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    c: np.ndarray,
    n_buckets: int,
    n: int,
    backward: bool,
    add: bool,
    next_rows: PrefetchRows,
) -> None:
    """Walk over n tokens: state [D, S] += outer(x[i], a[i]), c[i] = y[i] @ state, from `source` to
    `target`.

    a, c [BLOCK, S], S padded to whole vectors; x, y [BLOCK, D], D a multiple of 8. `backward` goes
    from the last token to the first; `add` adds to c.
    """
    size, like = x.itemsize, x.dtype.type(0)
    half = lanes(x) // 2
    width, row = x.shape[1], a.shape[1]
    first, step = (n - 1, -1) if backward else (0, 1)
    s = 0
    while s < n_buckets:
        left = -(-(n_buckets - s) // half)
        ac = size * (first * row + s)
        for d in range(0, width, 8):
            if s == 0:
                prefetch_rows(next_rows, n * d // width, n * (d + 8) // width)
            xy = size * (first * width + d)
            offset = size * (d * row + s)
            arguments = (
                source.ctypes.data + offset,
                target.ctypes.data + offset,
                row,
                a.ctypes.data + ac,
                step * row,
                x.ctypes.data + xy,
                step * width,
                y.ctypes.data + xy,
                step * width,
                c.ctypes.data + ac,
                n,
                1 if add or d > 0 else 0,
                like,
            )
            if left >= 4:
                _weights_4(*arguments)
            elif left >= 2:
                _weights_2(*arguments)
            else:
                _weights_1(*arguments)
        s += half * (4 if left >= 4 else (2 if left >= 2 else 1))
