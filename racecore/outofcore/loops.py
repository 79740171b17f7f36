"""Loops over every number of a chunk: make it up, add it to a checksum, look whether it is finite.
All without Python's lock.

Numbers are addressed by their place in the whole array, never in the chunk, so that cutting an
array otherwise changes nothing.
"""

from __future__ import annotations

import numpy as np

from racecore.runtime.jit import helper, kernel

__all__ = ["checksum", "fill", "fill_rows", "first_with"]

_U32, _U64 = np.uint32, np.uint64
_MIDDLE, _STEP = np.float32(254), np.float32(1 / 64)  # of four numbers of seven bits: mean and unit


@helper
def _number(x: np.uint32, key_a: np.uint32, key_b: np.uint32) -> np.float32:
    """Return the number at place x of a stream."""
    x = x ^ key_a
    x = _U32(x ^ (x >> _U32(16)))
    x = _U32(x * _U32(0x7FEB352D))
    x = _U32(_U32(x ^ (x >> _U32(15))) + key_b)
    x = _U32(x * _U32(0x846CA68B))
    x = _U32(x ^ (x >> _U32(16)))
    x = _U32((x & _U32(0x007F007F)) + ((x >> _U32(8)) & _U32(0x007F007F)))
    x = _U32((x & _U32(0xFFFF)) + (x >> _U32(16)))
    return (np.float32(np.int32(x)) - _MIDDLE) * _STEP


@kernel
def fill(out: np.ndarray, first: int, key_a: np.uint32, key_b: np.uint32) -> None:
    """Write the numbers first, first + 1 ... of a stream to out, float32; none of them may be
    beyond a multiple of 2^32.

    A counter goes through a mixer of 32 bits with two keys; of the result four groups of seven bits
    are added, which gives multiples of 1/64 from -3.97 to 3.97, exact in every dtype, that are
    distributed nearly normally.
    """
    for i in range(out.shape[0]):
        out[i] = _number(_U32(first + i), key_a, key_b)


@kernel
def fill_rows(out: np.ndarray, first: int, step: int, key_a: np.uint32, key_b: np.uint32) -> None:
    """Write numbers of the same stream to rows of out, float64: row r from number first + r * step
    on.
    """
    for r in range(out.shape[0]):
        row, begin = out[r], first + r * step
        for i in range(row.shape[0]):
            row[i] = _number(_U32(begin + i), key_a, key_b)


@kernel
def checksum(words: np.ndarray, first: int) -> np.uint64:
    """Return the sum of words times odd weights that follow from their places first, first + 1 ...,
    modulo 2^64.

    Sums of pieces add up to that of the whole, in any order. One changed word always changes the
    sum; two or more go unnoticed as often as a guess of 64 bits is right.
    """
    total = _U64(0)
    for i in range(words.shape[0]):
        weight = _U64(first + i) * _U64(0x9E3779B97F4A7C15)
        weight = (weight ^ (weight >> _U64(29))) * _U64(0xBF58476D1CE4E5B9)
        total += _U64(words[i]) * ((weight ^ (weight >> _U64(32))) | _U64(1))
    return total


@kernel
def first_with(words: np.ndarray, mask: int) -> int:
    """Return the place of the first word that has all bits of the mask, -1 if none has: the mask is
    a dtype's exponent.
    """
    found = False
    for i in range(words.shape[0]):  # without a way out: only so it becomes vector code
        found |= (words[i] & mask) == mask
    if found:
        for i in range(words.shape[0]):
            if (words[i] & mask) == mask:
                return i
    return -1
