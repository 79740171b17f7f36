"""A small transformer with softmax or RACE attention for the training examples.

Attention, in `Attention.mix`, is one call: `scaled_dot_product_attention` or `race_attention`. For
your own model, `racecore.adapters.torch.RaceAttention` is a complete layer.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from racecore import SoftLSH
from racecore.adapters.torch import race_attention


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of attention: softmax, or RACE with L tables of P planes and one of its readouts."""

    readout: str = "softmax"
    n_planes: int = 0
    n_tables: int = 0

    def __str__(self) -> str:
        """Return its name in tables and pictures."""
        return (
            self.readout
            if self.readout == "softmax"
            else f"RACE {self.readout} ({self.n_planes}, {self.n_tables})"
        )


SOFTMAX = Kind()


class Attention(nn.Module):
    """Attention of several heads with rotary embedding: x [B, T, E] -> [B, T, E]."""

    def __init__(
        self, dim: int, n_heads: int, kind: Kind, is_causal: bool, seed: list[int]
    ) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.kind, self.is_causal = (
            n_heads,
            dim // n_heads,
            kind,
            is_causal,
        )
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm_query, self.norm_key = nn.RMSNorm(self.head_dim), nn.RMSNorm(self.head_dim)
        if kind != SOFTMAX:
            lsh = SoftLSH.random(self.head_dim, kind.n_tables, kind.n_planes, beta=1.0, rng=seed)
            scale = 1.7 / math.sqrt(
                self.head_dim
            )  # rows have norm sqrt(D): tanh is then not saturated at the start
            self.planes = nn.Parameter(
                torch.tensor(scale * lsh.planes, dtype=torch.float32)
            )  # [L, P, D]
            self.beta = nn.Parameter(torch.tensor(lsh.beta))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project, normalise, rotate, mix, project."""
        rows = self.qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))  # [B, T, 3, H, D]
        query, key = rotate(self.norm_query(rows[:, :, 0])), rotate(self.norm_key(rows[:, :, 1]))
        return self.out(self.mix(query, key, rows[:, :, 2]).flatten(-2))

    def mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend: the only function that differs."""
        if self.kind == SOFTMAX:  # heads come before tokens
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2)
        return race_attention(
            query,
            key,
            value,
            self.planes,
            self.beta,
            is_causal=self.is_causal,
            readout=self.kind.readout,
        )


def rotate(x: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """Turn pairs (x[d], x[d + D/2]) of rows [B, T, H, D] by angles that grow with the position."""
    half = x.shape[-1] // 2
    speed = torch.exp(torch.arange(half, device=x.device) * (-math.log(base) / half))
    angle = (torch.arange(x.shape[1], device=x.device)[:, None] * speed)[:, None, :]  # [T, 1, D/2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim=-1,
    )


class ShortConvolution(nn.Module):
    """Add to every token a learned mixture of itself and the preceding tokens, per channel."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dim) * 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix: x [B, T, E] -> [B, T, E]."""
        shifted = (F.pad(x, (0, 0, i, 0))[:, : x.shape[1]] for i in range(len(self.weight)))
        return x + sum(w * y for w, y in zip(self.weight, shifted, strict=True))


class Block(nn.Module):
    """Pre-norm: short convolution and attention, then a perceptron of one hidden layer."""

    def __init__(
        self, dim: int, n_heads: int, kind: Kind, is_causal: bool, width: int, seed: list[int]
    ) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.convolution = ShortConvolution(dim, width) if width else nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.attention = Attention(dim, n_heads, kind, is_causal, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, E] -> [B, T, E]."""
        x = x + self.attention(self.convolution(self.before_attention(x)))
        return x + self.mlp(self.before_mlp(x))


def blocks(
    dim: int,
    n_heads: int,
    n_layers: int,
    kind: Kind,
    *,
    is_causal: bool,
    width: int = 0,
    seed: int = 0,
) -> nn.Sequential:
    """Return a stack of blocks and a last norm.

    The same seed gives the same weights outside attention for every kind.
    """
    torch.manual_seed(seed)
    stack = [Block(dim, n_heads, kind, is_causal, width, [seed, i]) for i in range(n_layers)]
    return nn.Sequential(*stack, nn.LayerNorm(dim))
