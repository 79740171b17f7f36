"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere, nothing for what takes a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from racecore import progress

__all__ = ["token_bar"]

SECONDS_UNTIL_BAR = 1.0
SECONDS_BETWEEN_LINES = 10.0
_FORMAT = "{desc} {percentage:3.0f} % |{bar}| {elapsed} gone, {remaining} left"


@contextmanager
def token_bar(label: str, total: int) -> Iterator[None]:
    """Show how far the attention calls inside the block are.

    Parameters
    ----------
    label : str
        What is being done.
    total : int
        Tokens, counted once for every pass over them.
    """
    if not sys.stderr.isatty():
        with progress.reporting(_lines(label, total)):
            yield
        return
    from tqdm import tqdm

    options = {"delay": SECONDS_UNTIL_BAR, "miniters": 1, "leave": False, "bar_format": _FORMAT}
    with tqdm(total=total, desc=label, file=sys.stderr, **options) as bar:

        def advance(n_tokens: int) -> None:
            bar.update(min(n_tokens, bar.total - bar.n))

        with progress.reporting(advance):
            yield


def _lines(label: str, total: int) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(n_tokens: int) -> None:
        nonlocal done, last
        done = min(done + n_tokens, total)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{label}: {done / max(total, 1):.0%} after {now - started:.0f} s", file=sys.stderr, flush=True)

    return advance
