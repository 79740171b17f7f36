"""RaceState: additive, mergeable, saved with a checksum, and never half-changed."""

import pickle

import numpy as np
import pytest

import racecore
from racecore.errors import CorruptFileError

B, T, G, D, V = 2, 50, 2, 6, 5


def make(seed=0, n_heads=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    lsh = racecore.SoftLSH.random(D, 3, 2, beta=1.2, rng=0, n_heads=n_heads)
    key = rng.standard_normal((B, T, G, D)).astype(dtype)
    value = rng.standard_normal((B, T, G, V)).astype(dtype)
    return lsh, key, value, racecore.RaceState.zeros(lsh, batch=B, n_kv_heads=G, value_dim=V)


@pytest.mark.parametrize("n_heads", [None, 4])
def test_shapes_and_sums(n_heads):
    lsh, key, value, state = make(n_heads=n_heads)
    state.append(key, value)
    heads = n_heads or G
    assert state.mass.shape == (B, heads, 3, 4)
    assert state.value_sum.shape == (B, heads, 3, 4, V)
    assert state.mass.dtype == state.value_sum.dtype == np.float64
    # probabilities of a token sum to 1 in every table
    np.testing.assert_allclose(state.mass.sum(axis=-1), T)
    summed = value.sum(axis=1).repeat(heads // G, axis=1)[:, :, None]
    np.testing.assert_allclose(
        state.value_sum.sum(axis=3), np.broadcast_to(summed, (B, heads, 3, V))
    )
    assert state.n_tokens == T
    np.testing.assert_array_equal(state.lengths, [T, T])
    assert state.lsh is lsh


def test_append_in_pieces_equals_append_at_once():
    _, key, value, whole = make()
    whole.append(key, value)
    *_, pieces = make()
    for start, stop in [(0, 0), (0, 1), (1, 30), (30, 30), (30, T)]:
        pieces.append(key[:, start:stop], value[:, start:stop])
    np.testing.assert_allclose(pieces.mass, whole.mass, rtol=1e-13)
    np.testing.assert_allclose(pieces.value_sum, whole.value_sum, rtol=1e-12, atol=1e-13)
    assert pieces.n_tokens == T


def test_attend_equals_bidirectional_attention():
    lsh, key, value, state = make()
    state.append(key, value)
    query = np.random.default_rng(5).standard_normal((B, 7, 4, D))
    for readout in ("ratio", "bucket_mean"):
        out = racecore.attention(query, key, value, lsh, readout=readout)
        np.testing.assert_array_equal(state.attend(query, readout=readout), out)


def test_one_sequence_may_leave_out_the_batch():
    lsh, key, value, _ = make()
    state = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=G, value_dim=V)
    state.append(key[0], value[0])
    query = np.random.default_rng(5).standard_normal((7, 4, D))
    np.testing.assert_array_equal(
        state.attend(query), racecore.attention(query, key[0], value[0], lsh)
    )


def test_an_empty_state_attends_to_zeros():
    *_, state = make()
    for readout in ("ratio", "bucket_mean"):
        out = state.attend(np.ones((B, 3, 2, D), np.float32), readout=readout)
        assert out.dtype == np.float32
        assert not out.any()


def test_masked_keys_do_not_count():
    _, key, value, state = make()
    mask = np.random.default_rng(1).random((B, T)) < 0.5
    state.append(key, value, key_mask=mask)
    np.testing.assert_array_equal(state.lengths, mask.sum(axis=1))
    np.testing.assert_allclose(
        state.mass.sum(axis=-1)[..., 0], np.repeat(mask.sum(axis=1)[:, None], G, axis=1)
    )


def test_merge_adds_in_any_order():
    _, key, value, whole = make()
    whole.append(key, value)
    shards = []
    for start in range(0, T, 13):
        *_, shard = make()
        shard.append(key[:, start : start + 13], value[:, start : start + 13])
        shards.append(shard)
    for order in (shards, shards[::-1]):
        *_, total = make()
        for shard in order:
            total.merge(shard)
        np.testing.assert_allclose(total.mass, whole.mass, rtol=1e-13)
        np.testing.assert_allclose(total.value_sum, whole.value_sum, rtol=1e-12, atol=1e-13)
        assert total.n_tokens == T


def test_merge_refuses_another_hash_or_size():
    lsh, key, value, state = make()
    other_hash = racecore.SoftLSH.random(D, 3, 2, beta=1.2, rng=9)
    with pytest.raises(ValueError, match="another hash.*fingerprint"):
        state.merge(racecore.RaceState.zeros(other_hash, B, G, V))
    with pytest.raises(ValueError, match="must agree"):
        state.merge(racecore.RaceState.zeros(lsh, B + 1, G, V))
    with pytest.raises(TypeError, match="only a RaceState"):
        state.merge(3)
    with pytest.raises(ValueError, match="another hash"):
        racecore.attention(key, key, value, other_hash, initial_state=state)


def test_copy_is_independent():
    _, key, value, state = make()
    copy = state.copy()
    state.append(key, value)
    assert not copy.mass.any()
    assert copy.n_tokens == 0


def test_select_repeats_and_reorders():
    _, key, value, state = make()
    state.append(key, value)
    chosen = state.select([1, 1, 0])
    np.testing.assert_array_equal(chosen.mass, state.mass[[1, 1, 0]])
    chosen.append(np.ones((3, 1, G, D)), np.ones((3, 1, G, V)))
    assert state.n_tokens == T
    assert chosen.n_tokens == T + 1
    assert state.select([]).batch == 0
    assert state.select([]).mass.shape == (0, G, 3, 4)
    assert state.select([]).value_sum.shape == (0, G, 3, 4, V)
    with pytest.raises(IndexError):
        state.select([2])
    with pytest.raises(TypeError, match="integers"):
        state.select([0.5])
    with pytest.raises(ValueError, match="one-dimensional"):
        state.select([[0]])


@pytest.mark.parametrize("n_heads", [None, 4])
def test_save_and_load(tmp_path, n_heads):
    lsh, key, value, state = make(n_heads=n_heads)
    state.append(key, value)
    state.save(tmp_path / "state.npz")
    loaded = racecore.RaceState.load(tmp_path / "state.npz")
    np.testing.assert_array_equal(loaded.mass, state.mass)
    np.testing.assert_array_equal(loaded.value_sum, state.value_sum)
    assert loaded.lsh == lsh
    assert (loaded.n_tokens, loaded.n_kv_heads, loaded.value_dim) == (T, G, V)
    loaded.append(key, value)  # a loaded state goes on
    assert loaded.n_tokens == 2 * T


def test_every_flipped_byte_of_the_numbers_is_noticed(tmp_path):
    _, key, value, state = make()
    state.append(key, value)
    path = tmp_path / "state.npz"
    state.save(path)
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(len(content), size=40):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            loaded = racecore.RaceState.load(path)
        except CorruptFileError:
            continue
        np.testing.assert_array_equal(loaded.mass, state.mass)  # the byte did not matter
        np.testing.assert_array_equal(loaded.value_sum, state.value_sum)


@pytest.mark.parametrize(
    ("key_shape", "value_shape"),
    [
        ((B, 3, G, D + 1), (B, 3, G, V)),
        ((B, 3, G, D), (B, 4, G, V)),
        ((B + 1, 3, G, D), (B + 1, 3, G, V)),
        ((3, D), (3, V)),
    ],
)
def test_a_bad_append_changes_nothing(key_shape, value_shape):
    _, key, value, state = make()
    state.append(key, value)
    before = state.copy()
    with pytest.raises(ValueError, match="key and value must have shapes"):
        state.append(np.ones(key_shape), np.ones(value_shape))
    with pytest.raises(TypeError, match="one dtype"):
        state.append(key, value.astype(np.float32))
    np.testing.assert_array_equal(state.mass, before.mass)
    assert state.n_tokens == T


def test_an_interrupted_append_changes_nothing(monkeypatch):
    from racecore.runtime import progress

    lsh, *_ = make()
    state = racecore.RaceState.zeros(lsh, batch=1, n_kv_heads=1, value_dim=V)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((1, 5000, 1, D)), rng.standard_normal((1, 5000, 1, V))
    state.append(key, value)
    before = state.copy()

    def interrupt(n_tokens):
        raise KeyboardInterrupt

    with progress.reporting(interrupt), pytest.raises(KeyboardInterrupt):
        state.append(key, value)
    np.testing.assert_array_equal(state.mass, before.mass)
    np.testing.assert_array_equal(state.value_sum, before.value_sum)
    assert state.n_tokens == 5000


def test_append_and_attend_compute_part_by_part(monkeypatch):
    """Temporary memory is bounded because a batch is cut into parts; the cut changes no bit."""
    from racecore import chunking

    lsh, *_ = make()
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((3, 2500, 1, D)), rng.standard_normal((3, 2500, 1, V))
    whole = racecore.RaceState.zeros(lsh, 3, 1, V)
    whole.append(key, value)
    expected = whole.attend(key)
    cut = []

    def one_by_one(problem):
        for i in range(len(problem.sequences)):
            cut.append(i)
            yield i, i + 1

    monkeypatch.setattr(chunking, "parts", one_by_one)
    state = racecore.RaceState.zeros(lsh, 3, 1, V)
    state.append(key, value)
    np.testing.assert_array_equal(state.mass, whole.mass)
    np.testing.assert_array_equal(state.value_sum, whole.value_sum)
    np.testing.assert_array_equal(state.attend(key), expected)
    assert cut == [0, 1, 2, 0, 1, 2]


def test_zeros_names_what_is_wrong():
    lsh = racecore.SoftLSH.random(D, n_heads=4, rng=0)
    with pytest.raises(ValueError, match="batch must be an integer of at least 0"):
        racecore.RaceState.zeros(lsh, -1, 1, 1)
    with pytest.raises(ValueError, match="n_kv_heads"):
        racecore.RaceState.zeros(lsh, 1, 0, 1)
    with pytest.raises(ValueError, match="4 heads of lsh must be a multiple of n_kv_heads, got 3"):
        racecore.RaceState.zeros(lsh, 1, 3, 1)
    with pytest.raises(TypeError, match="SoftLSH"):
        racecore.RaceState.zeros("lsh", 1, 3, 1)


def test_attend_names_what_is_wrong():
    *_, state = make()
    with pytest.raises(ValueError, match=r"query must have shape \[2, Tq, H, 6\]"):
        state.attend(np.ones((B, 3, 2, D + 1)))
    with pytest.raises(ValueError, match="multiple of the state's 2"):
        state.attend(np.ones((B, 3, 3, D)))
    with pytest.raises(ValueError, match="readout must be one of"):
        state.attend(np.ones((B, 3, 2, D)), readout="mean")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n_heads", "value_dim"), [(2, 32), (4, 48), (2, 20), (2, 24)])
def test_one_query_gets_the_same_bits_as_among_many(n_heads, value_dim, dtype):
    """One or two queries read the float64 state itself, many a rounded copy of it."""
    rng = np.random.default_rng(0)
    shapes = ((300, 2, 16), (300, 2, value_dim), (40, n_heads, 16))
    k, v, q = (rng.standard_normal((1, *shape), dtype=dtype) for shape in shapes)
    state = racecore.RaceState.zeros(
        racecore.SoftLSH.random(head_dim=16, n_tables=3, n_planes=3, beta=1.0, rng=0),
        batch=1,
        n_kv_heads=2,
        value_dim=value_dim,
    )
    state.append(k, v)
    together = state.attend(q)
    for n in (1, 2):
        alone = np.concatenate([state.attend(q[:, i : i + n]) for i in range(0, 40, n)], axis=1)
        np.testing.assert_array_equal(alone, together)


def test_pickles_name_modules_that_stay():
    """Pickles name a class by its module; those of version 0.1 name modules that have moved."""
    lsh = racecore.SoftLSH.random(D, 2, 2, rng=0)
    rng = np.random.default_rng(0)
    key, value = (rng.standard_normal((1, 70, 2, dim), dtype=np.float32) for dim in (D, 5))
    state, index = racecore.RaceState.zeros(lsh, 1, 2, 5), racecore.SocketIndex(lsh)
    state.append(key, value)
    index.append(key, value, backend="reference")
    content = pickle.dumps((state, index), protocol=2)
    assert b"racecore.state\nRaceState\n" in content
    new_name, old_name = b"racecore.sparse\nSocketIndex\n", b"racecore.socket_index\nSocketIndex\n"
    assert new_name in content
    for copy in (content, content.replace(new_name, old_name)):
        loaded_state, loaded_index = pickle.loads(copy)
        np.testing.assert_array_equal(loaded_state.value_sum, state.value_sum)
        np.testing.assert_array_equal(
            loaded_index.scores(key[:, -1:], backend="reference"),
            index.scores(key[:, -1:], backend="reference"),
        )
