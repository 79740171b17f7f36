"""Reading, computing and writing at the same time: one thread reads ahead, one writes behind, the
caller computes.

There are buffers for two tasks. While task i is computed, the inputs of task i + 1 are read and the
outputs of task i - 1 are written, so that the slower of disk and arithmetic sets the time.
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

__all__ = ["Buffers", "Clock", "run"]

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")
Computed = TypeVar("Computed")


class Buffers:
    """Memory for the arrays of two tasks, used again by every task, since new memory must be
    cleared by the system first.

    What is read and what is written have buffers of their own: one task may be read into them while
    another one's results are still being written.
    """

    def __init__(self, empty: Callable[[tuple[int, ...], Any], np.ndarray] = arrays.empty) -> None:
        self._empty = empty
        self._kept: dict[tuple[str, int, int], np.ndarray] = {}

    def get(
        self, use: str, index: int, slot: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """Return room for an array: the one at `index` of those that a task in this slot has for
        this use.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._kept.get((use, index, slot))
        if buffer is None or len(buffer) < n_bytes:
            self._kept.pop((use, index, slot), None)  # before there is another one
            buffer = self._kept[use, index, slot] = self._empty((n_bytes,), np.uint8)
        return buffer[:n_bytes].view(dtype).reshape(shape)


class Clock:
    """How long each part of a pipeline was at work, and how long either reading or writing was.

    Attributes
    ----------
    seconds : dict of str to float
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("reading", "computing", "writing", "reading or writing"), 0.0)
        self._lock, self._active, self._last = threading.Lock(), set[str](), time.perf_counter()

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """Count the time of a block."""
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


def run(
    items: Iterable[Item],
    read: Callable[[Item, int], Arrays],
    compute: Callable[[Item, int, Arrays], Computed],
    write: Callable[[Item, Computed], None],
    clock: Clock,
) -> None:
    """Do all items in their order.

    Parameters
    ----------
    items : iterable
    read : callable(item, slot) -> arrays
        Called in a thread of its own; slots alternate between 0 and 1.
    compute : callable(item, slot, arrays) -> results
        Called here.
    write : callable(item, results)
        Called in another thread, item by item.
    clock : Clock
        Told what is at work.

    The first exception ends the run, after what was being read and written at that moment.
    """

    def timed_read(item: Item, slot: int) -> Arrays:
        """Read, and tell the clock."""
        with clock.running("reading"):
            return read(item, slot)

    def timed_write(item: Item, results: Computed) -> None:
        """Write, and tell the clock."""
        with clock.running("writing"):
            write(item, results)

    written: list[Future[None]] = []
    with (
        ThreadPoolExecutor(1, "racecore-read") as reader,
        ThreadPoolExecutor(1, "racecore-write") as writer,
    ):
        ahead: tuple[Item, Future[Arrays]] | None = None
        for index, item in enumerate(itertools.chain(items, [None])):
            current = ahead
            if current is not None:
                arrays = current[1].result()
            ahead = None if item is None else (item, reader.submit(timed_read, item, index % 2))
            if current is None:
                continue
            slot = (index - 1) % 2
            if len(written) == 2:  # whose buffers are needed now
                written.pop(0).result()
            with clock.running("computing"):
                results = compute(current[0], slot, arrays)
            written.append(writer.submit(timed_write, current[0], results))
            del results  # of an earlier task, when the next one is computed: a GPU has room for two
        for future in written:
            future.result()
