"""Decode attention: one query per sequence over a key/value cache whose rows are read by address.

Why: a row of the cache meets only the query heads of its group, so there is little arithmetic to
hide memory behind. A copy of the row, a call with many arguments or a view of an array would each
take longer. For one query this module therefore replaces the general loop of `attend.kernels` by
one over plain addresses, see `row_addresses`, and prefetches the rows of the next block meanwhile.

Why addresses: Numba counts the references of every array that a function is given, atomically,
which takes longer than one row of a block does. So whatever runs once per block takes addresses
(int64) in place of arrays, and records name them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import KEY, QUERY, VALUE, can_gather_rows, is_bfloat16
from racecore.ops.socket.attend.gathered_products import (
    CAN_DOT_BFLOAT16,
    GatheredRows,
    ScratchRows,
    accumulate_gathered,
    paired_column,
    project_gathered,
)
from racecore.ops.socket.attend.online_softmax import RowSums, add_segment, weigh_row
from racecore.ops.socket.attend.row_addresses import (
    GATHER_BLOCK,
    AddressSlot,
    CacheRows,
    cache_rows,
    fill_dense_slots,
    fill_partial_block,
    fill_selected,
    first_block,
    prefetch_order,
    prefetch_slot,
    selected_block,
    signed_address,
)
from racecore.runtime.jit import helper

__all__ = [
    "DecodeScratch",
    "arrange_queries",
    "attend_gathered",
    "can_attend_gathered",
    "scale_of",
]

_FLOAT_BYTES = 4


class DecodeScratch(NamedTuple):
    """Scratch arrays of tiles that attend to the same tokens, float32; R rows of a tile."""

    q: np.ndarray  # [tiles, R, D]: see `arrange_queries`
    scale: np.float32  # 1/sqrt(D)
    logits: np.ndarray  # [R, 64], then weights
    peak: np.ndarray  # [tiles, R], this and the next two: see `online_softmax`
    weight: np.ndarray  # [tiles, R]
    sums: np.ndarray  # [tiles, R, V]
    row_addresses: np.ndarray  # int64 [tiles, SLOTS, 2, 64]: see `row_addresses`


class QueryTile(NamedTuple):
    """The query heads of a tile: addresses of its rows in `DecodeScratch`."""

    q: ScratchRows
    logits: ScratchRows
    sums: RowSums  # of the first row
    scale: np.float32
    is_bfloat16: bool  # queries are bfloat16 in memory, see `keeps_bfloat16`
    n_heads: int
    n_rows: int  # R: of scratch, from a tile to the next


# Queries
# -------------------------------------------------------------------------------------------------


@helper
def can_attend_gathered(
    table: np.ndarray, n_queries: int, dims: tuple[int, int], k: np.ndarray, v: np.ndarray
) -> bool:
    """Return whether there is one query, and rows need neither copies nor padding.

    Such rows are whole vectors of float32, or pairs of them of bfloat16. dims = (D, V); k and v are
    scratch blocks of the general loop.
    """
    return (
        n_queries == 1
        and can_gather_rows(table, KEY, dims[0], k)
        and can_gather_rows(table, VALUE, dims[1], v)
    )


@helper
def keeps_bfloat16(table: np.ndarray) -> bool:
    """Return whether logits are products of bfloat16 with bfloat16, by one instruction."""
    return CAN_DOT_BFLOAT16 and is_bfloat16(table, QUERY) and is_bfloat16(table, KEY)


@helper
def arrange_queries(table: np.ndarray, q: np.ndarray, head_dim: int) -> None:
    """Bring float32 queries [R, D] into the form that products with gathered keys need.

    If they keep bfloat16, its bits move to the first half of each row. Else they are multiplied by
    1/sqrt(D), and if keys are bfloat16 their columns come into paired order.
    """
    if keeps_bfloat16(table):
        # queries were widened to float32 when read, so their upper halves are the bfloat16 bits
        for r in range(q.shape[0]):
            bits, words = q[r].view(np.uint16), q[r].view(np.uint32)
            for d in range(q.shape[1]):
                bits[d] = np.uint16(words[d] >> 16)
        return
    scale = q.dtype.type(scale_of(head_dim))
    for r in range(q.shape[0]):
        for d in range(q.shape[1]):
            q[r, d] *= scale
    if is_bfloat16(table, KEY):
        _pair_columns(q)


@helper
def scale_of(head_dim: int) -> float:
    """Return 1/sqrt(D)."""
    return 1.0 / math.sqrt(head_dim)


@helper
def _pair_columns(x: np.ndarray) -> None:
    """Bring the rows of a matrix into paired order, see `gathered_products`."""
    row = np.empty(x.shape[1], x.dtype)
    for r in range(x.shape[0]):
        for d in range(x.shape[1]):
            row[d] = x[r, paired_column(d)]
        for d in range(x.shape[1]):
            x[r, d] = row[d]


# Attention
# -------------------------------------------------------------------------------------------------


@helper
def attend_gathered(
    table: np.ndarray,
    tile_heads: np.ndarray,
    selected: np.ndarray,
    span: tuple[int, int],
    shape: tuple[int, int],
    scratch: DecodeScratch,
    out: np.ndarray,
) -> None:
    """Add tokens span[0] ... span[1] - 1 to the float64 sums out [tiles, R, 2 + V].

    tile_heads [tiles, 3] holds the sequence, row of `selected` and key/value head of each tile;
    shape = (query heads of a tile, V). If `selected` [B, ., W] has W > 0, the span is one of
    positions in a row of it, and there is one tile.
    """
    n_heads, value_dim = shape
    n_tiles = tile_heads.shape[0]
    widths = (scratch.q.shape[2], scratch.sums.shape[2])
    cache = cache_rows(table, tile_heads, selected, widths, scratch.row_addresses)
    tile = _first_tile(table, n_heads, scratch)
    if cache.selected == 0:
        fill_dense_slots(table, tile_heads, cache, scratch.row_addresses)
    # float32 within a segment, float64 across segments: [tiles, R, V] and [tiles, R, 2 + V]
    for begin in range(span[0], span[1], SEGMENT):
        end = min(begin + SEGMENT, span[1])
        scratch.peak[:] = -np.inf
        scratch.weight[:] = 0
        scratch.sums[:] = 0
        if cache.selected == 0:  # one branch per segment, none per block
            _add_all(cache, begin, end, n_tiles, tile)
        else:
            _add_selected(cache, begin, end, span, tile)
        for j in range(n_tiles):
            add_segment(
                n_heads,
                value_dim,
                is_bfloat16(table, VALUE),
                scratch.peak[j],
                scratch.weight[j],
                scratch.sums[j],
                out[j],
            )


@helper
def _first_tile(table: np.ndarray, n_heads: int, scratch: DecodeScratch) -> QueryTile:
    """Return the addresses of the first tile's rows in scratch."""
    q = ScratchRows(signed_address(scratch.q), scratch.q.shape[2])
    logits = ScratchRows(signed_address(scratch.logits), scratch.logits.shape[1])
    peak, weight = signed_address(scratch.peak), signed_address(scratch.weight)
    sums = RowSums(peak, weight, signed_address(scratch.sums), scratch.sums.shape[2])
    return QueryTile(
        q, logits, sums, scratch.scale, keeps_bfloat16(table), n_heads, scratch.q.shape[1]
    )


