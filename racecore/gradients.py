"""What backward needs and what it returns: the saved bundle, the gradients, and the arrays they are
written to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from racecore import inputs
from racecore.problem import GradientBuffers, Problem, Sketch, changed
from racecore.runtime import arrays, cuda
from racecore.soft_lsh import SoftLSH

__all__ = [
    "Gradients",
    "Saved",
    "StateGradient",
    "gradient_buffers",
    "hash_gradients",
    "out_shape",
    "readable",
    "state_gradient",
    "stored",
]


class StateGradient(NamedTuple):
    """Gradient of a state, float64 arrays shaped as those of `RaceState`."""

    mass: np.ndarray  # [B, G, L, R]
    value_sum: np.ndarray  # [B, G, L, R, V]


class Gradients(NamedTuple):
    """What `attention_backward` returns; None where not asked for.

    Attributes
    ----------
    query, key, value : array
        Shapes, dtype and library of the inputs.
    planes : numpy.ndarray
        float64, shape of ``lsh.planes``.
    beta : float or numpy.ndarray
        A float, or float64 [H] where beta is per head.
    state : StateGradient
        Gradient of the initial state.

    Notes
    -----
    For arrays on a GPU those of planes, beta (then an array without axes in place of a float) and state are CuPy arrays
    too, so that nothing waits for the GPU.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    planes: np.ndarray | None = None
    beta: Any = None
    state: StateGradient | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """What backward needs: the inputs themselves, not copies, and states at the boundaries of
    chunks.

    Changing the inputs between forward and backward makes the gradients wrong.
    """

    problem: Problem
    lsh: SoftLSH
    wrt: frozenset[str]
    backend: str
    # Per part the states at the boundaries of its chunks; None where backward sums the keys again.
    states: tuple[list[np.ndarray] | None, ...]
    initial: Sketch | None
    sources: tuple[Any, ...]  # query, key, value as the caller passed them

    @property
    def had_batch(self) -> bool:
        """Whether the caller passed 4-D arrays."""
        return len(self.sources[0].shape) == 4

    @property
    def are_on_device(self) -> bool:
        """Whether the caller's arrays are on a GPU; with backend="cuda" those in host memory were
        copied there.
        """
        return arrays.is_on_device(self.sources[0])

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the inputs."""
        arrays_held = [state for states in self.states if states is not None for state in states]
        held = {id(array): array.nbytes for array in arrays_held}
        return sum(held.values()) + (0 if self.initial is None else self.initial.flat.nbytes)

    def without_inputs(self) -> Saved:
        """Return the same without query, key, value, mask and states, for frameworks that keep
        their tensors themselves.
        """
        problem = changed(self.problem, query=None, key=None, value=None, key_mask=None)
        return changed(self, problem=problem, states=(), sources=())

    def with_inputs(self, query: Any, key: Any, value: Any, key_mask: Any, states: Any) -> Saved:
        """Undo `without_inputs`, with the same arrays as before, NumPy's or CuPy's, and the same
        states.
        """
        q, k, v = (query, key, value) if query.ndim == 4 else (query[None], key[None], value[None])
        mask = key_mask if key_mask is None or key_mask.ndim == 2 else key_mask[None]
        problem = changed(self.problem, query=q, key=k, value=v, key_mask=mask)
        return changed(self, problem=problem, states=states, sources=(query, key, value))

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {x.shape}" for name, x in zip(inputs.WRT, self.sources, strict=False)
        )
        return f"Saved({shapes}, wrt={sorted(self.wrt)}, nbytes={self.nbytes})"


def gradient_buffers(
    saved: Saved, out: Any, d_out: tuple[Any, ...], overwrite_inputs: bool = False
) -> tuple[list[np.ndarray | None], GradientBuffers]:
    """Return the arrays for query, key and value in the caller's shapes, and the buffers over them."""
    problem, had_batch = saved.problem, saved.had_batch
    if overwrite_inputs:
        inputs.check_overwritten(problem, saved.sources, out)
        named = zip(inputs.WRT, (problem.query, problem.key, problem.value), strict=False)
        query, key, value = (array if name in saved.wrt else None for name, array in named)
        own = [x if x is None or had_batch else x[0] for x in (query, key, value)]
        return own, GradientBuffers(query, key, value, _new_hash_gradient(saved))
    inputs_by_name = {"query": problem.query, "key": problem.key, "value": problem.value}
    sources = [*readable(problem, saved.sources), *(("d_out", x) for x in d_out)]
    inputs.check_gradient_targets(out)
    results: list[np.ndarray | None] = []
    for name, array in inputs_by_name.items():
        shape = stored(array).shape
        given = getattr(out, name, None)
        if name not in saved.wrt:
            if given is not None:
                raise ValueError(
                    f"out.{name} was given, but wrt of attention_forward does not name {name!r}"
                )
            results.append(None)
            continue
        shape = shape if had_batch else shape[1:]
        result = inputs.check_out(
            given, f"out.{name}", shape, stored(array).dtype, sources, problem.on_device
        )
        sources.append((f"out.{name}", result))
        results.append(result)
    buffers = [r if r is None or had_batch else r[None] for r in results]
    return results, GradientBuffers(buffers[0], buffers[1], buffers[2], _new_hash_gradient(saved))


