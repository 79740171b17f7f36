"""The arithmetic of a run: what each pass does with a chunk, and the states it carries from one
chunk to the next.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from racecore import chunking
from racecore.backends import Backend
from racecore.outofcore.schedule import Task
from racecore.outofcore.states import States
from racecore.problem import GradientBuffers, Problem, Sketch
from racecore.runtime import arrays

__all__ = ["Origin", "Stages"]

Arrays = dict[str, np.ndarray]
Origin = dict[
    str, int
]  # by what is carried (sketch, d_sketch, hash): the task that left it last; nothing means zeros

_CHANGES = {
    "sum": "sketch",
    "causal_scan": "sketch",
    "read": "d_sketch",
    "walk back": "d_sketch",
}  # stage: state of the sequence


class Stages:
    """All passes of one run.

    Parameters
    ----------
    problem : Problem
        The whole run; of its arrays only shapes and dtypes are used.
    backend : Backend
    hash_gradient : float64 array [2, M, n] or None
        Where the sums of the gradients of planes and beta begin; None means forward only.
    on_device : bool
        Whether chunks are on a GPU; what is carried from one to the next is there too.
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
        self._first = -1  # task of the unit that the states belong to
        self._state_numbers = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim)

    @property
    def hash_gradient(self) -> np.ndarray | None:
        """The sums of the gradients of planes and beta, in host memory."""
        return None if self._hash is None else arrays.to_device(self._hash, False)

    @property
    def numbers(self) -> int:
        """How many numbers the largest state has that a task leaves."""
        return self._state_numbers + (0 if self._hash is None else self._hash.size)

    def changes(self, task: Task) -> list[str]:
        """Return what a task changes that later ones go on from: the state of the sequence and the
        gradient of the hash.

        Short sequences start from nothing and share a unit: of theirs only the gradient of the hash
        goes on.
        """
        changed = []
        state = _CHANGES.get(task.stage)
        if task.is_of_one_sequence and (
            state == "sketch" or (state == "d_sketch" and self._hash is not None)
        ):
            changed.append(state)
        if self._hash is not None and task.stage in ("read", "sum back", "walk back"):
            changed.append("hash")
        return changed

    def place(self, task: Task) -> tuple[int, int]:
        """Return where in its place in `States` a task leaves what it changes: (first number, how
        many).
        """
        changed = self.changes(task)
        first = self._state_numbers if changed == ["hash"] else 0
        last = self._state_numbers if "hash" not in changed else self.numbers
        return first, last - first if changed else 0

    def left(self, task: Task) -> np.ndarray:
        """Return what the task that was just computed changed."""
        held: dict[str, Any] = {
            "sketch": self._sketch.flat,
            "d_sketch": self._d_sketch.flat,
            "hash": self._hash,
        }
        return np.concatenate(
            [np.ravel(arrays.to_device(held[name], False)) for name in self.changes(task)]
        )

    def restore(self, task: Task, origin: Origin, states: States) -> None:
        """Make everything what it was before a task."""
        self._begin(task)
        for name, sketch in (("sketch", self._sketch), ("d_sketch", self._d_sketch)):
            if name in origin:
                found = states.get(origin[name], 0, self._state_numbers).reshape(sketch.flat.shape)
                sketch.flat[...] = arrays.to_device(found, self._on_device)
        self.restore_hash(origin, states)

    def restore_hash(self, origin: Origin, states: States) -> None:
        """Make the gradient of the hash what it was then."""
        if self._hash is None:
            return
        self._hash[...] = 0
        if "hash" in origin:
            found = states.get(origin["hash"], self._state_numbers, self._hash.size)
            self._hash[...] = arrays.to_device(found.reshape(self._hash.shape), self._on_device)

    def compute(self, task: Task, read: Arrays, written: Arrays, states: States | None) -> None:
        """Compute one task: from arrays [tokens, heads, dim] to arrays of that kind."""
        if task.first != self._first:
            self._begin(task)
        d_out = None if "d_out" not in read else read["d_out"][None]
        for first, last in chunking.parts(replace(self._problem, sequences=task.sequences)):
            part = self._part(read, task.sequences[first:last])
            sketch, d_sketch = self._sketch.part(first, last), self._d_sketch.part(first, last)
            grads = self._buffers(written)
            if task.stage == "sum":
                self._backend.bidirectional.sum_keys(part, sketch)
            elif task.stage == "read":
                self._backend.bidirectional.read_out(part, sketch, written["out"][None])
                if d_out is not None:
                    self._backend.bidirectional.read_out_backward(
                        part, sketch, d_out, d_sketch, grads
                    )
            elif task.stage == "sum back":
                self._backend.bidirectional.sum_keys_backward(part, d_sketch, grads)
            elif task.stage == "causal_scan":
                self._backend.causal.causal_scan(part, sketch, written["out"][None], False)
            else:
                self._backend.causal.causal_scan_backward(
                    part, [self._before(task, sketch, states)], d_out, d_sketch, grads
                )

    def _begin(self, task: Task) -> None:
        self._first = task.first
        unit = replace(self._problem, sequences=task.sequences)
        self._sketch, self._d_sketch = (
            unit.new_sketch().to_device(self._on_device) for _ in range(2)
        )

    def _part(self, read: Arrays, sequences: np.ndarray) -> Problem:
        tokens: dict[str, Any] = dict.fromkeys(("query", "key", "value", "key_mask"))
        tokens |= {name: array[None] for name, array in read.items() if name in tokens}
        return replace(self._problem, sequences=sequences, **tokens)

    def _buffers(self, written: Arrays) -> GradientBuffers:
        query, key, value = (
            None if name not in written else written[name][None]
            for name in ("d_query", "d_key", "d_value")
        )
        return GradientBuffers(query, key, value, self._hash)

    def _before(self, task: Task, sketch: Sketch, states: States | None) -> np.ndarray:
        """Return the state before a chunk, as the walk forward left it. Short sequences start from
        nothing.
        """
        if task.chunk == 0 or not task.is_of_one_sequence:
            return arrays.zeros(sketch.flat.shape, np.float64, self._on_device)
        if states is None:
            raise TypeError("a walk back needs the states of the walk")
        found = states.get(task.first + task.chunk - 1, 0, self._state_numbers).reshape(
            sketch.flat.shape
        )
        return arrays.to_device(found, self._on_device)
