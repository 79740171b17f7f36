"""The arrays of an index of keys: made, lengthened, trimmed, and checked when read from a file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from racecore.errors import CorruptFileError
from racecore.ops.socket.layout import BLOCK_TOKENS, HashedKeys, n_rows
from racecore.runtime import arrays, cuda
from racecore.soft_lsh import SoftLSH

__all__ = ["check_sizes", "no_keys", "trimmed", "with_capacity"]

_GROWTH = 1.5  # of arrays that are full: appending token by token then copies each about twice


def no_keys(lsh: SoftLSH, batch: int, n_kv_heads: int, on_device: bool = False) -> HashedKeys:
    """Return codes, norms and lengths of `batch` sequences without tokens."""
    shape = (batch, n_kv_heads, 0, n_rows(lsh.n_tables, lsh.n_planes), BLOCK_TOKENS)
    codes = arrays.zeros(shape, np.uint8, on_device)
    norms = arrays.zeros(shape[:3], np.uint16, on_device)
    return HashedKeys(codes, norms, np.zeros(batch, np.int64), lsh.n_tables, lsh.n_planes)


def with_capacity(hashed: HashedKeys, n_tokens: int) -> HashedKeys:
    """Return the same keys in arrays for at least `n_tokens`; new arrays are half as long again."""
    has, needed = hashed.codes.shape[2], -(-n_tokens // BLOCK_TOKENS)
    if needed <= has:
        return hashed
    size = max(needed, int(has * _GROWTH) + 1) if has else needed
    batch, n_kv_heads, _, rows, _ = hashed.codes.shape
    on_device = cuda.is_array(hashed.codes)
    codes = arrays.zeros((batch, n_kv_heads, size, rows, BLOCK_TOKENS), np.uint8, on_device)
    norms = arrays.zeros((batch, n_kv_heads, size * BLOCK_TOKENS), np.uint16, on_device)
    codes[:, :, :has] = hashed.codes
    norms[:, :, : has * BLOCK_TOKENS] = hashed.norms
    return hashed._replace(codes=codes, norms=norms)


def trimmed(hashed: HashedKeys, sequences: Any) -> HashedKeys:
    """Return a copy of some sequences without spare capacity."""
    # on the host an index out of range raises; on a GPU it would not
    lengths = hashed.lengths[sequences].copy()
    n_blocks = -(-int(lengths.max(initial=0)) // BLOCK_TOKENS)
    if not isinstance(sequences, slice):
        sequences = arrays.to_device(sequences, cuda.is_array(hashed.codes))
    codes = arrays.copied(hashed.codes[:, :, :n_blocks][sequences])
    norms = arrays.copied(hashed.norms[:, :, : n_blocks * BLOCK_TOKENS][sequences])
    return hashed._replace(codes=codes, norms=norms, lengths=lengths)


def check_sizes(hashed: HashedKeys, path: str | os.PathLike[str]) -> None:
    """Raise `racecore.errors.CorruptFileError` unless the arrays of a file fit each other."""
    batch, n_kv_heads, n_blocks, rows, n_lanes = hashed.codes.shape
    n_tokens = n_blocks * BLOCK_TOKENS
    fits = (
        hashed.norms.shape == (batch, n_kv_heads, n_tokens)
        and hashed.lengths.shape == (batch,)
        and (rows, n_lanes) == (n_rows(hashed.n_tables, hashed.n_planes), BLOCK_TOKENS)
        and bool(((hashed.lengths >= 0) & (hashed.lengths <= n_tokens)).all())
        and hashed.codes.dtype == np.uint8
        and hashed.norms.dtype == np.uint16
    )
    if not fits:
        raise CorruptFileError(f"{os.fspath(path)} holds arrays that do not fit each other")
