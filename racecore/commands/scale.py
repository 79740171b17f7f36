"""racecore scale: time attention over very many tokens on this machine, forward and backward, and
check rows of the results.

Inputs are generated when they are read and results are kept as digests, so no disk is needed. Rows
of one head are compared with the same computation in float64.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import racecore
from racecore import inputs
from racecore.commands import scale_rows
from racecore.commands.bad_input import BadInputError, natural_int, positive_int
from racecore.commands.doctor import processor
from racecore.commands.scale_result import (
    TOLERANCES,
    Result,
    options,
    report,
    table_row,
    versions,
)
from racecore.runtime import arrays
from racecore.runtime.threads import count

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Time attention, forward and backward, over inputs that are generated when they are read. Results are
kept as digests, so no disk is needed. Rows of one head are compared with the same computation in
float64."""
# Tokens of the run that compiles the kernels: several segments, so that all kernels are used.
_WARM_UP_TOKENS = 2100


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
    parser = commands.add_parser(
        "scale",
        help="time attention over millions of generated tokens on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_problem_arguments(parser)
    parser.add_argument("--forward-only", action="store_true", help="compute no gradients")
    parser.add_argument(
        "--memory-limit", default="4GB", metavar="SIZE", help="memory that the run may allocate"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to use; all processors if absent"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="leave out the comparison with float64"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--picture",
        type=_picture,
        default="scale.png",
        metavar="FILE",
        help="file for the picture of a sweep: .png, .svg or .pdf",
    )
    parser.set_defaults(run=run)


def _add_problem_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that define what is computed."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--tokens", type=positive_int, default=1_000_000, metavar="T", help="length of the sequence"
    )
    length.add_argument(
        "--sweep", type=positive_int, nargs="+", metavar="T", help="several lengths, and a picture"
    )
    parser.add_argument(
        "--heads", type=positive_int, default=4, metavar="H", help="attention heads"
    )
    parser.add_argument(
        "--head-dim", type=positive_int, default=128, metavar="D", help="dimension of a head"
    )
    parser.add_argument("--tables", type=positive_int, default=2, metavar="L", help="hash tables")
    parser.add_argument(
        "--planes", type=positive_int, default=2, metavar="P", help="planes of a table"
    )
    parser.add_argument(
        "--beta", type=float, default=1.0, metavar="X", help="sharpness of the hash"
    )
    parser.add_argument(
        "--seed", type=natural_int, default=0, metavar="N", help="seed of the inputs and the planes"
    )
    parser.add_argument("--causal", action="store_true", help="token i sees tokens 0 ... i only")
    parser.add_argument("--readout", choices=inputs.READOUTS, default="ratio", help="the estimator")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of all arrays")


def _picture(text: str) -> str:
    """Refuse a file that cannot be drawn to, before hours are spent on computing its contents."""
    path = Path(text)
    if path.suffix not in {".png", ".svg", ".pdf"} or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"expected a .png, .svg or .pdf file in an existing folder, got {text!r}"
        )
    return text


def run(args: argparse.Namespace) -> int:
    """Measure and report; return 1 if a row is wrong."""
    try:
        lsh = racecore.SoftLSH.random(
            args.head_dim, args.tables, args.planes, beta=args.beta, rng=args.seed
        )
        measurement = _Measurement(args, lsh)
    except (ValueError, TypeError) as error:
        raise BadInputError(str(error)) from error
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        if args.threads is not None:
            stack.enter_context(racecore.threads(args.threads))
        for tokens in args.sweep or [args.tokens]:
            results.append(measurement.measure(tokens))
            if not args.json:
                is_first = len(results) == 1
                text = table_row(results[-1], is_first) if args.sweep else report(results[-1])
                print(text, flush=True)
    if args.json:
        reports = [asdict(result) for result in results]
        print(json.dumps(reports if args.sweep else reports[0], indent=1))
    if args.sweep:
        _draw(args.picture, results)
    # On stderr, so that it is seen beside JSON as well.
    for result in results:
        for name, distance in result.wrong.items():
            print(
                f"racecore scale: ROWS ARE WRONG, please report this: {name} at {result.tokens:,} "
                f"tokens has a relative error of {distance:.1e}, the tolerance is "
                f"{TOLERANCES[result.dtype]:g}",
                file=sys.stderr,
            )
    return 1 if any(result.wrong for result in results) else 0


