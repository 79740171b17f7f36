"""Pictures of the tables of `socket_study.py`."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pictures
from socket_tables import Needles, Row, per_seed, pick

DRAWN = (
    "oracle",
    "signed_jl",
    "hamming",
    "soft",
    "soft, values weighted",
    "Quest, pages of 16",
    "Quest, pages of 4",
    "random",
)


def draw(rows: list[Row], needles: list[Needles], folder: pathlib.Path) -> None:
    """Draw all pictures."""
    benches = list(dict.fromkeys(row.bench for row in rows))
    figure = pictures.new_figure(9, 6.4)
    if figure is None:
        return
    if rows:
        axes = figure.subplots(len(benches), 2, squeeze=False)
        draw_budgets(axes, rows, benches)
        legend(figure, axes[0, 0])
        pictures.save(figure, folder / "budgets")
        figure = pictures.new_figure(9, 3.6)
        draw_sizes(figure.subplots(1, len(benches), squeeze=False)[0], rows, benches)
        pictures.save(figure, folder / "sizes")
    if needles:
        figure = pictures.new_figure(7, 4.2)
        axes = figure.subplots()
        draw_needles(axes, needles)
        legend(figure, axes)
        pictures.save(figure, folder / "needles")


def legend(figure: Any, axes: Any) -> None:
    """Place the legend under the picture: it is too large for a corner."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
    )


def draw_budgets(axes: Any, rows: list[Row], benches: list[str]) -> None:
    """Draw weight kept and error against the budget."""
    for bench, pair in zip(benches, axes, strict=True):
        for number, label, ax in zip(
            ("mass", "error"), ("share of softmax weight", "relative error"), pair, strict=True
        ):
            found = pick(rows, bench=bench, table="methods")
            kept = sorted({row.kept for row in found})
            lines = {
                name: [
                    (few, per_seed(pick(found, method=name, kept=few), number).mean())
                    for few in kept
                ]
                for name in DRAWN
            }
            pictures.curves(ax, lines, ("one token in so many", label), bench)
            pictures.scale(ax, kept, both=number == "error")


def draw_sizes(axes: Any, rows: list[Row], benches: list[str]) -> None:
    """Draw the error against bytes a token."""
    names = ("signed_jl", "hamming", "soft", "Quest")
    colours = [pictures.COLOURS[i] for i in (1, 2, 3, 5)]  # as in the other pictures
    for bench, ax in zip(benches, axes, strict=True):
        found = pick(rows, bench=bench, table="size")
        lines = {}
        for name in names:
            mine = [row for row in found if row.method.partition(",")[0] == name]
            sizes = sorted({row.n_bytes for row in mine})
            lines[name] = [
                (size, per_seed(pick(mine, n_bytes=size), "error").mean()) for size in sizes
            ]
        pictures.curves(
            ax, lines, ("bytes per token", "relative error"), f"{bench}, one token in 20", colours
        )
        pictures.scale(ax, [8, 16, 32, 64, 128])
    axes[0].legend(frameon=False)


def draw_needles(axes: Any, found: list[Needles]) -> None:
    """Draw the fraction of needles with the smallest cosine among the top n tokens."""
    budgets = 2 ** np.arange(0, 17, 2)
    lines = {}
    for needles in found:
        if needles.method in DRAWN:
            ranks = needles.ranks[needles.likeness == needles.likeness.min()]
            lines[needles.method] = [(int(n), float((ranks <= n).mean())) for n in budgets]
    ordered = {name: lines[name] for name in DRAWN}
    pictures.curves(axes, ordered, ("tokens attended to", "share of needles found"))
    pictures.scale(axes, budgets.tolist())
