"""One token at a time, as in decoding: what is left when there is hardly any arithmetic."""

from __future__ import annotations

import racecore

from .common import HEAD_DIM, hash_of, inputs

KV_HEADS = 8


class OneToken:
    params = ([1, 64],)
    param_names = ("batch",)

    def setup(self, batch):
        self.key, self.value = inputs(batch, 1, KV_HEADS, HEAD_DIM, n=2)
        (self.query,) = inputs(batch, 1, 4 * KV_HEADS, HEAD_DIM, n=1)
        self.state = racecore.RaceState.zeros(hash_of(), batch, KV_HEADS, HEAD_DIM)
        self.state.append(self.key, self.value)
        self.state.attend(self.query)

    def time_append(self, batch):
        self.state.append(self.key, self.value)

    def time_attend(self, batch):
        self.state.attend(self.query)

    def time_append_and_attend(self, batch):
        self.state.append(self.key, self.value)
        self.state.attend(self.query)


class States:
    """What one does with states beside appending."""

    def setup(self):
        key, value = inputs(16, 1, KV_HEADS, HEAD_DIM, n=2)
        self.state = racecore.RaceState.zeros(hash_of(), 16, KV_HEADS, HEAD_DIM)
        self.state.append(key, value)
        self.other = self.state.copy()

    def time_merge(self):
        self.state.merge(self.other)

    def time_select(self):
        self.state.select([3, 3, 0, 15])
