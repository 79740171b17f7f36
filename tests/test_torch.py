"""The PyTorch adapter: the bits of racecore on NumPy arrays, gradients that autograd can trust, and
what training loops do.
"""

from __future__ import annotations

import copy
import io
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from problems import PROBLEMS

import racecore

torch = pytest.importorskip("torch", reason="torch is not installed; only its adapter needs it")

from racecore.adapters.torch import RaceAttention, RaceCache, race_attention, race_sdpa
from racecore.adapters.torch.operator import attend, attend_backward

# Inductor and DistributedDataParallel warn of things in PyTorch itself; forked workers of what
# racecore is made for.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
MODES = list(itertools.product((False, True), ("ratio", "bucket_mean")))
IDS = [f"{'causal' if is_causal else 'bidirectional'}-{readout}" for is_causal, readout in MODES]


def made(shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def inputs(
    dtype=torch.float64, n=7, batch=2, heads=4, kv_heads=2, dim=6, value_dim=5, requires_grad=True
):
    """Return query, key, value, planes and beta."""
    shapes = (
        (batch, n, heads, dim),
        (batch, n, kv_heads, dim),
        (batch, n, kv_heads, value_dim),
        (3, 2, dim),
    )
    tensors = [made(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    tensors.append(torch.tensor(1.3, dtype=dtype))
    return [x.requires_grad_(requires_grad) for x in tensors]


def bits(tensor):
    """Return a tensor as a NumPy array that can be compared."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensor_of(array):
    array = np.array(array, array.dtype.newbyteorder("="), order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS[::6], ids=lambda problem: str(problem.seed))
def test_same_bits_as_numpy(problem, dtype):
    x = problem.arrays(dtype)
    lsh = racecore.SoftLSH(x.planes, x.beta)
    options = {"is_causal": problem.is_causal, "readout": problem.readout}
    out, saved = racecore.attention_forward(
        x.query, x.key, x.value, lsh, key_mask=x.key_mask, cu_seqlens=x.cu_seqlens, **options
    )
    grads = racecore.attention_backward(x.d_out, saved)
    tensors = [
        tensor_of(array).requires_grad_()
        for array in (x.query, x.key, x.value, x.planes, np.array(x.beta))
    ]
    key_mask = None if x.key_mask is None else torch.from_numpy(x.key_mask)
    cu_seqlens = None if x.cu_seqlens is None else torch.from_numpy(x.cu_seqlens)
    found = race_attention(*tensors, key_mask=key_mask, cu_seqlens=cu_seqlens, **options)
    assert found.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(bits(found), bits(tensor_of(out)))
    found.backward(tensor_of(x.d_out))
    for tensor, name in zip(tensors, ("query", "key", "value", "planes", "beta"), strict=True):
        expected = np.asarray(getattr(grads, name))
        np.testing.assert_array_equal(bits(tensor.grad), bits(tensor_of(expected)), err_msg=name)


@pytest.mark.parametrize(("is_causal", "readout"), MODES, ids=IDS)
def test_gradcheck(is_causal, readout):
    def attention(*tensors):
        return race_attention(*tensors, is_causal=is_causal, readout=readout)

    assert torch.autograd.gradcheck(attention, inputs(), nondet_tol=0.0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_with_masks_and_packed(is_causal):
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda *x: race_attention(*x, is_causal=is_causal, key_mask=mask), inputs(), nondet_tol=0.0
    )
    bounds = torch.tensor([0, 2, 2, 7])
    assert torch.autograd.gradcheck(
        lambda *x: race_attention(*x, is_causal=is_causal, cu_seqlens=bounds),
        inputs(batch=1),
        nondet_tol=0.0,
    )


def test_gradients_of_a_few():
    """Only the wanted gradients are computed; the values stay."""
    for wanted in range(5):
        tensors = inputs(requires_grad=False)
        tensors[wanted].requires_grad_()
        race_attention(*tensors, is_causal=True).sum().backward()
        everything = inputs()
        race_attention(*everything, is_causal=True).sum().backward()
        for i, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (i == wanted)
        torch.testing.assert_close(
            tensors[wanted].grad, everything[wanted].grad, rtol=1e-12, atol=1e-12
        )


def test_without_gradients():
    tensors = inputs()
    with torch.no_grad():
        out = race_attention(*tensors)
    assert not out.requires_grad
    np.testing.assert_array_equal(bits(out), bits(race_attention(*tensors)))


@pytest.mark.parametrize(
    "beta",
    [
        1.3,
        np.array(1.3),
        torch.tensor(1.3),
        torch.tensor([0.5, 1.0, 1.5, 2.0]),
        np.array([0.5, 1.0, 1.5, 2.0]),
        [1.0] * 4,
    ],
    ids=["float", "0-d array", "0-d", "1-d", "1-d array", "list"],
)
def test_beta(beta):
    query, key, value, planes, _ = inputs(torch.float32)
    expected = racecore.attention(
        *(x.detach().numpy() for x in (query, key, value)),
        racecore.SoftLSH(planes.detach().numpy(), np.asarray(beta)),
    )
    np.testing.assert_array_equal(bits(race_attention(query, key, value, planes, beta)), expected)


def test_compiler_takes_other_kinds_of_beta():
    query, key, value, planes, _ = inputs(torch.float32)
    compiled = torch.compile(
        lambda q: race_attention(q, key, value, planes, 1.3), backend="aot_eager", fullgraph=True
    )
    np.testing.assert_array_equal(
        bits(compiled(query)), bits(race_attention(query, key, value, planes, 1.3))
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_opcheck(is_causal):
    tensors = inputs(torch.float32)
    torch.library.opcheck(attend, (*tensors, None, None, is_causal, "ratio"))
    d_out = made((2, 7, 4, 5))
    arguments = [x.detach() for x in tensors]
    torch.library.opcheck(
        attend_backward,
        (d_out, *arguments, None, None, is_causal, "ratio", "query key value planes beta"),
    )
    torch.library.opcheck(
        attend_backward, (d_out, *arguments, None, None, is_causal, "ratio", "key beta")
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layer(backend):
    """One graph, without a break, for training and with lengths that change."""
    torch._dynamo.reset()
    layer = RaceAttention(32, 4, num_kv_heads=2, learn_planes=True, rope_base=100.0)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for n in (50, 70):
        x, y = (made((2, n, 32)).requires_grad_() for _ in range(2))
        expected, found = layer(x), compiled(y)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        layer.zero_grad()
        expected.square().sum().backward()
        wanted = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        layer.zero_grad()
        found.square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_backward_without_forward_has_the_same_bits(monkeypatch):
    """What the compiler's operator does; over several chunks too."""
    monkeypatch.setattr("racecore.inputs.WORKSPACE_BYTES", 3 << 20)
    for is_causal in (False, True):
        tensors = inputs(torch.float32, n=9000, batch=1, dim=16, value_dim=24)
        out = race_attention(*tensors, is_causal=is_causal)
        out.backward(made(out.shape))
        grads = attend_backward(
            made(out.shape),
            *(x.detach() for x in tensors),
            None,
            None,
            is_causal,
            "ratio",
            "query key value planes beta",
        )
        for tensor, grad in zip(tensors, grads, strict=True):
            np.testing.assert_array_equal(bits(tensor.grad), bits(grad))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_same_bits(use_reentrant):
    layer = RaceAttention(32, 4)
    grads = []
    for checkpointed in (False, True):
        layer.zero_grad()
        x = made((1, 3000, 32)).requires_grad_()
        y = x * 1.0
        out = (
            torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=use_reentrant)
            if checkpointed
            else layer(y)
        )
        out.square().sum().backward()
        grads.append([bits(x.grad), *(bits(p.grad) for p in layer.parameters())])
    for plain, again in zip(*grads, strict=True):
        np.testing.assert_array_equal(plain, again)


def test_checkpoint_drops_what_forward_kept():
    """Everything of size T goes through autograd's own saving, where checkpointing and offloading
    can reach it.
    """
    kept = []
    tensors = inputs(torch.float32, n=4000, batch=1)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or len(kept) - 1, lambda i: kept[i]
    ):
        out = race_attention(*tensors, is_causal=True)
    assert len(kept) > len(tensors)  # states, too
    out.sum().backward()
    assert all(x.grad is not None for x in tensors)
    held = [v for v in vars(out.grad_fn).values() if isinstance(v, (np.ndarray, torch.Tensor))]
    assert not held


def test_backward_twice_over_one_graph():
    tensors = inputs(torch.float32)
    out = race_attention(*tensors)
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), tensors)


