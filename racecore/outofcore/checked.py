"""A run after all checks and before any work: shapes, dtypes, memory budget, passes, tasks and the
identity by which an interrupted run is recognised.
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
from racecore.gradients import hash_gradients
from racecore.outofcore import schedule
from racecore.outofcore.devices import Device, GpuDevice, HostDevice
from racecore.outofcore.passes import PassRunner
from racecore.outofcore.request import Request
from racecore.outofcore.sources import TokenSource, open_source
from racecore.outofcore.stamps import stamp
from racecore.outofcore.targets import check_paths, folder_of, is_path
from racecore.runtime import arrays, kernel_cache

__all__ = ["CheckedRun", "checked_run"]


@contextlib.contextmanager
def checked_run(request: Request) -> Iterator[CheckedRun]:
    """Open the inputs and check everything that can be checked before anything is computed or
    written; yield the checked run, and close the inputs after the block.

    Raises
    ------
    ValueError, TypeError, OSError
        As `racecore.outofcore.run`, before it computes.
    """
    if request.d_out is None and any(
        x is not None for x in (request.d_query, request.d_key, request.d_value, request.d_lsh)
    ):
        raise ValueError("gradients need d_out, the gradient of the output")
    untyped = None if request.dtype is None else _bfloat16(request.dtype)
    with contextlib.ExitStack() as stack:
        sources = {}
        for name, source in request.inputs.items():
            sources[name] = open_source(source, name, untyped)
            stack.callback(sources[name].close)
        check_paths(list(request.inputs.items()), {**request.outputs, "d_lsh": request.d_lsh})
        # Of d_lsh too, which is written at the end of the run.
        for path in (*request.outputs.values(), request.d_lsh):
            if is_path(path):
                folder_of(path)
        yield CheckedRun(request, sources)


class CheckedRun:
    """What a run reads, computes and writes. It changes nothing and can be carried out, or
    estimated only.

    Parameters
    ----------
    request : Request
    sources : dict of str to TokenSource
        The open inputs, by name.

    Attributes
    ----------
    request : Request
    sources : dict of str to TokenSource
    problem : Problem
        Of its arrays only shapes and dtypes are meaningful.
    wants_gradients : bool
    memory_limit : int
        In bytes.
    device : Device
    budget : schedule.MemoryBudget
    passes : dict of str to schedule.Pass
    """

    def __init__(self, request: Request, sources: dict[str, TokenSource]) -> None:
        self.request, self.sources = request, sources
        self.wants_gradients = "d_out" in sources
        stand_ins = {name: _stand_in(source) for name, source in sources.items()}
        problem, self._lsh = inputs.check_attention(
            inputs.Passed.resolve(stand_ins["query"], stand_ins["key"], stand_ins["value"]),
            request.lsh,
            is_causal=request.is_causal,
            readout=request.readout,
            key_mask=stand_ins.get("key_mask"),
            cu_seqlens=_load_bounds(request.cu_seqlens),
            chunk_size=None,
            memory_limit=None,
        )
        self._check_d_out()
        self.memory_limit = inputs.parse_bytes(request.memory_limit)
        self._backend = backends.choose(request.backend)
        self.device: Device = GpuDevice() if self._backend.name == "cuda" else HostDevice()
        self.budget = schedule.budget_memory(
            problem, self.wants_gradients, self.memory_limit, self.device.max_segments
        )
        self.problem = replace(problem, workspace_bytes=self.budget.workspace_bytes)
        self.passes = schedule.PASSES[problem.is_causal, self.wants_gradients]
        # Parameters of the hash whose gradients are wanted; that of beta is a by-product.
        has_planes = request.d_lsh is not None and request.d_lsh is not False
        self._wrt = frozenset({"planes", "beta"} if has_planes else {"beta"})

    def _check_d_out(self) -> None:
        """Raise an error if d_out does not match the output."""
        if "d_out" not in self.sources:
            return
        d_out = self.sources["d_out"]
        shape, dtype = self.shape("out"), self.dtype
        if (d_out.shape, d_out.dtype) != (shape, dtype):
            raise ValueError(
                f"d_out must have the shape and dtype of the output, {shape} and "
                f"{dtype}, got "
                f"{d_out.shape} and {d_out.dtype}"
            )

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all arrays but the mask."""
        return self.sources["query"].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a result."""
        if name == "out":
            return (*self.sources["query"].shape[:-1], self.sources["value"].shape[-1])
        return self.sources[name.removeprefix("d_")].shape

    @property
    def n_tokens(self) -> int:
        """Query tokens."""
        return int(np.prod(self.sources["query"].shape[:-2], dtype=np.int64))

    @property
    def n_steps(self) -> int:
        """Tokens of all passes, as progress is counted."""
        return self.n_tokens * schedule.n_passes(self.problem.is_causal, self.wants_gradients)

    def inputs_of(self, pass_name: str) -> list[str]:
        """Return the names of the arrays that a pass reads, the mask last."""
        names = [*self.passes[pass_name].reads]
        return [*names, "key_mask"] if "key" in names and "key_mask" in self.sources else names

    def tasks(self) -> Iterator[schedule.ChunkTask]:
        """Yield all tasks of the run in their order."""
        return schedule.tasks(self.problem, self.wants_gradients, self.budget)

    def pass_runner(self) -> PassRunner:
        """Return a new computation of the tasks, with zero states."""
        gradient = None
        if self.wants_gradients:
            # [2, M, n], per state head: gradients of the planes, if wanted, and of beta.
            n = self.problem.planes[0].size + 1 if "planes" in self._wrt else 1
            gradient = np.zeros((2, self.problem.n_state_heads, n))
        return PassRunner(self.problem, self._backend, gradient, self.device.is_gpu)

    def hash_gradients(self, sums: np.ndarray | None) -> tuple[np.ndarray | None, Any]:
        """Return the gradients of planes and beta, None where they were not requested.

        Parameters
        ----------
        sums : float64 array [2, M, n] or None
            `PassRunner.hash_gradient` after all tasks.
        """
        return hash_gradients(sums, self.problem, self._lsh, self._wrt)

    def journal_path(self, journal: Any = None) -> str | None:
        """Return the path of the journal: the one given, else beside the first output file, None
        where there is none.

        Raises
        ------
        ValueError
            A journal is given though the run writes to arrays.
        """
        outputs = self.request.outputs.values()
        # Arrays in memory do not outlive the process, so there would be nothing to resume.
        if any(output is not None and not is_path(output) for output in outputs):
            if journal is not None:
                raise ValueError(
                    "a run that writes to arrays cannot be resumed: leave out journal, or write "
                    "to files"
                )
            return None
        if journal is not None:
            folder_of(journal)
            check_paths(
                list(self.request.inputs.items()), {**self.request.outputs, "journal": journal}
            )
            return os.path.realpath(os.fspath(journal))
        first = next((os.path.realpath(os.fspath(x)) for x in outputs if x is not None), None)
        return None if first is None else f"{first}.journal"

    def identity(self) -> dict[str, Any]:
        """Return everything that must be equal for an interrupted run to be resumed, by the names
        used in messages.
        """
        # Stored in journals: after a change here, runs interrupted before cannot be resumed.
        problem, lsh = self.problem, self._lsh
        beta = np.asarray(lsh.beta).tolist()
        bounds_digest = hashlib.sha256(problem.sequences.tobytes()).hexdigest()[:16]
        stamps = {
            name: stamp(self.request.inputs[name], source) for name, source in self.sources.items()
        }
        outputs = {
            name: os.path.basename(x) if is_path(x) else "digest only"
            for name, x in self.request.outputs.items()
        }
        return {
            "racecore": __version__,
            "kernels and processor": self.device.identity(kernel_cache.identity()),
            **stamps,
            "hash": f"{lsh.n_tables} tables of {lsh.n_planes} planes, beta {beta}, "
            f"fingerprint {lsh.fingerprint[:16]} of {lsh.planes.shape}",
            "is_causal": problem.is_causal,
            "readout": problem.readout,
            "sequences": f"{len(problem.sequences)}, digest {bounds_digest}",
            **outputs,
            # Determines the size of a state record.
            "d_planes": "planes" in self._wrt,
            # Tasks are numbered, so the same number must mean the same tokens.
            "tokens per chunk, which follow from memory_limit": self.budget.chunk_tokens,
            "sequences per chunk, which follow from memory_limit": self.budget.unit_sequences,
        }


def _stand_in(source: TokenSource) -> np.ndarray:
    """Return an array of the shape and dtype of a source that takes no memory: the checks use
    nothing else.
    """
    return np.broadcast_to(np.zeros((), source.dtype), source.shape)


def _load_bounds(cu_seqlens: Any) -> Any:
    """Return the bounds of sequences, read from a file where a path is given."""
    return np.load(cu_seqlens, allow_pickle=False) if is_path(cu_seqlens) else cu_seqlens


def _bfloat16(name: str) -> np.dtype:
    if name != "bfloat16":
        raise ValueError(f"dtype must be None or 'bfloat16', got {name!r}")
    return arrays.dtype_of(name)
