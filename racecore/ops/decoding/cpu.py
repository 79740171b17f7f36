"""One token at a time: a kernel that reads and writes each number of a state once; see `reference`.

A state is far larger than everything else of a token, so its memory sets the time. While a row of
the state is in registers, the key's value is added to it and it is read out for all query heads of
its group. The heads of a token are hashed in one block, as the tokens of a head are elsewhere: here
the table's "tokens" are heads. Sums and products are the same, in the same order, as those of
`bidirectional.sum_keys` followed by `read_out`, and so are the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from racecore.chunking import BLOCK, TOKENS
from racecore.ops.cpu.call import Call, n_buckets_of, new_call
from racecore.ops.cpu.read_modes import COPIES
from racecore.ops.cpu.readout import weigh
from racecore.ops.cpu.row_io import KEY, OUT, QUERY, VALUE, describe, load_rows, store_rows
from racecore.ops.cpu.scratch import task_of
from racecore.ops.cpu.states import load_keep
from racecore.ops.simd.accumulators import add_at
from racecore.ops.simd.memory import clear_columns, cleared_matrices, matrices
from racecore.ops.simd.products import NO_PREFETCH, input_rows, output_rows, padded
from racecore.ops.simd.tiles import fence
from racecore.ops.simd.vectors import fma, lanes, load_lanes, splat, store_lanes
from racecore.ops.soft_hash.cpu import Hash, hash_block, new_hash_arrays
from racecore.problem import Problem, Sketch
from racecore.runtime import progress
from racecore.runtime.jit import helper, kernel, piece
from racecore.runtime.threads import run

__all__ = ["step"]

_BYTES_AT_ONCE = 1 << 22  # of states: less is done before another thread has woken up
_NO_RUNS = np.zeros((0, 2), np.int64)


def step(part: Problem, sketch: Sketch, lengths: np.ndarray, out: np.ndarray) -> None:
    """Add the key and value of every sequence that has one to `sketch`, then write the output of
    its query to out [B, 1, H, V].

    `sketch` may be float32, and is rounded to it before it is read out. `lengths` [N] counts the
    keys that take part. Sequences without a token keep their bits; their rows of `out` are not
    written.
    """
    # before the work: should the listener raise, nothing has happened yet
    progress.advance(len(part.sequences))
    if len(part.sequences) == 0:
        return
    hashed_at_once, call = _make_call(part, sketch, out)
    n_tasks = len(part.sequences) * -(-part.n_kv_heads // call.kv_heads_per_task)
    done = np.zeros(n_tasks, np.uint8)
    per_launch = max(1, _BYTES_AT_ONCE * n_tasks // sketch.flat.nbytes)

    def work(first: int, last: int) -> None:
        _step(call, first, last, hashed_at_once, sketch.flat, lengths, done)

    _run_to_the_end(work, n_tasks, per_launch)


def _run_to_the_end(work: Callable[[int, int], object], n_tasks: int, per_launch: int) -> None:
    """Run all tasks, even if a signal raises meanwhile: no step is left half done."""
    try:
        run(work, n_tasks, per_launch)
    except BaseException:
        work(0, n_tasks)  # skips those that are done
        raise


def _make_call(part: Problem, sketch: Sketch, out: np.ndarray) -> tuple[int, Call]:
    """Return the state heads that are hashed together, and the arguments, with heads for tokens."""
    if part.query is None or part.key is None or part.value is None:
        raise TypeError("a step needs a query, a key and a value")
    shared = part.planes.strides[0] == 0 and part.beta.strides[0] == 0
    head_bytes = sketch.flat.nbytes // (len(part.sequences) * part.n_kv_heads)
    fit = min(
        BLOCK * part.n_kv_heads // part.n_heads, _BYTES_AT_ONCE // head_bytes, part.n_kv_heads
    )
    heads = max(1, fit) if shared else 1
    by_head = (x.swapaxes(1, 2) for x in (part.query, part.key, part.value, out))
    return heads, new_call(part, describe(*by_head), part.sequences, _NO_RUNS, heads, COPIES)


class StepScratch(NamedTuple):
    """The arrays of one launch, with heads as their rows [BLOCK, D or V] and last axis [S, BLOCK];
    D and V are padded.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    o: np.ndarray
    keep: np.ndarray  # [1, BLOCK]: 1 where the token takes part, else 0
    ones: np.ndarray
    phi_q: np.ndarray
    phi_k: np.ndarray
    mass: np.ndarray
    factor: np.ndarray
    rho: np.ndarray
    factors: np.ndarray  # this and the next three: see Hash
    d_u: np.ndarray
    d_planes: np.ndarray
    u_t: np.ndarray


