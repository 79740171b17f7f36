"""racecore.outofcore: the same bits as in memory, for any kind of input, output and chunks."""

from __future__ import annotations

import hashlib
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import racecore
from racecore import inputs, outofcore
from racecore.outofcore import loops, schedule
from racecore.outofcore.sinks import open_sink
from racecore.outofcore.synthetic import Synthetic

LSH = racecore.SoftLSH.random(16, 3, 2, beta=1.5, rng=3)
NAMES = ("query", "key", "value", "d_out")


def make(shape_q, shape_kv, dtype=np.float32, value_dim=24, seed=0):
    """Return query, key, value, d_out; 4 query heads, 2 key heads, head dim 16."""
    rng = np.random.default_rng(seed)
    shapes = (
        (*shape_q, 4, 16),
        (*shape_kv, 2, 16),
        (*shape_kv, 2, value_dim),
        (*shape_q, 4, value_dim),
    )
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def in_memory(x, wrt=("query", "key", "value", "planes", "beta"), **options):
    out, saved = racecore.attention_forward(
        x["query"], x["key"], x["value"], LSH, wrt=wrt, **options
    )
    return out, racecore.attention_backward(x["d_out"], saved)


def smallest(x, **options):
    """Return the smallest memory limit that works, from the message: chunks of one segment."""
    with pytest.raises(ValueError, match="the smallest that works here is") as caught:
        outofcore.run(
            x["query"], x["key"], x["value"], None, LSH, d_out=x["d_out"], memory_limit=1, **options
        )
    return int(str(caught.value).split("works here is ")[1].split(" ")[0].replace(",", ""))


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.fixture(params=["files", "arrays", "sliceable", "big-endian files", "Fortran files"])
def kind(request):
    return request.param


