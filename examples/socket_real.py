"""Keys, values and queries of a trained model for `socket_study.py`.

The model is that of `character_model.py`, with softmax. It trains on windows of 1,024 characters
and then for a while on the length of the study, so that its heads attend over such distances.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import character_model
import data_sets
import numpy as np
import torch
from layers import SOFTMAX
from socket_methods import Cache


@dataclasses.dataclass(frozen=True)
class Training:
    """Settings of the training, and the number of caches."""

    steps: int = 800
    long_steps: int = 60
    context: int = 1024
    long_context: int = 4096
    dim: int = 128
    heads: int = 2
    layers: int = 4
    windows: int = 16


QUICK = Training(
    steps=20, long_steps=4, context=64, long_context=256, dim=32, heads=2, layers=2, windows=3
)


def trained_cache(training: Training, text: bytes) -> tuple[Cache, float]:
    """Train; return the caches of all heads at the ends of validation windows, and the loss.

    There are layers times heads key/value heads, one query each: that of the last character of a
    window. Without the short convolution of the guide, attention itself has to find the preceding
    characters, as in language models.
    """
    characters, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    codes = torch.from_numpy(codes.astype(np.int64))
    plan = character_model.Plan(
        steps=training.steps,
        context=training.context,
        dim=training.dim,
        heads=training.heads,
        layers=training.layers,
        width=0,
        rate=4e-3,
        evaluations=1,
        validation_windows=8,
    )
    model = character_model.CharacterModel(len(characters), plan, SOFTMAX)
    character_model.train(SOFTMAX, codes, model, plan)
    plan = dataclasses.replace(
        plan, steps=training.long_steps, context=training.long_context, batch=1, rate=1e-3
    )
    loss = character_model.train(SOFTMAX, codes, model, plan)["loss"]
    held_out = codes[len(codes) * 9 // 10 :]
    starts = np.linspace(0, len(held_out) - training.long_context, training.windows).astype(int)
    caches = [
        last_rows(model, held_out[None, start : start + training.long_context]) for start in starts
    ]
    return Cache(*(np.concatenate(rows) for rows in zip(*caches, strict=True))), loss


@torch.no_grad()
def last_rows(model: Any, characters: torch.Tensor) -> Cache:
    """Return keys, values and last queries of a window, for the heads of all layers."""
    caught: list[Cache] = []
    attentions = [block.attention for block in model.blocks[:-1]]
    for attention in attentions:

        def mix(query: Any, key: Any, value: Any, mix: Any = attention.mix) -> Any:
            caught.append(Cache(*(x.numpy() for x in (query[:, -1:], key, value))))
            return mix(query, key, value)

        attention.mix = mix
    model(characters)
    for attention in attentions:
        del attention.mix  # restore the method
    return Cache(*(np.concatenate(rows, axis=2) for rows in zip(*caught, strict=True)))


def text(is_quick: bool) -> bytes:
    """Return the training text: Wikipedia, or generated text."""
    return data_sets.sentences(20_000) if is_quick else data_sets.wikipedia()
