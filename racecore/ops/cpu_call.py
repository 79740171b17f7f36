"""From a problem to kernel launches: arguments in one bundle, tasks spread over threads, scans over segments.

A task is one segment of one key/value head, with all state heads and query heads that belong to it. Tasks write to places
of their own; what they add up is added by `scan`, segment after segment in float64. That, and not luck, is why results do
not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore import arrays
from racecore.jit import kernel
from racecore.ops.blocks import describe
from racecore.ops.products import padded
from racecore.problem import Problem
from racecore.threads import run

__all__ = ["Call", "empty_hash_parts", "launch", "make_call", "pad_planes", "scan"]

_TOKENS_PER_LAUNCH = 4096  # rows of query heads: about a millisecond, so that Ctrl-C and idle threads wait no longer
_COLUMNS_PER_LAUNCH = 1 << 15


class Call(NamedTuple):
    """What every kernel needs. `table` holds addresses: the problem must outlive the launch, and does in `launch`."""

    table: np.ndarray  # int64 [8, 6], see ops.blocks
    segments: np.ndarray  # int64 [n, 5], see plan.chunks
    planes: np.ndarray  # [M, L*P, D] in the dtype of the arithmetic, D padded with zeros to whole vectors
    beta: np.ndarray  # [M], likewise
    mask: np.ndarray  # uint8 [B, Tk], or [0, 0] for none
    n_tables: int  # L
    head_dim: int  # D
    n_heads: int  # H
    n_kv_heads: int  # G
    value_dim: int  # V
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
    return Call(
        table=describe(part.query, part.key, part.value, out, d_out, d_query, d_key, d_value),
        segments=chunk,
        planes=pad_planes(part.planes, part.dtype),
        beta=np.ascontiguousarray(part.beta, part.dtype),
        mask=mask,
        n_tables=part.planes.shape[1],
        head_dim=part.planes.shape[3],
        n_heads=part.n_heads,
        n_kv_heads=part.n_kv_heads,
        value_dim=part.value_dim,
        bucket_mean=part.readout == "bucket_mean",
    )


def pad_planes(planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return planes [M, L, P, D] as [M, L*P, padded D], the padding zero."""
    m, n_tables, n_planes, head_dim = planes.shape
    wide = np.zeros((m, n_tables * n_planes, padded(head_dim)), dtype)
    wide[:, :, :head_dim] = planes.reshape(m, n_tables * n_planes, head_dim)
    return wide


def launch(function: Any, call: Call, *arguments: Any) -> int:
    """Run a kernel over all tasks of a call: function(call, first task, last task, *arguments). Return the tokens."""
    n_tasks = len(call.segments) * call.n_kv_heads
    n_tokens = int((call.segments[:, 3] - call.segments[:, 2]).sum())
    rows_per_task = max(1, n_tokens * call.n_heads // max(n_tasks, 1))
    run(
        lambda first, last: function(call, first, last, *arguments),
        n_tasks,
        max(1, _TOKENS_PER_LAUNCH // rows_per_task),
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


def empty_hash_parts(part: Problem, chunk: np.ndarray, wanted: bool) -> np.ndarray:
    """Return where tasks put their shares of the gradients of planes and beta, [n, M, L*P*D + 1]; no room if unwanted."""
    m, n_tables, n_planes, head_dim = part.planes.shape
    return arrays.empty((len(chunk), m, n_tables * n_planes * head_dim + 1 if wanted else 0), np.float64)
