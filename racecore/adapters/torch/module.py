"""RaceAttention: a layer of multi-head RACE attention, to replace one of softmax attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from racecore.adapters.torch.cache import RaceCache
from racecore.adapters.torch.function import race_attention
from racecore.inputs import READOUTS
from racecore.soft_lsh import SoftLSH

__all__ = ["RaceAttention", "add_hash"]


class RaceAttention(nn.Module):
    """Multi-head RACE attention with projections: x [B, T, E] -> [B, T, E].

    Parameters
    ----------
    embed_dim : int
        E.
    num_heads : int
        H; the head dim is E / H.
    num_kv_heads : int, optional
        G, which must divide H; None means H. Fewer make grouped queries.
    n_tables, n_planes : int
        L and P of the hash.
    beta : float or sequence of float
        Initial sharpness of the hash; a sequence has one value per head.
    learn_beta, learn_planes : bool
        Whether they are parameters; else they are buffers. Both are in the state dict either way,
        so that a loaded model hashes as the saved one did, whatever `rng` was.
    is_causal : bool
        Token i sees tokens 0 ... i.
    readout : {"ratio", "bucket_mean"}
        See `racecore.attention`.
    bias : bool
        Whether the projections have a bias.
    rng : int, or as for `numpy.random.default_rng`
        Draws the planes. Layers of one model should have different ones.
    rope_base : float, optional
        Rotate queries and keys by their positions (rotary embedding, in halves as in LLaMA), with
        wavelengths up to ``2 pi rope_base``; 10,000 is usual. None means no rotation. Needs an even
        head dim.
    device, dtype
        Of the parameters, as in any module.

    Raises
    ------
    ValueError
        Sizes that do not divide, or an unknown readout.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008). For backward it keeps, of size T: x, the projected
    (and rotated) queries, keys and values, and the output of attention.

    Examples
    --------
    >>> layer = RaceAttention(64, 4, num_kv_heads=2, rope_base=10_000.0)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    planes: torch.Tensor
    beta: torch.Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        n_tables: int = 4,
        n_planes: int = 4,
        beta: Any = 1.0,
        learn_beta: bool = True,
        learn_planes: bool = False,
        is_causal: bool = True,
        readout: str = "ratio",
        bias: bool = False,
        rng: Any = 0,
        rope_base: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}"
            )
        if readout not in READOUTS:
            raise ValueError(
                f"readout must be one of {', '.join(map(repr, READOUTS))}, got {readout!r}"
            )
        self.num_heads, self.num_kv_heads, self.head_dim = (
            num_heads,
            kv_heads,
            embed_dim // num_heads,
        )
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head dim, got {self.head_dim}")
        self.is_causal, self.readout, self.rope_base = is_causal, readout, rope_base
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **options)
        self.k_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(embed_dim, kv_heads * self.head_dim, **options)
        self.o_proj = nn.Linear(num_heads * self.head_dim, embed_dim, **options)
        lsh = SoftLSH.random(self.head_dim, n_tables, n_planes, beta, rng)
        if lsh.n_heads not in (None, num_heads):
            raise ValueError(
                f"beta has {lsh.n_heads} values, which must be 1 or num_heads = {num_heads}"
            )
        self._drawn = lsh  # for `reset_parameters`
        add_hash(
            self, lsh, learn_beta=learn_beta, learn_planes=learn_planes, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Draw new projections; reset planes and beta to those of `rng`, also after `to_empty`."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()
        with torch.no_grad():
            self.planes.copy_(torch.tensor(self._drawn.planes))
            self.beta.copy_(torch.tensor(self._drawn.beta))

    def forward(
        self,
        x: torch.Tensor,
        *,
        key_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: RaceCache | None = None,
    ) -> torch.Tensor:
        """Attend.

        Parameters
        ----------
        x : Tensor, shape [B, T, E]
        key_mask : bool Tensor, shape [B, T], optional
            True = the token takes part as a key.
        cu_seqlens : integer Tensor, shape [n + 1], optional
            Boundaries of sequences packed along T; B must be 1.
        positions : integer Tensor, shape [T] or [B, T], optional
            For the rotary embedding. None counts from 0, from the end of the cache, or from the
            beginning of each packed sequence.
        cache : RaceCache, optional
            The past, to which these tokens are added. Without gradients.

        Returns
        -------
        Tensor, shape [B, T, E]
        """
        if x.ndim != 3:
            raise ValueError(f"x must be [B, T, E], got {tuple(x.shape)}")
        batch, n_tokens, _ = x.shape
        query = self.q_proj(x).view(batch, n_tokens, self.num_heads, self.head_dim)
        key = self.k_proj(x).view(batch, n_tokens, self.num_kv_heads, self.head_dim)
        value = self.v_proj(x).view(batch, n_tokens, self.num_kv_heads, self.head_dim)
        if self.rope_base is not None:
            if positions is None:
                past = 0 if cache is None else cache.n_seen(self)
                positions = _positions(n_tokens, past, cu_seqlens, x.device)
            query, key = _rotated((query, key), positions, self.rope_base)
        if cache is None:
            out = race_attention(
                query,
                key,
                value,
                self.planes,
                self.beta,
                is_causal=self.is_causal,
                readout=self.readout,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
            )
        else:
            if not self.is_causal:
                raise ValueError(
                    "cache needs a causal layer: a past that later tokens change cannot be kept"
                )
            if cu_seqlens is not None:
                raise ValueError(
                    "cache and cu_seqlens were both given; decode sequences as a batch, padding "
                    "behind key_mask"
                )
            out = cache.attend(
                self,
                query,
                key,
                value,
                self.planes,
                self.beta,
                readout=self.readout,
                key_mask=key_mask,
            )
        return self.o_proj(out.reshape(batch, n_tokens, self.num_heads * self.head_dim))

    def extra_repr(self) -> str:
        """Return the text that `print` shows beside the projections."""
        n_tables, n_planes = self.planes.shape[-3:-1]
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, n_tables={n_tables}, "
            f"n_planes={n_planes}, is_causal={self.is_causal}, readout={self.readout!r}, "
            f"rope_base={self.rope_base}"
        )


