"""The O(T^2) angular kernel that RACE estimates: to judge the approximation, for short inputs."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from racecore import inputs
from racecore.inputs import Passed
from racecore.runtime import arrays

__all__ = ["angular_attention"]

# bounds the memory to so many rows of Tk similarities per head
_QUERIES_AT_ONCE = 256


def angular_attention(
    query: Any, key: Any, value: Any, power: float, *, is_causal: bool = False
) -> Any:
    """Compute attention under the sharpened angular kernel, exactly and in quadratic time.

    ``sim(q, k) = (1 - arccos(cos(q, k)) / pi)**power`` and ``out = sum sim v / sum sim``. With hard
    hashes (large beta) and many tables, `racecore.attention` with P planes converges to this with
    ``power = P``.

    Parameters
    ----------
    query : array, shape [B, Tq, H, D]
    key : array, shape [B, Tk, G, D]
    value : array, shape [B, Tk, G, V]
        As for `racecore.attention`; rows of zeros count as orthogonal to everything.
    power : float
        The sharpness; positive.
    is_causal : bool
        Query i sees keys 0 ... i only; needs Tq == Tk.

    Returns
    -------
    array, shape [B, Tq, H, V]
        In the query's dtype and library; zeros if there is no key. Arithmetic is float64.

    Raises
    ------
    ValueError, TypeError
        As for `racecore.attention`, and for a power that is not a positive number.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), section 3, the kernel before its estimation.
    """
    if (
        isinstance(power, bool)
        or not isinstance(power, numbers.Real)
        or not 0 < power < float("inf")
    ):
        raise ValueError(f"power must be a positive number, got {power!r}")
    passed = Passed.resolve(query, key, value)
    problem, _ = inputs.check_attention(passed, None, is_causal=is_causal, readout="ratio")
    give_back = passed.query.way_back()
    q, k, v = (
        arrays.as_numpy(x.array, name).astype(np.float64) for name, x in passed._asdict().items()
    )
    if not passed.query.had_batch:
        q, k, v = q[None], k[None], v[None]
    repeats = problem.n_heads // problem.n_kv_heads
    q, k = _unit_rows(q), _unit_rows(k)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h // repeats
            for begin in range(0, q.shape[1], _QUERIES_AT_ONCE):
                rows = slice(begin, begin + _QUERIES_AT_ONCE)
                out[b, rows, h] = _rows(
                    q[b, rows, h], k[b, :, g], v[b, :, g], power, begin if is_causal else None
                )
    return give_back((out if passed.query.had_batch else out[0]).astype(passed.query.dtype))


def _rows(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, power: float, first: int | None
) -> np.ndarray:
    """Return the outputs [n, V] of n queries.

    `first` is the token of the first query, None if attention is not causal.
    """
    with np.errstate(divide="ignore"):
        logits = power * np.log1p(-np.arccos(np.clip(q @ k.T, -1, 1)) / np.pi)  # [n, Tk]
    if first is not None:
        logits = np.where(np.arange(len(k)) <= first + np.arange(len(q))[:, None], logits, -np.inf)
    highest = logits.max(axis=1, keepdims=True, initial=-np.inf)
    # without the largest logit subtracted, a large power would underflow
    weight = np.exp(logits - np.where(np.isneginf(highest), 0, highest))
    total = weight.sum(axis=1, keepdims=True)
    if first is not None and not np.isfinite(v).all():
        # each query gets a product of its own: in one product, 0 * NaN would reach earlier queries
        seen = [(w[: first + i + 1], v[: first + i + 1]) for i, w in enumerate(weight)]
        out = np.stack([w @ values for w, values in seen]) if seen else np.zeros((0, v.shape[1]))
    else:
        out = weight @ v
    return np.divide(out, total, out=np.zeros((len(q), v.shape[1])), where=total != 0)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    """Return rows of length 1; rows of zeros stay, rows with infinities become NaN."""
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    with np.errstate(invalid="ignore"):
        # the squares of scaled rows cannot overflow
        scaled = np.divide(x, largest, out=np.zeros_like(x), where=largest != 0)
    length = np.linalg.norm(scaled, axis=-1, keepdims=True)
    return np.divide(scaled, length, out=np.zeros_like(x), where=length != 0)
