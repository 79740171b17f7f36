"""Measure racecore, its peers in torch and the ceilings of the machine in one run.

Writes the table and the picture.

    python asv_benchmarks/compare.py            # everything: some twenty minutes on an idle machine
    python asv_benchmarks/compare.py --quick    # a few lengths, about a minute: a smoke test
    python asv_benchmarks/compare.py --methods racecore softmax --lengths 2^12 2^14
    python asv_benchmarks/compare.py --from-json docs/performance.json    # without measuring

Forward + backward of one attention layer: B = 1, H = 4, D = V = 128, float32, gradients of query,
key, value (and beta, where there is one), as many threads as there are processors, no environment
variables. Every method and length runs in its own process: one call on 128 tokens, then repeated
calls at the full length; the best repetition counts. Peak memory is that of the process beyond its
inputs (query, key, value and the gradient of the output); it includes outputs and gradients.
racecore writes into the arrays that its first call returned (`out=`); the cost of allocating them
at every call is printed too. Sweeps of peers end where a call would take longer than `--patience`,
or need more than 85 % of the free memory.

Needs Linux, torch for the peers and Matplotlib for the picture: pip install torch matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile
from typing import Any

import ceilings
import machine
import report
import workers
from cases import BATCH, DIM, HASHES, HEADS, METHODS, Case, Setting, all_cases

__all__ = ["main"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTHS = [2**n for n in range(10, 21)]
PATIENCE = 20.0  # seconds of one call
SECONDS = 1.5  # of repetitions
MEMORY_SHARE = 0.85
_FIRST = 2**10  # the length from which time and memory of the first requested one are estimated


class Sweep:
    """All cases, length by length: figures to compare are measured within minutes."""

    def __init__(self, cases: list[Case], patience: float, seconds: float) -> None:
        self.cases = cases
        self.patience = patience
        self.seconds = seconds
        self.runs: list[dict[str, Any]] = []
        self.stopped: list[dict[str, Any]] = []
        self._last: dict[Case, dict[str, Any]] = {}

    def prepare(self, first: int) -> None:
        """Compile missing kernels, and estimate time and memory of the first length."""
        for case in self.cases:
            if case.method != "racecore" and first <= _FIRST:
                continue
            try:
                self._last[case] = self._measure(case, _FIRST)
            except workers.WorkerError as error:
                self._stop(case, _FIRST, str(error))

    def at(self, tokens: int) -> None:
        """Measure every case that has not been stopped."""
        done = {Case.of(stop) for stop in self.stopped}
        for case in self.cases:
            if case in done:
                continue
            reason = self._too_much(case, tokens)
            if reason is None:
                try:
                    record = self._measure(case, tokens)
                except workers.WorkerError as error:
                    reason = str(error)
                else:
                    self._last[case] = record
                    self.runs.append(record)
                    print(report.run_line(record), flush=True)
                    continue
            self._stop(case, tokens, reason)

    def _measure(self, case: Case, tokens: int) -> dict[str, Any]:
        memory = int(MEMORY_SHARE * machine.free_memory())
        job = {
            "kind": "case",
            "case": case.as_dict(),
            "tokens": tokens,
            "seconds": self.seconds,
            "memory": memory,
        }
        return {
            **case.as_dict(),
            "tokens": tokens,
            **workers.run(job, timeout=180 + 6 * self.patience),
        }

    def _too_much(self, case: Case, tokens: int) -> str | None:
        """Return why the next length is not tried, estimated from the one before."""
        last = self._last.get(case)
        if last is None:
            return None
        ratio = tokens / last["tokens"]
        seconds = last["seconds"] * ratio**case.exponent
        if seconds > self.patience:
            return f"time: some {seconds:.0f} s a call"
        n_bytes = last["peak_bytes"] * ratio + 4 * BATCH * tokens * HEADS * DIM * 4
        if n_bytes > MEMORY_SHARE * machine.free_memory():
            return f"memory: some {n_bytes / 1e9:.0f} GB"
        return None

    def _stop(self, case: Case, tokens: int, reason: str) -> None:
        self.stopped.append({**case.as_dict(), "tokens": tokens, "reason": reason})
        print(
            f"{case.label}, {case.direction}: stops before {tokens:,} tokens; {reason}", flush=True
        )


def experiments(tokens: int, long_tokens: int, n_processors: int) -> dict[str, list[Setting]]:
    """Return settings of racecore to be measured alternately, in one process."""
    counts = sorted({1, min(2, n_processors), n_processors})
    found = {}
    for causal in (False, True):
        way = "causal" if causal else "bidirectional"
        found[f"fresh outputs, {way}"] = [
            Setting(tokens, causal, fresh_outputs=fresh) for fresh in (False, True)
        ]
        found[f"threads, {way}"] = [Setting(tokens, causal, threads=n) for n in counts]
        if importlib.util.find_spec("ml_dtypes") is not None:
            found[f"bfloat16, {way}"] = [
                Setting(tokens, causal, dtype=name) for name in ("float32", "bfloat16")
            ]
    found["heads, causal"] = [Setting(long_tokens, True, heads=n) for n in (HEADS, 1)]
    return found


def measure_experiments(
    settings: dict[str, list[Setting]], seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Run every experiment in its own process; return each setting with its timings."""
    results = {}
    for name, variants in settings.items():
        memory = int(MEMORY_SHARE * machine.free_memory())
        chosen = [variant.as_dict() for variant in variants]
        job = {"kind": "settings", "settings": chosen, "seconds": seconds, "memory": memory}
        try:
            timings = workers.run(job, timeout=300)["timings"]
        except workers.WorkerError as error:
            print(f"{name}: not measured; {error}", flush=True)
            continue
        results[name] = [
            variant.as_dict() | timing for variant, timing in zip(variants, timings, strict=True)
        ]
    return results


