"""Attention forward and backward on plain NumPy arrays, with times and memory.

python examples/quickstart.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import racecore


def main(n_tokens: int = 2**17) -> None:
    """Run lengths up to `n_tokens`, forward and backward; print times, state size and a check."""
    lsh = racecore.SoftLSH.random(head_dim=64, n_tables=4, n_planes=4, beta=1.0, rng=0)
    print(f"{lsh}: {lsh.n_tables * lsh.n_buckets} buckets\n")
    print("  tokens    forward   backward   ns per token   state")
    lengths = [n for n in (n_tokens // 16, n_tokens // 4, n_tokens) if n]
    for n in [
        min(lengths),
        *lengths,
    ]:  # the first round loads the kernels (and compiles them, the first time ever)
        rng = np.random.default_rng(0)
        query, key, value = (
            rng.standard_normal((n, 1, 64), dtype=np.float32) for _ in range(3)
        )  # [T, H, D]
        started = time.perf_counter()
        out, saved, state = racecore.attention_forward(
            query, key, value, lsh, is_causal=True, return_state=True, wrt=("query", "key", "value")
        )
        between = time.perf_counter()
        grads = racecore.attention_backward(
            out, saved
        )  # the gradient of a loss that is half the sum of squares
        ended = time.perf_counter()
        state_bytes = state.mass.nbytes + state.value_sum.nbytes
        print(
            f"{n:8,}  {between - started:8.3f} s {ended - between:8.3f} s "
            f"{(ended - started) / n * 1e9:12,.0f}"
            f"   {state_bytes:,} bytes"
        )
    print("\nLinear time once the threads have enough work, and a state that does not grow.")

    # A check that needs no reference: the last token sees all keys, in any order.
    order = rng.permutation(n)
    shuffled = racecore.attention(query[-1:], key[order], value[order], lsh)
    print(
        "last causal row against a bidirectional one, keys shuffled: "
        f"{np.abs(out[-1:] - shuffled).max():.1e}"
    )
    print(f"gradient of the query, norm of the last row: {np.linalg.norm(grads.query[-1]):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**17)
    main(parser.parse_args().tokens)
