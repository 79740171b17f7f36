"""SOCKET's cases for the watchers: caches that reach every kernel, all public operations."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

__all__ = ["run"]


class Case(NamedTuple):
    """A cache of three sequences, the second shorter, the third empty, and its queries."""

    seed: int
    n_tokens: int
    n_kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    n_tables: int
    n_planes: int
    scorer: str = "soft"
    selection: str = "head"


TINY = Case(0, 21, 1, 2, 5, 3, 9, 4)
CASES = {
    "thread": [
        TINY._replace(n_planes=9, selection="group", group=5),
        Case(1, 300, 1, 1, 70, 66, 2, 2, "hamming"),  # two warps that select, five splits
    ],
    "address": [
        TINY,
        TINY._replace(n_planes=10, n_tables=3),
        TINY._replace(n_planes=16, scorer="signed_jl"),
        Case(2, 150, 2, 5, 36, 33, 9, 9, "signed_jl", "group"),
        Case(3, 70, 1, 1, 130, 140, 3, 8),
        Case(4, 64, 1, 17, 6, 1, 17, 11, "hamming"),
    ],
    "results": [
        TINY,
        Case(1, 300, 1, 5, 70, 66, 9, 9, "hamming", "group"),
        Case(2, 150, 2, 5, 36, 33, 10, 10, "signed_jl"),
        Case(3, 1282, 1, 9, 130, 140, 3, 12),
        Case(4, 100, 1, 18, 6, 5, 9, 8, "signed_jl", "group"),
        Case(5, 2100, 2, 2, 8, 8, 2, 8, "hamming"),
        Case(6, 2100, 1, 2, 8, 8, 2, 8),
    ],
}


def run(watcher: str) -> None:
    """Run the cases of a watcher; "results" compares them with the reference."""
    from problems import DTYPES

    from racecore.ops.socket import cuda_launch

    if watcher == "thread":
        # one block: tasks follow each other in the same shared memory
        cuda_launch.MAX_BLOCKS = cuda_launch.ENOUGH_BLOCKS = 1
    for case in CASES[watcher]:
        found = everything(case, "cuda", DTYPES["bfloat16" if watcher == "address" else "float32"])
        if watcher == "results":
            compare(case, found, everything(case, "reference", DTYPES["float32"]))
    if watcher == "results":
        compare_best()


def everything(case: Case, backend: str, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Return every public result of a cache."""
    from devices import fetch, put

    import racecore

    rng = np.random.default_rng(case.seed)
    shape = (3, case.n_tokens, case.n_kv_heads)
    key, value = (
        rng.standard_normal((*shape, d)).astype(dtype) for d in (case.head_dim, case.value_dim)
    )
    n_heads, lengths = case.n_kv_heads * case.group, np.array([case.n_tokens, case.n_tokens - 3, 0])
    query, prompt = (
        rng.standard_normal((3, n, n_heads, case.head_dim)).astype(dtype) for n in (1, 5)
    )
    key[1, -3:], value[1, -3:] = np.nan, np.nan
    # a norm of zero, and one halfway between two stored values
    value[:, :2] = 0
    value[:, 1, :, 0] = 1 + 3 * 2.0**-11
    lsh = racecore.SoftLSH(
        rng.standard_normal((case.n_kv_heads, case.n_tables, case.n_planes, case.head_dim)), 1.0
    )
    k, v, q = (put(x, backend) for x in (key, value, query))
    index = racecore.SocketIndex(
        lsh, scorer=case.scorer, weight_by_value_norm=case.scorer != "hamming"
    )
    for part in (slice(0, 11), slice(11, None)):
        index.append(
            k[:, part],
            v[:, part],
            lengths=np.clip(lengths - part.start, 0, 11 if part.stop else None),
            backend=backend,
        )
    options: dict[str, Any] = dict(
        budget=7, sink=2, window=3, group_selection=case.selection, backend=backend
    )
    found: dict[str, Any] = {"codes": index.hashed.codes, "norms": index.hashed.norms}
    found["scores"], found["selected"] = (
        index.scores(q, backend=backend),
        index.select(q, **options),
    )
    found["sparse"] = racecore.sparse_attention(q, k, v, index, lengths=lengths, **options)
    for name, rows, keys in (("dense", query, key), ("prefill", prompt, key.copy())):
        if name == "prefill":
            # visible to the last two queries only
            keys[0, -2:] = np.nan
        # an empty sequence has no last five tokens
        n = 2 if name == "prefill" else 3
        arrays = (
            put(x[:n], backend) for x in (rows, keys, keys[..., :1].repeat(case.value_dim, axis=3))
        )
        found[name] = racecore.sparse_attention(
            *arrays, None, budget=0, lengths=lengths[:n], backend=backend
        )
    return {name: fetch(array) for name, array in found.items()}


def compare(case: Case, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Exit unless the results agree with the reference: selections exactly, numbers closely."""
    from oracle_socket import selected_set

    for name in ("codes", "norms"):
        if not np.array_equal(found[name], expected[name]):
            sys.exit(f"{name} differ in {case}")
    scores = found["scores"]
    if not np.array_equal(scores == 0, expected["scores"] == 0):
        sys.exit(f"other scores are none in {case}")
    if case.selection == "group":
        scores = np.add.accumulate(scores.reshape(3, case.n_kv_heads, case.group, -1), axis=2)[
            :, :, -1
        ]
    for b, length in enumerate((case.n_tokens, case.n_tokens - 3, 0)):
        for row, score in zip(found["selected"][b], scores[b], strict=True):
            tokens = selected_set(score[:length], 7, 2, 3)
            if row.tolist() != tokens + [-1] * (len(row) - len(tokens)):
                sys.exit(f"other tokens are selected in {case}")
    for name in ("scores", "sparse", "dense", "prefill"):
        limit = 2e-5 * np.abs(expected[name][np.isfinite(expected[name])]).max()
        if not np.allclose(found[name], expected[name], rtol=2e-5, atol=limit, equal_nan=True):
            sys.exit(f"{name} differs in {case}")


def compare_best() -> None:
    """Exit unless the top-k of a long row with every kind of number are selected."""
    from devices import fetch, put
    from oracle_socket import selected_set

    from racecore.ops.cuda.call import empty
    from racecore.ops.socket.select.cuda import _write_top_k

    # more than the threads of a block take at once; half of the zeros
    n, budgets = 9000, np.array([5500, 0])
    choices = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 1.0, -1.0], np.float32)
    scores = np.random.default_rng(0).choice(choices, (2, n // 64 * 64 + 64))
    scores[:, n:] = -np.inf
    selected = empty((2, 5505), np.int64)
    _write_top_k(
        *(put(x, "cuda") for x in (scores, np.full(2, n), budgets)), (2, 3), 0, 1, selected
    )
    for row, score, budget in zip(fetch(selected).tolist(), scores, budgets, strict=True):
        tokens = selected_set(np.where(np.isnan(score[:n]), np.inf, score[:n]), budget, 2, 3)
        if row != tokens + [-1] * (len(row) - len(tokens)):
            sys.exit("the selected tokens are not the top-k")
