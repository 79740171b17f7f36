"""Launches of SOCKET's CPU kernels: tasks as a table, several of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from racecore.runtime.threads import count, run

__all__ = ["launch", "task_table"]

_LAUNCHES = 8  # for each thread


def launch(kernel: Callable[[int, int], object], n_tasks: int) -> None:
    """Run all tasks of a kernel, several in a launch where there are many.

    A launch takes ten microseconds, in which no other thread can begin one.
    """
    run(kernel, n_tasks, max(1, n_tasks // (_LAUNCHES * count())))


def task_table(rows: Sequence[tuple[int, ...]], width: int) -> np.ndarray:
    """Return rows of integers as int64 [n, width], also if there are none."""
    return np.array(rows, np.int64).reshape(len(rows), width)
