"""RACE attention and its gradient: the pipeline, readable from top to bottom.

check the arguments -> choose a backend -> cut into parts -> per part: sum keys and read out, or
walk -> the caller's kind of array. Backward walks the same road and recomputes the hash; beyond the
inputs only states are saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from racecore import backends, chunking, inputs
from racecore.gradients import (
    Gradients,
    Saved,
    gradient_buffers,
    hash_gradients,
    out_shape,
    readable,
    state_gradient,
    stored,
)
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import arrays
from racecore.soft_lsh import SoftLSH
from racecore.state.race_state import RaceState, check_initial_state, final_state, lsh_of

__all__ = ["attention", "attention_backward", "attention_forward", "saved_without_forward"]


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
        (grouped queries). Any strides are legal, inputs are never written to. Rows are hashed as
        they come: neither normalised nor divided by sqrt(D).
    lsh : SoftLSH, optional
        The hash. None means that of `initial_state` if there is one, else
        ``SoftLSH.random(head_dim=D, n_tables=4, n_planes=4, beta=1.0, rng=0)``.
    is_causal : bool
        Query i sees keys 0 ... i only; needs Tq == Tk.
    readout : {"ratio", "bucket_mean"}
        "ratio" divides the weighted sum of values by the summed weight (the paper's Algorithms 1
        and 2). "bucket_mean" averages over tables the mean values of the buckets, each weighted
        with the query's probability, with eps = 1e-6 (the authors' released kernels, which return L
        times this).
    key_mask : bool array, shape [B, Tk], optional
        True = the key takes part. What stands under False does not matter, not even NaN.
    cu_seqlens : integers, shape [n + 1], optional
        Boundaries of n sequences packed along the token axis (B is 1 or absent): starts at 0, ends
        at T, does not decrease. Not together with `key_mask`.
    initial_state : RaceState, optional
        What came before the first token: it counts as tokens that every query sees. Its batch is B,
        or n with `cu_seqlens`. It is not changed.
    return_state : bool
        Also return the state after the last token.
    chunk_size : int, optional
        Tokens in flight, rounded up to whole segments of 1,024. Bounds temporary memory, never
        changes a bit.
    memory_limit : int or str, optional
        The same bound as bytes of temporary memory, such as "512MB". At most one of the two.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the fastest that runs where the arrays are. "cuda" also takes arrays in host
        memory: they are copied to the GPU, and results come back.
    out : array, optional
        Where to write the result: a NumPy array, or a CuPy array where the computation is on a GPU.

    Returns
    -------
    out : array, shape [B, Tq, H, V]
        In the query's dtype and library. Zero where a query sees no key.
    state : RaceState
        Only if `return_state`.

    Raises
    ------
    ValueError, TypeError
        What was expected, what came and what to do. Nothing has been changed then.
    racecore.errors.BackendUnavailableError
        The backend cannot run here; lists every backend with its reason.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithm 1 (bidirectional) and Algorithm 2 (causal). Arithmetic is
    float32 (float64 for float64 inputs); sums over tokens are carried in float64. Results have the same bits for any
    number of threads, chunk size and memory limit.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1000, 2, 16), dtype=np.float32) for _ in range(3))
    >>> attention(q, k, v, is_causal=True).shape
    (1000, 2, 16)
    """
    problem, lsh, had_batch = inputs.check_attention(
        query,
        key,
        value,
        lsh_of(lsh, initial_state),
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        on_device=backends.needs_device(backend),
    )
    check_initial_state(initial_state, problem, lsh)
    chosen = backends.choose(backend, problem.on_device)
    result, result_4d, restore = _prepare_out(
        out, problem, had_batch, (query, key, value), initial_state
    )
    final, _ = _forward(
        problem, chosen, initial_state, result_4d, needs_final=return_state, save=False
    )
    if final is not None:
        return restore(result), final_state(
            initial_state, final.to_device(arrays.is_on_device(query)), problem, lsh
        )
    return restore(result)


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
    """Compute RACE attention and keep what `attention_backward` needs.

    Parameters
    ----------
    query, key, value, lsh, is_causal, readout, key_mask, cu_seqlens, initial_state, return_state, chunk_size, \
memory_limit, backend, out
        As for `attention`.
    wrt : str or sequence of str, optional
        Which gradients will be wanted, of "query", "key", "value", "planes", "beta", "state". None
        means all (the state's only where `initial_state` is given). Fewer can be cheaper.

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
    wanted = inputs.check_wrt(wrt, initial_state is not None)
    problem, lsh, had_batch = inputs.check_attention(
        query,
        key,
        value,
        lsh_of(lsh, initial_state),
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        on_device=backends.needs_device(backend),
    )
    check_initial_state(initial_state, problem, lsh)
    chosen = backends.choose(backend, problem.on_device)
    result, result_4d, restore = _prepare_out(
        out, problem, had_batch, (query, key, value), initial_state
    )
    final, states = _forward(
        problem, chosen, initial_state, result_4d, needs_final=return_state, save=True
    )
    initial = (
        None if initial_state is None else initial_state.sketch.copy().to_device(problem.on_device)
    )
    saved = Saved(problem, lsh, wanted, chosen.name, tuple(states), initial, (query, key, value))
    if final is not None:
        final = final.to_device(saved.are_on_device)
        return restore(result), saved, final_state(initial_state, final, problem, lsh)
    return restore(result), saved


def attention_backward(
    d_out: Any,
    saved: Saved,
    *,
    d_state: Any = None,
    out: Any = None,
    overwrite_inputs: bool = False,
) -> Gradients:
    """Compute the gradients of what `attention_forward` computed.

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
        What was expected, what came and what to do.

    Notes
    -----
    Derived by hand; see docs/math. Rows that see no key have zero gradients.
    """
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved must come from racecore.attention_forward, got {type(saved).__qualname__}"
        )
    problem, wrt = saved.problem, saved.wrt
    shape = out_shape(problem, saved.had_batch)
    g = inputs.check_d_out(d_out, shape, stored(problem.query).dtype, problem.on_device)
    g = g.reshape(out_shape(problem, True))
    d_final = inputs.check_d_state(d_state, problem)
    results, grads = gradient_buffers(saved, out, (d_out, g), overwrite_inputs)
    d_initial = problem.new_sketch() if "state" in wrt else None
    _backward(saved, g, d_final, d_initial, grads)
    restore = [arrays.restorer(source) for source in saved.sources]
    query, key, value = (
        None if array is None else put(array) for array, put in zip(results, restore, strict=True)
    )
    d_hash = (
        grads.hash
        if grads.hash is None or saved.are_on_device
        else arrays.to_device(grads.hash, False)
    )
    planes, beta = hash_gradients(d_hash, problem, saved.lsh, wrt)
    state = (
        None
        if d_initial is None
        else state_gradient(d_initial.to_device(saved.are_on_device), saved.lsh)
    )
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
    """Run part by part. Return the final states if they are wanted, and what to save for every
    part.
    """
    first_states = (
        None if initial_state is None else initial_state.sketch.to_device(problem.on_device)
    )
    final = problem.new_sketch() if needs_final else None
    saved: list[list[np.ndarray] | None] = []
    for first, last in chunking.parts(problem):
        part = problem.part(first, last)
        # Many short sequences have many states: summing their keys again costs less than keeping
        # those.
        keep = save and last == first + 1
        sketch = final.part(first, last) if final is not None else part.new_sketch()
        if first_states is not None:
            sketch.flat[...] = first_states.flat[first:last]
        if problem.is_causal:
            states = backend.causal.causal_scan(part, sketch, out, keep)
        else:
            backend.bidirectional.sum_keys(part, sketch)
            backend.bidirectional.read_out(part, sketch, out)
            states = [sketch.flat if final is None else sketch.flat.copy()] if keep else []
        saved.append(states if keep else None)
    return final, saved


def saved_without_forward(
    query: Any,
    key: Any,
    value: Any,
    lsh: SoftLSH,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    wrt: Any = None,
) -> Saved:
    """Return what `attention_backward` needs, without computing the output: it sums the keys again,
    to the same bits.

    For adapters to frameworks that recompute or cannot carry `Saved` from one call to another;
    arguments as for `attention_forward`.
    """
    problem, lsh, _ = inputs.check_attention(
        query,
        key,
        value,
        lsh,
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        chunk_size=None,
        memory_limit=None,
    )
    chosen = backends.choose(None, problem.on_device)
    nothing = (None,) * sum(1 for _ in chunking.parts(problem))
    return Saved(
        problem, lsh, inputs.check_wrt(wrt, False), chosen.name, nothing, None, (query, key, value)
    )


def _backward(
    saved: Saved,
    d_out: np.ndarray,
    d_final: Sketch | None,
    d_initial: Sketch | None,
    grads: GradientBuffers,
) -> None:
    """Run part by part, in an order of additions that depends on the sequences alone."""
    problem = saved.problem
    backend = backends.choose(saved.backend, problem.on_device)
    ranges = list(enumerate(chunking.parts(problem)))
    for index, (first, last) in reversed(ranges) if problem.is_causal else ranges:
        part, states = problem.part(first, last), saved.states[index]
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
    """Recompute what backward starts from: one state of every sequence for every chunk of the part."""
    sketch = part.new_sketch()
    if saved.initial is not None:
        sketch.flat[...] = saved.initial.flat[first:last]
    operations = backends.choose(saved.backend, part.on_device).bidirectional
    if not part.is_causal:
        operations.sum_keys(part, sketch)
        return [sketch.flat]
    states = [sketch.flat.copy()]
    for chunk in chunking.chunks(part, "key")[
        :-1
    ]:  # more than one only where the part is a single sequence
        begin, end = chunk[0, 2], chunk[-1, 3]
        span = np.array([[chunk[0, 1], begin, end, begin, end]])
        operations.sum_keys(replace(part, sequences=span), sketch)
        states.append(sketch.flat.copy())
    return states


def _prepare_out(
    out: Any,
    problem: Problem,
    had_batch: bool,
    passed: tuple[Any, Any, Any],
    initial_state: RaceState | None,
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return the result array in the caller's shape, a 4-D view of it, and what hands it over."""
    sources = readable(problem, passed)
    if initial_state is not None:
        sources.append(("initial_state", initial_state.sketch.flat))
    dtype = stored(problem.query).dtype
    result = inputs.check_out(
        out, "out", out_shape(problem, had_batch), dtype, sources, problem.on_device
    )
    return (
        result,
        result if had_batch else result[None],
        arrays.restorer(passed[0] if out is None else out),
    )
