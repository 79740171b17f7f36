"""run: attention and its gradients over arrays of any length, in bounded memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from racecore.outofcore.execution import Run, prepared
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
    query, key, value : sources, shapes [T, H, D], [T, G, D], [T, G, V], or with a batch axis in front
        Each the path of an .npy file, an array or memory map, a `Synthetic`, or anything with shape
        and dtype that gives arrays for slices (zarr, h5py). Files are read in chunks, while the
        chunk before is computed.
    out : sink, shape of the query with V in place of D
        The path of an .npy file to write, an array (or anything that slices can be assigned to), or
        None: then only its digest is kept. A file is called ``<path>.partial`` until it is
        complete, and replaces what had its name.
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
        Sum the gradient of the planes too, and write it with that of beta (names "planes" and
        "beta", float64); with True it is only in the report. The gradient of beta always is.
    dtype : {None, "bfloat16"}
        How to read .npy files whose entries are two untyped bytes: that is how NumPy stores
        ml_dtypes.bfloat16.
    memory_limit : int or str
        Bytes that the run may take, beyond what the process had when it was called; see
        `racecore.outofcore.schedule`. With ``backend="cuda"`` it holds for the memory of the host
        and for that of the GPU, each by itself.
    backend : {"cpu", "cuda", "reference"}, optional
        "cuda" copies chunks to a GPU and results back, while others are computed. None means the
        fastest in host memory.
    resume : bool
        Go on with what an earlier run to the same files left, if it was interrupted. False discards
        that.
    journal : path, optional
        Where to note what is done, so that the run can be resumed; without it beside the first
        output file, as ``<path>.journal``. A run that writes no files has a journal only if this
        names one; one that writes to arrays has none: they would be gone.
    check_finite : bool
        Refuse NaN and infinity in the inputs, naming array, token, head and dimension.
    progress : callable(done, total), True, or str, optional
        Told how many tokens are done, counted once per pass, out of how many. True shows a bar on
        the terminal, or lines where there is none; so does a str, which says what is being done.

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
    racecore.errors.BackendUnavailableError
        The backend cannot run here; lists every backend with its reason.
    OSError
        A file cannot be read, there is no room for an output, or the disk failed.

    Notes
    -----
    Outputs have the bits that `racecore.attention` and `racecore.attention_backward` give. However the process ends, the
    same call goes on where it was, to the same bytes; inputs or parameters that changed meanwhile are refused. Inputs that
    are not finite or change on the way leave nothing to go on with.
    """
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
    started = time.perf_counter()
    with (
        PeakMemory() as memory,
        prepared(request, check_finite) as run_,
        _listening(progress, run_),
    ):
        digests = run_.go(resume, journal)
    seconds = time.perf_counter() - started
    return Report(
        run_.n_tokens,
        seconds,
        memory.peak,
        digests,
        *run_.hash_gradients(),
        run_.resumed_tokens,
        run_.clock.seconds,
    )


@contextlib.contextmanager
def _listening(
    listener: Callable[[int, int], object] | bool | str | None, run: Run
) -> Iterator[None]:
    """Tell a caller's function about progress, or show a bar."""
    if listener is True or isinstance(listener, str):
        from racecore.runtime.progress_bar import token_bar

        with token_bar("racecore" if listener is True else listener, run.n_steps, run.n_tokens):
            yield
        return
    if not callable(listener):
        yield
        return
    done = 0

    def advance(n_tokens: int) -> None:
        """Tell the listener how much is done."""
        nonlocal done
        done = min(done + n_tokens, run.n_steps)
        listener(done, run.n_steps)

    with progress.reporting(advance):
        yield
