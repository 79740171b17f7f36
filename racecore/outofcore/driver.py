"""run: attention and its gradients over arrays of any length, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from racecore import backends, inputs, kernel_cache, progress
from racecore._version import __version__
from racecore.errors import InputChangedError
from racecore.gradients import hash_gradients
from racecore.memory_use import PeakMemory
from racecore.outofcore import pipeline, points, schedule
from racecore.outofcore.finite import refuse_non_finite
from racecore.outofcore.journal import Journal
from racecore.outofcore.results import Results, completed, opened
from racecore.outofcore.resume import Step
from racecore.outofcore.sinks import Sink, open_sink
from racecore.outofcore.sources import Source, open_source
from racecore.outofcore.stages import Stages
from racecore.outofcore.stamps import stamp, stamp_file
from racecore.outofcore.states import States
from racecore.outofcore.targets import check_paths, file_of, folder_of, is_path
from racecore.soft_lsh import SoftLSH

__all__ = ["Report", "run"]


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes
    ----------
    tokens : int
        Query tokens of all sequences.
    seconds : float
    tokens_per_second : float
    peak_anonymous_bytes : int
        The most anonymous memory that the process had, files in the page cache not counted; 0 where the system does not
        tell.
    digests : dict of str to str
        For every output a checksum of its values in their places, 16 hexadecimal digits: equal for equal arrays, however
        they were cut into chunks.
    d_planes, d_beta : array and float or array, or None
        Gradients of the hash, float64, shaped as ``lsh.planes`` and ``lsh.beta``; None where not asked for.
    resumed_tokens : int
        Tokens that an earlier run had done already, counted once for every pass over them.
    """

    tokens: int
    seconds: float
    peak_anonymous_bytes: int
    digests: dict[str, str] = field(default_factory=dict)
    d_planes: np.ndarray | None = None
    d_beta: Any = None
    resumed_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


def run(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lsh: SoftLSH | None = None,
    *,
    is_causal: bool = False,
    readout: str = "ratio",
    key_mask: Any = None,
    cu_seqlens: Any = None,
    d_out: Any = None,
    d_query: Any = None,
    d_key: Any = None,
    d_value: Any = None,
    d_lsh: Any = None,
    dtype: str | None = None,
    memory_limit: int | str = "1GB",
    resume: bool = True,
    journal: Any = None,
    check_finite: bool = True,
    progress: Callable[[int, int], object] | bool | None = None,
) -> Report:
    """Compute RACE attention, and its gradients, over arrays that may be larger than memory.

    Parameters
    ----------
    query, key, value : sources, shapes [T, H, D], [T, G, D], [T, G, V], or with a batch axis in front
        Each the path of an .npy file, an array or memory map, a `Synthetic`, or anything with shape and dtype that gives
        arrays for slices (zarr, h5py). Files are read in chunks, while the chunk before is computed.
    out : sink, shape of the query with V in place of D
        The path of an .npy file to write, an array (or anything that slices can be assigned to), or None: then only its
        digest is kept. A file is called ``<path>.partial`` until it is complete, and replaces what had its name.
    lsh, is_causal, readout
        As for `racecore.attention`.
    key_mask : source of bools, shape [T] or [B, T], optional
        True: the key takes part.
    cu_seqlens : int array [n + 1] or path of an .npy file, optional
        Where sequences begin and end, as for `racecore.attention`.
    d_out : source, optional
        Gradient of the output. With it the run is forward + backward.
    d_query, d_key, d_value : sinks
        For the gradients; None keeps their digests only.
    d_lsh : path of an .npz file to write, or True, optional
        Sum the gradient of the planes too, and write it with that of beta (names "planes" and "beta", float64); with True it
        is only in the report. The gradient of beta always is.
    dtype : {None, "bfloat16"}
        How to read .npy files whose entries are two untyped bytes: that is how NumPy stores ml_dtypes.bfloat16.
    memory_limit : int or str
        Bytes that the run may take, beyond what the process had when it was called; see `racecore.outofcore.schedule`.
    resume : bool
        Go on with what an earlier run to the same files left, if it was interrupted. False discards that.
    journal : path, optional
        Where to note what is done, so that the run can be resumed; without it beside the first output file, as
        ``<path>.journal``. A run that writes no files has a journal only if this names one; one that writes to arrays has
        none: they would be gone.
    check_finite : bool
        Refuse NaN and infinity in the inputs, naming array, token, head and dimension.
    progress : callable(done, total) or True, optional
        Told how many tokens are done, counted once per pass, out of how many; True shows a bar.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        What was expected, what came and what to do; before anything is computed.
    racecore.errors.NonFiniteError
        A number in an input is not finite; a ValueError.
    racecore.errors.CorruptFileError
        The journal is damaged at its beginning.
    racecore.errors.OutputInUseError
        Another run is writing the same files.
    racecore.errors.InputChangedError
        An input is not what it was when the run began.
    OSError
        A file cannot be read, there is no room for an output, or the disk failed.

    Notes
    -----
    Outputs have the bits that `racecore.attention` and `racecore.attention_backward` give. However the process ends, the
    same call goes on where it was, to the same bytes; inputs or parameters that changed meanwhile are refused. Inputs that
    are not finite or change on the way leave nothing to go on with.
    """
    reads = {"query": query, "key": key, "value": value, "d_out": d_out, "key_mask": key_mask}
    targets = {"out": out}
    if d_out is not None:
        targets |= {"d_query": d_query, "d_key": d_key, "d_value": d_value}
    elif any(x is not None for x in (d_query, d_key, d_value, d_lsh)):
        raise ValueError("gradients need d_out, the gradient of the output")
    untyped = None if dtype is None else _bfloat16(dtype)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack, PeakMemory() as memory:
        sources = {}
        for name, source in reads.items():
            if source is not None:
                sources[name] = open_source(source, name, untyped)
                stack.callback(sources[name].close)
        run_ = _Run(
            sources, lsh, is_causal, readout, _bounds(cu_seqlens), inputs.parse_bytes(memory_limit), check_finite, d_lsh
        )
        check_paths([x for x in reads.items() if x[1] is not None], {**targets, "d_lsh": d_lsh, "journal": journal})
        if is_path(d_lsh):
            folder_of(d_lsh)
        with _listening(progress, run_.n_steps):
            digests = run_.go(reads, targets, resume, journal)
    seconds = time.perf_counter() - started
    return Report(run_.n_tokens, seconds, memory.peak, digests, *run_.hash_gradients(), run_.resumed_tokens)


