"""Where the chunks of a run are computed: in host memory, or on a GPU with copies there and back on
the way.

The pipeline reads in one thread, computes in another and writes in a third. On a GPU each of them
has a stream of its own: the reader copies what it read to the device, the writer copies results
back, and both do so while kernels run. Every thread waits for its own stream before it hands arrays
on, so no array is used or given back to the memory pool too early.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from racecore.runtime import arrays, cuda

__all__ = ["Gpu", "Host", "Place"]

Arrays = dict[str, Any]


class Host:
    """Chunks stay where they were read to, and are computed into where they are written from."""

    on_device = False
    most_segments = 16  # of a chunk: longer ones are no faster

    def identity(self, kernels: str) -> str:
        """Return what results depend on to the last bit."""
        return kernels

    @property
    def empty(self) -> Callable[[tuple[int, ...], Any], np.ndarray]:
        """What makes the buffers that files are read to and written from."""
        return arrays.empty

    def takes(self, rows: np.ndarray) -> bool:
        """Tell whether results can go straight to a part of an array of the caller's."""
        return True

    def bring(self, read: Arrays) -> Arrays:
        """Return what was read, where it is computed on."""
        return read

    @contextlib.contextmanager
    def results_for(self, rows: Arrays) -> Iterator[Arrays]:
        """Yield arrays to compute into, for results that will lie in `rows`; they are complete
        after the block.
        """
        yield rows

    def send(self, results: Arrays, rows: Arrays) -> None:
        """Bring results to their rows."""


class Gpu:
    """Chunks are copied to a GPU, and results back."""

    on_device = True
    most_segments = 128  # enough blocks for all multiprocessors, and copies of some megabytes

    def __init__(self) -> None:
        cupy = cuda.cupy()
        self._in, self._compute, self._out = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))

    def identity(self, kernels: str) -> str:
        """Return what results depend on to the last bit."""
        cupy = cuda.cupy()
        return f"{kernels}, CUDA on compute capability {cupy.cuda.Device().compute_capability}"

    @property
    def empty(self) -> Callable[[tuple[int, ...], Any], np.ndarray]:
        """What makes the buffers: memory that is locked, from which copies run at full speed beside
        kernels.
        """
        return cuda.empty_pinned

    def takes(self, rows: np.ndarray) -> bool:
        """Tell whether results can go straight to a part of an array of the caller's."""
        return rows.flags.c_contiguous

    def bring(self, read: Arrays) -> Arrays:
        """Copy what was read to the device."""
        cupy = cuda.cupy()
        found = {}
        with self._in:
            for name, array in read.items():
                found[name] = cupy.empty(array.shape, array.dtype)
                found[name].set(np.ascontiguousarray(array), stream=self._in)
        self._in.synchronize()
        return found

    @contextlib.contextmanager
    def results_for(self, rows: Arrays) -> Iterator[Arrays]:
        """Yield arrays on the device; kernels of the block go to this place's stream and are over
        after it.
        """
        cupy = cuda.cupy()
        with self._compute:
            yield {name: cupy.empty(array.shape, array.dtype) for name, array in rows.items()}
        self._compute.synchronize()

    def send(self, results: Arrays, rows: Arrays) -> None:
        """Copy results to their rows in host memory."""
        for name, result in results.items():
            result.get(stream=self._out, out=rows[name])
        self._out.synchronize()


Place = Host | Gpu