class Sliceable:
    """The interface that zarr and h5py have in common."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        return self.array[index].copy()

    def __setitem__(self, index, rows):
        self.array[index] = rows


def stored(x, kind, folder):
    if kind == "arrays":
        return x
    if kind == "sliceable":
        return {name: Sliceable(array) for name, array in x.items()}
    for name, array in x.items():
        kept = array.astype(array.dtype.newbyteorder(">")) if kind.startswith("big") else array
        np.save(
            folder / f"{name}.npy", np.asfortranarray(kept) if kind.startswith("Fortran") else kept
        )
    return {name: folder / f"{name}.npy" for name in x}


def targets(x, kind, folder):
    names = {"out": "d_out", "d_query": "query", "d_key": "key", "d_value": "value"}
    if "files" in kind:
        return {name: str(folder / f"{name}.result.npy") for name in names}
    arrays = {name: np.full_like(x[like], np.nan) for name, like in names.items()}
    return {name: Sliceable(a) for name, a in arrays.items()} if kind == "sliceable" else arrays


def result(target):
    return np.load(target) if isinstance(target, str) else getattr(target, "array", target)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
def test_same_bits_as_in_memory_for_every_kind_of_array(kind, causal, readout, tmp_path):
    x = make((5000,), (5000,))
    options = {"is_causal": causal, "readout": readout}
    out, grads = in_memory(x, **options)
    read, written = stored(x, kind, tmp_path), targets(x, kind, tmp_path)
    rest = {name: written[name] for name in ("d_query", "d_key", "d_value")}
    report = outofcore.run(
        read["query"],
        read["key"],
        read["value"],
        written["out"],
        LSH,
        d_out=read["d_out"],
        d_lsh=True,
        memory_limit=smallest(x, **options),
        **rest,
        **options,
    )
    for name, wanted in {
        "out": out,
        "d_query": grads.query,
        "d_key": grads.key,
        "d_value": grads.value,
    }.items():
        assert_same_bits(result(written[name]), wanted)
        assert report.digests[name] == digest(wanted)
    assert_same_bits(report.d_planes, grads.planes)
    assert report.d_beta == grads.beta
    assert report.tokens == 5000
    assert not list(tmp_path.glob("*.partial"))


def digest(array):
    sink = open_sink(None, "x", array.shape, array.dtype, [])
    flat = array.reshape(-1, *array.shape[-2:])
    for begin in reversed(range(0, len(flat), 777)):
        sink.write(begin, min(begin + 777, len(flat)), flat[begin : begin + 777])
    return f"{sink.checksum:016x}"


CUTS = {
    "short rows of a batch": ((3, 700), (3, 700), {}),
    "long rows of a batch": ((2, 2500), (2, 2500), {}),
    "more keys than queries": ((2, 300), (2, 2100), {}),
    "more queries than keys": ((2, 2100), (2, 300), {}),
    "packed": ((6000,), (6000,), {"cu_seqlens": [0, 0, 5, 100, 2900, 2900, 3000, 4024, 6000]}),
    "nothing": ((0,), (0,), {}),
}


CUTS_AND_ORDERS = [
    (cut, causal)
    for cut, (q, kv, _) in CUTS.items()
    for causal in (False, True)
    if q == kv or not causal
]


@pytest.mark.parametrize(("cut", "causal"), CUTS_AND_ORDERS)
@pytest.mark.parametrize("multiple", [1, 2, 50])
def test_same_bits_for_many_sequences(cut, causal, multiple, tmp_path):
    shape_q, shape_kv, options = CUTS[cut]
    x = make(shape_q, shape_kv)
    out, grads = in_memory(x, is_causal=causal, **options)
    written = targets(x, "arrays", tmp_path)
    limit = multiple * smallest(x, is_causal=causal, **options)
    report = outofcore.run(
        *(x[name] for name in NAMES[:3]),
        written["out"],
        LSH,
        d_out=x["d_out"],
        is_causal=causal,
        memory_limit=limit,
        d_query=written["d_query"],
        d_key=written["d_key"],
        d_value=written["d_value"],
        **options,
    )
    for name, wanted in {
        "out": out,
        "d_query": grads.query,
        "d_key": grads.key,
        "d_value": grads.value,
    }.items():
        assert_same_bits(written[name], wanted)
    assert report.d_beta == grads.beta
    assert report.d_planes is None


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("as_file", [False, True])
def test_masked_tokens_may_hold_anything(causal, as_file, tmp_path):
    x = make((2, 2300), (2, 2300))
    mask = np.random.default_rng(5).random((2, 2300)) < 0.7
    out, grads = in_memory(x, is_causal=causal, key_mask=mask)
    x["key"][~mask] = np.nan
    x["value"][~mask] = np.inf
    np.save(tmp_path / "mask.npy", mask)
    written = targets(x, "arrays", tmp_path)
    outofcore.run(
        *(x[name] for name in NAMES[:3]),
        written["out"],
        LSH,
        d_out=x["d_out"],
        is_causal=causal,
        key_mask=tmp_path / "mask.npy" if as_file else mask,
        d_query=written["d_query"],
        memory_limit=smallest(x, is_causal=causal),
        d_key=written["d_key"],
    )
    assert_same_bits(written["out"], out)
    assert_same_bits(written["d_query"], grads.query)
    assert_same_bits(written["d_key"], grads.key)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_dtype_from_file_to_file(dtype, tmp_path):
    x = make((2100,), (2100,), dtype)
    out, grads = in_memory(x, is_causal=True)
    read, written = stored(x, "files", tmp_path), targets(x, "files", tmp_path)
    name = "bfloat16" if dtype == ml_dtypes.bfloat16 else None
    outofcore.run(
        *(read[n] for n in NAMES[:3]),
        written["out"],
        LSH,
        d_out=read["d_out"],
        is_causal=True,
        dtype=name,
        d_value=written["d_value"],
    )
    assert_same_bits(np.load(written["out"]).view(dtype), out)
    assert_same_bits(np.load(written["d_value"]).view(dtype), grads.value)


def test_forward_alone_and_digests_do_not_depend_on_the_limit():
    x = make((4000,), (4000,))
    digests = [
        outofcore.run(*(x[name] for name in NAMES[:3]), None, LSH, memory_limit=limit).digests
        for limit in (smallest(x), "100MB")
    ]
    assert (
        digests[0]
        == digests[1]
        == {"out": digest(racecore.attention(*(x[name] for name in NAMES[:3]), LSH))}
    )


def test_report_of_busy_times(tmp_path):
    x = make((40_000,), (40_000,))
    paths = stored(x, "files", tmp_path)
    report = outofcore.run(*(paths[name] for name in NAMES[:3]), tmp_path / "o.npy", LSH)
    busy = report.busy
    assert all(0 < seconds <= report.seconds for seconds in busy.values())
    assert (
        max(busy["reading"], busy["writing"])
        <= busy["reading or writing"]
        <= busy["reading"] + busy["writing"]
    )


def test_progress_counts_all_passes():
    x, reports = make((4000,), (4000,)), []
    for causal, total in ((False, 16000), (True, 12000)):
        outofcore.run(
            *(x[name] for name in NAMES[:3]),
            None,
            LSH,
            d_out=x["d_out"],
            is_causal=causal,
            progress=lambda done, of: reports.append((done, of)),
        )
        assert reports[-1] == (total, total)


def test_non_finite_numbers_are_named_and_nothing_is_left(tmp_path):
    x = make((2, 3000), (2, 3000))
    for name, index, message in (
        ("query", (1, 2999, 3, 5), "query is nan at batch row 1, token 2999, head 3, dimension 5"),
        ("value", (0, 7, 1, 23), "value is nan at batch row 0, token 7, head 1, dimension 23"),
        ("d_out", (1, 0, 0, 0), "d_out is nan at batch row 1, token 0, head 0, dimension 0"),
    ):
        broken = x | {name: x[name].copy()}
        broken[name][index] = np.nan
        target = tmp_path / "out.npy"
        with pytest.raises(ValueError, match=message):
            outofcore.run(
                *(broken[n] for n in NAMES[:3]),
                target,
                LSH,
                d_out=broken["d_out"],
                memory_limit=smallest(x),
            )
        assert list(tmp_path.iterdir()) == []
        outofcore.run(
            *(broken[n] for n in NAMES[:3]), None, LSH, d_out=broken["d_out"], check_finite=False
        )


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    x = make((2000,), (2000,))
    paths = stored(x, "files", tmp_path)
    names = sorted(os.listdir(tmp_path))
    link = tmp_path / "link.npy"
    os.link(paths["value"], link)
    q, k, v = (paths[name] for name in NAMES[:3])
    with pytest.raises(ValueError, match="out is the same file as value"):
        outofcore.run(q, k, v, link, LSH)
    link.unlink()
    with pytest.raises(ValueError, match="out is the same file as query"):
        outofcore.run(np.load(q, mmap_mode="r"), k, v, q, LSH)
    with pytest.raises(ValueError, match="d_key is the same file as out"):
        outofcore.run(
            q, k, v, tmp_path / "o.npy", LSH, d_out=paths["d_out"], d_key=tmp_path / "." / "o.npy"
        )
    with pytest.raises(ValueError, match="gradients need d_out"):
        outofcore.run(q, k, v, None, LSH, d_query=tmp_path / "dq.npy")
    with pytest.raises(FileNotFoundError, match="no folder"):
        outofcore.run(q, k, v, tmp_path / "nowhere" / "o.npy", LSH)
    with pytest.raises(
        ValueError, match=r"d_out must have the shape and dtype of the output, \(2000, 4, 24\)"
    ):
        outofcore.run(q, k, v, None, LSH, d_out=q)
    with pytest.raises(ValueError, match="same head dim D"):
        outofcore.run(q, v, v, None, LSH)
    with pytest.raises(TypeError, match="out must be a path, an array, or None; got float"):
        outofcore.run(q, k, v, 1.0, LSH)
    with pytest.raises(ValueError, match=r"out must have shape \(2000, 4, 24\)"):
        outofcore.run(q, k, v, np.zeros((2, 2)), LSH)
    assert sorted(os.listdir(tmp_path)) == names


def test_files_of_another_size_than_their_header_says_are_refused(tmp_path):
    x = make((2000,), (2000,))
    paths = stored(x, "files", tmp_path)
    size = paths["key"].stat().st_size
    with open(paths["key"], "ab") as file:
        file.write(b"x")
    with pytest.raises(
        ValueError, match=f"has bytes to spare.*{size:,} bytes, the file has {size + 1:,}"
    ):
        outofcore.run(*(paths[name] for name in NAMES[:3]), None, LSH)
    os.truncate(paths["key"], size - 4)
    with pytest.raises(ValueError, match="was cut short"):
        outofcore.run(*(paths[name] for name in NAMES[:3]), None, LSH)


def test_a_file_cut_short_during_the_run_is_an_error_and_leaves_nothing(tmp_path):
    x = make((5000,), (5000,))
    paths = stored(x, "files", tmp_path)

    def cut(done, total):
        os.truncate(paths["query"], 1000)

    with pytest.raises(OSError, match=r"query\.npy was cut short while it was being read"):
        outofcore.run(
            *(paths[name] for name in NAMES[:3]),
            tmp_path / "out.npy",
            LSH,
            memory_limit=smallest(x),
            progress=cut,
        )
    assert not [
        path for path in tmp_path.iterdir() if "out.npy" in path.name and path.name != "d_out.npy"
    ]


class LastRows:
    """Keeps the last rows of what is written to it."""

    def __init__(self, shape, n):
        self.shape, self.dtype, self.n = shape, np.dtype(np.float16), n
        self.rows = np.full((n, *shape[1:]), np.nan, self.dtype)

    def __setitem__(self, index, rows):
        if index.stop > self.shape[0] - self.n:
            first = index.start - (self.shape[0] - self.n)
            self.rows[max(first, 0) : first + len(rows)] = rows[max(-first, 0) :]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_rows_beyond_32_bits_of_a_sparse_file(causal, tmp_path):
    """The last 100 tokens of a sparse file of 4 GB, more than 2^31 elements from its beginning."""
    shape, n, path = ((1 << 21) + 100, 4, 256), 100, tmp_path / "x.npy"
    near = np.random.default_rng(0).standard_normal((n, *shape[1:])).astype(np.float16)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": shape}
        )
        file.truncate(file.tell() + 2 * int(np.prod(shape, dtype=np.int64)))
        file.seek(-near.nbytes, os.SEEK_END)
        near.tofile(file)
    lsh = racecore.SoftLSH.random(256, 1, 1, rng=0)
    out, saved = racecore.attention_forward(near, near, near, lsh, is_causal=causal)
    grads = racecore.attention_backward(near, saved)
    sinks = [LastRows(shape, n) for _ in range(4)]
    outofcore.run(
        path,
        path,
        path,
        sinks[0],
        lsh,
        d_out=path,
        d_query=sinks[1],
        d_key=sinks[2],
        d_value=sinks[3],
        is_causal=causal,
        cu_seqlens=[0, shape[0] - n, shape[0]],
    )
    for sink, wanted in zip(sinks, (out, grads.query, grads.key, grads.value), strict=True):
        assert_same_bits(sink.rows, wanted)


# The schedule


@st.composite
def packed(draw):
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 5, 1000, 1024, 1025, 2048, 5000]), min_size=1, max_size=12)
    )
    return np.concatenate([[0], np.cumsum(lengths)])


@given(
    bounds=packed(),
    n_segments=st.integers(1, 3),
    sequences=st.integers(1, 4),
    causal=st.booleans(),
    back=st.booleans(),
)
def test_every_pass_sees_every_token_once_and_cuts_at_segments(
    bounds, n_segments, sequences, causal, back
):
    n = int(bounds[-1])
    q, kv = np.zeros((n, 1, 16), np.float32), np.zeros((n, 1, 16), np.float32)
    passed = inputs.Passed.resolve(q, kv, kv)
    problem, _ = inputs.check_attention(
        passed, LSH, is_causal=causal, readout="ratio", cu_seqlens=bounds
    )
    limit = schedule.MemoryBudget(n_segments * 1024, 1 << 20, sequences, 0)
    seen = {stage: np.zeros(n, int) for stage in schedule.PASSES[causal, back]}
    order = []
    for number, task in enumerate(schedule.tasks(problem, back, limit)):
        assert task.number == number
        assert task.first <= number
        p = schedule.PASSES[causal, back][task.pass_name]
        begin, end = task.tokens(p.reads[0])
        assert end - begin <= limit.chunk_tokens
        assert len(task.sequences) <= sequences
        seen[task.pass_name][begin:end] += 1
        order.append((task.first, list(seen).index(task.pass_name)))
        for _, q_begin, _, k_begin, _ in task.sequences:
            first = begin + (k_begin if "key" in p.reads else q_begin)
            assert first == n or (first - bounds[bounds <= first].max()) % 1024 == 0
    assert all((counts == 1).all() for counts in seen.values())
    assert order == sorted(order)


def test_limits_follow_the_formula_and_grow_with_the_memory():
    x = np.broadcast_to(np.float32(0), (1 << 20, 4, 128))
    passed = inputs.Passed.resolve(x, x, x)
    problem, _ = inputs.check_attention(passed, None, is_causal=True, readout="ratio")
    chunks = []
    for limit in (40e6, 100e6, 200e6, 1e9, 64e9):
        found = schedule.budget_memory(problem, True, int(limit))
        state = 4 * 64 * 129 * 8
        buffers = 2 * found.chunk_tokens * 7 * 4 * 128 * 4
        assert (
            found.peak_bytes
            == buffers + found.workspace_bytes + 2 * found.unit_sequences * state
            <= limit
        )
        chunks.append(found.chunk_tokens)
    assert chunks == sorted(chunks)
    assert chunks[0] == 1024
    assert chunks[-1] == 16 * 1024


# Synthetic


def test_synthetic_numbers_equal_those_in_plain_python():
    first = (1 << 32) - 600
    values = np.empty(1000, np.float32)
    Synthetic((1 << 33, 1, 1), seed=7).fill(values, first)
    for position, value in zip(range(first, first + 1000), values, strict=True):
        period, x = divmod(position, 1 << 32)
        a, b = np.frombuffer(hashlib.sha256(f"7 {period}".encode()).digest()[:8], "<u4").tolist()
        x ^= a
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = ((x ^ x >> 15) + b) * 0x846CA68B % 2**32
        x ^= x >> 16
        assert value == (sum((x >> shift) & 0x7F for shift in (0, 8, 16, 24)) - 254) / 64


def test_synthetic_is_the_same_in_any_slices():
    x = Synthetic((3000, 3, 5), seed=4)
    whole = x[:]
    np.testing.assert_array_equal(
        whole, np.concatenate([x[begin : begin + 7] for begin in range(0, 3000, 7)])
    )
    batch = Synthetic((3, 1000, 3, 5), seed=4)
    np.testing.assert_array_equal(batch[1:3].reshape(-1, 3, 5), whole[1000:])
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(
            Synthetic((3000, 3, 5), dtype, seed=4)[:].astype(np.float32), whole
        )


def test_synthetic_numbers_look_normal_and_independent():
    a, b = (Synthetic((1 << 18, 1, 4), seed=seed)[:].reshape(-1).astype(float) for seed in (0, 1))
    n = a.size
    assert abs(a.mean()) < 5 * 1.155 / n**0.5
    assert abs(a.std() - 1.1547) < 0.005
    assert np.abs(a).max() <= 254 / 64
    for other in (b, np.roll(a, 1), np.roll(a, 4), np.roll(b, 1)):
        assert abs(np.corrcoef(a, other)[0, 1]) < 5 / n**0.5


def test_synthetic_beyond_32_bits():
    x = Synthetic((1 << 33, 1, 1), seed=2)
    across = x[(1 << 32) - 50 : (1 << 32) + 50].reshape(-1)
    np.testing.assert_array_equal(across[:50], x[(1 << 32) - 50 : 1 << 32].reshape(-1))
    np.testing.assert_array_equal(across[50:], x[1 << 32 : (1 << 32) + 50].reshape(-1))
    assert (across[50:] != x[:50].reshape(-1)).any()  # other keys, not the same numbers again
    assert np.unique(across).size > 50


@pytest.mark.parametrize(
    "bad", [((10, 4), 0), ((10, -4, 4), 0), ((10, 4, 4), -1), ((10, 4, 4), 1.5)]
)
def test_synthetic_refuses_bad_shapes_dtypes_and_seeds(bad):
    with pytest.raises(ValueError, match="must be"):
        Synthetic(bad[0], np.float32, bad[1])
    with pytest.raises(TypeError, match="dtype must be"):
        Synthetic((10, 4, 4), np.int32)


def test_runs_over_synthetic_arrays_equal_runs_over_what_they_contain():
    made = [Synthetic((3000, 2, 16), seed=seed) for seed in range(4)]
    arrays = [x[:] for x in made]
    reports = [
        outofcore.run(*inputs_[:3], None, LSH, d_out=inputs_[3], is_causal=True, memory_limit=limit)
        for inputs_, limit in ((made, "5MB"), (arrays, "500MB"))
    ]
    assert reports[0].digests == reports[1].digests
    assert len(set(reports[0].digests.values())) == 4
    assert reports[0].peak_anonymous_bytes > 10e6


# Checksums


@pytest.mark.parametrize("size", [2, 4, 8])
def test_checksums_equal_those_in_plain_python(size):
    words = np.random.default_rng(1).integers(
        0, 2 ** (8 * size), 100, dtype=f"u{size}", endpoint=False
    )
    total, first = 0, 1 << 40
    for position, word in enumerate(words.tolist(), first):
        weight = position * 0x9E3779B97F4A7C15 % 2**64
        weight = (weight ^ weight >> 29) * 0xBF58476D1CE4E5B9 % 2**64
        total += word * ((weight ^ weight >> 32) | 1)
    assert int(loops.checksum(words, first)) == total % 2**64


def test_the_first_word_with_all_bits_of_a_mask():
    words = np.zeros(10_000, np.uint32)
    assert loops.first_with_bits(words, np.uint32(6)) == -1
    words[5000:] = 2
    assert loops.first_with_bits(words, np.uint32(6)) == -1
    words[[9999, 9000]] = 7
    assert loops.first_with_bits(words, np.uint32(6)) == 9000


def test_checksum_depends_on_every_bit_and_position_but_not_on_order():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 5000, dtype=np.uint32)
    whole = loops.checksum(words, 10)
    halves = (loops.checksum(words[2000:], 2010), loops.checksum(words[:2000], 10))
    assert sum(map(int, halves)) % 2**64 == int(whole)
    for position, bit in rng.integers(0, (5000, 32), (50, 2)):
        other = words.copy()
        other[position] ^= np.uint32(1 << int(bit))
        assert loops.checksum(other, 10) != whole
    other = words.copy()
    other[[7, 8]] = other[[8, 7]]
    assert loops.checksum(other, 10) != whole
    assert loops.checksum(words, 11) != whole
