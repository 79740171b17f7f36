"""Print the latest benchmark results as tables; measure first if there are none.

    python asv_benchmarks/table.py                          # the table
    python asv_benchmarks/table.py --run                    # measure again, some ten minutes
    python asv_benchmarks/table.py --run --bench Threads    # only matching benchmarks
    python asv_benchmarks/table.py --run --careful          # repeat timings until they are stable

Measures the racecore that is installed for this Python, with ordinary asv commands.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from importlib.metadata import version
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Compile everything once before measuring, or the first process of each kind would be charged with
# it.
FILL_CACHE = """
import numpy as np, racecore
for dtype in ("float32", "float64"):
    x = np.ones((100, 1, 16), dtype)
    for causal in (False, True):
        out, saved = racecore.attention_forward(x, x, x, is_causal=causal)
        racecore.attention_backward(out, saved)
"""
UNITS = {
    "seconds": [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")],
    "bytes": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")],
}


def run(pattern: str | None, careful: bool) -> None:
    """Run the benchmarks in this Python, with a kernel cache of their own, made by the sources as
    they are.
    """
    asv = [sys.executable, "-m", "asv"]
    subprocess.run([*asv, "machine", "--yes"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, check=True, capture_output=True, text=True
    ).stdout
    command = [*asv, "run", "-E", "existing:same", "--set-commit-hash", commit.strip()]
    command += [] if careful else ["--quick"]
    command += ["--bench", pattern] if pattern else []
    with tempfile.TemporaryDirectory(prefix="racecore-bench-") as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        subprocess.run([sys.executable, "-c", FILL_CACHE], cwd=HERE, env=environment, check=True)
        code = subprocess.run(command, cwd=HERE, env=environment).returncode
    if code not in (0, 2):  # 2: some benchmark failed; the table says which
        raise SystemExit(f"asv ended with code {code}: {' '.join(command)}")


def latest() -> pathlib.Path | None:
    """Return the result file that was written last."""
    files = [
        p for p in RESULTS.glob("*/*.json") if p.name not in ("machine.json", "benchmarks.json")
    ]
    return max(files, key=lambda p: p.stat().st_mtime, default=None)


def text(value: float | None, unit: str) -> str:
    """Write a number with three digits and a unit; asv marks skipped by NaN and failed by None."""
    if value is None:
        return "failed"
    if math.isnan(value):
        return "n/a"
    for factor, name in UNITS.get(unit, []):
        if abs(value) >= factor or name in ("ns", "B"):
            return (
                f"{value / factor:.3g} {name}"
                if abs(value / factor) < 1000
                else f"{value / factor:.0f} {name}"
            )
    return f"{value:.3g} {unit}"


def grid(
    values: list[float | None], params: list[list[str]], names: list[str], unit: str
) -> list[list[str]]:
    """Lay out one benchmark: a line per combination of all parameters but the last, a column per
    value of that.
    """
    if not params:
        return [[text(values[0], unit)]]
    last = [p.strip("'") for p in params[-1]]
    lines = [[*names[:-1], *(f"{names[-1]}={p}" for p in last)]]
    for i, combination in enumerate(itertools.product(*params[:-1])):
        row = values[i * len(last) : (i + 1) * len(last)]
        lines.append([*(p.strip("'") for p in combination), *(text(value, unit) for value in row)])
    return lines


def show(path: pathlib.Path) -> None:
    """Print every benchmark of a result file."""
    from asv.results import Results

    results = Results.load(str(path))
    described: dict[str, Any] = json.loads((RESULTS / "benchmarks.json").read_text())
    machine = json.loads((path.parent / "machine.json").read_text())
    versions = ", ".join(f"{name} {version(name)}" for name in ("racecore", "numpy", "numba"))
    print(
        f"commit {results.commit_hash[:12]} on {machine['cpu'] or machine['machine']}, "
        f"{machine['num_cpu']} processors,"
    )
    print(f"{machine['os']}, Python {sys.version.split()[0]}, {versions}")
    for name in sorted(results.get_all_result_keys()):
        about = described.get(name)
        if about is None:
            continue
        params = results.get_result_params(name)
        lines = grid(
            results.get_result_value(name, params), params, about["param_names"], about["unit"]
        )
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        print(f"\n{name}")
        for line in lines:
            print(
                "   "
                + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="measure before printing")
    parser.add_argument(
        "--bench", metavar="REGEX", help="measure only benchmarks whose name matches"
    )
    parser.add_argument("--careful", action="store_true", help="many repetitions instead of one")
    options = parser.parse_args()
    if options.run or options.bench or latest() is None:
        run(options.bench, options.careful)
    newest = latest()
    if newest is None:
        raise SystemExit("asv wrote no results")
    show(newest)


if __name__ == "__main__":
    main()
