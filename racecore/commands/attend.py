"""racecore attend: attention and its gradients on .npy files, in bounded memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import racecore
from racecore import backends, inputs
from racecore.commands.bad_input import BadInputError, natural_int, positive_int
from racecore.outofcore import npy
from racecore.outofcore.targets import identity_of

__all__ = ["add_parser", "parse", "run"]

_DESCRIPTION = """\
RACE attention on .npy files, which may be far larger than memory.
Outputs are called FILE.partial until they are complete. If the run ends early for any reason, the
same command resumes it."""
_EPILOG = """\
Arrays are [tokens, heads, dim] or [batch, tokens, heads, dim], of one dtype, which is also that of
the outputs.

forward:    racecore attend --query q.npy --key k.npy --value v.npy --out o.npy --causal
gradients:  add --d-out g.npy --d-query dq.npy --d-key dk.npy --d-value dv.npy
estimate:   add --plan to print bytes, memory and time"""
# Not the defaults of the parser: None shows that an option was not given, see `_saved_hash`.
_HASH_DEFAULTS = {"tables": 4, "planes": 4, "beta": 1.0, "seed": 0}
_INPUTS = ("query", "key", "value", "d_out", "key_mask", "cu_seqlens")
_OUTPUTS = ("out", "d_query", "d_key", "d_value", "d_lsh")


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
    # No abbreviations of options: a new option could make them ambiguous.
    parser = commands.add_parser(
        "attend",
        help="attention and its gradients on .npy files",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_arguments(parser)
    parser.set_defaults(run=run)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `racecore attend`."""
    parser = argparse.ArgumentParser(prog="racecore attend", allow_abbrev=False)
    _add_arguments(parser)
    return parser.parse_args(argv)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_file_arguments(parser)
    _add_hash_arguments(parser)
    _add_options(parser)


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files of arrays, those of gradients in a group of their own."""
    group = parser.add_argument_group("files")
    group.add_argument(
        "--query", required=True, metavar="FILE", help="queries to read, [.., T, H, D]"
    )
    group.add_argument(
        "--key",
        required=True,
        metavar="FILE",
        help="keys to read, [.., T, G, D]; H a multiple of G",
    )
    group.add_argument(
        "--value", required=True, metavar="FILE", help="values to read, [.., T, G, V]"
    )
    group.add_argument(
        "--out", required=True, metavar="FILE", help="attention to write, [.., T, H, V]"
    )
    group.add_argument(
        "--key-mask", metavar="FILE", help="bools to read, [.., T]: True where the key takes part"
    )
    group.add_argument(
        "--cu-seqlens",
        metavar="FILE",
        help="integers to read, the bounds of packed sequences",
    )
    group.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    group.add_argument(
        "--dtype",
        choices=["bfloat16"],
        help="read entries of two untyped bytes (ml_dtypes) as bfloat16",
    )
    group = parser.add_argument_group("gradients (optional)")
    group.add_argument("--d-out", metavar="FILE", help="gradient of the output, to read")
    for name in ("query", "key", "value"):
        group.add_argument(f"--d-{name}", metavar="FILE", help=f"gradient of the {name}, to write")
    group.add_argument(
        "--d-lsh", metavar="FILE", help="gradients of planes and beta, to write (.npz)"
    )


def _add_hash_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the parameters of the hash."""
    group = parser.add_argument_group("hash: a saved one, or a random one")
    group.add_argument("--lsh", metavar="FILE", help="file of racecore.SoftLSH.save (.npz)")
    group.add_argument(
        "--tables",
        type=positive_int,
        metavar="L",
        help="hash tables; more tables mean less noise (4)",
    )
    group.add_argument(
        "--planes",
        type=positive_int,
        metavar="P",
        help="planes of a table; more planes mean sharper attention (4)",
    )
    group.add_argument("--beta", type=float, metavar="X", help="sharpness of the hash (1.0)")
    group.add_argument("--seed", type=natural_int, metavar="N", help="seed of the planes (0)")


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the computation and of the report."""
    group = parser.add_argument_group("options")
    group.add_argument("--causal", action="store_true", help="token i sees tokens 0 ... i only")
    group.add_argument(
        "--readout", choices=inputs.READOUTS, default="ratio", help="the estimator (ratio)"
    )
    group.add_argument(
        "--backend",
        choices=backends.NAMES,
        help="implementation; cuda computes chunks on a GPU (cpu)",
    )
    group.add_argument(
        "--memory-limit",
        default="1GB",
        metavar="SIZE",
        help="memory that the run may allocate (1GB)",
    )
    group.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to use (all processors)"
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="discard the results of an interrupted run, and start afresh",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="print expected bytes, memory and time; compute nothing",
    )
    group.add_argument(
        "--no-check-finite",
        action="store_true",
        help="do not check the inputs for NaN and infinity",
    )
    group.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compute attention or print the plan; return the exit code."""
    from racecore import outofcore

    outputs = _checked_outputs(args)
    lsh = _hash(args)
    request = {name: getattr(args, name) for name in (*_INPUTS, *_OUTPUTS)} | {
        "lsh": lsh,
        "is_causal": args.causal,
        "readout": args.readout,
        "dtype": args.dtype,
        "memory_limit": args.memory_limit,
    }
    with contextlib.ExitStack() as stack:
        if args.threads is not None:
            stack.enter_context(racecore.threads(args.threads))
        stack.enter_context(_input_errors())
        if args.plan and args.backend not in (None, "cpu"):
            raise BadInputError(
                f"--plan estimates the time of the CPU only; leave out --backend {args.backend}"
            )
        if args.plan:
            print(outofcore.plan(**request))
            return 0
        # After the plan, which leaves nothing to resume.
        stack.enter_context(_resume_hint(outputs))
        report = outofcore.run(
            **request,
            backend=args.backend,
            resume=not args.restart,
            check_finite=not args.no_check_finite,
            progress="racecore attend",
        )
    _print_report(report, args)
    return 0


