"""What must hold whatever the numbers are: most of it to the bit, none of it against another
implementation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from devices import BACKENDS
from problems import make_state, relative_error

import racecore
from racecore.ops.causal import cpu as causal
from racecore.ops.cpu import call

READOUTS = ("ratio", "bucket_mean")
LONG = 2 * 1024 + 77  # tokens: more than two of the pieces that long sequences are cut into


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def rows(seed: int, *shapes: tuple[int, ...], dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def inputs(
    n_tokens: int, *, n_heads: int = 2, n_kv_heads: int = 1, dtype: Any = np.float64, seed: int = 0
) -> list[np.ndarray]:
    """Return query, key, value and d_out without a batch axis; D = 8, V = 5."""
    shapes = [
        (n_tokens, n_heads, 8),
        (n_tokens, n_kv_heads, 8),
        (n_tokens, n_kv_heads, 5),
        (n_tokens, n_heads, 5),
    ]
    return rows(seed, *shapes, dtype=dtype)


def small_hash(**options: Any) -> racecore.SoftLSH:
    return racecore.SoftLSH.random(
        **{"head_dim": 8, "n_tables": 3, "n_planes": 2, "beta": 1.0, "rng": 0, **options}
    )


def forward_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    d_out: np.ndarray,
    lsh: racecore.SoftLSH,
    *,
    d_state: Any = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return everything that a forward and a backward call can return."""
    out, saved, state = racecore.attention_forward(q, k, v, lsh, return_state=True, **options)
    grads = racecore.attention_backward(d_out, saved, d_state=d_state)
    results = {
        "out": out,
        "mass": state.mass,
        "value_sum": state.value_sum,
        "lengths": state.lengths,
    }
    results |= {
        name: np.asarray(getattr(grads, name))
        for name in ("query", "key", "value", "planes", "beta")
    }
    if grads.state is not None:
        results |= {"d_mass": grads.state.mass, "d_value_sum": grads.state.value_sum}
    return results


def different_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if found[name].tobytes() != expected[name].tobytes()]


# Values


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(np.float64, 1e-13), (np.float32, 3e-6)])
def test_constant_values_come_out_and_leave_no_gradient(
    backend: str, is_causal: bool, dtype: Any, rounding: float
) -> None:
    q, k, v, d_out = inputs(300, dtype=dtype)
    v[...] = [3, -2, 0.5, 7, 1]
    result = forward_backward(q, k, v, d_out, small_hash(), is_causal=is_causal, backend=backend)
    np.testing.assert_allclose(
        result["out"], np.broadcast_to(v[0], result["out"].shape), rtol=rounding
    )
    for name in ("query", "key"):
        assert np.abs(result[name]).max() < 100 * rounding, name
    assert np.abs(result["value"]).max() > 0.01


