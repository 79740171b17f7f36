"""Measure the ceilings of the machine: memory bandwidth and float32 matrix products.

One process per physical core, each pinned and with one thread, all running at the same time: two
threads on one core would falsify the figure. Every round starts at a barrier. Its rate is the work
of all processes divided by the time from the first start to the last end: otherwise a late process
would have the memory bandwidth to itself. The best round counts.

Bandwidth is STREAM's triad, a = b + s * c, counted as 12 bytes per element, with ordinary stores
and with stores that bypass the caches (those do not read `a` first and so are faster); the better
one counts. The products are of 2048 x 2048 matrices, through NumPy and, where it is installed,
torch; the better one counts.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from machine import free_memory

__all__ = ["cores", "floor", "measure", "work"]

_SIDE = 2048  # of the matrices
_LARGEST = 2**28  # bytes of one array of the triad: well beyond the caches
_LINE = 64  # bytes
_PATIENCE = 120  # seconds that one process waits for the others
Task = tuple[Callable[[], object], float]  # what to time, and how many bytes or operations that is


def floor(
    n_tables: int, n_planes: int, causal: bool, dim: int, ceilings: dict[str, float]
) -> float:
    """Return the seconds that forward + backward need per token and head at the ceilings, bytes and
    arithmetic in turn.

    Bidirectional: (8 L P + 12 S) D operations and 9 float32 rows of D values; causal: (8 L P + 14
    S) D and 11 rows.
    """
    buckets = n_tables << n_planes
    operations = (8 * n_tables * n_planes + (14 if causal else 12) * buckets) * dim
    n_bytes = (11 if causal else 9) * dim * 4
    return n_bytes / ceilings["bytes_per_second"] + operations / ceilings["flops_per_second"]


def cores() -> list[int]:
    """Return one processor number for each physical core that this process may use."""
    first_of_core: dict[str, int] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        path = pathlib.Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        siblings = path.read_text().strip() if path.exists() else str(processor)
        first_of_core.setdefault(siblings, processor)
    return list(first_of_core.values())


def measure(n_cores: int | None = None, rounds: int = 12) -> dict[str, float]:
    """Measure all cores together, or the first `n_cores`.

    Returns
    -------
    dict
        "bytes_per_second", "flops_per_second" and "cores".

    Raises
    ------
    RuntimeError
        A process failed; it has printed the reason.
    """
    pinned = cores()[:n_cores]
    n_bytes = min(_LARGEST, free_memory() // (8 * len(pinned)))
    context = multiprocessing.get_context("spawn")  # a forked child would inherit thread pools
    barrier, results = context.Barrier(len(pinned)), context.SimpleQueue()
    children = [
        context.Process(target=work, args=(core, n_bytes, rounds, barrier, results), daemon=True)
        for core in pinned
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise RuntimeError(
            f"the ceilings of {len(pinned)} cores could not be measured; see the reason above"
        )
    laps = [json.loads(results.get()) for _ in children]
    together = {
        name: max(map(_rate, zip(*(lap[name] for lap in laps), strict=True))) for name in laps[0]
    }
    return {
        "bytes_per_second": max(together["triad"], together["streaming triad"]),
        "flops_per_second": max(together["numpy"], together.get("torch", 0.0)),
        "cores": len(pinned),
    }


def _rate(laps: tuple[tuple[float, float, float], ...]) -> float:
    """Return the rate of all processes in one round; a lap is (amount, start, end)."""
    amounts, starts, ends = zip(*laps, strict=True)
    return sum(amounts) / (max(ends) - min(starts))


def work(core: int, n_bytes: int, rounds: int, barrier: Any, results: Any) -> None:
    """Measure on one core, in step with the other processes; put {name: [[amount, start, end] of
    every round]} as JSON.
    """
    try:
        os.sched_setaffinity(
            0, {core}
        )  # before the libraries are imported, because they size their thread pools by it
        laps: dict[str, list[tuple[float, float, float]]] = {}
        for name, (task, amount) in (_triads(n_bytes) | _products()).items():
            task()
            laps[name] = [(amount, *_in_step(task, barrier)) for _ in range(rounds)]
        results.put(json.dumps(laps))
    except BaseException:
        barrier.abort()  # otherwise the other processes would wait for this one
        raise


def _in_step(task: Callable[[], object], barrier: Any) -> tuple[float, float]:
    """Return start and end, by the clock that all processes of a machine share."""
    barrier.wait(timeout=_PATIENCE)
    started = time.monotonic()
    task()
    return started, time.monotonic()


def _products() -> dict[str, Task]:
    import numpy as np

    amount = 2.0 * _SIDE**3
    a, b = np.random.default_rng(0).standard_normal((2, _SIDE, _SIDE), dtype=np.float32)
    c = np.empty_like(a)
    tasks: dict[str, Task] = {"numpy": (lambda: np.matmul(a, b, out=c), amount)}
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)
        ta, tb, tc = (torch.from_numpy(x) for x in (a, b, c))
        tasks["torch"] = (lambda: torch.mm(ta, tb, out=tc), amount)
    return tasks


def _triads(n_bytes: int) -> dict[str, Task]:
    import numpy as np

    n = n_bytes // _LINE * _LINE // 4
    a, b, c = (_aligned(n) for _ in range(3))
    scale = np.float32(1.5)
    plain, streaming = _triad_kernels()
    addresses = [x.ctypes.data for x in (a, b, c)]
    return {
        "triad": (lambda: plain(a, b, c, scale), 12.0 * n),
        "streaming triad": (lambda: streaming(*addresses, n // 16, scale), 12.0 * n),
    }


def _aligned(n: int) -> Any:
    """Return n ones of float32 that start on a cache line."""
    import numpy as np

    buffer = np.empty(4 * n + _LINE, np.uint8)
    first = -buffer.ctypes.data % _LINE
    array = buffer[first : first + 4 * n].view(np.float32)
    array[:] = 1.0
    return array


def _triad_kernels() -> tuple[Any, Any]:
    """Compile a = b + s * c over arrays, and over the addresses of aligned arrays with stores past
    the caches.
    """
    import numba
    from llvmlite import ir
    from numba.extending import intrinsic

    line, index = ir.VectorType(ir.FloatType(), 16), ir.IntType(32)

    @intrinsic
    def line_of_triad(_context: Any, a: Any, b: Any, c: Any, i: Any, scale: Any) -> Any:
        def build(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            *starts, i, scale = arguments
            offset = builder.mul(i, ir.Constant(i.type, _LINE))
            out, x, y = (
                builder.inttoptr(builder.add(start, offset), line.as_pointer()) for start in starts
            )
            one = builder.insert_element(
                ir.Constant(line, ir.Undefined), scale, ir.Constant(index, 0)
            )
            zeros = ir.Constant(ir.VectorType(index, 16), [0] * 16)
            scales = builder.shuffle_vector(one, one, zeros)
            product = builder.fmul(scales, builder.load(y, align=_LINE))
            store = builder.store(
                builder.fadd(builder.load(x, align=_LINE), product), out, align=_LINE
            )
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(index, 1)]))
            return context.get_dummy_value()

        return numba.void(a, b, c, i, scale), build

    @numba.njit
    def plain(a: Any, b: Any, c: Any, scale: Any) -> None:
        for i in range(a.size):
            a[i] = b[i] + scale * c[i]

    @numba.njit
    def streaming(a: Any, b: Any, c: Any, n_lines: Any, scale: Any) -> None:
        for i in range(n_lines):
            line_of_triad(a, b, c, i, scale)  # type: ignore[call-arg]  # the first argument is Numba's own

    return plain, streaming
