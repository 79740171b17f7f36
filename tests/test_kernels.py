"""The shared rooms of the CPU kernels against their plain twins: exp, tanh, products, rows in and out, readouts."""

import ml_dtypes
import numba
import numpy as np
import pytest

from racecore.ops import blocks, elementary, products
from racecore.ops.cpu_call import scan


@numba.njit
def _apply_exp(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = elementary.exp_of_nonpositive(x[i])
    return out


@numba.njit
def _apply_tanh(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = elementary.tanh(x[i])
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-15)])
def test_exp(dtype, tolerance):
    x = -np.concatenate([np.linspace(0, 86, 20001), np.logspace(-30, 0, 2001)]).astype(dtype)
    np.testing.assert_allclose(_apply_exp(x), np.exp(x.astype(np.float64)), rtol=tolerance)
    assert 0 <= _apply_exp(np.array([-1e30], dtype))[0] < 2e-38
    assert np.isnan(_apply_exp(np.array([np.nan], dtype))[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 1e-15)])
def test_tanh(dtype, tolerance):
    x = np.concatenate([np.linspace(0, 12, 20001), np.logspace(-30, 1, 2001), [6e4, 3e38]]).astype(dtype)
    for sign in (1, -1):
        np.testing.assert_allclose(_apply_tanh(sign * x), sign * np.tanh(x.astype(np.float64)), rtol=tolerance)
    assert _apply_tanh(np.array([np.inf], dtype))[0] == 1
    assert np.isnan(_apply_tanh(np.array([np.nan], dtype))[0])


SIZES = [(1, 1, 1), (4, 3, 5), (7, 32, 60), (9, 17, 96), (64, 32, 130), (8, 8, 16), (13, 5, 24)]  # K, n, D


@pytest.mark.parametrize(("n_rows", "n", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-4)])
def test_products(n_rows, n, width, dtype, tolerance):
    rng = np.random.default_rng(0)
    m, x, c = (rng.standard_normal(shape).astype(dtype) for shape in ((n_rows, width), (n, width), (n_rows, n)))
    result = np.full((n_rows, n), np.nan, dtype)
    products.project(m, x, n_rows, n, result)
    np.testing.assert_allclose(result, m @ x.T, atol=tolerance)
    result = x.copy()
    products.expand(c, m, n_rows, n, result)
    np.testing.assert_allclose(result, x + c.T @ m, atol=tolerance)
    result = m.copy()
    products.accumulate(c, x, n_rows, n, result)
    np.testing.assert_allclose(result, m + c @ x, atol=tolerance)


@pytest.mark.parametrize("width", [9, 16, 48])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 31, 32])
def test_causal_expand(n, width):
    rng = np.random.default_rng(0)
    c, x, start = np.triu(rng.standard_normal((n, n))), rng.standard_normal((n, width)), rng.standard_normal((n, width))
    result = start.copy()
    products.expand_causal(c, x, n, result)
    np.testing.assert_allclose(result, start + c.T @ x, atol=1e-12)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_causal_expand_never_reads_the_future(poison):
    n = 13
    c, x = np.triu(np.ones((n, n))), np.ones((n, 16))
    x[7:] = poison
    result = np.zeros((n, 16))
    products.expand_causal(c, x, n, result)
    assert np.isfinite(result[:7]).all()
    assert not np.isfinite(result[7:]).any()


@pytest.mark.parametrize("lower", [False, True])
def test_triangular_accumulate_never_meets_what_is_absent(lower):
    """Where the triangle of x is zero, 0 * NaN of c is 0."""
    n = 13
    rng = np.random.default_rng(0)
    x = np.tril(rng.standard_normal((n, n))) if lower else np.triu(rng.standard_normal((n, n)))
    c = rng.standard_normal((5, n))
    result = np.zeros((5, n))
    products.accumulate_triangular(c, x, 5, n, result)
    np.testing.assert_allclose(result, c @ x, atol=1e-12)
    poisoned = c.copy()
    poisoned[:, 7] = np.nan
    again = np.zeros((5, n))
    products.accumulate_triangular(poisoned, x, 5, n, again)
    met = x[7] != 0
    np.testing.assert_allclose(again[:, ~met], result[:, ~met], atol=1e-12)
    assert np.isnan(again[:, met]).all()


@numba.njit
def _round_trip(table, n, width, out):
    ones = np.ones(n, np.float32)
    block = np.empty((n, width), np.float32)
    blocks.load(table, 0, (1, 2, 1), n, width, block, ones)
    out[:] = block
    blocks.store(table, 1, (1, 2, 1), n, width, block)


@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_rows_in_and_out(dtype, step):
    rng = np.random.default_rng(0)
    width = 33 if step == 1 else 17 if step == 2 else 33
    source = rng.standard_normal((2, 9, 3, 33)).astype(dtype)[..., ::step]
    target = np.zeros((2, 9, 3, 33), dtype)[..., ::step]
    block = np.empty((5, width), np.float32)
    _round_trip(blocks.describe(source, target), 5, width, block)
    np.testing.assert_array_equal(block, source[1, 2:7, 1].astype(np.float32))
    expected = np.zeros_like(target)
    expected[1, 2:7, 1] = source[1, 2:7, 1].astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(target.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_16_bit_number_widens_exactly_and_comes_back(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    source = np.broadcast_to(bits.view(dtype), (2, 8, 2, 1 << 16))
    block = np.empty((5, 1 << 16), np.float32)
    target = np.zeros((2, 8, 2, 1 << 16), dtype)
    _round_trip(blocks.describe(source, target), 5, 1 << 16, block)
    expected = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(block[0], expected)
    back = target[1, 2, 1]
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], bits[numbers])
    assert np.isnan(back.astype(np.float32)[~numbers]).all()


@numba.njit
def _store_only(table, block):
    blocks.store(table, 0, (0, 0, 0), block.shape[0], block.shape[1], block)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_rounding_to_16_bits_is_to_nearest_even(dtype):
    rng = np.random.default_rng(0)
    exponents = rng.integers(0, 256, 200_000, dtype=np.uint32) << 23
    random = (rng.integers(0, 1 << 23, 200_000, dtype=np.uint32) | exponents).view(np.float32)
    random = random[np.isfinite(random)]
    numbers = np.arange(1 << 15, dtype=np.uint16).view(dtype).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    ties = numbers[:-1] / 2 + numbers[1:] / 2
    values = np.concatenate([random, -random, ties, numbers, [65519.996, 65520, 6e4, np.inf, -np.inf]]).astype(
        np.float32
    )
    target = np.zeros((1, 1, 1, values.size), dtype)
    _store_only(blocks.describe(target), values[None])
    np.testing.assert_array_equal(target[0, 0, 0].view(np.uint16), values.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(reverse):
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(0, 4, 9))
    parts, carry = rng.standard_normal((9, 3, 5)), rng.standard_normal((4, 3, 5))
    expected_parts, expected_carry = parts.copy(), carry.copy()
    for i in range(9)[::-1] if reverse else range(9):
        expected_parts[i] = expected_carry[owners[i]]
        expected_carry[owners[i]] += parts[i]
    scan(owners, parts, carry, reverse=reverse)
    np.testing.assert_array_equal(parts, expected_parts)
    np.testing.assert_array_equal(carry, expected_carry)
