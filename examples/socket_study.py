"""Compare scorers, planes, tables and temperatures of SOCKET.

    python examples/socket_study.py

There are three kinds of caches: generated clusters, caches of a transformer that is trained here
(this needs PyTorch), and needles in a haystack of 2^17 tokens. SOCKET is compared with page bounds
as in Quest, random tokens, and an oracle. Writes tables (`tables.md`), all numbers (`study.json`)
and pictures to a folder. Some minutes; `--quick` takes seconds; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pictures
import socket_pictures
import socket_tables
from socket_data import VARIANTS, clusters, haystack
from socket_methods import (
    Cache,
    Method,
    Oracle,
    Quest,
    Random,
    Socket,
    chosen,
    quality,
    true_weights,
)
from socket_tables import Needles, Row

SCORERS = ("soft", "hamming", "signed_jl")
METHODS: list[Method] = [
    Oracle(),
    Oracle(by_value=True),
    *(Socket(scorer, weighs) for scorer in reversed(SCORERS) for weighs in (False, True)),
    Socket("signed_jl", centres=True),
    Quest(16),
    Quest(4),
    Random(),
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and settings of the study."""

    cluster_tokens: int = 1 << 14
    cluster_queries: int = 32
    haystack_tokens: int = 1 << 17
    haystack_queries: int = 64
    likeness: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    seeds: tuple[int, ...] = (0, 1, 2)
    kept: tuple[int, ...] = (5, 10, 20, 33, 50)  # one token in so many is selected
    taus: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6, 1.0, 2.0)
    tables: tuple[int, ...] = (15, 30, 60, 120)
    pages: tuple[int, ...] = (2, 4, 8, 16, 32)


QUICK = Plan(
    cluster_tokens=1 << 11,
    cluster_queries=8,
    haystack_tokens=1 << 12,
    haystack_queries=8,
    likeness=(0.6, 0.8),
    seeds=(0,),
    kept=(1, 5, 20),
    taus=(0.1, 0.4),
    tables=(30, 60),
    pages=(4, 16),
)


