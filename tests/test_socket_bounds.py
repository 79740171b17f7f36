"""Selection by bounds of a group's scores must equal selection by exact scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import racecore
from racecore.ops.socket import cpu, layout
from racecore.ops.socket.select import bounds, top_k_by_bounds
from racecore.runtime import processor

pytestmark = pytest.mark.skipif(
    not processor.has("avx512vbmi"),
    reason="the processor has no AVX-512 VBMI: all scores are exact here",
)
B, T, G, H, D = 2, 5000, 2, 6, 16  # 79 blocks of 64: not a multiple of four


def make(
    scorer: str, n_tables: int = 6, n_planes: int = 8, scale: float = 1.0, kind: str = "random"
) -> Any:
    """Return the tables of queries and hashed keys, of lengths 5,000 and 4,333."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((B, 1, H, D), dtype=np.float32)
    key = rng.standard_normal((B, T, G, D), dtype=np.float32)
    value = rng.standard_normal((B, T, G, D), dtype=np.float32) * np.float32(scale)
    if kind == "ties":
        key, value = np.repeat(key[:, :50], 100, axis=1), np.ones_like(value)
    if kind == "sinks":  # a few norms are far from the others, and some are zero
        value[:, ::500] *= 1e4
        value[:, 1::7] = 0
    lsh = racecore.SoftLSH.random(D, n_tables, n_planes, rng=1)
    index = racecore.SocketIndex(lsh, scorer=scorer, weight_by_value_norm=True)
    index.append(key, value, lengths=[T, 4333])
    planes = np.broadcast_to(index.lsh.planes, (G, n_tables, n_planes, D)).astype(np.float64)
    hashed = index.hashed
    assert hashed is not None
    return cpu.query_tables(query, planes, index._scorer), hashed, index._scorer.multiplies


