"""racecore scale: how long attention over very many tokens takes here, forward and backward, with
rows checked.

Inputs are made up where they are read, results are kept as digests, so nothing needs a disk. Rows
of one head are compared with the same computation in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import racecore
from racecore import inputs
from racecore.commands.bad_input import BadInputError, natural_int, positive_int
from racecore.commands.doctor import processor
from racecore.runtime import arrays
from racecore.runtime.threads import count

__all__ = ["Result", "add_parser", "run"]

_DESCRIPTION = """\
Inputs are made up where they are read, results are kept as digests, so nothing needs a disk. Rows of one head are compared
with the same computation in float64."""
_DTYPES = {
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float32": 1e-4,
    "float64": 1e-10,
}  # relative error of a row that is right
_SPOTS = 16
_NAMES = ("query", "key", "value", "d_out")
_PAPER_TOKENS, _PAPER_SECONDS = (
    75_000_000,
    100,
)  # arXiv 2510.04008, CPU: Xeon Gold 5220R, 4 heads of 128


@dataclass(frozen=True)
class Result:
    """What one run gave: times in seconds, memory in bytes."""

    tokens: int
    heads: int
    head_dim: int
    tables: int
    planes: int
    beta: float
    seed: int
    causal: bool
    readout: str
    dtype: str
    backward: bool
    threads: int
    processor: str
    versions: dict[str, str]
    warm_up_seconds: float  # of a short run that compiles or loads the kernels, not counted below
    seconds: float
    tokens_per_second: float
    ns_per_token_and_head: float
    peak_anonymous_bytes: int
    memory_limit: int
    digests: dict[str, str]
    check_seconds: float | None
    checked_rows: int
    errors: dict[str, float]  # the largest relative error of a row, by array

    @property
    def wrong(self) -> dict[str, float]:
        """Those errors that the dtype does not explain."""
        return {
            name: error for name, error in self.errors.items() if not error <= _DTYPES[self.dtype]
        }


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
    parser = commands.add_parser(
        "scale",
        help="time attention over millions of made-up tokens on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--tokens", type=positive_int, default=1_000_000, metavar="T", help="length of the sequence"
    )
    length.add_argument(
        "--sweep", type=positive_int, nargs="+", metavar="T", help="several lengths, and a picture"
    )
    parser.add_argument(
        "--picture",
        type=_picture,
        default="scale.png",
        metavar="FILE",
        help="where a sweep is drawn: .png, .svg or .pdf",
    )
    parser.add_argument(
        "--heads", type=positive_int, default=4, metavar="H", help="attention heads"
    )
    parser.add_argument(
        "--head-dim", type=positive_int, default=128, metavar="D", help="values per head and token"
    )
    parser.add_argument("--tables", type=positive_int, default=2, metavar="L", help="hash tables")
    parser.add_argument(
        "--planes", type=positive_int, default=2, metavar="P", help="planes of a table"
    )
    parser.add_argument(
        "--beta", type=float, default=1.0, metavar="X", help="sharpness of the hash"
    )
    parser.add_argument(
        "--seed",
        type=natural_int,
        default=0,
        metavar="N",
        help="seed of the numbers and the planes",
    )
    parser.add_argument("--causal", action="store_true", help="token i sees tokens 0 ... i only")
    parser.add_argument("--readout", choices=inputs.READOUTS, default="ratio", help="the estimator")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of all arrays")
    parser.add_argument("--forward-only", action="store_true", help="no gradients")
    parser.add_argument(
        "--memory-limit", default="4GB", metavar="SIZE", help="memory that the run may take"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="processors to use; all if not given"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="leave out the comparison with float64"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def _picture(text: str) -> str:
    """Refuse a name that cannot be drawn to before hours are spent on what it should show."""
    path = Path(text)
    if path.suffix not in {".png", ".svg", ".pdf"} or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a .png, .svg or .pdf file in an existing folder, got {text!r}"
        )
    return text


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; return 1 if a row is not what it should be."""
    try:
        lsh = racecore.SoftLSH.random(
            args.head_dim, args.tables, args.planes, beta=args.beta, rng=args.seed
        )
        dtype = arrays.dtype_of(args.dtype)
        limit = inputs.parse_bytes(args.memory_limit)
    except (ValueError, TypeError) as error:
        raise BadInputError(str(error)) from error
    results = []
    with contextlib.ExitStack() as stack:
        if args.threads is not None:
            stack.enter_context(racecore.threads(args.threads))
        for tokens in args.sweep or [args.tokens]:
            results.append(_measured(args, lsh, dtype, tokens, limit))
            if not args.json:
                print(
                    _report(results[-1])
                    if args.sweep is None
                    else _line(results[-1], len(results) == 1),
                    flush=True,
                )
    if args.json:
        told = [asdict(result) for result in results]
        print(json.dumps(told if args.sweep else told[0], indent=1))
    if args.sweep:
        _draw(args.picture, results)
    for result in results:
        for name, distance in result.wrong.items():
            print(
                f"racecore scale: ROWS ARE WRONG, please report this: {name} at {result.tokens:,} "
                "tokens is off by "
                f"{distance:.1e}, right is up to {_DTYPES[result.dtype]:g}",
                file=sys.stderr,
            )
    return 1 if any(result.wrong for result in results) else 0


