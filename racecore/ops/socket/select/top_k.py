"""Exact top-k of rows of scores, in time linear in their length.

A sample of the scores gives a threshold that slightly more than k of them should reach. One pass
collects those that do: the candidates. Among them a radix selection finds the k-th largest score;
whatever is above it is selected, and of equal scores the earliest. Sampling affects speed only: if
too few scores reach the threshold, every token becomes a candidate.

Scores are compared as *sort keys*, integers in the order of the numbers, with NaN as infinity.
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
    "LOWEST_SORT_KEY",
    "candidates",
    "select_top_k",
    "sort_key",
    "sum_group_scores",
    "threshold_of",
    "write_selected",
]

_SAMPLE = 2048  # scores; below twice as many, every token is a candidate
_RADIX_BITS = 11  # 16 KiB of counters, half of a first-level cache
_LANES = 16
_CAN_COMPRESS = processor.has("avx512f")  # processors then write the chosen of 16 lanes at once
# that of minus infinity in float64, below that in float32: every score reaches it
LOWEST_SORT_KEY = np.int64(-0x7FF0000000000000)
_FLOAT32_INFINITY, _FLOAT64_INFINITY = np.int64(0x7F800000), np.int64(0x7FF0000000000000)
_FLOAT32_SIGN, _FLOAT64_SIGN = np.int64(0x80000000), np.int64(-0x8000000000000000)


@kernel
def sum_group_scores(scores: np.ndarray, sums: np.ndarray, first: int, last: int) -> None:
    """Write the sums [groups, tokens] of scores [groups, heads, tokens], adding heads in order."""
    for group in range(first, last):
        for t in range(scores.shape[2]):
            total = scores[group, 0, t]
            for h in range(1, scores.shape[1]):
                total += scores[group, h, t]
            sums[group, t] = total


@kernel
def select_top_k(
    scores: np.ndarray,
    lengths: np.ndarray,
    budgets: np.ndarray,
    ends: tuple[int, int],
    selected: np.ndarray,
    counts: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Write rows first ... last - 1 of selected [rows, W], ascending, and their counts.

    The rest of a row becomes -1. Scores [rows, tokens] are integers of the same bits; row r has
    lengths[r] tokens, of which the best budgets[r] and `ends` of both ends are selected.
    """
    for row in range(first, last):
        n, budget = lengths[row], min(budgets[row], lengths[row])
        tokens, sort_keys, _ = candidates(scores[row], n, budget)
        threshold, n_equal = threshold_of(sort_keys, len(sort_keys), budget)
        counts[row] = write_selected(tokens, sort_keys, threshold, n_equal, n, ends, selected[row])


@helper
def write_selected(
    tokens: np.ndarray,
    sort_keys: np.ndarray,
    threshold: int,
    n_equal: int,
    n: int,
    ends: tuple[int, int],
    out: np.ndarray,
) -> int:
    """Write the tokens whose sort key is above a threshold, the first `n_equal` of those equal to
    it, and both ends of a sequence of n tokens; return how many tokens these are.
    """
    n_sink = min(ends[0], n)
    begin = max(n - ends[1], n_sink)  # of the last tokens
    # candidates ascend and those at the ends are skipped: the result ascends without sorting
    n_out = 0
    for t in range(n_sink):
        out[n_out] = t
        n_out += 1
    for c in range(len(sort_keys)):
        takes = sort_keys[c] > threshold
        if sort_keys[c] == threshold:
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
def sort_key(bits: int, is_float64: bool) -> Any:
    """Return an integer that orders as the float64 or float32 of these bits.

    -0 and 0 are equal, and NaN is infinity.
    """
    infinity = _FLOAT64_INFINITY if is_float64 else _FLOAT32_INFINITY
    size = bits & (np.int64(0x7FFFFFFFFFFFFFFF) if is_float64 else np.int64(0x7FFFFFFF))
    if size > infinity:
        return infinity
    return np.int64(size) if bits >= 0 else -np.int64(size)


@helper
def _bits_of(key: Any, is_float64: bool) -> Any:
    """Return bits whose sort key is `key`."""
    if key >= 0:
        return np.int64(key)
    if is_float64:
        return np.int64(-key) | _FLOAT64_SIGN
    return np.int64(-max(key, -_FLOAT32_INFINITY)) | _FLOAT32_SIGN