def test_constant_values_under_bucket_mean_are_right_up_to_eps(backend: str) -> None:
    q, k, v, d_out = inputs(300)
    v[...] = 3
    result = forward_backward(q, k, v, d_out, small_hash(), readout="bucket_mean", backend=backend)
    error = np.abs(result["out"] / 3 - 1).max()
    smallest_mass = result["mass"].min()
    assert smallest_mass > 1
    assert error < 1e-6 / smallest_mass
    assert np.abs(result["query"]).max() < 1e-4
    assert np.abs(result["key"]).max() < 1e-4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_linear_in_the_values(backend: str, readout: str, is_causal: bool) -> None:
    q, k, v, _ = inputs(100)
    (w,) = rows(1, v.shape)

    def attend(values: np.ndarray) -> np.ndarray:
        return racecore.attention(
            q, k, values, small_hash(), readout=readout, is_causal=is_causal, backend=backend
        )

    np.testing.assert_allclose(
        attend(2 * v - 3 * w), 2 * attend(v) - 3 * attend(w), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("readout", READOUTS)
def test_the_order_of_keys_does_not_matter(backend: str, readout: str) -> None:
    q, k, v, d_out = inputs(LONG)
    mask = np.random.default_rng(2).random((1, LONG)) < 0.8
    order = np.random.default_rng(1).permutation(LONG)
    one = forward_backward(
        q, k, v, d_out, small_hash(), readout=readout, key_mask=mask, backend=backend
    )
    other = forward_backward(
        q,
        k[order],
        v[order],
        d_out,
        small_hash(),
        readout=readout,
        key_mask=mask[:, order],
        backend=backend,
    )
    for name in ("out", "mass", "value_sum", "query", "planes", "beta"):
        assert relative_error(other[name], one[name]) < 1e-11, name
    for name in ("key", "value"):
        assert relative_error(other[name], one[name][order]) < 1e-11, name


# Causality


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_token_cannot_change_the_past(backend: str, readout: str, dtype: Any) -> None:
    n_tokens = 1100
    q, k, v, _ = inputs(n_tokens, dtype=dtype)
    options: dict[str, Any] = {"is_causal": True, "readout": readout, "backend": backend}
    before = racecore.attention(q, k, v, small_hash(), **options)
    for t, new in itertools.product(
        (0, 1, 31, 32, 33, 63, 64, 500, 1023, 1024, 1025, 1099), (2.5, np.nan, np.inf)
    ):
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[t] = new
        with np.errstate(all="ignore"):
            after = racecore.attention(*changed, small_hash(), **options)
        assert after[:t].tobytes() == before[:t].tobytes(), (
            f"token {t} set to {new} changed the past"
        )
        assert (after[t] != before[t]).any(), f"token {t} set to {new} changed nothing"


@pytest.mark.parametrize("readout", READOUTS)
def test_an_output_cannot_change_the_gradient_of_its_future(backend: str, readout: str) -> None:
    q, k, v, d_out = inputs(1100, dtype=np.float32)
    _, saved = racecore.attention_forward(
        q, k, v, small_hash(), is_causal=True, readout=readout, backend=backend
    )
    before = racecore.attention_backward(d_out, saved)
    for t in (0, 31, 32, 63, 64, 500, 1023, 1024, 1098):
        changed = d_out.copy()
        changed[t] = 2.5
        after = racecore.attention_backward(changed, saved)
        for name in ("key", "value"):
            was, now = getattr(before, name), getattr(after, name)
            assert now[t + 1 :].tobytes() == was[t + 1 :].tobytes(), f"{name} after token {t}"
            assert (now[: t + 1] != was[: t + 1]).any(), f"{name} up to token {t}"
        others = np.arange(1100) != t
        assert after.query[others].tobytes() == before.query[others].tobytes()


@pytest.mark.parametrize("poisoned", ["query", "key", "value", "d_out"])
@pytest.mark.parametrize("readout", READOUTS)
def test_gradients_that_never_met_a_bad_token_stay_finite(readout: str, poisoned: str) -> None:
    """A NaN in token 101 reaches, also inside its block of tokens, no gradient that does not depend
    on it.
    """
    query, key, value, d_out = rows(
        4, (2, 200, 4, 8), (2, 200, 2, 8), (2, 200, 2, 5), (2, 200, 4, 5)
    )
    arrays = {"query": query, "key": key, "value": value, "d_out": d_out}
    arrays[poisoned][0, 101, 0] = np.nan
    finite = {}
    for backend in ("reference", "cpu"):
        _, saved = racecore.attention_forward(
            query,
            key,
            value,
            small_hash(),
            is_causal=True,
            readout=readout,
            backend=backend,
            wrt=("query", "key", "value"),
        )
        grads = racecore.attention_backward(d_out, saved)
        finite[backend] = [
            np.isfinite(array).all(axis=3) for array in (grads.query, grads.key, grads.value)
        ]
    for name, reference, cpu in zip(
        ("query", "key", "value"), finite["reference"], finite["cpu"], strict=True
    ):
        np.testing.assert_array_equal(
            cpu, reference, err_msg=f"finite rows of the gradient of {name}"
        )
        assert cpu[1].all()  # the other sequence
        assert cpu[0, :, -1].all()  # the other key/value head
    assert finite["cpu"][0][:, :101].all()
    assert not finite["cpu"][0][0, 101, 0]
    if poisoned in ("query", "d_out"):
        assert finite["cpu"][1][:, 102:].all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bad_query_stays_in_its_row(backend: str, is_causal: bool) -> None:
    q, k, v, _ = inputs(100, dtype=np.float32)
    bad = q.copy()
    bad[40] = np.nan
    before = racecore.attention(q, k, v, small_hash(), is_causal=is_causal, backend=backend)
    with np.errstate(all="ignore"):
        after = racecore.attention(bad, k, v, small_hash(), is_causal=is_causal, backend=backend)
    others = np.arange(100) != 40
    assert after[others].tobytes() == before[others].tobytes()
    assert np.isnan(after[40]).all()


# Masks and rows that see nothing


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf])
def test_what_stands_under_the_mask_changes_nothing(
    backend: str, readout: str, is_causal: bool, rubbish: float
) -> None:
    q, k, v, d_out = inputs(1100, dtype=np.float32)
    mask = np.random.default_rng(3).random((1, 1100)) < 0.7
    mask[0, :40] = False
    mask[0, 64:96] = False
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "readout": readout,
        "key_mask": mask,
        "backend": backend,
    }
    clean = forward_backward(q, k, v, d_out, small_hash(), **options)
    k[~mask[0]], v[~mask[0]] = rubbish, rubbish
    dirty = forward_backward(q, k, v, d_out, small_hash(), **options)
    assert different_bits(dirty, clean) == []
    assert not dirty["key"][~mask[0]].any()
    assert not dirty["value"][~mask[0]].any()
    assert dirty["key"][mask[0]].all()
    assert dirty["lengths"] == [mask.sum()]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_that_see_no_key_are_zero_with_zero_gradients(
    backend: str, readout: str, dtype: Any
) -> None:
    q, k, v, d_out = (np.stack([x, x]) for x in inputs(70, dtype=dtype))
    mask = np.ones((2, 70), bool)
    mask[0], mask[1, :40] = (
        False,
        False,
    )  # the first sequence sees nothing, the second nothing before token 40
    options: dict[str, Any] = {"readout": readout, "key_mask": mask, "backend": backend}
    for is_causal, n_blind in ((False, 0), (True, 40)):
        result = forward_backward(q, k, v, d_out, small_hash(), is_causal=is_causal, **options)
        for name in ("out", "query"):
            assert not result[name][0].any(), name
            assert not result[name][1, :n_blind].any(), name
            assert result[name][1, n_blind + 1 :].any(axis=(-2, -1)).all(), name
        for name in ("key", "value"):
            assert not result[name][~mask].any(), name
        assert all(np.isfinite(x.astype(np.float64)).all() for x in result.values())


