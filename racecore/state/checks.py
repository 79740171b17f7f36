"""Every check of what a caller hands to a `RaceState`, and every message about it; the helpers are
those of `inputs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from racecore.inputs import (
    check_dtypes,
    check_readout,
    check_same_device,
    checked_mask,
    whole_sequences,
)
from racecore.problem import DEVICE_WORKSPACE_BYTES, WORKSPACE_BYTES, Problem, changed
from racecore.runtime import arrays, cuda

if TYPE_CHECKING:
    from racecore.state.race_state import RaceState

__all__ = ["check_append", "check_attend", "check_members", "check_state_dtype", "check_step"]


def check_append(state: RaceState, key: Any, value: Any, key_mask: Any) -> Problem:
    """Check the arguments of `RaceState.append`."""
    k, v = arrays.as_array(key, "key"), arrays.as_array(value, "value")
    check_same_device(key=k, value=v)
    k, v = _with_batch(k, state.batch), _with_batch(v, state.batch)
    _check_keys(state, k, v)
    check_dtypes(key=k, value=v)
    return _state_problem(state, None, k, v, key_mask=checked_mask(key_mask, k))


def check_attend(state: RaceState, query: Any, readout: str, on_device: bool | None) -> Problem:
    """Check the arguments of `RaceState.attend`; `on_device` is where the query shall be, None
    means where it is.
    """
    q = _with_batch(arrays.as_array(query, "query"), state.batch)
    q = q if on_device is None else arrays.to_device(q, on_device)
    _check_query(state, q)
    check_dtypes(query=q)
    check_readout(readout)
    return _state_problem(state, q, None, None, readout=readout)


def check_step(
    state: RaceState,
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    counts: Any,
    readout: str,
    on_device: bool | None,
) -> Problem:
    """Check the arguments of `RaceState.step`; `on_device` is where the arrays shall be, None means
    where they are.

    Arrays like those of the last plain step have been checked then.
    """
    q, k, v = (
        arrays.as_array(query, "query"),
        arrays.as_array(key, "key"),
        arrays.as_array(value, "value"),
    )
    is_plain = key_mask is None and counts is None and on_device is None
    signature = (
        q.shape,
        k.shape,
        v.shape,
        type(q),
        type(k),
        type(v),
        q.dtype,
        k.dtype,
        v.dtype,
        readout,
    )
    if is_plain and signature == state.checked_step[0]:
        return changed(state.checked_step[1], query=q, key=k, value=v)
    if on_device is None:
        check_same_device(query=q, key=k, value=v)
    else:
        q, k, v = (arrays.to_device(x, on_device) for x in (q, k, v))
    q, k, v = (_with_batch(x, state.batch) for x in (q, k, v))
    _check_keys(state, k, v)
    _check_query(state, q)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"a step takes a query for every key, got Tq = {q.shape[1]} and Tk = {k.shape[1]}; "
            "append and attend take them apart"
        )
    check_dtypes(query=q, key=k, value=v)
    check_readout(readout)
    if key_mask is not None and counts is not None:
        raise ValueError(
            "key_mask and counts were both given; use one: a key that does not count is masked"
        )
    problem = _state_problem(
        state, q, k, v, key_mask=checked_mask(key_mask, k), counts=counts, readout=readout
    )
    if is_plain and q.ndim == len(signature[0]):
        state.checked_step = signature, changed(problem, query=None, key=None, value=None)
    return problem


def _check_keys(state: RaceState, k: np.ndarray, v: np.ndarray) -> None:
    wanted_k = (state.batch, "T", state.n_kv_heads, state.lsh.head_dim)
    wanted_v = (state.batch, "T", state.n_kv_heads, state.value_dim)
    if not (_fits(k.shape, wanted_k) and _fits(v.shape, wanted_v) and k.shape[1] == v.shape[1]):
        raise ValueError(
            f"key and value must have shapes {_text(wanted_k)} and {_text(wanted_v)} for this "
            f"state, got {k.shape} and {v.shape}"
        )


def _check_query(state: RaceState, q: np.ndarray) -> None:
    wanted = (state.batch, "Tq", state.lsh.n_heads or "H", state.lsh.head_dim)
    if not _fits(q.shape, wanted):
        raise ValueError(f"query must have shape {_text(wanted)} for this state, got {q.shape}")
    if q.shape[2] % state.n_kv_heads or q.shape[2] == 0:
        raise ValueError(
            f"the query's heads must be a multiple of the state's {state.n_kv_heads}, got "
            f"{q.shape[2]}"
        )


def _state_problem(
    state: RaceState,
    q: np.ndarray | None,
    k: np.ndarray | None,
    v: np.ndarray | None,
    *,
    key_mask: np.ndarray | None = None,
    counts: Any = None,
    readout: str = "ratio",
) -> Problem:
    """Bundle a problem: only keys to sum, only queries to answer, or both, which is causal."""
    side = q if q is not None else k
    if side is None:
        raise TypeError("a problem needs a query or a key")
    batch, n_state_heads, _ = state.sketch.flat.shape
    planes, beta = state.lsh.per_head(n_state_heads)
    sequences = whole_sequences(
        batch, 0 if q is None else q.shape[1], 0 if k is None else k.shape[1]
    )
    if counts is not None:
        sequences[:, 2] = sequences[:, 4] = _checked_counts(counts, batch, side.shape[1])
    return Problem(
        query=q,
        key=k,
        value=v,
        planes=planes,
        beta=beta,
        key_mask=key_mask,
        sequences=sequences,
        n_heads=n_state_heads if q is None else q.shape[2],
        n_kv_heads=state.n_kv_heads,
        value_dim=state.value_dim,
        is_causal=q is not None and k is not None,
        readout=readout,
        dtype=arrays.compute_dtype(side.dtype),
        workspace_bytes=DEVICE_WORKSPACE_BYTES if cuda.is_array(side) else WORKSPACE_BYTES,
    )


def _checked_counts(counts: Any, batch: int, n_tokens: int) -> np.ndarray:
    """Return how many tokens each sequence has, integers [B]."""
    if isinstance(counts, (list, tuple)):
        counts = np.asarray(counts, None if counts else np.int64)
    numbers = arrays.to_device(arrays.as_array(counts, "counts"), False)
    if numbers.dtype.kind not in "iub":
        raise TypeError(
            f"counts must be integers or bools (True = all tokens), got {numbers.dtype}"
        )
    if numbers.shape != (batch,):
        raise ValueError(f"counts must have shape [B] = {(batch,)}, got {numbers.shape}")
    if numbers.dtype.kind == "b":
        return numbers * np.int64(n_tokens)
    if batch and not (numbers.min() >= 0 and numbers.max() <= n_tokens):
        raise ValueError(
            f"counts must be between 0 and T = {n_tokens}, got {numbers.min()} ... {numbers.max()}"
        )
    return numbers


def check_members(indices: Any, name: str) -> np.ndarray:
    """Check which sequences of a batch a caller means: integers in one dimension, or a bool for
    each.
    """
    members = np.atleast_1d(np.asarray(indices))
    if members.size == 0 and members.dtype.kind == "f":
        members = members.astype(np.int64)
    if members.dtype.kind not in "iub":
        raise TypeError(f"{name} must be integers, got {members.dtype}")
    if members.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {members.shape}")
    return members


def check_state_dtype(dtype: Any) -> np.dtype:
    """Check the dtype of a state's numbers."""
    try:
        checked = np.dtype(dtype)
    except TypeError:
        checked = None
    if checked not in (np.float32, np.float64):
        raise ValueError(f"the dtype of a state is numpy.float32 or numpy.float64, got {dtype!r}")
    return checked


def _with_batch(array: np.ndarray, batch: int) -> np.ndarray:
    return array[None] if array.ndim == 3 and batch == 1 else array


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(w, str) or w == s for s, w in zip(shape, wanted, strict=True)
    )


def _text(wanted: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, wanted))}]"
