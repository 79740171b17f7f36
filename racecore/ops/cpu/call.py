"""From a problem to kernel launches: arguments in one bundle, tasks spread over threads, scans over
segments.

A task is one segment, or a run of them, of one or a few key/value heads, with all state heads and
query heads that belong to them. Tasks write to places of their own; what segments amount to is
added in their order in float64, by `scan` or by the task that has them all. That, and not luck, is
why results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from racecore.chunking import SEGMENT
from racecore.ops.cpu.row_io import describe
from racecore.ops.soft_hash.planes import padded_planes
from racecore.problem import Problem
from racecore.runtime import arrays
from racecore.runtime.jit import kernel
from racecore.runtime.threads import count, run

__all__ = [
    "NO_MASK",
    "Call",
    "empty_hash_parts",
    "in_series",
    "launch",
    "make_call",
    "n_buckets_of",
    "scan",
]

_LAUNCHES = 64  # at most as many where they are long enough: a launch costs some ten microseconds
_MIN_ROWS, _MAX_ROWS = (
    4096,
    32768,
)  # of query heads in a launch: one to twenty milliseconds, for Ctrl-C and idle threads
_MAX_WORK = 5e9  # floating-point operations in a launch, likewise, of large states
_RUN_BYTES = 2048
_STATE_BYTES = 1 << 18
_TASKS_PER_THREAD = 4
_COLUMNS_PER_LAUNCH = 1 << 15
NO_MASK = np.zeros((0, 0), np.uint8)


class Call(NamedTuple):
    """What every kernel needs. `table` holds addresses: the problem must outlive the launch, and
    does in `launch`.
    """

    table: np.ndarray  # int64 [8, 6], see ops.cpu.row_io
    segments: np.ndarray  # int64 [n, 5], see chunking.chunks
    runs: np.ndarray  # int64 [r, 2]: a task's first segment and the one after its last
    planes: (
        np.ndarray
    )  # [M or 1, L*P, D] in the dtype of the arithmetic, D padded with zeros to whole vectors
    planes_t: np.ndarray  # [M or 1, D, L*P], both padded; 1 where all heads share their planes
    beta: np.ndarray  # [M], likewise
    mask: np.ndarray  # uint8 [B, Tk], or [0, 0] for none
    n_tables: int  # L
    head_dim: int  # D
    n_heads: int  # H
    n_kv_heads: int  # G
    value_dim: int  # V
    kv_heads_per_task: int
    bucket_mean: bool  # which readout


@register_jitable
def n_buckets_of(call: Call) -> int:
    """Return S."""
    return call.n_tables << (call.planes.shape[1] // call.n_tables)


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
    mask = NO_MASK if part.key_mask is None else np.ascontiguousarray(part.key_mask).view(np.uint8)
    planes, planes_t, beta = padded_planes(part)
    return Call(
        table=describe(part.query, part.key, part.value, out, d_out, d_query, d_key, d_value),
        segments=chunk,
        runs=_runs_of_one(len(chunk)),
        planes=planes,
        planes_t=planes_t,
        beta=beta,
        mask=mask,
        n_tables=part.planes.shape[1],
        head_dim=part.planes.shape[3],
        n_heads=part.n_heads,
        n_kv_heads=part.n_kv_heads,
        value_dim=part.value_dim,
        kv_heads_per_task=_kv_heads_per_task(part, len(chunk)),
        bucket_mean=part.readout == "bucket_mean",
    )


def _runs_of_one(n: int) -> np.ndarray:
    return np.arange(n)[:, None] + np.array([0, 1])


def in_series(call: Call) -> list[tuple[slice, Call]]:
    """Cut a call into pieces whose tasks are whole sequences of a head or a few, segment after
    segment.

    Returns
    -------
    list of (slice, Call)
        The segments of the call that a piece has, and the piece. Empty if cores would be idle.
    """
    n, n_tokens = len(call.segments), call.segments[:, 3] - call.segments[:, 2]
    first = np.flatnonzero(np.diff(call.segments[:, 0], prepend=-1))
    lengths, n_threads = np.add.reduceat(n_tokens, first) if n else n_tokens, count()
    sizes = (h for h in range(call.kv_heads_per_task, 0, -1) if call.n_kv_heads % h == 0)
    single = (
        len(first) == n
    )  # segments: each is its own sequence, and there is nothing to do side by side
    heads = next((h for h in sizes if single or _fill(lengths, call.n_kv_heads // h, n_threads)), 0)
    if heads == 0:
        return []
    step = (
        n
        if len(first) > 1
        else max(1, 2 * _max_rows(call) * call.n_kv_heads // (SEGMENT * heads * call.n_heads))
    )
    pieces = []
    for start in range(0, n, max(step, 1)):
        rows = slice(start, min(start + step, n))
        segments = call.segments[rows].copy()
        segments[:, 4] -= segments[0, 4]
        runs = (
            np.stack([first, np.append(first[1:], n)], axis=1)
            if len(first) > 1
            else np.array([[0, len(segments)]])
        )
        pieces.append((rows, call._replace(segments=segments, runs=runs, kv_heads_per_task=heads)))
    return pieces


def _fill(lengths: np.ndarray, n_groups: int, n_threads: int) -> bool:
    """Tell whether sequences of such lengths, times groups of heads, keep all threads busy nine
    tenths of the time.
    """
    n_tasks, longest, total = (
        len(lengths) * n_groups,
        int(lengths.max(initial=0)),
        int(lengths.sum()) * n_groups,
    )
    alike = longest * n_tasks == total
    time = (
        -(-n_tasks // n_threads) * longest
        if alike
        else (total + (n_threads - 1) * longest) / n_threads
    )  # at most
    return time * n_threads * 0.9 <= total


def _kv_heads_per_task(part: Problem, n_segments: int) -> int:
    """Return how many neighbouring heads to treat block by block together: then memory is read in
    longer runs.

    Fewer where their states would not fit the second-level cache, or where there would be too few
    tasks for all cores.
    """
    row_bytes = part.dtype.itemsize * part.planes.shape[3]
    state_bytes = (
        2
        * part.n_state_heads
        // part.n_kv_heads
        * part.n_buckets
        * part.value_dim
        * part.dtype.itemsize
    )
    heads = min(part.n_kv_heads, max(1, min(_RUN_BYTES // row_bytes, _STATE_BYTES // state_bytes)))
    while heads > 1 and n_segments * -(-part.n_kv_heads // heads) < _TASKS_PER_THREAD * count():
        heads //= 2
    return heads


def launch(function: Any, call: Call, *arguments: Any, at_once: bool = False) -> int:
    """Run a kernel over all tasks of a call: function(call, first task, last task, *arguments).
    Return the tokens.

    `at_once` means in a single launch, by the calling thread.
    """
    n_tasks = len(call.runs) * -(-call.n_kv_heads // call.kv_heads_per_task)
    n_tokens = int((call.segments[:, 3] - call.segments[:, 2]).sum())
    rows_per_task = max(1, n_tokens * call.n_heads // max(n_tasks, 1))
    rows_per_launch = min(max(n_tokens * call.n_heads // _LAUNCHES, _MIN_ROWS), _max_rows(call))
    run(
        lambda first, last: function(call, first, last, *arguments),
        n_tasks,
        max(1, n_tasks if at_once else rows_per_launch // rows_per_task),
    )
    return n_tokens


def _max_rows(call: Call) -> int:
    """Return how many rows of query heads a launch may have: backward, causal, a row takes some 20
    S D operations.
    """
    work = (20 * n_buckets_of(call) + 8 * call.planes.shape[1]) * max(call.head_dim, call.value_dim)
    return max(1, min(_MAX_ROWS, int(_MAX_WORK / work)))


def scan(
    owners: np.ndarray, parts: np.ndarray, carry: np.ndarray, *, reverse: bool = False
) -> None:
    """Add parts [n, ...] to the carry [n_owners, ...] of their owners one by one, and leave in each
    what came before it.

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
        run(
            lambda first, last: _scan(owners, rows, totals, first, last, reverse),
            rows.shape[1],
            _COLUMNS_PER_LAUNCH,
        )


@kernel
def _scan(
    owners: np.ndarray, parts: np.ndarray, carry: np.ndarray, first: int, last: int, reverse: bool
) -> None:
    """Scan the columns first ... last - 1."""
    n = len(owners)
    for index in range(n):
        i = n - 1 - index if reverse else index
        part, total = parts[i, first:last], carry[owners[i], first:last]
        for c in range(last - first):
            x = part[c]
            part[c] = total[c]
            total[c] += x


def empty_hash_parts(part: Problem, segments: np.ndarray, total: np.ndarray | None) -> np.ndarray:
    """Return where tasks put their shares of `total`, gradients of planes and beta: [n, M, width];
    width 0 if unwanted.
    """
    return arrays.empty(
        (len(segments), part.n_state_heads, 0 if total is None else total.shape[2]), np.float64
    )
