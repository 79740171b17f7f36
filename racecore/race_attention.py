"""RACE attention and its gradient: the pipeline, readable from top to bottom.

check the arguments -> choose a backend -> cut into parts -> per part: sum keys and read out, or
causal scan -> the caller's kind of array. Backward takes the same parts, causal ones in reverse,
and recomputes the hash; beyond the inputs only states are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from racecore import backends, chunking, gradient_inputs, inputs, outputs
from racecore.gradients import (
    Gradients,
    Saved,
    gradient_buffers,
    hash_gradients,
    readable,
    state_gradient,
)
from racecore.inputs import Passed
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import arrays
from racecore.soft_lsh import SoftLSH
from racecore.state import RaceState
from racecore.state.continuation import check_initial_state, final_state, lsh_of

__all__ = ["attention", "attention_backward", "attention_forward"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    lsh: SoftLSH | None = None,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    initial_state: RaceState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str | None = None,
    out: np.ndarray | None = None,
) -> Any:
    """Compute RACE attention: linear time, a state of constant size.

    Parameters
    ----------
    query : array, shape [B, Tq, H, D]
    key : array, shape [B, Tk, G, D]
    value : array, shape [B, Tk, G, V]
        Tokens come before heads, unlike in PyTorch's ``scaled_dot_product_attention``. NumPy
        arrays, CuPy arrays, or arrays of any library that speaks DLPack; all of one dtype: float16,
        bfloat16, float32 or float64. 3-D arrays mean that B is absent. H must be a multiple of G
        (grouped queries). Any strides are legal, inputs are never written to. Rows are neither
        normalised nor divided by sqrt(D) before they are hashed.
    lsh : SoftLSH, optional
        The hash. None means the one of `initial_state` if there is one, else
        ``SoftLSH.random(head_dim=D, n_tables=4, n_planes=4, beta=1.0, rng=0)``.
    is_causal : bool
        Query i sees keys 0 ... i only; needs Tq == Tk.
    readout : {"ratio", "bucket_mean"}
        "ratio" divides the weighted sum of values by the summed weight (the paper's Algorithms 1
        and 2). "bucket_mean" averages over tables the mean values of the buckets, each weighted
        with the query's probability, with eps = 1e-6 (the authors' released kernels, which return L
        times this).
    key_mask : bool array, shape [B, Tk], optional
        True = the key takes part. Masked keys and values are not read, so NaN there has no effect.
    cu_seqlens : integers, shape [n + 1], optional
        Boundaries of n sequences packed along the token axis (B is 1 or absent): starts at 0, ends
        at T, does not decrease. Not together with `key_mask`.
    initial_state : RaceState, optional
        State before the first token: its tokens are seen by every query. Its batch is B, or n with
        `cu_seqlens`. It is not changed.
    return_state : bool
        Also return the state after the last token.
    chunk_size : int, optional
        Tokens in flight, rounded up to whole segments of 1,024. It bounds temporary memory and
        never changes a bit.
    memory_limit : int or str, optional
        The same bound as bytes of temporary memory, such as "512MB". At most one of the two.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the fastest for the device of the arrays. "cuda" also takes arrays in host
        memory: they are copied to the GPU, and results are copied back.
    out : array, optional
        Array for the result: of NumPy, or of CuPy if the computation is on a GPU.

    Returns
    -------
    out : array, shape [B, Tq, H, V]
        In the query's dtype and library. Zero if a query sees no key.
    state : RaceState
        Only if `return_state`.

    Raises
    ------
    ValueError, TypeError
        The message says what was expected, what came and what to do. Nothing has been changed.
    racecore.errors.BackendUnavailableError
        The backend cannot run here; lists every backend with its reason.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithm 1 (bidirectional) and Algorithm 2 (causal).
    Arithmetic is float32 (float64 for float64 inputs); sums over tokens are carried in float64.
    Results have the same bits for any number of threads, chunk size and memory limit.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1000, 2, 16), dtype=np.float32) for _ in range(3))
    >>> attention(q, k, v, is_causal=True).shape
    (1000, 2, 16)
    """
    passed = Passed.resolve(query, key, value, backends.needs_device(backend))
    problem, lsh = inputs.check_attention(
        passed,
        lsh_of(lsh, initial_state),
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
    )
    check_initial_state(initial_state, problem, lsh)
    chosen = backends.choose(backend, problem.on_device)
    result, rows, give_back = _result_array(out, problem, passed, initial_state)
    final, _ = _forward(problem, chosen, initial_state, rows, needs_final=return_state, save=False)
    if final is None:
        return give_back(result)
    final = final.to_device(passed.query.on_device)
    return give_back(result), final_state(initial_state, final, problem, lsh)


def attention_forward(
    query: Any,
    key: Any,
    value: Any,
    lsh: SoftLSH | None = None,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    initial_state: RaceState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str | None = None,
    out: np.ndarray | None = None,
    wrt: Any = None,
) -> tuple[Any, ...]:
    """Compute RACE attention; also return the `Saved` for `attention_backward`.

    Parameters
    ----------
    query, key, value, lsh, is_causal, readout, key_mask, cu_seqlens
        As for `attention`.
    initial_state, return_state, chunk_size, memory_limit, backend, out
        As for `attention`.
    wrt : str or sequence of str, optional
        Names of the gradients to compute later: "query", "key", "value", "planes", "beta", "state".
        None means all (the state's only if `initial_state` is given). Fewer can be cheaper.

    Returns
    -------
    out : array, shape [B, Tq, H, V]
    saved : Saved
        Refers to the inputs (do not change them before backward) and holds states at the boundaries
        of chunks.
    state : RaceState
        Only if `return_state`.

    Raises
    ------
    ValueError, TypeError, racecore.errors.BackendUnavailableError
        As for `attention`.
    """
    wanted = gradient_inputs.check_wrt(wrt, initial_state is not None)
    passed = Passed.resolve(query, key, value, backends.needs_device(backend))
    problem, lsh = inputs.check_attention(
        passed,
        lsh_of(lsh, initial_state),
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
    )
    check_initial_state(initial_state, problem, lsh)
    chosen = backends.choose(backend, problem.on_device)
    result, rows, give_back = _result_array(out, problem, passed, initial_state)
    final, states = _forward(
        problem, chosen, initial_state, rows, needs_final=return_state, save=True
    )
    initial = None
    if initial_state is not None:
        initial = initial_state.sketch.copy().to_device(problem.on_device)
    saved = Saved(problem, lsh, wanted, chosen.name, tuple(states), initial, passed)
    if final is None:
        return give_back(result), saved
    final = final.to_device(passed.query.on_device)
    return give_back(result), saved, final_state(initial_state, final, problem, lsh)


def attention_backward(
    d_out: Any,
    saved: Saved,
    *,
    d_state: Any = None,
    out: Any = None,
    overwrite_inputs: bool = False,
) -> Gradients:
    """Compute the gradients of an `attention_forward`.

    Parameters
    ----------
    d_out : array, shape [B, Tq, H, V]
        Gradient of the output, in any supported dtype.
    saved : Saved
        From `attention_forward`. May be used more than once.
    d_state : object with .mass and .value_sum, optional
        Gradient of the final state, shaped as that state.
    out : object with .query, .key and .value, optional
        Arrays to write those gradients to, such as a `Gradients`; None entries are allocated.
    overwrite_inputs : bool
        Write the gradients of query, key and value over these arrays themselves, which must be on a
        GPU: for sequences that fill its memory. `saved` cannot be used again.

    Returns
    -------
    Gradients
        query, key and value in the query's dtype and library; planes, beta and state in float64.

    Raises
    ------
    ValueError, TypeError
        The message says what was expected, what came and what to do.

    Notes
    -----
    Derived by hand; see docs/math. Rows that see no key have zero gradients.
    """
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved must come from racecore.attention_forward, got {type(saved).__qualname__}"
        )
    problem, wrt, passed = saved.problem, saved.wrt, saved.caller
    g = gradient_inputs.check_d_out(d_out, passed.query, problem)
    d_final = gradient_inputs.check_d_state(d_state, problem)
    results, grads = gradient_buffers(saved, out, (d_out, g), overwrite_inputs)
    give_back = [x.way_back() for x in passed]
    # [N, M, S*(1+V)], filled by _backward
    d_initial = problem.new_sketch() if "state" in wrt else None
    _backward(saved, g, d_final, d_initial, grads)
    query, key, value = (
        None if array is None else back(array)
        for array, back in zip(results, give_back, strict=True)
    )
    # the caller's arrays may be in host memory and the computation on a GPU
    d_hash, state = grads.hash, None
    if d_hash is not None and not passed.query.on_device:
        d_hash = arrays.to_device(d_hash, False)
    planes, beta = hash_gradients(d_hash, problem, saved.lsh, wrt)
    if d_initial is not None:
        state = state_gradient(d_initial.to_device(passed.query.on_device), saved.lsh)
    return Gradients(query, key, value, planes, beta, state)


def _forward(
    problem: Problem,
    backend: backends.Backend,
    initial_state: RaceState | None,
    out: np.ndarray,
    *,
    needs_final: bool,
    save: bool,
) -> tuple[Sketch | None, list[list[np.ndarray] | None]]:
    """Compute part by part; return the final states, if needed, and each part's saved states."""
    first_states = None  # [N, M, S*(1+V)]
    if initial_state is not None:
        first_states = initial_state.sketch.to_device(problem.on_device)
    final = problem.new_sketch() if needs_final else None
    saved: list[list[np.ndarray] | None] = []
    for first, last in chunking.parts(problem):
        part = problem.part(first, last)
        # Many short sequences have many states: backward sums their keys again, which costs less
        # than keeping the states.
        keep = save and last == first + 1
        # a view of the final states, so that nothing is copied at the end
        sketch = final.part(first, last) if final is not None else part.new_sketch()
        if first_states is not None:
            sketch.flat[...] = first_states.flat[first:last]
        if problem.is_causal:
            states = backend.causal.causal_scan(part, sketch, out, keep)
        else:
            backend.bidirectional.sum_keys(part, sketch)
            backend.bidirectional.read_out(part, sketch, out)
            # the caller may change a final state that is returned: backward gets a copy
            states = [sketch.flat if final is None else sketch.flat.copy()] if keep else []
        saved.append(states if keep else None)
    return final, saved


def _backward(
    saved: Saved,
    d_out: np.ndarray,
    d_final: Sketch | None,
    d_initial: Sketch | None,
    grads: GradientBuffers,
) -> None:
    """Compute part by part, in an order of additions that depends on the sequences alone."""
    problem = saved.problem
    backend = backends.choose(saved.backend, problem.on_device)
    # causal: gradients of the hash are added from the last segment to the first, in any parts
    ranges = list(enumerate(chunking.parts(problem)))
    for index, (first, last) in reversed(ranges) if problem.is_causal else ranges:
        part, states = problem.part(first, last), saved.states[index]
        # [n, M, S*(1+V)]: gradient of the final states, in the end that of the initial ones
        d_sketch = part.new_sketch() if d_initial is None else d_initial.part(first, last)
        if d_final is not None:
            d_sketch.flat[...] = d_final.flat[first:last]
        if states is None:
            states = _states_again(saved, part, first, last)
        if problem.is_causal:
            backend.causal.causal_scan_backward(part, states, d_out, d_sketch, grads)
        else:
            sketch = Sketch(states[0], problem.n_buckets)
            backend.bidirectional.read_out_backward(part, sketch, d_out, d_sketch, grads)
            backend.bidirectional.sum_keys_backward(part, d_sketch, grads)


def _states_again(saved: Saved, part: Problem, first: int, last: int) -> list[np.ndarray]:
    """Recompute the states that backward starts from: one per sequence and chunk of a part."""
    sketch = part.new_sketch()
    if saved.initial is not None:
        sketch.flat[...] = saved.initial.flat[first:last]
    operations = backends.choose(saved.backend, part.on_device).bidirectional
    if not part.is_causal:
        operations.sum_keys(part, sketch)
        return [sketch.flat]
    states = [sketch.flat.copy()]
    # more than one chunk only if the part is a single sequence
    for chunk in chunking.chunks(part, "key")[:-1]:
        # sequences have columns: batch, query begin and end, key begin and end
        begin, end = chunk[0, 2], chunk[-1, 3]
        span = np.array([[chunk[0, 1], begin, end, begin, end]])
        operations.sum_keys(replace(part, sequences=span), sketch)
        states.append(sketch.flat.copy())
    return states


def _result_array(
    out: Any, problem: Problem, passed: Passed, initial_state: RaceState | None
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Return the array of the result in the caller's shape, a 4-D view of it, and its way back."""
    sources = readable(problem, passed)
    if initial_state is not None:
        sources.append(("initial_state", initial_state.sketch.flat))
    return outputs.result_array(out, passed.query, problem.out_shape, sources, problem.on_device)
