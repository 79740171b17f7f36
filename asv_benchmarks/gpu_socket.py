"""Decoding one token over a key/value cache on a GPU, dense and by SOCKET: a section of gpu.py.

Caches in 16 bits, 32 query heads that share 8 key/value heads of 128, 60 tables of 8 planes, a
twentieth of the tokens. *Bytes* counts reads and writes of the kernels, from HBM or a cache: codes
and norms once, scores written once and read five times (once for each of four digits, once to
select), and the selected rows. Queries and keys are random, so heads select different tokens: the
worst case.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import racecore
from racecore.runtime import cuda

HEADS, KV_HEADS, DIM = 32, 8, 128
TABLES, PLANES = 60, 8
FRACTION, SINK, WINDOW = 0.05, 128, 128
CONTEXTS = tuple(1 << power for power in range(14, 21))
METHODS = ("dense", "head", "group")


class Step(NamedTuple):
    """One line of the table."""

    way: str
    context: int
    ms: float
    n_bytes: int


def check() -> float:
    """Compare a decoded token with the CPU; return the worst relative error.

    Exits the program if it is too large.
    """
    rng, cupy, worst = np.random.default_rng(0), cuda.cupy(), 0.0
    shapes = ((2, 1, 8, 48), (2, 3000, 2, 48), (2, 3000, 2, 40))
    host = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    lsh = racecore.SoftLSH.random(head_dim=48, n_tables=20, n_planes=10, rng=0)
    for selection in ("head", "group"):
        outs = []
        for query, key, value in (host, [cupy.asarray(x) for x in host]):
            index = racecore.SocketIndex(lsh)
            index.append(key, value)
            out = racecore.sparse_attention(
                query, key, value, index, budget=0.1, group_selection=selection
            )
            outs.append(cupy.asnumpy(out))
        worst = max(worst, float(np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[0])))
    print(f"check float32  SOCKET {worst:.1e}")
    # rounding of a score may select another token
    if not worst < 1e-3:
        sys.exit("WRONG")
    return worst


def steps(
    random_rows: Callable[..., Any],
    seconds: Callable[[Callable[[], Any]], float],
    deadline: float,
    peer: Callable[[Any, Any, Any], Callable[[], Any]] | None = None,
    contexts: Iterable[int] = CONTEXTS,
) -> Iterable[Step]:
    """Yield a line for every context and method until the deadline.

    `random_rows(B, T, heads, D)` makes an array, `seconds` times a call, and `peer` returns a call
    of another library.
    """
    lsh = racecore.SoftLSH.random(DIM, TABLES, PLANES, rng=0)
    for context in contexts:
        if time.monotonic() > deadline:
            return
        query, key, value = (
            random_rows(1, n, h, DIM)
            for n, h in ((1, HEADS), (context, KV_HEADS), (context, KV_HEADS))
        )
        index = racecore.SocketIndex(lsh)
        index.append(key, value)
        for way in METHODS:
            options: dict[str, Any] = {
                "budget": FRACTION,
                "sink": SINK,
                "window": WINDOW,
                "group_selection": way,
            }
            if way == "dense":
                options = {"budget": 1.0}
            call = partial(racecore.sparse_attention, query, key, value, index, **options)
            yield Step(way, context, seconds(call) * 1e3, bytes_of_step(way, context))
        if peer is not None:
            yield Step(
                "SDPA, torch",
                context,
                seconds(peer(query, key, value)) * 1e3,
                bytes_of_step("dense", context),
            )


def bytes_of_step(way: str, context: int) -> int:
    """Return the bytes that a step reads and writes."""
    # bytes of a key and a value
    row = 2 * 2 * DIM
    if way == "dense":
        return context * KV_HEADS * row
    n_selections = HEADS if way == "head" else KV_HEADS
    n_selected = min(context, -(-context // round(1 / FRACTION)) + SINK + WINDOW)
    return context * (
        KV_HEADS * (TABLES + 2) + 6 * 4 * n_selections
    ) + n_selected * n_selections * (row + 2 * 8)


def expectations(*bandwidths: float) -> list[str]:
    """Return lower bounds at 2^20 tokens from bytes, for copy bandwidths."""
    return [
        f"{b / 1e12:.2f} TB/s: "
        + ", ".join(f"{way} {bytes_of_step(way, 1 << 20) / b * 1e3:.2f} ms" for way in METHODS)
        for b in bandwidths
    ]


def table(rows: list[Step], copy_bytes: float) -> str:
    """Return all rows under a head: times, speedup over dense, fraction of the copy bandwidth."""
    lines = [
        f"{'a decoded token, H 32, G 8, D 128':36} {'context':>11} {'ms':>8} {'dense is':>9} "
        f"{'bytes':>8}"
    ]
    dense = {row.context: row.ms for row in rows if row.way == "dense"}
    for row in rows:
        name = row.way if row.way == "SDPA, torch" else f"racecore, {row.way}"
        times, fraction = dense[row.context] / row.ms, row.n_bytes / (row.ms / 1e3) / copy_bytes
        lines.append(f"{name:36} {row.context:>11,} {row.ms:>8.3f} {times:>8.2f}x {fraction:>8.0%}")
    return "\n".join(lines)