def _measured(
    args: argparse.Namespace, lsh: racecore.SoftLSH, dtype: np.dtype, tokens: int, limit: int
) -> Result:
    """Run once, and once more for one head in float64."""
    from racecore.outofcore import Synthetic, plan
    from racecore.outofcore import run as compute

    seeds = {
        name: 4 * args.seed + i for i, name in enumerate(_NAMES[: 3 if args.forward_only else 4])
    }
    options = {"is_causal": args.causal, "readout": args.readout, "memory_limit": limit}
    names = ("out", "d_query", "d_key", "d_value")[: 1 if args.forward_only else 4]

    def go(sources: dict[str, Any], sinks: dict[str, Any], label: str | None) -> Any:
        """Run over these sources into these sinks."""
        gradients = {name: sinks[name] for name in names[1:]}
        if not args.forward_only:
            gradients["d_out"] = sources["d_out"]
        return compute(
            sources["query"],
            sources["key"],
            sources["value"],
            sinks["out"],
            lsh,
            progress=label,
            **gradients,
            **options,
        )

    def made(n: int) -> dict[str, Any]:
        """Return sources of n made-up tokens."""
        return {
            name: Synthetic((n, args.heads, args.head_dim), dtype, seed)
            for name, seed in seeds.items()
        }

    try:
        chunk = plan(**made(tokens), out=None, lsh=lsh, calibrate=False, **options).chunk_tokens
        places = _places(tokens, chunk, args.seed)
        kept = {name: Rows((tokens, args.heads, args.head_dim), dtype, places) for name in names}
        started = time.perf_counter()
        go(made(min(tokens, 2100)), dict.fromkeys(names), None)  # compiles the kernels
        warm_up_seconds = time.perf_counter() - started
        report = go(made(tokens), kept, f"racecore scale, {tokens:,} tokens")
    except ValueError as error:
        raise BadInputError(str(error)) from error
    errors, check_seconds = {}, None
    if not args.no_check:
        started = time.perf_counter()
        exact = {
            name: Rows((tokens, 1, args.head_dim), np.dtype(np.float64), places) for name in names
        }
        go(
            {name: x.head(0) for name, x in made(tokens).items()},
            exact,
            "checking one head in float64",
        )
        check_seconds = time.perf_counter() - started
        errors = {
            name: _error(kept[name].rows[:, 0], exact[name].rows[:, 0], places, args.causal)
            for name in names
        }
    return Result(
        tokens=tokens,
        heads=args.heads,
        head_dim=args.head_dim,
        tables=args.tables,
        planes=args.planes,
        beta=args.beta,
        seed=args.seed,
        causal=args.causal,
        readout=args.readout,
        dtype=args.dtype,
        backward=not args.forward_only,
        threads=count(),
        processor=processor()["name"],
        versions=_versions(),
        warm_up_seconds=warm_up_seconds,
        seconds=report.seconds,
        tokens_per_second=report.tokens_per_second,
        ns_per_token_and_head=1e9 * report.seconds / tokens / args.heads,
        peak_anonymous_bytes=report.peak_anonymous_bytes,
        memory_limit=limit,
        digests=report.digests,
        check_seconds=check_seconds,
        checked_rows=len(places) if errors else 0,
        errors=errors,
    )


