"""Refuse NaN and infinity in the inputs, and name the first such number."""

from __future__ import annotations

import numpy as np

from racecore.errors import NonFiniteError
from racecore.outofcore.sources import TokenSource
from racecore.runtime import arrays

__all__ = ["refuse_non_finite"]

# Exponent bits by item size: a number with all of them set is NaN or infinite.
_EXPONENTS = {2: 0x7C00, 4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}
_BFLOAT16_EXPONENT = 0x7F80


def refuse_non_finite(
    source: TokenSource, begin: int, rows: np.ndarray, mask: np.ndarray | None
) -> None:
    """Raise an error if rows of a source are not finite.

    Parameters
    ----------
    source : TokenSource
    begin : int
        Number of the first token.
    rows : array, shape [tokens, heads, dim]
    mask : bool array, shape [tokens], or None
        Tokens that are False are not checked.

    Raises
    ------
    racecore.errors.NonFiniteError
        Names array, token, head and dimension of the first such number.
    """
    start = 0
    while start < len(rows):
        index = _first_non_finite(rows[start:])
        if index is None:
            return
        token, head, dim = index
        token += start
        # Masked keys and values take no part, whatever they hold.
        if mask is not None and not mask[token]:
            start = token + 1
            continue
        row, position = divmod(begin + token, source.shape[-3])
        batch = f"batch row {row}, " if len(source.shape) == 4 else ""
        raise NonFiniteError(
            f"{source.name} is {float(rows[token, head, dim])} at {batch}token {position}, head "
            f"{head}, dimension {dim}; "
            "all inputs must be finite (check_finite=False leaves out this check)"
        )


def _first_non_finite(rows: np.ndarray) -> tuple[int, int, int] | None:
    """Return the indices of the first number that is not finite."""
    from racecore.outofcore import loops

    size = rows.dtype.itemsize
    exponent = _BFLOAT16_EXPONENT if arrays.is_bfloat16(rows.dtype) else _EXPONENTS[size]
    words = np.ascontiguousarray(rows).reshape(-1).view(f"u{size}")
    first = loops.first_with_bits(words, words.dtype.type(exponent))
    if first < 0:
        return None
    token, head, dim = (int(i) for i in np.unravel_index(first, rows.shape))
    return token, head, dim
