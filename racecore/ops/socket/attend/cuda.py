"""SOCKET on a GPU: softmax attention to selected tokens or to all.

Launches of `attend_splits` and `merge_splits` of kernels.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cuda.call import array_fields, empty
from racecore.ops.socket import cuda_launch as launches
from racecore.ops.socket.cuda_launch import (
    ROWS_FILE,
    TILE,
    TOKENS,
    address,
    columns_per_lane,
    launch,
    whole_tiles,
)
from racecore.runtime import arrays, cuda

__all__ = ["attend_dense", "attend_selected"]

# rows of a tile and warps of a block that merges, as in softmax.cuh and kernels.cu
_MAX_ROWS, _MERGE_WARPS = 16, 8
# partial results in memory at a time
_PARTIAL_BYTES = 256 << 20
_WORKSPACE_BYTES = 256 << 20
# splits of a sequence if one tile has all its rows
_MAX_SPLITS = 256
# tokens of a split at least; of selections always, because their length is known on the GPU only
_MIN_SPLIT_TOKENS = 64


def attend_selected(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, selected: np.ndarray, out: np.ndarray
) -> None:
    """Write exact softmax attention of one query over selected tokens; zeros if there are none.

    The scale is 1/sqrt(D).
    """
    if selected.shape[2] == 0:
        out[...] = 0
        return
    lengths = np.full(len(query), selected.shape[2], np.int64)
    _attend(
        (query, key, value, out),
        lengths,
        np.full_like(lengths, _MIN_SPLIT_TOKENS),
        cuda.to_device(selected),
    )


def attend_dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Write exact causal softmax attention of the last Tq tokens of every sequence.

    The scale is 1/sqrt(D).
    """
    n_rows = query.shape[1] * query.shape[2] // key.shape[2]
    n_splits = max(1, _MAX_SPLITS * _MAX_ROWS // max(n_rows, _MAX_ROWS))
    # from the length of a sequence alone, so the order of its sums does not depend on the batch
    split_tokens = -(-lengths // (n_splits * _MIN_SPLIT_TOKENS)) * _MIN_SPLIT_TOKENS
    _attend((query, key, value, out), lengths, split_tokens.clip(_MIN_SPLIT_TOKENS, SEGMENT), None)


class _AttendCall(NamedTuple):
    """What the launches of one call have in common."""

    tensors: tuple[Any, ...]  # query, key, value, out
    lengths: np.ndarray  # int64 [B]: tokens of a sequence, or of its selection
    split_tokens: np.ndarray  # int64 [B]: tokens of a split
    selected: Any  # int64 [B, H or G, W] on the device, or None: all tokens
    n_head_groups: int  # selections of a sequence, or key/value heads
    tile_rows: int
    dtype: np.dtype  # of the arithmetic

    @property
    def heads_per_group(self) -> int:
        """Return the query heads with the same key/value head and the same tokens."""
        return self.tensors[0].shape[2] // self.n_head_groups

    @property
    def columns(self) -> int:
        return columns_per_lane(self.tensors[0].shape[3], self.tensors[2].shape[3])

    @property
    def scratch_numbers(self) -> int:
        """Return the scratch of a block of `attend_splits`, in numbers.

        Queries and sums, weights of a group of tokens, and factors.
        """
        slab = cuda.LANES * self.columns
        padded = sum(
            -(-tensor.shape[3] // slab) * slab for tensor in (self.tensors[0], self.tensors[2])
        )
        return self.tile_rows * (padded + TOKENS + 1)

    def n_splits(self, batches: slice, row: int) -> int:
        """Return the largest number of splits of the tokens that a row of a head group sees."""
        later = (
            0
            if self.selected is not None
            else self.tensors[0].shape[1] - 1 - row // self.heads_per_group
        )
        return max(
            1,
            int((-(-(self.lengths[batches] - later) // self.split_tokens[batches])).max(initial=0)),
        )


def _attend(
    tensors: tuple[Any, ...], lengths: np.ndarray, split_tokens: np.ndarray, selected: Any
) -> None:
    """Attend to all or to selected tokens in splits of `split_tokens` [B].

    As many rows at once as the memory for partial results allows.
    """
    query, key, value, _ = tensors
    n_head_groups = key.shape[2] if selected is None else selected.shape[1]
    dtype = arrays.compute_dtype(query.dtype)
    batch, n_rows = len(query), query.shape[1] * query.shape[2] // n_head_groups
    if batch * n_rows == 0:
        return
    call = _AttendCall(
        tensors,
        lengths,
        split_tokens,
        selected,
        n_head_groups,
        whole_tiles(min(n_rows, _MAX_ROWS)),
        dtype,
    )
    while call.tile_rows > TILE and call.scratch_numbers * dtype.itemsize > launches.SHARED_BYTES:
        call = call._replace(tile_rows=whole_tiles(call.tile_rows // 2))
    device_arrays = cuda.to_device(lengths), cuda.to_device(split_tokens)
    n_splits = call.n_splits(slice(batch), n_rows - 1)
    bytes_of_row = n_head_groups * n_splits * (2 + value.shape[3]) * dtype.itemsize
    row_step = max(1, _PARTIAL_BYTES // (batch * bytes_of_row * call.tile_rows)) * call.tile_rows
    batch_step = max(1, _PARTIAL_BYTES // (min(row_step, n_rows) * bytes_of_row))
    for b in range(0, batch, batch_step):
        for row in range(0, n_rows, row_step):
            batches = slice(b, min(b + batch_step, batch))
            rows = range(row, min(row + row_step, n_rows))
            _attend_rows(call, batches, rows, *device_arrays)


def _attend_rows(
    call: _AttendCall, batches: slice, rows: range, lengths: Any, split_tokens: Any
) -> None:
    """Attend with some rows of every head group in some sequences."""
    query, key, value, _ = call.tensors
    columns = call.columns
    n_batch = batches.stop - batches.start
    n_splits = call.n_splits(batches, rows[-1])
    n_row_groups = n_batch * call.n_head_groups
    # peak, weight and weighted values
    partial = empty(
        (n_batch, call.n_head_groups, len(rows), n_splits, 2 + value.shape[3]), call.dtype
    )
    n_tasks = n_row_groups * -(-len(rows) // call.tile_rows) * n_splits
    blocks = min(n_tasks, launches.MAX_BLOCKS)
    numbers, workspace = call.scratch_numbers, None
    shared = numbers * call.dtype.itemsize
    if shared > launches.SHARED_BYTES:
        blocks = min(blocks, max(1, _WORKSPACE_BYTES // shared))
        shared = 0
        workspace = empty((blocks * numbers,), call.dtype)
    named = zip(("query", "key", "value", "out"), call.tensors, strict=True)
    record = cuda.structure(
        [
            *(field for name, tensor in named for field in array_fields(name, tensor, columns)),
            ("lengths", lengths.data.ptr),
            ("split_tokens", split_tokens.data.ptr),
            ("selected", address(call.selected)),
            ("partial", partial.data.ptr),
            ("workspace", address(workspace)),
            ("scratch_numbers", numbers),
            ("first_batch", batches.start),
            ("n_batch", n_batch),
            ("n_head_groups", call.n_head_groups),
            ("first_row", rows.start),
            ("n_rows", len(rows)),
            ("heads_per_group", call.heads_per_group),
            ("heads_per_key", query.shape[2] // key.shape[2]),
            ("tile_rows", call.tile_rows),
            ("n_splits", n_splits),
            ("n_queries", query.shape[1]),
            ("width", 0 if call.selected is None else call.selected.shape[2]),
            ("head_dim", query.shape[3]),
            ("value_dim", value.shape[3]),
        ]
    )
    launch(ROWS_FILE, "attend_splits", query.dtype, columns, blocks, cuda.LANES, shared, record)
    threads, n_tasks = cuda.LANES * _MERGE_WARPS, n_row_groups * len(rows)
    launch(ROWS_FILE, "merge_splits", query.dtype, columns, n_tasks, threads, threads * 16, record)
