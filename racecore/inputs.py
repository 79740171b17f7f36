"""Every check of what a caller passed, and every message about it. One frozen bundle (`Problem`)
comes out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from racecore import chunking
from racecore.problem import DEVICE_WORKSPACE_BYTES, WORKSPACE_BYTES, Problem, Sketch
from racecore.runtime import arrays, cuda
from racecore.soft_lsh import SoftLSH

__all__ = [
    "READOUTS",
    "check_attention",
    "check_d_out",
    "check_d_state",
    "check_dtypes",
    "check_gradient_targets",
    "check_out",
    "check_overwritten",
    "check_readout",
    "check_same_device",
    "check_shapes",
    "check_wrt",
    "checked_mask",
    "parse_bytes",
    "whole_sequences",
]

READOUTS = ("ratio", "bucket_mean")
WRT = ("query", "key", "value", "planes", "beta", "state")
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def check_attention(
    query: Any,
    key: Any,
    value: Any,
    lsh: SoftLSH | None,
    *,
    is_causal: bool,
    readout: str,
    key_mask: Any,
    cu_seqlens: Any,
    chunk_size: int | None,
    memory_limit: int | str | None,
    on_device: bool | None = None,
) -> tuple[Problem, SoftLSH, bool]:
    """Check the arguments of `racecore.attention`.

    `on_device` is where the problem's arrays shall be; None means where they are.

    Returns
    -------
    problem : Problem
        With 4-D arrays.
    lsh : SoftLSH
        The hash, the default one where None was passed.
    had_batch : bool
        False where the caller passed 3-D arrays.
    """
    q, k, v = (
        arrays.as_array(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    if on_device is None:
        on_device = check_same_device(query=q, key=k, value=v)
    q, k, v = (arrays.to_device(x, on_device) for x in (q, k, v))
    q, k, v, had_batch = check_shapes(q, k, v)
    check_dtypes(query=q, key=k, value=v)
    lsh = _checked_lsh(lsh, q.shape[3], q.shape[2])
    check_readout(readout)
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"is_causal needs as many queries as keys, got Tq = {q.shape[1]} and Tk = "
            f"{k.shape[1]}; to continue a "
            "sequence, pass the new tokens alone and the past as initial_state"
        )
    mask = checked_mask(key_mask, k)
    if mask is not None and cu_seqlens is not None:
        raise ValueError(
            "key_mask and cu_seqlens were both given; use one: drop the masked tokens and adapt "
            "cu_seqlens"
        )
    sequences = _sequence_table(cu_seqlens, q, k)
    per_head = lsh.n_heads is not None
    planes, beta = lsh.per_head(q.shape[2] if per_head else k.shape[2])
    _check_chunk_size(chunk_size, memory_limit)
    problem = Problem(
        query=q,
        key=k,
        value=v,
        planes=planes,
        beta=beta,
        key_mask=mask,
        sequences=sequences,
        n_heads=q.shape[2],
        n_kv_heads=k.shape[2],
        value_dim=v.shape[3],
        is_causal=bool(is_causal),
        readout=readout,
        dtype=arrays.compute_dtype(q.dtype),
        chunk_tokens=None if chunk_size is None else int(chunk_size),
        workspace_bytes=DEVICE_WORKSPACE_BYTES if on_device else WORKSPACE_BYTES,
    )
    if memory_limit is not None:
        problem = _limited(problem, parse_bytes(memory_limit))
    elif problem.is_causal and chunk_size is None and chunking.can_keep_states(problem):
        problem = replace(problem, keeps_states=True)
    return problem, lsh, had_batch


def check_same_device(**named: Any) -> bool:
    """Return whether the arrays are on a GPU; all of them must be, or none."""
    places = {name: cuda.is_array(array) for name, array in named.items()}
    if len(set(places.values())) > 1:
        text = ", ".join(
            f"{name} {'on a GPU' if place else 'in host memory'}" for name, place in places.items()
        )
        raise ValueError(
            f"the arrays must be in one place, got {text}; bring them together with cupy.asarray "
            "or cupy.asnumpy"
        )
    return next(iter(places.values()))


def check_shapes(
    q: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Check the shapes of query, key and value with each other; return them with a batch axis, and
    whether they had one.
    """
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)):
        raise ValueError(
            "query, key and value must all be [B, T, heads, dim], or all [T, heads, dim] without "
            "a batch axis; "
            f"got {shapes}"
        )
    had_batch = q.ndim == 4
    if not had_batch:
        q, k, v = q[None], k[None], v[None]
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size; got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"key and value must agree in tokens and heads; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have the same head dim D (last axis); got {shapes}")
    if 0 in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"heads and head dims must not be 0 (tokens and batch may); got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads "
            "(axis order is "
            f"[batch, tokens, heads, dim]); got {shapes}"
        )
    return q, k, v, had_batch


