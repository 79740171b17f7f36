"""Read modes: whether products read rows of an input in place or from a copy in scratch.

Decided once per call, in Python, from the sizes of the problem. What depends on the block (a mask,
its last tokens, a dtype and alignment that tiles cannot read) stays in kernels: they copy there,
see `scratch.read_keys`, `scratch.read_query` and `row_io.rows_to_read`.

A product that passes over its rows once reads them in place: a copy costs more than it saves. If it
passes over them again and again, once for every tile of rows of the other matrix, they are copied:
the copy is in the nearest cache, its rows lie together, and bfloat16 is widened once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from racecore.ops.cpu.row_io import ANY_IN_PLACE, COPY, IN_PLACE, WIDENED
from racecore.ops.simd.products import is_wide
from racecore.ops.simd.vectors import VECTOR_BYTES
from racecore.problem import Problem

__all__ = ["COPIES", "ReadModes", "add_mode", "d_out_mode", "hash_mode", "state_mode"]


class ReadModes(NamedTuple):
    """The read mode of every input of a call."""

    hash: int  # keys and queries
    value: int
    d_out: int


_COPY, _IN_PLACE, _WIDENED, _ANY = (int(mode) for mode in (COPY, IN_PLACE, WIDENED, ANY_IN_PLACE))
COPIES = ReadModes(_COPY, _COPY, _COPY)


def hash_mode(part: Problem, d_hash: np.ndarray | None = None) -> int:
    """Return the mode of rows that are hashed: in place if one pass over the planes suffices, and
    no gradient of planes is wanted.

    That gradient, to be added to `d_hash` [..., M, L*P*D + 1], is a second product with the rows.
    """
    n_rows = part.planes.shape[1] * part.planes.shape[2]  # L*P
    one_pass = n_rows <= 4 or (is_wide(n_rows) and n_rows <= 2 * _lanes(part))
    wants_planes = d_hash is not None and d_hash.shape[-1] > 1
    if wants_planes or not one_pass:
        return _COPY
    # the one tile of `project` that widens bfloat16 takes four planes
    return _ANY if n_rows == 4 else _IN_PLACE


def add_mode(part: Problem) -> int:
    """Return the mode of values that are added to a state by weights: in place if one tile has all
    buckets.
    """
    if part.n_buckets > 8:
        return _COPY
    # the one tile of `accumulate` that widens bfloat16 and has whole cache lines takes 8 buckets
    return _ANY if part.n_buckets == 8 else _IN_PLACE


def state_mode(part: Problem) -> int:
    """Return the mode of values that are multiplied by the gradient of a state: in place if one
    tile has all buckets, and one state head reads them.
    """
    shared = part.n_state_heads > part.n_kv_heads
    if shared or part.n_buckets > 2 * _lanes(part):
        return _COPY
    return _ANY if part.n_buckets == 8 else _IN_PLACE


def d_out_mode(part: Problem) -> int:
    """Return the mode of gradients of outputs, which two products read: in place only if that saves
    widening them from bfloat16.
    """
    return _WIDENED if part.n_buckets == 8 else _COPY


def _lanes(part: Problem) -> int:
    """Return the numbers in a vector."""
    return VECTOR_BYTES // part.dtype.itemsize