def add_hash(
    module: nn.Module,
    lsh: SoftLSH,
    *,
    learn_beta: bool,
    learn_planes: bool,
    device: Any = None,
    dtype: Any = None,
) -> None:
    """Give a module `planes` and `beta`: parameters if learned, else buffers of the state dict."""
    options = {"device": device, "dtype": dtype or torch.get_default_dtype()}
    for name, array, is_learned in (
        ("planes", lsh.planes, learn_planes),
        ("beta", lsh.beta, learn_beta),
    ):
        tensor = torch.tensor(array, **options)
        if is_learned:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)


def _positions(
    n_tokens: int, past: int, cu_seqlens: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the positions of tokens that follow `past` others, or that start afresh in every
    packed sequence: [T].
    """
    positions = torch.arange(past, past + n_tokens, device=device)
    if cu_seqlens is None:
        return positions
    bounds = cu_seqlens.to(device)
    first = torch.searchsorted(bounds, positions, right=True) - 1
    return positions - bounds[first]


def _rotated(
    rows: tuple[torch.Tensor, ...], positions: torch.Tensor, base: float
) -> tuple[torch.Tensor, ...]:
    """Rotate pairs (x[d], x[d + D/2]) of rows [B, T, heads, D] by angles that grow with their
    positions [T] or [B, T].
    """
    half = rows[0].shape[-1] // 2
    # float64: at position 1,000,000 angles in float32 are off by 0.03, and from 2^24 on neighbours
    # have the same
    exponents = torch.arange(half, device=positions.device, dtype=torch.float64) * (
        -math.log(base) / half
    )
    angles = (positions.to(torch.float64)[..., None] * exponents.exp())[
        ..., None, :
    ]  # [T, 1, D/2] or [B, T, 1, D/2]
    cos, sin = angles.cos(), angles.sin()
    turned = []
    for x in rows:
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        first, second = x[..., :half], x[..., half:]
        turned.append(torch.cat([first * c - second * s, second * c + first * s], dim=-1))
    return tuple(turned)
