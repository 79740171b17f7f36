"""Bidirectional attention through a sketch: Numba kernels, one block of tokens at a time; see `reference` for the plain form.

No array of a block is longer than a block: probabilities of all tokens never exist. Sums over a block are float32 (or
the dtype of the arithmetic), sums over blocks float64.
"""

from __future__ import annotations

import numpy as np

from racecore import arrays, plan, progress
from racecore.jit import kernel
from racecore.ops.blocks import D_KEY, D_OUT, D_QUERY, D_VALUE, OUT, QUERY, load, store
from racecore.ops.cpu_call import Call, empty_hash_parts, launch, make_call, scan
from racecore.ops.products import expand, project
from racecore.ops.readout import weigh, weigh_backward
from racecore.ops.scratch import hash_of, load_keys, new_scratch
from racecore.ops.soft_hash.cpu import hash_block, hash_block_backward
from racecore.ops.states import add_block, drop_masked, widen
from racecore.plan import BLOCK
from racecore.problem import GradientBuffers, Problem, Sketch

__all__ = ["read_out", "read_out_backward", "sum_keys", "sum_keys_backward"]


def sum_keys(part: Problem, sketch: Sketch) -> None:
    """Add every key and value of `part` to `sketch`."""
    for chunk in plan.chunks(part, "key"):
        sums, n_tokens = segment_sums(part, chunk)
        scan(chunk[:, 0], sums, sketch.flat)
        del sums  # before the next chunk asks for as much
        progress.advance(n_tokens)


