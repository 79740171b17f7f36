"""SOCKET in plain NumPy: hash keys to bits, look up scores, select, attend exactly.

Source: arXiv 2602.06283; docs/math.md.

Letters: B batch, T tokens, H query heads, G key/value heads, D and V head and value dim, L tables,
P planes, N digits of a code (`layout`). Query head h belongs to key/value head h // (H // G).
"""

from __future__ import annotations

import numpy as np

from racecore.ops.socket.layout import (
    BLOCK_TOKENS,
    DIGIT_BITS,
    DIGIT_VALUES,
    HashedKeys,
    Scorer,
    from_norm16,
    high_bits,
    n_digits,
    to_norm16,
)
from racecore.runtime import arrays

__all__ = ["attend_dense", "attend_selected", "hash_keys", "query_tables", "scores", "select"]


def hash_keys(
    key: np.ndarray,
    value: np.ndarray,
    planes: np.ndarray,
    scorer: Scorer,
    keys: HashedKeys,
    counts: np.ndarray,
) -> None:
    """Write codes and norms of new tokens behind those of `keys`, whose lengths do not change.

    Parameters
    ----------
    key : array, shape [B, T, G, D]
    value : array, shape [B, T, G, V]
        Any strides, any of the four dtypes.
    planes : float64 array, shape [G, L, P, D]
    scorer : Scorer
        Stored norms are products of those that it multiplies scores with.
    keys : HashedKeys
        With capacity for the new tokens.
    counts : int64 array, shape [B]
        How many of the T tokens of each sequence are new; the rest is padding.
    """
    weights = 1 << np.arange(planes.shape[2])[::-1]
    for b, count in enumerate(counts):
        k, v = key[b, :count], value[b, :count]
        # in float64: the sign of a sum near 0 would depend on the order in which NumPy adds
        bits = np.einsum("tgd,glpd->tglp", k.astype(np.float64), planes) >= 0  # [T, G, L, P]
        position = keys.lengths[b] + np.arange(count)
        block, lane = position // BLOCK_TOKENS, position % BLOCK_TOKENS
        rows = _packed((bits * weights).sum(-1), planes.shape[2])  # [T, G, rows]
        keys.codes[b, :, block, :, lane] = rows
        norm = np.ones(k.shape[:2])
        if scorer.weighs_values:
            norm = norm * np.linalg.norm(v.astype(np.float64), axis=-1)
        if scorer.weighs_keys:
            norm = norm * np.linalg.norm(k.astype(np.float64), axis=-1)
        keys.norms[b, :, position] = to_norm16(norm)


