"""The arguments of a run, and its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from racecore.soft_lsh import SoftLSH

__all__ = ["Report", "Request"]


@dataclass(frozen=True)
class Report:
    """Results and measurements of a run.

    Attributes
    ----------
    tokens : int
        Query tokens of all sequences.
    seconds : float
    tokens_per_second : float
    peak_anonymous_bytes : int
        Peak anonymous memory of the process, without files in the page cache; 0 where the system
        does not report it.
    digests : dict of str to str
        For every output a checksum of its values and their positions, 16 hexadecimal digits: equal
        for equal arrays, however they were cut into chunks.
    d_planes, d_beta : array and float or array, or None
        Gradients of the hash, float64, shaped as ``lsh.planes`` and ``lsh.beta``; None where they
        were not requested.
    resumed_tokens : int
        Tokens that an earlier run had processed already, counted once for every pass over them.
    busy : dict of str to float
        Seconds spent "reading", "computing", "writing", and "reading or writing". They overlap; a
        part that is busy nearly all the time is the bottleneck.
    """

    tokens: int
    seconds: float
    peak_anonymous_bytes: int
    digests: dict[str, str] = field(default_factory=dict)
    d_planes: np.ndarray | None = None
    d_beta: Any = None
    resumed_tokens: int = 0
    busy: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of a run, unchecked; fields as the parameters of `run`."""

    query: Any
    key: Any
    value: Any
    out: Any
    lsh: SoftLSH | None = None
    is_causal: bool = False
    readout: str = "ratio"
    key_mask: Any = None
    cu_seqlens: Any = None
    d_out: Any = None
    d_query: Any = None
    d_key: Any = None
    d_value: Any = None
    d_lsh: Any = None
    dtype: str | None = None
    memory_limit: int | str = "1GB"
    backend: str | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The input arrays that were given, by name."""
        names = ("query", "key", "value", "d_out", "key_mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def outputs(self) -> dict[str, Any]:
        """The destination of every result, by name; None where only the digest is kept."""
        names = ("out", "d_query", "d_key", "d_value") if self.d_out is not None else ("out",)
        return {name: getattr(self, name) for name in names}
