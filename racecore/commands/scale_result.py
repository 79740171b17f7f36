"""The result of `racecore scale`, as a report and as a row of a table."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np

import racecore

__all__ = ["TOLERANCES", "Result", "options", "report", "table_row", "versions"]

# Relative error of a correct row, by dtype.
TOLERANCES = {
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float32": 1e-4,
    "float64": 1e-10,
}
# arXiv 2510.04008, on a CPU: Xeon Gold 5220R, 4 heads of 128.
_PAPER_TOKENS = 75_000_000
_PAPER_SECONDS = 100
_PAPER_SHAPE = (4, 128)


@dataclass(frozen=True)
class Result:
    """Options, times in seconds, memory in bytes and errors of one run.

    `warm_up_seconds` is the time of a short run before, which compiles or loads the kernels and is
    not part of `seconds`. `errors` has the largest relative error of a row, by array.
    """

    tokens: int
    heads: int
    head_dim: int
    tables: int
    planes: int
    beta: float
    seed: int
    causal: bool
    readout: str
    dtype: str
    backward: bool
    threads: int
    processor: str
    versions: dict[str, str]
    warm_up_seconds: float
    seconds: float
    tokens_per_second: float
    ns_per_token_and_head: float
    peak_anonymous_bytes: int
    memory_limit: int
    digests: dict[str, str]
    check_seconds: float | None
    checked_rows: int
    errors: dict[str, float]

    @property
    def wrong(self) -> dict[str, float]:
        """The errors above the tolerance of the dtype."""
        # `not <=`, so that NaN is wrong.
        tolerance = TOLERANCES[self.dtype]
        return {name: error for name, error in self.errors.items() if not error <= tolerance}


def versions() -> dict[str, str]:
    """Return the versions of racecore and of what its speed depends on."""
    import numba

    return {
        "racecore": racecore.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
    }


def options(result: Result) -> str:
    """Return the options of a run on one line."""
    order = "causal" if result.causal else "bidirectional"
    passes = "forward + backward" if result.backward else "forward"
    return (
        f"{order}, {passes}, {result.heads} heads of {result.head_dim}, {result.dtype}, "
        f"(L, P) = ({result.tables}, {result.planes}), {result.threads} threads"
    )


def report(result: Result) -> str:
    """Return the report of one run."""
    installed = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines = [
        f"{result.tokens:,} tokens, {options(result)}",
        f"{result.processor}; {installed}",
        "",
        f"time      {result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s, "
        f"{result.ns_per_token_and_head:,.0f} ns per token and head, generating the inputs "
        "included",
        f"warm-up   {result.warm_up_seconds:,.1f} s to compile or load the kernels, not included",
        f"memory    peak {result.peak_anonymous_bytes / 1e6:,.0f} MB for the whole process; "
        f"limit of the run {result.memory_limit / 1e6:,.0f} MB",
    ]
    lines += [f"digest    {name:<8} {digest}" for name, digest in result.digests.items()]
    if result.check_seconds is not None:
        worst = ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
        lines.append(
            f"check     largest relative error of a row: {worst} "
            f"(tolerance {TOLERANCES[result.dtype]:g})"
        )
        lines.append(
            f"          {result.checked_rows} rows of one head against float64, in "
            f"{result.check_seconds:,.1f} s"
        )
    if result.backward and not result.causal and (result.heads, result.head_dim) == _PAPER_SHAPE:
        lines.append(
            f"paper     about {_PAPER_SECONDS} s for {_PAPER_TOKENS:,} tokens on a Xeon Gold "
            "5220R (arXiv 2510.04008)"
        )
    return "\n".join(lines)


def table_row(result: Result, is_first: bool) -> str:
    """Return a row of the table of a sweep, the first one below the header."""
    error = f"{max(result.errors.values()):.1e}" if result.errors else "-"
    row = (
        f"{result.tokens:>15,} {result.seconds:>10.2f} {result.tokens_per_second:>13,.0f} "
        f"{result.ns_per_token_and_head:>7.0f} {result.peak_anonymous_bytes / 1e6:>7,.0f}   {error}"
    )
    if not is_first:
        return row
    columns = f"{'tokens':>15} {'seconds':>10} {'tokens/s':>13} {'ns':>7} {'MB':>7}   error"
    return f"{options(result)}\n\n{columns}\n{row}"
