"""The kernel that picks the best tokens of a row of scores, exactly, in time linear in its length.

A sample of the scores gives a bar that a few more than the wanted tokens should clear. One pass
notes who does; among those the score of the last one wanted is found digit by digit, and whoever is
above it is in. Should too few clear the bar, everybody counts as having done so: the sample saves
time, it never decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from racecore.ops.simd.emitter import Emitter, codegen
from racecore.runtime import processor
from racecore.runtime.jit import helper, kernel

__all__ = [
    "LOWEST_KEY",
    "add_groups",
    "candidates",
    "key_of",
    "pick",
    "threshold_of",
    "write_selected",
]

_SAMPLE = 2048
_RADIX_BITS = 11
_LANES = 16
_CAN_COMPRESS = processor.has("avx512f")  # processors then write the chosen of 16 lanes at once
LOWEST_KEY = np.int64(-0x7FF0000000000000)  # the key of minus infinity: everybody reaches it


@kernel
def add_groups(scores: np.ndarray, sums: np.ndarray, first: int, last: int) -> None:
    """Write the sums [groups, tokens] of the scores [groups, heads, tokens] of a group's heads,
    added one after the other.
    """
    for group in range(first, last):
        for t in range(scores.shape[2]):
            total = scores[group, 0, t]
            for h in range(1, scores.shape[1]):
                total += scores[group, h, t]
            sums[group, t] = total


@kernel
def pick(
    scores: np.ndarray,
    lengths: np.ndarray,
    budgets: np.ndarray,
    ends: tuple[int, int],
    selected: np.ndarray,
    counts: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Write rows first ... last - 1 of selected [rows, W], ascending, and how many they are; the
    rest becomes -1.

    scores are [rows, tokens] and belong to sequences lengths[row]; they come as integers of the
    same bits.
    """
    for row in range(first, last):
        n, budget = lengths[row], min(budgets[row], lengths[row])
        tokens, keys, _ = candidates(scores[row], n, budget)
        limit, n_equal = threshold_of(keys, len(keys), budget)
        counts[row] = write_selected(tokens, keys, limit, n_equal, n, ends, selected[row])


@helper
def write_selected(tokens, keys, limit, n_equal, n, ends, out):
    """Write the tokens whose key is above the limit, the first `n_equal` of those at it, and both
    ends. Return how many.
    """
    n_sink = min(ends[0], n)
    begin = max(n - ends[1], n_sink)
    n_out = 0
    for t in range(n_sink):
        out[n_out] = t
        n_out += 1
    for c in range(len(keys)):
        takes = keys[c] > limit
        if keys[c] == limit:
            takes = n_equal > 0
            n_equal -= 1
        if takes and tokens[c] >= n_sink and tokens[c] < begin:
            out[n_out] = tokens[c]
            n_out += 1
    for t in range(begin, n):
        out[n_out] = t
        n_out += 1
    for i in range(n_out, out.shape[0]):
        out[i] = -1
    return n_out


@helper
def key_of(bits: int, is_wide: bool) -> Any:
    """Return an integer that orders as the float64 (`is_wide`) or float32 of these bits; -0 is 0,
    and NaN infinity.
    """
    infinity = np.int64(0x7FF0000000000000) if is_wide else np.int64(0x7F800000)
    size = bits & (np.int64(0x7FFFFFFFFFFFFFFF) if is_wide else np.int64(0x7FFFFFFF))
    if size > infinity:
        return infinity
    return np.int64(size) if bits >= 0 else -np.int64(size)


@helper
def _bits_of(key: Any, is_wide: bool) -> Any:
    """Return bits of which this is the key."""
    if key >= 0:
        return np.int64(key)
    if is_wide:
        return np.int64(-key) | np.int64(-0x8000000000000000)
    return np.int64(-max(key, -np.int64(0x7F800000))) | np.int64(0x80000000)


