"""RACE attention on a GPU, in one call of a few minutes: is it right, how fast, against what the
card can do.

    python asv_benchmarks/gpu.py

It needs CuPy and a GPU, and torch for the peers. One table at the end: times over the length,
forward and forward + backward, for S = 8, 24 and 64 buckets, with tensor cores and without
("plain"), beside torch's own softmax attention (SDPA, which takes FlashAttention) and the formula
of RACE with cumulative sums in torch. Two shares say how near the ceilings it is: `least`, of the
card's own copy bandwidth, counting every input read once and every output written once per
direction, and `moved`, counting what the passes do read and write.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gpu_socket
import numpy as np

import racecore
from racecore import backends
from racecore.ops.cuda import call
from racecore.runtime import cuda

HASHES = ((2, 2), (3, 3), (4, 4))  # the published (L, P): S = 8, 24, 64
HEADS, DIM = 8, 128
PLAIN = "plain"  # without tensor cores
LONGEST = 24  # as a power of 2
SECONDS_PER_CASE = 1.0  # a length that takes longer forward and backward is the last of its method


class Ceilings(NamedTuple):
    """What the card itself does."""

    copy_bytes: float  # per second, read and written
    float32: float  # operations per second of a matrix product
    bfloat16: float


class Row(NamedTuple):
    """One line of the table."""

    method: str
    causal: bool
    tokens: int
    forward_ms: float
    both_ms: float
    least: float | None = None
    moved: float | None = None


def main() -> None:
    """Do everything that the arguments ask for."""
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
        print(
            f"cuda: {reason or 'available'}\n"
            + "\n".join(f"expected {line}" for line in expectations(3.35e12, 4.8e12))
        )
        print(
            "\n".join(
                f"expected of a decoded token {line}"
                for line in gpu_socket.expectations(3.35e12, 4.8e12)
            )
        )
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
        gpu_socket.steps(random_rows, median_seconds, started + 1.2 * arguments.seconds, _sdpa_step)
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


def describe() -> str:
    """Name the card and the versions."""
    cupy = cuda.cupy()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    name, free = properties["name"].decode(), cupy.cuda.runtime.memGetInfo()[0]
    versions = f"CuPy {cupy.__version__}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}, NumPy {np.__version__}"
    return f"{name}, {properties['multiProcessorCount']} multiprocessors, {free / 2**30:.0f} GiB free; {versions}"


def check() -> float:
    """Compare with the reference and the CPU kernels; print and return the worst relative error by
    dtype.
    """
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


@contextmanager
def tensor_cores(uses: bool) -> Iterator[None]:
    """Let kernels use tensor cores where they would, or not at all."""
    before = call.TENSOR_CORES_FROM
    call.TENSOR_CORES_FROM = before if uses else 1 << 30
    try:
        yield
    finally:
        call.TENSOR_CORES_FROM = before


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
    """Return the median time of a call on the device, by events, after two that warm up."""
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


def methods() -> list[
    tuple[str, Callable[[int, bool], tuple[Callable[[], Any], Callable[[], Any]]]]
]:
    """Return names and makers of (forward, forward + backward) for a length."""
    ours = [
        (f"racecore S={tables << planes}", _racecore(tables, planes)) for tables, planes in HASHES
    ]
    shown = [hash for hash in HASHES if hash[0] << hash[1] >= call.TENSOR_CORES_FROM]
    ours += [
        (f"racecore {PLAIN} S={tables << planes}", _racecore(tables, planes, False))
        for tables, planes in shown
    ]
    return [*ours, ("SDPA, torch", _sdpa), ("RACE by cumsum, torch", _cumsum)]


def stored_dtype() -> np.dtype:
    """Return bfloat16, or float16 where the package that gives NumPy the former is missing: as many
    bytes.
    """
    try:
        return racecore.arrays.dtype_of("bfloat16")
    except ValueError:
        return np.dtype(np.float16)


def torch_dtype() -> Any:
    """Return the same for torch."""
    import torch

    return torch.float16 if stored_dtype() == np.float16 else torch.bfloat16


def to_cupy(tensor: Any) -> Any:
    """Return a tensor of 16 bits as a CuPy array, without a copy."""
    import torch

    return cuda.cupy().from_dlpack(tensor.view(torch.int16)).view(stored_dtype())


def random_rows(*shape: int) -> Any:
    """Return normal random numbers of 16 bits as a CuPy array."""
    import torch

    return to_cupy(torch.randn(*shape, device="cuda", dtype=torch_dtype()))


def _sdpa_step(query: Any, key: Any, value: Any) -> Callable[[], Any]:
    """Return torch's softmax attention of one token over a cache, in the layout that it likes best."""
    import torch

    tensors = (torch.from_dlpack(x.view(np.int16)).view(torch_dtype()) for x in (query, key, value))
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _racecore(tables: int, planes: int, uses: bool = True) -> Callable[[int, bool], Any]:
    lsh = racecore.SoftLSH.random(head_dim=DIM, n_tables=tables, n_planes=planes, rng=0)

    def make(tokens: int, causal: bool) -> Any:
        cupy = cuda.cupy()
        q, k, v, g = (random_rows(1, tokens, HEADS, DIM) for _ in range(4))
        out = cupy.empty_like(q)
        grads = racecore.Gradients(*(cupy.empty_like(x) for x in (q, k, v)))
        wrt = ("query", "key", "value")

        def forward() -> None:
            with tensor_cores(uses):
                racecore.attention(q, k, v, lsh, is_causal=causal, out=out)

        def both() -> None:
            with tensor_cores(uses):
                _, saved = racecore.attention_forward(
                    q, k, v, lsh, is_causal=causal, out=out, wrt=wrt
                )
                racecore.attention_backward(g, saved, out=grads)

        return forward, both

    return make


