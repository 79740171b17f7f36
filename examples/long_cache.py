"""Decode over a cache of 10 million tokens on the disk.

    python examples/long_cache.py    # --tokens 100000 takes seconds

Keys and values are in two memory-mapped files, and the SocketIndex is in memory. The files are
dropped from the page cache before the first step. After each step `mincore` reports which of their
pages are in memory: those of the selected rows. Linux only.
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
    """Measurements of one decoded token."""

    seconds: float
    wanted: int  # pages of both files with selected rows that earlier steps had not read
    read: int  # pages read into memory
    found: bool  # whether every head selected the target token


def made_up(n_tokens: int) -> list[Synthetic]:
    """Return keys and values, float16 [T, G, D], of which any part can be generated at any time."""
    return [Synthetic((n_tokens, KV_HEADS, DIM), np.float16, seed=seed) for seed in (0, 1)]


def write(folder: pathlib.Path, n_tokens: int) -> None:
    """Write keys, values and index to files, chunk by chunk, and empty the page cache."""
    index = racecore.SocketIndex(racecore.SoftLSH.random(DIM, n_tables=60, n_planes=8, rng=0))
    with open(folder / "keys", "wb") as keys, open(folder / "values", "wb") as values:
        for start in range(0, n_tokens, CHUNK):
            key, value = (source[start : start + CHUNK] for source in made_up(n_tokens))
            keys.write(key.data)
            values.write(value.data)
            index.append(key, value)
        for file in (keys, values):
            file.flush()
            os.fsync(file.fileno())  # only pages that are on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index.save(folder / "index.npz")


def mapped(path: pathlib.Path) -> np.memmap:
    """Map a file as an array [1, T, G, D], without read-ahead."""
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
    """Search for a random token in every step, and yield the measurements."""
    rng, wanted = np.random.default_rng(0), np.zeros(len(in_memory(key)), bool)
    for _ in range(n_steps):
        token = int(rng.integers(index.n_tokens))
        query = (
            3
            * made_up(index.n_tokens)[0][token : token + 1].repeat(HEADS // KV_HEADS, axis=1)[None]
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
            bool((selected == token).any(axis=1).all()),
        )
        wanted |= more


def warm_up() -> None:
    """Load or compile all kernels, so that this is not measured in a step."""
    key, value = (source[:] for source in made_up(300))
    index = racecore.SocketIndex(racecore.SoftLSH.random(DIM, n_tables=60, n_planes=8, rng=0))
    index.append(key, value)
    racecore.sparse_attention(
        key[-1:].repeat(4, axis=1), key, value, index, budget=20, sink=1, window=1
    )


def main(folder: pathlib.Path, n_tokens: int, n_steps: int) -> None:
    """Write the files, decode, and print pages read and memory used."""
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
            megabytes = step.read * mmap.PAGESIZE / 1e6
            read = f"{1e3 * step.seconds:.0f} ms, {step.read:,} pages read ({megabytes:.1f} MB)"
            print(
                f"step {number}: {read}, {step.wanted:,} have selected rows, token "
                f"{'found' if step.found else 'MISSED'}"
            )
    print(
        f"memory during the steps, beyond the index: at most {(memory.peak - loaded) / 1e6:,.0f} MB"
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
