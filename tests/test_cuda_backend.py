"""Arrays on a GPU through the public functions: devices of results, refusals, reasons."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from cuda_on_cpu import fake_cupy
from devices import BACKENDS, fetch, put

import racecore
from racecore import backends
from racecore.cli import main
from racecore.errors import BackendUnavailableError
from racecore.runtime import cuda

pytestmark = pytest.mark.toolchain


@pytest.fixture(params=BACKENDS[2:])
def backend(request):
    return request.param


def rows(n_tokens=30, heads=2, dim=6, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal((1, n_tokens, heads, dim)).astype(dtype)


def test_results_are_on_the_device_of_the_inputs(backend):
    q = put(rows(), backend)
    out, saved, state = racecore.attention_forward(q, q, q, is_causal=True, return_state=True)
    grads = racecore.attention_backward(q, saved)
    for array in (
        out,
        grads.query,
        grads.key,
        grads.value,
        grads.planes,
        grads.beta,
        state.mass,
        state.value_sum,
    ):
        assert cuda.is_array(array)
    assert grads.beta.ndim == 0
    assert saved.backend == "cuda"
    assert "nbytes" in repr(saved)


def test_arrays_of_the_host_go_there_and_back(backend):
    q = rows()
    out, saved, state = racecore.attention_forward(q, q, q, backend="cuda", return_state=True)
    grads = racecore.attention_backward(q, saved)
    for array in (out, grads.query, grads.key, grads.value, grads.planes, state.mass):
        assert type(array) is np.ndarray
    assert isinstance(grads.beta, float)
    np.testing.assert_allclose(out, racecore.attention(q, q, q), rtol=1e-4, atol=1e-6)
    answer = state.attend(q, backend="cuda")
    assert type(answer) is type(state.mass) is np.ndarray


def test_results_go_into_the_callers_arrays(backend):
    q, target = put(rows(), backend), put(np.zeros((1, 30, 2, 6), np.float32), backend)
    assert racecore.attention(q, q, q, out=target) is target
    assert (fetch(target) == fetch(racecore.attention(q, q, q))).all()
    grads = racecore.Gradients(query=put(np.zeros((1, 30, 2, 6), np.float32), backend))
    _, saved = racecore.attention_forward(q, q, q, wrt="query")
    assert racecore.attention_backward(q, saved, out=grads).query is grads.query


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, x: {"query": x}, "on one device, got query in host memory, key on a GPU"),
        (
            lambda q, x: {"out": x},
            "out must be a CuPy array, as the inputs are on a GPU, got numpy.ndarray",
        ),
        (lambda q, x: {"out": q}, "out overlaps query"),
        (lambda q, x: {"out": q[:, ::-1]}, "out overlaps query"),
        (lambda q, x: {"backend": "cpu"}, "works in host memory, and these arrays are on a GPU"),
        (lambda q, x: {"backend": "reference"}, "works in host memory"),
        (lambda q, x: {"query": q[:, :, :, 0]}, r"must all be \[B, T, heads, dim\]"),
        (lambda q, x: {"query": q.astype(np.float64)}, "must have one dtype"),
        (lambda q, x: {"key_mask": q}, "key_mask must be bool"),
    ],
)
def test_refusals(backend, change, message):
    q = put(rows(), backend)
    arguments = {"query": q, "key": q, "value": q} | change(q, rows())
    with pytest.raises((ValueError, TypeError), match=message):
        racecore.attention(**arguments)


def test_an_output_beside_an_input_in_the_same_memory(backend):
    store = put(np.ones((1, 30, 2, 12), np.float32), backend)
    q, target = store[..., :6], store[..., 6:]
    assert racecore.attention(q, q, q, out=target) is target
    assert (fetch(q) == 1).all()


def test_a_mask_and_bounds_from_anywhere(backend):
    q, mask = rows(), np.arange(30)[None] < 20
    expected = fetch(racecore.attention(q, q, q, key_mask=mask))
    found = racecore.attention(*[put(q, backend)] * 3, key_mask=mask)
    np.testing.assert_allclose(fetch(found), expected, rtol=1e-4, atol=1e-6)
    bounds = np.array([0, 12, 30])
    expected = racecore.attention(q, q, q, cu_seqlens=bounds, is_causal=True)
    found = racecore.attention(
        *[put(q, backend)] * 3, cu_seqlens=put(bounds, backend), is_causal=True
    )
    np.testing.assert_allclose(fetch(found), expected, rtol=1e-4, atol=1e-6)


def test_a_state_is_on_the_device_of_its_last_arrays(backend, tmp_path):
    x, lsh = rows(), racecore.SoftLSH.random(head_dim=6, rng=0)
    state = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=2, value_dim=6)
    state.append(put(x, backend), put(x, backend))
    assert cuda.is_array(state.mass)
    other = state.copy()
    other.merge(state)
    assert cuda.is_array(other.select([0, 0]).mass)
    other.save(tmp_path / "state.npz")
    loaded = racecore.RaceState.load(tmp_path / "state.npz")
    assert (loaded.mass == fetch(other.mass)).all()
    loaded.merge(state)
    assert cuda.is_array(loaded.attend(put(x, backend)))
    assert cuda.is_array(loaded.mass)
    answer = loaded.attend(x)
    assert type(answer) is type(loaded.mass) is np.ndarray
    out = racecore.attention(*(put(x, backend) for _ in range(3)), initial_state=loaded)
    assert out.shape == x.shape


@pytest.mark.parametrize("planes_per_head", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_that_share_a_key_are_added_up_before_they_are_rounded(
    backend, is_causal, planes_per_head
):
    lsh = racecore.SoftLSH.random(head_dim=6, rng=0, n_heads=8 if planes_per_head else None)
    q, k, v = (rows(40, n, dtype=np.float16, seed=seed) for seed, n in enumerate((8, 1, 1)))
    grads = {}
    for name in (backend, "reference"):
        _, saved = racecore.attention_forward(
            *(put(x, name) for x in (q, k, v)), lsh, is_causal=is_causal
        )
        grads[name] = racecore.attention_backward(put(q, name), saved)
    for name in ("key", "value"):
        found, expected = (
            fetch(getattr(grads[b], name)).astype(np.float64) for b in (backend, "reference")
        )
        assert np.abs(found - expected).max() <= 1.1e-3 * np.abs(expected).max()
        assert (found == expected).mean() > 0.95  # else in the last bit


# Reasons why CUDA is unavailable


def unavailable(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "cupy", module)
    backends._load.cache_clear()
    q = rows()
    with pytest.raises(BackendUnavailableError) as caught:
        racecore.attention(q, q, q, backend="cuda")
    backends._load.cache_clear()
    assert caught.value.reasons["cpu"] is None
    assert caught.value.reasons["cuda"] in str(caught.value)
    return caught.value.reasons["cuda"]


def cupy_with(n_devices=1, capability="90", compiles=True):
    module = ModuleType("cupy")
    module.__version__ = "14.2.0"

    def count():
        if isinstance(n_devices, Exception):
            raise n_devices
        return n_devices

    def raw_module(code):
        if not compiles:
            raise RuntimeError("libnvrtc.so.13: cannot open shared object file")
        return SimpleNamespace(get_function=lambda name: None)

    module.ndarray = fake_cupy.ndarray
    module.RawModule = raw_module
    module.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=count),
        Device=lambda: SimpleNamespace(compute_capability=capability),
    )
    return module


def test_reasons(monkeypatch):
    assert "CuPy is not installed: pip install 'racecore[cuda13]'" in unavailable(monkeypatch, None)
    error = RuntimeError(
        "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    )
    assert (
        unavailable(monkeypatch, cupy_with(error)) == f"CuPy 14.2.0 finds no usable driver: {error}"
    )
    assert unavailable(monkeypatch, cupy_with(0)) == "CuPy 14.2.0 finds no CUDA device"
    assert "compute capability 61; 70 or newer is needed" in unavailable(
        monkeypatch, cupy_with(capability="61")
    )
    reason = unavailable(monkeypatch, cupy_with(compiles=False))
    assert (
        reason
        == "CuPy 14.2.0 cannot compile kernels: libnvrtc.so.13: cannot open shared object file"
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy_with())
    assert cuda.reason_unavailable() is None


def test_tensors_on_a_gpu_without_cupy(monkeypatch):
    class Tensor:
        dtype, shape = "float32", (1, 30, 2, 6)

        def __dlpack__(self, **options):
            raise AssertionError

        def __dlpack_device__(self):
            return 2, 0

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match="query is on a GPU, where racecore computes with CuPy"):
        racecore.attention(Tensor(), Tensor(), Tensor())


# Gradients over their inputs


@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_gradients_over_their_inputs_have_the_same_bits(backend, is_causal, readout, chunk_size):
    host = [rows(2500, heads, dim=40, seed=seed) for seed, heads in enumerate((4, 2, 2, 4))]
    options = {"is_causal": is_causal, "readout": readout, "chunk_size": chunk_size}
    results = []
    for overwrite in (False, True):
        q, k, v, d_out = (put(x, backend) for x in host)
        _, saved = racecore.attention_forward(q, k, v, **options)
        grads = racecore.attention_backward(d_out, saved, overwrite_inputs=overwrite)
        results.append([fetch(x).tobytes() for x in grads[:5]])
        if overwrite:
            assert [fetch(x).tobytes() for x in (q, k, v)] == results[0][:3]
    assert results[0] == results[1]


def test_when_inputs_cannot_be_overwritten(backend):
    def refused(arrays, message, lsh=None, **options):
        _, saved = racecore.attention_forward(*arrays, lsh)
        before = fetch(arrays[0]).copy()
        with pytest.raises(ValueError, match=message):
            racecore.attention_backward(arrays[0], saved, overwrite_inputs=True, **options)
        assert (fetch(arrays[0]) == before).all()

    q, k, v = (put(rows(seed=seed), backend) for seed in range(3))
    refused((q, k, k), "key and value in memory of their own")
    refused((rows(), rows(), rows()), "needs inputs on a GPU")
    refused((q, k, v), "both given", out=racecore.Gradients())
    refused(
        (q, k, put(np.broadcast_to(rows(heads=1), (1, 30, 2, 6)), backend)),
        "value is a broadcast array",
    )
    per_head = racecore.SoftLSH.random(head_dim=6, rng=0, n_heads=2)
    refused(
        (q, put(rows(heads=1), backend), put(rows(heads=1, seed=1), backend)),
        "grouped queries",
        per_head,
    )


# Long inputs, chunk by chunk


def problem_of_files(folder, dtype=np.float32):
    paths = {}
    for seed, (name, heads) in enumerate({"query": 4, "key": 2, "value": 2, "d_out": 4}.items()):
        paths[name] = folder / f"{name}.npy"
        np.save(paths[name], rows(9000, heads, dim=8, dtype=dtype, seed=seed)[0])
    return paths


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["plain", "mask", "packed"])
def test_files_go_through_the_gpu_in_chunks(backend, is_causal, kind, tmp_path):
    paths = problem_of_files(tmp_path)
    lsh, x = (
        racecore.SoftLSH.random(head_dim=8, rng=0),
        {name: np.load(path) for name, path in paths.items()},
    )
    mask = np.random.default_rng(0).random(9000) < 0.7 if kind == "mask" else None
    bounds = np.array([0, 30, 30, 5000, 9000]) if kind == "packed" else None
    results = {}
    for name in ("cpu", backend):
        sinks = {
            sink: tmp_path / f"{name} {sink}.npy" for sink in ("out", "d_query", "d_key", "d_value")
        }
        report = racecore.outofcore.run(
            *(paths[n] for n in ("query", "key", "value")),
            sinks.pop("out"),
            lsh,
            d_out=paths["d_out"],
            d_lsh=True,
            is_causal=is_causal,
            key_mask=mask,
            cu_seqlens=bounds,
            backend=name,
            memory_limit="4MB",
            **sinks,
        )
        results[name] = [
            np.load(tmp_path / f"{name} {n}.npy") for n in ("out", "d_query", "d_key", "d_value")
        ]
        results[name] += [report.d_planes, report.d_beta]
    for found, expected in zip(results[backend], results["cpu"], strict=True):
        assert np.linalg.norm(found - expected) <= 3e-5 * np.linalg.norm(expected) + 1e-3
    device = {name: put(array, backend) for name, array in x.items()}
    options = {"is_causal": is_causal, "key_mask": mask, "cu_seqlens": bounds}
    out, saved = racecore.attention_forward(
        device["query"], device["key"], device["value"], lsh, **options
    )
    grads = racecore.attention_backward(device["d_out"], saved)
    at_once = [fetch(array) for array in (out, *grads[:5])]
    # several sequences add to the gradients of planes and beta in another order
    n_equal = 4 if kind == "packed" else 6
    for found, expected in zip(results[backend][:n_equal], at_once[:n_equal], strict=True):
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_a_run_on_a_gpu_that_was_interrupted_goes_on(backend, tmp_path):
    paths = problem_of_files(tmp_path)
    sources = [paths[n] for n in ("query", "key", "value")]

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    def run(out, **options):
        gradients = {f"d_{n}": tmp_path / f"{out} d_{n}.npy" for n in ("query", "key", "value")}
        return racecore.outofcore.run(
            *sources,
            tmp_path / f"{out}.npy",
            d_out=paths["d_out"],
            d_lsh=True,
            is_causal=True,
            memory_limit="6MB",
            **gradients,
            **options,
        )

    with pytest.raises(KeyboardInterrupt):
        run("again", backend=backend, progress=stop)
    with pytest.raises(ValueError, match="kernels and processor"):
        run("again", backend="cpu")
    resumed, whole = run("again", backend=backend), run("whole", backend=backend)
    assert resumed.resumed_tokens > 0
    assert resumed.digests == whole.digests
    assert resumed.d_planes.tobytes() == whole.d_planes.tobytes()


def test_a_run_into_arrays_of_any_layout(backend):
    q = rows()[0]
    for out in (np.zeros((30, 2, 6), np.float32), np.zeros((30, 2, 12), np.float32)[..., ::2]):
        racecore.outofcore.run(q[:, ::-1], q, q, out, backend=backend)
        np.testing.assert_allclose(out, racecore.attention(q[:, ::-1], q, q), rtol=1e-4, atol=1e-6)


def test_a_run_without_a_gpu_is_refused_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", None)
    backends._load.cache_clear()
    q = rows()[0]
    with pytest.raises(BackendUnavailableError, match="CuPy is not installed"):
        racecore.outofcore.run(q, q, q, tmp_path / "out.npy", backend="cuda")
    assert not list(tmp_path.iterdir())


def test_the_program_takes_a_backend(backend, tmp_path, capsys):
    paths = problem_of_files(tmp_path)
    words = [
        "attend",
        *(word for n in ("query", "key", "value") for word in (f"--{n}", str(paths[n]))),
    ]
    assert main([*words, "--out", str(tmp_path / "cuda.npy"), "--backend", "cuda"]) == 0
    assert main([*words, "--out", str(tmp_path / "cpu.npy")]) == 0
    np.testing.assert_allclose(
        *(np.load(tmp_path / f"{n}.npy") for n in ("cuda", "cpu")), rtol=1e-4, atol=1e-6
    )
    assert main([*words, "--out", str(tmp_path / "plan.npy"), "--backend", "cuda", "--plan"]) == 2
    assert "--plan estimates the time of the CPU only" in capsys.readouterr().err


def test_the_doctor_tries_the_gpu(backend, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "between cpu or cuda and reference" in printed
    assert "backend cuda" in printed
