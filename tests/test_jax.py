"""The JAX adapter against the oracle, against racecore on NumPy arrays, and under every
transformation of JAX that it takes.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from layouts import LAYOUTS, arrange
from problems import Problem, relative_error

import racecore

jax = pytest.importorskip("jax", reason="jax is not installed: pip install 'racecore[jax]'")

from jax import numpy as jnp
from jax.test_util import check_grads

from racecore.adapters import jax as adapter
from racecore.adapters.jax import race_attention

NAMES = ("query", "key", "value", "planes", "beta")
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def problem(**changes: Any) -> Problem:
    kind: dict[str, Any] = dict(
        seed=200,
        batch=2,
        n_queries=37,
        n_keys=37,
        n_heads=4,
        n_kv_heads=2,
        head_dim=5,
        value_dim=3,
        n_tables=3,
        n_planes=2,
        beta=1.5,
        spread=1.0,
    )
    return Problem(**(kind | changes))


KINDS = {
    "bidirectional": problem(n_queries=21),
    "causal": problem(is_causal=True),
    "masked": problem(is_causal=True, mask="whole", batch=3),
    "packed": problem(
        batch=None,
        bounds=(0, 3, 3, 30, 37),
        is_causal=True,
        planes_per_head=True,
        beta_per_head=True,
    ),
    "packed, bidirectional": problem(batch=1, bounds=(0, 11, 37)),
}


def inputs_of(kind: Problem, dtype: str) -> tuple[list[np.ndarray], dict[str, Any], np.ndarray]:
    x = kind.arrays(dtype)
    options = {
        "is_causal": kind.is_causal,
        "readout": kind.readout,
        "key_mask": x.key_mask,
        "cu_seqlens": x.cu_seqlens,
    }
    return [x.query, x.key, x.value, x.planes, np.asarray(x.beta)], options, x.d_out


def numpy_results(arrays: list[Any], options: dict[str, Any], d_out: Any) -> dict[str, Any]:
    """Run racecore on NumPy arrays; gradients of planes and beta in their own dtype."""
    lsh = racecore.SoftLSH(arrays[3], arrays[4])
    out, saved = racecore.attention_forward(*arrays[:3], lsh, **options)
    grads = racecore.attention_backward(d_out, saved)
    found = {
        name: np.asarray(getattr(grads, name)).astype(x.dtype)
        for name, x in zip(NAMES, arrays, strict=True)
    }
    return {"out": out, **found}


def jax_results(
    arrays: list[Any], options: dict[str, Any], d_out: Any, wrap: Any = jax.jit
) -> dict[str, Any]:
    def both(arguments: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda *a: race_attention(*a, **options), *arguments)
        return out, pull(g)

    out, grads = wrap(both)([jnp.asarray(x) for x in arrays], jnp.asarray(d_out))
    return {"out": out, **dict(zip(NAMES, grads, strict=True))}


def assert_equal_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(
            np.asarray(found[name]), np.asarray(array), err_msg=name, strict=True
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_oracle_in_float64(kind: str, readout: str) -> None:
    arrays, options, d_out = inputs_of(KINDS[kind], "float64")
    options["readout"] = readout
    found = jax_results(arrays, options, d_out)
    expected = oracle.gradients(*arrays, d_out, **options) | {
        "out": oracle.attention(*arrays, **options)[0]
    }
    for name, array in expected.items():
        assert found[name].dtype == np.float64
        assert relative_error(found[name], array) <= 1e-9, name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["bidirectional", "masked", "packed"])
def test_gradients_equal_differences(kind: str) -> None:
    arrays, options, _ = inputs_of(KINDS[kind], "float64")
    check_grads(
        lambda *a: race_attention(*a, **options),
        arrays,
        order=1,
        modes=["rev"],
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_bits_with_numpy_arrays(kind: str, dtype: str) -> None:
    arrays, options, d_out = inputs_of(KINDS[kind], dtype)
    arrays[3:] = [x.astype(np.float32) for x in arrays[3:]]
    for wrap in (jax.jit, lambda function: function):
        assert_equal_bits(
            jax_results(arrays, options, d_out, wrap), numpy_results(arrays, options, d_out)
        )


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_long_sequences_give_the_bits_of_saved_states(
    batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several segments, and several chunks: backward starts from states summed again, forward's
    were kept.
    """
    from racecore import inputs

    kind = problem(batch=batch, n_queries=3 * 1024 + 7, n_keys=3 * 1024 + 7, is_causal=True)
    arrays, options, d_out = inputs_of(kind, "float32")
    arrays[3:] = [x.astype(np.float32) for x in arrays[3:]]
    expected = numpy_results(arrays, options, d_out)
    monkeypatch.setattr(inputs, "WORKSPACE_BYTES", 1)  # one segment a chunk
    assert_equal_bits(jax_results(arrays, options, d_out), expected)