@pytest.mark.parametrize("readout", READOUTS)
def test_without_any_key_everything_is_zero(backend: str, readout: str) -> None:
    q, k, v, d_out = inputs(6)
    result = forward_backward(
        q, k[:0], v[:0], d_out, small_hash(), readout=readout, backend=backend
    )
    assert result["out"].shape == (6, 2, 5)
    for name in ("out", "mass", "value_sum", "query", "planes", "beta"):
        assert not result[name].any(), name
    assert result["key"].shape == (0, 1, 8)
    state = racecore.RaceState.zeros(small_hash(), batch=1, n_kv_heads=1, value_dim=5)
    assert not state.attend(q, readout=readout, backend=backend).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 0], [0, 0, 0]])
def test_no_token_at_all(backend: str, is_causal: bool, bounds: list[int] | None) -> None:
    for batch in (1, 2) if bounds is None else (1,):
        q, k, v, d_out = (np.stack([x] * batch) for x in inputs(0))
        n = batch if bounds is None else len(bounds) - 1
        initial = make_state(small_hash(), np.ones((n, 1, 3, 4)), np.ones((n, 1, 3, 4, 5)), 1)
        result = forward_backward(
            q,
            k,
            v,
            d_out,
            small_hash(),
            is_causal=is_causal,
            cu_seqlens=bounds,
            initial_state=initial,
            d_state=initial,
            backend=backend,
        )
        assert result["out"].shape == (batch, 0, 2, 5)
        for name in ("mass", "d_mass", "value_sum", "d_value_sum"):
            assert (result[name] == 1).all(), name


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_denominator_below_float32_gives_a_row_of_zeros(backend: str, is_causal: bool) -> None:
    """Query and key on opposite sides of every plane of a hard hash: a weight of 1e-69 is 0 in
    float32, not in float64.
    """
    lsh = racecore.SoftLSH(np.eye(4)[None], 20.0)
    q, k = np.full((3, 1, 4), 30.0), np.full((3, 1, 4), -30.0)
    v = np.full((3, 1, 2), 5.0)
    exact = forward_backward(q, k, v, v, lsh, is_causal=is_causal, backend=backend)
    np.testing.assert_allclose(exact["out"], 5)
    with np.errstate(under="ignore"):
        single = forward_backward(
            *(x.astype(np.float32) for x in (q, k, v, v)), lsh, is_causal=is_causal, backend=backend
        )
    assert not single["out"].any()
    for name in ("query", "key", "value", "planes", "beta"):
        assert not single[name].any(), name


