"""Reading, computing and writing at the same time: one thread reads ahead, one writes behind, the caller computes.

Every array has two buffers. While task i is computed, the inputs of task i + 1 are read and the outputs of task i - 1
are written, so that the slower of disk and arithmetic sets the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from racecore.outofcore.schedule import Task

__all__ = ["Buffers", "run"]

Arrays = dict[str, np.ndarray]


class Buffers:
    """Two buffers per array, made on first use and used again, since new memory must be cleared by the system."""

    def __init__(self, allocate: Callable[[str, int], np.ndarray]) -> None:
        self._allocate = allocate
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def get(self, name: str, slot: int, n_tokens: int) -> np.ndarray:
        """Return room for some tokens of an array."""
        buffer = self._kept.get((name, slot))
        if buffer is None or len(buffer) < n_tokens:
            self._kept.pop((name, slot), None)
            buffer = self._kept[name, slot] = self._allocate(name, n_tokens)
        return buffer[:n_tokens]


def run(
    tasks: Iterable[Task],
    read: Callable[[Task, int], Arrays],
    compute: Callable[[Task, int, Arrays], Arrays],
    write: Callable[[Task, Arrays], None],
) -> None:
    """Do all tasks in their order.

    Parameters
    ----------
    tasks : iterable of Task
    read : callable(task, slot) -> arrays
        Called in a thread of its own; slots alternate between 0 and 1.
    compute : callable(task, slot, arrays) -> arrays
        Called here.
    write : callable(task, arrays)
        Called in another thread, task by task.

    The first exception ends the run, after what was being read and written at that moment.
    """
    written: list[Future[None]] = []
    with ThreadPoolExecutor(1, "racecore-read") as reader, ThreadPoolExecutor(1, "racecore-write") as writer:
        ahead: tuple[Task, Future[Arrays]] | None = None
        for index, task in enumerate(itertools.chain(tasks, [None])):
            current = ahead
            if current is not None:
                arrays = current[1].result()
            ahead = None if task is None else (task, reader.submit(read, task, index % 2))
            if current is None:
                continue
            slot = (index - 1) % 2
            if len(written) == 2:  # whose buffers are needed now
                written.pop(0).result()
            results = compute(current[0], slot, arrays)
            written.append(writer.submit(write, current[0], results))
        for future in written:
            future.result()
