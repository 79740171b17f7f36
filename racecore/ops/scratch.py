"""The arrays of one block of tokens that a kernel works in: made once per launch, small enough for the nearest caches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from racecore.jit import helper
from racecore.ops.blocks import KEY, VALUE, load
from racecore.ops.cpu_call import Call
from racecore.ops.products import padded
from racecore.ops.soft_hash.cpu import Hash
from racecore.ops.states import load_keep
from racecore.plan import BLOCK

__all__ = ["Scratch", "hash_of", "load_keys", "new_scratch"]


class Scratch(NamedTuple):
    """Rows have the token first, [BLOCK, D] or [BLOCK, V]; coefficients have it last, [planes or buckets, BLOCK].

    D and V are padded to whole vectors here; the padding is zero and stays zero.
    """

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
    factors: np.ndarray  # [3, L*P, BLOCK], see Hash
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
    d_planes: np.ndarray  # [L*P, D]
    pairs: np.ndarray  # [BLOCK, BLOCK]: a number per key and query of the block
    d_pairs: np.ndarray


@helper
def hash_of(call: Call, m: int, w: Scratch) -> Hash:
    """Return the hash of state head m with the arrays that it works in."""
    return Hash(call.planes[m], call.beta[m], call.n_tables, w.factors, w.d_u, w.d_planes)


@helper
def load_keys(call: Call, b: int, t: int, g: int, n: int, w: Scratch) -> None:
    """Load n keys and values of a block, zeros where they are masked, and which those are."""
    load_keep(call.mask, b, t, n, w.keep)
    load(call.table, KEY, (b, t, g), n, call.head_dim, w.k, w.keep)
    load(call.table, VALUE, (b, t, g), n, call.value_dim, w.v, w.keep)


@helper
def new_scratch(call: Call) -> Scratch:
    """Make the arrays for one launch."""
    dtype = call.planes.dtype
    n_rows, wide_d = call.planes.shape[1:]  # the planes come padded
    wide_v = padded(call.value_dim)
    n_buckets = call.n_tables << (n_rows // call.n_tables)
    x = np.zeros((4, BLOCK, wide_d), dtype)
    y = np.zeros((4, BLOCK, wide_v), dtype)
    c = np.empty((7, n_buckets, BLOCK), dtype)
    s = np.zeros((2, n_buckets, wide_v), dtype)
    w = np.empty((2, BLOCK, BLOCK), dtype)
    return Scratch(
        x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3], np.ones(BLOCK, dtype), np.ones(BLOCK, dtype),
        np.empty((3, n_rows, BLOCK), dtype), np.empty((n_rows, BLOCK), dtype),
        c[0], c[1], c[2], c[3], c[4], c[5], c[6], s[0], s[1],
        np.zeros((n_rows, wide_d), dtype), w[0], w[1],
    )  # fmt: skip
