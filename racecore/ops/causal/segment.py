"""The causal scan within one segment, forward and backward: what both schedules are made of.

While the tokens of a block go by, a state stays in registers, tile by tile (`scan_tiles`): a token
is added, then the state is read out for it. So causality is strict by construction.

Backward needs two passes over a segment: *queries*, from its first token to its last, with the
states that forward had; and *keys*, from its last token to its first, with the gradients of states.
The first leaves a stash for the second, see `stash_rows`.

Functions of a segment are pieces: each kernel compiles them as parts of itself. As helpers, which
are compiled on their own and again in a kernel, the first causal call, forward and backward,
compiled for 26 s of processor time in place of 21, to save 2 s of 11 where a process needs both
schedules.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.causal.scan_tiles import scan_rows, scan_weights
from racecore.ops.cpu.call import Call, n_buckets_of
from racecore.ops.cpu.readout import weigh, weigh_backward
from racecore.ops.cpu.row_io import D_KEY, D_QUERY, D_VALUE, OUT, rows_to_write, store_rows
from racecore.ops.cpu.scratch import (
    Scratch,
    hash_of,
    new_partial,
    new_scratch,
    new_states,
    read_d_out,
    read_keys,
    read_query,
)
from racecore.ops.cpu.states import (
    Partial,
    RoundedState,
    add_block,
    clear_after,
    drop_masked,
    flush,
    group_ends,
    new_rounded_state,
    prefix_mass,
    prefix_mass_backward,
)
from racecore.ops.simd.memory import clear_rows
from racecore.ops.simd.products import (
    NO_PREFETCH,
    InputRows,
    OutputRows,
    PrefetchRows,
    input_rows,
    output_rows,
    prefetch_rows,
    transpose,
)
from racecore.ops.simd.vectors import copy, lanes, load_lanes, store_lanes
from racecore.ops.soft_hash.cpu import hash_again, hash_block, hash_block_backward
from racecore.runtime.jit import helper, piece

__all__ = [
    "Workspace",
    "keys_backward",
    "new_workspace",
    "queries_backward",
    "scan_segment",
    "stash_of_task",
    "stash_rows",
]


class SpareState(NamedTuple):
    """States for further query heads of a state head, which scan the same block once more.

    Forward, each begins with the state before the block and must not end in it; backward, each
    begins from zero.
    """

    zero: np.ndarray  # [S, V]
    zero_t: np.ndarray  # [V, S]
    after: np.ndarray  # [S, V]
    after_t: np.ndarray  # [V, S]


class Workspace(NamedTuple):
    """The arrays of one launch.

    Unpacked once per segment, not per block: all references in it would be counted each time, half
    a microsecond by atomic additions.
    """

    scratch: Scratch
    state: RoundedState  # of the heads of a task: the state, or its gradient
    spare: SpareState
    partial: Partial


@helper
def new_workspace(call: Call) -> Workspace:
    """Return the arrays for one launch."""
    two = new_rounded_state(2, n_buckets_of(call), call.value_dim, call.planes.dtype)
    clear_rows(two.value_sum[0], 0, two.value_sum.shape[1])
    clear_rows(two.value_sum_t[0], 0, two.value_sum_t.shape[1])
    spare = SpareState(two.value_sum[0], two.value_sum_t[0], two.value_sum[1], two.value_sum_t[1])
    return Workspace(new_scratch(call), new_states(call), spare, new_partial(call))


@piece
def scan_segment(call: Call, index: int, m0: int, m1: int, sums: np.ndarray, ws: Workspace) -> None:
    """Write the outputs of a segment; the workspace has the state before it.

    The segment's sum is added to sums [m1 - m0, S*(1+V)], unless that is empty.
    """
    w, state, spare, partial = ws
    _, b, begin, end, _ = call.segments[index]
    repeats = call.n_heads // call.beta.shape[0]
    for t in range(begin, end, BLOCK):
        n = min(BLOCK, end - t)
        for m in range(m0, m1):
            i = m - m0
            keys = read_keys(call, (b, t, m), n, TOKENS, True, w)
            hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
            drop_masked(call.mask, w.keep, n, w.phi_k)
            prefix_mass(w.phi_k, state.mass[i], w.weights_t, w.products_t, w.mass)
            before = state.value_sum[i]
            for h in range(m * repeats, (m + 1) * repeats):
                q, next_q = read_query(call, (b, t, h), n, TOKENS, w)
                hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
                weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                # the last query head leaves the state after the block
                after = before if h % repeats == repeats - 1 else spare.after
                o = rows_to_write(call.table, OUT, (b, t, h), call.value_dim, w.o, True, False)
                # value_sum[s] += phi_k[s, j] * v[j], then o[j] = sum_s rho[s, j] * value_sum[s]
                scan_rows(before, after, w.phi_k, keys.v, w.rho, w.o, o, n, False, keys.next_v)
                store_rows(call.table, OUT, (b, t, h), n, call.value_dim, w.o, o)
            if sums.shape[0] > 0:
                add_block(w.phi_k, w.phi_k, keys.v, n, i, partial, NO_PREFETCH)
                if group_ends(t, begin, end):
                    flush(partial, i, sums[i])


# The stash
# ---------


@register_jitable
def stash_rows(call: Call) -> int:
    """Return the rows of a stash, BLOCK numbers each, for one block of one state head.

    They are what the pass for keys needs of the pass for queries: tanh(u) of the keys [L*P], and
    for each query head rho [S] and d_mass [S].
    """
    repeats = call.n_heads // call.beta.shape[0]
    return call.planes.shape[1] + 2 * repeats * n_buckets_of(call)


@helper
def stash_of_task(
    call: Call, index: int, heads: int, flat: np.ndarray, first_row: int
) -> np.ndarray:
    """Return the stash of a segment and so many state heads, [blocks, heads, rows, BLOCK], in
    `flat` [..., BLOCK] from `first_row` on.
    """
    n_blocks = -(-(call.segments[index, 3] - call.segments[index, 2]) // BLOCK)
    rows = stash_rows(call)
    part = flat[first_row : first_row + n_blocks * heads * rows]
    return part.reshape((n_blocks, heads, rows, BLOCK))


@helper
def _stashed(stash: np.ndarray, block: int, i: int, first: int, n: int) -> np.ndarray:
    """Return n rows of a block and a task's i-th state head, from `first` on."""
    return stash[block, i, first : first + n]


