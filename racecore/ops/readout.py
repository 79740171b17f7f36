"""The two readouts on a block: weights of the value sums from probabilities and masses, and their gradient.

Either way a token's output is ``sum_s rho[s] * value_sum[s]`` with ``rho = phi * factor``:

    ratio         factor = 1 / sum_s phi[s] * mass[s]      zero where the denominator vanishes
    bucket_mean   factor[s] = 1 / (L * (mass[s] + eps))

`mass` has a column per token, because a causal query has masses of its own. All columns of a block are computed, also those
past its last token, which nobody reads. The plain twins are `weights` and `weights_backward` in `ops.rows`.
"""

from __future__ import annotations

import numpy as np

from racecore.jit import helper
from racecore.plan import BLOCK
from racecore.problem import BUCKET_MEAN_EPS

__all__ = ["weigh", "weigh_backward"]

_TINY32 = float(np.finfo(np.float32).tiny)
_TINY64 = float(np.finfo(np.float64).tiny)


@helper
def weigh(
    phi: np.ndarray, mass: np.ndarray, n_tables: int, bucket_mean: bool, factor: np.ndarray, rho: np.ndarray
) -> None:
    """Fill factor [S, n] and rho [S, n] from phi [S, n] and mass [S, n]."""
    one = phi.dtype.type(1)
    n_buckets = phi.shape[0]
    if bucket_mean:
        eps, tables = phi.dtype.type(BUCKET_MEAN_EPS), phi.dtype.type(n_tables)
        for s in range(n_buckets):
            for i in range(BLOCK):
                factor[s, i] = one / (tables * (mass[s, i] + eps))
                rho[s, i] = phi[s, i] * factor[s, i]
        return
    den = factor[0]
    den[:] = 0
    for s in range(n_buckets):
        for i in range(BLOCK):
            den[i] += phi[s, i] * mass[s, i]
    tiny = _TINY32 if phi.itemsize == 4 else _TINY64
    for i in range(BLOCK):
        den[i] = phi.dtype.type(0) if den[i] < tiny else one / den[i]  # NaN is not below anything: it stays visible
    for s in range(n_buckets - 1, -1, -1):
        for i in range(BLOCK):
            factor[s, i] = den[i]
            rho[s, i] = phi[s, i] * den[i]


@helper
def weigh_backward(
    h: np.ndarray, phi: np.ndarray, mass: np.ndarray, factor: np.ndarray, rho: np.ndarray, n_tables: int,
    bucket_mean: bool, d_mass: np.ndarray,
) -> None:  # fmt: skip
    """From h = d_rho [S, n], which becomes d_phi, fill also d_mass [S, n], token by token."""
    n_buckets = phi.shape[0]
    if bucket_mean:
        # factor = 1 / (L * (mass + eps)); rho = phi * factor
        tables = phi.dtype.type(n_tables)
        for s in range(n_buckets):
            for i in range(BLOCK):
                d_mass[s, i] = -rho[s, i] * h[s, i] * factor[s, i] * tables
                h[s, i] *= factor[s, i]
        return
    # factor = 1 / sum_s phi * mass; rho = phi * factor
    d_den = d_mass[0]
    d_den[:] = 0
    for s in range(n_buckets):
        for i in range(BLOCK):
            d_den[i] -= rho[s, i] * h[s, i]
    for i in range(BLOCK):
        d_den[i] *= factor[0, i]
    for s in range(n_buckets - 1, -1, -1):
        for i in range(BLOCK):
            h[s, i] = h[s, i] * factor[s, i] + d_den[i] * mass[s, i]
            d_mass[s, i] = d_den[i] * phi[s, i]
