"""RaceState: the additive sketch of all keys and values seen so far. Sums of disjoint token sets add."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from racecore import arrays, backends, cuda, files, inputs, plan
from racecore.problem import Problem, Sketch
from racecore.soft_lsh import SoftLSH

__all__ = ["RaceState", "check_initial_state", "final_state", "lsh_of"]

_FILE_KIND = "racecore.RaceState"
_FILE_VERSION = 1


class RaceState:
    """What attention remembers of the keys and values: one mass and one value sum per bucket.

    ``mass[s] = sum_j phi(k_j)[s]`` and ``value_sum[s] = sum_j phi(k_j)[s] * v_j``, in float64, whatever the inputs are.
    Make one with `zeros`, with ``attention(..., return_state=True)`` or with `load`. The numbers are where the arrays were
    that they met last: NumPy arrays, or CuPy arrays on a GPU.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithms 1 and 2. The size is independent of the number of tokens:
    ``8 * B * G * L * R * (1 + V)`` bytes.
    """

    __slots__ = ("_lengths", "_lsh", "_n_kv_heads", "_sketch", "_value_dim")

    def __init__(self, lsh: SoftLSH, sketch: Sketch, lengths: np.ndarray, n_kv_heads: int, value_dim: int) -> None:
        self._lsh = lsh
        self._sketch = sketch
        self._lengths = lengths
        self._n_kv_heads = n_kv_heads
        self._value_dim = value_dim

    @classmethod
    def zeros(cls, lsh: SoftLSH, batch: int, n_kv_heads: int, value_dim: int) -> RaceState:
        """Make the state of `batch` empty sequences.

        Parameters
        ----------
        lsh : SoftLSH
            The hash that keys and queries share.
        batch, n_kv_heads, value_dim : int
            B, G and V.

        Raises
        ------
        ValueError
            Sizes that are not positive (an empty batch is legal), or heads that do not divide those of `lsh`.
        TypeError
            `lsh` is not a SoftLSH.
        """
        if not isinstance(lsh, SoftLSH):
            raise TypeError(f"lsh must be a racecore.SoftLSH, got {type(lsh).__qualname__}")
        for name, size, least in (("batch", batch, 0), ("n_kv_heads", n_kv_heads, 1), ("value_dim", value_dim, 1)):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
        if lsh.n_heads is not None and lsh.n_heads % n_kv_heads:
            raise ValueError(f"the {lsh.n_heads} heads of lsh must be a multiple of n_kv_heads, got {n_kv_heads}")
        n_buckets = lsh.n_tables * lsh.n_buckets
        shape = (int(batch), lsh.n_heads or int(n_kv_heads), n_buckets * (1 + int(value_dim)))
        sketch = Sketch(arrays.zeros(shape, np.float64), n_buckets)
        return cls(lsh, sketch, np.zeros(batch, np.int64), int(n_kv_heads), int(value_dim))

    @property
    def lsh(self) -> SoftLSH:
        """The hash this state was made with."""
        return self._lsh

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self._sketch.flat.shape[0]

    @property
    def n_kv_heads(self) -> int:
        """G, the number of key/value heads."""
        return self._n_kv_heads

    @property
    def value_dim(self) -> int:
        """V, the length of a value."""
        return self._value_dim

    @property
    def mass(self) -> np.ndarray:
        """Sum of the keys' bucket probabilities: float64 [B, G, L, R] (H for G where the hash is per query head); a view."""
        return self._sketch.mass.reshape(*self._sketch.flat.shape[:2], self._lsh.n_tables, self._lsh.n_buckets)

    @property
    def value_sum(self) -> np.ndarray:
        """Sum of probabilities times values: float64 [B, G, L, R, V]; a view."""
        return self._sketch.value_sum.reshape(*self.mass.shape, self._value_dim)

    @property
    def sketch(self) -> Sketch:
        """The numbers themselves, as the operations take them."""
        return self._sketch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens appended to each sequence, int64 [B]. Masked tokens do not count."""
        return self._lengths

    @property
    def n_tokens(self) -> int:
        """Tokens appended to the longest sequence."""
        return int(self._lengths.max(initial=0))

    def append(self, key: Any, value: Any, *, key_mask: Any = None) -> None:
        """Add tokens, in place.

        Parameters
        ----------
        key : array, shape [B, T, G, D]
        value : array, shape [B, T, G, V]
            Of one dtype: float16, bfloat16, float32 or float64. A state of one sequence also takes [T, G, dim].
        key_mask : bool array, shape [B, T], optional
            True = take part.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit; the state is then unchanged.
        """
        problem = inputs.check_append(self, key, value, key_mask)
        self._sketch = self._sketch.brought(problem.on_device)
        operations = backends.choose(None, problem.on_device).bidirectional
        if operations.add_at_once(problem, self._sketch, self._lengths):
            return
        before, lengths = self._sketch.flat.copy(), self._lengths.copy()
        try:
            for first, last in plan.parts(problem):
                operations.sum_keys(problem.part(first, last), self._sketch.part(first, last))
            self._lengths += _added_tokens(problem)
        except BaseException:  # an interrupt must not leave half of the tokens behind
            self._sketch.flat[...], self._lengths[...] = before, lengths
            raise

    def attend(self, query: Any, *, readout: str = "ratio", backend: str | None = None) -> Any:
        """Answer queries from everything appended so far.

        Parameters
        ----------
        query : array, shape [B, Tq, H, D]
            Every query sees every token of its sequence. H must be a multiple of G.
        readout : {"ratio", "bucket_mean"}
            See `racecore.attention`.
        backend : str, optional
            See `racecore.attention`.

        Returns
        -------
        array, shape [B, Tq, H, V]
            In the query's dtype and library; zeros where nothing was appended.
        """
        problem = inputs.check_attend(self, query, readout, backends.place(backend))
        if problem.query is None:
            raise TypeError("query is missing")
        sketch = self._sketch.brought(problem.on_device)
        if arrays.is_on_device(query) == problem.on_device:  # not where backend="cuda" took a host array for this once
            self._sketch = sketch
        out = arrays.empty((*problem.query.shape[:3], self._value_dim), problem.query.dtype, problem.on_device)
        operations = backends.choose(backend, problem.on_device).bidirectional
        for first, last in plan.parts(problem):
            operations.read_out(problem.part(first, last), sketch.part(first, last), out)
        return arrays.restorer(query)(out[0] if len(query.shape) == 3 else out)

    def merge(self, other: RaceState) -> None:
        """Add the tokens of `other`, in place. Order does not matter, beyond rounding in the last bit.

        Raises
        ------
        ValueError
            `other` was made with another hash, or for other sizes.
        """
        if not isinstance(other, RaceState):
            raise TypeError(f"only a RaceState can be merged, got {type(other).__qualname__}")
        other.check_same_hash(self._lsh)
        if other.sketch.flat.shape != self._sketch.flat.shape or other.n_kv_heads != self._n_kv_heads:
            raise ValueError(
                "states must agree in (batch, key/value heads, value dim): this one has "
                f"{(self.batch, self._n_kv_heads, self._value_dim)}, the other {(other.batch, other.n_kv_heads, other.value_dim)}"
            )
        self._sketch.flat += other.sketch.brought(cuda.is_array(self._sketch.flat)).flat
        self._lengths += other.lengths

    def copy(self) -> RaceState:
        """Return an independent copy."""
        return RaceState(self._lsh, self._sketch.copy(), self._lengths.copy(), self._n_kv_heads, self._value_dim)

    def select(self, batch_indices: Any) -> RaceState:
        """Return a new state of the sequences at `batch_indices`, in that order; repeats are legal (beam search).

        Raises
        ------
        IndexError
            An index is out of range.
        TypeError, ValueError
            The indices are not a list or 1-D array of integers (or a bool array of length B).
        """
        indices = np.atleast_1d(np.asarray(batch_indices))
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.dtype.kind not in "iub":
            raise TypeError(f"batch_indices must be integers, got {indices.dtype}")
        if indices.ndim != 1:
            raise ValueError(f"batch_indices must be one-dimensional, got shape {indices.shape}")
        flat = self._sketch.flat
        sketch = Sketch(flat[arrays.brought(indices, cuda.is_array(flat))], self._sketch.n_buckets)
        return RaceState(self._lsh, sketch, self._lengths[indices], self._n_kv_heads, self._value_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state, hash and checksum to an .npz file, which appears whole or not at all."""
        files.save(
            path, _FILE_KIND, _FILE_VERSION,
            planes=self._lsh.planes, beta=np.asarray(self._lsh.beta), flat=arrays.brought(self._sketch.flat, False),
            lengths=self._lengths, sizes=np.array([self._n_kv_heads, self._value_dim]),
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RaceState:
        """Read what `save` wrote.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its checksum.
        """
        content = files.load(path, _FILE_KIND, _FILE_VERSION, ("planes", "beta", "flat", "lengths", "sizes"))
        lsh = SoftLSH(content["planes"], content["beta"])
        n_kv_heads, value_dim = (int(size) for size in content["sizes"])
        sketch = Sketch(content["flat"], lsh.n_tables * lsh.n_buckets)
        return cls(lsh, sketch, content["lengths"], n_kv_heads, value_dim)

    def check_same_hash(self, lsh: SoftLSH) -> None:
        """Raise ValueError if this state was made with another hash than `lsh`."""
        if lsh is not self._lsh and lsh.fingerprint != self._lsh.fingerprint:
            raise ValueError(
                f"this state was made with another hash: its fingerprint is {self._lsh.fingerprint[:12]}..., that of "
                f"the hash in use {lsh.fingerprint[:12]}...; planes and beta must be identical"
            )

    def __repr__(self) -> str:
        return (
            f"RaceState(batch={self.batch}, n_kv_heads={self._n_kv_heads}, value_dim={self._value_dim}, "
            f"n_tokens={self.n_tokens}, lsh={self._lsh!r})"
        )


def _added_tokens(problem: Problem) -> np.ndarray:
    """Count the keys of every sequence that take part, int64 [N]."""
    batch, begin, end = problem.sequences[:, 0], problem.sequences[:, 3], problem.sequences[:, 4]
    if problem.key_mask is None:
        return end - begin
    return np.count_nonzero(arrays.brought(problem.key_mask, False), axis=1)[batch]


def final_state(initial: RaceState | None, sketch: Sketch, problem: Problem, lsh: SoftLSH) -> RaceState:
    """Wrap the sketch that attention arrived at."""
    lengths = _added_tokens(problem)
    if initial is not None:
        lengths = lengths + initial.lengths
    return RaceState(lsh, sketch, lengths, problem.n_kv_heads, problem.value_dim)


def lsh_of(lsh: Any, initial_state: Any) -> Any:
    """Return `lsh`, or the hash of the state that a call continues from where no hash was passed."""
    return initial_state.lsh if lsh is None and isinstance(initial_state, RaceState) else lsh


def check_initial_state(state: Any, problem: Problem, lsh: SoftLSH) -> None:
    """Raise unless `state` is None or fits the hash and the sizes of `problem`."""
    if state is None:
        return
    if not isinstance(state, RaceState):
        raise TypeError(f"initial_state must be a racecore.RaceState or None, got {type(state).__qualname__}")
    state.check_same_hash(lsh)
    wanted = (len(problem.sequences), problem.n_kv_heads, problem.value_dim)
    found = (state.batch, state.n_kv_heads, state.value_dim)
    if found != wanted:
        raise ValueError(
            "initial_state does not fit: (batch or packed sequences, key/value heads, value dim) must be "
            f"{wanted}, got {found}"
        )
