"""The file of a `SocketIndex`: hash, scorer, bits and norms in an .npz archive with a checksum."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from racecore.ops.socket.layout import HashedKeys, Scorer
from racecore.runtime import arrays, files
from racecore.soft_lsh import SoftLSH
from racecore.sparse.checks import check_scorer
from racecore.sparse.key_storage import check_sizes, no_keys, trimmed

__all__ = ["SavedIndex", "read_index", "write_index"]

_FILE_KIND = "racecore.SocketIndex"
_FILE_VERSION = 1
_SCORER_ARRAYS = ("scorer", "tau", "weighs_values")
_ARRAYS = ("planes", "beta", *_SCORER_ARRAYS, "codes", "norms", "lengths", "is_empty")


class SavedIndex(NamedTuple):
    """The parts of an index."""

    lsh: SoftLSH
    scorer: Scorer
    hashed: HashedKeys | None  # None before the first append


def write_index(path: str | os.PathLike[str], index: SavedIndex) -> None:
    """Write an index to a file that appears whole or not at all; spare capacity is left out."""
    lsh, scorer, hashed = index
    kept = no_keys(lsh, 0, 0) if hashed is None else trimmed(hashed, slice(None))
    files.save(
        path,
        _FILE_KIND,
        _FILE_VERSION,
        planes=lsh.planes,
        beta=np.asarray(lsh.beta),
        scorer=np.array(scorer.kind),
        tau=np.array(scorer.tau),
        weighs_values=np.array(scorer.weighs_values),
        codes=arrays.to_device(kept.codes, False),
        norms=arrays.to_device(kept.norms, False),
        lengths=kept.lengths,
        is_empty=np.array(hashed is None),
    )


def read_index(path: str | os.PathLike[str], expected: SoftLSH | None) -> SavedIndex:
    """Read a file of `write_index` into host memory.

    Raises
    ------
    racecore.errors.CorruptFileError
        It is not such a file, comes from a newer version, or is damaged.
    ValueError
        The index was made with another hash than `expected`.
    """
    content: dict[str, Any] = files.load(path, _FILE_KIND, _FILE_VERSION, _ARRAYS)
    lsh = SoftLSH(content["planes"], content["beta"])
    if expected is not None and expected != lsh:
        raise ValueError(
            f"{os.fspath(path)} was made with another hash: its fingerprint is "
            f"{lsh.fingerprint[:12]}..., that of lsh {expected.fingerprint[:12]}..."
        )
    scorer = check_scorer(
        lsh, str(content["scorer"]), float(content["tau"]), bool(content["weighs_values"])
    )
    if content["is_empty"]:
        return SavedIndex(lsh, scorer, None)
    lengths = content["lengths"].astype(np.int64)
    hashed = HashedKeys(content["codes"], content["norms"], lengths, lsh.n_tables, lsh.n_planes)
    check_sizes(hashed, path)
    return SavedIndex(lsh, scorer, hashed)