@helper
def candidates(scores: np.ndarray, n: int, budget: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return tokens, ascending, with their keys: at least the `budget` best, and all that reach the
    bar, the third result.
    """
    if budget <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), LOWEST_KEY
    bar, room = _bar(scores, n, budget)
    tokens = np.empty(room + _LANES, np.int64)
    found = _note(scores, n, bar, tokens)
    if found < budget or found > room:  # the sample has misled
        bar, tokens = LOWEST_KEY, np.empty(n + _LANES, np.int64)
        found = _note(scores, n, bar, tokens)
    keys = np.empty(found, np.int64)
    for c in range(found):
        keys[c] = key_of(np.int64(scores[tokens[c]]), scores.itemsize == 8)
    return tokens, keys, bar


@helper
def _note(scores: np.ndarray, n: int, bar: int, tokens: np.ndarray) -> int:
    """Write the tokens whose keys reach the bar and return how many; stop where the room, all but
    16 places, does not do.
    """
    is_wide, found, room, whole = (
        scores.itemsize == 8,
        0,
        tokens.shape[0] - _LANES,
        n // _LANES * _LANES,
    )
    bits = _bits_of(bar, is_wide)
    for t in range(0, whole, _LANES):
        address = scores.ctypes.data + scores.itemsize * t
        if _CAN_COMPRESS:
            found += _append_reaching(address, bits, scores[0], t, tokens.ctypes.data + 8 * found)
        else:
            who = _mask_reaching(address, bits, scores[0])
            while who != 0:
                tokens[found] = t + _lowest(who)
                found += 1
                who &= who - 1
        if found > room:
            return found
    for t in range(whole, n):
        if key_of(np.int64(scores[t]), is_wide) >= bar:
            tokens[found] = t
            found += 1
    return found


def _reaching(emit: Emitter, address: Any, threshold: Any) -> Any:
    """Return a bit for each of the 16 numbers from an address on: whether it is NaN, or at least
    the number of the bits `threshold`.
    """
    # scores come as integers of the same bits
    bits = emit.element
    kind = ir.DoubleType() if bits.width == 64 else ir.FloatType()
    values = emit.load(address, ir.VectorType(kind, _LANES))
    number = emit.builder.bitcast(
        emit.builder.trunc(threshold, bits) if bits.width == 32 else threshold, kind
    )
    # unordered: NaN compares true
    return emit.builder.fcmp_unordered(">=", values, emit.splat(number, values.type))


@codegen(types.int64)
def _mask_reaching(emit: Emitter, address: Any, threshold: Any, like: Any) -> Any:
    """Return the bits of `_reaching`, the first number's lowest."""
    reaches = _reaching(emit, address, threshold)
    return emit.builder.zext(emit.builder.bitcast(reaches, ir.IntType(_LANES)), emit.word)


@codegen(types.int64)
def _append_reaching(
    emit: Emitter, address: Any, threshold: Any, like: Any, first: Any, out: Any
) -> Any:
    """Write first + i for those of 16 numbers that reach the threshold; return how many do.

    All 16 int64 of `out` are written, the rest with anything.
    """
    builder = emit.builder
    reaches = _reaching(emit, address, threshold)
    indices = ir.VectorType(ir.IntType(32), _LANES)
    numbers = ir.Constant(indices, list(range(_LANES)))
    name = "llvm.x86.avx512.mask.compress.v16i32"
    compressed = emit.call(name, indices, [numbers, numbers, reaches])
    wide = builder.zext(compressed, ir.VectorType(emit.word, _LANES))
    emit.store(builder.add(wide, emit.splat(first, wide.type)), out, align=8)
    mask = builder.bitcast(reaches, ir.IntType(_LANES))
    return builder.zext(builder.ctpop(mask), emit.word)


@codegen(types.int64)
def _lowest(emit: Emitter, bits: Any) -> Any:
    """Return the index of the lowest set bit."""
    return emit.builder.cttz(bits, ir.Constant(ir.IntType(1), 1))


@helper
def _bar(scores: np.ndarray, n: int, budget: int) -> tuple[Any, int]:
    """Return a key that somewhat more than `budget` of n keys should reach, judged by a sample, and
    room for those that do.
    """
    share = budget / max(n, 1)
    if n < 2 * _SAMPLE or share > 0.5:
        return LOWEST_KEY, n
    sample = np.empty(_SAMPLE, np.int64)
    for i in range(_SAMPLE):
        sample[i] = key_of(np.int64(scores[i * n // _SAMPLE]), scores.itemsize == 8)
    rank = _surely_more(share * _SAMPLE)
    limit, _ = threshold_of(sample, _SAMPLE, int(rank))
    return limit, min(n, int(_surely_more(rank) / _SAMPLE * n) + 1)


@helper
def _surely_more(count: float) -> float:
    """Return what a sample's count of something hardly exceeds, given what is expected of it."""
    return count + 4 * np.sqrt(count) + 8


@helper
def threshold_of(keys: np.ndarray, n: int, rank: int) -> tuple[Any, Any]:
    """Return the rank-th largest of n keys, and how many of those equal to it belong to the `rank`
    largest.
    """
    if rank <= 0 or n == 0:
        return np.int64(0x7FFFFFFFFFFFFFFF), np.int64(0)
    lowest, highest = keys[0], keys[0]
    for i in range(1, n):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    # keys are lowest + something below 2^bits: find it digit by digit, from the most significant
    # down; all digits but the last are whole, so that the first one already tells keys apart
    bits = 0
    while bits < 64 and (np.uint64(highest - lowest) >> np.uint64(bits)) > 0:
        bits += 1
    counts, largest = np.empty(1 << _RADIX_BITS, np.int64), np.uint64(0xFFFFFFFFFFFFFFFF)
    left = np.int64(rank)
    while bits > 0:
        bits = max(bits - _RADIX_BITS, 0)
        shift = np.uint64(bits)
        counts[:] = 0
        for i in range(n):
            offset = np.uint64(keys[i] - lowest)
            if offset <= largest:
                counts[np.int64(offset >> shift)] += 1
        digit = (1 << _RADIX_BITS) - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        lowest += np.int64(np.uint64(digit) << shift)
        largest = (np.uint64(1) << shift) - np.uint64(1)
        if bits > 0 and counts[digit] < n // 2:  # go on with those that share the digit
            rest, found = np.empty(counts[digit], np.int64), 0
            for i in range(n):
                if np.uint64(keys[i] - lowest) <= largest:
                    rest[found] = keys[i]
                    found += 1
            keys, n = rest, found
    return lowest, left
