"""Bidirectional attention through a state, in plain NumPy; each gradient under what it inverts."""

from __future__ import annotations

import numpy as np

from racecore import chunking
from racecore.ops.reference_rows import (
    add_hash_gradient,
    key_rows,
    query_rows,
    store_key_rows,
    store_query_rows,
    weights,
    weights_backward,
)
from racecore.ops.soft_hash.reference import soft_hash, soft_hash_backward
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import progress

__all__ = ["add_at_once", "read_out", "read_out_backward", "sum_keys", "sum_keys_backward"]


def sum_keys(part: Problem, sketch: Sketch) -> None:
    """Add every key and value of `part` to `sketch`."""
    for chunk in chunking.chunks(part, "key"):
        for n, batch, begin, end, _ in chunk.tolist():
            k, v, keep = key_rows(part, batch, begin, end)
            phi_k = soft_hash(k, part.planes, part.beta) * keep[:, None, None]  # [t, M, S]
            sketch.mass[n] += phi_k.sum(axis=0, dtype=np.float64)
            sketch.value_sum[n] += np.einsum("tms,tmv->msv", phi_k.astype(np.float64), v)
            progress.advance(end - begin)


def add_at_once(part: Problem, sketch: Sketch, lengths: np.ndarray) -> bool:
    """Return False: in plain NumPy, an interrupt may come between any two tokens."""
    return False


def sum_keys_backward(part: Problem, d_sketch: Sketch, grads: GradientBuffers) -> None:
    """Write the gradients of keys and values, given that of the state they were added to."""
    for chunk in chunking.chunks(part, "key"):
        for n, batch, begin, end, _ in chunk.tolist():
            k, v, keep = key_rows(part, batch, begin, end)
            phi_k = soft_hash(k, part.planes, part.beta) * keep[:, None, None]
            d_value_sum = d_sketch.value_sum[n].astype(part.dtype)
            # value_sum += phi_k * v
            d_phi_k = np.einsum("msv,tmv->tms", d_value_sum, v)
            if grads.value is not None:
                store_key_rows(
                    grads.value, batch, begin, end, np.einsum("tms,msv->tmv", phi_k, d_value_sum)
                )
            # mass += phi_k
            d_phi_k += d_sketch.mass[n].astype(part.dtype)
            # phi_k = soft_hash(k) * keep
            d_k, d_planes, d_beta = soft_hash_backward(
                d_phi_k * keep[:, None, None], k, part.planes, part.beta
            )
            if grads.key is not None:
                store_key_rows(grads.key, batch, begin, end, d_k)
            add_hash_gradient(None if grads.hash is None else grads.hash[1], d_planes, d_beta)
            progress.advance(end - begin)


def read_out(part: Problem, sketch: Sketch, out: np.ndarray) -> None:
    """Read out `sketch` for every query of `part` into out [B, Tq, H, V]."""
    for chunk in chunking.chunks(part, "query"):
        for n, batch, begin, end, _ in chunk.tolist():
            q = query_rows(part, part.query, batch, begin, end)
            phi_q = soft_hash(q, part.planes, part.beta)  # [t, H/M, M, S]
            rho, _ = weights(phi_q, sketch.mass[n].astype(part.dtype), part)
            rows = np.einsum("trms,msv->trmv", rho, sketch.value_sum[n].astype(part.dtype))
            store_query_rows(out, batch, begin, end, rows)
            progress.advance(end - begin)


def read_out_backward(
    part: Problem, sketch: Sketch, d_out: np.ndarray, d_sketch: Sketch, grads: GradientBuffers
) -> None:
    """Write the gradient of the queries and add that of the state to `d_sketch`."""
    for chunk in chunking.chunks(part, "query"):
        for n, batch, begin, end, _ in chunk.tolist():
            q = query_rows(part, part.query, batch, begin, end)
            g = query_rows(part, d_out, batch, begin, end)
            mass = sketch.mass[n].astype(part.dtype)
            phi_q = soft_hash(q, part.planes, part.beta)
            rho, factor = weights(phi_q, mass, part)
            # out = rho @ value_sum
            h = np.einsum("msv,trmv->trms", sketch.value_sum[n].astype(part.dtype), g)
            d_sketch.value_sum[n] += np.einsum("trms,trmv->msv", rho.astype(np.float64), g)
            # rho = weights(phi_q, mass)
            d_phi_q, d_mass = weights_backward(h, phi_q, rho, factor, mass, part)
            d_sketch.mass[n] += d_mass.sum(axis=(0, 1), dtype=np.float64)
            # phi_q = soft_hash(q)
            d_q, d_planes, d_beta = soft_hash_backward(d_phi_q, q, part.planes, part.beta)
            if grads.query is not None:
                store_query_rows(grads.query, batch, begin, end, d_q)
            add_hash_gradient(None if grads.hash is None else grads.hash[0], d_planes, d_beta)
            progress.advance(end - begin)
