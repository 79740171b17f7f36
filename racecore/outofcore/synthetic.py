"""Synthetic: an array whose numbers are generated when they are read, the same in any slices."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import DTypeLike

from racecore.runtime import arrays

__all__ = ["Synthetic", "SyntheticHead"]

# Numbers generated before they are converted to another dtype: they stay in a cache.
_BLOCK = 1 << 16
# Period of the counter of the generator; beyond it other keys are used.
_COUNTER = 1 << 32
# Rows of one head that are generated at once.
_ROWS = 1024


class Synthetic:
    """An array of random numbers of mean 0 and standard deviation 1.15, for tests of any length.

    Every value depends only on the seed and its position. Values are multiples of 1/64 between
    -3.97 and 3.97, nearly normally distributed, and exact in every dtype: arrays of different
    dtypes and one seed are equal.

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
        The shape or dtype is not that of a query, key or value, or the seed is not an integer of at
        least 0.

    Examples
    --------
    >>> x = Synthetic((75_000_000, 4, 128), np.float32, seed=0)
    >>> x[1_000_000:1_000_002].shape
    (2, 4, 128)
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: DTypeLike = np.float32, seed: int = 0
    ) -> None:
        shape = tuple(shape)
        if len(shape) not in (3, 4) or not all(
            isinstance(n, (int, np.integer)) and n >= 0 for n in shape
        ):
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
        """Return ``array[begin:end]``: tokens, or rows of a batch."""
        if not isinstance(tokens, slice):
            raise TypeError(f"a Synthetic is read in slices such as x[10:20], got {tokens!r}")
        begin, end, step = tokens.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"a Synthetic is read in slices without a step, got {tokens!r}")
        out = arrays.empty((max(0, end - begin), *self.shape[1:]), self.dtype)
        self.fill(out, begin * math.prod(self.shape[1:]))
        return out

    def fill(self, out: np.ndarray, first: int) -> None:
        """Write numbers, from position `first` of the flattened array on, to a contiguous array."""
        from racecore.outofcore import loops

        flat = out.reshape(-1)
        if self.dtype == np.float32:
            for begin, end, keys in self._split(first, flat.size):
                loops.fill(flat[begin:end], (first + begin) % _COUNTER, *keys)
            return
        block = np.empty(min(_BLOCK, flat.size), np.float32)
        for start in range(0, flat.size, _BLOCK):
            part = block[: min(_BLOCK, flat.size - start)]
            for begin, end, keys in self._split(first + start, part.size):
                loops.fill(part[begin:end], (first + start + begin) % _COUNTER, *keys)
            _convert(part, flat[start : start + part.size])

    def head(self, head: int) -> SyntheticHead:
        """Return one head as an array [T, 1, dim], float64, to check results against it."""
        return SyntheticHead(self, head)

    def _split(self, first: int, n: int) -> list[tuple[int, int, tuple[np.uint32, np.uint32]]]:
        """Split n numbers where the 32-bit counter wraps; return (begin, end, keys) tuples."""
        parts = []
        begin = 0
        while begin < n:
            period, counter = divmod(first + begin, _COUNTER)
            end = min(n, begin + _COUNTER - counter)
            digest = hashlib.sha256(f"{self.seed} {period}".encode()).digest()
            a, b = np.frombuffer(digest[:8], "<u4").astype(np.uint32)
            parts.append((begin, end, (a, b)))
            begin = end
        return parts


class SyntheticHead:
    """One head of a `Synthetic` array, in float64, generated without the other heads.

    Parameters
    ----------
    whole : Synthetic
        [T, heads, dim].
    head : int
    """

    def __init__(self, whole: Synthetic, head: int) -> None:
        if whole.ndim != 3 or not 0 <= head < whole.shape[1]:
            raise ValueError(
                f"head must be one of an array [T, heads, dim], got {head} of {whole.shape}"
            )
        self._whole, self._head = whole, head
        self.shape = (whole.shape[0], 1, whole.shape[2])
        self.dtype = np.dtype(np.float64)

    def __repr__(self) -> str:
        return f"{self._whole!r}.head({self._head})"

    def fill(self, out: np.ndarray, first: int) -> None:
        """Write whole rows, from number `first` of this head on, to a contiguous array."""
        from racecore.outofcore import loops

        n_heads, dim = self._whole.shape[1:]
        rows = out.reshape(-1, dim)
        # From a row of this head to the next one in the whole array.
        step = n_heads * dim
        for begin in range(0, len(rows), _ROWS):
            part = rows[begin : begin + _ROWS]
            # Position of the block's first number in the whole array.
            position = ((first // dim + begin) * n_heads + self._head) * dim
            splits = self._whole._split(position, (len(part) - 1) * step + dim)
            if len(splits) == 1:
                loops.fill_rows(part, position % _COUNTER, step, *splits[0][2])
                continue
            # The counter wraps around within this block: row by row.
            for row in part:
                values = np.empty(dim, np.float32)
                for start, end, keys in self._whole._split(position, dim):
                    loops.fill(values[start:end], (position + start) % _COUNTER, *keys)
                row[...] = values
                position += step


def _convert(values: np.ndarray, out: np.ndarray) -> None:
    """Copy float32 numbers of at most eight significant bits to another dtype, exactly."""
    # bfloat16 is the upper half of float32.
    if arrays.is_bfloat16(out.dtype):
        np.right_shift(values.view(np.uint32), 16, out=out.view(np.uint16), casting="unsafe")
    else:
        out[...] = values
