"""Bidirectional attention through a state, block by block: Numba; see `reference` for the formulas.

No array of a block is longer than a block: probabilities of all tokens never exist. Sums over a few
blocks are float32 (or the dtype of the arithmetic), sums over those float64.
"""

from __future__ import annotations

import numpy as np

from racecore import chunking
from racecore.chunking import BLOCK, TOKENS
from racecore.ops.cpu.call import (
    Call,
    add_hash_parts,
    exclusive_scan,
    launch,
    make_call,
    new_hash_parts,
)
from racecore.ops.cpu.read_modes import (
    COPIES,
    ReadModes,
    add_mode,
    d_out_mode,
    hash_mode,
    state_mode,
)
from racecore.ops.cpu.readout import weigh, weigh_backward
from racecore.ops.cpu.row_io import (
    D_KEY,
    D_QUERY,
    D_VALUE,
    OUT,
    rows_to_write,
    store_rows,
)
from racecore.ops.cpu.scratch import (
    Scratch,
    hash_of,
    new_partial,
    new_scratch,
    new_states,
    read_d_out,
    read_keys,
    read_query,
    task_of,
)
from racecore.ops.cpu.states import (
    GROUP,
    RoundedState,
    add_block,
    add_mass,
    clear_after,
    count_kept,
    drop_masked,
    expand_state,
    flush,
    group_ends,
    round_states,
    splat_mass,
)
from racecore.ops.simd.memory import clear_rows
from racecore.ops.simd.products import (
    NO_PREFETCH,
    InputRows,
    PrefetchRows,
    expand,
    project,
    project_wide,
    transpose,
)
from racecore.ops.simd.tiles import fence
from racecore.ops.soft_hash.cpu import hash_block, hash_block_backward
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import arrays, progress
from racecore.runtime.jit import helper, kernel

__all__ = ["add_at_once", "read_out", "read_out_backward", "sum_keys", "sum_keys_backward"]

_ROWS_AT_ONCE = 1 << 15  # of keys in a launch that cannot be cut: some milliseconds
_BYTES_AT_ONCE = 1 << 28  # of states, likewise
_NO_COUNTS = np.zeros(0, np.int64)


def sum_keys(part: Problem, sketch: Sketch) -> None:
    """Add every key and value of `part` to `sketch`."""
    for chunk in chunking.chunks(part, "key"):
        if _are_groups(chunk, sketch):
            call = _call_of_sums(part, chunk)
            n_tokens = launch(_sum_keys, call, sketch.flat, True, _NO_COUNTS)
        else:
            sums = new_sums(part, len(chunk))
            n_tokens = sum_segments(part, chunk, sums)
            exclusive_scan(chunk[:, 0], sums, sketch.flat)
            del sums  # before the next chunk needs as much
        progress.advance(n_tokens)


def _are_groups(chunk: np.ndarray, sketch: Sketch) -> bool:
    """Return whether every sequence is one segment of one group.

    A kernel then adds to every state once, so it can do that in place: the same bits without states
    of segments.
    """
    n_tokens = chunk[:, 3] - chunk[:, 2]
    return chunking.are_whole(chunk, len(sketch.flat)) and bool(n_tokens.max(initial=0) <= GROUP)


def add_at_once(part: Problem, sketch: Sketch, lengths: np.ndarray) -> bool:
    """Add few keys and values to `sketch` and their numbers to `lengths` [N], uninterrupted: in one
    launch.

    Returns
    -------
    bool
        False where they are too many; nothing has been done then.
    """
    chunk, *more = chunking.chunks(part, "key")
    n_tokens = int((chunk[:, 3] - chunk[:, 2]).sum())
    too_many = n_tokens * part.n_state_heads > _ROWS_AT_ONCE or sketch.flat.nbytes > _BYTES_AT_ONCE
    if more or too_many or not _are_groups(chunk, sketch):
        return False
    progress.advance(n_tokens)  # before: should the listener raise, nothing has happened yet
    launch(_sum_keys, _call_of_sums(part, chunk), sketch.flat, True, lengths, at_once=True)
    return True


def new_sums(part: Problem, n: int) -> np.ndarray:
    """Return memory for the states of n segments, float64 [n, M, S*(1+V)]."""
    return arrays.empty((n, part.n_state_heads, part.n_buckets * (1 + part.value_dim)), np.float64)


