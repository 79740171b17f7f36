"""Looking for NaN and infinity in what was read, and naming the first place."""

from __future__ import annotations

import numpy as np

from racecore.errors import NonFiniteError
from racecore.outofcore.sources import Source
from racecore.runtime import arrays

__all__ = ["refuse_non_finite"]

_EXPONENTS = {2: 0x7C00, 4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}  # all ones: not a finite number
_BFLOAT16_EXPONENT = 0x7F80


def refuse_non_finite(
    source: Source, begin: int, rows: np.ndarray, mask: np.ndarray | None
) -> None:
    """Refuse rows [tokens, heads, dim], from token `begin` of a source on, that are not finite.

    Parameters
    ----------
    mask : bool array, shape [tokens], or None
        What stands under False does not matter.

    Raises
    ------
    racecore.errors.NonFiniteError
        Names array, token, head and dimension of the first such number.
    """
    start = 0
    while start < len(rows):
        place = _first(rows[start:])
        if place is None:
            return
        token, head, dim = place
        token += start
        if mask is not None and not mask[token]:
            start = token + 1
            continue
        row, where = divmod(begin + token, source.shape[-3])
        batch = f"batch row {row}, " if len(source.shape) == 4 else ""
        raise NonFiniteError(
            f"{source.name} is {float(rows[token, head, dim])} at {batch}token {where}, head "
            f"{head}, dimension {dim}; "
            "all inputs must be finite (check_finite=False computes on, as NumPy would)"
        )


def _first(rows: np.ndarray) -> tuple[int, int, int] | None:
    """Return the indices of the first number that is not finite."""
    from racecore.outofcore import loops

    contiguous = np.ascontiguousarray(rows)
    size = rows.dtype.itemsize
    exponent = _BFLOAT16_EXPONENT if arrays.is_bfloat16(rows.dtype) else _EXPONENTS[size]
    words = contiguous.reshape(-1).view(f"u{size}")
    place = loops.first_with(words, words.dtype.type(exponent))
    return None if place < 0 else tuple(int(i) for i in np.unravel_index(place, rows.shape))  # type: ignore[return-value]