def _packed(code: np.ndarray, n_planes: int) -> np.ndarray:
    """Return codes [T, G, L] as bytes [T, G, rows].

    First the low eight bits of each code, then the bits above, table after table.
    """
    low, high = (code & 0xFF).astype(np.uint8), code >> 8
    width = high_bits(n_planes)
    if width == 0:
        return low
    per_byte = 8 // width
    n_bytes = -(-code.shape[2] // per_byte)
    padded = np.zeros((*code.shape[:2], n_bytes * per_byte), np.int64)
    padded[..., : code.shape[2]] = high
    shifts = width * np.arange(per_byte)
    bytes_above = (padded.reshape(*code.shape[:2], n_bytes, per_byte) << shifts).sum(-1)
    return np.concatenate([low, bytes_above.astype(np.uint8)], axis=-1)


def _digits(rows: np.ndarray, n_tables: int, n_planes: int) -> np.ndarray:
    """Return the digits [..., L, N] of codes, lowest first: inverts `_packed`."""
    code, width = rows[..., :n_tables].astype(np.int64), high_bits(n_planes)
    if width:
        table = np.arange(n_tables)
        above = rows[..., n_tables + table * width // 8] >> (table * width % 8).astype(np.uint8)
        code |= (above & ((1 << width) - 1)).astype(np.int64) << 8
    return code[..., None] >> DIGIT_BITS * np.arange(n_digits(n_planes)) & (DIGIT_VALUES - 1)


def query_tables(query: np.ndarray, planes: np.ndarray, scorer: Scorer) -> np.ndarray:
    """Return the tables of queries, [B, H, L, N, 16] in the dtype of the arithmetic.

    They have an entry for every digit of a key's code. Of "soft" the probability of a bucket is the
    *product* of its digits' entries: a softmax over corners is a product of sigmoids,
    sigma(2 y_p c_p) with y_p = tanh(u_p) / (sqrt(D) tau). Of "hamming" (agreeing signs) and
    "signed_jl" (sum of u_p times the sign of the key's) the score is the *sum* of the digits'
    entries.

    Parameters
    ----------
    query : array, shape [B, 1, H, D]
    planes : float64 array, shape [G, L, P, D]
    scorer : Scorer
    """
    dtype = arrays.compute_dtype(query.dtype)
    batch, _, n_heads, dim = query.shape
    n_kv_heads, n_tables, n_planes, _ = planes.shape
    q = query.astype(dtype).reshape(batch, n_kv_heads, n_heads // n_kv_heads, dim)
    u = np.einsum("bgid,glpd->bgilp", q, planes.astype(dtype)).reshape(
        batch, n_heads, n_tables, n_planes
    )
    one, zero = _bit_entries(u, dim, scorer)
    values = np.arange(DIGIT_VALUES)
    shape = (batch, n_heads, n_tables, n_digits(n_planes), DIGIT_VALUES)
    tables = np.ones(shape, dtype) if scorer.multiplies else np.zeros(shape, dtype)
    for bit in range(n_planes):  # bit 0 is the last plane
        plane, is_set = n_planes - 1 - bit, (values >> bit % DIGIT_BITS & 1).astype(bool)
        entry = np.where(is_set, one[..., plane, None], zero[..., plane, None])
        if scorer.multiplies:
            tables[..., bit // DIGIT_BITS, :] *= entry
        else:
            tables[..., bit // DIGIT_BITS, :] += entry
    return tables


def _bit_entries(u: np.ndarray, dim: int, scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a set and an unset bit, given the query's projections u [..., P]."""
    if scorer.kind == "soft":
        y2 = np.tanh(u) * u.dtype.type(2 / (dim**0.5 * scorer.tau))
        return 1 / (1 + np.exp(-y2)), 1 / (1 + np.exp(y2))
    if scorer.kind == "hamming":
        return (u >= 0).astype(u.dtype), (u < 0).astype(u.dtype)
    return u, -u


def scores(tables: np.ndarray, keys: HashedKeys, multiplies: bool) -> np.ndarray:
    """Return the scores of all keys, [B, H, T]; -inf behind the end of a sequence.

    A score is the norm of a key times the sum, over tables, of the product or sum of its digits'
    entries.

    Parameters
    ----------
    tables : array, shape [B, H, L, N, 16]
        Those of `query_tables`.
    keys : HashedKeys
    multiplies : bool
        Whether the digits of a table are multiplied, or added.
    """
    batch, n_heads, n_tables, n, _ = tables.shape
    group = n_heads // keys.codes.shape[1]
    result = np.full((batch, n_heads, int(keys.lengths.max(initial=0))), -np.inf, tables.dtype)
    table, digit = np.arange(n_tables)[:, None], np.arange(n)
    for b in range(batch):
        length = int(keys.lengths[b])
        for h in range(n_heads):
            codes = keys.codes[b, h // group].swapaxes(1, 2)  # [blocks, 64, rows]
            rows = codes.reshape(-1, codes.shape[2])[:length]  # [T, rows]
            digits = _digits(rows, keys.n_tables, keys.n_planes)  # [T, L, N]
            entries = tables[b, h, table, digit, digits]  # [T, L, N]
            values = entries.prod(axis=-1) if multiplies else entries.sum(axis=-1)  # [T, L]
            norms = from_norm16(keys.norms[b, h // group, :length])  # [T]
            result[b, h, :length] = values.sum(axis=-1) * norms
    return result


def select(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    budgets: np.ndarray,
    ends: tuple[int, int],
    is_shared: bool,
) -> np.ndarray:
    """Return the tokens to attend to, int64 [B, H, W]: ascending, padded with -1 at the end.

    They are the `budgets` best by score (of equal ones the earlier; NaN counts as infinite), the
    first and the last tokens, without duplicates.

    Parameters
    ----------
    tables, keys, multiplies
        As for `scores`.
    budgets : int64 array, shape [B]
    ends : (int, int)
        How many of the first and of the last tokens to take in any case.
    is_shared : bool
        The heads of a group select together, by the sum of their scores; H becomes G.
    """
    score = scores(tables, keys, multiplies)
    if is_shared:
        n_kv_heads = keys.codes.shape[1]
        grouped = score.reshape(len(score), n_kv_heads, -1, score.shape[2])
        score = np.add.accumulate(grouped, axis=2)[:, :, -1]  # heads in order, as kernels add
    score = np.where(np.isnan(score), np.inf, score)
    chosen = [
        [_chosen(row[:length], budget, ends) for row in heads]
        for heads, length, budget in zip(score, keys.lengths, budgets, strict=True)
    ]
    width = max((len(tokens) for heads in chosen for tokens in heads), default=0)
    selected = np.full((*score.shape[:2], width), -1, np.int64)
    for b, heads in enumerate(chosen):
        for h, tokens in enumerate(heads):
            selected[b, h, : len(tokens)] = tokens
    return selected


def _chosen(score: np.ndarray, budget: int, ends: tuple[int, int]) -> np.ndarray:
    """Return the tokens that one row of scores selects."""
    best = np.argsort(-score, kind="stable")[:budget]
    takes = np.zeros(len(score), bool)
    takes[best] = True
    takes[: ends[0]] = True
    takes[max(0, len(score) - ends[1]) :] = True
    return np.flatnonzero(takes)


def attend_selected(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, selected: np.ndarray, out: np.ndarray
) -> None:
    """Write exact softmax attention of one query over selected tokens; zeros if there are none.

    The scale is 1/sqrt(D).

    Parameters
    ----------
    query : array, shape [B, 1, H, D]
    key : array, shape [B, T, G, D]
    value : array, shape [B, T, G, V]
        Only the selected rows are read.
    selected : int64 array, shape [B, H or G, W]
        Those of `select`.
    out : array, shape [B, 1, H, V]
    """
    dtype, n_heads = arrays.compute_dtype(query.dtype), query.shape[2]
    group = n_heads // key.shape[2]  # heads that share keys
    n_sharing = n_heads // selected.shape[1]  # heads that share selected tokens
    for b in range(len(query)):
        for h in range(n_heads):
            tokens = selected[b, h // n_sharing]
            tokens = tokens[tokens >= 0]
            k = key[b, tokens, h // group].astype(dtype)  # [W, D]
            v = value[b, tokens, h // group].astype(dtype)  # [W, V]
            out[b, 0, h] = _softmax_mean(query[b, 0, h].astype(dtype), k, v)


def attend_dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> None:
    """Write exact causal softmax attention of the last Tq tokens of every sequence.

    The scale is 1/sqrt(D).

    Parameters
    ----------
    query : array, shape [B, Tq, H, D]
        Query i is token length - Tq + i, and sees that and all before it.
    key : array, shape [B, T, G, D]
    value : array, shape [B, T, G, V]
    lengths : int64 array, shape [B]
        How many of the T tokens there are; the others are not read.
    out : array, shape [B, Tq, H, V]
    """
    dtype, n_queries = arrays.compute_dtype(query.dtype), query.shape[1]
    group = query.shape[2] // key.shape[2]
    for b, length in enumerate(lengths):
        for h in range(query.shape[2]):
            k = key[b, :length, h // group].astype(dtype)  # [T, D]
            v = value[b, :length, h // group].astype(dtype)  # [T, V]
            for i in range(n_queries):
                n = max(0, length - n_queries + i + 1)  # tokens that query i sees
                out[b, i, h] = _softmax_mean(query[b, i, h].astype(dtype), k[:n], v[:n])


def _softmax_mean(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the mean of values v [W, V] under softmax(<q, k> / sqrt(D)); zeros if W = 0."""
    if len(k) == 0:
        return np.zeros(v.shape[1], q.dtype)
    logits = k @ (q * q.dtype.type(len(q) ** -0.5))
    weights = np.exp(logits - logits.max())
    return weights @ v / weights.sum(dtype=np.float64)
