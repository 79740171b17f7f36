"""One token at a time, in plain NumPy: add the key and value to the state, then read it out."""

from __future__ import annotations

import numpy as np

from racecore.ops.reference_rows import key_rows, query_rows, store_query_rows, weights
from racecore.ops.soft_hash.reference import soft_hash
from racecore.problem import Problem, Sketch
from racecore.runtime import progress

__all__ = ["step"]


def step(part: Problem, sketch: Sketch, lengths: np.ndarray, out: np.ndarray) -> None:
    """Add the key and value of every sequence that has one to `sketch`, then write the output of
    its query to out [B, 1, H, V].

    `sketch` may be float32, and is rounded to it before it is read out. `lengths` [N] counts the
    keys that take part. Sequences without a token keep their bits; their rows of `out` are not
    written.
    """
    progress.advance(len(part.sequences))
    before = sketch.flat.copy(), lengths.copy()
    try:
        for n in range(len(part.sequences)):
            _step_sequence(part, n, sketch, lengths, out)
    except BaseException:  # an interrupt must not leave the step half done
        sketch.flat[...], lengths[...] = before
        raise


def _step_sequence(
    part: Problem, n: int, sketch: Sketch, lengths: np.ndarray, out: np.ndarray
) -> None:
    batch, begin, end = part.sequences[n, :3].tolist()
    if begin == end:
        return
    k, v, keep = key_rows(part, batch, begin, end)
    phi_k = soft_hash(k, part.planes, part.beta)[0] * keep[0]  # [M, S]
    lengths[n] += int(keep[0])
    sketch.mass[n] += phi_k.astype(np.float64)
    sketch.value_sum[n] += phi_k.astype(np.float64)[:, :, None] * v[0, :, None, :]  # [M, S, V]
    q = query_rows(part, part.query, batch, begin, end)
    phi_q = soft_hash(q, part.planes, part.beta)  # [1, H/M, M, S]
    rho, _ = weights(phi_q, sketch.mass[n].astype(part.dtype), part)
    rows = np.einsum("trms,msv->trmv", rho, sketch.value_sum[n].astype(part.dtype))
    store_query_rows(out, batch, begin, end, rows)
