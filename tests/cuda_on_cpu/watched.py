"""Run the kernels on a few problems in a process of its own, watched by a sanitiser or by the oracle.

"results" compares with the oracle; "address" sees accesses outside of arrays and of the shared memory that was asked for;
"thread", with a thread of the system for every CUDA thread, sees those that no barrier orders. `failure` starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["WATCHERS", "failure"]

WATCHERS = ("results", "address", "thread")
_HERE = Path(__file__)
_RUNTIMES = {"results": (), "address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def failure(watcher: str, ops: Path | None = None, of_socket: bool = False) -> str:
    """Return what a watcher has to say against the kernels, or against those in a changed copy of racecore/ops.

    Those of attention, or of SOCKET.
    """
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
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
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    except subprocess.TimeoutExpired:
        return "it did not come to an end"
    return "" if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-4000:]}"


def problems(watcher: str) -> list:
    """Return problems that reach every kernel, both readouts, masks, packed sequences and all ways to share heads."""
    from problems import PROBLEMS, Problem

    if watcher == "address":
        return [problem for problem in PROBLEMS if problem.n_keys <= 150]
    tiny = {"batch": None, "head_dim": 5, "value_dim": 3, "n_tables": 3, "n_planes": 2, "beta": 1.2, "spread": 1.0}
    # more rows and buckets than four, so that lanes meet numbers of others
    wide = tiny | {"head_dim": 70, "value_dim": 66}  # four columns for every lane
    found = [
        Problem(0, n_queries=17, n_keys=17, n_heads=2, n_kv_heads=1, is_causal=True, mask="random", **wide),
        Problem(1, n_queries=9, n_keys=9, n_heads=2, n_kv_heads=1, is_causal=True, readout="bucket_mean",
                beta_per_head=True, bounds=(0, 3, 3, 9), **tiny),
        Problem(2, n_queries=9, n_keys=17, n_heads=2, n_kv_heads=1, planes_per_head=True, has_initial_state=True, **wide),
        Problem(3, n_queries=17, n_keys=9, n_heads=1, n_kv_heads=1, readout="bucket_mean", mask="random", **tiny),
    ]  # fmt: skip
    if watcher == "results":
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
        found += [
            Problem(4, n_queries=1100, n_keys=1100, is_causal=True, mask="random", **sizes),
            Problem(5, n_queries=600, n_keys=1100, mask="random", **sizes),
        ]
    return found


def main() -> None:
    """Run them, and compare where that is what this process is for."""
    from problems import relative_error, run_library, run_oracle

    from cuda_on_cpu import fake_cupy, socket_cases
    from racecore import cuda
    from racecore.ops import cuda_call

    watcher, ops = sys.argv[1], os.environ.get("CUDA_ON_CPU_OPS")
    if ops:
        cuda._OPS = Path(ops)
    if sys.argv[2] == "socket":
        with fake_cupy.install():
            socket_cases.run(watcher)
        return
    if watcher == "thread":
        cuda_call._MAX_BLOCKS = 1  # so that tasks follow each other in the same shared memory
    with fake_cupy.install():
        for problem in problems(watcher):
            dtype = "bfloat16" if watcher == "address" else "float32"
            found = run_library(problem, dtype, "cuda")
            if watcher == "results":
                for name, expected in run_oracle(problem, dtype).items():
                    error = relative_error(found[name], expected, 1e-2)
                    if not error < 1e-5:
                        sys.exit(f"{name} is off by {error:.1g} in {problem}")


if __name__ == "__main__":
    main()
