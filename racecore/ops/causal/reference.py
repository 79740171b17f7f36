"""Causal attention token by token, in plain NumPy: add the key to the state, then read it out."""

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

__all__ = ["causal_scan", "causal_scan_backward"]


def causal_scan(
    part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool
) -> list[np.ndarray]:
    """Write the output of every query, from keys up to its own, to out [B, T, H, V]; `sketch` moves
    from first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from; empty unless
        `keep_checkpoints`.
    """
    checkpoints = []
    for chunk in chunking.chunks(part, "key"):
        if keep_checkpoints:
            checkpoints.append(sketch.flat.copy())
        for n, batch, begin, end, _ in chunk.tolist():
            k, v, keep = key_rows(part, batch, begin, end)
            q = query_rows(part, part.query, batch, begin, end)
            phi_k = soft_hash(k, part.planes, part.beta) * keep[:, None, None]  # [t, M, S]
            phi_q = soft_hash(q, part.planes, part.beta)  # [t, H/M, M, S]
            rows = np.empty((*q.shape[:-1], part.value_dim), part.dtype)
            mass, value_sum = sketch.mass[n], sketch.value_sum[n]  # [M, S], [M, S, V]
            for i in range(end - begin):
                mass += phi_k[i]
                value_sum += phi_k[i, :, :, None] * v[i, :, None, :]
                rho, _ = weights(phi_q[i], mass.astype(part.dtype), part)
                rows[i] = np.einsum("rms,msv->rmv", rho, value_sum.astype(part.dtype))
            store_query_rows(out, batch, begin, end, rows)
            progress.advance(end - begin)
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
    for chunk, checkpoint in zip(
        reversed(chunking.chunks(part, "key")), reversed(checkpoints), strict=True
    ):
        states = Sketch(checkpoint.copy(), part.n_buckets)
        read = [_read_backward(part, states, d_out, grads, segment) for segment in chunk.tolist()]
        for segment, (rho, d_mass, d_planes, d_beta) in zip(
            reversed(chunk.tolist()), reversed(read), strict=True
        ):
            add_hash_gradient(None if grads.hash is None else grads.hash[0], d_planes, d_beta)
            _add_backward(part, rho, d_mass, d_out, d_sketch, grads, segment)


def _read_backward(
    part: Problem,
    states: Sketch,
    d_out: np.ndarray,
    grads: GradientBuffers,
    segment: list[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scan forward again, inverting the read-out of every token.

    Returns rho and d_mass [t, H/M, M, S], of which sums are the gradients of earlier states, and
    the gradients of planes and beta.
    """
    n, batch, begin, end, _ = segment
    k, v, keep = key_rows(part, batch, begin, end)
    q = query_rows(part, part.query, batch, begin, end)
    g = query_rows(part, d_out, batch, begin, end)
    phi_k = soft_hash(k, part.planes, part.beta) * keep[:, None, None]
    phi_q = soft_hash(q, part.planes, part.beta)
    rho, d_phi_q, d_mass = np.empty_like(phi_q), np.empty_like(phi_q), np.empty_like(phi_q)
    for i in range(end - begin):
        states.mass[n] += phi_k[i]
        states.value_sum[n] += phi_k[i, :, :, None] * v[i, :, None, :]
        mass = states.mass[n].astype(part.dtype)
        rho[i], factor = weights(phi_q[i], mass, part)
        # rows[i] = rho @ value_sum
        h = np.einsum("msv,rmv->rms", states.value_sum[n].astype(part.dtype), g[i])
        # rho = weights(phi_q[i], mass)
        d_phi_q[i], d_mass[i] = weights_backward(h, phi_q[i], rho[i], factor, mass, part)
    # phi_q = soft_hash(q)
    d_q, d_planes, d_beta = soft_hash_backward(d_phi_q, q, part.planes, part.beta)
    if grads.query is not None:
        store_query_rows(grads.query, batch, begin, end, d_q)
    progress.advance(end - begin)
    return rho, d_mass, d_planes, d_beta


def _add_backward(
    part: Problem,
    rho: np.ndarray,
    d_mass: np.ndarray,
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
    segment: list[int],
) -> None:
    """Scan from the last token, inverting the addition of every token's key and value."""
    n, batch, begin, end, _ = segment
    k, v, keep = key_rows(part, batch, begin, end)
    g = query_rows(part, d_out, batch, begin, end)
    phi_k = soft_hash(k, part.planes, part.beta) * keep[:, None, None]
    d_phi_k, d_v = np.empty_like(phi_k), np.empty_like(v)
    d_state_mass, d_value_sum = d_sketch.mass[n], d_sketch.value_sum[n]
    for i in reversed(range(end - begin)):
        # rows[i] = rho @ value_sum, and rho depends on mass
        d_value_sum += np.einsum("rms,rmv->msv", rho[i], g[i])
        d_state_mass += d_mass[i].sum(axis=0)
        # value_sum += phi_k[i] * v[i]; mass += phi_k[i]
        d_v[i] = np.einsum("ms,msv->mv", phi_k[i], d_value_sum)
        d_phi_k[i] = np.einsum("msv,mv->ms", d_value_sum, v[i]) + d_state_mass
    # phi_k = soft_hash(k) * keep
    d_k, d_planes, d_beta = soft_hash_backward(
        d_phi_k * keep[:, None, None], k, part.planes, part.beta
    )
    if grads.key is not None:
        store_key_rows(grads.key, batch, begin, end, d_k)
    if grads.value is not None:
        store_key_rows(grads.value, batch, begin, end, d_v)
    add_hash_gradient(None if grads.hash is None else grads.hash[1], d_planes, d_beta)
    progress.advance(end - begin)
