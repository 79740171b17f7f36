"""The soft hash of a block of tokens, by the factorised softmax; Numba.

The logits are linear in the corner, so the softmax over corners is a product over planes, ``phi[r]
= prod_p sigmoid(2 * beta * c_r[p] * tanh(u_p))``: P sigmoids and about 2R products in place of R
exponentials (derived in docs/math). Arrays of a block are laid out [planes or buckets, tokens], so
that all of it is vector code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.simd.elementary import sigmoids, tanh
from racecore.ops.simd.memory import clear_columns, clear_rows, matrices
from racecore.ops.simd.products import (
    NO_PREFETCH,
    InputRows,
    OutputRows,
    PrefetchRows,
    accumulate,
    expand,
    input_rows,
    is_wide,
    output_rows,
    padded,
    project,
    project_wide,
    transpose,
)
from racecore.ops.simd.vectors import fma, lanes, load_lanes, splat, store_lanes, total
from racecore.ops.soft_hash.planes import pad_planes
from racecore.runtime.jit import helper, kernel
from racecore.runtime.threads import run

__all__ = ["soft_hash", "soft_hash_backward"]

_BLOCKS_PER_LAUNCH = 64


class Hash(NamedTuple):
    """The hash of one state head, and the arrays of a block that it works in.

    D is padded to whole vectors, and so is L*P in u_t.
    """

    planes: np.ndarray  # [L*P, D]
    planes_t: np.ndarray  # [D, L*P]
    beta: float
    n_tables: int  # L
    # [3, L*P, BLOCK]: tanh(u), sigmoid(2 beta tanh(u)), 1 - that; the backward pass needs them
    factors: np.ndarray
    d_u: np.ndarray  # [L*P, BLOCK]
    d_planes: np.ndarray  # [L*P, D]
    u_t: np.ndarray  # [BLOCK, L*P]


@helper
def hash_block(f: Hash, x: InputRows, n: int, phi: np.ndarray, next_rows: PrefetchRows) -> None:
    """Hash n rows x [n, D] into phi [S, n], and prefetch the next rows.

    Element-wise loops run over whole vectors; columns past n are never read.
    """
    tanh_u, n_rows = f.factors[0], f.planes.shape[0]
    if is_wide(n_rows):
        project_wide(f.planes_t, x, n_rows, n, f.u_t, next_rows)
        transpose(f.u_t, TOKENS, n_rows, tanh_u)
    else:
        project(f.planes, x, n_rows, n, tanh_u, next_rows)
    for k in range(n_rows):
        for i in range(0, n, lanes(phi)):
            store_lanes(tanh_u, k, i, tanh(load_lanes(tanh_u, k, i)))
    hash_again(f, tanh_u, n, phi)


@helper
def hash_again(f: Hash, tanh_u: np.ndarray, n: int, phi: np.ndarray) -> None:
    """Fill phi [S, n] from tanh(u) [L*P, n], as `hash_block` leaves it in f.factors[0]."""
    kept, plus, minus = f.factors[0], f.factors[1], f.factors[2]
    twice_beta, one = splat(f.beta + f.beta), splat(phi.dtype.type(1))
    n_rows = f.planes.shape[0]
    for k in range(n_rows):
        for i in range(0, n, lanes(phi)):
            t = load_lanes(tanh_u, k, i)
            high, low = sigmoids(twice_beta * t, one)
            store_lanes(kept, k, i, t)
            store_lanes(plus, k, i, high)
            store_lanes(minus, k, i, low)
    n_planes = n_rows // f.n_tables
    for table in range(f.n_tables):
        _corner_products(plus, minus, table * n_planes, n_planes, table << n_planes, n, phi)


@helper
def _corner_products(
    plus: np.ndarray,
    minus: np.ndarray,
    first: int,
    n_planes: int,
    row: int,
    n: int,
    phi: np.ndarray,
) -> None:
    """Fill the rows of one table, `row` on, from the last bit: every plane doubles them."""
    last_plane = first + n_planes - 1
    for i in range(0, n, lanes(phi)):
        store_lanes(phi, row, i, load_lanes(minus, last_plane, i))
        store_lanes(phi, row + 1, i, load_lanes(plus, last_plane, i))
        for bit in range(1, n_planes):
            a, b = load_lanes(plus, last_plane - bit, i), load_lanes(minus, last_plane - bit, i)
            half = 1 << bit
            for r in range(row, row + half):
                value = load_lanes(phi, r, i)
                store_lanes(phi, r + half, i, value * a)
                store_lanes(phi, r, i, value * b)


@helper
def hash_block_backward(
    f: Hash,
    d_phi: np.ndarray,
    x: InputRows,
    n: int,
    phi: np.ndarray,
    d_x: OutputRows,
    d_hash: np.ndarray,
) -> None:
    """Invert `hash_block`: write d_x [n, D], and add to d_hash [L*P*D + 1], beta's gradient last.

    `f` is as `hash_block` left it. With d_hash [1] only that of beta is wanted, with d_hash [0]
    neither. d_phi [S, n] is overwritten.
    """
    tanh_u, plus, minus = f.factors[0], f.factors[1], f.factors[2]
    n_rows, one = f.planes.shape[0], splat(phi.dtype.type(1))
    n_planes = n_rows // f.n_tables
    wants_hash = d_hash.shape[0] > 0
    # phi[s] = prod_p plus[p] or minus[p]
    for table in range(f.n_tables):
        _corner_products_backward(
            d_phi, phi, table << n_planes, plus, minus, table * n_planes, n_planes, f.d_u
        )
    # z = 2 * beta * tanh(u); d_u holds the gradient of z / 2
    if wants_hash:
        _add_d_beta(f.d_u, tanh_u, n_rows, n, d_hash)
    beta = splat(f.beta)
    for k in range(n_rows):
        for i in range(0, BLOCK, lanes(phi)):
            t = load_lanes(tanh_u, k, i)
            store_lanes(f.d_u, k, i, load_lanes(f.d_u, k, i) * (beta * (one - t) * (one + t)))
    # u = planes @ x.T
    expand(f.d_u, f.planes, n_rows, n, d_x)
    if wants_hash and d_hash.shape[0] > 1:
        head_dim = (d_hash.shape[0] - 1) // n_rows  # the last number is beta's
        clear_rows(f.d_planes, 0, n_rows)
        accumulate(f.d_u, x, n_rows, n, f.d_planes, NO_PREFETCH)
        for k in range(n_rows):
            row = d_hash[k * head_dim : (k + 1) * head_dim]
            for d in range(head_dim):
                row[d] += f.d_planes[k, d]


@helper
def _add_d_beta(
    d_y: np.ndarray, tanh_u: np.ndarray, n_rows: int, n: int, d_hash: np.ndarray
) -> None:
    """Add <d_y, tanh(u)> over the n tokens of a block to the last number of d_hash."""
    if n < BLOCK:
        clear_columns(d_y, n)
        clear_columns(tanh_u, n)  # 0 * NaN
    sums = splat(tanh_u.dtype.type(0))
    for k in range(n_rows):
        for i in range(0, BLOCK, lanes(tanh_u)):
            sums = fma(load_lanes(d_y, k, i), load_lanes(tanh_u, k, i), sums)
    d_hash[-1] += np.float64(total(sums))


@helper
def _corner_products_backward(
    d_phi: np.ndarray,
    phi: np.ndarray,
    row: int,
    plus: np.ndarray,
    minus: np.ndarray,
    first: int,
    n_planes: int,
    d_y: np.ndarray,
) -> None:
    """From d_phi of one table, rows from `row` on, overwritten, to d_y [P, BLOCK], y = beta *
    tanh(u).

    With w = d_phi * phi, and s1, s0 its sums over corners that have the plane's bit set or not, d_y
    = 2 * (s1 * sigmoid(-2y) - s0 * sigmoid(2y)). Adding the two halves of w removes the first bit,
    so each plane takes half as many sums as the one before.
    """
    zero = splat(phi.dtype.type(0))
    for i in range(0, BLOCK, lanes(phi)):
        for p in range(n_planes):
            half = 1 << (n_planes - 1 - p)
            s0, s1 = zero, zero
            for r in range(row, row + half):
                low, high = load_lanes(d_phi, r, i), load_lanes(d_phi, r + half, i)
                if p == 0:
                    low, high = low * load_lanes(phi, r, i), high * load_lanes(phi, r + half, i)
                s0, s1 = s0 + low, s1 + high
                store_lanes(d_phi, r, i, low + high)
            d = s1 * load_lanes(minus, first + p, i) - s0 * load_lanes(plus, first + p, i)
            store_lanes(d_y, first + p, i, d + d)


@helper
def new_hash_arrays(
    n_rows: int, wide_d: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the arrays of a `Hash`: factors, d_u, d_planes and u_t."""
    wide_rows = padded(n_rows)
    rows = matrices(4, wide_rows, TOKENS, dtype)
    return (
        rows[:3],
        rows[3],
        matrices(1, n_rows, wide_d, dtype)[0],
        matrices(1, TOKENS, wide_rows, dtype)[0],
    )


