"""run: attention and its gradients over arrays of any length, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from racecore import backends, inputs, progress
from racecore.gradients import hash_gradients
from racecore.outofcore import pipeline, schedule
from racecore.outofcore.finite import refuse_non_finite
from racecore.outofcore.sinks import Sink, open_sink
from racecore.outofcore.sources import Source, open_source
from racecore.outofcore.stages import Stages
from racecore.soft_lsh import SoftLSH

__all__ = ["Report", "run"]

_SAMPLE_SECONDS = 0.02


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
    """

    tokens: int
    seconds: float
    peak_anonymous_bytes: int
    digests: dict[str, str] = field(default_factory=dict)
    d_planes: np.ndarray | None = None
    d_beta: Any = None

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
    wants_d_planes: bool = False,
    dtype: str | None = None,
    memory_limit: int | str = "1GB",
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
        digest is kept. A file is called ``<path>.partial`` until it is complete.
    lsh, is_causal, readout
        As for `racecore.attention`.
    key_mask : source of bools, shape [T] or [B, T], optional
        True: the key takes part.
    cu_seqlens : int array [n + 1], optional
        Where sequences begin and end, as for `racecore.attention`.
    d_out : source, optional
        Gradient of the output. With it the run is forward + backward.
    d_query, d_key, d_value : sinks
        For the gradients; None keeps their digests only.
    wants_d_planes : bool
        Sum the gradient of the planes too; that of beta always comes along.
    dtype : {None, "bfloat16"}
        How to read .npy files whose entries are two untyped bytes: that is how NumPy stores ml_dtypes.bfloat16.
    memory_limit : int or str
        Bytes that the run may take, beyond what the process had when it was called; see `racecore.outofcore.schedule`.
    check_finite : bool
        Refuse NaN and infinity in the inputs, naming array, token, head and dimension.
    progress : callable(done, total) or True, optional
        Told how many tokens are done, counted once per pass; True shows a bar.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        What was expected, what came and what to do; before anything is computed, or when a number is not finite.
    OSError
        A file cannot be read, there is no room for an output, or the disk failed.

    Notes
    -----
    Outputs have the bits that `racecore.attention` and `racecore.attention_backward` give.
    """
    reads = {"query": query, "key": key, "value": value, "d_out": d_out, "key_mask": key_mask}
    gradients = {"d_query": d_query, "d_key": d_key, "d_value": d_value}
    if d_out is None and any(sink is not None for sink in gradients.values()):
        raise ValueError("gradients need d_out, the gradient of the output")
    untyped = None if dtype is None else _bfloat16(dtype)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack, _PeakMemory() as memory:
        sources = {}
        for name, source in reads.items():
            if source is not None:
                sources[name] = open_source(source, name, untyped)
                stack.callback(sources[name].close)
        run_ = _Run(
            sources, lsh, is_causal, readout, cu_seqlens, inputs.parse_bytes(memory_limit), check_finite, wants_d_planes
        )
        sinks = stack.enter_context(run_.opened({"out": out} | (gradients if d_out is not None else {}), reads))
        with _listening(progress, run_.n_steps):
            run_.go(sinks)
    seconds = time.perf_counter() - started
    digests = {name: f"{sink.checksum:016x}" for name, sink in sinks.items()}
    return Report(run_.n_tokens, seconds, memory.peak, digests, *run_.hash_gradients())


class _Run:
    """One checked run: what is read, how it is cut, and the arithmetic."""

    def __init__(
        self, sources: dict[str, Source], lsh: SoftLSH | None, is_causal: bool, readout: str, cu_seqlens: Any,
        memory_limit: int, check_finite: bool, wants_d_planes: bool,
    ) -> None:  # fmt: skip
        self._sources, self._checks = sources, check_finite
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
        self._wrt = frozenset({"planes", "beta"} if wants_d_planes else {"beta"})
        n_numbers = problem.planes[0].size + 1 if wants_d_planes else 1
        self._hash = np.zeros((2, problem.n_state_heads, n_numbers)) if self._wants_gradients else None
        self._passes = schedule.PASSES[problem.is_causal, self._wants_gradients]
        self._folder: str | None = None

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

    @contextlib.contextmanager
    def opened(self, targets: dict[str, Any], reads: dict[str, Any]) -> Iterator[dict[str, Sink]]:
        """Open all sinks; give files their names at the end if all went well, else leave none of them behind."""
        self._folder = next((_folder_of(x) for x in targets.values() if isinstance(x, (str, os.PathLike))), None)
        like = {"out": ("query", "value"), "d_query": ("query",), "d_key": ("key",), "d_value": ("value",)}
        taken = [(name, array) for name, array in reads.items() if array is not None]
        _check_paths(taken, targets)
        sinks: dict[str, Sink] = {}
        try:
            for name, target in targets.items():
                sinks[name] = open_sink(
                    target, name, self._shape_like(*like[name]), self._sources["query"].dtype, taken
                )
                taken.append((name, target))
            yield sinks
            for sink in sinks.values():
                sink.finish()
        except BaseException:
            for sink in sinks.values():
                sink.abandon()
            raise

    def go(self, sinks: dict[str, Sink]) -> None:
        """Compute everything."""
        stages = Stages(self._problem, backends.choose(None), self._hash, self._folder)
        buffers = pipeline.Buffers()

        def read(task: schedule.Task, slot: int) -> dict[str, np.ndarray]:
            return self._read(task, slot, buffers)

        def compute(task: schedule.Task, slot: int, read: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            written = {}
            for index, name in enumerate(self._passes[task.stage].writes):
                begin, end = task.tokens(name)
                sink = sinks[name]
                place, shape = sink.place(begin, end), (end - begin, *sink.shape[-2:])
                written[name] = buffers.get("write", index, slot, shape, sink.dtype) if place is None else place
            stages.compute(task, read, written)
            return written

        def write(task: schedule.Task, written: dict[str, np.ndarray]) -> None:
            for name, rows in written.items():
                sinks[name].write(*task.tokens(name), rows)

        try:
            pipeline.run(schedule.tasks(self._problem, self._wants_gradients, self._limits), read, compute, write)
        finally:
            stages.close()

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


def _folder_of(path: str | os.PathLike[str]) -> str | None:
    folder = os.path.dirname(os.path.realpath(os.fspath(path)))
    return folder if os.path.isdir(folder) else None


def _check_paths(sources: list[tuple[str, Any]], targets: dict[str, Any]) -> None:
    """Refuse a file that is to be written and is also something else here, under whatever name."""
    seen = {_identity(x): name for name, x in sources if _file_of(x) is not None}
    for name, target in targets.items():
        if _file_of(target) is not None and (other := seen.setdefault(_identity(target), name)) != name:
            raise ValueError(f"{name} is the same file as {other} ({_file_of(target)}); give it a file of its own")


def _file_of(x: Any) -> str | None:
    """Return the path of a file, or of the file that an array maps."""
    if isinstance(x, (str, os.PathLike)):
        return os.fspath(x)
    filename = getattr(x, "filename", None) if isinstance(x, np.memmap) else None
    return None if filename is None else os.fspath(filename)


def _identity(x: Any) -> tuple[object, ...]:
    """Return what two names of one file have in common: device and inode, or the resolved name of a file to be."""
    path = _file_of(x) or ""
    try:
        status = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return status.st_dev, status.st_ino


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


class _PeakMemory:
    """Watch the anonymous memory of this process while a block runs."""

    def __enter__(self) -> _PeakMemory:
        self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="racecore-memory", daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, _anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()


def _anonymous_bytes() -> int:
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), 0)
    except OSError:
        return 0
