"""The shared rooms of the CPU kernels against their plain twins: exp, tanh, products, rows in and
out, readouts.
"""

import ml_dtypes
import numba
import numpy as np
import pytest

from racecore.ops.causal import scan_tiles
from racecore.ops.cpu import row_io, states
from racecore.ops.cpu.call import exclusive_scan
from racecore.ops.simd import elementary, products, tiles, vectors
from racecore.ops.socket.select import top_k


def compiled(function):
    """Return a function for Python to call: helpers can only be called from compiled code."""

    @numba.njit
    def run(*arguments):
        return function(*arguments)

    return run


def aligned(*shape, dtype, rng=None):
    """Return an array on a cache line with some rows to spare, random or NaN."""
    size = int(np.prod(shape))
    room = np.full(size + 16 * shape[-1] + 16, np.nan, dtype)
    first = -room.ctypes.data % 64 // room.itemsize
    result = room[first : first + size].reshape(shape)
    if rng is not None:
        result[:] = rng.standard_normal(shape)
    return result


def input_rows(x):
    return products.InputRows(x.ctypes.data, x.shape[1], x.itemsize)


def _elementwise(function):
    """Return a function of Python that applies a function of vectors to every element."""

    @numba.njit
    def run(x, out):
        for i in range(0, x.shape[1], vectors.lanes(x)):
            vectors.store_lanes(out, 0, i, function(vectors.load_lanes(x, 0, i)))

    def apply(x):
        padded = np.zeros((1, -(-x.size // 16) * 16), x.dtype)
        padded[0, : x.size] = x
        out = np.empty_like(padded)
        run(padded, out)
        return out[0, : x.size]

    return apply


_apply_exp, _apply_tanh = _elementwise(elementary.exp_of_nonpositive), _elementwise(elementary.tanh)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-15)])
def test_exp(dtype, tolerance):
    x = -np.concatenate([np.linspace(0, 86, 20001), np.logspace(-30, 0, 2001)]).astype(dtype)
    np.testing.assert_allclose(_apply_exp(x), np.exp(x.astype(np.float64)), rtol=tolerance)
    assert 0 <= _apply_exp(np.array([-1e30], dtype))[0] < 2e-38
    assert np.isnan(_apply_exp(np.array([np.nan], dtype))[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 1e-15)])