def segment_sums(part: Problem, chunk: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the state that each segment alone amounts to, float64 [n, M, S*(1+V)], and the number of tokens."""
    width = part.n_buckets * (1 + part.value_dim)
    sums = arrays.empty((len(chunk), part.n_state_heads, width), np.float64)
    return sums, launch(_sum_keys, make_call(part, chunk), sums)


@kernel
def _sum_keys(call: Call, first: int, last: int, sums: np.ndarray) -> None:
    w = new_scratch(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        _, b, begin, end, _ = call.segments[index]
        sums[index, g * heads : (g + 1) * heads] = 0
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            load_keys(call, b, t, g, n, w)
            for m in range(g * heads, (g + 1) * heads):
                hash_block(hash_of(call, m, w), w.k, n, w.phi_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                add_block(w.phi_k, w.phi_k, w.v, n, w.block_sum, sums[index, m])


def sum_keys_backward(part: Problem, d_sketch: Sketch, grads: GradientBuffers) -> None:
    """Write the gradients of keys and values, given that of the state they were added to."""
    wants_hash = grads.hash is not None
    if grads.key is None and grads.value is None and not wants_hash:
        return
    for chunk in plan.chunks(part, "key"):
        call = make_call(part, chunk, d_key=grads.key, d_value=grads.value)
        hash_parts = empty_hash_parts(part, chunk, wants_hash)
        n_tokens = launch(_sum_keys_backward, call, d_sketch.flat, hash_parts)
        if grads.hash is not None:
            scan(np.zeros_like(chunk[:, 0]), hash_parts, grads.hash[1:])
        del hash_parts
        progress.advance(n_tokens)


@kernel
def _sum_keys_backward(call: Call, first: int, last: int, d_states: np.ndarray, hash_parts: np.ndarray) -> None:
    w = new_scratch(call)
    n_buckets = w.phi_k.shape[0]
    heads = call.planes.shape[0] // call.n_kv_heads
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        owner, b, begin, end, _ = call.segments[index]
        hash_parts[index, g * heads : (g + 1) * heads] = 0
        for t in range(begin, end, BLOCK):
            n = min(BLOCK, end - t)
            load_keys(call, b, t, g, n, w)
            w.d_k[:] = 0
            w.d_v[:] = 0
            for m in range(g * heads, (g + 1) * heads):
                if t == begin or heads > 1:
                    widen(d_states[owner, m], w.d_mass, w.block_sum)  # block_sum: the gradient of value_sum
                hash_block(hash_of(call, m, w), w.k, n, w.phi_k)
                drop_masked(call.mask, w.keep, n, w.phi_k)
                # value_sum += phi_k @ v
                project(w.block_sum, w.v, w.rho.shape[0], n, w.d_phi)
                expand(w.phi_k, w.block_sum, n_buckets, n, w.d_v)
                # mass += phi_k
                w.d_phi[:] += w.d_mass
                # phi_k = hash_block(k)
                hash_block_backward(hash_of(call, m, w), w.d_phi, w.k, n, w.phi_k, w.d_k, hash_parts[index, m])
            store(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k)
            store(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v)


def read_out(part: Problem, sketch: Sketch, out: np.ndarray) -> None:
    """Answer every query of `part` from `sketch` into out [B, Tq, H, V]."""
    for chunk in plan.chunks(part, "query"):
        progress.advance(launch(_read_out, make_call(part, chunk, out=out), sketch.flat))


@kernel
def _read_out(call: Call, first: int, last: int, states: np.ndarray) -> None:
    w = new_scratch(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        owner, b, begin, end, _ = call.segments[index]
        for m in range(g * heads, (g + 1) * heads):
            widen(states[owner, m], w.mass, w.value_sum)
            for h in range(m * repeats, (m + 1) * repeats):
                for t in range(begin, end, BLOCK):
                    n = min(BLOCK, end - t)
                    load(call.table, QUERY, (b, t, h), n, call.head_dim, w.q, w.ones)
                    hash_block(hash_of(call, m, w), w.q, n, w.phi_q)
                    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                    w.o[:] = 0
                    expand(w.rho, w.value_sum, w.rho.shape[0], n, w.o)
                    store(call.table, OUT, (b, t, h), n, call.value_dim, w.o)


def read_out_backward(
    part: Problem, sketch: Sketch, d_out: np.ndarray, d_sketch: Sketch, grads: GradientBuffers
) -> None:
    """Write the gradient of the queries and add that of the state to `d_sketch`."""
    for chunk in plan.chunks(part, "query"):
        call = make_call(part, chunk, d_out=d_out, d_query=grads.query)
        d_sums = arrays.empty((len(chunk), *sketch.flat.shape[1:]), np.float64)
        hash_parts = empty_hash_parts(part, chunk, grads.hash is not None)
        n_tokens = launch(_read_out_backward, call, sketch.flat, d_sums, hash_parts)
        scan(chunk[:, 0], d_sums, d_sketch.flat)
        if grads.hash is not None:
            scan(np.zeros_like(chunk[:, 0]), hash_parts, grads.hash[:1])
        del d_sums, hash_parts
        progress.advance(n_tokens)


@kernel
def _read_out_backward(
    call: Call, first: int, last: int, states: np.ndarray, d_sums: np.ndarray, hash_parts: np.ndarray
) -> None:
    w = new_scratch(call)
    heads = call.planes.shape[0] // call.n_kv_heads
    repeats = call.n_heads // call.planes.shape[0]
    for task in range(first, last):
        index, g = task // call.n_kv_heads, task % call.n_kv_heads
        owner, b, begin, end, _ = call.segments[index]
        d_sums[index, g * heads : (g + 1) * heads] = 0
        hash_parts[index, g * heads : (g + 1) * heads] = 0
        for m in range(g * heads, (g + 1) * heads):
            widen(states[owner, m], w.mass, w.value_sum)
            for h in range(m * repeats, (m + 1) * repeats):
                for t in range(begin, end, BLOCK):
                    n = min(BLOCK, end - t)
                    load(call.table, QUERY, (b, t, h), n, call.head_dim, w.q, w.ones)
                    load(call.table, D_OUT, (b, t, h), n, call.value_dim, w.g, w.ones)
                    hash_block(hash_of(call, m, w), w.q, n, w.phi_q)
                    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                    # out = rho.T @ value_sum
                    project(w.value_sum, w.g, w.rho.shape[0], n, w.d_phi)
                    # rho = weigh(phi_q, mass)
                    weigh_backward(w.d_phi, w.phi_q, w.mass, w.factor, w.rho, call.n_tables, call.bucket_mean, w.d_mass)
                    add_block(w.d_mass, w.rho, w.g, n, w.block_sum, d_sums[index, m])
                    # phi_q = hash_block(q)
                    w.d_q[:] = 0
                    hash_block_backward(hash_of(call, m, w), w.d_phi, w.q, n, w.phi_q, w.d_q, hash_parts[index, m])
                    store(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q)
