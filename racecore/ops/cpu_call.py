"""From a problem to kernel launches: arguments in one bundle, tasks spread over threads, scans over segments.

A task is one segment of one or a few key/value heads, with all state heads and query heads that belong to them. Tasks
write to places of their own; what they add up is added by `scan`, segment after segment in float64. That, and not luck,
is why results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore import arrays
from racecore.jit import kernel
from racecore.ops.blocks import describe
from racecore.ops.products import padded
from racecore.problem import Problem
from racecore.threads import count, run

__all__ = ["Call", "empty_hash_parts", "launch", "make_call", "pad_planes", "scan"]

_LAUNCHES = 64  # at most as many where they are long enough: a launch costs some ten microseconds
_MIN_ROWS, _MAX_ROWS = (
    4096,
    32768,
)  # of query heads in a launch: one to twenty milliseconds, for Ctrl-C and idle threads
_RUN_BYTES = 2048
_STATE_BYTES = 1 << 18
_TASKS_PER_THREAD = 4
_COLUMNS_PER_LAUNCH = 1 << 15


class Call(NamedTuple):
    """What every kernel needs. `table` holds addresses: the problem must outlive the launch, and does in `launch`."""

    table: np.ndarray  # int64 [8, 6], see ops.blocks
    segments: np.ndarray  # int64 [n, 5], see plan.chunks
    planes: np.ndarray  # [M, L*P, D] in the dtype of the arithmetic, D padded with zeros to whole vectors
    planes_t: np.ndarray  # [M, D, L*P], both padded
    beta: np.ndarray  # [M], likewise
    mask: np.ndarray  # uint8 [B, Tk], or [0, 0] for none
    n_tables: int  # L
    head_dim: int  # D
    n_heads: int  # H
    n_kv_heads: int  # G
    value_dim: int  # V
    kv_heads_per_task: int
    bucket_mean: bool  # which readout


def make_call(
    part: Problem,
    chunk: np.ndarray,
    *,
    out: np.ndarray | None = None,
    d_out: np.ndarray | None = None,
    d_query: np.ndarray | None = None,
    d_key: np.ndarray | None = None,
    d_value: np.ndarray | None = None,
) -> Call:
    """Bundle the arguments for the segments of one chunk."""
    if part.key_mask is None:
        mask = np.zeros((0, 0), np.uint8)
    else:
        mask = np.ascontiguousarray(part.key_mask).view(np.uint8)
    planes, planes_t = pad_planes(part.planes, part.dtype)
    return Call(
        table=describe(part.query, part.key, part.value, out, d_out, d_query, d_key, d_value),
        segments=chunk,
        planes=planes,
        planes_t=planes_t,
        beta=np.ascontiguousarray(part.beta, part.dtype),
        mask=mask,
        n_tables=part.planes.shape[1],
        head_dim=part.planes.shape[3],
        n_heads=part.n_heads,
        n_kv_heads=part.n_kv_heads,
        value_dim=part.value_dim,
        kv_heads_per_task=_kv_heads_per_task(part, len(chunk)),
        bucket_mean=part.readout == "bucket_mean",
    )


def pad_planes(planes: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return planes [M, L, P, D] as [M, L*P, D] and transposed, with D and the other's L*P padded with zeros."""
    m, n_tables, n_planes, head_dim = planes.shape
    n_rows = n_tables * n_planes
    wide = arrays.zeros((m, n_rows, padded(head_dim)), dtype)
    wide[:, :, :head_dim] = planes.reshape(m, n_rows, head_dim)
    wide_t = arrays.zeros((m, padded(head_dim), padded(n_rows)), dtype)
    wide_t[:, :, :n_rows] = wide.transpose(0, 2, 1)
    return wide, wide_t


def _kv_heads_per_task(part: Problem, n_segments: int) -> int:
    """Return how many neighbouring heads to treat block by block together: then memory is read in longer runs.

    Fewer where their states would not fit the second-level cache, or where there would be too few tasks for all cores.
    """
    row_bytes = part.dtype.itemsize * part.planes.shape[3]
    state_bytes = 2 * part.n_state_heads // part.n_kv_heads * part.n_buckets * part.value_dim * part.dtype.itemsize
    heads = min(part.n_kv_heads, max(1, min(_RUN_BYTES // row_bytes, _STATE_BYTES // state_bytes)))
    while heads > 1 and n_segments * -(-part.n_kv_heads // heads) < _TASKS_PER_THREAD * count():
        heads //= 2
    return heads


def launch(function: Any, call: Call, *arguments: Any) -> int:
    """Run a kernel over all tasks of a call: function(call, first task, last task, *arguments). Return the tokens."""
    n_tasks = len(call.segments) * -(-call.n_kv_heads // call.kv_heads_per_task)
    n_tokens = int((call.segments[:, 3] - call.segments[:, 2]).sum())
    rows_per_task = max(1, n_tokens * call.n_heads // max(n_tasks, 1))
    rows_per_launch = min(max(n_tokens * call.n_heads // _LAUNCHES, _MIN_ROWS), _MAX_ROWS)
    run(
        lambda first, last: function(call, first, last, *arguments),
        n_tasks,
        max(1, rows_per_launch // rows_per_task),
    )
    return n_tokens


def scan(owners: np.ndarray, parts: np.ndarray, carry: np.ndarray, *, reverse: bool = False) -> None:
    """Add parts [n, ...] to the carry [n_owners, ...] of their owners one by one, and leave in each what came before it.

    Parameters
    ----------
    owners : int64 array, shape [n]
        Which carry a part belongs to.
    parts, carry : float64 arrays, C-contiguous
        Both change: parts become exclusive sums, carry the total.
    reverse : bool
        Go from the last part to the first.
    """
    if parts.size:
        rows, totals = parts.reshape(len(parts), -1), carry.reshape(len(carry), -1)
        run(lambda first, last: _scan(owners, rows, totals, first, last, reverse), rows.shape[1], _COLUMNS_PER_LAUNCH)


@kernel
def _scan(owners: np.ndarray, parts: np.ndarray, carry: np.ndarray, first: int, last: int, reverse: bool) -> None:
    """Scan the columns first ... last - 1."""
    n = len(owners)
    for index in range(n):
        i = n - 1 - index if reverse else index
        part, total = parts[i, first:last], carry[owners[i], first:last]
        for c in range(last - first):
            x = part[c]
            part[c] = total[c]
            total[c] += x


def empty_hash_parts(part: Problem, chunk: np.ndarray, total: np.ndarray | None) -> np.ndarray:
    """Return where tasks put their shares of `total`, gradients of planes and beta: [n, M, width]; width 0 if unwanted."""
    return arrays.empty((len(chunk), part.n_state_heads, 0 if total is None else total.shape[2]), np.float64)
