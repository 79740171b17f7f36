"""One token at a time on a GPU: the kernels that add keys and that read a state out, one after the
other.
"""

from __future__ import annotations

import numpy as np

from racecore.ops.bidirectional.cuda import read_out, sum_keys
from racecore.problem import Problem, Sketch

__all__ = ["step"]


def step(part: Problem, sketch: Sketch, lengths: np.ndarray, out: np.ndarray) -> None:
    """Add the key and value of every sequence that has one to `sketch`, and answer its query into
    out [B, 1, H, V].

    `sketch` may be float32, and is rounded to it before it is asked. `lengths` [N] counts the keys
    that take part. Sequences without a token keep their bits; their rows of `out` are left alone.
    """
    after = Sketch(
        sketch.flat.astype(np.float64), sketch.n_buckets
    )  # an interrupt may come between any two launches
    sum_keys(part, after)
    rounded = after.flat.astype(sketch.flat.dtype)
    read_out(part, Sketch(rounded.astype(np.float64), sketch.n_buckets), out)
    sketch.flat[...] = rounded
    lengths += part.count_keys()
