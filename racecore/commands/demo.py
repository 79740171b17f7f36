"""racecore demo: attention on files, forward and backward, checked and timed, in a minute."""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import numpy as np

import racecore
from racecore.commands import attend, softmax_comparison
from racecore.commands.bad_input import BadInputError, natural_int, positive_int
from racecore.commands.exact_rows import exact_rows
from racecore.outofcore import npy
from racecore.runtime.threads import default_count

__all__ = ["add_parser", "run"]

_INPUTS = ("q", "k", "v", "d_out")
_RESULTS = ("out", "d_query", "d_key", "d_value")
_MARKER = "made-by-racecore-demo.txt"
_TOPICS = 64
# Tokens generated at once.
_BLOCK = 1 << 16
# Relative error of a float32 row; usual is 1e-6.
_TOLERANCE = 1e-4


def add_parser(commands: Any) -> None:
    """Add this command to the program's."""
    parser = commands.add_parser(
        "demo",
        help="run, check and time attention on this machine in a minute",
        description="Write arrays to files, run `racecore attend` on them forward and backward, "
        "check rows of every result against an exact computation, and compare the speed with "
        "softmax attention. Takes a minute or less; the folder can be deleted afterwards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--folder", default="racecore-demo", metavar="DIR", help="folder to write")
    parser.add_argument(
        "--tokens", type=positive_int, default=65_536, metavar="T", help="length of the sequence"
    )
    parser.add_argument(
        "--heads", type=positive_int, default=4, metavar="H", help="attention heads"
    )
    parser.add_argument(
        "--head-dim", type=positive_int, default=64, metavar="D", help="dimension of a head"
    )
    parser.add_argument(
        "--seed", type=natural_int, default=0, help="seed of the data and of the hash"
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads to use; all processors if absent"
    )
    parser.add_argument(
        "--quick", action="store_true", help="at most 4,096 tokens and short timings: a few seconds"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all steps; return 1 if a row is wrong."""
    started = time.perf_counter()
    folder = _prepare_folder(args.folder)
    tokens = min(args.tokens, 4096) if args.quick else args.tokens
    lsh = racecore.SoftLSH.random(args.head_dim, rng=args.seed)
    _say(f"racecore {racecore.__version__}: RACE attention, forward and backward, in linear time.")
    _load_kernels(args)
    _write_inputs(folder, (tokens, args.heads, args.head_dim), args.seed)
    _attend(folder, args)
    is_correct = _check(folder, lsh, args.seed)
    _show_quality(folder, lsh)
    _compare_with_softmax(folder, args, lsh)
    _say(f"""
{"All rows are correct" if is_correct else "ROWS ARE WRONG: please report this"}; the demo took \
{time.perf_counter() - started:.0f} s. Next steps:
  in Python    out = racecore.attention(query, key, value)      # NumPy arrays [tokens, heads, dim]
  on files     {_command()} attend --help
  trouble      {_command()} doctor
  clean up     rm -r {folder}""")
    return 0 if is_correct else 1


def _say(text: str) -> None:
    print(text, flush=True)


def _prepare_folder(name: str) -> pathlib.Path:
    """Create the folder; refuse one with files of others, which might be overwritten."""
    folder = pathlib.Path(name)
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"{folder} exists and is not a folder; choose another --folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise BadInputError(
            f"the folder {folder} holds files that are not the demo's; choose another --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).write_text(
        "Everything in this folder was made by `racecore demo` and may be deleted.\n"
    )
    return folder


def _command() -> str:
    """Return the command that starts this program: its name, or its path if it is not in PATH."""
    return "racecore" if shutil.which("racecore") else os.path.relpath(sys.argv[0])


def _load_kernels(args: argparse.Namespace) -> None:
    """Compile the kernels, so that it is not part of the timings."""
    started = time.perf_counter()
    x = np.ones((4, 1, args.head_dim), np.float32)
    racecore.attention_backward(*racecore.attention_forward(x, x, x))
    _say(
        f"Kernels ready in {time.perf_counter() - started:.1f} s (compiled on first use, then "
        "cached)."
    )


def _write_inputs(folder: pathlib.Path, shape: tuple[int, int, int], seed: int) -> None:
    """Write tokens of random topics: keys of one topic are similar, and so are their values.

    Queries and keys are scaled to rows of norm about 1, as after a normalisation layer.
    """
    started = time.perf_counter()
    # Another stream than `seed`, from which the hash draws its planes.
    rng = np.random.default_rng([seed, 1])
    tokens, heads, dim = shape
    scales = dict(zip(_INPUTS, (0.7 / dim**0.5, 0.7 / dim**0.5, 0.7, 1.0), strict=True))
    topics = rng.standard_normal((2, _TOPICS, heads, dim), dtype=np.float32)
    maps = {
        name: npy.create(str(folder / f"{name}.npy"), shape, np.dtype(np.float32))
        for name in _INPUTS
    }
    for begin in range(0, tokens, _BLOCK):
        n = min(_BLOCK, tokens - begin)
        # Each query looks for a topic of its own.
        wanted, topic = rng.integers(_TOPICS, size=(2, n))
        means = {
            "q": topics[0, wanted],
            "k": topics[0, topic],
            "v": topics[1, topic],
            "d_out": np.float32(0),
        }
        for name, array in maps.items():
            noise = rng.standard_normal((n, heads, dim), dtype=np.float32)
            array[begin : begin + n] = np.float32(scales[name]) * (means[name] + noise)
    megabytes = sum(array.nbytes for array in maps.values()) / 1e6
    _say(f"""
1. Inputs: {tokens:,} tokens, {heads} heads of {dim} values, float32, {megabytes:,.0f} MB \
in {time.perf_counter() - started:.1f} s
   {" ".join(f"{folder}/{name}.npy" for name in _INPUTS)}""")


def _attend(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Print and run the command `racecore attend`."""
    files = {"--query": "q", "--key": "k", "--value": "v", "--out": "out", "--d-out": "d_out"}
    files |= {"--d-query": "d_query", "--d-key": "d_key", "--d-value": "d_value"}
    words = [
        word for flag, name in files.items() for word in (flag, os.path.join(folder, f"{name}.npy"))
    ]
    options = ["--seed", str(args.seed), "--overwrite"]
    options += [] if args.threads is None else ["--threads", str(args.threads)]
    pairs = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    _say("\n2. Attention and its gradients, from file to file, by the command:")
    _say("   racecore attend " + " \\\n       ".join([*pairs, " ".join(options)]))
    attend.run(attend.parse([*words, *options]))


def _check(folder: pathlib.Path, lsh: racecore.SoftLSH, seed: int) -> bool:
    """Compare some rows of every head with exact ones; return whether all are correct."""
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*_INPUTS, *_RESULTS)
    }
    tokens, heads, _ = arrays["q"].shape
    sample = np.random.default_rng(seed).integers(tokens, size=14)
    # The first and the last row too, where errors at boundaries show.
    rows = np.unique([0, tokens - 1, *sample])
    worst = dict.fromkeys(_RESULTS, 0.0)
    for h in range(heads):
        # [T, D] of one head, still in the files.
        q, k, v, d_out = (arrays[name][:, h] for name in _INPUTS)
        exact = exact_rows(q, k, v, d_out, lsh.planes, lsh.beta, rows)
        for name in _RESULTS:
            wanted = getattr(exact, name)
            error = np.linalg.norm(arrays[name][rows, h] - wanted, axis=1)
            size = np.linalg.norm(wanted, axis=1)
            relative = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
            worst[name] = max(
                worst[name], float(np.where(np.isnan(relative), np.inf, relative).max())
            )
    _say(f"""
3. {len(rows)} rows of each head compared with exact ones (float64, NumPy, no code of racecore):

   array      largest relative error""")
    for name, error in worst.items():
        _say(
            f"   {name:<10} {error:.1e}   "
            f"{'ok' if error <= _TOLERANCE else f'WRONG: more than {_TOLERANCE:g}'}"
        )
    _say(f"   largest    {max(worst.values()):.1e}")
    return max(worst.values()) <= _TOLERANCE


