"""Upper and lower bounds of a group's scores, from tables of 14-bit integers.

Why: an exact score looks up two float32 numbers for every table, key and query head. But most keys
are far from the best, and for those a bound decides. The heads of a group, added up, have one
number for each of the 256 codes of a table. It is quantised to 14 bits: two parts of 7 bits, each a
table of 256 bytes, which are four registers, and processors with AVX-512 VBMI look up 64 bytes in
those at once. Sums of integers are exact, so how far they can be from the scores is known.

`fill_bound_tables` makes the tables, `score_bounds` upper bounds, and `top_k_by_bounds` selects by
them. Only processors with AVX-512 VBMI run the tile; `can_bound` returns False on others, and all
keys are scored exactly.
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
    "OFFSET",
    "WIDTH",
    "BoundCall",
    "can_bound",
    "fill_bound_tables",
    "has_finite_bounds",
    "have_finite_bounds",
    "new_bound_call",
    "score_bounds",
]

_CODES = 256  # of a table of at most eight planes
_MOST_TABLES = 512  # sums of so many numbers of seven bits fit 16
_FEWEST_TOKENS = 4096  # for which filling tables of 256 entries pays
_LARGEST = 1e25  # of a score without its norm (which is below 2^32): bounds then do not overflow
_SMALLEST_STEP = np.float32(1e-30)
_PARTS = 2
_TOP = 128 * 128 - 1
# Blocks of 64 tokens for which a tile scores: with their sums and a part of two tables the
# registers are full.
_BLOCKS_AT_ONCE = 4
_BYTES, _HALVES = (ir.VectorType(ir.IntType(bits), 512 // bits) for bits in (8, 16))


# Columns of BoundCall.scales: a bound of a score is (integer * step + offset) * norm.
STEP, OFFSET, WIDTH, MAGNITUDE = (np.int64(i) for i in range(4))


class BoundCall(NamedTuple):
    """Arguments of the kernels. A row is a key/value head of a sequence: row b * G + g."""

    tables: np.ndarray  # float32 [B, H, L, 2, 16]
    byte_tables: np.ndarray  # uint8 [rows, L, 2, 256]: high and low seven bits
    # float32 [rows, 4]: the step of the integers, the offset of upper bounds, the width by which
    # lower bounds are below them, and the magnitude that scores without their norm cannot exceed
    scales: np.ndarray
    codes: np.ndarray  # this and the next: see layout.HashedKeys
    norms: np.ndarray
    multiplies: bool


def can_bound(tables: np.ndarray, high_bits: int, n_tokens: int) -> bool:
    """Return whether bounds are possible on this processor, and pay for so many tokens."""
    n_tables = tables.shape[2]
    fits = (
        tables.dtype == np.float32
        and high_bits == 0
        and n_tables <= _MOST_TABLES
        and n_tables % 2 == 0
    )
    return fits and n_tokens >= _FEWEST_TOKENS and processor.has("avx512vbmi")


def _look_up(emit: Emitter, table: list[Any], codes: Any) -> Any:
    """Return table[code] for 64 codes, of a table of 256 bytes in four registers."""
    # a byte is negative from 128 on
    is_high = emit.builder.icmp_signed("<", codes, ir.Constant(_BYTES, [0] * BLOCK_TOKENS))
    halves = [_look_up_128(emit, table[i], table[i + 1], codes) for i in (2, 0)]
    return emit.builder.select(is_high, *halves)


def _look_up_128(emit: Emitter, low: Any, high: Any, codes: Any) -> Any:
    """Return table[code & 127] for 64 codes."""
    return emit.call("llvm.x86.avx512.vpermi2var.qi.512", _BYTES, [low, codes, high])


def _odd_bytes(emit: Emitter, values: Any) -> Any:
    """Return the upper byte of every 16 bits: a product with (0, 1), as lookups and shifts compete
    for the same units.
    """
    odd = ir.Constant(_BYTES, [0, 1] * 32)
    return emit.call("llvm.x86.avx512.pmaddubs.w.512", _HALVES, [values, odd])


def _bound_tile(n_blocks: int) -> Any:
    """Return a tile that scores `n_blocks` blocks of 64 tokens. In plain Python::

        for i in range(64 * n_blocks):
            code = [codes[i // 64 * block + 64 * l + i % 64] for l in range(2 * pairs)]
            high, low = (
                sum(tables[512 * l + 256 * p + code[l]] for l in range(2 * pairs)) for p in range(2)
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
        tables: Any,
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
            # one part after the other: the tables of both would not fit the registers
            for p in range(_PARTS):
                registers = [
                    [load(table, 512 * k + _CODES * p + 64 * i) for i in range(4)] for k in range(2)
                ]
                for i in range(n_blocks):
                    start = builder.add(first, emit.times(block, i))
                    numbers = [
                        _look_up(emit, registers[k], load(start, BLOCK_TOKENS * k))
                        for k in range(2)
                    ]
                    both = builder.add(*numbers)
                    j = 2 * (_PARTS * i + p)
                    new[j] = builder.add(sums[j], builder.bitcast(both, _HALVES))
                    new[j + 1] = builder.add(sums[j + 1], _odd_bytes(emit, both))
            return new

        zeros = [ir.Constant(_HALVES, [0] * 32)] * (2 * _PARTS * n_blocks)
        steps = [emit.constant(2 * BLOCK_TOKENS), emit.constant(2 * _PARTS * _CODES)]
        sums = emit.loop(pairs, zeros, [codes, tables], steps, add_pair)
        for i in range(n_blocks):
            norm = norms_of(emit, builder.add(norms, emit.constant(2 * BLOCK_TOKENS * i)))
            high, low = (
                _sums_of_bytes(emit, *sums[2 * j : 2 * j + 2]) for j in (_PARTS * i, _PARTS * i + 1)
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


def _sums_of_bytes(emit: Emitter, total: Any, odd: Any) -> list[Any]:
    """Return the sums of 64 bytes, four vectors of 32 bits, from those of (odd byte * 256 + even
    byte) and of odd bytes.
    """
    builder = emit.builder
    even = builder.sub(total, builder.shl(odd, ir.Constant(_HALVES, [8] * 32)))
    words = ir.VectorType(ir.IntType(32), 16)
    # lanes of even and odd in turn, 16 for each of the four vectors
    picks = [[8 * v + i // 2 + 32 * (i % 2) for i in range(16)] for v in range(4)]
    return [builder.zext(emit.shuffle(even, odd, pick), words) for pick in picks]


_bound_blocks, _bound_block = _bound_tile(_BLOCKS_AT_ONCE), _bound_tile(1)


def new_bound_call(
    tables: np.ndarray, n_kv_heads: int, codes: np.ndarray, norms: np.ndarray, multiplies: bool
) -> BoundCall:
    """Return a call with memory for the tables of all key/value heads."""
    n_rows = len(tables) * n_kv_heads
    byte_tables = arrays.empty((n_rows, tables.shape[2], _PARTS, _CODES), np.uint8)
    scales = np.empty((n_rows, 4), np.float32)
    return BoundCall(tables, byte_tables, scales, codes, norms, multiplies)


def have_finite_bounds(call: BoundCall) -> bool:
    """Return whether the bounds of all rows are finite: if scores are, and not too large."""
    return bool((call.scales[:, MAGNITUDE] < _LARGEST).all())


@helper
def has_finite_bounds(call: BoundCall, row: int) -> bool:
    """Return whether those of one row are."""
    return call.scales[row, MAGNITUDE] < _LARGEST


@kernel
def fill_bound_tables(call: BoundCall, first: int, last: int) -> None:
    """Fill `byte_tables` and `scales` of rows first ... last - 1."""
    n_heads, n_tables = call.tables.shape[1:3]
    group = len(call.tables) * n_heads // call.byte_tables.shape[0]
    entries = np.empty((n_tables, _CODES), np.float32)
    lowest = np.empty(n_tables, np.float32)
    for row in range(first, last):
        step, offset, magnitude = _SMALLEST_STEP, 0.0, 0.0
        for table in range(n_tables):
            entries[table] = 0
            for h in range(row * group, (row + 1) * group):
                digits = call.tables[h // n_heads, h % n_heads, table]
                _add_table(digits, call.multiplies, entries[table])
                magnitude += _magnitude(digits, call.multiplies)
            low, high = _range(entries[table])
            lowest[table] = low
            step = max(step, (high - low) / np.float32(_TOP))
            offset += np.float64(low)
        _quantise(entries, lowest, step, call.byte_tables[row])
        # Half a step a table for rounding to integers; and, several times over, what rounding to
        # float32 adds to exact scores and to bounds.
        margin = 0.5 * step * n_tables + magnitude * (n_tables + group + 16) * 2.0**-22
        scales = call.scales[row]
        scales[STEP] = step
        scales[OFFSET] = offset + margin
        scales[WIDTH] = 2 * margin
        scales[MAGNITUDE] = magnitude


@helper
def _add_table(digits: np.ndarray, multiplies: bool, entries: np.ndarray) -> None:
    """Add to entries [256] those of every code: of a table of two digits [2, 16], multiplied or
    added.
    """
    low = load_vector(digits.ctypes.data, np.float32(0))
    for high in range(digits.shape[1]):
        address = entries.ctypes.data + 64 * high
        more = splat(digits[1, high])
        value = low * more if multiplies else low + more
        store_vector(load_vector(address, np.float32(0)) + value, address)


@helper
def _magnitude(digits: np.ndarray, multiplies: bool) -> float:
    """Return a bound of the entries of a table, NaN where a number is not finite."""
    low, high, nan_or_zero = 0.0, 0.0, 0.0
    for i in range(digits.shape[1]):
        low = max(low, abs(np.float64(digits[0, i])))
        high = max(high, abs(np.float64(digits[1, i])))
        nan_or_zero += np.float64(digits[0, i]) * 0 + np.float64(digits[1, i]) * 0
    return (low * high if multiplies else low + high) + nan_or_zero


@helper
def _range(entries: np.ndarray) -> tuple[Any, Any]:
    """Return the lowest and the highest of 256 entries."""
    zero = splat(np.float32(0))
    high = load_vector(entries.ctypes.data, np.float32(0))
    negated = zero - high
    for code in range(lanes(entries), _CODES, lanes(entries)):
        value = load_vector(entries.ctypes.data + 4 * code, np.float32(0))
        negated, high = maximum(negated, zero - value), maximum(high, value)
    return -highest(negated), highest(high)


@helper
def _quantise(
    entries: np.ndarray, lowest: np.ndarray, step: float, byte_tables: np.ndarray
) -> None:
    """Write entries [L, 256] as multiples of the step above each table's lowest: 14 bits, seven to
    each byte table.
    """
    per_step = np.float32(1) / step
    for table in range(byte_tables.shape[0]):
        low, address = splat(lowest[table]), byte_tables[table].ctypes.data
        for code in range(0, _CODES, lanes(entries)):
            value = load_vector(address_of(entries, table, code), np.float32(0)) - low
            _store_halves(
                value * splat(per_step) + splat(np.float32(0.5)),
                address + code,
                address + _CODES + code,
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
    n_kv_heads = call.codes.shape[1]
    block_bytes = call.codes.shape[3] * BLOCK_TOKENS
    pairs = call.byte_tables.shape[1] // 2
    for task in range(first, last):
        b, g, block, end, row = tasks[task]
        tables = call.byte_tables[b * n_kv_heads + g].ctypes.data
        scales = call.scales[b * n_kv_heads + g]
        step, offset = scales[STEP], scales[OFFSET]
        while block < end:
            codes = call.codes[b, g, block].ctypes.data
            norms = call.norms[b, g, block * BLOCK_TOKENS :].ctypes.data
            bounds = address_of(out, row, block * BLOCK_TOKENS)
            if block + _BLOCKS_AT_ONCE <= end:
                _bound_blocks(codes, block_bytes, norms, tables, pairs, step, offset, bounds)
                block += _BLOCKS_AT_ONCE
            else:
                _bound_block(codes, block_bytes, norms, tables, pairs, step, offset, bounds)
                block += 1
