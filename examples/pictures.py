"""Shared by the training examples: pictures of curves, and a description of the machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys
from typing import Any

import racecore
from racecore.runtime.threads import default_count

COLOURS = [
    "#c2502e",
    "#1f5a96",
    "#7fb0de",
    "#2f7d4f",
    "#93c9a5",
    "#8a5aa8",
    "#d9a441",
    "#888888",
]  # softmax first
_GREY = "#555555"


def machine() -> str:
    """Return the processor, the threads and the versions in one line."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    torch = sys.modules.get("torch")  # not every example needs it
    n_threads = default_count() if torch is None else torch.get_num_threads()
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "numba")]
    packages += [] if torch is None else [f"torch {torch.__version__}"]
    return ", ".join(
        [
            processor,
            f"{n_threads} threads",
            f"Python {platform.python_version()}",
            *packages,
            f"racecore {racecore.__version__}",
        ]
    )


def record(path: pathlib.Path, plan: Any, results: Any) -> None:
    """Write command, machine and results to `path`.json."""
    found = {"machine": machine(), "plan": dataclasses.asdict(plan), "results": results}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1))
    print(f"wrote {path}.json")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, or None with a message if Matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: Matplotlib is not installed (pip install matplotlib)")
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    return figure


def curves(
    axes: Any,
    lines: dict[str, list[tuple[float, float]]],
    labels: tuple[str, str],
    title: str = "",
    colours: list[str] | None = None,
) -> None:
    """Draw lines of points (x, y) in the common style; `labels` are those of the axes."""
    from matplotlib.ticker import FuncFormatter

    for (label, points), colour in zip(lines.items(), colours or COLOURS, strict=False):
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, linewidth=1.8, markersize=4, label=label
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel(labels[0], color=_GREY)
    axes.set_ylabel(labels[1], color=_GREY)
    axes.set_title(title, fontsize="medium")
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY)


def scale(axes: Any, ticks: list[float], both: bool = False) -> None:
    """Make the x axis, or both, logarithmic, with these ticks on the x axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if both:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.minorticks_off()


def draw(
    path: pathlib.Path,
    lines: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> None:
    """Draw lines of points (x, y) to `path`.png, if Matplotlib is installed."""
    figure = new_figure(7, 4.2)
    if figure is None:
        return
    axes = figure.subplots()
    curves(axes, lines, (x_label, y_label))
    if logarithmic:
        scale(axes, [x for x, _ in next(iter(lines.values()))], both=True)
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure to `path`.png."""
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"wrote {path}.png")
