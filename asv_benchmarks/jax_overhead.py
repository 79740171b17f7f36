"""Measure the overhead of JAX on a call of racecore. Needs JAX.

    python asv_benchmarks/jax_overhead.py

Calls on NumPy arrays and jitted JAX functions are timed alternately; the table has the median over
the rounds of the ratio of neighbouring times.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

import racecore
from racecore.adapters.jax import race_attention

CASES = ((1, 1), (1, 256), (1, 2**11), (1, 2**14), (1, 2**16), (32, 256))  # batch, tokens


def functions(
    batch: int, tokens: int, is_causal: bool
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return functions on NumPy arrays and their JAX counterparts, by name."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((batch, tokens, 4, 128), dtype=np.float32) for _ in range(4)]
    lsh = racecore.SoftLSH.random(128, 4, 4, rng=0)
    *jax_rows, g = (jnp.asarray(x) for x in rows)
    planes, beta = jnp.asarray(lsh.planes, jnp.float32), jnp.float32(1.0)

    def attend(*rows: Any) -> Any:
        return race_attention(*rows, planes, beta, is_causal=is_causal)

    @jax.jit
    def both(g: Any, *rows: Any) -> Any:
        out, pull = jax.vjp(attend, *rows)
        return out, pull(g)

    def both_in_numpy() -> None:
        _, saved = racecore.attention_forward(
            *rows[:3], lsh, is_causal=is_causal, wrt=("query", "key", "value")
        )
        racecore.attention_backward(rows[3], saved)

    forward = jax.jit(attend)
    return {
        "forward": (
            lambda: racecore.attention(*rows[:3], lsh, is_causal=is_causal),
            lambda: forward(*jax_rows).block_until_ready(),
        ),
        "forward + backward": (both_in_numpy, lambda: jax.block_until_ready(both(g, *jax_rows))),
    }


def compare(
    pair: tuple[Callable[[], Any], Callable[[], Any]], rounds: int
) -> tuple[float, float, float]:
    """Return the median milliseconds of each, and the median of the ratios."""
    seconds = np.empty((rounds + 1, 2))
    for each in seconds:
        for i, function in enumerate(pair):
            started = time.perf_counter()
            function()
            each[i] = time.perf_counter() - started
    seconds = seconds[1:]  # the first round compiles
    return *(1e3 * np.median(seconds, axis=0)), float(np.median(seconds[:, 1] / seconds[:, 0]))


def main(rounds: int) -> None:
    """Print one table."""
    print(
        f"JAX {jax.__version__}, NumPy {np.__version__}, {len(os.sched_getaffinity(0))} processors"
    )
    print("float32, 4 heads of 128, L = P = 4; milliseconds, medians of", rounds, "rounds\n")
    print("batch  tokens  kind           what                   NumPy       JAX   ratio")
    for batch, tokens in CASES:
        for is_causal in (False, True):
            for what, pair in functions(batch, tokens, is_causal).items():
                numpy, in_jax, ratio = compare(pair, rounds)
                kind = "causal" if is_causal else "bidirectional"
                print(
                    f"{batch:5}  {tokens:6}  {kind:<13}  {what:<18}  {numpy:8.2f}  {in_jax:8.2f}  "
                    f"{ratio:6.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    main(parser.parse_args().rounds)
