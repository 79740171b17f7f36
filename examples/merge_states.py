"""Sum shards of a sequence separately, save their states, and merge them.

    python examples/merge_states.py

Attention needs only sums over the keys and values, and sums add. Every worker turns its shard into
a state of a few kilobytes, and the merged state answers queries over all tokens. Here the workers
are processes that exchange states as files; a network works in the same way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import tempfile

import numpy as np

import racecore

LSH = racecore.SoftLSH.random(head_dim=64, n_tables=8, n_planes=3, beta=1.5, rng=0)


def make_shard(index: int, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random keys and values [1, T, G, dim] in place of a worker's data."""
    rng = np.random.default_rng([7, index])
    key, value = (rng.standard_normal((1, n_tokens, 2, 64), dtype=np.float32) for _ in range(2))
    return key, value


def work(index: int, n_tokens: int, path: pathlib.Path) -> str:
    """Sum one shard and save its state."""
    state = racecore.RaceState.zeros(LSH, batch=1, n_kv_heads=2, value_dim=64)
    state.append(*make_shard(index, n_tokens))
    state.save(path)
    n_bytes = path.stat().st_size
    return f"process {os.getpid()}: shard {index}, {state.n_tokens:,} tokens -> {n_bytes:,} bytes"


def main(n_tokens: int = 200_000, n_shards: int = 4) -> None:
    """Sum shards in two processes, merge them in two orders, and compare with the whole."""
    shares = [n_tokens * (i + 1) // n_shards - n_tokens * i // n_shards for i in range(n_shards)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / f"shard{i}.npz" for i in range(n_shards)]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for line in pool.starmap(work, zip(range(n_shards), shares, paths, strict=True)):
                print(line)
        states = [racecore.RaceState.load(path) for path in paths]

    merged, backwards = states[0].copy(), states[-1].copy()
    for state in states[1:]:
        merged.merge(state)
    for state in reversed(states[:-1]):
        backwards.merge(state)

    query = np.random.default_rng(8).standard_normal(
        (1, 5, 8, 64), dtype=np.float32
    )  # 8 heads share 2 key heads
    shards = [make_shard(i, share) for i, share in enumerate(shares)]
    key, value = (np.concatenate(parts, axis=1) for parts in zip(*shards, strict=True))
    whole = racecore.attention(query, key, value, LSH)
    state_kb = (merged.mass.nbytes + merged.value_sum.nbytes) / 1e3
    inputs_mb = (key.nbytes + value.nbytes) / 1e6
    print(
        f"\nmerged: {merged.n_tokens:,} tokens; {inputs_mb:,.0f} MB of keys and values became "
        f"{state_kb:,.0f} kB"
    )
    for name, state in (("merged", merged), ("merged in the other order", backwards)):
        error = np.abs(state.attend(query) - whole).max() / np.abs(whole).max()
        print(f"five queries, {name}, against all tokens at once: relative difference {error:.1e}")
    try:
        merged.merge(
            racecore.RaceState.zeros(racecore.SoftLSH.random(64, 8, 3, 1.5, rng=1), 1, 2, 64)
        )
    except ValueError as error:
        print(f"a state of another hash is refused: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    main(parser.parse_args().tokens)
