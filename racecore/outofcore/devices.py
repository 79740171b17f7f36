"""The device that computes the chunks of a run: the host, or a GPU with copies to it and back.

The pipeline reads in one thread, computes in a second and writes in a third. On a GPU each thread
has a stream of its own: the reader copies inputs to the device and the writer copies results back
while kernels run. Every thread waits for its own stream before it hands arrays on, so no array is
used, or returned to the memory pool, too early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from racecore.runtime import arrays, cuda

__all__ = ["Device", "GpuDevice", "HostDevice"]

Arrays = dict[str, Any]


class HostDevice:
    """Chunks are computed in host memory, without copies."""

    is_gpu = False
    # Segments of a chunk at most: longer chunks are no faster.
    max_segments = 16

    def identity(self, kernels: str) -> str:
        """Return a text that changes whenever the bits of results may change."""
        return kernels

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an uninitialised buffer for reading from and writing to files."""
        return arrays.empty(shape, dtype)

    def can_write_to(self, rows: np.ndarray) -> bool:
        """Return whether results can be written directly to part of a caller's array."""
        return True

    def to_device(self, inputs: Arrays) -> Arrays:
        """Return the inputs unchanged: they are in host memory already."""
        return inputs

    @contextlib.contextmanager
    def result_arrays(self, rows: Arrays) -> Iterator[Arrays]:
        """Yield the arrays to compute results into; they are complete after the block."""
        yield rows

    def to_host(self, results: Arrays, rows: Arrays) -> None:
        """Do nothing: results were computed in `rows`."""


class GpuDevice:
    """Chunks are copied to a GPU, and results back."""

    is_gpu = True
    # Enough thread blocks for all multiprocessors, and copies of some megabytes.
    max_segments = 128

    def __init__(self) -> None:
        cupy = cuda.cupy()
        self._input_stream = cupy.cuda.Stream(non_blocking=True)
        self._compute_stream = cupy.cuda.Stream(non_blocking=True)
        self._output_stream = cupy.cuda.Stream(non_blocking=True)

    def identity(self, kernels: str) -> str:
        """Return a text that changes whenever the bits of results may change."""
        cupy = cuda.cupy()
        return f"{kernels}, CUDA on compute capability {cupy.cuda.Device().compute_capability}"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an uninitialised buffer in page-locked memory: copies from it run at full speed
        while kernels run.
        """
        return cuda.empty_pinned(shape, dtype)

    def can_write_to(self, rows: np.ndarray) -> bool:
        """Return whether results can be copied directly to part of a caller's array."""
        return rows.flags.c_contiguous

    def to_device(self, inputs: Arrays) -> Arrays:
        """Return copies of the inputs on the GPU."""
        cupy = cuda.cupy()
        copies = {}
        with self._input_stream:
            for name, array in inputs.items():
                copies[name] = cupy.empty(array.shape, array.dtype)
                copies[name].set(np.ascontiguousarray(array), stream=self._input_stream)
        # The host buffers are read into again as soon as this returns.
        self._input_stream.synchronize()
        return copies

    @contextlib.contextmanager
    def result_arrays(self, rows: Arrays) -> Iterator[Arrays]:
        """Yield GPU arrays of the shapes of `rows`; kernels launched in the block have finished
        after it.
        """
        cupy = cuda.cupy()
        with self._compute_stream:
            yield {name: cupy.empty(array.shape, array.dtype) for name, array in rows.items()}
        self._compute_stream.synchronize()

    def to_host(self, results: Arrays, rows: Arrays) -> None:
        """Copy results to their rows in host memory."""
        for name, result in results.items():
            result.get(stream=self._output_stream, out=rows[name])
        self._output_stream.synchronize()


Device = HostDevice | GpuDevice
