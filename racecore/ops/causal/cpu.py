"""Causal attention by segments: Numba kernels; see `reference` for the token-by-token form.

One long sequence keeps every core busy, because its segments run side by side. Forward: sum every segment's keys, scan
the sums into the state before each segment, then walk all segments at once. Backward: the same scan from the saved states;
a forward walk for the queries, which also sums what each segment adds to the gradients of earlier states; a scan from the
end; a backward walk for keys and values. States are never recovered by subtraction.

Inside a block of tokens, pairs of a key and a later query are weighed directly, as in plain attention; everything before
the block comes from the state.
"""

from __future__ import annotations

import numpy as np

from racecore import arrays, plan, progress
from racecore.jit import helper, kernel
from racecore.ops.bidirectional.cpu import segment_sums
from racecore.ops.blocks import D_KEY, D_OUT, D_QUERY, D_VALUE, OUT, QUERY, load, store
from racecore.ops.cpu_call import Call, empty_hash_parts, launch, make_call, scan
from racecore.ops.products import accumulate, accumulate_triangular, expand, expand_causal, project
from racecore.ops.readout import weigh, weigh_backward
from racecore.ops.scratch import Scratch, hash_of, load_keys, new_scratch
from racecore.ops.soft_hash.cpu import hash_block, hash_block_backward
from racecore.ops.states import add_block, drop_masked
from racecore.plan import BLOCK, count_blocks
from racecore.problem import GradientBuffers, Problem, Sketch

__all__ = ["walk", "walk_backward"]


def walk(part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool) -> list[np.ndarray]:
    """Answer every query from the keys up to its own, into out [B, T, H, V]; `sketch` moves from first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from; empty unless `keep_checkpoints`.
    """
    checkpoints = []
    for chunk in plan.chunks(part, "key"):
        if keep_checkpoints:
            checkpoints.append(sketch.flat.copy())
        _walk_chunk(part, chunk, sketch, out)
    return checkpoints


def _walk_chunk(part: Problem, chunk: np.ndarray, sketch: Sketch, out: np.ndarray) -> None:
    states, _ = segment_sums(part, chunk)
    scan(chunk[:, 0], states, sketch.flat)
    progress.advance(launch(_walk, make_call(part, chunk, out=out), states))


