"""The soft hash of a block of tokens, by the factorised softmax; Numba.

The logits are linear in the corner, so the softmax over corners is a product over planes,
``phi[r] = prod_p sigmoid(2 * beta * c_r[p] * tanh(u_p))``: P sigmoids and about 2R products in place of R exponentials
(derived in docs/math). Arrays of a block are laid out [planes or buckets, tokens], so that all of it is vector code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from racecore.jit import helper, kernel
from racecore.ops.cpu_call import pad_planes
from racecore.ops.elementary import exp_of_nonpositive, tanh
from racecore.ops.products import accumulate, expand, project
from racecore.plan import BLOCK
from racecore.threads import run

__all__ = ["soft_hash", "soft_hash_backward"]


class Hash(NamedTuple):
    """The hash of one state head, and the arrays of a block that it works in."""

    planes: np.ndarray  # [L*P, D], D padded
    beta: float
    n_tables: int  # L
    factors: (
        np.ndarray
    )  # [3, L*P, BLOCK]: tanh(u), sigmoid(2 beta tanh(u)), sigmoid(-2 beta tanh(u)); kept for the way back
    d_u: np.ndarray  # [L*P, BLOCK]
    d_planes: np.ndarray  # [L*P, D]


@helper
def hash_block(f: Hash, x: np.ndarray, n: int, phi: np.ndarray) -> None:
    """Hash n rows x [n, D] into phi [S, n].

    Element-wise loops run over whole blocks: a constant length vectorises better, and nobody reads columns past n.
    """
    # Typed constants throughout: an integer literal would turn float32 arithmetic into float64.
    zero, one = phi.dtype.type(0), phi.dtype.type(1)
    twice_beta = f.beta + f.beta
    tanh_u, plus, minus = f.factors[0], f.factors[1], f.factors[2]
    n_rows = f.planes.shape[0]
    project(f.planes, x, n_rows, n, tanh_u)
    for k in range(n_rows):
        for i in range(BLOCK):
            t = tanh(tanh_u[k, i])
            z = twice_beta * t
            e = exp_of_nonpositive(-abs(z))
            high = one / (one + e)
            low = e * high  # sigmoid(-|z|) without cancellation
            tanh_u[k, i] = t
            plus[k, i] = high if z >= zero else low
            minus[k, i] = low if z >= zero else high
    n_planes = n_rows // f.n_tables
    for table in range(f.n_tables):
        _corner_products(plus, minus, table * n_planes, n_planes, phi[table << n_planes : (table + 1) << n_planes])


@helper
def _corner_products(plus: np.ndarray, minus: np.ndarray, first: int, n_planes: int, phi: np.ndarray) -> None:
    """Fill phi [R, BLOCK] of one table, plane by plane from the least significant bit: every plane doubles the rows."""
    phi[0] = 1
    for bit in range(n_planes):
        a, b = plus[first + n_planes - 1 - bit], minus[first + n_planes - 1 - bit]
        for r in range(1 << bit):
            low, high = phi[r], phi[r + (1 << bit)]
            for i in range(BLOCK):
                value = low[i]
                high[i] = value * a[i]
                low[i] = value * b[i]


@helper
def hash_block_backward(
    f: Hash, d_phi: np.ndarray, x: np.ndarray, n: int, phi: np.ndarray, d_x: np.ndarray, d_hash: np.ndarray
) -> None:
    """Invert `hash_block`: add to d_x [n, D] and to d_hash, L*P*D numbers for planes and one for beta.

    `f` is as `hash_block` left it. An empty d_hash means that this gradient is not wanted. d_phi [S, n] is overwritten.
    """
    tanh_u, plus, minus = f.factors[0], f.factors[1], f.factors[2]
    n_rows, one = f.planes.shape[0], phi.dtype.type(1)
    n_planes = n_rows // f.n_tables
    wants_hash = d_hash.shape[0] > 0
    for s in range(d_phi.shape[0]):
        for i in range(BLOCK):
            d_phi[s, i] *= phi[s, i]
    # phi[s] = prod_p plus[p] or minus[p]
    for table in range(f.n_tables):
        _corner_products_backward(
            d_phi[table << n_planes : (table + 1) << n_planes], plus, minus, table * n_planes, n_planes, f.d_u
        )
    # z = 2 * beta * tanh(u); d_u holds the gradient of z / 2
    if wants_hash:
        d_beta = 0.0
        for k in range(n_rows):
            total = phi.dtype.type(0)
            for i in range(n):
                total += f.d_u[k, i] * tanh_u[k, i]
            d_beta += total
        d_hash[-1] += d_beta
    for k in range(n_rows):
        for i in range(BLOCK):
            t = tanh_u[k, i]
            f.d_u[k, i] *= f.beta * (one - t) * (one + t)
    # u = planes @ x.T
    expand(f.d_u, f.planes, n_rows, n, d_x)
    if wants_hash:
        head_dim = (d_hash.shape[0] - 1) // n_rows  # the last number is beta's
        f.d_planes[:] = 0
        accumulate(f.d_u, x, n_rows, n, f.d_planes)
        for k in range(n_rows):
            row = d_hash[k * head_dim : (k + 1) * head_dim]
            for d in range(head_dim):
                row[d] += f.d_planes[k, d]


@helper
def _corner_products_backward(
    weighted: np.ndarray, plus: np.ndarray, minus: np.ndarray, first: int, n_planes: int, d_y: np.ndarray
) -> None:
    """From weighted = d_phi * phi [R, BLOCK] of one table, overwritten, to d_y [P, BLOCK], y = beta * tanh(u).

    With s1, s0 the sums of `weighted` over corners that have the plane's bit set or not,
    d_y = 2 * (s1 * sigmoid(-2y) - s0 * sigmoid(2y)): folding the first bit away serves plane after plane.
    """
    for p in range(n_planes):
        row, a, b = d_y[first + p], plus[first + p], minus[first + p]
        half = 1 << (n_planes - 1 - p)
        row[:] = 0
        for r in range(half):
            low, high = weighted[r], weighted[r + half]
            for i in range(BLOCK):
                s0, s1 = low[i], high[i]
                d = s1 * b[i] - s0 * a[i]
                row[i] += d + d
                low[i] = s0 + s1


@helper
def _new_hash(planes: np.ndarray, beta: float, n_tables: int) -> Hash:
    n_rows, dtype = planes.shape[0], planes.dtype
    factors, d_u = np.empty((3, n_rows, BLOCK), dtype), np.empty((n_rows, BLOCK), dtype)
    return Hash(planes, beta, n_tables, factors, d_u, np.empty_like(planes))


@kernel
def _hash_rows(
    x: np.ndarray, planes: np.ndarray, beta: np.ndarray, n_tables: int, first: int, last: int, out: np.ndarray
) -> None:
    """Hash rows first ... last - 1 of x [N, M, D] into out [N, M, S]."""
    head_dim = x.shape[2]
    block = np.zeros((BLOCK, planes.shape[2]), x.dtype)
    phi = np.empty((out.shape[2], BLOCK), x.dtype)
    for m in range(x.shape[1]):
        f = _new_hash(planes[m], beta[m], n_tables)
        for start in range(first, last, BLOCK):
            n = min(BLOCK, last - start)
            block[:n, :head_dim] = x[start : start + n, m]
            hash_block(f, block, n, phi)
            for i in range(n):
                for s in range(out.shape[2]):
                    out[start + i, m, s] = phi[s, i]


@kernel
def _hash_rows_backward(
    d_out: np.ndarray, x: np.ndarray, planes: np.ndarray, beta: np.ndarray, n_tables: int, first: int, last: int,
    d_x: np.ndarray, d_hash: np.ndarray,
) -> None:  # fmt: skip
    """Invert `_hash_rows`; d_hash [N / BLOCK, M, L*P*D + 1] has a line per block."""
    head_dim = x.shape[2]
    block = np.zeros((BLOCK, planes.shape[2]), x.dtype)
    d_block = np.zeros_like(block)
    phi = np.empty((d_out.shape[2], BLOCK), x.dtype)
    d_phi = np.empty_like(phi)
    for m in range(x.shape[1]):
        f = _new_hash(planes[m], beta[m], n_tables)
        for start in range(first, last, BLOCK):
            n = min(BLOCK, last - start)
            block[:n, :head_dim] = x[start : start + n, m]
            for i in range(n):
                for s in range(d_out.shape[2]):
                    d_phi[s, i] = d_out[start + i, m, s]
            hash_block(f, block, n, phi)
            d_block[:] = 0
            hash_block_backward(f, d_phi, block, n, phi, d_block, d_hash[start // BLOCK, m])
            d_x[start : start + n, m] = d_block[:n, :head_dim]


def soft_hash(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return phi [..., M, S] of the rows x [..., M, D], with planes [M, L, P, D] and beta [M]."""
    rows, w, b, n_tables = _flat(x, planes, beta)
    out = np.empty((*rows.shape[:2], n_tables << planes.shape[2]), x.dtype)
    run(
        lambda i, j: _hash_rows(rows, w, b, n_tables, i * BLOCK, min(j * BLOCK, len(rows)), out),
        -(-len(rows) // BLOCK),
        64,
    )
    return out.reshape(*x.shape[:-1], out.shape[2])


def soft_hash_backward(
    d_phi: np.ndarray, x: np.ndarray, planes: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return d_x [..., M, D], d_planes [M, L, P, D] and d_beta [M], the last two in float64."""
    rows, w, b, n_tables = _flat(x, planes, beta)
    d_rows = np.ascontiguousarray(d_phi.reshape(*rows.shape[:2], d_phi.shape[-1]), x.dtype)
    d_x = np.empty_like(rows)
    n_blocks = -(-len(rows) // BLOCK)
    d_hash = np.zeros((n_blocks, len(w), planes[0].size + 1))
    run(
        lambda i, j: _hash_rows_backward(d_rows, rows, w, b, n_tables, i * BLOCK, min(j * BLOCK, len(rows)), d_x, d_hash),
        n_blocks, 64,
    )  # fmt: skip
    total = d_hash.sum(axis=0)
    return d_x.reshape(x.shape), total[:, :-1].reshape(planes.shape), total[:, -1]


def _flat(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return x [N, M, D], planes [M, L*P, padded D] and beta [M] in the dtype of x, and L."""
    rows = np.ascontiguousarray(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
    return rows, pad_planes(planes, x.dtype), np.ascontiguousarray(beta, x.dtype), planes.shape[1]