def test_inputs_changed_in_place_are_noticed():
    query, *others = inputs(torch.float32)
    changed = query * 1.0
    out = race_attention(changed, *others)
    changed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled):
    tensors = inputs()
    function = torch.compile(race_attention, backend="eager") if compiled else race_attention
    (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[:1], create_graph=True)
    assert torch.isfinite(grad).all()  # the first one is there
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_transforms_of_functions_are_refused(transform):
    query, *others = inputs(torch.float32, requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transform(lambda x: race_attention(x, *others).sum())(query)


def test_second_derivative_of_beta_alone_is_refused():
    query, key, value, planes, beta = inputs(requires_grad=False)
    (grad,) = torch.autograd.grad(
        race_attention(query, key, value, planes, beta.requires_grad_()).sum(),
        beta,
        create_graph=True,
    )
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.square().backward()


def test_forward_mode_is_refused():
    from torch.autograd import forward_ad

    query, *others = inputs(torch.float32, requires_grad=False)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        race_attention(forward_ad.make_dual(query, query), *others)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_no_constant():
    layer, x, y = RaceAttention(16, 2), made((1, 5, 16)), made((1, 5, 16), seed=1)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        np.testing.assert_array_equal(bits(traced(y)), bits(layer(y)))
        graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
        np.testing.assert_array_equal(bits(graph(y)), bits(layer(y)))


def test_gradient_accumulation():
    layer = RaceAttention(32, 4)
    x = made((4, 50, 32))
    layer(x).square().sum().backward()
    whole = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for part in x.split(2):
        layer(part).square().sum().backward()
    for p, grad in zip(layer.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_autocast():
    layer, x = RaceAttention(32, 4), made((1, 40, 32)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        mixed = race_attention(*(y.to(torch.float32) for y in inputs(torch.float32)))
    assert out.dtype == mixed.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == layer.beta.grad.dtype == torch.float32
    plain = layer(x)
    assert (out.float() - plain).norm() < 0.02 * plain.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert race_attention(*inputs(torch.float64)).dtype == torch.float64


# Layouts and traps
# --------------------------------------------------------------------------------------------------


def test_any_strides_are_read_in_place():
    tensors = inputs(torch.float32)
    expected = race_attention(*tensors)
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:3]]
    every_second = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in transposed]
    for views in (transposed, every_second):
        assert not views[0].is_contiguous()
        np.testing.assert_array_equal(bits(race_attention(*views, *tensors[3:])), bits(expected))
    one = tensors[0][:, :1].detach().expand(-1, 7, -1, -1)
    np.testing.assert_array_equal(
        bits(race_attention(one, *tensors[1:])),
        bits(race_attention(one.contiguous(), *tensors[1:])),
    )