def sum_segments(part: Problem, chunk: np.ndarray, sums: np.ndarray) -> int:
    """Write the state of each segment alone, from zero; return the number of tokens."""
    return launch(_sum_keys, _call_of_sums(part, chunk), sums, False, _NO_COUNTS)


def _call_of_sums(part: Problem, chunk: np.ndarray) -> Call:
    return make_call(part, chunk, ReadModes(hash_mode(part), add_mode(part), COPIES.d_out))


@kernel
def _sum_keys(
    call: Call, first: int, last: int, sums: np.ndarray, add: bool, counts: np.ndarray
) -> None:
    """Write the sum of every segment to its row of `sums`, or add it there; add its keys to
    `counts`, unless that is empty.
    """
    w, partial = new_scratch(call), new_partial(call)
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        _, b, begin, end, _ = call.segments[index]
        if not add:
            clear_rows(sums[index], m0, m1)
        if m0 == 0 and counts.shape[0] > 0:
            counts[index] += count_kept(call.mask, b, begin, end)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for m in range(m0, m1):
                keys = read_keys(call, (b, t, m), n, TOKENS, True, w)
                hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                add_block(w.phi_k, w.phi_k, keys.v, n, m - m0, partial, keys.next_v)
                if group_ends(t, begin, end):
                    flush(partial, m - m0, sums[index, m])


def sum_keys_backward(part: Problem, d_sketch: Sketch, grads: GradientBuffers) -> None:
    """Write the gradients of keys and values, given that of the state they were added to."""
    wants_hash = grads.hash is not None
    if grads.key is None and grads.value is None and not wants_hash:
        return
    modes = ReadModes(hash_mode(part, grads.hash), state_mode(part), COPIES.d_out)
    for chunk in chunking.chunks(part, "key"):
        call = make_call(part, chunk, modes, d_key=grads.key, d_value=grads.value)
        hash_parts = new_hash_parts(part, chunk, grads.hash)
        n_tokens = launch(_sum_keys_backward, call, d_sketch.flat, hash_parts)
        add_hash_parts(hash_parts, grads.hash, 1)
        del hash_parts
        progress.advance(n_tokens)


@kernel
def _sum_keys_backward(
    call: Call, first: int, last: int, d_states: np.ndarray, hash_parts: np.ndarray
) -> None:
    w, d_state = new_scratch(call), new_states(call)
    heads = call.beta.shape[0] // call.n_kv_heads  # state heads that share a key/value head
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        sequence, b, begin, end, _ = call.segments[index]
        clear_rows(hash_parts[index], m0, m1)
        round_states(d_states[sequence], m0, m1, True, d_state)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for m in range(m0, m1):
                i, g, of_group = m - m0, m // heads, m % heads
                keys = read_keys(call, (b, t, m), n, TOKENS, True, w)
                hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                # value_sum += phi_k @ v
                multiply_state(d_state, i, keys.v, n, w, keys.next_v)
                d_v = rows_to_write(
                    call.table, D_VALUE, (b, t, g), call.value_dim, w.d_v, heads == 1, of_group > 0
                )
                expand(w.phi_k, d_state.value_sum[i], w.phi_k.shape[0], n, d_v)
                # mass += phi_k
                add_mass(d_state.mass[i], w.d_phi)
                # phi_k = hash_block(k)
                d_k = rows_to_write(
                    call.table, D_KEY, (b, t, g), call.head_dim, w.d_k, heads == 1, of_group > 0
                )
                hash_block_backward(
                    hash_of(call, m, w), w.d_phi, keys.k, n, w.phi_k, d_k, hash_parts[index, m]
                )
                if of_group == heads - 1:
                    store_rows(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k, d_k)
                    store_rows(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v, d_v)
    fence()


@helper
def multiply_state(
    state: RoundedState, j: int, x: InputRows, n: int, w: Scratch, next_rows: PrefetchRows
) -> None:
    """d_phi[:, i] = value_sum @ x[i], for every token i, with the state of head j."""
    n_buckets = w.d_phi.shape[0]
    if x.size < w.d_phi.itemsize:
        project(state.value_sum[j], x, n_buckets, n, w.d_phi, next_rows)
    else:
        project_wide(state.value_sum_t[j], x, n_buckets, n, w.products_t, next_rows)
        transpose(w.products_t, TOKENS, n_buckets, w.d_phi)


