"""Forward and every gradient against the oracle, on problems drawn over everything that a caller
may do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from devices import BACKENDS
from layouts import LAYOUTS
from problems import DTYPES, PROBLEMS, Problem, make_state, relative_error, run_library, run_oracle

import racecore

LIMITS = {
    "float64": (1e-9, 1e-8),
    "float32": (3e-6, 3e-5),
}  # forward, gradients; relative, root mean square


def by_seed(problem: Problem) -> str:
    return f"problem{problem.seed}"


def errors(problem: Problem, dtype: str, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the relative error of every result.

    Where terms of the size of d_out cancel (as in the gradient of beta, one number), the error
    relative to the little that is left says nothing: a hundredth of |d_out| is the least
    denominator.
    """
    floor = 0.01 * float(np.linalg.norm(problem.arrays(dtype).d_out.astype(np.float64)))
    return {
        name: relative_error(found[name], expected, floor if name.startswith("d_") else 0.0)
        for name, expected in run_oracle(problem, dtype).items()
    }


# Problems outside backends: the oracle remembers its last answers.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=by_seed)
def test_agrees_in_full_precision(problem: Problem, dtype: str, backend: str) -> None:
    found = run_library(problem, dtype, backend=backend)
    assert (
        found["out"].dtype
        == found["d_query"].dtype
        == found["d_key"].dtype
        == found["d_value"].dtype
        == DTYPES[dtype]
    )
    forward, backward = LIMITS[dtype]
    for name, error in errors(problem, dtype, found).items():
        limit = backward if name.startswith("d_") else forward
        assert error <= limit, f"{name}: relative error {error:.2g} in {problem}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("problem", PROBLEMS[::2], ids=by_seed)
def test_agrees_in_half_precision(problem: Problem, dtype: str, backend: str) -> None:
    """No error above twice (gradients three times) that of the same formulas in float32, rounded at
    the end.
    """
    found = run_library(problem, dtype, backend=backend)
    plain = dict(run_oracle(problem, dtype, "float32"))
    for name in ("out", "d_query", "d_key", "d_value"):
        assert found[name].dtype == DTYPES[dtype]
        plain[name] = plain[name].astype(DTYPES[dtype])
    plain_errors = errors(problem, dtype, plain)
    for name, error in errors(problem, dtype, found).items():
        is_gradient = name.startswith("d_")
        limit = max((3 if is_gradient else 2) * plain_errors[name], LIMITS["float32"][is_gradient])
        assert error <= limit, f"{name}: {error:.2g}, plain {plain_errors[name]:.2g} in {problem}"


def test_the_problems_reach_everything() -> None:
    def seen(field: str) -> set[Any]:
        return {getattr(problem, field) for problem in PROBLEMS}

    assert len(PROBLEMS) >= 48
    assert {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2051} <= seen("n_keys")
    assert {1, 4, 16, 60, 96, 130} == seen("head_dim")
    assert {"ratio", "bucket_mean"} == seen("readout")
    assert {None, "random", "whole"} == seen("mask")
    assert {0.0, 20.0} <= seen("beta")
    assert None in seen("batch")
    for flag in (
        "planes_per_head",
        "beta_per_head",
        "is_causal",
        "has_initial_state",
        "has_d_state",
    ):
        assert seen(flag) == {False, True}, flag
    assert {1, 2, 3, 4} <= {problem.n_heads // problem.n_kv_heads for problem in PROBLEMS}
    assert any(problem.n_queries != problem.n_keys for problem in PROBLEMS)
    assert any(problem.value_dim != problem.head_dim for problem in PROBLEMS)
    empty_in_the_middle = [
        p for p in PROBLEMS if p.bounds is not None and any(np.diff(p.bounds)[1:-1] == 0)
    ]
    assert {problem.is_causal for problem in empty_in_the_middle} == {False, True}
    for position in range(4):
        assert {problem.layouts[position] for problem in PROBLEMS} == set(LAYOUTS) - {
            "broadcast_tokens"
        }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_asked_for_is_the_one_that_runs(
    backend: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: set[str] = set()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.add(name)
            return function(*args, **options)

        return call

    for operation in ("bidirectional", "causal"):
        for implementation in ("reference", "cpu", "cuda"):
            module = importlib.import_module(f"racecore.ops.{operation}.{implementation}")
            for name in module.__all__:
                monkeypatch.setattr(
                    module, name, noting(f"{operation}.{implementation}", getattr(module, name))
                )
    rows = np.ones((5, 1, 4))
    _, saved = racecore.attention_forward(rows, rows, rows, is_causal=is_causal, backend=backend)
    racecore.attention_backward(rows, saved)
    assert calls == {f"{'causal' if is_causal else 'bidirectional'}.{backend}"}


SMALL = {
    "causal": Problem(
        100,
        2,
        9,
        9,
        4,
        2,
        5,
        3,
        3,
        2,
        1.3,
        1.0,
        is_causal=True,
        mask="random",
        has_initial_state=True,
        has_d_state=True,
        beta_per_head=True,
    ),
    "bidirectional": Problem(
        101,
        2,
        5,
        9,
        4,
        2,
        5,
        3,
        2,
        3,
        1.3,
        1.0,
        readout="bucket_mean",
        planes_per_head=True,
        has_initial_state=True,
        has_d_state=True,
    ),
    "packed": Problem(
        102,
        None,
        40,
        40,
        2,
        1,
        5,
        3,
        2,
        2,
        1.3,
        1.0,
        readout="bucket_mean",
        is_causal=True,
        bounds=(0, 3, 3, 38, 40),
        has_initial_state=True,
        has_d_state=True,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", SMALL.values(), ids=SMALL)
def test_gradients_equal_central_differences(problem: Problem, backend: str) -> None:
    x = problem.arrays("float64")
    assert x.initial is not None
    assert x.d_state is not None
    inputs = {
        "query": x.query,
        "key": x.key,
        "value": x.value,
        "planes": x.planes,
        "beta": np.asarray(x.beta),
        "mass": x.initial[0],
        "value_sum": x.initial[1],
    }
    found = run_library(problem, "float64", backend=backend)

    def loss(**changed: np.ndarray) -> float:
        y = {**inputs, **changed}
        lsh = racecore.SoftLSH(y["planes"], y["beta"])
        out, state = racecore.attention(
            y["query"],
            y["key"],
            y["value"],
            lsh,
            is_causal=problem.is_causal,
            readout=problem.readout,
            key_mask=x.key_mask,
            cu_seqlens=x.cu_seqlens,
            initial_state=make_state(lsh, y["mass"], y["value_sum"], problem.n_kv_heads),
            return_state=True,
            backend=backend,
        )
        results = zip((out, state.mass, state.value_sum), (x.d_out, *x.d_state), strict=True)
        return sum(float((result * weight).sum()) for result, weight in results)

    rng = np.random.default_rng(0)
    for name, array in inputs.items():
        direction = rng.standard_normal(array.shape)
        slope = (
            loss(**{name: array + 1e-5 * direction}) - loss(**{name: array - 1e-5 * direction})
        ) / 2e-5
        assert float((found[f"d_{name}"] * direction).sum()) == pytest.approx(
            slope, rel=1e-6, abs=1e-7
        ), name
