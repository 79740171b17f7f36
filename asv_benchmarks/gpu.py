"""RACE attention on a GPU, in one call of a few minutes: correctness, times, and ceilings.

    python asv_benchmarks/gpu.py

It needs CuPy and a GPU, and torch for the peers. The table at the end has times over the length,
forward and forward + backward, for S = 8, 24 and 64 buckets, with tensor cores and without
("plain"), beside torch's own softmax attention (SDPA, which uses FlashAttention) and the formula of
RACE with cumulative sums in torch. Two columns are fractions of the card's own copy bandwidth:
`least` counts every input read once and every output written once per direction, `moved` counts
the actual reads and writes of the passes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_socket
import numpy as np
from gpu_methods import (
    DIM,
    HASHES,
    HEADS,
    methods,
    random_rows,
    sdpa_step,
    stored_dtype,
    tensor_cores,
    to_cupy,
    torch_dtype,
)
from gpu_report import Row, expectations, line, table, units_moved

import racecore
from racecore import backends
from racecore.runtime import cuda

# longest sequence, as a power of 2
LONGEST = 24
# a length that takes longer, forward and backward, is the last of its method
SECONDS_PER_CASE = 1.0


class Ceilings(NamedTuple):
    """Measured ceilings of the card."""

    copy_bytes: float  # per second, read and written
    float32: float  # operations per second of a matrix product
    bfloat16: float


def main() -> None:
    """Run the checks and measurements that the arguments select."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=300, help="stop beginning new lengths after so long"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    parser.add_argument(
        "--checks-only", action="store_true", help="only compare results with the reference"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run, and what this machine lacks"
    )
    arguments = parser.parse_args()
    reason = cuda.reason_unavailable()
    if arguments.dry_run:
        print_expectations(reason)
        return
    if reason is not None:
        sys.exit(f"no GPU: {reason}")
    started = time.monotonic()
    print(describe())
    worst = max(check(), gpu_socket.check())
    if arguments.checks_only:
        return
    ceilings = measure_ceilings()
    print(
        f"copy {ceilings.copy_bytes / 1e12:.2f} TB/s, matrix products "
        f"{ceilings.float32 / 1e12:.0f} TFLOP/s in float32, "
        f"{ceilings.bfloat16 / 1e12:.0f} in bfloat16\n"
    )
    rows: list[Row] = []
    for method, run in methods():
        for causal in (True, False):
            for row in lengths(method, run, causal, ceilings, started + arguments.seconds):
                rows.append(row)
                print(line(row), flush=True)
    print()
    print(table(rows))
    steps = list(
        gpu_socket.steps(random_rows, median_seconds, started + 1.2 * arguments.seconds, sdpa_step)
    )
    print(gpu_socket.table(steps, ceilings.copy_bytes))
    record = million_12()
    print(record)
    if arguments.json:
        content = {
            "machine": describe(),
            "worst": worst,
            "ceilings": ceilings._asdict(),
            "12 million": record,
            "rows": [row._asdict() for row in rows],
            "decoding": [step._asdict() for step in steps],
        }
        Path(arguments.json).write_text(json.dumps(content, indent=1))


def print_expectations(reason: str | None) -> None:
    """Print whether CUDA is available, and the lower bounds for an H100 and an H200."""
    print(f"cuda: {reason or 'available'}")
    for bound in expectations(3.35e12, 4.8e12):
        print(f"expected {bound}")
    for bound in gpu_socket.expectations(3.35e12, 4.8e12):
        print(f"expected of a decoded token {bound}")


def describe() -> str:
    """Name the card and the versions."""
    cupy = cuda.cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    name, free = properties["name"].decode(), cupy.cuda.runtime.memGetInfo()[0]
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return (
        f"{name}, {properties['multiProcessorCount']} multiprocessors, "
        f"{free / 2**30:.0f} GiB free; "
        f"CuPy {cupy.__version__}, CUDA {runtime}, NumPy {np.__version__}"
    )


def check() -> float:
    """Compare with the CPU; print relative errors, return the worst one of float32."""
    lsh, worst = racecore.SoftLSH.random(head_dim=48, n_tables=3, n_planes=3, rng=0), 0.0
    limits = {
        np.dtype(np.float64): 1e-10,
        np.dtype(np.float32): 1e-5,
        np.dtype(np.float16): 1e-2,
        stored_dtype(): 1e-2,
    }
    cases = [(dtype, limit, True) for dtype, limit in limits.items()] + [
        (stored_dtype(), 1e-2, False)
    ]
    for dtype, limit, uses in cases:
        for causal in (False, True):
            for readout in ("ratio", "bucket_mean"):
                with tensor_cores(uses):
                    error = _difference(5000, dtype, lsh, is_causal=causal, readout=readout)
                without = "" if uses else "without tensor cores"
                print(
                    f"check {dtype.name:8} causal={causal!s:5} {readout:12} {error:.1e} {without}"
                )
                if not error < limit:
                    sys.exit("WRONG")
                worst = max(worst, error if dtype == np.float32 else 0)
    return worst


