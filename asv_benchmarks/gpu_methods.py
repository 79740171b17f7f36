"""The methods that gpu.py measures: racecore, torch's softmax attention, RACE in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import racecore
from racecore.ops.cuda import call as cuda_call
from racecore.runtime import arrays, cuda

# the published (L, P): S = 8, 24, 64
HASHES = ((2, 2), (3, 3), (4, 4))
HEADS, DIM = 8, 128
# without tensor cores
PLAIN = "plain"


@contextmanager
def tensor_cores(uses: bool) -> Iterator[None]:
    """Switch tensor cores off within the block unless `uses`."""
    before = cuda_call.TENSOR_CORES_FROM
    cuda_call.TENSOR_CORES_FROM = before if uses else 1 << 30
    try:
        yield
    finally:
        cuda_call.TENSOR_CORES_FROM = before


def methods() -> list[
    tuple[str, Callable[[int, bool], tuple[Callable[[], Any], Callable[[], Any]]]]
]:
    """Return names and makers of (forward, forward + backward) for a length."""
    ours = [
        (f"racecore S={tables << planes}", _racecore(tables, planes)) for tables, planes in HASHES
    ]
    shown = [hash for hash in HASHES if hash[0] << hash[1] >= cuda_call.TENSOR_CORES_FROM]
    ours += [
        (f"racecore {PLAIN} S={tables << planes}", _racecore(tables, planes, False))
        for tables, planes in shown
    ]
    return [*ours, ("SDPA, torch", _sdpa), ("RACE by cumsum, torch", _cumsum)]


def stored_dtype() -> np.dtype:
    """Return bfloat16, or float16, of the same size, if ml_dtypes is missing."""
    try:
        return arrays.dtype_of("bfloat16")
    except ValueError:
        return np.dtype(np.float16)


def torch_dtype() -> Any:
    """Return torch's dtype for `stored_dtype`."""
    import torch

    return torch.float16 if stored_dtype() == np.float16 else torch.bfloat16


def to_cupy(tensor: Any) -> Any:
    """Return a tensor of 16 bits as a CuPy array, without a copy."""
    import torch

    return cuda.cupy().from_dlpack(tensor.view(torch.int16)).view(stored_dtype())


def random_rows(*shape: int) -> Any:
    """Return normal random numbers of 16 bits as a CuPy array."""
    import torch

    return to_cupy(torch.randn(*shape, device="cuda", dtype=torch_dtype()))


def sdpa_step(query: Any, key: Any, value: Any) -> Callable[[], Any]:
    """Return torch's softmax attention of one token over a cache, in its fastest layout."""
    import torch

    tensors = (torch.from_dlpack(x.view(np.int16)).view(torch_dtype()) for x in (query, key, value))
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in tensors)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _racecore(tables: int, planes: int, uses: bool = True) -> Callable[[int, bool], Any]:
    lsh = racecore.SoftLSH.random(head_dim=DIM, n_tables=tables, n_planes=planes, rng=0)

    def make(tokens: int, causal: bool) -> Any:
        cupy = cuda.cupy()
        q, k, v, g = (random_rows(1, tokens, HEADS, DIM) for _ in range(4))
        out = cupy.empty_like(q)
        grads = racecore.Gradients(*(cupy.empty_like(x) for x in (q, k, v)))
        wrt = ("query", "key", "value")

        def forward() -> None:
            with tensor_cores(uses):
                racecore.attention(q, k, v, lsh, is_causal=causal, out=out)

        def both() -> None:
            with tensor_cores(uses):
                _, saved = racecore.attention_forward(
                    q, k, v, lsh, is_causal=causal, out=out, wrt=wrt
                )
                racecore.attention_backward(g, saved, out=grads)

        return forward, both

    return make


def _tensors(tokens: int) -> Any:
    import torch

    make = lambda: torch.randn(1, HEADS, tokens, DIM, device="cuda", dtype=torch_dtype())  # noqa: E731
    q, k, v, g = (make() for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v)], g


def _sdpa(tokens: int, causal: bool) -> Any:
    import torch

    (q, k, v), g = _tensors(tokens)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.autograd.grad(out, (q, k, v), g)

    return forward, both


def _cumsum(tokens: int, causal: bool) -> Any:
    """Return RACE as a few lines of torch, with gradients by autograd; (L, P) = (2, 2)."""
    import torch

    lsh = racecore.SoftLSH.random(head_dim=DIM, n_tables=2, n_planes=2, rng=0)
    planes = torch.tensor(lsh.planes, device="cuda", dtype=torch.float32).reshape(-1, DIM)
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], device="cuda", dtype=torch.float32)
    (q, k, v), g = _tensors(tokens)

    def phi(x: Any) -> Any:
        u = (x.float() @ planes.T).tanh().unflatten(-1, (2, 2))
        return (u @ corners.T).softmax(-1).flatten(-2)

    def attention() -> Any:
        phi_q, phi_k = phi(q), phi(k)
        if causal:
            sums = (phi_k.unsqueeze(-1) * v.float().unsqueeze(-2)).cumsum(2)
            mass = phi_k.cumsum(2)
            top = (phi_q.unsqueeze(-1) * sums).sum(-2)
            return (top / (phi_q * mass).sum(-1, keepdim=True)).to(q.dtype)
        return ((phi_q @ (phi_k.mT @ v.float())) / (phi_q @ phi_k.sum(2).unsqueeze(-1))).to(q.dtype)

    def forward() -> Any:
        with torch.no_grad():
            return attention()

    def both() -> None:
        torch.autograd.grad(attention(), (q, k, v), g)

    return forward, both