@helper
def candidates(scores: np.ndarray, n: int, budget: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return candidate tokens, ascending, their sort keys, and the threshold they all reach.

    At least the best `budget` of the n scores are among them, and every score that reaches the
    threshold. Scores are integers of the same bits.
    """
    if budget <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), LOWEST_SORT_KEY
    threshold, capacity = _sampled_threshold(scores, n, budget)
    tokens = np.empty(capacity + _LANES, np.int64)
    found = _collect(scores, n, threshold, tokens)
    if found < budget or found > capacity:  # the sample was not typical
        threshold, tokens = LOWEST_SORT_KEY, np.empty(n + _LANES, np.int64)
        found = _collect(scores, n, threshold, tokens)
    sort_keys = np.empty(found, np.int64)
    for c in range(found):
        sort_keys[c] = sort_key(np.int64(scores[tokens[c]]), scores.itemsize == 8)
    return tokens, sort_keys, threshold


@helper
def _collect(scores: np.ndarray, n: int, threshold: int, tokens: np.ndarray) -> int:
    """Write the tokens whose sort keys reach a threshold, and return how many.

    Stop once they exceed the capacity of `tokens`, which is all of it but 16: vectors write so many
    at a time.
    """
    is_float64 = scores.itemsize == 8
    capacity = tokens.shape[0] - _LANES
    whole = n // _LANES * _LANES
    found = 0
    bits = _bits_of(threshold, is_float64)
    for t in range(0, whole, _LANES):
        address = scores.ctypes.data + scores.itemsize * t
        if _CAN_COMPRESS:
            found += _append_reaching(address, bits, scores[0], t, tokens.ctypes.data + 8 * found)
        else:
            mask = _mask_reaching(address, bits, scores[0])
            while mask != 0:
                tokens[found] = t + _lowest(mask)
                found += 1
                mask &= mask - 1
        if found > capacity:
            return found
    for t in range(whole, n):
        if sort_key(np.int64(scores[t]), is_float64) >= threshold:
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
def _sampled_threshold(scores: np.ndarray, n: int, budget: int) -> tuple[Any, int]:
    """Return a sort key that slightly more than `budget` of n scores should reach, judged by a
    sample, and a capacity for those that do.
    """
    fraction = budget / max(n, 1)
    if n < 2 * _SAMPLE or fraction > 0.5:  # the sample would cost more than it saves
        return LOWEST_SORT_KEY, n
    sample = np.empty(_SAMPLE, np.int64)
    for i in range(_SAMPLE):
        sample[i] = sort_key(np.int64(scores[i * n // _SAMPLE]), scores.itemsize == 8)
    rank = _upper_count(fraction * _SAMPLE)
    threshold, _ = threshold_of(sample, _SAMPLE, int(rank))
    return threshold, min(n, int(_upper_count(rank) / _SAMPLE * n) + 1)


@helper
def _upper_count(expected: float) -> float:
    """Return a count that a sample hardly exceeds: four standard deviations above the expected."""
    return expected + 4 * np.sqrt(expected) + 8


@helper
def threshold_of(keys: np.ndarray, n: int, rank: int) -> tuple[Any, Any]:
    """Return the rank-th largest of n sort keys, and how many equal to it are among the `rank`
    largest.
    """
    if rank <= 0 or n == 0:
        return np.int64(0x7FFFFFFFFFFFFFFF), np.int64(0)
    lowest, highest = keys[0], keys[0]
    for i in range(1, n):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    # Radix selection: keys are lowest + an offset below 2^bits, whose digits are found from the
    # most significant down. All digits but the last have _RADIX_BITS bits, so that already the
    # first one separates keys.
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
        if bits > 0 and counts[digit] < n // 2:  # keep only the keys of this digit
            rest, found = np.empty(counts[digit], np.int64), 0
            for i in range(n):
                if np.uint64(keys[i] - lowest) <= largest:
                    rest[found] = keys[i]
                    found += 1
            keys, n = rest, found
    return lowest, left
