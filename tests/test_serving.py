"""Decoding from a RaceState: one token and many, ragged batches, snapshots, float32 states; to the
bit where the docs say so.
"""

from __future__ import annotations

import gc
import pathlib
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import oracle
import pytest
from devices import BACKENDS, fetch, put

import racecore
from racecore.ops.decoding import cpu as decoding
from racecore.ops.soft_hash import planes
from racecore.ops.soft_hash.cpu import soft_hash
from racecore.runtime import files, progress

# B, H, G, D, V, L, P: whole vectors and tails of both dtypes, groups of all sizes, one of more
# heads than a block has rows
SIZES = [
    (1, 4, 4, 16, 16, 2, 2),
    (2, 4, 2, 6, 5, 3, 2),
    (3, 8, 1, 16, 20, 4, 4),
    (2, 80, 2, 16, 32, 2, 3),
    (1, 66, 33, 8, 24, 1, 1),
]
BATCH, H, G, D, V = 3, 4, 2, 6, 5


def rows(sizes, n_tokens, dtype=np.float32, seed=0):
    batch, n_heads, n_kv_heads, head_dim, value_dim, *_ = sizes
    rng = np.random.default_rng(seed)
    shapes = ((n_heads, head_dim), (n_kv_heads, head_dim), (n_kv_heads, value_dim))
    return [
        rng.standard_normal((batch, n_tokens, *shape)).astype(np.float32).astype(dtype)
        for shape in shapes
    ]


def make(sizes=(BATCH, H, G, D, V, 3, 2), n_tokens=20, per_head="", dtype=np.float64, seed=7):
    """Return a state that has seen some tokens; planes, beta, both or nothing `per_head`."""
    batch, n_heads, n_kv_heads, head_dim, value_dim, n_tables, n_planes = sizes
    beta = np.linspace(0.5, 2, n_heads) if "beta" in per_head else 1.2
    own_planes = n_heads if "planes" in per_head else None
    lsh = racecore.SoftLSH.random(
        head_dim, n_tables, n_planes, beta=beta, rng=0, n_heads=own_planes
    )
    state = racecore.RaceState.zeros(lsh, batch, n_kv_heads, value_dim, dtype=dtype)
    _, key, value = rows(sizes, n_tokens, seed=seed)
    state.append(key, value)
    return state


def assert_same(a, b):
    """Assert that two states, or what a snapshot and a state hold, have the same bits."""
    assert a.sketch.flat.dtype == b.sketch.flat.dtype
    assert fetch(a.sketch.flat).tobytes() == fetch(b.sketch.flat).tobytes()
    np.testing.assert_array_equal(a.lengths, b.lengths)


