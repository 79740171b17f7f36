"""Tests that need a GPU; without one all are skipped, with the reason.

RACECORE_REQUIRE_GPU=1 pytest -m gpu also runs every test of the backend "cuda" on the real thing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import Gpu, fetch, put
from problems import PROBLEMS, run_library, run_oracle

import racecore
from racecore.ops.cuda import call
from racecore.runtime import arrays, cuda

pytestmark = pytest.mark.gpu
GPU = Gpu("cuda")


@pytest.fixture
def cupy():
    return cuda.cupy()


def rows(n_tokens, dtype=np.float32, seed=0, dim=64):
    return np.random.default_rng(seed).standard_normal((1, n_tokens, 4, dim)).astype(dtype)


def forward_backward(q, k, v, d_out, **options):
    out, saved = racecore.attention_forward(q, k, v, is_causal=True, **options)
    return [out, *racecore.attention_backward(d_out, saved)[:5]]


def test_work_goes_to_the_current_stream(cupy):
    host = [rows(20_000, seed=seed) for seed in range(4)]
    expected = [fetch(x) for x in forward_backward(*(put(x, GPU) for x in host))]
    stream = cupy.cuda.Stream(non_blocking=True)
    device = [cupy.zeros_like(put(x, GPU)) for x in host]
    sources = [put(x, GPU) for x in host]
    cupy.cuda.Device().synchronize()
    with stream:
        busy = cupy.ones((4096, 4096), np.float32)
        for _ in range(20):  # the default stream would overtake this
            busy = busy @ busy * 1e-4
        for target, source in zip(device, sources, strict=True):
            target[...] = source
        found = forward_backward(*device)
    stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert fetch(ours).tobytes() == theirs.tobytes()


def test_the_memory_pool_gets_everything_back(cupy):
    device = [put(rows(50_000, seed=seed), GPU) for seed in range(4)]
    forward_backward(*device)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    for _ in range(3):
        forward_backward(*device)
    assert pool.used_bytes() == before


def test_running_out_of_memory_breaks_nothing(cupy):
    device = [put(rows(50_000, seed=seed), GPU) for seed in range(4)]
    expected = [fetch(x) for x in forward_backward(*device)]
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    used = pool.used_bytes()
    pool.set_limit(size=used + (8 << 20))
    try:
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            forward_backward(*device)
    finally:
        pool.set_limit(size=0)
    assert pool.used_bytes() == used
    for ours, theirs in zip(forward_backward(*device), expected, strict=True):
        assert fetch(ours).tobytes() == theirs.tobytes()


def test_two_runs_have_the_same_bits(cupy):
    device = [put(rows(70_000, seed=seed), GPU) for seed in range(4)]
    first, second = ([fetch(x).tobytes() for x in forward_backward(*device)] for _ in range(2))
    assert first == second


def test_more_heads_than_a_grid_is_wide(cupy):
    q = put(np.random.default_rng(0).standard_normal((35_000, 3, 2, 8)).astype(np.float32), GPU)
    out = fetch(racecore.attention(q, q, q, is_causal=True))
    for index in (0, 17_000, 34_999):
        one = fetch(
            racecore.attention(
                q[index : index + 1], q[index : index + 1], q[index : index + 1], is_causal=True
            )
        )
        np.testing.assert_allclose(out[index : index + 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_beyond_two_to_the_31(cupy, dtype):
    """The last rows of 2^31 + 2^20 elements equal those of a short sequence from the same state."""
    heads, dim = 4, 128
    tokens = ((1 << 31) + (1 << 20)) // (heads * dim)
    if cupy.cuda.runtime.memGetInfo()[0] < 5 * tokens * heads * dim * 2:
        pytest.skip("the card has too little memory")
    q = cupy.zeros((1, tokens, heads, dim), arrays.dtype_of(dtype))
    q[:, -100:] = put(rows(100, dim=dim).astype(arrays.dtype_of(dtype)), GPU)
    lsh = racecore.SoftLSH.random(head_dim=dim, n_tables=2, n_planes=2, rng=0)
    out = racecore.attention(q, q, q, lsh, is_causal=True)
    _, state = racecore.attention(
        q[:, :-100], q[:, :-100], q[:, :-100], lsh, is_causal=True, return_state=True
    )
    end = q[:, -100:]
    expected = racecore.attention(end, end, end, lsh, is_causal=True, initial_state=state)
    np.testing.assert_allclose(
        *(fetch(x).astype(np.float32) for x in (out[:, -100:], expected)), rtol=2e-2, atol=1e-7
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_reports_nothing(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    here = Path(__file__).parent
    code = (
        "from devices import Gpu; from problems import PROBLEMS, run_library\n"
        "for problem in PROBLEMS[:12]:\n"
        "    if problem.n_keys <= 70: run_library(problem, 'float32', Gpu('cuda'))\n"
        "from cuda_on_cpu import socket_cases\n"
        "socket_cases.run('results')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "CUPY_CACHE_IN_MEMORY": "1",
    }
    command = [program, f"--tool={tool}", "--error-exitcode=66", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_long_sequences_agree_with_the_cpu(cupy):
    host = [rows(1 << 17, seed=seed) for seed in range(4)]
    found, expected = (forward_backward(*(put(x, name) for x in host)) for name in (GPU, "cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = fetch(ours).astype(np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) <= 2e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_agree_with_tensor_cores_and_without(cupy, is_causal, monkeypatch):
    """bfloat16 results may differ in the last bit, float64 gradients by the rounding of float32."""
    device = [put(rows(1 << 17, arrays.dtype_of("bfloat16"), seed), GPU) for seed in range(4)]
    results = []
    for limit in (call.TENSOR_CORES_FROM, 1 << 30):
        monkeypatch.setattr(call, "TENSOR_CORES_FROM", limit)
        out, saved = racecore.attention_forward(
            *device[:3], racecore.SoftLSH.random(64, rng=0), is_causal=is_causal
        )
        results.append(
            [fetch(x) for x in (out, *racecore.attention_backward(device[3], saved)[:4])]
        )
    for ours, theirs in zip(*results, strict=True):
        limit = 2e-5 if ours.dtype == np.float64 else 1e-3
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        assert 0 < np.linalg.norm(ours - theirs) <= limit * np.linalg.norm(theirs)


def test_tensors_of_torch(cupy):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    problem = next(p for p in PROBLEMS if p.is_causal and p.n_keys == 100 and p.bounds is None)
    x = problem.arrays("float32")
    q, k, v = (
        torch.tensor(np.ascontiguousarray(y)).cuda().to(torch.bfloat16)
        for y in (x.query, x.key, x.value)
    )
    lsh = racecore.SoftLSH(x.planes, x.beta)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = racecore.attention(q, k, v, lsh, is_causal=True, readout=problem.readout)
    assert (out.dtype, out.device) == (torch.bfloat16, q.device)
    if problem.mask is None and not problem.has_initial_state:
        np.testing.assert_allclose(
            out.float().cpu(), run_oracle(problem, "float32")["out"], rtol=0.1, atol=0.05
        )


def test_every_problem_in_16_bits_without_a_copy_of_the_inputs(cupy):
    for problem in PROBLEMS[::6]:
        assert run_library(problem, "bfloat16", GPU)["backend"] == "cuda"


# SOCKET, beside tests/test_socket.py


def cache(n_tokens, dtype=np.float32, heads=8, kv_heads=2, dim=64):
    rng = np.random.default_rng(n_tokens)
    shapes = ((2, 1, heads, dim), (2, n_tokens, kv_heads, dim), (2, n_tokens, kv_heads, dim))
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


def decoded(arrays, lsh, backend=None, **options):
    """Return every intermediate and final result of a decoded token."""
    index = racecore.SocketIndex(lsh)
    index.append(arrays[1], arrays[2], backend=backend)
    query, options = (
        arrays[0],
        {"budget": 0.05, "sink": 16, "window": 32, "backend": backend} | options,
    )
    found = [
        index.hashed.codes,
        index.hashed.norms,
        index.scores(query, backend=backend),
        index.select(query, **options),
    ]
    found.append(racecore.sparse_attention(*arrays, index, **options))
    return [*found, racecore.sparse_attention(*arrays, None, budget=1.0, backend=backend)]


@pytest.mark.parametrize("selection", ["head", "group"])
@pytest.mark.parametrize("n_planes", [8, 10])
def test_a_decoded_token_is_that_of_the_reference(n_planes, selection):
    """In float64, where rounding decides no bit and no token."""
    host, lsh = cache(5000, np.float64), racecore.SoftLSH.random(64, 20, n_planes, rng=0)
    found = [fetch(x) for x in decoded([put(x, GPU) for x in host], lsh, group_selection=selection)]
    expected = decoded(host, lsh, "reference", group_selection=selection)
    blocks = -(-5000 // 64)
    np.testing.assert_array_equal(found[0][:, :, : blocks - 1], expected[0][:, :, : blocks - 1])
    np.testing.assert_array_equal(found[1][..., :5000], expected[1][..., :5000])
    np.testing.assert_array_equal(found[3], expected[3])
    for ours, theirs in zip((found[2], *found[4:]), (expected[2], *expected[4:]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoded_token_over_a_long_cache_is_that_of_the_cpu(dtype):
    host, lsh = cache(1 << 17, arrays.dtype_of(dtype)), racecore.SoftLSH.random(64, 60, 8, rng=0)
    found = [fetch(x) for x in decoded([put(x, GPU) for x in host], lsh)]
    expected = decoded(host, lsh)
    assert (found[0] == expected[0]).mean() > 0.9999  # projections near 0 may fall to either side
    np.testing.assert_array_equal(found[1], expected[1])
    assert np.isclose(found[2], expected[2], rtol=1e-4).mean() > 0.99
    for ours, theirs in zip(found[4:], expected[4:], strict=True):
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        assert np.linalg.norm(ours - theirs) <= 2e-2 * np.linalg.norm(theirs)
    again = [fetch(x) for x in decoded([put(x, GPU) for x in host], lsh)]
    assert [x.tobytes() for x in again] == [x.tobytes() for x in found]


def test_decoding_is_asynchronous_on_the_current_stream(cupy):
    """Its inputs come from work that the default stream would overtake."""
    host, lsh = cache(20_000), racecore.SoftLSH.random(64, 20, 8, rng=0)
    expected = [fetch(x).tobytes() for x in decoded([put(x, GPU) for x in host], lsh)]
    sources = [put(x, GPU) for x in host]
    device = [cupy.zeros_like(x) for x in sources]
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for n_products in (1, 200):  # the second time all memory is there
            busy = cupy.ones((4096, 4096), np.float32)
            for _ in range(n_products):
                busy = busy @ busy * 1e-4
            for target, source in zip(device, sources, strict=True):
                target[...] = source
            index = racecore.SocketIndex(lsh)
            index.append(*device[1:])
            out = racecore.sparse_attention(*device, index, budget=0.05, sink=16, window=32)
            was_done = stream.done
            stream.synchronize()
            assert fetch(out).tobytes() == expected[4]
            for target in device:
                target[...] = 0
    assert not was_done


def test_a_cache_of_torch_is_searched_in_place(cupy):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    if not torch.cuda.is_available():
        pytest.skip("this build of torch has no CUDA")
    host, lsh = cache(3000), racecore.SoftLSH.random(64, 20, 8, rng=0)
    expected = fetch(decoded([put(x, GPU) for x in host], lsh)[4])
    tensors = [torch.from_numpy(x).cuda() for x in host]
    torch.cuda.synchronize()
    out = decoded(tensors, lsh)[4]
    assert out.is_cuda
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_tensors_of_torch_on_its_current_stream(cupy, name):
    """The bits of CuPy's arrays, in memory of PyTorch's pool, after work of the current stream."""
    torch = pytest.importorskip("torch", reason="torch is not installed; only its adapter needs it")
    if not torch.cuda.is_available():
        pytest.skip("this build of torch has no CUDA")
    from racecore.adapters.torch import race_attention

    dtype = arrays.dtype_of(name)
    host = [rows(20_000, dtype, seed) for seed in range(4)]
    lsh = racecore.SoftLSH.random(64, rng=0)
    expected = forward_backward(*(put(x, GPU) for x in host), lsh=lsh)
    expected = [fetch(x).view(np.uint8) for x in expected[:4]]
    sources = [
        torch.from_numpy(x.view(np.int16 if name == "bfloat16" else dtype)).cuda() for x in host
    ]
    sources = [x.view(getattr(torch, name)) for x in sources]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        busy = torch.ones(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-4
        tensors = [(x * 1).requires_grad_() for x in sources]
        before = torch.cuda.memory_allocated()
        out = race_attention(*tensors[:3], torch.from_numpy(lsh.planes.copy()), 1.0, is_causal=True)
        assert torch.cuda.memory_allocated() >= before + out.nbytes
        grads = torch.autograd.grad(out, tensors[:3], tensors[3].detach())
    stream.synchronize()
    for ours, theirs in zip((out.detach(), *grads), expected, strict=True):
        assert ours.is_cuda
        np.testing.assert_array_equal(ours.cpu().view(torch.uint8).numpy().ravel(), theirs.ravel())
