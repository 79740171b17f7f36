"""Causal attention by segments: Numba kernels; see `reference` for the token-by-token form.

There are two schedules, with the same bits. *Serial* (`serial`): a task takes whole sequences of a
head or a few, segment after segment; it reads everything once. *Segmented* (`segmented`): every
segment is a task, which reads keys and values twice, where a serial scan would leave cores idle, as
for one long sequence of one head. Both are made of the same functions of a segment (`segment`).

Either way the state before a segment is a float64 sum of segments' sums, and states are never
recovered by subtraction.
"""

from __future__ import annotations

import numpy as np

from racecore import chunking
from racecore.ops.bidirectional.cpu import new_sums
from racecore.ops.causal.segmented import (
    segmented_scan,
    segmented_scan_backward,
    states_before_segments,
)
from racecore.ops.causal.serial import serial_scan, serial_scan_backward
from racecore.ops.cpu.call import make_call, serial_calls
from racecore.ops.cpu.read_modes import COPIES, ReadModes, add_mode, hash_mode
from racecore.problem import GradientBuffers, Problem, Sketch

__all__ = ["causal_scan", "causal_scan_backward"]


def causal_scan(
    part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool
) -> list[np.ndarray]:
    """Write the output of every query, from keys up to its own, to out [B, T, H, V]; `sketch` moves
    from first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from, or before all of its
        segments where that is affordable; empty unless `keep_checkpoints`.
    """
    checkpoints, keep_all = [], keep_checkpoints and part.keeps_states
    # several query heads of a state head scan the same values: these are copied
    one_scan = part.n_heads == part.n_state_heads
    value_mode = add_mode(part) if one_scan else COPIES.value
    modes = ReadModes(hash_mode(part), value_mode, COPIES.d_out)
    for chunk in chunking.chunks(part, "key"):
        if keep_checkpoints:
            checkpoints.append(new_sums(part, len(chunk)) if keep_all else sketch.flat.copy())
        kept = checkpoints[-1] if keep_all else new_sums(part, 0)
        call = make_call(part, chunk, modes, out=out)
        calls = serial_calls(call)
        if calls:
            serial_scan(calls, kept, sketch)
        else:
            segmented_scan(part, call, kept, sketch)
    return checkpoints


def causal_scan_backward(
    part: Problem,
    checkpoints: list[np.ndarray],
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    """Write all gradients; `d_sketch` moves from the gradient of the final state to that of the
    first one.
    """
    chunks = chunking.chunks(part, "key")
    for chunk, checkpoint in zip(reversed(chunks), reversed(checkpoints), strict=True):
        _scan_chunk_backward(part, chunk, checkpoint, d_out, d_sketch, grads)


def _scan_chunk_backward(
    part: Problem,
    chunk: np.ndarray,
    checkpoint: np.ndarray,
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    """Write the gradients of one chunk, from what forward left of the states before it."""
    states = checkpoint
    if not chunking.has_state_per_segment(part, chunk, len(checkpoint)):
        states = new_sums(part, len(chunk))
        states_before_segments(part, chunk, checkpoint.copy(), states)
    # values and d_out are scanned more than once: they are copied
    modes = ReadModes(hash_mode(part, grads.hash), COPIES.value, COPIES.d_out)
    call = make_call(
        part,
        chunk,
        modes,
        d_out=d_out,
        d_query=grads.query,
        d_key=grads.key,
        d_value=grads.value,
    )
    calls = serial_calls(call)
    if calls:
        serial_scan_backward(part, calls, states, d_sketch, grads.hash)
    else:
        segmented_scan_backward(part, call, states, d_sketch, grads.hash)
