"""Results of `socket_study.py`, and their tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """Result of one method on one part of the caches, for one number of tokens."""

    bench: str
    table: str  # the setting that was varied
    part: str
    method: str
    settings: dict[str, Any]
    n_bytes: float  # per token and key/value head, beside the cache
    kept: int  # one token in so many was selected
    ends: tuple[int, int]  # first and last tokens selected by position
    mass: list[float]  # for every seed, means over queries
    error: list[float]


class Needles(NamedTuple):
    """Ranks of the needles by one method, over all seeds."""

    method: str
    n_bytes: float
    likeness: np.ndarray  # [N] cosine of query and needle
    ranks: np.ndarray  # [N] of the needle among all tokens, 1 is the best


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these fields, or settings."""
    return [
        row
        for row in rows
        if all(
            getattr(row, name) == x if name in Row._fields else row.settings.get(name) == x
            for name, x in wanted.items()
        )
    ]


def per_seed(rows: Sequence[Row], number: str) -> np.ndarray:
    """Return the mean over parts of "mass" or "error", for every seed."""
    return np.array([getattr(row, number) for row in rows]).mean(axis=0)


def spread(values: np.ndarray, factor: float, digits: int) -> str:
    """Return mean ± standard deviation over seeds."""
    return f"{factor * values.mean():.{digits}f} ± {factor * values.std():.{digits}f}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"


def both(
    title: str,
    head: Sequence[str],
    names: Sequence[str],
    columns: Sequence[Callable[[str], list[Row]]],
    oracle: Sequence[list[Row]],
) -> str:
    """Return a table of mass, relative to the oracle, and one of errors, by method."""
    text = ""
    for number, heading in (
        ("mass", "softmax weight kept, % of the oracle's"),
        ("error", "relative error of the output"),
    ):
        lines = []
        for name in names:
            cells = [name]
            for column, best in zip(columns, oracle, strict=True):
                values = per_seed(column(name), number)
                if number == "mass" and name == "oracle":
                    cells.append(f"({100 * values.mean():.1f} of all)")
                else:
                    cells.append(
                        spread(values / per_seed(best, "mass"), 100, 1)
                        if number == "mass"
                        else spread(values, 1, 3)
                    )
            lines.append(cells)
        text += f"\n**{title}: {heading}**\n\n" + markdown([*head], lines)
    return text


def by_budget(rows: list[Row], bench: str) -> str:
    """Return the tables over budgets."""
    found = pick(rows, bench=bench, table="methods")
    names, kept = (
        list(dict.fromkeys(row.method for row in found)),
        sorted({row.kept for row in found}),
    )
    columns = [lambda name, few=few: pick(found, method=name, kept=few) for few in kept]
    oracle = [pick(found, method="oracle", kept=few) for few in kept]
    return both(
        f"{bench}, one token in so many", ["", *(f"{few}" for few in kept)], names, columns, oracle
    )


def by_part(rows: list[Row], bench: str) -> str:
    """Return the tables over parts, with one token in 20."""
    found = pick(rows, bench=bench, table="methods", kept=20)
    names, parts = (
        list(dict.fromkeys(getattr(row, field) for row in found)) for field in ("method", "part")
    )
    columns = [lambda name, part=part: pick(found, method=name, part=part) for part in parts]
    oracle = [pick(found, method="oracle", part=part) for part in parts]
    return both(f"{bench}, one token in 20", ["", *parts], names, columns, oracle)


def by_size(rows: list[Row]) -> str:
    """Return the tables over bytes per token."""
    benches, lines = list(dict.fromkeys(row.bench for row in rows)), []
    found = pick(rows, table="size")
    for name, settings in dict.fromkeys((row.method, tuple(row.settings.items())) for row in found):
        mine = pick(found, method=name, settings=dict(settings))
        tables = dict(settings).get("n_tables")
        label = f"{name}, L = {tables}, P = 8" if tables else name
        values = [
            per_seed(pick(mine, bench=bench), number)
            for bench in benches
            for number in ("mass", "error")
        ]
        cells = [spread(x, *((1, 3) if i % 2 else (100, 1))) for i, x in enumerate(values)]
        lines.append([label, f"{mine[0].n_bytes:.0f}", *cells])
    lines.sort(key=lambda cells: float(cells[1]))
    head = [
        "",
        "bytes per token",
        *(f"{bench}: {what}" for bench in benches for what in ("weight kept, %", "error")),
    ]
    return "\n**one token in 20, by size**\n\n" + markdown(head, lines)


def by_tau(rows: list[Row], bench: str) -> str:
    """Return the tables over the temperature of "soft" and planes; 60 bytes of codes each."""
    found = pick(rows, bench=bench, table="tau")
    taus = sorted({row.settings["tau"] for row in found})
    lines = []
    for name, planes, tables in dict.fromkeys(
        (r.method, r.settings["n_planes"], r.settings["n_tables"]) for r in found
    ):
        cells = (
            per_seed(pick(found, method=name, n_planes=planes, tau=tau), "error") for tau in taus
        )
        lines.append([f"{name}, P = {planes}, L = {tables}", *(spread(x, 1, 3) for x in cells)])
    return f"\n**{bench}, one token in 20: relative error by tau**\n\n" + markdown(
        ["tau", *map(str, taus)], lines
    )


def by_ends(rows: list[Row], bench: str) -> str:
    """Return the tables with some tokens selected by position in place of the lowest scores."""
    found = pick(rows, bench=bench, table="ends")
    names = list(dict.fromkeys(row.method for row in found))
    lines = []
    for ends in dict.fromkeys(row.ends for row in found):
        cells = [per_seed(pick(found, ends=ends, method=name), "error") for name in names]
        lines.append([f"{ends[0]} first, {ends[1]} last", *(spread(x, 1, 3) for x in cells)])
    return f"\n**{bench}, one token in 20 in all: relative error**\n\n" + markdown(
        ["of which", *names], lines
    )


PAIRS = (
    ("signed_jl", "hamming"),
    ("hamming", "soft"),
    ("signed_jl", "signed_jl, values weighted"),
    ("hamming", "hamming, values weighted"),
    ("soft", "soft, values weighted"),
    ("signed_jl", "Quest, pages of 4"),
    ("oracle", "oracle, weights times norms"),
)


def by_pairs(rows: list[Row]) -> str:
    """Return how often the first of two methods is better, over parts, budgets and seeds."""
    found = [row for row in pick(rows, table="methods") if row.kept > 1]
    lines = []
    for first, second in PAIRS:
        cells = [f"{first}, not {second}"]
        for number, sign in (("mass", 1), ("error", -1)):
            ours, theirs = (
                np.array([getattr(row, number) for row in pick(found, method=m)])
                for m in (first, second)
            )
            cells.append(f"{int((sign * (ours - theirs) > 0).sum())} of {ours.size}")
        lines.append(cells)
    return "\n**how often the first is better**\n\n" + markdown(["", "weight kept", "error"], lines)


def of_needles(found: list[Needles]) -> str:
    """Return the ranks of the needles: median and worst."""
    likeness = sorted(set(found[0].likeness.tolist()))
    lines = []
    for needles in found:
        cells = (needles.ranks[needles.likeness == np.float32(x)] for x in likeness)
        lines.append(
            [
                needles.method,
                f"{needles.n_bytes:.0f}",
                *(f"{np.median(x):,.0f} / {x.max():,}" for x in cells),
            ]
        )
    head = ["", "bytes per token", *(f"cosine {x:.1f}" for x in likeness)]
    return "\n**haystack: rank of the needle, median / worst**\n\n" + markdown(head, lines)
