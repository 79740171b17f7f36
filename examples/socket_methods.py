"""Methods of selecting tokens, and measures of a selection, for `socket_study.py`, in plain NumPy.

A method returns scores [B, H, T]; `chosen` selects the tokens with the highest scores, in the same
way for all methods. SOCKET is `racecore.SocketIndex`; the other methods are implemented here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import racecore


class Cache(NamedTuple):
    """A key/value cache and one query per head; the query sees all of its tokens."""

    query: np.ndarray  # [B, 1, H, D]
    key: np.ndarray  # [B, T, G, D]
    value: np.ndarray  # [B, T, G, V]

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[2] // self.key.shape[2]


@dataclasses.dataclass(frozen=True)
class Socket:
    """SOCKET with one of its scorers: L tables of P planes."""

    scorer: str = "soft"
    weighs: bool = False
    n_tables: int = 60
    n_planes: int = 8
    tau: float = 0.4
    centres: bool = False  # subtract the mean of the keys, which does not change softmax

    def __str__(self) -> str:
        """Return its name in the tables."""
        weighted = ", values weighted" if self.weighs else ""
        return f"{self.scorer}{weighted}{', keys centred' if self.centres else ''}"

    def bytes_per_token(self, head_dim: int) -> float:
        """Return the bytes per token beside the cache: codes and a norm."""
        above = {8: 0, 9: 1, 10: 2, 11: 4, 12: 4}.get(max(8, self.n_planes), 8)
        return self.n_tables + -(-self.n_tables * above // 8) + 2

    def scores(self, cache: Cache, seed: int) -> np.ndarray:
        """Return the scores of an index of these keys."""
        lsh = racecore.SoftLSH.random(cache.key.shape[3], self.n_tables, self.n_planes, rng=seed)
        index = racecore.SocketIndex(
            lsh, scorer=self.scorer, tau=self.tau, weight_by_value_norm=self.weighs
        )
        key = cache.key - cache.key.mean(axis=1, keepdims=True) if self.centres else cache.key
        index.append(key, cache.value)
        return index.scores(cache.query)


@dataclasses.dataclass(frozen=True)
class Quest:
    """Pages of consecutive tokens, scored by a bound on <q, k> from minima and maxima.

    Source: Quest (arXiv 2406.10774).
    """

    page: int = 16

    def __str__(self) -> str:
        """Return its name in the tables."""
        return f"Quest, pages of {self.page}"

    def bytes_per_token(self, head_dim: int) -> float:
        """Return the bytes per token beside the cache: two rows per page in 16 bits."""
        return 2 * 2 * head_dim / self.page

    def scores(self, cache: Cache, seed: int) -> np.ndarray:
        """Return for every token the bound of its page."""
        n_tokens = cache.key.shape[1]
        starts = np.arange(0, n_tokens, self.page)
        least = np.minimum.reduceat(cache.key, starts, axis=1)  # [B, pages, G, D]
        greatest = np.maximum.reduceat(cache.key, starts, axis=1)
        q = _by_group(cache)
        bound = _products(np.maximum(q, 0), greatest) + _products(np.minimum(q, 0), least)
        return np.repeat(bound, self.page, axis=2)[:, :, :n_tokens]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The tokens with the largest softmax weights, or weights times norms (`by_value`)."""

    by_value: bool = False

    def __str__(self) -> str:
        """Return its name in the tables."""
        return "oracle, weights times norms" if self.by_value else "oracle"

    def bytes_per_token(self, head_dim: int) -> float:
        """Return the bytes read per token: the key in 16 bits."""
        return 2 * head_dim

    def scores(self, cache: Cache, seed: int) -> np.ndarray:
        """Return the true weights."""
        weights = true_weights(cache)
        if not self.by_value:
            return weights
        norms = np.linalg.norm(cache.value, axis=3).swapaxes(1, 2)  # [B, G, T]
        return weights * norms.repeat(cache.group, axis=1)


