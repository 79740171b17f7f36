"""Where the results of a run go, and what is kept beside them so that it can be resumed.

Beside the first output file lie `<output>.journal` and `<output>.states` until the run is complete.
Everything is written in an order in which an end at any moment leaves something to go on from: rows
and state of a task before its line in the journal; all rows on the disk before the line that says
so; that line before any file gets its name; the names before the journal goes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from racecore.errors import InputChangedError, NonFiniteError
from racecore.outofcore import crash_points
from racecore.outofcore.journal import Entry, Journal
from racecore.outofcore.resume import Step, all_steps, remaining_steps
from racecore.outofcore.schedule import PASSES, Task
from racecore.outofcore.sinks import Sink
from racecore.outofcore.stages import Stages
from racecore.outofcore.states import States
from racecore.problem import Problem

__all__ = ["Results", "completed", "opened"]


class Results:
    """Open sinks, and journal and states where the run keeps them.

    Parameters
    ----------
    sinks : dict of str to Sink
    stages : Stages
        What computes; says what each task leaves.
    problem : Problem
    states : States or None
        None where no task needs what another one left.
    journal : Journal or None
    """

    def __init__(
        self,
        sinks: dict[str, Sink],
        stages: Stages,
        problem: Problem,
        states: States | None,
        journal: Journal | None,
    ) -> None:
        self.sinks, self._stages, self.states, self._journal = sinks, stages, states, journal
        self._is_causal = problem.is_causal

    def steps(self, tasks: Iterable[Task], skipped: Callable[[Task], object]) -> Iterator[Step]:
        """Yield what is to be done; tell `skipped` about each task that is done already."""
        if self._journal is None or not self._journal.entries:
            return all_steps(tasks)

        def take_over(task: Task) -> None:
            """Count the checksums of a task that is done already."""
            for name, checksum in self._entry(task).rows.items():
                self.sinks[name].checksum = (self.sinks[name].checksum + checksum) % 2**64
            skipped(task)

        return remaining_steps(tasks, self._is_done, self._stages.changes, take_over)

    def keep_state(self, task: Task) -> int | None:
        """Keep what the task that was just computed left, if another one may start from it; return
        the checksum.
        """
        if self.states is None or (self._journal is None and task.stage != "causal_scan"):
            return None
        first, numbers = self._stages.place(task)
        return self.states.put(task.number, first, self._stages.left(task)) if numbers else None

    def write(self, task: Task, rows: dict[str, np.ndarray], state: int | None) -> None:
        """Write what a task computed, and that it did."""
        checksums = {}
        for name, array in rows.items():
            checksums[name] = self.sinks[name].write(*task.tokens(name), array)
            crash_points.reached("one array written")
        crash_points.reached("rows written")
        if self._journal is not None:
            self._journal.note(task.number, Entry(checksums, state))

    def finish(self, completion: dict[str, Any]) -> None:
        """Give the outputs their names."""
        crash_points.reached("all tasks done")
        for sink in self.sinks.values():
            sink.sync()
        crash_points.reached("outputs on the disk")
        if self._journal is not None:
            self._journal.note_completion(completion)
        for sink in self.sinks.values():
            sink.finish()
            crash_points.reached("one output named")
        crash_points.reached("outputs named")
        self._forget()

    def close(self) -> None:
        """Let go of everything, for a later run to go on with; without a journal there is nothing
        to go on with.
        """
        if self._journal is None:
            self.abandon()
            return
        for sink in self.sinks.values():
            sink.close()
        if self.states is not None:
            self.states.close()

    def abandon(self) -> None:
        """Leave nothing behind."""
        for sink in self.sinks.values():
            sink.abandon()
        self._forget()

    def _forget(self) -> None:
        if self.states is not None:
            self.states.remove()
        crash_points.reached("states removed")
        if self._journal is not None:
            self._journal.remove()

    def _entry(self, task: Task) -> Entry:
        if self._journal is None:
            raise TypeError("a run without a journal has no entries")
        return self._journal.entries[task.number]

    def _is_done(self, task: Task) -> bool:
        """Tell whether what a task left is all there."""
        if self._journal is None or task.number not in self._journal.entries:
            return False
        entry = self._entry(task)
        passes = PASSES[self._is_causal, "d_query" in self.sinks]
        if set(entry.rows) != set(passes[task.stage].writes):
            return False
        first, numbers = self._stages.place(task)
        if numbers and (
            entry.state is None or not self._holds_state(task, first, numbers, entry.state)
        ):
            return False
        return all(
            self.sinks[name].holds(*task.tokens(name), entry.rows[name]) for name in entry.rows
        )

    def _holds_state(self, task: Task, first: int, numbers: int, expected: int) -> bool:
        return self.states is not None and self.states.holds(task.number, first, numbers, expected)


@contextlib.contextmanager
def opened(results: Results) -> Iterator[Results]:
    """Let go of results when a block ends early: they stay to be resumed, but not if the inputs are
    no good.
    """
    try:
        yield results
    except (NonFiniteError, InputChangedError):
        results.abandon()
        raise
    except BaseException:
        results.close()
        raise


def completed(journal: Journal, paths: list[str]) -> dict[str, Any] | None:
    """Return what a journal says of a run that was complete but could not finish giving names; do
    what is left of that.

    None means that it was not complete, or that its outputs are gone.
    """
    if journal.completion is None:
        return None
    left = {path: f"{path}.partial" for path in paths if os.path.exists(f"{path}.partial")}
    if any(path not in left and not os.path.exists(path) for path in paths):
        return None
    for path, partial in left.items():
        os.replace(partial, path)
    return journal.completion
