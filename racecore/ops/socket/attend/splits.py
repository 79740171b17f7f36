"""How exact attention is cut into tiles and splits, and launched; the kernels are in `kernels`.

Tiles that attend to the same tokens form a group, and their tokens are cut into splits: whole
segments, by the length of a sequence alone. Every split leaves partial results in memory until
those of its group are merged, so only some groups are under way at a time.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import describe
from racecore.ops.socket.attend.kernels import TILE_ROWS, AttendCall, attend_splits, merge_splits
from racecore.ops.socket.launches import launch, task_table
from racecore.runtime import arrays
from racecore.runtime.threads import run

__all__ = ["ALL_TOKENS", "TileGroup", "attend_groups", "dense_groups", "heads_per_tile"]

_PARTIAL_BYTES = 32 << 20  # of partial results in memory
_MOST_SPLITS = 64  # of a tile that decodes: enough for any number of threads
_LONGEST_SPLIT = 1 << 17  # tokens: a launch must stay short, for Ctrl-C
_MOST_TILES = 16  # of a group: their sums stay in the second-level cache
ALL_TOKENS = np.zeros((0, 0, 0), np.int64)  # in place of selected tokens [B, H or G, W]
_MERGED_AT_ONCE = 1 << 16  # numbers: less is merged before a second thread has woken up


class TileGroup(NamedTuple):
    """Tiles that attend to the same tokens, block by block together."""

    tiles: list[tuple[int, int, int, int]]  # sequence, first head, first query, number of queries
    n_tokens: int


def heads_per_tile(n_sharing: int) -> int:
    """Return how many of the heads that share keys and values a tile takes.

    That is as many as fit, in equal parts.
    """
    return next(n for n in range(min(n_sharing, TILE_ROWS), 0, -1) if n_sharing % n == 0)


def dense_groups(lengths: np.ndarray, n_queries: int, n_heads: int, heads: int) -> list[TileGroup]:
    """Return the groups of causal attention by the last n_queries tokens of every sequence."""
    queries = max(1, TILE_ROWS // heads)  # of a tile
    # in decoding, tiles of neighbouring heads see the same tokens, in neighbouring memory
    n_tiles = min(n_heads // heads, _MOST_TILES) if n_queries == 1 else 1
    groups = []
    for b, length in enumerate(lengths):
        tiles = [
            (b, h, i, min(queries, n_queries - i))
            for i in range(0, n_queries, queries)
            for h in range(0, n_heads, heads)
        ]
        for first in range(0, len(tiles), n_tiles):
            some = tiles[first : first + n_tiles]
            _, _, query, count = some[0]
            n_visible = int(length) - n_queries + query + count  # to the last query of a tile
            groups.append(TileGroup(some, max(0, n_visible)))
    return groups


def attend_groups(
    tensors: tuple[np.ndarray, ...],
    lengths: np.ndarray,
    selected: np.ndarray,
    heads: int,
    groups: list[TileGroup],
) -> None:
    """Write exact attention of all groups of tiles, some groups at a time.

    Parameters
    ----------
    tensors : query, key, value, out
    lengths : int64 array, shape [B]
    selected : int64 array, shape [B, H or G, W]
        W = 0: all tokens.
    heads : int
        Query heads of a tile.
    groups : list of TileGroup
    """
    query, key, value, _ = tensors
    n_queries, width = query.shape[1], 2 + value.shape[3]
    n_tiles = max((len(group.tiles) for group in groups), default=1)
    n_rows = heads * max((tile[3] for group in groups for tile in group.tiles), default=1)
    longest = max((group.n_tokens for group in groups), default=1)
    n_splits = max(1, -(-longest // _split_length(longest, n_queries)))
    at_once = max(1, _PARTIAL_BYTES // (n_splits * n_tiles * n_rows * width * 8))
    for start in range(0, len(groups), at_once):
        tiles, splits = _tiles_and_splits(groups[start : start + at_once], n_queries)
        call = AttendCall(
            table=describe(*tensors),
            tiles=task_table(tiles, 7),
            splits=task_table(splits, 4),
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
        results = np.empty((len(splits), n_tiles, n_rows, width))  # [splits, tiles, R, 2 + V]
        launch(partial(attend_splits, call, results), len(splits))
        run(
            partial(merge_splits, call, results),
            len(tiles),
            max(1, _MERGED_AT_ONCE * len(tiles) // max(1, results.size)),
        )


def _tiles_and_splits(
    groups: list[TileGroup], n_queries: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the rows of AttendCall.tiles and AttendCall.splits for some groups."""
    tiles: list[tuple[int, ...]] = []
    splits: list[tuple[int, ...]] = []
    for some, n_tokens in groups:
        step, first_split = _split_length(n_tokens, n_queries), len(splits)
        splits += [
            (len(tiles), len(tiles) + len(some), t, min(t + step, n_tokens))
            for t in range(0, n_tokens, step)
        ]
        tiles += [(*tile, first_split, len(splits), j) for j, tile in enumerate(some)]
    return tiles, splits


def _split_length(n_tokens: int, n_queries: int) -> int:
    """Return the tokens of a split: whole segments.

    Only decoding needs many splits. A prefill has many tiles, and one split each as long as that is
    not too long.
    """
    n_splits = _MOST_SPLITS if n_queries == 1 else 1
    return min(max(SEGMENT, -(-n_tokens // (SEGMENT * n_splits)) * SEGMENT), _LONGEST_SPLIT)