@helper
def _new_scratch(call: Call) -> StepScratch:
    dtype = call.planes.dtype
    n_rows, wide_d = call.planes.shape[1:]
    x, y = matrices(2, TOKENS, wide_d, dtype), matrices(2, TOKENS, padded(call.value_dim), dtype)
    for i in range(2):
        clear_columns(x[i], call.head_dim)
        clear_columns(y[i], call.value_dim)
    ones, c = matrices(2, 1, TOKENS, dtype), matrices(5, n_buckets_of(call), TOKENS, dtype)
    for i in range(BLOCK):
        ones[0, 0, i] = ones[1, 0, i] = 1
    return StepScratch(
        x[0],
        x[1],
        y[0],
        y[1],
        ones[0],
        ones[1][0],
        c[0],
        c[1],
        c[2],
        c[3],
        c[4],
        *new_hash_arrays(n_rows, wide_d, dtype),
    )


@kernel
def _step(
    call: Call,
    first: int,
    last: int,
    hashed_at_once: int,
    states: np.ndarray,
    lengths: np.ndarray,
    done: np.ndarray,
) -> None:
    """Do the tasks first ... last - 1 that are not `done` [tasks]; states [N, M, S*(1+V)].

    A task is some heads of a sequence.
    """
    w = _new_scratch(call)
    tail = cleared_matrices(1, 2, TOKENS, states.dtype)[0]
    for task in range(first, last):
        if done[task] != 0:
            continue
        n, m0, m1 = task_of(call, task)
        b, begin, end = call.segments[n, 0], call.segments[n, 1], call.segments[n, 2]
        if begin < end:
            load_keep(call.mask, b, begin, 1, w.keep)
            if m0 == 0:
                lengths[n] += np.int64(w.keep[0, 0])
            for m in range(m0, m1, hashed_at_once):
                _step_heads(call, b, m, min(hashed_at_once, m1 - m), states[n], tail, w)
        done[task] = 1
    fence()


