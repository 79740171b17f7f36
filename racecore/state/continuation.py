"""Attention that begins with a state and ends in one: the check of the first, the making of the
last.
"""

from __future__ import annotations

from typing import Any

from racecore.problem import Problem, Sketch
from racecore.soft_lsh import SoftLSH
from racecore.state.race_state import RaceState

__all__ = ["check_initial_state", "final_state", "lsh_of"]


def lsh_of(lsh: Any, initial_state: Any) -> Any:
    """Return `lsh`; None means the hash of the initial state, if there is one."""
    return initial_state.lsh if lsh is None and isinstance(initial_state, RaceState) else lsh


def check_initial_state(state: Any, problem: Problem, lsh: SoftLSH) -> None:
    """Raise unless `state` is None or fits the hash and the sizes of `problem`."""
    if state is None:
        return
    if not isinstance(state, RaceState):
        raise TypeError(
            f"initial_state must be a racecore.RaceState or None, got {type(state).__qualname__}"
        )
    state.check_same_hash(lsh)
    expected = (len(problem.sequences), problem.n_kv_heads, problem.value_dim)
    found = (state.batch, state.n_kv_heads, state.value_dim)
    if found != expected:
        raise ValueError(
            "initial_state does not fit: (batch or packed sequences, key/value heads, value dim) "
            f"must be {expected}, got {found}"
        )


def final_state(
    initial: RaceState | None, sketch: Sketch, problem: Problem, lsh: SoftLSH
) -> RaceState:
    """Return the state after the last token, from the sums of `problem` and its initial state."""
    lengths = problem.count_keys()
    if initial is not None:
        lengths = lengths + initial.lengths
    return RaceState(lsh, sketch, lengths, problem.n_kv_heads, problem.value_dim)
