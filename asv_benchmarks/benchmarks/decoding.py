"""One decoded token over a key/value cache: dense attention, and SOCKET over a twentieth of the
tokens.
"""

from __future__ import annotations

import racecore

from .common import inputs

HEADS, KV_HEADS, DIM = 32, 8, 128
TABLES, PLANES = 60, 8
SHARE = 0.05


def cache_and_index(context: int, with_index: bool = True):
    """Return a query, keys and values of a cache in bfloat16, and the index of the keys."""
    (query,) = inputs(1, 1, HEADS, DIM, dtype="bfloat16", n=1)
    key, value = inputs(1, context, KV_HEADS, DIM, dtype="bfloat16", n=2)
    index = racecore.SocketIndex(racecore.SoftLSH.random(DIM, TABLES, PLANES, rng=0))
    if with_index:
        index.append(key, value)
    return query, key, value, index


class Step:
    """Time per decoded token."""

    params = (["dense", "head", "group"], [2**12, 2**14, 2**17, 2**20])
    param_names = ("selection", "context")
    timeout = 300

    def setup(self, selection, context):
        *self.arrays, self.index = cache_and_index(context, selection != "dense")
        self.options = (
            {"budget": 1.0}
            if selection == "dense"
            else {"budget": SHARE, "group_selection": selection}
        )
        if selection == "dense":
            self.index = None
        self.time_step(selection, context)

    def time_step(self, selection, context):
        racecore.sparse_attention(*self.arrays, self.index, **self.options)


class Index:
    """The index: time to hash a prompt and to append a token, and bytes."""

    params = ([6, 8, 10],)
    param_names = ("planes",)
    prompt = 2**13

    def setup(self, planes):
        _, self.key, self.value, _ = cache_and_index(self.prompt, False)
        self.lsh = racecore.SoftLSH.random(DIM, TABLES, planes, rng=0)
        self.index = racecore.SocketIndex(self.lsh)
        self.index.append(self.key, self.value)

    def time_prompt(self, planes):
        racecore.SocketIndex(self.lsh).append(self.key, self.value)

    def time_one_token(self, planes):
        self.index.append(self.key[:, :1], self.value[:, :1])

    def track_bytes_per_token(self, planes):
        index = racecore.SocketIndex(self.lsh)
        index.append(self.key, self.value)
        return index.nbytes / self.prompt

    track_bytes_per_token.unit = "bytes"
