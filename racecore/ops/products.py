"""The three small matrix products that everything else is made of.

Inside a block of tokens all work is one of these, on C-contiguous scratch arrays that stay in the first-level cache:

    project     C = M @ X.T      projections on planes, gradients of weights           [K, n]
    expand      X = C.T @ M      outputs from states, rows from their coefficients      [n, D]
    accumulate  M += C @ X       sums over the tokens of a block                        [K, D]

K counts planes or buckets, n tokens, D columns of a row. Coefficients are stored with the token as the last axis, so that
element-wise work on them is vector code too. Inner loops run over whole rows, several rows at once, which the compiler
turns into fused multiply-adds. The plain twins are the NumPy expressions above.
"""

from __future__ import annotations

import numpy as np

from racecore.jit import helper

__all__ = ["accumulate", "expand", "project"]


@helper
def project(m: np.ndarray, x: np.ndarray, n: int, c: np.ndarray) -> None:
    """c[k, i] = <m[k], x[i]> for every row k of m and i < n."""
    n_rows, width = m.shape
    zero = c.dtype.type(0)
    k = 0
    while k + 4 <= n_rows:
        m0, m1, m2, m3 = m[k], m[k + 1], m[k + 2], m[k + 3]
        for i in range(n):
            row = x[i]
            s0, s1, s2, s3 = zero, zero, zero, zero
            for d in range(width):
                s0 += m0[d] * row[d]
                s1 += m1[d] * row[d]
                s2 += m2[d] * row[d]
                s3 += m3[d] * row[d]
            c[k, i], c[k + 1, i], c[k + 2, i], c[k + 3, i] = s0, s1, s2, s3
        k += 4
    while k < n_rows:
        m0 = m[k]
        for i in range(n):
            row = x[i]
            s0 = zero
            for d in range(width):
                s0 += m0[d] * row[d]
            c[k, i] = s0
        k += 1


@helper
def expand(c: np.ndarray, m: np.ndarray, n_rows: int, n: int, x: np.ndarray, causal: bool) -> None:
    """x[i] += sum_k c[k, i] * m[k] over k < n_rows, for every i < n; over k <= i only if `causal`.

    The causal sum never touches rows behind token i: not even NaN or infinity there can reach it.
    """
    width = m.shape[1]
    for i in range(n):
        row = x[i]
        stop = min(i + 1, n_rows) if causal else n_rows
        k = 0
        while k + 4 <= stop:
            c0, c1, c2, c3 = c[k, i], c[k + 1, i], c[k + 2, i], c[k + 3, i]
            m0, m1, m2, m3 = m[k], m[k + 1], m[k + 2], m[k + 3]
            for d in range(width):
                row[d] += c0 * m0[d] + c1 * m1[d] + c2 * m2[d] + c3 * m3[d]
            k += 4
        while k < stop:
            c0, m0 = c[k, i], m[k]
            for d in range(width):
                row[d] += c0 * m0[d]
            k += 1


@helper
def accumulate(c: np.ndarray, x: np.ndarray, n_rows: int, n: int, m: np.ndarray, anticausal: bool) -> None:
    """m[k] += sum_i c[k, i] * x[i] over i < n, for every k < n_rows; over i >= k only if `anticausal`."""
    width = x.shape[1]
    for k in range(n_rows):
        row = m[k]
        i = k if anticausal else 0
        while i + 4 <= n:
            c0, c1, c2, c3 = c[k, i], c[k, i + 1], c[k, i + 2], c[k, i + 3]
            x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
            for d in range(width):
                row[d] += c0 * x0[d] + c1 * x1[d] + c2 * x2[d] + c3 * x3[d]
            i += 4
        while i < n:
            c0, x0 = c[k, i], x[i]
            for d in range(width):
                row[d] += c0 * x0[d]
            i += 1
