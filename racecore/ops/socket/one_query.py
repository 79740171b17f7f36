"""Softmax attention of one query per sequence: keys and values are read where they lie, by lists of their addresses.

Why: when one token is decoded every row of the cache meets only the query heads of its group, so there is little arithmetic to
hide anything behind: neither copies nor calls with many arguments nor views of arrays. This is what `softmax.attend_shares` does,
for that case, as one loop over plain addresses. While a block is worked on, the rows of the next one are asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from racecore.jit import helper
from racecore.ops.blocks import KEY, QUERY, VALUE, ask_for_row, can_list, is_narrow, list_rows, row_bytes
from racecore.ops.socket.listed import (
    CAN_DOT,
    Lists,
    Matrix,
    accumulate_listed,
    dot_listed,
    paired_column,
    project_listed,
)
from racecore.ops.socket.running import RowSums, flush, weigh_row
from racecore.ops.tiles import prefetch
from racecore.ops.vectors import VECTOR_BYTES
from racecore.plan import SEGMENT

__all__ = ["LISTED", "LISTS", "ListedSums", "arrange_queries", "attend_listed", "can_attend_listed", "scale_of"]

LISTS = 3  # of a tile
_FIRST, _SECOND, _ASKED = np.int64(0), np.int64(1), np.int64(2)
LISTED = 64  # tokens of a block: more than elsewhere, as nothing is copied, and every block has to begin and to end
_LIST = 8 * LISTED  # bytes


class ListedSums(NamedTuple):
    """Scratch of tiles that go through the same tokens, float32."""

    q: np.ndarray  # [tiles, R, D]: see `arrange_queries`
    scale: Any  # 1/sqrt(D), float32
    c: np.ndarray  # [R, 64]: logits, then weights
    peak: np.ndarray  # [tiles, R], as the next two: see `running`
    weight: np.ndarray
    sums: np.ndarray  # [tiles, R, V]
    rows: np.ndarray  # int64 [tiles, LISTS, 2, 64]: lists of addresses of keys and values


class Tile(NamedTuple):
    """Addresses of the scratch of one tile."""

    q: Matrix
    c: Matrix
    sums: RowSums  # of the first row


@helper
def can_attend_listed(table: np.ndarray, n_queries: int, dims: tuple[int, int], k: np.ndarray, v: np.ndarray) -> bool:
    """Tell whether there is one query, and rows are whole vectors of float32, or pairs of them of bfloat16."""
    return n_queries == 1 and can_list(table, KEY, dims[0], k) and can_list(table, VALUE, dims[1], v)


@helper
def dots_bfloat16(table: np.ndarray) -> bool:
    """Tell whether products of queries and keys are those of bfloat16 with bfloat16."""
    return CAN_DOT and is_narrow(table, QUERY) and is_narrow(table, KEY)


@helper
def arrange_queries(table: np.ndarray, q: np.ndarray, head_dim: int) -> None:
    """Scale queries by 1/sqrt(D), and bring their columns into paired order if keys are bfloat16; or keep just their bits."""
    if dots_bfloat16(table):
        for r in range(q.shape[0]):
            bits, words = q[r].view(np.uint16), q[r].view(np.uint32)
            for d in range(q.shape[1]):
                bits[d] = np.uint16(words[d] >> 16)
        return
    scale = q.dtype.type(scale_of(head_dim))
    for r in range(q.shape[0]):
        for d in range(q.shape[1]):
            q[r, d] *= scale
    if is_narrow(table, KEY):
        _pair_columns(q)


@helper
def scale_of(head_dim: int) -> float:
    """Return 1/sqrt(D)."""
    return 1.0 / math.sqrt(head_dim)


@helper
def _pair_columns(x: np.ndarray) -> None:
    """Bring the rows of a matrix into paired order, see `listed`."""
    row = np.empty(x.shape[1], x.dtype)
    for r in range(x.shape[0]):
        for d in range(x.shape[1]):
            row[d] = x[r, paired_column(d)]
        for d in range(x.shape[1]):
            x[r, d] = row[d]


@helper
def attend_listed(table, places, selected, ends, shape, s, out):
    """Add tokens ends[0] ... ends[1] - 1, or these places of lists of tokens, to float64 sums out [tiles, R, 2 + V].

    places [tiles, 3] are sequences, rows of selected [B, ., W] (W = 0: all tokens) and key/value heads; shape = (heads of a
    tile, V).
    """
    (n_heads, value_dim), dots = shape, dots_bfloat16(table)
    if selected.shape[2] == 0:
        _list_a_block(table, places, selected, s.rows)
    for segment in range(ends[0], ends[1], SEGMENT):
        s.peak[:] = -np.inf
        s.weight[:] = 0
        s.sums[:] = 0
        for t in range(segment, min(segment + SEGMENT, ends[1]), LISTED):
            for j in range(places.shape[0]):  # neighbouring heads are neighbours in memory
                if selected.shape[2] == 0:
                    keys, values = _run_of_tokens(table, places, selected, j, t, ends[1], s.rows)
                else:
                    keys, values = _chosen_tokens(table, places, selected, j, t, ends, s)
                _add_block(_tile_of(s, j), min(LISTED, ends[1] - t), n_heads, keys, values, dots, s.scale)
        for j in range(places.shape[0]):
            flush(n_heads, value_dim, is_narrow(table, VALUE), s.peak[j], s.weight[j], s.sums[j], out[j])


@helper
def _tile_of(s, j):
    """Return the addresses of tile j."""
    wide_d, wide_v, first = s.q.shape[2], s.sums.shape[2], j * s.q.shape[1]  # its first row
    q, c = Matrix(s.q.ctypes.data + 4 * first * wide_d, wide_d), Matrix(s.c.ctypes.data, s.c.shape[1])
    values = s.sums.ctypes.data + 4 * first * wide_v
    return Tile(q, c, RowSums(s.peak.ctypes.data + 4 * first, s.weight.ctypes.data + 4 * first, values, wide_v))


@helper
def _add_block(tile, n, n_heads, keys, values, dots, scale):
    """Add n tokens to the sums of a tile. With `dots`, queries are bfloat16, see `dots_bfloat16`."""
    if dots:
        dot_listed(tile.q, keys, n_heads, n, tile.c, scale)
    else:
        project_listed(tile.q, keys, n_heads, n, tile.c)
    sums = tile.sums
    for r in range(n_heads):
        row = RowSums(sums.peak + 4 * r, sums.weight + 4 * r, sums.values + 4 * r * sums.width, sums.width)
        weigh_row(tile.c.address + 4 * r * tile.c.row, n, tile.c.row, row, np.float32(0))
    accumulate_listed(tile.c, values, n_heads, n, Matrix(sums.values, sums.width))


@helper
def _list_a_block(table, places, selected, rows):
    """Write where the first 64 tokens are: all blocks look alike. And what tiles ask for: token by token all heads.

    So memory is asked for in its order, whose continuation processors guess by themselves.
    """
    n_tiles = places.shape[0]
    for j in range(n_tiles):
        _list(table, places, selected, j, 0, LISTED, rows, _FIRST)
    for side in range(2):
        for p in range(n_tiles * LISTED):
            rows[p // LISTED, _ASKED, side, p % LISTED] = rows[p % n_tiles, _FIRST, side, p // n_tiles]


@helper
def _run_of_tokens(table, places, selected, j, t, end, rows):
    """Return the lists of the block at t where all tokens are attended to, for keys and for values."""
    narrow, asked = is_narrow(table, KEY), _list_at(rows, j, _ASKED)
    next_k, next_v = row_bytes(table, KEY) * (t + LISTED), row_bytes(table, VALUE) * (t + LISTED)
    if t + LISTED > end:  # beyond the last token there may be no memory
        _list(table, places, selected, j, t, end - t, rows, _SECOND)
        this, base_k, base_v = _list_at(rows, j, _SECOND), 0, 0
    else:
        this, base_k, base_v = _list_at(rows, j, _FIRST), row_bytes(table, KEY) * t, row_bytes(table, VALUE) * t
    return Lists(this, base_k, asked, next_k, narrow), Lists(this + _LIST, base_v, asked + _LIST, next_v, narrow)


@helper
def _chosen_tokens(table, places, selected, j, t, ends, s):
    """Return the lists of the block at t of selected tokens, for keys and for values."""
    narrow, now, left, rows = is_narrow(table, KEY), t // LISTED % 2, ends[1] - t - LISTED, s.rows
    itemsize = 2 if narrow else 4
    if t == ends[0]:
        _list(table, places, selected, j, t, min(LISTED, ends[1] - t), rows, now)
        for i in range(LISTED):  # nobody could ask for these in good time
            ask_for_row(rows[j, now, 0, i], itemsize * s.q.shape[2])
            ask_for_row(rows[j, now, 1, i], itemsize * s.sums.shape[2])
    if left > 0:
        _list(table, places, selected, j, t + LISTED, min(LISTED, left), rows, 1 - now)
        _ask_for_ends(rows[j, 1 - now, 0], itemsize * s.q.shape[2])
        _ask_for_ends(rows[j, 1 - now, 1], itemsize * s.sums.shape[2])
    this = _list_at(rows, j, now)
    ahead = _list_at(rows, j, 1 - now) if left > 0 else this
    return Lists(this, 0, ahead, 0, narrow), Lists(this + _LIST, 0, ahead + _LIST, 0, narrow)


@helper
def _ask_for_ends(addresses: np.ndarray, n_bytes: int) -> None:
    """Ask for the last lines of rows that do not begin with a line, as `ask_for_row` does. Tiles ask for all others."""
    for i in range(addresses.shape[0]):
        if addresses[i] % VECTOR_BYTES != 0:
            prefetch(addresses[i] + n_bytes - 1)


@helper
def _list_at(rows, j, which):
    """Return the address of a list of keys; that of values is behind it."""
    return rows.ctypes.data + (LISTS * j + which) * 2 * _LIST


@helper
def _list(table, places, selected, j, t, n, rows, which):
    """Write where the keys and values of n tokens are."""
    place = (places[j, 0], places[j, 1], places[j, 2])
    list_rows(table, KEY, place, selected, t, n, rows, (j, which, 0))
    list_rows(table, VALUE, place, selected, t, n, rows, (j, which, 1))
