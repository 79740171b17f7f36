"""The rows on which `racecore scale` compares a run with float64, and their errors."""

from __future__ import annotations

import numpy as np

__all__ = ["N_ROWS", "SampledRows", "largest_error", "sample_tokens"]

# Rows compared per array.
N_ROWS = 16


class SampledRows:
    """An output of which only some rows are kept.

    Parameters
    ----------
    shape : tuple of int
        [T, heads, dim].
    dtype : dtype
    tokens : int array
        Numbers of the rows to keep, ascending.

    Attributes
    ----------
    rows : array [len(tokens), heads, dim]
        NaN until they are written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, tokens: np.ndarray) -> None:
        self.shape, self.dtype, self._tokens = shape, dtype, tokens
        self.rows = np.full((len(tokens), *shape[1:]), np.nan, dtype)

    def __setitem__(self, tokens: slice, rows: np.ndarray) -> None:
        first, last = np.searchsorted(self._tokens, [tokens.start, tokens.stop])
        self.rows[first:last] = rows[self._tokens[first:last] - tokens.start]


def sample_tokens(n_tokens: int, chunk: int, seed: int) -> np.ndarray:
    """Return the numbers of the rows to check, ascending.

    Both ends, both sides of the first, middle and last cut between chunks, and random ones.
    """
    n_cuts = (n_tokens - 1) // chunk
    cuts = chunk * np.array([1, (n_cuts + 1) // 2, n_cuts]) if n_cuts else np.array([], np.int64)
    n_random = N_ROWS - 2 - 2 * len(cuts)
    random = np.random.default_rng(seed).integers(n_tokens, size=n_random)
    return np.unique(np.concatenate([[0, n_tokens - 1], cuts - 1, cuts, random]))


def largest_error(
    found: np.ndarray, exact: np.ndarray, tokens: np.ndarray, is_causal: bool
) -> float:
    """Return the largest relative error of a row; infinity if a row is NaN.

    The error is relative to the norm of the row, or to the usual norm of rows at its position if
    that is larger: where all planes are saturated, gradients vanish and their float32 values are
    noise.

    Parameters
    ----------
    found, exact : arrays, shape [n, dim]
    tokens : int array, shape [n]
        Numbers of the rows.
    is_causal : bool
        Causal row i is a mean of i + 1 random ones, whose norm shrinks as 1 / sqrt(i + 1).
    """
    usual = 1 / np.sqrt(tokens + 1.0) if is_causal else np.ones(len(tokens))
    distance = np.linalg.norm(found.astype(np.float64) - exact, axis=1)
    size = np.linalg.norm(exact, axis=1)
    usual *= np.sqrt(np.mean((size / usual) ** 2))
    size = np.maximum(size, usual)
    relative = np.divide(distance, size, out=np.where(distance > 0, np.inf, 0.0), where=size > 0)
    # A NaN must not hide in a maximum.
    return float(np.where(np.isnan(relative), np.inf, relative).max())
