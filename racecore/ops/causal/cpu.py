"""Causal attention by segments: Numba kernels; see `reference` for the token-by-token form.

There are two schedules, with the same bits. *In series*: a task takes some heads of a whole
sequence, segment after segment, and carries the state along; everything is read once, or again
while it is still in a cache. *Side by side*, where that would leave cores idle, as for one long
sequence of one head: every segment is a task. Forward, its keys are summed first, a scan over these
sums gives the state before each segment, and then all segments walk at once. Backward, a forward
walk for the queries also sums what each segment adds to the gradients of earlier states; after a
scan from the end, a backward walk is for keys and values. Either way the state before a segment is
a float64 sum of segments' sums, and states are never recovered by subtraction.

Inside a segment the state stays in the registers, piece by piece, while the tokens of a block walk
past it (`ops.causal.scan_tiles`): a token is added, then asks. So causality is strict by
construction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import register_jitable

from racecore import chunking
from racecore.chunking import BLOCK, SEGMENT, TOKENS, count_blocks
from racecore.ops.bidirectional.cpu import new_sums, sum_segments
from racecore.ops.causal.scan_tiles import scan_rows, scan_weights
from racecore.ops.cpu.call import (
    Call,
    empty_hash_parts,
    in_series,
    launch,
    make_call,
    n_buckets_of,
    scan,
)
from racecore.ops.cpu.readout import weigh, weigh_backward
from racecore.ops.cpu.row_io import (
    COPY,
    D_KEY,
    D_OUT,
    D_QUERY,
    D_VALUE,
    OUT,
    QUERY,
    rows_to_write,
    store,
)
from racecore.ops.cpu.scratch import (
    Scratch,
    add_read_mode,
    hash_of,
    hash_read_mode,
    new_partial,
    new_scratch,
    new_states,
    read_keys,
    read_query,
    task_of,
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
    start,
)
from racecore.ops.simd import vectors
from racecore.ops.simd.memory import add_rows, clear_rows, copy_rows, matrices
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
from racecore.ops.simd.tiles import fence
from racecore.ops.simd.vectors import copy, lanes
from racecore.ops.soft_hash.cpu import hash_again, hash_block, hash_block_backward
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import progress
from racecore.runtime.jit import helper, kernel, piece

__all__ = ["causal_scan", "causal_scan_backward"]


def causal_scan(
    part: Problem, sketch: Sketch, out: np.ndarray, keep_checkpoints: bool
) -> list[np.ndarray]:
    """Answer every query from the keys up to its own, into out [B, T, H, V]; `sketch` moves from
    first to final state.

    Returns
    -------
    list of float64 arrays
        The states before every chunk, which the backward pass starts from, or before all of its
        segments where that is affordable; empty unless `keep_checkpoints`.
    """
    checkpoints, keep_all = [], keep_checkpoints and part.keeps_states
    for chunk in chunking.chunks(part, "key"):
        if keep_checkpoints:
            checkpoints.append(new_sums(part, len(chunk)) if keep_all else sketch.flat.copy())
        kept = checkpoints[-1] if keep_all else new_sums(part, 0)
        call = make_call(part, chunk, out=out)
        pieces = in_series(call)
        for rows, part_call in pieces:
            progress.advance(launch(_walk, part_call, kept[rows], sketch.flat, True))
        if not pieces:
            states = kept if keep_all else new_sums(part, len(chunk))
            sum_segments(call, states)
            scan(chunk[:, 0], states, sketch.flat)
            progress.advance(launch(_walk, call, states, sketch.flat, False))
            del states  # before the next chunk asks for as much
    return checkpoints


class Spare(NamedTuple):
    """States of further query heads that share a key head: they start from nothing, and end in a
    place of their own.
    """

    none: np.ndarray  # [S, V], zeros
    none_t: np.ndarray  # [V, S]
    after: np.ndarray  # [S, V]
    after_t: np.ndarray  # [V, S]


@helper
def _new_spare(call: Call) -> Spare:
    two = new_rounded_state(2, n_buckets_of(call), call.value_dim, call.planes.dtype)
    clear_rows(two.value_sum[0], 0, two.value_sum.shape[1])
    clear_rows(two.value_sum_t[0], 0, two.value_sum_t.shape[1])
    return Spare(two.value_sum[0], two.value_sum_t[0], two.value_sum[1], two.value_sum_t[1])


@helper
def _add_to(state: np.ndarray, more: np.ndarray) -> None:
    """state += more, of matrices whose rows are whole vectors."""
    for r in range(state.shape[0]):
        for c in range(0, state.shape[1], lanes(state)):
            vectors.store_lanes(
                state, r, c, vectors.load_lanes(state, r, c) + vectors.load_lanes(more, r, c)
            )


@kernel
def _walk(
    call: Call, first: int, last: int, states: np.ndarray, carry: np.ndarray, in_series: bool
) -> None:
    """Walk along segments, each from the state before it, states [n, M, S*(1+V)].

    In series, the state before a run's first segment is in carry [N, M, S*(1+V)], which moves
    along; `states` is written, unless it is empty.
    """
    w, state, spare, partial = (
        new_scratch(call),
        new_states(call),
        _new_spare(call),
        new_partial(call),
    )
    sums = matrices(1, partial.mass.shape[0], carry.shape[2], np.float64)
    for task in range(first, last):
        run, m0, m1 = task_of(call, task)
        for index in range(call.runs[run, 0], call.runs[run, 1]):
            owner = call.segments[index, 0]
            if in_series:
                if states.shape[0] > 0:
                    copy_rows(carry[owner], m0, m1, states[index])
                start(carry[owner], m0, m1, False, state)
                clear_rows(sums[0], 0, m1 - m0)
            else:
                start(states[index], m0, m1, False, state)
            _walk_segment(call, index, m0, m1, state, spare, partial, sums, in_series, w)
            if in_series:
                add_rows(sums[0], m0, m1, carry[owner])
    fence()


@piece
def _walk_segment(
    call: Call,
    index: int,
    m0: int,
    m1: int,
    state: RoundedState,
    spare: Spare,
    partial: Partial,
    sums: np.ndarray,
    in_series: bool,
    w: Scratch,
) -> None:
    """Walk along one segment; `in_series`, add what it amounts to to sums [1, m1 - m0, S*(1+V)]."""
    _, b, begin, end, _ = call.segments[index]
    repeats = call.n_heads // call.beta.shape[0]
    read_mode, v_mode = (
        hash_read_mode(call, 0),
        add_read_mode(w.phi_k.shape[0]) if repeats == 1 else COPY,
    )
    for t in range(begin, end, BLOCK):
        n = min(BLOCK, end - t)
        for m in range(m0, m1):
            i = m - m0
            keys = read_keys(call, b, t, m, n, TOKENS, True, read_mode, v_mode, w)
            hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
            drop_masked(call.mask, w.keep, n, w.phi_k)
            prefix_mass(w.phi_k, state.mass[i], w.weights_t, w.answers_t, w.mass)
            before = state.value_sum[i]
            for h in range(m * repeats, (m + 1) * repeats):
                q, next_q = read_query(call, QUERY, b, t, h, n, TOKENS, read_mode, w.q, w)
                hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
                weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
                after = before if h % repeats == repeats - 1 else spare.after
                o = rows_to_write(call.table, OUT, (b, t, h), call.value_dim, w.o, True, False)
                scan_rows(before, after, w.phi_k, keys.v, w.rho, w.o, o, n, False, keys.next_v)
                store(call.table, OUT, (b, t, h), n, call.value_dim, w.o, o)
            if in_series:
                add_block(w.phi_k, w.phi_k, keys.v, n, i, partial, NO_PREFETCH)
                if group_ends(t, begin, end):
                    flush(partial, i, sums[0, i])


def causal_scan_backward(
    part: Problem,
    checkpoints: list[np.ndarray],
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    """Write all gradients; `d_sketch` moves from the gradient of the final state to that of the
    first one.
    """
    for chunk, checkpoint in zip(
        reversed(chunking.chunks(part, "key")), reversed(checkpoints), strict=True
    ):
        _walk_chunk_backward(part, chunk, checkpoint, d_out, d_sketch, grads)


def _walk_chunk_backward(
    part: Problem,
    chunk: np.ndarray,
    checkpoint: np.ndarray,
    d_out: np.ndarray,
    d_sketch: Sketch,
    grads: GradientBuffers,
) -> None:
    call = make_call(
        part, chunk, d_out=d_out, d_query=grads.query, d_key=grads.key, d_value=grads.value
    )
    states = checkpoint
    if not chunking.have_own_states(part, chunk, len(checkpoint)):
        states = new_sums(part, len(chunk))
        sum_segments(call, states)
        scan(chunk[:, 0], states, checkpoint.copy())
    pieces = in_series(call)
    for rows, part_call in reversed(pieces):
        shares = _new_shares(part, part_call, grads.hash)
        no_stash = np.empty((0, BLOCK), part.dtype)
        n_tokens = launch(
            _walk_backward, part_call, states[rows], d_sketch.flat, no_stash, *shares, True, True
        )
        _add_shares(shares, grads.hash)
        progress.advance(2 * n_tokens)
    if not pieces:
        _walk_side_by_side_backward(part, call, states, d_sketch, grads.hash)


def _walk_side_by_side_backward(
    part: Problem, call: Call, states: np.ndarray, d_sketch: Sketch, d_hash: np.ndarray | None
) -> None:
    shares, d_sums = _new_shares(part, call, d_hash), new_sums(part, len(call.segments))
    lines = count_blocks(call.segments) * part.n_state_heads * _lines_per_head(call)
    stash = np.empty((lines + BLOCK, BLOCK), part.dtype)[:lines]  # transpositions read past the end
    progress.advance(launch(_walk_backward, call, states, d_sums, stash, *shares, True, False))
    # every later token read the sums of this segment
    scan(call.segments[:, 0], d_sums, d_sketch.flat, reverse=True)
    progress.advance(launch(_walk_backward, call, states, d_sums, stash, *shares, False, True))
    _add_shares(shares, d_hash)


def _new_shares(
    part: Problem, call: Call, d_hash: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    return empty_hash_parts(part, call.segments, d_hash), empty_hash_parts(
        part, call.segments, d_hash
    )


def _add_shares(shares: tuple[np.ndarray, np.ndarray], d_hash: np.ndarray | None) -> None:
    """Add what segments contribute to the gradients of the hash, by queries and by keys."""
    if d_hash is not None:
        for side, parts in enumerate(shares):
            scan(np.zeros(len(parts), np.int64), parts, d_hash[side : side + 1], reverse=True)


@register_jitable
def _lines_per_head(call: Call) -> int:
    """Return the lines of a stash, BLOCK numbers each, for the tokens of one block and one state
    head.

    The walk for queries leaves there what the walk for keys needs: tanh(u) of the keys, and rho and
    d_mass of each query head.
    """
    return call.planes.shape[1] + 2 * (call.n_heads // call.beta.shape[0]) * n_buckets_of(call)


@kernel
def _walk_backward(
    call: Call,
    first: int,
    last: int,
    states: np.ndarray,
    d_states: np.ndarray,
    stash: np.ndarray,
    hash_q: np.ndarray,
    hash_k: np.ndarray,
    queries: bool,
    keys: bool,
) -> None:
    """Walk along segments and back, from the states before them, states [n, M, S*(1+V)].

    First for `queries`: sums into d_states [n, M, S*(1+V)] what each segment adds to the gradients
    of earlier states, and leaves a stash for the second pass. Then for `keys`: d_states is the
    gradient of the state after each segment. If both at once, runs go from their last segment to
    their first, and d_states [N, M, S*(1+V)] moves along.
    """
    w, state, spare, partial = (
        new_scratch(call),
        new_states(call),
        _new_spare(call),
        new_partial(call),
    )
    in_series = queries and keys
    heads = partial.mass.shape[0]
    own_sums = matrices(1, heads, d_states.shape[2], np.float64)
    own_stash = matrices(
        1, SEGMENT // BLOCK * heads * _lines_per_head(call) if in_series else 0, TOKENS, stash.dtype
    )[0]
    for task in range(first, last):
        run, m0, m1 = task_of(call, task)
        for index in range(call.runs[run, 1] - 1, call.runs[run, 0] - 1, -1):
            owner, block = call.segments[index, 0], call.segments[index, 4]
            if in_series:
                place = Stash(own_stash, 0, heads, m0)
            else:
                place = Stash(stash, block, call.beta.shape[0], 0)
            if queries:
                sums, line = (own_sums, 0) if in_series else (d_states, index)
                shift = m0 if in_series else 0
                clear_rows(sums[line], m0 - shift, m1 - shift)
                clear_rows(hash_q[index], m0, m1)
                start(states[index], m0, m1, True, state)
                _walk_queries(
                    call,
                    index,
                    m0,
                    m1,
                    state,
                    spare,
                    partial,
                    place,
                    sums[line],
                    shift,
                    hash_q[index],
                    w,
                )
            if keys:
                clear_rows(hash_k[index], m0, m1)
                start(d_states[owner if in_series else index], m0, m1, True, state)
                _walk_keys(call, index, m0, m1, state, spare, place, hash_k[index], w)
            if in_series:
                add_rows(
                    own_sums[0], m0, m1, d_states[owner]
                )  # every later token read the sums of this segment
    fence()


class Stash(NamedTuple):
    """What the walk for queries leaves for the walk for keys, see `_lines_per_head`."""

    lines: np.ndarray  # [blocks * heads * lines per head, BLOCK]
    first_block: int
    n_heads: int
    first_head: int


@helper
def _part_of(stash: Stash, block: int, m: int, per_head: int, first: int, n: int) -> np.ndarray:
    """Return n of the lines of a block and a state head, from `first` on."""
    line = ((stash.first_block + block) * stash.n_heads + m - stash.first_head) * per_head + first
    return stash.lines[line : line + n]


@piece
def _walk_queries(
    call: Call,
    index: int,
    m0: int,
    m1: int,
    state: RoundedState,
    spare: Spare,
    partial: Partial,
    stash: Stash,
    d_sums: np.ndarray,
    shift: int,
    d_hash: np.ndarray,
    w: Scratch,
) -> None:
    """Walk forward again for the gradients of queries; stash rho and d_mass of every token, sum
    them in d_sums[m - shift].
    """
    _, b, begin, end, _ = call.segments[index]
    repeats, n_buckets, n_rows, per_head = _sizes(call)
    read_mode = hash_read_mode(call, d_hash.shape[1])
    for t in range(begin, end, BLOCK):
        n, block = min(BLOCK, end - t), (t - begin) // BLOCK
        for m in range(m0, m1):
            i = m - m0
            keys = read_keys(call, b, t, m, n, TOKENS, True, read_mode, COPY, w)
            hash_block(hash_of(call, m, w), keys.k, n, w.phi_k, keys.next_k)
            copy(w.factors[0, :n_rows], _part_of(stash, block, m, per_head, 0, n_rows))
            drop_masked(call.mask, w.keep, n, w.phi_k)
            prefix_mass(w.phi_k, state.mass[i], w.weights_t, w.answers_t, w.mass)
            for r in range(repeats):
                h = m * repeats + r
                after_t = state.value_sum_t[i] if r == repeats - 1 else spare.after_t
                q = _read_block_backward(
                    call, (b, t, h), n, state.value_sum_t[i], after_t, keys.next_v, read_mode, w
                )
                line = n_rows + 2 * r * n_buckets
                copy(w.rho, _part_of(stash, block, m, per_head, line, n_buckets))
                copy(w.d_mass, _part_of(stash, block, m, per_head, line + n_buckets, n_buckets))
                # sums of these are what earlier keys and values of the sequence get
                add_block(w.d_mass, w.rho, input_rows(w.g), n, i, partial, NO_PREFETCH)
                # phi_q = hash_block(q)
                d_q = rows_to_write(
                    call.table, D_QUERY, (b, t, h), call.head_dim, w.d_q, True, False
                )
                hash_block_backward(hash_of(call, m, w), w.d_phi, q, n, w.phi_q, d_q, d_hash[m])
                store(call.table, D_QUERY, (b, t, h), n, call.head_dim, w.d_q, d_q)
            if group_ends(t, begin, end):
                flush(partial, i, d_sums[m - shift])


@helper
def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Return the query heads per state head, S, L*P, and the lines of a stash per head."""
    return (
        call.n_heads // call.beta.shape[0],
        n_buckets_of(call),
        call.planes.shape[1],
        _lines_per_head(call),
    )


