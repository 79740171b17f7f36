"""The causal scan of a block in registers: tokens pass a tile of the state, each added to it and
read out of it.

A state, a sum of outer products, is updated by one token after the other, and read out right after
each::

    scan_rows      state += outer(a[:, i], x[i]);  y[i] = b[:, i] @ state    weights in, rows out
    scan_weights   state += outer(x[i], a[i]);     c[i] = y[i] @ state       rows in, weights out

for i from the first token of a block to the last, or back. Weights are [S], rows [D]; the two lines
are the plain twins of the functions below.

Why it is written by hand: as two products with the state, plus the corrections for pairs of tokens
inside a block, this is half as much work again, and where a block is short against the number of
buckets several times. Here a tile of the state (8 x 2 vectors) stays in registers while all tokens
of the block pass it, and a token reads only earlier ones and itself, by construction.

How: the second form has the state transposed, buckets in vector lanes, so that its sums over D need
no sum across lanes. Coefficients a, b of the first form are stored [S, BLOCK], of the second
[BLOCK, S].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from racecore.chunking import BLOCK
from racecore.ops.simd.emitter import Emitter, codegen
from racecore.ops.simd.products import InputRows, OutputRows, PrefetchRows, prefetch_rows
from racecore.ops.simd.tile_sums import ADD, OVERWRITE, kept, load_row, store_rows
from racecore.ops.simd.vectors import lanes
from racecore.runtime.jit import helper

__all__ = ["scan_rows", "scan_weights"]

# Columns of a tile of `scan_weights`: with 8 x 2 vectors the state takes 16 of 32 registers.
_WEIGHTS_ROWS = 8


class _Chains:
    """Sums over the rows of a tile, as two chains of additions each where rows are many: half the
    latency.
    """

    def __init__(self, emit: Emitter, start: list[Any], n_rows: int) -> None:
        self.emit = emit
        zero = emit.zeros(start[0].type)
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


class _StateTile:
    """The vectors of a state that a tile holds, n_rows x n_vectors, loaded and stored."""

    def __init__(self, emit: Emitter, n_rows: int, n_vectors: int, stride: Any) -> None:
        self.emit = emit
        self.stride = stride
        self.positions = [(r, v) for r in range(n_rows) for v in range(n_vectors)]

    def _address(self, base: Any, r: int, v: int) -> Any:
        return self.emit.address(base, self.emit.times(self.stride, r), v * self.emit.lanes)

    def load(self, base: Any, kind: Any) -> list[Any]:
        return [self.emit.load(self._address(base, r, v), kind) for r, v in self.positions]

    def store(self, values: list[Any], base: Any) -> None:
        for (r, v), value in zip(self.positions, values, strict=True):
            self.emit.store(value, self._address(base, r, v))


def _rows_tile(n_rows: int, n_vectors: int, is_bfloat16: bool = False) -> Any:
    """Return the tile of `scan_rows` that holds n_rows buckets and n_vectors vectors of columns.

    The rows x are bfloat16 if `is_bfloat16`. The state is read at `source` and written to `target`.
    In plain Python, for every column d of the tile::

        for i in range(count):
            for r in range(n_rows):
                state[r, d] += a[r * BLOCK + i * a_step] * x[i * x_step + d]
            total = sum(b[r * BLOCK + i * a_step] * state[r, d] for r in range(n_rows))
            z[i * z_step + d] = (y[i * y_step + d] if keep == ADD else 0) + total

    Strides count elements, but that of z bytes; z is written by `mode`, as products are.
    """

    @codegen(name=f"scan_rows_{n_rows}x{n_vectors}" + "_bfloat16" * is_bfloat16)
    def tile(
        emit: Emitter,
        source: Any,
        target: Any,
        state_row: Any,
        a: Any,
        b: Any,
        a_step: Any,
        x: Any,
        x_step: Any,
        y: Any,
        y_step: Any,
        z: Any,
        z_step: Any,
        count: Any,
        keep: Any,
        mode: Any,
        like: Any,
    ) -> None:
        state_tile = _StateTile(emit, n_rows, n_vectors, state_row)

        def token(addresses: list[Any], state: list[Any]) -> list[Any]:
            a, b, x, y, z = addresses  # of this token's column or row
            columns = [v * emit.lanes for v in range(n_vectors)]
            row = [load_row(emit, x, d, emit.vector, is_bfloat16) for d in columns]
            old = [emit.load(emit.address(y, d), emit.vector) for d in columns]
            state = list(state)  # [n_rows, n_vectors]
            chains = _Chains(emit, [kept(emit, keep, value) for value in old], n_rows)
            for r in range(n_rows):
                weight = emit.splat(emit.load(emit.address(a, r * BLOCK), emit.element))
                for v in range(n_vectors):
                    state[r * n_vectors + v] = emit.fma(weight, row[v], state[r * n_vectors + v])
                # read out after the token was added: it is part of its own result
                weight = emit.splat(emit.load(emit.address(b, r * BLOCK), emit.element))
                chains.add(r, weight, state)
            store_rows(emit, [chains.sums()], z, z_step, mode)
            return state

        start = state_tile.load(source, emit.vector)
        weight_step = emit.times(a_step, emit.size)
        steps = [
            weight_step,
            weight_step,
            emit.times(x_step, 2 if is_bfloat16 else emit.size),
            emit.times(y_step, emit.size),
            z_step,
        ]
        state_tile.store(emit.loop(count, start, [a, b, x, y, z], steps, token), target)

    return tile


def _weights_tile(n_halves: int) -> Any:
    """Return the tile of `scan_weights` that holds 8 columns and n_halves half vectors of buckets,
    1, 2 or 4.

    The state is read at `source` and written to `target`. In plain Python, for every bucket s of
    the tile::

        for i in range(count):
            for r in range(8):
                state[r, s] += x[i * x_step + r] * a[i * a_step + s]
            total = sum(y[i * y_step + r] * state[r, s] for r in range(8))
            c[i * a_step + s] = (c[i * a_step + s] if keep == ADD else 0) + total

    Strides count elements.
    """
    n_vectors = max(1, n_halves // 2)

    @codegen(name=f"scan_weights_{n_halves}halves")
    def tile(
        emit: Emitter,
        source: Any,
        target: Any,
        state_row: Any,
        a: Any,
        a_step: Any,
        x: Any,
        x_step: Any,
        y: Any,
        y_step: Any,
        c: Any,
        count: Any,
        keep: Any,
        like: Any,
    ) -> None:
        kind = emit.vector if n_halves > 1 else ir.VectorType(emit.element, emit.lanes // 2)
        state_tile = _StateTile(emit, _WEIGHTS_ROWS, n_vectors, state_row)

        def token(addresses: list[Any], state: list[Any]) -> list[Any]:
            a, x, y, c = addresses  # of this token's row
            buckets = [v * emit.lanes for v in range(n_vectors)]
            weights = [emit.load(emit.address(a, s), kind) for s in buckets]
            old = [emit.load(emit.address(c, s), kind) for s in buckets]
            state = list(state)  # [8 columns, n_vectors of buckets]
            chains = _Chains(emit, [kept(emit, keep, value) for value in old], _WEIGHTS_ROWS)
            for r in range(_WEIGHTS_ROWS):
                number = emit.splat(emit.load(emit.address(x, r), emit.element), kind)
                for v in range(n_vectors):
                    state[r * n_vectors + v] = emit.fma(
                        number, weights[v], state[r * n_vectors + v]
                    )
                # read out after the token was added: it is part of its own result
                number = emit.splat(emit.load(emit.address(y, r), emit.element), kind)
                chains.add(r, number, state)
            for s, value in zip(buckets, chains.sums(), strict=True):
                emit.store(value, emit.address(c, s))
            return state

        start = state_tile.load(source, kind)
        steps = [emit.times(step, emit.size) for step in (a_step, x_step, y_step, a_step)]
        state_tile.store(emit.loop(count, start, [a, x, y, c], steps, token), target)

    return tile


# Buckets x vectors of columns: 8 x 2 of the state are 16 registers of the 32 of AVX-512.
_rows_8x2, _rows_4x2, _rows_1x2 = (_rows_tile(rows, 2) for rows in (8, 4, 1))
_rows_8x2_bfloat16 = _rows_tile(8, 2, is_bfloat16=True)
_rows_8x1, _rows_4x1, _rows_1x1 = (_rows_tile(rows, 1) for rows in (8, 4, 1))
# Half vectors of buckets: few buckets would waste most lanes of a whole vector.
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
    """Scan n tokens: state [S, D] += outer(a[:, i], x[i]), y[i] = b[:, i] @ state, from `source` to
    `target`.

    Parameters
    ----------
    source, target : [S, D]
        The state before and after; both may be one array.
    a, b : [S, BLOCK]
        Weights, tokens last.
    x, y : [BLOCK, D]
        Rows in and out; D is padded to whole vectors. x may be bfloat16 if S is a multiple of 8 and
        D of 32.
    written : OutputRows
        Where the rows y go; y itself holds partial sums if that is elsewhere.
    backward : bool
        From the last token to the first.
    """
    size, like = y.itemsize, y.dtype.type(0)
    step_d = lanes(y)
    n_rows, width, row = source.shape[0], y.shape[1], source.shape[1]
    first, step = (n - 1, -1) if backward else (0, 1)
    d = 0
    # columns outside, buckets inside: each pass scans all tokens for a tile of the state
    while d < width:
        two = d + 2 * step_d <= width  # vectors
        # as much of the next rows as this pass is of the columns
        prefetch_rows(next_rows, n * d // width, n * min(d + 2 * step_d, width) // width)
        xd = x.address + x.size * (first * x.row + d)
        yd = y.ctypes.data + size * (first * width + d)
        s = 0
        while s < n_rows:
            left = n_rows - s
            rows = 8 if left >= 8 else (4 if left >= 4 else 1)
            # partial sums stay in y; the last tile of a column writes what leaves
            z, z_row, mode = yd, size * width, OVERWRITE
            if left == rows:
                z = written.address + written.size * (first * written.row + d)
                z_row, mode = written.size * written.row, written.mode
            state_offset = size * (s * row + d)
            weight_offset = size * (s * BLOCK + first)
            arguments = (
                source.ctypes.data + state_offset,
                target.ctypes.data + state_offset,
                row,
                a.ctypes.data + weight_offset,
                b.ctypes.data + weight_offset,
                step,
                xd,
                step * x.row,
                yd,
                step * width,
                z,
                step * z_row,
                n,
                ADD if s > 0 or written.mode == ADD else OVERWRITE,
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
    c: OutputRows,
    n_buckets: int,
    n: int,
    backward: bool,
    next_rows: PrefetchRows,
) -> None:
    """Scan n tokens: state [D, S] += outer(x[i], a[i]), c[i] = y[i] @ state, from `source` to
    `target`.

    Parameters
    ----------
    source, target : [D, S]
        The state before and after, S padded to whole vectors; both may be one array.
    a : [BLOCK, S]
        Weights.
    x, y : [BLOCK, D]
        Rows; D is a multiple of 8.
    c : OutputRows of a scratch array [BLOCK, S]
        The weights read out, added to or overwritten.
    n_buckets : int
        Buckets before padding.
    backward : bool
        From the last token to the first.
    """
    size, like = x.itemsize, x.dtype.type(0)
    half = lanes(x) // 2
    width, row = x.shape[1], a.shape[1]
    first, step = (n - 1, -1) if backward else (0, 1)
    s = 0
    while s < n_buckets:
        left = -(-(n_buckets - s) // half)  # half vectors
        weight_offset = size * (first * row + s)
        # buckets outside, columns inside: c is a sum over tiles of 8 columns
        for d in range(0, width, _WEIGHTS_ROWS):
            if s == 0:
                prefetch_rows(next_rows, n * d // width, n * (d + _WEIGHTS_ROWS) // width)
            row_offset = size * (first * width + d)
            state_offset = size * (d * row + s)
            arguments = (
                source.ctypes.data + state_offset,
                target.ctypes.data + state_offset,
                row,
                a.ctypes.data + weight_offset,
                step * row,
                x.ctypes.data + row_offset,
                step * width,
                y.ctypes.data + row_offset,
                step * width,
                c.address + weight_offset,
                n,
                ADD if d > 0 else c.mode,
                like,
            )
            if left >= 4:
                _weights_4(*arguments)
            elif left >= 2:
                _weights_2(*arguments)
            else:
                _weights_1(*arguments)
        s += half * (4 if left >= 4 else (2 if left >= 2 else 1))