# Backward: the pass for queries
# ------------------------------


@piece
def queries_backward(
    call: Call,
    index: int,
    m0: int,
    m1: int,
    stash: np.ndarray,
    d_sums: np.ndarray,
    d_hash: np.ndarray,
    ws: Workspace,
) -> None:
    """Scan a segment forward again for the gradients of queries, and fill its stash.

    The state is that before the segment. What the segment adds to the gradients of earlier states
    is added to d_sums [m1 - m0, S*(1+V)], and gradients of the hash to d_hash [M, ...].
    """
    w, state, spare, partial = ws
    _, b, begin, end, _ = call.segments[index]
    repeats, n_buckets, n_rows = _sizes(call)
    for t in range(begin, end, BLOCK):
        n, block = min(BLOCK, end - t), (t - begin) // BLOCK
        for m in range(m0, m1):
            i = m - m0
            keys = read_keys(call, (b, t, m), n, TOKENS, True, w)
            hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
            copy(w.factors[0, :n_rows], _stashed(stash, block, i, 0, n_rows))
            drop_masked(call.mask, w.keep, n, w.phi_k)
            prefix_mass(w.phi_k, state.mass[i], w.weights_t, w.products_t, w.mass)
            for r in range(repeats):
                h = m * repeats + r
                after_t = state.value_sum_t[i] if r == repeats - 1 else spare.after_t
                q = _read_out_backward(
                    call, (b, t, h), n, state.value_sum_t[i], after_t, keys.next_v, w
                )
                row = n_rows + 2 * r * n_buckets
                copy(w.rho, _stashed(stash, block, i, row, n_buckets))
                copy(w.d_mass, _stashed(stash, block, i, row + n_buckets, n_buckets))
                # sums of these are the gradients that earlier keys and values of the sequence get
                add_block(w.d_mass, w.rho, input_rows(w.g), n, i, partial, NO_PREFETCH)
                # phi_q = hash_block(q)
                d_q = rows_to_write(
                    call.table, D_QUERY, (b, t, h), call.head_dim, w.d_q, True, False
                )
                hash_block_backward(hash_of(call, m, w), w.d_phi, q, n, w.phi_q, d_q, d_hash[m])
                store_rows(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q, d_q)
            if group_ends(t, begin, end):
                flush(partial, i, d_sums[i])


@helper
def _sizes(call: Call) -> tuple[int, int, int]:
    """Return the query heads per state head, S, and L*P."""
    return call.n_heads // call.beta.shape[0], n_buckets_of(call), call.planes.shape[1]


