"""Planes as CPU kernels take them: padded with zeros to whole vectors, and transposed."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from racecore.ops.simd.products import padded
from racecore.problem import Problem
from racecore.runtime import arrays

__all__ = ["pad_planes", "padded_planes"]

# By the identity of planes and beta, and the dtype: their weak references, and the result. A weak
# reference shows whether an array of the same identity is still the same array.
_padded: dict[tuple[int, int, str], tuple[Any, Any, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}


def padded_planes(part: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the planes of a problem as `pad_planes` does, M = 1 where heads share them, and beta
    [M].

    They are kept as long as the hash lives, since padding takes longer than decoding a token may: a
    hash gives the same arrays every time (`SoftLSH.per_head`).
    """
    key = id(part.planes), id(part.beta), part.dtype.char
    kept = _padded.get(key)
    if kept is not None and kept[0]() is part.planes and kept[1]() is part.beta:
        return kept[2]
    planes = part.planes[:1] if part.planes.strides[0] == 0 else part.planes
    result = *pad_planes(planes, part.dtype), np.ascontiguousarray(part.beta, part.dtype)
    if not (part.planes.flags.writeable or part.beta.flags.writeable):
        forget = ref(part.planes, lambda _: _padded.pop(key, None))
        _padded[key] = forget, ref(part.beta), result
    return result


def pad_planes(planes: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return planes [M, L, P, D] as [M, L*P, D] and [M, D, L*P], padded with zeros: D in both, L*P
    in the second.
    """
    m, n_tables, n_planes, head_dim = planes.shape
    n_rows = n_tables * n_planes
    wide = arrays.zeros((m, n_rows, padded(head_dim)), dtype)
    wide[:, :, :head_dim] = planes.reshape(m, n_rows, head_dim)
    wide_t = arrays.zeros((m, padded(head_dim), padded(n_rows)), dtype)
    wide_t[:, :, :n_rows] = wide.transpose(0, 2, 1)
    return wide, wide_t