@kernel
def _walk(call: Call, first: int, last: int, states: np.ndarray) -> None:
    """Walk along segments, each from the state before it, states [n, M, S*(1+V)]."""
    w = new_scratch(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    mass, value_sum = _running_state(call, heads, w)
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        _, b, begin, end, _ = call.segments[index]
        _start(states[index], g * heads, mass, value_sum)
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            load_keys(call, b, t, g, n, w)
            for j in range(heads):
                m = g * heads + j
                hash_block(hash_of(call, m, w), w.k, n, w.phi_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                _running_mass(w.phi_k, n, mass[j], w.mass)
                for h in range(m * repeats, (m + 1) * repeats):
                    load(call.table, QUERY, (b, t, h), n, call.head_dim, w.q, w.ones)
                    hash_block(hash_of(call, m, w), w.q, n, w.phi_q)
                    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                    w.o[:] = 0
                    expand(w.rho, value_sum[j], w.rho.shape[0], n, w.o)
                    w.pairs[:] = 0
                    expand(w.phi_k, w.rho, w.rho.shape[0], n, w.pairs)  # pairs[key, query]
                    _clear_before(w.pairs, n)
                    expand_causal(w.pairs, w.v, n, w.o)
                    store(call.table, OUT, (b, t, h), n, call.value_dim, w.o)
                accumulate(w.phi_k, w.v, w.phi_k.shape[0], n, value_sum[j])


@helper
def _running_state(call: Call, heads: int, w: Scratch) -> tuple[np.ndarray, np.ndarray]:
    """Make room for the states of the heads of a task: masses in float64, value sums in the dtype of the arithmetic."""
    n_buckets, width = w.value_sum.shape
    return np.empty((heads, n_buckets)), np.zeros((heads, n_buckets, width), call.planes.dtype)


@helper
def _start(states: np.ndarray, first_head: int, mass: np.ndarray, value_sum: np.ndarray) -> None:
    """Take over the states before (or gradients after) a segment."""
    n_buckets = value_sum.shape[1]
    width = states.shape[1] // n_buckets - 1
    for j in range(mass.shape[0]):
        state = states[first_head + j]
        mass[j, :] = state[:n_buckets]
        for s in range(n_buckets):
            value_sum[j, s, :width] = state[n_buckets + s * width : n_buckets + (s + 1) * width]
            value_sum[j, s, width:] = 0  # a NaN of the task before must not stay in the padding


@helper
def _running_mass(phi_k: np.ndarray, n: int, mass: np.ndarray, masses: np.ndarray) -> None:
    """Fill masses[:, i] with the masses up to and including token i, and advance `mass` by the block."""
    for s in range(phi_k.shape[0]):
        total = mass[s]
        for i in range(n):
            total += phi_k[s, i]
            masses[s, i] = total
        mass[s] = total


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
    states, _ = segment_sums(part, chunk)
    scan(owners, states, checkpoint.copy())
    hash_parts = empty_hash_parts(part, chunk, grads.hash is not None)
    d_sums = arrays.empty(states.shape, np.float64)
    read = arrays.empty((count_blocks(chunk), part.n_heads, 2, part.n_buckets, BLOCK), part.dtype)  # rho and d_mass
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
    w = new_scratch(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    mass, value_sum = _running_state(call, heads, w)
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        _, b, begin, end, block = call.segments[index]
        _start(states[index], g * heads, mass, value_sum)
        d_sums[index, g * heads : (g + 1) * heads] = 0
        hash_parts[index, g * heads : (g + 1) * heads] = 0
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            load_keys(call, b, t, g, n, w)
            for j in range(heads):
                m = g * heads + j
                hash_block(hash_of(call, m, w), w.k, n, w.phi_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                _running_mass(w.phi_k, n, mass[j], w.mass)
                for h in range(m * repeats, (m + 1) * repeats):
                    load(call.table, QUERY, (b, t, h), n, call.head_dim, w.q, w.ones)
                    load(call.table, D_OUT, (b, t, h), n, call.value_dim, w.g, w.ones)
                    _read_block_backward(call, m, n, value_sum[j], w)
                    add_block(w.d_mass, w.rho, w.g, n, w.block_sum, d_sums[index, m])
                    read[block, h, 0, :, :n] = w.rho[:, :n]
                    read[block, h, 1, :, :n] = w.d_mass[:, :n]
                    # phi_q = hash_block(q)
                    w.d_q[:] = 0
                    hash_block_backward(hash_of(call, m, w), w.d_phi, w.q, n, w.phi_q, w.d_q, hash_parts[index, m])
                    store(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q)
                accumulate(w.phi_k, w.v, w.phi_k.shape[0], n, value_sum[j])
            block += 1


@helper
def _read_block_backward(call: Call, m: int, n: int, value_sum: np.ndarray, w: Scratch) -> None:
    """Hash the queries of a block, weigh them, and invert the read-out: fills rho, d_mass and d_phi (of the queries)."""
    hash_block(hash_of(call, m, w), w.q, n, w.phi_q)
    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
    # o[i] = sum_s rho[s, i] * (value_sum[s] + sum_{j <= i} phi_k[s, j] * v[j])
    project(value_sum, w.g, w.rho.shape[0], n, w.d_phi)
    project(w.v, w.g, n, n, w.d_pairs)  # <v[j], g[i]>
    _clear_before(w.d_pairs, n)
    accumulate_triangular(w.phi_k, w.d_pairs, w.phi_k.shape[0], n, w.d_phi)
    # rho = weigh(phi_q, mass)
    weigh_backward(w.d_phi, w.phi_q, w.mass, w.factor, w.rho, call.n_tables, call.bucket_mean, w.d_mass)


@helper
def _clear_before(pairs: np.ndarray, n: int) -> None:
    """Set pairs[i, j] to zero for j < i."""
    for i in range(n):
        pairs[i, :i] = 0


@helper
def _clear_after(pairs: np.ndarray, n: int) -> None:
    """Set pairs[i, j] to zero for j > i."""
    for i in range(n):
        pairs[i, i + 1 :] = 0


@kernel
def _walk_keys_backward(
    call: Call, first: int, last: int, d_states: np.ndarray, read: np.ndarray, hash_parts: np.ndarray
) -> None:
    """Walk backward for the gradients of keys and values, each segment from the gradient of the state after it."""
    w = new_scratch(call)
    n_buckets = w.phi_k.shape[0]
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    d_mass, d_value_sum = _running_state(call, heads, w)
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        _, b, begin, end, first_block = call.segments[index]
        _start(d_states[index], g * heads, d_mass, d_value_sum)
        hash_parts[index, g * heads : (g + 1) * heads] = 0
        for i_block in range((end - begin - 1) // BLOCK, -1, -1):
            t = begin + i_block * BLOCK
            n = min(BLOCK, end - t)
            load_keys(call, b, t, g, n, w)
            w.d_k[:] = 0
            w.d_v[:] = 0
            for j in range(heads):
                m = g * heads + j
                hash_block(hash_of(call, m, w), w.k, n, w.phi_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                # what later blocks read: value_sum += phi_k @ v
                project(d_value_sum[j], w.v, n_buckets, n, w.d_phi)
                expand(w.phi_k, d_value_sum[j], n_buckets, n, w.d_v)
                for h in range(m * repeats, (m + 1) * repeats):
                    load(call.table, D_OUT, (b, t, h), n, call.value_dim, w.g, w.ones)
                    rho = read[first_block + i_block, h, 0]
                    _add_pairs_backward(rho, n, w)
                    accumulate(rho, w.g, n_buckets, n, d_value_sum[j])
                # what queries of this block and later ones divide by: mass += phi_k
                _running_mass_backward(
                    read[first_block + i_block, m * repeats : (m + 1) * repeats, 1], n, d_mass[j], w.d_phi
                )
                # phi_k = hash_block(k)
                hash_block_backward(hash_of(call, m, w), w.d_phi, w.k, n, w.phi_k, w.d_k, hash_parts[index, m])
            store(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k)
            store(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v)


@helper
def _add_pairs_backward(rho: np.ndarray, n: int, w: Scratch) -> None:
    """Invert, within a block, o[i] += sum_{j <= i} pairs[j, i] * v[j] with pairs = phi_k.T @ rho: adds to d_v and d_phi."""
    w.pairs[:] = 0
    expand(w.phi_k, rho, rho.shape[0], n, w.pairs)  # pairs[key, query]
    _clear_before(w.pairs, n)
    accumulate_triangular(w.pairs, w.g, n, n, w.d_v)
    project(w.g, w.v, n, n, w.d_pairs)  # d_pairs[query, key]
    _clear_after(w.d_pairs, n)
    accumulate_triangular(rho, w.d_pairs, rho.shape[0], n, w.d_phi)


@helper
def _running_mass_backward(d_masses: np.ndarray, n: int, d_mass: np.ndarray, d_phi: np.ndarray) -> None:
    """Add to d_phi[:, j] what tokens i >= j of this block, d_masses [heads, S, n], and later blocks, d_mass, ask of mass."""
    for s in range(d_phi.shape[0]):
        total = d_mass[s]
        for i in range(n - 1, -1, -1):
            for h in range(d_masses.shape[0]):
                total += d_masses[h, s, i]
            d_phi[s, i] += total
        d_mass[s] = total
