"""The exceptions that are racecore's own. Everything else is the standard ValueError, TypeError or
OSError.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "BackendUnavailableError",
    "CorruptFileError",
    "InputChangedError",
    "NonFiniteError",
    "OutputInUseError",
]


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here.

    Parameters
    ----------
    wanted : str
        Name of the backend that was asked for.
    reasons : mapping of str to (str or None)
        For every backend the reason why it cannot run, or None where it can.

    Attributes
    ----------
    wanted, reasons
        As passed.
    """

    def __init__(self, wanted: str, reasons: Mapping[str, str | None]) -> None:
        self.wanted = wanted
        self.reasons = dict(reasons)
        lines = "\n".join(
            f"  {name}: {reason or 'available'}" for name, reason in self.reasons.items()
        )
        super().__init__(f"backend {wanted!r} cannot run here. All backends:\n{lines}")

    def __reduce__(self) -> tuple[type[BackendUnavailableError], tuple[str, dict[str, str | None]]]:
        return type(self), (self.wanted, self.reasons)


class CorruptFileError(ValueError):
    """A saved hash or state does not match its own checksum, or is not one of racecore's files at
    all.
    """


class NonFiniteError(ValueError):
    """An input holds NaN or infinity; the message names the first place."""


class OutputInUseError(OSError):
    """Another run is writing the same output."""


class InputChangedError(OSError):
    """A file that is being read is not what it was when the run began."""