@dataclasses.dataclass(frozen=True)
class Random:
    """Random tokens."""

    def __str__(self) -> str:
        """Return its name in the tables."""
        return "random"

    def bytes_per_token(self, head_dim: int) -> float:
        """Return 0: nothing is stored."""
        return 0

    def scores(self, cache: Cache, seed: int) -> np.ndarray:
        """Return random numbers."""
        shape = (cache.query.shape[0], cache.query.shape[2], cache.key.shape[1])
        return np.random.default_rng(seed).random(shape, dtype=np.float32)


Method = Socket | Quest | Oracle | Random


def _by_group(cache: Cache) -> np.ndarray:
    """Return the queries as [B, G, H / G, D]."""
    batch, _, n_heads, dim = cache.query.shape
    return cache.query.reshape(batch, cache.key.shape[2], n_heads // cache.key.shape[2], dim)


def _products(q: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return <q, row> of q [B, G, I, D] and rows [B, T, G, D], as [B, H, T]."""
    found = np.matmul(q, rows.transpose(0, 2, 3, 1))
    return found.reshape(len(q), -1, rows.shape[1])


def true_weights(cache: Cache) -> np.ndarray:
    """Return the softmax of <q, k> / sqrt(D) over all tokens, [B, H, T]."""
    logits = _products(_by_group(cache), cache.key) / np.sqrt(np.float32(cache.key.shape[3]))
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


def chosen(scores: np.ndarray, budget: int, sink: int, window: int, page: int = 1) -> np.ndarray:
    """Return the tokens that `SocketIndex.select` selects by these scores, bool [B, H, T].

    Pages are selected whole, up to the budget.
    """
    n_tokens = scores.shape[2]
    budget -= budget % page
    takes = np.zeros(scores.shape, bool)
    if budget >= n_tokens:
        takes[:] = True
    elif budget > 0:
        # the threshold, all scores above it, and the first of those equal to it
        limit = -np.partition(-scores, budget - 1, axis=2)[:, :, budget - 1 : budget]
        takes = scores > limit
        missing = budget - takes.sum(axis=2, keepdims=True)
        equal = scores == limit
        takes |= equal & (equal.cumsum(axis=2, dtype=np.int32) <= missing)
    takes[:, :, :sink] = True
    takes[:, :, max(0, n_tokens - max(window, 1 - min(sink, 1))) :] = (
        True  # with neither, the last token
    )
    return takes


class Quality(NamedTuple):
    """Measures of a selection for every query: [B, H]."""

    mass: np.ndarray  # fraction of the total softmax weight on the selected tokens
    error: np.ndarray  # |output - dense output| / |dense output|


def quality(cache: Cache, weights: np.ndarray, takes: np.ndarray) -> Quality:
    """Compare exact attention over the selected tokens with attention over all."""
    kept = weights * takes
    mass = kept.sum(axis=2)
    dense, sparse = (_outputs(cache, w) for w in (weights, kept / mass[..., None]))
    error = np.linalg.norm(sparse - dense, axis=2) / np.linalg.norm(dense, axis=2)
    return Quality(mass, error)


def _outputs(cache: Cache, weights: np.ndarray) -> np.ndarray:
    """Return sums of values [B, H, V] under weights [B, H, T]."""
    batch, n_heads, n_tokens = weights.shape
    grouped = weights.reshape(batch, cache.key.shape[2], cache.group, n_tokens)
    return np.matmul(grouped, cache.value.transpose(0, 2, 1, 3)).reshape(batch, n_heads, -1)


def judge(
    cache: Cache,
    method: Any,
    budgets: list[int],
    sink: int,
    window: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> Iterator[Quality]:
    """Yield the measures of a method for every budget."""
    weights = true_weights(cache) if weights is None else weights
    scores = method.scores(cache, seed)
    for budget in budgets:
        yield quality(
            cache, weights, chosen(scores, budget, sink, window, getattr(method, "page", 1))
        )
