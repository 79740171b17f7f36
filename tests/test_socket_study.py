"""The study of sparse decoding compares with the right thing, and holds on a small scale."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import racecore

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import socket_methods

    return socket_methods


def small_cache(methods, n_tokens=300, dim=16):
    """Return a cache [2, T, 2, D] with 6 query heads."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 2, n_tokens, 2, dim), dtype=np.float32)
    return methods.Cache(rng.standard_normal((2, 1, 6, dim), dtype=np.float32), key, value)


@pytest.mark.parametrize(("sink", "window"), [(0, 0), (3, 0), (0, 5), (20, 30)])
@pytest.mark.parametrize("budget", [0, 1, 40, 300])
def test_the_study_chooses_and_attends_as_the_library_does(methods, budget, sink, window):
    cache = small_cache(methods)
    index = racecore.SocketIndex(racecore.SoftLSH.random(16, 5, 8, rng=4), scorer="soft")
    index.append(cache.key, cache.value)
    ends = {"sink": sink, "window": window}
    scores = methods.Socket(n_tables=5).scores(cache, seed=4)
    takes = methods.chosen(scores, budget, sink, window)
    selected = index.select(cache.query, budget=budget, **ends)
    for b in range(2):
        for h in range(6):
            assert (
                np.flatnonzero(takes[b, h]).tolist() == selected[b, h][selected[b, h] >= 0].tolist()
            )
    found = methods.quality(cache, methods.true_weights(cache), takes)
    sparse, dense = (
        racecore.sparse_attention(*cache, i, budget=budget, **ends)[:, 0] for i in (index, None)
    )
    error = np.linalg.norm(sparse - dense, axis=2) / np.linalg.norm(dense, axis=2)
    np.testing.assert_allclose(found.error, error, rtol=1e-4, atol=1e-6)


def test_of_equal_scores_the_earlier_are_chosen(methods):
    scores = np.array([[[1, 2, 1, 2, 1, 0]]], np.float32)
    assert np.flatnonzero(methods.chosen(scores, 4, 0, 0)).tolist() == [
        0,
        1,
        2,
        3,
        5,
    ]  # and the last one
    assert np.flatnonzero(methods.chosen(scores, 3, 1, 0)).tolist() == [0, 1, 3]
    assert np.flatnonzero(methods.chosen(scores, 3, 1, 0, page=2)).tolist() == [
        0,
        1,
        3,
    ]  # 3 tokens are one page of 2


def test_bounds_of_pages_are_bounds(methods):
    cache = small_cache(methods)
    query = cache.query[:, 0].reshape(2, 2, 3, 16)
    products = np.einsum("bgid,btgd->bgit", query, cache.key).reshape(2, 6, -1)
    bound = methods.Quest(16).scores(cache, 0)
    assert (bound >= products - 1e-5).all()
    assert (bound[:, :, 16:32] == bound[:, :, 16:17]).all()
    np.testing.assert_allclose(methods.Quest(1).scores(cache, 0), products, rtol=1e-4, atol=1e-4)
    whole = methods.chosen(bound, 50, 0, 1, page=16)  # 3 pages, and the last token
    assert (whole[:, :, :288].reshape(2, 6, -1, 16).sum(axis=3) % 16 == 0).all()
    assert set(np.unique(whole.sum(axis=2))) <= {48, 49, 48 - 16 + 12}


@pytest.mark.parametrize("n_planes", [1, 8, 9, 10, 12, 16])
def test_bytes_are_those_of_the_index(methods, n_planes):
    key = np.ones((1, 128, 1, 8), np.float32)
    index = racecore.SocketIndex(racecore.SoftLSH.random(8, 13, n_planes, rng=0))
    index.append(key, key)
    assert methods.Socket(n_tables=13, n_planes=n_planes).bytes_per_token(8) == index.nbytes / 128


def test_a_needle_has_the_likeness_that_is_asked_for(methods):
    import socket_data

    found = socket_data.haystack(3000, 6, (0.5, 0.9), seed=1)
    query, key = found.cache.query[0, 0], found.cache.key[0, found.needles, 0]
    cosine = (query * key).sum(axis=1) / np.linalg.norm(query, axis=1) / np.linalg.norm(key, axis=1)
    np.testing.assert_allclose(cosine, [0.5] * 3 + [0.9] * 3, atol=1e-5)


@pytest.mark.process
def test_the_study_in_small(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(EXAMPLES / "socket_study.py"),
        "--quick",
        "--out",
        "found",
    ]
    done = subprocess.run(
        [*command, "--only", "clusters", "haystack"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found" / "study.json").read_text())
    check_rows(found["rows"], parts=5)
    check_needles(found["needles"])
    assert done.stdout.startswith("Printed by `python examples/socket_study.py`")
    assert (tmp_path / "found" / "tables.md").read_text() in done.stdout
    for name in ("budgets", "sizes", "needles"):
        assert (tmp_path / "found" / f"{name}.png").stat().st_size > 5_000


def check_rows(rows, parts):
    by_budget = [row for row in rows if row["table"] == "methods"]
    mass = {(row["method"], row["part"], row["kept"]): row["mass"][0] for row in by_budget}
    assert len({part for _, part, _ in mass}) == parts
    for (method, part, kept), share in mass.items():
        assert share <= mass["oracle", part, kept] + 1e-6, method
        if kept == 1:
            assert share == pytest.approx(1, abs=1e-5)
        elif method in ("signed_jl", "hamming", "soft"):
            for worse in ("Quest, pages of 16", "random"):
                assert share > mass[worse, part, kept]
        elif method == "random":
            assert share == pytest.approx(1 / kept, abs=0.1)
    assert all(row["error"][0] < 1e-4 for row in by_budget if row["kept"] == 1)


def check_needles(needles):
    ranks = {found["method"]: np.array(found["ranks"]) for found in needles}
    assert (ranks["oracle"] == 1).all()
    for scorer in ("signed_jl", "hamming", "soft"):
        assert ranks[scorer].max() <= 20  # of 4,096
    assert np.median(ranks["random"]) > 400
