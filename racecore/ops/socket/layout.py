"""How a SOCKET index lies in memory, and the records that its operations share; plain NumPy.

A key's code in a table is P bits. They are cut into *digits* of four bits, the lowest first: P = 8
has two, P = 10 three, of which the last is 2 bits wide. A query has a table of 16 numbers per
digit, which is one vector register of float32.

Tokens are stored in blocks of 64, a cache line for each row of a block::

    rows 0 ... L - 1      the two lowest digits of every table: a byte a token
    the rows after those  the bits above, `high_bits` for each table: 8 // high_bits tables a byte

so an index takes one byte a token and table for P <= 8, and 8 + high_bits bits for more planes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = [
    "BLOCK_TOKENS",
    "DIGIT_BITS",
    "DIGIT_VALUES",
    "HashedKeys",
    "Scorer",
    "from_norm16",
    "high_bits",
    "n_digits",
    "n_rows",
    "to_norm16",
]

BLOCK_TOKENS = 64
DIGIT_BITS, DIGIT_VALUES = 4, 16
_LOW_BITS = 8
# of a norm, with the bias of float32
_LOWEST_EXPONENT = 127 - 32


class Scorer(NamedTuple):
    """How a query scores the bits of a key."""

    kind: str  # "soft", "hamming" or "signed_jl"
    tau: float  # temperature of "soft"
    weighs_values: bool  # scores are multiplied by ||v||

    @property
    def multiplies(self) -> bool:
        """Whether the digits of a table are multiplied; else they are added."""
        return self.kind == "soft"

    @property
    def weighs_keys(self) -> bool:
        """Whether scores are multiplied by ||k||."""
        return self.kind == "signed_jl"


class HashedKeys(NamedTuple):
    """Codes and norms of the keys and values of a batch, with capacity for more tokens."""

    codes: np.ndarray  # uint8 [B, G, blocks, rows, 64]
    norms: np.ndarray  # uint16 [B, G, blocks * 64]: factors of the scores, see `to_norm16`
    lengths: np.ndarray  # int64 [B]
    n_tables: int  # L
    n_planes: int  # P


def high_bits(n_planes: int) -> int:
    """Return the bits of a code above its lowest 8, rounded up to 1, 2, 4 or 8."""
    more = max(0, n_planes - _LOW_BITS)
    return more if more <= 2 else (4 if more <= 4 else 8)


def n_rows(n_tables: int, n_planes: int) -> int:
    """Return the bytes of a token's codes."""
    return n_tables + -(-n_tables * high_bits(n_planes) // 8)


def n_digits(n_planes: int) -> int:
    """Return the number of digits of a code; at least two, of which the second may be constant."""
    return max(2, -(-n_planes // DIGIT_BITS))


def to_norm16(norm: np.ndarray) -> np.ndarray:
    """Round float64 norms to 16 bits: 6 of exponent and 10 of fraction, to nearest, ties to even.

    The relative error is at most 2^-11, as in float16, but from 2^-32 to 2^32. Smaller norms become
    0, larger ones the largest number; so do infinity and NaN, so that a token that holds them is
    selected and its NaN stays visible.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.asarray(norm, np.float64).astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0xFFF + (bits >> 13 & 1)) >> 13
    return np.clip(rounded - (_LOWEST_EXPONENT << 10), 0, 0xFFFF).astype(np.uint16)


def from_norm16(norm: np.ndarray) -> np.ndarray:
    """Return the float32 numbers of 16-bit norms."""
    bits = (norm.astype(np.uint32) << 13) + np.uint32(_LOWEST_EXPONENT << 23)
    return np.where(norm == 0, np.uint32(0), bits).astype(np.uint32).view(np.float32)
