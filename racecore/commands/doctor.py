"""racecore doctor: what works on this machine, and the reasons for what does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from typing import Any

import numpy as np

import racecore
from racecore import backends
from racecore.runtime import kernel_cache
from racecore.runtime.threads import default_count

__all__ = ["add_parser", "processor", "run"]

_REQUIRED = ("numpy", "numba", "llvmlite", "scipy", "threadpoolctl", "tqdm")
# By import name: its purpose, and the packages that provide it.
_OPTIONAL = {
    "ml_dtypes": ("bfloat16", ("ml_dtypes",)),
    "matplotlib": ("pictures of racecore demo and scale", ("matplotlib",)),
    "torch": ("tensors in and out", ("torch",)),
    "jax": ("arrays in and out", ("jax",)),
    "cupy": ("GPU arrays", ("cupy", "cupy-cuda12x", "cupy-cuda13x")),
}
_FEATURES = (
    "sse4.2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512bf16",
    "avx512fp16",
    "neon",
    "sve",
)
# Relative error of the self-test; two float32 implementations usually agree to a few 1e-6.
_TOLERANCE = 1e-4


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
    parser = commands.add_parser(
        "doctor",
        help="show versions, backends and kernel cache, and run a self-test",
        description="Show versions, backends with the reason for each unavailable one, threads, "
        "processor and kernel cache, and test attention and its gradients on a small problem. "
        "Exit code 0: everything works; 1: something does not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, for programs and for bug reports"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and report; return the exit code."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Return everything that the command shows; ``report["ok"]`` is True if everything works."""
    versions: dict[str, str | None] = {
        "racecore": racecore.__version__,
        "python": platform.python_version(),
    }
    versions |= {name: _version(name) for name in _REQUIRED}
    optional = {name: _version(*packages) for name, (_, packages) in _OPTIONAL.items()}
    reasons = backends.available()
    # Before the cache is described: the self-test fills it.
    self_test = _self_test(reasons)
    cache = kernel_cache.describe()
    problems = [f"{name} is not installed" for name, version in versions.items() if version is None]
    problems += [
        f"backend {name}: {reasons[name]}"
        for name in ("cpu", "reference")
        if reasons[name] is not None
    ]
    problems += [] if self_test["ok"] else [f"self-test: {self_test['message']}"]
    return {
        "ok": not problems,
        "problems": problems,
        "versions": versions,
        "optional": optional,
        "backends": reasons,
        "threads": default_count(),
        "cpu": processor(),
        "kernel_cache": cache,
        "self_test": self_test,
    }


def _version(*packages: str) -> str | None:
    """Return the version of the first package that is installed, without importing it."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def processor() -> dict[str, Any]:
    """Return name and number of processors, and the instruction sets that the kernels can use."""
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    except OSError:
        # Not Linux.
        pass
    try:
        from llvmlite import binding

        available = binding.get_host_cpu_features()
        features = [feature for feature in _FEATURES if available.get(feature)]
    except (ImportError, RuntimeError):
        features = []
    return {
        "name": name,
        "count": os.cpu_count(),
        "machine": platform.machine(),
        "features": features,
    }


def _self_test(reasons: dict[str, str | None]) -> dict[str, Any]:
    """Compare the compiled backends with the reference on a small problem, with gradients."""
    if any(reasons[name] is not None for name in ("cpu", "reference")):
        return {"ok": False, "message": "needs the backends cpu and reference"}
    started = time.perf_counter()
    compiled = [name for name in ("cpu", "cuda") if reasons[name] is None]
    try:
        worst = max(
            _difference(name, is_causal, readout)
            for name in compiled
            for is_causal in (False, True)
            for readout in ("ratio", "bucket_mean")
        )
    except Exception as error:
        # Any error is a finding to report.
        return {"ok": False, "message": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - started
    ok = worst <= _TOLERANCE
    names = " or ".join(compiled)
    message = (
        f"largest relative difference {worst:.1e} between {names} and reference "
        f"(tolerance {_TOLERANCE:.0e})"
    )
    return {"ok": ok, "message": message, "seconds": round(seconds, 3)}


def _difference(name: str, is_causal: bool, readout: str) -> float:
    """Return the largest relative difference between a backend and the reference."""
    # 257 tokens: not a multiple of any block.
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((257, 2, 16), dtype=np.float32) for _ in range(4))
    lsh = racecore.SoftLSH.random(16, rng=0)
    results = []
    for backend in (name, "reference"):
        out, saved = racecore.attention_forward(
            q, k, v, lsh, is_causal=is_causal, readout=readout, backend=backend
        )
        grads = racecore.attention_backward(d_out, saved)
        results.append(
            [out, grads.query, grads.key, grads.value, grads.planes, np.asarray(grads.beta)]
        )
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*results, strict=True)]
    # A NaN must not hide in a maximum.
    return float(max(np.inf if np.isnan(error) else error for error in errors))


def _text(report: dict[str, Any]) -> str:
    """Return the report as a table."""
    rows: list[tuple[str, str]] = [
        (name, version or "MISSING") for name, version in report["versions"].items()
    ]
    for name, version in report["optional"].items():
        rows.append((name, version or f"not installed (optional: {_OPTIONAL[name][0]})"))
    rows.append(("", ""))
    rows += [(f"backend {name}", reason or "ok") for name, reason in report["backends"].items()]
    cpu, cache, test = report["cpu"], report["kernel_cache"], report["self_test"]
    rows.append(
        (
            "threads",
            f"{report['threads']} (change with --threads, racecore.threads(n) or OMP_NUM_THREADS)",
        )
    )
    rows.append(("processor", f"{cpu['name']}, {cpu['count']} cores, {cpu['machine']}"))
    rows.append(("instructions", " ".join(cpu["features"]) or "unknown"))
    state = "" if cache["writable"] else ", not writable: every process compiles again"
    rows.append(
        (
            "kernel cache",
            f"{cache['folder']}: {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB{state}",
        )
    )
    rows += [("", f"note: {problem}") for problem in cache["problems"]]
    rows.append(("self-test", f"{'ok' if test['ok'] else 'FAILED'}: {test['message']}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    lines += ["", "All is well." if report["ok"] else "Something is wrong:"]
    return "\n".join(lines + [f"  - {problem}" for problem in report["problems"]])
