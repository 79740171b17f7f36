"""Every bad call raises at once and says what was expected, what came and what to do; also under
python -O.
"""

import subprocess
import sys

import numpy as np
import pytest

import racecore
from racecore import inputs
from racecore.errors import BackendUnavailableError

q = np.ones((2, 8, 4, 6), np.float32)
k = np.ones((2, 8, 2, 6), np.float32)
v = np.ones((2, 8, 2, 5), np.float32)
lsh = racecore.SoftLSH.random(6, 2, 2, rng=0)


def state(batch=2, heads=2, dim=5):
    return racecore.RaceState.zeros(lsh, batch, heads, dim)


BAD_CALLS = [
    (
        dict(query=q[0]),
        ValueError,
        r"all be \[B, T, heads, dim\].*query \(8, 4, 6\), key \(2, 8, 2, 6\)",
    ),
    (dict(query=q[:1]), ValueError, "same batch size"),
    (dict(value=v[:, :7]), ValueError, "key and value must agree in tokens and heads"),
    (dict(key=k[..., :5]), ValueError, "same head dim D"),
    (
        dict(query=q[:, :, :3]),
        ValueError,
        "3 query heads must be a multiple of the 2 key/value heads",
    ),
    (dict(query=q[:, :, :0]), ValueError, "must not be 0"),
    (dict(value=v[..., :0]), ValueError, "must not be 0"),
    (
        dict(query=[[1.0]]),
        TypeError,
        "query must be a NumPy array or an array that speaks DLPack, got builtins.list",
    ),
    (
        dict(query=q.astype(int)),
        TypeError,
        r"query must be float16.*got int64; convert it with .astype",
    ),
    (
        dict(query=q.astype(np.float64)),
        TypeError,
        "must have one dtype, got float64, float32, float32",
    ),
    (dict(query=q.astype(np.longdouble)), TypeError, "query must be float16"),
    (dict(query=np.ma.masked_array(q)), TypeError, "masked array.*key_mask"),
    (dict(lsh="hash"), TypeError, "lsh must be a racecore.SoftLSH or None, got str"),
    (
        dict(lsh=racecore.SoftLSH.random(7)),
        ValueError,
        "hashes rows of 7 values, query and key have 6",
    ),
    (
        dict(lsh=racecore.SoftLSH.random(6, n_heads=3)),
        ValueError,
        "for 3 query heads, the query has 4",
    ),
    (dict(readout="mean"), ValueError, "readout must be one of 'ratio', 'bucket_mean', got 'mean'"),
    (dict(is_causal=1), TypeError, "is_causal must be True or False"),
    (dict(is_causal=True, query=q[:, :3]), ValueError, "Tq = 3 and Tk = 8.*initial_state"),
    (
        dict(key_mask=np.ones((2, 7), bool)),
        ValueError,
        r"key_mask must have shape \[B, Tk\] = \(2, 8\), got \(2, 7\)",
    ),
    (dict(key_mask=np.ones((2, 8), np.uint8)), TypeError, "key_mask must be bool.*got uint8"),
    (dict(cu_seqlens=[0, 8]), ValueError, "B must be 1 or absent, got B = 2"),
    (dict(initial_state=3), TypeError, "initial_state must be a racecore.RaceState"),
    (
        dict(initial_state=state(3)),
        ValueError,
        r"initial_state does not fit.*must be \(2, 2, 5\), got \(3, 2, 5\)",
    ),
    (dict(initial_state=state(2, 2, 4)), ValueError, r"got \(2, 2, 4\)"),
    (dict(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    (dict(chunk_size=1.5), TypeError, "chunk_size must be an integer"),
    (dict(chunk_size=5, memory_limit=10**9), ValueError, "give one of them"),
    (dict(memory_limit="many"), ValueError, "'512MB' or '1GiB', got 'many'"),
    (dict(memory_limit=-1), ValueError, "must be positive"),
    (dict(memory_limit=1000), ValueError, "the smallest memory_limit that works is [0-9]+"),
    (
        dict(backend="gpu"),
        ValueError,
        "backend must be None or one of 'reference', 'cpu', 'cuda', got 'gpu'",
    ),
    (
        dict(out=np.empty((2, 8, 4, 4), np.float32)),
        ValueError,
        r"out must have shape \(2, 8, 4, 5\)",
    ),
    (dict(out=np.empty((2, 8, 4, 5))), ValueError, "dtype float32, got .* float64"),
    (dict(out=[1]), TypeError, "out must be a NumPy array"),
    (dict(out=np.broadcast_to(np.float32(0), (2, 8, 4, 5))), ValueError, "read-only"),
]


@pytest.mark.parametrize("function", [racecore.attention, racecore.attention_forward])
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_calls(function, change, error, message):
    arguments = {"query": q, "key": k, "value": v, "lsh": lsh, **change}
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([1, 8], ValueError, r"start at 0 and end at T = 8, got 1 \.\.\. 8"),
        ([0, 7], ValueError, "end at T = 8"),
        ([0, 5, 4, 8], ValueError, "must not decrease, got 5, 4 at index 1"),
        ([], ValueError, "shape"),
        ([[0, 8]], ValueError, r"shape \[n_sequences \+ 1\]"),
        (np.array([0.0, 8.0]), TypeError, "integers"),
        (np.array([], np.int64), ValueError, "shape"),
    ],
)
def test_bad_cu_seqlens(bounds, error, message):
    with pytest.raises(error, match=message):
        racecore.attention(q[0], k[0], v[0], lsh, cu_seqlens=bounds)


