"""One token at a time, as in decoding: the overhead where there is hardly any arithmetic."""

from __future__ import annotations

import racecore

from .common import HEAD_DIM, hash_of, inputs

KV_HEADS = 8


class OneToken:
    """A model with grouped queries: 8 key/value heads of 64 and four times as many query heads, S =
    24.
    """

    params = ([1, 64],)
    param_names = ("batch",)
    n_kv_heads, group, head_dim = KV_HEADS, 4, HEAD_DIM
    hash_size = (3, 3)

    def setup(self, batch):
        self.key, self.value = inputs(batch, 1, self.n_kv_heads, self.head_dim, n=2)
        (self.query,) = inputs(batch, 1, self.group * self.n_kv_heads, self.head_dim, n=1)
        lsh = hash_of(*self.hash_size, self.head_dim)
        self.state = racecore.RaceState.zeros(lsh, batch, self.n_kv_heads, self.head_dim)
        self.state.append(self.key, self.value)
        self.state.attend(self.query)
        self.state.step(self.query, self.key, self.value)

    def time_append(self, batch):
        self.state.append(self.key, self.value)

    def time_attend(self, batch):
        self.state.attend(self.query)

    def time_append_and_attend(self, batch):
        self.state.append(self.key, self.value)
        self.state.attend(self.query)

    def time_step(self, batch):
        self.state.step(self.query, self.key, self.value)


class OneTokenOfManyHeads(OneToken):
    """32 heads of 128 without groups and S = 64: a state of 2 MB per sequence to read for every
    token.
    """

    n_kv_heads, group, head_dim = 32, 1, 128
    hash_size = (4, 4)


class OneTokenOfAFloat32State(OneTokenOfManyHeads):
    """The same with half the bytes."""

    def setup(self, batch):
        super().setup(batch)
        self.state = self.state.astype("float32")
        self.state.step(self.query, self.key, self.value)


class States:
    """Operations on states other than appending."""

    def setup(self):
        key, value = inputs(16, 1, KV_HEADS, HEAD_DIM, n=2)
        self.state = racecore.RaceState.zeros(hash_of(), 16, KV_HEADS, HEAD_DIM)
        self.state.append(key, value)
        self.other = self.state.copy()

    def time_merge(self):
        self.state.merge(self.other)

    def time_select(self):
        self.state.select([3, 3, 0, 15])

    def time_snapshot_write_restore(self):
        snapshot = self.state.snapshot()
        self.state.merge(self.other)
        self.state.restore(snapshot)
