"""SoftLSH: the hash that queries and keys share, i.e. hyperplanes and the sharpness beta."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from racecore.runtime import files

__all__ = ["SoftLSH"]

_MAX_PLANES = 16  # 65,536 buckets per table
_LARGEST_BETA = 1e6  # beyond 20 a hash is hard; this only keeps float32 from overflowing
_FILE_KIND = "racecore.SoftLSH"
_FILE_VERSION = 1


class SoftLSH:
    """Soft locality-sensitive hash: `n_tables` tables of `n_planes` random hyperplanes each.

    A row x has a probability for every corner r of the cube {-1, +1}^P of a table, ``phi[r] =
    softmax_r(beta * sum_p tanh(<W_p, x>) * c_r[p])``. Corners are numbered big-endian: plane 0 is
    the most significant bit, and a set bit means +1.

    Parameters
    ----------
    planes : array_like, shape [L, P, D] or [H, L, P, D]
        Normal vectors; the 4-D form has separate planes for every query head. Stored as float64.
    beta : float or array_like, shape [H]
        Sharpness; 0 hashes everything evenly, large values approach a hard hash. In float32 nothing
        under- or overflows for beta in [0, 20]. One value per query head is allowed.

    Raises
    ------
    ValueError
        Wrong shapes, more than 16 planes per table, or values that are not finite.
    TypeError
        Planes or beta that are not real numbers.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), section 3. Instances are immutable.

    Examples
    --------
    >>> lsh = SoftLSH.random(head_dim=64, n_tables=4, n_planes=4, rng=0)
    >>> lsh.planes.shape, lsh.n_buckets
    ((4, 4, 64), 16)
    """

    __slots__ = ("_beta", "_fingerprint", "_per_head", "_planes")

    def __init__(self, planes: ArrayLike, beta: ArrayLike) -> None:
        self._planes = _locked(_checked_planes(planes))
        self._beta = _locked(_checked_beta(beta, self._planes))
        self._fingerprint: str | None = None
        self._per_head: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def random(
        cls,
        head_dim: int,
        n_tables: int = 4,
        n_planes: int = 4,
        beta: ArrayLike = 1.0,
        rng: Any = None,
        *,
        orthogonal: bool = False,
        n_heads: int | None = None,
    ) -> SoftLSH:
        """Draw the planes.

        Parameters
        ----------
        head_dim, n_tables, n_planes : int
            D, L and P. There will be ``L * 2**P`` buckets.
        beta : float or array_like, shape [H]
            Sharpness.
        rng : None, int, array_like of int, SeedSequence, BitGenerator or Generator
            As for `numpy.random.default_rng`.
        orthogonal : bool
            Make the planes orthogonal in blocks of D rows, keeping the lengths of Gaussian rows.
            This lowers the error of the kernel estimate a little (by about a tenth at 16 tables or
            more).
        n_heads : int, optional
            Draw separate planes for each of so many query heads.

        Returns
        -------
        SoftLSH
            With planes that float32 represents exactly, whatever the dtype of the arithmetic.
        """
        sizes = {"head_dim": head_dim, "n_tables": n_tables, "n_planes": n_planes}
        if n_heads is not None:
            sizes["n_heads"] = n_heads
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if n_planes > _MAX_PLANES:
            raise ValueError(
                f"n_planes must be at most {_MAX_PLANES} (2**n_planes buckets a table), got "
                f"{n_planes}"
            )
        generator = np.random.default_rng(rng)
        n_rows = n_tables * n_planes
        heads = 1 if n_heads is None else n_heads
        draw = _orthogonal_rows if orthogonal else _gaussian_rows
        rows = np.stack([draw(generator, n_rows, head_dim) for _ in range(heads)])
        planes = rows.astype(np.float32).reshape(heads, n_tables, n_planes, head_dim)
        return cls(planes[0] if n_heads is None else planes, beta)

    @property
    def planes(self) -> np.ndarray:
        """Hyperplanes, float64 [L, P, D] or [H, L, P, D], read-only."""
        return self._planes

    @property
    def beta(self) -> Any:
        """Sharpness: a float, or float64 [H] read-only."""
        return float(self._beta) if self._beta.ndim == 0 else self._beta

    @property
    def n_tables(self) -> int:
        """L, the number of hash tables."""
        return self._planes.shape[-3]

    @property
    def n_planes(self) -> int:
        """P, the number of hyperplanes of a table."""
        return self._planes.shape[-2]

    @property
    def n_buckets(self) -> int:
        """R = 2**P, the number of buckets of one table (a state has L * R of them)."""
        return 1 << self.n_planes

    @property
    def head_dim(self) -> int:
        """D, the length of the rows that are hashed."""
        return self._planes.shape[-1]

    @property
    def n_heads(self) -> int | None:
        """H if planes or beta are given per query head, else None."""
        if self._planes.ndim == 4:
            return self._planes.shape[0]
        return self._beta.shape[0] if self._beta.ndim == 1 else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over shapes and values, in hex; states of different fingerprints do not mix."""
        if self._fingerprint is None:
            digest = hashlib.sha256(b"racecore.SoftLSH.1")
            for array in (self._planes, self._beta):
                digest.update(repr(array.shape).encode())
                digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def per_head(self, n_state_heads: int) -> tuple[np.ndarray, np.ndarray]:
        """Return planes [M, L, P, D] and beta [M] for M state heads; shared values are broadcast.

        Every call returns the same arrays, because kernels key their padded copies by them.
        """
        if n_state_heads not in self._per_head:
            arrays = (
                _repeated(self._planes, 3, n_state_heads),
                _repeated(self._beta, 0, n_state_heads),
            )
            self._per_head.setdefault(n_state_heads, arrays)
        return self._per_head[n_state_heads]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write planes, beta and a checksum to an .npz file, which appears whole or not at all."""
        files.save(path, _FILE_KIND, _FILE_VERSION, planes=self._planes, beta=self._beta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SoftLSH:
        """Read a file of `save`.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its
            checksum.
        """
        content = files.load(path, _FILE_KIND, _FILE_VERSION, ("planes", "beta"))
        return cls(content["planes"], content["beta"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoftLSH) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[type[SoftLSH], tuple[np.ndarray, np.ndarray]]:
        return type(self), (self._planes, self._beta)

    def __repr__(self) -> str:
        heads = "" if self.n_heads is None else f", n_heads={self.n_heads}"
        beta = (
            f"{self.beta:g}"
            if self._beta.ndim == 0
            else f"[{self._beta.min():g} ... {self._beta.max():g}]"
        )
        return (
            f"SoftLSH(head_dim={self.head_dim}, n_tables={self.n_tables}, "
            f"n_planes={self.n_planes}, beta={beta}{heads})"
        )


def _checked_planes(planes: ArrayLike) -> np.ndarray:
    array = np.asarray(planes)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"planes must be real numbers, got dtype {array.dtype}")
    array = np.array(array, dtype=np.float64, order="C")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            "planes must have shape [L, P, D] or [H, L, P, D] with no empty axis, got "
            f"{array.shape}"
        )
    if array.shape[-2] > _MAX_PLANES:
        raise ValueError(
            f"a table has at most {_MAX_PLANES} planes (2**P buckets), got P = {array.shape[-2]} "
            f"in planes of shape {array.shape}; use more tables"
        )
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"planes must be finite, got {array[where]} at index {where}")
    return array


def _checked_beta(beta: ArrayLike, planes: np.ndarray) -> np.ndarray:
    array = np.asarray(beta)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"beta must be a real number or one per head, got dtype {array.dtype}")
    array = np.array(array, dtype=np.float64)
    if array.ndim > 1 or array.size == 0:
        raise ValueError(f"beta must be a number or have shape [H], got shape {array.shape}")
    if array.ndim == 1 and planes.ndim == 4 and len(array) != len(planes):
        raise ValueError(
            f"beta has {len(array)} heads and planes have {len(planes)}: they must agree"
        )
    if not (np.abs(array) <= _LARGEST_BETA).all():
        raise ValueError(
            f"beta must be finite and at most {_LARGEST_BETA:g}, got {beta!r}; useful values are "
            "0 to 20"
        )
    return array


def _locked(array: np.ndarray) -> np.ndarray:
    """Return a read-only view of an array."""
    # the view cannot be made writable again, because the array itself is read-only
    array.flags.writeable = False
    return array.view()


def _repeated(array: np.ndarray, ndim: int, n: int) -> np.ndarray:
    """Return an array of `ndim` axes broadcast along a new first axis; more axes stay."""
    if array.ndim > ndim:
        return array
    # numpy.broadcast_to does the same in six times the time: too long for a step of one token
    return np.ndarray((n, *array.shape), array.dtype, array, 0, (0, *array.strides))


def _gaussian_rows(generator: np.random.Generator, n_rows: int, dim: int) -> np.ndarray:
    return generator.standard_normal((n_rows, dim))


def _orthogonal_rows(generator: np.random.Generator, n_rows: int, dim: int) -> np.ndarray:
    """Draw orthogonal blocks of `dim` rows; lengths are those of Gaussian rows (chi_dim)."""
    blocks = []
    for start in range(0, n_rows, dim):
        q, r = np.linalg.qr(generator.standard_normal((dim, dim)))
        # the signs make the rotation uniform (Haar)
        q = q * np.sign(np.diag(r))
        lengths = np.linalg.norm(generator.standard_normal((dim, dim)), axis=1)
        blocks.append((q.T * lengths[:, None])[: n_rows - start])
    return np.concatenate(blocks)
