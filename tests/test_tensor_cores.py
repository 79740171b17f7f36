"""Tensor cores, for bfloat16 arrays and 16 buckets or more; on the CPU, their portable twin."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cuda_on_cpu import fake_cupy, nvrtc, watched
from devices import BACKENDS, fetch, put
from problems import DTYPES, Problem, relative_error, run_library, run_oracle

import racecore
from racecore.ops.cuda import call
from racecore.runtime import cuda

pytestmark = pytest.mark.toolchain

BFLOAT16 = DTYPES["bfloat16"]
INSTRUCTION = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
FILES = ("bidirectional/kernels.cu", "causal/kernels.cu")


@pytest.fixture(params=BACKENDS[2:])
def backend(request):
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """Note which kernels are launched, and whether they use tensor cores."""
    names, real = {}, cuda.kernel

    def kernel(file, name, dtype, columns, tensor_cores=False):
        names[name] = tensor_cores
        return real(file, name, dtype, columns, tensor_cores)

    monkeypatch.setattr(cuda, "kernel", kernel)
    return names


# The instruction
# -----------------------------------------------------------------------------

ONE_PRODUCT = """#include "cuda/warp.cuh"
extern "C" __global__ void one_product(const unsigned* a, const unsigned* b, float* d) {
    int i = lane_id();
    Sum sum = {{d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]}};
    Left left = {{a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]}};
    multiply_add(sum, left, Right{{b[2 * i], b[2 * i + 1]}});
    for (int j = 0; j < 4; ++j) d[4 * i + j] = sum.x[j];
}
"""


def positions(n, row, column):
    """Return row and column of each of the n numbers of each lane, from the PTX ISA's formulas."""
    lane, i = np.divmod(np.arange(32 * n), n)
    return row(lane // 4, lane % 4, i), column(lane // 4, lane % 4, i)


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type";
# g = groupID, t = threadID_in_group
OF_A = positions(
    8,
    lambda g, t, i: np.where((i < 2) | ((i >= 4) & (i < 6)), g, g + 8),
    lambda g, t, i: t * 2 + (i & 1) + 8 * (i >= 4),
)
OF_B = positions(4, lambda g, t, i: t * 2 + (i & 1) + 8 * (i >= 2), lambda g, t, i: g)
OF_D = positions(4, lambda g, t, i: np.where(i < 2, g, g + 8), lambda g, t, i: t * 2 + (i & 1))


def test_fragments_are_those_of_the_ptx_isa(backend):
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.integers(-9, 10, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8))
    )
    library = cuda.cupy()
    code = cuda._INCLUDE.sub(lambda match: cuda.source(match[1]), ONE_PRODUCT)
    kernel = library.RawModule(code=code, options=cuda.options(BFLOAT16, 4, True)).get_function(
        "one_product"
    )
    words = [
        library.asarray(x[of].astype(BFLOAT16).view(np.uint32)) for x, of in ((a, OF_A), (b, OF_B))
    ]
    d = library.asarray(c[OF_D])
    kernel((1,), (32,), (*words, d))
    np.testing.assert_array_equal(fetch(d), (a @ b + c)[OF_D])


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_instance_compiles_to_the_instruction(architecture):
    codes = [cuda.source(file) for file in FILES]
    with ThreadPoolExecutor(2) as pool:
        results = list(
            pool.map(
                lambda code: nvrtc.compiled(
                    code, cuda.options(BFLOAT16, 4, True), architecture, "PTX"
                ),
                codes,
            )
        )
    for file, code, (ptx, log) in zip(FILES, codes, results, strict=True):
        frames = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
        assert len(frames) == code.count("__global__")
        assert max(frames) <= 160, f"{file}: {log}"
        kernels = ptx.decode().split(".entry ")[1:]
        assert len(kernels) == len(frames)
        for kernel in kernels:
            assert INSTRUCTION in kernel


def test_other_instances_do_without_it():
    ptx, _ = nvrtc.compiled(
        cuda.source("soft_hash/kernels.cu"), cuda.options(BFLOAT16, 4), "sm_75", "PTX"
    )
    assert b"mma" not in ptx


# Results
# -----------------------------------------------------------------------------

STRIDED = ("transposed", "reversed", "contiguous", "strided")
BASE = {"beta": 1.2, "spread": 1.0}
CASES = {
    "S=64": Problem(0, 1, 100, 100, 2, 1, 64, 48, 4, 4, **BASE),
    "S=64 causal": Problem(1, 2, 70, 70, 2, 2, 16, 130, 4, 4, is_causal=True, **BASE),
    "S=24 mask": Problem(
        2,
        2,
        37,
        50,
        4,
        2,
        33,
        7,
        3,
        3,
        mask="random",
        readout="bucket_mean",
        has_initial_state=True,
        has_d_state=True,
        **BASE,
    ),
    "S=24 mask causal": Problem(
        3,
        2,
        50,
        50,
        4,
        1,
        5,
        33,
        3,
        3,
        mask="whole",
        is_causal=True,
        has_initial_state=True,
        has_d_state=True,
        beta=20.0,
        spread=0.6,
    ),
    "S=20 packed": Problem(
        4,
        None,
        90,
        90,
        2,
        2,
        20,
        40,
        5,
        2,
        bounds=(0, 3, 3, 20, 52, 53, 90),
        beta_per_head=True,
        **BASE,
    ),
    "S=32 packed causal": Problem(
        5,
        None,
        90,
        90,
        2,
        2,
        64,
        8,
        1,
        5,
        bounds=(0, 3, 3, 20, 52, 53, 90),
        is_causal=True,
        planes_per_head=True,
        readout="bucket_mean",
        **BASE,
    ),
    "S=24 over segments": Problem(
        6, None, 1100, 1100, 1, 1, 4, 5, 3, 3, is_causal=True, layouts=STRIDED, **BASE
    ),
    "S=16": Problem(7, 1, 17, 16, 1, 1, 1, 1, 2, 3, has_d_state=True, layouts=STRIDED, **BASE),
}


