"""The arithmetic of a run: what each pass does with a chunk, and the states it carries from one chunk to the next."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import numpy as np

from racecore import plan
from racecore.backends import Backend
from racecore.outofcore.positioned import read_at, write_at
from racecore.outofcore.schedule import Task
from racecore.problem import GradientBuffers, Problem, Sketch

__all__ = ["Stages"]

Arrays = dict[str, np.ndarray]


class Stages:
    """All passes of one run.

    Parameters
    ----------
    problem : Problem
        The whole run; of its arrays only shapes and dtypes are used.
    backend : Backend
    hash_gradient : float64 array [2, M, n] or None
        Where the gradients of planes and beta are summed; None means forward only.
    folder : str or None
        Where states between chunks are kept until the backward pass reads them.
    """

    def __init__(
        self, problem: Problem, backend: Backend, hash_gradient: np.ndarray | None, folder: str | None
    ) -> None:
        self._problem, self._backend, self._hash = problem, backend, hash_gradient
        self._folder = folder
        self._unit = -1
        self._checkpoints: _Checkpoints | None = None

    def compute(self, task: Task, read: Arrays, written: Arrays) -> None:
        """Compute one task: from arrays [tokens, heads, dim] to arrays of that kind."""
        if task.unit != self._unit:
            self._begin(task)
        d_out = None if "d_out" not in read else read["d_out"][None]
        for first, last in plan.parts(replace(self._problem, sequences=task.sequences)):
            part = self._part(read, task.sequences[first:last])
            sketch, d_sketch = self._sketch.part(first, last), self._d_sketch.part(first, last)
            grads = self._buffers(written)
            if task.stage == "sum":
                self._backend.bidirectional.sum_keys(part, sketch)
            elif task.stage == "read":
                self._backend.bidirectional.read_out(part, sketch, written["out"][None])
                if d_out is not None:
                    self._backend.bidirectional.read_out_backward(part, sketch, d_out, d_sketch, grads)
            elif task.stage == "sum back":
                self._backend.bidirectional.sum_keys_backward(part, d_sketch, grads)
            elif task.stage == "walk":
                self._keep(task, sketch)
                self._backend.causal.walk(part, sketch, written["out"][None], False)
            else:
                self._backend.causal.walk_backward(part, [self._before(task, sketch)], d_out, d_sketch, grads)
        if task.is_last:
            self.close()

    def close(self) -> None:
        """Forget the states of the unit."""
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None

    def _begin(self, task: Task) -> None:
        self.close()
        self._unit = task.unit
        unit = replace(self._problem, sequences=task.sequences)
        self._sketch, self._d_sketch = unit.new_sketch(), unit.new_sketch()

    def _part(self, read: Arrays, sequences: np.ndarray) -> Problem:
        arrays: dict[str, Any] = dict.fromkeys(("query", "key", "value", "key_mask"))
        arrays |= {name: array[None] for name, array in read.items() if name in arrays}
        return replace(self._problem, sequences=sequences, **arrays)

    def _buffers(self, written: Arrays) -> GradientBuffers:
        query, key, value = (
            None if name not in written else written[name][None] for name in ("d_query", "d_key", "d_value")
        )
        return GradientBuffers(query, key, value, self._hash)

    def _keep(self, task: Task, sketch: Sketch) -> None:
        """Keep the state before a chunk for the backward pass. Short sequences start from nothing: no need to."""
        if self._hash is None or task.n_chunks == 0:
            return
        if self._checkpoints is None:
            self._checkpoints = _Checkpoints(sketch.flat, self._folder)
        self._checkpoints.put(task.chunk, sketch.flat)

    def _before(self, task: Task, sketch: Sketch) -> np.ndarray:
        if self._checkpoints is None:
            return np.zeros_like(sketch.flat)
        return self._checkpoints.get(task.chunk)


class _Checkpoints:
    """States of one shape in a file without a name, which is gone when the process is, however it ends."""

    def __init__(self, like: np.ndarray, folder: str | None) -> None:
        self._shape, self._nbytes = like.shape, like.nbytes
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115, closed by `close`

    def put(self, index: int, state: np.ndarray) -> None:
        write_at(self._file.fileno(), index * self._nbytes, np.ascontiguousarray(state))

    def get(self, index: int) -> np.ndarray:
        state = np.empty(self._shape, np.float64)
        read_at(self._file.fileno(), index * self._nbytes, state, "the temporary file of states")
        return state

    def close(self) -> None:
        self._file.close()
