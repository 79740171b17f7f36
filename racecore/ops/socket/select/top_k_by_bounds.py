"""Exact top-k of a group's scores by their bounds.

Why: most tokens are selected or excluded by their bounds alone, see `bounds`. Only the others, the
uncertain candidates, are scored exactly: their codes are copied into blocks of 64, for the tile
that scores all keys elsewhere. So the selection is that of exact scores; the plain twin is
`reference.select`.

A row is a key/value head of a sequence: row b * G + g. Sort keys are those of `top_k`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.ops.simd.vectors import bits_of, float_of
from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.ops.socket.score.kernels import block_scorer, widen_norm16
from racecore.ops.socket.select.bounds import (
    WIDTH,
    BoundCall,
    fill_bound_tables,
    has_finite_bounds,
    score_bounds,
)
from racecore.ops.socket.select.top_k import (
    LOWEST_SORT_KEY,
    candidates,
    sort_key,
    threshold_of,
    write_selected,
)
from racecore.runtime.jit import helper, kernel

__all__ = ["BOUND_AND_SELECT", "SELECT_BY_BOUNDS"]

_SELECTED = np.int64(1 << 40)  # above the sort key of any float32


def _row_selector(multiplies: bool) -> Any:
    """Return the function that selects for a row, for digits that are multiplied or added."""
    score_block = block_scorer(2, multiplies)

    @helper
    def score_uncertain(call, row, tokens, uncertain, sort_keys):
        """Return exact sort keys of uncertain candidates, written to sort_keys[uncertain] too."""
        group, n_tables = call.tables.shape[1] // call.codes.shape[1], call.tables.shape[2]
        b, g = divmod(row, call.codes.shape[1])
        # one block, filled again and again: the last one may repeat some keys, whose scores are
        # not read
        tables = call.tables[b, g * group].ctypes.data
        head = call.tables.strides[1] // 4
        sizes = (n_tables, 0)
        codes = np.zeros((n_tables, BLOCK_TOKENS), np.uint8)
        norms = np.zeros(BLOCK_TOKENS, np.uint16)
        scores = np.empty((group, BLOCK_TOKENS), np.float32)
        block = (codes.ctypes.data, norms.ctypes.data)
        exact = np.empty(len(uncertain), np.int64)
        for start in range(0, len(uncertain), BLOCK_TOKENS):
            n = min(BLOCK_TOKENS, len(uncertain) - start)
            for i in range(n):
                token = tokens[uncertain[start + i]]
                _copy_key(call.codes[b, g], call.norms[b, g], token, codes, norms, i)
            score_block(*block, tables, group, head, sizes, scores.ctypes.data, BLOCK_TOKENS)
            for i in range(n):
                total = scores[0, i]
                for h in range(1, group):  # in the order of `sum_group_scores`, for its bits
                    total += scores[h, i]
                exact[start + i] = sort_keys[uncertain[start + i]] = sort_key(bits_of(total), False)
        return exact

    @helper
    def select_row(call, row, upper, n, budget, ends, out):
        """Write the tokens of a row to out, as `top_k.select_top_k` does, and return how many.

        `upper` has upper bounds of n scores, as integers of the same bits. A token is selected if
        its lower bound is above the threshold, the budget-th largest upper bound. It is excluded if
        its upper bound is below the cutoff: `budget` tokens have lower bounds that reach it.
        """
        budget = min(budget, n)
        # candidates by upper bound: at least the `budget` largest are among them
        tokens, sort_keys, sampled = candidates(upper, n, budget)
        threshold, _ = threshold_of(sort_keys, len(sort_keys), budget)
        lower, cutoff = _lower_bounds(call, row, upper, tokens, sort_keys, threshold)
        if cutoff < sampled:  # then tokens matter that are no candidates yet
            tokens, sort_keys, _ = candidates(upper, n, n)
            lower, cutoff = _lower_bounds(call, row, upper, tokens, sort_keys, threshold)
        # exact scores decide between those that remain, for what remains of the budget
        uncertain = _uncertain(lower, sort_keys, threshold, cutoff)
        n_selected = _apply_bounds(lower, threshold, cutoff, sort_keys)
        exact = score_uncertain(call, row, tokens, uncertain, sort_keys)
        threshold, n_equal = threshold_of(exact, len(exact), budget - n_selected)
        return write_selected(tokens, sort_keys, threshold, n_equal, n, ends, out)

    return select_row


@helper
def _lower_bounds(
    call: BoundCall,
    row: int,
    upper: np.ndarray,
    tokens: np.ndarray,
    sort_keys: np.ndarray,
    threshold: int,
) -> tuple[np.ndarray, Any]:
    """Return sort keys of the lower bounds of candidates, and the cutoff: the lowest of those whose
    upper bounds, `sort_keys`, reach the threshold.
    """
    b, g = divmod(row, call.codes.shape[1])
    n, norms, width = len(sort_keys), call.norms[b, g], call.scales[row, WIDTH]
    lower, cutoff = np.empty(n, np.int64), _SELECTED
    for c in range(n):
        bound = float_of(np.int64(upper[tokens[c]]))
        bound -= widen_norm16(norms[tokens[c]]) * width
        lower[c] = sort_key(bits_of(bound), False)
    for c in range(n):
        cutoff = min(cutoff, lower[c] if sort_keys[c] >= threshold else _SELECTED)
    return lower, cutoff


@helper
def _uncertain(lower: np.ndarray, sort_keys: np.ndarray, threshold: int, cutoff: int) -> np.ndarray:
    """Return the indices of candidates that bounds neither select nor exclude."""
    uncertain, n = np.empty(len(sort_keys), np.int64), 0
    for c in range(len(sort_keys)):
        if (lower[c] <= threshold) & (sort_keys[c] >= cutoff):
            uncertain[n] = c
            n += 1
    return uncertain[:n]


@helper
def _apply_bounds(lower: np.ndarray, threshold: int, cutoff: int, sort_keys: np.ndarray) -> Any:
    """Give selected candidates the highest sort key and excluded ones the lowest; return how many
    are selected.
    """
    n_selected = np.int64(0)
    # selections instead of branches: which way a random key goes cannot be predicted
    for c in range(len(sort_keys)):
        key = sort_keys[c] if sort_keys[c] >= cutoff else LOWEST_SORT_KEY
        sort_keys[c] = _SELECTED if lower[c] > threshold else key
        n_selected += 1 if lower[c] > threshold else 0
    return n_selected


@helper
def _copy_key(
    codes: np.ndarray,
    norms: np.ndarray,
    token: int,
    block_codes: np.ndarray,
    block_norms: np.ndarray,
    i: int,
) -> None:
    """Copy the code bytes and the norm of a token's key to column i of a block [L, 64]."""
    block, lane = codes[token // BLOCK_TOKENS], token % BLOCK_TOKENS
    for table in range(block_codes.shape[0]):
        block_codes[table, i] = block[table, lane]
    block_norms[i] = norms[token]


def _select_kernel(select_row: Any, variant: str) -> Any:
    """Return the kernel that selects, given bounds."""

    def select_by_bounds(call, upper, start, lengths, budgets, ends, selected, counts, first, last):
        """Write selected and counts [first:last], given upper bounds [rows, tokens] of scores.

        These are rows of the result; `start` is the first one's key/value head.
        """
        for i in range(first, last):
            counts[i] = select_row(
                call, start + i, upper[i], lengths[i], budgets[i], ends, selected[i]
            )

    return kernel(select_by_bounds, variant)


def _bound_and_select_kernel(select_row: Any, variant: str) -> Any:
    """Return the kernel that finds the bounds as well."""

    def bound_and_select(call, n_padded, lengths, budgets, ends, selected, counts, first, last):
        """Write selected and counts [first:last]; rows without finite bounds are left unwritten.

        Tables, bounds and selection of one row follow each other, so that its bounds, `n_padded` of
        them, are still in the core's cache when it selects.
        """
        bounds, tasks = np.empty((1, n_padded), np.float32), np.zeros((1, 5), np.int64)
        upper = bounds[0].view(np.int32)
        for row in range(first, last):
            fill_bound_tables(call, row, row + 1)
            if has_finite_bounds(call, row):
                tasks[0, 0], tasks[0, 1] = divmod(row, call.codes.shape[1])
                tasks[0, 3] = -(-lengths[row] // BLOCK_TOKENS)
                score_bounds(call, tasks, bounds, 0, 1)
                counts[row] = select_row(
                    call, row, upper, lengths[row], budgets[row], ends, selected[row]
                )

    return kernel(bound_and_select, variant)


_SELECTORS = {
    multiplies: (_row_selector(multiplies), "multiplied" if multiplies else "added")
    for multiplies in (False, True)
}
SELECT_BY_BOUNDS = {
    multiplies: _select_kernel(*selector) for multiplies, selector in _SELECTORS.items()
}
BOUND_AND_SELECT = {
    multiplies: _bound_and_select_kernel(*selector) for multiplies, selector in _SELECTORS.items()
}
