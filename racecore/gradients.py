"""The input and the output of backward: the saved bundle, the gradients, the arrays for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from racecore import backends, chunking, gradient_inputs, inputs, outputs
from racecore.gradient_inputs import WRT
from racecore.inputs import Passed
from racecore.problem import GradientBuffers, Problem, Sketch, changed
from racecore.runtime import arrays, cuda
from racecore.soft_lsh import SoftLSH

__all__ = [
    "Gradients",
    "Saved",
    "StateGradient",
    "gradient_buffers",
    "hash_gradients",
    "readable",
    "saved_without_forward",
    "state_gradient",
]


class StateGradient(NamedTuple):
    """Gradient of a state, float64 arrays shaped as those of `RaceState`."""

    mass: np.ndarray  # [B, G, L, R]
    value_sum: np.ndarray  # [B, G, L, R, V]


class Gradients(NamedTuple):
    """The gradients from `attention_backward`; None for those that `wrt` does not name.

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
    For arrays on a GPU those of planes, beta (then a 0-D array in place of a float) and state are
    CuPy arrays too, so that nothing waits for the GPU.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    planes: np.ndarray | None = None
    beta: Any = None
    state: StateGradient | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Saved:
    """The inputs, not copied, and the states at the boundaries of chunks, for the backward pass.

    Changing the inputs between forward and backward makes the gradients wrong.
    """

    problem: Problem
    lsh: SoftLSH
    wrt: frozenset[str]
    backend: str
    # Per part the states at the boundaries of its chunks; None if backward sums the keys again.
    states: tuple[list[np.ndarray] | None, ...]
    initial: Sketch | None
    passed: Passed | None  # the caller's query, key and value; None in `without_inputs`

    @property
    def caller(self) -> Passed:
        """The caller's arrays: axes, device, and the way back of gradients."""
        if self.passed is None:
            raise TypeError("this Saved lacks its inputs: they come back by with_inputs")
        return self.passed

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the inputs."""
        arrays_held = [state for states in self.states if states is not None for state in states]
        held = {id(array): array.nbytes for array in arrays_held}
        return sum(held.values()) + (0 if self.initial is None else self.initial.flat.nbytes)

    def without_inputs(self) -> Saved:
        """Return a copy without arrays, for frameworks that keep tensors themselves."""
        problem = changed(self.problem, query=None, key=None, value=None, key_mask=None)
        return changed(self, problem=problem, states=(), passed=None)

    def with_inputs(self, query: Any, key: Any, value: Any, key_mask: Any, states: Any) -> Saved:
        """Undo `without_inputs` with the same arrays and states, arrays of NumPy or CuPy."""
        passed = Passed.resolve(query, key, value)
        q, k, v = (x.array if x.had_batch else x.array[None] for x in passed)
        mask = key_mask if key_mask is None or key_mask.ndim == 2 else key_mask[None]
        problem = changed(self.problem, query=q, key=k, value=v, key_mask=mask)
        return changed(self, problem=problem, states=states, passed=passed)

    def __repr__(self) -> str:
        named = () if self.passed is None else self.passed._asdict().items()
        shapes = ", ".join(f"{name} {x.array.shape}" for name, x in named)
        return f"Saved({shapes}, wrt={sorted(self.wrt)}, nbytes={self.nbytes})"


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
    """Return the `Saved` of an `attention_forward` without computing the output.

    Backward then sums the keys again, to the same bits. For adapters to frameworks that recompute,
    or that cannot carry `Saved` from one call to another; arguments as for `attention_forward`.
    """
    passed = Passed.resolve(query, key, value)
    problem, lsh = inputs.check_attention(
        passed,
        lsh,
        is_causal=is_causal,
        readout=readout,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
    )
    chosen = backends.choose(None, problem.on_device)
    nothing = (None,) * sum(1 for _ in chunking.parts(problem))
    wanted = gradient_inputs.check_wrt(wrt, False)
    return Saved(problem, lsh, wanted, chosen.name, nothing, None, passed)


def gradient_buffers(
    saved: Saved, out: Any, d_out: tuple[Any, ...], overwrite_inputs: bool = False
) -> tuple[list[np.ndarray | None], GradientBuffers]:
    """Return the arrays for the gradients of query, key and value in the caller's shapes, and the
    buffers over them.
    """
    problem, had_batch = saved.problem, saved.caller.query.had_batch
    results: list[np.ndarray | None]
    if overwrite_inputs:
        outputs.check_overwritten(problem, saved.caller.query, out)
        named = zip(WRT, (problem.query, problem.key, problem.value), strict=False)
        query, key, value = (array if name in saved.wrt else None for name, array in named)
        results = [x if x is None or had_batch else x[0] for x in (query, key, value)]
        return results, GradientBuffers(query, key, value, _new_hash_gradient(saved))
    sources = [*readable(problem, saved.caller), *(("d_out", x) for x in d_out)]
    outputs.check_gradient_targets(out)
    results = []
    for name, passed in saved.caller._asdict().items():
        given = getattr(out, name, None)
        if name not in saved.wrt:
            if given is not None:
                raise ValueError(
                    f"out.{name} was given, but wrt of attention_forward does not name {name!r}"
                )
            results.append(None)
            continue
        result = outputs.check_out(
            given, f"out.{name}", passed.array.shape, passed.dtype, sources, problem.on_device
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
    """Return the gradients of planes and beta in the shapes of `lsh.planes` and `lsh.beta`."""
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
    """Return the gradient of the initial states in the shapes of a `RaceState`."""
    mass = sketch.mass.reshape(*sketch.flat.shape[:2], lsh.n_tables, lsh.n_buckets)
    return StateGradient(mass, sketch.value_sum.reshape(*mass.shape, sketch.value_sum.shape[3]))


def readable(problem: Problem, passed: Passed) -> list[tuple[str, Any]]:
    """Return by name the arrays that a result must not overlap: those that are read, and those
    passed by the caller in case they were copied.
    """
    read = {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "key_mask": problem.key_mask,
    }
    return [*read.items(), *((name, x.source) for name, x in passed._asdict().items())]
