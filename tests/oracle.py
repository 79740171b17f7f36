"""An independent judge: RACE attention in quadratic time with gradients by automatic
differentiation.

Nothing here comes from the library under test, and nothing is shared with it: the soft hash is an
explicit softmax over the 2^P corners of the cube, keys that a query may see stand in an explicit
[Tq, Tk] table, and no gradient is derived by hand. Any array layout may come in; arithmetic is
float64, or `dtype=np.float32` for a *plain implementation*, whose error says what a given precision
costs when nothing clever is done.

Letters: B batch, T tokens, H query heads, G key/value heads, D head dim, V value dim, L tables, P
planes, R = 2^P.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import make_vjp
from autograd.builtins import tuple as traced_tuple

__all__ = ["attention", "corners", "gradients", "soft_hash"]

EPS = 1e-6  # of the readout "bucket_mean"
NAMES = ("query", "key", "value", "planes", "beta", "mass", "value_sum")


def attention(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    beta: Any,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    initial_mass: Any = None,
    initial_value_sum: Any = None,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return out [B, Tq, H, V], mass [B, G, L, R] and value_sum [B, G, L, R, V] after the last
    token.

    G becomes H in the states where planes [H, L, P, D] or beta [H] are per head. With `cu_seqlens`
    the states' batch is the number of sequences. 3-D inputs give a 3-D `out` and states of batch 1.
    """
    values = [query, key, value, planes, beta, initial_mass, initial_value_sum]
    compute = _function(is_causal, readout, key_mask, cu_seqlens)
    return compute(*(None if x is None else _plain(x, dtype) for x in values))


def gradients(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    beta: Any,
    d_out: Any,
    *,
    d_mass: Any = None,
    d_value_sum: Any = None,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    initial_mass: Any = None,
    initial_value_sum: Any = None,
    dtype: Any = np.float64,
) -> dict[str, np.ndarray]:
    """Return the gradients of <out, d_out> + <mass, d_mass> + <value_sum, d_value_sum> by name.

    Names: query, key, value, planes, beta, and mass and value_sum (of the initial state) where one
    was given.
    """
    values = [query, key, value, planes, beta, initial_mass, initial_value_sum]
    given = {name: _plain(x, dtype) for name, x in zip(NAMES, values, strict=True) if x is not None}
    compute = _function(is_causal, readout, key_mask, cu_seqlens)

    def call(arguments: Any) -> Any:
        named = dict(zip(given, arguments, strict=True))
        return traced_tuple(compute(*(named.get(name) for name in NAMES)))

    vjp, (out, mass, value_sum) = make_vjp(call)(tuple(given.values()))
    seeds = (d_out, d_mass, d_value_sum)
    cotangents = (
        np.zeros_like(result) if seed is None else _plain(seed, dtype)
        for result, seed in zip((out, mass, value_sum), seeds, strict=True)
    )
    with np.errstate(
        over="ignore"
    ):  # autograd differentiates tanh as 1 / cosh^2: infinity there is a gradient of 0
        return dict(zip(given, vjp(tuple(cotangents)), strict=True))


def corners(n_planes: int) -> np.ndarray:
    """Return [R, P] of -1 and +1: row r spells r in binary, plane 0 its most significant digit."""
    digits = [[int(digit) for digit in format(r, f"0{n_planes}b")] for r in range(2**n_planes)]
    return 2.0 * np.array(digits) - 1.0


def soft_hash(x: Any, planes: Any, beta: Any) -> Any:
    """Return phi [B, M, T, L, R] of the rows x [B, T, M, D], planes [L, P, D] or [M, L, P, D], beta
    a number or [M].
    """
    head_axes = "mlpd" if anp.ndim(planes) == 4 else "lpd"
    u = anp.einsum(f"btmd,{head_axes}->bmtlp", x, planes)
    sharpness = anp.reshape(beta, (-1, 1, 1, 1))  # [M or 1, 1, 1, 1]
    c = corners(planes.shape[-2]).astype(x.dtype)
    logits = sharpness * anp.dot(anp.tanh(u), c.T)
    weights = anp.exp(logits - anp.max(logits, axis=-1, keepdims=True))
    return weights / anp.sum(weights, axis=-1, keepdims=True)


def _plain(x: Any, dtype: Any) -> np.ndarray:
    """Return a contiguous copy in the dtype of the arithmetic."""
    return np.array(x, dtype=dtype, order="C")


def _function(
    is_causal: bool, readout: str, key_mask: Any, cu_seqlens: Any
) -> Callable[..., tuple[Any, Any, Any]]:
    """Return the map from the seven differentiable arguments to (out, mass, value_sum)."""

    def compute(query, key, value, planes, beta, mass, value_sum):  # type: ignore[no-untyped-def]
        if query.ndim == 3:
            mask = None if key_mask is None else np.reshape(key_mask, (1, -1))
            with_batch = (query[None], key[None], value[None], planes, beta, mass, value_sum)
            out, *state = _packed(*with_batch, is_causal, readout, mask, cu_seqlens)
            return out[0], *state
        return _packed(
            query,
            key,
            value,
            planes,
            beta,
            mass,
            value_sum,
            is_causal,
            readout,
            key_mask,
            cu_seqlens,
        )

    return compute


