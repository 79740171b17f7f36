"""Progress without a parameter: loops over tokens call `advance`, a listener opens `reporting`.

The callback lives in a context variable, so that no signature between the command line and the
chunk loop has to carry it, and two threads that compute at once report to separate listeners.
Without a listener `advance` costs one look-up per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["advance", "reporting"]

_listener: ContextVar[Callable[[int], object] | None] = ContextVar(
    "racecore_progress", default=None
)


def advance(n_tokens: int) -> None:
    """Report to the listener of this context, if any, one pass over `n_tokens` more tokens."""
    listener = _listener.get()
    if listener is not None:
        listener(n_tokens)


@contextmanager
def reporting(callback: Callable[[int], object]) -> Iterator[None]:
    """Send every `advance` of this context to `callback` until the block ends."""
    token = _listener.set(callback)
    try:
        yield
    finally:
        _listener.reset(token)
