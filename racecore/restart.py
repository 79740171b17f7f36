"""Backward in another place than forward: what it starts from, rebuilt from the inputs alone.

Frameworks that trace programs (JAX) keep arrays between the two, no Python objects. So the states before every chunk are
summed from the keys again: the same sums in the same order, hence the same bits as those that forward would have saved.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from racecore import backends, inputs, plan
from racecore.gradients import Saved
from racecore.problem import Problem
from racecore.soft_lsh import SoftLSH

__all__ = ["saved_from_inputs"]


def saved_from_inputs(
    query: Any, key: Any, value: Any, lsh: SoftLSH, *,
    is_causal: bool, readout: str, key_mask: Any, cu_seqlens: Any, wrt: Any,
) -> Saved:  # fmt: skip
    """Return what `racecore.attention_forward` saves, without an output and for a pass over the keys at most.

    Parameters are those of `racecore.attention_forward`, whose inputs these must be; gradients come out bit for bit the same.

    Raises
    ------
    ValueError, TypeError
        As `racecore.attention_forward`.
    """
    problem, lsh, _ = inputs.check_attention(
        query, key, value, lsh, is_causal=is_causal, readout=readout, key_mask=key_mask, cu_seqlens=cu_seqlens,
        chunk_size=None, memory_limit=None,
    )  # fmt: skip
    backend = backends.choose(None, problem.on_device)
    states = tuple(_states_of_part(problem, backend, first, last) for first, last in plan.parts(problem))
    return Saved(problem, lsh, inputs.check_wrt(wrt, False), backend.name, states, None, (query, key, value))


def _states_of_part(problem: Problem, backend: backends.Backend, first: int, last: int) -> list[np.ndarray] | None:
    """Return the states before every chunk of a long causal sequence; backward sums those of other parts itself."""
    if not problem.is_causal or last > first + 1:
        return None
    part = problem.part(first, last)
    sketch = part.new_sketch()
    states = [sketch.flat.copy()]
    for chunk in plan.chunks(part, "key")[:-1]:
        sequence = part.sequences.copy()
        sequence[0, 3:] = chunk[0, 2], chunk[-1, 3]  # the keys of this chunk alone
        backend.bidirectional.sum_keys(replace(part, sequences=sequence), sketch)
        states.append(sketch.flat.copy())
    return states
