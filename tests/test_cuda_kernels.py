"""The CUDA kernels: compilation by NVRTC, sanitizers, mutations.

Their results are tested with all backends; here are the errors that only kernels can have.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import fake_cupy, mutations, nvrtc, watched
from devices import BACKENDS, fetch, put
from problems import DTYPES, Problem, run_library

import racecore
from racecore.ops.cuda import call
from racecore.runtime import cuda

pytestmark = pytest.mark.toolchain

OPS = Path(racecore.__file__).parent / "ops"
FILES = sorted(str(path.relative_to(OPS)) for path in OPS.rglob("*.cu"))
NAMES = ("query", "key", "value", "d_out")
# compiled for the dtypes of the arithmetic, with one column
READ_NO_ROWS = {"socket/selection.cu", "cuda/sums.cu"}


def columns_of(file: str, dtype: np.dtype) -> tuple[int, ...]:
    """Return the numbers of columns per lane for which a file is compiled, by dtype."""
    if file in READ_NO_ROWS:
        return (1,) if dtype.itemsize > 2 else ()
    return (2, 4) if file == "socket/kernels.cu" else (1, 2, 4)


def test_all_files_are_found():
    assert FILES == [
        "bidirectional/kernels.cu",
        "causal/kernels.cu",
        "cuda/sums.cu",
        "socket/kernels.cu",
        "socket/selection.cu",
        "soft_hash/kernels.cu",
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_instance_compiles(architecture):
    """For every dtype and number of columns; almost without spills, except in float64."""
    instances = [
        (file, dtype, columns)
        for file in FILES
        for dtype in DTYPES.values()
        for columns in columns_of(file, dtype)
    ]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(
            lambda x: nvrtc.compiled(cuda.source(x[0]), cuda.options(x[1], x[2]), architecture),
            instances,
        )
        for (file, dtype, columns), (binary, log) in zip(instances, results, strict=True):
            assert binary.startswith(b"\x7fELF")
            frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
            assert len(frames) == cuda.source(file).count("__global__")
            if dtype.name != "float64":
                assert max(frames) <= 160, f"{file} in {dtype} with {columns} columns: {log}"


def test_compiler_errors_are_raised():
    with pytest.raises(RuntimeError, match="undeclared_thing"):
        nvrtc.compiled("__global__ void f() { undeclared_thing = 1; }", (), "sm_90")


def test_no_atomics_and_no_short_offsets():
    """Except counts: a sum of integers does not depend on the order."""
    for path in OPS.rglob("*.cu*"):
        text = re.sub(r"//.*", "", path.read_text())
        counts = re.findall(r"atomicAdd\((\w+) ", text)
        assert all(f"unsigned* {name}" in text for name in counts), path
        assert text.count("atomic") == len(counts), path
        assert not re.search(r"\b(unsigned|long|short)\b(?! long)(?! short)(?=.*offset)", text), (
            path
        )


@pytest.mark.parametrize("of_socket", [False, True])
@pytest.mark.parametrize("watcher", ["address", "thread"])
def test_sanitizers_report_nothing(watcher, of_socket):
    assert not watched.failure(watcher, of_socket=of_socket)


# One mutation for every kernel and header; mutations.py tries all.
SAMPLE = (
    "sum_keys: add_group(state, phi, phi, ",
    "sum_keys_backward: d_phi[j] += (Real)d_state",
    "read_out_backward: add_group(d_state, d_mass",
    "causal_scan: masses[i * padded_buckets + s] = before",
    "causal_scan_queries_backward: if (task.head % repeats",
    "causal_scan_keys_backward: d_mass[s] += sum",
    "scan_segments: parts[i * step + offset] = total",
    "hash: corner >> (hash.n_planes",
    "bound: column + c < rows.width) x[c]",
    "bound: rows.group.kept >> i & 1) || column",
    "bound: if (column >= heads * width) return",
    "hash_keys: n_planes - 1 - first - i",
    "score_keys: code[1] |= above",
    "select_tokens: rank++ < threshold.n_equal",
    "attend_splits: a[r][d] *= factors[row + r];",
    "merge_splits: if (part[1] == 0) continue;",
    "bound: if (position < left)",
)


@pytest.mark.parametrize("sample", SAMPLE)
def test_a_changed_kernel_is_noticed(sample):
    change = next(c for c in mutations.changes() if sample.partition(": ")[2] in c.old)
    assert mutations.noticed_by(change)


@pytest.mark.parametrize(
    "file",
    [
        "bidirectional/kernels.cu",
        "causal/kernels.cu",
        "soft_hash/soft_hash.cuh",
        "socket/selection.cu",
    ],
)
def test_a_missing_barrier_is_noticed(file):
    removals = [m for m in mutations.barriers() if m.file == file]
    assert mutations.noticed_by(removals[len(removals) // 2])


@pytest.fixture(params=BACKENDS[2:])
def backend(request):
    return request.param


LARGE = Problem(
    0,
    2,
    1100,
    1100,
    4,
    2,
    20,
    9,
    3,
    3,
    1.2,
    1.0,
    mask="random",
    has_initial_state=True,
    has_d_state=True,
    beta_per_head=True,
)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_bits_for_any_grid_and_any_scratch(backend, is_causal, monkeypatch):
    problem = Problem(**{**LARGE.__dict__, "is_causal": is_causal})
    expected = run_library(problem, "float32", backend)
    monkeypatch.setattr(call, "_MAX_BLOCKS", 3)
    few_blocks = run_library(problem, "float32", backend)
    monkeypatch.setattr(call, "_SHARED_BYTES", 0)
    in_global_memory = run_library(problem, "float32", backend)
    in_chunks = run_library(problem, "float32", backend, chunk_size=1)
    for found in (few_blocks, in_global_memory, in_chunks):
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_state_too_large_for_shared_memory(backend, is_causal):
    """S = 2,560: the scratch of a block is in global memory."""
    problem = Problem(1, None, 40, 40, 2, 1, 6, 33, 5, 9, 1.0, 1.0, is_causal=is_causal)
    found, expected = (run_library(problem, "float64", name) for name in (backend, "reference"))
    for name in ("out", "d_query", "d_key", "d_value", "d_planes"):
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-9, atol=1e-11 * np.abs(expected[name]).max()
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_of_16_bits(backend, dtype):
    """Values pass unchanged, and NaN stays NaN: with one key, the output is its value."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    values = every.reshape(1 << 10, 1, 1, 64)
    query = np.ones((1 << 10, 1, 1, 4), DTYPES[dtype])
    key = query.copy()
    # one key has the mass 1/2 in both buckets: nothing is rounded
    lsh = racecore.SoftLSH(np.zeros((1, 1, 4)), 0.0)
    out = fetch(racecore.attention(*(put(x, backend) for x in (query, key, values)), lsh)).ravel()
    finite = np.isfinite(every.astype(np.float32))
    normal = finite & (np.abs(every.astype(np.float32)) >= np.finfo(np.float32).tiny * 2)
    assert (out[normal] == every[normal]).all()
    assert np.isnan(out[np.isnan(every.astype(np.float32))].astype(np.float32)).all()


def test_kernels_are_compiled_once_and_only_when_used():
    with fake_cupy.install() as cupy:
        rows = cupy.asarray(np.ones((5, 1, 4), np.float32))
        racecore.attention(rows, rows, rows)
        before = dict(cuda._modules)
        racecore.attention(rows, rows, rows)
        assert cuda._modules == before
        assert not [
            key
            for key in before
            if key[3] == "float64" and key[4] == 4 and key[2] == "soft_hash/kernels.cu"
        ]
