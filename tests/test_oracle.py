"""The oracle itself is judged here, by loops, by other formulas and by differences; the library
takes no part.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest

B, T, H, G, D, V, L, P = 2, 6, 4, 2, 5, 3, 3, 2
BETA = np.array([0.7, 1.1, 2.0, 0.4])


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "query": (B, T, H, D),
        "key": (B, T, G, D),
        "value": (B, T, G, V),
        "planes": (H, L, P, D),
    }
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def hash_by_loops(x: np.ndarray, planes: np.ndarray, beta: float) -> np.ndarray:
    """Return phi [L, R] of one row, as the definition reads."""
    phi = np.zeros((L, 2**P))
    for table in range(L):
        weights = []
        for corner in itertools.product(
            [-1, 1], repeat=P
        ):  # counts in binary, first plane most significant
            weights.append(
                math.exp(
                    sum(
                        beta * c * math.tanh(w @ x)
                        for c, w in zip(corner, planes[table], strict=True)
                    )
                )
            )
        phi[table] = np.array(weights) / sum(weights)
    return phi


@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_loops_over_tokens(
    rows: dict[str, np.ndarray], readout: str, is_causal: bool
) -> None:
    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    rng = np.random.default_rng(1)
    mass, value_sum = rng.uniform(1, 2, (B, H, L, 2**P)), rng.standard_normal((B, H, L, 2**P, V))
    out, last_mass, last_value_sum = oracle.attention(
        **rows,
        beta=BETA,
        readout=readout,
        is_causal=is_causal,
        key_mask=mask,
        initial_mass=mass,
        initial_value_sum=value_sum,
    )
    for b, h in itertools.product(range(B), range(H)):
        planes, g = rows["planes"][h], h // 2
        for i in range(T):
            m, s = mass[b, h].copy(), value_sum[b, h].copy()
            for j in range(i + 1 if is_causal else T):
                if mask[b, j]:
                    phi = hash_by_loops(rows["key"][b, j, g], planes, BETA[h])
                    m += phi
                    s += phi[..., None] * rows["value"][b, j, g]
            phi = hash_by_loops(rows["query"][b, i, h], planes, BETA[h])
            if readout == "ratio":
                expected = np.einsum("lr,lrv->v", phi, s) / (phi * m).sum()
            else:
                expected = np.einsum("lr,lrv->v", phi / (m + 1e-6), s) / L
            np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-12)
        np.testing.assert_allclose(last_mass[b, h], m, rtol=1e-12)  # of the last query: all keys
        np.testing.assert_allclose(last_value_sum[b, h], s, rtol=1e-12, atol=1e-12)


def test_ratio_is_attention_under_the_product_kernel(rows: dict[str, np.ndarray]) -> None:
    """<phi_q, phi_k> of a table is prod_p (a b + (1 - a)(1 - b)), without any corner, a and b being
    sigmoids.
    """
    planes = rows["planes"][0]

    def bits(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-2 * 0.9 * np.tanh(np.einsum("bthd,lpd->bhtlp", x, planes))))

    a = bits(rows["query"])[:, :, :, None]
    b = bits(rows["key"].repeat(2, axis=2))[:, :, None]
    kernel = np.prod(a * b + (1 - a) * (1 - b), axis=-1).sum(axis=-1)  # [B, H, Tq, Tk]
    expected = np.einsum(
        "bhij,bjhv->bihv", kernel / kernel.sum(-1, keepdims=True), rows["value"].repeat(2, axis=2)
    )
    out, _, _ = oracle.attention(rows["query"], rows["key"], rows["value"], planes, 0.9)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)


def test_packed_sequences_are_separate_sequences(rows: dict[str, np.ndarray]) -> None:
    q, k, v = (rows[name][0] for name in ("query", "key", "value"))
    out, mass, value_sum = oracle.attention(
        q, k, v, rows["planes"], BETA, is_causal=True, cu_seqlens=[0, 2, 2, 6]
    )
    assert mass.shape == (3, H, L, 2**P)
    assert not mass[1].any()
    for n, (begin, end) in enumerate([(0, 2), (2, 2), (2, 6)]):
        piece = oracle.attention(
            q[begin:end], k[begin:end], v[begin:end], rows["planes"], BETA, is_causal=True
        )
        for whole, part in zip(
            (out[begin:end], mass[n : n + 1], value_sum[n : n + 1]), piece, strict=True
        ):
            np.testing.assert_allclose(whole, part, rtol=1e-14)


@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_equal_central_differences(
    rows: dict[str, np.ndarray], readout: str, is_causal: bool
) -> None:
    rng = np.random.default_rng(2)
    inputs = {
        **rows,
        "beta": BETA,
        "initial_mass": rng.uniform(1, 2, (B, H, L, 2**P)),
        "initial_value_sum": rng.standard_normal((B, H, L, 2**P, V)),
    }
    options = {"readout": readout, "is_causal": is_causal, "key_mask": rng.random((B, T)) < 0.6}
    cotangents = [
        rng.standard_normal(result.shape) for result in oracle.attention(**inputs, **options)
    ]
    d_out, d_mass, d_value_sum = cotangents
    grads = oracle.gradients(
        **inputs, d_out=d_out, d_mass=d_mass, d_value_sum=d_value_sum, **options
    )

    def loss(**changed: np.ndarray) -> float:
        return sum(
            (a * b).sum()
            for a, b in zip(
                oracle.attention(**{**inputs, **changed}, **options), cotangents, strict=True
            )
        )

    for name, x in inputs.items():
        gradient = grads[name.removeprefix("initial_")]
        direction = rng.standard_normal(x.shape)
        slope = (loss(**{name: x + 1e-5 * direction}) - loss(**{name: x - 1e-5 * direction})) / 2e-5
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-7, abs=1e-8), name


def test_rows_without_keys_have_no_output_and_no_gradient(rows: dict[str, np.ndarray]) -> None:
    mask = np.zeros((B, T), bool)
    mask[1, 3:] = True  # the first three queries of the second sequence see nothing either
    out, _, _ = oracle.attention(**rows, beta=BETA, is_causal=True, key_mask=mask)
    grads = oracle.gradients(
        **rows, beta=BETA, d_out=np.ones_like(out), is_causal=True, key_mask=mask
    )
    assert not out[0].any()
    assert not out[1, :3].any()
    assert out[1, 3:].all()
    assert all(np.isfinite(gradient).all() for gradient in grads.values())
    assert not grads["query"][0].any()
    assert not grads["value"][~mask].any()
    assert grads["value"][mask].all()


def test_plain_implementation_stays_in_its_precision(rows: dict[str, np.ndarray]) -> None:
    out, mass, value_sum = oracle.attention(**rows, beta=BETA, dtype=np.float32)
    grads = oracle.gradients(**rows, beta=BETA, d_out=out, dtype=np.float32)
    assert {x.dtype for x in (out, mass, value_sum, *grads.values())} == {np.dtype(np.float32)}