def check_readout(readout: str) -> None:
    """Check the name of a readout."""
    if not isinstance(readout, str) or readout not in READOUTS:
        raise ValueError(
            f"readout must be one of {', '.join(map(repr, READOUTS))}, got {readout!r}"
        )


def check_dtypes(**named: np.ndarray) -> None:
    """Check that arrays have one dtype, and one that kernels read."""
    for name, array in named.items():
        if not arrays.is_supported(array.dtype):
            raise TypeError(
                f"{name} must be {arrays.DTYPE_NAMES}, got {array.dtype}; convert it with "
                ".astype(numpy.float32)"
            )
    dtypes = [array.dtype for array in named.values()]
    if len(set(dtypes)) > 1:
        raise TypeError(
            f"{', '.join(named)} must have one dtype, got {', '.join(map(str, dtypes))}; convert "
            "them with .astype"
        )


def _checked_lsh(lsh: SoftLSH | None, head_dim: int, n_heads: int) -> SoftLSH:
    if lsh is None:
        return _default_lsh(head_dim)
    if not isinstance(lsh, SoftLSH):
        raise TypeError(f"lsh must be a racecore.SoftLSH or None, got {type(lsh).__qualname__}")
    if lsh.head_dim != head_dim:
        raise ValueError(
            f"lsh hashes rows of {lsh.head_dim} values, query and key have {head_dim}; make one "
            f"for {head_dim}"
        )
    if lsh.n_heads not in (None, n_heads):
        raise ValueError(
            f"lsh has planes or beta for {lsh.n_heads} query heads, the query has {n_heads}"
        )
    return lsh


@lru_cache(maxsize=8)
def _default_lsh(head_dim: int) -> SoftLSH:
    """Return the hash of a call that names none; drawing it takes longer than a short call."""
    return SoftLSH.random(head_dim=head_dim, n_tables=4, n_planes=4, beta=1.0, rng=0)


def checked_mask(key_mask: Any, k: np.ndarray) -> np.ndarray | None:
    """Return the mask of keys k [B, Tk, G, D], bool [B, Tk], where they are; None stays None."""
    if key_mask is None:
        return None
    mask = arrays.to_device(arrays.as_array(key_mask, "key_mask"), cuda.is_array(k))
    if mask.dtype != np.bool_:
        raise TypeError(
            f"key_mask must be bool (True = the key takes part), got {mask.dtype}; compare it to "
            "get bools"
        )
    batch, n_keys = k.shape[:2]
    if mask.shape == (n_keys,) and batch == 1:
        mask = mask[None]
    if mask.shape != (batch, n_keys):
        raise ValueError(f"key_mask must have shape [B, Tk] = {(batch, n_keys)}, got {mask.shape}")
    return mask


