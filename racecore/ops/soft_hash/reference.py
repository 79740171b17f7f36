"""The soft hash as the paper defines it, in plain NumPy: softmax over corners of {-1, +1}^P."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import softmax

__all__ = ["soft_hash", "soft_hash_backward"]


def _corners(n_planes: int) -> np.ndarray:
    """Return c [R, P]: row r holds the bits of r, plane 0 the most significant, as -1 and +1."""
    bits = np.arange(1 << n_planes)[:, None] >> np.arange(n_planes - 1, -1, -1)
    return np.where(bits & 1, 1.0, -1.0)


def soft_hash(x: np.ndarray, planes: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Return phi [..., M, S] of the rows x [..., M, D], with planes [M, L, P, D] and beta [M]."""
    c = _corners(planes.shape[2]).astype(x.dtype)
    u = np.einsum("...md,mlpd->...mlp", x, planes.astype(x.dtype))
    y = beta.astype(x.dtype)[:, None, None] * np.tanh(u)  # [..., M, L, P]
    phi = softmax(y @ c.T, axis=-1)  # [..., M, L, R]
    return phi.reshape(*x.shape[:-1], planes.shape[1] << planes.shape[2])


def soft_hash_backward(
    d_phi: np.ndarray, x: np.ndarray, planes: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return d_x [..., M, D], d_planes [M, L, P, D] and d_beta [M], the last two in float64."""
    c = _corners(planes.shape[2]).astype(x.dtype)
    w = planes.astype(x.dtype)
    b = beta.astype(x.dtype)[:, None, None]
    tanh_u = np.tanh(np.einsum("...md,mlpd->...mlp", x, w))
    y = b * tanh_u
    phi = softmax(y @ c.T, axis=-1)
    d_phi = d_phi.reshape(phi.shape)
    # phi = softmax(y @ c.T): the mean of the corners under phi is tanh(y)
    weighted = d_phi * phi  # [..., M, L, R]
    d_y = weighted @ c - weighted.sum(axis=-1, keepdims=True) * np.tanh(y)
    # y = beta * tanh(u)
    tokens = tuple(range(x.ndim - 2))
    d_beta = (d_y * tanh_u).sum(axis=(*tokens, -2, -1), dtype=np.float64)
    d_u = d_y * b * (1 - tanh_u) * (1 + tanh_u)
    # u = <W, x>
    d_x = np.einsum("...mlp,mlpd->...md", d_u, w)
    n_tokens = math.prod(x.shape[:-2])
    rows = d_u.reshape(n_tokens, *d_u.shape[-3:]).astype(np.float64)
    d_planes = np.einsum(
        "tmlp,tmd->mlpd", rows, x.reshape(n_tokens, *x.shape[-2:]).astype(np.float64)
    )
    return d_x, d_planes, d_beta
