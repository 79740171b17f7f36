"""Decoding one token at a time on a GPU: add the key, then read out, with the chunked kernels."""

from __future__ import annotations

import numpy as np

from racecore.ops.bidirectional.cuda import read_out, sum_keys
from racecore.problem import Problem, Sketch

__all__ = ["step"]


def step(part: Problem, sketch: Sketch, lengths: np.ndarray, out: np.ndarray) -> None:
    """Add the new key and value of each sequence to `sketch`, then read out its query.

    `out` is [B, 1, H, V]. `sketch` may be float32; the new state is rounded to it before the
    readout. `lengths` [N] advances by the unmasked keys. Sequences without a token keep their bits,
    and their rows of `out` stay unchanged.
    """
    # in a copy: an interrupt may come between any two launches
    after = Sketch(sketch.flat.astype(np.float64), sketch.n_buckets)
    sum_keys(part, after)
    rounded = after.flat.astype(sketch.flat.dtype)
    read_out(part, Sketch(rounded.astype(np.float64), sketch.n_buckets), out)
    sketch.flat[...] = rounded
    lengths += part.count_keys()