class Rows:
    """An output of which only some rows are kept.

    Parameters
    ----------
    shape : tuple of int
        [T, heads, dim].
    dtype : dtype
    places : int array
        Ascending.

    Attributes
    ----------
    rows : array [len(places), heads, dim]
        NaN until they are written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, places: np.ndarray) -> None:
        self.shape, self.dtype, self._places = shape, dtype, places
        self.rows = np.full((len(places), *shape[1:]), np.nan, dtype)

    def __setitem__(self, tokens: slice, rows: np.ndarray) -> None:
        first, last = np.searchsorted(self._places, [tokens.start, tokens.stop])
        self.rows[first:last] = rows[self._places[first:last] - tokens.start]


def _places(tokens: int, chunk: int, seed: int) -> np.ndarray:
    """Return which rows to check: the ends, both sides of the first, middle and last cut between
    chunks, some at random.
    """
    n_cuts = (tokens - 1) // chunk
    cuts = chunk * np.array([1, (n_cuts + 1) // 2, n_cuts]) if n_cuts else np.array([], np.int64)
    drawn = np.random.default_rng(seed).integers(tokens, size=_SPOTS - 2 - 2 * len(cuts))
    return np.unique(np.concatenate([[0, tokens - 1], cuts - 1, cuts, drawn]))


def _error(found: np.ndarray, exact: np.ndarray, places: np.ndarray, is_causal: bool) -> float:
    """Return the largest relative error of a row.

    Relative to its size, or to that which rows at its place usually have where it is smaller: where
    all planes are saturated, gradients vanish and what is left of them in float32 is noise. Causal
    rows see i + 1 random ones, whose mean shrinks with the root of that.
    """
    usual = 1 / np.sqrt(places + 1.0) if is_causal else np.ones(len(places))
    distance = np.linalg.norm(found.astype(np.float64) - exact, axis=1)
    size = np.linalg.norm(exact, axis=1)
    usual *= np.sqrt(np.mean((size / usual) ** 2))
    size = np.maximum(size, usual)
    relative = np.divide(distance, size, out=np.where(distance > 0, np.inf, 0.0), where=size > 0)
    return float(np.where(np.isnan(relative), np.inf, relative).max())


def _versions() -> dict[str, str]:
    import numba

    versions = {
        "racecore": racecore.__version__,
        "numpy": np.__version__,
        "numba": numba.__version__,
    }
    return versions | {"python": platform.python_version()}


def _what(result: Result) -> str:
    kind = f"{'causal' if result.causal else 'bidirectional'}, forward{' + backward' if result.backward else ''}"
    return (
        f"{kind}, {result.heads} heads of {result.head_dim}, {result.dtype}, "
        f"(L, P) = ({result.tables}, {result.planes}), {result.threads} threads"
    )


def _report(result: Result) -> str:
    """Return the report in words."""
    lines = [
        f"{result.tokens:,} tokens, {_what(result)}",
        f"{result.processor}; "
        f"{', '.join(f'{name} {version}' for name, version in result.versions.items())}",
        "",
        f"time      {result.seconds:,.1f} s, {result.tokens_per_second:,.0f} tokens/s, "
        f"{result.ns_per_token_and_head:,.0f} ns per token and head, making up the numbers "
        "included",
        f"warm-up   {result.warm_up_seconds:,.1f} s to compile or load the kernels, not counted",
        f"memory    {result.peak_anonymous_bytes / 1e6:,.0f} MB at most, all of this process; the "
        "limit was "
        f"{result.memory_limit / 1e6:,.0f} MB",
    ]
    lines += [f"digest    {name:<8} {digest}" for name, digest in result.digests.items()]
    if result.check_seconds is not None:
        limit = _DTYPES[result.dtype]
        worst = ", ".join(f"{name} {error:.1e}" for name, error in result.errors.items())
        lines.append(f"check     largest relative error of a row: {worst} (right up to {limit:g})")
        lines.append(
            f"          {result.checked_rows} rows of one head against float64, in "
            f"{result.check_seconds:,.1f} s"
        )
    if result.backward and not result.causal and (result.heads, result.head_dim) == (4, 128):
        lines.append(
            f"paper     about {_PAPER_SECONDS} s for {_PAPER_TOKENS:,} tokens on a Xeon Gold "
            "5220R (arXiv 2510.04008)"
        )
    return "\n".join(lines)


def _line(result: Result, is_first: bool) -> str:
    """Return a row of the table of a sweep, and its head before the first."""
    head = f"{_what(result)}\n\n{'tokens':>15} {'seconds':>10} {'tokens/s':>13} {'ns':>7} {'MB':>7}   error\n"
    error = f"{max(result.errors.values()):.1e}" if result.errors else "-"
    row = f"{result.tokens:>15,} {result.seconds:>10.2f} {result.tokens_per_second:>13,.0f} "
    row += (
        f"{result.ns_per_token_and_head:>7.0f} {result.peak_anonymous_bytes / 1e6:>7,.0f}   {error}"
    )
    return head + row if is_first else row


def _draw(path: str, results: list[Result]) -> None:
    try:
        from racecore.commands.picture import draw_scale

        draw_scale(path, results, _what(results[0]))
        print(f"picture: {path}", file=sys.stderr)
    except ImportError:
        print("no picture: Matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