def _packed(
    q: Any,
    k: Any,
    v: Any,
    planes: Any,
    beta: Any,
    mass: Any,
    value_sum: Any,
    is_causal: bool,
    readout: str,
    key_mask: Any,
    cu_seqlens: Any,
) -> tuple[Any, Any, Any]:
    """Treat every packed sequence as an attention problem of its own, and put the answers side by
    side.
    """
    if cu_seqlens is None:
        return _sequences(q, k, v, planes, beta, mass, value_sum, is_causal, readout, key_mask)
    outs, masses, value_sums = [], [], []
    bounds = [int(bound) for bound in cu_seqlens]
    for n, (begin, end) in enumerate(pairwise(bounds)):
        state = (None, None) if mass is None else (mass[n : n + 1], value_sum[n : n + 1])
        rows = [x[:, begin:end] for x in (q, k, v)]
        out, new_mass, new_value_sum = _sequences(
            *rows, planes, beta, *state, is_causal, readout, None
        )
        outs.append(out)
        masses.append(new_mass)
        value_sums.append(new_value_sum)
    return anp.concatenate(outs, axis=1), anp.concatenate(masses), anp.concatenate(value_sums)


def _sequences(
    q: Any,
    k: Any,
    v: Any,
    planes: Any,
    beta: Any,
    mass: Any,
    value_sum: Any,
    is_causal: bool,
    readout: str,
    key_mask: Any,
) -> tuple[Any, Any, Any]:
    """Answer a batch of sequences: q [B, Tq, H, D], k [B, Tk, G, D], v [B, Tk, G, V]."""
    n_batch, n_queries, n_heads, _ = q.shape
    n_keys, n_kv_heads, value_dim = v.shape[1:]
    n_tables, n_planes = planes.shape[-3:-1]
    n_buckets = n_tables * 2**n_planes
    take_part = (
        np.ones((n_batch, n_keys), bool) if key_mask is None else np.array(key_mask, dtype=bool)
    )
    cleaned = [
        anp.where(take_part[:, :, None, None], x, 0.0) for x in (k, v)
    ]  # NaN under the mask ends here
    if anp.ndim(planes) == 4 or anp.ndim(beta) == 1:
        cleaned = [anp.repeat(x, n_heads // n_kv_heads, axis=2) for x in cleaned]
    k, v = cleaned
    n_states = k.shape[2]

    phi_k = anp.reshape(soft_hash(k, planes, beta), (n_batch, n_states, n_keys, n_buckets))
    phi_k = phi_k * take_part[:, None, :, None].astype(phi_k.dtype)
    phi_q = anp.reshape(soft_hash(q, planes, beta), (n_batch, n_heads, n_queries, n_buckets))
    v = anp.transpose(v, (0, 2, 1, 3))  # [B, M, Tk, V]
    added_mass = anp.sum(phi_k, axis=2)  # [B, M, S]
    added_value_sum = anp.matmul(anp.swapaxes(phi_k, 2, 3), v)  # [B, M, S, V]
    shape = (n_batch, n_states, n_tables, 2**n_planes)
    if mass is None:
        mass, value_sum = np.zeros(shape, q.dtype), np.zeros((*shape, value_dim), q.dtype)
    first_mass = anp.reshape(mass, added_mass.shape)
    first_value_sum = anp.reshape(value_sum, added_value_sum.shape)

    visible = np.ones((n_queries, n_keys), bool)
    if is_causal:
        visible = np.tril(visible)
    repeats = n_heads // n_states
    per_query_head = [
        anp.repeat(x, repeats, axis=1) for x in (phi_k, v, first_mass, first_value_sum)
    ]
    out = _read_out(phi_q, *per_query_head, visible.astype(q.dtype), readout, n_tables)

    final_mass = anp.reshape(first_mass + added_mass, shape)
    final_value_sum = anp.reshape(first_value_sum + added_value_sum, (*shape, value_dim))
    return anp.transpose(out, (0, 2, 1, 3)), final_mass, final_value_sum


def _read_out(
    phi_q: Any,
    phi_k: Any,
    v: Any,
    first_mass: Any,
    first_value_sum: Any,
    visible: np.ndarray,
    readout: str,
    n_tables: int,
) -> Any:
    """Return out [B, H, Tq, V] from phi [B, H, T, S], values [B, H, Tk, V] and first states [B, H,
    S(, V)].
    """
    if readout == "ratio":
        similarity = anp.matmul(phi_q, anp.swapaxes(phi_k, 2, 3)) * visible  # [B, H, Tq, Tk]
        numerator = anp.matmul(similarity, v) + anp.matmul(phi_q, first_value_sum)
        denominator = (
            anp.sum(similarity, axis=-1) + anp.matmul(phi_q, first_mass[..., None])[..., 0]
        )
        sees_something = _value_of(denominator) > 0
        safe = anp.where(
            sees_something, denominator, 1.0
        )  # rows that see no key: 0 / 1, and no gradient
        return anp.where(sees_something[..., None], numerator, 0.0) / safe[..., None]
    mass = (
        anp.matmul(visible, phi_k) + first_mass[:, :, None, :]
    )  # [B, H, Tq, S], what each query sees
    weights = phi_q / (mass + EPS) / n_tables
    similarity = anp.matmul(weights, anp.swapaxes(phi_k, 2, 3)) * visible
    return anp.matmul(similarity, v) + anp.matmul(weights, first_value_sum)


def _value_of(x: Any) -> np.ndarray:
    """Look at a number that is being traced."""
    while hasattr(x, "_value"):
        x = x._value
    return np.asarray(x)