def group_scores(tables: np.ndarray, keys: layout.HashedKeys, multiplies: bool) -> np.ndarray:
    """Return exact scores, the heads of a group added up in float64: [B, G, T]."""
    scores = cpu.scores(tables, keys, multiplies).astype(np.float64)
    return scores.reshape(B, G, H // G, -1).sum(axis=2)


@pytest.mark.parametrize("scorer", ["soft", "hamming", "signed_jl"])
@pytest.mark.parametrize("n_planes", [5, 8])
@pytest.mark.parametrize("kind", ["random", "sinks"])
def test_exact_scores_lie_between_their_bounds(scorer, n_planes, kind):
    tables, keys, multiplies = make(scorer, n_planes=n_planes, kind=kind)
    call = bounds.new_bound_call(tables, G, keys.codes, keys.norms, multiplies)
    bounds.fill_bound_tables(call, 0, len(call.byte_tables))
    n_blocks = -(-T // layout.BLOCK_TOKENS)
    upper = np.empty((B * G, n_blocks * layout.BLOCK_TOKENS), np.float32)
    tasks = np.array([(b, g, 0, n_blocks, b * G + g) for b in range(B) for g in range(G)])
    bounds.score_bounds(call, tasks, upper, 0, len(tasks))
    norm = layout.from_norm16(keys.norms[:, :, :T]).astype(np.float64)
    high = upper[:, :T].reshape(B, G, T).astype(np.float64)
    low = high - call.scales[:, bounds.WIDTH].reshape(B, G, 1) * norm
    exact = group_scores(tables, keys, multiplies)
    exists = np.isfinite(exact)  # tokens of the shorter sequence
    assert (high >= exact)[exists].all()
    assert (low <= exact)[exists].all()
    width = ((high - low)[exists] / norm[exists].clip(1e-30)).max()
    # wider bounds would leave most candidates uncertain
    assert width < 0.02 * (exact[exists] / norm[exists].clip(1e-30)).std()


@pytest.mark.parametrize("scorer", ["soft", "hamming", "signed_jl"])
@pytest.mark.parametrize("kind", ["random", "ties", "sinks"])
@pytest.mark.parametrize("cut", ["whole heads", "pieces", "pieces of three heads"])
def test_bounds_select_the_same_as_exact_scores(scorer, kind, cut, monkeypatch):
    tables, keys, multiplies = make(scorer, kind=kind)
    monkeypatch.setattr(cpu, "_HEADS_PER_THREAD", 0 if cut == "whole heads" else 1000)
    if cut == "pieces of three heads":
        monkeypatch.setattr(cpu, "_SCORE_BYTES", 3 * 4 * 79 * 64)
    for budget in (1, 37, 400, 3000, 4999):
        for ends in ((0, 1), (100, 200)):
            chosen = []
            for by_bounds in (True, False):
                monkeypatch.setattr(cpu, "can_bound", lambda *_, answer=by_bounds: answer)
                chosen.append(
                    cpu.select(
                        tables, keys, multiplies, np.array([budget, min(budget, 90)]), ends, True
                    )
                )
            np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize("widened", [0.0, 0.1, 2.0, 50.0])
def test_wide_bounds_decide_less_but_never_wrongly(widened):
    """Scores have either sign, and wide upper bounds grow with the norm: then tokens below the
    sampled threshold matter.
    """
    tables, keys, multiplies = make("signed_jl", kind="sinks")
    call = bounds.new_bound_call(tables, G, keys.codes, keys.norms, multiplies)
    bounds.fill_bound_tables(call, 0, len(call.byte_tables))
    exact = group_scores(tables, keys, multiplies)[0]
    norms = layout.from_norm16(keys.norms[0, :, :T]).clip(1e-30)
    by = np.float32(widened * (exact / norms).std(where=exact != 0))
    call.scales[:, bounds.OFFSET] += by
    call.scales[:, bounds.WIDTH] += 2 * by
    n_blocks, budget = -(-T // layout.BLOCK_TOKENS), 300
    upper = np.empty((G, n_blocks * layout.BLOCK_TOKENS), np.float32)
    bounds.score_bounds(call, np.array([(0, g, 0, n_blocks, g) for g in range(G)]), upper, 0, G)
    selected, counts = np.empty((G, budget), np.int64), np.empty(G, np.int64)
    lengths, budgets = np.full(G, T), np.full(G, budget)
    top_k_by_bounds.SELECT_BY_BOUNDS[multiplies](
        call, upper.view(np.int32), 0, lengths, budgets, (0, 0), selected, counts, 0, G
    )
    for g in range(G):
        best = np.sort(np.argsort(-exact[g], kind="stable")[:budget])
        np.testing.assert_array_equal(selected[g], best)


def test_bounds_are_used_only_if_they_help():
    tables = make("soft")[0]
    assert bounds.can_bound(tables, layout.high_bits(8), T)
    # too few tokens to pay for the tables
    assert not bounds.can_bound(tables, layout.high_bits(8), 4095)
    assert not bounds.can_bound(tables, layout.high_bits(9), T)  # codes of more than a byte
    assert not bounds.can_bound(tables[:, :, :5], layout.high_bits(8), T)  # tables come in pairs
    assert not bounds.can_bound(tables.astype(np.float64), layout.high_bits(8), T)


@pytest.mark.parametrize("whole_heads", [True, False], ids=["whole heads", "pieces"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("digit", [0, 1])
def test_numbers_that_are_not_finite_are_scored_exactly(number, digit, whole_heads, monkeypatch):
    tables, keys, multiplies = make("soft")
    tables[1, H - 1, 3, digit, 7] = number
    answers, select_by_bounds = [], cpu._select_by_bounds
    monkeypatch.setattr(cpu, "_HEADS_PER_THREAD", 0 if whole_heads else 1000)
    monkeypatch.setattr(
        cpu,
        "_select_by_bounds",
        lambda *arguments: answers.append(select_by_bounds(*arguments)) or answers[-1],
    )
    selected = cpu.select(tables, keys, multiplies, np.array([100, 100]), (0, 1), True)
    assert answers == [False]
    monkeypatch.setattr(cpu, "_select_by_bounds", lambda *arguments: False)
    np.testing.assert_array_equal(
        selected, cpu.select(tables, keys, multiplies, np.array([100, 100]), (0, 1), True)
    )


@pytest.mark.parametrize("whole_heads", [True, False], ids=["whole heads", "pieces"])
@pytest.mark.parametrize(("factor", "fits"), [(1.0, True), (1e25, False), (1e-38, True)])
def test_huge_scores_are_computed_exactly(whole_heads, factor, fits, monkeypatch):
    tables, keys, multiplies = make("signed_jl")
    tables *= np.float32(factor)
    answers, select_by_bounds = [], cpu._select_by_bounds
    monkeypatch.setattr(cpu, "_HEADS_PER_THREAD", 0 if whole_heads else 1000)
    monkeypatch.setattr(
        cpu,
        "_select_by_bounds",
        lambda *arguments: answers.append(select_by_bounds(*arguments)) or answers[-1],
    )
    selected = cpu.select(tables, keys, multiplies, np.array([100, 100]), (0, 1), True)
    assert answers == [fits]
    call = bounds.new_bound_call(tables, G, keys.codes, keys.norms, multiplies)
    bounds.fill_bound_tables(call, 0, len(call.byte_tables))
    assert bounds.have_finite_bounds(call) == fits
    assert np.isfinite(call.scales).all() or not fits
    scores = cpu.scores(tables, keys, multiplies).reshape(B, G, H // G, -1)
    exact = scores[:, :, 0].copy()
    for h in range(1, H // G):  # heads in order, as kernels add
        exact += scores[:, :, h]
    last = keys.lengths - 1
    for b in range(B):
        for g in range(G):
            best = np.argsort(-exact[b, g], kind="stable")[:100]
            np.testing.assert_array_equal(np.unique(selected[b, g]), np.unique([*best, last[b]]))