def read_out(part: Problem, sketch: Sketch, out: np.ndarray) -> None:
    """Read out `sketch` for every query of `part` into out [B, Tq, H, V]."""
    modes = ReadModes(hash_mode(part), COPIES.value, COPIES.d_out)
    for chunk in chunking.chunks(part, "query"):
        progress.advance(launch(_read_out, make_call(part, chunk, modes, out=out), sketch.flat))


@kernel
def _read_out(call: Call, first: int, last: int, states: np.ndarray) -> None:
    w, state = new_scratch(call), new_states(call)
    repeats = call.n_heads // call.beta.shape[0]
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        sequence, b, begin, end, _ = call.segments[index]
        # for one or two queries, rounding a state would take longer than reading it out
        at_once = (end - begin) * repeats <= 2 and call.value_dim == w.o.shape[1]
        if not at_once:
            round_states(states[sequence], m0, m1, False, state)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for h in range(m0 * repeats, m1 * repeats):
                m = h // repeats
                q, next_q = read_query(call, (b, t, h), n, TOKENS, w)
                hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
                splat_mass(states[sequence, m] if at_once else state.mass[m - m0], w.mass)
                weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                o = rows_to_write(
                    call.table, OUT, (b, t, h), call.value_dim, w.o, not at_once, False
                )
                if at_once:
                    expand_state(w.rho, states[sequence, m], n, w.o)
                else:
                    expand(w.rho, state.value_sum[m - m0], w.rho.shape[0], n, o)
                store_rows(call.table, OUT, (b, t, h), n, call.value_dim, w.o, o)
    fence()


def read_out_backward(
    part: Problem, sketch: Sketch, d_out: np.ndarray, d_sketch: Sketch, grads: GradientBuffers
) -> None:
    """Write the gradient of the queries and add that of the state to `d_sketch`."""
    modes = ReadModes(hash_mode(part, grads.hash), COPIES.value, d_out_mode(part))
    for chunk in chunking.chunks(part, "query"):
        call = make_call(part, chunk, modes, d_out=d_out, d_query=grads.query)
        hash_parts = new_hash_parts(part, chunk, grads.hash)
        if _are_groups(chunk, sketch):
            n_tokens = launch(
                _read_out_backward, call, sketch.flat, d_sketch.flat, True, hash_parts
            )
        else:
            d_sums = arrays.empty((len(chunk), *sketch.flat.shape[1:]), np.float64)
            n_tokens = launch(_read_out_backward, call, sketch.flat, d_sums, False, hash_parts)
            exclusive_scan(chunk[:, 0], d_sums, d_sketch.flat)
            del d_sums
        add_hash_parts(hash_parts, grads.hash, 0)
        del hash_parts
        progress.advance(n_tokens)


@kernel
def _read_out_backward(
    call: Call,
    first: int,
    last: int,
    states: np.ndarray,
    d_sums: np.ndarray,
    add: bool,
    hash_parts: np.ndarray,
) -> None:
    w, state, partial = new_scratch(call), new_states(call), new_partial(call)
    repeats = call.n_heads // call.beta.shape[0]
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        sequence, b, begin, end, _ = call.segments[index]
        if not add:
            clear_rows(d_sums[index], m0, m1)
        clear_rows(hash_parts[index], m0, m1)
        round_states(states[sequence], m0, m1, True, state)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for h in range(m0 * repeats, m1 * repeats):
                m = h // repeats
                i = m - m0
                q, next_q = read_query(call, (b, t, h), n, TOKENS, w)
                g, next_g = read_d_out(call, (b, t, h), n, TOKENS, w)
                hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
                splat_mass(state.mass[i], w.mass)
                weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                # out = rho.T @ value_sum
                multiply_state(state, i, g, n, w, next_g)
                # rho = weigh(phi_q, mass)
                weigh_backward(
                    w.d_phi,
                    w.phi_q,
                    w.mass,
                    w.factor,
                    w.rho,
                    call.n_tables,
                    call.bucket_mean,
                    w.d_mass,
                )
                clear_after(n, w.d_mass)
                add_block(w.d_mass, w.rho, g, n, i, partial, NO_PREFETCH)
                if group_ends(t, begin, end) and h % repeats == repeats - 1:
                    flush(partial, i, d_sums[index, m])
                # phi_q = hash_block(q)
                d_q = rows_to_write(
                    call.table, D_QUERY, (b, t, h), call.head_dim, w.d_q, True, False
                )
                hash_block_backward(
                    hash_of(call, m, w), w.d_phi, q, n, w.phi_q, d_q, hash_parts[index, m]
                )
                store_rows(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q, d_q)
    fence()
