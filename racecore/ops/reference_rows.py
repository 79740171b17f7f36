"""What the reference implementations share: rows of tokens by state head, weights of readouts."""

from __future__ import annotations

import numpy as np

from racecore.problem import BUCKET_MEAN_EPS, Problem

__all__ = [
    "add_hash_gradient",
    "key_rows",
    "query_rows",
    "store_key_rows",
    "store_query_rows",
    "weights",
    "weights_backward",
]


def key_rows(
    problem: Problem, batch: int, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys [t, M, D], values [t, M, V] and keep [t]: 0 where masked, and those rows zero."""
    if problem.key is None or problem.value is None:
        raise TypeError("this problem has no keys")
    repeats = problem.n_state_heads // problem.n_kv_heads
    keep = np.ones(end - begin, problem.dtype)
    k = problem.key[batch, begin:end].astype(problem.dtype, order="C")
    v = problem.value[batch, begin:end].astype(problem.dtype, order="C")
    if problem.key_mask is not None:
        keep[...] = problem.key_mask[batch, begin:end]
        k[keep == 0], v[keep == 0] = 0, 0
    return k.repeat(repeats, axis=1), v.repeat(repeats, axis=1), keep


def query_rows(
    problem: Problem, array: np.ndarray | None, batch: int, begin: int, end: int
) -> np.ndarray:
    """Return rows of `array` [B, T, H, X] as [t, H/M, M, X], by query head of a state head."""
    if array is None:
        raise TypeError("this problem has no queries")
    rows = array[batch, begin:end].astype(problem.dtype, order="C")
    by_head = rows.reshape(end - begin, problem.n_state_heads, -1, rows.shape[-1])
    return by_head.swapaxes(1, 2)


def store_query_rows(
    target: np.ndarray, batch: int, begin: int, end: int, rows: np.ndarray
) -> None:
    """Invert `query_rows`: write [t, H/M, M, X] into target [B, T, H, X]."""
    target[batch, begin:end] = rows.swapaxes(1, 2).reshape(target[batch, begin:end].shape)


def store_key_rows(target: np.ndarray, batch: int, begin: int, end: int, rows: np.ndarray) -> None:
    """Write [t, M, X] into target [B, T, G, X], summed over state heads of a key/value head."""
    n_kv_heads = target.shape[2]
    target[batch, begin:end] = rows.reshape(len(rows), n_kv_heads, -1, rows.shape[-1]).sum(axis=2)


def add_hash_gradient(
    hash_gradient: np.ndarray | None, d_planes: np.ndarray, d_beta: np.ndarray
) -> None:
    """Add to one side of `GradientBuffers.hash`, [M, L*P*D + 1]."""
    if hash_gradient is not None:
        if hash_gradient.shape[1] > 1:  # else that of beta alone is wanted
            hash_gradient[:, :-1] += d_planes.reshape(len(d_planes), -1)
        hash_gradient[:, -1] += d_beta


def weights(phi: np.ndarray, mass: np.ndarray, part: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return rho = phi * factor, the weights of the value sums in the output, and factor.

    ratio: factor = 1 / <phi, mass>, zero where the denominator is; bucket_mean: factor = 1 / (L *
    (mass + eps)).
    """
    if part.readout == "ratio":
        den = (phi * mass).sum(axis=-1, keepdims=True)
        seen = ~(den < np.finfo(phi.dtype).tiny)  # also true for NaN, which must stay visible
        factor = np.divide(1, den, out=np.zeros_like(den), where=seen)
    else:
        factor = 1 / (part.planes.shape[1] * (mass + BUCKET_MEAN_EPS).astype(phi.dtype))
    return phi * factor, factor


def weights_backward(
    h: np.ndarray,
    phi: np.ndarray,
    rho: np.ndarray,
    factor: np.ndarray,
    mass: np.ndarray,
    part: Problem,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of phi and, row by row, of mass, given h = d_rho."""
    # rho = phi * factor
    if part.readout == "ratio":
        # factor = 1 / <phi, mass>
        d_den = -(rho * h).sum(axis=-1, keepdims=True) * factor
        return h * factor + d_den * mass, d_den * phi
    # factor = 1 / (L * (mass + eps))
    return h * factor, -rho * h * factor * part.planes.shape[1]
