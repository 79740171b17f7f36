"""The kernel that picks the best tokens of a row of scores, exactly, in time linear in its length.

A sample of the scores gives a bar that a few more than the wanted tokens should clear. One pass notes who does; among those the
score of the last one wanted is found digit by digit, and whoever is above it is in. Should too few clear the bar, everybody
counts as having done so: the sample saves time, it never decides.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.jit import helper, kernel

__all__ = ["add_groups", "pick"]

_SAMPLE = 2048
_RADIX_BITS = 8


@kernel
def add_groups(scores: np.ndarray, sums: np.ndarray, first: int, last: int) -> None:
    """Write the sums [groups, tokens] of the scores [groups, heads, tokens] of a group's heads, added one after the other."""
    for group in range(first, last):
        for t in range(scores.shape[2]):
            total = scores[group, 0, t]
            for h in range(1, scores.shape[1]):
                total += scores[group, h, t]
            sums[group, t] = total


@kernel
def pick(
    scores: np.ndarray, lengths: np.ndarray, budgets: np.ndarray, sink: int, window: int,
    selected: np.ndarray, counts: np.ndarray, first: int, last: int,
) -> None:  # fmt: skip
    """Write rows first ... last - 1 of selected [rows, W], ascending, and how many they are; the rest becomes -1.

    scores are [rows, tokens] and belong to sequences lengths[row]; they come as integers of the same bits.
    """
    for row in range(first, last):
        n, budget = lengths[row], min(budgets[row], lengths[row])
        n_sink, begin = min(sink, n), max(n - window, min(sink, n))
        out = selected[row]
        # tokens that may be among the best: all of them where all are wanted
        candidates, keys, n_candidates = _candidates(scores[row], n, budget)
        limit, n_equal = _limit(keys, n_candidates, budget)
        n_out = 0
        for t in range(n_sink):
            out[n_out] = t
            n_out += 1
        for c in range(n_candidates):
            t, key = candidates[c], keys[c]
            takes = budget > 0 and key >= limit
            if takes and key == limit:
                takes = n_equal > 0
                n_equal -= 1
            if takes and t >= n_sink and t < begin:
                out[n_out] = t
                n_out += 1
        for t in range(begin, n):
            out[n_out] = t
            n_out += 1
        counts[row] = n_out
        for i in range(n_out, out.shape[0]):
            out[i] = -1


@helper
def _key(bits: int, highest: int) -> Any:
    """Return an integer that orders as the number of these bits does; -0 is 0, and NaN infinity."""
    size = bits & highest
    infinity = np.int64(0x7F800000) if highest == 0x7FFFFFFF else np.int64(0x7FF0000000000000)
    if size > infinity:
        return infinity
    return np.int64(size) if bits >= 0 else -np.int64(size)


@helper
def _candidates(scores: np.ndarray, n: int, budget: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return tokens, ascending, with their keys and their number: at least the `budget` best."""
    wide = scores.itemsize == 8
    highest = np.int64(0x7FFFFFFFFFFFFFFF) if wide else np.int64(0x7FFFFFFF)
    infinity = np.int64(0x7FF0000000000000) if wide else np.int64(0x7F800000)
    bar = _bar(scores, n, budget, highest)
    tokens = np.empty(n if budget > 0 else 0, np.int64)
    found = 0
    if budget > 0 and bar > 0:
        for t in range(n):  # no branches, and no keys: bits that are no sign order as the numbers do
            bits = np.int64(scores[t])
            tokens[found] = t
            found += (bits >= bar) | (bits & highest > infinity)
    if found < budget:
        for t in range(n):
            tokens[t] = t
        found = n
    keys = np.empty(found, np.int64)
    for c in range(found):
        keys[c] = _key(np.int64(scores[tokens[c]]), highest)
    return tokens, keys, found


@helper
def _bar(scores: np.ndarray, n: int, budget: int, highest: int) -> int:
    """Return a key that somewhat more than `budget` of all keys should reach, judged by a sample."""
    step = n // _SAMPLE
    share = budget / max(n, 1)
    if step < 2 or share > 0.5:
        return -highest
    sample = np.empty(_SAMPLE, np.int64)
    for i in range(_SAMPLE):
        sample[i] = _key(np.int64(scores[i * step]), highest)
    rank = int(share * _SAMPLE + 4 * np.sqrt(share * _SAMPLE) + 8)
    limit, _ = _limit(sample, _SAMPLE, rank)
    return limit


@helper
def _limit(keys: np.ndarray, n: int, rank: int) -> tuple[Any, Any]:
    """Return the rank-th largest of n keys, and how many of those equal to it belong to the `rank` largest."""
    if rank <= 0 or n == 0:
        return np.int64(0), np.int64(0)
    lowest, highest = keys[0], keys[0]
    for i in range(1, n):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    # keys are lowest + something below 2^bits: find it digit by digit, from the most significant down
    bits = 0
    while bits < 64 and (np.uint64(highest - lowest) >> np.uint64(bits)) > 0:
        bits += _RADIX_BITS
        if bits >= 64:
            break
    counts = np.empty(1 << _RADIX_BITS, np.int64)
    prefix, left = np.uint64(0), rank
    while bits > 0:
        bits -= _RADIX_BITS
        counts[:] = 0
        for i in range(n):
            offset = np.uint64(keys[i] - lowest)
            if bits + _RADIX_BITS >= 64 or offset >> np.uint64(bits + _RADIX_BITS) == prefix:
                counts[np.int64(offset >> np.uint64(bits)) & 255] += 1
        digit = (1 << _RADIX_BITS) - 1
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        prefix = (prefix << np.uint64(_RADIX_BITS)) | np.uint64(digit)
    return lowest + np.int64(prefix), left
