"""Causal attention by segments on a GPU: launches of the kernels in kernels.cu.

Forward: the keys of each segment are summed, prefix sums over segments give the state before each
segment, and all segments are scanned in parallel. Backward: a scan forward in time computes the
gradients of queries and sums the gradients of earlier states per segment; after prefix sums from
the end, a scan backward in time computes those of keys and values. `reference`, token by token, is
the specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore import chunking
from racecore.ops.bidirectional.cuda import sum_segments
from racecore.ops.cuda.call import (
    LaunchScratch,
    empty,
    empty_hash_parts,
    hash_width,
    key_gradients,
    launch,
    make_call,
    new_sums,
    scan_segments,
    stash_numbers,
    state_heads_per_key,
)
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import progress

__all__ = ["causal_scan", "causal_scan_backward"]

_FILE = "causal/kernels.cu"


def causal_scan(
    part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool
) -> list[np.ndarray]:
    """Write causal attention to out [B, T, H, V]; `sketch` moves from first to final state.

    Returns
    -------
    list of float64 arrays
        The state before every chunk, from which the backward pass starts, or the states before all
        of its segments if memory allows; empty unless `keep_checkpoints`.
    """
    checkpoints: list[np.ndarray] = []
    for chunk in chunking.chunks(part, "key"):
        if keep_checkpoints and not part.keeps_states:
            checkpoints.append(sketch.flat.copy())
        call = make_call(part, chunk, out=out)
        states = _states_before(part, chunk, sketch.flat)
        n_tokens = launch(
            _FILE, "causal_scan", call, part.n_heads, LaunchScratch(states=1, weights=4), states
        )
        if keep_checkpoints and part.keeps_states:
            checkpoints.append(states)
        # free it before the next chunk allocates as much
        del states
        progress.advance(n_tokens)
    return checkpoints


def _states_before(part: Problem, chunk: np.ndarray, carry: Any) -> Any:
    """Return the states before the segments of a chunk; carry [N, M, S*(1+V)] moves past them."""
    states = new_sums(part, len(chunk), part.n_state_heads)
    sum_segments(part, make_call(part, chunk), states)
    scan_segments(chunk[:, 0], states, carry)
    return states


def causal_scan_backward(
    part: Problem,
    checkpoints: list[np.ndarray],
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    """Write all gradients; `d_sketch` moves from the final state's to the first state's."""
    with key_gradients(part, grads, d_out) as (promoted, sums, promoted_d_out):
        for chunk, checkpoint in zip(
            reversed(chunking.chunks(part, "key")), reversed(checkpoints), strict=True
        ):
            has_states = chunking.has_state_per_segment(part, chunk, len(checkpoint))
            states = checkpoint if has_states else _states_before(part, chunk, checkpoint.copy())
            stash = empty((stash_numbers(part, chunk),), part.dtype)
            d_states = _scan_queries_backward(part, chunk, states, d_out, d_sketch, grads, stash)
            del states
            _scan_keys_backward(promoted, chunk, d_states, promoted_d_out, sums, stash)


def _scan_queries_backward(
    part: Problem,
    chunk: np.ndarray,
    states: Any,
    d_out: Any,
    d_sketch: Sketch,
    grads: GradientBuffers,
    stash: Any,
) -> Any:
    """Write the gradients of queries; return those of the states after each segment.

    They are in every (H/M)-th head of the result.
    """
    call = make_call(
        part, chunk, d_out=d_out, d_query=grads.query, hash_width=hash_width(grads.hash)
    )
    d_sums = new_sums(part, len(chunk), part.n_heads)
    parts = empty_hash_parts(chunk, part.n_heads, grads.hash)
    scratch = LaunchScratch(states=1, state_sums=1, weights=6, hash_sums=True)
    n_tokens = launch(
        _FILE,
        "causal_scan_queries_backward",
        call,
        part.n_heads,
        scratch,
        states,
        d_sums,
        parts,
        stash,
    )
    # the sums of a segment are part of every later state
    scan_segments(chunk[:, 0], d_sums, d_sketch.flat, reverse=True)
    if grads.hash is not None:
        scan_segments(np.zeros_like(chunk[:, 0]), parts, grads.hash[:1], reverse=True)
    progress.advance(n_tokens)
    return d_sums


def _scan_keys_backward(
    part: Problem, chunk: np.ndarray, d_states: Any, d_out: Any, grads: GradientBuffers, stash: Any
) -> None:
    """Write the gradients of keys and values."""
    call = make_call(
        part,
        chunk,
        d_out=d_out,
        d_key=grads.key,
        d_value=grads.value,
        hash_width=hash_width(grads.hash),
    )
    parts = empty_hash_parts(chunk, part.n_state_heads, grads.hash)
    scratch = LaunchScratch(states=1, weights=2, hash_sums=True)
    step = np.int64(part.n_heads // part.n_state_heads * d_states.shape[2])
    for state_head in range(state_heads_per_key(part)):
        launch(
            _FILE,
            "causal_scan_keys_backward",
            call,
            part.n_kv_heads,
            scratch,
            d_states,
            parts,
            stash,
            step,
            state_head=state_head,
        )
    if grads.hash is not None:
        scan_segments(np.zeros_like(chunk[:, 0]), parts, grads.hash[1:], reverse=True)
    progress.advance(call.n_tokens)