def test_lazy_minus_sign():
    query, key, value, planes, beta = inputs(torch.float32)
    negative = torch.complex(query.detach(), query.detach()).conj().imag
    assert negative.is_neg()
    np.testing.assert_array_equal(
        bits(race_attention(negative, key, value, planes, beta)),
        bits(race_attention(-query, key, value, planes, beta)),
    )


def test_numpy_arrays_that_torch_must_not_get():
    """A reversed or read-only array goes into racecore as NumPy's; what comes back as a tensor has
    memory of its own.
    """
    array = np.ones((5, 2, 8), np.float32)
    array.flags.writeable = False
    tensor = torch.ones(5, 2, 8)
    assert isinstance(racecore.attention(tensor, array[::-1], array), torch.Tensor)
    assert isinstance(racecore.attention(array, tensor, array[:, ::-1]), np.ndarray)
    assert (array == 1).all()


def test_outputs_share_no_memory_with_inputs():
    tensors = inputs(torch.float32)
    out = race_attention(*tensors)
    with torch.no_grad():
        before = out.clone()
        for x in tensors:
            x.zero_()
    np.testing.assert_array_equal(bits(out), bits(before))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": lambda x: x.to(torch.float16)}, TypeError, "must have one dtype"),
        ({"query": lambda x: x.int()}, TypeError, "query must be float16"),
        ({"key": lambda x: x[:, :-1]}, ValueError, "agree in tokens"),
        ({"planes": lambda x: x[..., :-1]}, ValueError, "lsh hashes rows of 5 values"),
        ({"planes": lambda x: x * float("nan")}, ValueError, "planes must be finite"),
        (
            {"beta": lambda x: x.reshape(1, 1)},
            ValueError,
            r"beta must be a number or have shape \[H\]",
        ),
        ({"query": lambda x: x.detach().numpy()}, TypeError, "query must be a torch.Tensor"),
        ({"key": lambda x: x.to("meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_input(change, error, message):
    tensors = dict(
        zip(("query", "key", "value", "planes", "beta"), inputs(torch.float32), strict=True)
    )
    tensors |= {name: function(tensors[name]) for name, function in change.items()}
    with pytest.raises(error, match=message):
        race_attention(**tensors)
    with torch.no_grad(), pytest.raises(error, match=message):
        race_attention(**tensors)


def test_tensors_without_memory():
    """Shapes go through a model before it has numbers, as when it is made on the device "meta"."""
    out = race_attention(*(x.to("meta") for x in inputs(torch.float32)))
    assert out.shape == (2, 7, 4, 5)
    assert out.device.type == "meta"


# race_sdpa
# --------------------------------------------------------------------------------------------------


def test_sdpa_has_heads_first():
    lsh = racecore.SoftLSH.random(6, 3, 2, rng=1)
    query, key, value, *_ = inputs(torch.float32)
    first = [x.detach().transpose(1, 2) for x in (query, key, value)]
    out = race_sdpa(*first, is_causal=True, enable_gqa=True, lsh=lsh)
    expected = racecore.attention(
        *(x.detach().numpy() for x in (query, key, value)), lsh, is_causal=True
    )
    np.testing.assert_array_equal(bits(out.transpose(1, 2)), expected)
    np.testing.assert_array_equal(
        bits(race_sdpa(*(x[0] for x in first), is_causal=True, enable_gqa=True, lsh=lsh)),
        bits(out[0]),
    )


def test_compiled_sdpa():
    """In one graph with a module's hash; in pieces with a SoftLSH, which is not made of tensors."""
    module = RaceAttention(24, 4, n_tables=3, n_planes=2)
    lsh = racecore.SoftLSH(module.planes.numpy(), module.beta.item())
    tensors = [x.detach().transpose(1, 2) for x in inputs(torch.float32)[:3]]
    expected = bits(race_sdpa(*tensors, enable_gqa=True, lsh=lsh))
    for given, fullgraph in ((module, True), (lsh, False)):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *x, given=given: race_sdpa(*x, enable_gqa=True, lsh=given),
            backend="aot_eager",
            fullgraph=fullgraph,
        )
        np.testing.assert_array_equal(bits(compiled(*tensors)), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="module with planes and beta"):
        torch.compile(
            lambda *x: race_sdpa(*x, enable_gqa=True, lsh=lsh), backend="aot_eager", fullgraph=True
        )(*tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.ones(7, 7, dtype=torch.bool)}, "attn_mask must be None"),
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
        ({"scale": 0.5}, "scale must be None"),
        ({"enable_gqa": False}, "enable_gqa"),
        ({"lsh": None}, "must be a racecore.SoftLSH"),
    ],
)
def test_sdpa_refuses_what_a_sketch_cannot_do(options, message):
    tensors = [x.transpose(1, 2) for x in inputs(torch.float32)[:3]]
    with pytest.raises((ValueError, TypeError), match=message):
        race_sdpa(
            *tensors, **({"enable_gqa": True, "lsh": racecore.SoftLSH.random(6, rng=0)} | options)
        )


