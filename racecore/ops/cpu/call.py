"""From a problem to kernel launches: arguments in one bundle, tasks for threads, exclusive scans.

A task is one segment, or a run of them, of one or a few key/value heads, with all state heads and
query heads that belong to them. Each task writes to memory of its own; sums of segments are added
in their order in float64, by `exclusive_scan` or by the task that has them all. That is why results
do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.extending import register_jitable

from racecore.chunking import SEGMENT
from racecore.ops.cpu.read_modes import ReadModes
from racecore.ops.cpu.row_io import describe
from racecore.ops.soft_hash.planes import padded_planes
from racecore.problem import Problem
from racecore.runtime import arrays
from racecore.runtime.jit import kernel
from racecore.runtime.threads import count, run

__all__ = [
    "Call",
    "add_hash_parts",
    "exclusive_scan",
    "launch",
    "make_call",
    "n_buckets_of",
    "new_call",
    "new_hash_parts",
    "serial_calls",
]

_LAUNCHES = 64  # at most as many where they are long enough: a launch costs some ten microseconds
# Rows of query heads in a launch: one to twenty milliseconds, for Ctrl-C and idle threads.
_MIN_ROWS, _MAX_ROWS = 4096, 32768
_MAX_WORK = 5e9  # floating-point operations in a launch, likewise, of large states
_BUSY = 0.9  # of all threads' time, for a serial scan; else segments are tasks
_RUN_BYTES = 2048  # of one token's rows that are read together, of neighbouring heads
_STATE_BYTES = 1 << 18  # of the states of a task: in the second-level cache, with its rows
_TASKS_PER_THREAD = 4
_COLUMNS_PER_LAUNCH = 1 << 15
_NO_MASK = np.zeros((0, 0), np.uint8)
_ONE_RUN = np.array([[0, 1]])


class Call(NamedTuple):
    """The arguments of every kernel. `table` holds addresses: `launch` keeps the problem alive."""

    table: np.ndarray  # int64 [8, 6], see ops.cpu.row_io
    segments: np.ndarray  # int64 [n, 5], see chunking.chunks
    runs: np.ndarray  # int64 [r, 2]: a task's first segment and the one after its last
    # [M or 1, L*P, D] in the dtype of the arithmetic, D padded with zeros to whole vectors; 1 where
    # all heads share their planes
    planes: np.ndarray
    planes_t: np.ndarray  # [M or 1, D, L*P], both padded
    beta: np.ndarray  # [M], in the dtype of the arithmetic
    mask: np.ndarray  # uint8 [B, Tk], or [0, 0] for none
    n_tables: int  # L
    head_dim: int  # D
    n_heads: int  # H
    n_kv_heads: int  # G
    value_dim: int  # V
    kv_heads_per_task: int
    bucket_mean: bool  # which readout
    # read modes of inputs, see ops.cpu.read_modes; not a tuple in the tuple: Numba takes two
    # microseconds of a call to unpack that
    hash_mode: int
    value_mode: int
    d_out_mode: int


@register_jitable
def n_buckets_of(call: Call) -> int:
    """Return S."""
    return call.n_tables << (call.planes.shape[1] // call.n_tables)


def make_call(
    part: Problem,
    chunk: np.ndarray,
    modes: ReadModes,
    *,
    out: np.ndarray | None = None,
    d_out: np.ndarray | None = None,
    d_query: np.ndarray | None = None,
    d_key: np.ndarray | None = None,
    d_value: np.ndarray | None = None,
) -> Call:
    """Return the arguments for the segments of one chunk, each a task."""
    table = describe(part.query, part.key, part.value, out, d_out, d_query, d_key, d_value)
    n = len(chunk)
    # one segment, as when decoding: saves some microseconds
    runs = _ONE_RUN if n == 1 else np.arange(n)[:, None] + np.array([0, 1])
    return new_call(part, table, chunk, runs, _kv_heads_per_task(part, n), modes)


def new_call(
    part: Problem,
    table: np.ndarray,
    segments: np.ndarray,
    runs: np.ndarray,
    kv_heads_per_task: int,
    modes: ReadModes,
) -> Call:
    """Return these arguments with those that only depend on the problem."""
    mask = _NO_MASK if part.key_mask is None else np.ascontiguousarray(part.key_mask).view(np.uint8)
    planes, planes_t, beta = padded_planes(part)
    return Call(
        table=table,
        segments=segments,
        runs=runs,
        planes=planes,
        planes_t=planes_t,
        beta=beta,
        mask=mask,
        n_tables=part.planes.shape[1],
        head_dim=part.planes.shape[3],
        n_heads=part.n_heads,
        n_kv_heads=part.n_kv_heads,
        value_dim=part.value_dim,
        kv_heads_per_task=kv_heads_per_task,
        bucket_mean=part.readout == "bucket_mean",
        hash_mode=modes.hash,
        value_mode=modes.value,
        d_out_mode=modes.d_out,
    )


def _kv_heads_per_task(part: Problem, n_segments: int) -> int:
    """Return how many neighbouring heads a task treats block by block: memory is read in longer
    runs.

    Fewer where their states would not fit the second-level cache, or where there would be too few
    tasks for all cores.
    """
    row_bytes = part.dtype.itemsize * part.planes.shape[3]
    state_heads = part.n_state_heads // part.n_kv_heads
    # a state is there twice, see `states.RoundedState`
    state_bytes = 2 * state_heads * part.n_buckets * part.value_dim * part.dtype.itemsize
    heads = min(part.n_kv_heads, max(1, min(_RUN_BYTES // row_bytes, _STATE_BYTES // state_bytes)))
    while heads > 1 and n_segments * -(-part.n_kv_heads // heads) < _TASKS_PER_THREAD * count():
        heads //= 2
    return heads


# Serial tasks
# ------------


def serial_calls(call: Call) -> list[tuple[slice, Call]]:
    """Cut a call into calls whose tasks are runs of segments: whole sequences of a head or a few.

    Returns
    -------
    list of (slice, Call)
        The segments that a call has of the given one, and the call; in the order of segments.
        Empty if cores would be idle.
    """
    n = len(call.segments)
    n_tokens = call.segments[:, 3] - call.segments[:, 2]
    first = np.flatnonzero(np.diff(call.segments[:, 0], prepend=-1))  # segment of each sequence
    lengths = np.add.reduceat(n_tokens, first) if n else n_tokens
    heads = _heads_of_serial_tasks(call, lengths)
    if heads == 0:
        return []
    if len(first) > 1:
        # several sequences share a chunk, so it is small: a run for each, all in one call
        step, runs = n, np.stack([first, np.append(first[1:], n)], axis=1)
    else:
        # a launch takes a run of segments of the one sequence, not all of them: for Ctrl-C
        rows_per_segment = SEGMENT * heads * call.n_heads // call.n_kv_heads
        step, runs = max(1, 2 * _max_rows(call) // rows_per_segment), None
    calls = []
    for start in range(0, n, max(step, 1)):
        rows = slice(start, min(start + step, n))
        segments = call.segments[rows].copy()
        segments[:, 4] -= segments[0, 4]
        calls.append(
            (
                rows,
                call._replace(
                    segments=segments,
                    runs=np.array([[0, len(segments)]]) if runs is None else runs,
                    kv_heads_per_task=heads,
                ),
            )
        )
    return calls


def _heads_of_serial_tasks(call: Call, lengths: np.ndarray) -> int:
    """Return how many key/value heads a task of whole sequences has; 0 if cores would be idle."""
    # where every sequence is one segment, a serial scan has as many tasks as a segmented one
    single = len(lengths) == len(call.segments)
    n_threads = count()
    for heads in range(call.kv_heads_per_task, 0, -1):
        if call.n_kv_heads % heads == 0:
            n_groups = call.n_kv_heads // heads
            if single or _keep_threads_busy(lengths, n_groups, n_threads):
                return heads
    return 0


def _keep_threads_busy(lengths: np.ndarray, n_groups: int, n_threads: int) -> bool:
    """Return whether sequences of such lengths, each for n_groups groups of heads, keep all threads
    busy.
    """
    n_tasks = len(lengths) * n_groups
    longest = int(lengths.max(initial=0))
    total = int(lengths.sum()) * n_groups
    if longest * n_tasks == total:  # equal lengths: rounds of tasks
        time: float = -(-n_tasks // n_threads) * longest
    else:  # at most: a thread begins the longest as the others end
        time = (total + (n_threads - 1) * longest) / n_threads
    return time * n_threads * _BUSY <= total


# Launches
# --------


def launch(function: Any, call: Call, *arguments: Any, at_once: bool = False) -> int:
    """Run a kernel over all tasks of a call: function(call, first task, last task, *arguments).

    `at_once` means in a single launch, by the calling thread. Returns the number of tokens.
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
    """Return how many rows of query heads a launch may have: causal, backward, a row takes some 20
    S D operations.
    """
    work = (20 * n_buckets_of(call) + 8 * call.planes.shape[1]) * max(call.head_dim, call.value_dim)
    return max(1, min(_MAX_ROWS, int(_MAX_WORK / work)))