def _show_quality(folder: pathlib.Path, lsh: racecore.SoftLSH) -> None:
    """Print the distance of RACE from attention under the kernel that it estimates, for several
    hashes, and that of the mean of all values.
    """
    q, k, v = (np.load(folder / f"{name}.npy", mmap_mode="r")[:_BLOCK] for name in ("q", "k", "v"))
    q = q[:32]
    exact = racecore.exact.angular_attention(q, k, v, lsh.n_planes)
    betas = (1.0, 4.0)

    def distance(out: np.ndarray) -> str:
        """Return the relative distance from the exact result, in per cent."""
        return f"{np.linalg.norm(out - exact) / np.linalg.norm(exact):.0%}"

    mean = distance(v.mean(axis=0))
    header = "".join(f"   beta {beta:g}" for beta in betas)
    _say(f"""
   RACE estimates attention under the angular kernel. Its relative distance from the exact result,
   {len(q)} queries on {len(k):,} keys of these data (plain mean of all values: {mean}):

                {header}""")
    for n_tables in (4, 16, 64):
        hashes = [
            racecore.SoftLSH.random(lsh.head_dim, n_tables, lsh.n_planes, beta=beta, rng=0)
            for beta in betas
        ]
        cells = "".join(f"{distance(racecore.attention(q, k, v, h)):>9}" for h in hashes)
        _say(f"   {n_tables:3} tables    {cells}")
    _say("""
   Few tables give noise, a small beta blurs; a larger beta needs more tables. Models adapt to
   either in training.""")


def _compare_with_softmax(
    folder: pathlib.Path, args: argparse.Namespace, lsh: racecore.SoftLSH
) -> None:
    """Time RACE and softmax attention; print a table and draw a picture."""
    # 64 tokens to 4,096 or 131,072.
    lengths = [1 << n for n in range(6, 13 if args.quick else 18)]
    max_seconds = 0.5 if args.quick else 4.0
    n_threads = args.threads or default_count()
    threads = f"{n_threads} thread{'s' if n_threads > 1 else ''}"
    _say(
        f"\n4. Speed in memory, {threads}: RACE and softmax attention (NumPy, blocks of queries), "
        "float32\n"
    )
    timings = list(
        softmax_comparison.measure(lengths, args.heads, args.head_dim, lsh, n_threads, max_seconds)
    )
    _say(softmax_comparison.table(timings) + "\n")
    short = softmax_comparison.lengths_where_softmax_is_faster(timings)
    if short:
        _say(
            f"   Up to {short[-1]:,} tokens softmax is faster here: use it for short sequences, "
            "it is exact."
        )
    else:
        _say("   Softmax was not faster here, but it is exact: prefer it for short sequences.")
    picture = folder / "race_vs_softmax.png"
    title = f"RACE and softmax attention, {args.heads} heads of {args.head_dim}, float32, {threads}"
    try:
        from racecore.commands.picture import draw

        draw(str(picture), timings, title)
        _say(f"   Picture: {picture}")
    except ImportError:
        _say("   No picture: Matplotlib is not installed (pip install matplotlib).")