# RaceAttention
# --------------------------------------------------------------------------------------------------


def test_layer_is_projections_around_attention():
    layer = RaceAttention(
        24, 4, num_kv_heads=2, n_tables=3, n_planes=2, beta=[1.0, 2.0, 0.5, 1.5], bias=True, rng=5
    )
    x = made((2, 30, 24))
    q, k, v = (
        p(x).detach().numpy().reshape(2, 30, -1, 6)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    lsh = racecore.SoftLSH(racecore.SoftLSH.random(6, 3, 2, rng=5).planes, [1.0, 2.0, 0.5, 1.5])
    expected = layer.o_proj(
        torch.from_numpy(racecore.attention(q, k, v, lsh, is_causal=True).reshape(2, 30, 24))
    )
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert layer.beta.requires_grad
    assert not layer.planes.requires_grad


def test_state_dict_brings_planes_and_beta():
    one = RaceAttention(32, 4, rng=1, beta=2.0)
    other = RaceAttention(32, 4, rng=2, learn_beta=False, learn_planes=True)
    x = made((1, 50, 32))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    np.testing.assert_array_equal(bits(other(x)), bits(one(x)))
    assert {"planes", "beta"} < set(one.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: torch.load(_saved(layer), weights_only=False)]
)
def test_copies_of_a_layer(duplicate):
    layer, x = RaceAttention(32, 4, rope_base=10_000.0), made((1, 50, 32))
    again = duplicate(layer)
    np.testing.assert_array_equal(bits(again(x)), bits(layer(x)))
    with torch.no_grad():
        again.beta.add_(1.0)
    assert not torch.equal(again(x), layer(x))


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_in_every_dtype(dtype):
    layer = RaceAttention(32, 4, num_kv_heads=2, rope_base=10_000.0, learn_planes=True).to(
        DTYPES[dtype]
    )
    x = made((1, 50, 32), DTYPES[dtype]).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    assert (
        out.dtype
        == x.grad.dtype
        == layer.planes.grad.dtype
        == layer.beta.grad.dtype
        == DTYPES[dtype]
    )
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_learned_planes_and_beta_learn():
    layer = RaceAttention(16, 2, learn_planes=True)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(made((1, 50, 16))).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], x) for name, x in layer.state_dict().items())