# One token
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("per_head", ["", "beta", "planes and beta"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_step_is_append_and_attend_to_the_bit(sizes, per_head, dtype, readout):
    fused = make(sizes, per_head=per_head)
    apart = fused.copy()
    for seed in range(2):
        query, key, value = rows(sizes, 1, dtype, seed)
        out = fused.step(query, key, value, readout=readout)
        apart.append(key, value)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, apart.attend(query, readout=readout))
        assert_same(fused, apart)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_step_of_a_float32_state_reads_out_the_rounded_sums(sizes, dtype):
    state = make(sizes, dtype=np.float32)
    wide = state.astype(np.float64)
    query, key, value = rows(sizes, 1, dtype)
    out = state.step(query, key, value)
    wide.append(key, value)
    assert_same(state, wide.astype(np.float32))
    np.testing.assert_array_equal(out, state.attend(query))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("per_head", ["", "beta", "planes and beta"])
def test_every_backend_agrees_with_the_oracle(per_head, readout, backend):
    sizes = (2, 4, 2, 6, 5, 3, 2)
    history = rows(sizes, 4, np.float64)
    state = make(sizes, n_tokens=0, per_head=per_head)
    lsh = state.lsh
    expected, mass, value_sum = oracle.attention(
        *history, lsh.planes, lsh.beta, is_causal=True, readout=readout
    )
    for i in range(4):
        token = [put(x[:, i : i + 1].copy(), backend) for x in history]
        out = state.step(*token, readout=readout, backend=backend)
        np.testing.assert_allclose(fetch(out), expected[:, i : i + 1], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(fetch(state.mass), mass, rtol=1e-12)
    np.testing.assert_allclose(fetch(state.value_sum), value_sum, rtol=1e-11, atol=1e-13)
    assert state.n_tokens == 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backends_take_idle_members_masks_and_float32_states(dtype, backend):
    state = make(dtype=dtype)
    before, expected = state.copy(), state.copy()
    query, key, value = rows((BATCH, H, G, D, V), 1, np.float64)
    placed = [put(x, backend) for x in (query, key, value)]
    out = state.step(*placed, counts=[1, 0, 1], backend=backend)
    want = expected.step(query, key, value, counts=[1, 0, 1])
    again = fetch(
        state.attend(placed[0], backend=backend)
    )  # from what is stored: rounded, where that is float32
    np.testing.assert_allclose(fetch(out)[[0, 2]], again[[0, 2]], rtol=1e-12)
    tolerance = (
        {"rtol": 1e-11, "atol": 1e-13} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-6}
    )
    np.testing.assert_allclose(fetch(out), want, **tolerance)
    np.testing.assert_allclose(fetch(state.sketch.flat), expected.sketch.flat, **tolerance)
    assert fetch(state.sketch.flat)[1].tobytes() == before.sketch.flat[1].tobytes()
    assert not fetch(out)[1].any()
    assert state.dtype == dtype
    np.testing.assert_array_equal(state.lengths, [21, 20, 21])
    mask = np.array([[False], [True], [False]])
    held = fetch(state.sketch.flat)[[0, 2]].copy()
    key[[0, 2]], value[[0, 2]] = np.nan, np.nan
    placed = [put(x, backend) for x in (query, key, value)]
    out_of_two = state.step(*placed, key_mask=put(mask, backend), backend=backend)
    np.testing.assert_array_equal(fetch(state.sketch.flat)[[0, 2]], held)
    np.testing.assert_allclose(fetch(out_of_two)[[0, 2]], fetch(out)[[0, 2]], rtol=1e-6)
    np.testing.assert_array_equal(state.lengths, [21, 21, 21])


def test_any_layout_the_callers_array_and_one_sequence_without_its_batch():
    sizes = (1, 4, 2, 6, 5)
    query, key, value = rows(sizes, 1)
    state = make((*sizes, 3, 2))
    plain, three = state.copy(), state.copy()
    expected = plain.step(query, key, value)
    strided = [np.asfortranarray(np.repeat(x, 2, axis=3))[..., ::2] for x in (query, key, value)]
    kept = [x.copy() for x in strided]
    out = np.full((1, 1, 4, 10), np.nan, np.float32)[..., ::-2]
    assert state.step(*strided, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert_same(state, plain)
    for x, copy in zip(strided, kept, strict=True):
        np.testing.assert_array_equal(x, copy)
    snapshot = three.snapshot()
    for _ in range(2):  # the second call knows the shapes of the first
        three.restore(snapshot)
        np.testing.assert_array_equal(three.step(query[0], key[0], value[0]), expected[0])


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(decoding, "_BYTES_AT_ONCE", 1)
    query, key, value = rows((BATCH, H, G, D, V), 1)
    states = [make() for _ in range(3)]
    outs = []
    for n, state in zip((1, 2, 3), states, strict=True):
        with racecore.threads(n):
            outs.append(state.step(query, key, value))
    for out, state in zip(outs[1:], states[1:], strict=True):
        np.testing.assert_array_equal(out, outs[0])
        assert_same(state, states[0])
    whole = make()
    monkeypatch.undo()
    np.testing.assert_array_equal(whole.step(query, key, value), outs[0])
    assert_same(whole, states[0])


def test_an_interrupted_step_is_done_as_a_whole_or_not_at_all(monkeypatch):
    query, key, value = rows((BATCH, H, G, D, V), 1)
    before, expected = make(), make()
    expected.step(query, key, value)

    def interrupt(n_tokens):
        raise KeyboardInterrupt

    state = make()
    for tokens in ((query, key, value), rows((BATCH, H, G, D, V), 40)):
        with progress.reporting(interrupt), pytest.raises(KeyboardInterrupt):
            state.step(*tokens)
        assert_same(state, before)

    def one_task_and_no_more(work, n_tasks, per_launch):
        assert n_tasks == BATCH
        work(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "run", one_task_and_no_more)
    with pytest.raises(KeyboardInterrupt):
        state.step(query, key, value)
    assert_same(state, expected)


def test_a_step_unlike_the_last_one_is_checked_again():
    state = make()
    query, key, value = rows((BATCH, H, G, D, V), 1)
    state.step(query, key, value)
    before = state.copy()
    with pytest.raises(TypeError, match="one dtype"):
        state.step(query, key, value.astype(np.float64))
    with pytest.raises(ValueError, match=r"query must have shape \[3, Tq, H, 6\]"):
        state.step(query[..., :5], key, value)
    with pytest.raises(ValueError, match="key and value must have shapes"):
        state.step(query, key, value[..., :4])
    with pytest.raises(ValueError, match="readout must be one of"):
        state.step(query, key, value, readout="mean")
    with pytest.raises(TypeError, match="must be a NumPy array"):
        state.step(query.tolist(), key, value)
    with pytest.raises(ValueError, match="a query for every key, got Tq = 2 and Tk = 1"):
        state.step(query.repeat(2, axis=1), key, value)
    with pytest.raises(ValueError, match="use one"):
        state.step(query, key, value, key_mask=np.ones((BATCH, 1), bool), counts=[1, 1, 1])
    for counts, error, message in (
        ([1, 2, 0], ValueError, "between 0 and T = 1, got 0 ... 2"),
        ([1, -1, 0], ValueError, "between 0 and T"),
        ([1, 0], ValueError, r"shape \[B\] = \(3,\), got \(2,\)"),
        ([0.5, 1, 1], TypeError, "integers or bools"),
    ):
        with pytest.raises(error, match=message):
            state.step(query, key, value, counts=counts)
    with pytest.raises(ValueError, match="out overlaps"):
        state.step(query, key, value, out=query[..., :5])
    with pytest.raises(ValueError, match="out must have shape"):
        state.step(query, key, value, out=np.empty((BATCH, 1, H, V + 1), np.float32))
    assert_same(state, before)


def test_padded_planes_are_dropped_with_their_hash():
    gc.collect()
    n_before = len(planes._padded)
    outs = []
    for beta in (0.5, 3.0):  # the second hash may have the address of the first one
        state = racecore.RaceState.zeros(
            racecore.SoftLSH.random(D, 3, 2, beta=beta, rng=int(beta)), BATCH, G, V
        )
        _, key, value = rows((BATCH, H, G, D, V), 9)
        state.append(key, value)
        tokens = rows((BATCH, H, G, D, V), 1, seed=3)
        outs.append((state.copy().step(*tokens), state.copy().step(*tokens, backend="reference")))
        assert len(planes._padded) > n_before
        del state
        gc.collect()
        assert len(planes._padded) == n_before
    for fast, plain in outs:
        np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-6)


# Several tokens
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
def test_several_tokens_are_causal_attention_to_the_bit(readout, backend):
    state = make()
    tokens = [put(x, backend) for x in rows((BATCH, H, G, D, V), 30)]
    expected, final = racecore.attention(
        *tokens,
        initial_state=state,
        return_state=True,
        is_causal=True,
        readout=readout,
        backend=backend,
    )
    np.testing.assert_array_equal(
        fetch(state.step(*tokens, readout=readout, backend=backend)), fetch(expected)
    )
    assert_same(state, final)


def test_a_prompt_in_pieces_of_whole_segments_has_the_bits_of_the_whole():
    sizes = (2, 2, 1, 6, 5, 2, 2)
    tokens = rows(sizes, 3100)
    whole, state, appended, at_once = (make(sizes, n_tokens=0) for _ in range(4))
    expected, final = racecore.attention(*tokens, state.lsh, is_causal=True, return_state=True)
    np.testing.assert_array_equal(whole.step(*tokens), expected)
    at_once.append(*tokens[1:])
    outs = []
    for start, stop in ((0, 1024), (1024, 3072), (3072, 3100)):
        outs.append(state.step(*(x[:, start:stop] for x in tokens)))
        appended.append(*(x[:, start:stop] for x in tokens[1:]))
    np.testing.assert_array_equal(np.concatenate(outs, axis=1), expected)
    for other in (whole, final):
        assert_same(state, other)
    assert_same(appended, at_once)


def test_a_prompt_in_any_pieces_equals_the_whole_to_rounding():
    sizes = (2, 2, 1, 6, 5, 2, 2)
    tokens = rows(sizes, 70, np.float64)
    whole, state = make(sizes, n_tokens=0), make(sizes, n_tokens=0)
    expected = whole.step(*tokens)
    cuts = [0, 0, 1, 2, 33, 33, 65, 66, 67, 68, 70]
    outs = [state.step(*(x[:, a:b] for x in tokens)) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(state.sketch.flat, whole.sketch.flat, rtol=1e-12, atol=1e-13)
    assert state.n_tokens == 70


@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_ragged_batch_equals_its_sequences_one_by_one(dtype, n_tokens):
    state = make(dtype=dtype)
    singles = [state.select([b]) for b in range(BATCH)]
    counts = np.array([n_tokens, 0, (n_tokens + 1) // 2])
    tokens = rows((BATCH, H, G, D, V), n_tokens)
    for x in tokens:
        for b, n in enumerate(counts):
            x[b, n:] = np.nan  # padding is never read
    out = state.step(*tokens, counts=counts)
    for b, n in enumerate(counts):
        expected = singles[b].step(*(x[b : b + 1, :n] for x in tokens))
        np.testing.assert_array_equal(out[b, :n], expected[0])
        assert out[b, n:].tobytes() == bytes(out[b, n:].nbytes)
        assert_same(state.select([b]), singles[b])
    np.testing.assert_array_equal(state.lengths, 20 + counts)


def test_true_means_all_tokens():
    tokens = rows((BATCH, H, G, D, V), 3)
    by_bool, by_number = make(), make()
    out = by_bool.step(*tokens, counts=np.array([True, False, True]))
    np.testing.assert_array_equal(out, by_number.step(*tokens, counts=[3, 0, 3]))
    assert_same(by_bool, by_number)


def test_padding_on_the_left_is_masked():
    state = make(n_tokens=0)
    alone = state.select([1])
    tokens = rows((BATCH, H, G, D, V), 5)
    mask = np.ones((BATCH, 5), bool)
    mask[1, :3] = False
    out = state.step(*tokens, key_mask=mask)
    np.testing.assert_allclose(
        out[1:2, 3:], alone.step(*(x[1:2, 3:] for x in tokens)), rtol=1e-5, atol=1e-6
    )
    assert not out[1, :3].any()  # nothing has been seen yet
    np.testing.assert_array_equal(state.lengths, [5, 2, 5])


# Snapshots
# --------------------------------------------------------------------------------------------------

WRITES = {
    "step": lambda state: state.step(*rows((BATCH, H, G, D, V), 1)),
    "several": lambda state: state.step(*rows((BATCH, H, G, D, V), 7)),
    "append": lambda state: state.append(*rows((BATCH, H, G, D, V), 1)[1:]),
    "append many": lambda state: state.append(*rows((BATCH, H, G, D, V), 1500)[1:]),
    "merge": lambda state: state.merge(make(seed=9)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("write", WRITES)
def test_a_restored_state_has_the_bits_of_the_snapshot(write, dtype):
    state = make(dtype=dtype)
    before, after = state.copy(), state.copy()
    WRITES[write](after)
    snapshot = state.snapshot()
    for _ in range(2):  # it may be used again
        WRITES[write](state)
        assert_same(state, after)
        assert_same(snapshot, before)
        state.restore(snapshot)
        assert_same(state, before)


def test_a_snapshot_copies_nothing_before_the_next_write():
    state = make()
    snapshot = state.snapshot()
    assert state.snapshot() is snapshot
    assert np.shares_memory(snapshot.sketch.flat, state.mass)
    assert snapshot.n_tokens == 20
    WRITES["step"](state)
    assert not np.shares_memory(snapshot.sketch.flat, state.mass)
    owned = state.sketch.flat
    WRITES["step"](state)
    assert state.sketch.flat is owned  # copied once
    state.restore(snapshot)
    assert np.shares_memory(snapshot.sketch.flat, state.mass)
    kept = state.sketch.flat
    del snapshot
    WRITES["step"](state)
    # no copy for a snapshot that is gone
    assert state.sketch.flat is kept


def test_snapshots_are_independent_of_each_other():
    state = make()
    contents, snapshots = [], []
    for _ in range(3):
        contents.append(state.copy())
        snapshots.append(state.snapshot())
        WRITES["step"](state)
    for i in (2, 0, 1, 0):
        state.restore(snapshots[i])
        WRITES["append"](state)
        for snapshot, content in zip(snapshots, contents, strict=True):
            assert_same(snapshot, content)


def test_members_of_a_batch_are_restored_alone():
    state = make()
    before = state.copy()
    snapshot = state.snapshot()
    WRITES["step"](state)
    after = state.copy()
    state.restore(snapshot, [0, 2])
    assert_same(state.select([0, 2]), before.select([0, 2]))
    assert_same(state.select([1]), after.select([1]))
    state.restore(snapshot, np.array([False, True, False]))
    assert_same(state, before)
    assert_same(snapshot, before)
    with pytest.raises(IndexError):
        state.restore(snapshot, [3])
    with pytest.raises(TypeError, match="members must be integers"):
        state.restore(snapshot, [0.5])
    assert_same(state, before)


def test_a_snapshot_is_restored_in_its_own_state_only():
    state, other = make(), make()
    with pytest.raises(ValueError, match="another state"):
        other.restore(state.snapshot())
    with pytest.raises(TypeError, match="what snapshot returned, got RaceState"):
        state.restore(other)


# float32 states
# --------------------------------------------------------------------------------------------------


def test_the_dtype_of_a_state_stays(tmp_path):
    state = make(dtype=np.float32)
    assert state.mass.dtype == state.value_sum.dtype == state.dtype == np.float32
    assert make().dtype == np.float64
    state.save(tmp_path / "state.npz")
    loaded = racecore.RaceState.load(tmp_path / "state.npz")
    for other in (state.copy(), state.select([0, 1, 2]), loaded, pickle.loads(pickle.dumps(state))):
        assert_same(other, state)
    WRITES["step"](loaded)
    WRITES["append many"](loaded)
    assert loaded.dtype == np.float32
    assert_same(state.astype(np.float64).astype(np.float32), state)
    for dtype in (np.float16, "int32", "nonsense", None.__class__):
        with pytest.raises(ValueError, match=r"numpy\.float32 or numpy\.float64"):
            make(dtype=dtype)


@pytest.mark.parametrize("n_tokens", [3, 300, 1500])
def test_many_tokens_are_summed_in_float64_and_rounded_once(n_tokens):
    rounded = make(dtype=np.float32)
    wide = rounded.astype(np.float64)
    tokens = rows((BATCH, H, G, D, V), n_tokens, seed=5)
    rounded.append(*tokens[1:])
    wide.append(*tokens[1:])
    assert_same(rounded, wide.astype(np.float32))
    stepped, wide = make(dtype=np.float32), make(dtype=np.float32).astype(np.float64)
    np.testing.assert_array_equal(stepped.step(*tokens), wide.step(*tokens))
    assert_same(stepped, wide.astype(np.float32))


def test_a_float32_sum_stands_still_where_the_docs_say_so():
    lsh = racecore.SoftLSH(np.ones((1, 1, 4)), 0.0)  # every token adds 1/2 to both buckets
    ones = [np.ones((1, 1, 1, dim), np.float32) for dim in (4, 4, 1)]
    for dtype, grows in ((np.float32, False), (np.float64, True)):
        state = racecore.RaceState.zeros(lsh, 1, 1, 1, dtype=dtype)
        state.mass[...] = 2**24
        for _ in range(4):
            state.step(*ones)
        assert (state.mass == 2**24 + (2 if grows else 0)).all()
        state.append(*(x.repeat(8, axis=1) for x in ones[1:]))
        assert (state.mass == 2**24 + (6 if grows else 4)).all()


@pytest.mark.parametrize(("mine", "others"), [(np.float32, np.float64), (np.float64, np.float32)])
def test_merging_keeps_the_dtype_of_the_state_that_grows(mine, others):
    state, other = make(dtype=mine), make(dtype=others, seed=9)
    expected = (state.sketch.flat.astype(np.float64) + other.sketch.flat).astype(mine)
    state.merge(other)
    np.testing.assert_array_equal(state.sketch.flat, expected)
    assert state.dtype == mine


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_continues_a_float32_state(is_causal):
    rounded = make(dtype=np.float32)
    wide = rounded.astype(np.float64)
    tokens = rows((BATCH, H, G, D, V), 12)
    results = []
    for state in (rounded, wide):
        out, saved, final = racecore.attention_forward(
            *tokens, initial_state=state, is_causal=is_causal, return_state=True
        )
        assert final.dtype == np.float64
        grads = racecore.attention_backward(np.ones_like(out), saved, d_state=state)
        results.append(
            (
                out,
                final.mass,
                final.value_sum,
                grads.query,
                grads.key,
                grads.planes,
                grads.state.value_sum,
            )
        )
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_files_of_the_first_version_still_load(tmp_path):
    state = make()
    files.save(
        tmp_path / "old.npz",
        "racecore.RaceState",
        1,
        planes=state.lsh.planes,
        beta=np.asarray(state.lsh.beta),
        flat=state.sketch.flat,
        lengths=state.lengths,
        sizes=np.array([G, V]),
    )
    assert_same(racecore.RaceState.load(tmp_path / "old.npz"), state)


# The benchmark
# --------------------------------------------------------------------------------------------------


def test_the_loop_behind_the_table_of_errors_adds_as_a_step_does(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "asv_benchmarks"))
    import decoding as benchmark

    lsh = racecore.SoftLSH.random(8, 2, 2, rng=0)
    state = racecore.RaceState.zeros(lsh, 1, 1, 16, dtype=np.float32)
    looped = state.copy()
    query, key, value = rows((1, 1, 1, 8, 16), 50)
    for i in range(50):
        state.step(*(x[:, i : i + 1] for x in (query, key, value)))
    phi = soft_hash(key[0], *lsh.per_head(1))[:, 0]
    benchmark._add_one_by_one(
        phi, value[0, :, 0], looped.mass.reshape(-1), looped.value_sum.reshape(8, 16)
    )
    np.testing.assert_array_equal(looped.sketch.flat, state.sketch.flat)
    monkeypatch.setattr(benchmark, "CHUNK", 64)
    lines = list(benchmark.errors(1.0, (64, 256), head_dim=8))
    assert [line.split(" | ")[1] for line in lines] == ["64", "256"]
    assert all(0 < float(lines[1].split(" | ")[column]) < 1e-4 for column in (2, 3))