def _print_report(report: Any, args: argparse.Namespace) -> None:
    """Print the report of a run."""
    # The files, as they were given.
    written = [getattr(args, name) for name in _OUTPUTS if getattr(args, name) is not None]
    if args.json:
        beta = None if report.d_beta is None else np.asarray(report.d_beta).tolist()
        content = {
            "tokens": report.tokens,
            "seconds": report.seconds,
            "tokens_per_second": report.tokens_per_second,
            "resumed_tokens": report.resumed_tokens,
            "peak_anonymous_bytes": report.peak_anonymous_bytes,
            "busy": report.busy,
            "digests": report.digests,
            "d_beta": beta,
            "written": written,
        }
        print(json.dumps(content, indent=1))
        return
    if args.d_out is not None:
        print(f"d_beta = {np.array2string(np.asarray(report.d_beta), separator=', ', precision=9)}")
    for name, digest in report.digests.items():
        if getattr(args, name) is not None:
            print(f"digest of {getattr(args, name)}: {digest}")
    busy = ", ".join(
        f"{part} {seconds / report.seconds:.0%}" for part, seconds in report.busy.items()
    )
    print(f"busy: {busy}; peak memory {report.peak_anonymous_bytes / 1e6:,.0f} MB")
    speed = f"{report.tokens_per_second:,.0f} tokens/s"
    print(f"{report.tokens:,} tokens in {report.seconds:.2f} s ({speed}): {', '.join(written)}")


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    """Turn errors of the library about inputs into errors of the command."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise BadInputError(str(error)) from error


@contextlib.contextmanager
def _resume_hint(outputs: dict[str, str]) -> Iterator[None]:
    """Print how to resume a run that ends early."""
    # For Ctrl-C and SIGTERM too, which are no `Exception`.
    try:
        yield
    except BaseException:
        if os.path.exists(f"{outputs['out']}.journal"):
            print("racecore attend: run the same command again to resume", file=sys.stderr)
        raise


def _hash(args: argparse.Namespace) -> racecore.SoftLSH:
    """Return the hash; a random one takes the head dim from the query, so headers are read."""
    # Headers are checked against the size of each file here, before anything is computed.
    shapes = {}
    for name in _INPUTS:
        if (path := getattr(args, name)) is not None:
            try:
                with _input_errors():
                    shapes[name] = npy.read_header(path).shape
            except OSError as error:
                raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    given = {
        name: getattr(args, name) for name in _HASH_DEFAULTS if getattr(args, name) is not None
    }
    if args.lsh is not None:
        return _saved_hash(args.lsh, given)
    if len(shapes["query"]) not in (3, 4):
        raise BadInputError(
            f"{args.query} has shape {shapes['query']}; expected [tokens, heads, dim] or [batch, "
            "tokens, heads, dim]"
        )
    chosen = {**_HASH_DEFAULTS, **given}
    with _input_errors():
        return racecore.SoftLSH.random(
            shapes["query"][-1],
            chosen["tables"],
            chosen["planes"],
            beta=chosen["beta"],
            rng=chosen["seed"],
        )


def _saved_hash(path: str, given: dict[str, Any]) -> racecore.SoftLSH:
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise BadInputError(f"--lsh already says which hash to use; leave out {flags}")
    try:
        with _input_errors():
            return racecore.SoftLSH.load(path)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error


def _checked_outputs(args: argparse.Namespace) -> dict[str, str]:
    """Return the path of each output, after checking that writing it overwrites nothing."""
    named = {name: getattr(args, name) for name in _OUTPUTS}
    outputs = {name: os.path.realpath(path) for name, path in named.items() if path is not None}
    wants_gradients = len(outputs) > 1
    if wants_gradients and args.d_out is None:
        raise BadInputError("gradients need --d-out, the gradient of the output")
    if args.d_out is not None and not wants_gradients:
        raise BadInputError(
            "--d-out was given: say which gradients to write, --d-query, --d-key, --d-value or "
            "--d-lsh"
        )
    sources = {name: getattr(args, name) for name in (*_INPUTS, "lsh")}
    seen = {identity_of(path): _flag(name) for name, path in sources.items() if path is not None}
    # An interrupted run may have renamed some outputs already.
    resumes = os.path.exists(f"{outputs['out']}.journal")
    # In the order of the options, so that the message names the second of two equal files.
    for name, path in outputs.items():
        _check_path(path, named[name])
        if (other := seen.setdefault(identity_of(path), _flag(name))) != _flag(name):
            raise BadInputError(
                f"{_flag(name)} is the same file as {other} ({named[name]}); give it a name of "
                "its own"
            )
        if os.path.exists(path) and not (args.overwrite or resumes):
            raise BadInputError(
                f"{named[name]} exists; choose another name for {_flag(name)}, or add --overwrite"
            )
    return outputs


def _flag(name: str) -> str:
    """Return the option of a parameter of `racecore.outofcore.run`."""
    return f"--{name.replace('_', '-')}"


def _check_path(path: str, shown: str) -> None:
    """Raise an error if a path cannot be written; `shown` is the path as it was given."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise BadInputError(f"cannot write {shown}: there is no folder {folder}")
    # The final rename would replace a device or a pipe by a file.
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInputError(f"cannot write {shown}: it exists and is not a regular file")
