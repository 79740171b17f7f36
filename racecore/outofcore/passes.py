"""The kernels of every pass for one chunk, and the states carried from chunk to chunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from racecore import chunking
from racecore.backends import Backend
from racecore.outofcore.schedule import ChunkTask
from racecore.outofcore.states import StateFile
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import arrays

__all__ = ["Checkpoint", "PassRunner"]

Arrays = dict[str, np.ndarray]
# By the name of a carried array ("sketch", "d_sketch", "hash"): the number of the task that saved
# it last. An array without an entry is zero.
Checkpoint = dict[str, int]

# The state of a sequence that a pass updates, by the name of the pass.
_UPDATED_STATE = {
    "sum": "sketch",
    "scan": "sketch",
    "read out": "d_sketch",
    "scan back": "d_sketch",
}


class PassRunner:
    """Computes the tasks of all passes of one run.

    Parameters
    ----------
    problem : Problem
        The whole run; of its arrays only shapes and dtypes are used.
    backend : Backend
    hash_gradient : float64 array [2, M, n] or None
        Initial sums of the gradients of planes and beta; None means forward only.
    on_device : bool
        Whether chunks are on a GPU; the carried arrays are there too.
    """

    def __init__(
        self,
        problem: Problem,
        backend: Backend,
        hash_gradient: np.ndarray | None,
        on_device: bool = False,
    ) -> None:
        self._problem, self._backend, self._on_device = problem, backend, on_device
        self._hash = None if hash_gradient is None else arrays.to_device(hash_gradient, on_device)
        # First task of the unit that the states in memory belong to.
        self._unit = -1
        # float64 numbers of the state of one sequence: masses [M, S] and value sums [M, S, V].
        self._state_size = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim)

    @property
    def hash_gradient(self) -> np.ndarray | None:
        """The sums of the gradients of planes and beta, in host memory."""
        return None if self._hash is None else arrays.to_device(self._hash, False)

    @property
    def record_size(self) -> int:
        """float64 numbers of the largest state after a task."""
        return self._state_size + (0 if self._hash is None else self._hash.size)

    def updated_by(self, task: ChunkTask) -> list[str]:
        """Return the names of the carried arrays that a task updates for later tasks: the state of
        the sequence and the gradient of the hash.

        The states of short sequences start from zero and end with their unit, so only the gradient
        of the hash is carried on.
        """
        updated = []
        state = _UPDATED_STATE.get(task.pass_name)
        if task.is_of_one_sequence and (
            state == "sketch" or (state == "d_sketch" and self._hash is not None)
        ):
            updated.append(state)
        if self._hash is not None and task.pass_name in ("read out", "sum back", "scan back"):
            updated.append("hash")
        return updated

    def record_range(self, task: ChunkTask) -> tuple[int, int]:
        """Return (first number, how many) of the record of a task that hold its updated arrays."""
        # A record is a state of a sequence followed by the gradient of the hash.
        updated = self.updated_by(task)
        first = self._state_size if updated == ["hash"] else 0
        last = self._state_size if "hash" not in updated else self.record_size
        return first, last - first if updated else 0

    def updated_state(self, task: ChunkTask) -> np.ndarray:
        """Return the arrays that the task just computed has updated, concatenated."""
        carried: dict[str, Any] = {
            "sketch": self._sketch.flat,
            "d_sketch": self._d_sketch.flat,
            "hash": self._hash,
        }
        return np.concatenate(
            [np.ravel(arrays.to_device(carried[name], False)) for name in self.updated_by(task)]
        )

    def restore(self, task: ChunkTask, checkpoint: Checkpoint, states: StateFile) -> None:
        """Set all carried arrays to their values before a task."""
        self._reset(task)
        for name, sketch in (("sketch", self._sketch), ("d_sketch", self._d_sketch)):
            if name in checkpoint:
                saved = states.read(checkpoint[name], 0, self._state_size)
                saved = saved.reshape(sketch.flat.shape)
                sketch.flat[...] = arrays.to_device(saved, self._on_device)
        self.restore_hash(checkpoint, states)

    def restore_hash(self, checkpoint: Checkpoint, states: StateFile) -> None:
        """Set the gradient of the hash to its saved value."""
        if self._hash is None:
            return
        self._hash[...] = 0
        if "hash" in checkpoint:
            saved = states.read(checkpoint["hash"], self._state_size, self._hash.size)
            self._hash[...] = arrays.to_device(saved.reshape(self._hash.shape), self._on_device)

    def compute(
        self, task: ChunkTask, inputs: Arrays, results: Arrays, states: StateFile | None
    ) -> None:
        """Compute one task.

        Parameters
        ----------
        task : ChunkTask
        inputs, results : dict of str to array
            Shape [tokens, heads, dim]; results are written.
        states : StateFile or None
            Read by the causal backward pass.
        """
        if task.first != self._unit:
            self._reset(task)
        d_out = None if "d_out" not in inputs else inputs["d_out"][None]
        for first, last in chunking.parts(replace(self._problem, sequences=task.sequences)):
            part = self._part(inputs, task.sequences[first:last])
            sketch, d_sketch = self._sketch.part(first, last), self._d_sketch.part(first, last)
            grads = self._buffers(results)
            if task.pass_name == "sum":
                self._backend.bidirectional.sum_keys(part, sketch)
            elif task.pass_name == "read out":
                self._backend.bidirectional.read_out(part, sketch, results["out"][None])
                if d_out is not None:
                    self._backend.bidirectional.read_out_backward(
                        part, sketch, d_out, d_sketch, grads
                    )
            elif task.pass_name == "sum back":
                self._backend.bidirectional.sum_keys_backward(part, d_sketch, grads)
            elif task.pass_name == "scan":
                self._backend.causal.causal_scan(part, sketch, results["out"][None], False)
            else:
                self._backend.causal.causal_scan_backward(
                    part, [self._state_before(task, sketch, states)], d_out, d_sketch, grads
                )

    def _reset(self, task: ChunkTask) -> None:
        """Start the unit of a task with zero states."""
        self._unit = task.first
        unit = replace(self._problem, sequences=task.sequences)
        self._sketch = unit.new_sketch().to_device(self._on_device)
        self._d_sketch = unit.new_sketch().to_device(self._on_device)

    def _part(self, inputs: Arrays, sequences: np.ndarray) -> Problem:
        """Return the problem of some sequences of a chunk."""
        tokens: dict[str, Any] = dict.fromkeys(("query", "key", "value", "key_mask"))
        # [1, T, H, D]: kernels expect a batch axis.
        tokens |= {name: array[None] for name, array in inputs.items() if name in tokens}
        return replace(self._problem, sequences=sequences, **tokens)

    def _buffers(self, results: Arrays) -> GradientBuffers:
        query, key, value = (
            None if name not in results else results[name][None]
            for name in ("d_query", "d_key", "d_value")
        )
        return GradientBuffers(query, key, value, self._hash)

    def _state_before(
        self, task: ChunkTask, sketch: Sketch, states: StateFile | None
    ) -> np.ndarray:
        """Return the state before a chunk, which the forward scan saved after the chunk before;
        zeros for the first chunk and for short sequences.
        """
        if task.chunk == 0 or not task.is_of_one_sequence:
            return arrays.zeros(sketch.flat.shape, np.float64, self._on_device)
        if states is None:
            raise TypeError("the pass 'scan back' needs the states of the pass 'scan'")
        # The first tasks of the unit are those of the forward scan, chunk by chunk.
        saved = states.read(task.first + task.chunk - 1, 0, self._state_size)
        return arrays.to_device(saved.reshape(sketch.flat.shape), self._on_device)
