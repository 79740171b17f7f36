"""Pictures of `racecore demo` and `racecore scale`, with Matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.commands.scale_result import Result
from racecore.commands.softmax_comparison import Timing

__all__ = ["draw", "draw_scale"]

_BLUE, _LIGHT, _RED, _GREY = "#1f5fbf", "#7fb2f0", "#c8442c", "#555555"


def draw(path: str, timings: list[Timing], title: str) -> None:
    """Draw time against length to a file, for RACE and softmax attention.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    # A canvas of its own: no window and no global state of pyplot.
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = np.array([timing.tokens for timing in timings])
    _line(axes, tokens, np.array([timing.forward for timing in timings]), _BLUE, "RACE forward")
    _line(
        axes,
        tokens,
        np.array([timing.backward for timing in timings]),
        _LIGHT,
        "RACE forward + backward",
    )
    measured = [timing for timing in timings if timing.softmax is not None]
    seconds = np.array([timing.softmax for timing in measured], dtype=float)
    lengths = np.array([timing.tokens for timing in measured])
    label = "softmax forward"
    if len(measured) < len(timings):
        # Time grows with the square of the length.
        beyond = tokens[tokens >= lengths[-1]]
        axes.plot(beyond, seconds[-1] * (beyond / lengths[-1]) ** 2, ":", color=_RED, linewidth=2)
        label += "\n(dotted: extrapolated)"
    _line(axes, lengths, seconds, _RED, label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:,.0f}k" if x >= 1024 else f"{x:.0f}")
    )
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:g} s" if y >= 1 else f"{y * 1e3:g} ms")
    )
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


def draw_scale(path: str, results: list[Result], title: str) -> None:
    """Draw time and memory of a sweep to a file.

    Raises
    ------
    ImportError
        Matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    tokens = np.array([result.tokens for result in results])
    for axes, label, values in zip(
        figure.subplots(1, 2),
        ("seconds", "peak memory of the process, MB"),
        (
            [result.seconds for result in results],
            [result.peak_anonymous_bytes / 1e6 for result in results],
        ),
        strict=True,
    ):
        _line(axes, tokens, np.array(values), _BLUE, label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(min(values) / 2, 1), top=max(values) * 2)
        axes.set_xlabel("tokens", color=_GREY)
        axes.set_ylabel(label, color=_GREY)
        axes.grid(True, color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
