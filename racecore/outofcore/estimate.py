"""plan: what a run will read, write, hold and take, by the formulas of the documentation and a
second of measuring.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from racecore.chunking import SEGMENT
from racecore.outofcore.driver import run
from racecore.outofcore.execution import Run, prepared
from racecore.outofcore.positioned import write_at
from racecore.outofcore.request import Request
from racecore.outofcore.synthetic import Synthetic, SyntheticHead
from racecore.outofcore.targets import file_of, folder_of, is_path
from racecore.soft_lsh import SoftLSH

__all__ = ["PassPlan", "Plan", "Speeds", "plan"]

_SECONDS = 0.3  # for each thing that is measured
_PIECE = 1 << 22


@dataclass
class PassPlan:
    """One pass over the arrays: how many chunks and tokens, and what it moves, in bytes."""

    name: str
    chunks: int = 0
    tokens: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Speeds:
    """What was measured: seconds of arithmetic per token of the whole run, bytes per second of the
    disk.

    A speed is None where no file is read or written.
    """

    seconds_per_token: float
    reading: float | None
    writing: float | None


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes
    ----------
    tokens : int
        Query tokens.
    passes : list of PassPlan
    chunk_tokens : int
        Tokens of a chunk, at most: how much is read at once, and how far apart states are kept.
    memory_bytes, memory_limit : int
        What the run takes at most, beyond what the process has, and what it may take.
    read_bytes, written_bytes : int
        Of files (and other arrays that are neither in memory nor made up), over all passes.
    output_bytes : int
        Room that is reserved for output files before work starts.
    state_bytes : int
        Size of the file of states, of which not all places are filled.
    speeds : Speeds or None
    """

    tokens: int
    passes: list[PassPlan]
    chunk_tokens: int
    memory_bytes: int
    memory_limit: int
    read_bytes: int
    written_bytes: int
    output_bytes: int
    state_bytes: int
    speeds: Speeds | None = None

    @property
    def arithmetic_seconds(self) -> float | None:
        """Time of the arithmetic, None if nothing was measured."""
        return None if self.speeds is None else self.tokens * self.speeds.seconds_per_token

    @property
    def disk_seconds(self) -> float | None:
        """Time of reading and writing files, None if nothing was measured."""
        if self.speeds is None:
            return None
        pairs = ((self.read_bytes, self.speeds.reading), (self.written_bytes, self.speeds.writing))
        return sum(n_bytes / speed for n_bytes, speed in pairs if speed is not None)

    @property
    def seconds(self) -> float | None:
        """Time to expect: the larger of the two, since they overlap."""
        if self.arithmetic_seconds is None or self.disk_seconds is None:
            return None
        return max(self.arithmetic_seconds, self.disk_seconds)

    def __str__(self) -> str:
        lines = [f"{self.tokens:,} tokens in chunks of {self.chunk_tokens:,}", ""]
        lines.append(
            f"{'pass':<10} {'chunks':>9} {'tokens':>15} {'MB read':>12} {'MB written':>12}"
        )
        for p in self.passes:
            lines.append(
                f"{p.name:<10} {p.chunks:>9,} {p.tokens:>15,} {p.read / 1e6:>12,.1f} "
                f"{p.written / 1e6:>12,.1f}"
            )
        lines += [
            "",
            f"memory   at most {self.memory_bytes / 1e6:,.1f} MB, of "
            f"{self.memory_limit / 1e6:,.1f} MB allowed",
        ]
        lines.append(
            f"disk     {self.output_bytes / 1e6:,.1f} MB for outputs, "
            f"{self.state_bytes / 1e6:,.1f} MB for states; "
            f"{self.read_bytes / 1e6:,.1f} MB to read, {self.written_bytes / 1e6:,.1f} MB to write"
        )
        if self.speeds is not None:
            lines.append(
                f"time     about {self.seconds:,.1f} s: arithmetic {self.arithmetic_seconds:,.1f} "
                "s, "
                f"disk {self.disk_seconds:,.1f} s at the same time"
                f"{_speed('reading', self.speeds.reading)}{_speed('writing', self.speeds.writing)}"
            )
        return "\n".join(lines)


def plan(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lsh: SoftLSH | None = None,
    *,
    calibrate: bool = True,
    **options: Any,
) -> Plan:
    """Tell what `run` would do with these arguments, without doing it.

    Parameters
    ----------
    query, key, value, out, lsh
        As for `run`.
    calibrate : bool
        Measure arithmetic and disk for a second, to tell the time too. It takes the memory of two
        chunks and, where files are written, for a moment a file beside them.
    **options
        Those of `run` that say what to compute: is_causal, readout, key_mask, cu_seqlens, d_out,
        d_query, d_key, d_value, d_lsh, dtype, memory_limit.

    Returns
    -------
    Plan
        Its str is a table.

    Raises
    ------
    ValueError, TypeError, OSError
        As `run`, before it computes.

    Examples
    --------
    >>> x = Synthetic((100_000, 2, 32))
    >>> plan(x, x, x, None, memory_limit="20MB", calibrate=False).chunk_tokens
    5120
    """
    with prepared(Request(query, key, value, out, lsh, **options)) as prepared_run:
        speeds = _measured(prepared_run) if calibrate else None
        return _counted(prepared_run, speeds)