def _sequence_table(cu_seqlens: Any, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return int64 [N, 5]: batch index, query begin and end, key begin and end."""
    batch, n_queries, n_keys = q.shape[0], q.shape[1], k.shape[1]
    if cu_seqlens is None:
        return whole_sequences(batch, n_queries, n_keys)
    if isinstance(cu_seqlens, (list, tuple, range)):
        cu_seqlens = np.asarray(cu_seqlens, None if len(cu_seqlens) else np.int64)
    bounds = arrays.to_device(arrays.as_array(cu_seqlens, "cu_seqlens"), False)
    if bounds.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens must be integers, got {bounds.dtype}")
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(f"cu_seqlens must have shape [n_sequences + 1], got {bounds.shape}")
    if batch != 1:
        raise ValueError(
            "cu_seqlens packs all sequences along one token axis: B must be 1 or absent, got B = "
            f"{batch}"
        )
    if n_queries != n_keys:
        raise ValueError(
            f"cu_seqlens needs as many queries as keys, got Tq = {n_queries} and Tk = {n_keys}"
        )
    bounds = bounds.astype(np.int64)
    if bounds[0] != 0 or bounds[-1] != n_keys:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at T = {n_keys}, got {bounds[0]} ... {bounds[-1]}"
        )
    steps = np.diff(bounds)
    if (steps < 0).any():
        where = int(np.argmax(steps < 0))
        raise ValueError(
            f"cu_seqlens must not decrease, got {bounds[where]}, {bounds[where + 1]} at index "
            f"{where}"
        )
    begin, end = bounds[:-1], bounds[1:]
    return np.stack([np.zeros_like(begin), begin, end, begin, end], axis=1)


def whole_sequences(batch: int, n_queries: int, n_keys: int) -> np.ndarray:
    """Return the table of sequences that are the rows of a batch."""
    table = np.empty((batch, 5), np.int64)
    table[:] = (0, 0, n_queries, 0, n_keys)
    table[:, 0] = np.arange(batch)
    return table


def _check_chunk_size(chunk_size: int | None, memory_limit: int | str | None) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)):
        raise TypeError(f"chunk_size must be an integer number of tokens, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    if memory_limit is not None:
        raise ValueError(
            "chunk_size and memory_limit both bound the temporary memory; give one of them"
        )


def _limited(problem: Problem, memory_limit: int) -> Problem:
    """Lower the workspace to the limit; a higher limit changes nothing, because larger chunks are
    no faster.
    """
    smallest = chunking.smallest_workspace(problem)
    if memory_limit < smallest:
        raise ValueError(
            f"memory_limit is {memory_limit} bytes, but a segment of {chunking.SEGMENT} tokens "
            "needs more temporary memory "
            f"here; the smallest memory_limit that works is {smallest} (bytes)"
        )
    return replace(problem, workspace_bytes=min(problem.workspace_bytes, memory_limit))


def parse_bytes(size: int | str) -> int:
    """Turn 1_000_000, "512MB" (10^6), "1 GiB" (2^30) or "64M" into a number of bytes.

    Raises
    ------
    ValueError
        For what cannot be read so, or is not positive.
    """
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        n_bytes = int(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                "a memory size is a number of bytes or text such as '512MB' or '1GiB', got "
                f"{size!r}"
            )
        n_bytes = int(min(float(match[1]) * _UNITS[match[2]], 2.0**62))
    if n_bytes < 1:
        raise ValueError(f"a memory size must be positive, got {size!r}")
    return n_bytes


def check_wrt(wrt: Any, has_initial_state: bool) -> frozenset[str]:
    """Return the set of gradients that are wanted; None means all of them (the state's only if one
    was passed).
    """
    if wrt is None:
        return frozenset(WRT if has_initial_state else WRT[:-1])
    if not isinstance(wrt, (str, list, tuple, set, frozenset)):
        raise TypeError(
            f"wrt must be None, a name or several names of {', '.join(WRT)}; got {wrt!r}"
        )
    names = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    unknown = [name for name in names if name not in WRT]
    if unknown:
        raise ValueError(
            f"wrt must name some of {', '.join(WRT)}; got {', '.join(map(repr, unknown))}"
        )
    return frozenset(names)


def check_out(
    out: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sources: list[tuple[str, Any]],
    on_device: bool,
) -> Any:
    """Check an array that the caller gave for a result, or make one where None was given."""
    if out is None:
        return arrays.empty(shape, dtype, on_device)
    if cuda.is_array(out) != on_device or not (on_device or isinstance(out, np.ndarray)):
        kind = "a CuPy array, as the inputs are on a GPU" if on_device else "a NumPy array"
        raise TypeError(
            f"{name} must be {kind}, got {type(out).__module__}.{type(out).__qualname__}"
        )
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(
            f"{name} must have shape {shape} and dtype {dtype}, got {out.shape} and {out.dtype}"
        )
    if not on_device and not out.flags.writeable:
        raise ValueError(f"{name} is read-only")
    is_aligned = on_device or (out.dtype.isnative and out.flags.aligned)
    if not is_aligned or any(s % dtype.itemsize for s in out.strides):
        raise ValueError(f"{name} must be aligned and in native byte order")
    if out.size and 0 in (s for s, n in zip(out.strides, out.shape, strict=True) if n > 1):
        raise ValueError(
            f"{name} is a broadcast array: several of its elements share one place in memory"
        )
    for other, array in sources:
        if _overlap(out, array):
            raise ValueError(
                f"{name} overlaps {other} in memory; inputs are never written to, so give it "
                "memory of its own"
            )
    return out


def check_overwritten(problem: Problem, sources: tuple[Any, Any, Any], out: Any) -> None:
    """Check that gradients can be written over query, key and value: on a GPU, each in memory of
    its own.
    """
    if out is not None:
        raise ValueError("overwrite_inputs and out were both given; gradients go to one place only")
    if not (problem.on_device and arrays.is_on_device(sources[0])):
        raise ValueError(
            "overwrite_inputs needs inputs on a GPU; in host memory pass arrays of your own as out"
        )
    if problem.n_state_heads > problem.n_kv_heads:
        raise ValueError(
            "overwrite_inputs does not work with grouped queries whose planes or beta are per "
            "query head: keys and values are "
            "read once for every query head"
        )
    named: dict[str, Any] = {"query": problem.query, "key": problem.key, "value": problem.value}
    for name, array in named.items():
        if array.size and 0 in (
            s for s, n in zip(array.strides, array.shape, strict=True) if n > 1
        ):
            raise ValueError(
                f"{name} is a broadcast array: several of its elements share one place in memory"
            )
        for other, its in named.items():
            if other != name and _overlap(array, its):
                raise ValueError(
                    f"overwrite_inputs needs {name} and {other} in memory of their own, and they "
                    "overlap"
                )


def check_gradient_targets(out: Any) -> None:
    """Check that `out` of a backward call, if there is one, names its arrays."""
    if out is None:
        return
    if not all(hasattr(out, name) for name in WRT[:3]):
        raise TypeError(
            "out must have .query, .key and .value, as a racecore.Gradients has, got "
            f"{type(out).__qualname__}"
        )
    for name in WRT[3:]:
        if getattr(out, name, None) is not None:
            raise ValueError(
                f"out.{name} was given, but only query, key and value can be written to arrays of "
                "yours"
            )


def _overlap(a: Any, b: Any) -> bool:
    """Tell whether two arrays share an element. Slices of one buffer that interleave do not."""
    if cuda.is_array(a) and cuda.is_array(b):
        a, b = cuda.shadow(a), cuda.shadow(b)
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # NumPy's stub knows 0 and -1 only
    except np.exceptions.TooHardError:
        return True


def check_d_out(d_out: Any, shape: tuple[int, ...], dtype: np.dtype, on_device: bool) -> Any:
    """Check the gradient of the output: shape of the output, any supported dtype (converted to the
    output's).
    """
    array = arrays.to_device(arrays.as_array(d_out, "d_out"), on_device)
    if array.shape != shape:
        raise ValueError(f"d_out must have the shape of the output, {shape}, got {array.shape}")
    if not arrays.is_supported(array.dtype):
        raise TypeError(f"d_out must be {arrays.DTYPE_NAMES}, got {array.dtype}")
    return array if array.dtype == dtype else array.astype(dtype)


def check_d_state(d_state: Any, problem: Problem) -> Sketch | None:
    """Check the gradient of the final state (.mass and .value_sum shaped as the state's); None
    means zero and stays None.
    """
    if d_state is None:
        return None
    sketch = problem.new_sketch()
    tables, buckets = problem.planes.shape[1], 1 << problem.planes.shape[2]
    shape = (len(problem.sequences), problem.n_state_heads, tables, buckets)
    for name, wanted, target in (
        ("mass", shape, sketch.mass),
        ("value_sum", (*shape, problem.value_dim), sketch.value_sum),
    ):
        array = getattr(d_state, name, None)
        if array is None:
            raise TypeError(
                "d_state must have .mass and .value_sum, as a RaceState has; "
                f"{type(d_state).__qualname__} lacks .{name}"
            )
        array = arrays.to_device(arrays.as_array(array, f"d_state.{name}"), problem.on_device)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"d_state.{name} must be real numbers, got {array.dtype}")
        if array.shape != wanted:
            raise ValueError(f"d_state.{name} must have shape {wanted}, got {array.shape}")
        target[...] = array.reshape(target.shape)
    return sketch
