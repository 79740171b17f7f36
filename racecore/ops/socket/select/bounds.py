"""Bounds of a group's scores: which keys may be among the best is known before their exact scores
are.

Why: an exact score asks two registers of float32 for every table, key and query head. But most keys
are far from the best, and of those a rough score tells. The heads of a group, added up, have one
number for each of the 256 codes of a table. It is cut to 14 bits: two planes of 7, each of 256
bytes, which are four registers, and processors with AVX-512 VBMI pick 64 bytes from those at once.
The sums are whole numbers, so how far they can be from the scores is known. `fill_bound_tables` makes the
tables, `score_bounds` upper bounds, and `settling` picks by them.

How: as in `ops.simd.tiles`. What the tile does is said in plain Python beside it. Only processors
with AVX-512 VBMI can run it; for others `can_bound` says no, and everything is scored exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from racecore.ops.simd.emitter import Emitter, codegen
from racecore.ops.simd.vectors import (
    Vector,
    address_of,
    highest,
    lanes,
    load_vector,
    maximum,
    splat,
    store_vector,
)
from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.ops.socket.score.lookup_tile import norms_of
from racecore.runtime import arrays, processor
from racecore.runtime.jit import helper, kernel

__all__ = [
    "BoundCall",
    "can_bound",
    "fill_bound_tables",
    "fits",
    "new_call",
    "overflows",
    "score_bounds",
]

_CODES = 256  # of a table of at most eight planes
_MOST_TABLES = 512  # whose seven bits add up in 16
_FEWEST_TOKENS = 4096  # for which tables of 256 pay
_LARGEST = 1e25  # of what scores may amount to, without the norm: nothing overflows
_SMALLEST_STEP = np.float32(1e-30)
_PLANES = 2
_TOP = 128 * 128 - 1
_AT_ONCE = (
    4  # blocks of 64 tokens: with their sums and a plane of two tables the registers are full
)
_BYTES, _HALVES = (ir.VectorType(ir.IntType(bits), 512 // bits) for bits in (8, 16))


class BoundCall(NamedTuple):
    """What coarse scores need. A row is a key/value head of a sequence."""

    tables: np.ndarray  # float32 [B, H, L, 2, 16]
    planes: np.ndarray  # uint8 [rows, L, 2, 256]
    # float32 [rows, 4]: step, offset of upper bounds, their distance to lower ones, size of scores
    numbers: np.ndarray
    codes: np.ndarray  # see layout.HashedKeys
    norms: np.ndarray
    multiplies: bool


def can_bound(tables: np.ndarray, high_bits: int, n_tokens: int) -> bool:
    """Tell whether coarse scores are possible and pay, on this processor."""
    n_tables = tables.shape[2]
    fits = (
        tables.dtype == np.float32
        and high_bits == 0
        and n_tables <= _MOST_TABLES
        and n_tables % 2 == 0
    )
    return fits and n_tokens >= _FEWEST_TOKENS and processor.has("avx512vbmi")


def _pick(emit: Emitter, table: list[Any], codes: Any) -> Any:
    """Return table[code] for 64 codes, of a table of 256 bytes in four registers."""
    # a byte is negative from 128 on
    is_high = emit.builder.icmp_signed("<", codes, ir.Constant(_BYTES, [0] * BLOCK_TOKENS))
    halves = [_pick_of_128(emit, table[i], table[i + 1], codes) for i in (2, 0)]
    return emit.builder.select(is_high, *halves)


def _pick_of_128(emit: Emitter, low: Any, high: Any, codes: Any) -> Any:
    """Return table[code & 127] for 64 codes."""
    return emit.call("llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [low, codes, high])


def _odd_bytes(emit: Emitter, values: Any) -> Any:
    """Return the upper byte of every 16 bits: a product with (0, 1), as picks and shifts compete
    for the same units.
    """
    odd = ir.Constant(_BYTES, [0, 1] * 32)
    return emit.call("llvm.x86.avx512.pmaddubs.w.512", _HALVES, [values, odd])


def _bound_tile(n_blocks: int) -> Any:
    """Return a tile that scores `n_blocks` blocks of 64 tokens. In plain Python::

        for i in range(64 * n_blocks):
            code = [codes[i // 64 * block + 64 * l + i % 64] for l in range(2 * pairs)]
            high, low = (
                sum(planes[512 * l + 256 * p + code[l]] for l in range(2 * pairs)) for p in range(2)
            )
            out[i] = ((128 * high + low) * step + offset) * from_norm16(norms[i])

    Tables come in pairs: two numbers of seven bits are added before they are widened. 16 bits hold
    the sum of all bytes times (1, 256), modulo 2^16, and that of the odd bytes.
    """

    @codegen(name=f"bounds_{n_blocks}_blocks", step=types.float32, offset=types.float32)
    def tile(
        emit: Emitter,
        codes: Any,
        block: Any,
        norms: Any,
        planes: Any,
        pairs: Any,
        step: Any,
        offset: Any,
        out: Any,
    ) -> None:
        builder = emit.builder

        def load(address: Any, offset: int) -> Any:
            return emit.load(builder.add(address, emit.constant(offset)), _BYTES, align=1)

        def add_pair(addresses: list[Any], sums: list[Any]) -> list[Any]:
            first, table = addresses
            new = list(sums)
            # prefetch the same codes of the next n_blocks blocks
            for i in range(n_blocks):
                line = builder.add(first, emit.times(block, n_blocks + i))
                for k in range(2):
                    emit.prefetch(builder.add(line, emit.constant(BLOCK_TOKENS * k)))
            # one plane after the other: the tables of both would not fit the registers
            for p in range(_PLANES):
                registers = [
                    [load(table, 512 * k + _CODES * p + 64 * i) for i in range(4)] for k in range(2)
                ]
                for i in range(n_blocks):
                    start = builder.add(first, emit.times(block, i))
                    numbers = [
                        _pick(emit, registers[k], load(start, BLOCK_TOKENS * k)) for k in range(2)
                    ]
                    both = builder.add(*numbers)
                    j = 2 * (_PLANES * i + p)
                    new[j] = builder.add(sums[j], builder.bitcast(both, _HALVES))
                    new[j + 1] = builder.add(sums[j + 1], _odd_bytes(emit, both))
            return new

        zeros = [ir.Constant(_HALVES, [0] * 32)] * (2 * _PLANES * n_blocks)
        steps = [emit.constant(2 * BLOCK_TOKENS), emit.constant(2 * _PLANES * _CODES)]
        sums = emit.loop(pairs, zeros, [codes, planes], steps, add_pair)
        for i in range(n_blocks):
            norm = norms_of(emit, builder.add(norms, emit.constant(2 * BLOCK_TOKENS * i)))
            high, low = (
                _in_order(emit, *sums[2 * j : 2 * j + 2]) for j in (_PLANES * i, _PLANES * i + 1)
            )
            for v in range(4):
                seven = ir.Constant(high[v].type, [7] * 16)
                total = builder.add(builder.shl(high[v], seven), low[v])
                value = emit.fma(
                    builder.sitofp(total, emit.vector), emit.splat(step), emit.splat(offset)
                )
                target = emit.address(out, BLOCK_TOKENS * i + 16 * v)
                emit.store(builder.fmul(value, norm[v]), target)

    return tile


def _in_order(emit: Emitter, total: Any, odd: Any) -> list[Any]:
    """Return the sums of 64 bytes, four vectors of 32 bits, from those of (odd byte * 256 + even
    byte) and of odd bytes.
    """
    builder = emit.builder
    even = builder.sub(total, builder.shl(odd, ir.Constant(_HALVES, [8] * 32)))
    words = ir.VectorType(ir.IntType(32), 16)
    # lanes of even and odd in turn, 16 for each of the four vectors
    picks = [[8 * v + i // 2 + 32 * (i % 2) for i in range(16)] for v in range(4)]
    return [builder.zext(emit.shuffle(even, odd, pick), words) for pick in picks]


_some, _one = _bound_tile(_AT_ONCE), _bound_tile(1)


def new_call(
    tables: np.ndarray, n_kv_heads: int, codes: np.ndarray, norms: np.ndarray, multiplies: bool
) -> BoundCall:
    """Return a call with room for the tables of all key/value heads."""
    n_rows = len(tables) * n_kv_heads
    planes = arrays.empty((n_rows, tables.shape[2], _PLANES, _CODES), np.uint8)
    return BoundCall(tables, planes, np.empty((n_rows, 4), np.float32), codes, norms, multiplies)


def overflows(call: BoundCall) -> bool:
    """Tell whether scores are so large that bounds of them could be infinite, or are not finite at
    all.
    """
    return not bool((call.numbers[:, 3] < _LARGEST).all())


@helper
def fits(call: BoundCall, row: int) -> bool:
    """Tell of one row that they are not."""
    return call.numbers[row, 3] < _LARGEST


@kernel
def fill_bound_tables(call: BoundCall, first: int, last: int) -> None:
    """Fill `planes` and `numbers` of rows first ... last - 1, each of neighbouring heads."""
    n_heads, n_tables = call.tables.shape[1:3]
    group = len(call.tables) * n_heads // call.planes.shape[0]
    worth = np.empty((n_tables, _CODES), np.float32)
    lows = np.empty(n_tables, np.float32)
    for row in range(first, last):
        step, offset, size = _SMALLEST_STEP, 0.0, 0.0
        for table in range(n_tables):
            worth[table] = 0
            for h in range(row * group, (row + 1) * group):
                digits = call.tables[h // n_heads, h % n_heads, table]
                _add_table(digits, call.multiplies, worth[table])
                size += _size(digits, call.multiplies)
            low, high = _range(worth[table])
            lows[table] = low
            step = max(step, (high - low) / np.float32(_TOP))
            offset += np.float64(low)
        _cut(worth, lows, step, call.planes[row])
        # half a step a table, and, several times over, what float32 does to exact and to coarse
        # scores
        margin = 0.5 * step * n_tables + size * (n_tables + group + 16) * 2.0**-22
        numbers = call.numbers[row]
        numbers[0], numbers[1], numbers[2], numbers[3] = step, offset + margin, 2 * margin, size


@helper
def _add_table(digits: np.ndarray, multiplies: bool, worth: np.ndarray) -> None:
    """Add to worth[code] what a table of two digits says."""
    low = load_vector(digits.ctypes.data, np.float32(0))
    for high in range(digits.shape[1]):
        place = worth.ctypes.data + 64 * high
        more = splat(digits[1, high])
        value = low * more if multiplies else low + more
        store_vector(load_vector(place, np.float32(0)) + value, place)


@helper
def _size(digits: np.ndarray, multiplies: bool) -> float:
    """Return a bound of what a table says, NaN where a number is not finite."""
    low, high, nothing = 0.0, 0.0, 0.0
    for i in range(digits.shape[1]):
        low, high = (
            max(low, abs(np.float64(digits[0, i]))),
            max(high, abs(np.float64(digits[1, i]))),
        )
        nothing += np.float64(digits[0, i]) * 0 + np.float64(digits[1, i]) * 0
    return (low * high if multiplies else low + high) + nothing


@helper
def _range(worth: np.ndarray) -> tuple[Any, Any]:
    """Return the lowest and the highest number of a table."""
    zero = splat(np.float32(0))
    high = load_vector(worth.ctypes.data, np.float32(0))
    negated = zero - high
    for code in range(lanes(worth), _CODES, lanes(worth)):
        value = load_vector(worth.ctypes.data + 4 * code, np.float32(0))
        negated, high = maximum(negated, zero - value), maximum(high, value)
    return -highest(negated), highest(high)


@helper
def _cut(worth: np.ndarray, lows: np.ndarray, step: float, planes: np.ndarray) -> None:
    """Write the 14 bits of every number, seven to each plane."""
    per_step = np.float32(1) / step
    for table in range(planes.shape[0]):
        low, place = splat(lows[table]), planes[table].ctypes.data
        for code in range(0, _CODES, lanes(worth)):
            value = load_vector(address_of(worth, table, code), np.float32(0)) - low
            _store_halves(
                value * splat(per_step) + splat(np.float32(0.5)),
                place + code,
                place + _CODES + code,
            )


@codegen(value=Vector)
def _store_halves(emit: Emitter, value: Any, high: Any, low: Any) -> None:
    """Truncate every lane to an integer; write the bits above its lowest seven to bytes from the
    address `high` on, and those seven to `low`.
    """
    builder = emit.builder
    words = ir.VectorType(ir.IntType(32), value.type.count)
    size = ir.VectorType(ir.IntType(8), value.type.count)
    whole = builder.fptosi(value, words)
    above = builder.lshr(whole, ir.Constant(words, [7] * value.type.count))
    lowest = builder.and_(whole, ir.Constant(words, [127] * value.type.count))
    for part, address in ((above, high), (lowest, low)):
        emit.store(builder.trunc(part, size), address, align=1)


@kernel
def score_bounds(
    call: BoundCall, tasks: np.ndarray, out: np.ndarray, first: int, last: int
) -> None:
    """Write upper bounds of scores to rows of out [rows, tokens], whole blocks of 64.

    A task is a sequence, a key/value head, the first and last block, and the row of out.
    """
    wide, pairs, n_kv_heads = (
        call.codes.shape[3] * BLOCK_TOKENS,
        call.planes.shape[1] // 2,
        call.codes.shape[1],
    )
    for task in range(first, last):
        b, g, block, end, row = tasks[task]
        planes, numbers = (
            call.planes[b * n_kv_heads + g].ctypes.data,
            call.numbers[b * n_kv_heads + g],
        )
        while block < end:
            codes = call.codes[b, g, block].ctypes.data
            norms = call.norms[b, g, block * BLOCK_TOKENS :].ctypes.data
            place = address_of(out, row, block * BLOCK_TOKENS)
            if block + _AT_ONCE <= end:
                _some(codes, wide, norms, planes, pairs, numbers[0], numbers[1], place)
                block += _AT_ONCE
            else:
                _one(codes, wide, norms, planes, pairs, numbers[0], numbers[1], place)
                block += 1
