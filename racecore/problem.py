"""The frozen bundle that operations take: checked arrays, planes per state head, sequences.

Letters: B batch, Tq and Tk tokens, H query heads, G key/value heads, D head dim, V value dim, L
tables, P planes, R = 2^P buckets, S = L*R. There is one state per *state head*; M of them: M = G,
or M = H if planes or beta are given per query head. State head m reads key/value head m // (M/G)
and serves query heads m*(H/M) ... (m+1)*(H/M) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from racecore.runtime import arrays, cuda

__all__ = [
    "BUCKET_MEAN_EPS",
    "DEVICE_WORKSPACE_BYTES",
    "WORKSPACE_BYTES",
    "GradientBuffers",
    "Problem",
    "Sketch",
    "changed",
]

WORKSPACE_BYTES = 64 << 20
DEVICE_WORKSPACE_BYTES = 1 << 30  # a GPU wants many segments at once
BUCKET_MEAN_EPS = 1e-6  # of the readout "bucket_mean"; the value of the authors' released kernels


def changed(instance: Any, **fields: Any) -> Any:
    """Return a copy of a frozen dataclass with other fields, unchecked."""
    # a tenth of the time of dataclasses.replace, which a step of one token would notice
    copy = object.__new__(type(instance))
    copy.__dict__.update(instance.__dict__, **fields)
    return copy


@dataclass(frozen=True, eq=False)
class Problem:
    """A computation. `query` is None if keys are only summed, `key` and `value` if a state is only
    read.

    Arrays of tokens are NumPy arrays, or all of them CuPy arrays; planes, beta and sequences are
    NumPy arrays.
    """

    query: np.ndarray | None  # [B, Tq, H, D], any strides
    key: np.ndarray | None  # [B, Tk, G, D]
    value: np.ndarray | None  # [B, Tk, G, V]
    planes: np.ndarray  # [M, L, P, D] float64, broadcast if heads share them
    beta: np.ndarray  # [M] float64
    key_mask: np.ndarray | None  # [B, Tk] bool, True = take part
    sequences: np.ndarray  # [N, 5] int64: batch index, query begin, query end, key begin, key end
    n_heads: int  # H
    n_kv_heads: int  # G
    value_dim: int  # V
    is_causal: bool
    readout: str  # "ratio" or "bucket_mean"
    dtype: np.dtype  # of the arithmetic
    # at most so many tokens in flight, rounded up to whole segments
    chunk_tokens: int | None = None
    workspace_bytes: int = WORKSPACE_BYTES  # at most so much temporary memory
    # of all segments, for the backward pass, not only those at the boundaries of chunks
    keeps_states: bool = False

    @property
    def n_state_heads(self) -> int:
        """M."""
        return self.planes.shape[0]

    @property
    def n_buckets(self) -> int:
        """S = L * 2^P, over all tables."""
        return self.planes.shape[1] << self.planes.shape[2]

    @property
    def on_device(self) -> bool:
        """Whether tokens, and so states and results, are on a GPU."""
        return cuda.is_array(self.key if self.query is None else self.query)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[B, Tq, H, V] of the output; there must be queries."""
        if self.query is None:
            raise TypeError("this problem has no queries")
        return (*self.query.shape[:3], self.value_dim)

    def count_keys(self) -> np.ndarray:
        """Count the keys of every sequence that take part, int64 [N]."""
        batch, begin, end = self.sequences[:, 0], self.sequences[:, 3], self.sequences[:, 4]
        if self.key_mask is None:
            return end - begin
        return np.count_nonzero(arrays.to_device(self.key_mask, False), axis=1)[batch]

    def part(self, first: int, last: int) -> Problem:
        """Return the same problem with only the sequences first ... last - 1."""
        if (first, last) == (0, len(self.sequences)):
            return self
        return replace(self, sequences=self.sequences[first:last])

    def new_sketch(self) -> Sketch:
        """Return the empty state of every sequence."""
        shape = (len(self.sequences), self.n_state_heads, self.n_buckets * (1 + self.value_dim))
        return Sketch(arrays.zeros(shape, np.float64, self.on_device), self.n_buckets)


class Sketch:
    """States in one array [N, M, S*(1+V)], so that one scan serves masses and value sums.

    The first S numbers of a row are `mass`, the others `value_sum`; both properties are views.
    Operations take float64; a state that a caller keeps may be float32.
    """

    __slots__ = ("flat", "n_buckets")

    def __init__(self, flat: np.ndarray, n_buckets: int) -> None:
        self.flat = flat
        self.n_buckets = n_buckets

    @property
    def mass(self) -> np.ndarray:
        """[N, M, S]."""
        return self.flat[..., : self.n_buckets]

    @property
    def value_sum(self) -> np.ndarray:
        """[N, M, S, V]."""
        n, m, width = self.flat.shape
        value_dim = width // self.n_buckets - 1
        return self.flat[..., self.n_buckets :].reshape(n, m, self.n_buckets, value_dim)

    def part(self, first: int, last: int) -> Sketch:
        """Return a view of the states of the sequences first ... last - 1."""
        return Sketch(self.flat[first:last], self.n_buckets)

    def to_device(self, on_device: bool) -> Sketch:
        """Return the same states on a GPU or in host memory, copied only to the other device."""
        flat = arrays.to_device(self.flat, on_device)
        return self if flat is self.flat else Sketch(flat, self.n_buckets)

    def copy(self) -> Sketch:
        """Return an independent copy."""
        return Sketch(self.flat.copy(), self.n_buckets)

    def rounded(self, dtype: np.dtype) -> Sketch:
        """Return the same states as float32 or float64; itself if it has that dtype."""
        return self if self.flat.dtype == dtype else Sketch(self.flat.astype(dtype), self.n_buckets)


@dataclass(eq=False)
class GradientBuffers:
    """Arrays for the gradients; None for those that are not wanted.

    The gradients of planes and beta are separate by side (0 queries, 1 keys), which makes the order
    of their additions, and so their bits, independent of how the work is cut into chunks.
    """

    query: np.ndarray | None  # [B, Tq, H, D]
    key: np.ndarray | None  # [B, Tk, G, D]
    value: np.ndarray | None  # [B, Tk, G, V]
    hash: np.ndarray | None  # [2, M, L*P*D + 1] or [2, M, 1], float64: planes if wanted; beta last
