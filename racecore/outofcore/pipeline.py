"""Reading, computing and writing at the same time: one thread prefetches inputs, one writes
results, the calling thread computes.

There are buffers for two tasks. While task i is computed, the inputs of task i + 1 are read and the
outputs of task i - 1 are written, so the slower of disk and arithmetic determines the time.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from racecore.runtime import arrays

__all__ = ["Buffers", "Clock", "run_overlapped"]

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")
Computed = TypeVar("Computed")


class Buffers:
    """Memory for the arrays of two tasks, reused by all tasks: the system clears new memory first,
    which takes time.

    Inputs and results have separate buffers, since one task is read while another one's results are
    still being written.

    Parameters
    ----------
    empty : callable(shape, dtype) -> array
        Allocates a buffer.
    """

    def __init__(self, empty: Callable[[tuple[int, ...], Any], np.ndarray] = arrays.empty) -> None:
        self._empty = empty
        self._buffers: dict[tuple[str, int, int], np.ndarray] = {}

    def get(
        self, use: str, index: int, slot: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """Return an uninitialised array in a reused buffer.

        Parameters
        ----------
        use : str
            "read" or "write".
        index : int
            Number of the array among those of a task.
        slot : int
            0 or 1; the arrays of two tasks in a row are in different slots.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get((use, index, slot))
        if buffer is None or len(buffer) < n_bytes:
            # Free the old buffer before the larger one is allocated.
            self._buffers.pop((use, index, slot), None)
            buffer = self._buffers[use, index, slot] = self._empty((n_bytes,), np.uint8)
        return buffer[:n_bytes].view(dtype).reshape(shape)


class Clock:
    """Measures how long each part of a pipeline was busy, and how long reading or writing was.

    Attributes
    ----------
    seconds : dict of str to float
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "computing", "writing", "reading or writing"), 0.0)
        self._lock = threading.Lock()
        self._active = set[str]()
        self._last = time.perf_counter()

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the time of a block as that of a part."""
        with self._lock:
            self._tick()
            self._active.add(part)
        try:
            yield
        finally:
            with self._lock:
                self._tick()
                self._active.discard(part)

    def _tick(self) -> None:
        now = time.perf_counter()
        for part in self._active:
            self.seconds[part] += now - self._last
        if self._active - {"computing"}:
            self.seconds["reading or writing"] += now - self._last
        self._last = now


def run_overlapped(
    items: Iterable[Item],
    read: Callable[[Item, int], Arrays],
    compute: Callable[[Item, int, Arrays], Computed],
    write: Callable[[Item, Computed], None],
    clock: Clock,
) -> None:
    """Process all items in their order; the first exception ends the run, after the reads and
    writes that are under way.

    Parameters
    ----------
    items : iterable
    read : callable(item, slot) -> arrays
        Called in a reader thread; slots alternate between 0 and 1.
    compute : callable(item, slot, arrays) -> results
        Called in the calling thread.
    write : callable(item, results)
        Called in a writer thread, item by item.
    clock : Clock
    """

    def timed_read(item: Item, slot: int) -> Arrays:
        """Read, on the clock."""
        with clock.timing("reading"):
            return read(item, slot)

    def timed_write(item: Item, results: Computed) -> None:
        """Write, on the clock."""
        with clock.timing("writing"):
            write(item, results)

    written: list[Future[None]] = []
    with (
        ThreadPoolExecutor(1, "racecore-read") as reader,
        ThreadPoolExecutor(1, "racecore-write") as writer,
    ):
        prefetched: tuple[Item, Future[Arrays]] | None = None
        # One more round than items: the last item is computed after the last read.
        for index, item in enumerate(itertools.chain(items, [None])):
            current = prefetched
            if current is not None:
                inputs = current[1].result()
            prefetched = (
                None if item is None else (item, reader.submit(timed_read, item, index % 2))
            )
            if current is None:
                continue
            slot = (index - 1) % 2
            # Wait for the write of two items ago, whose buffers are needed now.
            if len(written) == 2:
                written.pop(0).result()
            with clock.timing("computing"):
                results = compute(current[0], slot, inputs)
            written.append(writer.submit(timed_write, current[0], results))
            # Drop the reference before the next item is computed: a GPU has memory for the results
            # of two items.
            del results
        for future in written:
            future.result()
