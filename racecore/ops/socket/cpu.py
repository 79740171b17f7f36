"""SOCKET with Numba kernels; see `reference` for the plain form. The kernels are in `scoring`,
`ranking` and `softmax`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import describe
from racecore.ops.simd.products import padded
from racecore.ops.socket.attend.kernels import ROWS, AttendCall, attend_splits, merge_splits
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
    SCORE_KERNELS,
    HashCall,
    ScoreCall,
    TableCall,
    fill_tables,
    hash_blocks,
    score_one_by_one,
)
from racecore.ops.socket.select.bounds import (
    can_bound,
    fill_bound_tables,
    new_call,
    overflows,
    score_bounds,
)
from racecore.ops.socket.select.top_k import add_groups, pick
from racecore.ops.socket.select.top_k_by_bounds import BOUND_AND_SETTLE, SETTLE
from racecore.runtime import arrays
from racecore.runtime.threads import count, run

__all__ = ["attend_dense", "attend_selected", "hash_keys", "query_tables", "scores", "select"]

_KINDS = {"soft": 0, "hamming": 1, "signed_jl": 2}
_HASHED_AT_ONCE = 1 << 15  # tokens whose norms are in memory as float64
_SCORED_AT_ONCE = 128  # blocks of a task: 8,192 tokens, whose scores stay in the second-level cache
_SCORE_BYTES = 64 << 20  # of scores in memory while the best are picked
_PARTIAL_BYTES = 32 << 20  # of sums of shares
_LAUNCHES = 8  # for each thread
_ROWS_EACH = 4  # key/value heads for each thread, from which on threads take whole ones
_PRODUCTS_AT_ONCE = (
    1 << 21
    # of a launch that fills tables, and numbers of one that joins: less is done before a helper wakes
)
_JOINED_AT_ONCE = 1 << 16
_MOST_SHARES = 64  # of a tile
_LONGEST_SHARE = 1 << 17  # tokens: a launch must not take long, for Ctrl-C
_MOST_TILES = 16  # side by side: their sums stay in the second-level cache
_NOTHING_SELECTED = np.zeros((0, 0, 0), np.int64)


def hash_keys(
    key: np.ndarray,
    value: np.ndarray,
    planes: np.ndarray,
    scorer: Scorer,
    keys: HashedKeys,
    counts: np.ndarray,
) -> None:
    """Write bits and norms of new tokens behind those that `keys` has; its lengths stay as they
    are.
    """
    batch, n_tokens, n_kv_heads, head_dim = key.shape
    padded_planes = _padded(planes, arrays.compute_dtype(key.dtype))
    for start in range(0, n_tokens, _HASHED_AT_ONCE):
        stop = min(start + _HASHED_AT_ONCE, n_tokens)
        norms = np.empty((batch, n_kv_heads, stop - start))
        tasks = [
            (b, t - start, min(t + SEGMENT, stop, int(count)) - start, int(keys.lengths[b]) + t)
            for b, count in enumerate(counts)
            for t in range(start, min(stop, int(count)), SEGMENT)
        ]
        k, v = key[:, start:stop], value[:, start:stop]
        call = HashCall(
            table=describe(None, k, v),
            tasks=_table(tasks, 4),
            planes=padded_planes,
            codes=keys.codes,
            n_tables=keys.n_tables,
            high_bits=high_bits(keys.n_planes),
            head_dim=head_dim,
            value_dim=value.shape[3],
            weighs_keys=scorer.weighs_keys,
            weighs_values=scorer.weighs_values,
        )
        _run_some(partial(hash_blocks, call, norms), len(tasks))
        for b, first, last, place in tasks:
            with np.errstate(over="ignore", invalid="ignore"):
                keys.norms[b, :, place : place + last - first] = to_norm16(
                    np.sqrt(norms[b, :, first:last])
                )


def query_tables(query: np.ndarray, planes: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Return what every digit of a key's code is worth to a query, [B, H, L, N, 16] in the dtype of
    the arithmetic.
    """
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
        kind=_KINDS[scorer.kind],
        factor=2 / (head_dim**0.5 * scorer.tau),
    )
    products = n_heads // n_kv_heads * n_tables * n_planes * head_dim
    run(
        partial(fill_tables, call, tables),
        batch * n_kv_heads,
        max(1, _PRODUCTS_AT_ONCE // products),
    )
    return tables


def scores(tables: np.ndarray, keys: HashedKeys, multiplies: bool) -> np.ndarray:
    """Return what queries think of every key, [B, H, T]: (sum over tables) * norm, and -inf behind
    the end of a sequence.
    """
    batch, n_heads = tables.shape[:2]
    longest = int(keys.lengths.max(initial=0))
    result = arrays.empty((batch, n_heads, _whole_blocks(longest) * BLOCK_TOKENS), tables.dtype)
    pairs = [(b, g) for b in range(batch) for g in range(keys.codes.shape[1])]
    _score(tables, keys, multiplies, pairs, result.reshape(batch * n_heads, -1))
    for b, length in enumerate(keys.lengths):
        result[b, :, length:] = -np.inf
    return result[:, :, :longest]


def _score(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    pairs: list[tuple[int, int]],
    out: np.ndarray,
) -> None:
    """Score all keys of some (sequence, key/value head) for the heads of their groups: rows of out
    [rows, tokens].
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
    kernel: Any = score_one_by_one
    if tables.dtype == np.float32:
        kernel = SCORE_KERNELS[tables.shape[3], multiplies]
    _run_some(partial(kernel, call, out), len(tasks))


def _score_tasks(keys: HashedKeys, pairs: list[tuple[int, int]], rows_per_pair: int) -> np.ndarray:
    """Return tasks of scoring, int64 [n, 5]: sequence, key/value head, first and last block, first
    row of the result.
    """
    tasks = [
        (b, g, block, min(block + _SCORED_AT_ONCE, n_blocks), row * rows_per_pair)
        for row, (b, g) in enumerate(pairs)
        for n_blocks in (_whole_blocks(int(keys.lengths[b])),)
        for block in range(0, n_blocks, _SCORED_AT_ONCE)
    ]
    return _table(tasks, 5)


def select(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    budgets: np.ndarray,
    ends: tuple[int, int],
    is_shared: bool,
) -> np.ndarray:
    """Return the tokens to attend to, int64 [B, H, W]: ascending, without duplicates, padded with
    -1 at the end.
    """
    batch, n_heads = tables.shape[:2]
    n_kv_heads = keys.codes.shape[1]
    rows_per_pair = 1 if is_shared else n_heads // n_kv_heads
    width = int(
        np.minimum(keys.lengths, np.minimum(budgets, keys.lengths) + sum(ends)).max(initial=0)
    )
    selected = np.empty((batch * n_kv_heads * rows_per_pair, width), np.int64)
    counts = np.zeros(len(selected), np.int64)
    sequence = np.repeat(np.arange(batch), n_kv_heads * rows_per_pair)
    picks = _Picks((keys.lengths[sequence], budgets[sequence]), ends, (selected, counts))
    if not (
        is_shared and n_heads > n_kv_heads and _select_by_bounds(tables, keys, multiplies, picks)
    ):
        _select_by_scores(tables, keys, multiplies, rows_per_pair, picks)
    return selected[:, : int(counts.max(initial=0))].reshape(batch, n_kv_heads * rows_per_pair, -1)


class _Picks(NamedTuple):
    """What to pick, by row: of every sequence and key/value head, or of every query head."""

    limits: tuple[np.ndarray, np.ndarray]  # lengths and budgets
    ends: tuple[int, int]
    results: tuple[np.ndarray, np.ndarray]  # tokens and how many they are

    def some(self, first: int, last: int) -> Any:
        """Return arguments of a kernel that picks rows first ... last - 1."""
        return (
            *(x[first:last] for x in self.limits),
            self.ends,
            *(x[first:last] for x in self.results),
        )


def _pairs(keys: HashedKeys) -> list[tuple[int, int]]:
    return [(b, g) for b in range(keys.codes.shape[0]) for g in range(keys.codes.shape[1])]


def _select_by_scores(
    tables: np.ndarray, keys: HashedKeys, multiplies: bool, rows_per_pair: int, picks: _Picks
) -> None:
    """Score all keys exactly, and pick the best; a few key/value heads at once, as the memory for
    their scores allows.
    """
    pairs, group = _pairs(keys), tables.shape[1] // keys.codes.shape[1]
    longest = _room_for(keys)
    at_once = max(1, _SCORE_BYTES // max(1, longest * group * tables.dtype.itemsize))
    room = arrays.empty((min(at_once, len(pairs)) * group, longest), tables.dtype)
    sums = arrays.empty((len(room) // group if rows_per_pair < group else 0, longest), tables.dtype)
    bits = np.dtype(f"i{tables.dtype.itemsize}")
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        score = room[: len(some) * group]
        _score(tables, keys, multiplies, some, score)
        if rows_per_pair < group:
            by_group = score.reshape(len(some), group, longest)
            score = sums[: len(some)]
            run(partial(add_groups, by_group, score), len(some), 1)
        arguments = picks.some(start * rows_per_pair, (start + len(some)) * rows_per_pair)
        _run_some(partial(pick, score.view(bits), *arguments), len(score))


def _select_by_bounds(
    tables: np.ndarray, keys: HashedKeys, multiplies: bool, picks: _Picks
) -> bool:
    """Do the same for groups by bounds of their scores; tell whether that could be done."""
    if not can_bound(tables, high_bits(keys.n_planes), int(keys.lengths.max(initial=0))):
        return False
    coarse, pairs = (
        new_call(tables, keys.codes.shape[1], keys.codes, keys.norms, multiplies),
        _pairs(keys),
    )
    longest = _room_for(keys)
    at_once = min(len(pairs), max(1, _SCORE_BYTES // (4 * longest)))
    if at_once >= count() and len(pairs) >= _ROWS_EACH * count():
        arguments = picks.some(0, len(pairs))
        run(partial(BOUND_AND_SETTLE[multiplies], coarse, longest, *arguments), len(pairs), 1)
        return not overflows(coarse)
    run(partial(fill_bound_tables, coarse), len(pairs), 1)
    if overflows(coarse):
        return False
    room = arrays.empty((at_once, longest), np.float32)
    for start in range(0, len(pairs), at_once):
        some = pairs[start : start + at_once]
        tasks = _score_tasks(keys, some, 1)
        _run_some(partial(score_bounds, coarse, tasks, room), len(tasks))
        arguments = (room.view(np.int32), start, *picks.some(start, start + len(some)))
        run(partial(SETTLE[multiplies], coarse, *arguments), len(some), 1)
    return True


def _room_for(keys: HashedKeys) -> int:
    return _whole_blocks(int(keys.lengths.max(initial=0))) * BLOCK_TOKENS


def attend_selected(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, selected: np.ndarray, out: np.ndarray
) -> None:
    """Write exact softmax attention, scale 1/sqrt(D), of one query over selected tokens; zeros
    where there are none.
    """
    if selected.shape[2] == 0:
        out[...] = 0
        return
    if selected.strides[2] != selected.itemsize:  # kernels take the address of a list
        selected = np.ascontiguousarray(selected)
    counts = _counts(selected)
    sharing = query.shape[2] // selected.shape[1]
    heads = _heads_per_tile(sharing)
    runs = [
        _Run([(b, h, 0, 1)], int(counts[b, h // sharing]))
        for b in range(len(query))
        for h in range(0, query.shape[2], heads)
    ]
    _attend((query, key, value, out), np.zeros(len(query), np.int64), selected, heads, runs)


def _counts(selected: np.ndarray) -> np.ndarray:
    """Return how many tokens every list has: they ascend, and without a sign the -1 behind them is
    the largest number.
    """
    unsigned, negative = selected.view(np.uint64), np.uint64(1 << 63)
    return np.array([[row.searchsorted(negative) for row in lists] for lists in unsigned])


def attend_dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Write exact causal softmax attention, scale 1/sqrt(D), of the last Tq tokens of every
    sequence.
    """
    batch, n_queries, n_heads, _ = query.shape
    heads = _heads_per_tile(n_heads // key.shape[2])
    step = max(1, ROWS // heads)
    runs = []
    for b in range(batch):
        tiles = [
            (b, h, i, min(step, n_queries - i))
            for i in range(0, n_queries, step)
            for h in range(0, n_heads, heads)
        ]
        side_by_side = min(n_heads // heads, _MOST_TILES) if n_queries == 1 else 1
        for first in range(0, len(tiles), side_by_side):
            some = tiles[first : first + side_by_side]
            seen = int(lengths[b]) - n_queries + some[0][2] + some[0][3]
            runs.append(_Run(some, max(0, seen)))
    _attend((query, key, value, out), lengths, _NOTHING_SELECTED, heads, runs)


class _Run(NamedTuple):
    """Tiles that go through the same tokens together."""

    tiles: list[tuple[int, int, int, int]]  # sequence, first head, first query, number of queries
    n_tokens: int


def _attend(
    tensors: tuple[np.ndarray, ...],
    lengths: np.ndarray,
    selected: np.ndarray,
    heads: int,
    runs: list[_Run],
) -> None:
    """Attend run after run; some at once, as many as the memory for their sums allows."""
    query, key, value, _ = tensors
    n_queries, width = query.shape[1], 2 + value.shape[3]
    n_tiles = max((len(run.tiles) for run in runs), default=1)
    rows = heads * max((tile[3] for run in runs for tile in run.tiles), default=1)
    longest = max((run.n_tokens for run in runs), default=1)
    sums_of_run = max(1, -(-longest // _share(longest, n_queries))) * n_tiles * rows * width * 8
    at_once = max(1, _PARTIAL_BYTES // sums_of_run)
    for start in range(0, len(runs), at_once):
        tiles: list[tuple[int, ...]] = []
        shares: list[tuple[int, ...]] = []
        for some, n_tokens in runs[start : start + at_once]:
            step, first = _share(n_tokens, n_queries), len(shares)
            shares += [
                (len(tiles), len(tiles) + len(some), t, min(t + step, n_tokens))
                for t in range(0, n_tokens, step)
            ]
            tiles += [(*tile, first, len(shares), j) for j, tile in enumerate(some)]
        call = AttendCall(
            table=describe(*tensors),
            tiles=_table(tiles, 7),
            shares=_table(shares, 4),
            lengths=lengths,
            selected=selected,
            like=np.empty(0, arrays.compute_dtype(query.dtype)),
            n_heads=query.shape[2],
            n_kv_heads=key.shape[2],
            n_queries=n_queries,
            heads_per_tile=heads,
            head_dim=query.shape[3],
            value_dim=value.shape[3],
        )
        sums = np.empty((len(shares), n_tiles, rows, width))
        _run_some(partial(attend_splits, call, sums), len(shares))
        run(
            partial(merge_splits, call, sums),
            len(tiles),
            max(1, _JOINED_AT_ONCE * len(tiles) // max(1, sums.size)),
        )


def _heads_per_tile(n_sharing: int) -> int:
    """Return how many of the heads that share their rows a tile takes: as many as fit, in equal
    parts.
    """
    return next(n for n in range(min(n_sharing, ROWS), 0, -1) if n_sharing % n == 0)


def _share(n_tokens: int, n_queries: int) -> int:
    """Return the tokens of a share: whole segments; few shares where there are many tiles, those of
    a prefill.
    """
    n_splits = _MOST_SHARES if n_queries == 1 else 1
    return min(max(SEGMENT, -(-n_tokens // (SEGMENT * n_splits)) * SEGMENT), _LONGEST_SHARE)


def _padded(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return planes as kernels take them: [G or 1, L*P, D padded]."""
    own = planes[:1] if planes.strides[0] == 0 else planes  # heads share them
    wide = np.zeros((len(own), own.shape[1] * own.shape[2], padded(own.shape[3])), dtype)
    wide[:, :, : own.shape[3]] = own.reshape(*wide.shape[:2], -1)
    return wide


def _run_some(launch: Callable[[int, int], object], n_tasks: int) -> None:
    """Run tasks, several of them at a time where there are many: a launch takes ten microseconds,
    in which no other can begin.
    """
    run(launch, n_tasks, max(1, n_tasks // (_LAUNCHES * count())))


def _whole_blocks(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK_TOKENS)


def _table(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(len(rows), width)
