"""One call from an adapter: forward or gradients, of one example or of many, on NumPy arrays.

A framework that traces programs knows everything but the values while tracing: that is a
`HostTask`. It is passed as text, which can be part of a compiled program; the arrays come when the
program runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import numpy as np

import racecore
from racecore.gradients import saved_without_forward

__all__ = ["HASH", "ROWS", "HostTask", "mapped_axes", "run"]

ROWS = ("query", "key", "value")
HASH = ("planes", "beta")


@dataclass(frozen=True)
class HostTask:
    """All that is known while tracing. It is part of the compiled program, as text."""

    is_causal: bool
    readout: str
    ndims: tuple[tuple[str, int], ...]  # of every argument of one example, in order
    wrt: tuple[str, ...] | None = None  # None: forward

    @property
    def text(self) -> str:
        """The task as text, for `run`."""
        return json.dumps(asdict(self))


def run(text: str, arguments: list[np.ndarray], results: list[np.ndarray]) -> None:
    """Run a task on arguments with the axes of vmap in front, of length 1 if examples share one."""
    task = _task_of(text)
    given = _named(task, arguments)
    for example, view in _examples(task, given, mapped_axes(text, arguments)):
        lsh = _hash(example)
        targets = [view(result) for result in results]
        if lsh is None:
            for target in targets:
                target[...] = np.nan
        elif task.wrt is None:
            query, key, value = _rows(example)
            racecore.attention(query, key, value, lsh, **_options(task, example), out=targets[0])
        else:
            _write_gradients(task, example, lsh, dict(zip(task.wrt, targets, strict=True)))


def mapped_axes(text: str, arguments: list[np.ndarray]) -> tuple[int, ...]:
    """Return the lengths of the axes that vmap has put in front."""
    ndims = (ndim for _, ndim in _task_of(text).ndims)
    return np.broadcast_shapes(
        *(a.shape[: a.ndim - n] for a, n in zip(arguments, ndims, strict=True))
    )


@cache
def _task_of(text: str) -> HostTask:
    fields = json.loads(text)
    fields["ndims"] = tuple((name, ndim) for name, ndim in fields["ndims"])
    return HostTask(**fields)


def _named(task: HostTask, arguments: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for (name, _), array in zip(task.ndims, arguments, strict=True)}


def _write_gradients(
    task: HostTask,
    example: dict[str, np.ndarray],
    lsh: racecore.SoftLSH,
    targets: dict[str, np.ndarray],
) -> None:
    query, key, value = _rows(example)
    saved = saved_without_forward(
        query, key, value, lsh, **_options(task, example), wrt=tuple(targets)
    )
    rows = racecore.Gradients(targets.get("query"), targets.get("key"), targets.get("value"))
    gradients = racecore.attention_backward(example["d_out"], saved, out=rows)
    for name in HASH:
        if name in targets:
            targets[name][...] = getattr(gradients, name)


def _examples(
    task: HostTask, given: dict[str, np.ndarray], mapped: tuple[int, ...]
) -> Iterator[tuple[Any, Any]]:
    """Yield arguments for racecore, and the function from an array of results to their view in it.

    All examples are one batch if they share the hash and its gradient is not wanted; else they are
    yielded one by one.
    """
    shares = (
        all(set(given[name].shape[: len(mapped)]) <= {1} for name in HASH)
        and "cu_seqlens" not in given
    )
    if mapped and shares and not set(task.wrt or ()) & set(HASH):
        yield {name: _folded(array, name, mapped) for name, array in given.items()}, _folded_result
        return
    for index in np.ndindex(mapped):
        example = {
            name: array[tuple(0 if n == 1 else i for i, n in zip(index, array.shape, strict=False))]
            for name, array in given.items()
        }
        yield example, partial(_result_of_one, index)


def _folded(array: np.ndarray, name: str, mapped: tuple[int, ...]) -> np.ndarray:
    """Return an array whose mapped axes and batch axis, if there is one, are one batch axis."""
    shape = array.shape[len(mapped) :]
    if name in HASH:
        return array.reshape(shape)
    n_kept = 1 if name == "key_mask" else 3  # [Tk], or [T, heads, dim]
    batch = math.prod(mapped) * math.prod(shape[:-n_kept])
    return np.broadcast_to(array, (*mapped, *shape)).reshape(batch, *shape[-n_kept:])


def _folded_result(result: np.ndarray) -> np.ndarray:
    return result.reshape(math.prod(result.shape[:-3]), *result.shape[-3:])


def _result_of_one(index: tuple[Any, ...], result: np.ndarray) -> np.ndarray:
    # a view even if no axis is left
    return result[(*index, Ellipsis)]


def _rows(example: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return example["query"], example["key"], example["value"]


def _options(task: HostTask, example: dict[str, np.ndarray]) -> dict[str, Any]:
    names = ("key_mask", "cu_seqlens")
    return {"is_causal": task.is_causal, "readout": task.readout} | {
        name: example.get(name) for name in names
    }


def _hash(example: dict[str, np.ndarray]) -> racecore.SoftLSH | None:
    """Return the hash, or None for planes or beta that are not finite."""
    # shapes were checked while tracing: only values can be wrong here
    try:
        return racecore.SoftLSH(example["planes"], example["beta"])
    except ValueError:
        return None
