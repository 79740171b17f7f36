"""plan: bytes, memory and time of a run, from formulas and a short measurement."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from racecore.chunking import SEGMENT
from racecore.outofcore.checked import CheckedRun, checked_run
from racecore.outofcore.driver import run
from racecore.outofcore.positioned import write_at
from racecore.outofcore.request import Request
from racecore.outofcore.schedule import ChunkTask
from racecore.outofcore.synthetic import Synthetic, SyntheticHead
from racecore.outofcore.targets import file_of, folder_of, is_path
from racecore.soft_lsh import SoftLSH

__all__ = ["PassPlan", "Plan", "Speeds", "plan"]

# Duration of each measurement.
_SECONDS = 0.3
# Bytes of one read or write when the disk is measured.
_IO_BYTES = 1 << 22


@dataclass
class PassPlan:
    """Chunks and tokens of one pass, and the bytes it reads and writes."""

    name: str
    chunks: int = 0
    tokens: int = 0
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Speeds:
    """Measured speeds: seconds of arithmetic per token of the whole run, bytes per second of the
    disk; None where no file is read or written.
    """

    seconds_per_token: float
    reading: float | None
    writing: float | None


@dataclass(frozen=True)
class Plan:
    """Expected bytes, memory and time of a run.

    Attributes
    ----------
    tokens : int
        Query tokens.
    passes : list of PassPlan
    chunk_tokens : int
        Tokens of a chunk, at most: read at once, with one saved state after each.
    memory_bytes, memory_limit : int
        Memory that the run allocates at most, beyond that of the process before, and its limit.
    read_bytes, written_bytes : int
        Of files (and other arrays that are neither in memory nor synthetic), over all passes.
    output_bytes : int
        Disk space reserved for output files before work starts.
    state_bytes : int
        Size of the file of states, at most; not all of its records are written.
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
        """Expected time: the larger of the two, since they overlap."""
        if self.arithmetic_seconds is None or self.disk_seconds is None:
            return None
        return max(self.arithmetic_seconds, self.disk_seconds)

    def __str__(self) -> str:
        """Return a table of the passes, and memory, disk and time below it."""
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
                f"time     about {self.seconds:,.1f} s: "
                f"arithmetic {self.arithmetic_seconds:,.1f} s, "
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
    """Estimate bytes, memory and time of `run` with these arguments, without running.

    Parameters
    ----------
    query, key, value, out, lsh
        As for `run`.
    calibrate : bool
        Measure arithmetic and disk for about a second, to estimate the time too. That takes the
        memory of two chunks and, where files are written, a temporary file beside them.
    **options
        As for `run`: is_causal, readout, key_mask, cu_seqlens, d_out,
        d_query, d_key, d_value, d_lsh, dtype, memory_limit.

    Returns
    -------
    Plan
        As a str it is a table.

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
    with checked_run(Request(query, key, value, out, lsh, **options)) as checked:
        speeds = _measured(checked) if calibrate else None
        return _counted(checked, speeds)


def _counted(checked: CheckedRun, speeds: Speeds | None) -> Plan:
    """Return the plan of a run: the sum over all its tasks."""
    request = checked.request
    passes = {name: PassPlan(name) for name in checked.passes}
    on_disk = {name for name, x in request.inputs.items() if _needs_io(x)}
    on_disk |= {name for name, x in request.outputs.items() if _needs_io(x)}
    read = written = n_records = 0
    for task in checked.tasks():
        p, arrays = passes[task.pass_name], checked.passes[task.pass_name]
        begin, end = task.tokens(arrays.reads[0])
        p.chunks += 1
        p.tokens += end - begin
        for name in checked.inputs_of(task.pass_name):
            n_bytes = _bytes(checked, task, name)
            p.read += n_bytes
            read += n_bytes * (name in on_disk)
        for name in arrays.writes:
            n_bytes = _bytes(checked, task, name)
            p.written += n_bytes
            written += n_bytes * (name in on_disk)
        n_records = task.number + 1
    # A run with a journal saves states to resume from, a causal backward pass to start from.
    has_states = checked.journal_path() is not None or (
        checked.problem.is_causal and checked.wants_gradients
    )
    record_bytes = 8 * checked.pass_runner().record_size if has_states else 0
    # Files only: arrays of the caller have their memory already.
    outputs = [checked.shape(name) for name, x in request.outputs.items() if is_path(x)]
    return Plan(
        tokens=checked.n_tokens,
        passes=list(passes.values()),
        chunk_tokens=checked.budget.chunk_tokens,
        memory_bytes=checked.budget.peak_bytes,
        memory_limit=checked.memory_limit,
        read_bytes=read,
        written_bytes=written,
        output_bytes=sum(math.prod(shape) for shape in outputs) * checked.dtype.itemsize,
        state_bytes=n_records * record_bytes,
        speeds=speeds,
    )


def _bytes(checked: CheckedRun, task: ChunkTask, name: str) -> int:
    """Return the bytes of an array that a task reads or writes."""
    begin, end = task.tokens(name)
    if name == "key_mask":
        return int(end - begin)
    shape = checked.sources[name].shape if name in checked.sources else checked.shape(name)
    return int((end - begin) * shape[-2] * shape[-1] * checked.dtype.itemsize)


def _needs_io(x: Any) -> bool:
    """Return whether an array is neither in memory nor synthetic."""
    in_memory = (
        x is None
        or isinstance(x, (Synthetic, SyntheticHead))
        or (isinstance(x, np.ndarray) and file_of(x) is None)
    )
    return not in_memory


def _measured(checked: CheckedRun) -> Speeds:
    """Measure the speeds of arithmetic and disk."""
    request = checked.request
    paths = [path for x in request.inputs.values() if (path := file_of(x)) is not None]
    folder = next((folder_of(x) for x in request.outputs.values() if is_path(x)), None)
    return Speeds(
        _seconds_per_token(checked),
        _reading_speed(paths) if paths else None,
        None if folder is None else _writing_speed(folder),
    )


def _seconds_per_token(checked: CheckedRun) -> float:
    """Measure all passes over synthetic arrays of the same heads and dims in memory."""
    # Two chunks, or less where the run is shorter; at least one segment.
    n = min(2 * checked.budget.chunk_tokens, max(SEGMENT, checked.n_tokens))
    arrays = {
        name: Synthetic((n, *checked.sources[name].shape[-2:]), checked.dtype, seed=index)[:]
        for index, name in enumerate(("query", "key", "value", "d_out"))
        if name in checked.sources
    }
    request = checked.request
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

    # The first call compiles.
    work()
    return 1 / _speed_of(work)


def _reading_speed(paths: list[str]) -> float:
    """Measure reading at random offsets of some files, in bytes per second."""
    buffer = np.empty(_IO_BYTES, np.uint8)
    # At random offsets: what was read last may be in the page cache.
    rng = np.random.default_rng(0)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [os.fstat(file).st_size for file in files]

    def work() -> int:
        """Read once; return the bytes."""
        index = int(rng.integers(len(files)))
        offset = int(rng.integers(max(1, sizes[index] - _IO_BYTES)))
        return os.preadv(files[index], [buffer.data], offset)

    # Empty files take no time at any speed.
    try:
        return _speed_of(work) if sum(sizes) else 1.0
    finally:
        for file in files:
            os.close(file)


def _writing_speed(folder: str) -> float:
    """Measure writing to a temporary file, in bytes per second."""
    block, offset = np.zeros(_IO_BYTES, np.uint8), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def work() -> int:
            """Write once, to the disk and not only to the page cache; return the bytes."""
            nonlocal offset
            write_at(file.fileno(), offset, block)
            os.fdatasync(file.fileno())
            offset += _IO_BYTES
            return _IO_BYTES

        return _speed_of(work)


def _speed_of(work: Callable[[], int]) -> float:
    """Return how much work is done in a second, in the unit that `work` returns."""
    started, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < _SECONDS:
        done += work()
    return done / seconds


def _speed(label: str, speed: float | None) -> str:
    return "" if speed is None else f" ({label} {speed / 1e6:,.0f} MB/s)"
