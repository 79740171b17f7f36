"""Progress reports without a parameter: loops over tokens call `advance`, and `reporting` sets the
function that receives the reports.

The callback is kept in a context variable, so that no signature between the command line and the
loop over chunks has to pass it on, and two threads that compute at once report to their own
callbacks. Without a callback `advance` costs one look-up per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["advance", "reporting"]

_callback: ContextVar[Callable[[int], object] | None] = ContextVar(
    "racecore_progress", default=None
)


def advance(n_tokens: int) -> None:
    """Report that one pass over `n_tokens` more tokens is done, if this context has a callback."""
    callback = _callback.get()
    if callback is not None:
        callback(n_tokens)


@contextmanager
def reporting(callback: Callable[[int], object]) -> Iterator[None]:
    """Send every `advance` of this context to `callback` until the block ends."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)
