"""Named steps of a run, at each of which tests kill the process by replacing `reached`."""

from __future__ import annotations

__all__ = ["NAMES", "reached"]

NAMES = (
    "journal begun",
    "outputs reserved",
    "state written",
    "one array written",
    "rows written",
    "line half written",
    "line written",
    "all tasks done",
    "outputs on the disk",
    "completion noted",
    "one output named",
    "outputs named",
    "states removed",
)


def reached(name: str) -> None:
    """Do nothing; called when the run reaches the crash point `name`."""
