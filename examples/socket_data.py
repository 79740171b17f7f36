"""Generated key/value caches for `socket_study.py`: clusters of keys, and needles in a haystack.

All have D = V = 64. A cache has one key/value head for every variant of clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from socket_methods import Cache

DIM = 64
VARIANTS = ("scattered", "in runs", "norms by cluster", "key norms vary", "common offset")


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def clusters(n_tokens: int, n_queries: int, seed: int, n_clusters: int = 64) -> Cache:
    """Return keys around centres and queries near one: B = 1, a key/value head for each of
    `VARIANTS`.

    Keys are 0.6 centre + 0.8 noise, so of about equal norm, and queries 1.5 times such a row. A
    query gives about half of its weight to its own cluster, a 64th of the tokens. Values are 0.6
    times a centre of the cluster's own + 0.8 noise, times a norm.

    "scattered"         clusters are drawn per token; norms of values are log-normal
    "in runs"           as before, but 64 tokens in a row share a cluster, as in text
    "norms by cluster"  scattered; the norm of values is log-normal per cluster
    "key norms vary"    scattered; the norms of keys are log-normal
    "common offset"     scattered; all keys share a large row, which softmax ignores
    """
    rng = np.random.default_rng([seed, 1])
    key, value = np.empty((2, 1, n_tokens, len(VARIANTS), DIM), np.float32)
    query = np.empty((1, 1, len(VARIANTS), n_queries, DIM), np.float32)
    for g, variant in enumerate(VARIANTS):
        centre, centre_of_values = _normal(rng, 2, n_clusters, DIM)
        member = rng.integers(n_clusters, size=n_tokens)
        if variant == "in runs":
            member = member[::64].repeat(64)[:n_tokens]
        norm = np.exp(0.5 * _normal(rng, n_tokens))
        if variant == "norms by cluster":
            norm = np.exp(_normal(rng, n_clusters))[member]
        rows = 0.6 * centre[member] + 0.8 * _normal(rng, n_tokens, DIM)
        if variant == "key norms vary":
            rows *= np.exp(0.3 * _normal(rng, n_tokens, 1))
        if variant == "common offset":
            rows += 1.5 * _normal(rng, DIM)
        key[0, :, g] = rows
        value[0, :, g] = norm[:, None] * (
            0.6 * centre_of_values[member] + 0.8 * _normal(rng, n_tokens, DIM)
        )
        matched = rng.integers(n_clusters, size=n_queries)
        query[0, 0, g] = 1.5 * (0.6 * centre[matched] + 0.8 * _normal(rng, n_queries, DIM))
    return Cache(query.reshape(1, 1, -1, DIM), key, value)


class Haystack(NamedTuple):
    """A cache with one matching token (the needle) for each query."""

    cache: Cache  # B = G = 1
    needles: np.ndarray  # [H]: the needle of query h
    likeness: np.ndarray  # [H]: cosine of the needle's key and the query


def haystack(n_tokens: int, n_queries: int, likeness: tuple[float, ...], seed: int) -> Haystack:
    """Return tokens in runs of 256 around topics, as in documents, and random needles.

    Every query is a random direction of norm 4 sqrt(D); by chance some keys have a cosine up to
    0.55 with it. The key of its needle has a cosine of one of `likeness`, the same for a part of
    the queries.
    """
    rng = np.random.default_rng([seed, 2])
    topics = _normal(rng, n_tokens // 256 + 1, DIM).repeat(256, axis=0)[:n_tokens]
    key = 0.6 * topics + 0.8 * _normal(rng, n_tokens, DIM)
    value = _normal(rng, n_tokens, DIM)
    query = _normal(rng, n_queries, DIM)
    query *= 4 * np.sqrt(DIM) / np.linalg.norm(query, axis=1, keepdims=True)
    wanted = np.repeat(np.array(likeness, np.float32), -(-n_queries // len(likeness)))[:n_queries]
    needles = rng.choice(n_tokens, n_queries, replace=False)
    key[needles] = _at_cosine(query, wanted[:, None], _normal(rng, n_queries, DIM))
    cache = Cache(query[None, None], key[None, :, None], value[None, :, None])
    return Haystack(cache, needles, wanted)


def _at_cosine(rows: np.ndarray, cosine: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return rows of norm sqrt(D) that have the given cosines with the given rows."""
    along = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    across = noise - (noise * along).sum(axis=1, keepdims=True) * along
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    return np.float32(DIM**0.5) * (cosine * along + np.sqrt(1 - cosine**2) * across)
