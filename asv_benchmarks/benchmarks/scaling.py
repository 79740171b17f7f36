"""Time against length, size of the hash, head dim and threads; one head, where parallelism over heads does not help."""

from __future__ import annotations

import racecore

from .common import HEAD_DIM, HEADS, TOKENS, hash_of, inputs, processors


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
        n_planes, n_tables = (int(n) for n in planes_tables.strip("()").split(","))
        self.arrays = inputs(TOKENS, HEADS, head_dim)
        self.lsh = hash_of(n_planes, n_tables, head_dim)
        both_ways(self.arrays, self.lsh, causal)

    def time_forward_backward(self, causal, planes_tables, head_dim):
        both_ways(self.arrays, self.lsh, causal)


class Threads:
    params = ([False, True], [1, 2, 4, 8, 16])
    param_names = ("causal", "threads")

    def setup(self, causal, threads):
        if threads > processors():
            raise NotImplementedError("more threads than processors")
        self.arrays = inputs(4 * TOKENS, 1, HEAD_DIM)
        self.lsh = hash_of()
        both_ways(self.arrays, self.lsh, causal)

    def time_forward_backward(self, causal, threads):
        with racecore.threads(threads):
            both_ways(self.arrays, self.lsh, causal)
