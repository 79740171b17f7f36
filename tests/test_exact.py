"""The exact angular kernel, and that RACE converges to it."""

import numpy as np
import pytest

import racecore


def brute(q, k, v, power, causal):
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            n = i + 1 if causal else len(k)
            cosine = k[:n, g] @ q[i, h] / np.linalg.norm(k[:n, g], axis=1) / np.linalg.norm(q[i, h])
            weight = (1 - np.arccos(cosine) / np.pi) ** power
            out[i, h] = weight @ v[:n, g] / weight.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_matches_a_loop(causal):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((300, 4, 5)),
        rng.standard_normal((300, 2, 5)),
        rng.standard_normal((300, 2, 3)),
    )
    out = racecore.exact.angular_attention(q, k, v, 3, is_causal=causal)
    np.testing.assert_allclose(out, brute(q, k, v, 3, causal), rtol=1e-10, atol=1e-12)
    batched = racecore.exact.angular_attention(
        *(x[None].astype(np.float32) for x in (q, k, v)), 3, is_causal=causal
    )
    assert batched.dtype == np.float32
    np.testing.assert_allclose(batched[0], out, rtol=1e-4, atol=1e-5)


def test_race_converges_to_it():
    """Many tables and hard hashes leave only the variance of the tables (Theorem 1)."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((200, 1, 16)) for _ in range(3))
    exact = racecore.exact.angular_attention(q, k, v, 2)
    errors = []
    for n_tables in (8, 128, 2048):
        lsh = racecore.SoftLSH.random(16, n_tables, 2, beta=20.0, rng=2)
        errors.append(np.sqrt(((racecore.attention(q * 50, k * 50, v, lsh) - exact) ** 2).mean()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_bad_values_stay_where_they_are():
    rng = np.random.default_rng(0)
    for poisoned in range(3):
        arrays = [rng.standard_normal((40, 1, 4)) for _ in range(3)]
        arrays[poisoned][30] = np.nan
        out = racecore.exact.angular_attention(*arrays, 2, is_causal=True)
        assert np.isfinite(out[:30]).all()
        assert np.isnan(out[30]).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_lengths_of_rows_do_not_matter(scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((20, 1, 4)) for _ in range(3))
    expected = racecore.exact.angular_attention(q, k, v, 3)
    np.testing.assert_allclose(
        racecore.exact.angular_attention(q * scale, k * scale, v, 3), expected, rtol=1e-10
    )


def test_a_large_power_picks_the_nearest_key():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((20, 1, 4)), rng.standard_normal((20, 1, 2))
    np.testing.assert_allclose(racecore.exact.angular_attention(k, k, v, 1e6), v)


def test_power_must_be_positive():
    x = np.ones((2, 1, 3))
    for power in (0, -1, np.nan, np.inf, "2", True, 1j):
        with pytest.raises(ValueError, match="power must be a positive number"):
            racecore.exact.angular_attention(x, x, x, power)
    assert not racecore.exact.angular_attention(x, x[:0], x[:0], 2).any()
