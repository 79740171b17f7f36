"""Bidirectional attention through a sketch on a GPU: launches of the kernels in kernels.cu.

`reference` is the specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore import chunking
from racecore.ops.cuda.call import (
    CudaCall,
    LaunchScratch,
    empty_hash_parts,
    hash_width,
    key_gradients,
    launch,
    make_call,
    new_sums,
    scan_segments,
    state_heads_per_key,
)
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import progress

__all__ = ["add_at_once", "read_out", "read_out_backward", "sum_keys", "sum_keys_backward"]

_FILE = "bidirectional/kernels.cu"


def sum_keys(part: Problem, sketch: Sketch) -> None:
    """Add every key and value of `part` to `sketch`."""
    for chunk in chunking.chunks(part, "key"):
        sums = new_sums(part, len(chunk), part.n_state_heads)
        n_tokens = sum_segments(part, make_call(part, chunk), sums)
        scan_segments(chunk[:, 0], sums, sketch.flat)
        # free it before the next chunk allocates as much
        del sums
        progress.advance(n_tokens)


def sum_segments(part: Problem, call: CudaCall, sums: Any) -> int:
    """Sum keys and values per segment into sums [n, M, S*(1+V)]; return the number of tokens."""
    return launch(
        _FILE, "sum_keys", call, part.n_state_heads, LaunchScratch(state_sums=1, weights=1), sums
    )


def add_at_once(part: Problem, sketch: Sketch, lengths: np.ndarray) -> bool:
    """Return False: an interrupt may come between two launches."""
    return False


def sum_keys_backward(part: Problem, d_sketch: Sketch, grads: GradientBuffers) -> None:
    """Write the gradients of keys and values, given that of the state they were added to."""
    scratch = LaunchScratch(states=1, weights=2, hash_sums=True)
    with key_gradients(part, grads, None) as (promoted, sums, _):
        for chunk in chunking.chunks(part, "key"):
            call = make_call(
                promoted,
                chunk,
                d_key=sums.key,
                d_value=sums.value,
                hash_width=hash_width(grads.hash),
            )
            parts = empty_hash_parts(chunk, part.n_state_heads, grads.hash)
            for state_head in range(state_heads_per_key(part)):
                launch(
                    _FILE,
                    "sum_keys_backward",
                    call,
                    part.n_kv_heads,
                    scratch,
                    d_sketch.flat,
                    parts,
                    state_head=state_head,
                )
            if grads.hash is not None:
                scan_segments(np.zeros_like(chunk[:, 0]), parts, grads.hash[1:])
            progress.advance(call.n_tokens)


def read_out(part: Problem, sketch: Sketch, out: np.ndarray) -> None:
    """Write the attention of every query of `part` to `sketch` into out [B, Tq, H, V]."""
    for chunk in chunking.chunks(part, "query"):
        call = make_call(part, chunk, out=out)
        progress.advance(
            launch(
                _FILE,
                "read_out",
                call,
                part.n_heads,
                LaunchScratch(states=1, masses=1, weights=2),
                sketch.flat,
            )
        )


def read_out_backward(
    part: Problem, sketch: Sketch, d_out: np.ndarray, d_sketch: Sketch, grads: GradientBuffers
) -> None:
    """Write the gradient of the queries and add that of the state to `d_sketch`."""
    scratch = LaunchScratch(states=1, state_sums=1, masses=1, weights=4, hash_sums=True)
    for chunk in chunking.chunks(part, "query"):
        call = make_call(
            part, chunk, d_out=d_out, d_query=grads.query, hash_width=hash_width(grads.hash)
        )
        d_sums = new_sums(part, len(chunk), part.n_heads)
        parts = empty_hash_parts(chunk, part.n_heads, grads.hash)
        n_tokens = launch(
            _FILE, "read_out_backward", call, part.n_heads, scratch, sketch.flat, d_sums, parts
        )
        scan_segments(chunk[:, 0], d_sums, d_sketch.flat)
        if grads.hash is not None:
            scan_segments(np.zeros_like(chunk[:, 0]), parts, grads.hash[:1])
        del d_sums, parts
        progress.advance(n_tokens)