@piece
def _read_block_backward(
    call: Call,
    place: tuple[int, int, int],
    n: int,
    before_t: np.ndarray,
    after_t: np.ndarray,
    next_v: PrefetchRows,
    read_mode: int,
    w: Scratch,
) -> InputRows:
    """Read queries and d_out of one block, walk over it, and invert the read-out: fills rho, d_mass
    and d_phi.

    Returns the queries.
    """
    b, t, h = place
    m = h * call.beta.shape[0] // call.n_heads
    q, next_q = read_query(call, QUERY, b, t, h, n, TOKENS, read_mode, w.q, w)
    _, next_g = read_query(call, D_OUT, b, t, h, n, TOKENS, COPY, w.g, w)
    hash_block(hash_of(call, m, w), q, n, w.phi_q, next_q)
    weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
    # o[i] = sum_s rho[s, i] * value_sum[s], after token i was added
    n_buckets = w.rho.shape[0]
    prefetch_rows(next_v, 0, n // 2)
    c = output_rows(w.answers_t, False)
    scan_weights(before_t, after_t, w.weights_t, w.v, w.g, c, n_buckets, n, False, next_g)
    transpose(w.answers_t, TOKENS, n_buckets, w.d_phi)
    prefetch_rows(next_v, n // 2, n)
    # rho = weigh(phi_q, mass)
    weigh_backward(
        w.d_phi, w.phi_q, w.mass, w.factor, w.rho, call.n_tables, call.bucket_mean, w.d_mass
    )
    clear_after(n, w.d_mass)
    return q


@piece
def _walk_keys(
    call: Call,
    index: int,
    m0: int,
    m1: int,
    d_state: RoundedState,
    spare: Spare,
    stash: Stash,
    d_hash: np.ndarray,
    w: Scratch,
) -> None:
    """Walk backward for the gradients of keys and values, from the gradient of the state after the
    segment.
    """
    _, b, begin, end, _ = call.segments[index]
    repeats, n_buckets, n_rows, per_head = _sizes(call)
    heads = call.beta.shape[0] // call.n_kv_heads
    read_mode, wants_planes = hash_read_mode(call, d_hash.shape[1]), d_hash.shape[1] > 1
    for block in range((end - begin - 1) // BLOCK, -1, -1):
        t = begin + block * BLOCK
        n = min(BLOCK, end - t)
        for m in range(m0, m1):
            g, share = m // heads, m % heads
            keys = read_keys(call, b, t, m, n, -TOKENS, wants_planes, read_mode, COPY, w)
            prefetch_rows(keys.next_k, 0, n)
            hash_again(
                hash_of(call, m, w), _part_of(stash, block, m, per_head, 0, n_rows), n, w.phi_k
            )
            drop_masked(call.mask, w.keep, n, w.phi_k)
            d_v = rows_to_write(
                call.table, D_VALUE, (b, t, g), call.value_dim, w.d_v, heads * repeats == 1, False
            )
            for r in range(repeats):
                line = n_rows + 2 * r * n_buckets
                _, next_g = read_query(call, D_OUT, b, t, m * repeats + r, n, -TOKENS, COPY, w.g, w)
                rho = _part_of(stash, block, m, per_head, line, n_buckets)
                _ask_gradients(
                    rho, d_v, d_state, m - m0, r, share == 0, n, spare, keys.next_v, next_g, w
                )
            # what queries from this token on divide by: mass += phi_k
            for r in range(repeats):
                d_mass = _part_of(
                    stash, block, m, per_head, n_rows + (2 * r + 1) * n_buckets, n_buckets
                )
                prefix_mass_backward(d_mass, r == 0, w.weights_t, d_state.mass[m - m0], w.answers_t)
            transpose(w.answers_t, TOKENS, n_buckets, w.d_phi)
            # phi_k = hash_block(k)
            d_k = rows_to_write(
                call.table, D_KEY, (b, t, g), call.head_dim, w.d_k, heads == 1, share > 0
            )
            hash_block_backward(hash_of(call, m, w), w.d_phi, keys.k, n, w.phi_k, d_k, d_hash[m])
            if share == heads - 1:
                store(call.table, D_KEY, (b, t, g), n, call.head_dim, w.d_k, d_k)
                store(call.table, D_VALUE, (b, t, g), n, call.value_dim, w.d_v, d_v)


@piece
def _ask_gradients(
    rho: np.ndarray,
    d_v: OutputRows,
    d_state: RoundedState,
    i: int,
    r: int,
    first_share: bool,
    n: int,
    spare: Spare,
    next_v: PrefetchRows,
    next_g: PrefetchRows,
    w: Scratch,
) -> None:
    """Add query head r's block to the gradient of state i, and its answers to d_v and to answers_t
    (of d_phi).

    The first query head continues from the state; each other one starts from nothing and is added
    to the state at last.
    """
    n_buckets = rho.shape[0]
    transpose(rho, n_buckets, TOKENS, w.weights_t)
    state, state_t = d_state.value_sum[i], d_state.value_sum_t[i]
    before, before_t = (state, state_t) if r == 0 else (spare.none, spare.none_t)
    after, after_t = (state, state_t) if r == 0 else (spare.after, spare.after_t)
    # value_sum[s] += phi_k[s, i] * v[i], read with rho by this query and all later ones
    if r > 0 or not first_share:
        d_v = output_rows(w.d_v, True)
    scan_rows(before, after, rho, input_rows(w.g), w.phi_k, w.d_v, d_v, n, True, next_v)
    c = output_rows(w.answers_t, r > 0)
    scan_weights(before_t, after_t, w.weights_t, w.g, w.v, c, n_buckets, n, True, next_g)
    if r > 0:
        _add_to(state, after)
        _add_to(state_t, after_t)
