"""What a run is asked for, and what it tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from racecore.soft_lsh import SoftLSH

__all__ = ["Report", "Request"]


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes
    ----------
    tokens : int
        Query tokens of all sequences.
    seconds : float
    tokens_per_second : float
    peak_anonymous_bytes : int
        The most anonymous memory that the process had, files in the page cache not counted; 0 where
        the system does not tell.
    digests : dict of str to str
        For every output a checksum of its values in their places, 16 hexadecimal digits: equal for
        equal arrays, however they were cut into chunks.
    d_planes, d_beta : array and float or array, or None
        Gradients of the hash, float64, shaped as ``lsh.planes`` and ``lsh.beta``; None where not
        asked for.
    resumed_tokens : int
        Tokens that an earlier run had done already, counted once for every pass over them.
    busy : dict of str to float
        Seconds in which there was "reading", "computing", "writing", and "reading or writing". They
        overlap; what is busy nearly all the time is what a faster one would speed up.
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
    """What a run is asked for; fields as the parameters of `run`."""

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
    def reads(self) -> dict[str, Any]:
        """What is read, by name."""
        names = ("query", "key", "value", "d_out", "key_mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def targets(self) -> dict[str, Any]:
        """Where to write, by name."""
        names = ("out", "d_query", "d_key", "d_value") if self.d_out is not None else ("out",)
        return {name: getattr(self, name) for name in names}
