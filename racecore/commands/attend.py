"""racecore attend: attention and its gradients from .npy file to .npy file, in bounded memory."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import racecore
from racecore import files, inputs
from racecore.commands import npy
from racecore.commands.bad_input import BadInputError, natural_int, positive_int
from racecore.commands.bar import token_bar

__all__ = ["add_parser", "parse", "run"]

_DESCRIPTION = """\
RACE attention from .npy files to .npy files. Files are memory-mapped, so they may be far larger than memory.
Outputs get their names only when they are complete; if the run ends early, they are absent."""
_EPILOG = """\
Arrays are [tokens, heads, dim] or [batch, tokens, heads, dim], of one dtype. Outputs have the dtype of the query.

forward:    racecore attend --query q.npy --key k.npy --value v.npy --out o.npy --causal
gradients:  add --d-out g.npy --d-query dq.npy --d-key dk.npy --d-value dv.npy"""
_HASH_DEFAULTS = {"tables": 4, "planes": 4, "beta": 1.0, "seed": 0}


@dataclass(frozen=True)
class _Job:
    """What to compute, checked as far as it can be without computing."""

    arrays: dict[str, np.ndarray]  # query, key, value, and d_out where gradients are wanted
    lsh: racecore.SoftLSH
    targets: dict[str, str]  # out, query, key, value (gradients), lsh: the file that each goes to
    options: dict[str, Any]  # of racecore.attention

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.arrays["query"][..., 0, 0].size


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
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
    """Read the words after `racecore attend`."""
    parser = argparse.ArgumentParser(prog="racecore attend", allow_abbrev=False)
    _add_arguments(parser)
    return parser.parse_args(argv)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--query", required=True, metavar="FILE", help="queries to read, [.., T, H, D]")
    group.add_argument("--key", required=True, metavar="FILE", help="keys to read, [.., T, G, D]; H a multiple of G")
    group.add_argument("--value", required=True, metavar="FILE", help="values to read, [.., T, G, V]")
    group.add_argument("--out", required=True, metavar="FILE", help="attention to write, [.., T, H, V]")
    group.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    group.add_argument(
        "--dtype", choices=["bfloat16"], help="read entries of two untyped bytes (ml_dtypes) as bfloat16"
    )
    group = parser.add_argument_group("gradients (optional)")
    group.add_argument("--d-out", metavar="FILE", help="gradient of the output, to read")
    for name in ("query", "key", "value"):
        group.add_argument(f"--d-{name}", metavar="FILE", help=f"gradient of the {name}, to write")
    group.add_argument("--d-lsh", metavar="FILE", help="gradients of planes and beta, to write (.npz)")
    group = parser.add_argument_group("hash: a saved one, or a random one")
    group.add_argument("--lsh", metavar="FILE", help="what racecore.SoftLSH.save wrote (.npz)")
    group.add_argument("--tables", type=positive_int, metavar="L", help="hash tables; more mean less noise (4)")
    group.add_argument("--planes", type=positive_int, metavar="P", help="planes of a table; more mean sharper (4)")
    group.add_argument("--beta", type=float, metavar="X", help="sharpness of the hash (1.0)")
    group.add_argument("--seed", type=natural_int, metavar="N", help="seed of the planes (0)")
    group = parser.add_argument_group("options")
    group.add_argument("--causal", action="store_true", help="token i sees tokens 0 ... i only")
    group.add_argument("--readout", choices=inputs.READOUTS, default="ratio", help="the estimator (ratio)")
    group.add_argument(
        "--memory-limit", default="1GB", metavar="SIZE", help="bound on memory beyond the mapped files (1GB)"
    )
    group.add_argument("--threads", type=positive_int, metavar="N", help="processors to use (all)")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; return the exit code."""
    job = _prepare(args)
    q, v = job.arrays["query"], job.arrays["value"]
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if args.threads is not None:
            stack.enter_context(racecore.threads(args.threads))
        partial = {name: stack.enter_context(files.replace_when_done(path)) for name, path in job.targets.items()}
        shapes = {"out": (*q.shape[:-1], v.shape[-1])} | {name: job.arrays[name].shape for name in _GRADIENTS}
        maps = {name: npy.create(partial[name], shapes[name], q.dtype) for name in shapes if name in partial}
        with token_bar("racecore attend", _passes(job) * job.n_tokens):
            grads = _compute(job, maps)
        if grads is not None and "lsh" in partial:
            with open(partial["lsh"], "wb") as file:
                np.savez(file, planes=np.asarray(grads.planes), beta=np.asarray(grads.beta))
        for array in maps.values():
            npy.finish(array)
    seconds = time.perf_counter() - started
    if grads is not None:
        print(f"d_beta = {np.array2string(np.asarray(grads.beta), separator=', ', precision=9)}")
    speed = job.n_tokens / seconds
    print(f"{job.n_tokens:,} tokens in {seconds:.2f} s ({speed:,.0f} tokens/s): {', '.join(_written(args))}")
    return 0


_GRADIENTS = ("query", "key", "value")


