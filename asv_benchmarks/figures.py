"""The raw figures of one comparison, and look-ups in them."""

from __future__ import annotations

from typing import Any

from cases import Case
from ceilings import floor

__all__ = ["Figures"]

# Reasons why a sweep ended, as the table prints them.
_MARKS = {"time": "too slow", "memory": "memory", "out of memory": "memory"}


class Figures:
    """Look-ups in the raw figures of one run."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self._runs = {(Case.of(run), run["tokens"]): run for run in data["runs"]}
        self.cases = list(
            dict.fromkeys(Case.of(record) for record in [*data["runs"], *data["stopped"]])
        )
        self.lengths = sorted({run["tokens"] for run in data["runs"]})

    def get(self, case: Case, tokens: int, what: str = "seconds") -> float | None:
        """Return one figure, None where it was not measured."""
        run = self._runs.get((case, tokens))
        return None if run is None else run[what]

    def of(self, method: str, causal: bool) -> list[Case]:
        """Return the cases of a method in one direction."""
        return [case for case in self.cases if case.method == method and case.causal == causal]

    def common(self, wanted: float, *cases: Case) -> int | None:
        """Return `wanted`, or the longest shorter length that all the cases were measured at."""
        shared = [
            n
            for n in self.lengths
            if n <= wanted and all((case, n) in self._runs for case in cases)
        ]
        return max(shared, default=None)

    def nanoseconds(self, case: Case, tokens: int) -> float:
        """Return nanoseconds per token and head."""
        setting = self.data["setting"]
        return (
            self._runs[case, tokens]["seconds"]
            / (tokens * setting["batch"] * setting["heads"])
            * 1e9
        )

    def rounds(self) -> list[tuple[Case, list[float], list[float]]]:
        """Return, for every case below the roofline, nanoseconds per token and head and the share
        of each round.

        The share is the least time at the ceilings of the same round divided by the measured time.
        """
        found: dict[Case, tuple[list[float], list[float]]] = {}
        for measured in self.data["rounds"]:
            for run in measured["runs"]:
                case = Case("racecore", run["causal"], run["tables"], run["planes"])
                least = floor(
                    case.tables,
                    case.planes,
                    case.causal,
                    self.data["setting"]["dim"],
                    measured["ceilings"],
                )
                seconds = run["seconds"] / (
                    run["tokens"] * self.data["setting"]["batch"] * run["heads"]
                )
                times, shares = found.setdefault(case, ([], []))
                times.append(seconds * 1e9)
                shares.append(least / seconds)
        return [(case, times, shares) for case, (times, shares) in found.items()]

    def mark(self, case: Case, tokens: int) -> str:
        """Return why a figure is missing."""
        for stop in self.data["stopped"]:
            if Case.of(stop) == case and tokens >= stop["tokens"]:
                return _MARKS.get(stop["reason"].partition(":")[0].partition(" (")[0], "failed")
        return ""
