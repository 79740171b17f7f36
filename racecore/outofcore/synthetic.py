"""Synthetic: an array that is made up where it is read, at the speed of memory, and is the same however it is cut."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import DTypeLike

from racecore import arrays

__all__ = ["Synthetic"]

_PIECE = 1 << 16  # numbers that are made up before they are converted: they stay in a cache
_COUNTER = 1 << 32


class Synthetic:
    """Random numbers of mean 0 and standard deviation 1.15 in the place of an array, for tests of any length.

    The value at each place follows from seed and place alone. Values are multiples of 1/64 between -3.97 and 3.97, nearly
    normally distributed, and exact in every dtype: arrays of different dtypes and one seed are equal.

    Parameters
    ----------
    shape : tuple of int
        [T, heads, dim] or [B, T, heads, dim].
    dtype : dtype
        float16, bfloat16 (ml_dtypes), float32 or float64.
    seed : int
        Arrays of different seeds are independent.

    Raises
    ------
    ValueError, TypeError
        For a shape or dtype that no query, key or value could have, or a seed that is no integer of at least 0.

    Examples
    --------
    >>> x = Synthetic((75_000_000, 4, 128), np.float32, seed=0)
    >>> x[1_000_000:1_000_002].shape
    (2, 4, 128)
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32, seed: int = 0) -> None:
        shape = tuple(shape)
        if len(shape) not in (3, 4) or not all(isinstance(n, (int, np.integer)) and n >= 0 for n in shape):
            raise ValueError(f"shape must be [T, heads, dim] or [B, T, heads, dim], got {shape}")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.seed = int(seed)
        if not arrays.is_supported(self.dtype) or not self.dtype.isnative:
            raise TypeError(f"dtype must be {arrays.DTYPE_NAMES}, got {self.dtype}")

    def __repr__(self) -> str:
        return f"Synthetic({self.shape}, {self.dtype.name}, seed={self.seed})"

    @property
    def ndim(self) -> int:
        """3 or 4."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """Make up ``array[begin:end]``: tokens, or rows of a batch."""
        if not isinstance(tokens, slice):
            raise TypeError(f"a Synthetic is read in slices such as x[10:20], got {tokens!r}")
        begin, end, step = tokens.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a Synthetic is read in slices without a step, got {tokens!r}")
        out = arrays.empty((max(0, end - begin), *self.shape[1:]), self.dtype)
        self.fill(out, begin * math.prod(self.shape[1:]))
        return out

    def fill(self, out: np.ndarray, first: int) -> None:
        """Write the numbers from place `first` on, places counted along the flattened array, to a contiguous array."""
        from racecore.outofcore import loops

        flat = out.reshape(-1)
        if self.dtype == np.float32:
            for begin, end, keys in self._runs(first, flat.size):
                loops.fill(flat[begin:end], (first + begin) % _COUNTER, *keys)
            return
        piece = np.empty(min(_PIECE, flat.size), np.float32)
        for start in range(0, flat.size, _PIECE):
            part = piece[: min(_PIECE, flat.size - start)]
            for begin, end, keys in self._runs(first + start, part.size):
                loops.fill(part[begin:end], (first + start + begin) % _COUNTER, *keys)
            _convert(part, flat[start : start + part.size])

    def _runs(self, first: int, n: int) -> list[tuple[int, int, tuple[np.uint32, np.uint32]]]:
        """Cut n numbers where the counter's 32 bits are full; each run has keys of its own."""
        runs, begin = [], 0
        while begin < n:
            era, low = divmod(first + begin, _COUNTER)
            end = min(n, begin + _COUNTER - low)
            digest = hashlib.sha256(f"{self.seed} {era}".encode()).digest()
            a, b = np.frombuffer(digest[:8], "<u4").astype(np.uint32)
            runs.append((begin, end, (a, b)))
            begin = end
        return runs


def _convert(values: np.ndarray, out: np.ndarray) -> None:
    """Copy float32 numbers of at most eight significant bits."""
    if arrays.is_bfloat16(out.dtype):
        np.right_shift(values.view(np.uint32), 16, out=out.view(np.uint16), casting="unsafe")
    else:
        out[...] = values
