"""asv_benchmarks/gpu.py without a GPU: its checks on the CPU, its arithmetic, its table."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest
from cuda_on_cpu import fake_cupy

import racecore
from racecore.ops.cuda import call as cuda_call


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "asv_benchmarks"))
    import gpu

    yield gpu
    for name in ("gpu", "gpu_methods", "gpu_report", "gpu_socket"):
        sys.modules.pop(name, None)


@pytest.mark.toolchain
@pytest.mark.parametrize("is_causal", [False, True])
def test_its_checks_compare_the_gpu_with_the_host(gpu, is_causal, monkeypatch):
    lsh = racecore.SoftLSH.random(head_dim=48, n_tables=3, n_planes=3, rng=0)
    with fake_cupy.install() as cupy:
        error = gpu._difference(300, np.float32, lsh, is_causal=is_causal)
        assert 0 < error < 1e-5
        # with tensor cores
        assert 0 < gpu._difference(100, gpu.stored_dtype(), lsh, is_causal=is_causal) < 5e-3
        monkeypatch.setattr(
            cupy,
            "asarray",
            lambda x, real=cupy.asarray: real(x * np.float32(1.01) if x.ndim == 4 else x),
        )
        assert gpu._difference(300, np.float32, lsh, is_causal=is_causal) > 1e-4


def test_bytes_are_those_of_the_passes(gpu):
    stash = (2 * 8 + 4) * 4  # S = 8, L P = 4: rho, d_mass and u of a token and head, float32
    rows = 2 + 4 + 5 + 5
    assert gpu.units_moved(2, 2, True) * 256 == rows * 256 + 2 * stash
    assert gpu.units_moved(2, 2, False) == 11
    (line,) = gpu.expectations(4.8e12)
    assert line.startswith("4.80 TB/s: 4.9 ms if every array moved once, 7.4 ms")


def test_the_table_has_the_length_from_which_softmax_is_slower(gpu):
    rows = [
        gpu.Row("racecore S=8", True, 1 << p, 0.1, 0.3 * 2 ** (p - 12), 0.5, 0.75)
        for p in (12, 13, 14)
    ]
    rows += [gpu.Row("SDPA, torch", True, 1 << p, 0.05, 0.1 * 4 ** (p - 12)) for p in (12, 13, 14)]
    printed = gpu.table(rows)
    assert (
        "racecore S=8, causal: faster than SDPA forward + backward from 16,384 tokens on" in printed
    )
    assert "50%     75%" in printed
    assert "with tensor cores" not in printed


def test_the_table_has_the_gain_of_tensor_cores(gpu):
    assert [name for name, _ in gpu.methods()[:5]] == [
        "racecore S=8",
        "racecore S=24",
        "racecore S=64",
        "racecore plain S=24",
        "racecore plain S=64",
    ]
    rows = [gpu.Row("racecore S=64", True, 1 << p, 0.1 * p, 0.3, 0.5, 0.75) for p in (12, 13, 14)]
    rows += [
        gpu.Row("racecore plain S=64", True, 1 << p, 0.2 * p, 0.9, 0.5, 0.75) for p in (12, 13)
    ]
    import gpu_report

    (line,) = gpu_report.gains(rows)
    assert line == (
        "racecore S=64, causal, 8,192 tokens, with tensor cores and without: "
        "forward 1.30 and 2.60 ms, both 0.30 and 0.90 ms"
    )


def test_tensor_cores_can_be_switched_off(gpu):
    before = cuda_call.TENSOR_CORES_FROM
    with gpu.tensor_cores(False):
        assert before < 64 < cuda_call.TENSOR_CORES_FROM
    with gpu.tensor_cores(True):
        assert before == cuda_call.TENSOR_CORES_FROM


def test_without_a_gpu_it_says_why(gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no GPU: CuPy is not installed"):
        gpu.main()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run"])
    gpu.main()
    printed = capsys.readouterr().out
    assert "expected 3.35 TB/s" in printed
    assert (
        "expected of a decoded token 3.35 TB/s: dense 1.28 ms, head 0.66 ms, group 0.28 ms"
        in printed
    )


@pytest.mark.toolchain
def test_a_decoded_token_is_checked_and_timed(gpu, capsys):
    """The whole section, on the CPU; the times are made up."""
    socket = gpu.gpu_socket
    rng = np.random.default_rng(0)
    with fake_cupy.install() as cupy:
        assert 0 < socket.check() < 1e-5
        calls = []

        def seconds(call):
            calls.append(call())
            return 1e-3 / len(calls)

        def rows(*shape):
            return cupy.asarray(rng.standard_normal(shape).astype(np.float16))

        steps = list(socket.steps(rows, seconds, float("inf"), contexts=(700,)))
        assert not list(socket.steps(rows, seconds, 0.0))  # no time left
    assert [(step.way, step.context) for step in steps] == [
        ("dense", 700),
        ("head", 700),
        ("group", 700),
    ]
    assert all(out.shape == (1, 1, 32, 128) for out in calls)
    assert [step.n_bytes for step in steps] == [
        700 * 8 * 512,
        700 * (8 * 62 + 24 * 32) + 291 * 32 * 528,
        700 * (8 * 62 + 24 * 8) + 291 * 8 * 528,
    ]
    printed = socket.table(steps, 1e12)
    assert "racecore, head                               700    0.500     2.00x" in printed
    assert capsys.readouterr().out.startswith("check float32  SOCKET")


@pytest.mark.toolchain
def test_a_wrong_token_is_noticed(gpu, monkeypatch):
    with fake_cupy.install() as cupy:
        monkeypatch.setattr(
            cupy,
            "asarray",
            lambda x, real=cupy.asarray: real(x * np.float32(1.01) if x.ndim == 4 else x),
        )
        with pytest.raises(SystemExit, match="WRONG"):
            gpu.gpu_socket.check()
