"""An independent oracle of SOCKET: scores, selected sets and exact attention, in float64.

Everything follows the definitions and nothing comes from the library under test. A query's
probabilities are an explicit softmax over all 2^P corners of the cube, codes are integers, sets are
Python sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["attention", "codes", "probabilities", "scores", "selected_set"]


def corners(n_planes: int) -> np.ndarray:
    """Return [R, P] of -1 and +1: row r spells r in binary, plane 0 its most significant digit."""
    digits = [[int(digit) for digit in format(r, f"0{n_planes}b")] for r in range(2**n_planes)]
    return 2.0 * np.array(digits) - 1.0


def codes(key: Any, planes: Any) -> np.ndarray:
    """Return the buckets [B, T, G, L] of keys [B, T, G, D], given planes [L, P, D]."""
    u = np.einsum("btgd,lpd->btglp", np.asarray(key, np.float64), np.asarray(planes, np.float64))
    weights = 2 ** np.arange(u.shape[-1])[::-1]
    return ((u >= 0) * weights).sum(-1)


def probabilities(query: Any, planes: Any, tau: float) -> np.ndarray:
    """Return the probabilities [B, H, L, R] of queries [B, 1, H, D].

    They are the softmax, over corners, of sum_p tanh(u_p) c_r[p] / (sqrt(D) tau).
    """
    x, w = np.asarray(query, np.float64)[:, 0], np.asarray(planes, np.float64)
    u = np.einsum("bhd,lpd->bhlp", x, w)
    logits = np.tanh(u) / np.sqrt(x.shape[-1]) / tau @ corners(w.shape[1]).T
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    *,
    scorer: str = "soft",
    tau: float = 0.4,
    weight_by_value_norm: bool = True,
) -> np.ndarray:
    """Return the scores [B, H, T] of all keys, token by token."""
    key, value, planes = (np.asarray(x, np.float64) for x in (key, value, planes))
    n_batch, n_tokens, n_kv_heads = key.shape[:3]
    n_heads, n_tables = np.shape(query)[2], planes.shape[0]
    bucket = codes(key, planes)
    prob = probabilities(query, planes, tau)
    u_query = np.einsum("bhd,lpd->bhlp", np.asarray(query, np.float64)[:, 0], planes)
    sign = np.where(np.einsum("btgd,lpd->btglp", key, planes) >= 0, 1.0, -1.0)
    result = np.zeros((n_batch, n_heads, n_tokens))
    for b in range(n_batch):
        for h in range(n_heads):
            g = h // (n_heads // n_kv_heads)
            for t in range(n_tokens):
                if scorer == "soft":
                    score = sum(prob[b, h, n, bucket[b, t, g, n]] for n in range(n_tables))
                elif scorer == "hamming":
                    score = float(((u_query[b, h] >= 0) == (sign[b, t, g] > 0)).sum())
                else:
                    score = float((u_query[b, h] * sign[b, t, g]).sum()) * np.linalg.norm(
                        key[b, t, g]
                    )
                result[b, h, t] = score * (
                    np.linalg.norm(value[b, t, g]) if weight_by_value_norm else 1.0
                )
    return result


def selected_set(score: Any, budget: int, sink: int, window: int) -> list[int]:
    """Return the tokens that a row of scores selects, ascending.

    They are the first `sink`, the last `window` and the `budget` best ones.
    """
    n_tokens = len(score)
    best = sorted(range(n_tokens), key=lambda t: (-score[t], t))[:budget]
    if sink == window == 0:
        window = 1
    return sorted({*range(min(sink, n_tokens)), *range(max(0, n_tokens - window), n_tokens), *best})


def attention(query: Any, key: Any, value: Any, chosen: Any = None) -> np.ndarray:
    """Return exact softmax attention [B, Tq, H, V], scale 1/sqrt(D), of the last Tq of Tk tokens.

    `chosen`, if given, holds for [b][h] the tokens that the (only) query sees.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    n_batch, n_queries, n_heads, dim = query.shape
    n_tokens, n_kv_heads = key.shape[1:3]
    out = np.zeros((n_batch, n_queries, n_heads, value.shape[3]))
    for b in range(n_batch):
        for i in range(n_queries):
            for h in range(n_heads):
                g = h // (n_heads // n_kv_heads)
                rows = (
                    list(range(n_tokens - n_queries + i + 1))
                    if chosen is None
                    else list(chosen[b][h])
                )
                if rows:
                    logits = key[b, rows, g] @ query[b, i, h] / np.sqrt(dim)
                    weights = np.exp(logits - logits.max())
                    out[b, i, h] = weights @ value[b, rows, g] / weights.sum()
    return out