def _tensors(tokens: int) -> Any:
    import torch

    make = lambda: torch.randn(1, HEADS, tokens, DIM, device="cuda", dtype=torch_dtype())  # noqa: E731
    q, k, v, g = (make() for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], g


def _sdpa(tokens: int, causal: bool) -> Any:
    import torch

    (q, k, v), g = _tensors(tokens)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.autograd.grad(out, (q, k, v), g)

    return forward, both


def _cumsum(tokens: int, causal: bool) -> Any:
    """RACE as a few lines of torch: probabilities of all tokens, sums over them, gradients by
    autograd; (L, P) = (2, 2).
    """
    import torch

    lsh = racecore.SoftLSH.random(head_dim=DIM, n_tables=2, n_planes=2, rng=0)
    planes = torch.tensor(lsh.planes, device="cuda", dtype=torch.float32).reshape(-1, DIM)
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], device="cuda", dtype=torch.float32)
    (q, k, v), g = _tensors(tokens)

    def phi(x: Any) -> Any:
        u = (x.float() @ planes.T).tanh().unflatten(-1, (2, 2))
        return (u @ corners.T).softmax(-1).flatten(-2)

    def attention() -> Any:
        phi_q, phi_k = phi(q), phi(k)
        if causal:
            sums = (phi_k.unsqueeze(-1) * v.float().unsqueeze(-2)).cumsum(2)
            mass = phi_k.cumsum(2)
            top = (phi_q.unsqueeze(-1) * sums).sum(-2)
            return (top / (phi_q * mass).sum(-1, keepdim=True)).to(q.dtype)
        return ((phi_q @ (phi_k.mT @ v.float())) / (phi_q @ phi_k.sum(2).unsqueeze(-1))).to(q.dtype)

    def forward() -> Any:
        with torch.no_grad():
            return attention()

    def both() -> None:
        torch.autograd.grad(attention(), (q, k, v), g)

    return forward, both


def lengths(method: str, make: Any, causal: bool, ceilings: Ceilings, deadline: float) -> Any:
    """Yield rows from 2^12 tokens to the longest that fits the memory and the time."""
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
        shares: tuple[float | None, ...] = (None, None)
        if method.startswith("racecore"):
            tables, planes = next((t, p) for t, p in HASHES if method.endswith(f"={t << p}"))
            counts = (11, units_moved(tables, planes, causal))
            shares = tuple(n * tokens * HEADS * DIM * 2 / b / ceilings.copy_bytes for n in counts)
        yield Row(method, causal, tokens, f * 1e3, b * 1e3, *shares)
        if b > SECONDS_PER_CASE:
            return


