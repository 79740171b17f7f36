"""Times of RACE attention and softmax attention on NumPy arrays, with the same threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

import racecore
from racecore.soft_lsh import SoftLSH

__all__ = ["Timing", "lengths_where_softmax_is_faster", "measure", "softmax_attention", "table"]

# Queries of one block of softmax attention: their scores stay in the cache.
_BLOCK = 64
# Total time of the repetitions of one measurement; there are two at least.
_MIN_SECONDS = 0.2


@dataclass(frozen=True)
class Timing:
    """Seconds for one length.

    `backward` is that of forward and backward together; `softmax` is None where it was not run
    because it would take too long.
    """

    tokens: int
    forward: float
    backward: float
    softmax: float | None


def softmax_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, pool: Executor
) -> np.ndarray:
    """Compute softmax(q k^T / sqrt(D)) v for [T, H, D] arrays, one block of queries of a head at a
    time on every thread of the pool.

    That is two to five times as fast as NumPy's own threads, which serve matrix products alone.
    """
    out = np.empty_like(query)
    n_tokens, n_heads, dim = query.shape
    # Per head: keys [D, T], scaled, and values [T, D], contiguous.
    scaled = [np.ascontiguousarray(key[:, h].T) / np.float32(np.sqrt(dim)) for h in range(n_heads)]
    values = [np.ascontiguousarray(value[:, h]) for h in range(n_heads)]

    def block(task: tuple[int, int]) -> None:
        """Compute some rows of one head."""
        h, begin = task
        scores = query[begin : begin + _BLOCK, h] @ scaled[h]
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        out[begin : begin + _BLOCK, h] = scores @ values[h] / scores.sum(axis=1, keepdims=True)

    tasks = [(h, begin) for h in range(n_heads) for begin in range(0, n_tokens, _BLOCK)]
    # `map`, since it cancels the tasks that have not started when Ctrl-C is pressed.
    list(pool.map(block, tasks))
    return out


def measure(
    lengths: list[int], heads: int, head_dim: int, lsh: SoftLSH, n_threads: int, max_seconds: float
) -> Iterator[Timing]:
    """Time every length, shortest first; best of a few repetitions.

    Parameters
    ----------
    lengths : list of int
        Tokens, ascending.
    heads, head_dim : int
    lsh : SoftLSH
    n_threads : int
        For both kinds of attention.
    max_seconds : float
        Neither is run where the length before predicts a longer time.
    """
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    softmax: float | None = 0.0
    backward = 0.0
    # Blocks of softmax run in parallel, so each matrix product gets one thread; RACE does not use
    # BLAS.
    with ThreadPoolExecutor(n_threads) as pool, racecore.threads(n_threads), threadpool_limits(1):
        for tokens in lengths:
            # RACE takes twice as long for twice the tokens, softmax four times.
            if 2 * backward > max_seconds:
                return
            q, k, v, d_out = (
                rng.standard_normal((tokens, heads, head_dim), dtype=np.float32) for _ in range(4)
            )
            forward = _best(racecore.attention, q, k, v, lsh)
            backward = _best(_forward_and_backward, q, k, v, d_out, lsh)
            if softmax is not None:
                is_too_slow = 4 * softmax > max_seconds
                softmax = None if is_too_slow else _best(softmax_attention, q, k, v, pool)
            yield Timing(tokens, forward, backward, softmax)


def _forward_and_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray, lsh: SoftLSH
) -> None:
    _, saved = racecore.attention_forward(q, k, v, lsh, wrt=("query", "key", "value"))
    racecore.attention_backward(d_out, saved)


def _best(function: Callable[..., object], *arguments: object) -> float:
    """Return the shortest time of a call in seconds."""
    best, total, n_calls = np.inf, 0.0, 0
    # Two calls at least: the first one warms caches, or even compiles.
    while n_calls < 2 or total < _MIN_SECONDS:
        started = time.perf_counter()
        function(*arguments)
        seconds = time.perf_counter() - started
        best = min(best, seconds)
        total += seconds
        n_calls += 1
    return float(best)


def table(timings: list[Timing]) -> str:
    """Return a plain table of all timings."""
    lines = [
        "      tokens         RACE              RACE      softmax     RACE forward is",
        "                  forward   forw. + backward      forward",
    ]
    for timing in timings:
        softmax = "-" if timing.softmax is None else _milliseconds(timing.softmax)
        lines.append(
            f"{timing.tokens:>12,} {_milliseconds(timing.forward):>12} "
            f"{_milliseconds(timing.backward):>18} {softmax:>12}"
            f"     {_ratio(timing)}".rstrip()
        )
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _ratio(timing: Timing) -> str:
    if timing.softmax is None:
        return ""
    ratio = timing.softmax / timing.forward
    return f"{ratio:.1f} x faster" if ratio >= 1 else f"{1 / ratio:.1f} x slower"


def lengths_where_softmax_is_faster(timings: list[Timing]) -> list[int]:
    """Return the lengths at which softmax attention was faster than RACE, forward."""
    return [
        timing.tokens
        for timing in timings
        if timing.softmax is not None and timing.softmax < timing.forward
    ]
