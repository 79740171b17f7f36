"""Kernels over every number of a chunk: generate it, add it to a checksum, test it for NaN and
infinity. All run without Python's lock.

Numbers are addressed by their position in the whole array, never in the chunk, so results do not
depend on how an array is cut into chunks.
"""

from __future__ import annotations

import numpy as np

from racecore.runtime.jit import helper, kernel

__all__ = ["checksum", "fill", "fill_rows", "first_with_bits"]

_U32, _U64 = np.uint32, np.uint64
# Mean of the sum of four 7-bit integers (4 * 63.5), and the spacing of the generated values.
_MEAN = np.float32(254)
_SPACING = np.float32(1 / 64)


@helper
def _random_number(counter: np.uint32, key_a: np.uint32, key_b: np.uint32) -> np.float32:
    """Return the number of a stream at a 32-bit counter."""
    # A mixer of xor-shifts and odd multiplications: a bijection of 32 bits for any pair of keys.
    x = counter ^ key_a
    x = _U32(x ^ (x >> _U32(16)))
    x = _U32(x * _U32(0x7FEB352D))
    x = _U32(_U32(x ^ (x >> _U32(15))) + key_b)
    x = _U32(x * _U32(0x846CA68B))
    x = _U32(x ^ (x >> _U32(16)))
    # Add the four groups of seven bits, two at a time within one word.
    x = _U32((x & _U32(0x007F007F)) + ((x >> _U32(8)) & _U32(0x007F007F)))
    x = _U32((x & _U32(0xFFFF)) + (x >> _U32(16)))
    return (np.float32(np.int32(x)) - _MEAN) * _SPACING


@kernel
def fill(out: np.ndarray, first: int, key_a: np.uint32, key_b: np.uint32) -> None:
    """Write the numbers first, first + 1 ... of a random stream to out, float32.

    The range may not cross a multiple of 2^32, the period of the counter. A mixer of 32 bits with
    two keys maps the counter to a word; the sum of four groups of seven bits of that word gives
    multiples of 1/64 from -3.97 to 3.97, nearly normally distributed and exact in every dtype.
    """
    for i in range(out.shape[0]):
        out[i] = _random_number(_U32(first + i), key_a, key_b)


@kernel
def fill_rows(out: np.ndarray, first: int, step: int, key_a: np.uint32, key_b: np.uint32) -> None:
    """Write rows of the same stream to out, float64 [rows, dim]: row r starts at number
    first + r * step.
    """
    for r in range(out.shape[0]):
        row = out[r]
        begin = first + r * step
        for i in range(row.shape[0]):
            row[i] = _random_number(_U32(begin + i), key_a, key_b)


@kernel
def checksum(words: np.ndarray, first: int) -> np.uint64:
    """Return the weighted sum of words modulo 2^64, with odd weights derived from their positions
    first, first + 1 ...

    The checksums of parts add up to that of the whole, in any order. One changed word always
    changes the sum; several changed words go unnoticed with probability 2^-64.
    """
    total = _U64(0)
    for i in range(words.shape[0]):
        # The weight depends on the position, so exchanged words are noticed. It is odd, hence
        # invertible modulo 2^64: a change of one word cannot cancel.
        weight = _U64(first + i) * _U64(0x9E3779B97F4A7C15)
        weight = (weight ^ (weight >> _U64(29))) * _U64(0xBF58476D1CE4E5B9)
        total += _U64(words[i]) * ((weight ^ (weight >> _U64(32))) | _U64(1))
    return total


@kernel
def first_with_bits(words: np.ndarray, mask: int) -> int:
    """Return the index of the first word with all bits of the mask, -1 if there is none.

    With the exponent bits of a dtype as the mask, that is the first NaN or infinity.
    """
    found = False
    # No early exit: only then is the loop vectorised. The exact index is searched afterwards.
    for i in range(words.shape[0]):
        found |= (words[i] & mask) == mask
    if found:
        for i in range(words.shape[0]):
            if (words[i] & mask) == mask:
                return i
    return -1
