"""Single rows of RACE attention and of its gradients, from the definition, in float64 and plain
NumPy: no code of racecore is used.

Bidirectional, readout "ratio" (RACE Attention, arXiv 2510.04008, Algorithm 1), for one head. A
token is hashed by a softmax over all corners; row i attends to key j with the weight <phi_q[i],
phi_k[j]>, computed for every pair that the rows are part of; gradients follow from the weights
and from the Jacobian of the softmax. The gradient of a key also needs the outputs of all other
queries: those come from sums over the keys, since all pairs of tokens would take minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["ExactRows", "exact_rows"]

# Tokens of one block.
_BLOCK = 1 << 14


@dataclass(frozen=True)
class ExactRows:
    """Rows of the output and of the gradients, all [n, dim] float64."""

    out: np.ndarray
    d_query: np.ndarray
    d_key: np.ndarray
    d_value: np.ndarray


def exact_rows(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    d_out: np.ndarray,
    planes: np.ndarray,
    beta: float,
    rows: np.ndarray,
) -> ExactRows:
    """Return the rows of output and gradients with the given numbers.

    Parameters
    ----------
    query, key, value, d_out : arrays, shape [T, D] or [T, V]
        One head, any float dtype; memory maps are read block by block.
    planes : array, shape [L, P, D]
    beta : float
    rows : integers, shape [n]
        Numbers of queries for out and d_query, of keys for d_key and d_value.
    """
    q, k, v, g = (_double(x[rows]) for x in (query, key, value, d_out))
    # [n, S], S = L*R
    phi_q, _ = _hash(q, planes, beta)
    phi_k, _ = _hash(k, planes, beta)
    # Numerators [n, V] and denominators [n, 1] of these rows.
    denominator, total = np.zeros((len(rows), 1)), np.zeros_like(v)
    # The sums over all keys, [S] and [S, V], for the outputs of all queries below.
    mass, value_sum = np.zeros(phi_q.shape[1]), np.zeros((phi_q.shape[1], v.shape[1]))
    for begin, end in _blocks(len(key)):
        phi, values = _hash(_double(key[begin:end]), planes, beta)[0], _double(value[begin:end])
        # [n, block]: weights of the keys for these queries
        weights = phi_q @ phi.T
        denominator += weights.sum(axis=1, keepdims=True)
        total += weights @ values
        mass += phi.sum(axis=0)
        value_sum += phi.T @ values
    out = total / denominator

    d_phi_q = np.zeros_like(phi_q)
    for begin, end in _blocks(len(key)):
        phi, values = _hash(_double(key[begin:end]), planes, beta)[0], _double(value[begin:end])
        # out = sum_j w_j v_j / sum_j w_j, so d out / d w_j = (v_j - out) / sum_j w_j
        d_weights = (g @ values.T - (g * out).sum(axis=1, keepdims=True)) / denominator
        d_phi_q += d_weights @ phi

    d_phi_k, d_value = _key_gradients(
        query, d_out, phi_k, v, lambda x: _hash(x, planes, beta)[0], mass, value_sum
    )
    return ExactRows(
        out,
        _hash_backward(q, d_phi_q, planes, beta),
        _hash_backward(k, d_phi_k, planes, beta),
        d_value,
    )


def _key_gradients(
    query: np.ndarray,
    d_out: np.ndarray,
    phi_k: np.ndarray,
    v: np.ndarray,
    hash_: Callable[[np.ndarray], np.ndarray],
    mass: np.ndarray,
    value_sum: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of phi [n, S] and value [n, V] of some keys.

    `mass` [S] and `value_sum` [S, V] are the sums over all keys.
    """
    d_phi_k, d_value = np.zeros_like(phi_k), np.zeros_like(v)
    for begin, end in _blocks(len(query)):
        phi, gradients = hash_(_double(query[begin:end])), _double(d_out[begin:end])
        # Denominators and outputs of the queries of the block.
        norms = (phi @ mass)[:, None]
        outs = phi @ value_sum / norms
        # [block, n]: weights of these keys for the queries
        weights = phi @ phi_k.T / norms
        d_value += weights.T @ gradients
        d_weights = (gradients @ v.T - (gradients * outs).sum(axis=1, keepdims=True)) / norms
        d_phi_k += d_weights.T @ phi
    return d_phi_k, d_value


def _hash(x: np.ndarray, planes: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return phi [n, L*R], the probabilities of all corners, and tanh of projections [n, L, P]."""
    n_tables, n_planes, _ = planes.shape
    t = np.tanh((x @ planes.reshape(-1, planes.shape[2]).T).reshape(len(x), n_tables, n_planes))
    # [n, L, R]
    logits = beta * t @ _corners(n_planes).T
    phi = np.exp(logits - logits.max(axis=2, keepdims=True))
    phi /= phi.sum(axis=2, keepdims=True)
    return phi.reshape(len(x), -1), t


def _hash_backward(x: np.ndarray, d_phi: np.ndarray, planes: np.ndarray, beta: float) -> np.ndarray:
    """Return the gradient of x for d_phi [n, L*R]: softmax, tanh and projection in reverse."""
    phi, t = _hash(x, planes, beta)
    phi, d_phi = (a.reshape(len(x), planes.shape[0], -1) for a in (phi, d_phi))
    d_logits = phi * (d_phi - (phi * d_phi).sum(axis=2, keepdims=True))
    d_t = beta * d_logits @ _corners(planes.shape[1])
    # [n, L, P]
    d_u = d_t * (1 - t**2)
    return d_u.reshape(len(x), -1) @ planes.reshape(-1, planes.shape[2])


def _corners(n_planes: int) -> np.ndarray:
    """Return all sign vectors [R, P], the first plane as the most significant bit."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n_planes)))


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, n, _BLOCK):
        yield begin, min(begin + _BLOCK, n)


def _double(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)
