"""One measurement in one fresh process: a job is passed as JSON, the result is a line of JSON.

Only a fresh process has a meaningful peak memory, and thread pools of different libraries do not
disturb each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import machine
from cases import BATCH, DIM, HEADS, Case, Setting

__all__ = ["WorkerError", "answer", "clean_environment", "run"]

Call = Callable[
    [], tuple[float, float]
]  # returns the seconds of forward, and of forward + backward
_SCRIPT = pathlib.Path(__file__).with_name("compare.py")
_WARM_TOKENS = 128
_BLOCK = (
    2**22
)  # random values; longer inputs repeat them, since making them would take longer than all the rest
_THREAD_SETTINGS = (
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "OPENBLAS_",
    "BLIS_",
    "NUMBA_NUM_THREADS",
    "NUMBA_THREADING",
)


class WorkerError(RuntimeError):
    """A subprocess ended without a result; the text has the reason."""


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of thread libraries."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_THREAD_SETTINGS)
    }


def run(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Do a job in a fresh process.

    Raises
    ------
    WorkerError
        It failed, or took too long.
    """
    command = [sys.executable, str(_SCRIPT), "--worker", json.dumps(job)]
    try:
        done = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"no result after {timeout:.0f} s") from None
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if done.returncode == -9 or any(
        word in done.stderr for word in ("MemoryError", "can't allocate memory")
    ):
        raise WorkerError(f"out of memory ({last})")
    raise WorkerError(f"exit code {done.returncode}: {last}")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process: "verify", "case" (time and peak memory of one method) or
    "settings".
    """
    if job["kind"] == "verify":
        import peers

        return peers.verify()
    if job["kind"] == "case":
        return _measure_case(Case(**job["case"]), job["tokens"], job["seconds"], job["memory"])
    machine.limit_memory(job["memory"])
    calls = [_race_call(Setting(**setting)) for setting in job["settings"]]
    return {"timings": _timings(calls, job["seconds"] * len(calls))}


def _measure_case(case: Case, tokens: int, seconds: float, memory: int) -> dict[str, Any]:
    _prepared(
        case, _WARM_TOKENS
    )()()  # loads or compiles everything, so that it counts neither as time nor as memory
    machine.limit_memory(memory)
    with_inputs = _prepared(case, tokens)
    before = machine.resident_memory()
    machine.reset_peak()
    (timing,) = _timings([with_inputs()], seconds)
    return {**timing, "peak_bytes": max(0, machine.peak_memory() - before)}


def _timings(calls: list[Call], seconds: float) -> list[dict[str, Any]]:
    """Repeat all calls alternately until `seconds` have passed, at least twice. The first round
    counts.

    It counts because only the best matters, and the fastest of two slow calls is no worse than the
    second of them.
    """
    laps: list[list[tuple[float, float]]] = [[] for _ in calls]
    started = time.perf_counter()
    while len(laps[0]) < 2 or time.perf_counter() - started < seconds:
        for call, mine in zip(calls, laps, strict=True):
            mine.append(call())
    return [
        {
            "seconds": min(total for _, total in mine),
            "median_seconds": statistics.median(total for _, total in mine),
            "forward_seconds": min(forward for forward, _ in mine),
            "backward_seconds": min(total - forward for forward, total in mine),
            "calls": len(mine),
        }
        for mine in laps
    ]


def _prepared(case: Case, tokens: int) -> Callable[[], Call]:
    """Make the inputs of a case; return what makes the call, whose outputs count as its memory."""
    if case.method == "racecore":
        setting = Setting(tokens, case.causal, case.tables, case.planes)
        arrays = _random_arrays((BATCH, tokens, setting.heads, DIM))
        return lambda: _race_call(setting, arrays)
    return _torch_call(case, _random_arrays((BATCH, HEADS, tokens, DIM)))


def _random_arrays(shape: tuple[int, ...]) -> list[Any]:
    """Return query, key, value and d_out."""
    import numpy as np

    rng = np.random.default_rng(0)
    block = min(_BLOCK, int(np.prod(shape, dtype=np.int64)))
    return [np.resize(rng.standard_normal(block, dtype=np.float32), shape) for _ in range(4)]


def _race_call(setting: Setting, arrays: list[Any] | None = None) -> Call:
    import racecore

    *inputs, d_out = arrays or _random_arrays((BATCH, setting.tokens, setting.heads, DIM))
    if setting.dtype == "bfloat16":
        import ml_dtypes

        *inputs, d_out = (x.astype(ml_dtypes.bfloat16) for x in (*inputs, d_out))
    lsh = racecore.SoftLSH.random(
        head_dim=DIM, n_tables=setting.tables, n_planes=setting.planes, beta=1.0, rng=0
    )
    options: dict[str, Any] = {
        "is_causal": setting.causal,
        "wrt": ("query", "key", "value", "beta"),
    }
    buffers: dict[str, Any] = {"out": None, "gradients": None}

    def call() -> tuple[float, float]:
        with racecore.threads(setting.threads) if setting.threads else contextlib.nullcontext():
            started = time.perf_counter()
            out, saved = racecore.attention_forward(*inputs, lsh, out=buffers["out"], **options)
            forward = time.perf_counter() - started
            grads = racecore.attention_backward(d_out, saved, out=buffers["gradients"])
            total = time.perf_counter() - started
        if not setting.fresh_outputs:  # as a training loop does: the next call writes over these
            buffers["out"] = out
            buffers["gradients"] = SimpleNamespace(
                query=grads.query, key=grads.key, value=grads.value
            )
        return forward, total

    return call


def _torch_call(case: Case, arrays: list[Any]) -> Callable[[], Call]:
    import numpy as np
    import peers
    import torch

    import racecore

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    *inputs, d_out = (torch.from_numpy(x) for x in arrays)
    leaves = [x.requires_grad_() for x in inputs]
    if case.method == "formula":
        lsh = racecore.SoftLSH.random(
            head_dim=DIM, n_tables=case.tables, n_planes=case.planes, beta=1.0, rng=0
        )
        planes = torch.from_numpy(lsh.planes.astype(np.float32))
        leaves.append(torch.tensor(1.0, requires_grad=True))
    features = peers.performer_features(DIM)

    def forward() -> torch.Tensor:
        query, key, value = leaves[:3]
        if case.method == "formula":
            return peers.race_formula(query, key, value, planes, leaves[3], causal=case.causal)
        if case.method == "performer":
            return peers.performer(query, key, value, features)
        attention = peers.linear_attention if case.method == "linear" else peers.softmax_attention
        return attention(query, key, value, causal=case.causal)

    def call() -> tuple[float, float]:
        for leaf in leaves:
            leaf.grad = None
        started = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        out.backward(d_out)
        return middle - started, time.perf_counter() - started

    return lambda: call
