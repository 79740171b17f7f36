"""Arrays for results: new ones, and the checks of those that a caller passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from racecore.problem import Problem
from racecore.runtime import arrays, cuda
from racecore.runtime.arrays import CallerArray

__all__ = ["check_gradient_targets", "check_out", "check_overwritten", "result_array"]


def result_array(
    out: Any,
    query: CallerArray,
    shape: tuple[int, ...],
    sources: list[tuple[str, Any]],
    on_device: bool,
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Return the array of a result in the caller's shape, a 4-D view of it, and its way back.

    `shape` is [B, Tq, H, V]; the batch axis is absent where the query has none. The dtype is the
    query's. Other parameters as for `check_out`.
    """
    expected = shape if query.had_batch else shape[1:]
    result = check_out(out, "out", expected, query.dtype, sources, on_device)
    rows = result if query.had_batch else result[None]
    return result, rows, query.way_back() if out is None else arrays.result_itself


def check_out(
    out: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sources: list[tuple[str, Any]],
    on_device: bool,
) -> Any:
    """Check an array that a caller passed to receive a result; None makes a new one.

    Parameters
    ----------
    out : array or None
    name : str
        The argument's name, for messages.
    shape, dtype
        Of the result.
    sources : list of (str, array)
        The inputs by name, which `out` must not overlap.
    on_device : bool
        Whether the result is computed on a GPU.
    """
    # a new array overlaps none of the sources
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
    _check_not_broadcast(name, out)
    for other, array in sources:
        if _overlap(out, array):
            raise ValueError(
                f"{name} overlaps {other} in memory; inputs are never written to, so give it "
                "memory of its own"
            )
    return out


def check_overwritten(problem: Problem, query: CallerArray, out: Any) -> None:
    """Check that gradients can overwrite query, key and value: on a GPU, without any overlap."""
    if out is not None:
        raise ValueError(
            "overwrite_inputs and out were both given; gradients go to one of them only"
        )
    if not (problem.on_device and query.on_device):
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
        _check_not_broadcast(name, array)
        for other, its in named.items():
            if other != name and _overlap(array, its):
                raise ValueError(
                    f"overwrite_inputs needs {name} and {other} in memory of their own, and they "
                    "overlap"
                )


def check_gradient_targets(out: Any) -> None:
    """Check that `out` of a backward call has attributes for the arrays of gradients."""
    if out is None:
        return
    if not all(hasattr(out, name) for name in ("query", "key", "value")):
        raise TypeError(
            "out must have .query, .key and .value, as a racecore.Gradients has, got "
            f"{type(out).__qualname__}"
        )
    for name in ("planes", "beta", "state"):
        if getattr(out, name, None) is not None:
            raise ValueError(
                f"out.{name} was given, but only query, key and value can be written to arrays of "
                "yours"
            )


def _check_not_broadcast(name: str, array: Any) -> None:
    if array.size and 0 in (s for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        raise ValueError(f"{name} is a broadcast array: several of its elements share one address")


def _overlap(a: Any, b: Any) -> bool:
    """Return whether two arrays share an element. Slices of one buffer that interleave do not."""
    if cuda.is_array(a) and cuda.is_array(b):
        a, b = cuda.shadow(a), cuda.shadow(b)
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    try:
        # NumPy's stub knows only 0 and -1 as max_work
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
