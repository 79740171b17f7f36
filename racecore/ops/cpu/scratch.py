"""The arrays of one block of tokens that a kernel works in: made once per launch, small enough for
the nearest caches.

All begin on a cache line, so that no vector crosses one. Some have memory past their end, for
transpositions write whole squares of a vector's lanes. Fresh memory is not cleared: coefficients
past a block's last token hold anything, and where that matters `states.clear_after` zeroes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.cpu.call import Call, n_buckets_of
from racecore.ops.cpu.row_io import (
    COPY,
    D_OUT,
    KEY,
    QUERY,
    VALUE,
    read,
    rows_to_prefetch,
    rows_to_read,
)
from racecore.ops.cpu.states import Partial, RoundedState, load_keep, new_rounded_state
from racecore.ops.simd.memory import clear_columns, cleared_matrices, matrices
from racecore.ops.simd.products import NO_PREFETCH, InputRows, PrefetchRows, padded
from racecore.ops.soft_hash.cpu import Hash, new_hash_arrays
from racecore.runtime.jit import helper

__all__ = [
    "Keys",
    "Scratch",
    "hash_of",
    "new_partial",
    "new_scratch",
    "new_states",
    "read_d_out",
    "read_keys",
    "read_query",
    "task_of",
]


class Scratch(NamedTuple):
    """Rows have the token first, [BLOCK, D] or [BLOCK, V]; coefficients have it last, [planes or
    buckets, BLOCK].

    D and V are padded to whole vectors here; the padding is zero and stays zero. So is S in
    transposed arrays, ..._t, where the padding holds anything.
    """

    q: np.ndarray  # [BLOCK, D]
    k: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    v: np.ndarray  # [BLOCK, V]
    o: np.ndarray
    g: np.ndarray  # d_out
    d_v: np.ndarray
    keep: np.ndarray  # [1, BLOCK]: 1 where a key takes part, else 0
    ones: np.ndarray  # [BLOCK]
    phi_q: np.ndarray  # [S, BLOCK]
    phi_k: np.ndarray
    d_phi: np.ndarray
    mass: np.ndarray
    d_mass: np.ndarray
    factor: np.ndarray
    rho: np.ndarray
    weights_t: np.ndarray  # [BLOCK, S]: what goes into a product or scan over tokens,
    products_t: np.ndarray  # and what comes out
    factors: np.ndarray  # this and the next three: see Hash
    d_u: np.ndarray
    d_planes: np.ndarray
    u_t: np.ndarray


@helper
def hash_of(call: Call, m: int, w: Scratch) -> Hash:
    """Return the hash of state head m with the arrays that it works in."""
    planes = m if call.planes.shape[0] > 1 else 0  # 0 where all heads share them
    return Hash(
        call.planes[planes],
        call.planes_t[planes],
        call.beta[m],
        call.n_tables,
        w.factors,
        w.d_u,
        w.d_planes,
        w.u_t,
    )


@helper
def task_of(call: Call, task: int) -> tuple[int, int, int]:
    """Return the run of segments of a task, and its first state head and the one after its last."""
    heads = call.beta.shape[0] // call.n_kv_heads
    n_groups = -(-call.n_kv_heads // call.kv_heads_per_task)
    first = task % n_groups * call.kv_heads_per_task
    last = min(first + call.kv_heads_per_task, call.n_kv_heads)
    return task // n_groups, first * heads, last * heads


# Rows of a block
# ---------------

_TOKENS_AT_ONCE = 8  # that `project_wide` reads: in place, they must not reach past the input's end


@helper
def _block_mode(call: Call, mode: int, n: int, may_be_masked: bool) -> Any:
    """Return the read mode of a block: that of its call, unless a mask or its last tokens need a
    copy.
    """
    masked = may_be_masked and call.mask.shape[0] > 0
    return COPY if masked or n % _TOKENS_AT_ONCE != 0 else mode


class Keys(NamedTuple):
    """A block of keys and values, and the next one to prefetch."""

    k: InputRows
    v: InputRows
    next_k: PrefetchRows
    next_v: PrefetchRows


@helper
def read_keys(
    call: Call,
    position: tuple[int, int, int],
    n: int,
    step: int,
    needs_k: bool,
    w: Scratch,
) -> Keys:
    """Read n keys and values at (b, t, m) for state head m, zeros where they are masked, and
    `keep`.

    Copies stay for the other state heads that share them. The next block is `step` tokens on.
    Without `needs_k`, keys are not read.
    """
    b, t, m = position
    heads = call.beta.shape[0] // call.n_kv_heads
    g, first = m // heads, m % heads == 0
    if first:
        load_keep(call.mask, b, t, n, w.keep)
    mode = _block_mode(call, call.hash_mode, n, True)
    d = call.head_dim
    load = first and needs_k
    k = rows_to_read(call.table, KEY, (b, t, g), n, d, w.k, w.keep[0], mode, load)
    mode = _block_mode(call, call.value_mode, n, True)
    d = call.value_dim
    v = rows_to_read(call.table, VALUE, (b, t, g), n, d, w.v, w.keep[0], mode, first)
    if not first:
        return Keys(k, v, NO_PREFETCH, NO_PREFETCH)
    next_k = NO_PREFETCH
    if needs_k:
        next_k = rows_to_prefetch(call.table, KEY, (b, t + step, g), call.head_dim)
    return Keys(k, v, next_k, rows_to_prefetch(call.table, VALUE, (b, t + step, g), d))


@helper
def read_query(
    call: Call, position: tuple[int, int, int], n: int, step: int, w: Scratch
) -> tuple[InputRows, PrefetchRows]:
    """Return n queries at (b, t, h), and those `step` tokens on to prefetch."""
    b, t, h = position
    mode = _block_mode(call, call.hash_mode, n, False)
    rows = read(call.table, QUERY, position, n, call.head_dim, w.q, w.ones, mode)
    return rows, rows_to_prefetch(call.table, QUERY, (b, t + step, h), call.head_dim)


@helper
def read_d_out(
    call: Call, position: tuple[int, int, int], n: int, step: int, w: Scratch
) -> tuple[InputRows, PrefetchRows]:
    """Return n rows of d_out at (b, t, h), and those `step` tokens on to prefetch."""
    b, t, h = position
    mode = _block_mode(call, call.d_out_mode, n, False)
    rows = read(call.table, D_OUT, position, n, call.value_dim, w.g, w.ones, mode)
    return rows, rows_to_prefetch(call.table, D_OUT, (b, t + step, h), call.value_dim)


# Arrays of a launch
# ------------------


@helper
def _heads_of_task(call: Call) -> int:
    """Return how many state heads a task has at most."""
    return call.kv_heads_per_task * (call.beta.shape[0] // call.n_kv_heads)


@helper
def new_partial(call: Call) -> Partial:
    """Return empty partial sums for the state heads of a task."""
    heads, n_buckets, dtype = _heads_of_task(call), n_buckets_of(call), call.planes.dtype
    mass = cleared_matrices(heads, n_buckets, TOKENS, dtype)
    return Partial(mass, cleared_matrices(heads, n_buckets, padded(call.value_dim), dtype))


@helper
def new_states(call: Call) -> RoundedState:
    """Return memory for the states of the heads of a task."""
    return new_rounded_state(
        _heads_of_task(call), n_buckets_of(call), call.value_dim, call.planes.dtype
    )


@helper
def new_scratch(call: Call) -> Scratch:
    """Return the arrays for one launch."""
    dtype = call.planes.dtype
    n_rows, wide_d = call.planes.shape[1:]  # the planes come padded
    wide_v = padded(call.value_dim)
    n_buckets = n_buckets_of(call)
    wide_s = padded(n_buckets)
    x = matrices(4, TOKENS, wide_d, dtype)  # rows of head dim
    y = matrices(4, TOKENS, wide_v, dtype)  # rows of value dim
    for i in range(4):
        clear_columns(x[i], call.head_dim)
        clear_columns(y[i], call.value_dim)
    ones = matrices(2, 1, TOKENS, dtype)
    for i in range(BLOCK):
        ones[0, 0, i] = ones[1, 0, i] = 1
    # d_phi and mass end their memory: transpositions write past them
    c = matrices(6, n_buckets, TOKENS, dtype)
    mass = matrices(1, n_buckets, TOKENS, dtype)[0]
    c_t = matrices(2, TOKENS, wide_s, dtype)
    return Scratch(
        x[0],
        x[1],
        x[2],
        x[3],
        y[0],
        y[1],
        y[2],
        y[3],
        ones[0],
        ones[1][0],
        c[0],
        c[1],
        c[5],
        mass,
        c[2],
        c[3],
        c[4],
        c_t[0],
        c_t[1],
        *new_hash_arrays(n_rows, wide_d, dtype),
    )