def test_mask_and_cu_seqlens_exclude_each_other():
    with pytest.raises(ValueError, match="key_mask and cu_seqlens were both given"):
        racecore.attention(q[0], k[0], v[0], lsh, cu_seqlens=[0, 8], key_mask=np.ones((1, 8), bool))


def test_out_must_not_overlap_an_input():
    buffer = np.ones((3, 2, 8, 4, 6), np.float32)
    with pytest.raises(ValueError, match="out overlaps query in memory"):
        racecore.attention(buffer[0], buffer[1], buffer[2], out=buffer[0])


def test_out_must_not_overlap_an_input_that_was_copied():
    """A byte-swapped input is copied; a result must not land in the original either."""
    swapped = np.ones((8, 2, 6), ">f4")
    before = swapped.copy()
    with pytest.raises(ValueError, match="out overlaps query"):
        racecore.attention(swapped, swapped, swapped, out=swapped.view("<f4"))
    _, saved = racecore.attention_forward(swapped, swapped.copy(), swapped.copy())
    with pytest.raises(ValueError, match=r"out.value overlaps query"):
        racecore.attention_backward(
            np.ones((8, 2, 6)), saved, out=racecore.Gradients(value=swapped.view("<f4"))
        )
    np.testing.assert_array_equal(swapped, before)


def test_out_must_not_overlap_the_initial_state():
    x = np.ones((1, 8, 1, 6))
    past = racecore.RaceState.zeros(racecore.SoftLSH.random(6, rng=0), 1, 1, 6)
    past.append(x, x)
    with pytest.raises(ValueError, match="out overlaps initial_state"):
        racecore.attention(
            x, x, x, initial_state=past, out=past.value_sum.reshape(1, 64, 1, 6)[:, :8]
        )


@pytest.mark.parametrize("out", [(None, None, None), {"query": None}, np.ones(3)])
def test_gradient_targets_are_named(out):
    _, saved = racecore.attention_forward(q, k, v, lsh)
    with pytest.raises(TypeError, match=r"out must have .query, .key and .value"):
        racecore.attention_backward(np.ones((2, 8, 4, 5)), saved, out=out)
    with pytest.raises(ValueError, match=r"out.beta was given"):
        racecore.attention_backward(np.ones((2, 8, 4, 5)), saved, out=racecore.Gradients(beta=1.0))


def test_the_hash_is_that_of_the_initial_state():
    other = racecore.SoftLSH.random(6, 2, 3, rng=5)
    past = racecore.RaceState.zeros(other, 2, 2, 5)
    past.append(k, v)
    np.testing.assert_array_equal(
        racecore.attention(q, k, v, initial_state=past),
        racecore.attention(q, k, v, other, initial_state=past),
    )


def test_any_true_byte_of_a_mask_counts_once():
    mask = np.ones((2, 8), bool)
    mask[:, 5:] = False
    odd = np.where(mask, np.uint8(255), np.uint8(0)).view(bool)
    _, expected = racecore.attention(q, k, v, lsh, key_mask=mask, return_state=True)
    _, found = racecore.attention(q, k, v, lsh, key_mask=odd, return_state=True)
    np.testing.assert_array_equal(found.mass, expected.mass)


