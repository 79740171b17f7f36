"""Time against length, size of the hash, head dim, heads and threads; mostly with a single head."""

from __future__ import annotations

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_named, hash_of, inputs, processors


def both_ways(arrays, lsh, causal):
    """Forward, then backward, wanting all gradients; the output stands in for its own gradient."""
    out, saved = racecore.attention_forward(*arrays, lsh, is_causal=causal)
    racecore.attention_backward(out, saved)


class Length:
    params = ([False, True], [2**10, 2**12, 2**14, 2**16, 2**18])
    param_names = ("causal", "tokens")
    timeout = 120

    def setup(self, causal, tokens):
        self.arrays = inputs(tokens, 1, HEAD_DIM)
        self.lsh = hash_of()
        both_ways([x[:2048] for x in self.arrays], self.lsh, causal)

    def time_forward_backward(self, causal, tokens):
        both_ways(self.arrays, self.lsh, causal)

    def peakmem_forward_backward(self, causal, tokens):
        both_ways(self.arrays, self.lsh, causal)


class HashSize:
    """The published hashes, by (planes, tables)."""

    params = ([False, True], ["(2, 2)", "(3, 3)", "(4, 4)"], [64, 128])
    param_names = ("causal", "planes_tables", "head_dim")

    def setup(self, causal, planes_tables, head_dim):
        self.arrays = inputs(TOKENS, HEADS, head_dim)
        self.lsh = hash_named(planes_tables, head_dim)
        both_ways(self.arrays, self.lsh, causal)

    def time_forward_backward(self, causal, planes_tables, head_dim):
        both_ways(self.arrays, self.lsh, causal)


class Threads:
    params = ([False, True], ["(2, 2)", "(4, 4)"], [1, 2, 4, 8, 16])
    param_names = ("causal", "planes_tables", "threads")

    def setup(self, causal, planes_tables, threads):
        if threads > processors():
            raise NotImplementedError("more threads than processors")
        *self.arrays, self.d_out = inputs(4 * TOKENS, 1, HEAD_DIM, n=4)
        self.lsh = hash_named(planes_tables)
        _, self.saved = racecore.attention_forward(*self.arrays, self.lsh, is_causal=causal)
        racecore.attention_backward(self.d_out, self.saved)

    def time_forward(self, causal, planes_tables, threads):
        with racecore.threads(threads):
            racecore.attention_forward(*self.arrays, self.lsh, is_causal=causal)

    def time_backward(self, causal, planes_tables, threads):
        with racecore.threads(threads):
            racecore.attention_backward(self.d_out, self.saved)


class FewHeads:
    """Causal backward over 2^18 rows as one long head, or as four heads of a quarter: equal times
    mean no loss.
    """

    params = ([1, 4],)
    param_names = ("heads",)
    timeout = 120

    def setup(self, heads):
        *arrays, self.d_out = inputs(2**18 // heads, heads, HEAD_DIM, n=4)
        _, self.saved = racecore.attention_forward(*arrays, hash_of(), is_causal=True)
        racecore.attention_backward(self.d_out, self.saved)

    def time_backward(self, heads):
        racecore.attention_backward(self.d_out, self.saved)