@kernel
def _hash_rows(
    x: np.ndarray,
    planes: np.ndarray,
    planes_t: np.ndarray,
    beta: np.ndarray,
    n_tables: int,
    first: int,
    last: int,
    out: np.ndarray,
) -> None:
    """Hash rows first ... last - 1 of x [N, M, D] into out [N, M, S]."""
    head_dim, n_buckets = x.shape[2], out.shape[2]
    block = matrices(1, TOKENS, planes.shape[2], x.dtype)[0]
    clear_rows(block, 0, BLOCK)
    phi = matrices(1, n_buckets, TOKENS, x.dtype)[0]
    arrays = new_hash_arrays(planes.shape[1], planes.shape[2], x.dtype)
    for m in range(x.shape[1]):
        f = Hash(planes[m], planes_t[m], beta[m], n_tables, *arrays)
        for start in range(first, last, BLOCK):
            n = min(BLOCK, last - start)
            for i in range(n):
                for d in range(head_dim):
                    block[i, d] = x[start + i, m, d]
            hash_block(f, input_rows(block), n, phi, NO_PREFETCH)
            for i in range(n):
                for s in range(n_buckets):
                    out[start + i, m, s] = phi[s, i]


@kernel
def _hash_rows_backward(
    d_out: np.ndarray,
    x: np.ndarray,
    planes: np.ndarray,
    planes_t: np.ndarray,
    beta: np.ndarray,
    n_tables: int,
    first: int,
    last: int,
    d_x: np.ndarray,
    d_hash: np.ndarray,
) -> None:
    """Invert `_hash_rows`; d_hash [N / BLOCK, M, L*P*D + 1] has partial sums of each block."""
    head_dim, n_buckets = x.shape[2], d_out.shape[2]
    block = matrices(1, TOKENS, planes.shape[2], x.dtype)[0]
    d_block = matrices(1, TOKENS, planes.shape[2], x.dtype)[0]
    clear_rows(block, 0, BLOCK)
    # two arrays, not one of two: each needs memory past its end, see ops.cpu.scratch
    phi = matrices(1, n_buckets, TOKENS, x.dtype)[0]
    d_phi = matrices(1, n_buckets, TOKENS, x.dtype)[0]
    arrays = new_hash_arrays(planes.shape[1], planes.shape[2], x.dtype)
    for m in range(x.shape[1]):
        f = Hash(planes[m], planes_t[m], beta[m], n_tables, *arrays)
        for start in range(first, last, BLOCK):
            n = min(BLOCK, last - start)
            for i in range(n):
                for d in range(head_dim):
                    block[i, d] = x[start + i, m, d]
            for i in range(n):
                for s in range(n_buckets):
                    d_phi[s, i] = d_out[start + i, m, s]
            hash_block(f, input_rows(block), n, phi, NO_PREFETCH)
            hash_block_backward(
                f,
                d_phi,
                input_rows(block),
                n,
                phi,
                output_rows(d_block, False),
                d_hash[start // BLOCK, m],
            )
            for i in range(n):
                for d in range(head_dim):
                    d_x[start + i, m, d] = d_block[i, d]


def soft_hash(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return phi [..., M, S] of the rows x [..., M, D], with planes [M, L, P, D] and beta [M]."""
    rows, (w, w_t), b, n_tables = _flat(x, planes, beta)
    out = np.empty((*rows.shape[:2], n_tables << planes.shape[2]), x.dtype)
    n_blocks = -(-len(rows) // BLOCK)

    def work(first: int, last: int) -> None:
        tokens = first * BLOCK, min(last * BLOCK, len(rows))
        _hash_rows(rows, w, w_t, b, n_tables, *tokens, out)

    run(work, n_blocks, _BLOCKS_PER_LAUNCH)
    return out.reshape(*x.shape[:-1], out.shape[2])


def soft_hash_backward(
    d_phi: np.ndarray, x: np.ndarray, planes: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return d_x [..., M, D], d_planes [M, L, P, D] and d_beta [M], the last two in float64."""
    rows, (w, w_t), b, n_tables = _flat(x, planes, beta)
    d_rows = np.ascontiguousarray(d_phi.reshape(*rows.shape[:2], d_phi.shape[-1]), x.dtype)
    d_x = np.empty_like(rows)
    n_blocks = -(-len(rows) // BLOCK)
    d_hash = np.zeros((n_blocks, len(w), planes[0].size + 1))

    def work(first: int, last: int) -> None:
        tokens = first * BLOCK, min(last * BLOCK, len(rows))
        _hash_rows_backward(d_rows, rows, w, w_t, b, n_tables, *tokens, d_x, d_hash)

    run(work, n_blocks, _BLOCKS_PER_LAUNCH)
    total = d_hash.sum(axis=0)
    return d_x.reshape(x.shape), total[:, :-1].reshape(planes.shape), total[:, -1]


def _flat(
    x: np.ndarray, planes: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, Any, np.ndarray, int]:
    """Return x [N, M, D]; planes as `pad_planes` does and beta [M], in the dtype of x; and L."""
    rows = np.ascontiguousarray(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
    return rows, pad_planes(planes, x.dtype), np.ascontiguousarray(beta, x.dtype), planes.shape[1]
