"""The anonymous memory of this process."""

from __future__ import annotations

import threading

__all__ = ["PeakMemory", "anonymous_bytes"]

_SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process in bytes (no pages of files); 0 if unknown."""
    try:
        with open("/proc/self/status") as file:
            return next(
                (int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:")), 0
            )
    except OSError:
        return 0


class PeakMemory:
    """Watch the anonymous memory of this process while a block runs.

    Attributes
    ----------
    peak : int
        Bytes.
    """

    def __enter__(self) -> PeakMemory:
        self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="racecore-memory", daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._watcher.join()
        self.peak = max(self.peak, anonymous_bytes())