def test_rotation_sees_only_distances():
    layer = RaceAttention(32, 2, rope_base=100.0, is_causal=False)
    x = made((1, 20, 32))
    shifted = layer(x, positions=torch.arange(20) + 5)
    assert not torch.allclose(shifted, RaceAttention(32, 2, is_causal=False)(x))
    q, k = made((1, 1, 1, 16), seed=1), made((1, 1, 1, 16), seed=2)
    from racecore.adapters.torch.module import _rotated

    products = []
    for shift in (0, 7):
        (a,), (b,) = (
            _rotated((q,), torch.tensor([3 + shift]), 100.0),
            _rotated((k,), torch.tensor([9 + shift]), 100.0),
        )
        products.append((a * b).sum())
        torch.testing.assert_close(a.norm(), q.norm())
    torch.testing.assert_close(*products)
    assert not torch.isclose(products[0], (q * k).sum())


def test_rotation_far_out():
    """Neighbours have different positions however far out, and a whole sequence may start there."""
    from racecore.adapters.torch.module import _rotated

    x = made((1, 1, 1, 64)).expand(1, 2, 1, 64)
    (near,) = _rotated((x,), torch.arange(2), 1e4)
    (far,) = _rotated((x,), torch.arange(2) + (1 << 24), 1e4)
    torch.testing.assert_close(
        (far[0, 0] * far[0, 1]).sum(), (near[0, 0] * near[0, 1]).sum(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_no_tokens(shape):
    layer = RaceAttention(16, 2)
    assert layer(torch.zeros(shape)).shape == shape
    with torch.no_grad():
        assert layer(torch.zeros(shape), cache=RaceCache()).shape == shape


def test_a_layer_made_without_memory_gets_its_hash():
    layer = RaceAttention(32, 4, rng=3, beta=2.0, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    expected = RaceAttention(32, 4, rng=3, beta=2.0)
    assert torch.equal(layer.planes, expected.planes)
    assert torch.equal(layer.beta, expected.beta)
    assert torch.isfinite(layer(made((1, 5, 32)))).all()


def test_packed_sequences_start_at_position_0():
    layer, x = RaceAttention(32, 2, rope_base=100.0), made((1, 50, 32))
    packed = layer(x, cu_seqlens=torch.tensor([0, 20, 20, 50]))
    alone = torch.cat([layer(x[:, :20]), layer(x[:, 20:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 33}, "multiple of num_heads"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"readout": "mean"}, "readout must be one of"),
        ({"embed_dim": 36, "rope_base": 10.0}, "even head dim"),
        ({"beta": [1.0, 2.0]}, "beta has 2 values"),
        ({"n_planes": 20}, "at most 16"),
    ],
)
def test_bad_layers(options, message):
    with pytest.raises(ValueError, match=message):
        RaceAttention(**({"embed_dim": 32, "num_heads": 4} | options))


# RaceCache
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["ratio", "bucket_mean"])
def test_decoding_equals_the_whole_sequence(readout):
    layers = [
        RaceAttention(32, 4, num_kv_heads=2, rope_base=100.0, readout=readout, rng=i)
        for i in range(3)
    ]
    x = made((2, 40, 32))

    def stack(tokens, cache=None):
        for layer in layers:
            tokens = tokens + layer(tokens, cache=cache)
        return tokens

    with torch.no_grad():
        whole, cache = stack(x), RaceCache()
        pieces = [
            stack(x[:, :25], cache),
            stack(x[:, 25:30], cache),
            *(stack(x[:, i : i + 1], cache) for i in range(30, 40)),
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)
    assert len(cache) == 3
    assert [state.n_tokens for state in cache.states] == [40, 40, 40]
    assert cache.nbytes == sum(8 * 2 * 2 * 64 * (1 + 8) for _ in layers)
    assert cache.n_seen(layers[0]) == 40


def test_cache_of_a_batch_with_padding_in_front():
    layer, x = RaceAttention(32, 4), made((2, 20, 32))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :8] = False
    with torch.no_grad():
        cache = RaceCache()
        layer(x[:, :15], key_mask=mask[:, :15], cache=cache)
        found = layer(x[:, 15:], cache=cache)
        alone = layer(x[1:, 8:])
    torch.testing.assert_close(found[1], alone[0, 7:], rtol=1e-5, atol=1e-6)


