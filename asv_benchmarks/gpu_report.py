"""The table of gpu.py: rows, fractions of the ceilings, and the estimates from bytes."""

from __future__ import annotations

from typing import NamedTuple

from gpu_methods import DIM, HEADS, PLAIN, stored_dtype


class Row(NamedTuple):
    """One line of the table."""

    method: str
    causal: bool
    tokens: int
    forward_ms: float
    both_ms: float
    least: float | None = None
    moved: float | None = None


def units_moved(tables: int, planes: int, causal: bool) -> float:
    """Return the rows of D 16-bit numbers read or written per token and head, both directions.

    Bidirectional: k, v; q, out; q, d_out, d_q; k, v, d_k, d_v. Causal: k, v; q, k, v, out; q, k, v,
    d_out, d_q and the stash; k, v, d_out, d_k, d_v and the stash. States are not counted: there is
    one per segment of 1,024 tokens.
    """
    stash = (2 * (tables << planes) + tables * planes) * 4 / (2 * DIM)
    return 2 + 4 + 5 + 5 + 2 * stash if causal else 2 + 2 + 3 + 4


def expectations(*bandwidths: float) -> list[str]:
    """Return lower bounds of forward + backward at 2^20 tokens, S = 8, causal, from bytes."""
    rows = (1 << 20) * HEADS * DIM * 2
    return [
        f"{b / 1e12:.2f} TB/s: {11 * rows / b * 1e3:.1f} ms if every array moved once, "
        f"{units_moved(2, 2, True) * rows / b * 1e3:.1f} ms with these passes"
        for b in bandwidths
    ]


def line(row: Row) -> str:
    """Return a row of the table."""
    fractions = "".join(
        f"{fraction:8.0%}" if fraction is not None else f"{'':8}"
        for fraction in (row.least, row.moved)
    )
    kind = "causal" if row.causal else "bidirectional"
    return (
        f"{row.method:22} {kind:13} {row.tokens:>11,} {row.forward_ms:>10.3f} "
        f"{row.both_ms:>10.3f}{fractions}"
    )


def table(rows: list[Row]) -> str:
    """Return all rows under a head, and the lengths from which racecore is faster than SDPA."""
    head = (
        f"{f'{stored_dtype()}, B 1 H 8 D 128':36} {'tokens':>11} {'forward ms':>10} "
        f"{'both ms':>10}{'least':>8}{'moved':>8}"
    )
    lines = [head, *map(line, rows)]
    for causal in (True, False):
        peer = {
            row.tokens: row
            for row in rows
            if row.method.startswith("SDPA") and row.causal == causal
        }
        for method in dict.fromkeys(
            row.method for row in rows if row.method.startswith("racecore")
        ):
            ours = [
                row
                for row in rows
                if (row.method, row.causal) == (method, causal) and row.tokens in peer
            ]
            wins = [row.tokens for row in ours if row.both_ms < peer[row.tokens].both_ms]
            at = f"from {min(wins):,} tokens on" if wins else "at none of these lengths"
            lines.append(
                f"{method}, {'causal' if causal else 'bidirectional'}: faster than SDPA forward + "
                f"backward {at}"
            )
    return "\n".join([*lines, *gains(rows)])


def gains(rows: list[Row]) -> list[str]:
    """Return times with and without tensor cores, at the longest length that has both."""
    times = {(row.method, row.causal, row.tokens): row for row in rows}
    best: dict[tuple[str, bool], tuple[Row, Row]] = {}
    for row in rows:
        plain = times.get(
            (row.method.replace("racecore ", f"racecore {PLAIN} "), row.causal, row.tokens)
        )
        if plain is not None and plain is not row:
            best[row.method, row.causal] = (row, plain)  # lengths come in their order
    return [
        f"{row.method}, {'causal' if row.causal else 'bidirectional'}, {row.tokens:,} tokens, "
        "with tensor cores and without: "
        f"forward {row.forward_ms:.2f} and {plain.forward_ms:.2f} ms, both {row.both_ms:.2f} and "
        f"{plain.both_ms:.2f} ms"
        for row, plain in best.values()
    ]