def test_unwanted_gradients_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from racecore.adapters import task

    wanted = []
    monkeypatch.setattr(
        task,
        "saved_without_forward",
        lambda *a, wrt, original=task.saved_without_forward, **o: (
            wanted.append(wrt) or original(*a, wrt=wrt, **o)
        ),
    )
    arrays, options, _ = inputs_of(KINDS["causal"], "float32")
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    for argnums in ((0, 2), (4,), (0, 1, 2, 3, 4)):
        loss = jax.jit(jax.grad(lambda *a: race_attention(*a, **options).sum(), argnums=argnums))
        jax.block_until_ready(loss(*arrays))
        assert [set(names) for names in wanted] == [{NAMES[i] for i in argnums}]
        wanted.clear()


def test_one_set_of_gradients_is_not_taken_for_another() -> None:
    """JAX traces the forward rule once for every set and keeps what it traced: sets used in
    turns stay apart.
    """
    arrays, options, _ = inputs_of(KINDS["causal"], "float32")
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]

    def loss(*a: Any) -> Any:
        return race_attention(*a, **options).sum()

    expected = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays)
    sets = [(0,), (4,), (1, 3), (0, 2), (0, 1, 2, 3, 4), (3,)]
    for argnums in [*sets, *reversed(sets), *sets]:
        for transform in (jax.grad, lambda f, argnums: jax.jit(jax.grad(f, argnums=argnums))):
            for i, found in zip(argnums, transform(loss, argnums=argnums)(*arrays), strict=True):
                np.testing.assert_array_equal(found, expected[i])


@pytest.mark.parametrize(
    "axes",
    [
        (0, 0, 0, None, None),
        (0, None, None, None, None),
        (1, 0, 0, 0, None),
        (None, 2, 0, None, 0),
        (0, 0, 0, 0, 0),
    ],
)
@pytest.mark.parametrize("kind", ["bidirectional", "masked"])
def test_vmap_equals_a_loop(kind: str, axes: tuple[int | None, ...]) -> None:
    rng = np.random.default_rng(0)
    arrays, options, _ = inputs_of(KINDS[kind], "float32")
    arrays = [np.asarray(x, np.float32) for x in arrays]
    stacked = [
        x
        if axis is None
        else np.stack([x * factor for factor in rng.uniform(0.5, 1.5, 3).astype(np.float32)], axis)
        for x, axis in zip(arrays, axes, strict=True)
    ]

    def function(*a: Any) -> Any:
        return race_attention(*a, **options)

    def loss(*a: Any) -> Any:
        return (race_attention(*a, **options) ** 2).sum()

    for each in (
        function,
        jax.grad(loss, argnums=(0, 1, 2)),
        jax.grad(loss, argnums=(0, 1, 2, 3, 4)),
    ):
        found = jax.jit(jax.vmap(each, in_axes=axes))(*stacked)
        for i in range(3):
            one = [
                x if axis is None else np.take(x, i, axis)
                for x, axis in zip(stacked, axes, strict=True)
            ]
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(each(*one)), strict=True):
                np.testing.assert_array_equal(a[i], b)


