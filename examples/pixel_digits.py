"""Classify handwritten digits pixel by pixel, 784 tokens each, with softmax and with RACE.

    python examples/pixel_digits.py

A pixel is a token. The model does not know which pixels are neighbours: every position has two
learned vectors, one of which is scaled by the brightness of the pixel. Initial weights, batches and
the number of steps are the same; only attention, here bidirectional, differs. Writes
`pixel_digits.json` and `.png`. `--quick` takes seconds and no data.
"""

from __future__ import annotations

import argparse
import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings that are the same for every kind of attention."""

    steps: int = 600
    batch: int = 16
    dim: int = 48
    heads: int = 3
    layers: int = 2
    rate: float = 3e-3
    evaluations: int = 6
    test_images: int = 1000
    seed: int = 0


class PixelClassifier(nn.Module):
    """Images [B, T] of T pixels -> logits of ten digits [B, 10]."""

    def __init__(self, n_pixels: int, plan: Plan, kind: Kind) -> None:
        super().__init__()
        self.blocks = blocks(
            plan.dim, plan.heads, plan.layers, kind, is_causal=False, seed=plan.seed
        )
        torch.manual_seed(plan.seed)
        self.norm, self.head = nn.BatchNorm1d(plan.dim, momentum=None), nn.Linear(plan.dim, 10)
        self.position, self.ink = (
            nn.Parameter(torch.randn(n_pixels, plan.dim) * 0.3) for _ in range(2)
        )  # [T, E]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify."""
        pooled = self.blocks(self.position + images[..., None] * self.ink).mean(dim=1)
        return self.head(
            self.norm(pooled)
        )  # means of 784 tokens differ little between images: the batch norm scales the differences


@torch.no_grad()
def accuracy(
    model: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, shown: torch.Tensor
) -> float:
    """Return the accuracy, with the batch norm's statistics taken from training images."""
    model.norm.reset_running_stats()
    model(shown)
    model.eval()
    found = torch.cat([model(part).argmax(dim=1) for part in images.split(len(shown))])
    model.train()
    return (found == labels).double().mean().item()


def train(kind: Kind, images: torch.Tensor, labels: torch.Tensor, plan: Plan) -> dict[str, Any]:
    """Train one classifier; return its accuracies on held-out images and the time of the steps."""
    held, shown = slice(plan.test_images), slice(plan.test_images, None)
    model = PixelClassifier(images.shape[1], plan, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.rate, total_steps=plan.steps, pct_start=0.1
    )
    rng = np.random.default_rng(plan.seed)
    curve, seconds = [], []
    every = max(plan.steps // plan.evaluations, 1)
    for step in (bar := tqdm(range(1, plan.steps + 1), desc=f"{kind!s:<24}", unit="step")):
        drawn = rng.integers(len(images[shown]), size=plan.batch)
        started = time.perf_counter()
        loss = F.cross_entropy(model(images[shown][drawn]), labels[shown][drawn])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        schedule.step()
        if step % every == 0 or step == plan.steps:
            curve.append((step, accuracy(model, images[held], labels[held], images[shown][:64])))
            bar.set_postfix(accuracy=f"{curve[-1][1]:.1%}", loss=f"{loss.item():.3f}")
    return {"kind": str(kind), "curve": curve, "ms_per_step": 1e3 * float(np.median(seconds))}


def linear(images: torch.Tensor, labels: torch.Tensor, plan: Plan) -> float:
    """Return the accuracy of a linear classifier of whole images, a baseline without attention."""
    held, shown = slice(plan.test_images), slice(plan.test_images, None)
    torch.manual_seed(plan.seed)
    model = nn.Linear(images.shape[1], 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, weight_decay=0.01)
    for _ in range(200):
        loss = F.cross_entropy(model(images[shown]), labels[shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model(images[held]).argmax(dim=1) == labels[held]).double().mean().item()


def compare(
    kinds: list[Kind], images: np.ndarray, labels: np.ndarray, plan: Plan
) -> list[dict[str, Any]]:
    """Train one classifier after the other and print the results."""
    order = np.random.default_rng(plan.seed).permutation(len(images))
    pixels, shown = (
        torch.from_numpy(images[order].reshape(len(images), -1)),
        torch.from_numpy(labels[order]),
    )
    print(
        f"{len(images):,} images of {pixels.shape[1]} pixels, {plan.test_images:,} of them held "
        f"out; {plan}"
    )
    results = [train(kind, pixels, shown, plan) for kind in kinds]
    print("\nattention                  accuracy   ms per step")
    for result in results:
        print(f"{result['kind']:<26} {result['curve'][-1][1]:8.1%} {result['ms_per_step']:13.0f}")
    print(f"linear, without attention  {linear(pixels, shown, plan):8.1%}")
    return results


def main() -> None:
    """Read the command line, train, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds, on generated images")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--threads", type=int, help="of PyTorch and racecore")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("pixel_digits"), help="without a suffix"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = Plan(steps=arguments.steps)
    if arguments.quick:
        plan = dataclasses.replace(plan, steps=25, evaluations=2, test_images=40)
    images, labels = data_sets.bars(200, size=10) if arguments.quick else data_sets.digits()
    print(pictures.machine())
    results = compare([SOFTMAX, Kind("ratio", 4, 4), Kind("ratio", 2, 2)], images, labels, plan)
    lines = {
        result["kind"]: [(step, 100 * right) for step, right in result["curve"]]
        for result in results
    }
    pictures.draw(arguments.out, lines, "training steps", "accuracy on images held out, %")
    pictures.record(arguments.out, plan, results)


if __name__ == "__main__":
    main()
