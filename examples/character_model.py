"""Train a small character model on Wikipedia with softmax and with RACE attention.

    python examples/character_model.py

The initial weights, the batches and their order, and the number of steps are the same; only
attention differs. Writes `character_model.json` and `.png`. `--all` trains both readouts at (P, L)
= (2, 2) and (4, 4); `--time` measures a training step against the length of the context instead;
`--quick` takes seconds and no data.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import time
from typing import Any

import data_sets
import numpy as np
import pictures
import torch
import torch.nn.functional as F
from layers import SOFTMAX, Kind, blocks
from torch import nn
from tqdm import tqdm

ALL = [SOFTMAX, *(Kind(readout, n, n) for readout in ("ratio", "bucket_mean") for n in (4, 2))]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings that are the same for every kind of attention."""

    steps: int = 400
    context: int = 1024
    batch: int = 2
    dim: int = 128
    heads: int = 4
    layers: int = 2
    width: int = 4  # of the short convolution before attention; 0: none
    rate: float = 2e-3
    hash_rate: float = 20.0  # times the rate, for planes and beta
    evaluations: int = 10
    validation_windows: int = 32
    seed: int = 0


class CharacterModel(nn.Module):
    """Characters [B, T] -> logits of the next one [B, T, C]."""

    def __init__(self, n_characters: int, plan: Plan, kind: Kind) -> None:
        super().__init__()
        self.blocks = blocks(
            plan.dim,
            plan.heads,
            plan.layers,
            kind,
            is_causal=True,
            width=plan.width,
            seed=plan.seed,
        )
        torch.manual_seed(plan.seed)  # drawn in the same way for every kind of attention
        self.embedding, self.head = (
            nn.Embedding(n_characters, plan.dim),
            nn.Linear(plan.dim, n_characters),
        )
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Predict."""
        return self.head(self.blocks(self.embedding(characters)))


def windows(text: torch.Tensor, starts: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut pieces out of a text; return their characters and the next ones, both [B, T]."""
    pieces = torch.stack([text[start : start + length + 1] for start in starts])
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy in nats a character."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, text: torch.Tensor, plan: Plan) -> float:
    """Return the loss over windows evenly spaced in the text."""
    starts = np.linspace(0, len(text) - plan.context - 1, plan.validation_windows).astype(int)
    parts = np.array_split(starts, math.ceil(len(starts) / plan.batch))
    losses = [
        loss_of(model, *windows(text, part, plan.context)).item() * len(part) for part in parts
    ]
    return sum(losses) / len(starts)