def _counted(run_: Run, speeds: Speeds | None) -> Plan:
    """Go over all tasks of a run."""
    stages = run_.stages()
    passes = {name: PassPlan(name) for name in run_.passes}
    on_disk = {name for name, x in run_.request.reads.items() if _is_elsewhere(x)}
    on_disk |= {name for name, x in run_.request.targets.items() if _is_elsewhere(x)}
    read = written = n_places = 0
    for task in run_.tasks():
        p = passes[task.stage]
        begin, end = task.tokens(run_.passes[task.stage].reads[0])
        p.chunks, p.tokens = p.chunks + 1, p.tokens + end - begin
        for name in run_.reads_of(task.stage):
            n_bytes = _bytes(run_, task, name)
            p.read, read = p.read + n_bytes, read + n_bytes * (name in on_disk)
        for name in run_.passes[task.stage].writes:
            n_bytes = _bytes(run_, task, name)
            p.written, written = p.written + n_bytes, written + n_bytes * (name in on_disk)
        n_places = task.number + 1
    has_states = run_.journal_path() is not None or (
        run_.problem.is_causal and run_.wants_gradients
    )
    outputs = [name for name, x in run_.request.targets.items() if is_path(x)]
    return Plan(
        tokens=run_.n_tokens,
        passes=list(passes.values()),
        chunk_tokens=run_.limits.chunk_tokens,
        memory_bytes=run_.limits.peak_bytes,
        memory_limit=run_.memory_limit,
        read_bytes=read,
        written_bytes=written,
        output_bytes=sum(
            int(np.prod(run_.shape(name), dtype=object)) * run_.dtype.itemsize for name in outputs
        ),
        state_bytes=n_places * stages.numbers * 8 if has_states else 0,
        speeds=speeds,
    )


def _bytes(run_: Run, task: Any, name: str) -> int:
    """Return the bytes of an array that a task reads or writes."""
    begin, end = task.tokens(name)
    if name == "key_mask":
        return int(end - begin)
    shape = run_.sources[name].shape if name in run_.sources else run_.shape(name)
    return int((end - begin) * shape[-2] * shape[-1] * run_.dtype.itemsize)


def _is_elsewhere(x: Any) -> bool:
    """Tell whether an array is neither in memory nor made up."""
    in_memory = (
        x is None
        or isinstance(x, (Synthetic, SyntheticHead))
        or (isinstance(x, np.ndarray) and file_of(x) is None)
    )
    return not in_memory


def _measured(run_: Run) -> Speeds:
    inputs_ = [path for x in run_.request.reads.values() if (path := file_of(x)) is not None]
    folder = next((folder_of(x) for x in run_.request.targets.values() if is_path(x)), None)
    reading = _reading_speed(inputs_) if inputs_ else None
    return Speeds(
        _seconds_per_token(run_), reading, None if folder is None else _writing_speed(folder)
    )


def _seconds_per_token(run_: Run) -> float:
    """Run all passes over made-up arrays of the same heads in memory, until there is something to
    measure.
    """
    n = min(2 * run_.limits.chunk_tokens, max(SEGMENT, run_.n_tokens))
    arrays = {
        name: Synthetic((n, *run_.sources[name].shape[-2:]), run_.dtype, seed=index)[:]
        for index, name in enumerate(("query", "key", "value", "d_out"))
        if name in run_.sources
    }
    request = run_.request
    wants_planes = bool(request.d_lsh) or None

    def work() -> int:
        """Compute; return the tokens."""
        run(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            None,
            request.lsh,
            is_causal=request.is_causal,
            readout=request.readout,
            d_out=arrays.get("d_out"),
            d_lsh=wants_planes,
        )
        return n

    work()  # compiles
    return 1 / _speed_of(work)


def _reading_speed(paths: list[str]) -> float:
    """Return bytes per second of reading pieces all over some files."""
    buffer, total = np.empty(_PIECE, np.uint8), 0
    rng = np.random.default_rng(0)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [os.fstat(file).st_size for file in files]

    def work() -> int:
        """Read a piece of some file; return its bytes."""
        which = int(rng.integers(len(files)))
        place = int(rng.integers(max(1, sizes[which] - _PIECE)))
        return os.preadv(files[which], [buffer.data], place)

    try:
        total = sum(sizes)
        return _speed_of(work) if total else 1.0
    finally:
        for file in files:
            os.close(file)


def _writing_speed(folder: str) -> float:
    """Return bytes per second of writing to a file that is gone afterwards."""
    piece, place = np.zeros(_PIECE, np.uint8), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def work() -> int:
            """Write a piece to the disk; return its bytes."""
            nonlocal place
            write_at(file.fileno(), place, piece)
            os.fdatasync(file.fileno())
            place += _PIECE
            return _PIECE

        return _speed_of(work)


def _speed_of(work: Callable[[], int]) -> float:
    """Return how many units of work are done in a second."""
    started, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _SECONDS:
        done += work()
    return done / seconds


def _speed(what: str, speed: float | None) -> str:
    return "" if speed is None else f" ({what} {speed / 1e6:,.0f} MB/s)"
