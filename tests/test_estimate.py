"""plan: the bytes that a run reads and writes, without reading or writing any."""

from __future__ import annotations

import os

import numpy as np
import pytest

import racecore
from racecore import outofcore
from racecore.outofcore import Synthetic, sinks, sources

LSH = racecore.SoftLSH.random(16, 3, 2, rng=3)


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    for name, heads, dim in (("query", 4, 16), ("key", 2, 16), ("value", 2, 24), ("d_out", 4, 24)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((9000, heads, dim), dtype=np.float32))
    np.save(tmp_path / "mask.npy", np.arange(9000) % 3 > 0)
    return {path.stem: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"key_mask": True}, {"cu_seqlens": [0, 100, 5000, 5000, 9000]}]
)
def test_the_bytes_are_those_of_the_run(causal, back, more, paths, tmp_path, monkeypatch):
    moved = {"read": 0, "written": 0}

    def counting(genuine, direction, argument):
        def call(*args):
            moved[direction] += args[argument].nbytes
            return genuine(*args)

        return call

    monkeypatch.setattr(sources, "read_at", counting(sources.read_at, "read", 2))
    monkeypatch.setattr(sinks, "write_at", counting(sinks.write_at, "written", 2))
    options = {"is_causal": causal, "memory_limit": 3_700_000, **more}
    options |= {"key_mask": paths["mask"]} if more.get("key_mask") else {}
    if back:
        options |= {
            "d_out": paths["d_out"],
            "d_query": tmp_path / "dq.npy",
            "d_value": tmp_path / "dv.npy",
        }
    arrays = (paths["query"], paths["key"], paths["value"], tmp_path / "o.npy", LSH)
    plan = outofcore.plan(*arrays, calibrate=False, **options)
    assert moved == {"read": 0, "written": 0}
    totals = []
    outofcore.run(*arrays, progress=lambda done, total: totals.append(total), **options)
    assert (plan.read_bytes, plan.written_bytes) == (moved["read"], moved["written"])
    assert (
        sum(
            p.tokens * (2 if p.name == "scan back" or (back and p.name == "read out") else 1)
            for p in plan.passes
        )
        == totals[0]
    )
    assert plan.chunk_tokens % 1024 == 0
    assert plan.memory_bytes <= plan.memory_limit == 3_700_000
    written = [tmp_path / name for name in (("o.npy", "dq.npy", "dv.npy") if back else ("o.npy",))]
    assert plan.output_bytes == sum(path.stat().st_size - 128 for path in written)
    assert plan.seconds is None
    assert f"{plan.read_bytes / 1e6:,.1f} MB to read" in str(plan)


def test_states_take_the_planned_bytes(paths, tmp_path):
    arrays = (paths["query"], paths["key"], paths["value"], tmp_path / "o.npy", LSH)
    options = {"d_out": paths["d_out"], "is_causal": True, "memory_limit": 3_700_000}
    sizes = []

    def look(done, total):
        sizes.append(os.path.getsize(tmp_path / "o.npy.states"))

    outofcore.run(*arrays, progress=look, **options)
    planned = outofcore.plan(*arrays, calibrate=False, **options).state_bytes
    assert 0 < sizes[-1] <= planned
    x = Synthetic((9000, 4, 16))
    assert outofcore.plan(x, x, x, None, LSH, calibrate=False).state_bytes == 0


def test_the_time_is_measured_and_no_file_is_left(paths, tmp_path):
    before = sorted(os.listdir(tmp_path))
    plan = outofcore.plan(
        paths["query"], paths["key"], paths["value"], tmp_path / "o.npy", LSH, d_out=paths["d_out"]
    )
    assert sorted(os.listdir(tmp_path)) == before
    assert plan.seconds == max(plan.arithmetic_seconds, plan.disk_seconds)
    assert 0 < plan.arithmetic_seconds < 60
    assert 0 < plan.disk_seconds < 60
    assert "MB/s" in str(plan)
    x = Synthetic((9000, 4, 16))
    in_memory = outofcore.plan(x, x, x, None, LSH, is_causal=True)
    assert in_memory.disk_seconds == 0
    assert "MB/s" not in str(in_memory)


def test_plan_refuses_the_same_arguments_as_run(paths, tmp_path):
    with pytest.raises(ValueError, match="the smallest that works here is"):
        outofcore.plan(
            paths["query"], paths["key"], paths["value"], tmp_path / "o.npy", LSH, memory_limit=1000
        )
    with pytest.raises(ValueError, match="out is the same file as value"):
        outofcore.plan(paths["query"], paths["key"], paths["value"], paths["value"], LSH)
    with pytest.raises(FileNotFoundError, match="no folder"):
        outofcore.plan(
            paths["query"], paths["key"], paths["value"], tmp_path / "none" / "o.npy", LSH
        )
