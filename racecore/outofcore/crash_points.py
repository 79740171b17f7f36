"""Named moments of a run at which it may be killed: tests put something in the place of `reached`
and kill it at each.
"""

from __future__ import annotations

__all__ = ["POINTS", "reached"]

POINTS = (
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


def reached(point: str) -> None:
    """Do nothing: the run is at this point."""
