"""The arrays of one block of tokens that a kernel works in: made once per launch, small enough for the nearest caches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from racecore.jit import helper
from racecore.ops.cpu_call import Call
from racecore.plan import BLOCK

__all__ = ["Scratch", "new_scratch"]


class Scratch(NamedTuple):
    """Rows have the token first, [BLOCK, D] or [BLOCK, V]; coefficients have it last, [planes or buckets, BLOCK]."""

    q: np.ndarray  # [BLOCK, D]
    k: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    v: np.ndarray  # [BLOCK, V]
    o: np.ndarray
    g: np.ndarray
    d_v: np.ndarray
    keep: np.ndarray  # [BLOCK]: 1 where a key takes part, else 0
    ones: np.ndarray
    factors: np.ndarray  # [3, L*P, BLOCK], see hash_block
    d_u: np.ndarray  # [L*P, BLOCK]
    phi_q: np.ndarray  # [S, BLOCK]
    phi_k: np.ndarray
    d_phi: np.ndarray
    mass: np.ndarray
    d_mass: np.ndarray
    factor: np.ndarray
    rho: np.ndarray
    value_sum: np.ndarray  # [S, V]
    block_sum: np.ndarray
    pairs: np.ndarray  # [BLOCK, BLOCK]: a number per key (row) and query (column) of the block
    d_pairs: np.ndarray


@helper
def new_scratch(call: Call) -> Scratch:
    """Make the arrays for one launch."""
    dtype = call.planes.dtype
    n_rows, head_dim = call.planes.shape[1:]
    n_buckets = call.n_tables << (n_rows // call.n_tables)
    x = np.empty((4, BLOCK, head_dim), dtype)
    y = np.empty((4, BLOCK, call.value_dim), dtype)
    c = np.empty((7, n_buckets, BLOCK), dtype)
    s = np.empty((2, n_buckets, call.value_dim), dtype)
    w = np.empty((2, BLOCK, BLOCK), dtype)
    return Scratch(
        x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3], np.ones(BLOCK, dtype), np.ones(BLOCK, dtype),
        np.empty((3, n_rows, BLOCK), dtype), np.empty((n_rows, BLOCK), dtype),
        c[0], c[1], c[2], c[3], c[4], c[5], c[6], s[0], s[1], w[0], w[1],
    )  # fmt: skip
