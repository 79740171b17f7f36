"""Products with rows that lie anywhere in memory: selected keys and values, read where they are.

Why: a row that is read once should not be copied first. With one query head for a row there is so little arithmetic that the copy
would take longer than all of it. What the products compute is what `products.project` and `products.accumulate` do.

How: rows come as a list of addresses. Two factories of register tiles, as in `ops.tiles`, read float32 rows or widen bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from racecore.jit import helper
from racecore.ops.tiles import Emitter, totals
from racecore.ops.vectors import VECTOR_BYTES

__all__ = ["accumulate_listed", "project_listed"]

_AT_ONCE = np.int64(4)  # rows of a tile of dot products


def _dot_tile(n_queries: int, narrow: bool) -> Any:
    """Return a tile of dot products of `n_queries` float32 rows with four listed rows. In plain Python::

    c[r * c_row + i] = sum(q[r * q_row + d] * row(rows[i])[d] for d in range(16 * count))
    """

    @intrinsic
    def tile(typing_context, q, q_row, rows, c, c_row, count):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            q, q_row, rows, c, c_row, count = arguments
            emit = Emitter(builder, ir.FloatType())
            starts = [emit.load(builder.add(rows, ir.Constant(emit.word, 8 * i)), emit.word) for i in range(4)]

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                weights = [
                    emit.load(emit.address(addresses[0], emit.times(q_row, r)), emit.vector) for r in range(n_queries)
                ]
                new = list(sums)
                for i in range(4):
                    row = emit.load_row(addresses[1 + i], 0, emit.vector, narrow)
                    for r in range(n_queries):
                        new[r * 4 + i] = emit.fma(weights[r], row, sums[r * 4 + i])
                return new

            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            row_step = ir.Constant(emit.word, VECTOR_BYTES // (2 if narrow else 1))
            steps = [ir.Constant(emit.word, VECTOR_BYTES)] + [row_step] * 4
            sums = emit.loop(count, [zero] * (4 * n_queries), [q, *starts], steps, step)
            for r in range(n_queries):
                emit.store(totals(emit, sums[4 * r : 4 * r + 4]), emit.address(c, emit.times(c_row, r)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), code

    return tile


def _outer_tile(n_queries: int, n_vectors: int, narrow: bool) -> Any:
    """Return a tile that adds weighted listed rows to n_queries x (16 * n_vectors) sums. In plain Python::

    m[r * m_row + d] += sum(c[r * c_row + i] * row(rows[i])[first + d] for i in range(count))
    """

    @intrinsic
    def tile(typing_context, c, c_row, rows, first, m, m_row, count):
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            c, c_row, rows, first, m, m_row, count = arguments
            emit = Emitter(builder, ir.FloatType())
            offset = builder.mul(first, ir.Constant(emit.word, 2 if narrow else 4))

            def step(addresses: list[Any], sums: list[Any]) -> list[Any]:
                start = builder.add(emit.load(addresses[1], emit.word), offset)
                row = [emit.load_row(start, v * emit.lanes, emit.vector, narrow) for v in range(n_vectors)]
                new = []
                for r in range(n_queries):
                    factor = emit.splat(emit.load(emit.address(addresses[0], emit.times(c_row, r)), emit.element))
                    new += [emit.fma(factor, row[v], sums[r * n_vectors + v]) for v in range(n_vectors)]
                return new

            places = [
                emit.address(m, emit.times(m_row, r), v * emit.lanes)
                for r in range(n_queries)
                for v in range(n_vectors)
            ]
            zero = ir.Constant(emit.vector, [0.0] * emit.lanes)
            steps = [ir.Constant(emit.word, 4), ir.Constant(emit.word, 8)]
            sums = emit.loop(count, [zero] * len(places), [c, rows], steps, step)
            for value, place in zip(sums, places, strict=True):
                emit.store(builder.fadd(emit.load(place, emit.vector), value), place)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), code

    return tile


_dot_4, _dot_1, _dot_4_narrow, _dot_1_narrow = (_dot_tile(n, narrow) for narrow in (False, True) for n in (4, 1))
_outer_4x4, _outer_1x8, _outer_1x1 = (_outer_tile(n, v, False) for n, v in ((4, 4), (1, 8), (1, 1)))
_outer_4x4_narrow, _outer_1x8_narrow, _outer_1x1_narrow = (_outer_tile(n, v, True) for n, v in ((4, 4), (1, 8), (1, 1)))


@helper
def project_listed(q: np.ndarray, rows: np.ndarray, narrow: bool, n_queries: int, n: int, c: np.ndarray) -> None:
    """c[r, i] = <q[r], rows[i]> for r < n_queries and i < n, float32. The list goes on to a multiple of four."""
    count, c_row, q_row = q.shape[1] * 4 // VECTOR_BYTES, c.shape[1], q.shape[1]
    for i in range(0, n, _AT_ONCE):
        listed, r = rows.ctypes.data + 8 * i, 0
        while r < n_queries:
            qr, cr = q.ctypes.data + 4 * r * q_row, c.ctypes.data + 4 * (r * c_row + i)
            if r + 4 <= n_queries:
                if narrow:
                    _dot_4_narrow(qr, q_row, listed, cr, c_row, count)
                else:
                    _dot_4(qr, q_row, listed, cr, c_row, count)
                r += 4
            else:
                if narrow:
                    _dot_1_narrow(qr, q_row, listed, cr, c_row, count)
                else:
                    _dot_1(qr, q_row, listed, cr, c_row, count)
                r += 1


@helper
def accumulate_listed(c: np.ndarray, rows: np.ndarray, narrow: bool, n_queries: int, n: int, m: np.ndarray) -> None:
    """m[r] += sum_i c[r, i] * rows[i] over i < n, for r < n_queries; float32."""
    listed, c_row, m_row, width, r = rows.ctypes.data, c.shape[1], m.shape[1], m.shape[1], 0
    while r < n_queries:
        d, four = 0, r + 4 <= n_queries and width % 64 == 0
        while d < width:
            cr, mr = c.ctypes.data + 4 * r * c_row, m.ctypes.data + 4 * (r * m_row + d)
            if four:
                if narrow:
                    _outer_4x4_narrow(cr, c_row, listed, d, mr, m_row, n)
                else:
                    _outer_4x4(cr, c_row, listed, d, mr, m_row, n)
                d += 64
            elif d + 128 <= width:
                if narrow:
                    _outer_1x8_narrow(cr, c_row, listed, d, mr, m_row, n)
                else:
                    _outer_1x8(cr, c_row, listed, d, mr, m_row, n)
                d += 128
            else:
                if narrow:
                    _outer_1x1_narrow(cr, c_row, listed, d, mr, m_row, n)
                else:
                    _outer_1x1(cr, c_row, listed, d, mr, m_row, n)
                d += 16
        r += 4 if four else 1
