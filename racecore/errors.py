"""The exceptions of racecore; every other error is a ValueError, a TypeError or an OSError."""

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
    """The requested backend cannot run here.

    Parameters
    ----------
    wanted : str
        Name of the requested backend.
    reasons : mapping of str to (str or None)
        For every backend the reason why it cannot run, or None if it can.

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
    """A file is not one that racecore saved, or does not match its checksum."""


class NonFiniteError(ValueError):
    """An input holds NaN or infinity; the message names the first index."""


class OutputInUseError(OSError):
    """Another run is writing the same output."""


class InputChangedError(OSError):
    """An input file has changed since the run began."""
