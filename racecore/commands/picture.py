"""The picture of `racecore demo`: time against length on logarithmic axes. Needs Matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.commands.race import Lap

__all__ = ["draw"]

_BLUE, _LIGHT, _RED, _GREY = "#1f5fbf", "#7fb2f0", "#c8442c", "#555555"


def draw(path: str, laps: list[Lap], title: str) -> None:
    """Draw to a file.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    tokens = np.array([lap.tokens for lap in laps])
    _line(axes, tokens, np.array([lap.forward for lap in laps]), _BLUE, "RACE forward")
    _line(axes, tokens, np.array([lap.backward for lap in laps]), _LIGHT, "RACE forward + backward")
    run = [lap for lap in laps if lap.softmax is not None]
    seconds = np.array([lap.softmax for lap in run], dtype=float)
    at = np.array([lap.tokens for lap in run])
    label = "softmax forward"
    if len(run) < len(laps):
        beyond = tokens[tokens >= at[-1]]
        axes.plot(beyond, seconds[-1] * (beyond / at[-1]) ** 2, ":", color=_RED, linewidth=2)
        label += "\n(dotted: extrapolated)"
    _line(axes, at, seconds, _RED, label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:,.0f}k" if x >= 1024 else f"{x:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} s" if y >= 1 else f"{y * 1e3:g} ms"))
    axes.set_xticks(tokens)
    axes.minorticks_off()
    axes.set_xlabel("tokens", color=_GREY)
    axes.set_ylabel("time", color=_GREY)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def _line(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    axes.plot(x, y, "o-", color=color, linewidth=2, markersize=5, label=label)
