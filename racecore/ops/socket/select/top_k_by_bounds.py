"""The best keys of a group, picked by bounds of their scores.

Why: see `coarse`, where the bounds come from. Most keys are in or out by their bounds alone; the
few others are scored exactly, put together in blocks of 64 for the tile that scores them
everywhere. So what is selected is what exact scores select; the plain twin is `reference.select`.

A row is a key/value head of a sequence: row b * G + g.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.ops.simd.vectors import bits_of, float_of
from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.ops.socket.score.kernels import block_scorer, norm_of
from racecore.ops.socket.select.bounds import fill_bound_tables, fits, score_bounds
from racecore.ops.socket.select.top_k import (
    LOWEST_KEY,
    candidates,
    key_of,
    threshold_of,
    write_selected,
)
from racecore.runtime.jit import helper, kernel

__all__ = ["BOUND_AND_SETTLE", "SETTLE"]

_IN = np.int64(1 << 40)  # a key above that of any float32


def _row_settler(multiplies: bool) -> Any:
    """Return the function that picks for a row, for digits that are multiplied or added."""
    score_block = block_scorer(2, multiplies)

    @helper
    def score_undecided(call, row, tokens, undecided, keys, open_keys):
        """Write the exact keys of some tokens to keys[undecided] and open_keys, block after block."""
        group, n_tables = call.tables.shape[1] // call.codes.shape[1], call.tables.shape[2]
        b, g = divmod(row, call.codes.shape[1])
        tables, head, sizes = (
            call.tables[b, g * group].ctypes.data,
            call.tables.strides[1] // 4,
            (n_tables, 0),
        )
        codes, norms = (
            np.zeros((n_tables, BLOCK_TOKENS), np.uint8),
            np.zeros(BLOCK_TOKENS, np.uint16),
        )
        scores = np.empty((group, BLOCK_TOKENS), np.float32)
        block = (codes.ctypes.data, norms.ctypes.data)
        for start in range(0, len(open_keys), BLOCK_TOKENS):
            n = min(BLOCK_TOKENS, len(open_keys) - start)
            for i in range(n):
                _copy_key(
                    call.codes[b, g],
                    call.norms[b, g],
                    tokens[undecided[start + i]],
                    codes,
                    norms,
                    i,
                )
            score_block(*block, tables, group, head, sizes, scores.ctypes.data, BLOCK_TOKENS)
            for i in range(n):
                total = scores[0, i]
                for h in range(1, group):  # one after the other, as `add_groups` does
                    total += scores[h, i]
                open_keys[start + i] = keys[undecided[start + i]] = key_of(bits_of(total), False)

    @helper
    def settle_row(call, row, highs, n, most, ends, out):
        """Write the tokens of a row to out, as `ranking.pick` does, and return how many they are.

        highs are upper bounds, as integers of the same bits. A token is in if its lower bound is
        above the budget-th largest upper bound, and out if its upper bound is below the lower ones
        of `budget` tokens; the budget is at most all n.
        """
        budget = min(most, n)
        tokens, keys, bar = candidates(highs, n, budget)
        limit, _ = threshold_of(keys, len(keys), budget)
        lows, lowest = _lower_bounds(call, row, highs, tokens, keys, limit)
        if lowest < bar:  # then others may matter than those that reached the bar
            tokens, keys, bar = candidates(highs, n, n)
            lows, lowest = _lower_bounds(call, row, highs, tokens, keys, limit)
        undecided, n_open = np.empty(len(keys), np.int64), 0
        for c in range(len(keys)):
            if (lows[c] <= limit) & (keys[c] >= lowest):
                undecided[n_open] = c
                n_open += 1
        n_in = _decide(lows, limit, lowest, keys)
        open_keys = np.empty(n_open, np.int64)
        score_undecided(call, row, tokens, undecided, keys, open_keys)
        limit, n_equal = threshold_of(open_keys, n_open, budget - n_in)
        return write_selected(tokens, keys, limit, n_equal, n, ends, out)

    return settle_row


@helper
def _lower_bounds(call, row, highs, tokens, keys, limit):
    """Return keys of the lower bounds of tokens, and the lowest of those whose upper bounds,
    `keys`, reach a limit.
    """
    b, g = divmod(row, call.codes.shape[1])
    n, norms, distance = len(keys), call.norms[b, g], call.numbers[row, 2]
    lows, lowest = np.empty(n, np.int64), _IN
    for c in range(n):
        high = float_of(np.int64(highs[tokens[c]]))
        lows[c] = key_of(bits_of(high - norm_of(norms[tokens[c]]) * distance), False)
    for c in range(n):
        lowest = min(lowest, lows[c] if keys[c] >= limit else _IN)
    return lows, lowest


@helper
def _decide(lows: np.ndarray, limit: int, lowest: int, keys: np.ndarray) -> Any:
    """Let those that are in have the highest key, and those that are out the lowest; return how
    many are in.
    """
    n_in = np.int64(0)
    for c in range(len(keys)):
        key = keys[c] if keys[c] >= lowest else LOWEST_KEY
        keys[c] = _IN if lows[c] > limit else key
        n_in += 1 if lows[c] > limit else 0
    return n_in


@helper
def _copy_key(codes, norms, t, block_codes, block_norms, i):
    """Copy the codes and the norm of key t of a row to column i of a block."""
    block, lane = codes[t // BLOCK_TOKENS], t % BLOCK_TOKENS
    for table in range(block_codes.shape[0]):
        block_codes[table, i] = block[table, lane]
    block_norms[i] = norms[t]


def _settle_kernel(settle_row: Any, variant: str) -> Any:
    """Return the kernel that picks by bounds that are there."""

    def settle(call, highs, start, lengths, budgets, ends, selected, counts, first, last):
        """Write selected and counts [first:last], those of rows from `start` on, given upper bounds
        of scores.
        """
        for i in range(first, last):
            counts[i] = settle_row(
                call, start + i, highs[i], lengths[i], budgets[i], ends, selected[i]
            )

    return kernel(settle, variant)


def _bound_and_settle_kernel(settle_row: Any, variant: str) -> Any:
    """Return the kernel that also finds the bounds."""

    def bound_and_settle(call, longest, lengths, budgets, ends, selected, counts, first, last):
        """Do everything for rows first ... last - 1: tables, bounds, and which tokens; rows that do
        not fit are left alone.

        A row is picked from while its bounds are in the cache. `longest` is the room for them.
        """
        bounds, tasks = np.empty((1, longest), np.float32), np.zeros((1, 5), np.int64)
        highs = bounds[0].view(np.int32)
        for row in range(first, last):
            fill_bound_tables(call, row, row + 1)
            if fits(call, row):
                tasks[0, 0], tasks[0, 1] = divmod(row, call.codes.shape[1])
                tasks[0, 3] = -(-lengths[row] // BLOCK_TOKENS)
                score_bounds(call, tasks, bounds, 0, 1)
                counts[row] = settle_row(
                    call, row, highs, lengths[row], budgets[row], ends, selected[row]
                )

    return kernel(bound_and_settle, variant)


_SETTLERS = {
    multiplies: (_row_settler(multiplies), "multiplied" if multiplies else "added")
    for multiplies in (False, True)
}
SETTLE = {multiplies: _settle_kernel(*settler) for multiplies, settler in _SETTLERS.items()}
BOUND_AND_SETTLE = {
    multiplies: _bound_and_settle_kernel(*settler) for multiplies, settler in _SETTLERS.items()
}
