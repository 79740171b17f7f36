"""Arrays of other libraries in and out, through DLPack; odd memory."""

import sys
import types

import ml_dtypes
import numpy as np
import pytest

import racecore
from racecore.runtime import arrays


class Foreign:
    """An array of another library that has DLPack and nothing else, in place of real ones."""

    def __init__(self, array, device=(1, 0)):
        self.array = array
        self.dtype = array.dtype
        self.shape = array.shape
        self.device = device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("foreign_arrays")
    module.from_dlpack = lambda array: Foreign(np.from_dlpack(array))
    monkeypatch.setitem(sys.modules, "foreign_arrays", module)
    monkeypatch.setattr(Foreign, "__module__", "foreign_arrays.core")
    return module


def test_dlpack_in_gives_the_same_kind_out(library):
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((2, 20, 2, 5), dtype=np.float32) for _ in range(4))
    lsh = racecore.SoftLSH.random(5, rng=0)
    out, saved = racecore.attention_forward(*map(Foreign, (q, k, v)), lsh)
    grads = racecore.attention_backward(Foreign(d_out), saved)
    plain, plain_saved = racecore.attention_forward(q, k, v, lsh)
    plain_grads = racecore.attention_backward(d_out, plain_saved)
    assert isinstance(out, Foreign)
    np.testing.assert_array_equal(out.array, plain)
    for name in ("query", "key", "value"):
        assert isinstance(getattr(grads, name), Foreign)
        np.testing.assert_array_equal(getattr(grads, name).array, getattr(plain_grads, name))
    state = racecore.RaceState.zeros(lsh, 2, 2, 5)
    state.append(Foreign(k), Foreign(v))
    attended = state.attend(Foreign(q))
    assert isinstance(attended, Foreign)
    np.testing.assert_array_equal(attended.array, plain)


def test_foreign_arrays_that_cannot_be_used_are_named(library):
    x = np.ones((3, 1, 2), np.float32)
    with pytest.raises(TypeError, match="query lives on a device .*type 10"):
        racecore.attention(Foreign(x, device=(10, 0)), x, x)
    with pytest.raises(TypeError, match="x is on a GPU, and here host memory is needed"):
        arrays.as_numpy(Foreign(x, device=(2, 0)), "x")
    needs_gradient = Foreign(x)
    needs_gradient.requires_grad = True
    with pytest.raises(TypeError, match=r"requires a gradient.*\.detach\(\)"):
        racecore.attention(x, needs_gradient, x)
    del library.from_dlpack
    with pytest.raises(TypeError, match="foreign_arrays can be read but not made"):
        racecore.attention(Foreign(x), x, x)


def test_masked_arrays_and_lists_are_refused():
    x = np.ones((3, 1, 2), np.float32)
    with pytest.raises(TypeError, match="masked array"):
        arrays.as_numpy(np.ma.masked_array(x), "x")
    with pytest.raises(TypeError, match="got builtins.list"):
        arrays.as_numpy([1.0], "x")


def test_memory_that_needs_a_copy_is_copied_and_nothing_else():
    x = np.arange(24.0).reshape(4, 6)
    assert arrays.as_numpy(x, "x") is x
    assert np.shares_memory(arrays.as_numpy(x[::-2, ::3], "x"), x)
    swapped = x.astype(x.dtype.newbyteorder())
    np.testing.assert_array_equal(arrays.as_numpy(swapped, "x"), x)
    assert arrays.as_numpy(swapped, "x").dtype.isnative
    packed = np.zeros(4, np.dtype([("flag", "u1"), ("x", "f8")]))["x"]
    packed[:] = range(4)
    assert not packed.flags.aligned
    np.testing.assert_array_equal(arrays.as_numpy(packed, "x"), range(4))
    odd_stride = np.zeros(
        4, np.dtype({"names": ["x"], "formats": ["f8"], "offsets": [0], "itemsize": 12})
    )["x"]
    assert arrays.as_numpy(odd_stride, "x").strides[0] % 8 == 0


def test_subclasses_and_memory_maps_give_plain_arrays(tmp_path):
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(30, 2, 4))
    x[:] = np.random.default_rng(0).standard_normal(x.shape)
    x.flush()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    out = racecore.attention(mapped, mapped, mapped)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, racecore.attention(*[np.array(mapped)] * 3))


def test_results_start_on_a_cache_line():
    for shape in [(3,), (0, 4), (7, 5, 3)]:
        array = arrays.empty(shape, np.float32)
        assert array.shape == shape
        assert array.size == 0 or array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous


def test_torch_tensors_where_torch_is_installed():
    torch = pytest.importorskip(
        "torch", reason="torch is not installed; DLPack is tested with a stand-in above"
    )
    q, k, v = (torch.randn(2, 20, 2, 5, dtype=torch.bfloat16) for _ in range(3))
    out = racecore.attention(q, k, v)
    assert out.dtype == torch.bfloat16
    as_numpy = [x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for x in (q, k, v)]
    expected = racecore.attention(*as_numpy)
    np.testing.assert_array_equal(out.view(torch.int16).numpy(), expected.view(np.int16))
