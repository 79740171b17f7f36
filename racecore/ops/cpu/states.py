"""States inside kernels: float64 rows of a sketch to and from arrays of a block, masses, masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.simd.accumulators import load_rounded, widen_add
from racecore.ops.simd.memory import clear_columns, clear_rows, cleared_matrices, matrices
from racecore.ops.simd.products import InputRows, PrefetchRows, accumulate, padded, transpose
from racecore.ops.simd.vectors import (
    fma,
    lanes,
    load_lanes,
    splat,
    store_lanes,
    total,
)
from racecore.runtime.jit import helper

__all__ = [
    "GROUP",
    "Partial",
    "RoundedState",
    "add_block",
    "add_mass",
    "clear_after",
    "count_kept",
    "drop_masked",
    "expand_state",
    "flush",
    "group_ends",
    "load_keep",
    "new_rounded_state",
    "prefix_mass",
    "prefix_mass_backward",
    "round_states",
    "splat_mass",
]

GROUP = 8 * BLOCK  # tokens whose partial sums are float32 before they are added to a float64 state


class Partial(NamedTuple):
    """Partial sums for the state of each head of a task: of the tokens since the last `flush`."""

    mass: np.ndarray  # [heads, S, BLOCK]: the sum of a row is a mass
    value_sum: np.ndarray  # [heads, S, V], V padded


@helper
def load_keep(mask: np.ndarray, b: int, t: int, n: int, keep: np.ndarray) -> None:
    """Fill keep[:n] with 1 where a key takes part and 0 where not; without a mask it keeps its
    ones.
    """
    if mask.shape[0] > 0:
        for i in range(n):
            keep[0, i] = 1 if mask[b, t + i] != 0 else 0  # any other byte is True too


@helper
def count_kept(mask: np.ndarray, b: int, begin: int, end: int) -> int:
    """Return how many keys of a segment take part."""
    if mask.shape[0] == 0:
        return end - begin
    count = 0
    for t in range(begin, end):
        count += 1 if mask[b, t] != 0 else 0
    return count


@helper
def drop_masked(mask: np.ndarray, keep: np.ndarray, n: int, phi: np.ndarray) -> None:
    """phi = phi * keep, where there is a mask; and zero for tokens past the block's last."""
    if mask.shape[0] > 0:
        for s in range(phi.shape[0]):
            for i in range(0, BLOCK, lanes(phi)):
                store_lanes(phi, s, i, load_lanes(phi, s, i) * load_lanes(keep, 0, i))
    clear_after(n, phi)


@helper
def clear_after(n: int, c: np.ndarray) -> None:
    """Zero the coefficients of tokens that a block does not have."""
    if n < BLOCK:
        clear_columns(c, n)


@helper
def add_block(
    mass_terms: np.ndarray,
    c: np.ndarray,
    x: InputRows,
    n: int,
    j: int,
    partial: Partial,
    next_rows: PrefetchRows,
) -> None:
    """Add a block to the partial sums of head j: mass_terms [S, n] to its masses, c[:, i] * x[i] to
    its value sums.

    Coefficients past token n must be zero.
    """
    mass = partial.mass[j]
    for s in range(mass.shape[0]):
        for i in range(0, BLOCK, lanes(mass)):
            store_lanes(mass, s, i, load_lanes(mass, s, i) + load_lanes(mass_terms, s, i))
    accumulate(c, x, mass.shape[0], n, partial.value_sum[j], next_rows)


@helper
def group_ends(t: int, begin: int, end: int) -> bool:
    """Return whether the block at t is the last one before a `flush`."""
    return t + BLOCK >= end or (t + BLOCK - begin) % GROUP == 0


@helper
def flush(partial: Partial, j: int, state: np.ndarray) -> None:
    """Add the partial sums of head j to a float64 state [S*(1+V)], and clear them."""
    mass, value_sum = partial.mass[j], partial.value_sum[j]
    n_buckets, zero = mass.shape[0], splat(mass.dtype.type(0))
    width, step = state.shape[0] // n_buckets - 1, lanes(mass)
    whole = width // step * step
    for s in range(n_buckets):
        sums = zero
        for i in range(0, BLOCK, step):
            sums = sums + load_lanes(mass, s, i)
            store_lanes(mass, s, i, zero)
        state[s] += np.float64(total(sums))
        row = n_buckets + s * width
        for d in range(0, whole, step):
            widen_add(load_lanes(value_sum, s, d), state.ctypes.data + 8 * (row + d))
            store_lanes(value_sum, s, d, zero)
        for d in range(whole, width):
            state[row + d] += value_sum[s, d]
            value_sum[s, d] = 0


class RoundedState(NamedTuple):
    """States of a task's heads, or gradients of states: value sums in the dtype of the arithmetic.

    Masses stay float64: a causal scan adds to them token by token, over a whole segment.
    """

    mass: np.ndarray  # [heads, S], float64, S padded
    value_sum: np.ndarray  # [heads, S, V], V padded
    value_sum_t: np.ndarray  # [heads, V, S], both padded: the same transposed, for sums over V


