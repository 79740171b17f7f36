"""Time a decoded token against the memory bandwidth, and measure the errors of float32 states.

    python asv_benchmarks/decoding.py            # times (a minute)
    python asv_benchmarks/decoding.py --errors   # float32 against float64 (some minutes)

The floor is the time that the bandwidth of the machine (`ceilings`) needs to read and write every
number of the states once. States of many tokens are made by merging copies of a state of 1,024
tokens, so that their numbers have a realistic size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ceilings
import machine
import numba
import numpy as np

import racecore
from racecore.ops.soft_hash.cpu import soft_hash

HEADS, DIM = 32, 128
SHORT, LONG = 2**10, 2**24
SETTINGS = ((32, 1), (8, 1), (8, 8))  # key/value heads, batch
CHUNK = 2**12


def seconds(call: Callable[[], object], rounds: int = 300, patience: float = 2.0) -> float:
    """Return the median time of a call."""
    call()
    laps, began = [], time.perf_counter()
    while len(laps) < 5 or (len(laps) < rounds and time.perf_counter() - began < patience):
        started = time.perf_counter()
        call()
        laps.append(time.perf_counter() - started)
    return statistics.median(laps)


def grown(n_kv_heads: int, batch: int, n_tokens: int, dtype: Any) -> racecore.RaceState:
    """Return a state of so many tokens, a power of two."""
    lsh = racecore.SoftLSH.random(DIM, 4, 4, rng=0)
    state = racecore.RaceState.zeros(lsh, batch, n_kv_heads, DIM, dtype=dtype)
    key, value = np.random.default_rng(0).standard_normal(
        (2, batch, SHORT, n_kv_heads, DIM), dtype=np.float32
    )
    state.append(key, value)
    while state.n_tokens < n_tokens:
        state.merge(state.copy())
    return state


def seconds_per_token(state: racecore.RaceState, token: list[np.ndarray]) -> float:
    """Return the time of a step."""
    return seconds(lambda: state.step(*token))


def seconds_apart(state: racecore.RaceState, token: list[np.ndarray]) -> float:
    """Return the time of `append` and `attend`."""

    def both() -> None:
        state.append(*token[1:])
        state.attend(token[0])

    return seconds(both)


def times(bytes_per_second: float) -> Iterator[str]:
    """Yield the lines of the table of times, in microseconds."""
    yield (
        f"| G | batch | state | floor | {SHORT:,} tokens | {LONG:,} tokens | over the floor "
        "| append, attend |"
    )
    yield "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for n_kv_heads, batch in SETTINGS:
        token = [
            np.random.default_rng(1).standard_normal((batch, 1, heads, DIM), dtype=np.float32)
            for heads in (HEADS, n_kv_heads, n_kv_heads)
        ]
        for dtype in (np.float64, np.float32):
            short, long = (grown(n_kv_heads, batch, n, dtype) for n in (SHORT, LONG))
            n_bytes = short.mass.nbytes + short.value_sum.nbytes
            floor = 2 * n_bytes / bytes_per_second
            first, last, both = (
                seconds_per_token(short, token),
                seconds_per_token(long, token),
                seconds_apart(short, token),
            )
            columns = " | ".join(f"{1e6 * x:,.0f}" for x in (floor, first, last))
            name = f"{n_bytes / 1e6:.1f} MB, {np.dtype(dtype).name}"
            ratio = f"{last / floor:.1f} | {1e6 * both:,.0f}"
            yield f"| {n_kv_heads} | {batch} | {name} | {columns} | {ratio} |"


@numba.njit
def _add_one_by_one(phi: Any, value: Any, mass: Any, value_sum: Any) -> None:
    """Add rows phi [T, S] and value [T, V] as `RaceState.step` adds a token to a float32 state."""
    for t in range(phi.shape[0]):
        for s in range(phi.shape[1]):
            mass[s] += phi[t, s]
            for d in range(value.shape[1]):
                value_sum[s, d] += np.float32(phi[t, s] * value[t, d])


def errors(
    mean: float, n_tokens: tuple[int, ...], head_dim: int = 32, value_dim: int = 16
) -> Iterator[str]:
    """Yield a line per number of tokens: the largest relative error of a mass, and that of outputs,
    in norm.

    Keys are rows of independent numbers with projections around 1, values have this mean and
    variance 1.
    """
    lsh = racecore.SoftLSH.random(head_dim, 4, 4, rng=0)
    rng = np.random.default_rng(0)
    wide, pieces = (
        racecore.RaceState.zeros(lsh, 1, 1, value_dim, dtype=dtype)
        for dtype in (np.float64, np.float32)
    )
    single = pieces.copy()
    scale = np.float32(head_dim**-0.5)
    query = rng.standard_normal((1, 64, 1, head_dim), dtype=np.float32) * scale
    planes, beta = lsh.per_head(1)
    while wide.n_tokens < max(n_tokens):
        key = rng.standard_normal((1, CHUNK, 1, head_dim), dtype=np.float32) * scale
        value = rng.standard_normal((1, CHUNK, 1, value_dim), dtype=np.float32) + np.float32(mean)
        wide.append(key, value)
        pieces.append(key, value)
        phi = soft_hash(key[0], planes, beta)[:, 0]
        n_buckets = phi.shape[1]
        _add_one_by_one(
            phi,
            value[0, :, 0],
            single.mass.reshape(-1),
            single.value_sum.reshape(n_buckets, value_dim),
        )
        if wide.n_tokens in n_tokens:
            found = []
            for state in (single, pieces):
                out, right = (s.attend(query).astype(np.float64) for s in (state, wide))
                found.append(np.abs(state.mass / wide.mass - 1).max())
                found.append(np.linalg.norm(out - right) / np.linalg.norm(right))
            yield (
                f"| {mean:g} | {wide.n_tokens:,} | " + " | ".join(f"{x:.1e}" for x in found) + " |"
            )


def main() -> None:
    """Print the table chosen on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--errors", action="store_true", help="of float32 states")
    options = parser.parse_args()
    print(machine.describe())
    if options.errors:
        print(
            "| mean of values | tokens | mass, one by one | outputs | mass, in pieces of "
            f"{CHUNK:,} | outputs |"
        )
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for mean in (0.0, 1.0):
            for line in errors(mean, tuple(2**n for n in (12, 16, 20, 22, 24))):
                print(line, flush=True)
        return
    found = ceilings.measure()
    print(f"bandwidth: {found['bytes_per_second'] / 1e9:.1f} GB/s, cores: {found['cores']}")
    for line in times(found["bytes_per_second"]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