def test_cache_for_beams():
    layer, x = RaceAttention(32, 4), made((2, 20, 32))
    with torch.no_grad():
        cache = RaceCache()
        layer(x, cache=cache)
        before = cache.copy()
        cache.select(torch.tensor([1, 1, 0]))
        token = made((3, 1, 32), seed=9)
        found = layer(token, cache=cache)
        for i, source in enumerate((1, 1, 0)):
            alone = layer(torch.cat([x[source], token[i]])[None])[0, -1]
            torch.testing.assert_close(found[i, 0], alone, rtol=1e-5, atol=1e-6)
        assert before.states[0].batch == 2
        cache.reset()
        assert len(cache) == cache.n_seen(layer) == 0


def test_copies_of_a_cache_know_the_past():
    layer, x, token = RaceAttention(32, 4), made((1, 5, 32)), made((1, 1, 32), seed=1)
    with torch.no_grad():
        cache = RaceCache()
        layer(x, cache=cache)
        copies = [copy.deepcopy(cache), cache.copy()]
        expected = layer(token, cache=cache)
        for other in copies:
            np.testing.assert_array_equal(bits(layer(token, cache=other)), bits(expected))
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(cache)


def test_cache_under_autocast_and_beside_a_compiler():
    layer, x = RaceAttention(32, 4, rope_base=100.0), made((1, 5, 32))
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x, cache=RaceCache()).dtype == torch.bfloat16
        compiled = torch.compile(layer, backend="eager")
        torch.testing.assert_close(compiled(x, cache=RaceCache()), expected, rtol=1e-5, atol=1e-6)


