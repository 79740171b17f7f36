"""The same values in every memory layout that a caller may pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["LAYOUTS", "arrange"]


def _contiguous(array: np.ndarray) -> np.ndarray:
    return array.copy()


def _strided(array: np.ndarray) -> np.ndarray:
    """Take every other element of the last axis and every third of the token axis, with rubbish in
    between.
    """
    store = np.full(
        (*array.shape[:-3], 3 * array.shape[-3], array.shape[-2], 2 * array.shape[-1]),
        np.nan,
        array.dtype,
    )
    view = store[..., 1::3, :, ::2]
    view[...] = array
    return view


def _transposed(array: np.ndarray) -> np.ndarray:
    """Store heads before tokens, as most frameworks do."""
    return array.swapaxes(-3, -2).copy().swapaxes(-3, -2)


def _reversed(array: np.ndarray) -> np.ndarray:
    """Run backwards through memory on every axis."""
    backwards = (slice(None, None, -1),) * array.ndim
    return array[backwards].copy()[backwards]


def _fortran(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def _read_only(array: np.ndarray) -> np.ndarray:
    frozen = array.copy()
    frozen.flags.writeable = False
    return frozen


def _byte_swapped(array: np.ndarray) -> np.ndarray:
    """Store the other byte order. bfloat16 has only one in NumPy: it stays as it is."""
    return array.astype(array.dtype.newbyteorder("S")) if array.dtype.kind == "f" else array.copy()


def _broadcast_heads(array: np.ndarray) -> np.ndarray:
    """Repeat the first head by a stride of 0. This changes values, as the next one does."""
    return np.broadcast_to(array[..., :1, :], array.shape)


def _broadcast_tokens(array: np.ndarray) -> np.ndarray:
    """Repeat the first token by a stride of 0."""
    return np.broadcast_to(array[..., :1, :, :], array.shape) if array.shape[-3] else array.copy()


def _unaligned(array: np.ndarray) -> np.ndarray:
    """Start at an odd address."""
    store = np.zeros(array.nbytes + 1, np.uint8)
    view = store[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": _contiguous,
    "strided": _strided,
    "transposed": _transposed,
    "reversed": _reversed,
    "fortran": _fortran,
    "read_only": _read_only,
    "byte_swapped": _byte_swapped,
    "broadcast_heads": _broadcast_heads,
    "broadcast_tokens": _broadcast_tokens,
    "unaligned": _unaligned,
}


def arrange(array: np.ndarray, layout: str) -> np.ndarray:
    """Return `array` [..., T, heads, dim] in the layout called `layout`."""
    return LAYOUTS[layout](array)