def optimizer_of(
    model: nn.Module, plan: Plan
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW, which decays matrices only, and learns the hash faster; and a cosine schedule
    with a short warm-up.
    """
    matrices, vectors, of_hash = [], [], []
    for name, parameter in model.named_parameters():
        kind = (
            of_hash
            if name.endswith(("planes", "beta"))
            else matrices
            if parameter.ndim > 1
            else vectors
        )
        kind.append(parameter)
    settings = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
        {"params": of_hash, "weight_decay": 0.0, "lr": plan.hash_rate * plan.rate},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in settings if group["params"]], lr=plan.rate, betas=(0.9, 0.95)
    )
    warm_up = max(plan.steps // 20, 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (
            0.55 + 0.45 * math.cos(math.pi * step / plan.steps)
        )

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(kind: Kind, text: torch.Tensor, model: CharacterModel, plan: Plan) -> dict[str, Any]:
    """Train a model; return its validation losses and the time of the steps."""
    training, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    optimizer, schedule = optimizer_of(model, plan)
    rng = np.random.default_rng(plan.seed)
    curve, seconds = [], []
    every = max(plan.steps // plan.evaluations, 1)
    for step in (bar := tqdm(range(1, plan.steps + 1), desc=f"{kind!s:<24}", unit="step")):
        starts = rng.integers(len(training) - plan.context, size=plan.batch)
        started = time.perf_counter()
        loss = loss_of(model, *windows(training, starts, plan.context))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        schedule.step()
        if step % every == 0 or step == plan.steps:
            curve.append((step, validation_loss(model, validation, plan)))
            bar.set_postfix(validation=f"{curve[-1][1]:.3f}")
    return {
        "kind": str(kind),
        "curve": curve,
        "loss": curve[-1][1],
        "ms_per_step": 1e3 * float(np.median(seconds)),
        "beta": [
            round(x.item(), 2) for name, x in model.named_parameters() if name.endswith("beta")
        ],
    }


def compare(kinds: list[Kind], text: bytes, plan: Plan) -> list[dict[str, Any]]:
    """Train one model after the other and print the results."""
    characters, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    codes = torch.from_numpy(codes.astype(np.int64))
    print(f"{len(text):,} characters, {len(characters)} different ones; {plan}")
    results = [
        train(kind, codes, CharacterModel(len(characters), plan, kind), plan) for kind in kinds
    ]
    print(
        "\nattention                  validation loss   against softmax   bits a character   ms "
        "per step   beta"
    )
    for result in results:
        against = f"{result['loss'] / results[0]['loss'] - 1:+.1%}"
        betas = ", ".join(map(str, result["beta"]))
        print(
            f"{result['kind']:<26} {result['loss']:15.3f} {against:>17} "
            f"{result['loss'] / math.log(2):18.3f}"
            f" {result['ms_per_step']:13.0f}   {betas}"
        )
    return results


def time_steps(kinds: list[Kind], plan: Plan, lengths: list[int]) -> list[dict[str, Any]]:
    """Measure training steps on random characters: one sequence, forward, backward and update, the
    best of three or more.
    """
    results = [{"kind": str(kind), "ms": []} for kind in kinds]
    print("context   " + "   ".join(f"{kind!s:>24}" for kind in kinds))
    for length in lengths:
        text = torch.randint(90, (1, length + 1))
        for kind, result in zip(kinds, results, strict=True):
            model = CharacterModel(90, plan, kind)
            optimizer, _ = optimizer_of(model, plan)
            seconds = []
            while len(seconds) < 4 or sum(seconds) < 0.5:  # the first one loads kernels
                started = time.perf_counter()
                optimizer.zero_grad()
                loss_of(model, text[:, :-1], text[:, 1:]).backward()
                optimizer.step()
                seconds.append(time.perf_counter() - started)
            result["ms"].append((length, 1e3 * min(seconds[1:])))
        print(
            f"{length:7,}   " + "   ".join(f"{result['ms'][-1][1]:21.1f} ms" for result in results),
            flush=True,
        )
    return results


def main() -> None:
    """Read the command line and train, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="both readouts at (2, 2) and (4, 4)")
    parser.add_argument(
        "--time", action="store_true", help="measure time per step against length, train nothing"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, on generated text")
    for field in dataclasses.fields(Plan):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(
            option, type=type(field.default), default=field.default, help=f"default {field.default}"
        )
    parser.add_argument("--threads", type=int, help="of PyTorch and racecore")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("character_model"),
        help="without a suffix",
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = Plan(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Plan)}
    )
    kinds = ALL if arguments.all else ALL[:2]
    if arguments.quick:
        plan = dataclasses.replace(
            plan, steps=30, context=64, dim=32, layers=2, evaluations=3, validation_windows=4
        )
    print(pictures.machine())
    if arguments.time:
        lengths = [2**i for i in range(6, 8)] if arguments.quick else [2**i for i in range(8, 15)]
        results = time_steps([SOFTMAX, Kind("ratio", 2, 2), Kind("ratio", 4, 4)], plan, lengths)
        lines = {result["kind"]: result["ms"] for result in results}
        pictures.draw(
            arguments.out,
            lines,
            "characters of context",
            "time per training step, ms",
            logarithmic=True,
        )
    else:
        text = data_sets.sentences(20_000) if arguments.quick else data_sets.wikipedia()
        results = compare(kinds, text, plan)
        lines = {result["kind"]: result["curve"] for result in results}
        pictures.draw(arguments.out, lines, "training steps", "validation loss, nats a character")
    pictures.record(arguments.out, plan, results)


if __name__ == "__main__":
    main()
