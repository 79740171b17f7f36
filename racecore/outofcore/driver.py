"""run: attention and its gradients over arrays of any length, in bounded memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from racecore.outofcore.checked import CheckedRun, checked_run
from racecore.outofcore.execution import Execution
from racecore.outofcore.request import Report, Request
from racecore.runtime import progress
from racecore.runtime.memory_use import PeakMemory
from racecore.soft_lsh import SoftLSH

__all__ = ["run"]


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
    backend: str | None = None,
    resume: bool = True,
    journal: Any = None,
    check_finite: bool = True,
    progress: Callable[[int, int], object] | bool | str | None = None,
) -> Report:
    """Compute RACE attention, and its gradients, over arrays that may be larger than memory.

    Parameters
    ----------
    query, key, value : sources, shapes [T, H, D], [T, G, D], [T, G, V]; or batched
        Each the path of an .npy file, an array or memory map, a `Synthetic`, or an object with
        shape and dtype that returns arrays for slices (zarr, h5py); with a batch axis in front or
        without one. Files are read in chunks, while
        the chunk before is computed.
    out : sink, shape of the query with V in place of D
        The path of an .npy file to write, an array (or an object that accepts assignment to
        slices), or None to keep only its digest. A file is called ``<path>.partial`` until it is
        complete; then it replaces an existing file of its name.
    lsh, is_causal, readout
        As for `racecore.attention`.
    key_mask : source of bools, shape [T] or [B, T], optional
        True where the key takes part.
    cu_seqlens : int array [n + 1] or path of an .npy file, optional
        Bounds of packed sequences, as for `racecore.attention`.
    d_out : source, optional
        Gradient of the output. If it is given, the run is forward + backward.
    d_query, d_key, d_value : sinks
        Destinations of the gradients; None keeps their digests only.
    d_lsh : path of an .npz file to write, or True, optional
        Compute the gradient of the planes too, and write it with that of beta (names "planes" and
        "beta", float64); with True it is in the report only. The gradient of beta is always there.
    dtype : {None, "bfloat16"}
        How to read .npy files whose entries are two untyped bytes, as NumPy stores
        ml_dtypes.bfloat16.
    memory_limit : int or str
        Bytes that the run may allocate, beyond the memory of the process before; see
        `racecore.outofcore.schedule`. With ``backend="cuda"`` the limit applies to host memory and
        to GPU memory separately.
    backend : {"cpu", "cuda", "reference"}, optional
        "cuda" copies chunks to a GPU and results back, while other chunks are computed. None means
        the fastest backend in host memory.
    resume : bool
        Continue an interrupted run to the same files, if there is one. False discards its results.
    journal : path, optional
        File that records completed chunks, so that the run can be resumed; by default
        ``<path>.journal`` beside the first output file. A run without output files has a journal
        only if this names one; a run that writes to arrays has none, since they do not outlive it.
    check_finite : bool
        Refuse NaN and infinity in the inputs, naming array, token, head and dimension.
    progress : callable(done, total), True, or str, optional
        Called with the number of tokens done, counted once per pass, and the total. True shows a
        progress bar on a terminal, and plain lines elsewhere; a str does so with that label.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        An argument is wrong; raised before anything is computed. The message gives what was
        expected, what was given, and the remedy.
    racecore.errors.NonFiniteError
        An input has a number that is not finite; a ValueError.
    racecore.errors.CorruptFileError
        The first line of the journal is damaged.
    racecore.errors.OutputInUseError
        Another run is writing the same files.
    racecore.errors.InputChangedError
        An input changed during the run.
    racecore.errors.BackendUnavailableError
        The backend cannot run here; the message lists every backend with its reason.
    OSError
        A file cannot be read, the disk has no space for an output, or it failed.

    Notes
    -----
    Outputs have the bits of `racecore.attention` and `racecore.attention_backward`. If the process
    ends early for any reason, the same call resumes the run and gives the same bytes; it refuses
    inputs or parameters that have changed meanwhile. A run that fails because an input is not
    finite or changes during the run cannot be resumed: its files are removed.
    """
    # One object from here on, which is unchecked yet.
    request = Request(
        query,
        key,
        value,
        out,
        lsh,
        is_causal,
        readout,
        key_mask,
        cu_seqlens,
        d_out,
        d_query,
        d_key,
        d_value,
        d_lsh,
        dtype,
        memory_limit,
        backend,
    )
    return _run(request, resume, journal, check_finite, progress)


def _run(
    request: Request,
    resume: bool,
    journal: Any,
    check_finite: bool,
    listener: Callable[[int, int], object] | bool | str | None,
) -> Report:
    """Check and carry out a request; time and memory of both are in the report."""
    started = time.perf_counter()
    with (
        PeakMemory() as memory,
        checked_run(request) as checked,
        _reporting_to(listener, checked),
    ):
        execution = Execution(checked, check_finite)
        digests = execution.execute(resume, journal)
    seconds = time.perf_counter() - started
    d_planes, d_beta = execution.hash_gradients()
    return Report(
        tokens=checked.n_tokens,
        seconds=seconds,
        peak_anonymous_bytes=memory.peak,
        digests=digests,
        d_planes=d_planes,
        d_beta=d_beta,
        resumed_tokens=execution.resumed_tokens,
        busy=execution.clock.seconds,
    )


@contextlib.contextmanager
def _reporting_to(
    listener: Callable[[int, int], object] | bool | str | None, checked: CheckedRun
) -> Iterator[None]:
    """Report the progress of a block to a callable, or show a progress bar."""
    if listener is True or isinstance(listener, str):
        # Imported here, since it is needed for this alone.
        from racecore.runtime.progress_bar import token_bar

        label = "racecore" if listener is True else listener
        with token_bar(label, checked.n_steps, checked.n_tokens):
            yield
        return
    if not callable(listener):
        yield
        return
    done = 0

    def advance(n_tokens: int) -> None:
        """Add tokens and call the listener."""
        nonlocal done
        # Never beyond the total, whatever the kernels report.
        done = min(done + n_tokens, checked.n_steps)
        listener(done, checked.n_steps)

    with progress.reporting(advance):
        yield