# Sums over segments
# ------------------


def exclusive_scan(
    owners: np.ndarray, parts: np.ndarray, carry: np.ndarray, *, reverse: bool = False
) -> None:
    """Add partial sums to the carry of their owners one by one, and replace each by the carry
    before it.

    Parameters
    ----------
    owners : int64 array, shape [n]
        Index of the carry that a part belongs to.
    parts, carry : float64 arrays, C-contiguous, shapes [n, ...] and [n_owners, ...]
        Both change: parts become exclusive sums, carry the total.
    reverse : bool
        Go from the last part to the first.
    """
    if parts.size:
        rows, totals = parts.reshape(len(parts), -1), carry.reshape(len(carry), -1)
        run(
            lambda first, last: _scan_columns(owners, rows, totals, first, last, reverse),
            rows.shape[1],
            _COLUMNS_PER_LAUNCH,
        )


@kernel
def _scan_columns(
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


def new_hash_parts(part: Problem, segments: np.ndarray, total: np.ndarray | None) -> np.ndarray:
    """Return memory for the partial sums of `total` by segment, gradients of planes and beta.

    float64 [n, M, width] for `total` [..., M, width]; width 0 if unwanted.
    """
    width = 0 if total is None else total.shape[2]
    return arrays.empty((len(segments), part.n_state_heads, width), np.float64)


def add_hash_parts(
    parts: np.ndarray, d_hash: np.ndarray | None, side: int, *, reverse: bool = False
) -> None:
    """Add partial sums of segments to one side of `GradientBuffers.hash`, in the order of segments
    or its `reverse`; they are overwritten.
    """
    if d_hash is not None:
        owners = np.zeros(len(parts), np.int64)
        exclusive_scan(owners, parts, d_hash[side : side + 1], reverse=reverse)
