"""asv_benchmarks/compare.py: the peers compute what they are called, sweeps end in time, and the
figures become a page.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CEILINGS = {"bytes_per_second": 64e9, "flops_per_second": 457e9, "cores": 2}
MODULES = ("cases", "ceilings", "compare", "machine", "peers", "report", "speed_plot", "workers")


@pytest.fixture(autouse=True)
def script_folder(monkeypatch):
    """Import the script's modules as the script itself does; forget them afterwards, since their
    names are common.
    """
    monkeypatch.syspath_prepend(str(ROOT / "asv_benchmarks"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def record(method: str, causal: bool, tokens: int, seconds: float, size: int = 0) -> dict[str, Any]:
    return {
        "method": method,
        "causal": causal,
        "tables": size,
        "planes": size,
        "tokens": tokens,
        "seconds": seconds,
        "median_seconds": seconds,
        "forward_seconds": seconds / 3,
        "backward_seconds": seconds / 2,
        "peak_bytes": 2048 * tokens,
        "calls": 3,
    }


def figures() -> dict[str, Any]:
    """Return a run of two lengths, in which softmax got to one of them and the causal formula ran
    out of memory.
    """
    runs = []
    for tokens in (1024, 4096):
        runs += [record("racecore", causal, tokens, 1e-6 * tokens, 2) for causal in (False, True)]
        runs += [record("formula", False, tokens, 7e-6 * tokens, 2)]
    runs += [record("formula", True, 1024, 0.3, 2), record("softmax", False, 1024, 0.04)]
    stopped = [
        record("softmax", False, 4096, 0.0) | {"reason": "time: some 44 s a call"},
        record("formula", True, 4096, 0.0, 2) | {"reason": "memory: some 44 GB"},
    ]
    setting = {
        "tokens": 4096,
        "tables": 2,
        "planes": 2,
        "heads": 4,
        "forward_seconds": 1.0,
        "backward_seconds": 2.0,
    }
    return {
        "command": "python asv_benchmarks/compare.py --quick",
        "machine": {
            "processor": "Some CPU",
            "wide_vectors": "AVX2",
            "processors": 2,
            "memory_bytes": 8e9,
            "date": "2026-01-01",
            "versions": {"python": "3.11.7"},
        },
        "setting": {"batch": 1, "heads": 4, "dim": 128, "dtype": "float32"},
        "lengths": [1024, 4096],
        "runs": runs,
        "stopped": stopped,
        "ceilings": {"all": CEILINGS, "one": {**CEILINGS, "cores": 1}},
        "rounds": [
            {
                "ceilings": {name: slowness * rate for name, rate in CEILINGS.items()},
                "runs": [
                    setting | {"causal": causal, "seconds": 4096e-6} for causal in (False, True)
                ],
            }
            for slowness in (1.0, 0.9, 0.6)
        ],
        "experiments": {
            "threads, causal": [
                setting | {"threads": 1, "seconds": 3.0},
                setting
                | {"threads": 2, "seconds": 1.5, "forward_seconds": 0.5, "backward_seconds": 1.0},
            ],
        },
    }


def test_torch_formula_agrees_with_racecore_and_every_other_peer_is_what_it_is_called(monkeypatch):
    pytest.importorskip(
        "torch", reason="torch is not installed; only the comparison's peers need it"
    )
    import peers

    errors = peers.verify(tokens=256, dim=32)
    assert {name for name in errors if name.startswith("RACE")} == {
        "RACE formula, bidirectional",
        "RACE formula, causal",
    }
    assert max(error for name, error in errors.items() if name.startswith("RACE")) < 1e-4
    monkeypatch.setattr(peers, "linear_attention", peers.softmax_attention)
    with pytest.raises(RuntimeError, match="linear, bidirectional is off by"):
        peers.verify(tokens=256, dim=32)


def test_table_and_summary_say_what_was_measured():
    import report

    lines = report.table(figures()).splitlines()
    assert "|  | 1,024 | 4,096 |" in lines
    assert "| racecore (2, 2) | 1.02 ms | 4.10 ms |" in lines
    assert "| racecore (2, 2) | 2.10 MB | 8.39 MB |" in lines
    assert "| softmax (SDPA), torch | 40.0 ms | too slow |" in lines
    assert "| RACE formula in torch (2, 2) | 300 ms | memory |" in lines
    # 107.9 and 128.3 ns at the ceilings, of which the second round had nine tenths and the third
    # six
    assert "| (2, 2) | 250 ns | 48 % (43 to 72) | 250 ns | 57 % (51 to 86) |" in lines
    assert (
        "- times as fast as RACE formula in torch, bidirectional, 4,096 tokens: 7 at (2, 2)"
        in lines
    )
    assert "- times as fast as RACE formula in torch, causal, 1,024 tokens: 293 at (2, 2)" in lines
    said = "\n".join(report.summary(figures()))
    assert (
        "2 threads beside 1: forward 2.00 x as fast, backward 2.00 x, causal, 4,096 tokens, (2, 2)"
        in said
    )
    assert "ceilings of 1 core: 64.0 GB/s, 457 GFLOP/s" in said
    assert "ceilings of the rounds: 58 GB/s (38 to 64), 411 GFLOP/s (274 to 457)" in said
    assert (
        "racecore (2, 2), causal: 250 ns per token and head, 57 % (51 to 86) of the roofline"
        in said
    )


def test_page_and_picture_are_made_again_from_the_raw_figures(tmp_path, capsys):
    import compare

    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(figures()))
    compare.main(["--from-json", str(raw), "--output", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "images" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "racecore (2, 2)" in (tmp_path / "docs" / "performance_table.md").read_text()
    assert "of the roofline" in capsys.readouterr().out


def test_labels_of_the_picture_keep_apart():
    from speed_plot import spread

    heights = spread([(1024.0, 0.5), (1024.0, 0.5), (4096.0, 0.51), (2.0**20, 0.5)], gap=0.1)
    assert heights[3] == 0.5  # far to the right of the others
    low, middle, high = sorted(heights[:3])
    assert middle - low > 0.099
    assert high - middle > 0.099


def test_a_sweep_ends_before_a_call_gets_too_slow_or_too_large(monkeypatch, capsys):
    import compare
    from cases import Case

    def measured(job, timeout):
        scale = job["tokens"] / 1024
        if job["case"]["method"] == "softmax":
            return {"seconds": scale**2, "peak_bytes": 0, "calls": 2}
        return {"seconds": 1e-3 * scale, "peak_bytes": int(2e8 * scale), "calls": 2}

    monkeypatch.setattr(compare.workers, "run", measured)
    monkeypatch.setattr(compare.machine, "free_memory", lambda: 2 * 10**9)
    sweep = compare.Sweep(
        [Case("softmax", False), Case("formula", True, 2, 2)], patience=10.0, seconds=1.0
    )
    sweep.prepare(1024)
    for tokens in (1024, 2048, 4096, 8192, 16384):
        sweep.at(tokens)
    assert [run["tokens"] for run in sweep.runs if run["method"] == "softmax"] == [1024, 2048]
    assert [run["tokens"] for run in sweep.runs if run["method"] == "formula"] == [
        1024,
        2048,
        4096,
        8192,
    ]
    assert [stop["reason"].partition(":")[0] for stop in sweep.stopped] == ["time", "memory"]
    assert "stops before 4,096 tokens" in capsys.readouterr().out


def test_a_failing_worker_ends_its_sweep_and_is_named(monkeypatch, capsys):
    import compare
    from cases import Case

    def failing(job, timeout):
        raise compare.workers.WorkerError("exit code 1: something")

    monkeypatch.setattr(compare.workers, "run", failing)
    sweep = compare.Sweep([Case("linear", True)], patience=10.0, seconds=1.0)
    sweep.at(1024)
    sweep.at(2048)
    assert [(stop["tokens"], stop["reason"]) for stop in sweep.stopped] == [
        (1024, "exit code 1: something")
    ]
    assert "something" in capsys.readouterr().out


def test_command_line_reads_powers_and_refuses_odd_lengths(capsys):
    import compare

    assert compare.parse(["--lengths", "2^12", "1024"]).lengths == [1024, 4096]
    with pytest.raises(SystemExit):
        compare.parse(["--lengths", "1000"])
    assert "multiple of 128 tokens, got 1000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_measurement_in_a_process_of_its_own():
    import workers
    from cases import Case, Setting

    case = {
        "kind": "case",
        "case": Case("racecore", True, 2, 2).as_dict(),
        "tokens": 4096,
        "seconds": 0.0,
    }
    done = workers.run(case | {"memory": 10**9}, timeout=2000)
    assert done["calls"] == 2
    assert 0 < done["forward_seconds"] < done["seconds"] <= done["median_seconds"]
    assert (
        4 * 4096 * 4 * 128 * 4 <= 1.1 * done["peak_bytes"] < 10**9
    )  # the output and three gradients are in it
    settings = [Setting(1024, False, fresh_outputs=fresh).as_dict() for fresh in (False, True)]
    job = {"kind": "settings", "settings": settings, "seconds": 0.0, "memory": 10**9}
    done = workers.run(job, timeout=2000)
    assert [timing["calls"] for timing in done["timings"]] == [2, 2]
    with pytest.raises(workers.WorkerError, match="out of memory"):
        workers.run(case | {"memory": 10**6}, timeout=2000)