class Bench:
    """One kind of caches, a cache for every seed, and the results."""

    def __init__(
        self,
        name: str,
        parts: tuple[str, ...],
        seeds: tuple[int, ...],
        make: Callable[[int], Cache],
    ) -> None:
        self.name, self.parts, self.seeds = name, parts, seeds
        self.caches = [make(seed) for seed in seeds]
        self.weights = [true_weights(cache) for cache in self.caches]

    def rows(
        self, table: str, method: Method, kept: tuple[int, ...], ends: tuple[int, int] = (0, 0)
    ) -> list[Row]:
        """Measure a method that selects one token in `kept`, `ends` of them by position.

        Heads are sorted by part, with equal numbers of heads.
        """
        found = np.empty((len(kept), 2, len(self.parts), len(self.seeds)))
        for s, (seed, cache, weights) in enumerate(
            zip(self.seeds, self.caches, self.weights, strict=True)
        ):
            scores = method.scores(cache, seed)
            for i, few in enumerate(kept):
                budget = max(0, -(-cache.key.shape[1] // few) - sum(ends))
                takes = chosen(
                    scores, budget, *ends, method.page if isinstance(method, Quest) else 1
                )
                for j, numbers in enumerate(quality(cache, weights, takes)):
                    found[i, j, :, s] = numbers.reshape(len(numbers), len(self.parts), -1).mean(
                        axis=(0, 2)
                    )
        size = method.bytes_per_token(self.caches[0].key.shape[3])
        settings = dataclasses.asdict(method)
        return [
            Row(
                self.name,
                table,
                part,
                str(method),
                settings,
                size,
                few,
                ends,
                found[i, 0, p].tolist(),
                found[i, 1, p].tolist(),
            )
            for i, few in enumerate(kept)
            for p, part in enumerate(self.parts)
        ]


def compare(bench: Bench, plan: Plan) -> list[Row]:
    """Vary budgets, sizes, planes, temperature, and the number of tokens selected by position."""
    middle = plan.kept[len(plan.kept) // 2 :][:1]  # one in 20
    found = [row for method in METHODS for row in bench.rows("methods", method, plan.kept)]
    for n_tables in plan.tables:
        for scorer in SCORERS:
            found += bench.rows("size", Socket(scorer, n_tables=n_tables), middle)
    for page in plan.pages:
        found += bench.rows("size", Quest(page), middle)
    for n_planes, n_tables in (
        (2, 60),
        (4, 60),
        (6, 60),
        (8, 60),
        (10, 48),
        (12, 40),
        (16, 30),
    ):  # of 60 bytes each
        for weighs in (False, True) if n_planes in (8, 10) else (False,):
            for tau in plan.taus:
                method = Socket(weighs=weighs, n_tables=n_tables, n_planes=n_planes, tau=tau)
                found += bench.rows("tau", method, middle)
    for ends in ((0, 0), (4, 0), (0, 16), (4, 32), (0, 64), (0, 128)):
        for scorer in ("signed_jl", "soft"):
            found += bench.rows("ends", Socket(scorer), middle, ends)
    return found


def find_needles(plan: Plan) -> list[Needles]:
    """Return the rank of the needle among all tokens for every method."""
    stacks = [
        haystack(plan.haystack_tokens, plan.haystack_queries, plan.likeness, seed)
        for seed in plan.seeds
    ]
    likeness = np.concatenate([stack.likeness for stack in stacks])
    found = []
    for method in METHODS:
        ranks = []
        for seed, stack in zip(plan.seeds, stacks, strict=True):
            scores = method.scores(stack.cache, seed)[0]  # [H, T]
            of_needles = np.take_along_axis(scores, stack.needles[:, None], axis=1)
            ranks.append((scores >= of_needles).sum(axis=1))  # of a page, that of its last token
        found.append(
            Needles(
                str(method),
                method.bytes_per_token(stacks[0].cache.key.shape[3]),
                likeness,
                np.concatenate(ranks),
            )
        )
    return found


def tables(rows: list[Row], needles: list[Needles]) -> str:
    """Return all tables."""
    text = ""
    for bench in dict.fromkeys(row.bench for row in rows):
        for table in (
            socket_tables.by_budget,
            socket_tables.by_part,
            socket_tables.by_tau,
            socket_tables.by_ends,
        ):
            text += table(rows, bench)
    text += socket_tables.by_size(rows) + socket_tables.by_pairs(rows) if rows else ""
    return text + (socket_tables.of_needles(needles) if needles else "")


def main() -> None:
    """Read the command line, measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=("clusters", "real", "haystack"),
        help="some of the three; default all",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds; the numbers mean nothing"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("socket_study"), help="a folder"
    )
    arguments = parser.parse_args()
    plan, wanted = (
        QUICK if arguments.quick else Plan(),
        arguments.only or ("clusters", "real", "haystack"),
    )
    rows: list[Row] = []
    needles: list[Needles] = []
    about = ""
    if "clusters" in wanted:
        bench = Bench(
            "clusters",
            VARIANTS,
            plan.seeds,
            lambda seed: clusters(plan.cluster_tokens, plan.cluster_queries, seed),
        )
        rows += compare(bench, plan)
    if "haystack" in wanted:
        needles = find_needles(plan)
    if "real" in wanted:
        import socket_real  # here, since it needs PyTorch

        training = socket_real.QUICK if arguments.quick else socket_real.Training()
        cache, loss = socket_real.trained_cache(training, socket_real.text(arguments.quick))
        about = f"{training}, validation loss {loss:.3f}"
        parts = tuple(f"layer {i + 1}" for i in range(training.layers))
        rows += compare(Bench("real", parts, plan.seeds, lambda seed: cache), plan)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = (
        f"Printed by `python examples/socket_study.py`: {pictures.machine()}.\n{about}\n"
        + tables(rows, needles)
    )
    print(text)
    (arguments.out / "tables.md").write_text(text)
    found = {
        "plan": dataclasses.asdict(plan),
        "rows": [row._asdict() for row in rows],
        "needles": [
            needle._replace(
                likeness=needle.likeness.tolist(), ranks=needle.ranks.tolist()
            )._asdict()
            for needle in needles
        ],
    }
    (arguments.out / "study.json").write_text(json.dumps(found))
    socket_pictures.draw(rows, needles, arguments.out)


if __name__ == "__main__":
    main()
