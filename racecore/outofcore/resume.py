"""Which tasks of a run are still to be done, after what an earlier one left was looked at, and
where they start from.

A task is done if the journal says so, its rows are in the files with the checksums noted there, and
so is the state that it left. Every other one is done again from the state before it; that those
after it are done already does not matter, since every task leaves the same bits each time. Short
sequences that share a unit keep no states: their unit is done whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from racecore.outofcore.schedule import Task
from racecore.outofcore.stages import Origin

__all__ = ["Step", "all_steps", "remaining_steps"]


class Step(NamedTuple):
    """A task to do."""

    task: Task
    origin: Origin | None  # where to start from; None means where the task before it ended


def all_steps(tasks: Iterable[Task]) -> Iterator[Step]:
    """Yield every task."""
    for task in tasks:
        yield Step(task, None)


def remaining_steps(
    tasks: Iterable[Task],
    is_done: Callable[[Task], bool],
    changes: Callable[[Task], list[str]],
    skipped: Callable[[Task], object],
) -> Iterator[Step]:
    """Yield what is to be done.

    Parameters
    ----------
    tasks : iterable of Task
        All of the run, in their order.
    is_done : callable(task) -> bool
    changes : callable(task) -> list of str
        What a task changes that later ones go on from.
    skipped : callable(task)
        Told about every task that is done.
    """
    hash_left: Origin = {}
    follows = False  # whether the task before was one to be done
    for _, unit in groupby(tasks, key=lambda task: task.first):
        origin = dict(hash_left)
        for task, done in _judged(unit, is_done):
            if done:
                skipped(task)
            else:
                yield Step(task, None if follows else dict(origin))
            follows = not done
            origin |= dict.fromkeys(changes(task), task.number)
        hash_left = {name: number for name, number in origin.items() if name == "hash"}


def _judged(unit: Iterator[Task], is_done: Callable[[Task], bool]) -> Iterator[tuple[Task, bool]]:
    """Yield the tasks of a unit and whether each is done."""
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
