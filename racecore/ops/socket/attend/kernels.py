"""The kernel of exact softmax attention over a run of tokens or a list of them; `reference` says
the same in a line.

A task is a *tile* of up to 32 rows, that is query heads of one key/value head and some queries of
theirs, and a share of the tokens that they see. It goes through these in blocks, keeps the largest
logit, the sum of weights and the weighted sum of values of every row, float32 within a segment of
1,024 tokens and float64 beyond. Shares of one tile are put together in their order. Shares are cut
by the length of a sequence alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from racecore.chunking import BLOCK, SEGMENT, TOKENS
from racecore.ops.cpu.row_io import (
    ANY_IN_PLACE,
    IN_PLACE,
    KEY,
    OUT,
    QUERY,
    VALUE,
    load_rows,
    load_scattered,
    read,
    rows_to_prefetch,
    store_rows,
)
from racecore.ops.simd.memory import clear_columns, clear_rows, matrices
from racecore.ops.simd.products import (
    NO_PREFETCH,
    accumulate,
    input_rows,
    output_rows,
    padded,
    project,
)
from racecore.ops.simd.vectors import address_of
from racecore.ops.socket.attend.decode import (
    GATHER_BLOCK,
    LISTS,
    GatheredSums,
    arrange_queries,
    attend_gathered,
    can_attend_gathered,
    scale_of,
)
from racecore.ops.socket.attend.online_softmax import RowSums, clear, flush, weigh_row
from racecore.runtime.jit import helper, kernel

__all__ = ["ROWS", "AttendCall", "attend_splits", "merge_splits"]

ROWS = 32  # of a tile, at most


class AttendCall(NamedTuple):
    """What attention needs; `table` holds addresses, see ops.cpu.row_io."""

    table: np.ndarray  # int64 [4, 6]
    # int64 [n, 7]: sequence, first head, first query, number of queries, first and last share,
    # place in those
    tiles: np.ndarray
    shares: (
        np.ndarray
    )  # int64 [n, 4]: first and last tile, first and last token or place in the list
    lengths: np.ndarray  # int64 [B]
    selected: np.ndarray  # int64 [B, H or G, W], W = 0: all tokens
    like: np.ndarray  # [0] in the dtype of the arithmetic
    n_heads: int  # H
    n_kv_heads: int  # G
    n_queries: int  # Tq
    heads_per_tile: int
    head_dim: int
    value_dim: int


@kernel
def attend_splits(call: AttendCall, partial: np.ndarray, first: int, last: int) -> None:
    """Write what shares first ... last - 1 amount to: partial [shares, tiles, R, 2 + V], peak,
    weight and weighted values.
    """
    dtype, n_most, n_rows = call.like.dtype, partial.shape[1], partial.shape[2]
    wide_d, wide_v = padded(call.head_dim), padded(call.value_dim)
    q, sums = matrices(n_most, n_rows, wide_d, dtype), matrices(n_most, n_rows, wide_v, dtype)
    k, v = matrices(1, TOKENS, wide_d, dtype)[0], matrices(1, TOKENS, wide_v, dtype)[0]
    is_gathered = can_attend_gathered(
        call.table, call.n_queries, (call.head_dim, call.value_dim), k, v
    )
    c = matrices(1, n_rows, GATHER_BLOCK if is_gathered else TOKENS, dtype)[0]
    for j in range(n_most):
        clear_columns(q[j], call.head_dim)
    clear_columns(k, call.head_dim)
    clear_columns(v, call.value_dim)
    keep, peak, weight = (
        np.ones(BLOCK),
        np.empty((n_most, n_rows), dtype),
        np.empty((n_most, n_rows), dtype),
    )
    rows, places = (
        np.empty((n_most, LISTS, 2, GATHER_BLOCK), np.int64),
        np.empty((n_most, 3), np.int64),
    )
    for share in range(first, last):
        tile, tile_end, begin, end = call.shares[share]
        for j in range(tile_end - tile):
            places[j, 0], places[j, 1], places[j, 2] = _place(call, tile + j)
            _read_queries(call, tile + j, q[j])
            if is_gathered:
                arrange_queries(call.table, q[j, : call.heads_per_tile], call.head_dim)
            else:
                q[j, : _n_rows(call, tile + j)] *= dtype.type(scale_of(call.head_dim))
            clear(partial[share, j])
        if is_gathered:
            n, shape = tile_end - tile, (call.heads_per_tile, call.value_dim)
            scratch = GatheredSums(
                q[:n], np.float32(scale_of(call.head_dim)), c, peak[:n], weight[:n], sums[:n], rows
            )
            attend_gathered(
                call.table, places[:n], call.selected, (begin, end), shape, scratch, partial[share]
            )
            continue
        for segment in range(begin, end, SEGMENT):
            peak[:], weight[:] = -np.inf, 0
            for j in range(tile_end - tile):
                clear_rows(sums[j], 0, _n_rows(call, tile + j))
            for t in range(segment, min(segment + SEGMENT, end), BLOCK):
                n = min(BLOCK, end - t)
                for j in range(tile_end - tile):  # neighbouring heads are neighbours in memory
                    _add_block(
                        call, tile + j, t, n, q[j], k, v, c, keep, peak[j], weight[j], sums[j]
                    )
            for j in range(tile_end - tile):
                flush(
                    _n_rows(call, tile + j),
                    call.value_dim,
                    False,
                    peak[j],
                    weight[j],
                    sums[j],
                    partial[share, j],
                )


@helper
def _add_block(call, tile, t, n, q, k, v, c, keep, peak, weight, sums):
    """Add tokens t ... t + n - 1 of a run, or these places of a list, to the sums of a tile."""
    n_rows = _n_rows(call, tile)
    keys, values, next_k, next_v = _rows(call, tile, t, n, n_rows, k, v, keep)
    project(q, keys, n_rows, n, c, next_k)
    if _weigh(call, tile, t, n, n_rows, c, peak, weight, sums):
        accumulate(c, values, n_rows, n, sums, next_v)
        return
    for r in range(n_rows):  # a row must not touch the values of tokens that it does not see
        seen = min(n, _seen(call, tile, r) - t)
        if seen > 0:
            accumulate(c[r : r + 1], values, 1, seen, sums[r : r + 1], NO_PREFETCH)


@helper
def _place(call: AttendCall, tile: int) -> tuple[int, int, int]:
    """Return the sequence of a tile, the row of its list of tokens, and its key/value head."""
    b, h = call.tiles[tile, 0], call.tiles[tile, 1]
    return b, h * call.selected.shape[1] // call.n_heads, h // (call.n_heads // call.n_kv_heads)


@helper
def _n_rows(call: AttendCall, tile: int) -> int:
    return call.tiles[tile, 3] * call.heads_per_tile


@helper
def _read_queries(call: AttendCall, tile: int, q: np.ndarray) -> None:
    """Read the queries of a tile: row r is query r // heads, head r % heads."""
    b, h, first, n, _, _, _ = call.tiles[tile]
    keep = np.ones(1)
    for r in range(n * call.heads_per_tile):
        place = (b, first + r // call.heads_per_tile, h + r % call.heads_per_tile)
        load_rows(call.table, QUERY, place, 1, call.head_dim, q[r : r + 1], keep)


@helper
def _seen(call: AttendCall, tile: int, r: int) -> int:
    """Return how many tokens a row sees: causal, the last query all of them; of a list, every
    entry.
    """
    if call.selected.shape[2] > 0:
        return call.selected.shape[2]
    return (
        call.lengths[call.tiles[tile, 0]]
        - call.n_queries
        + call.tiles[tile, 2]
        + r // call.heads_per_tile
        + 1
    )


@helper
def _rows(call, tile, t, n, n_rows, k, v, keep):
    """Return keys and values t ... t + n - 1 of a run or a list of tokens, and what to ask for
    meanwhile.
    """
    b, r, g = _place(call, tile)
    if call.selected.shape[2] > 0:
        load_scattered(call.table, KEY, b, g, call.selected[b, r], t, n, call.head_dim, k)
        load_scattered(call.table, VALUE, b, g, call.selected[b, r], t, n, call.value_dim, v)
        return input_rows(k), input_rows(v), NO_PREFETCH, NO_PREFETCH
    # a product takes bfloat16 as it is only if it has a whole number of register tiles
    read_mode = ANY_IN_PLACE if n_rows % 4 == 0 else IN_PLACE
    keys = read(call.table, KEY, (b, t, g), n, call.head_dim, k, keep, read_mode)
    if _seen(call, tile, 0) - t < n:  # row by row, then
        read_mode = IN_PLACE
    values = read(call.table, VALUE, (b, t, g), n, call.value_dim, v, keep, read_mode)
    next_k = rows_to_prefetch(call.table, KEY, (b, t + BLOCK, g), call.head_dim)
    return (
        keys,
        values,
        next_k,
        rows_to_prefetch(call.table, VALUE, (b, t + BLOCK, g), call.value_dim),
    )


@helper
def _weigh(call, tile, t, n, n_rows, c, peak, weight, sums):
    """Turn logits c [R, n] into weights relative to the peak so far; tell whether every row sees
    every token of the block.
    """
    is_whole = _seen(call, tile, 0) - t >= n  # the first row sees the fewest
    for r in range(n_rows):
        seen = n if is_whole else min(n, _seen(call, tile, r) - t)
        if seen > 0:
            peaks, weights = (
                peak.ctypes.data + peak.itemsize * r,
                weight.ctypes.data + weight.itemsize * r,
            )
            of_row = RowSums(peaks, weights, address_of(sums, r, 0), sums.shape[1])
            weigh_row(address_of(c, r, 0), seen, c.shape[1], of_row, c.dtype.type(0))
    return is_whole


@kernel
def merge_splits(call: AttendCall, partial: np.ndarray, first: int, last: int) -> None:
    """Write the outputs of tiles first ... last - 1: their shares, put together in order."""
    row = matrices(1, 1, padded(call.value_dim), call.like.dtype)[0]
    sums = np.empty(2 + call.value_dim)
    for tile in range(first, last):
        b, h, i, n, begin, end, j = call.tiles[tile]
        for r in range(n * call.heads_per_tile):
            top, weight = -np.inf, 0.0
            sums[:] = 0
            for share in range(begin, end):
                if partial[share, j, r, 1] != 0 and not partial[share, j, r, 0] <= top:
                    top = partial[share, j, r, 0]
            for share in range(begin, end):
                if partial[share, j, r, 1] != 0:
                    factor = math.exp(partial[share, j, r, 0] - top)
                    weight += partial[share, j, r, 1] * factor
                    for d in range(call.value_dim):
                        sums[d] += partial[share, j, r, 2 + d] * factor
            for d in range(call.value_dim):
                row[0, d] = sums[d] / weight if weight != 0 else 0.0
            place = (b, i + r // call.heads_per_tile, h + r % call.heads_per_tile)
            store_rows(call.table, OUT, place, 1, call.value_dim, row, output_rows(row, False))