class _Run:
    """One checked run: what is read, how it is cut, and the arithmetic."""

    def __init__(
        self, sources: dict[str, Source], lsh: SoftLSH | None, is_causal: bool, readout: str, cu_seqlens: Any,
        memory_limit: int, check_finite: bool, d_lsh: Any,
    ) -> None:  # fmt: skip
        self._sources, self._checks, self._d_lsh = sources, check_finite, d_lsh
        stand_ins = {name: _stand_in(source) for name, source in sources.items()}
        problem, self._lsh, self._had_batch = inputs.check_attention(
            stand_ins["query"], stand_ins["key"], stand_ins["value"], lsh, is_causal=is_causal, readout=readout,
            key_mask=stand_ins.get("key_mask"), cu_seqlens=cu_seqlens, chunk_size=None, memory_limit=None,
        )  # fmt: skip
        shape = self._shape_like("query", "value")
        if "d_out" in sources and (sources["d_out"].shape, sources["d_out"].dtype) != (shape, sources["query"].dtype):
            raise ValueError(
                f"d_out must have the shape and dtype of the output, {shape} and {sources['query'].dtype}, got "
                f"{sources['d_out'].shape} and {sources['d_out'].dtype}"
            )
        self._wants_gradients = "d_out" in sources
        self._limits = schedule.limits(problem, self._wants_gradients, memory_limit)
        self._problem = replace(problem, workspace_bytes=self._limits.workspace_bytes)
        self._wrt = frozenset({"beta"} if d_lsh is None or d_lsh is False else {"planes", "beta"})
        n_numbers = problem.planes[0].size + 1 if "planes" in self._wrt else 1
        self._hash = np.zeros((2, problem.n_state_heads, n_numbers)) if self._wants_gradients else None
        self._passes = schedule.PASSES[problem.is_causal, self._wants_gradients]
        self.resumed_tokens = 0

    @property
    def n_tokens(self) -> int:
        """Query tokens."""
        return int(np.prod(self._sources["query"].shape[:-2], dtype=np.int64))

    @property
    def n_steps(self) -> int:
        """Tokens of all passes, as `progress` counts them."""
        return self.n_tokens * schedule.n_passes(self._problem.is_causal, self._wants_gradients)

    def hash_gradients(self) -> tuple[np.ndarray | None, Any]:
        """Return the gradients of planes and beta."""
        return hash_gradients(self._hash, self._problem, self._lsh, self._wrt)

    def go(self, reads: dict[str, Any], targets: dict[str, Any], resume: bool, journal: Any) -> dict[str, str]:
        """Compute everything, or what is left to do; return the digests."""
        files_read = {name: path for name, x in reads.items() if (path := file_of(x)) is not None}
        before = {name: stamp_file(path) for name, path in files_read.items()}
        stages = Stages(self._problem, backends.choose(None), self._hash)
        with contextlib.ExitStack() as stack:
            found = None
            if (path := _journal_path(targets, journal)) is not None:
                found = Journal(path, afresh=not resume)
                stack.callback(found.close)
                digests = self._taken_up(found, reads, targets)
                if digests is not None:
                    return digests
            results = stack.enter_context(opened(self._results(reads, targets, stages, found)))
            self._compute(stages, results)
            for name, path in files_read.items():
                if (now := stamp_file(path)) != before[name]:
                    raise InputChangedError(f"{path} ({name}) changed during the run: {before[name]}, then {now}")
            self._write_hash_gradients()
            digests = {name: f"{sink.checksum:016x}" for name, sink in results.sinks.items()}
            results.finish({"digests": digests, "hash": None if self._hash is None else self._hash.tobytes().hex()})
        return digests

    def _taken_up(self, journal: Journal, reads: dict[str, Any], targets: dict[str, Any]) -> dict[str, str] | None:
        """Compare a journal with this run, or begin it; return the digests if it says that all is done."""
        identity = self._identity(reads, targets)
        paths = [os.path.realpath(target) for target in targets.values() if is_path(target)]
        if journal.identity is not None:
            difference = journal.difference(identity)
            is_over = journal.completion is not None and not any(os.path.exists(f"{path}.partial") for path in paths)
            if difference is not None and not is_over:
                raise ValueError(difference)
            if difference is None and (completion := completed(journal, paths)) is not None:
                if self._hash is not None:
                    self._hash[...] = np.frombuffer(bytes.fromhex(completion["hash"])).reshape(self._hash.shape)
                self.resumed_tokens = self.n_steps
                _remove(_states_path(journal.path))
                journal.remove()
                return dict(completion["digests"])
            if difference is None and journal.completion is None:
                return None
        journal.begin(identity)
        return None

    def _results(
        self, reads: dict[str, Any], targets: dict[str, Any], stages: Stages, journal: Journal | None
    ) -> Results:
        """Open sinks and the file of states."""
        resumes = journal is not None and bool(journal.entries)
        taken = [(name, array) for name, array in reads.items() if array is not None]
        like = {"out": ("query", "value"), "d_query": ("query",), "d_key": ("key",), "d_value": ("value",)}
        dtype = self._sources["query"].dtype
        sinks: dict[str, Sink] = {}
        results = Results(sinks, stages, self._problem, None, journal)
        try:
            for name, target in targets.items():
                sinks[name] = open_sink(target, name, self._shape_like(*like[name]), dtype, taken, resumes)
                taken.append((name, target))
            points.reached("outputs reserved")
            if journal is not None:
                results.states = States(stages.numbers, _states_path(journal.path))
            elif self._problem.is_causal and self._wants_gradients:
                folder = next((folder_of(target) for target in targets.values() if is_path(target)), None)
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
        buffers = pipeline.Buffers()
        last = 0

        def skipped(task: schedule.Task) -> None:
            nonlocal last
            last = task.number
            begin, end = task.tokens(self._passes[task.stage].reads[0])
            n_tokens = (end - begin) * (2 if self._passes[task.stage].is_walk_back else 1)
            self.resumed_tokens += n_tokens
            progress.advance(n_tokens)

        def read(step: Step, slot: int) -> dict[str, np.ndarray]:
            return self._read(step.task, slot, buffers)

        def compute(step: Step, slot: int, read: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int | None]:
            nonlocal last
            task, written = step.task, {}
            last = max(last, task.number)
            for index, name in enumerate(self._passes[task.stage].writes):
                begin, end = task.tokens(name)
                sink = results.sinks[name]
                place, shape = sink.place(begin, end), (end - begin, *sink.shape[-2:])
                written[name] = buffers.get("write", index, slot, shape, sink.dtype) if place is None else place
            if step.origin is not None and results.states is not None:
                stages.restore(task, step.origin, results.states)
            stages.compute(task, read, written, results.states)
            return written, results.keep_state(task)

        def write(step: Step, computed: tuple[dict[str, np.ndarray], int | None]) -> None:
            results.write(step.task, *computed)

        tasks = schedule.tasks(self._problem, self._wants_gradients, self._limits)
        pipeline.run(results.steps(tasks, skipped), read, compute, write)
        if self.resumed_tokens and results.states is not None:  # the last task to be done need not be the last of all
            stages.restore_hash({"hash": last}, results.states)

    def _write_hash_gradients(self) -> None:
        if not is_path(self._d_lsh):
            return
        d_planes, d_beta = self.hash_gradients()
        path = os.path.realpath(os.fspath(self._d_lsh))
        with open(f"{path}.partial", "wb") as file:
            np.savez(file, planes=np.asarray(d_planes), beta=np.asarray(d_beta))
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.partial", path)

    def _identity(self, reads: dict[str, Any], targets: dict[str, Any]) -> dict[str, Any]:
        """Return what must be the same for a run to be resumed, by the names that a message can give."""
        problem, planes = self._problem, self._lsh.planes
        hash_ = (
            f"{self._lsh.n_tables} tables of {self._lsh.n_planes} planes, beta {np.asarray(self._lsh.beta).tolist()}"
        )
        return {
            "racecore": __version__,
            "kernels and processor": kernel_cache.identity(),
            **{name: stamp(reads[name], source) for name, source in self._sources.items()},
            "hash": f"{hash_}, fingerprint {self._lsh.fingerprint[:16]} of {planes.shape}",
            "is_causal": problem.is_causal,
            "readout": problem.readout,
            "sequences": f"{len(problem.sequences)}, digest {hashlib.sha256(problem.sequences.tobytes()).hexdigest()[:16]}",
            **{name: os.path.basename(x) if is_path(x) else "digest only" for name, x in targets.items()},
            "d_planes": "planes" in self._wrt,
            "tokens per chunk, which follow from memory_limit": self._limits.chunk_tokens,
            "sequences per chunk, which follow from memory_limit": self._limits.unit_sequences,
        }

    def _read(self, task: schedule.Task, slot: int, buffers: pipeline.Buffers) -> dict[str, np.ndarray]:
        p = self._passes[task.stage]
        names = [*p.reads, *(["key_mask"] if "key" in p.reads and "key_mask" in self._sources else [])]
        read = {}
        for index, name in enumerate(names):
            source, (begin, end) = self._sources[name], task.tokens(name)
            row = () if name == "key_mask" else source.shape[-2:]
            read[name] = source.read(begin, end, buffers.get("read", index, slot, (end - begin, *row), source.dtype))
        if self._checks:
            for name in p.reads:
                if not p.backward or name == "d_out":
                    mask = read.get("key_mask") if name in ("key", "value") else None
                    refuse_non_finite(self._sources[name], task.tokens(name)[0], read[name], mask)
        return read

    def _shape_like(self, first: str, last: str | None = None) -> tuple[int, ...]:
        """Return the shape of one source, with the last axis of another."""
        shape = self._sources[first].shape
        return shape if last is None else (*shape[:-1], self._sources[last].shape[-1])


