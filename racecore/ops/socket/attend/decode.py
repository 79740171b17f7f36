"""Softmax attention of one query per sequence: keys and values are read where they lie, by lists of
their addresses.

Why: when one token is decoded every row of the cache meets only the query heads of its group, so
there is little arithmetic to hide anything behind: neither copies nor calls with many arguments nor
views of arrays. This is what `softmax.attend_shares` does, for that case, as one loop over plain
addresses. While a block is worked on, the rows of the next one are asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import (
    KEY,
    QUERY,
    VALUE,
    can_gather_rows,
    first_row,
    is_bfloat16,
    prefetch_row,
    row_bytes,
    write_row_addresses,
)
from racecore.ops.simd.vectors import load_number
from racecore.ops.socket.attend.gathered_products import (
    CAN_DOT,
    Lists,
    Matrix,
    accumulate_gathered,
    dot_gathered,
    paired_column,
    project_gathered,
)
from racecore.ops.socket.attend.online_softmax import RowSums, flush, weigh_row
from racecore.runtime.jit import helper

__all__ = [
    "GATHER_BLOCK",
    "LISTS",
    "GatheredSums",
    "arrange_queries",
    "attend_gathered",
    "can_attend_gathered",
    "scale_of",
]

LISTS = 3  # of a tile
_FIRST, _SECOND, _ASKED = np.int64(0), np.int64(1), np.int64(2)
# tokens of a block: more than elsewhere, as nothing is copied, and every block has to begin and to
# end
GATHER_BLOCK = 64
_LIST = 8 * GATHER_BLOCK  # bytes


class GatheredSums(NamedTuple):
    """Scratch of tiles that go through the same tokens, float32."""

    q: np.ndarray  # [tiles, R, D]: see `arrange_queries`
    scale: Any  # 1/sqrt(D), float32
    c: np.ndarray  # [R, 64]: logits, then weights
    peak: np.ndarray  # [tiles, R], as the next two: see `running`
    weight: np.ndarray
    sums: np.ndarray  # [tiles, R, V]
    rows: np.ndarray  # int64 [tiles, LISTS, 2, 64]: lists of addresses of keys and values


class Tile(NamedTuple):
    """A tile by addresses: arrays as arguments have their references counted, which takes longer
    than a row of a block does.
    """

    q: Matrix
    c: Matrix
    sums: RowSums  # of the first row
    scale: Any
    dots: bool  # see `dots_bfloat16`
    n_heads: int
    n_rows: int  # of scratch, for a tile


class Where(NamedTuple):
    """Where keys and values are, the first tile's where tiles differ."""

    lists: Any  # address of ListedSums.rows
    tokens: Any  # address of a list of tokens, 0: all of them
    starts: Any  # addresses of the first token's key and value
    steps: Any  # bytes from a token to the next, of keys and of values
    n_bytes: Any  # of a row
    has_bfloat16: bool  # rows are bfloat16


@helper
def can_attend_gathered(
    table: np.ndarray, n_queries: int, dims: tuple[int, int], k: np.ndarray, v: np.ndarray
) -> bool:
    """Tell whether there is one query, and rows are whole vectors of float32, or pairs of them of
    bfloat16.
    """
    return (
        n_queries == 1
        and can_gather_rows(table, KEY, dims[0], k)
        and can_gather_rows(table, VALUE, dims[1], v)
    )


@helper
def dots_bfloat16(table: np.ndarray) -> bool:
    """Tell whether products of queries and keys are those of bfloat16 with bfloat16."""
    return CAN_DOT and is_bfloat16(table, QUERY) and is_bfloat16(table, KEY)


