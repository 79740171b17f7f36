"""Causal attention by segments: Numba kernels; see `reference` for the token-by-token form.

One long sequence keeps every core busy, because its segments run side by side. Forward: sum every segment's keys, scan
the sums into the state before each segment, then walk all segments at once. Backward: the same scan from the saved states;
a forward walk for the queries, which also sums what each segment adds to the gradients of earlier states; a scan from the
end; a backward walk for keys and values. States are never recovered by subtraction.

Inside a segment the state stays in the registers, piece by piece, while the tokens of a block walk past it (`ops.walks`): a
token is added, then asks. So causality is strict by construction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from racecore import arrays, plan, progress
from racecore.jit import helper, kernel
from racecore.ops import vectors
from racecore.ops.bidirectional.cpu import segment_sums
from racecore.ops.blocks import D_KEY, D_OUT, D_QUERY, D_VALUE, OUT, QUERY, rows_to_write, store
from racecore.ops.cpu_call import Call, empty_hash_parts, launch, make_call, scan
from racecore.ops.products import NOTHING, Ahead, Source, ask, rows_of, source_of, transpose
from racecore.ops.readout import weigh, weigh_backward
from racecore.ops.scratch import (
    Scratch,
    hash_of,
    hashes_once,
    n_buckets_of,
    new_partial,
    new_scratch,
    new_states,
    read_keys,
    read_query,
    task_of,
)
from racecore.ops.soft_hash.cpu import hash_block, hash_block_backward
from racecore.ops.states import (
    Running,
    add_block,
    clear_after,
    drop_masked,
    flush,
    group_ends,
    new_running,
    running_mass,
    running_mass_backward,
    start,
)
from racecore.ops.tiles import fence
from racecore.ops.vectors import copy, lanes
from racecore.ops.walks import walk_rows, walk_weights
from racecore.plan import BLOCK, TOKENS, count_blocks
from racecore.problem import GradientBuffers, Problem, Sketch

__all__ = ["walk", "walk_backward"]


def walk(part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool) -> list[np.ndarray]:
    """Answer every query from the keys up to its own, into out [B, T, H, V]; `sketch` moves from first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from, or before all of its segments where that is
        affordable; empty unless `keep_checkpoints`.
    """
    checkpoints, keep_all = [], plan.can_keep_states(part)
    for chunk in plan.chunks(part, "key"):
        before = sketch.flat.copy()
        states, _ = segment_sums(part, chunk)
        scan(chunk[:, 0], states, sketch.flat)
        progress.advance(launch(_walk, make_call(part, chunk, out=out), states))
        if keep_checkpoints:
            checkpoints.append(states if keep_all else before)
        del states  # before the next chunk asks for as much
    return checkpoints


class Spare(NamedTuple):
    """States of further query heads that share a key head: they start from nothing, and end in a place of their own."""

    none: np.ndarray  # [S, V], zeros
    none_t: np.ndarray  # [V, S]
    after: np.ndarray  # [S, V]
    after_t: np.ndarray  # [V, S]


@helper
def _new_spare(call: Call) -> Spare:
    two = new_running(2, n_buckets_of(call), call.value_dim, call.planes.dtype)
    two.value_sum[:] = 0
    two.value_sum_t[:] = 0
    return Spare(two.value_sum[0], two.value_sum_t[0], two.value_sum[1], two.value_sum_t[1])


@helper
def _add_to(state: np.ndarray, more: np.ndarray) -> None:
    """state += more, of matrices whose rows are whole vectors."""
    for r in range(state.shape[0]):
        for c in range(0, state.shape[1], lanes(state)):
            vectors.store(state, r, c, vectors.load(state, r, c) + vectors.load(more, r, c))


@kernel
def _walk(call: Call, first: int, last: int, states: np.ndarray) -> None:
    """Walk along segments, each from the state before it, states [n, M, S*(1+V)]."""
    w, state, spare = new_scratch(call), new_states(call), _new_spare(call)
    repeats = call.n_heads // call.planes.shape[0]
    straight, straight_v = hashes_once(call, 0), repeats == 1 and w.phi_k.shape[0] <= 8
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        _, b, begin, end, _ = call.segments[index]
        start(states[index], m0, m1, False, state)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for m in range(m0, m1):
                keys = read_keys(call, b, t, m, n, TOKENS, straight, straight_v, w)
                hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                running_mass(w.phi_k, state.mass[m - m0], w.weights_t, w.answers_t, w.mass)
                before = state.value_sum[m - m0]
                for h in range(m * repeats, (m + 1) * repeats):
                    q, next_q = read_query(call, QUERY, b, t, h, n, TOKENS, straight, w.q, w)
                    hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
                    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                    after = before if h % repeats == repeats - 1 else spare.after
                    walk_rows(before, after, w.phi_k, keys.v, w.rho, w.o, n, False, False, keys.next_v)
                    store(call.table, OUT, (b, t, h), n, call.value_dim, w.o, rows_of(w.o, False))
    fence()


def walk_backward(
    part: Problem, checkpoints: list[np.ndarray], d_out: np.ndarray, d_sketch: Sketch, grads: GradientBuffers
) -> None:
    """Write all gradients; `d_sketch` moves from the gradient of the final state to that of the first one."""
    for chunk, checkpoint in zip(reversed(plan.chunks(part, "key")), reversed(checkpoints), strict=True):
        _walk_chunk_backward(part, chunk, checkpoint, d_out, d_sketch, grads)


def _walk_chunk_backward(
    part: Problem,
    chunk: np.ndarray,
    checkpoint: np.ndarray,
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    call = make_call(part, chunk, d_out=d_out, d_query=grads.query, d_key=grads.key, d_value=grads.value)
    owners, no_owners = chunk[:, 0], np.zeros_like(chunk[:, 0])
    if plan.have_own_states(part, chunk, len(checkpoint)):
        states = checkpoint
    else:
        states, _ = segment_sums(part, chunk)
        scan(owners, states, checkpoint.copy())
    hash_parts = empty_hash_parts(part, chunk, grads.hash)
    d_sums = arrays.empty(states.shape, np.float64)
    shape = (count_blocks(chunk), part.n_heads, 2, part.n_buckets, BLOCK)  # rho and d_mass
    size = math.prod(shape)
    read = arrays.empty((size + BLOCK * BLOCK,), part.dtype)[:size].reshape(shape)  # transpositions read past the end
    n_tokens = launch(_walk_queries_backward, call, states, read, d_sums, hash_parts)
    if grads.hash is not None:
        scan(no_owners, hash_parts, grads.hash[:1], reverse=True)
    progress.advance(n_tokens)
    # every later token read the sums of this segment
    scan(owners, d_sums, d_sketch.flat, reverse=True)
    launch(_walk_keys_backward, call, d_sums, read, hash_parts)
    if grads.hash is not None:
        scan(no_owners, hash_parts, grads.hash[1:], reverse=True)
    progress.advance(n_tokens)


@kernel
def _walk_queries_backward(
    call: Call, first: int, last: int, states: np.ndarray, read: np.ndarray, d_sums: np.ndarray, hash_parts: np.ndarray
) -> None:
    """Walk forward again for the gradients of queries; keep rho and d_mass of every token in `read`, sum them in d_sums."""
    w, state, spare, partial = new_scratch(call), new_states(call), _new_spare(call), new_partial(call)
    repeats = call.n_heads // call.planes.shape[0]
    straight = hashes_once(call, hash_parts.shape[2])
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        _, b, begin, end, block = call.segments[index]
        start(states[index], m0, m1, True, state)
        d_sums[index, m0:m1] = 0
        hash_parts[index, m0:m1] = 0
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            for m in range(m0, m1):
                i = m - m0
                keys = read_keys(call, b, t, m, n, TOKENS, straight, False, w)
                hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                running_mass(w.phi_k, state.mass[i], w.weights_t, w.answers_t, w.mass)
                for h in range(m * repeats, (m + 1) * repeats):
                    after_t = state.value_sum_t[i] if h % repeats == repeats - 1 else spare.after_t
                    q = _read_block_backward(
                        call, (b, t, h), n, state.value_sum_t[i], after_t, keys.next_v, straight, w
                    )
                    copy(w.rho, read[block, h, 0])
                    copy(w.d_mass, read[block, h, 1])
                    # sums of these are what earlier keys and values of the sequence get
                    add_block(w.d_mass, w.rho, source_of(w.g), n, i, partial, NOTHING)
                    # phi_q = hash_block(q)
                    d_q = rows_to_write(call.table, D_QUERY, (b, t, h), call.head_dim, w.d_q, True, False)
                    hash_block_backward(hash_of(call, m, w), w.d_phi, q, n, w.phi_q, d_q, hash_parts[index, m])
                    store(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q, d_q)
                if group_ends(t, begin, end):
                    flush(partial, i, d_sums[index, m])
            block += 1
    fence()


@helper
def _read_block_backward(
    call: Call, place: tuple[int, int, int], n: int, before_t: np.ndarray, after_t: np.ndarray, next_v: Ahead,
    straight: bool, w: Scratch,
) -> Source:  # fmt: skip
    """Read queries and d_out of one block, walk over it, and invert the read-out: fills rho, d_mass and d_phi.

    Returns the queries.
    """
    b, t, h = place
    m = h * call.planes.shape[0] // call.n_heads
    q, next_q = read_query(call, QUERY, b, t, h, n, TOKENS, straight, w.q, w)
    _, next_g = read_query(call, D_OUT, b, t, h, n, TOKENS, False, w.g, w)
    hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
    # o[i] = sum_s rho[s, i] * value_sum[s], after token i was added
    n_buckets = w.rho.shape[0]
    ask(next_v, 0, n // 2)
    walk_weights(before_t, after_t, w.weights_t, w.v, w.g, w.answers_t, n_buckets, n, False, False, next_g)
    transpose(w.answers_t, TOKENS, n_buckets, w.d_phi)
    ask(next_v, n // 2, n)
    # rho = weigh(phi_q, mass)
    weigh_backward(w.d_phi, w.phi_q, w.mass, w.factor, w.rho, call.n_tables, call.bucket_mean, w.d_mass)
    clear_after(n, w.d_mass)
    return q


@kernel
def _walk_keys_backward(
    call: Call, first: int, last: int, d_states: np.ndarray, read: np.ndarray, hash_parts: np.ndarray
) -> None:
    """Walk backward for the gradients of keys and values, each segment from the gradient of the state after it."""
    w, d_state, spare = new_scratch(call), new_states(call), _new_spare(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    straight = hashes_once(call, hash_parts.shape[2])
    for task in range(first, last):
        index, m0, m1 = task_of(call, task)
        _, b, begin, end, first_block = call.segments[index]
        start(d_states[index], m0, m1, True, d_state)
        hash_parts[index, m0:m1] = 0
        for i_block in range((end - begin - 1) // BLOCK, -1, -1):
            t, block = begin + i_block * BLOCK, first_block + i_block
            n = min(BLOCK, end - t)
            for m in range(m0, m1):
                g, share = m // heads, m % heads
                keys = read_keys(call, b, t, m, n, -TOKENS, straight, False, w)
                hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                for h in range(m * repeats, (m + 1) * repeats):
                    _, next_g = read_query(call, D_OUT, b, t, h, n, -TOKENS, False, w.g, w)
                    copy(read[block, h, 0], w.rho)
                    _ask_gradients(w, d_state, m - m0, h % repeats, share == 0, n, spare, keys.next_v, next_g)
                # what queries from this token on divide by: mass += phi_k
                d_masses = read[block, m * repeats : (m + 1) * repeats, 1]
                running_mass_backward(d_masses, w.weights_t, d_state.mass[m - m0], w.answers_t)
                transpose(w.answers_t, TOKENS, w.rho.shape[0], w.d_phi)
                # phi_k = hash_block(k)
                d_k = rows_to_write(call.table, D_KEY, (b, t, g), call.head_dim, w.d_k, heads == 1, share > 0)
                hash_block_backward(hash_of(call, m, w), w.d_phi, keys.k, n, w.phi_k, d_k, hash_parts[index, m])
                if share == heads - 1:
                    store(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k, d_k)
                    store(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v, rows_of(w.d_v, False))
    fence()


@helper
def _ask_gradients(
    w: Scratch, d_state: Running, i: int, r: int, first_share: bool, n: int, spare: Spare, next_v: Ahead, next_g: Ahead
) -> None:
    """Add query head r's block to the gradient of state i, and its answers to d_v and to answers_t (of d_phi).

    The first query head continues from the state; each other one starts from nothing and is added to the state at last.
    """
    n_buckets = w.rho.shape[0]
    transpose(w.rho, n_buckets, TOKENS, w.weights_t)
    state, state_t = d_state.value_sum[i], d_state.value_sum_t[i]
    before, before_t = (state, state_t) if r == 0 else (spare.none, spare.none_t)
    after, after_t = (state, state_t) if r == 0 else (spare.after, spare.after_t)
    # value_sum[s] += phi_k[s, i] * v[i], read with rho by this query and all later ones
    walk_rows(before, after, w.rho, source_of(w.g), w.phi_k, w.d_v, n, True, r > 0 or not first_share, next_v)
    walk_weights(before_t, after_t, w.weights_t, w.g, w.v, w.answers_t, n_buckets, n, True, r > 0, next_g)
    if r > 0:
        _add_to(state, after)
        _add_to(state_t, after_t)
