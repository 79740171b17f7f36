"""The tasks that remain after an interrupted run, and the saved states they start from.

A task is done if the journal has a line for it, its rows are in the files with the checksums of
that line, and so is the state after it. Every other task is computed again from the state before
it. Later tasks that are done already stay done: a task computes the same bits each time. Short
sequences of one unit keep no states, so their unit is done as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from racecore.outofcore.passes import Checkpoint
from racecore.outofcore.schedule import ChunkTask

__all__ = ["Step", "all_steps", "remaining_steps"]


class Step(NamedTuple):
    """A task to compute.

    `checkpoint` names the saved states to restore before it; None means that the state in memory,
    after the task before, is the right one.
    """

    task: ChunkTask
    checkpoint: Checkpoint | None


def all_steps(tasks: Iterable[ChunkTask]) -> Iterator[Step]:
    """Yield every task."""
    for task in tasks:
        yield Step(task, None)


def remaining_steps(
    tasks: Iterable[ChunkTask],
    is_done: Callable[[ChunkTask], bool],
    updated_by: Callable[[ChunkTask], list[str]],
    on_skipped: Callable[[ChunkTask], object],
) -> Iterator[Step]:
    """Yield the tasks that remain.

    Parameters
    ----------
    tasks : iterable of ChunkTask
        All of the run, in their order.
    is_done : callable(task) -> bool
    updated_by : callable(task) -> list of str
        Names of the carried arrays that a task updates for later tasks.
    on_skipped : callable(task)
        Called for every task that is done.
    """
    # The gradient of the hash is summed over all units; states belong to one unit.
    hash_checkpoint: Checkpoint = {}
    # Whether the task before was computed, so that its state is in memory.
    computed_before = False
    for _, unit in groupby(tasks, key=lambda task: task.first):
        checkpoint = dict(hash_checkpoint)
        for task, done in _with_status(unit, is_done):
            if done:
                on_skipped(task)
            else:
                yield Step(task, None if computed_before else dict(checkpoint))
            computed_before = not done
            checkpoint |= dict.fromkeys(updated_by(task), task.number)
        hash_checkpoint = {name: number for name, number in checkpoint.items() if name == "hash"}


def _with_status(
    unit: Iterator[ChunkTask], is_done: Callable[[ChunkTask], bool]
) -> Iterator[tuple[ChunkTask, bool]]:
    """Yield the tasks of a unit, each with whether it is done."""
    # Between chunks of one sequence states are saved: each task can be computed again by itself.
    first = next(unit)
    if first.is_of_one_sequence:
        yield first, is_done(first)
        for task in unit:
            yield task, is_done(task)
        return
    tasks = [first, *unit]
    done = all(is_done(task) for task in tasks)
    for task in tasks:
        yield task, done
