"""Run the kernels on a few problems in a subprocess, under a watcher: a sanitizer or the oracle.

"results" compares with the oracle. "address" reports accesses outside of arrays and of the
requested shared memory. "thread", with a system thread for every CUDA thread, reports accesses that
no barrier orders. `failure` starts the subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["WATCHERS", "failure"]

WATCHERS = ("results", "address", "thread")
_HERE = Path(__file__)
_RUNTIMES = {"results": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def failure(
    watcher: str, ops: Path | None = None, of_socket: bool = False, limit: float | None = None
) -> str:
    """Return the error report of a watcher, or "".

    Of the kernels of attention or of SOCKET, in racecore/ops or in the changed copy `ops`. A limit
    in seconds is for kernels that may not end.
    """
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in _RUNTIMES[watcher]
    ]
    environment = {
        **os.environ,
        "CUDA_ON_CPU_SANITIZER": "" if watcher == "results" else watcher,
        "CUDA_ON_CPU_OPS": "" if ops is None else str(ops),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "PYTHONPATH": os.pathsep.join([str(_HERE.parents[1]), str(_HERE.parents[2])]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(_HERE), watcher, "socket" if of_socket else "attention"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return (
        ""
        if done.returncode == 0
        else f"exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-4000:]}"
    )


def problems(watcher: str) -> list:
    """Return problems that reach every kernel, readout, mask, packing and grouping of heads."""
    from problems import PROBLEMS, Problem

    if watcher == "address":
        return [(problem, "bfloat16") for problem in PROBLEMS if problem.n_keys <= 150]
    tiny = {"batch": None, "head_dim": 5, "value_dim": 3, "n_tables": 3, "n_planes": 2}
    tiny |= {"beta": 1.2, "spread": 1.0}
    # more than four rows and buckets, so lanes exchange numbers; four columns per lane
    wide = tiny | {"head_dim": 70, "value_dim": 66}
    found = [
        Problem(
            0,
            n_queries=17,
            n_keys=17,
            n_heads=2,
            n_kv_heads=1,
            is_causal=True,
            mask="random",
            **wide,
        ),
        Problem(
            1,
            n_queries=9,
            n_keys=9,
            n_heads=2,
            n_kv_heads=1,
            is_causal=True,
            readout="bucket_mean",
            beta_per_head=True,
            bounds=(0, 3, 3, 9),
            **tiny,
        ),
        Problem(
            2,
            n_queries=9,
            n_keys=17,
            n_heads=2,
            n_kv_heads=1,
            planes_per_head=True,
            has_initial_state=True,
            **wide,
        ),
        Problem(
            3,
            n_queries=17,
            n_keys=9,
            n_heads=1,
            n_kv_heads=1,
            readout="bucket_mean",
            mask="random",
            **tiny,
        ),
    ]
    if watcher == "results":
        found += _over_segments()
    return [(problem, "float32") for problem in found] + [
        (problem, "bfloat16") for problem in for_tensor_cores()
    ]


def _over_segments() -> list:
    """Return problems of more than one segment, with states and their gradients."""
    from problems import Problem

    sizes = {
        "batch": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 33,
        "value_dim": 40,
        "n_tables": 3,
        "n_planes": 3,
    }
    sizes |= {"beta": 1.2, "spread": 1.0, "has_initial_state": True, "has_d_state": True}
    return [
        Problem(4, n_queries=1100, n_keys=1100, is_causal=True, mask="random", **sizes),
        Problem(5, n_queries=600, n_keys=1100, mask="random", **sizes),
    ]


def for_tensor_cores() -> list:
    """Return problems for tensor cores: rows and buckets not multiples of 16, several warps."""
    from problems import Problem

    sizes = {
        "n_queries": 19,
        "n_keys": 19,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 5,
        "value_dim": 70,
        "n_tables": 3,
    }
    sizes |= {
        "batch": None,
        "n_planes": 3,
        "beta": 1.2,
        "spread": 1.0,
        "mask": "random",
        "has_initial_state": True,
    }
    return [
        Problem(6, is_causal=True, has_d_state=True, **sizes),
        Problem(7, readout="bucket_mean", **sizes | {"head_dim": 36, "value_dim": 3}),
    ]


def past_that_changed(problem: Any, backend: str = "cuda") -> str:
    """Return which results change where they must not, when a token late in a causal problem
    becomes NaN or infinite.
    """
    import numpy as np
    from devices import fetch, put

    import racecore

    x, t = problem.arrays("bfloat16"), problem.n_keys - 2  # not the first of its group
    lsh = racecore.SoftLSH(x.planes, x.beta)
    changed = []
    for poisoned in ("query", "key", "value", "d_out"):
        results = []
        for value in (1.0, np.nan, np.inf):
            rows = {name: np.array(getattr(x, name)) for name in ("query", "key", "value", "d_out")}
            rows[poisoned][..., t, :, :] = value
            q, k, v, d_out = (put(row, backend) for row in rows.values())
            out, saved = racecore.attention_forward(q, k, v, lsh, is_causal=True)
            grads = racecore.attention_backward(d_out, saved)
            before = (fetch(out), fetch(grads.query))
            after = (fetch(grads.key), fetch(grads.value)) if poisoned in ("query", "d_out") else ()
            results.append(
                [x[..., :t, :, :] for x in before] + [x[..., t + 1 :, :, :] for x in after]
            )
            affected = before[1 if poisoned == "d_out" else 0][..., t, :, :].astype(np.float32)
            if value != 1 and np.isfinite(affected).all():
                changed.append(f"nothing where {poisoned} becomes {value}")
        changed += [
            f"{poisoned} {i}"
            for i, (x, *others) in enumerate(zip(*results, strict=True))
            for y in others
            if (x != y).any()
        ]
    return ", ".join(changed)


def main() -> None:
    """Run the problems of a watcher; "results" compares with the oracle."""
    from problems import relative_error, run_library, run_oracle

    from cuda_on_cpu import fake_cupy, socket_cases
    from racecore.ops.cuda import call
    from racecore.runtime import cuda

    watcher, ops = sys.argv[1], os.environ.get("CUDA_ON_CPU_OPS")
    if ops:
        cuda._OPS = Path(ops)
    if sys.argv[2] == "socket":
        with fake_cupy.install():
            socket_cases.run(watcher)
        return
    if watcher == "thread":
        # tasks follow each other in the same shared memory
        call._MAX_BLOCKS = 1
    with fake_cupy.install():
        for problem, dtype in problems(watcher):
            found = run_library(problem, dtype, "cuda")
            if watcher == "results":
                for name, expected in run_oracle(problem, dtype).items():
                    error = relative_error(found[name], expected, 1e-2)
                    limit = (
                        1e-5
                        if dtype == "float32"
                        else 2e-6
                        if found[name].dtype == "float64"
                        else 3e-3
                    )
                    if not error < limit:
                        sys.exit(f"{name} is off by {error:.1g} in {problem}")
                if (
                    dtype == "bfloat16"
                    and problem.is_causal
                    and (changed := past_that_changed(problem))
                ):
                    sys.exit(f"a later token changes {changed}")


if __name__ == "__main__":
    main()