def _compute(job: _Job, maps: dict[str, np.memmap]) -> racecore.Gradients | None:
    """Write to the maps; the library goes through the arrays in chunks."""
    q, k, v = (job.arrays[name] for name in ("query", "key", "value"))
    if "d_out" not in job.arrays:
        racecore.attention(q, k, v, job.lsh, out=maps["out"], **job.options)
        return None
    wrt = [name for name in _GRADIENTS if name in maps] + ["beta"] + ["planes"] * ("lsh" in job.targets)
    _, saved = racecore.attention_forward(q, k, v, job.lsh, out=maps["out"], wrt=wrt, **job.options)
    out = racecore.Gradients(query=maps.get("query"), key=maps.get("key"), value=maps.get("value"))
    return racecore.attention_backward(job.arrays["d_out"], saved, out=out)


def _passes(job: _Job) -> int:
    """Return how often the tokens are gone through."""
    forward = 1 if job.options["is_causal"] else 2
    return forward + (2 if "d_out" in job.arrays else 0)


def _prepare(args: argparse.Namespace) -> _Job:
    """Open the inputs and check everything that can be wrong before the work starts."""
    sources = {name: getattr(args, name) for name in ("query", "key", "value")}
    if args.d_out is not None:
        sources["d_out"] = args.d_out
    opened = {name: _native(npy.open_array(path, args.dtype), path) for name, path in sources.items()}
    targets = _checked_targets(args, sources)
    options = {"is_causal": args.causal, "readout": args.readout, "memory_limit": args.memory_limit}
    q, k, v = (opened[name] for name in ("query", "key", "value"))
    try:
        lsh = _hash(args, q.shape[-1])
        inputs.check_attention(q, k, v, lsh, key_mask=None, cu_seqlens=None, chunk_size=None, **options)
    except (ValueError, TypeError) as error:
        raise BadInputError(str(error)) from error
    shape = (*q.shape[:-1], v.shape[-1])
    if "d_out" in opened and opened["d_out"].shape != shape:
        raise BadInputError(f"{args.d_out} must have the shape of the output, {shape}, got {opened['d_out'].shape}")
    return _Job(opened, lsh, targets, options)


def _native(array: np.memmap, path: str) -> np.ndarray:
    if array.dtype.isnative:
        return array
    print(f"racecore attend: {path} has foreign byte order and is copied into memory", file=sys.stderr)
    return array.astype(array.dtype.newbyteorder("="))


def _hash(args: argparse.Namespace, head_dim: int) -> racecore.SoftLSH:
    given = {name: getattr(args, name) for name in _HASH_DEFAULTS if getattr(args, name) is not None}
    if args.lsh is None:
        chosen = {**_HASH_DEFAULTS, **given}
        return racecore.SoftLSH.random(
            head_dim, chosen["tables"], chosen["planes"], beta=chosen["beta"], rng=chosen["seed"]
        )
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise BadInputError(f"--lsh already says which hash to use; leave out {flags}")
    try:
        return racecore.SoftLSH.load(args.lsh)
    except OSError as error:
        raise BadInputError(f"cannot read {args.lsh}: {error.strerror}") from error


def _checked_targets(args: argparse.Namespace, sources: dict[str, str]) -> dict[str, str]:
    """Return the file for each result, after checking that writing it destroys nothing."""
    flags = {"out": "--out"} | {name: f"--d-{name}" for name in (*_GRADIENTS, "lsh")}
    named = {name: getattr(args, "out" if name == "out" else f"d_{name}") for name in flags}
    targets = {name: os.path.realpath(path) for name, path in named.items() if path is not None}
    wants_gradients = len(targets) > 1
    if wants_gradients and args.d_out is None:
        raise BadInputError("gradients need --d-out, the gradient of the output")
    if args.d_out is not None and not wants_gradients:
        raise BadInputError("--d-out was given: say which gradients to write, --d-query, --d-key, --d-value or --d-lsh")
    seen = {_identity(path): f"--{name.replace('_', '-')}" for name, path in sources.items()}
    if args.lsh is not None:
        seen[_identity(args.lsh)] = "--lsh"
    for name, path in targets.items():
        _check_place(path, named[name])
        if (other := seen.setdefault(_identity(path), flags[name])) != flags[name]:
            raise BadInputError(f"{flags[name]} is the same file as {other} ({named[name]}); give it a name of its own")
        if os.path.exists(path) and not args.overwrite:
            raise BadInputError(f"{named[name]} exists; choose another name for {flags[name]}, or add --overwrite")
    return targets


def _check_place(path: str, shown: str) -> None:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise BadInputError(f"cannot write {shown}: there is no folder {folder}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadInputError(f"cannot write {shown}: it exists and is not a regular file")


def _identity(path: str) -> tuple[object, ...]:
    """Return what two names of one file have in common: device and inode, or the resolved name of a file to be."""
    try:
        status = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return status.st_dev, status.st_ino


def _written(args: argparse.Namespace) -> list[str]:
    named = (args.out, args.d_query, args.d_key, args.d_value, args.d_lsh)
    return [path for path in named if path is not None]
