"""Kernels of exact softmax attention over consecutive or selected tokens; see `reference`.

A *tile* is up to 32 rows: query heads that share a key/value head, each with some of its queries. A
*split* is a range of the tokens that some tiles see. A task is a split: it goes through its tokens
in blocks and keeps, for every row, the partial result of online softmax: the largest logit, the
sum of weights and the weighted sum of values, float32 within a segment of 1,024 tokens and float64
across segments. A second kernel merges the partial results of each tile in the order of its splits.

The splits depend on the length of a sequence alone, so results have the same bits for any number of
threads. Decoding, one query over rows that need no conversion, takes the loop of `decode`.
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
    InputRows,
    PrefetchRows,
    accumulate,
    input_rows,
    output_rows,
    padded,
    project,
)
from racecore.ops.simd.vectors import address_of
from racecore.ops.socket.attend.decode import (
    DecodeScratch,
    arrange_queries,
    attend_gathered,
    can_attend_gathered,
    scale_of,
)
from racecore.ops.socket.attend.online_softmax import (
    RowSums,
    add_segment,
    clear_sums,
    weigh_row,
)
from racecore.ops.socket.attend.row_addresses import GATHER_BLOCK, SLOTS
from racecore.runtime.jit import helper, kernel, piece

__all__ = ["TILE_ROWS", "AttendCall", "attend_splits", "merge_splits"]

TILE_ROWS = 32  # at most


class AttendCall(NamedTuple):
    """Arguments of both kernels; `table` holds addresses, see ops.cpu.row_io."""

    table: np.ndarray  # int64 [4, 6]
    # int64 [n, 7]: sequence, first head, first query, number of queries, first and last split, and
    # the index of the tile within these splits
    tiles: np.ndarray
    # int64 [n, 4]: first and last tile; first and last token, or position in `selected`
    splits: np.ndarray
    lengths: np.ndarray  # int64 [B]
    selected: np.ndarray  # int64 [B, H or G, W], W = 0: all tokens
    like: np.ndarray  # [0] in the dtype of the arithmetic
    n_heads: int  # H
    n_kv_heads: int  # G
    n_queries: int  # Tq
    heads_per_tile: int
    head_dim: int
    value_dim: int


class SplitScratch(NamedTuple):
    """Scratch of a thread for one split of up to M tiles with R rows; D and V padded."""

    q: np.ndarray  # [M, R, D], times 1/sqrt(D)
    k: np.ndarray  # [32, D]
    v: np.ndarray  # [32, V]
    logits: np.ndarray  # [R, 32], or [R, 64] for `decode`; then weights
    keep: np.ndarray  # [32] of ones: no token is masked
    peak: np.ndarray  # [M, R], this and the next two: see `online_softmax`
    weight: np.ndarray  # [M, R]
    sums: np.ndarray  # [M, R, V]
    tile_heads: np.ndarray  # int64 [M, 3]: see `_tile_heads`
    row_addresses: np.ndarray  # int64 [M, SLOTS, 2, 64]: see `row_addresses`


@kernel
def attend_splits(call: AttendCall, partial: np.ndarray, first: int, last: int) -> None:
    """Write the partial results of splits first ... last - 1.

    partial [splits, tiles of a split, R, 2 + V]: peak, weight and weighted values.
    """
    n_tiles, n_rows = partial.shape[1], partial.shape[2]
    head_dim, value_dim, dtype = padded(call.head_dim), padded(call.value_dim), call.like.dtype
    k, v = matrices(1, TOKENS, head_dim, dtype)[0], matrices(1, TOKENS, value_dim, dtype)[0]
    dims = (call.head_dim, call.value_dim)
    is_gathered = can_attend_gathered(call.table, call.n_queries, dims, k, v)
    scratch = SplitScratch(
        q=matrices(n_tiles, n_rows, head_dim, dtype),
        k=k,
        v=v,
        logits=matrices(1, n_rows, GATHER_BLOCK if is_gathered else TOKENS, dtype)[0],
        keep=np.ones(BLOCK),
        peak=np.empty((n_tiles, n_rows), dtype),
        weight=np.empty((n_tiles, n_rows), dtype),
        sums=matrices(n_tiles, n_rows, value_dim, dtype),
        tile_heads=np.empty((n_tiles, 3), np.int64),
        row_addresses=np.empty((n_tiles, SLOTS, 2, GATHER_BLOCK), np.int64),
    )
    for j in range(n_tiles):
        clear_columns(scratch.q[j], call.head_dim)
    clear_columns(k, call.head_dim)
    clear_columns(v, call.value_dim)
    for split in range(first, last):
        first_tile, last_tile, begin, end = call.splits[split]
        for j in range(last_tile - first_tile):
            heads = scratch.tile_heads[j]
            _prepare_tile(call, first_tile + j, is_gathered, scratch.q[j], heads)
            clear_sums(partial[split, j])
        if is_gathered:
            _attend_gathered(call, last_tile - first_tile, (begin, end), scratch, partial[split])
        else:
            _attend_blocks(call, split, scratch, partial[split])


@helper
def _prepare_tile(
    call: AttendCall, tile: int, is_gathered: bool, q: np.ndarray, heads: np.ndarray
) -> None:
    """Read the queries of a tile into q [R, D], scaled, and its `_tile_heads` into heads [3]."""
    heads[0], heads[1], heads[2] = _tile_heads(call, tile)
    _read_queries(call, tile, q)
    if is_gathered:
        arrange_queries(call.table, q[: call.heads_per_tile], call.head_dim)
    else:
        q[: _n_rows(call, tile)] *= call.like.dtype.type(scale_of(call.head_dim))


@piece
def _attend_gathered(
    call: AttendCall,
    n_tiles: int,
    span: tuple[int, int],
    scratch: SplitScratch,
    partial: np.ndarray,
) -> None:
    """Add the tokens of a split to the sums of its tiles, reading keys and values by address."""
    decode = DecodeScratch(
        q=scratch.q[:n_tiles],
        scale=np.float32(scale_of(call.head_dim)),
        logits=scratch.logits,
        peak=scratch.peak[:n_tiles],
        weight=scratch.weight[:n_tiles],
        sums=scratch.sums[:n_tiles],
        row_addresses=scratch.row_addresses,
    )
    tile_heads = scratch.tile_heads[:n_tiles]
    shape = (call.heads_per_tile, call.value_dim)
    attend_gathered(call.table, tile_heads, call.selected, span, shape, decode, partial)


@helper
def _attend_blocks(
    call: AttendCall, split: int, scratch: SplitScratch, partial: np.ndarray
) -> None:
    """Add the tokens of a split to the sums of its tiles, block by block."""
    first_tile, last_tile, begin, end = call.splits[split]
    n_tiles = last_tile - first_tile
    for segment in range(begin, end, SEGMENT):
        scratch.peak[:] = -np.inf
        scratch.weight[:] = 0
        for j in range(n_tiles):
            clear_rows(scratch.sums[j], 0, _n_rows(call, first_tile + j))
        for t in range(segment, min(segment + SEGMENT, end), BLOCK):
            n = min(BLOCK, end - t)
            for j in range(n_tiles):  # neighbouring heads are neighbours in memory
                _add_block(call, first_tile + j, t, n, j, scratch)
        for j in range(n_tiles):
            add_segment(
                _n_rows(call, first_tile + j),
                call.value_dim,
                False,
                scratch.peak[j],
                scratch.weight[j],
                scratch.sums[j],
                partial[j],
            )


@helper
def _add_block(call: AttendCall, tile: int, t: int, n: int, j: int, scratch: SplitScratch) -> None:
    """Add tokens or positions of selected ones t ... t + n - 1 to the sums of a tile, slot j."""
    n_rows = _n_rows(call, tile)
    weights, sums = scratch.logits, scratch.sums[j]
    keys, values, next_keys, next_values = _read_block(call, tile, t, n, scratch)
    project(scratch.q[j], keys, n_rows, n, weights, next_keys)
    if _weigh_block(call, tile, t, n, j, scratch):
        accumulate(weights, values, n_rows, n, sums, next_values)
        return
    # row by row: a row must not touch the values of tokens that it does not see, which may be NaN
    for r in range(n_rows):
        visible = min(n, _n_visible(call, tile, r) - t)
        if visible > 0:
            accumulate(weights[r : r + 1], values, 1, visible, sums[r : r + 1], NO_PREFETCH)


@helper
def _tile_heads(call: AttendCall, tile: int) -> tuple[int, int, int]:
    """Return the sequence of a tile, its row of selected tokens, and its key/value head."""
    b, h = call.tiles[tile, 0], call.tiles[tile, 1]
    return b, h * call.selected.shape[1] // call.n_heads, h // (call.n_heads // call.n_kv_heads)


@helper
def _n_rows(call: AttendCall, tile: int) -> int:
    """Return the rows of a tile: queries times heads."""
    return call.tiles[tile, 3] * call.heads_per_tile


@helper
def _read_queries(call: AttendCall, tile: int, q: np.ndarray) -> None:
    """Read the queries of a tile: row r is query r // heads, head r % heads."""
    b, h, first, n, _, _, _ = call.tiles[tile]
    keep = np.ones(1)
    for r in range(n * call.heads_per_tile):
        position = (b, first + r // call.heads_per_tile, h + r % call.heads_per_tile)
        load_rows(call.table, QUERY, position, 1, call.head_dim, q[r : r + 1], keep)


@helper
def _n_visible(call: AttendCall, tile: int, r: int) -> int:
    """Return how many tokens a row of a tile sees: the causal ones, or all that are selected."""
    if call.selected.shape[2] > 0:
        return call.selected.shape[2]
    query = call.tiles[tile, 2] + r // call.heads_per_tile
    # the last query sees the whole sequence
    return call.lengths[call.tiles[tile, 0]] - call.n_queries + query + 1


@helper
def _read_block(
    call: AttendCall, tile: int, t: int, n: int, scratch: SplitScratch
) -> tuple[InputRows, InputRows, PrefetchRows, PrefetchRows]:
    """Return the keys and values t ... t + n - 1 of a tile, and those to prefetch meanwhile."""
    b, row, g = _tile_heads(call, tile)
    k, v = scratch.k, scratch.v
    if call.selected.shape[2] > 0:
        tokens = call.selected[b, row]
        load_scattered(call.table, KEY, b, g, tokens, t, n, call.head_dim, k)
        load_scattered(call.table, VALUE, b, g, tokens, t, n, call.value_dim, v)
        return input_rows(k), input_rows(v), NO_PREFETCH, NO_PREFETCH
    # a product reads bfloat16 in place only if it has a whole number of register tiles
    read_mode = ANY_IN_PLACE if _n_rows(call, tile) % 4 == 0 else IN_PLACE
    keys = read(call.table, KEY, (b, t, g), n, call.head_dim, k, scratch.keep, read_mode)
    if _n_visible(call, tile, 0) - t < n:  # values are then accumulated row by row
        read_mode = IN_PLACE
    values = read(call.table, VALUE, (b, t, g), n, call.value_dim, v, scratch.keep, read_mode)
    next_keys = rows_to_prefetch(call.table, KEY, (b, t + BLOCK, g), call.head_dim)
    next_values = rows_to_prefetch(call.table, VALUE, (b, t + BLOCK, g), call.value_dim)
    return keys, values, next_keys, next_values


@helper
def _weigh_block(
    call: AttendCall, tile: int, t: int, n: int, j: int, scratch: SplitScratch
) -> bool:
    """Turn the logits [R, n] of a block into weights relative to the peaks so far.

    Return whether every row sees every token of the block.
    """
    logits, peak, weight = scratch.logits, scratch.peak[j], scratch.weight[j]
    sums = scratch.sums[j]
    is_whole = _n_visible(call, tile, 0) - t >= n  # the first row sees the fewest
    for r in range(_n_rows(call, tile)):
        visible = n if is_whole else min(n, _n_visible(call, tile, r) - t)
        if visible > 0:
            row = RowSums(
                peak.ctypes.data + peak.itemsize * r,
                weight.ctypes.data + weight.itemsize * r,
                address_of(sums, r, 0),
                sums.shape[1],
            )
            weigh_row(address_of(logits, r, 0), visible, logits.shape[1], row, logits.dtype.type(0))
    return is_whole


@kernel
def merge_splits(call: AttendCall, partial: np.ndarray, first: int, last: int) -> None:
    """Write the outputs of tiles first ... last - 1: their partial results, merged in order."""
    row = matrices(1, 1, padded(call.value_dim), call.like.dtype)[0]
    sums = np.empty(2 + call.value_dim)
    for tile in range(first, last):
        b, h, i, n, begin, end, j = call.tiles[tile]
        for r in range(n * call.heads_per_tile):
            top, weight = -np.inf, 0.0
            sums[:] = 0
            for split in range(begin, end):
                # a weight of 0: no token of the split is visible
                if partial[split, j, r, 1] != 0 and not partial[split, j, r, 0] <= top:
                    top = partial[split, j, r, 0]
            for split in range(begin, end):
                if partial[split, j, r, 1] != 0:
                    factor = math.exp(partial[split, j, r, 0] - top)
                    weight += partial[split, j, r, 1] * factor
                    for d in range(call.value_dim):
                        sums[d] += partial[split, j, r, 2 + d] * factor
            for d in range(call.value_dim):
                row[0, d] = sums[d] / weight if weight != 0 else 0.0
            position = (b, i + r // call.heads_per_tile, h + r % call.heads_per_tile)
            store_rows(call.table, OUT, position, 1, call.value_dim, row, output_rows(row, False))