def measure_roofline(
    tokens: int, hashes: tuple[tuple[int, int], ...], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure the ceilings of all cores and racecore alternately, so that disturbances affect both.

    Returns
    -------
    list of dict
        One per round: "ceilings", and "runs", the timings of every hash in both directions.
    """
    settings = [Setting(tokens, causal, *sizes) for causal in (False, True) for sizes in hashes]
    chosen = [setting.as_dict() for setting in settings]
    found = []
    for _ in range(rounds):
        rates = ceilings.measure(rounds=5)
        job = {
            "kind": "settings",
            "settings": chosen,
            "seconds": seconds,
            "memory": int(MEMORY_SHARE * machine.free_memory()),
        }
        timings = workers.run(job, timeout=300)["timings"]
        runs = [setting | timing for setting, timing in zip(chosen, timings, strict=True)]
        found.append({"ceilings": rates, "runs": runs})
        print(report.round_line(found[-1]), flush=True)
    return found


def measure(options: argparse.Namespace, save: Any) -> dict[str, Any]:
    """Measure everything, in the order: ceilings, peers verified, roofline, experiments, sweep."""
    quick = options.quick
    rounds, seconds, patience = (
        (2, 0.2, min(options.patience, 2.0)) if quick else (9, SECONDS, options.patience)
    )
    hashes = HASHES[:1] if quick else HASHES
    cases = all_cases(options.methods, hashes)
    data: dict[str, Any] = {
        "command": " ".join(["python asv_benchmarks/compare.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "setting": {"batch": BATCH, "heads": HEADS, "dim": DIM, "dtype": "float32"},
        "lengths": options.lengths,
    }
    print(report.machine_line(data))
    data["ceilings"] = {"all": ceilings.measure(), "one": ceilings.measure(1)}
    if set(options.methods) - {"racecore"}:
        data["verified"] = workers.run({"kind": "verify"}, timeout=300)
        print("verified: every peer agrees with its definition", flush=True)
    sweep = Sweep(cases, patience, seconds)
    data |= {"runs": sweep.runs, "stopped": sweep.stopped, "rounds": [], "experiments": {}}
    print("warming up (compiling missing kernels takes a minute or two, once)", flush=True)
    sweep.prepare(options.lengths[0])
    if "racecore" in options.methods:
        tokens, long_tokens = (2**12, 2**14) if quick else (2**16, 2**18)
        data["rounds"] = measure_roofline(tokens, hashes, rounds, seconds)
        settings = experiments(tokens, long_tokens, data["machine"]["processors"])
        data["experiments"] = measure_experiments(settings, seconds)
        save(data)
    for tokens in options.lengths:
        sweep.at(tokens)
        save(data)
    return data


def check_packages(methods: list[str]) -> None:
    """Fail before anything is measured if a package is missing."""
    needed = ["matplotlib", "torch"] if set(methods) - {"racecore"} else ["matplotlib"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"the comparison needs {' and '.join(missing)}: pip install {' '.join(missing)} "
            "(without torch, --methods racecore works)"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test; writes to a temporary folder"
    )
    parser.add_argument(
        "--lengths", nargs="+", type=_length, metavar="T", help="tokens, such as 4096 or 2^12"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, help="seconds of one call (%(default)g)"
    )
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="instead of docs")
    parser.add_argument(
        "--from-json", type=pathlib.Path, metavar="FILE", help="draw earlier measurements"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lengths = sorted(set(options.lengths or ([2**10, 2**12] if options.quick else LENGTHS)))
    if options.output is None:
        scratch = options.quick and options.from_json is None
        options.output = (
            pathlib.Path(tempfile.mkdtemp(prefix="racecore-compare-")) if scratch else ROOT / "docs"
        )
    return options


def _length(text: str) -> int:
    base, _, power = text.replace("**", "^").partition("^")
    tokens = int(base) ** int(power or 1)
    if tokens < 1 or tokens % 128:
        raise argparse.ArgumentTypeError(
            f"a length is a positive multiple of 128 tokens, got {text}"
        )
    return tokens


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    if options.worker is not None:
        print(json.dumps(workers.answer(json.loads(options.worker))))
        return
    path = options.output / "performance.json"
    if options.from_json is not None:
        data = json.loads(options.from_json.read_text())
    else:
        check_packages(options.methods)
        options.output.mkdir(parents=True, exist_ok=True)
        data = measure(options, lambda data: path.write_text(json.dumps(data, indent=1) + "\n"))
        print(f"\nwrote {path}")
    for written in report.write(data, options.output):
        print(f"wrote {written}")
    print("\n" + "\n".join(report.summary(data)))
    failed = [
        stop
        for stop in data["stopped"]
        if stop["method"] == "racecore" and "memory" not in stop["reason"]
    ]
    if failed:
        raise SystemExit(f"racecore itself did not finish: {failed}")


if __name__ == "__main__":
    main()