def _new_hash_gradient(saved: Saved) -> Any:
    problem = saved.problem
    n_numbers = problem.planes[0].size + 1 if "planes" in saved.wrt else 1
    shape = (2, problem.n_state_heads, n_numbers)
    needed = saved.wrt & {"planes", "beta"}
    return arrays.zeros(shape, np.float64, problem.on_device) if needed else None


def hash_gradients(
    hash_gradient: Any, problem: Problem, lsh: SoftLSH, wrt: frozenset[str]
) -> tuple[Any, Any]:
    """Bring the gradients of planes and beta to the shapes of `lsh.planes` and `lsh.beta`."""
    if hash_gradient is None:
        return None, None
    total = hash_gradient[0] + hash_gradient[1]  # [M, L*P*D + 1], or [M, 1] for beta alone
    planes: Any = None
    beta: Any = None
    if "planes" in wrt:
        per_head = total[:, :-1].reshape(problem.planes.shape)
        planes = per_head if lsh.planes.ndim == 4 else per_head.sum(axis=0)
    if "beta" in wrt:
        beta = total[:, -1].copy() if np.ndim(lsh.beta) else total[:, -1].sum()
        if beta.ndim == 0 and not cuda.is_array(beta):
            beta = float(beta)
    return planes, beta


def state_gradient(sketch: Sketch, lsh: SoftLSH) -> StateGradient:
    """Bring the gradient of the initial states to the shapes of a `RaceState`."""
    mass = sketch.mass.reshape(*sketch.flat.shape[:2], lsh.n_tables, lsh.n_buckets)
    return StateGradient(mass, sketch.value_sum.reshape(*mass.shape, sketch.value_sum.shape[3]))


def readable(problem: Problem, passed: tuple[Any, Any, Any]) -> list[tuple[str, Any]]:
    """Name what a result must not overlap: what is read, and what the caller passed where that was
    copied.
    """
    read = zip(
        ("query", "key", "value", "key_mask"),
        (problem.query, problem.key, problem.value, problem.key_mask),
        strict=True,
    )
    return [*read, *zip(("query", "key", "value"), passed, strict=True)]


def out_shape(problem: Problem, had_batch: bool) -> tuple[int, ...]:
    """Return the shape of the output as the caller sees it."""
    shape = (*stored(problem.query).shape[:3], problem.value_dim)
    return shape if had_batch else shape[1:]


def stored(array: np.ndarray | None) -> np.ndarray:
    """Tell the type checker, and anyone who breaks it, that an attention problem has both sides."""
    if array is None:
        raise TypeError("this problem lacks its queries or its keys")
    return array
