"""The readable and the fast implementation have the same functions with the same arguments and the
same results.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from devices import BACKENDS, fetch, put
from problems import PROBLEMS, Problem, relative_error, run_library

import racecore
from racecore import inputs
from racecore.chunking import BLOCK
from racecore.ops.simd import products
from racecore.ops.soft_hash import cpu as soft_hash_cpu
from racecore.ops.soft_hash import reference as soft_hash_reference
from racecore.problem import GradientBuffers, Sketch

OPERATIONS = sorted(
    path.name
    for path in (Path(racecore.__file__).parent / "ops").iterdir()
    if (path / "reference.py").is_file()
)


# What a state that is decoded from is advanced by, and decoding from a cache.
NEVER_DIFFERENTIATED = {
    "add_at_once",
    "attend_dense",
    "attend_selected",
    "hash_keys",
    "query_tables",
    "scores",
    "select",
    "step",
}


def implementations(operation: str) -> list[ModuleType]:
    return [
        importlib.import_module(f"racecore.ops.{operation}.{name}")
        for name in ("reference", "cpu", "cuda")
    ]


def test_every_operation_is_found() -> None:
    assert {"bidirectional", "causal", "decoding", "socket", "soft_hash"} <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_public_functions_with_the_same_arguments(operation: str) -> None:
    reference, *others = implementations(operation)
    assert reference.__all__
    for other in others:
        assert reference.__all__ == other.__all__
        for name in reference.__all__:
            mine, its = getattr(reference, name), getattr(other, name)
            assert inspect.isfunction(mine), (
                name
            )  # plain functions: launching kernels is the business of the inside
            assert inspect.isfunction(its), name
            assert inspect.signature(mine) == inspect.signature(its), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_forward_has_its_backward_right_under_it(operation: str) -> None:
    for module in implementations(operation):
        lines = {name: inspect.getsourcelines(getattr(module, name))[1] for name in module.__all__}
        for name in module.__all__:
            if not name.endswith("_backward") and name not in NEVER_DIFFERENTIATED:
                assert lines[name] < lines[f"{name}_backward"], f"{module.__name__}.{name}"


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-13), (np.float32, 2e-6)])
@pytest.mark.parametrize("n_tokens", [0, 1, 31, 33, 100])
def test_soft_hash(dtype: Any, limit: float, n_tokens: int, backend: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_tokens, 2, 3, 6)).astype(dtype)
    planes, beta = (
        rng.standard_normal((3, 4, 3, 6)).astype(np.float32).astype(np.float64),
        np.array([0.5, 1.0, 4.0]),
    )
    d_phi = rng.standard_normal((n_tokens, 2, 3, 4 * 8)).astype(dtype)
    module, reference = (
        importlib.import_module(f"racecore.ops.soft_hash.{name}") for name in (backend, "reference")
    )
    phi = module.soft_hash(put(x, backend), planes, beta)
    assert phi.dtype == dtype
    assert phi.shape == d_phi.shape
    assert relative_error(fetch(phi), reference.soft_hash(x, planes, beta)) < limit
    found = module.soft_hash_backward(put(d_phi, backend), put(x, backend), planes, beta)
    expected = reference.soft_hash_backward(d_phi, x, planes, beta)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(fetch(ours), theirs) < 10 * limit


def problem_of(arrays: Any, problem: Problem, backend: str) -> Any:
    rows = (put(array, backend) for array in (arrays.query, arrays.key, arrays.value))
    checked, _ = inputs.check_attention(
        inputs.Passed.resolve(*rows),
        racecore.SoftLSH(arrays.planes, arrays.beta),
        is_causal=problem.is_causal,
        readout=problem.readout,
        key_mask=put(arrays.key_mask, backend),
    )
    return checked


def steps(backend: str, operation: str, arrays: Any, problem: Problem) -> dict[str, np.ndarray]:
    """Call the functions of one module in the order in which the pipeline does, and keep everything
    they write.
    """
    module, p = (
        importlib.import_module(f"racecore.ops.{operation}.{backend}"),
        problem_of(arrays, problem, backend),
    )
    rng = np.random.default_rng(0)
    sketch, d_sketch = p.new_sketch(), p.new_sketch()
    sketch.mass[...] = 1
    d_sketch.flat[...] = put(rng.standard_normal(d_sketch.flat.shape), backend)
    d_out, out = put(arrays.d_out, backend), put(np.full_like(arrays.d_out, np.nan), backend)
    targets = [
        put(np.full(x.shape, np.nan, x.dtype), backend)
        for x in (arrays.query, arrays.key, arrays.value)
    ]
    d_hash = np.zeros((2, p.n_state_heads, arrays.planes[0].size * len(arrays.planes) + 1))
    grads = GradientBuffers(*targets, put(d_hash, backend))
    results: dict[str, Any] = {}
    if problem.is_causal:
        checkpoints = module.causal_scan(p, sketch, out, True)
        results["checkpoint"] = checkpoints[0].copy()
        results["state"] = sketch.flat
        module.causal_scan_backward(p, checkpoints, d_out, d_sketch, grads)
    else:
        module.sum_keys(p, sketch)
        results["state"] = sketch.flat.copy()
        module.read_out(p, sketch, out)
        module.read_out_backward(p, Sketch(results["state"], p.n_buckets), d_out, d_sketch, grads)
        results["d_state between"] = d_sketch.flat.copy()
        module.sum_keys_backward(p, d_sketch, grads)
    names = ("d_query", "d_key", "d_value")
    results |= dict(zip(names, targets, strict=True)) | {
        "out": out,
        "d_hash": grads.hash,
        "d_state": d_sketch.flat,
    }
    return {name: fetch(array) for name, array in results.items()}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("operation", ["bidirectional", "causal"])
def test_same_results_function_by_function(operation: str, readout: str, backend: str) -> None:
    problem = Problem(
        0,
        2,
        100,
        100,
        4,
        2,
        6,
        5,
        3,
        2,
        1.2,
        1.0,
        mask="random",
        readout=readout,
        is_causal=operation == "causal",
    )
    arrays = problem.arrays("float64")
    found, expected = (steps(name, operation, arrays, problem) for name in (backend, "reference"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert relative_error(found[name], array) < 1e-12, name


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("problem", PROBLEMS[1::3], ids=lambda problem: f"problem{problem.seed}")
def test_same_results_through_the_public_functions(
    problem: Problem, dtype: str, backend: str
) -> None:
    """Closer to each other than either needs to be to the oracle."""
    found, expected = (run_library(problem, dtype, name) for name in (backend, "reference"))
    assert (found.pop("backend"), expected.pop("backend")) == (backend, "reference")
    floor = 0.01 * float(np.linalg.norm(problem.arrays(dtype).d_out.astype(np.float64)))
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        limit = 1e-11 if dtype == "float64" else 3e-5
        assert (
            relative_error(found[name], array, floor if name.startswith("d_") else 0.0) < limit
        ), name


def between_nan(array: np.ndarray) -> np.ndarray:
    """Return a copy with NaN right before and right behind it in memory."""
    store = np.full(array.size + 2 * 64, np.nan, array.dtype)
    inner = store[64:-64].reshape(array.shape)
    inner[...] = array
    return inner


@numba.njit
def _there_and_back(f, x, n, phi, d_phi, d_x, d_hash):
    soft_hash_cpu.hash_block(f, products.input_rows(x), n, phi, products.NO_PREFETCH)
    soft_hash_cpu.hash_block_backward(
        f, d_phi, products.input_rows(x), n, phi, products.output_rows(d_x, False), d_hash
    )


@pytest.mark.parametrize("n", [1, 31, 32])
@pytest.mark.parametrize(
    ("n_tables", "n_planes", "head_dim"),
    [(1, 1, 16), (1, 1, 5), (1, 3, 16), (2, 1, 17), (3, 2, 32), (4, 4, 16), (2, 4, 24)],
)
def test_hashing_a_block_touches_nothing_beside_it(
    n_tables: int, n_planes: int, head_dim: int, n: int
) -> None:
    rng = np.random.default_rng(0)
    n_rows, width, n_buckets = n_tables * n_planes, products.padded(head_dim), n_tables << n_planes
    planes, x = np.zeros((n_rows, width)), np.zeros((BLOCK, width))
    planes[:, :head_dim] = rng.standard_normal((n_rows, head_dim))
    x[:n, :head_dim] = rng.standard_normal((n, head_dim))
    d_phi = rng.standard_normal((n_buckets, BLOCK))
    expected_phi = soft_hash_reference.soft_hash(
        x[:n, None, :head_dim],
        planes[None, :, :head_dim].reshape(1, n_tables, n_planes, -1),
        np.array([1.5]),
    )
    expected = soft_hash_reference.soft_hash_backward(
        d_phi.T[:n, None],
        x[:n, None, :head_dim],
        planes[None, :, :head_dim].reshape(1, n_tables, n_planes, -1),
        np.array([1.5]),
    )

    x = between_nan(x)
    phi, d_x = between_nan(np.zeros((n_buckets, BLOCK))), between_nan(np.zeros((BLOCK, width)))
    d_hash = between_nan(np.zeros(n_rows * head_dim + 1))
    wide = products.padded(n_rows)
    planes_t = np.zeros((width, wide))
    planes_t[:, :n_rows] = planes.T
    shapes = ((3, wide, BLOCK), (wide, BLOCK), (n_rows, width), (BLOCK, wide))
    arrays = [between_nan(np.zeros(shape)) for shape in shapes]
    scratch = [x, phi, d_x, d_hash, between_nan(planes), between_nan(planes_t), *arrays]
    f = soft_hash_cpu.Hash(scratch[4], scratch[5], 1.5, n_tables, *arrays)
    _there_and_back(f, x, n, phi, between_nan(d_phi), d_x, d_hash)
    np.testing.assert_allclose(phi[:, :n].T, expected_phi[:, 0], rtol=1e-12)
    np.testing.assert_allclose(d_x[:n, :head_dim], expected[0][:, 0], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(d_hash[:-1], expected[1].ravel(), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(d_hash[-1], expected[2][0], rtol=1e-10, atol=1e-13)
    for array in scratch:
        assert np.isnan(array.base[:64]).all()
        assert np.isnan(array.base[-64:]).all()
