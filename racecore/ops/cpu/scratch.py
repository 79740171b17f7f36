"""The arrays of one block of tokens that a kernel works in: made once per launch, small enough for
the nearest caches.

All begin on a cache line, so that no vector crosses one. Some have room past their end, for
transpositions write whole squares of a vector's lanes. Fresh memory is not cleared: coefficients
past a block's last token hold anything, and where that matters `states.clear_after` zeroes them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.cpu.call import Call, n_buckets_of
from racecore.ops.cpu.row_io import (
    ANY_IN_PLACE,
    COPY,
    IN_PLACE,
    KEY,
    QUERY,
    VALUE,
    read,
    rows_to_prefetch,
)
from racecore.ops.cpu.states import Partial, RoundedState, load_keep, new_rounded_state
from racecore.ops.simd.memory import clear_columns, cleared_matrices, matrices
from racecore.ops.simd.products import NO_PREFETCH, InputRows, PrefetchRows, is_wide, padded
from racecore.ops.simd.vectors import lanes
from racecore.ops.soft_hash.cpu import Hash, new_hash_arrays
from racecore.runtime.jit import helper

__all__ = [
    "Keys",
    "Scratch",
    "add_read_mode",
    "hash_of",
    "hash_read_mode",
    "new_partial",
    "new_scratch",
    "new_states",
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
    g: np.ndarray
    d_v: np.ndarray
    keep: np.ndarray  # [1, BLOCK]: 1 where a key takes part, else 0
    ones: np.ndarray
    phi_q: np.ndarray  # [S, BLOCK]
    phi_k: np.ndarray
    d_phi: np.ndarray
    mass: np.ndarray
    d_mass: np.ndarray
    factor: np.ndarray
    rho: np.ndarray
    weights_t: np.ndarray  # [BLOCK, S]
    answers_t: np.ndarray
    factors: np.ndarray  # this and the next three: see Hash
    d_u: np.ndarray
    d_planes: np.ndarray
    u_t: np.ndarray


@helper
def hash_of(call: Call, m: int, w: Scratch) -> Hash:
    """Return the hash of state head m with the arrays that it works in."""
    own = m if call.planes.shape[0] > 1 else 0
    return Hash(
        call.planes[own],
        call.planes_t[own],
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


_TOKENS_AT_ONCE = 8  # `project_wide` reads so many: what it reads where it lies must not end before


class Keys(NamedTuple):
    """A block of keys and values, and the next one to be asked for."""

    k: InputRows
    v: InputRows
    next_k: PrefetchRows
    next_v: PrefetchRows


@helper
def read_keys(
    call: Call,
    b: int,
    t: int,
    m: int,
    n: int,
    step: int,
    needs_k: bool,
    k_mode: Any,
    v_mode: Any,
    w: Scratch,
) -> Keys:
    """Read n keys and values of a block for state head m, zeros where they are masked, and which
    those are.

    Copies stay for the other state heads that share them. The next block is `step` tokens on.
    Without `needs_k`, keys are left alone.
    """
    heads = call.beta.shape[0] // call.n_kv_heads
    g, first, masked = m // heads, m % heads == 0, call.mask.shape[0] > 0
    if first:
        load_keep(call.mask, b, t, n, w.keep)
    if masked or n % _TOKENS_AT_ONCE != 0:
        k_mode, v_mode = COPY, COPY
    n_loads = n if first else 0
    k = read(
        call.table,
        KEY,
        (b, t, g),
        n_loads if needs_k else 0,
        call.head_dim,
        w.k,
        w.keep[0],
        k_mode,
    )
    v = read(call.table, VALUE, (b, t, g), n_loads, call.value_dim, w.v, w.keep[0], v_mode)
    if not first:
        return Keys(k, v, NO_PREFETCH, NO_PREFETCH)
    next_k = (
        rows_to_prefetch(call.table, KEY, (b, t + step, g), call.head_dim)
        if needs_k
        else NO_PREFETCH
    )
    return Keys(k, v, next_k, rows_to_prefetch(call.table, VALUE, (b, t + step, g), call.value_dim))


@helper
def read_query(
    call: Call,
    line: int,
    b: int,
    t: int,
    h: int,
    n: int,
    step: int,
    read_mode: int,
    x: np.ndarray,
    w: Scratch,
) -> tuple[InputRows, PrefetchRows]:
    """Read n rows of a query head, of queries or of d_out; return them and those `step` tokens on."""
    width = call.head_dim if line == QUERY else call.value_dim
    how = COPY if n % _TOKENS_AT_ONCE != 0 else read_mode
    source = read(call.table, line, (b, t, h), n, width, x, w.ones, how)
    return source, rows_to_prefetch(call.table, line, (b, t + step, h), width)


@helper
def hash_read_mode(call: Call, d_hash_width: int) -> Any:
    """Tell whether to read rows for their hash where they are: if once, with one pass over the
    planes and no gradient of them.
    """
    n_rows = call.planes.shape[1]
    one_pass = n_rows <= 4 or (is_wide(n_rows) and n_rows <= 2 * lanes(call.planes))
    if d_hash_width > 1 or not one_pass:
        return COPY
    return ANY_IN_PLACE if n_rows == 4 else IN_PLACE


@helper
def add_read_mode(n_buckets: int) -> Any:
    """Tell whether to read rows where they are that are added up, by weights, for so many buckets:
    if in one pass.
    """
    return ANY_IN_PLACE if n_buckets == 8 else (IN_PLACE if n_buckets < 8 else COPY)


@helper
def new_partial(call: Call) -> Partial:
    """Make empty sums for the state heads of a task."""
    heads = call.kv_heads_per_task * (call.beta.shape[0] // call.n_kv_heads)
    n_buckets, dtype = n_buckets_of(call), call.planes.dtype
    mass = cleared_matrices(heads, n_buckets, TOKENS, dtype)
    return Partial(mass, cleared_matrices(heads, n_buckets, padded(call.value_dim), dtype))


@helper
def new_states(call: Call) -> RoundedState:
    """Make room for the states of the heads of a task."""
    heads = call.kv_heads_per_task * (call.beta.shape[0] // call.n_kv_heads)
    return new_rounded_state(heads, n_buckets_of(call), call.value_dim, call.planes.dtype)


@helper
def new_scratch(call: Call) -> Scratch:
    """Make the arrays for one launch."""
    dtype = call.planes.dtype
    n_rows, wide_d = call.planes.shape[1:]  # the planes come padded
    wide_v = padded(call.value_dim)
    n_buckets = n_buckets_of(call)
    wide_s = padded(n_buckets)
    x, y = matrices(4, TOKENS, wide_d, dtype), matrices(4, TOKENS, wide_v, dtype)
    for i in range(4):
        clear_columns(x[i], call.head_dim)
        clear_columns(y[i], call.value_dim)
    ones = matrices(2, 1, TOKENS, dtype)
    for i in range(BLOCK):
        ones[0, 0, i] = ones[1, 0, i] = 1
    c, mass = matrices(6, n_buckets, TOKENS, dtype), matrices(1, n_buckets, TOKENS, dtype)[0]
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
        c[4],  # d_phi and mass end their memory: transpositions write past them
        c_t[0],
        c_t[1],
        *new_hash_arrays(n_rows, wide_d, dtype),
    )
