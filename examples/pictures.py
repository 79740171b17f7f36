"""What the examples that train have in common when they show results: curves in one picture, and where they were measured."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
from typing import Any

import torch

import racecore

_COLOURS = ["#c2502e", "#1f5a96", "#7fb0de", "#2f7d4f", "#93c9a5"]  # softmax first
_GREY = "#555555"


def machine() -> str:
    """Return the processor, the threads and the versions in one line."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return (
        f"{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"racecore {racecore.__version__}"
    )


def record(path: pathlib.Path, plan: Any, results: Any) -> None:
    """Write to `path`.json what ran where and what came out."""
    found = {"machine": machine(), "plan": dataclasses.asdict(plan), "results": results}
    path.with_suffix(".json").write_text(json.dumps(found, indent=1))
    print(f"wrote {path}.json")


def draw(
    path: pathlib.Path,
    lines: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
) -> None:
    """Draw lines of points (x, y) to `path`.png, if Matplotlib is there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        print("no picture: Matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no global state
    axes = figure.subplots()
    for (label, points), colour in zip(lines.items(), _COLOURS, strict=False):
        axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.8, markersize=4, label=label)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([x for x, _ in points])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel(x_label, color=_GREY)
    axes.set_ylabel(y_label, color=_GREY)
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY)
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"wrote {path}.png")
