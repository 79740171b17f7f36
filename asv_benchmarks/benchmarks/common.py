"""Shared by the benchmarks: inputs, hashes, and fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

import racecore

HEADS, HEAD_DIM = 4, 64
TOKENS = 2**15


def hash_of(n_planes: int = 3, n_tables: int = 3, head_dim: int = HEAD_DIM) -> racecore.SoftLSH:
    """Return one of the published hashes: (P, L) = (2, 2), (3, 3) or (4, 4)."""
    return racecore.SoftLSH.random(
        head_dim=head_dim, n_tables=n_tables, n_planes=n_planes, beta=1.0, rng=0
    )


def hash_named(planes_tables: str, head_dim: int = HEAD_DIM) -> racecore.SoftLSH:
    """Return the hash of a benchmark's parameter, such as "(2, 2)"."""
    n_planes, n_tables = (int(n) for n in planes_tables.strip("()").split(","))
    return hash_of(n_planes, n_tables, head_dim)


def inputs(*shape: int, dtype: str = "float32", n: int = 3) -> list[np.ndarray]:
    """Return `n` arrays of one shape; skip the benchmark if the dtype is not available."""
    if dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise NotImplementedError("bfloat16 needs ml_dtypes") from None
        kind: type = ml_dtypes.bfloat16
    else:
        kind = np.dtype(dtype).type
    rng = np.random.default_rng(0)
    arrays = []
    for _ in range(n):
        x = rng.standard_normal(shape, dtype=np.float32)
        arrays.append(x if kind is np.float32 else x.astype(kind))
    return arrays


def processors() -> int:
    """Return the number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_in_fresh_process(code: str, cache_folder: str | None = None) -> float:
    """Run `code` in a new interpreter; it prints seconds on its last line."""
    environment = dict(os.environ)
    if cache_folder is not None:
        environment["NUMBA_CACHE_DIR"] = cache_folder
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return float(done.stdout.splitlines()[-1])
