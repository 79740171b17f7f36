"""SOCKET against oracle_socket.py: scores, selected sets, exact attention, and the index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import oracle_socket as oracle
import pytest
from devices import BACKENDS, fetch, put
from layouts import LAYOUTS, arrange

import racecore
from racecore.errors import CorruptFileError
from racecore.ops.socket import cpu, layout
from racecore.runtime import cuda

B, T, G, H, D, V = 2, 150, 2, 4, 20, 12
BF16 = ml_dtypes.bfloat16


def make(
    seed: int = 0, t: int = T, dtype: Any = np.float32, h: int = H, d: int = D, v: int = V
) -> list[np.ndarray]:
    """Return a query, keys, and values whose norms differ much."""
    rng = np.random.default_rng(seed)
    value = rng.standard_normal((B, t, G, v)) * rng.gamma(1, 1, (B, t, G, 1))
    arrays = rng.standard_normal((B, 1, h, d)), rng.standard_normal((B, t, G, d)), value
    return [x.astype(dtype) for x in arrays]


def make_lsh(n_tables: int = 5, n_planes: int = 8, d: int = D) -> racecore.SoftLSH:
    return racecore.SoftLSH.random(d, n_tables, n_planes, rng=1)


OF_THE_PAPER: dict[str, Any] = dict(scorer="soft", weight_by_value_norm=True)


def make_index(
    key: np.ndarray, value: np.ndarray, lsh: Any = None, **options: Any
) -> racecore.SocketIndex:
    backend, lengths = options.pop("backend", None), options.pop("lengths", None)
    index = racecore.SocketIndex(make_lsh() if lsh is None else lsh, **OF_THE_PAPER | options)
    index.append(put(key, backend), put(value, backend), lengths=lengths, backend=backend)
    return index


def scores_of(
    index: racecore.SocketIndex, query: np.ndarray, backend: str | None = None
) -> np.ndarray:
    return fetch(index.scores(put(query, backend), backend=backend))


def select(
    index: racecore.SocketIndex, query: np.ndarray, *, backend: str | None = None, **options: Any
) -> np.ndarray:
    return fetch(index.select(put(query, backend), backend=backend, **options))


def attend(
    query: Any, key: Any, value: Any, index: Any, *, backend: str | None = None, **options: Any
) -> np.ndarray:
    arrays = (put(x, backend) for x in (query, key, value))
    return fetch(racecore.sparse_attention(*arrays, index, backend=backend, **options))


def rounded_norms(key: np.ndarray, value: np.ndarray, scorer: str, weighted: bool) -> np.ndarray:
    """Return the factors of scores, rounded to 16 bits, over their exact values: [B, G, T]."""
    norm = np.ones(key.shape[:3])
    if weighted:
        norm = norm * np.linalg.norm(value.astype(np.float64), axis=-1)
    if scorer == "signed_jl":
        norm = norm * np.linalg.norm(key.astype(np.float64), axis=-1)
    mantissa, exponent = np.frexp(norm)
    return (np.ldexp(np.round(mantissa * 2048) / 2048, exponent) / norm).swapaxes(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scorer", ["soft", "hamming", "signed_jl"])
@pytest.mark.parametrize(
    ("n_planes", "dtype", "weighted"),
    [
        (1, np.float32, True),
        (4, np.float16, True),
        (6, np.float32, False),
        (8, np.float32, True),
        (8, BF16, False),
        (9, np.float32, True),
        (10, BF16, True),
        (10, np.float64, True),
        (12, np.float32, True),
        (13, np.float32, False),
        (16, np.float32, True),
    ],
)
def test_scores_equal_the_definition(scorer, n_planes, dtype, weighted, backend):
    query, key, value = make(n_planes, 70, dtype, h=10)  # groups of 5: four heads at once, and one
    lsh = make_lsh(3 if n_planes == 16 else 5, n_planes)
    index = make_index(
        key, value, lsh, scorer=scorer, tau=0.3, weight_by_value_norm=weighted, backend=backend
    )
    found = scores_of(index, query, backend)
    expected = oracle.scores(
        query, key, value, lsh.planes, scorer=scorer, tau=0.3, weight_by_value_norm=weighted
    ) * np.repeat(rounded_norms(key, value, scorer, weighted), 5, axis=1)
    assert found.dtype == (np.float64 if dtype is np.float64 else np.float32)
    tolerance = 1e-12 if dtype is np.float64 else 3e-6
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


def test_norms_of_sixteen_bits():
    """Six bits of exponent and ten of fraction: errors of 2^-11 where float16 overflows, no NaN."""
    norms = np.exp2(np.random.default_rng(0).uniform(-31.9, 31.9, 5000))
    back = layout.from_norm16(layout.to_norm16(norms))
    assert np.abs(back / norms - 1).max() <= 2.0**-11
    special = layout.from_norm16(
        layout.to_norm16(np.array([0.0, 1e-30, 1.0, 1e30, np.inf, np.nan]))
    )
    largest = 2.0**31 * (2 - 2.0**-10)
    np.testing.assert_array_equal(special, np.float32([0, 0, 1, largest, largest, largest]))
    np.testing.assert_array_equal(
        layout.to_norm16(np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11])) & 1023, [0, 2]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scorer", ["soft", "hamming"])  # hamming, unweighted: ties everywhere
@pytest.mark.parametrize(
    ("budget", "sink", "window"),
    [(20, 4, 7), (0.1, 0, 0), (0, 0, 0), (0, 3, 0), (1, 200, 0), (149, 0, 1)],
)
def test_selected_sets(budget, sink, window, scorer, backend):
    query, key, value = make()
    index = make_index(
        key, value, scorer=scorer, weight_by_value_norm=scorer == "soft", backend=backend
    )
    found = select(index, query, budget=budget, sink=sink, window=window, backend=backend)
    scores = scores_of(index, query, backend)
    assert found.dtype == np.int64
    wanted = 15 if isinstance(budget, float) else budget
    for b in range(B):
        for h in range(H):
            row = found[b, h]
            tokens = row[row >= 0]
            assert (row[len(tokens) :] == -1).all()
            assert tokens.tolist() == oracle.selected_set(scores[b, h], wanted, sink, window)
    assert found.shape[2] == (found >= 0).sum(axis=2).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_group_select_together(backend):
    query, key, value = make()
    index = make_index(key, value, backend=backend)
    options = dict(budget=20, sink=2, window=3, group_selection="group", backend=backend)
    found = select(index, query, **options)
    scores = scores_of(index, query, backend)
    summed = scores.reshape(B, G, H // G, T)
    summed = summed[:, :, 0] + summed[:, :, 1]
    for b in range(B):
        for g in range(G):
            assert found[b, g][found[b, g] >= 0].tolist() == oracle.selected_set(
                summed[b, g], 20, 2, 3
            )
    out = attend(query, key, value, index, **options)
    expected = oracle.attention(
        query, key, value, [[row[row >= 0] for row in found[b].repeat(H // G, 0)] for b in range(B)]
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def select_by_scores(
    scores: np.ndarray, lengths: np.ndarray, budget: int, backend: str
) -> np.ndarray:
    """Return what a backend selects, sink 2 and window 3, by scores [rows, tokens].

    A row is a sequence of one head.
    """
    budgets, shape = np.full(len(scores), budget), (len(scores), min(scores.shape[1], budget + 5))
    if backend == "cuda":
        from racecore.ops.cuda.call import empty
        from racecore.ops.socket.select.cuda import _write_top_k

        selected = empty(shape, np.int64)
        _write_top_k(*(put(x, backend) for x in (scores, lengths, budgets)), (2, 3), 0, 1, selected)
        return fetch(selected)
    from racecore.ops.socket.select import top_k

    selected, counts = np.full(shape, -7), np.zeros(len(scores), np.int64)
    top_k.select_top_k(
        scores.view(f"i{scores.itemsize}"),
        lengths,
        budgets,
        (2, 3),
        selected,
        counts,
        0,
        len(scores),
    )
    assert (counts == (selected >= 0).sum(axis=1)).all()
    return selected


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", ["random", "equal", "few values", "wide", "negative", "special"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_k_of_many_scores_is_exact(kind, dtype, backend):
    """On the CPU a sample of a long row gives a threshold: untypical samples must do no harm."""
    rng = np.random.default_rng(3)
    n, rows = 20_032, 3
    scores = {
        "random": rng.standard_normal((rows, n)),
        "equal": np.ones((rows, n)),
        "negative": -rng.gamma(1, 1, (rows, n)),
        "few values": rng.integers(0, 4, (rows, n)).astype(float),
        "wide": rng.standard_normal((rows, n)) ** 31,
        "special": rng.choice([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 1.0], (rows, n)),
    }[kind]
    if kind == "random":
        scores[1, ::9] = 1e3  # a sample of every ninth token is not typical
        scores[2, :500] = 1e3
    scores = scores.astype(dtype)
    lengths = np.array([n, n, n - 61])
    for budget in (0, 1, 37, 1000, n - 1, n):
        selected = select_by_scores(scores, lengths, budget, backend)
        for row in range(rows):
            usable = np.where(np.isnan(scores[row]), np.inf, scores[row])[: lengths[row]]
            best = np.argsort(-usable, kind="stable")[:budget]
            expected = np.unique([*best, 0, 1, *range(lengths[row] - 3, lengths[row])]).astype(
                np.int64
            )
            np.testing.assert_array_equal(selected[row, : len(expected)], expected)
            assert (selected[row, len(expected) :] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16, np.float16])
@pytest.mark.parametrize(
    ("t", "n_queries", "d", "v", "h"),
    [
        (1, 1, 20, 12, 4),
        (33, 33, 16, 32, 2),
        (150, 1, 64, 64, 8),
        (150, 7, 20, 5, 4),
        (97, 40, 32, 48, 10),
        (1100, 1, 32, 64, 8),
        (2300, 2, 16, 16, 2),
    ],
)
def test_dense_attention_equals_the_oracle(t, n_queries, d, v, h, dtype, backend):
    if backend == "reference" and t > 200:
        t = 200
    _, key, value = make(1, t, dtype, d=d, v=v)
    query = np.random.default_rng(2).standard_normal((B, n_queries, h, d)).astype(dtype)
    found = attend(query, key, value, None, budget=t, backend=backend)
    expected = oracle.attention(query, key, value)
    assert found.dtype == dtype
    rounding = {2: 2.0**-8 if dtype is BF16 else 2.0**-11, 4: 2e-6, 8: 1e-13}[
        np.dtype(dtype).itemsize
    ]
    np.testing.assert_allclose(
        found.astype(np.float64),
        expected,
        rtol=1.1 * rounding,
        atol=1.1 * rounding * np.abs(expected).max(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("selection", ["head", "group"])
@pytest.mark.parametrize(("d", "v", "h"), [(20, 12, 4), (64, 64, 8), (32, 176, 10), (16, 144, 2)])
def test_sparse_attention_is_exact_over_the_selected(d, v, h, selection, dtype, backend):
    query, key, value = make(4, dtype=dtype, d=d, v=v, h=h)
    index = make_index(key, value, make_lsh(d=d), backend=backend)
    options = dict(budget=30, sink=5, window=6, group_selection=selection, backend=backend)
    selected = select(index, query, **options)
    selected = selected.repeat(h // selected.shape[1], axis=1)
    found = attend(query, key, value, index, **options)
    expected = oracle.attention(
        query, key, value, [[row[row >= 0] for row in heads] for heads in selected]
    )
    tolerance = 1e-5 if dtype is np.float32 else 2.0**-8
    np.testing.assert_allclose(
        found.astype(np.float64), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("budget", [60, 64, 200, 1100, 2090])  # blocks are of 64, segments of 1,024
def test_many_selected_tokens_are_read_block_by_block(budget, dtype, backend):
    query, key, value = make(5, t=2100, dtype=dtype, d=64, v=64)
    index = make_index(key, value, make_lsh(d=64), backend=backend)
    options = dict(budget=budget, sink=0, window=4, backend=backend)
    selected = select(index, query, **options)
    found = attend(query, key, value, index, **options)
    expected = oracle.attention(
        query, key, value, [[row[row >= 0] for row in heads] for heads in selected]
    )
    tolerance = 1e-5 if dtype is np.float32 else 2.0**-8
    np.testing.assert_allclose(
        found.astype(np.float64), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_budget_of_all_tokens_is_dense_attention(backend):
    query, key, value = make()
    index = make_index(key, value, backend=backend)
    dense = oracle.attention(query, key, value)
    for budget in (T, T + 1, 10**9, 1.0):
        found = attend(query, key, value, index, budget=budget, backend=backend)
        np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-6)
    # and so is attention over a selection of all of them
    every, out = (
        np.broadcast_to(np.arange(T), (B, H, T)),
        put(np.empty((B, 1, H, V), np.float32), backend),
    )
    operations = racecore.backends.choose(backend).socket
    operations.attend_selected(*(put(x, backend) for x in (query, key, value, every)), out)
    np.testing.assert_allclose(fetch(out), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [2, -1, 0])
@pytest.mark.parametrize(("d", "v"), [(64, 64), (20, 12)])
def test_selected_tokens_may_be_strided(step, d, v):
    query, key, value = make(t=300, d=d, v=v)
    selected = np.broadcast_to(np.int64(7), (B, G, 100))
    if step != 0:
        selected = np.full((B, G, 200), 250)[:, :, ::step][:, :, :100]
        selected[...] = np.arange(0, 300, 3)
    assert selected.strides[2] == step * selected.itemsize
    results = np.empty((2, B, 1, H, v), np.float32)
    for tokens, out in zip((selected, selected.copy()), results, strict=True):
        cpu.attend_selected(query, key, value, tokens, out)
    np.testing.assert_array_equal(*results)


def test_the_best_scorer_of_the_study_is_the_default():
    index = racecore.SocketIndex(make_lsh())
    assert (index.scorer, index.tau, index.weight_by_value_norm) == ("signed_jl", 0.4, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_planes", [8, 10])
def test_appended_in_pieces_equals_rebuilt_to_the_bit(n_planes, backend):
    query, key, value = make(5, 400)
    lsh = make_lsh(7, n_planes)
    whole = make_index(key, value, lsh, backend=backend)
    pieces = racecore.SocketIndex(lsh, **OF_THE_PAPER)
    sizes = []
    for start, stop in pairwise([0, 0, 1, 2, 66, 67, 67, *range(129, 200), 400]):
        pieces.append(
            put(key[:, start:stop], backend), put(value[:, start:stop], backend), backend=backend
        )
        sizes.append(pieces.nbytes)
    mine, its = pieces.hashed, whole.hashed
    np.testing.assert_array_equal(fetch(mine.codes[:, :, :6]), fetch(its.codes[:, :, :6]))
    np.testing.assert_array_equal(fetch(mine.norms[..., :400]), fetch(its.norms[..., :400]))
    np.testing.assert_array_equal(*(scores_of(index, query, backend) for index in (pieces, whole)))
    np.testing.assert_array_equal(
        *(select(index, query, budget=50, backend=backend) for index in (pieces, whole))
    )
    assert pieces.n_tokens == whole.n_tokens == 400
    assert len(set(sizes)) < 12  # it grows by a factor, not for every token


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [30, 0.2, 80])  # 80: dense for the shorter sequences
def test_ragged_batches_equal_one_by_one_to_the_bit(budget, backend):
    rng = np.random.default_rng(6)
    lengths = np.array([150, 70, 0, 1, 149])
    key, value = (rng.standard_normal((5, 160, G, D)).astype(BF16) for _ in range(2))
    key[1, 70:], value[1, 70:] = np.nan, np.nan  # tokens behind the end do not matter
    query = rng.standard_normal((5, 1, H, D)).astype(BF16)
    lsh = make_lsh()
    index = make_index(key, value, lsh, lengths=lengths, backend=backend)
    options = dict(budget=budget, sink=3, window=4, backend=backend)
    np.testing.assert_array_equal(index.lengths, lengths)
    together = attend(query, key, value, index, lengths=lengths, **options)
    scores, selected = scores_of(index, query, backend), select(index, query, **options)
    for b, n in enumerate(lengths):
        rows = key[b : b + 1, :n], value[b : b + 1, :n]
        alone = make_index(*rows, lsh, backend=backend)
        np.testing.assert_array_equal(
            attend(query[b : b + 1], *rows, alone, **options), together[b : b + 1]
        )
        np.testing.assert_array_equal(
            scores_of(alone, query[b : b + 1], backend)[0], scores[b, :, :n]
        )
        assert (scores[b, :, n:] == -np.inf).all()
        mine = select(alone, query[b : b + 1], **options)[0]
        np.testing.assert_array_equal(mine, selected[b, :, : mine.shape[1]])
        assert (selected[b, :, mine.shape[1] :] == -1).all()
    assert not together[2].any()  # nothing seen: zeros


def test_threads_do_not_change_a_bit():
    query, key, value = make(7, 20_000, h=8, d=16, v=16)
    lsh = make_lsh(d=16)
    results = []
    for n in (1, 2, 5):
        with racecore.threads(n):
            index = make_index(key, value, lsh)
            results.append(
                [
                    index.hashed.codes,
                    index.hashed.norms,
                    index.scores(query),
                    index.select(query, budget=0.1),
                    racecore.sparse_attention(query, key, value, index, budget=0.1),
                    racecore.sparse_attention(query, key, value, index, budget=1.0),
                    racecore.sparse_attention(
                        key[:, -50:], key[:, -99:], value[:, -99:], None, budget=0
                    ),
                ]
            )
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_causality_is_strict_in_a_prefill(backend):
    """A token changed, to NaN even, changes no bit before it."""
    query, key, value = (
        np.random.default_rng(i).standard_normal((1, 90, 2, 16), dtype=np.float32) for i in range(3)
    )
    before = attend(query, key, value, None, budget=0, backend=backend)
    for t in (89, 50, 33):
        for array in (key, value):
            array[:, t] = np.nan
        after = attend(query, key, value, None, budget=0, backend=backend)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.isnan(after[:, t:]).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_gives_what_a_contiguous_copy_gives(name, backend):
    query, key, value = (
        arrange(x, name)
        for x in make(8, d=32, v=48, dtype=np.float32 if "swapped" in name else BF16)
    )
    q, k, v = (np.array(x, x.dtype.newbyteorder("="), order="C") for x in (query, key, value))
    lsh = make_lsh(d=32)
    plain, index = (
        make_index(k, v, lsh, backend=backend),
        make_index(key, value, lsh, backend=backend),
    )
    np.testing.assert_array_equal(fetch(index.hashed.codes), fetch(plain.hashed.codes))
    for budget in (30, 1.0):
        options = dict(budget=budget, sink=3, window=4, backend=backend)
        np.testing.assert_array_equal(
            attend(query, key, value, index, **options), attend(q, k, v, plain, **options)
        )


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_batch_axis_and_out(backend):
    query, key, value = (put(x, backend) for x in make())
    index, alone_index = racecore.SocketIndex(make_lsh()), racecore.SocketIndex(make_lsh())
    index.append(key, value)
    alone_index.append(key[0], value[0])
    alone = racecore.sparse_attention(query[0], key[0], value[0], alone_index, budget=20)
    whole = fetch(racecore.sparse_attention(query, key, value, index, budget=20))
    assert alone.shape == (1, H, V)
    np.testing.assert_array_equal(fetch(alone), whole[0])
    assert alone_index.scores(query[0]).shape == (H, T)
    assert alone_index.select(query[0], budget=3).ndim == 2
    out = put(np.full((B, 1, H, 2 * V), np.nan, np.float32), backend)[..., ::2]
    assert racecore.sparse_attention(query, key, value, index, budget=20, out=out) is out
    np.testing.assert_array_equal(fetch(out), whole)


def test_arrays_of_torch():
    torch = pytest.importorskip("torch")
    query, key, value = make()
    q, k, v = (torch.from_numpy(x).to(torch.bfloat16) for x in (query, key, value))
    index = make_index(k, v)
    out = racecore.sparse_attention(q, k, v, index, budget=30)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.bfloat16
    assert isinstance(index.select(q, budget=3), torch.Tensor)
    expected = racecore.sparse_attention(
        *(x.astype(BF16) for x in (query, key, value)), index, budget=30
    )
    np.testing.assert_array_equal(out.view(torch.int16).numpy().view(BF16), expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_extreme_numbers_do_no_harm(backend):
    """Norms that float16 cannot hold, logits beyond exp: finite, and what the oracle says."""
    for scale, dtype in ((1e18, np.float32), (1e-30, np.float32), (200.0, np.float16)):
        query, key, value = (x * np.dtype(dtype).type(scale) for x in make(9, dtype=dtype))
        index = make_index(key, value, backend=backend)
        assert np.isfinite(scores_of(index, query, backend)).all()
        with np.errstate(over="ignore", invalid="ignore"):
            out = attend(
                query.clip(-1e3, 1e3), key.clip(-1e3, 1e3), value, index, budget=30, backend=backend
            )
        assert np.isfinite(out).all()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_planes_for_every_key_value_head(backend):
    query, key, value = make()
    planes = np.random.default_rng(1).standard_normal((G, 5, 8, D))
    index = make_index(key, value, racecore.SoftLSH(planes, 1.0), backend=backend)
    for g in range(G):
        lsh = racecore.SoftLSH(planes[g], 1.0)
        one = make_index(key[:, :, g : g + 1], value[:, :, g : g + 1], lsh, backend=backend)
        heads = slice(2 * g, 2 * g + 2)
        found = scores_of(one, query[:, :, heads], backend)
        np.testing.assert_array_equal(found, scores_of(index, query, backend)[:, heads])
    with pytest.raises(
        ValueError,
        match="hashed once per key/value head, of which there are 2, and lsh has planes for 4",
    ):
        make_index(key, value, racecore.SoftLSH.random(D, n_heads=4, rng=0))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_copy_truncate_and_select_batch(backend):
    query, key, value = make(10, 200)
    index = make_index(key[:, :150], value[:, :150], backend=backend)
    before = scores_of(index, query, backend)
    copy = index.copy()
    copy.append(put(key[:, 150:], backend), put(value[:, 150:], backend))
    assert (index.n_tokens, copy.n_tokens) == (150, 200)
    np.testing.assert_array_equal(scores_of(index, query, backend), before)
    copy.truncate([150, 100])
    np.testing.assert_array_equal(copy.lengths, [150, 100])
    np.testing.assert_array_equal(scores_of(copy, query, backend)[0], before[0])
    copy.append(
        put(key[:, 100:], backend), put(value[:, 100:], backend), lengths=[0, 50]
    )  # over what was forgotten
    np.testing.assert_array_equal(scores_of(copy, query, backend), before)
    swapped = index.select_batch([1, 0, 1])
    np.testing.assert_array_equal(scores_of(swapped, query[[1, 0, 1]], backend), before[[1, 0, 1]])
    assert index.select_batch([]).batch == 0
    for indices, error in (([2], IndexError), ([0.5], TypeError), ([[0]], ValueError)):
        with pytest.raises(error):
            index.select_batch(indices)
    copy.truncate([150, 100])
    with pytest.raises(ValueError, match="truncate cannot lengthen"):
        copy.truncate([150, 101])
    with pytest.raises(ValueError, match="nothing to truncate"):
        racecore.SocketIndex(make_lsh()).truncate(0)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_save_and_load(tmp_path, backend):
    query, key, value = make()
    path = tmp_path / "index.npz"
    index = make_index(
        key, value, scorer="signed_jl", tau=0.35, weight_by_value_norm=False, backend=backend
    )
    index.save(path)
    loaded = racecore.SocketIndex.load(path, index.lsh, backend=backend)
    assert (loaded.scorer, loaded.tau, loaded.weight_by_value_norm) == ("signed_jl", 0.35, False)
    assert loaded.lsh == index.lsh
    np.testing.assert_array_equal(
        scores_of(loaded, query, backend), scores_of(index, query, backend)
    )
    for each in (loaded, index):  # a loaded index can be appended to
        each.append(put(key, backend), put(value, backend))
    np.testing.assert_array_equal(
        scores_of(loaded, query, backend), scores_of(index, query, backend)
    )
    with pytest.raises(ValueError, match="made with another hash: its fingerprint"):
        racecore.SocketIndex.load(path, make_lsh(6))
    racecore.RaceState.zeros(make_lsh(), 1, 1, 1).save(tmp_path / "state.npz")
    with pytest.raises(
        CorruptFileError,
        match=r"not a racecore.SocketIndex file: it says it is 'racecore.RaceState'",
    ):
        racecore.SocketIndex.load(tmp_path / "state.npz")
    empty = racecore.SocketIndex(make_lsh())
    empty.save(path)
    assert racecore.SocketIndex.load(path).batch is None


def test_flipped_bytes_are_noticed(tmp_path):
    query, key, value = make()
    path = tmp_path / "index.npz"
    index = make_index(key, value)
    index.save(path)
    expected, content, noticed = index.scores(query), path.read_bytes(), 0
    for position in np.random.default_rng(0).integers(len(content), size=25):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            loaded = racecore.SocketIndex.load(path)
        except CorruptFileError:
            noticed += 1
            continue
        np.testing.assert_array_equal(loaded.scores(query), expected)  # the byte did not matter
    assert noticed > 15
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError):
        racecore.SocketIndex.load(path)


@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_results_are_on_the_device_of_the_index(backend, tmp_path):
    query, key, value = make()
    q, k, v = (put(x, backend) for x in (query, key, value))
    index, host = make_index(key, value, backend=backend), make_index(key, value)
    assert (index.on_device, host.on_device) == (True, False)
    out = racecore.sparse_attention(q, k, v, index, budget=20)
    for array in (
        index.hashed.codes,
        index.hashed.norms,
        index.scores(q),
        index.select(q, budget=20),
        out,
    ):
        assert cuda.is_array(array)
    assert type(index.lengths) is np.ndarray
    assert isinstance(index.copy().nbytes, int)
    # arrays of the host go to the device and back if the backend is named
    from_host = racecore.SocketIndex(index.lsh, **OF_THE_PAPER)
    from_host.append(key, value, backend="cuda")
    assert from_host.on_device
    there = racecore.sparse_attention(query, key, value, from_host, budget=20, backend="cuda")
    for found, expected in (
        (from_host.scores(query, backend="cuda"), index.scores(q)),
        (there, out),
    ):
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, fetch(expected))
    lengths = put(np.full(B, T), backend)
    np.testing.assert_array_equal(
        fetch(racecore.sparse_attention(q, k, v, index, budget=20, lengths=lengths)), fetch(out)
    )
    # a file belongs to no device
    index.save(tmp_path / "index.npz")
    np.testing.assert_allclose(
        racecore.SocketIndex.load(tmp_path / "index.npz").scores(query), host.scores(query), 1e-5
    )
    # anything else is an error
    for call, message in (
        (
            lambda: index.append(key, value),
            "index is in a GPU's memory and key in the host's memory: an index stays",
        ),
        (lambda: host.append(k, v), "index is in the host's memory and key in a GPU's memory"),
        (
            lambda: host.append(k, value),
            "must be on one device, got key on a GPU, value in host memory",
        ),
        (lambda: index.scores(query), "index is in a GPU's memory and query in the host's"),
        (lambda: host.select(q, budget=3), "index is in the host's memory and query in a GPU's"),
        (
            lambda: racecore.sparse_attention(q, k, v, host, budget=3),
            "index is in the host's memory and key in a GPU's",
        ),
        (
            lambda: index.scores(q, backend="cpu"),
            "works in host memory, and these arrays are on a GPU",
        ),
        (
            lambda: host.scores(query, backend="cuda"),
            "index is in the host's memory and query in a GPU's",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_the_same_bits_for_any_grid_and_any_memory(backend, monkeypatch):
    """Few blocks, some sequences or rows at a time, scratch in global memory, tables in place."""
    from racecore.ops.socket import cuda_launch
    from racecore.ops.socket.attend import cuda as attend_cuda
    from racecore.ops.socket.select import cuda as select_cuda

    lengths = np.array([1100, 300])
    query, key, value = make(11, 1100, h=12, d=40, v=36)
    prompt = np.random.default_rng(12).standard_normal((B, 13, 12, 40)).astype(np.float32)

    def everything():
        index = make_index(key, value, make_lsh(3, 10, 40), lengths=lengths, backend=backend)
        results = [
            fetch(index.hashed.codes),
            fetch(index.hashed.norms),
            scores_of(index, query, backend),
        ]
        for selection in ("head", "group"):
            options = dict(budget=50, sink=3, window=4, group_selection=selection, backend=backend)
            results.append(select(index, query, **options))
            results.append(attend(query, key, value, index, lengths=lengths, **options))
        results.append(attend(query, key, value, None, budget=0, lengths=lengths, backend=backend))
        return [
            *results,
            attend(prompt, key, value, None, budget=0, lengths=lengths, backend=backend),
        ]

    expected = everything()
    for changes in (
        {(cuda_launch, "MAX_BLOCKS"): 3, (cuda_launch, "ENOUGH_BLOCKS"): 1},
        {(attend_cuda, "_PARTIAL_BYTES"): 1 << 15},
        {(attend_cuda, "_PARTIAL_BYTES"): 1, (select_cuda, "_SCORE_BYTES"): 1},
        {(cuda_launch, "SHARED_BYTES"): 0},
        {(cuda_launch, "SHARED_BYTES"): 2000},
    ):
        with monkeypatch.context() as patch:
            for (module, name), number in changes.items():
                patch.setattr(module, name, number)
            for found, its in zip(everything(), expected, strict=True):
                assert found.tobytes() == its.tobytes()


MEMORY_MAP = """
import json, sys
import numpy as np, racecore

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))

