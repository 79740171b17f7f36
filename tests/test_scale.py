"""racecore scale: small runs, and wrong rows."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import racecore
from racecore import outofcore
from racecore.cli import main
from racecore.commands import scale_result, scale_rows
from racecore.outofcore import Synthetic

SHAPE = ("scale", "--heads", "2", "--head-dim", "16", "--memory-limit", "20MB")
SMALL = (*SHAPE, "--tokens", "5000")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--causal",),
        ("--dtype", "bfloat16"),
        ("--dtype", "float16", "--causal"),
        ("--dtype", "float64"),
        ("--forward-only", "--readout", "bucket_mean"),
    ],
)
def test_rows_are_correct_and_the_report_is_complete(words, capsys):
    assert main([*SMALL, *words, "--json", "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["threads"]) == (5000, 1)
    assert (report["heads"], report["head_dim"]) == (2, 16)
    assert report["causal"] == ("--causal" in words)
    assert sorted(report["errors"]) == sorted(report["digests"])
    assert len(report["errors"]) == (1 if "--forward-only" in words else 4)
    assert all(
        0 <= error <= scale_result.TOLERANCES[report["dtype"]]
        for error in report["errors"].values()
    )
    assert report["seconds"] > 0
    assert report["tokens_per_second"] == pytest.approx(5000 / report["seconds"])
    assert report["peak_anonymous_bytes"] > 1e7
    assert report["warm_up_seconds"] > 0
    assert report["checked_rows"] == scale_rows.N_ROWS


def test_digests_are_those_of_the_same_run_in_python(capsys):
    assert main([*SMALL, "--json", "--no-check", "--seed", "3", "--tables", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    lsh = racecore.SoftLSH.random(16, 3, 2, rng=3)
    x = [Synthetic((5000, 2, 16), seed=seed) for seed in (12, 13, 14, 15)]
    assert report["digests"] == outofcore.run(*x[:3], None, lsh, d_out=x[3]).digests
    assert report["check_seconds"] is None
    assert report["errors"] == {}


def test_wrong_rows_are_seen(monkeypatch, capsys):
    genuine = scale_rows.SampledRows.__setitem__

    def spoiled(self, tokens, rows):
        genuine(self, tokens, rows * (1 if self.dtype == np.float64 else 1.001))

    monkeypatch.setattr(scale_rows.SampledRows, "__setitem__", spoiled)
    assert main([*SMALL, "--causal"]) == 1
    error = capsys.readouterr().err
    assert (
        "ROWS ARE WRONG, please report this: out at 5,000 tokens has a relative error of 1.0e-03, "
        "the tolerance is 0.0001" in error
    )


def test_rows_that_were_never_written_are_wrong():
    positions, exact = np.array([0, 5]), np.ones((2, 3))
    never = scale_rows.SampledRows((10, 1, 3), np.dtype(np.float32), positions).rows[:, 0]
    assert scale_rows.largest_error(never, exact, positions, False) == np.inf
    assert scale_rows.largest_error(exact, exact, positions, True) == 0


def test_both_sides_of_cuts_between_chunks_are_checked(monkeypatch, capsys):
    checked, begins = [], set()
    genuine, take = scale_rows.sample_tokens, scale_rows.SampledRows.__setitem__

    def positions(*arguments):
        checked.extend(genuine(*arguments).tolist())
        return np.array(checked)

    def note(self, tokens, rows):
        if self.dtype == np.float32:  # not the check
            begins.add(tokens.start)
        take(self, tokens, rows)

    monkeypatch.setattr(scale_rows, "sample_tokens", positions)
    monkeypatch.setattr(scale_rows.SampledRows, "__setitem__", note)
    assert main([*SMALL, "--memory-limit", "2MB"]) == 0
    cuts = sorted(begins - {0})
    assert len(cuts) > 2
    assert {0, 4999, cuts[0] - 1, cuts[0], cuts[-1] - 1, cuts[-1]} <= set(checked)


@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, 1024), (1024, 1024), (1025, 1024), (75_000_000, 16_384)]
)
def test_places_are_rows(tokens, chunk):
    positions = scale_rows.sample_tokens(tokens, chunk, 0)
    assert (positions[0], positions[-1]) == (0, tokens - 1)
    assert (np.diff(positions) > 0).all()
    assert len(positions) <= scale_rows.N_ROWS
    assert (tokens <= chunk) or {chunk - 1, chunk} <= set(positions.tolist())


def test_in_words(capsys):
    assert main(["scale", "--tokens", "3000", "--head-dim", "128", "--heads", "4"]) == 0
    printed = capsys.readouterr().out
    assert (
        "3,000 tokens, bidirectional, forward + backward, 4 heads of 128, float32, (L, P) = (2, 2)"
        in printed
    )
    assert "largest relative error of a row: out" in printed
    assert "arXiv 2510.04008" in printed


def test_a_sweep_is_a_table_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ("--sweep", "1000", "2000", "--picture", str(tmp_path / "scale.png"))
    assert main([*SHAPE, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["tokens", "1,000", "2,000"]
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["scale.what", "scale", "missing/scale.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_first(tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        main([*SHAPE, "--sweep", "1000", "--picture", str(tmp_path / name)])
    assert "expected a .png, .svg or .pdf file in an existing folder" in capsys.readouterr().err


def test_a_sweep_and_one_length_do_not_go_together(capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, "--sweep", "1000"])
    assert "--sweep: not allowed with argument --tokens" in capsys.readouterr().err


def test_a_sweep_without_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert (
        main(
            [
                *SHAPE,
                "--no-check",
                "--sweep",
                "1000",
                "--json",
                "--picture",
                str(tmp_path / "scale.png"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["tokens"] == 1000
    assert "no picture: Matplotlib is not installed (pip install matplotlib)" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_program_starts_without_docstrings():
    command = [sys.executable, "-OO", "-m", "racecore", "scale", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Rows of one head" in done.stdout


def test_bad_usage(capsys):
    assert main([*SMALL, "--memory-limit", "1kB"]) == 2
    assert "the smallest that works here is" in capsys.readouterr().err
    assert main([*SMALL, "--beta", "nan"]) == 2
    assert "beta must be finite" in capsys.readouterr().err


def test_one_head_alone_is_that_head_of_the_whole():
    x = Synthetic((5000, 3, 20), np.float16, seed=4)
    whole = x[:].astype(np.float64)
    for head in range(3):
        alone = np.empty((5000, 1, 20))
        x.head(head).fill(alone, 0)
        np.testing.assert_array_equal(alone, whole[:, head : head + 1])
    part = np.empty((7, 1, 20))
    x.head(2).fill(part, 40 * 20)
    np.testing.assert_array_equal(part[:, 0], whole[40:47, 2])
    with pytest.raises(ValueError, match="head must be one of"):
        x.head(3)


def test_one_head_alone_beyond_32_bits():
    x = Synthetic((1 << 28, 3, 20), seed=4)
    token = (1 << 32) // 60  # the row in which the counter is full
    wanted = x[token - 700 : token + 700].astype(np.float64)
    for head in range(3):
        alone = np.empty((1400, 1, 20))
        x.head(head).fill(alone, (token - 700) * 20)
        np.testing.assert_array_equal(alone[:, 0], wanted[:, head])