@piece
def _step_heads(
    call: Call, b: int, m: int, n: int, states: np.ndarray, tail: np.ndarray, w: StepScratch
) -> None:
    """Do n state heads from m on, whose keys share a hash and are neighbours."""
    planes = m if call.planes.shape[0] > 1 else 0  # 0 where all heads share them
    f = Hash(
        call.planes[planes],
        call.planes_t[planes],
        call.beta[m],
        call.n_tables,
        w.factors,
        w.d_u,
        w.d_planes,
        w.u_t,
    )
    g, repeats = m // (call.beta.shape[0] // call.n_kv_heads), call.n_heads // call.beta.shape[0]
    keep = w.keep[0, 0]
    for i in range(n):
        w.keep[0, i] = keep
    load_rows(call.table, KEY, (b, g, 0), n, call.head_dim, w.k, w.keep[0])
    load_rows(call.table, VALUE, (b, g, 0), n, call.value_dim, w.v, w.keep[0])
    hash_block(f, input_rows(w.k), n, w.phi_k, NO_PREFETCH)
    for i in range(n):
        for s in range(w.phi_k.shape[0]):
            w.phi_k[s, i] *= keep
            states[m + i, s] += np.float64(w.phi_k[s, i])
    for h in range(0, n * repeats, BLOCK):
        rows = min(BLOCK, n * repeats - h)
        load_rows(call.table, QUERY, (b, m * repeats + h, 0), rows, call.head_dim, w.q, w.ones)
        hash_block(f, input_rows(w.q), rows, w.phi_q, NO_PREFETCH)
        _gather_mass(states, m, n, rows // n, w.mass)
        weigh(w.phi_q, w.mass, call.n_tables, call.bucket_mean, w.factor, w.rho)
        for i in range(n):
            _step_values(states[m + i], i, rows // n, tail, w)
        store_rows(
            call.table,
            OUT,
            (b, m * repeats + h, 0),
            rows,
            call.value_dim,
            w.o,
            output_rows(w.o, False),
        )
        # a group of more query heads than a block reads the state out again: it adds nothing then
        for s in range(w.phi_k.shape[0]):
            w.phi_k[s, 0] = 0


@helper
def _gather_mass(states: np.ndarray, m: int, n: int, per_state: int, mass: np.ndarray) -> None:
    """Fill mass [S, n * per_state] with the masses of the state that each query head reads."""
    for s in range(mass.shape[0]):
        for i in range(n):
            value = mass.dtype.type(states[m + i, s])
            for j in range(i * per_state, (i + 1) * per_state):
                mass[s, j] = value


@helper
def _step_values(
    state: np.ndarray, i: int, per_state: int, tail: np.ndarray, w: StepScratch
) -> None:
    """value_sum += phi_k[:, i] * v[i], and o[j] = sum_s rho[s, j] * value_sum[s] for its query
    heads j; state [S*(1+V)].
    """
    n_buckets, wide = w.phi_k.shape[0], w.o.shape[1]
    width = state.shape[0] // n_buckets - 1
    whole = width // lanes(w.o) * lanes(w.o)
    for j in range(i * per_state, (i + 1) * per_state):
        for d in range(wide):
            w.o[j, d] = 0
    # buckets outside: memory is read once and in its order; S = L * 2^P is even
    for s in range(0, n_buckets, 2):
        first, second = n_buckets + s * width, n_buckets + (s + 1) * width
        start, step = state.ctypes.data, state.itemsize
        for d in range(0, whole, lanes(w.o)):
            _step_vector(
                start + step * (first + d),
                start + step * (second + d),
                state.dtype.type(0),
                i,
                per_state,
                s,
                d,
                w,
            )
        if whole < width:
            for d in range(whole, width):
                tail[0, d - whole], tail[1, d - whole] = state[first + d], state[second + d]
            addresses = tail.ctypes.data, tail.ctypes.data + step * tail.shape[1]
            _step_vector(addresses[0], addresses[1], state.dtype.type(0), i, per_state, s, whole, w)
            for d in range(whole, width):
                state[first + d], state[second + d] = tail[0, d - whole], tail[1, d - whole]


@helper
def _step_vector(
    address: int,
    next_address: int,
    like: Any,
    i: int,
    per_state: int,
    s: int,
    d: int,
    w: StepScratch,
) -> None:
    """Add to the columns from d on of buckets s and s + 1, at two addresses, and read them out: two
    buckets for one load and store of the output.
    """
    v, zero = load_lanes(w.v, i, d), splat(w.o.dtype.type(0))
    # c * v + 0 and not c * v: a product might fuse with the sum, and `append` rounds it before
    sums = add_at(fma(splat(w.phi_k[s, i]), v, zero), address, like)
    next_sums = add_at(fma(splat(w.phi_k[s + 1, i]), v, zero), next_address, like)
    for j in range(i * per_state, (i + 1) * per_state):
        o = fma(splat(w.rho[s, j]), sums, load_lanes(w.o, j, d))
        store_lanes(w.o, j, d, fma(splat(w.rho[s + 1, j]), next_sums, o))
