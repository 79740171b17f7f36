"""Many short sequences: the cost of a sequence beyond its tokens."""

from __future__ import annotations

import numpy as np

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_named, hash_of, inputs


class ShortSequences:
    """As many tokens in all as one long sequence has."""

    params = ([False, True], ["batch", "packed"], [16, 256, 4096])
    param_names = ("causal", "layout", "tokens_each")

    def setup(self, causal, layout, tokens_each):
        n = TOKENS // tokens_each
        if layout == "batch":
            self.arrays = inputs(n, tokens_each, HEADS, HEAD_DIM)
            self.options = {"is_causal": causal}
        else:
            self.arrays = inputs(TOKENS, HEADS, HEAD_DIM)
            self.options = {"is_causal": causal, "cu_seqlens": np.arange(n + 1) * tokens_each}
        self.lsh = hash_of()
        self.time_forward_backward(causal, layout, tokens_each)

    def time_forward(self, causal, layout, tokens_each):
        racecore.attention(*self.arrays, self.lsh, **self.options)

    def time_forward_backward(self, causal, layout, tokens_each):
        out, saved = racecore.attention_forward(*self.arrays, self.lsh, **self.options)
        racecore.attention_backward(out, saved)


class ManySequences:
    """A batch of 1,024 sequences of 64 tokens with 4 heads: 4,096 states, each of which sees few
    tokens.
    """

    params = ([False, True], ["(2, 2)", "(4, 4)"])
    param_names = ("causal", "planes_tables")

    def setup(self, causal, planes_tables):
        *self.arrays, self.d_out = inputs(1024, 64, HEADS, HEAD_DIM, n=4)
        self.lsh = hash_named(planes_tables)
        _, self.saved = racecore.attention_forward(*self.arrays, self.lsh, is_causal=causal)
        racecore.attention_backward(self.d_out, self.saved)

    def time_forward(self, causal, planes_tables):
        racecore.attention(*self.arrays, self.lsh, is_causal=causal)

    def time_backward(self, causal, planes_tables):
        racecore.attention_backward(self.d_out, self.saved)