def _stand_in(source: Source) -> np.ndarray:
    """Return an array of the shape and dtype of a source that takes no memory: checks look at nothing else."""
    return np.broadcast_to(np.zeros((), source.dtype), source.shape)


def _journal_path(targets: dict[str, Any], journal: Any) -> str | None:
    """Return where to keep the journal; None where a run could not be resumed, or nobody asked for it."""
    if any(target is not None and not is_path(target) for target in targets.values()):
        if journal is not None:
            raise ValueError("a run that writes to arrays cannot be resumed: leave out journal, or write to files")
        return None
    if journal is not None:
        folder_of(journal)
        return os.path.realpath(os.fspath(journal))
    first = next((os.path.realpath(os.fspath(x)) for x in targets.values() if x is not None), None)
    if first is None:
        return None
    folder_of(first)
    return f"{first}.journal"


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
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("dtype='bfloat16' needs the package ml_dtypes: pip install 'racecore[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def _listening(listener: Callable[[int, int], object] | bool | None, total: int) -> Iterator[None]:
    """Tell a caller's function about progress, or show a bar."""
    if listener is True:
        from racecore.commands.bar import token_bar

        with token_bar("racecore", total):
            yield
        return
    if not callable(listener):
        yield
        return
    done = 0

    def advance(n_tokens: int) -> None:
        nonlocal done
        done = min(done + n_tokens, total)
        listener(done, total)

    with progress.reporting(advance):
        yield
