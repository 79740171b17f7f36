"""SOCKET on a GPU: hash keys, make the lookup tables of queries, score keys.

Launches of `hash_keys` and `fill_tables` of kernels.cu and `score_keys` of selection.cu.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.chunking import SEGMENT
from racecore.ops.cuda.call import array_fields, empty
from racecore.ops.socket import cuda_launch as launches
from racecore.ops.socket.cuda_launch import (
    ROWS_FILE,
    SELECTION_FILE,
    TOKENS,
    address,
    columns_per_lane,
    device_planes,
    launch,
    whole_blocks,
    whole_tiles,
)
from racecore.ops.socket.layout import (
    BLOCK_TOKENS,
    DIGIT_VALUES,
    HashedKeys,
    Scorer,
    high_bits,
    n_digits,
)
from racecore.runtime import arrays, cuda

__all__ = ["hash_keys", "query_tables", "score_pairs", "scores"]

_KINDS = {"soft": 0, "hamming": 1, "signed_jl": 2}
# tables of a task that hashes, as in kernels.cu
_TABLES = 8
# heads scored while a code is in registers, as in selection.cu
_HEADS = 4


def hash_keys(
    key: np.ndarray,
    value: np.ndarray,
    planes: np.ndarray,
    scorer: Scorer,
    keys: HashedKeys,
    counts: np.ndarray,
) -> None:
    """Write codes and norms of new tokens after those in `keys`, without changing its lengths."""
    longest = int(counts.max(initial=0))
    columns = columns_per_lane(key.shape[3], value.shape[3])
    n_tasks = keys.codes.shape[0] * keys.codes.shape[1] * -(-keys.n_tables // _TABLES)
    run = min(SEGMENT, max(1, longest * n_tasks // (launches.ENOUGH_BLOCKS * TOKENS)) * TOKENS)
    n_runs = -(-longest // run)
    # [B, 2]: number of new tokens, index of the first
    sequences = cuda.to_device(np.stack([counts, keys.lengths], axis=1))
    dtype = arrays.compute_dtype(key.dtype)
    planes_on_device, plane_fields = device_planes(planes, dtype, columns)
    call = cuda.structure(
        [
            *array_fields("key", key, columns),
            *array_fields("value", value, columns),
            *plane_fields,
            ("sequences", sequences.data.ptr),
            ("codes", address(keys.codes)),
            ("norms", address(keys.norms)),
            ("n_batch", keys.codes.shape[0]),
            ("n_kv_heads", keys.codes.shape[1]),
            ("high_bits", high_bits(keys.n_planes)),
            ("capacity", keys.codes.shape[2]),
            ("code_rows", keys.codes.shape[3]),
            ("value_dim", value.shape[3]),
            ("weighs_keys", scorer.weighs_keys),
            ("weighs_values", scorer.weighs_values),
            ("tokens_per_task", run),
            ("n_runs", n_runs),
        ]
    )
    shared = TOKENS * whole_tiles(_TABLES * keys.n_planes) * dtype.itemsize
    launch(ROWS_FILE, "hash_keys", key.dtype, columns, n_tasks * n_runs, cuda.LANES, shared, call)
    # alive until the launch
    del planes_on_device


def query_tables(query: np.ndarray, planes: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Return the lookup tables of queries, [B, H, L, N, 16] in the dtype of the arithmetic.

    An entry is the factor or term of one digit of a key's code in the score.
    """
    batch, _, n_heads, head_dim = query.shape
    n_kv_heads, n_tables, n_planes, _ = planes.shape
    columns, dtype = columns_per_lane(head_dim), arrays.compute_dtype(query.dtype)
    tables = empty((batch, n_heads, n_tables, n_digits(n_planes), DIGIT_VALUES), dtype)
    planes_on_device, plane_fields = device_planes(planes, dtype, columns)
    # [B, H, 1, D]: the heads of a group are hashed together, like tokens
    rows = query.reshape(batch, n_heads, 1, head_dim)
    call = cuda.structure(
        [
            *array_fields("query", rows, columns),
            *plane_fields,
            ("tables", address(tables)),
            ("n_batch", batch),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("n_digits", n_digits(n_planes)),
            ("kind", _KINDS[scorer.kind]),
        ]
    )
    group = n_heads // n_kv_heads
    n_tasks = batch * n_kv_heads * -(-group // TOKENS) * -(-n_tables // _TABLES)
    shared = 2 * TOKENS * whole_tiles(_TABLES * n_planes) * dtype.itemsize
    factor = np.float64(2 / (head_dim**0.5 * scorer.tau))
    launch(
        ROWS_FILE, "fill_tables", query.dtype, columns, n_tasks, cuda.LANES, shared, call, factor
    )
    del planes_on_device
    return tables


def scores(tables: np.ndarray, keys: HashedKeys, multiplies: bool) -> np.ndarray:
    """Return the scores of every key, [B, H, T]: (sum over tables) * norm.

    Positions after the end of a sequence have -inf.
    """
    batch, n_heads = tables.shape[:2]
    longest = int(keys.lengths.max(initial=0))
    result = empty((batch, n_heads, whole_blocks(longest)), tables.dtype)
    pairs = range(batch * keys.codes.shape[1])
    score_pairs(tables, keys, multiplies, cuda.to_device(keys.lengths), pairs, False, result)
    return result[:, :, :longest]


def score_pairs(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    lengths: Any,
    pairs: range,
    adds_heads: bool,
    out: Any,
) -> None:
    """Write the scores of all keys of some (sequence, key/value head) pairs to out.

    The rows of `out`, [..., whole blocks], are the heads of the pairs' groups, or the pairs if
    `adds_heads`.
    """
    n_heads, n_tables, digits = tables.shape[1:4]
    group = n_heads // keys.codes.shape[1]
    bytes_of_head = n_tables * digits * DIGIT_VALUES * tables.dtype.itemsize
    copies = min(_HEADS, group, launches.SHARED_BYTES // bytes_of_head)
    n_blocks = out.shape[-1] // BLOCK_TOKENS
    blocks_per_task = min(128, max(8, n_blocks * len(pairs) // launches.ENOUGH_BLOCKS))
    call = cuda.structure(
        [
            ("tables", address(tables)),
            ("codes", address(keys.codes)),
            ("norms", address(keys.norms)),
            ("lengths", lengths.data.ptr),
            ("out", out.data.ptr),
            ("first_pair", pairs.start),
            ("n_pairs", len(pairs)),
            ("n_heads", n_heads),
            ("n_kv_heads", keys.codes.shape[1]),
            ("n_tables", n_tables),
            ("n_digits", digits),
            ("high_bits", high_bits(keys.n_planes)),
            ("multiplies", multiplies),
            ("capacity", keys.codes.shape[2]),
            ("code_rows", keys.codes.shape[3]),
            ("width", out.shape[-1]),
            ("blocks_per_task", blocks_per_task),
            ("heads_at_once", copies or _HEADS),
            ("has_copies", copies > 0),
            ("adds_heads", adds_heads),
        ]
    )
    n_tasks = len(pairs) * -(-n_blocks // blocks_per_task)
    launch(
        SELECTION_FILE, "score_keys", tables.dtype, 1, n_tasks, 128, copies * bytes_of_head, call
    )