def test_tanh(dtype, tolerance):
    x = np.concatenate([np.linspace(0, 12, 20001), np.logspace(-30, 1, 2001), [6e4, 3e38]]).astype(
        dtype
    )
    for sign in (1, -1):
        np.testing.assert_allclose(
            _apply_tanh(sign * x), sign * np.tanh(x.astype(np.float64)), rtol=tolerance
        )
    assert _apply_tanh(np.array([np.inf], dtype))[0] == 1
    assert np.isnan(_apply_tanh(np.array([np.nan], dtype))[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoids(dtype):
    @numba.njit
    def run(z, high, low):
        one = vectors.splat(z.dtype.type(1))
        for i in range(0, z.shape[1], vectors.lanes(z)):
            a, b = elementary.sigmoids(vectors.load_lanes(z, 0, i), one)
            vectors.store_lanes(high, 0, i, a)
            vectors.store_lanes(low, 0, i, b)

    z = np.linspace(-80, 80, 1600).astype(dtype)[None]
    high, low = np.empty_like(z), np.empty_like(z)
    run(z, high, low)
    tolerance = 4e-7 if dtype == np.float32 else 1e-15
    np.testing.assert_allclose(high, 1 / (1 + np.exp(-z.astype(np.float64))), rtol=tolerance)
    np.testing.assert_allclose(low, 1 / (1 + np.exp(z.astype(np.float64))), rtol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_totals(dtype):
    @numba.njit
    def run(x):
        return vectors.total(vectors.load_lanes(x, 0, 0))

    assert run(np.arange(16, dtype=dtype)[None]) == np.arange(64 // np.dtype(dtype).itemsize).sum()


@pytest.mark.parametrize("n_buckets", [2, 8, 24, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-13)])
def test_running_masses(n_buckets, dtype, tolerance):
    rng = np.random.default_rng(0)
    wide = -(-n_buckets // 16) * 16
    phi, phi_t, masses_t = (
        aligned(n_buckets, 32, dtype=dtype, rng=rng),
        *aligned(2, 32, wide, dtype=dtype),
    )
    mass, masses = np.zeros(wide), aligned(n_buckets, 32, dtype=dtype)
    mass[:n_buckets] = before = rng.random(n_buckets) * 10
    compiled(states.prefix_mass)(phi, mass, phi_t, masses_t, masses)
    np.testing.assert_allclose(masses, before[:, None] + phi.cumsum(axis=1), atol=tolerance)
    np.testing.assert_allclose(mass[:n_buckets], before + phi.sum(axis=1), atol=tolerance)
    np.testing.assert_array_equal(phi_t[:, :n_buckets], phi.T)
    phi[:, 13] = np.nan
    compiled(states.prefix_mass)(phi, mass, phi_t, masses_t, masses)
    assert np.isfinite(masses[:, :13]).all()
    assert np.isnan(masses[:, 13:]).all()


@pytest.mark.parametrize("n_buckets", [2, 8, 24, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-13)])
def test_running_masses_backward(n_buckets, dtype, tolerance):
    rng = np.random.default_rng(0)
    wide = -(-n_buckets // 16) * 16
    d_masses, (mass_t, d_phi_t) = (
        aligned(3, n_buckets, 32, dtype=dtype, rng=rng),
        aligned(2, 32, wide, dtype=dtype),
    )
    d_mass, d_phi_t[:] = np.zeros(wide), 1
    d_mass[:n_buckets] = later = rng.random(n_buckets)
    for head, d_masses_of_head in enumerate(d_masses):
        compiled(states.prefix_mass_backward)(d_masses_of_head, head == 0, mass_t, d_mass, d_phi_t)
    terms = d_masses.sum(axis=0)
    expected = 1 + later[:, None] + terms[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(d_phi_t[:, :n_buckets].T, expected, atol=tolerance)
    np.testing.assert_allclose(d_mass[:n_buckets], later + terms.sum(axis=1), atol=tolerance)


SIZES = [
    (1, 1, 16),
    (4, 3, 16),
    (7, 32, 64),
    (9, 17, 96),
    (64, 32, 144),
    (8, 8, 16),
    (13, 5, 32),
    (24, 9, 48),
]  # K, n, D
TOLERANCES = [(np.float64, 1e-12), (np.float32, 1e-4)]


@pytest.mark.parametrize(("n_rows", "n", "width"), SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_products(n_rows, n, width, dtype, tolerance):
    rng = np.random.default_rng(0)
    m, x, c = (
        aligned(*shape, dtype=dtype, rng=rng)
        for shape in ((n_rows, width), (32, width), (n_rows, 32))
    )
    nothing, x_source = products.NO_PREFETCH, input_rows(x)
    result = aligned(n_rows, 32, dtype=dtype)
    compiled(products.project)(m, x_source, n_rows, n, result, nothing)
    np.testing.assert_allclose(result[:, :n], m @ x[:n].T, atol=tolerance)
    m_t = aligned(width, -(-n_rows // 16) * 16, dtype=dtype)
    m_t[:, :n_rows] = m.T
    result = aligned(32, m_t.shape[1], dtype=dtype)
    compiled(products.project_wide)(m_t, x_source, n_rows, n, result, nothing)
    np.testing.assert_allclose(result[:n, :n_rows], x[:n] @ m.T, atol=tolerance)
    for mode, start in ((tiles.OVERWRITE, np.nan), (tiles.ADD, 2.0), (tiles.STREAM, np.nan)):
        result = aligned(32, width, dtype=dtype)
        result[:] = start
        compiled(products.expand)(
            c, m, n_rows, n, products.OutputRows(result.ctypes.data, width, mode, result.itemsize)
        )
        np.testing.assert_allclose(
            result[:n], c[:, :n].T @ m + (2 if mode == tiles.ADD else 0), atol=tolerance
        )
        assert mode == tiles.ADD or np.isnan(result[n:]).all()
    result = m.copy()
    compiled(products.accumulate)(c, x_source, n_rows, n, result, nothing)
    np.testing.assert_allclose(result, m + c[:, :n] @ x[:n], atol=tolerance)


def _bfloat16_rows(rng, n, width):
    """Return rows of bfloat16 on a cache line, and the same in float32."""
    x = aligned(n, width, dtype=np.float32, rng=rng).astype(ml_dtypes.bfloat16)
    room = np.zeros(x.size + 32, ml_dtypes.bfloat16)
    first = -room.ctypes.data % 64 // 2
    is_bfloat16 = room[first : first + x.size].reshape(x.shape)
    is_bfloat16[:] = x
    return is_bfloat16, x.astype(np.float32)


@pytest.mark.parametrize("width", [32, 96, 128])
def test_products_that_read_bfloat16(width):
    rng = np.random.default_rng(0)
    is_bfloat16, x = _bfloat16_rows(rng, 32, width)
    for n_rows in (4, 8, 16):
        m, result = (
            aligned(n_rows, width, dtype=np.float32, rng=rng),
            aligned(n_rows, 32, dtype=np.float32),
        )
        compiled(products.project)(
            m, input_rows(is_bfloat16), n_rows, 32, result, products.NO_PREFETCH
        )
        np.testing.assert_allclose(result, m @ x.T, atol=1e-4)
    for n_rows, n in ((8, 32), (16, 32), (8, 7)):
        c, m = (
            aligned(n_rows, 32, dtype=np.float32, rng=rng),
            aligned(n_rows, width, dtype=np.float32, rng=rng),
        )
        result = m.copy()
        compiled(products.accumulate)(
            c, input_rows(is_bfloat16), n_rows, n, result, products.NO_PREFETCH
        )
        np.testing.assert_allclose(result, m + c[:, :n] @ x[:n], atol=1e-4)


@pytest.mark.parametrize(("n_rows", "n"), [(4, 32), (8, 32), (3, 13), (9, 1)])
def test_products_that_write_bfloat16(n_rows, n):
    rng = np.random.default_rng(0)
    c, m = (
        aligned(n_rows, 32, dtype=np.float32, rng=rng),
        aligned(n_rows, 64, dtype=np.float32, rng=rng),
    )
    m[1, 7] = np.nan
    written, _ = _bfloat16_rows(rng, 32, 64)
    before, exact = written.copy(), aligned(32, 64, dtype=np.float32)
    compiled(products.expand)(
        c, m, n_rows, n, products.OutputRows(exact.ctypes.data, 64, tiles.OVERWRITE, 4)
    )
    compiled(products.expand)(
        c, m, n_rows, n, products.OutputRows(written.ctypes.data, 64, tiles.STREAM_BFLOAT16, 2)
    )
    rounded = exact[:n].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        written[:n].astype(np.float32), rounded.astype(np.float32)
    )  # NaN are equal there
    np.testing.assert_array_equal(written[n:], before[n:])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [1, 32])
def test_walks_from_bfloat16_to_bfloat16(n, backward):
    rng = np.random.default_rng(0)
    a, b = (aligned(8, 32, dtype=np.float32, rng=rng) for _ in range(2))
    before, (is_bfloat16, x) = (
        aligned(8, 96, dtype=np.float32, rng=rng),
        _bfloat16_rows(rng, 32, 96),
    )
    results = []
    for source, mode in (
        (input_rows(x), tiles.OVERWRITE),
        (input_rows(is_bfloat16), tiles.STREAM_BFLOAT16),
    ):
        rows, after = aligned(32, 96, dtype=np.float32), aligned(8, 96, dtype=np.float32)
        written, _ = _bfloat16_rows(rng, 32, 96)
        to = products.OutputRows(
            *(
                (rows.ctypes.data, 96, mode, 4)
                if mode == tiles.OVERWRITE
                else (written.ctypes.data, 96, mode, 2)
            )
        )
        compiled(scan_tiles.scan_rows)(
            before, after, a, source, b, rows, to, n, backward, products.NO_PREFETCH
        )
        results.append((rows if mode == tiles.OVERWRITE else written, after))
    np.testing.assert_array_equal(results[1][0][:n], results[0][0][:n].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(results[1][1], results[0][1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transpose(dtype):
    rng = np.random.default_rng(0)
    for n_rows, n_columns in ((32, 8), (24, 32), (3, 130)):
        source = aligned(-(-n_rows // 16) * 16, -(-n_columns // 16) * 16, dtype=dtype, rng=rng)
        target = aligned(*source.shape[::-1], dtype=dtype)
        compiled(products.transpose)(source, n_rows, n_columns, target)
        np.testing.assert_array_equal(target[:n_columns, :n_rows], source[:n_rows, :n_columns].T)


def _walked(state, a, x, order):
    """Yield a token and the state after it was added, in float64."""
    for i in order:
        state = state + np.outer(a[:, i], x[i])
        yield i, state


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n", [1, 7, 32])
@pytest.mark.parametrize(("n_buckets", "width"), [(2, 16), (4, 48), (9, 32), (24, 80), (64, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_walks(n_buckets, width, n, backward, dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b = (aligned(n_buckets, 32, dtype=dtype, rng=rng) for _ in range(2))
    x, y, before = (aligned(rows, width, dtype=dtype, rng=rng) for rows in (32, 32, n_buckets))
    order = list(range(n))[:: -1 if backward else 1]
    expected_rows, expected_weights = np.zeros((n, width)), np.zeros((n, n_buckets))
    for i, state in _walked(
        before.astype(np.float64), a.astype(np.float64), x.astype(np.float64), order
    ):
        expected_rows[i], expected_weights[i], expected = b[:, i] @ state, state @ y[i], state

    after, rows = aligned(n_buckets, width, dtype=dtype), aligned(32, width, dtype=dtype)
    rows[:] = 1
    streamed = aligned(32, width, dtype=dtype)
    for mode in (tiles.OVERWRITE, tiles.ADD):
        written = products.OutputRows(rows.ctypes.data, width, mode, rows.itemsize)
        compiled(scan_tiles.scan_rows)(
            before, after, a, input_rows(x), b, rows, written, n, backward, products.NO_PREFETCH
        )
    np.testing.assert_allclose(after, expected, atol=tolerance)
    np.testing.assert_allclose(rows[:n], 2 * expected_rows, atol=4 * tolerance)
    assert (rows[n:] == 1).all()
    written = products.OutputRows(streamed.ctypes.data, width, tiles.STREAM, streamed.itemsize)
    compiled(scan_tiles.scan_rows)(
        before, after, a, input_rows(x), b, rows, written, n, backward, products.NO_PREFETCH
    )
    np.testing.assert_allclose(streamed[:n], expected_rows, atol=2 * tolerance)
    assert np.isnan(streamed[n:]).all()

    wide = -(-n_buckets // 16) * 16
    a_t, before_t, after_t = (aligned(r, wide, dtype=dtype) for r in (32, width, width))
    a_t[:, :n_buckets], before_t[:, :n_buckets] = a.T, before.T
    weights = aligned(32, wide, dtype=dtype)
    for mode in (tiles.OVERWRITE, tiles.ADD):
        c = products.OutputRows(weights.ctypes.data, wide, mode, weights.itemsize)
        compiled(scan_tiles.scan_weights)(
            before_t, after_t, a_t, x, y, c, n_buckets, n, backward, products.NO_PREFETCH
        )
    np.testing.assert_allclose(after_t[:, :n_buckets], expected.T, atol=tolerance)
    np.testing.assert_allclose(weights[:n, :n_buckets], 2 * expected_weights, atol=8 * tolerance)


@pytest.mark.parametrize("backward", [False, True])
def test_walks_never_meet_what_is_to_come(backward):
    """What is not finite reaches the tokens from its own on, and no other."""
    rng = np.random.default_rng(0)
    a, b = (aligned(8, 32, dtype=np.float32, rng=rng) for _ in range(2))
    x, y, state = (aligned(rows, 16, dtype=np.float32, rng=rng) for rows in (32, 32, 8))
    x[13, 5] = np.nan
    rows = aligned(32, 16, dtype=np.float32)
    written = products.OutputRows(rows.ctypes.data, 16, tiles.OVERWRITE, 4)
    compiled(scan_tiles.scan_rows)(
        state, state.copy(), a, input_rows(x), b, rows, written, 32, backward, products.NO_PREFETCH
    )
    clean, poisoned = (slice(14, 32), slice(0, 14)) if backward else (slice(0, 13), slice(13, 32))
    assert np.isfinite(rows[clean]).all()
    assert np.isnan(rows[poisoned, 5]).all()
    a_t, state_t = (
        aligned(32, 16, dtype=np.float32, rng=rng),
        aligned(16, 16, dtype=np.float32, rng=rng),
    )
    weights = aligned(32, 16, dtype=np.float32)
    c = products.OutputRows(weights.ctypes.data, 16, tiles.OVERWRITE, 4)
    compiled(scan_tiles.scan_weights)(
        state_t, state_t.copy(), a_t, x, y, c, 8, 32, backward, products.NO_PREFETCH
    )
    assert np.isfinite(weights[clean, :8]).all()
    assert np.isnan(weights[poisoned, :8]).all()


@numba.njit
def _round_trip(table, n, width, out):
    ones = np.ones(n, np.float32)
    block = np.empty((n, width), np.float32)
    row_io.load_rows(table, 0, (1, 2, 1), n, width, block, ones)
    out[:] = block
    row_io.store_rows(table, 1, (1, 2, 1), n, width, block, products.output_rows(block, False))


@pytest.mark.parametrize("step", [1, 2, -1])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_rows_in_and_out(dtype, step):
    rng = np.random.default_rng(0)
    width = 33 if step == 1 else 17 if step == 2 else 33
    source = rng.standard_normal((2, 9, 3, 33)).astype(dtype)[..., ::step]
    target = np.zeros((2, 9, 3, 33), dtype)[..., ::step]
    block = np.empty((5, width), np.float32)
    _round_trip(row_io.describe(source, target), 5, width, block)
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
    _round_trip(row_io.describe(source, target), 5, 1 << 16, block)
    expected = bits.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(block[0], expected)
    back = target[1, 2, 1]
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(back.view(np.uint16)[numbers], bits[numbers])
    assert np.isnan(back.astype(np.float32)[~numbers]).all()


@numba.njit
def _store_only(table, block):
    row_io.store_rows(
        table,
        0,
        (0, 0, 0),
        block.shape[0],
        block.shape[1],
        block,
        products.output_rows(block, False),
    )


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
    values = np.concatenate(
        [random, -random, ties, numbers, [65519.996, 65520, 6e4, np.inf, -np.inf]]
    ).astype(np.float32)
    target = np.zeros((1, 1, 1, values.size), dtype)
    _store_only(row_io.describe(target), values[None])
    np.testing.assert_array_equal(
        target[0, 0, 0].view(np.uint16), values.astype(dtype).view(np.uint16)
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(reverse):
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(0, 4, 9))
    parts, carry = rng.standard_normal((9, 3, 5)), rng.standard_normal((4, 3, 5))
    expected_parts, expected_carry = parts.copy(), carry.copy()
    for i in range(9)[::-1] if reverse else range(9):
        expected_parts[i] = expected_carry[owners[i]]
        expected_carry[owners[i]] += parts[i]
    exclusive_scan(owners, parts, carry, reverse=reverse)
    np.testing.assert_array_equal(parts, expected_parts)
    np.testing.assert_array_equal(carry, expected_carry)


@pytest.mark.parametrize("kind", ["random", "rising", "few above"])
@pytest.mark.parametrize(
    ("n", "budget"), [(5000, 100), (4_000_000, 64), (4_000_000, 2048), (1_000_000, 50_000)]
)
def test_a_sample_leaves_few_candidates_for_the_best(kind, n, budget):
    scores = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    if kind == "rising":
        scores.sort()
    if kind == "few above":  # so few that the sample may miss all of them
        scores[:] = np.where(np.arange(n) % 4001 == 5, scores, -3)
    tokens, keys, bar = compiled(top_k.candidates)(scores.view(np.int32), n, budget)
    best = np.argsort(-scores, kind="stable")[:budget]
    assert np.isin(best, tokens[: len(keys)]).all() or kind == "few above"
    assert np.sort(scores[tokens[: len(keys)]])[-budget] == np.sort(scores)[-budget]
    if kind != "few above":
        assert bar > top_k.LOWEST_KEY
        assert len(keys) < 2 * budget + n // 50
        assert len(tokens) < 3 * budget + n // 40
