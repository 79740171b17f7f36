"""States inside kernels: float64 rows of a sketch to and from the arrays of a block, and masked keys."""

from __future__ import annotations

import numpy as np

from racecore.jit import helper
from racecore.ops.products import accumulate

__all__ = ["add_block", "drop_masked", "load_keep", "widen"]


@helper
def load_keep(mask: np.ndarray, b: int, t: int, n: int, keep: np.ndarray) -> None:
    """Fill keep[:n] with 1 where a key takes part and 0 where not; without a mask it stays as it is, ones."""
    if mask.shape[0] > 0:
        for i in range(n):
            keep[i] = 1 if mask[b, t + i] != 0 else 0  # any other byte is True too


@helper
def drop_masked(mask: np.ndarray, keep: np.ndarray, n: int, phi: np.ndarray) -> None:
    """phi = phi * keep, where there is a mask."""
    if mask.shape[0] > 0:
        for s in range(phi.shape[0]):
            for i in range(n):
                phi[s, i] *= keep[i]


@helper
def add_block(
    mass_terms: np.ndarray, c: np.ndarray, x: np.ndarray, n: int, block_sum: np.ndarray, total: np.ndarray
) -> None:
    """Add a block to a float64 state: sum_i mass_terms[s, i] to its masses, sum_i c[s, i] * x[i] to its value sums."""
    n_buckets = block_sum.shape[0]
    width = total.shape[0] // n_buckets - 1
    block_sum[:] = 0
    accumulate(c, x, n_buckets, n, block_sum)
    for s in range(n_buckets):
        mass = 0.0
        for i in range(n):
            mass += np.float64(mass_terms[s, i])
        total[s] += mass
        row = total[n_buckets + s * width : n_buckets + (s + 1) * width]
        for d in range(width):
            row[d] += block_sum[s, d]


@helper
def widen(state: np.ndarray, mass: np.ndarray, value_sum: np.ndarray) -> None:
    """Round a float64 state to the dtype of the arithmetic, its masses repeated for every token of a block."""
    n_buckets = value_sum.shape[0]
    width = state.shape[0] // n_buckets - 1
    for s in range(n_buckets):
        mass[s, :] = state[s]
        for d in range(width):
            value_sum[s, d] = state[n_buckets + s * width + d]
