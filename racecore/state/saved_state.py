"""The file of a `RaceState`: hash, sums and lengths in an .npz archive with a checksum."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from racecore.problem import Sketch
from racecore.runtime import arrays, files
from racecore.soft_lsh import SoftLSH

__all__ = ["SavedState", "read_state", "write_state"]

_FILE_KIND = "racecore.RaceState"
_FILE_VERSION = 2  # 2: sums may be float32


class SavedState(NamedTuple):
    """The parts of a state, in the order in which `RaceState` takes them."""

    lsh: SoftLSH
    sketch: Sketch
    lengths: np.ndarray
    n_kv_heads: int
    value_dim: int


def write_state(path: str | os.PathLike[str], state: SavedState) -> None:
    """Write a state to a file that appears whole or not at all."""
    files.save(
        path,
        _FILE_KIND,
        _FILE_VERSION,
        planes=state.lsh.planes,
        beta=np.asarray(state.lsh.beta),
        flat=arrays.to_device(state.sketch.flat, False),
        lengths=state.lengths,
        sizes=np.array([state.n_kv_heads, state.value_dim]),
    )


def read_state(path: str | os.PathLike[str]) -> SavedState:
    """Read a file of `write_state`; raises `racecore.errors.CorruptFileError`."""
    names = ("planes", "beta", "flat", "lengths", "sizes")
    content: dict[str, Any] = files.load(path, _FILE_KIND, _FILE_VERSION, names)
    lsh = SoftLSH(content["planes"], content["beta"])
    n_kv_heads, value_dim = (int(size) for size in content["sizes"])
    sketch = Sketch(content["flat"], lsh.n_tables * lsh.n_buckets)
    return SavedState(lsh, sketch, content["lengths"], n_kv_heads, value_dim)
