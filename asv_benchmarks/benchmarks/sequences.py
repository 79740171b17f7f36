"""Many short sequences with as many tokens in all as one long one: what a sequence costs beyond its tokens."""

from __future__ import annotations

import numpy as np

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_of, inputs


class ShortSequences:
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