def test_several_mapped_axes_masks_and_bounds() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 3, 12, 2, 4), dtype=np.float32)) for _ in range(3)
    )
    planes = jnp.asarray(rng.standard_normal((2, 2, 4), dtype=np.float32))
    masks = jnp.asarray(rng.random((3, 12)) < 0.5)
    cuts = jnp.asarray([[0, 5, 12], [0, 0, 12], [0, 7, 12]])

    def masked(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return race_attention(q, k, v, planes, 1.0, key_mask=mask[None])

    def packed(q: Any, k: Any, v: Any, cuts: Any) -> Any:
        return race_attention(q, k, v, planes, 1.0, is_causal=True, cu_seqlens=cuts)

    for one, extra in ((masked, masks), (packed, cuts)):
        each = jax.grad(
            lambda q, k, v, e, one=one: (one(q[None], k[None], v[None], e) ** 2).sum(),
            argnums=(0, 1, 2),
        )
        found = jax.vmap(jax.vmap(each), in_axes=(0, 0, None, None))(q, k, v[0], extra)
        for index in np.ndindex(2, 3):
            for a, b in zip(
                found, each(q[index], k[index], v[0, index[1]], extra[index[1]]), strict=True
            ):
                np.testing.assert_array_equal(a[index], b)
    summed = jax.grad(
        lambda p: jax.vmap(lambda q, k, v: race_attention(q, k, v, p, 1.0))(q[0], k[0], v[0]).sum()
    )(planes)
    batch = jax.grad(lambda p: race_attention(q[0], k[0], v[0], p, 1.0).sum())(planes)
    assert relative_error(summed, batch) < 1e-5


@pytest.mark.parametrize("policy", [None, "dots_saveable"])
def test_checkpoint_and_scan_change_no_bit(policy: str | None) -> None:
    arrays, options, _ = inputs_of(KINDS["masked"], "float32")
    q, k, v, planes, beta = (jnp.asarray(x, jnp.float32) for x in arrays)
    lift = jnp.ones((v.shape[-1], q.shape[-1]))

    def layer(x: Any, scale: Any) -> Any:
        return x + race_attention(x, k, v, planes, beta * scale, **options) @ lift

    def looped(q: Any, scales: Any, layer: Any = layer) -> Any:
        for scale in scales:
            q = layer(q, scale)
        return q.sum()

    rule = None if policy is None else getattr(jax.checkpoint_policies, policy)
    rebuilt = jax.checkpoint(layer, policy=rule)
    scales = jnp.asarray([0.5, 1.0, 1.5], jnp.float32)
    expected = jax.jit(jax.grad(looped, argnums=(0, 1)))(q, scales)
    variants = [
        lambda q, scales: looped(q, scales, rebuilt),
        lambda q, scales: jax.lax.scan(lambda x, scale: (layer(x, scale), None), q, scales)[
            0
        ].sum(),
        lambda q, scales: jax.lax.scan(lambda x, scale: (rebuilt(x, scale), None), q, scales)[
            0
        ].sum(),
    ]
    for variant in variants:
        for a, b in zip(
            jax.jit(jax.grad(variant, argnums=(0, 1)))(q, scales), expected, strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_masks_and_bounds_may_be_traced_and_have_no_gradient() -> None:
    for kind, name in (("masked", "key_mask"), ("packed", "cu_seqlens")):
        arrays, options, _ = inputs_of(KINDS[kind], "float32")
        arrays[3:] = [x.astype(np.float32) for x in arrays[3:]]
        extra = jnp.asarray(options.pop(name))

        def loss(
            extra: Any, query: Any, options: Any = options, name: Any = name, arrays: Any = arrays
        ) -> Any:
            return race_attention(query, *arrays[1:], **options, **{name: extra}).sum()

        none, traced = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(extra, arrays[0])
        assert none.dtype == jax.dtypes.float0
        np.testing.assert_array_equal(traced, jax.grad(loss, argnums=1)(extra, arrays[0]))


def test_gradients_come_in_the_dtypes_of_their_inputs() -> None:
    arrays, options, _ = inputs_of(KINDS["causal"], "bfloat16")
    q, k, v = (jnp.asarray(x) for x in arrays[:3])
    hash_dtypes = (jnp.float16, jnp.bfloat16)
    planes, beta = (jnp.asarray(x, dtype) for x, dtype in zip(arrays[3:], hash_dtypes, strict=True))
    out, pull = jax.vjp(lambda *a: race_attention(*a, **options), q, k, v, planes, beta)
    grads = pull(jnp.ones_like(out))
    assert [out.dtype, *(g.dtype for g in grads)] == [jnp.bfloat16] * 4 + list(hash_dtypes)
    assert (
        jax.grad(lambda b: race_attention(q, k, v, planes, b).astype(jnp.float32).sum())(1.0).dtype
        == jnp.float32
    )


def test_nothing_is_narrowed_silently() -> None:
    arrays, _, _ = inputs_of(KINDS["causal"], "float64")
    lsh = racecore.SoftLSH.random(5, rng=0)
    single = [x.astype(np.float32) for x in arrays[:3]]
    assert (
        race_attention(*single, lsh.planes, lsh.beta).dtype == jnp.float32
    )  # float64 with values of float32
    for bad in (
        [*arrays[:3], lsh.planes, 1.0],
        [*single, lsh.planes / 3, 1.0],
        [*single, lsh.planes, np.float64(0.1)],
    ):
        with pytest.raises(
            TypeError, match="is float64, and JAX would silently make it float32.*jax_enable_x64"
        ):
            race_attention(*bad)
    with jax.enable_x64(True):
        assert (
            race_attention(
                *(jnp.asarray(x) for x in arrays[:3]), lsh.planes / 3, np.float64(0.1)
            ).dtype
            == jnp.float64
        )
        assert race_attention(*single, lsh.planes / 3, 0.1).dtype == jnp.float32
        wide = [jnp.asarray(x) for x in arrays[:3]]
    with pytest.raises(TypeError, match="query is float64"):
        race_attention(*wide, lsh.planes, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_arrays_of_any_layout(layout: str) -> None:
    rng = np.random.default_rng(0)
    rows = [arrange(rng.standard_normal((2, 12, 2, 4), dtype=np.float32), layout) for _ in range(3)]
    lsh = racecore.SoftLSH.random(4, rng=0)
    expected = racecore.attention(*rows, lsh)
    np.testing.assert_array_equal(race_attention(*rows, lsh.planes[::-1][::-1], lsh.beta), expected)
    np.testing.assert_array_equal(
        jax.jit(lambda p: race_attention(*rows, p, 1.0))(jnp.asarray(lsh.planes)), expected
    )


def test_mistakes_are_reported_while_tracing() -> None:
    x = jnp.ones((2, 6, 4, 8))
    planes = jnp.ones((3, 2, 8))

    def call(
        query: Any = x,
        key: Any = x,
        value: Any = x,
        planes: Any = planes,
        beta: Any = 1.0,
        **options: Any,
    ) -> Any:
        return jax.eval_shape(
            lambda q: race_attention(q, key, value, planes, beta, **options), query
        )

    assert call().shape == x.shape
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (dict(key=x[:, :3]), ValueError, "agree in tokens and heads"),
        (dict(query=x[:, :3], is_causal=True), ValueError, "as many queries as keys"),
        (dict(query=x.astype(int)), TypeError, "query must be float16, bfloat16"),
        (dict(key=x.astype(jnp.bfloat16)), TypeError, "one dtype"),
        (dict(planes=planes[..., :5]), ValueError, "hashes rows of 5 values"),
        (dict(planes=planes[0]), ValueError, r"planes must have shape \[L, P, D\]"),
        (dict(beta=jnp.ones(3)), ValueError, "for 3 query heads, the query has 4"),
        (dict(readout="mean"), ValueError, "readout must be one of"),
        (dict(is_causal=1), TypeError, "is_causal must be True or False"),
        (
            dict(key_mask=jnp.ones((2, 5), bool)),
            ValueError,
            r"key_mask must have shape \[B, Tk\] = \(2, 6\)",
        ),
        (dict(key_mask=jnp.ones((2, 6))), TypeError, "key_mask must be bool"),
        (dict(cu_seqlens=[0, 6]), ValueError, "B must be 1 or absent"),
        (
            dict(query=x[0], key=x[0], value=x[0], cu_seqlens=[0, 4, 3, 6]),
            ValueError,
            "must not decrease, got 4, 3",
        ),
        (
            dict(query=x[0], key=x[0], value=x[0], cu_seqlens=np.array([0, 5])),
            ValueError,
            "end at T = 6",
        ),
        (dict(key=[1.0]), TypeError, "key must be a NumPy array"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            call(**arguments)
    traced = jax.jit(
        lambda bounds: race_attention(x[0], x[0], x[0], planes, 1.0, cu_seqlens=bounds)
    )
    assert traced(jnp.asarray([0, 2, 6])).shape == (6, 4, 8)
    with pytest.raises(TypeError, match="cu_seqlens must be integers"):
        traced(jnp.asarray([0.0, 6.0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="cu_seqlens must not decrease, got 4, 2"):
        jax.block_until_ready(traced(jnp.asarray([0, 4, 2, 6])))


def test_a_hash_that_is_not_finite_gives_nan() -> None:
    arrays, options, d_out = inputs_of(KINDS["causal"], "float32")
    arrays[3:] = [x.astype(np.float32) for x in arrays[3:]]
    for broken in (3, 4):
        spoilt = [x.copy() for x in arrays]
        spoilt[broken].flat[0] = np.nan
        assert all(
            np.isnan(np.asarray(x)).all() for x in jax_results(spoilt, options, d_out).values()
        )


def test_higher_and_forward_derivatives_are_refused() -> None:
    arrays, _, _ = inputs_of(KINDS["causal"], "float32")
    q, k, v, planes, beta = (jnp.asarray(x, jnp.float32) for x in arrays)

    def slope(q: Any) -> Any:
        return jax.grad(lambda q: (race_attention(q, k, v, planes, beta) ** 2).sum())(q).sum()

    for function in (
        jax.grad(slope),
        jax.jit(jax.grad(slope)),
        lambda q: jax.vmap(jax.grad(slope))(q[None]),
    ):
        with pytest.raises(NotImplementedError, match="race_attention has first derivatives only"):
            function(q)
    with pytest.raises(TypeError, match="forward-mode.*custom_vjp"):
        jax.jvp(lambda q: race_attention(q, k, v, planes, beta), (q,), (q,))


def test_calls_with_copies_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XLA takes no calls in place, as on a GPU."""
    arrays, options, d_out = inputs_of(KINDS["masked"], "float32")
    arrays[3:] = [x.astype(np.float32) for x in arrays[3:]]
    expected = jax_results(arrays, options, d_out)
    in_place = adapter._is_registered
    calls = []
    monkeypatch.setattr(adapter, "_is_registered", lambda: calls.append(1))
    jax.clear_caches()
    assert_equal_bits(jax_results(arrays, options, d_out), expected)
    rows = [np.stack([x, 2 * x]) for x in arrays[:3]]
    mapped = jax.jit(jax.vmap(lambda q, k, v: race_attention(q, k, v, *arrays[3:], **options)))
    copied = mapped(*rows)
    assert calls
    monkeypatch.setattr(adapter, "_is_registered", in_place)
    jax.clear_caches()
    np.testing.assert_array_equal(mapped(*rows), copied)


def test_a_refused_registration_warns_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such interface")

    monkeypatch.setattr(adapter.xla_call, "register", refuse)
    with pytest.warns(UserWarning, match="arrays are copied .* no such interface"):
        assert not adapter._is_registered.__wrapped__()


def test_empty_sequences_and_batches() -> None:
    planes = jnp.ones((2, 2, 4))
    for shape in ((2, 0, 2, 4), (0, 3, 2, 4), (0, 2, 4)):
        x = jnp.ones(shape)
        assert race_attention(x, x, x, planes, 1.0).shape == shape
        assert jax.grad(lambda x: race_attention(x, x, x, planes, 1.0).sum())(x).shape == shape
        mapped = jax.vmap(lambda x: race_attention(x, x, x, planes, 1.0))(x[None])
        assert mapped.shape == (1, *shape)


# racecore's own functions on arrays of JAX, through DLPack


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_plain_attention_takes_and_gives_jax_arrays(dtype: str) -> None:
    arrays, options, d_out = inputs_of(KINDS["masked"], dtype)
    lsh = racecore.SoftLSH(arrays[3], arrays[4])
    rows, options["key_mask"] = (
        [jnp.asarray(x) for x in arrays[:3]],
        jnp.asarray(options["key_mask"]),
    )
    out, saved = racecore.attention_forward(*rows, lsh, **options)
    grads = racecore.attention_backward(jnp.asarray(d_out), saved)
    expected = numpy_results([*arrays[:3], lsh.planes, np.asarray(lsh.beta)], options, d_out)
    for name, array in {
        "out": out,
        "query": grads.query,
        "key": grads.key,
        "value": grads.value,
    }.items():
        assert isinstance(array, jax.Array)
        assert array.dtype == ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        np.testing.assert_array_equal(np.asarray(array), expected[name])
    for before, after in zip(arrays[:3], rows, strict=True):
        np.testing.assert_array_equal(before, after)


def test_plain_attention_does_not_narrow_float64() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 1, 4)))
    out = racecore.attention(x, x, x)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(np.asarray(out), racecore.attention(*[np.asarray(x)] * 3))


def test_plain_attention_names_the_adapter_where_values_are_missing() -> None:
    x = jnp.ones((7, 1, 4))
    for transformed in (jax.jit, lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap):
        with pytest.raises(TypeError, match=r"traced by JAX.*racecore\.adapters\.jax"):
            transformed(lambda x: racecore.attention(x, x, x))(x)


# Processes of their own


def run_program(program: str, **environment: str) -> Any:
    """Run a program in a new process, warnings as errors; return the JSON of its last line."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHARDED = """
    import json
    import jax, numpy as np
    from jax import numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from racecore.adapters.jax import race_attention
    import racecore

    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.standard_normal((2, 50, 4, 8), dtype=np.float32)) for _ in range(3)]
    shared = jnp.asarray(rng.standard_normal((3, 2, 8), dtype=np.float32)), jnp.float32(1.5)
    attend = lambda *a: race_attention(*a, is_causal=True)
    def both(attend):
        loss = lambda *a: (attend(*a) * 0.5).sum()
        return lambda *a: (attend(*a), jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*a))
    expected = [np.asarray(x) for x in jax.tree.leaves(both(attend)(*rows, *shared))]
    worst = {}

    def compare(name, found, exact):
        found = [np.asarray(x) for x in jax.tree.leaves(found)]
        pairs = zip(found, expected, strict=True)
        errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
        worst[name] = [max(errors[:4]), max(errors[4:])]  # rows, and what is summed over shards

    for spec in (P("x"), P(None, None, "x")):
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x in rows]
                compare(f"jit {spec} {kind}", jax.jit(both(attend))(*spread, *shared), True)
                out = attend(*spread, *shared) + spread[0]  # what comes out can be used
                compare(f"eager {spec} {kind}", both(attend)(*spread, *shared), True)
                lsh = racecore.SoftLSH(*map(np.asarray, shared))
                plain = racecore.attention(*spread, lsh, is_causal=True)
                assert (np.asarray(plain) == expected[0]).all()
            if kind == AxisType.Auto:
                for check in (True, False):
                    specs = dict(in_specs=(spec,) * 3 + (P(), P()), out_specs=spec)
                    local = jax.shard_map(attend, mesh=mesh, check_vma=check, **specs)
                    found = jax.jit(both(local))(*spread, *shared)
                    compare(f"shard_map {spec} {check}", found, False)
                    assert local(*spread, *shared).sharding.spec == spec
    print(json.dumps(worst))
"""


@pytest.mark.process
def test_sharded_equals_unsharded() -> None:
    worst = run_program(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert len(worst) == 12
    for name, (rows, summed) in worst.items():
        assert rows == 0, name
        assert summed < (1e-5 if name.startswith("shard_map") else 1e-30), name


LARGE = """
    import faulthandler, json
    faulthandler.dump_traceback_later(1000, exit=True)  # a dead lock
    import jax, numpy as np
    from jax import numpy as jnp
    from racecore.adapters.jax import race_attention

    # 17 MB, unlike its neighbours
    constant = np.random.default_rng(0).standard_normal((1 << 15, 2, 64), dtype=np.float32)
    planes = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 64), dtype=np.float32))
    attend = lambda q: race_attention(q, constant, q * 2, planes, 1.0, is_causal=True)
    step = jax.jit(lambda q: q - 0.1 * jax.grad(lambda q: (attend(attend(q)) ** 2).mean())(q))
    q = jnp.asarray(constant)
    for _ in range(12):
        q = step(q)  # not waited for: as many as JAX likes are under way
    attend_few = lambda q: race_attention(q, q, q, planes, 1.0)
    pieces = jax.jit(jax.vmap(attend_few))(q.reshape(64, 512, 2, 64))
    print(json.dumps(bool(jnp.isfinite(q).all() & jnp.isfinite(pieces).all())))
"""


@pytest.mark.process
@pytest.mark.parametrize("n_processors", [1, 2])
def test_large_arrays_under_jit_do_not_dead_lock(n_processors: int) -> None:
    few = sorted(os.sched_getaffinity(0))[:n_processors]
    assert run_program(f"import os\nos.sched_setaffinity(0, {few})\n" + textwrap.dedent(LARGE))


@pytest.mark.process
def test_importing_racecore_loads_no_jax() -> None:
    program = "import json, sys, racecore, racecore.adapters.task"
    assert run_program(program + "\nprint(json.dumps('jax' in sys.modules))") is False
