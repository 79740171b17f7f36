"""The soft hash of rows on a GPU and its gradient; `reference` is the specification.

Attention computes the hash inside its own kernels.
"""

from __future__ import annotations

import math

import numpy as np

from racecore import chunking
from racecore.ops.cuda.call import (
    LaunchScratch,
    empty,
    empty_hash_parts,
    launch,
    make_call,
    scan_segments,
)
from racecore.problem import Problem
from racecore.runtime import cuda

__all__ = ["soft_hash", "soft_hash_backward"]

_FILE = "soft_hash/kernels.cu"


def soft_hash(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return phi [..., M, S] of the rows x [..., M, D], with planes [M, L, P, D] and beta [M]."""
    problem = _as_problem(x, planes, beta)
    (chunk,) = chunking.chunks(problem, "query")
    out = empty((*x.shape[:-1], problem.n_buckets), x.dtype)
    call = make_call(problem, chunk)
    launch(_FILE, "hash_rows", call, problem.n_state_heads, LaunchScratch(weights=1), out)
    return out


def soft_hash_backward(
    d_phi: np.ndarray, x: np.ndarray, planes: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return d_x [..., M, D], d_planes [M, L, P, D] and d_beta [M], the last two in float64."""
    problem = _as_problem(x, planes, beta)
    (chunk,) = chunking.chunks(problem, "query")
    d_x = empty(x.shape, x.dtype)
    total = cuda.cupy().zeros((1, len(planes), planes[0].size + 1), np.float64)
    parts = empty_hash_parts(chunk, len(planes), total)
    d_rows = d_x.reshape(1, -1, *x.shape[-2:])
    call = make_call(problem, chunk, d_query=d_rows, hash_width=total.shape[2])
    scratch = LaunchScratch(weights=2, hash_sums=True)
    launch(
        _FILE,
        "hash_rows_backward",
        call,
        problem.n_state_heads,
        scratch,
        cuda.to_device(d_phi, x.dtype),
        parts,
    )
    scan_segments(np.zeros_like(chunk[:, 0]), parts, total)
    return d_x, total[0, :, :-1].reshape(planes.shape), total[0, :, -1]


def _as_problem(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> Problem:
    """Return a problem whose queries are the rows and that has no keys."""
    n_rows, n_heads = math.prod(x.shape[:-2]), x.shape[-2]
    return Problem(
        query=x.reshape(1, n_rows, *x.shape[-2:]),
        key=None,
        value=None,
        planes=planes,
        beta=beta,
        key_mask=None,
        sequences=np.array([[0, 0, n_rows, 0, 0]]),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        value_dim=1,
        is_causal=False,
        readout="ratio",
        dtype=x.dtype,
        chunk_tokens=max(n_rows, 1),
    )
