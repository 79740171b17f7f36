"""SOCKET with Numba kernels; see `reference` for the plain form.

The kernels lie in the folders of the stages: `score`, `select`, `attend`. What is here cuts each
operation into tasks, and sizes the memory between the stages.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import describe
from racecore.ops.simd.products import padded
from racecore.ops.socket.attend.splits import (
    ALL_TOKENS,
    TileGroup,
    attend_groups,
    dense_groups,
    heads_per_tile,
)
from racecore.ops.socket.launches import launch, task_table
from racecore.ops.socket.layout import (
    BLOCK_TOKENS,
    DIGIT_VALUES,
    HashedKeys,
    Scorer,
    high_bits,
    n_digits,
    to_norm16,
)
from racecore.ops.socket.score.kernels import (
    KINDS,
    SCORE_KERNELS,
    HashCall,
    ScoreCall,
    TableCall,
    fill_tables,
    hash_blocks,
    score_serially,
)
from racecore.ops.socket.select.bounds import (
    can_bound,
    fill_bound_tables,
    have_finite_bounds,
    new_bound_call,
    score_bounds,
)
from racecore.ops.socket.select.top_k import select_top_k, sum_group_scores
from racecore.ops.socket.select.top_k_by_bounds import BOUND_AND_SELECT, SELECT_BY_BOUNDS
from racecore.runtime import arrays
from racecore.runtime.threads import count, run

__all__ = ["attend_dense", "attend_selected", "hash_keys", "query_tables", "scores", "select"]

_HASHED_AT_ONCE = 1 << 15  # tokens whose norms are in memory as float64
_BLOCKS_OF_TASK = 128  # to score: 8,192 tokens, whose scores stay in the second-level cache
_SCORE_BYTES = 64 << 20  # of scores in memory while the best are selected
_HEADS_PER_THREAD = 4  # key/value heads from which on a thread takes whole ones
_PRODUCTS_AT_ONCE = 1 << 21  # to fill tables: fewer are done before a second thread has woken up


def hash_keys(
    key: np.ndarray,
    value: np.ndarray,
    planes: np.ndarray,
    scorer: Scorer,
    keys: HashedKeys,
    counts: np.ndarray,
) -> None:
    """Write codes and norms of new tokens behind those of `keys`, whose lengths do not change."""
    batch, n_tokens, n_kv_heads, head_dim = key.shape
    padded_planes = _padded(planes, arrays.compute_dtype(key.dtype))
    for start in range(0, n_tokens, _HASHED_AT_ONCE):
        stop = min(start + _HASHED_AT_ONCE, n_tokens)
        norms = np.empty((batch, n_kv_heads, stop - start))
        # a segment each; tokens that are padding belong to none
        tasks = [
            (b, t - start, min(t + SEGMENT, stop, int(count)) - start, int(keys.lengths[b]) + t)
            for b, count in enumerate(counts)
            for t in range(start, min(stop, int(count)), SEGMENT)
        ]
        k, v = key[:, start:stop], value[:, start:stop]
        call = HashCall(
            table=describe(None, k, v),
            tasks=task_table(tasks, 4),
            planes=padded_planes,
            codes=keys.codes,
            n_tables=keys.n_tables,
            high_bits=high_bits(keys.n_planes),
            head_dim=head_dim,
            value_dim=value.shape[3],
            weighs_keys=scorer.weighs_keys,
            weighs_values=scorer.weighs_values,
        )
        launch(partial(hash_blocks, call, norms), len(tasks))
        # rounded here and not in the kernel, so that the rule stands in one function, of `layout`
        for b, first, last, position in tasks:
            with np.errstate(over="ignore", invalid="ignore"):
                keys.norms[b, :, position : position + last - first] = to_norm16(
                    np.sqrt(norms[b, :, first:last])
                )


def query_tables(query: np.ndarray, planes: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Return the tables of queries, [B, H, L, N, 16] in the dtype of the arithmetic."""
    dtype = arrays.compute_dtype(query.dtype)
    batch, _, n_heads, head_dim = query.shape
    n_kv_heads, n_tables, n_planes, _ = planes.shape
    tables = arrays.empty((batch, n_heads, n_tables, n_digits(n_planes), DIGIT_VALUES), dtype)
    call = TableCall(
        table=describe(query),
        planes=_padded(planes, dtype),
        n_tables=n_tables,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        kind=KINDS[scorer.kind],
        factor=2 / (head_dim**0.5 * scorer.tau),
    )
    products = n_heads // n_kv_heads * n_tables * n_planes * head_dim  # of a task
    run(
        partial(fill_tables, call, tables),
        batch * n_kv_heads,
        max(1, _PRODUCTS_AT_ONCE // products),
    )
    return tables


def _padded(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return planes [G, L, P, D] as [G or 1, L*P, D padded with zeros]."""
    distinct = planes[:1] if planes.strides[0] == 0 else planes  # one if all heads share them
    n_heads, n_tables, n_planes, head_dim = distinct.shape
    wide = np.zeros((n_heads, n_tables * n_planes, padded(head_dim)), dtype)
    wide[:, :, :head_dim] = distinct.reshape(n_heads, n_tables * n_planes, head_dim)
    return wide


def scores(tables: np.ndarray, keys: HashedKeys, multiplies: bool) -> np.ndarray:
    """Return the scores of all keys, [B, H, T]; -inf behind the end of a sequence."""
    batch, n_heads = tables.shape[:2]
    longest = int(keys.lengths.max(initial=0))
    result = arrays.empty((batch, n_heads, _n_blocks(longest) * BLOCK_TOKENS), tables.dtype)
    _score(tables, keys, multiplies, _pairs(keys), result.reshape(batch * n_heads, -1))
    for b, length in enumerate(keys.lengths):
        result[b, :, length:] = -np.inf
    return result[:, :, :longest]


def _pairs(keys: HashedKeys) -> list[tuple[int, int]]:
    """Return all pairs (sequence, key/value head)."""
    return [(b, g) for b in range(keys.codes.shape[0]) for g in range(keys.codes.shape[1])]


def _score(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    pairs: list[tuple[int, int]],
    out: np.ndarray,
) -> None:
    """Write the scores of some pairs (sequence, key/value head) for all heads of their groups.

    out [pairs * group, tokens in whole blocks].
    """
    tasks = _score_tasks(keys, pairs, tables.shape[1] // keys.codes.shape[1])
    call = ScoreCall(
        tables=tables,
        codes=keys.codes,
        norms=keys.norms,
        tasks=tasks,
        n_tables=keys.n_tables,
        high_bits=high_bits(keys.n_planes),
        multiplies=multiplies,
    )
    kernel: Any = score_serially
    if tables.dtype == np.float32:
        kernel = SCORE_KERNELS[tables.shape[3], multiplies]
    launch(partial(kernel, call, out), len(tasks))


def _score_tasks(keys: HashedKeys, pairs: list[tuple[int, int]], rows_per_pair: int) -> np.ndarray:
    """Return tasks of scoring, int64 [n, 5].

    Sequence, key/value head, first and last block, first row of the result.
    """
    tasks = [
        (b, g, block, min(block + _BLOCKS_OF_TASK, n_blocks), row * rows_per_pair)
        for row, (b, g) in enumerate(pairs)
        for n_blocks in (_n_blocks(int(keys.lengths[b])),)
        for block in range(0, n_blocks, _BLOCKS_OF_TASK)
    ]
    return task_table(tasks, 5)


def select(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    budgets: np.ndarray,
    ends: tuple[int, int],
    is_shared: bool,
) -> np.ndarray:
    """Return the tokens to attend to, int64 [B, H, W]: ascending, padded with -1 at the end."""
    batch, n_heads = tables.shape[:2]
    n_kv_heads = keys.codes.shape[1]
    rows_per_pair = 1 if is_shared else n_heads // n_kv_heads
    # the best and both ends, if no token is chosen twice
    most = np.minimum(keys.lengths, np.minimum(budgets, keys.lengths) + sum(ends))
    selected = np.empty((batch * n_kv_heads * rows_per_pair, int(most.max(initial=0))), np.int64)
    counts = np.zeros(len(selected), np.int64)
    sequence = np.repeat(np.arange(batch), n_kv_heads * rows_per_pair)
    rows = _SelectedRows(keys.lengths[sequence], budgets[sequence], ends, selected, counts)
    # bounds are made for the sums of groups
    if not (
        is_shared and n_heads > n_kv_heads and _select_by_bounds(tables, keys, multiplies, rows)
    ):
        _select_by_scores(tables, keys, multiplies, rows_per_pair, rows)
    return selected[:, : int(counts.max(initial=0))].reshape(batch, n_kv_heads * rows_per_pair, -1)


class _SelectedRows(NamedTuple):
    """Rows of selected tokens: of key/value heads, or of query heads."""

    lengths: np.ndarray  # int64 [rows]
    budgets: np.ndarray  # int64 [rows]
    ends: tuple[int, int]
    selected: np.ndarray  # int64 [rows, W], the result
    counts: np.ndarray  # int64 [rows], how many tokens are selected

    def some(self, first: int, last: int) -> tuple[Any, ...]:
        """Return rows first ... last - 1, as the arguments of a kernel that selects."""
        lengths, budgets = self.lengths[first:last], self.budgets[first:last]
        return lengths, budgets, self.ends, self.selected[first:last], self.counts[first:last]


def _select_by_scores(
    tables: np.ndarray, keys: HashedKeys, multiplies: bool, rows_per_pair: int, rows: _SelectedRows
) -> None:
    """Select by exact scores of all keys: for as many pairs at once as the memory for their scores
    allows.
    """
    pairs, group = _pairs(keys), tables.shape[1] // keys.codes.shape[1]
    n_padded = _padded_length(keys)
    at_once = max(1, _SCORE_BYTES // max(1, n_padded * group * tables.dtype.itemsize))
    buffer = arrays.empty((min(at_once, len(pairs)) * group, n_padded), tables.dtype)
    n_sums = len(buffer) // group if rows_per_pair < group else 0
    sums = arrays.empty((n_sums, n_padded), tables.dtype)
    bits = np.dtype(f"i{tables.dtype.itemsize}")
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        score = buffer[: len(some) * group]
        _score(tables, keys, multiplies, some, score)
        if rows_per_pair < group:
            by_group = score.reshape(len(some), group, n_padded)
            score = sums[: len(some)]
            run(partial(sum_group_scores, by_group, score), len(some), 1)
        # integers of the same bits order as the scores do, see `top_k.sort_key`
        arguments = rows.some(start * rows_per_pair, (start + len(some)) * rows_per_pair)
        launch(partial(select_top_k, score.view(bits), *arguments), len(score))


def _select_by_bounds(
    tables: np.ndarray, keys: HashedKeys, multiplies: bool, rows: _SelectedRows
) -> bool:
    """Select for groups by bounds of their scores; return whether that was possible."""
    if not can_bound(tables, high_bits(keys.n_planes), int(keys.lengths.max(initial=0))):
        return False
    call = new_bound_call(tables, keys.codes.shape[1], keys.codes, keys.norms, multiplies)
    pairs, n_padded = _pairs(keys), _padded_length(keys)
    at_once = min(len(pairs), max(1, _SCORE_BYTES // (4 * n_padded)))
    # With enough heads for every thread, one kernel takes a head through all stages: threads wait
    # for each other once, and select from scores in the cache of their core.
    if at_once >= count() and len(pairs) >= _HEADS_PER_THREAD * count():
        kernel = BOUND_AND_SELECT[multiplies]
        run(partial(kernel, call, n_padded, *rows.some(0, len(pairs))), len(pairs), 1)
        return have_finite_bounds(call)
    run(partial(fill_bound_tables, call), len(pairs), 1)
    if not have_finite_bounds(call):
        return False
    upper = arrays.empty((at_once, n_padded), np.float32)
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        tasks = _score_tasks(keys, some, 1)
        launch(partial(score_bounds, call, tasks, upper), len(tasks))
        arguments = (upper.view(np.int32), start, *rows.some(start, start + len(some)))
        run(partial(SELECT_BY_BOUNDS[multiplies], call, *arguments), len(some), 1)
    return True


def _padded_length(keys: HashedKeys) -> int:
    """Return the tokens of the longest sequence, in whole blocks."""
    return _n_blocks(int(keys.lengths.max(initial=0))) * BLOCK_TOKENS


def _n_blocks(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK_TOKENS)


def attend_selected(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, selected: np.ndarray, out: np.ndarray
) -> None:
    """Write exact softmax attention of one query over selected tokens; zeros if there are none."""
    if selected.shape[2] == 0:
        out[...] = 0
        return
    if selected.strides[2] != selected.itemsize:  # kernels take the address of a row
        selected = np.ascontiguousarray(selected)
    counts = _counts(selected)
    n_sharing = query.shape[2] // selected.shape[1]
    heads = heads_per_tile(n_sharing)
    groups = [
        TileGroup([(b, h, 0, 1)], int(counts[b, h // n_sharing]))
        for b in range(len(query))
        for h in range(0, query.shape[2], heads)
    ]
    attend_groups((query, key, value, out), np.zeros(len(query), np.int64), selected, heads, groups)


def _counts(selected: np.ndarray) -> np.ndarray:
    """Return how many tokens every row has: [B, H or G].

    By bisection: tokens ascend, and the -1 behind them is the largest number without a sign.
    """
    unsigned, negative = selected.view(np.uint64), np.uint64(1 << 63)
    return np.array([[row.searchsorted(negative) for row in heads] for heads in unsigned])


def attend_dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Write exact causal softmax attention of the last Tq tokens of every sequence."""
    _, n_queries, n_heads, _ = query.shape
    heads = heads_per_tile(n_heads // key.shape[2])
    groups = dense_groups(lengths, n_queries, n_heads, heads)
    attend_groups((query, key, value, out), lengths, ALL_TOKENS, heads, groups)