# Bits


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_inputs_are_never_modified(backend: str, readout: str, is_causal: bool) -> None:
    q, k, v, d_out = inputs(LONG, dtype=np.float32)
    mask = np.random.default_rng(0).random((1, LONG)) < 0.5
    initial = make_state(small_hash(), np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 4, 5)), 1)
    d_state = make_state(small_hash(), np.ones((1, 1, 3, 4)), np.ones((1, 1, 3, 4, 5)), 1)
    arrays = [
        q,
        k,
        v,
        d_out,
        mask,
        initial.mass,
        initial.value_sum,
        initial.lengths,
        d_state.mass,
        d_state.value_sum,
    ]
    before = [x.tobytes() for x in arrays]
    forward_backward(
        q,
        k,
        v,
        d_out,
        small_hash(),
        readout=readout,
        is_causal=is_causal,
        key_mask=mask,
        initial_state=initial,
        d_state=d_state,
        backend=backend,
    )
    assert [x.tobytes() for x in arrays] == before


CASES = {
    "bidirectional": {},
    "causal": {"is_causal": True},
    "causal bucket_mean": {"is_causal": True, "readout": "bucket_mean"},
    "packed": {"is_causal": True, "cu_seqlens": [0, 5, 5, 1100, 1130, LONG]},
    "causal masked": {
        "is_causal": True,
        "key_mask": np.random.default_rng(5).random((1, LONG)) < 0.6,
    },
    "masked": {
        "key_mask": np.random.default_rng(4).random((1, LONG)) < 0.6,
        "readout": "bucket_mean",
    },
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def test_the_same_bits_for_any_number_of_threads(case: dict[str, Any]) -> None:
    arrays = inputs(LONG, n_heads=6, n_kv_heads=3, dtype=np.float32)
    with racecore.threads(1):
        expected = forward_backward(*arrays, small_hash(), **case)
    for n in (2, 8):
        with racecore.threads(n):
            assert (
                different_bits(forward_backward(*arrays, small_hash(), **case), expected) == []
            ), f"{n} threads"


def test_the_same_bits_in_any_order_of_work(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads race seldom on a small machine: run every piece alone, and the last ones first."""
    arrays = inputs(LONG, n_heads=6, n_kv_heads=3, dtype=np.float32)
    expected = forward_backward(*arrays, small_hash(), **case)
    pieces: list[int] = []

    def backwards(
        launch: Callable[[int, int], object], n_tasks: int, tasks_per_launch: int
    ) -> None:
        pieces.append(n_tasks)
        for task in reversed(range(n_tasks)):
            launch(task, task + 1)

    monkeypatch.setattr(call, "run", backwards)
    assert different_bits(forward_backward(*arrays, small_hash(), **case), expected) == []
    assert max(pieces) > 1


CAUSAL = {name: case for name, case in CASES.items() if "is_causal" in case}


@pytest.mark.parametrize("case", CAUSAL.values(), ids=CAUSAL)
def test_the_same_bits_serial_and_segmented(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = inputs(LONG, n_heads=6, n_kv_heads=3, dtype=np.float32)
    found = []

    def recorded(call: call.Call) -> Any:
        found.append(serial_calls(call))
        return found[-1]

    serial_calls = causal.serial_calls
    monkeypatch.setattr(causal, "serial_calls", recorded)
    with racecore.threads(1):
        expected = forward_backward(*arrays, small_hash(), **case)
        assert all(found)
        monkeypatch.setattr(call, "_MAX_ROWS", 1)
        assert different_bits(forward_backward(*arrays, small_hash(), **case), expected) == []
        assert "cu_seqlens" in case or len(found[-1]) == 3
        monkeypatch.setattr(causal, "serial_calls", lambda call: [])
        assert different_bits(forward_backward(*arrays, small_hash(), **case), expected) == []


@pytest.mark.parametrize(
    ("n_tokens", "n_heads", "n_threads", "heads_of_a_task"),
    [
        (5000, 4, 2, 2),
        (5000, 4, 4, 1),
        (5000, 3, 1, 3),
        (5000, 6, 4, None),
        (5000, 1, 2, None),
        (300, 1, 2, 1),
    ],
)
def test_scans_are_serial_where_that_keeps_all_threads_busy(
    n_tokens: int,
    n_heads: int,
    n_threads: int,
    heads_of_a_task: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    serial_calls = causal.serial_calls
    monkeypatch.setattr(
        causal, "serial_calls", lambda call: found.append(serial_calls(call)) or found[-1]
    )
    q, k, v, _ = inputs(n_tokens, n_heads=n_heads, n_kv_heads=n_heads, dtype=np.float32)
    with racecore.threads(n_threads):
        racecore.attention(q, k, v, small_hash(), is_causal=True)
    sizes = {call.kv_heads_per_task for _, call in found[0]}
    assert sizes == (set() if heads_of_a_task is None else {heads_of_a_task})


def limits() -> Iterator[dict[str, Any]]:
    yield from ({"chunk_size": size} for size in (1, 7, 64, 1024, 1500, 10**9))
    yield {"memory_limit": "300kB"}


def test_the_same_bits_for_any_chunks(backend: str, case: dict[str, Any]) -> None:
    arrays = inputs(LONG, n_heads=2, dtype=np.float32)
    expected = forward_backward(*arrays, small_hash(), **case, backend=backend)
    for limit in limits():
        found = forward_backward(*arrays, small_hash(), **case, **limit, backend=backend)
        assert different_bits(found, expected) == [], limit


@pytest.mark.parametrize("limit", [{"chunk_size": 1}, {"memory_limit": "300kB"}], ids=str)
def test_limits_do_cut_a_sequence(limit: dict[str, Any]) -> None:
    """Otherwise the test before this one compares a computation with itself."""
    q, k, v, _ = inputs(LONG, dtype=np.float32)
    _, whole = racecore.attention_forward(q, k, v, small_hash(), is_causal=True)
    _, cut = racecore.attention_forward(q, k, v, small_hash(), is_causal=True, **limit)
    chunks = [len(saved.states[0] or []) for saved in (whole, cut)]
    assert chunks[1] > chunks[0] == 1


# States


@pytest.mark.parametrize("cut", [0, 1, 50, 1024, 1099, 1100])
@pytest.mark.parametrize("readout", READOUTS)
def test_a_causal_sequence_may_be_cut_anywhere(backend: str, readout: str, cut: int) -> None:
    q, k, v, d_out = inputs(1100)
    lsh = small_hash()
    d_final = make_state(lsh, *rows(7, (1, 1, 3, 4), (1, 1, 3, 4, 5)), 1)
    options: dict[str, Any] = {
        "is_causal": True,
        "readout": readout,
        "return_state": True,
        "backend": backend,
    }
    whole = forward_backward(
        q, k, v, d_out, lsh, d_state=d_final, is_causal=True, readout=readout, backend=backend
    )

    zero = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=1, value_dim=5)
    out_1, saved_1, middle = racecore.attention_forward(
        q[:cut], k[:cut], v[:cut], lsh, initial_state=zero, **options
    )
    out_2, saved_2, final = racecore.attention_forward(
        q[cut:], k[cut:], v[cut:], lsh, initial_state=middle, **options
    )
    second = racecore.attention_backward(d_out[cut:], saved_2, d_state=d_final)
    first = racecore.attention_backward(d_out[:cut], saved_1, d_state=second.state)

    assert final.n_tokens == 1100
    found = {
        "out": np.concatenate([out_1, out_2]),
        "mass": final.mass,
        "value_sum": final.value_sum,
        "planes": first.planes + second.planes,
        "beta": first.beta + second.beta,
    }
    for name in ("query", "key", "value"):
        found[name] = np.concatenate([getattr(first, name), getattr(second, name)])
    for name, array in found.items():
        assert relative_error(array, whole[name]) < 1e-11, name


@pytest.mark.parametrize("cut", [0, 1, 50, 130])
@pytest.mark.parametrize("readout", READOUTS)
def test_keys_may_come_in_two_halves(backend: str, readout: str, cut: int) -> None:
    q, k, v, _ = inputs(130)
    q, d_out = rows(5, (20, 2, 8), (20, 2, 5))
    lsh = small_hash()
    whole = forward_backward(q, k, v, d_out, lsh, readout=readout, backend=backend)

    options: dict[str, Any] = {"readout": readout, "return_state": True, "backend": backend}
    _, saved_1, middle = racecore.attention_forward(q[:0], k[:cut], v[:cut], lsh, **options)
    out, saved_2, final = racecore.attention_forward(
        q, k[cut:], v[cut:], lsh, initial_state=middle, **options
    )
    second = racecore.attention_backward(d_out, saved_2)
    first = racecore.attention_backward(d_out[:0], saved_1, d_state=second.state)
    found = {
        "out": out,
        "mass": final.mass,
        "query": second.query,
        "planes": first.planes + second.planes,
        "beta": first.beta + second.beta,
        "key": np.concatenate([first.key, second.key]),
        "value": np.concatenate([first.value, second.value]),
    }
    for name, array in found.items():
        assert relative_error(array, whole[name]) < 1e-11, name


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_prefill_and_single_tokens_equal_all_at_once(
    backend: str, dtype: Any, limit: float
) -> None:
    q, k, v, _ = inputs(100, n_heads=4, n_kv_heads=2, dtype=dtype)
    lsh = small_hash()
    at_once = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=2, value_dim=5)
    at_once.append(k, v)
    out = racecore.attention(q, k, v, lsh, is_causal=True, backend=backend)

    state = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=2, value_dim=5)
    state.append(k[:70], v[:70])
    state.append(k[70:70], v[70:70])
    for t in range(70, 100):
        state.append(k[t : t + 1], v[t : t + 1])
        assert (
            relative_error(state.attend(q[t : t + 1], backend=backend), out[t : t + 1]) < 10 * limit
        )
    assert state.n_tokens == at_once.n_tokens == 100
    assert relative_error(state.mass, at_once.mass) < limit
    assert relative_error(state.value_sum, at_once.value_sum) < limit


# Ranges


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_finite_for_inputs_of_any_size(
    backend: str, readout: str, is_causal: bool, dtype: Any
) -> None:
    signs = [np.sign(x) for x in inputs(65)]
    for size, size_of_values in itertools.product((1e-30, 1e-7, 1.0, 300.0, 6e4), repeat=2):
        sizes = (size, size, size_of_values, 1.0)
        q, k, v, d_out = ((x * s).astype(dtype) for x, s in zip(signs, sizes, strict=True))
        assert np.isfinite(v.astype(np.float64)).all()
        with np.errstate(under="ignore", over="ignore"):  # a gradient may exceed float16
            result = forward_backward(
                q, k, v, d_out, small_hash(), is_causal=is_causal, readout=readout, backend=backend
            )
        checked = ["out", "mass", "value_sum", "value", "planes", "beta"]
        checked += [] if dtype == np.float16 and size_of_values > 1 else ["query", "key"]
        for name in checked:
            assert np.isfinite(result[name].astype(np.float64)).all(), (name, sizes)
        assert (
            np.abs(result["out"].astype(np.float64)).max()
            <= 1.01 * np.abs(v.astype(np.float64)).max()
        )


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("readout", READOUTS)
def test_finite_for_any_beta(backend: str, readout: str, is_causal: bool, spread: float) -> None:
    q, k, v, d_out = inputs(65, dtype=np.float32)
    for beta in (0.0, 1e-3, 1.0, 5.0, 10.0, 20.0):
        lsh = small_hash(n_planes=5, beta=beta)
        with np.errstate(under="ignore"):
            result = forward_backward(
                spread * q,
                spread * k,
                v,
                d_out,
                lsh,
                is_causal=is_causal,
                readout=readout,
                backend=backend,
            )
        for name, array in result.items():
            assert np.isfinite(array).all(), (name, beta)
        # every row of phi sums to 1 in every table
        np.testing.assert_allclose(result["mass"].sum(axis=-1), 65, rtol=1e-6)


# Heads


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(8, 2), (3, 1), (10, 2), (6, 3)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_grouped_queries_equal_repeated_keys(
    backend: str, n_heads: int, n_kv_heads: int, is_causal: bool, per_head: bool
) -> None:
    q, k, v, d_out = inputs(70, n_heads=n_heads, n_kv_heads=n_kv_heads)
    lsh = small_hash(n_heads=n_heads if per_head else None)
    options: dict[str, Any] = {"is_causal": is_causal, "backend": backend}
    grouped = forward_backward(q, k, v, d_out, lsh, **options)
    ratio = n_heads // n_kv_heads
    repeated = forward_backward(
        q, k.repeat(ratio, axis=1), v.repeat(ratio, axis=1), d_out, lsh, **options
    )
    for name in ("key", "value"):
        repeated[name] = repeated[name].reshape(70, n_kv_heads, ratio, -1).sum(axis=2)
    for name in ("out", "query", "key", "value", "planes", "beta"):
        assert relative_error(grouped[name], repeated[name]) < 1e-12, name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n_tables", [2, 1])
def test_bfloat16_keys_that_state_heads_share(is_causal: bool, n_tables: int) -> None:
    """Sizes at which products read bfloat16 in place: a second state head found no copy to read."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    shapes = [(1, 70, 4, 32), (1, 70, 2, 32), (1, 70, 2, 32), (1, 70, 4, 32)]
    arrays = [x.astype(ml_dtypes.bfloat16) for x in rows(0, *shapes)]
    # four planes, or eight buckets
    lsh = racecore.SoftLSH.random(32, n_tables, 4 // n_tables, rng=0, n_heads=4)
    if n_tables == 1:
        lsh = racecore.SoftLSH.random(32, 1, 3, rng=0, n_heads=4)
    found, expected = (
        forward_backward(
            *(x.astype(dtype) for x in arrays), lsh, is_causal=is_causal, backend="cpu"
        )
        for dtype in (ml_dtypes.bfloat16, np.float32)
    )
    for name in ("out", "query", "key", "value", "planes", "beta"):
        assert relative_error(found[name].astype(np.float64), expected[name]) < 1e-2, name


@pytest.mark.parametrize("is_causal", [False, True])
def test_more_heads_than_16_bits_count(is_causal: bool) -> None:
    """Batch times heads above 65,535, the largest grid of many launchers."""
    batch, heads = 257, 256
    q, k, v, d_out = rows(0, *[(batch, 2, heads, 2)] * 2, *[(batch, 2, heads, 1)] * 2)
    lsh = racecore.SoftLSH.random(head_dim=2, n_tables=1, n_planes=1, rng=0)
    found = forward_backward(q, k, v, d_out, lsh, is_causal=is_causal)
    out, mass, _ = oracle.attention(q, k, v, lsh.planes, 1.0, is_causal=is_causal)
    grads = oracle.gradients(q, k, v, lsh.planes, 1.0, d_out, is_causal=is_causal)
    for name, expected in {"out": out, "mass": mass, **grads}.items():
        assert relative_error(found[name], expected) < 1e-10, name


# Long inputs


@pytest.mark.parametrize(("n_tokens", "head_dim"), [(75_000_000, 1), (2**22 + 3, 512)])
def test_the_mass_of_many_identical_keys(n_tokens: int, head_dim: int) -> None:
    """A float32 sum stands still at 2^24; the wider input has more than 2^31 elements."""
    lsh = racecore.SoftLSH.random(head_dim=head_dim, n_tables=1, n_planes=1, rng=0)
    key = np.full((1, 1, head_dim), 0.1, np.float32)
    value = np.full((1, 1, 1), 0.3, np.float32)
    state = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=1, value_dim=1)
    state.append(
        np.broadcast_to(key, (n_tokens, 1, head_dim)), np.broadcast_to(value, (n_tokens, 1, 1))
    )
    phi = oracle.soft_hash(key[None].astype(np.float64), lsh.planes, 1.0)[0, 0, 0]  # [L, R]
    np.testing.assert_allclose(state.mass[0, 0], n_tokens * phi, rtol=1e-6)
    np.testing.assert_allclose(state.value_sum[0, 0, ..., 0], n_tokens * phi * 0.3, rtol=1e-6)
    assert state.n_tokens == n_tokens


@pytest.mark.parametrize("is_causal", [False, True])
def test_offsets_beyond_32_bits(backend: str, is_causal: bool, tmp_path: Any) -> None:
    """41 tokens that stand more than 2^31 elements apart, in a file that is nearly all hole."""
    n_tokens, step, width = 41, 2**20, 64
    path = tmp_path / "sparse"
    path.touch()
    shape = (40 * step + 1, 1, width)
    assert np.prod(shape) > 2**31
    with path.open("r+b") as file:
        file.truncate(2 * int(np.prod(shape)))
    far = np.memmap(path, np.float16, "r+", shape=shape)[::step]
    (near,) = rows(0, (n_tokens, 1, width), dtype=np.float16)
    far[...] = near
    lsh = racecore.SoftLSH.random(head_dim=width, rng=0)
    options: dict[str, Any] = {"is_causal": is_causal, "backend": backend}
    expected = forward_backward(near, near, near, near, lsh, **options)
    found = forward_backward(far, far, far, far, lsh, **options)
    assert different_bits(found, expected) == []
