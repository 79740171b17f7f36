"""Write the figures of a comparison as a Markdown table, a summary of lines, and a picture."""

from __future__ import annotations

import math
import pathlib
import statistics
from typing import Any

from cases import METHODS, Case
from figures import Figures
from speed_plot import draw

__all__ = ["Figures", "machine_line", "round_line", "run_line", "summary", "table", "write"]

_AT = 2**16  # where most ratios are taken, or the longest length that was measured
_SHORT = 2**14  # where softmax and the causal formula still run


def write(data: dict[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write `performance_table.md` and `images/speed.png`; return their paths."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    markdown, picture = folder / "performance_table.md", folder / "images" / "speed.png"
    markdown.write_text(table(data))
    draw(Figures(data), picture)
    return [markdown, picture]


def table(data: dict[str, Any]) -> str:
    """Return the Markdown page part: machine, time, peak memory, shares of the roofline, ratios."""
    figures = Figures(data)
    columns = (
        figures.lengths
        if len(figures.lengths) <= 6
        else [n for n in figures.lengths if math.log2(n) % 2 == 0]
    )
    setting = data["setting"]
    parts = [
        f"Printed by `{data['command']}`: {machine_line(data)}.",
        f"Forward + backward, B = {setting['batch']}, H = {setting['heads']}, D = V = "
        f"{setting['dim']}, "
        f"{setting['dtype']}; (L, P) in brackets; best of several calls. "
        '"Too slow" and "memory" say why a sweep ended.',
    ]
    for causal in (False, True):
        cases = [case for case in figures.cases if case.causal == causal]
        if not cases:
            continue
        way = "Causal" if causal else "Bidirectional"
        parts.append(f"**{way}, time against the number of tokens**")
        parts.append(_grid(figures, cases, columns, "seconds", duration))
        parts.append(f"**{way}, peak memory beyond the inputs**")
        parts.append(_grid(figures, cases, columns, "peak_bytes", size))
    shares = _share_table(figures)
    if shares:
        rounds = data["rounds"]
        parts += [
            f"**Time per token and head at {rounds[0]['runs'][0]['tokens']:,} tokens, and its "
            "share of the roofline**",
            f"The median of {len(rounds)} rounds, each measures ceilings and calls alternately; "
            "in brackets "
            "the lowest and the highest.",
            shares,
        ]
    parts.append("\n".join(f"- {line}" for line in _findings(figures)))
    return "\n\n".join(parts) + "\n"


def _grid(figures: Figures, cases: list[Case], columns: list[int], what: str, text: Any) -> str:
    lines = [["", *(f"{n:,}" for n in columns)], ["---", *["---:"] * len(columns)]]
    for case in cases:
        values = [figures.get(case, n, what) for n in columns]
        cells = [
            figures.mark(case, n) if x is None else text(x)
            for n, x in zip(columns, values, strict=True)
        ]
        lines.append([case.label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _share_table(figures: Figures) -> str:
    cells: dict[tuple[int, int], list[str]] = {}
    for case, times, shares in figures.rounds():
        cells.setdefault((case.tables, case.planes), []).extend(
            [f"{statistics.median(times):.0f} ns", _with_range(shares, 100, "%")]
        )
    lines = [
        f"| ({tables}, {planes}) | {' | '.join(line)} |" for (tables, planes), line in cells.items()
    ]
    head = [
        "| (L, P) | bidirectional | of roofline | causal | of roofline |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + lines) if lines else ""


def summary(data: dict[str, Any]) -> list[str]:
    """Return the lines that a run ends with."""
    figures = Figures(data)
    lines = [
        f"{case.label}, {case.direction}: {statistics.median(times):.0f} ns per token and head, "
        f"{_with_range(shares, 100, '%')} of the roofline"
        for case, times, shares in figures.rounds()
    ]
    return [machine_line(data), *lines, *_findings(figures)]


def round_line(measured: dict[str, Any]) -> str:
    """Describe one round of ceilings and of racecore during the run."""
    rates, runs = measured["ceilings"], measured["runs"]
    times = ", ".join(duration(run["seconds"]) for run in runs)
    return (
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s, {rates['flops_per_second'] / 1e9:.0f} "
        "GFLOP/s; "
        f"{runs[0]['tokens']:,} tokens in {times}"
    )


def _findings(figures: Figures) -> list[str]:
    lines = [
        f"ceilings of {_cores(rates['cores'])}: {rates['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s in float32"
        for name, rates in figures.data["ceilings"].items()
        if name == "all" or rates["cores"] < figures.data["ceilings"]["all"]["cores"]
    ]
    rounds = [measured["ceilings"] for measured in figures.data["rounds"]]
    if rounds:
        lines.append(
            "ceilings of the rounds: "
            f"{_with_range([rates['bytes_per_second'] for rates in rounds], 1e-9, 'GB/s')}, "
            f"{_with_range([rates['flops_per_second'] for rates in rounds], 1e-9, 'GFLOP/s')}"
        )
    for method, causal, wanted in (
        ("formula", False, _AT),
        ("formula", True, _SHORT),
        ("formula", True, math.inf),
        ("softmax", False, _SHORT),
        ("softmax", True, _SHORT),
        ("linear", False, _AT),
        ("linear", True, _AT),
        ("performer", False, _AT),
    ):
        lines += _speed_ups(figures, method, causal, wanted)
    return [*dict.fromkeys(lines), *_ratios(figures.data["experiments"])]


def _speed_ups(figures: Figures, method: str, causal: bool, wanted: float) -> list[str]:
    """Return a line that says how many times as fast racecore is, for every hash."""
    found = []
    for ours in figures.of("racecore", causal):
        peer = (
            Case(method, causal, ours.tables, ours.planes)
            if method == "formula"
            else Case(method, causal)
        )
        tokens = figures.common(wanted, ours, peer)
        if tokens is not None:
            ratio = figures.nanoseconds(peer, tokens) / figures.nanoseconds(ours, tokens)
            number = f"{ratio:.3g}" if ratio < 100 else f"{ratio:,.0f}"
            found.append((f"{number} at ({ours.tables}, {ours.planes})", tokens))
    if not found:
        return []
    name = f"times as fast as {METHODS[method]}, {'causal' if causal else 'bidirectional'}"
    lengths = {tokens for _, tokens in found}
    if len(lengths) == 1:
        return [f"{name}, {lengths.pop():,} tokens: {'; '.join(text for text, _ in found)}"]
    return [f"{name}: {'; '.join(f'{text}, {tokens:,} tokens' for text, tokens in found)}"]


def _ratios(experiments: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines that compare settings of racecore, measured alternately."""
    lines = []
    for name, runs in experiments.items():
        kind, _, way = name.partition(", ")
        base, where = (
            runs[0],
            f"{way}, {runs[0]['tokens']:,} tokens, ({runs[0]['tables']}, {runs[0]['planes']})",
        )
        for run in runs[1:]:
            times = {
                part: run[f"{part}seconds"] / base[f"{part}seconds"]
                for part in ("", "forward_", "backward_")
            }
            if kind == "fresh outputs":
                per = run["tokens"] * run["heads"] / 1e9
                lines.append(
                    f"fresh outputs at every call: {run['seconds'] / per:.0f} ns per token and "
                    "head in place of "
                    f"{base['seconds'] / per:.0f}, {where}"
                )
            elif kind == "threads":
                lines.append(
                    f"{run['threads']} threads beside 1: forward {1 / times['forward_']:.2f} x as "
                    "fast, "
                    f"backward {1 / times['backward_']:.2f} x, {where}"
                )
            elif kind == "bfloat16":
                lines.append(f"bfloat16 takes {times['']:.2f} of the time of float32, {where}")
            elif kind == "heads":
                fewer = base["heads"] / run["heads"]
                lines.append(
                    f"backward with H = {run['heads']} takes {times['backward_'] * fewer:.2f} of "
                    "the time per token "
                    f"and head with H = {base['heads']}, {where}"
                )
    return lines


def _with_range(values: list[float], factor: float, unit: str) -> str:
    """Write the median, and the lowest and highest value in brackets."""
    low, middle, high = (x * factor for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.0f} {unit} ({low:.0f} to {high:.0f})"


def machine_line(data: dict[str, Any]) -> str:
    """Name the machine, the versions and the day."""
    about = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    vectors = f", {about['wide_vectors']}" if about["wide_vectors"] else ""
    return (
        f"{_cores(about['processors'])} of {about['processor']}{vectors}, "
        f"{about['memory_bytes'] / 1e9:.0f} GB, "
        f"{versions}, {about['date']}"
    )


def run_line(run: dict[str, Any]) -> str:
    """Describe one measurement during the sweep."""
    case = Case.of(run)
    return (
        f"{run['tokens']:>9,}  {case.label:<28} {case.direction:<14} {duration(run['seconds']):>9} "
        f"{size(run['peak_bytes']):>9}  ({run['calls']} calls)"
    )


def duration(seconds: float) -> str:
    """Write a time with three digits."""
    return _three_digits(seconds, [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")])


def size(n_bytes: float) -> str:
    """Write a number of bytes with three digits."""
    return _three_digits(n_bytes, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")])


def _three_digits(value: float, units: list[tuple[float, str]]) -> str:
    factor, name = next(((f, name) for f, name in units if value >= 0.9995 * f), units[-1])
    scaled = value / factor
    digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f} {name}"


def _cores(n: float) -> str:
    return f"{n:.0f} core{'s' if n != 1 else ''}"
