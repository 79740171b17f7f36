"""Snapshot: what a state was, kept without a copy for as long as nobody writes to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from racecore.problem import Sketch

if TYPE_CHECKING:
    from racecore.state.race_state import RaceState

__all__ = ["Snapshot"]


class Snapshot:
    """A moment of a `RaceState`, from `RaceState.snapshot`, to come back to with
    `RaceState.restore`.

    It shares the numbers of its state until that is written to; then the state takes a copy. It
    never changes itself.

    Notes
    -----
    Two parties at most share numbers, a state and one snapshot of it: that is why a snapshot goes back to its own state only,
    and why the state can tell whether a copy is needed by asking whether that snapshot still lives.
    """

    __slots__ = ("__weakref__", "lengths", "sketch", "state")

    def __init__(self, state: RaceState, sketch: Sketch, lengths: np.ndarray) -> None:
        self.state = state
        self.sketch = sketch
        self.lengths = lengths

    @property
    def n_tokens(self) -> int:
        """Tokens appended to the longest sequence."""
        return int(self.lengths.max(initial=0))