def test_cache_refuses():
    layer, x = RaceAttention(32, 4), made((1, 5, 32))
    with pytest.raises(RuntimeError, match="no gradients"):
        RaceCache().attend(
            0, x[:, :, None], x[:, :, None], x[:, :, None], made((2, 2, 32)), layer.beta
        )
    with pytest.raises(RuntimeError, match="no gradients"):
        layer(x, cache=RaceCache())
    with torch.no_grad():
        with pytest.raises(ValueError, match="causal"):
            RaceAttention(32, 4, is_causal=False)(x, cache=RaceCache())
        cache = RaceCache()
        layer(x, cache=cache)
        layer.beta.add_(1.0)
        with pytest.raises(ValueError, match="another hash"):
            layer(x, cache=cache)
        with pytest.raises(ValueError, match="for this state"):
            layer.beta.sub_(1.0)
            layer(made((2, 5, 32)), cache=cache)
        assert cache.states[0].n_tokens == 5


# Processes, threads and memory
# ---------------------------------------------------------------------------------------


class Attended(torch.utils.data.Dataset):
    """Samples whose making computes attention in a data loader's worker."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = made((200, 2, 8), seed=index)
        return race_attention(x, x, x, made((2, 2, 8)), 1.0, is_causal=True)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_data_loader_workers_after_the_parent_has_computed():
    expected = torch.stack([Attended()[i] for i in range(8)])
    context = multiprocessing.get_context("fork")
    loader = torch.utils.data.DataLoader(
        Attended(), batch_size=4, num_workers=2, multiprocessing_context=context
    )
    np.testing.assert_array_equal(bits(torch.cat(list(loader))), bits(expected))


def test_threads_are_those_of_torch_unless_set_in_racecore(monkeypatch):
    from racecore.runtime.threads import count

    seen = []
    real = racecore.adapters.torch.function.attention
    monkeypatch.setattr(
        "racecore.adapters.torch.function.attention",
        lambda *a, **o: seen.append(count()) or real(*a, **o),
    )
    tensors, before = inputs(requires_grad=False), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        race_attention(*tensors)
        with racecore.threads(3):
            race_attention(*tensors)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


def _train_in_a_process(rank, file, results):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = RaceAttention(16, 2)
    model = torch.nn.parallel.DistributedDataParallel(layer)
    model(made((4, 30, 16))[rank * 2 : rank * 2 + 2]).square().mean().backward()
    results.put((rank, [p.grad.numpy().copy() for p in layer.parameters()]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.process
@pytest.mark.slow
def test_data_parallel_training(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_train_in_a_process, args=(r, tmp_path / "file", results))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    torch.manual_seed(0)
    layer = RaceAttention(16, 2)
    layer(made((4, 30, 16))).square().mean().backward()
    for name, one, two, p in zip(
        dict(layer.named_parameters()), found[0], found[1], layer.parameters(), strict=True
    ):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, p.grad.numpy(), rtol=1e-4, atol=1e-7, err_msg=name)


PEAK = """
import resource, sys, torch
from racecore.adapters.torch import RaceAttention
layer = RaceAttention(256, 4)
def step(n):
    x = torch.ones(1, n, 256).requires_grad_()
    out = layer(x)
    out.backward(torch.ones_like(out))
step(3000)  # kernels and threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(int(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.process
@pytest.mark.slow
def test_peak_memory_of_training():
    """Linear in T, and little more than what there must be: see docs/torch.md for the list."""
    for n in (1 << 16, 1 << 17):
        run = subprocess.run(
            [sys.executable, "-c", PEAK, str(n)], capture_output=True, text=True, check=True
        )
        # When attention goes backward: x, query, key, value; out, d_out; the gradients of
        # attention's output, query, key, value.
        arrays = 4 + 2 + 4
        assert int(run.stdout) <= 1.3 * arrays * n * 256 * 4


@pytest.mark.process
def test_importing_racecore_loads_no_framework():
    names = ("torch", "jax", "transformers", "dask", "cupy")
    code = f"import sys, racecore; print([m for m in {names} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
