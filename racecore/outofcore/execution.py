"""One run: checked before it starts, computed in a pipeline of tasks, kept so that it can be
resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from racecore import backends, inputs
from racecore._version import __version__
from racecore.errors import InputChangedError
from racecore.gradients import hash_gradients
from racecore.outofcore import crash_points, pipeline, schedule
from racecore.outofcore.devices import Gpu, Host, Place
from racecore.outofcore.finite import refuse_non_finite
from racecore.outofcore.journal import Journal
from racecore.outofcore.request import Request
from racecore.outofcore.results import Results, completed, opened
from racecore.outofcore.resume import Step
from racecore.outofcore.sinks import Sink, open_sink
from racecore.outofcore.sources import Source, open_source
from racecore.outofcore.stages import Stages
from racecore.outofcore.stamps import stamp, stamp_file
from racecore.outofcore.states import States
from racecore.outofcore.targets import check_paths, file_of, folder_of, is_path
from racecore.runtime import arrays, kernel_cache, progress

__all__ = ["Run", "prepared"]

Arrays = dict[str, Any]


@contextlib.contextmanager
def prepared(request: Request, check_finite: bool = True) -> Iterator[Run]:
    """Open what is to be read and check everything that can be wrong before anything is computed or
    written.
    """
    if request.d_out is None and any(
        x is not None for x in (request.d_query, request.d_key, request.d_value, request.d_lsh)
    ):
        raise ValueError("gradients need d_out, the gradient of the output")
    untyped = None if request.dtype is None else _bfloat16(request.dtype)
    with contextlib.ExitStack() as stack:
        sources = {}
        for name, source in request.reads.items():
            sources[name] = open_source(source, name, untyped)
            stack.callback(sources[name].close)
        check_paths(list(request.reads.items()), {**request.targets, "d_lsh": request.d_lsh})
        for path in (*request.targets.values(), request.d_lsh):
            if is_path(path):
                folder_of(path)
        yield Run(request, sources, check_finite)


class Run:
    """One checked run: what is read, how it is cut, and the arithmetic.

    Attributes
    ----------
    request : Request
    sources : dict of str to Source
    problem : Problem
        Of its arrays only shapes and dtypes mean anything.
    limits : schedule.Limits
    resumed_tokens : int
    clock : pipeline.Clock
    """

    def __init__(self, request: Request, sources: dict[str, Source], check_finite: bool) -> None:
        self.request, self.sources, self._checks = request, sources, check_finite
        stand_ins = {name: _stand_in(source) for name, source in sources.items()}
        problem, self._lsh = inputs.check_attention(
            inputs.Passed.resolve(stand_ins["query"], stand_ins["key"], stand_ins["value"]),
            request.lsh,
            is_causal=request.is_causal,
            readout=request.readout,
            key_mask=stand_ins.get("key_mask"),
            cu_seqlens=_bounds(request.cu_seqlens),
        )
        shape = self.shape("out")
        if "d_out" in sources and (sources["d_out"].shape, sources["d_out"].dtype) != (
            shape,
            sources["query"].dtype,
        ):
            raise ValueError(
                f"d_out must have the shape and dtype of the output, {shape} and "
                f"{sources['query'].dtype}, got "
                f"{sources['d_out'].shape} and {sources['d_out'].dtype}"
            )
        self.wants_gradients = "d_out" in sources
        self.memory_limit = inputs.parse_bytes(request.memory_limit)
        self._backend = backends.choose(request.backend)
        self._place: Place = Gpu() if self._backend.name == "cuda" else Host()
        most = self._place.most_segments
        self.limits = schedule.limits(problem, self.wants_gradients, self.memory_limit, most)
        self.problem = replace(problem, workspace_bytes=self.limits.workspace_bytes)
        self._wrt = frozenset(
            {"beta"} if request.d_lsh is None or request.d_lsh is False else {"planes", "beta"}
        )
        n_numbers = problem.planes[0].size + 1 if "planes" in self._wrt else 1
        self._hash = (
            np.zeros((2, problem.n_state_heads, n_numbers)) if self.wants_gradients else None
        )
        self.passes = schedule.PASSES[problem.is_causal, self.wants_gradients]
        self.resumed_tokens = 0
        self.clock = pipeline.Clock()

    @property
    def n_tokens(self) -> int:
        """Query tokens."""
        return int(np.prod(self.sources["query"].shape[:-2], dtype=np.int64))

    @property
    def n_steps(self) -> int:
        """Tokens of all passes, as `progress` counts them."""
        return self.n_tokens * schedule.n_passes(self.problem.is_causal, self.wants_gradients)

    def hash_gradients(self) -> tuple[np.ndarray | None, Any]:
        """Return the gradients of planes and beta."""
        return hash_gradients(self._hash, self.problem, self._lsh, self._wrt)

    @property
    def dtype(self) -> np.dtype:
        """Of all arrays but the mask."""
        return self.sources["query"].dtype

    def reads_of(self, stage: str) -> list[str]:
        """Return the names of what a pass reads, the mask last."""
        names = [*self.passes[stage].reads]
        return [*names, "key_mask"] if "key" in names and "key_mask" in self.sources else names

    def tasks(self) -> Iterator[schedule.Task]:
        """Yield everything that is to be done."""
        return schedule.tasks(self.problem, self.wants_gradients, self.limits)

    def stages(self) -> Stages:
        """Return the arithmetic."""
        return Stages(self.problem, self._backend, self._hash, self._place.on_device)

    def journal_path(self, journal: Any = None) -> str | None:
        """Return where the journal goes: where a caller says, beside the first output, or nowhere.

        Raises
        ------
        ValueError
            A caller asks for one though the run writes to arrays.
        """
        targets = self.request.targets.values()
        if any(target is not None and not is_path(target) for target in targets):
            if journal is not None:
                raise ValueError(
                    "a run that writes to arrays cannot be resumed: leave out journal, or write "
                    "to files"
                )
            return None
        if journal is not None:
            folder_of(journal)
            check_paths(
                list(self.request.reads.items()), {**self.request.targets, "journal": journal}
            )
            return os.path.realpath(os.fspath(journal))
        first = next((os.path.realpath(os.fspath(x)) for x in targets if x is not None), None)
        return None if first is None else f"{first}.journal"

    def go(self, resume: bool, journal: Any) -> dict[str, str]:
        """Compute everything, or what is left to do; return the digests."""
        files_read = {
            name: path for name, x in self.request.reads.items() if (path := file_of(x)) is not None
        }
        before = {name: stamp_file(path) for name, path in files_read.items()}
        stages = self.stages()
        with contextlib.ExitStack() as stack:
            found = None
            if (path := self.journal_path(journal)) is not None:
                found = Journal(path, afresh=not resume)
                stack.callback(found.close)
                digests = self._taken_up(found)
                if digests is not None:
                    return digests
            results = stack.enter_context(opened(self._results(stages, found)))
            self._compute(stages, results)
            if self._hash is not None:
                self._hash[...] = stages.hash_gradient
            for name, path in files_read.items():
                if (now := stamp_file(path)) != before[name]:
                    raise InputChangedError(
                        f"{path} ({name}) changed during the run: {before[name]}, then {now}"
                    )
            self._write_hash_gradients()
            digests = {name: f"{sink.checksum:016x}" for name, sink in results.sinks.items()}
            completion = {
                "digests": digests,
                "hash": None if self._hash is None else self._hash.tobytes().hex(),
            }
            with self.clock.running("writing"):
                results.finish(completion)
        return digests

    def _taken_up(self, journal: Journal) -> dict[str, str] | None:
        """Compare a journal with this run, or begin it; return the digests if it says that all is
        done.
        """
        identity = self._identity()
        paths = [
            os.path.realpath(target) for target in self.request.targets.values() if is_path(target)
        ]
        if journal.identity is not None:
            difference = journal.difference(identity)
            is_over = journal.completion is not None and not any(
                os.path.exists(f"{path}.partial") for path in paths
            )
            if difference is not None and not is_over:
                raise ValueError(difference)
            if difference is None and (completion := completed(journal, paths)) is not None:
                if self._hash is not None:
                    self._hash[...] = np.frombuffer(bytes.fromhex(completion["hash"])).reshape(
                        self._hash.shape
                    )
                self.resumed_tokens = self.n_steps
                _remove(_states_path(journal.path))
                journal.remove()
                return dict(completion["digests"])
            if difference is None and journal.completion is None:
                return None
        journal.begin(identity)
        return None

    def _results(self, stages: Stages, journal: Journal | None) -> Results:
        """Open sinks and the file of states."""
        resumes = journal is not None and bool(journal.entries)
        taken, targets = list(self.request.reads.items()), self.request.targets
        sinks: dict[str, Sink] = {}
        results = Results(sinks, stages, self.problem, None, journal)
        try:
            for name, target in targets.items():
                sinks[name] = open_sink(target, name, self.shape(name), self.dtype, taken, resumes)
                taken.append((name, target))
            crash_points.reached("outputs reserved")
            if journal is not None:
                results.states = States(stages.numbers, _states_path(journal.path))
            elif self.problem.is_causal and self.wants_gradients:
                folder = next(
                    (folder_of(target) for target in targets.values() if is_path(target)), None
                )
                results.states = States(stages.numbers, folder=folder)
        except BaseException:
            if resumes:
                results.close()
            else:
                results.abandon()
            raise
        return results

    def _compute(self, stages: Stages, results: Results) -> None:
        """Do every task that is still to be done."""
        buffers, place = pipeline.Buffers(self._place.empty), self._place
        last = 0

        def skipped(task: schedule.Task) -> None:
            """Count a task that an earlier run did."""
            nonlocal last
            last = task.number
            begin, end = task.tokens(self.passes[task.stage].reads[0])
            n_tokens = (end - begin) * self.passes[task.stage].times
            self.resumed_tokens += n_tokens
            progress.advance(n_tokens)

        def read(step: Step, slot: int) -> Arrays:
            """Return the inputs of a task, where it is computed."""
            return place.bring(self._read(step.task, slot, buffers))

        def compute(step: Step, slot: int, read: Arrays) -> tuple[Arrays, Arrays, int | None]:
            """Do a task: into the sinks themselves where they lend their memory, else into buffers."""
            nonlocal last
            task, rows = step.task, {}
            last = max(last, task.number)
            for index, name in enumerate(self.passes[task.stage].writes):
                begin, end = task.tokens(name)
                sink = results.sinks[name]
                own, shape = sink.place(begin, end), (end - begin, *sink.shape[-2:])
                own = own if own is None or place.takes(own) else None
                rows[name] = (
                    buffers.get("write", index, slot, shape, sink.dtype) if own is None else own
                )
            with place.results_for(rows) as written:
                if step.origin is not None and results.states is not None:
                    stages.restore(task, step.origin, results.states)
                stages.compute(task, read, written, results.states)
                state = results.keep_state(task)
            return written, rows, state

        def write(step: Step, computed: tuple[Arrays, Arrays, int | None]) -> None:
            """Bring what a task left back, and write it."""
            written, rows, state = computed
            place.send(written, rows)
            results.write(step.task, rows, state)

        pipeline.run(results.steps(self.tasks(), skipped), read, compute, write, self.clock)
        if (
            self.resumed_tokens and results.states is not None
        ):  # the last task to be done need not be the last of all
            stages.restore_hash({"hash": last}, results.states)

    def _write_hash_gradients(self) -> None:
        if not is_path(self.request.d_lsh):
            return
        d_planes, d_beta = self.hash_gradients()
        path = os.path.realpath(os.fspath(self.request.d_lsh))
        with open(f"{path}.partial", "wb") as file:
            np.savez(file, planes=np.asarray(d_planes), beta=np.asarray(d_beta))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed, by the names that a message can
        give.
        """
        problem, planes = self.problem, self._lsh.planes
        hash_ = f"{self._lsh.n_tables} tables of {self._lsh.n_planes} planes, beta {np.asarray(self._lsh.beta).tolist()}"
        return {
            "racecore": __version__,
            "kernels and processor": self._place.identity(kernel_cache.identity()),
            **{
                name: stamp(self.request.reads[name], source)
                for name, source in self.sources.items()
            },
            "hash": f"{hash_}, fingerprint {self._lsh.fingerprint[:16]} of {planes.shape}",
            "is_causal": problem.is_causal,
            "readout": problem.readout,
            "sequences": f"{len(problem.sequences)}, digest "
            f"{hashlib.sha256(problem.sequences.tobytes()).hexdigest()[:16]}",
            **{
                name: os.path.basename(x) if is_path(x) else "digest only"
                for name, x in self.request.targets.items()
            },
            "d_planes": "planes" in self._wrt,
            "tokens per chunk, which follow from memory_limit": self.limits.chunk_tokens,
            "sequences per chunk, which follow from memory_limit": self.limits.unit_sequences,
        }

    def _read(
        self, task: schedule.Task, slot: int, buffers: pipeline.Buffers
    ) -> dict[str, np.ndarray]:
        p = self.passes[task.stage]
        read = {}
        for index, name in enumerate(self.reads_of(task.stage)):
            source, (begin, end) = self.sources[name], task.tokens(name)
            row = () if name == "key_mask" else source.shape[-2:]
            read[name] = source.read(
                begin, end, buffers.get("read", index, slot, (end - begin, *row), source.dtype)
            )
        if self._checks:
            for name in p.reads:
                if not self.sources[name].is_made_up and (not p.backward or name == "d_out"):
                    mask = read.get("key_mask") if name in ("key", "value") else None
                    refuse_non_finite(self.sources[name], task.tokens(name)[0], read[name], mask)
        return read

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a result."""
        if name == "out":
            return (*self.sources["query"].shape[:-1], self.sources["value"].shape[-1])
        return self.sources[name.removeprefix("d_")].shape


def _stand_in(source: Source) -> np.ndarray:
    """Return an array of the shape and dtype of a source that takes no memory: checks look at
    nothing else.
    """
    return np.broadcast_to(np.zeros((), source.dtype), source.shape)


def _states_path(journal: str) -> str:
    return f"{journal.removesuffix('.journal')}.states"


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _bounds(cu_seqlens: Any) -> Any:
    """Return the bounds of sequences, from a file where that is given."""
    return np.load(cu_seqlens, allow_pickle=False) if is_path(cu_seqlens) else cu_seqlens


def _bfloat16(name: str) -> np.dtype:
    if name != "bfloat16":
        raise ValueError(f"dtype must be None or 'bfloat16', got {name!r}")
    return arrays.dtype_of(name)
