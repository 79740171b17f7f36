"""The checks of a `RaceState`'s arguments, and their messages."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from racecore.inputs import (
    Passed,
    check_dtypes,
    check_readout,
    checked_mask,
    whole_sequences,
)
from racecore.problem import DEVICE_WORKSPACE_BYTES, WORKSPACE_BYTES, Problem
from racecore.runtime import arrays, cuda
from racecore.runtime.arrays import CallerArray
from racecore.soft_lsh import SoftLSH

__all__ = [
    "StateSizes",
    "check_append",
    "check_attend",
    "check_members",
    "check_mergeable",
    "check_same_hash",
    "check_sizes",
    "check_state_dtype",
    "check_step",
]


class StateSizes(NamedTuple):
    """The hash and the sizes of a state: all that its arguments are checked against."""

    lsh: SoftLSH
    batch: int  # B
    n_state_heads: int  # M
    n_kv_heads: int  # G
    value_dim: int  # V


def check_sizes(lsh: Any, batch: Any, n_kv_heads: Any, value_dim: Any) -> None:
    """Check the arguments of `RaceState.zeros`."""
    if not isinstance(lsh, SoftLSH):
        raise TypeError(f"lsh must be a racecore.SoftLSH, got {type(lsh).__qualname__}")
    for name, size, least in (
        ("batch", batch, 0),
        ("n_kv_heads", n_kv_heads, 1),
        ("value_dim", value_dim, 1),
    ):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
    if lsh.n_heads is not None and lsh.n_heads % n_kv_heads:
        raise ValueError(
            f"the {lsh.n_heads} heads of lsh must be a multiple of n_kv_heads, got {n_kv_heads}"
        )


def check_append(state: StateSizes, key: Any, value: Any, key_mask: Any) -> Problem:
    """Check the arguments of `RaceState.append`."""
    k, v = (_with_batch(x.array, state.batch) for x in arrays.resolve(None, key=key, value=value))
    _check_keys(state, k, v)
    check_dtypes(key=k, value=v)
    return _state_problem(state, None, k, v, key_mask=checked_mask(key_mask, k))


def check_attend(
    state: StateSizes, query: Any, readout: str, on_device: bool | None
) -> tuple[Problem, CallerArray]:
    """Check the arguments of `RaceState.attend`; also return the resolved query.

    `on_device` says whether to compute on a GPU, None means on the query's device.
    """
    (passed,) = arrays.resolve(on_device, query=query)
    q = _with_batch(passed.array, state.batch)
    _check_query(state, q)
    check_dtypes(query=q)
    check_readout(readout)
    return _state_problem(state, q, None, None, readout=readout), passed


def check_step(
    state: StateSizes, passed: Passed, key_mask: Any, counts: Any, readout: str
) -> Problem:
    """Check the arguments of `RaceState.step`."""
    q, k, v = (_with_batch(x.array, state.batch) for x in passed)
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
    return _state_problem(
        state, q, k, v, key_mask=checked_mask(key_mask, k), counts=counts, readout=readout
    )


def _check_keys(state: StateSizes, k: np.ndarray, v: np.ndarray) -> None:
    expected_k = (state.batch, "T", state.n_kv_heads, state.lsh.head_dim)
    expected_v = (state.batch, "T", state.n_kv_heads, state.value_dim)
    if not (_fits(k.shape, expected_k) and _fits(v.shape, expected_v) and k.shape[1] == v.shape[1]):
        raise ValueError(
            f"key and value must have shapes {_text(expected_k)} and {_text(expected_v)} for this "
            f"state, got {k.shape} and {v.shape}"
        )


def _check_query(state: StateSizes, q: np.ndarray) -> None:
    expected = (state.batch, "Tq", state.lsh.n_heads or "H", state.lsh.head_dim)
    if not _fits(q.shape, expected):
        raise ValueError(f"query must have shape {_text(expected)} for this state, got {q.shape}")
    if q.shape[2] % state.n_kv_heads or q.shape[2] == 0:
        raise ValueError(
            f"the query's heads must be a multiple of the state's {state.n_kv_heads}, got "
            f"{q.shape[2]}"
        )


def _state_problem(
    state: StateSizes,
    q: np.ndarray | None,
    k: np.ndarray | None,
    v: np.ndarray | None,
    *,
    key_mask: np.ndarray | None = None,
    counts: Any = None,
    readout: str = "ratio",
) -> Problem:
    """Return a problem: only keys to sum, only queries to read out, or both, which is causal."""
    side = q if q is not None else k
    if side is None:
        raise TypeError("a problem needs a query or a key")
    planes, beta = state.lsh.per_head(state.n_state_heads)
    # int64 [B, 5]: batch, query begin and end, key begin and end
    sequences = whole_sequences(
        state.batch, 0 if q is None else q.shape[1], 0 if k is None else k.shape[1]
    )
    if counts is not None:
        sequences[:, 2] = sequences[:, 4] = _checked_counts(counts, state.batch, side.shape[1])
    return Problem(
        query=q,
        key=k,
        value=v,
        planes=planes,
        beta=beta,
        key_mask=key_mask,
        sequences=sequences,
        n_heads=state.n_state_heads if q is None else q.shape[2],
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
    numbers = arrays.to_host(counts, "counts")
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


def check_same_hash(of_state: SoftLSH, lsh: SoftLSH) -> None:
    """Raise unless a state's hash is `lsh`, or one of the same planes and beta."""
    if lsh is not of_state and lsh.fingerprint != of_state.fingerprint:
        raise ValueError(
            "this state was made with another hash: its fingerprint is "
            f"{of_state.fingerprint[:12]}..., that of the hash in use {lsh.fingerprint[:12]}...; "
            "planes and beta must be identical"
        )


def check_mergeable(mine: StateSizes, other: StateSizes) -> None:
    """Raise unless two states have the same hash and sizes."""
    check_same_hash(other.lsh, mine.lsh)
    if mine[1:] != other[1:]:
        raise ValueError(
            "states must agree in (batch, key/value heads, value dim): this one has "
            f"{(mine.batch, mine.n_kv_heads, mine.value_dim)}, the other "
            f"{(other.batch, other.n_kv_heads, other.value_dim)}"
        )


def check_members(indices: Any, name: str) -> np.ndarray:
    """Return indices into a batch: integers in one dimension, or a bool for each sequence."""
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


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(w, str) or w == s for s, w in zip(shape, expected, strict=True)
    )


def _text(expected: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, expected))}]"
