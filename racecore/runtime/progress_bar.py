"""Progress on stderr: a bar on a terminal, a plain line every ten seconds elsewhere, nothing for
work of less than a second.
"""

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
_FORMAT = "{desc} {percentage:3.0f} % |{bar}| {elapsed} elapsed, {remaining} left{postfix}"


@contextmanager
def token_bar(label: str, total: int, n_tokens: int | None = None) -> Iterator[None]:
    """Show the progress and speed of the attention calls in a block, and the anonymous memory of
    the process.

    Parameters
    ----------
    label : str
        Description of the work.
    total : int
        Tokens, counted once for every pass over them.
    n_tokens : int, optional
        Tokens, counted once: the speed is shown in these. None means that there is one pass.
    """
    # Progress is counted per pass, the speed is that of whole tokens.
    tokens_per_step = 1.0 if n_tokens is None or total == 0 else n_tokens / total
    if not sys.stderr.isatty():
        with progress.reporting(_lines(label, total, tokens_per_step)):
            yield
        return
    from tqdm import tqdm

    options = {"delay": SECONDS_UNTIL_BAR, "miniters": 1, "leave": False, "bar_format": _FORMAT}
    with tqdm(total=total, desc=label, file=sys.stderr, **options) as bar:

        def advance(n_steps: int) -> None:
            """Move the bar."""
            # The recent rate, as tqdm smooths it.
            rate = bar.format_dict["rate"]
            speed = f"{rate * tokens_per_step:,.0f} tokens/s, " if rate else ""
            bar.set_postfix_str(f"{speed}{_megabytes()}", refresh=False)
            bar.update(min(n_steps, bar.total - bar.n))

        with progress.reporting(advance):
            yield


def _lines(label: str, total: int, tokens_per_step: float) -> Callable[[int], None]:
    """Return a callback that prints a line every few seconds."""
    started = time.monotonic()
    # Time and progress at the last line: the rate is that since then.
    last, done_at_last = started, 0
    done = 0

    def advance(n_steps: int) -> None:
        """Count, and print a line if the last one is old enough."""
        nonlocal done, done_at_last, last
        done = min(done + n_steps, total)
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        rate = (done - done_at_last) / max(now - last, 1e-9)
        left = f"{(total - done) / rate:,.0f} s left, " if rate > 0 else ""
        print(
            f"{label}: {done / max(total, 1):.0%} after {now - started:.0f} s, "
            f"{left}{rate * tokens_per_step:,.0f} tokens/s, "
            f"{_megabytes()}",
            file=sys.stderr,
            flush=True,
        )
        last, done_at_last = now, done

    return advance


def _megabytes() -> str:
    return f"{anonymous_bytes() / 1e6:,.0f} MB"
