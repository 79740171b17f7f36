"""Carry out a checked run as a pipeline of tasks, in a way that can be resumed."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from racecore.errors import InputChangedError
from racecore.outofcore import crash_points, pipeline
from racecore.outofcore.checked import CheckedRun
from racecore.outofcore.finite import refuse_non_finite
from racecore.outofcore.journal import Journal
from racecore.outofcore.results import Results, complete_renames, kept_for_resuming
from racecore.outofcore.resume import Step
from racecore.outofcore.schedule import ChunkTask
from racecore.outofcore.sinks import Sink, open_sink
from racecore.outofcore.stamps import stamp_file
from racecore.outofcore.states import StateFile
from racecore.outofcore.targets import file_of, folder_of, is_path
from racecore.runtime import progress

__all__ = ["Execution"]

Arrays = dict[str, Any]
# Results on the device, their rows in host memory, and the checksum of the state after the task.
Computed = tuple[Arrays, Arrays, int | None]


class Execution:
    """One execution of a checked run.

    Parameters
    ----------
    run : CheckedRun
    check_finite : bool
        Refuse NaN and infinity in the inputs.

    Attributes
    ----------
    resumed_tokens : int
        Tokens that an earlier run had processed already, counted once for every pass.
    clock : pipeline.Clock
    """

    def __init__(self, run: CheckedRun, check_finite: bool) -> None:
        self._run, self._check_finite = run, check_finite
        self._runner = run.pass_runner()
        self._buffers = pipeline.Buffers(run.device.empty)
        # Sums of the gradients of planes and beta, complete when all tasks are.
        self._hash_sums = self._runner.hash_gradient
        # Number of the last task that is done.
        self._last = 0
        self.resumed_tokens = 0
        self.clock = pipeline.Clock()

    def execute(self, resume: bool, journal: Any) -> dict[str, str]:
        """Compute everything that remains; return the digests of the outputs.

        Parameters
        ----------
        resume : bool
            Start from the results of an interrupted run, if there are any.
        journal : path or None
            As for `racecore.outofcore.run`.
        """
        stamps = self._input_stamps()
        with contextlib.ExitStack() as stack:
            opened = None
            if (path := self._run.journal_path(journal)) is not None:
                opened = Journal(path, afresh=not resume)
                stack.callback(opened.close)
                digests = self._adopt(opened)
                if digests is not None:
                    return digests
            results = stack.enter_context(kept_for_resuming(self._open_results(opened)))
            self._compute(results)
            self._hash_sums = self._runner.hash_gradient
            self._refuse_changed_inputs(stamps)
            self._write_hash_gradients()
            digests = {name: f"{sink.checksum:016x}" for name, sink in results.sinks.items()}
            sums = None if self._hash_sums is None else self._hash_sums.tobytes().hex()
            with self.clock.timing("writing"):
                results.finish({"digests": digests, "hash": sums})
        return digests

    def hash_gradients(self) -> tuple[np.ndarray | None, Any]:
        """Return the gradients of planes and beta, None where they were not requested."""
        return self._run.hash_gradients(self._hash_sums)

    def _input_stamps(self) -> dict[str, tuple[str, str]]:
        """Return (path, stamp) of every input file, by the name of the input."""
        paths = {name: file_of(x) for name, x in self._run.request.inputs.items()}
        return {name: (path, stamp_file(path)) for name, path in paths.items() if path is not None}

    def _refuse_changed_inputs(self, stamps: dict[str, tuple[str, str]]) -> None:
        """Raise an error if an input file is not what it was when the run began."""
        for name, (path, before) in stamps.items():
            if (now := stamp_file(path)) != before:
                raise InputChangedError(
                    f"{path} ({name}) changed during the run: {before}, then {now}"
                )

    def _adopt(self, journal: Journal) -> dict[str, str] | None:
        """Compare a journal with this run, and begin it anew where there is nothing to resume;
        return the digests if it says that the run is complete.
        """
        identity = self._run.identity()
        outputs = self._run.request.outputs.values()
        paths = [os.path.realpath(output) for output in outputs if is_path(output)]
        if journal.identity is not None:
            difference = journal.difference(identity)
            # All outputs have their names: only the removal of the journal was missing.
            is_over = journal.completion is not None and not any(
                os.path.exists(f"{path}.partial") for path in paths
            )
            if difference is not None and not is_over:
                raise ValueError(difference)
            if difference is None and (completion := complete_renames(journal, paths)) is not None:
                return self._adopt_completion(journal, completion)
            if difference is None and journal.completion is None:
                return None
        journal.begin(identity)
        return None

    def _adopt_completion(self, journal: Journal, completion: dict[str, Any]) -> dict[str, str]:
        """Take over the results of a complete run, and remove its journal and states."""
        if self._hash_sums is not None:
            sums = np.frombuffer(bytes.fromhex(completion["hash"]))
            self._hash_sums = sums.reshape(self._hash_sums.shape)
        self.resumed_tokens = self._run.n_steps
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_states_path(journal.path))
        journal.remove()
        return dict(completion["digests"])

    def _open_results(self, journal: Journal | None) -> Results:
        """Open the sinks and the file of states."""
        run = self._run
        resumes = journal is not None and bool(journal.entries)
        taken, outputs = list(run.request.inputs.items()), run.request.outputs
        sinks: dict[str, Sink] = {}
        results = Results(sinks, self._runner, run.problem, None, journal)
        try:
            for name, output in outputs.items():
                sinks[name] = open_sink(output, name, run.shape(name), run.dtype, taken, resumes)
                taken.append((name, output))
            crash_points.reached("outputs reserved")
            if journal is not None:
                path = _states_path(journal.path)
                results.states = StateFile(self._runner.record_size, path)
            elif run.problem.is_causal and run.wants_gradients:
                # Beside the outputs, since the folder for temporary files may be in memory.
                folders = [folder_of(output) for output in outputs.values() if is_path(output)]
                folder = folders[0] if folders else None
                results.states = StateFile(self._runner.record_size, folder=folder)
        except BaseException:
            if resumes:
                results.close()
            else:
                results.discard()
            raise
        return results

    def _compute(self, results: Results) -> None:
        """Compute every task that remains."""
        device, runner = self._run.device, self._runner

        def read(step: Step, slot: int) -> Arrays:
            """Return the inputs of a task, on the device."""
            return device.to_device(self._read(step.task, slot))

        def compute(step: Step, slot: int, inputs: Arrays) -> Computed:
            """Compute a task, and save the state after it."""
            task = step.task
            self._last = max(self._last, task.number)
            rows = self._result_rows(task, slot, results)
            with device.result_arrays(rows) as computed:
                if step.checkpoint is not None and results.states is not None:
                    runner.restore(task, step.checkpoint, results.states)
                runner.compute(task, inputs, computed, results.states)
                state = results.save_state(task)
            return computed, rows, state

        def write(step: Step, computed: Computed) -> None:
            """Copy the results of a task to host memory, and write them."""
            on_device, rows, state = computed
            device.to_host(on_device, rows)
            results.write(step.task, rows, state)

        steps = results.steps(self._run.tasks(), self._skip)
        pipeline.run_overlapped(steps, read, compute, write, self.clock)
        # The last task computed need not be the last of the run: an earlier run may have done it.
        if self.resumed_tokens and results.states is not None:
            runner.restore_hash({"hash": self._last}, results.states)

    def _skip(self, task: ChunkTask) -> None:
        """Count a task that an earlier run has done."""
        self._last = task.number
        p = self._run.passes[task.pass_name]
        begin, end = task.tokens(p.reads[0])
        n_tokens = (end - begin) * p.times
        self.resumed_tokens += n_tokens
        progress.advance(n_tokens)

    def _read(self, task: ChunkTask, slot: int) -> dict[str, np.ndarray]:
        """Return the inputs of a task in host memory, checked."""
        p = self._run.passes[task.pass_name]
        inputs = {}
        for index, name in enumerate(self._run.inputs_of(task.pass_name)):
            source, (begin, end) = self._run.sources[name], task.tokens(name)
            row = () if name == "key_mask" else source.shape[-2:]
            buffer = self._buffers.get("read", index, slot, (end - begin, *row), source.dtype)
            inputs[name] = source.read(begin, end, buffer)
        if self._check_finite:
            for name in p.reads:
                # A backward pass reads again what the forward pass has checked, but for d_out.
                is_new = not p.is_backward or name == "d_out"
                if is_new and not self._run.sources[name].is_synthetic:
                    mask = inputs.get("key_mask") if name in ("key", "value") else None
                    begin, _ = task.tokens(name)
                    refuse_non_finite(self._run.sources[name], begin, inputs[name], mask)
        return inputs

    def _result_rows(self, task: ChunkTask, slot: int, results: Results) -> Arrays:
        """Return the arrays in host memory for the results of a task: in the memory of the sink
        where it has any that the device can write to, else in buffers.
        """
        rows = {}
        for index, name in enumerate(self._run.passes[task.pass_name].writes):
            begin, end = task.tokens(name)
            sink = results.sinks[name]
            memory = sink.memory_of(begin, end)
            if memory is None or not self._run.device.can_write_to(memory):
                shape = (end - begin, *sink.shape[-2:])
                memory = self._buffers.get("write", index, slot, shape, sink.dtype)
            rows[name] = memory
        return rows

    def _write_hash_gradients(self) -> None:
        """Write the gradients of planes and beta to their file, if one was given."""
        d_lsh = self._run.request.d_lsh
        if not is_path(d_lsh):
            return
        d_planes, d_beta = self.hash_gradients()
        path = os.path.realpath(os.fspath(d_lsh))
        with open(f"{path}.partial", "wb") as file:
            np.savez(file, planes=np.asarray(d_planes), beta=np.asarray(d_beta))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)


def _states_path(journal: str) -> str:
    return f"{journal.removesuffix('.journal')}.states"
