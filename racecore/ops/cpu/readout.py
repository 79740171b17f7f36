"""The two readouts on a block: weights of the value sums from probabilities and masses, and their
gradient.

Either way a token's output is ``sum_s rho[s] * value_sum[s]`` with ``rho = phi * factor``:

    ratio         factor = 1 / sum_s phi[s] * mass[s]      zero where the denominator vanishes
    bucket_mean   factor[s] = 1 / (L * (mass[s] + eps))

`mass` has a column per token, because a causal query has masses of its own. All columns of a block
are computed, also those past its last token, which nobody reads. The plain twins are `weights` and
`weights_backward` in `ops.reference_rows`.
"""

from __future__ import annotations

import numpy as np

from racecore.chunking import BLOCK
from racecore.ops.simd.vectors import at_least, fma, lanes, load_lanes, select, splat, store_lanes
from racecore.problem import BUCKET_MEAN_EPS
from racecore.runtime.jit import helper

__all__ = ["weigh", "weigh_backward"]

_TINY32 = float(np.finfo(np.float32).tiny)
_TINY64 = float(np.finfo(np.float64).tiny)


@helper
def weigh(
    phi: np.ndarray,
    mass: np.ndarray,
    n_tables: int,
    bucket_mean: bool,
    factor: np.ndarray,
    rho: np.ndarray,
) -> None:
    """Fill rho [S, n] from phi [S, n] and mass [S, n]; and factor [S, n], of the ratio only its
    first row.
    """
    one, zero = splat(phi.dtype.type(1)), splat(phi.dtype.type(0))
    n_buckets = phi.shape[0]
    if bucket_mean:
        eps, tables = splat(phi.dtype.type(BUCKET_MEAN_EPS)), splat(phi.dtype.type(n_tables))
        for s in range(n_buckets):
            for i in range(0, BLOCK, lanes(phi)):
                f = one / (tables * (load_lanes(mass, s, i) + eps))
                store_lanes(factor, s, i, f)
                store_lanes(rho, s, i, load_lanes(phi, s, i) * f)
        return
    tiny = splat(phi.dtype.type(_TINY32 if phi.itemsize == 4 else _TINY64))
    for i in range(0, BLOCK, lanes(phi)):
        den = zero
        for s in range(n_buckets):
            den = fma(load_lanes(phi, s, i), load_lanes(mass, s, i), den)
        # NaN is neither at least tiny nor below it: it stays visible
        f = select(at_least(den, tiny), one / den, select(at_least(tiny, den), zero, den))
        store_lanes(factor, 0, i, f)
        for s in range(n_buckets):
            store_lanes(rho, s, i, load_lanes(phi, s, i) * f)


@helper
def weigh_backward(
    h: np.ndarray,
    phi: np.ndarray,
    mass: np.ndarray,
    factor: np.ndarray,
    rho: np.ndarray,
    n_tables: int,
    bucket_mean: bool,
    d_mass: np.ndarray,
) -> None:
    """From h = d_rho [S, n], which becomes d_phi, fill also d_mass [S, n], token by token."""
    n_buckets, zero = phi.shape[0], splat(phi.dtype.type(0))
    if bucket_mean:
        # factor = 1 / (L * (mass + eps)); rho = phi * factor
        minus_tables = splat(phi.dtype.type(-n_tables))
        for s in range(n_buckets):
            for i in range(0, BLOCK, lanes(phi)):
                d_phi = load_lanes(h, s, i) * load_lanes(factor, s, i)
                store_lanes(d_mass, s, i, load_lanes(rho, s, i) * d_phi * minus_tables)
                store_lanes(h, s, i, d_phi)
        return
    # factor = 1 / sum_s phi * mass; rho = phi * factor
    for i in range(0, BLOCK, lanes(phi)):
        f, asked = load_lanes(factor, 0, i), zero
        for s in range(n_buckets):
            asked = fma(load_lanes(rho, s, i), load_lanes(h, s, i), asked)
        d_den = (zero - asked) * f
        for s in range(n_buckets):
            store_lanes(h, s, i, fma(load_lanes(h, s, i), f, d_den * load_lanes(mass, s, i)))
            store_lanes(d_mass, s, i, d_den * load_lanes(phi, s, i))
