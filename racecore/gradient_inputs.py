"""The checks of the arguments of gradients: their names, and the gradients that backward takes."""

from __future__ import annotations

from typing import Any

from racecore.problem import Problem, Sketch
from racecore.runtime import arrays
from racecore.runtime.arrays import CallerArray

__all__ = [
    "WRT",
    "check_d_out",
    "check_d_state",
    "check_wrt",
]

WRT = ("query", "key", "value", "planes", "beta", "state")


def check_wrt(wrt: Any, has_initial_state: bool) -> frozenset[str]:
    """Return the names of wanted gradients; None means all, the state's only if one was passed."""
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


def check_d_out(d_out: Any, query: CallerArray, problem: Problem) -> Any:
    """Return the gradient of the output, [B, Tq, H, V] in the output's dtype, on its device."""
    array = arrays.to_device(arrays.as_array(d_out, "d_out"), problem.on_device)
    shape = problem.out_shape if query.had_batch else problem.out_shape[1:]
    if array.shape != shape:
        raise ValueError(f"d_out must have the shape of the output, {shape}, got {array.shape}")
    if not arrays.is_supported(array.dtype):
        raise TypeError(f"d_out must be {arrays.DTYPE_NAMES}, got {array.dtype}")
    array = array if array.dtype == query.dtype else array.astype(query.dtype)
    return array.reshape(problem.out_shape)


def check_d_state(d_state: Any, problem: Problem) -> Sketch | None:
    """Return the gradient of the final states as a sketch; None means zero and stays None."""
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