@piece
def _read_out_backward(
    call: Call,
    position: tuple[int, int, int],
    n: int,
    before_t: np.ndarray,
    after_t: np.ndarray,
    next_v: PrefetchRows,
    w: Scratch,
) -> InputRows:
    """Invert the read-out of one block of query head h: fills rho, d_mass and d_phi; position =
    (b, t, h).

    The state moves from before_t to after_t. Returns the queries.
    """
    _, _, h = position
    m = h * call.beta.shape[0] // call.n_heads
    q, next_q = read_query(call, position, n, TOKENS, w)
    _, next_g = read_d_out(call, position, n, TOKENS, w)
    hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
    # o[j] = sum_s rho[s, j] * value_sum[s], after token j was added
    n_buckets = w.rho.shape[0]
    prefetch_rows(next_v, 0, n // 2)
    c = output_rows(w.products_t, False)
    scan_weights(before_t, after_t, w.weights_t, w.v, w.g, c, n_buckets, n, False, next_g)
    transpose(w.products_t, TOKENS, n_buckets, w.d_phi)
    prefetch_rows(next_v, n // 2, n)
    # rho = weigh(phi_q, mass)
    weigh_backward(
        w.d_phi, w.phi_q, w.mass, w.factor, w.rho, call.n_tables, call.bucket_mean, w.d_mass
    )
    clear_after(n, w.d_mass)
    return q


# Backward: the pass for keys
# ---------------------------


@piece
def keys_backward(
    call: Call, index: int, m0: int, m1: int, stash: np.ndarray, d_hash: np.ndarray, ws: Workspace
) -> None:
    """Scan a segment from its end for the gradients of keys and values, with the stash of
    `queries_backward`.

    The workspace has the gradient of the state after the segment. Gradients of the hash are added
    to d_hash [M, ...].
    """
    w, d_state, spare, _ = ws
    _, b, begin, end, _ = call.segments[index]
    repeats, n_buckets, n_rows = _sizes(call)
    heads = call.beta.shape[0] // call.n_kv_heads  # state heads that share a key/value head
    wants_planes = d_hash.shape[1] > 1
    for block in range((end - begin - 1) // BLOCK, -1, -1):
        t = begin + block * BLOCK
        n = min(BLOCK, end - t)
        for m in range(m0, m1):
            i, g, of_group = m - m0, m // heads, m % heads
            # the keys themselves are only needed for gradients of planes: tanh(u) is in the stash
            keys = read_keys(call, (b, t, m), n, -TOKENS, wants_planes, w)
            prefetch_rows(keys.next_k, 0, n)
            hash_again(hash_of(call, m, w), _stashed(stash, block, i, 0, n_rows), n, w.phi_k)
            drop_masked(call.mask, w.keep, n, w.phi_k)
            alone = heads * repeats == 1
            d_v = rows_to_write(call.table, D_VALUE, (b, t, g), call.value_dim, w.d_v, alone, False)
            for r in range(repeats):
                _, next_g = read_d_out(call, (b, t, m * repeats + r), n, -TOKENS, w)
                row = n_rows + 2 * r * n_buckets
                rho = _stashed(stash, block, i, row, n_buckets)
                if r > 0 or of_group > 0:
                    d_v = output_rows(w.d_v, True)
                _add_queries(rho, i, r, d_v, n, keys.next_v, next_g, d_state, spare, w)
            # mass += phi_k, and queries from this token on divide by it
            for r in range(repeats):
                row = n_rows + (2 * r + 1) * n_buckets
                d_mass = _stashed(stash, block, i, row, n_buckets)
                prefix_mass_backward(d_mass, r == 0, w.weights_t, d_state.mass[i], w.products_t)
            transpose(w.products_t, TOKENS, n_buckets, w.d_phi)
            # phi_k = hash_block(k)
            d_k = rows_to_write(
                call.table, D_KEY, (b, t, g), call.head_dim, w.d_k, heads == 1, of_group > 0
            )
            hash_block_backward(hash_of(call, m, w), w.d_phi, keys.k, n, w.phi_k, d_k, d_hash[m])
            if of_group == heads - 1:
                store_rows(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k, d_k)
                store_rows(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v, d_v)


@piece
def _add_queries(
    rho: np.ndarray,
    i: int,
    r: int,
    d_v: OutputRows,
    n: int,
    next_v: PrefetchRows,
    next_g: PrefetchRows,
    d_state: RoundedState,
    spare: SpareState,
    w: Scratch,
) -> None:
    """Add a block of query head r to the gradient of state i, token by token from the last, and
    read it out into d_v and products_t (of d_phi).

    The first query head continues from the gradient of the state. Each other one begins from zero,
    since a sum is linear, and is added to the gradient at the end.
    """
    n_buckets = rho.shape[0]
    transpose(rho, n_buckets, TOKENS, w.weights_t)
    state, state_t = d_state.value_sum[i], d_state.value_sum_t[i]
    before, before_t = (state, state_t) if r == 0 else (spare.zero, spare.zero_t)
    after, after_t = (state, state_t) if r == 0 else (spare.after, spare.after_t)
    # value_sum[s] += phi_k[s, j] * v[j], read with rho by this query and all later ones
    scan_rows(before, after, rho, input_rows(w.g), w.phi_k, w.d_v, d_v, n, True, next_v)
    c = output_rows(w.products_t, r > 0)
    scan_weights(before_t, after_t, w.weights_t, w.g, w.v, c, n_buckets, n, True, next_g)
    if r > 0:
        _add(after, state)
        _add(after_t, state_t)


@helper
def _add(x: np.ndarray, target: np.ndarray) -> None:
    """target += x, of matrices whose rows are whole vectors."""
    for r in range(target.shape[0]):
        for c in range(0, target.shape[1], lanes(target)):
            store_lanes(target, r, c, load_lanes(target, r, c) + load_lanes(x, r, c))