@helper
def arrange_queries(table: np.ndarray, q: np.ndarray, head_dim: int) -> None:
    """Scale queries by 1/sqrt(D), and bring their columns into paired order if keys are bfloat16;
    or keep just their bits.
    """
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
    if is_bfloat16(table, KEY):
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
def attend_gathered(table, places, selected, ends, shape, s, out):
    """Add tokens ends[0] ... ends[1] - 1, or these places of lists of tokens, to float64 sums out
    [tiles, R, 2 + V].

    places [tiles, 3] are sequences, rows of selected [B, ., W] (W = 0: all tokens) and key/value
    heads; shape = (heads of a tile, V). If tokens are selected, there is one tile.
    """
    n_heads, value_dim = shape
    rows = _where(table, places, selected, s)
    tile = Tile(
        _matrix(s.q), _matrix(s.c), _sums(s), s.scale, dots_bfloat16(table), n_heads, s.q.shape[1]
    )
    if rows.tokens == 0:
        _list_a_block(table, places, rows, s.rows)
    for segment in range(ends[0], ends[1], SEGMENT):
        last = min(segment + SEGMENT, ends[1])
        s.peak[:] = -np.inf
        s.weight[:] = 0
        s.sums[:] = 0
        if rows.tokens == 0:
            _add_run(rows, segment, last, places.shape[0], tile)
        else:
            _add_chosen(rows, segment, last, ends, tile)
        for j in range(places.shape[0]):
            flush(
                n_heads,
                value_dim,
                is_bfloat16(table, VALUE),
                s.peak[j],
                s.weight[j],
                s.sums[j],
                out[j],
            )


@helper
def _matrix(x):
    """Return the rows of a scratch array, of the first matrix if there are several."""
    return Matrix(_address(x), x.shape[x.ndim - 1])


@helper
def _address(x):
    """Return the address of an array with the sign that all other addresses have: else functions
    would be compiled for both.
    """
    return np.int64(x.ctypes.data)


@helper
def _sums(s):
    return RowSums(_address(s.peak), _address(s.weight), _address(s.sums), s.sums.shape[2])


@helper
def _where(table, places, selected, s):
    """Return where the rows of the first tile are."""
    b, r, g = places[0]
    tokens = _address(selected[b, r]) if selected.shape[2] > 0 else np.int64(0)
    steps, has_bfloat16 = (row_bytes(table, KEY), row_bytes(table, VALUE)), is_bfloat16(table, KEY)
    starts = (first_row(table, KEY, b, g), first_row(table, VALUE, b, g))
    size = 2 if has_bfloat16 else 4
    return Where(
        _address(s.rows),
        tokens,
        starts,
        steps,
        (size * s.q.shape[2], size * s.sums.shape[2]),
        has_bfloat16,
    )


@helper
def _add_run(rows, first, last, n_tiles, tile):
    """Add tokens first ... last - 1 to all tiles, block by block: neighbouring heads are neighbours
    in memory.
    """
    for t in range(first, last, GATHER_BLOCK):
        n, next_rows = (
            min(GATHER_BLOCK, last - t),
            (rows.steps[0] * (t + GATHER_BLOCK), rows.steps[1] * (t + GATHER_BLOCK)),
        )
        for j in range(n_tiles):
            this, base = _list_at(rows, j, _FIRST), (rows.steps[0] * t, rows.steps[1] * t)
            if n < GATHER_BLOCK:  # beyond the last token there may be no memory
                start_k, start_v = (
                    load_number(this, np.int64(0)),
                    load_number(this + _LIST, np.int64(0)),
                )
                this = _list_at(rows, j, _SECOND)
                write_row_addresses(start_k + base[0], rows.steps[0], 0, n, GATHER_BLOCK, this)
                write_row_addresses(
                    start_v + base[1], rows.steps[1], 0, n, GATHER_BLOCK, this + _LIST
                )
                base = (0, 0)
            _add_block(
                _tile_at(tile, j), n, _lists(rows, this, base, _list_at(rows, j, _ASKED), next_rows)
            )