def _difference(tokens: int, dtype: Any, lsh: racecore.SoftLSH, **options: Any) -> float:
    rng, cupy = np.random.default_rng(0), cuda.cupy()
    host = [rng.standard_normal((2, tokens, heads, 48)).astype(dtype) for heads in (4, 2, 2, 4)]
    results = []
    for arrays in (host, [cupy.asarray(x) for x in host]):
        out, saved = racecore.attention_forward(*arrays[:3], lsh, **options)
        grads = racecore.attention_backward(arrays[3], saved)
        found = (out, grads.query, grads.key, grads.value, grads.planes)
        results.append([cupy.asnumpy(x).astype(np.float64) for x in found])
    return max(
        float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(*results, strict=True)
    )


def measure_ceilings() -> Ceilings:
    """Time a copy of 4 GiB and two matrix products."""
    import torch

    cupy = cuda.cupy()
    a, b = cupy.ones(1 << 29, np.float32), cupy.empty(1 << 29, np.float32)
    seconds = median_seconds(lambda: cupy.copyto(b, a))
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8192, 8192, device="cuda").to(dtype)
        rates.append(2 * 8192**3 / median_seconds(lambda x=x: x @ x))
    return Ceilings(2 * a.nbytes / seconds, *rates)


def median_seconds(call: Callable[[], Any], at_least: int = 5, budget: float = 0.5) -> float:
    """Return the median time of a call on the device, by events, after two warm-up calls."""
    cupy = cuda.cupy()
    import torch

    call(), call()
    times: list[float] = []
    began = time.monotonic()
    while len(times) < at_least or (time.monotonic() - began < budget and len(times) < 100):
        cupy.cuda.Device().synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            first.record()
            call()
            last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
        if time.monotonic() - began > 4 * budget:
            break
    return statistics.median(times)


def lengths(method: str, make: Any, causal: bool, ceilings: Ceilings, deadline: float) -> Any:
    """Yield rows from 2^12 tokens to the longest length that memory and time allow."""
    import torch

    cupy = cuda.cupy()
    for power in range(12, LONGEST + 1):
        if time.monotonic() > deadline:
            return
        tokens = 1 << power
        try:
            forward, both = make(tokens, causal)
            f, b = median_seconds(forward, budget=0.2), median_seconds(both, budget=0.2)
        except (torch.cuda.OutOfMemoryError, cupy.cuda.memory.OutOfMemoryError, MemoryError):
            return
        finally:
            forward = both = None
            torch.cuda.empty_cache()
            cupy.get_default_memory_pool().free_all_blocks()
        fractions: tuple[float | None, ...] = (None, None)
        if method.startswith("racecore"):
            tables, planes = next((t, p) for t, p in HASHES if method.endswith(f"={t << p}"))
            counts = (11, units_moved(tables, planes, causal))
            fractions = tuple(
                n * tokens * HEADS * DIM * 2 / b / ceilings.copy_bytes for n in counts
            )
        yield Row(method, causal, tokens, f * 1e3, b * 1e3, *fractions)
        if b > SECONDS_PER_CASE:
            return


def million_12() -> str:
    """Measure 12 million tokens, causal, forward + backward, gradients over their inputs.

    4 heads of 128 in 16 bits.
    """
    import torch

    cupy = cuda.cupy()
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    shape = (1, 12_000_000, 4, 128)
    if cupy.cuda.runtime.memGetInfo()[0] < 5.2 * np.prod(shape) * 2:
        return "12 million tokens: the card has too little memory"
    tensors = [torch.empty(shape, device="cuda", dtype=torch_dtype()) for _ in range(4)]
    for tensor in tensors:
        tensor.normal_()
    q, k, v, g = map(to_cupy, tensors)
    lsh = racecore.SoftLSH.random(head_dim=128, n_tables=2, n_planes=2, rng=0)
    cupy.cuda.Device().synchronize()
    began = time.monotonic()
    out, saved = racecore.attention_forward(
        q, k, v, lsh, is_causal=True, wrt=("query", "key", "value")
    )
    grads = racecore.attention_backward(g, saved, overwrite_inputs=True)
    cupy.cuda.Device().synchronize()
    seconds = time.monotonic() - began
    rows = [
        cupy.asnumpy(x[:, -1]).astype(np.float32)
        for x in (out, grads.query, grads.key, grads.value)
    ]
    ends = [float(np.abs(row).max()) for row in rows]
    beside = pool.total_bytes() / 2**30
    return (
        f"12,000,000 tokens, 4 heads of 128, {stored_dtype()}, causal, forward + backward: "
        f"{seconds:.2f} s, 4 inputs of "
        f"{tensors[0].nbytes / 2**30:.1f} GiB and {beside:.1f} GiB beside them; largest numbers "
        "of the last rows "
        f"{', '.join(f'{x:.2g}' for x in ends)}"
    )


if __name__ == "__main__":
    backends.choose("reference")
    main()
