"""The accuracy of tensor-core products, emulated on the CPU: python tests/cuda_on_cpu/accuracy.py

Root-mean-square relative errors against the oracle in float64: of the kernels with tensor cores, of
those without, and of the plain formulas in float32. The emulation adds like the least exact tensor
cores would, see `cuda_mma_sum`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from problems import DTYPES, Problem, relative_error, run_library, run_oracle

from cuda_on_cpu import fake_cupy
from racecore.ops.cuda import call

RESULTS = ("out", "d_query", "d_key", "d_value", "mass", "value_sum", "d_planes", "d_beta")


def errors(problem: Problem) -> list[dict[str, float]]:
    """Return the errors of every result: with tensor cores, without, and of the formulas."""
    with fake_cupy.install():
        found = [run_library(problem, "bfloat16", "cuda")]
        before, call.TENSOR_CORES_FROM = call.TENSOR_CORES_FROM, 1 << 30
        found.append(run_library(problem, "bfloat16", "cuda"))
        call.TENSOR_CORES_FROM = before
    plain = dict(run_oracle(problem, "bfloat16", "float32"))
    for name in ("out", "d_query", "d_key", "d_value"):
        plain[name] = plain[name].astype(DTYPES["bfloat16"])
    expected = run_oracle(problem, "bfloat16")
    return [
        {name: relative_error(x[name], expected[name]) for name in RESULTS} for x in (*found, plain)
    ]


def main() -> None:
    """Print a table."""
    print(f"{'':20}{'':14}" + "".join(f"{name:>11}" for name in RESULTS))
    for n_tables, n_planes in ((3, 3), (4, 4)):
        for is_causal in (False, True):
            problem = Problem(
                0, None, 600, 600, 2, 1, 64, 64, n_tables, n_planes, 1.0, 1.0, is_causal=is_causal
            )
            label = f"S={n_tables << n_planes} {'causal' if is_causal else 'bidirectional'}"
            for method, found in zip(
                ("tensor cores", "without", "float32"), errors(problem), strict=True
            ):
                print(
                    f"{label:20}{method:14}" + "".join(f"{found[name]:11.1e}" for name in RESULTS)
                )


if __name__ == "__main__":
    main()