@helper
def _add_chosen(rows, first, last, ends, tile):
    """Add places first ... last - 1 of a list of tokens, of which these and others up to ends[1]
    are asked for in order.
    """
    for t in range(first, last, GATHER_BLOCK):
        n, left = min(GATHER_BLOCK, last - t), ends[1] - t - GATHER_BLOCK
        this, next_rows = (
            _list_at(rows, 0, t // GATHER_BLOCK % 2),
            _list_at(rows, 0, 1 - t // GATHER_BLOCK % 2),
        )
        if t == ends[0]:
            _list_chosen(rows, t, n, this)
            for i in range(GATHER_BLOCK):  # nobody could ask for these in good time
                prefetch_row(load_number(this + 8 * i, np.int64(0)), rows.n_bytes[0])
                prefetch_row(load_number(this + _LIST + 8 * i, np.int64(0)), rows.n_bytes[1])
        if left > 0:
            _list_chosen(rows, t + GATHER_BLOCK, min(GATHER_BLOCK, left), next_rows)
        else:
            next_rows = this
        _add_block(tile, n, _lists(rows, this, (0, 0), next_rows, (0, 0)))


@helper
def _list_chosen(rows, t, n, at):
    """Write where n chosen keys and values are from place t on."""
    write_row_addresses(rows.starts[0], rows.steps[0], rows.tokens + 8 * t, n, GATHER_BLOCK, at)
    write_row_addresses(
        rows.starts[1], rows.steps[1], rows.tokens + 8 * t, n, GATHER_BLOCK, at + _LIST
    )


@helper
def _list_at(rows, j, which):
    """Return the address of a list of keys; that of values is behind it."""
    return rows.lists + (LISTS * j + which) * 2 * _LIST


@helper
def _lists(rows, this, base, next_rows, next_base):
    """Return the lists of keys and those of values."""
    keys = Lists(this, base[0], next_rows, next_base[0], rows.has_bfloat16)
    return keys, Lists(this + _LIST, base[1], next_rows + _LIST, next_base[1], rows.has_bfloat16)


@helper
def _tile_at(tile, j):
    """Return the addresses of tile j, given those of the first."""
    q, c, sums, scale, dots, n_heads, n_rows = tile
    first = 4 * j * n_rows  # bytes of a number of every row before it
    own = RowSums(
        sums.peak + first, sums.weight + first, sums.values + first * sums.width, sums.width
    )
    return Tile(Matrix(q.address + first * q.row, q.row), c, own, scale, dots, n_heads, n_rows)


@helper
def _add_block(tile, n, lists):
    """Add n tokens to the sums of a tile."""
    q, c, sums, scale, dots, n_heads, _ = tile
    keys, values = lists
    if dots:
        dot_gathered(q, keys, n_heads, n, c, scale)
    else:
        project_gathered(q, keys, n_heads, n, c)
    for r in range(n_heads):
        row = RowSums(
            sums.peak + 4 * r, sums.weight + 4 * r, sums.values + 4 * r * sums.width, sums.width
        )
        weigh_row(c.address + 4 * r * c.row, n, c.row, row, np.float32(0))
    accumulate_gathered(c, values, n_heads, n, Matrix(sums.values, sums.width))


@helper
def _list_a_block(table, places, rows, lists):
    """Write to lists [tiles, LISTS, 2, 64], at rows.lists, where the first 64 tokens are: all
    blocks look alike.

    And what tiles ask for, token by token all heads: so memory is asked for in its order, whose
    continuation processors guess.
    """
    n_tiles = places.shape[0]
    for j in range(n_tiles):
        at = _list_at(rows, j, _FIRST)
        write_row_addresses(
            first_row(table, KEY, places[j, 0], places[j, 2]),
            rows.steps[0],
            0,
            GATHER_BLOCK,
            GATHER_BLOCK,
            at,
        )
        write_row_addresses(
            first_row(table, VALUE, places[j, 0], places[j, 2]),
            rows.steps[1],
            0,
            GATHER_BLOCK,
            GATHER_BLOCK,
            at + _LIST,
        )
    for side in range(2):
        for p in range(n_tiles * GATHER_BLOCK):
            lists[p // GATHER_BLOCK, _ASKED, side, p % GATHER_BLOCK] = lists[
                p % n_tiles, _FIRST, side, p // n_tiles
            ]
