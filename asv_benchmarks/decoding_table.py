"""Time a decoded token, dense and with SOCKET, for contexts up to 2^20.

    python asv_benchmarks/decoding_table.py

One key/value cache in bfloat16, 32 query heads that share 8 key/value heads of 128, 60 tables, a
twentieth of the tokens. The three methods alternate with a loop that only reads the same keys and
values (`reading`), and the median of the rounds counts; *of reading* is the time of this loop
divided by that of dense attention. The bandwidth of STREAM's triad is measured in the same run.
*Bytes* are counted: for dense attention all keys and values, which is the minimum; for SOCKET
codes, norms and the selected rows, with the minimum of reading every selected row once. Queries
and keys are random, so heads select different tokens: the worst case.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import ceilings
import machine
import numpy as np
import reading

HEADS, KV_HEADS, DIM = 32, 8, 128
TABLES = 60
SINK = WINDOW = 128
WAYS = ("dense", "head", "group")


def make(context: int, seed: int) -> Any:
    """Return keys or values [1, T, G, D] in bfloat16, made piece by piece."""
    import ml_dtypes

    rng, x = np.random.default_rng(seed), np.empty((1, context, KV_HEADS, DIM), ml_dtypes.bfloat16)
    for start in range(0, context, 4096):
        part = x[:, start : start + 4096]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32)
    return x


def measure(
    context: int, n_planes: int, share: float, rounds: int, read: Callable[..., None]
) -> dict[str, Any]:
    """Measure one context; `read` only reads the arrays."""
    import racecore

    key, value, query = (
        make(context, 0),
        make(context, 1),
        make(HEADS // KV_HEADS, 2).reshape(1, 1, HEADS, DIM),
    )
    lsh = racecore.SoftLSH.random(DIM, TABLES, n_planes, rng=0)
    index = racecore.SocketIndex(lsh)
    racecore.SocketIndex(lsh).append(key[:, :64], value[:, :64])  # compiles
    started = time.perf_counter()
    index.append(key, value)
    build = time.perf_counter() - started
    options = {"budget": share, "sink": SINK, "window": WINDOW}
    calls = {
        "reading": lambda: read(key, value),
        "dense": lambda: racecore.sparse_attention(query, key, value, None, budget=1.0),
        "head": lambda: racecore.sparse_attention(query, key, value, index, **options),
        "group": lambda: racecore.sparse_attention(
            query, key, value, index, group_selection="group", **options
        ),
    }
    laps: dict[str, list[float]] = {way: [] for way in calls}
    for number in range(rounds + 1):
        for way, call in list(calls.items())[
            :: 1 if number % 2 else -1
        ]:  # no method always follows the same one
            started = time.perf_counter()
            call()
            if number:
                laps[way].append(time.perf_counter() - started)
    scanned = (index.hashed.codes.shape[3] + 2) * KV_HEADS * context
    row = 2 * DIM * 2
    moved, least = {"dense": key.nbytes + value.nbytes}, {"dense": key.nbytes + value.nbytes}
    for way in WAYS[1:]:
        chosen = index.select(query, group_selection=way, **options)[0]
        distinct = sum(
            len(np.unique(part[part >= 0]))
            for part in chosen.reshape(KV_HEADS, -1, chosen.shape[-1])
        )
        moved[way], least[way] = scanned + row * int((chosen >= 0).sum()), scanned + row * distinct
    seconds = {way: float(np.median(laps[way])) for way in calls}
    return {
        "context": context,
        "seconds": seconds,
        "read": moved,
        "least": least,
        "build": build / context,
        "index": (index.hashed.codes.shape[3] + 2) * KV_HEADS,
        "cache": (key.nbytes + value.nbytes) // context,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| context | reading alone | dense | of reading | SOCKET, per head | against dense | per "
        "group | against dense "
        "| MB read: dense, head, group | of which needed once | index build per token |",
        "| ---: " * 11 + "|",
    ]
    for r in results:
        s = r["seconds"]
        read = ", ".join(f"{r['read'][way] / 1e6:,.0f}" for way in WAYS)
        once = ", ".join(f"{r['least'][way] / r['read'][way]:.0%}" for way in WAYS)
        lines.append(
            f"| {r['context']:,} | {s['reading'] * 1e3:.2f} ms | {s['dense'] * 1e3:.2f} ms | "
            f"{s['reading'] / s['dense']:.0%} "
            f"| {s['head'] * 1e3:.2f} ms | "
            f"{s['dense'] / s['head']:.2f}x | {s['group'] * 1e3:.2f} ms | "
            f"{s['dense'] / s['group']:.2f}x | {read} | {once} | "
            f"{r['build'] * 1e6:.1f} us |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--planes", type=int, default=8)
    parser.add_argument(
        "--share", type=float, default=0.05, help="of the tokens, selected by score"
    )
    parser.add_argument(
        "--log2", type=int, nargs="+", default=[12, 14, 16, 17, 18, 20], help="contexts"
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    from racecore.runtime.threads import default_count

    bandwidth = ceilings.measure(rounds=6)["bytes_per_second"]
    read = reading.reader(default_count())
    results = [
        measure(1 << n, options.planes, options.share, options.rounds, read) for n in options.log2
    ]
    about = machine.describe()
    print(table(results))
    rates = ", ".join(f"{r['read']['dense'] / r['seconds']['reading'] / 1e9:.0f}" for r in results)
    print(
        f"\n{about['processors']} cores of {about['processor']}; triad {bandwidth / 1e9:.0f} "
        f"GB/s, reading {rates} GB/s; "
        f"{about['versions']}; L = {TABLES}, "
        f"P = {options.planes}. A token takes {results[0]['cache']:,} bytes in the cache and "
        f"{results[0]['index']} in the index."
    )


if __name__ == "__main__":
    main()