@helper
def new_rounded_state(heads: int, n_buckets: int, value_dim: int, dtype: Any) -> RoundedState:
    """Return memory for the states of so many heads."""
    wide_s, wide_v = padded(n_buckets), padded(value_dim)
    rows, columns = (
        matrices(heads, n_buckets, wide_v, dtype),
        matrices(heads, wide_v, wide_s, dtype),
    )
    return RoundedState(cleared_matrices(1, heads, wide_s, np.float64)[0], rows, columns)


@helper
def round_states(
    states: np.ndarray, m0: int, m1: int, transposed: bool, rounded: RoundedState
) -> None:
    """Round the float64 states of heads m0 ... m1 - 1, rows of [M, S*(1+V)]; `transposed`, also
    into value_sum_t.
    """
    n_buckets = rounded.value_sum.shape[1]
    width = states.shape[1] // n_buckets - 1
    for m in range(m0, m1):
        i, state = m - m0, states[m]
        for s in range(n_buckets):
            rounded.mass[i, s] = state[s]
            for d in range(width):
                rounded.value_sum[i, s, d] = state[n_buckets + s * width + d]
        # a NaN of the task before must not stay in the padding
        clear_columns(rounded.value_sum[i], width)
        if transposed:
            wide_v = rounded.value_sum.shape[2]
            transpose(rounded.value_sum[i], n_buckets, wide_v, rounded.value_sum_t[i])


@helper
def splat_mass(mass: np.ndarray, masses: np.ndarray) -> None:
    """Repeat the masses [S] of a state for every token of a block, masses [S, BLOCK]."""
    for s in range(masses.shape[0]):
        value = splat(masses.dtype.type(mass[s]))
        for i in range(0, BLOCK, lanes(masses)):
            store_lanes(masses, s, i, value)


@helper
def expand_state(c: np.ndarray, state: np.ndarray, n: int, x: np.ndarray) -> None:
    """x[i] = sum_s c[s, i] * value_sum[s], as `expand` does, with a float64 state [S*(1+V)].

    V must be whole vectors. Each number is rounded as it is read: the same bits as `expand`.
    """
    n_buckets, width = c.shape[0], x.shape[1]
    like = x.dtype.type(0)
    clear_rows(x, 0, n)
    # buckets outside: memory is read once and in its order
    for s in range(n_buckets):
        address = state.ctypes.data + 8 * (n_buckets + s * width)
        for i in range(n):
            weight = splat(c[s, i])
            for d in range(0, width, lanes(x)):
                store_lanes(
                    x, i, d, fma(weight, load_rounded(address + 8 * d, like), load_lanes(x, i, d))
                )


@helper
def add_mass(mass: np.ndarray, c: np.ndarray) -> None:
    """c[s, i] += mass[s]."""
    for s in range(c.shape[0]):
        value = splat(c.dtype.type(mass[s]))
        for i in range(0, BLOCK, lanes(c)):
            store_lanes(c, s, i, load_lanes(c, s, i) + value)


@helper
def prefix_mass(
    phi: np.ndarray, mass: np.ndarray, phi_t: np.ndarray, masses_t: np.ndarray, masses: np.ndarray
) -> None:
    """Fill masses[:, i] with the masses up to and including token i, and add the block to `mass`,
    float64.

    phi [S, BLOCK] is zero past the block's last token. It is left transposed in phi_t [BLOCK, S]:
    with buckets in vector lanes, a prefix sum over tokens is one addition per vector.
    """
    n_buckets = phi.shape[0]
    transpose(phi, n_buckets, TOKENS, phi_t)
    for s in range(0, n_buckets, lanes(phi)):
        before = load_rounded(mass.ctypes.data + 8 * s, phi.dtype.type(0))
        sums = before - before
        for i in range(BLOCK):
            sums = sums + load_lanes(phi_t, i, s)
            store_lanes(masses_t, i, s, before + sums)
        widen_add(sums, mass.ctypes.data + 8 * s)
    transpose(masses_t, TOKENS, n_buckets, masses)


@helper
def prefix_mass_backward(
    d_masses: np.ndarray,
    from_later: bool,
    mass_t: np.ndarray,
    d_mass: np.ndarray,
    d_phi_t: np.ndarray,
) -> None:
    """Add to d_phi_t[j] the gradients of the masses of tokens i >= j of this block, from d_masses
    [S, BLOCK].

    d_mass, float64, is their sum over later blocks: with `from_later` it is added too. This block
    is added to it. mass_t [BLOCK, S] is scratch.
    """
    n_buckets = d_masses.shape[0]
    transpose(d_masses, n_buckets, TOKENS, mass_t)
    for s in range(0, n_buckets, lanes(mass_t)):
        later = load_rounded(d_mass.ctypes.data + 8 * s, mass_t.dtype.type(0))
        sums = splat(mass_t.dtype.type(0))
        for i in range(BLOCK - 1, -1, -1):
            sums = sums + load_lanes(mass_t, i, s)
            store_lanes(
                d_phi_t, i, s, load_lanes(d_phi_t, i, s) + (later + sums if from_later else sums)
            )
        widen_add(sums, d_mass.ctypes.data + 8 * s)
