"""The sums and lengths of a state, copied on write after a snapshot."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from racecore.problem import Problem, Sketch
from racecore.runtime import arrays, cuda

__all__ = ["Contents", "Snapshot"]


class Snapshot:
    """A moment of a `RaceState`, from `RaceState.snapshot`, for `RaceState.restore`.

    It shares the sums of its state until that is written to; then the state takes a copy. A
    snapshot never changes.

    Notes
    -----
    At most two objects share sums, a state and one snapshot of it: hence a snapshot can be restored
    in its own state only, and the state needs no copy once that snapshot is gone.
    """

    __slots__ = ("__weakref__", "lengths", "owner", "sketch")

    def __init__(self, owner: object, sketch: Sketch, lengths: np.ndarray) -> None:
        self.owner = owner
        self.sketch = sketch
        self.lengths = lengths

    @property
    def n_tokens(self) -> int:
        """Tokens appended to the longest sequence."""
        return int(self.lengths.max(initial=0))


class Contents:
    """Sums and lengths of one state, on the device of the arrays it was last used with.

    Attributes
    ----------
    sketch : Sketch
        The sums; write to those that `to_write` returns.
    lengths : numpy.ndarray
        Tokens of each sequence, int64 [B].
    """

    __slots__ = ("_snapshot", "lengths", "sketch")

    def __init__(self, sketch: Sketch, lengths: np.ndarray) -> None:
        self.sketch = sketch
        self.lengths = lengths
        # the latest one that shares `sketch`; weak, so that no copy is made for a dropped snapshot
        self._snapshot: ref[Snapshot] | None = None

    def to_write(self, on_device: bool) -> Sketch:
        """Return the sums for writing, on a GPU or the host; a snapshot keeps the old ones."""
        sketch = self.sketch.to_device(on_device)
        if sketch is self.sketch and self._shared() is not None:
            sketch = sketch.copy()
        self.sketch = sketch
        return sketch

    def widened_copy(self, on_device: bool) -> Sketch:
        """Return a float64 copy of the sums, to which many tokens can be added.

        It is rounded once, by `replace`; an interrupt before that leaves these contents unchanged.
        """
        sketch = self.sketch.to_device(on_device)
        return Sketch(sketch.flat.astype(np.float64), sketch.n_buckets)

    def replace(self, after: Sketch, problem: Problem) -> None:
        """Take the sums of a `widened_copy` to which the keys of a problem were added."""
        sketch = after.rounded(self.sketch.flat.dtype)
        lengths = self.lengths + problem.count_keys()
        # both at once: an interrupt between the two lines above changes nothing
        self.sketch, self.lengths = sketch, lengths

    def add(self, other: Contents) -> None:
        """Add the sums and lengths of other contents of the same sizes."""
        sketch = self.to_write(cuda.is_array(self.sketch.flat))
        # numpy adds in the wider dtype and rounds once
        sketch.flat += other.sketch.to_device(cuda.is_array(sketch.flat)).flat
        self.lengths += other.lengths

    def select(self, indices: np.ndarray) -> Contents:
        """Return a copy of the sequences at `indices`."""
        flat = self.sketch.flat
        chosen = flat[arrays.to_device(indices, cuda.is_array(flat))]
        return Contents(Sketch(chosen, self.sketch.n_buckets), self.lengths[indices])

    def _shared(self) -> Snapshot | None:
        """Return the snapshot that shares the sums, if there is one."""
        snapshot = None if self._snapshot is None else self._snapshot()
        if snapshot is None or snapshot.sketch.flat is not self.sketch.flat:
            return None
        return snapshot

    def snapshot(self) -> Snapshot:
        """Return a snapshot: the one that shares the sums, or a new one."""
        snapshot = self._shared()
        if snapshot is None:
            snapshot = Snapshot(self, self.sketch, self.lengths.copy())
            self._snapshot = ref(snapshot)
        return snapshot

    def check_own(self, snapshot: Any) -> None:
        """Raise unless this is a snapshot of these contents."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"restore takes what snapshot returned, got {type(snapshot).__qualname__}"
            )
        if snapshot.owner is not self:
            raise ValueError(
                "this snapshot was taken of another state; a state that shall go its own way is a "
                "copy()"
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Share the sums of a snapshot again."""
        self.sketch, self.lengths, self._snapshot = (
            snapshot.sketch,
            snapshot.lengths.copy(),
            ref(snapshot),
        )

    def restore_members(self, snapshot: Snapshot, members: np.ndarray) -> None:
        """Copy some sequences of a snapshot; an index out of range raises and changes nothing."""
        lengths = snapshot.lengths[members]
        on_device = cuda.is_array(self.sketch.flat)
        indices = arrays.to_device(members, on_device)
        sketch = self.to_write(on_device)
        sketch.flat[indices] = snapshot.sketch.to_device(on_device).flat[indices]
        self.lengths[members] = lengths
