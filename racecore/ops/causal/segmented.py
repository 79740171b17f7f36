"""The segmented schedule: every segment is a task, for few long sequences, where a serial scan
would leave cores idle.

Forward, the keys of each segment are summed first; an exclusive scan over these sums gives the
state before each segment; then all segments are scanned at once. Backward, the pass for queries
also sums what each segment adds to the gradients of earlier states; after an exclusive scan from
the end, the pass for keys follows. The sums and their order are those of the serial schedule, and
so are the bits.
"""

from __future__ import annotations

import numpy as np

from racecore.chunking import BLOCK, count_blocks
from racecore.ops.bidirectional.cpu import new_sums, sum_segments
from racecore.ops.causal.segment import (
    keys_backward,
    new_workspace,
    queries_backward,
    scan_segment,
    stash_of_task,
    stash_rows,
)
from racecore.ops.cpu.call import Call, add_hash_parts, exclusive_scan, launch, new_hash_parts
from racecore.ops.cpu.scratch import task_of
from racecore.ops.cpu.states import round_states
from racecore.ops.simd.memory import clear_rows
from racecore.ops.simd.tiles import fence
from racecore.problem import Problem, Sketch
from racecore.runtime import progress
from racecore.runtime.jit import helper, kernel

__all__ = ["segmented_scan", "segmented_scan_backward", "states_before_segments"]


def states_before_segments(
    part: Problem, chunk: np.ndarray, carry: np.ndarray, states: np.ndarray
) -> None:
    """Fill states [n, M, S*(1+V)] with the states before the segments of a chunk; carry
    [N, M, S*(1+V)] moves from that before the chunk to that after it.
    """
    sum_segments(part, chunk, states)
    exclusive_scan(chunk[:, 0], states, carry)


def segmented_scan(part: Problem, call: Call, kept: np.ndarray, sketch: Sketch) -> None:
    """Write the outputs of a chunk; `sketch` moves from the state before it to that after it.

    The states before its segments are written to kept [n, M, S*(1+V)], unless that is empty.
    """
    states = kept if len(kept) else new_sums(part, len(call.segments))
    states_before_segments(part, call.segments, sketch.flat, states)
    progress.advance(launch(_scan, call, states))


@kernel
def _scan(call: Call, first: int, last: int, states: np.ndarray) -> None:
    """Scan each segment from the state before it, states [n, M, S*(1+V)]."""
    ws = new_workspace(call)
    no_sums = np.empty((0, 0), np.float64)
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        round_states(states[index], m0, m1, False, ws.state)
        scan_segment(call, index, m0, m1, no_sums, ws)
    fence()


def segmented_scan_backward(
    part: Problem, call: Call, states: np.ndarray, d_sketch: Sketch, d_hash: np.ndarray | None
) -> None:
    """Write the gradients of a chunk, given the states before its segments [n, M, S*(1+V)];
    `d_sketch` moves to the gradient of the first.
    """
    hash_q = new_hash_parts(part, call.segments, d_hash)
    hash_k = new_hash_parts(part, call.segments, d_hash)
    d_sums = new_sums(part, len(call.segments))
    rows = count_blocks(call.segments) * part.n_state_heads * stash_rows(call)
    stash = np.empty((rows + BLOCK, BLOCK), part.dtype)[:rows]  # transpositions read past the end
    progress.advance(launch(_queries_backward, call, states, d_sums, stash, hash_q))
    # every later token read the sums of this segment
    exclusive_scan(call.segments[:, 0], d_sums, d_sketch.flat, reverse=True)
    progress.advance(launch(_keys_backward, call, d_sums, stash, hash_k))
    add_hash_parts(hash_q, d_hash, 0, reverse=True)
    add_hash_parts(hash_k, d_hash, 1, reverse=True)


@helper
def _stash_of_task(call: Call, index: int, m0: int, m1: int, stash: np.ndarray) -> np.ndarray:
    """Return a task's part of the stash: segments follow each other in it, in each its heads."""
    _, _, begin, end, first_block = call.segments[index]
    n_blocks = -(-(end - begin) // BLOCK)
    first_row = (first_block * call.beta.shape[0] + n_blocks * m0) * stash_rows(call)
    return stash_of_task(call, index, m1 - m0, stash, first_row)


@kernel
def _queries_backward(
    call: Call,
    first: int,
    last: int,
    states: np.ndarray,
    d_sums: np.ndarray,
    stash: np.ndarray,
    hash_q: np.ndarray,
) -> None:
    """Invert the read-out of each segment, from the state before it, states [n, M, S*(1+V)]; write
    what it adds to the gradients of earlier states to d_sums [n, M, S*(1+V)].
    """
    ws = new_workspace(call)
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        part = _stash_of_task(call, index, m0, m1, stash)
        clear_rows(d_sums[index], m0, m1)
        clear_rows(hash_q[index], m0, m1)
        round_states(states[index], m0, m1, True, ws.state)
        queries_backward(call, index, m0, m1, part, d_sums[index, m0:m1], hash_q[index], ws)
    fence()


@kernel
def _keys_backward(
    call: Call,
    first: int,
    last: int,
    d_states: np.ndarray,
    stash: np.ndarray,
    hash_k: np.ndarray,
) -> None:
    """Invert the additions of each segment, from the gradient of the state after it, d_states
    [n, M, S*(1+V)].
    """
    ws = new_workspace(call)
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        part = _stash_of_task(call, index, m0, m1, stash)
        clear_rows(hash_k[index], m0, m1)
        round_states(d_states[index], m0, m1, True, ws.state)
        keys_backward(call, index, m0, m1, part, hash_k[index], ws)
    fence()