def test_out_may_interleave_with_the_inputs():
    """One packed buffer for query, key, value and output is common, and legal: no element is
    shared.
    """
    packed = np.random.default_rng(0).standard_normal((2, 30, 4, 2, 6)).astype(np.float32)
    inputs_before = packed[:, :, :3].copy()
    out = packed[:, :, 3]
    result = racecore.attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], out=out)
    assert result is out
    np.testing.assert_array_equal(packed[:, :, :3], inputs_before)
    np.testing.assert_array_equal(out, racecore.attention(*np.moveaxis(inputs_before, 2, 0)))


def test_backward_names_what_is_wrong():
    _, saved = racecore.attention_forward(q, k, v, lsh, wrt=("query", "value"))
    with pytest.raises(
        ValueError,
        match=r"d_out must have the shape of the output, \(2, 8, 4, 5\), got \(2, 8, 4, 6\)",
    ):
        racecore.attention_backward(q, saved)
    with pytest.raises(TypeError, match="saved must come from racecore.attention_forward, got int"):
        racecore.attention_backward(q, 3)
    d_out = np.ones((2, 8, 4, 5), np.float32)
    with pytest.raises(TypeError, match=r"d_state must have .mass and .value_sum.*int lacks .mass"):
        racecore.attention_backward(d_out, saved, d_state=3)
    with pytest.raises(ValueError, match=r"d_state.mass must have shape"):
        racecore.attention_backward(d_out, saved, d_state=state(1))
    with pytest.raises(
        ValueError, match=r"out.key was given, but wrt of attention_forward does not name 'key'"
    ):
        racecore.attention_backward(d_out, saved, out=racecore.Gradients(key=np.empty_like(k)))
    with pytest.raises(ValueError, match=r"out.query overlaps query"):
        racecore.attention_backward(d_out, saved, out=racecore.Gradients(query=q))
    shared = np.empty((2, 8, 4, 6), np.float32)
    with pytest.raises(ValueError, match=r"out.value overlaps out.query"):
        racecore.attention_backward(
            d_out,
            saved,
            out=racecore.Gradients(
                query=shared, value=shared.reshape(-1)[: v.size].reshape(v.shape)
            ),
        )
    with pytest.raises(TypeError, match="wrt must be None, a name or several names"):
        racecore.attention_forward(q, k, v, wrt=5)
    with pytest.raises(ValueError, match="wrt must name some of query, key"):
        racecore.attention_forward(q, k, v, wrt=("queries",))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_wrt_selects_gradients(backend, is_causal):
    options = {"backend": backend, "is_causal": is_causal}
    out, saved = racecore.attention_forward(q, k, v, lsh, wrt=("query", "beta"), **options)
    grads = racecore.attention_backward(out, saved)
    assert grads.query is not None
    assert isinstance(grads.beta, float)
    assert grads.key is grads.value is grads.planes is grads.state is None
    full = racecore.attention_backward(out, racecore.attention_forward(q, k, v, lsh, **options)[1])
    np.testing.assert_array_equal(full.query, grads.query)
    assert full.beta == grads.beta
    assert full.state is None


def test_cuda_is_refused_with_every_reason():
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)reference: available.*cpu: available.*cuda: "
    ) as caught:
        racecore.attention(q, k, v, lsh, backend="cuda")
    assert set(caught.value.reasons) == {"reference", "cpu", "cuda"}


def test_a_bad_call_leaves_out_alone():
    out = np.full((2, 8, 4, 5), 7, np.float32)
    with pytest.raises(ValueError, match="readout"):
        racecore.attention(q, k, v, lsh, readout="no", out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("512MB", 512_000_000),
        ("1GiB", 2**30),
        ("1 gb", 10**9),
        ("64M", 64_000_000),
        (1234, 1234),
        ("1.5k", 1500),
        ("7", 7),
    ],
)
def test_parse_bytes(text, n_bytes):
    assert inputs.parse_bytes(text) == n_bytes


@pytest.mark.process
def test_checks_survive_optimised_python():
    program = (
        "import numpy as np, racecore\n"
        "x = np.ones((4, 1, 3), np.float32)\n"
        "try:\n    racecore.attention(x, x[:3], x)\n"
        "except ValueError as error:\n    print('refused:', error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, check=True
    )
    assert "refused: key and value must agree" in result.stdout