@helper
def _tile(first: QueryTile, j: int) -> QueryTile:
    """Return tile j, given the first one."""
    row = j * first.n_rows
    return QueryTile(
        ScratchRows(first.q.address + _FLOAT_BYTES * row * first.q.step, first.q.step),
        first.logits,
        _row_sums(first.sums, row),
        first.scale,
        first.is_bfloat16,
        first.n_heads,
        first.n_rows,
    )


@helper
def _row_sums(first: RowSums, row: int) -> RowSums:
    """Return the addresses of the sums of a row, given those of the first one."""
    offset = _FLOAT_BYTES * row
    return RowSums(
        first.peak + offset,
        first.weight + offset,
        first.values + offset * first.width,
        first.width,
    )


@helper
def _add_all(cache: CacheRows, begin: int, end: int, n_tiles: int, first: QueryTile) -> None:
    """Add tokens begin ... end - 1 to all tiles, a block at a time: neighbouring heads are
    neighbours in memory.
    """
    for t in range(begin, end, GATHER_BLOCK):
        n = min(GATHER_BLOCK, end - t)
        for j in range(n_tiles):
            if n == GATHER_BLOCK:
                block = first_block(cache, j, t)
            else:
                block = fill_partial_block(cache, j, t, n)
            next_block = prefetch_order(cache, j, t + GATHER_BLOCK)
            _add_block(_gathered_rows(cache, block, next_block), n, _tile(first, j))


@helper
def _add_selected(
    cache: CacheRows, begin: int, end: int, span: tuple[int, int], tile: QueryTile
) -> None:
    """Add the selected tokens at positions begin ... end - 1, a segment of a span."""
    for i in range(begin, end, GATHER_BLOCK):
        n = min(GATHER_BLOCK, end - i)
        index = i // GATHER_BLOCK
        block, next_block = selected_block(cache, index), selected_block(cache, index + 1)
        if i == span[0]:  # nothing ran before this block that could have prefetched it
            fill_selected(cache, i, n, block)
            prefetch_slot(cache, block)
        n_next = min(GATHER_BLOCK, span[1] - i - GATHER_BLOCK)
        if n_next > 0:
            fill_selected(cache, i + GATHER_BLOCK, n_next, next_block)
        else:
            next_block = block  # there is no next one: these rows are in the caches already
        _add_block(_gathered_rows(cache, block, next_block), n, tile)


@helper
def _gathered_rows(
    cache: CacheRows, block: AddressSlot, next_block: AddressSlot
) -> tuple[GatheredRows, GatheredRows]:
    """Return the keys and values of a block, with those of another one to prefetch."""
    keys = GatheredRows(
        rows=block.keys,
        offset=block.key_offset,
        next_rows=next_block.keys,
        next_offset=next_block.key_offset,
        is_bfloat16=cache.is_bfloat16,
    )
    values = GatheredRows(
        rows=block.values,
        offset=block.value_offset,
        next_rows=next_block.values,
        next_offset=next_block.value_offset,
        is_bfloat16=cache.is_bfloat16,
    )
    return keys, values


@helper
def _add_block(rows: tuple[GatheredRows, GatheredRows], n: int, tile: QueryTile) -> None:
    """Add n keys and values to the sums of a tile."""
    keys, values = rows
    logits = tile.logits
    project_gathered(tile.q, keys, tile.n_heads, n, logits, tile.is_bfloat16, tile.scale)
    for r in range(tile.n_heads):
        row = logits.address + _FLOAT_BYTES * r * logits.step
        weigh_row(row, n, logits.step, _row_sums(tile.sums, r), np.float32(0))
    sums = ScratchRows(tile.sums.values, tile.sums.width)
    accumulate_gathered(logits, values, tile.n_heads, n, sums)
