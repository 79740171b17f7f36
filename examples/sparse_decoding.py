"""Decode with a key/value cache and attend to the tokens with the highest scores.

    python examples/sparse_decoding.py

The cache holds keys and values of all tokens, as in a language model, here around topics, so that a
query matches some of them. A SocketIndex holds some bytes per key. Every step appends one token to
both and attends to a twentieth of the tokens.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import racecore

HEADS, KV_HEADS, DIM = 8, 2, 64


def tokens(rng: np.random.Generator, n: int, topics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return keys and values [1, n, G, D] around the topics, one for every token."""
    centre = topics[rng.integers(len(topics), size=n)]
    key = centre + 0.7 * rng.standard_normal((n, KV_HEADS, DIM))
    value = 0.5 * centre + rng.standard_normal((n, KV_HEADS, DIM))
    return key[None].astype(np.float32), value[None].astype(np.float32)


def main(n_tokens: int = 60_000, n_steps: int = 20) -> None:
    """Fill a cache, decode some tokens; print the error and the time of dense attention."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((40, KV_HEADS, DIM))
    capacity = n_tokens + n_steps
    key, value = np.zeros((2, 1, capacity, KV_HEADS, DIM), np.float32)
    key[:, :n_tokens], value[:, :n_tokens] = tokens(rng, n_tokens, topics)

    index = racecore.SocketIndex(
        racecore.SoftLSH.random(head_dim=DIM, n_tables=60, n_planes=8, rng=0)
    )
    index.append(key[:, :n_tokens], value[:, :n_tokens])  # the prompt
    bytes_of_cache = 2 * key[:, :n_tokens].nbytes
    print(
        f"a cache of {n_tokens:,} tokens: {bytes_of_cache / 1e6:.0f} MB; its index: "
        f"{index.nbytes / 1e6:.0f} MB"
    )

    errors, seconds = [], {"sparse": 0.0, "dense": 0.0}
    for step in range(n_steps):
        n = n_tokens + step + 1
        key[:, n - 1 : n], value[:, n - 1 : n] = tokens(rng, 1, topics)
        index.append(key[:, n - 1 : n], value[:, n - 1 : n])
        topic = topics[rng.integers(len(topics))].repeat(HEADS // KV_HEADS, axis=0)
        query = (1.5 * topic + 0.5 * rng.standard_normal((HEADS, DIM))).astype(np.float32)[
            None, None
        ]

        started = time.perf_counter()
        sparse = racecore.sparse_attention(query, key[:, :n], value[:, :n], index, budget=0.05)
        middle = time.perf_counter()
        dense = racecore.sparse_attention(query, key[:, :n], value[:, :n], index, budget=1.0)
        ended = time.perf_counter()
        errors.append(np.linalg.norm(sparse - dense) / np.linalg.norm(dense))
        if step > 0:  # the first step loads the kernels
            seconds["sparse"] += middle - started
            seconds["dense"] += ended - middle
    print(f"relative error of attention over a twentieth of the tokens: {np.median(errors):.3f}")
    for name, total in seconds.items():
        print(f"{name}: {total / max(1, n_steps - 1) * 1e3:.2f} ms per token")

    chosen = index.select(query, budget=0.05)
    print(f"tokens selected by each of {HEADS} heads: {(chosen >= 0).sum(axis=2).ravel().tolist()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=60_000)
    main(parser.parse_args().tokens)
