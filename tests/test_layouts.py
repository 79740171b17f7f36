"""Any memory layout gives what its contiguous copy gives, to the bit, and results go where the
caller wants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, arrange
from problems import DTYPES

import racecore

WRITABLE = ("contiguous", "strided", "transposed", "reversed", "fortran")
NAMES = ("query", "key", "value", "d_out")


def run(
    arrays: dict[str, np.ndarray],
    lsh: racecore.SoftLSH,
    *,
    out: Any = None,
    grads: Any = None,
    **options: Any,
) -> dict[str, Any]:
    out, saved, state = racecore.attention_forward(
        arrays["query"], arrays["key"], arrays["value"], lsh, return_state=True, out=out, **options
    )
    found = racecore.attention_backward(arrays["d_out"], saved, out=grads)
    return {"out": out, "mass": state.mass, "value_sum": state.value_sum} | {
        f"d_{name}": getattr(found, name) for name in ("query", "key", "value", "planes", "beta")
    }


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, array in expected.items():
        assert np.asarray(found[name]).dtype == np.asarray(array).dtype, name
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


@st.composite
def calls(
    draw: st.DrawFn,
) -> tuple[dict[str, np.ndarray], dict[str, str], racecore.SoftLSH, dict[str, Any]]:
    """Draw contiguous arrays, a layout for each of them, a hash and options."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)), label="dtype")]
    batch = draw(st.sampled_from([(), (1,), (2,)]), label="batch")
    n_keys = draw(st.one_of(st.integers(0, 70), st.sampled_from([1023, 1025, 2100])), label="Tk")
    is_causal = draw(st.booleans(), label="is_causal")
    n_queries = n_keys if is_causal else draw(st.integers(0, 70), label="Tq")
    n_kv_heads, repeats = draw(st.integers(1, 3), label="G"), draw(st.integers(1, 3), label="H/G")
    head_dim, value_dim = draw(st.integers(1, 20), label="D"), draw(st.integers(1, 20), label="V")
    n_heads = n_kv_heads * repeats
    shapes = {
        "query": (*batch, n_queries, n_heads, head_dim),
        "key": (*batch, n_keys, n_kv_heads, head_dim),
        "value": (*batch, n_keys, n_kv_heads, value_dim),
        "d_out": (*batch, n_queries, n_heads, value_dim),
    }
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    layouts = {name: draw(st.sampled_from(sorted(LAYOUTS)), label=name) for name in NAMES}
    lsh = racecore.SoftLSH.random(
        head_dim,
        draw(st.integers(1, 3), label="L"),
        draw(st.integers(1, 3), label="P"),
        rng=rng,
        n_heads=draw(st.sampled_from([None, n_heads]), label="planes of heads"),
    )
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "readout": draw(st.sampled_from(["ratio", "bucket_mean"]), label="readout"),
        "chunk_size": draw(st.sampled_from([None, 1, 1000, 1025]), label="chunk_size"),
    }
    if draw(st.booleans(), label="masked"):
        options["key_mask"] = rng.random((*(batch or (1,)), n_keys)) < 0.7
    return arrays, layouts, lsh, options


@settings(max_examples=150)
@given(call=calls())
def test_any_layout_equals_its_contiguous_copy(call: tuple[Any, ...]) -> None:
    contiguous, layouts, lsh, options = call
    arranged = {name: arrange(array, layouts[name]) for name, array in contiguous.items()}
    before = {name: array.tobytes() for name, array in arranged.items()}
    # the layouts that broadcast change values: copy back what is really there, in one chunk and
    # native byte order
    copies = {
        name: np.array(array, dtype=contiguous[name].dtype, order="C")
        for name, array in arranged.items()
    }
    expected = run(copies, lsh, **{**options, "chunk_size": None})
    assert_same_bits(run(arranged, lsh, **options), expected)
    assert {name: array.tobytes() for name, array in arranged.items()} == before


@settings(max_examples=20)
@given(call=calls())
def test_the_reference_takes_any_layout(call: tuple[Any, ...]) -> None:
    contiguous, layouts, lsh, options = call
    contiguous = {name: array[..., :70, :, :] for name, array in contiguous.items()}
    options["key_mask"] = None
    arranged = {name: arrange(array, layouts[name]) for name, array in contiguous.items()}
    copies = {
        name: np.array(array, dtype=contiguous[name].dtype, order="C")
        for name, array in arranged.items()
    }
    found = run(arranged, lsh, backend="reference", **options)
    for name, array in run(copies, lsh, backend="reference", **options).items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@settings(max_examples=60)
@given(call=calls(), data=st.data())
def test_results_go_where_the_caller_wants_them(call: tuple[Any, ...], data: st.DataObject) -> None:
    arrays, _, lsh, options = call
    expected = run(arrays, lsh, **options)
    targets = {
        name: arrange(
            np.full_like(expected[name], 7),
            data.draw(st.sampled_from(WRITABLE), label=f"layout of {name}"),
        )
        for name in ("out", "d_query", "d_key", "d_value")
    }
    grads = racecore.Gradients(
        query=targets["d_query"], key=targets["d_key"], value=targets["d_value"]
    )
    found = run(arrays, lsh, out=targets["out"], grads=grads, **options)
    assert_same_bits(found, expected)
    for name, target in targets.items():
        assert found[name] is target, name


def test_writing_into_a_view_leaves_the_rest_alone() -> None:
    query = np.random.default_rng(0).standard_normal((50, 2, 4))
    store = np.full((150, 2, 8), 7.0)
    racecore.attention(query, query, query, out=store[1::3, :, ::2])
    written = np.zeros(store.shape, bool)
    written[1::3, :, ::2] = True
    assert (store[~written] == 7).all()
    assert (store[written] != 7).all()


@pytest.mark.parametrize("layout", ["read_only", "byte_swapped", "broadcast_heads", "unaligned"])
def test_an_output_that_cannot_be_written_in_place_is_refused(layout: str) -> None:
    query = np.random.default_rng(0).standard_normal((5, 2, 4))
    out = arrange(np.zeros((5, 2, 4)), layout)
    with pytest.raises(ValueError, match="^out "):
        racecore.attention(query, query, query, out=out)
    assert not out.any()


def test_an_output_over_an_input_is_refused() -> None:
    query = np.random.default_rng(0).standard_normal((50, 2, 4))
    before = query.copy()
    with pytest.raises(ValueError, match="overlaps"):
        racecore.attention(query, query.copy(), query.copy(), out=query[::-1])
    assert (query == before).all()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_mapped_files(dtype: str, is_causal: bool, tmp_path: Path) -> None:
    arrays, mapped = {}, {}
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        arrays[name] = rng.standard_normal((1100, 2, 6)).astype(DTYPES[dtype])
        path = tmp_path / name
        path.write_bytes(
            b"?" * number + arrays[name].tobytes()
        )  # a header of any length: most maps are not aligned
        mapped[name] = np.memmap(path, DTYPES[dtype], "r", offset=number, shape=arrays[name].shape)
    lsh = racecore.SoftLSH.random(head_dim=6, rng=0)
    assert_same_bits(run(mapped, lsh, is_causal=is_causal), run(arrays, lsh, is_causal=is_causal))
