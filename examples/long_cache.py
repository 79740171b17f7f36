"""Decode over a cache of 10 million tokens on the disk: `python examples/long_cache.py`; `--tokens
100000` takes seconds.

Keys and values lie in two files, mapped to memory; beside them a SocketIndex, in memory. The system
is told to forget what it has of the files before the first step, and asked after each which of
their pages it has: those of the chosen rows. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

import racecore
from racecore.outofcore import Synthetic
from racecore.runtime.memory_use import PeakMemory, anonymous_bytes

HEADS, KV_HEADS, DIM, CHUNK = 8, 2, 64, 1 << 16
CHOICE = {"budget": 2048, "sink": 128, "window": 128}
ROW = 2 * DIM  # bytes


class Step(NamedTuple):
    """What one decoded token took."""

    seconds: float
    wanted: int  # pages of both files with chosen rows, but for those that steps before had read
    read: int  # pages that came to memory
    found: bool  # whether every head chose the token that was looked for


def made_up(n_tokens: int) -> list[Synthetic]:
    """Return keys and values, float16 [T, G, D], of which any part can be made at any time."""
    return [Synthetic((n_tokens, KV_HEADS, DIM), np.float16, seed=seed) for seed in (0, 1)]


def write(folder: pathlib.Path, n_tokens: int) -> None:
    """Write keys, values and their index to files, chunk by chunk, and let the system forget keys
    and values.
    """
    index = racecore.SocketIndex(racecore.SoftLSH.random(DIM, n_tables=60, n_planes=8, rng=0))
    with open(folder / "keys", "wb") as keys, open(folder / "values", "wb") as values:
        for start in range(0, n_tokens, CHUNK):
            key, value = (source[start : start + CHUNK] for source in made_up(n_tokens))
            keys.write(key.data)
            values.write(value.data)
            index.append(key, value)
        for file in (keys, values):
            file.flush()
            os.fsync(file.fileno())  # what is not on the disk yet cannot be forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index.save(folder / "index.npz")


def mapped(path: pathlib.Path) -> np.memmap:
    """Return a file as an array [1, T, G, D]; nothing is read yet, and later no neighbours of what
    is.
    """
    rows = np.memmap(path, np.float16, "r").reshape(1, -1, KV_HEADS, DIM)
    rows._mmap.madvise(mmap.MADV_RANDOM)
    return rows


def in_memory(rows: np.memmap) -> np.ndarray:
    """Return which pages of a mapped file the system has in memory, bool."""
    pages = np.zeros(-(-rows.nbytes // mmap.PAGESIZE), np.uint8)
    if ctypes.CDLL(None).mincore(
        *map(ctypes.c_void_p, (rows.ctypes.data, rows.nbytes, pages.ctypes.data))
    ):
        raise OSError("mincore failed")
    return (pages & 1).astype(bool)


def decode(
    index: racecore.SocketIndex, key: np.memmap, value: np.memmap, n_steps: int
) -> Iterator[Step]:
    """Look for a token at random, every step another one, and yield what that took."""
    rng, wanted = np.random.default_rng(0), np.zeros(len(in_memory(key)), bool)
    for _ in range(n_steps):
        place = int(rng.integers(index.n_tokens))
        query = (
            3
            * made_up(index.n_tokens)[0][place : place + 1].repeat(HEADS // KV_HEADS, axis=1)[None]
        )  # [1, 1, H, D]
        before, started = in_memory(key).sum() + in_memory(value).sum(), time.perf_counter()
        racecore.sparse_attention(query, key, value, index, **CHOICE)
        seconds = time.perf_counter() - started
        selected = index.select(query, **CHOICE)[0]  # [H, W]
        head, column = np.nonzero(selected >= 0)
        more = np.zeros_like(wanted)
        more[
            (selected[head, column] * KV_HEADS + head // (HEADS // KV_HEADS)) * ROW // mmap.PAGESIZE
        ] = True
        read = int(in_memory(key).sum() + in_memory(value).sum() - before)
        yield Step(
            seconds,
            2 * int((more & ~wanted).sum()),
            read,
            bool((selected == place).any(axis=1).all()),
        )
        wanted |= more


def warm_up() -> None:
    """Load, or compile, all kernels: what that takes is not what a step takes."""
    key, value = (source[:] for source in made_up(300))
    index = racecore.SocketIndex(racecore.SoftLSH.random(DIM, n_tables=60, n_planes=8, rng=0))
    index.append(key, value)
    racecore.sparse_attention(
        key[-1:].repeat(4, axis=1), key, value, index, budget=20, sink=1, window=1
    )


def main(folder: pathlib.Path, n_tokens: int, n_steps: int) -> None:
    """Write the files, decode, and print what was read and what memory it took."""
    warm_up()
    base = anonymous_bytes()
    with PeakMemory() as writing:
        write(folder, n_tokens)
    with PeakMemory() as loading:
        index = racecore.SocketIndex.load(folder / "index.npz")
        loaded = anonymous_bytes()
    key, value = mapped(folder / "keys"), mapped(folder / "values")
    n_pages = 2 * len(in_memory(key))
    print(
        f"{n_tokens:,} tokens: keys and values {2 * key.nbytes / 1e6:,.0f} MB, {n_pages:,} pages, "
        "on the disk"
    )
    built, read = (f"{(memory.peak - base) / 1e6:,.0f} MB" for memory in (writing, loading))
    print(
        f"index: {index.nbytes / 1e6:,.0f} MB in memory; at most {built} while it was built, "
        f"{read} while it was loaded"
    )
    print(f"pages in memory at first: {in_memory(key).sum() + in_memory(value).sum():,}")
    with PeakMemory() as memory:
        for number, step in enumerate(decode(index, key, value, n_steps), 1):
            read = f"{1e3 * step.seconds:.0f} ms, {step.read:,} pages read ({step.read * mmap.PAGESIZE / 1e6:.1f} MB)"
            print(
                f"step {number}: {read}, {step.wanted:,} have chosen rows, token "
                f"{'found' if step.found else 'MISSED'}"
            )
    print(
        "memory of its own during the steps, beyond the index: at most "
        f"{(memory.peak - loaded) / 1e6:,.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        help="on the disk to measure; its files are removed at the end",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        main(pathlib.Path(temporary), arguments.tokens, arguments.steps)