def _draw(path: str, results: list[Result]) -> None:
    """Draw a sweep to a file, or print that Matplotlib is missing."""
    try:
        from racecore.commands.picture import draw_scale

        draw_scale(path, results, options(results[0]))
        print(f"picture: {path}", file=sys.stderr)
    except ImportError:
        print("no picture: Matplotlib is not installed (pip install matplotlib)", file=sys.stderr)


class _Measurement:
    """Runs of the options of one command line.

    Parameters
    ----------
    args : argparse.Namespace
    lsh : racecore.SoftLSH
    """

    def __init__(self, args: argparse.Namespace, lsh: racecore.SoftLSH) -> None:
        self._args, self._lsh = args, lsh
        self._dtype = arrays.dtype_of(args.dtype)
        self._limit = inputs.parse_bytes(args.memory_limit)
        self._inputs = ("query", "key", "value", "d_out")[: 3 if args.forward_only else 4]
        self._outputs = ("out", "d_query", "d_key", "d_value")[: 1 if args.forward_only else 4]
        self._options = {
            "is_causal": args.causal,
            "readout": args.readout,
            "memory_limit": self._limit,
        }

    def measure(self, tokens: int) -> Result:
        """Run once, and once more for one head in float64."""
        from racecore.outofcore import plan

        args = self._args
        shape = (tokens, args.heads, args.head_dim)
        try:
            # For the length of chunks: errors are likeliest beside the cuts.
            estimate = plan(
                **self._sources(tokens), out=None, lsh=self._lsh, calibrate=False, **self._options
            )
            sample = scale_rows.sample_tokens(tokens, estimate.chunk_tokens, args.seed)
            rows = {
                name: scale_rows.SampledRows(shape, self._dtype, sample) for name in self._outputs
            }
            started = time.perf_counter()
            # Compiles the kernels; the digests are dropped.
            self._run(
                self._sources(min(tokens, _WARM_UP_TOKENS)), dict.fromkeys(self._outputs), None
            )
            warm_up_seconds = time.perf_counter() - started
            outcome = self._run(self._sources(tokens), rows, f"racecore scale, {tokens:,} tokens")
        except ValueError as error:
            raise BadInputError(str(error)) from error
        errors: dict[str, float] = {}
        check_seconds = None
        if not args.no_check:
            started = time.perf_counter()
            errors = self._errors(tokens, rows, sample)
            check_seconds = time.perf_counter() - started
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
            versions=versions(),
            warm_up_seconds=warm_up_seconds,
            seconds=outcome.seconds,
            tokens_per_second=outcome.tokens_per_second,
            ns_per_token_and_head=1e9 * outcome.seconds / tokens / args.heads,
            peak_anonymous_bytes=outcome.peak_anonymous_bytes,
            memory_limit=self._limit,
            digests=outcome.digests,
            check_seconds=check_seconds,
            checked_rows=len(sample) if errors else 0,
            errors=errors,
        )

    def _sources(self, n: int) -> dict[str, Any]:
        """Return synthetic inputs of n tokens, by name."""
        from racecore.outofcore import Synthetic

        shape = (n, self._args.heads, self._args.head_dim)
        # Four seeds for each seed of the command line: all inputs are independent.
        first = 4 * self._args.seed
        return {
            name: Synthetic(shape, self._dtype, first + i) for i, name in enumerate(self._inputs)
        }

    def _run(self, sources: dict[str, Any], sinks: dict[str, Any], label: str | None) -> Any:
        """Compute attention, and its gradients if they are wanted; return the report."""
        from racecore.outofcore import run as compute

        return compute(**sources, **sinks, lsh=self._lsh, progress=label, **self._options)

    def _errors(
        self, tokens: int, rows: dict[str, scale_rows.SampledRows], sample: np.ndarray
    ) -> dict[str, float]:
        """Compute head 0 in float64; return the largest relative error of a row, by array."""
        shape = (tokens, 1, self._args.head_dim)
        exact = {
            name: scale_rows.SampledRows(shape, np.dtype(np.float64), sample)
            for name in self._outputs
        }
        # Float64 arrays with the same values: multiples of 1/64 are exact in every dtype.
        heads = {name: source.head(0) for name, source in self._sources(tokens).items()}
        self._run(heads, exact, "checking one head in float64")
        return {
            name: scale_rows.largest_error(
                rows[name].rows[:, 0], exact[name].rows[:, 0], sample, self._args.causal
            )
            for name in self._outputs
        }