folder, tokens = json.loads(sys.argv[1])
shape = (1, tokens, 2, 64)
rng = np.random.default_rng(0)
maps = []
for name in ("k", "v"):  # sparse files: only some rows are more than zeros
    cache = np.memmap(f"{folder}/{name}", np.float16, "w+", shape=shape)
    cache[0, :: tokens // 64] = rng.standard_normal((64, 2, 64))
    cache.flush()
    del cache
    maps.append(np.memmap(f"{folder}/{name}", np.float16, "r", shape=shape))
key, value = maps
index = racecore.SocketIndex(racecore.SoftLSH.random(64, 4, 8, rng=0))
query = rng.standard_normal((1, 1, 8, 64)).astype(np.float16)

def step(n):
    options = dict(budget=64, sink=4, window=16)
    return racecore.sparse_attention(query, key[:, :n], value[:, :n], index, **options)

index.append(key[:, :2000], value[:, :2000])
step(2000)  # loads the kernels
for start in range(2000, tokens, 1 << 16):
    index.append(key[:, start : start + (1 << 16)], value[:, start : start + (1 << 16)])
base = anonymous()
out = step(tokens)
found = index.select(query, budget=64, sink=4, window=16)
rows = [key[0, found[0, h][found[0, h] >= 0], h // 4] for h in range(8)]
result = {
    "anonymous": anonymous() - base,
    "finite": bool(np.isfinite(out).all()),
    "index": index.nbytes,
    "not zero": bool(all(np.abs(r.astype(float)).sum() > 0 for r in rows)),
}
print(json.dumps(result))
"""


@pytest.mark.process
def test_a_memory_mapped_cache_stays_on_disk(tmp_path):
    tokens = 1 << 19  # 134 MB each of keys and values
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_MAP, json.dumps([str(tmp_path), tokens])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["finite"]
    assert found["not zero"]
    assert found["index"] < 1.6 * tokens * 2 * (4 + 2)
    assert found["anonymous"] < 40e6  # scores of 8 heads are 17 MB of it


FORBIDDEN = """
import ctypes, mmap
import numpy as np, racecore

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
rng = np.random.default_rng(0)
shape = (1, 1 << 16, 2, 64)  # 16 tokens a page
memory = [mmap.mmap(-1, 2 * 128 << 16) for _ in "kv"]
key, value = (np.frombuffer(m, np.float16).reshape(shape) for m in memory)
for x in (key, value):
    x[...] = rng.standard_normal(shape, dtype=np.float32)
query = rng.standard_normal((1, 1, 8, 64)).astype(np.float16)
index = racecore.SocketIndex(racecore.SoftLSH.random(64, 4, 8, rng=0))
index.append(key, value)
options = dict(budget=64, sink=4, window=16)
expected = racecore.sparse_attention(query, key, value, index, **options)
pages = np.unique(index.select(query, **options)) // 16
closed = np.setdiff1d(np.arange(1 << 12), pages)
assert len(closed) > 3000
for x in (key, value):
    for page in closed:
        assert libc.mprotect(x.ctypes.data + int(page) * 4096, 4096, 0) == 0
assert (racecore.sparse_attention(query, key, value, index, **options) == expected).all()

# and dense attention: nothing behind the last of 261 tokens, where a page ends
memory = [mmap.mmap(-1, 36 * 4096) for _ in "kv"]
start = 35 * 4096 - 261 * 512
key, value = (
    np.frombuffer(m, np.float32, 261 * 128, start).reshape(1, 261, 2, 64) for m in memory
)
query = rng.standard_normal((1, 1, 8, 64)).astype(np.float32)
for x in (key, value):
    x[...] = rng.standard_normal(x.shape, dtype=np.float32)
    assert libc.mprotect(x.ctypes.data + x.nbytes, 4096, 0) == 0
out, expected = (
    racecore.sparse_attention(query, key, value, None, budget=1.0, backend=name)
    for name in ("cpu", "reference")
)
np.testing.assert_allclose(out, expected, rtol=1e-4)
print("done")
"""


@pytest.mark.process
def test_only_selected_rows_are_read():
    """All other pages are protected against reading."""
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout == "done\n"


query, key, value = make()
INDEX = make_index(key, value)
DECODE: dict[str, Any] = dict(query=query, key=key, value=value, index=INDEX, budget=5)
BAD_CALLS = [
    (dict(query=query[0]), ValueError, r"must all be \[B, T, heads, dim\]"),
    (dict(query=query[:, :, :3]), ValueError, "3 query heads must be a multiple of the 2"),
    (dict(query=query.astype(np.float64)), TypeError, "must have one dtype"),
    (
        dict(key=key[:, :100], value=value[:, :100]),
        ValueError,
        "have 100 tokens and the index 150: append every token",
    ),
    (dict(lengths=[150, 149]), ValueError, r"lengths\[1\] is 149, and the index has 150"),
    (dict(lengths=[150]), ValueError, r"lengths must have shape \[B\] = \(2,\), got \(1,\)"),
    (dict(lengths=[150, 151]), ValueError, "lengths must be from 0 to 150.*got 151 at index 1"),
    (dict(lengths=[1.5, 2]), TypeError, "lengths must be integers, got float64"),
    (
        dict(index=3),
        TypeError,
        "index must be a racecore.SocketIndex, or None for dense attention, got int",
    ),
    (dict(index=racecore.SocketIndex(make_lsh())), ValueError, "the index is empty"),
    (
        dict(index=racecore.SocketIndex(make_lsh(d=7))),
        ValueError,
        "hashes rows of 7 values, query and key have 20",
    ),
    (
        dict(index=INDEX.select_batch([0])),
        ValueError,
        r"\(batch, key/value heads\) = \(1, 2\), key and value \(2, 2\)",
    ),
    (dict(budget=-1), ValueError, "budget must not be negative, got -1"),
    (dict(budget=1.5), ValueError, "a float budget is a share of the tokens, from 0 to 1, got 1.5"),
    (dict(budget=float("nan")), ValueError, "a share of the tokens"),
    (dict(budget=True), TypeError, "budget must be a number of tokens"),
    (dict(budget="all"), TypeError, "budget must be a number of tokens"),
    (dict(sink=-1), ValueError, "sink must not be negative"),
    (dict(window=1.0), TypeError, "window must be an integer number of tokens"),
    (
        dict(group_selection="layer"),
        ValueError,
        "group_selection must be 'head'.*or 'group'.*got 'layer'",
    ),
    (dict(backend="gpu"), ValueError, "backend must be None or one of"),
    (
        dict(out=np.empty((2, 1, 4, 5), np.float32)),
        ValueError,
        r"out must have shape \(2, 1, 4, 12\)",
    ),
    (dict(out=value[:, :1].repeat(2, axis=2).astype(np.float64)), ValueError, "dtype float32"),
    (
        dict(query=key[:, :, [0, 0, 1, 1]][:, :60], lengths=[150, 40], index=None),
        ValueError,
        "sequence 1 has only 40",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong(changed, error, message):
    with pytest.raises(error, match=message):
        racecore.sparse_attention(**(DECODE | changed))


def test_bad_appends_change_nothing():
    index = make_index(key, value)
    before = index.scores(query)
    bad = [
        (
            (key[..., :7], value),
            {},
            ValueError,
            r"must have shapes \[2, T, 2, 20\] and \[2, T, 2, V\] for this index",
        ),
        ((key[:1], value[:1]), {}, ValueError, "must have shapes"),
        ((key[:, :, :1], value[:, :, :1]), {}, ValueError, "must have shapes"),
        ((key, value[:, :9]), {}, ValueError, "must have shapes"),
        ((key, value.astype(BF16)), {}, TypeError, "one dtype"),
        ((key.astype(int), value), {}, TypeError, "key must be float16"),
        ((key, value), dict(lengths=[1, 151]), ValueError, "from 0 to 150"),
        ((key, value), dict(backend="gpu"), ValueError, "backend must be"),
    ]
    for arguments, options, error, message in bad:
        with pytest.raises(error, match=message):
            index.append(*arguments, **options)
    assert index.n_tokens == T
    np.testing.assert_array_equal(index.scores(query), before)


def test_an_interrupted_append_changes_nothing(monkeypatch):
    index = make_index(key, value)
    before = index.scores(query)

    def interrupt(norms):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "to_norm16", interrupt)
    with pytest.raises(KeyboardInterrupt):
        index.append(key, value)
    assert index.n_tokens == T
    np.testing.assert_array_equal(index.scores(query), before)


def test_an_index_says_what_is_wrong():
    for options, error, message in (
        (
            dict(scorer="cosine"),
            ValueError,
            "scorer must be one of 'soft', 'hamming', 'signed_jl', got 'cosine'",
        ),
        (dict(tau=0), ValueError, "tau must be a positive number"),
        (dict(tau=float("nan")), ValueError, "tau must be a positive number"),
        (dict(tau="warm"), TypeError, "tau must be a number"),
        (dict(weight_by_value_norm=1), TypeError, "weight_by_value_norm must be True or False"),
    ):
        with pytest.raises(error, match=message):
            racecore.SocketIndex(make_lsh(), **options)
    with pytest.raises(TypeError, match=r"lsh must be a racecore.SoftLSH, got str"):
        racecore.SocketIndex("lsh")
    with pytest.raises(ValueError, match="this index is empty: append"):
        racecore.SocketIndex(make_lsh()).scores(query)
    for wrong, message in (
        (key[:, :2], "one token, got"),
        (query[..., :7], r"\[2, 1, H, 20\]"),
        (query[:, :, :3], "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            INDEX.scores(wrong)


OTHER_PROCESSOR = """
import numpy as np, racecore

rng = np.random.default_rng(0)
key, value = (rng.standard_normal((1, 100, 1, 16), dtype=np.float32) for _ in range(2))
query = rng.standard_normal((1, 1, 5, 16), dtype=np.float32)
index = racecore.SocketIndex(racecore.SoftLSH.random(16, 4, 7, rng=0), scorer="soft")
index.append(key, value, backend="reference")
found, expected = (index.scores(query, backend=name) for name in ("cpu", "reference"))
np.testing.assert_allclose(found, expected, rtol=1e-5)
print("done")
"""


@pytest.mark.process
@pytest.mark.parametrize(("name", "features"), [("generic", ""), ("haswell", "+avx,+avx2,+fma")])
def test_scores_on_processors_without_the_widest_lookups(name, features, tmp_path):
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSOR],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "done\n"
