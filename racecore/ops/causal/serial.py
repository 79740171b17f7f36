"""The serial schedule: a task takes a head or a few of a whole sequence, segment after segment.

It carries the state along, as a float64 sum of segments' sums. Everything is read once, or again
while it is still in a cache, and keys are hashed once per direction.
"""

from __future__ import annotations

import numpy as np

from racecore.chunking import BLOCK, SEGMENT, TOKENS
from racecore.ops.causal.segment import (
    keys_backward,
    new_workspace,
    queries_backward,
    scan_segment,
    stash_of_task,
    stash_rows,
)
from racecore.ops.cpu.call import Call, add_hash_parts, launch, new_hash_parts
from racecore.ops.cpu.scratch import task_of
from racecore.ops.cpu.states import round_states
from racecore.ops.simd.memory import add_rows, clear_rows, copy_rows, matrices
from racecore.ops.simd.tiles import fence
from racecore.problem import Problem, Sketch
from racecore.runtime import progress
from racecore.runtime.jit import kernel

__all__ = ["serial_scan", "serial_scan_backward"]


def serial_scan(calls: list[tuple[slice, Call]], kept: np.ndarray, sketch: Sketch) -> None:
    """Write the outputs of a chunk, call by call; `sketch` moves from the state before it to that
    after it.

    The states before its segments are written to kept [n, M, S*(1+V)], unless that is empty.
    """
    for rows, call in calls:
        progress.advance(launch(_scan, call, kept[rows], sketch.flat))


@kernel
def _scan(call: Call, first: int, last: int, kept: np.ndarray, carry: np.ndarray) -> None:
    """Scan runs of segments; the state before the first is in carry [N, M, S*(1+V)], which moves
    along.
    """
    ws = new_workspace(call)
    # [heads, S*(1+V)]: the sum of one segment
    sums = matrices(1, ws.partial.mass.shape[0], carry.shape[2], np.float64)[0]
    for task in range(first, last):
        run, m0, m1 = task_of(call, task)
        for index in range(call.runs[run, 0], call.runs[run, 1]):
            sequence = call.segments[index, 0]
            if kept.shape[0] > 0:
                copy_rows(carry[sequence], m0, m1, kept[index])
            round_states(carry[sequence], m0, m1, False, ws.state)
            clear_rows(sums, 0, m1 - m0)
            scan_segment(call, index, m0, m1, sums, ws)
            add_rows(sums, m0, m1, carry[sequence])
    fence()


def serial_scan_backward(
    part: Problem,
    calls: list[tuple[slice, Call]],
    states: np.ndarray,
    d_sketch: Sketch,
    d_hash: np.ndarray | None,
) -> None:
    """Write the gradients of a chunk, call by call from its end, given the states before its
    segments [n, M, S*(1+V)]; `d_sketch` moves to the gradient of the first.
    """
    for rows, call in reversed(calls):
        hash_q = new_hash_parts(part, call.segments, d_hash)
        hash_k = new_hash_parts(part, call.segments, d_hash)
        n_tokens = launch(_scan_backward, call, states[rows], d_sketch.flat, hash_q, hash_k)
        add_hash_parts(hash_q, d_hash, 0, reverse=True)
        add_hash_parts(hash_k, d_hash, 1, reverse=True)
        progress.advance(2 * n_tokens)


@kernel
def _scan_backward(
    call: Call,
    first: int,
    last: int,
    states: np.ndarray,
    carry: np.ndarray,
    hash_q: np.ndarray,
    hash_k: np.ndarray,
) -> None:
    """Scan runs of segments from their end; the gradient of the state after the last is in carry
    [N, M, S*(1+V)], which moves along.
    """
    ws = new_workspace(call)
    heads = ws.partial.mass.shape[0]
    d_sums = matrices(1, heads, carry.shape[2], np.float64)[0]
    rows = SEGMENT // BLOCK * heads * stash_rows(call)
    flat = matrices(1, rows, TOKENS, call.planes.dtype)[0]  # the stash of one segment
    for task in range(first, last):
        run, m0, m1 = task_of(call, task)
        for index in range(call.runs[run, 1] - 1, call.runs[run, 0] - 1, -1):
            sequence = call.segments[index, 0]
            stash = stash_of_task(call, index, m1 - m0, flat, 0)
            clear_rows(d_sums, 0, m1 - m0)
            clear_rows(hash_q[index], m0, m1)
            round_states(states[index], m0, m1, True, ws.state)
            queries_backward(call, index, m0, m1, stash, d_sums, hash_q[index], ws)
            clear_rows(hash_k[index], m0, m1)
            round_states(carry[sequence], m0, m1, True, ws.state)
            keys_backward(call, index, m0, m1, stash, hash_k[index], ws)
            # every later token read the sums of this segment
            add_rows(d_sums, m0, m1, carry[sequence])
    fence()
