"""The methods that are compared, their names in the table, and their encoding for subprocesses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["BATCH", "DIM", "HASHES", "HEADS", "METHODS", "Case", "Setting", "all_cases"]

BATCH, HEADS, DIM = 1, 4, 128  # of the comparison: the setting of the paper's scaling study
HASHES = ((2, 2), (3, 3), (4, 4))  # the published (L, P)
METHODS = {
    "racecore": "racecore",
    "formula": "RACE formula in torch",
    "linear": "linear attention, torch",
    "performer": "Performer-256, torch",
    "softmax": "softmax (SDPA), torch",
}


@dataclass(frozen=True)
class Case:
    """One line of the table. L and P are 0 where there is no hash."""

    method: str
    causal: bool
    tables: int = 0
    planes: int = 0

    @property
    def label(self) -> str:
        """The name in the table, without its direction."""
        hash_of = f" ({self.tables}, {self.planes})" if self.tables else ""
        return METHODS[self.method] + hash_of

    @property
    def direction(self) -> str:
        """ "causal" or "bidirectional"."""
        return "causal" if self.causal else "bidirectional"

    @property
    def exponent(self) -> int:
        """Time grows with the length to this power."""
        return 2 if self.method == "softmax" else 1

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Case:
        """Return the case of a JSON record, which may have more fields."""
        return cls(*(record[name] for name in ("method", "causal", "tables", "planes")))


@dataclass(frozen=True)
class Setting:
    """How racecore is called in one measurement."""

    tokens: int
    causal: bool
    tables: int = 2
    planes: int = 2
    heads: int = HEADS
    dtype: str = "float32"
    threads: int | None = None  # None: the default of a user who sets nothing
    fresh_outputs: bool = (
        False  # allocate results at every call; otherwise write into those of the first call
    )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def all_cases(methods: list[str], hashes: tuple[tuple[int, int], ...] = HASHES) -> list[Case]:
    """Return every case of the chosen methods, in the order of the table. Performer is
    bidirectional only.
    """
    cases = []
    for causal in (False, True):
        for method in methods:
            if method in ("racecore", "formula"):
                cases += [Case(method, causal, tables, planes) for tables, planes in hashes]
            elif not (method == "performer" and causal):
                cases.append(Case(method, causal))
    return cases
