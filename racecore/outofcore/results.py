"""Writing the results of a run, and what is kept beside them so that it can be resumed.

Until the run is complete, `<output>.journal` and `<output>.states` lie beside the first output
file. The order of writes leaves something to resume from whenever the process is killed: rows and
state of a task before its line in the journal; all rows on the disk before the line that says so;
that line before any file is renamed; the renames before the journal is removed.
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
from racecore.outofcore.passes import PassRunner
from racecore.outofcore.resume import Step, all_steps, remaining_steps
from racecore.outofcore.schedule import PASSES, ChunkTask
from racecore.outofcore.sinks import Sink
from racecore.outofcore.states import StateFile
from racecore.problem import Problem

__all__ = ["Results", "complete_renames", "kept_for_resuming"]


class Results:
    """Open sinks, and the journal and the states where the run keeps them.

    Parameters
    ----------
    sinks : dict of str to Sink
    runner : PassRunner
        Holds the states that are saved after a task.
    problem : Problem
    states : StateFile or None
        None where no task starts from the saved state of another one.
    journal : Journal or None
    """

    def __init__(
        self,
        sinks: dict[str, Sink],
        runner: PassRunner,
        problem: Problem,
        states: StateFile | None,
        journal: Journal | None,
    ) -> None:
        self.sinks, self._runner = sinks, runner
        self.states, self._journal = states, journal
        self._is_causal = problem.is_causal

    def steps(
        self, tasks: Iterable[ChunkTask], on_skipped: Callable[[ChunkTask], object]
    ) -> Iterator[Step]:
        """Yield the tasks that remain; call `on_skipped` for each task that is done already."""
        if self._journal is None or not self._journal.entries:
            return all_steps(tasks)

        def skip(task: ChunkTask) -> None:
            """Add the checksums of a task that is done already to the digests."""
            for name, checksum in self._entry(task).rows.items():
                self.sinks[name].checksum = (self.sinks[name].checksum + checksum) % 2**64
            on_skipped(task)

        return remaining_steps(tasks, self._is_done, self._runner.updated_by, skip)

    def save_state(self, task: ChunkTask) -> int | None:
        """Save the state after the task just computed, if another task may start from it; return
        its checksum.
        """
        # Without a journal only the causal backward pass reads states: those of the forward scan.
        if self.states is None or (self._journal is None and task.pass_name != "scan"):
            return None
        first, count = self._runner.record_range(task)
        if count == 0:
            return None
        return self.states.write(task.number, first, self._runner.updated_state(task))

    def write(self, task: ChunkTask, rows: dict[str, np.ndarray], state: int | None) -> None:
        """Write the rows of a task, then its line in the journal."""
        checksums = {}
        for name, array in rows.items():
            checksums[name] = self.sinks[name].write(*task.tokens(name), array)
            crash_points.reached("one array written")
        crash_points.reached("rows written")
        # Not synchronised with the rows: the checksums show whether both reached the disk.
        if self._journal is not None:
            self._journal.add_task(task.number, Entry(checksums, state))

    def finish(self, completion: dict[str, Any]) -> None:
        """Bring all outputs to the disk and give them their names."""
        crash_points.reached("all tasks done")
        # A complete run is not verified again, so its rows must be on the disk before that line.
        for sink in self.sinks.values():
            sink.sync()
        crash_points.reached("outputs on the disk")
        if self._journal is not None:
            self._journal.add_completion(completion)
        for sink in self.sinks.values():
            sink.finish()
            crash_points.reached("one output named")
        crash_points.reached("outputs named")
        self._remove_resume_files()

    def close(self) -> None:
        """Close all files and keep them for a later run; without a journal, which nothing could
        resume, remove them.
        """
        if self._journal is None:
            self.discard()
            return
        for sink in self.sinks.values():
            sink.close()
        if self.states is not None:
            self.states.close()

    def discard(self) -> None:
        """Close and remove all files."""
        for sink in self.sinks.values():
            sink.discard()
        self._remove_resume_files()

    def _remove_resume_files(self) -> None:
        if self.states is not None:
            self.states.remove()
        crash_points.reached("states removed")
        # The journal last: as long as it is there, a later run removes the states.
        if self._journal is not None:
            self._journal.remove()

    def _entry(self, task: ChunkTask) -> Entry:
        if self._journal is None:
            raise TypeError("a run without a journal has no entries")
        return self._journal.entries[task.number]

    def _is_done(self, task: ChunkTask) -> bool:
        """Return whether rows and state of a task are all in the files."""
        if self._journal is None or task.number not in self._journal.entries:
            return False
        entry = self._entry(task)
        # A line of other arrays is not one of this run.
        passes = PASSES[self._is_causal, "d_query" in self.sinks]
        if set(entry.rows) != set(passes[task.pass_name].writes):
            return False
        first, count = self._runner.record_range(task)
        if count and (entry.state is None or not self._has_state(task, first, count, entry.state)):
            return False
        return all(
            self.sinks[name].matches(*task.tokens(name), entry.rows[name]) for name in entry.rows
        )

    def _has_state(self, task: ChunkTask, first: int, count: int, expected: int) -> bool:
        return self.states is not None and self.states.matches(task.number, first, count, expected)


@contextlib.contextmanager
def kept_for_resuming(results: Results) -> Iterator[Results]:
    """Close results when a block fails: files stay to be resumed, unless the inputs are to blame,
    which a later run would refuse as well.
    """
    try:
        yield results
    except (NonFiniteError, InputChangedError):
        results.discard()
        raise
    except BaseException:
        results.close()
        raise


def complete_renames(journal: Journal, paths: list[str]) -> dict[str, Any] | None:
    """Rename the outputs that a complete run could not rename any more; return its completion from
    the journal.

    None means that the run was not complete, or that its outputs are gone.
    """
    if journal.completion is None:
        return None
    partials = {path: f"{path}.partial" for path in paths if os.path.exists(f"{path}.partial")}
    if any(path not in partials and not os.path.exists(path) for path in paths):
        return None
    for path, partial in partials.items():
        os.replace(partial, path)
    return journal.completion
