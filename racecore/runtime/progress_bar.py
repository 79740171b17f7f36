"""Progress on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from racecore.runtime import progress
from racecore.runtime.memory_use import anonymous_bytes

__all__ = ["token_bar"]

SECONDS_UNTIL_BAR = 1.0
SECONDS_BETWEEN_LINES = 10.0
_FORMAT = "{desc} {percentage:3.0f} % |{bar}| {elapsed} gone, {remaining} left{postfix}"


@contextmanager
def token_bar(label: str, total: int, n_tokens: int | None = None) -> Iterator[None]:
    """Show progress, speed and anonymous memory of the attention calls inside the block.

    Parameters
    ----------
    label : str
        Name of the work.
    total : int
        Tokens, counted once for every pass over them.
    n_tokens : int, optional
        Tokens, counted once, for the speed shown. None means that there is one pass.
    """
    share = 1.0 if n_tokens is None or total == 0 else n_tokens / total
    if not sys.stderr.isatty():
        with progress.reporting(_lines(label, total, share)):
            yield
        return
    from tqdm import tqdm

    options = {"delay": SECONDS_UNTIL_BAR, "miniters": 1, "leave": False, "bar_format": _FORMAT}
    with tqdm(total=total, desc=label, file=sys.stderr, **options) as bar:

        def advance(n_steps: int) -> None:
            """Move the bar."""
            # tqdm smooths it over recent steps
            rate = bar.format_dict["rate"]
            speed = f"{rate * share:,.0f} tokens/s, " if rate else ""
            bar.set_postfix_str(f"{speed}{_megabytes()}", refresh=False)
            bar.update(min(n_steps, bar.total - bar.n))

        with progress.reporting(advance):
            yield


def _lines(label: str, total: int, share: float) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = done_then = 0

    def advance(n_steps: int) -> None:
        """Count, and print a line if the last one is old."""
        nonlocal done, done_then, last
        done = min(done + n_steps, total)
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        rate = (done - done_then) / max(now - last, 1e-9)
        left = f"{(total - done) / rate:,.0f} s left, " if rate > 0 else ""
        print(
            f"{label}: {done / max(total, 1):.0%} after {now - started:.0f} s, "
            f"{left}{rate * share:,.0f} tokens/s, "
            f"{_megabytes()}",
            file=sys.stderr,
            flush=True,
        )
        last, done_then = now, done

    return advance


def _megabytes() -> str:
    return f"{anonymous_bytes() / 1e6:,.0f} MB"
