"""Causal attention by segments on a GPU: launches of the kernels in kernels.cu; see `reference` for
it token by token.

Forward, the keys of every segment are summed first, a scan over these sums gives the state before
each segment, and all segments walk at once. Backward, a forward walk for the queries also sums what
each segment adds to the gradients of earlier states; after a scan from the end, a backward walk is
for keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore import chunking
from racecore.ops.bidirectional.cuda import sum_segments
from racecore.ops.cuda.call import (
    Scratch,
    empty,
    empty_hash_parts,
    hash_width,
    key_gradients,
    launch,
    make_call,
    new_sums,
    scan,
    shares,
    stash_numbers,
)
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import progress

__all__ = ["causal_scan", "causal_scan_backward"]

_FILE = "causal/kernels.cu"


def causal_scan(
    part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool
) -> list[np.ndarray]:
    """Answer every query from the keys up to its own, into out [B, T, H, V]; `sketch` moves from
    first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from, or before all of its
        segments where that is affordable; empty unless `keep_checkpoints`.
    """
    checkpoints: list[np.ndarray] = []
    for chunk in chunking.chunks(part, "key"):
        if keep_checkpoints and not part.keeps_states:
            checkpoints.append(sketch.flat.copy())
        call = make_call(part, chunk, out=out)
        states = _states_before(part, chunk, sketch.flat)
        n_tokens = launch(_FILE, "walk", call, part.n_heads, Scratch(states=1, weights=4), states)
        if keep_checkpoints and part.keeps_states:
            checkpoints.append(states)
        del states  # before the next chunk asks for as much
        progress.advance(n_tokens)
    return checkpoints


def _states_before(part: Problem, chunk: np.ndarray, carry: Any) -> Any:
    """Return the states before the segments of a chunk; carry [N, M, S*(1+V)] moves to after them."""
    states = new_sums(part, len(chunk), part.n_state_heads)
    sum_segments(part, make_call(part, chunk), states)
    scan(chunk[:, 0], states, carry)
    return states


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
    with key_gradients(part, grads, d_out) as (wide, sums, wide_d_out):
        for chunk, checkpoint in zip(
            reversed(chunking.chunks(part, "key")), reversed(checkpoints), strict=True
        ):
            own = chunking.has_state_per_segment(part, chunk, len(checkpoint))
            states = checkpoint if own else _states_before(part, chunk, checkpoint.copy())
            stash = empty((stash_numbers(part, chunk),), part.dtype)
            d_states = _walk_queries_backward(part, chunk, states, d_out, d_sketch, grads, stash)
            del states
            _walk_keys_backward(wide, chunk, d_states, wide_d_out, sums, stash)


def _walk_queries_backward(
    part: Problem,
    chunk: np.ndarray,
    states: Any,
    d_out: Any,
    d_sketch: Sketch,
    grads: GradientBuffers,
    stash: Any,
) -> Any:
    """Walk forward for the queries. Return the gradients of the states after each segment, in every
    (H/M)-th head.
    """
    call = make_call(
        part, chunk, d_out=d_out, d_query=grads.query, hash_width=hash_width(grads.hash)
    )
    d_sums = new_sums(part, len(chunk), part.n_heads)
    parts = empty_hash_parts(chunk, part.n_heads, grads.hash)
    scratch = Scratch(states=1, state_sums=1, weights=6, hash_sums=True)
    n_tokens = launch(
        _FILE, "walk_queries_backward", call, part.n_heads, scratch, states, d_sums, parts, stash
    )
    # every later token read the sums of this segment
    scan(chunk[:, 0], d_sums, d_sketch.flat, reverse=True)
    if grads.hash is not None:
        scan(np.zeros_like(chunk[:, 0]), parts, grads.hash[:1], reverse=True)
    progress.advance(n_tokens)
    return d_sums


def _walk_keys_backward(
    part: Problem, chunk: np.ndarray, d_states: Any, d_out: Any, grads: GradientBuffers, stash: Any
) -> None:
    """Walk backward for keys and values."""
    call = make_call(
        part,
        chunk,
        d_out=d_out,
        d_key=grads.key,
        d_value=grads.value,
        hash_width=hash_width(grads.hash),
    )
    parts = empty_hash_parts(chunk, part.n_state_heads, grads.hash)
    scratch = Scratch(states=1, weights=2, hash_sums=True)
    step = np.int64(part.n_heads // part.n_state_heads * d_states.shape[2])
    for share in range(shares(part)):
        launch(
            _FILE,
            "walk_keys_backward",
            call,
            part.n_kv_heads,
            scratch,
            d_states,
            parts,
            stash,
            step,
            share=share,
        )
    if grads.hash is not None:
        scan(np.zeros_like(chunk[:, 0]), parts, grads.hash[1:], reverse=True)
    progress.advance(call.n_tokens)
