"""The picture of a comparison: time against length on logarithmic axes, one panel per direction,
lines labelled directly.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from typing import TYPE_CHECKING, Any

from cases import Case

if TYPE_CHECKING:
    from report import Figures

__all__ = ["draw", "spread"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; two are darker, since text is
# drawn in them too. In grey, markers tell the lines apart.
_BLUE, _SKY, _VERMILION, _GREEN, _PURPLE, _ORANGE = (
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#B05A8A",
    "#C98A00",
)
_GREY = "#555555"
_STYLES: dict[str, tuple[str, str, str]] = {  # colour, marker, line
    "softmax": (_VERMILION, "s", "-"),
    "formula": (_PURPLE, "D", "--"),
    "performer": (_ORANGE, "^", "-"),
    "linear": (_GREEN, "v", "-"),
}
_NAMES = {
    "softmax": "softmax (SDPA)",
    "formula": "RACE formula\nin torch",
    "performer": "Performer-256",
    "linear": "linear attention",
}
_GAP = 0.06  # between labels, as a share of the height


def draw(figures: Figures, path: pathlib.Path) -> None:
    """Draw to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        causal for causal in (False, True) if any(case.causal == causal for case in figures.cases)
    ]
    figure = Figure(figsize=(5.6 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    about = figures.data["machine"]
    figure.suptitle(
        f"Attention, forward + backward, {about['processors']} processors of {about['processor']}: "
        "4 heads of 128, float32, (L, P) in brackets",
        x=0.01,
        ha="left",
        fontsize=11,
        color="#222222",
    )
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    seconds = [run["seconds"] for run in figures.data["runs"]]
    low, high = min(seconds, default=1e-3) / 2, max(seconds, default=1.0) * 2.5
    for axes, causal in zip(all_axes, panels, strict=True):
        _frame(axes, figures.lengths, (low, high), "causal" if causal else "bidirectional")
        _lines(axes, figures, causal)
    all_axes[0].set_ylabel("time of one layer", color=_GREY)
    figure.savefig(path, dpi=160)


def _shown(figures: Figures, causal: bool) -> list[Case]:
    """Return the drawn cases: of racecore and of the formula only the smallest and the largest
    hash.
    """
    cases: list[Case] = []
    for method in ("racecore", *_STYLES):
        found = [
            case
            for case in figures.of(method, causal)
            if figures.common(math.inf, case) is not None
        ]
        if method == "formula":
            found = found[-1:]
        cases += list(dict.fromkeys([*found[:1], *found[-1:]]))
    return cases


def _lines(axes: Any, figures: Figures, causal: bool) -> None:
    from matplotlib.patheffects import withStroke

    labels = []
    cases = _shown(figures, causal)
    for case in cases:
        points = [(n, s) for n in figures.lengths if (s := figures.get(case, n)) is not None]
        small = case.method == "racecore" and case != figures.of("racecore", causal)[-1]
        color, marker, line = _STYLES.get(case.method, (_SKY if small else _BLUE, "o", "-"))
        width = 2.6 if case.method == "racecore" else 1.6
        axes.plot(
            *zip(*points, strict=True),
            line,
            marker=marker,
            color=color,
            linewidth=width,
            markersize=4.5,
            zorder=3 if case.method == "racecore" else 2,
        )
        hash_of = f" ({case.tables}, {case.planes})" if case.tables else ""
        labels.append(
            (
                *points[-1],
                _NAMES.get(case.method, "racecore") + hash_of,
                color,
                case.method == "racecore",
            )
        )
    bottom, top = (math.log10(limit) for limit in axes.get_ylim())
    heights = spread([(x, (math.log10(y) - bottom) / (top - bottom)) for x, y, *_ in labels], _GAP)
    for (x, _, text, color, bold), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            (x, height),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
            fontweight="bold" if bold else "normal",
            linespacing=1.0,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=4,
        )


def spread(points: list[tuple[float, float]], gap: float, reach: float = 2.0**3) -> list[float]:
    """Move the heights of (x, height) apart, where one x is less than `reach` times another; return
    the heights.
    """
    heights = [height for _, height in points]
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(len(points)), 2)
        if (heights[i], i) < (heights[j], j)
    ]
    for _ in range(50):  # far more iterations than a few labels need
        for low, high in pairs:
            overlap = gap - (heights[high] - heights[low])
            near = max(points[low][0], points[high][0]) < reach * min(
                points[low][0], points[high][0]
            )
            if near and overlap > 0:
                heights[low] -= overlap / 2
                heights[high] += overlap / 2
    return heights


def _frame(axes: Any, lengths: list[int], limits: tuple[float, float], title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    axes.set_ylim(*limits)
    axes.set_xticks(lengths if len(lengths) <= 6 else [n for n in lengths if math.log2(n) % 2 == 0])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:g} s" if y >= 1 else f"{y * 1e3:g} ms")
    )
    axes.set_xlabel("tokens", color=_GREY)
    axes.set_title(title, loc="left", fontsize=10, color=_GREY)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, length=0)


def _tokens(x: float, _: object) -> str:
    return f"{x / 2**20:g}M" if x >= 2**20 else f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"
