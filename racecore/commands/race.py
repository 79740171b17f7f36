"""Time against length: RACE attention beside softmax attention, both on NumPy arrays and the same
processors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

import racecore
from racecore.soft_lsh import SoftLSH

__all__ = ["Lap", "measure", "softmax_attention", "softmax_wins", "table"]

_ROWS = 64  # queries that softmax treats at once: their scores stay in the cache
_ENOUGH = 0.2  # seconds of repetitions, and at least two of them


@dataclass(frozen=True)
class Lap:
    """Seconds for one length; None where it was not run because it would take too long."""

    tokens: int
    forward: float
    backward: float  # forward and backward together
    softmax: float | None


def softmax_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, pool: Executor
) -> np.ndarray:
    """Compute softmax(q k^T / sqrt(D)) v for [T, H, D] arrays; every thread of the pool takes
    blocks of queries.

    That is two to five times as fast as leaving the threads to NumPy, which uses them for matrix
    products alone.
    """
    out = np.empty_like(query)
    n_tokens, n_heads, dim = query.shape
    scaled = [np.ascontiguousarray(key[:, h].T) / np.float32(np.sqrt(dim)) for h in range(n_heads)]
    values = [np.ascontiguousarray(value[:, h]) for h in range(n_heads)]

    def block(task: tuple[int, int]) -> None:
        """Write some rows of one head."""
        h, begin = task
        scores = query[begin : begin + _ROWS, h] @ scaled[h]
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        out[begin : begin + _ROWS, h] = scores @ values[h] / scores.sum(axis=1, keepdims=True)

    tasks = [(h, begin) for h in range(n_heads) for begin in range(0, n_tokens, _ROWS)]
    list(pool.map(block, tasks))  # map, since it drops what is waiting when Ctrl-C comes
    return out


def measure(
    lengths: list[int], heads: int, head_dim: int, lsh: SoftLSH, n_threads: int, patience: float
) -> Iterator[Lap]:
    """Time every length, shortest first; best of a few repetitions.

    Parameters
    ----------
    n_threads : int
        For both attentions.
    patience : float
        Seconds; neither attention is run where the lengths before say that it would take longer.
    """
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    softmax: float | None = 0.0
    backward = 0.0
    # The blocks of softmax run side by side, so each matrix product gets one thread; RACE does not
    # use BLAS.
    with ThreadPoolExecutor(n_threads) as pool, racecore.threads(n_threads), threadpool_limits(1):
        for tokens in lengths:
            if 2 * backward > patience:
                return
            q, k, v, d_out = (
                rng.standard_normal((tokens, heads, head_dim), dtype=np.float32) for _ in range(4)
            )
            forward = _best(racecore.attention, q, k, v, lsh)
            backward = _best(_forward_and_backward, q, k, v, d_out, lsh)
            if softmax is not None:  # it takes four times as long for twice the tokens
                slow = 4 * softmax > patience
                softmax = None if slow else _best(softmax_attention, q, k, v, pool)
            yield Lap(tokens, forward, backward, softmax)


def _forward_and_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, lsh: SoftLSH
) -> None:
    _, saved = racecore.attention_forward(q, k, v, lsh, wrt=("query", "key", "value"))
    racecore.attention_backward(d_out, saved)


def _best(function: Callable[..., object], *arguments: object) -> float:
    best, spent, n_calls = np.inf, 0.0, 0
    while n_calls < 2 or spent < _ENOUGH:  # the first one warms caches, or even compiles
        started = time.perf_counter()
        function(*arguments)
        seconds = time.perf_counter() - started
        best, spent, n_calls = min(best, seconds), spent + seconds, n_calls + 1
    return float(best)


def table(laps: list[Lap]) -> str:
    """Return a plain table of all laps."""
    lines = [
        "      tokens         RACE              RACE      softmax     RACE forward is",
        "                  forward   forw. + backward      forward",
    ]
    for lap in laps:
        softmax = "-" if lap.softmax is None else _milliseconds(lap.softmax)
        lines.append(
            f"{lap.tokens:>12,} {_milliseconds(lap.forward):>12} "
            f"{_milliseconds(lap.backward):>18} {softmax:>12}"
            f"     {_verdict(lap)}".rstrip()
        )
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _verdict(lap: Lap) -> str:
    if lap.softmax is None:
        return ""
    ratio = lap.softmax / lap.forward
    return f"{ratio:.1f} x faster" if ratio >= 1 else f"{1 / ratio:.1f} x slower"


def softmax_wins(laps: list[Lap]) -> list[int]:
    """Return the lengths at which softmax attention was the faster one, forward."""
    return [lap.tokens for lap in laps if lap.softmax is not None and lap.softmax < lap.forward]
