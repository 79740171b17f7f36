"""Peers of the comparison in plain torch on the CPU: [B, H, T, D] tensors, with autograd.

Each is the formulation of its paper or of its best-known implementation. `verify` compares every
peer with an implementation that shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import racecore

__all__ = [
    "linear_attention",
    "performer",
    "performer_features",
    "race_formula",
    "softmax_attention",
    "verify",
]

_CHUNK = 128  # tokens of one chunk of causal linear attention
_SMALL = 1e-6  # keeps the features of Performer positive


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention: torch's own fused kernel."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Linear attention with the feature map elu + 1 (Katharopoulos et al., arXiv 2006.16236).

    Causal: the chunk-wise form (Hua et al., arXiv 2202.10447) that flash-linear-attention also has
    in plain torch: states are added up from chunk to chunk, and a masked product treats the tokens
    of one chunk. T must be a multiple of 128.
    """
    q, k = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    if not causal:
        state = k.transpose(-1, -2) @ value  # [B, H, D, V]
        return (q @ state) / (q @ k.sum(2).unsqueeze(-1))
    batch, heads, tokens, _ = q.shape
    if tokens % _CHUNK:
        raise ValueError(
            f"causal linear attention takes a multiple of {_CHUNK} tokens, got {tokens}"
        )
    q, k, v = (x.reshape(batch, heads, tokens // _CHUNK, _CHUNK, -1) for x in (q, k, value))
    state = _before((k.transpose(-1, -2) @ v).cumsum(2))  # [B, H, chunks, D, V]
    mass = _before(k.sum(3).cumsum(2))  # [B, H, chunks, D]
    scores = (q @ k.transpose(-1, -2)).tril()
    out = (q @ state + scores @ v) / (q @ mass.unsqueeze(-1) + scores.sum(-1, keepdim=True))
    return out.reshape(batch, heads, tokens, -1)


def _before(sums: Tensor) -> Tensor:
    """Turn inclusive sums over chunks into exclusive sums."""
    return torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2)


def performer_features(dim: int, n_features: int = 256, seed: int = 0) -> Tensor:
    """Draw the directions [m, D] of FAVOR+: orthogonal in blocks of D, with the norms of Gaussian
    rows.
    """
    rng = np.random.default_rng(seed)
    blocks = [
        np.linalg.qr(rng.standard_normal((dim, dim)))[0].T for _ in range(-(-n_features // dim))
    ]
    norms = np.linalg.norm(rng.standard_normal((n_features, dim)), axis=1)
    return torch.from_numpy(
        (np.concatenate(blocks)[:n_features] * norms[:, None]).astype(np.float32)
    )


def performer(query: Tensor, key: Tensor, value: Tensor, features: Tensor) -> Tensor:
    """Performer, bidirectional, with positive random features (Choromanski et al., arXiv
    2009.14794).
    """
    q = _positive_features(query, features, lambda x: x.amax(-1, keepdim=True))
    k = _positive_features(key, features, lambda x: x.amax((-1, -2), keepdim=True))
    state = k.transpose(-1, -2) @ value  # [B, H, m, V]
    return (q @ state) / (q @ k.sum(2).unsqueeze(-1))


def _positive_features(x: Tensor, features: Tensor, largest: Callable[[Tensor], Tensor]) -> Tensor:
    x = x * x.shape[-1] ** -0.25
    logits = x @ features.T
    half_square = x.square().sum(-1, keepdim=True) / 2
    return (torch.exp(logits - half_square - largest(logits).detach()) + _SMALL) / math.sqrt(
        len(features)
    )


def race_formula(
    query: Tensor, key: Tensor, value: Tensor, planes: Tensor, beta: Tensor, *, causal: bool
) -> Tensor:
    """RACE attention as its paper writes it (arXiv 2510.04008, Algorithms 1 and 2), with planes [L,
    P, D].

    The causal one holds the state of every token: [B, H, T, S, V].
    """
    phi_q, phi_k = (_soft_hash(x, planes, beta) for x in (query, key))  # [B, H, T, S]
    if causal:
        mass = phi_k.cumsum(2)
        value_sum = (phi_k.unsqueeze(-1) * value.unsqueeze(-2)).cumsum(2)  # [B, H, T, S, V]
        return torch.einsum("bhts,bhtsv->bhtv", phi_q, value_sum) / (phi_q * mass).sum(
            -1, keepdim=True
        )
    value_sum = torch.einsum("bhts,bhtv->bhsv", phi_k, value)
    sums = torch.einsum("bhts,bhsv->bhtv", phi_q, value_sum)
    return sums / torch.einsum("bhts,bhs->bht", phi_q, phi_k.sum(2)).unsqueeze(-1)


def _soft_hash(x: Tensor, planes: Tensor, beta: Tensor) -> Tensor:
    n_planes = planes.shape[1]
    bits = torch.arange(2**n_planes).unsqueeze(-1) >> torch.arange(n_planes - 1, -1, -1) & 1
    corners = (2 * bits - 1).to(x.dtype)  # [R, P], plane 0 is the most significant bit
    projected = torch.einsum("bhtd,lpd->bhtlp", x, planes)
    logits = beta * torch.einsum("bhtlp,rp->bhtlr", torch.tanh(projected), corners)
    return torch.softmax(logits, -1).flatten(-2)


def verify(tokens: int = 256, dim: int = 32) -> dict[str, float]:
    """Compare every peer with an independent computation at a small length.

    Returns
    -------
    dict
        The largest absolute difference of each comparison; of Performer, which is an estimate, the
        relative one.

    Raises
    ------
    RuntimeError
        A peer does not agree with its definition.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, dim) for _ in range(3))
    errors: dict[str, float] = {}
    for causal in (False, True):
        way = "causal" if causal else "bidirectional"
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(dim)
        errors[f"softmax, {way}"] = _far(
            softmax_attention(q, k, v, causal=causal), _quadratic(scores.exp(), v, causal)
        )
        f, g = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
        similarity = torch.einsum("bhid,bhjd->bhij", f, g)
        errors[f"linear, {way}"] = _far(
            linear_attention(q, k, v, causal=causal), _quadratic(similarity, v, causal)
        )
        errors[f"RACE formula, {way}"] = _race_error(q, k, v, causal)
    half = (
        0.5  # short rows, where features do well; the plain mean of the values would be off by 0.3
    )
    exact = softmax_attention(half * q, half * k, v, causal=False)
    near = performer(half * q, half * k, v, performer_features(dim, 2**14))
    errors["Performer, many features"] = float((near - exact).norm() / exact.norm())
    allowed = dict.fromkeys(errors, 1e-4) | {"Performer, many features": 0.1}
    wrong = [
        f"{name} is off by {error:.1e}"
        for name, error in errors.items()
        if not error < allowed[name]
    ]
    if wrong:
        raise RuntimeError(
            "a peer does not agree with its definition, so no comparison was made: "
            f"{'; '.join(wrong)}"
        )
    return errors


def _quadratic(similarity: Tensor, value: Tensor, causal: bool) -> Tensor:
    similarity = similarity.tril() if causal else similarity
    return (similarity @ value) / similarity.sum(-1, keepdim=True)


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _race_error(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """Return the largest difference between formula and racecore, in the outputs and in every
    gradient.
    """
    lsh = racecore.SoftLSH.random(head_dim=q.shape[-1], n_tables=3, n_planes=3, beta=1.0, rng=0)
    q, k, v = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    beta = torch.tensor(1.0, requires_grad=True)
    out = race_formula(
        q, k, v, torch.from_numpy(lsh.planes.astype(np.float32)), beta, causal=causal
    )
    d_out = torch.randn_like(out)
    out.backward(d_out)
    ours, saved = racecore.attention_forward(
        *(_numpy(x) for x in leaves), lsh, is_causal=causal, wrt=("query", "key", "value", "beta")
    )
    grads = racecore.attention_backward(_numpy(d_out), saved)
    pairs = [(out, ours), (q.grad, grads.query), (k.grad, grads.key), (v.grad, grads.value)]
    errors = [float(np.abs(_numpy(theirs) - mine).max()) for theirs, mine in pairs]
    beta_error = abs(float(_numpy(beta.grad)) - grads.beta) / max(1.0, abs(grads.beta))
    return max(*errors, beta_error)


def _numpy(x: Tensor | None) -> Any:
    """Return a tensor as racecore has it: [B, T, H, D]."""
    if x is None:
        raise RuntimeError("torch made no gradient")
    return x.detach().movedim(1, -2).numpy() if x.ndim == 4 else x.detach().numpy()