def errors(problem, found):
    floor = 0.01 * float(np.linalg.norm(problem.arrays("bfloat16").d_out.astype(np.float64)))
    expected = run_oracle(problem, "bfloat16")
    return {
        name: relative_error(found[name], x, floor if name[:2] == "d_" else 0.0)
        for name, x in expected.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_as_near_to_the_oracle_as_float32(backend, name, launched):
    """bfloat16 results are within their rounding; float64 results show a lost piece of 16 bits."""
    found = run_library(CASES[name], "bfloat16", backend)
    assert all(launched[kernel] for kernel in launched if kernel != "scan_segments")
    assert len(launched) == 5 if CASES[name].is_causal else 4
    for result, error in errors(CASES[name], found).items():
        limit = 2.4e-3 if found[result].dtype == BFLOAT16 else 2e-5 if result[:2] == "d_" else 1e-6
        assert error < limit, f"{result}: {error:.2g}"


def without(monkeypatch):
    monkeypatch.setattr(call, "TENSOR_CORES_FROM", 1 << 30)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_without_them(backend, is_causal, monkeypatch, launched):
    problem = CASES["S=24 mask causal" if is_causal else "S=24 mask"]
    found = run_library(problem, "bfloat16", backend)
    assert launched.pop("sum_keys")
    without(monkeypatch)
    expected = run_library(problem, "bfloat16", backend)
    assert not any(launched.values())
    for name, array in expected.items():
        if name != "backend":
            assert relative_error(found[name], array, 1e-2) < (
                1e-3 if array.dtype == BFLOAT16 else 4e-6
            ), name


# Bits
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_same_bits_for_any_grid_and_any_scratch(backend, is_causal, monkeypatch):
    problem = Problem(
        0,
        2,
        1100,
        1100,
        1,
        1,
        5,
        40,
        3,
        3,
        1.2,
        1.0,
        mask="random",
        has_d_state=True,
        is_causal=is_causal,
    )
    expected = run_library(problem, "bfloat16", backend)
    monkeypatch.setattr(call, "_MAX_BLOCKS", 3)
    few_blocks = run_library(problem, "bfloat16", backend)
    monkeypatch.setattr(call, "_SHARED_BYTES_TENSOR_CORES", 0)
    in_global_memory = run_library(problem, "bfloat16", backend, chunk_size=1)
    for found in (few_blocks, in_global_memory):
        for name, array in expected.items():
            assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_over_their_inputs_have_the_same_bits(backend, is_causal):
    rng = np.random.default_rng(0)
    host = [rng.standard_normal((1, 60, heads, 70)).astype(BFLOAT16) for heads in (2, 1, 1, 2)]
    results = []
    for overwrite in (False, True):
        q, k, v, d_out = (put(x, backend) for x in host)
        _, saved = racecore.attention_forward(q, k, v, is_causal=is_causal)
        grads = racecore.attention_backward(d_out, saved, overwrite_inputs=overwrite)
        results.append([fetch(x).tobytes() for x in grads[:5]])
    assert results[0] == results[1]


def test_a_bad_token_changes_no_bit_where_it_is_invisible(backend):
    for problem in (watched.for_tensor_cores()[0], CASES["S=32 packed causal"]):
        assert watched.past_that_changed(problem, backend) == ""


# When
# -----------------------------------------------------------------------------


def launches(launched, dtype=BFLOAT16, n_planes=3, n_heads=None, heads=2, kv_heads=2):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((9, n, 4)).astype(dtype) for n in (heads, kv_heads))
    lsh = racecore.SoftLSH.random(head_dim=4, n_tables=3, n_planes=n_planes, n_heads=n_heads, rng=0)
    launched.clear()
    with fake_cupy.install() as cupy:
        racecore.attention(*(cupy.asarray(x) for x in (q, k, k)), lsh)
    return launched["read_out"]


def test_when_they_are_used(launched, monkeypatch):
    assert launches(launched)
    assert not launches(launched, n_planes=2)  # 12 buckets
    assert not launches(launched, dtype=np.float16)
    assert not launches(launched, dtype=np.float32)
    assert launches(launched, kv_heads=1)
    assert launches(launched, n_heads=2)
    # gradients of shared keys are added up in float32
    assert not launches(launched, n_heads=2, kv_heads=1)
    monkeypatch.setattr(cuda, "has_bfloat16_products", lambda: False)
    assert not launches(launched)


def test_which_devices_have_them(monkeypatch):
    for capability, expected in (("75", False), ("80", True), ("90", True), ("120", True)):
        with fake_cupy.install() as cupy:
            device = cupy.cuda.Device()
            device.compute_capability = capability
            monkeypatch.setattr(cupy.cuda, "Device", lambda device=device: device)
            assert cuda.has_bfloat16_products() is expected