def units_moved(tables: int, planes: int, causal: bool) -> float:
    """Return how many rows of D numbers in 16 bits are read or written for a token and head,
    forward + backward.

    Bidirectional: k, v; q, out; q, d_out, d_q; k, v, d_k, d_v. Causal: k, v; q, k, v, out; q, k, v,
    d_out, d_q and the stash; k, v, d_out, d_k, d_v and the stash. States are left out: they are of
    a segment of 1,024 tokens.
    """
    stash = (2 * (tables << planes) + tables * planes) * 4 / (2 * DIM)
    return 2 + 4 + 5 + 5 + 2 * stash if causal else 2 + 2 + 3 + 4


def expectations(*bandwidths: float) -> list[str]:
    """Return the least time of forward + backward at 2^20 tokens, S = 8, causal, for copy
    bandwidths.
    """
    rows = (1 << 20) * HEADS * DIM * 2
    return [
        f"{b / 1e12:.2f} TB/s: {11 * rows / b * 1e3:.1f} ms if every array moved once, "
        f"{units_moved(2, 2, True) * rows / b * 1e3:.1f} ms as the passes are"
        for b in bandwidths
    ]


def line(row: Row) -> str:
    """Return a row of the table."""
    shares = "".join(
        f"{share:8.0%}" if share is not None else f"{'':8}" for share in (row.least, row.moved)
    )
    kind = "causal" if row.causal else "bidirectional"
    return f"{row.method:22} {kind:13} {row.tokens:>11,} {row.forward_ms:>10.3f} {row.both_ms:>10.3f}{shares}"


def table(rows: list[Row]) -> str:
    """Return all rows under a head, and where racecore overtakes SDPA."""
    head = f"{f'{stored_dtype()}, B 1 H 8 D 128':36} {'tokens':>11} {'forward ms':>10} {'both ms':>10}{'least':>8}{'moved':>8}"
    lines = [head, *map(line, rows)]
    for causal in (True, False):
        peer = {
            row.tokens: row
            for row in rows
            if row.method.startswith("SDPA") and row.causal == causal
        }
        for method in dict.fromkeys(
            row.method for row in rows if row.method.startswith("racecore")
        ):
            ours = [
                row
                for row in rows
                if (row.method, row.causal) == (method, causal) and row.tokens in peer
            ]
            wins = [row.tokens for row in ours if row.both_ms < peer[row.tokens].both_ms]
            at = f"from {min(wins):,} tokens on" if wins else "at none of these lengths"
            lines.append(
                f"{method}, {'causal' if causal else 'bidirectional'}: faster than SDPA forward + "
                f"backward {at}"
            )
    return "\n".join([*lines, *gains(rows)])


def gains(rows: list[Row]) -> list[str]:
    """Return what tensor cores bring at the longest length that was measured with them and without."""
    times = {(row.method, row.causal, row.tokens): row for row in rows}
    best: dict[tuple[str, bool], tuple[Row, Row]] = {}
    for row in rows:
        plain = times.get(
            (row.method.replace("racecore ", f"racecore {PLAIN} "), row.causal, row.tokens)
        )
        if plain is not None and plain is not row:
            best[row.method, row.causal] = (row, plain)  # lengths come in their order
    return [
        f"{row.method}, {'causal' if row.causal else 'bidirectional'}, {row.tokens:,} tokens, "
        "with tensor cores and without: "
        f"forward {row.forward_ms:.2f} and {plain.forward_ms:.2f} ms, both {row.both_ms:.2f} and "
        f"{plain.both_ms:.2f} ms"
        for row, plain in best.values()
    ]


def million_12() -> str:
    """Run 12 million tokens, 4 heads of 128 in 16 bits, causal, forward + backward, gradients over
    their inputs.
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
