"""RaceState: the additive sketch of all keys and values seen so far. Sums of disjoint token sets
add.
"""

from __future__ import annotations

import os
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import DTypeLike

from racecore import backends, chunking, inputs
from racecore.problem import Problem, Sketch
from racecore.runtime import arrays, cuda, files
from racecore.soft_lsh import SoftLSH
from racecore.state import checks
from racecore.state.snapshot import Snapshot

__all__ = ["RaceState", "check_initial_state", "final_state", "lsh_of"]

_FILE_KIND = "racecore.RaceState"
_FILE_VERSION = 2  # 2: numbers may be float32


class RaceState:
    """What attention remembers of the keys and values: one mass and one value sum per bucket.

    ``mass[s] = sum_j phi(k_j)[s]`` and ``value_sum[s] = sum_j phi(k_j)[s] * v_j``, in float64,
    whatever the inputs are, or in float32 by choice. Make one with `zeros`, with ``attention(...,
    return_state=True)`` or with `load`. The numbers are where the arrays were that they met last:
    NumPy arrays, or CuPy arrays on a GPU.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithms 1 and 2. The size is independent of the number of tokens:
    ``8 * B * G * L * R * (1 + V)`` bytes, half of that in float32.
    """

    __slots__ = (
        "__weakref__",
        "_lengths",
        "_lsh",
        "_n_kv_heads",
        "_sketch",
        "_snapshot",
        "_value_dim",
        "checked_step",
    )

    def __init__(
        self, lsh: SoftLSH, sketch: Sketch, lengths: np.ndarray, n_kv_heads: int, value_dim: int
    ) -> None:
        self._lsh = lsh
        self._sketch = sketch
        self._lengths = lengths
        self._n_kv_heads = n_kv_heads
        self._value_dim = value_dim
        self._snapshot: ref[Snapshot] | None = (
            None  # the one that shares `_sketch`, if it still lives
        )
        self.checked_step: tuple[Any, Any] = (
            None,
            None,
        )  # of `state/checks.py`: the last arrays, as a problem

    @classmethod
    def zeros(
        cls,
        lsh: SoftLSH,
        batch: int,
        n_kv_heads: int,
        value_dim: int,
        *,
        dtype: DTypeLike = np.float64,
    ) -> RaceState:
        """Make the state of `batch` empty sequences.

        Parameters
        ----------
        lsh : SoftLSH
            The hash that keys and queries share.
        batch, n_kv_heads, value_dim : int
            B, G and V.
        dtype : numpy.float64 or numpy.float32
            Of the sums. float32 takes half the memory and time, and loses digits with every token
            that is added by itself (docs/numerics tells how many).

        Raises
        ------
        ValueError
            Sizes that are not positive (an empty batch is legal), heads that do not divide those of
            `lsh`, another dtype.
        TypeError
            `lsh` is not a SoftLSH.
        """
        if not isinstance(lsh, SoftLSH):
            raise TypeError(f"lsh must be a racecore.SoftLSH, got {type(lsh).__qualname__}")
        for name, size, least in (
            ("batch", batch, 0),
            ("n_kv_heads", n_kv_heads, 1),
            ("value_dim", value_dim, 1),
        ):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
        if lsh.n_heads is not None and lsh.n_heads % n_kv_heads:
            raise ValueError(
                f"the {lsh.n_heads} heads of lsh must be a multiple of n_kv_heads, got {n_kv_heads}"
            )
        n_buckets = lsh.n_tables * lsh.n_buckets
        shape = (int(batch), lsh.n_heads or int(n_kv_heads), n_buckets * (1 + int(value_dim)))
        sketch = Sketch(arrays.zeros(shape, checks.check_state_dtype(dtype)), n_buckets)
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
    def dtype(self) -> np.dtype:
        """Of the sums: float64 or float32."""
        return self._sketch.flat.dtype

    @property
    def mass(self) -> np.ndarray:
        """Sum of the keys' bucket probabilities: [B, G, L, R] (H for G where the hash is per query
        head); a view.
        """
        return self._sketch.mass.reshape(
            *self._sketch.flat.shape[:2], self._lsh.n_tables, self._lsh.n_buckets
        )

    @property
    def value_sum(self) -> np.ndarray:
        """Sum of probabilities times values: [B, G, L, R, V]; a view."""
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
            Of one dtype: float16, bfloat16, float32 or float64. A state of one sequence also takes
            [T, G, dim].
        key_mask : bool array, shape [B, T], optional
            True = take part.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit; the state is then unchanged.
        """
        problem = checks.check_append(self, key, value, key_mask)
        operations = backends.choose(None, problem.on_device).bidirectional
        if self.dtype == np.float64 and operations.add_at_once(
            problem, self._own_sketch(problem.on_device), self._lengths
        ):
            return
        after = self._widened_copy(problem.on_device)
        for first, last in chunking.parts(problem):
            operations.sum_keys(problem.part(first, last), after.part(first, last))
        self._replace(after, problem)

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
        problem = checks.check_attend(self, query, readout, backends.needs_device(backend))
        if problem.query is None:
            raise TypeError("query is missing")
        sketch = self._sketch.to_device(problem.on_device)
        if (
            arrays.is_on_device(query) == problem.on_device
        ):  # not where backend="cuda" took a host array for this once
            self._sketch = sketch
        out = arrays.empty(
            (*problem.query.shape[:3], self._value_dim), problem.query.dtype, problem.on_device
        )
        operations = backends.choose(backend, problem.on_device).bidirectional
        wide = sketch.rounded(np.dtype(np.float64))
        for first, last in chunking.parts(problem):
            operations.read_out(problem.part(first, last), wide.part(first, last), out)
        return arrays.restorer(query)(out[0] if len(query.shape) == 3 else out)

    def step(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        readout: str = "ratio",
        key_mask: Any = None,
        counts: Any = None,
        backend: str | None = None,
        out: Any = None,
    ) -> Any:
        """Add tokens, in place, and answer the query of each from everything up to and including
        itself.

        One token is `append` followed by `attend`, with the same bits, in one pass over the state.
        Several are ``attention(..., is_causal=True, initial_state=state, return_state=True)``, with
        the same bits where the state is float64: a prompt, or a piece of one.

        Parameters
        ----------
        query : array, shape [B, T, H, D]
        key : array, shape [B, T, G, D]
        value : array, shape [B, T, G, V]
            As for `racecore.attention`. A state of one sequence also takes [T, heads, dim].
        readout : {"ratio", "bucket_mean"}
            See `racecore.attention`.
        key_mask : bool array, shape [B, T], optional
            True = the key takes part. Queries are answered everywhere.
        counts : integers or bools, shape [B], optional
            How many of the T tokens each sequence has. What comes after them is never read, and
            answered with zeros. A sequence without a token keeps its state, to the bit. True means
            all tokens, False none.
        backend : str, optional
            See `racecore.attention`.
        out : array, optional
            Where to write the result.

        Returns
        -------
        array, shape [B, T, H, V]
            In the query's dtype and library.

        Raises
        ------
        ValueError, TypeError, racecore.errors.BackendUnavailableError
            What does not fit; the state is then unchanged. Whatever is raised in the middle, a step
            is done as a whole or not at all.
        """
        place = backends.needs_device(backend)
        problem = checks.check_step(self, query, key, value, key_mask, counts, readout, place)
        stored: Any = problem.query
        had_batch, shape = len(query.shape) == 4, (*stored.shape[:3], self._value_dim)
        sources = (
            []
            if out is None
            else [("query", query), ("key", key), ("value", value), ("state", self._sketch.flat)]
        )
        result = inputs.check_out(
            out, "out", shape if had_batch else shape[1:], stored.dtype, sources, problem.on_device
        )
        rows = result if had_batch else result[None]
        chosen = backends.choose(backend, problem.on_device)
        if shape[1] == 1:
            chosen.decoding.step(problem, self._own_sketch(problem.on_device), self._lengths, rows)
        else:
            after = self._widened_copy(problem.on_device)
            for first, last in chunking.parts(problem):
                chosen.causal.causal_scan(
                    problem.part(first, last), after.part(first, last), rows, False
                )
            self._replace(after, problem)
        if counts is not None:
            for row, end in zip(rows, problem.sequences[:, 2].tolist(), strict=True):
                row[end:] = 0
        if place:  # arrays in host memory went to a GPU for this once
            self._sketch = self._sketch.to_device(arrays.is_on_device(query))
        return arrays.restorer(query if out is None else out)(result)

    def _own_sketch(self, on_device: bool) -> Sketch:
        """Return the numbers to write to, where they are wanted; a snapshot that shares them keeps
        them, copied here.
        """
        sketch = self._sketch.to_device(on_device)
        if sketch is self._sketch and self._shared() is not None:
            sketch = sketch.copy()
        self._sketch = sketch
        return sketch

    def _widened_copy(self, on_device: bool) -> Sketch:
        """Return a float64 copy: many tokens are added to it before it is rounded once, and an
        interrupt leaves this state be.
        """
        sketch = self._sketch.to_device(on_device)
        return Sketch(sketch.flat.astype(np.float64), sketch.n_buckets)

    def _replace(self, after: Sketch, problem: Problem) -> None:
        """Take what a `_widened_copy` has become by adding the keys of a problem."""
        sketch, lengths = after.rounded(self.dtype), self._lengths + problem.count_keys()
        self._sketch, self._lengths = sketch, lengths

    def _shared(self) -> Snapshot | None:
        """Return the snapshot that shares the numbers of this state, if there is one."""
        snapshot = None if self._snapshot is None else self._snapshot()
        return (
            snapshot if snapshot is not None and snapshot.sketch.flat is self._sketch.flat else None
        )

    def snapshot(self) -> Snapshot:
        """Remember this state, to come back to it with `restore`: for tokens that may turn out to
        be wrong.

        That copies nothing. The numbers are copied once, when this state is next written to, and
        not even then if the snapshot has been dropped before.
        """
        snapshot = self._shared()
        if snapshot is None:
            snapshot = Snapshot(self, self._sketch, self._lengths.copy())
            self._snapshot = ref(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot, members: Any = None) -> None:
        """Come back to what `snapshot` remembers, to the bit; it may be used again.

        Parameters
        ----------
        snapshot : Snapshot
            From this state's `snapshot`. A whole state comes back without a copy.
        members : integers or bools, optional
            Restore only these sequences of the batch.

        Raises
        ------
        TypeError, ValueError, IndexError
            It is no snapshot, or one of another state; members that are not there. Nothing has been
            changed then.
        """
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"restore takes what snapshot returned, got {type(snapshot).__qualname__}"
            )
        if snapshot.state is not self:
            raise ValueError(
                "this snapshot was taken of another state; a state that shall go its own way is a "
                "copy()"
            )
        if members is None:
            self._sketch, self._lengths, self._snapshot = (
                snapshot.sketch,
                snapshot.lengths.copy(),
                ref(snapshot),
            )
            return
        chosen = checks.check_members(members, "members")
        lengths = snapshot.lengths[chosen]  # an index that is out of range raises here
        on_device = cuda.is_array(self._sketch.flat)
        place = arrays.to_device(chosen, on_device)
        sketch = self._own_sketch(on_device)
        sketch.flat[place] = snapshot.sketch.to_device(on_device).flat[place]
        self._lengths[chosen] = lengths

    def merge(self, other: RaceState) -> None:
        """Add the tokens of `other`, in place. Order does not matter, beyond rounding in the last
        bit.

        The dtype of this state stays: where one is float32 and the other float64, sums are float64
        before they are rounded.

        Raises
        ------
        ValueError
            `other` was made with another hash, or for other sizes.
        """
        if not isinstance(other, RaceState):
            raise TypeError(f"only a RaceState can be merged, got {type(other).__qualname__}")
        other.check_same_hash(self._lsh)
        if (
            other.sketch.flat.shape != self._sketch.flat.shape
            or other.n_kv_heads != self._n_kv_heads
        ):
            raise ValueError(
                "states must agree in (batch, key/value heads, value dim): this one has "
                f"{(self.batch, self._n_kv_heads, self._value_dim)}, the other "
                f"{(other.batch, other.n_kv_heads, other.value_dim)}"
            )
        sketch = self._own_sketch(cuda.is_array(self._sketch.flat))
        sketch.flat += other.sketch.to_device(
            cuda.is_array(sketch.flat)
        ).flat  # in the wider dtype, and rounded once
        self._lengths += other.lengths

    def copy(self) -> RaceState:
        """Return an independent copy."""
        return RaceState(
            self._lsh, self._sketch.copy(), self._lengths.copy(), self._n_kv_heads, self._value_dim
        )

    def astype(self, dtype: DTypeLike) -> RaceState:
        """Return a copy whose sums are of another dtype, float32 or float64."""
        checked = checks.check_state_dtype(dtype)
        sketch = Sketch(self._sketch.flat.astype(checked), self._sketch.n_buckets)
        return RaceState(self._lsh, sketch, self._lengths.copy(), self._n_kv_heads, self._value_dim)

    def select(self, batch_indices: Any) -> RaceState:
        """Return a new state of the sequences at `batch_indices`, in that order; repeats are legal
        (beam search).

        Raises
        ------
        IndexError
            An index is out of range.
        TypeError, ValueError
            The indices are not a list or 1-D array of integers (or a bool array of length B).
        """
        indices = checks.check_members(batch_indices, "batch_indices")
        flat = self._sketch.flat
        sketch = Sketch(
            flat[arrays.to_device(indices, cuda.is_array(flat))], self._sketch.n_buckets
        )
        return RaceState(
            self._lsh, sketch, self._lengths[indices], self._n_kv_heads, self._value_dim
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state, hash and checksum to an .npz file, which appears whole or not at all."""
        files.save(
            path,
            _FILE_KIND,
            _FILE_VERSION,
            planes=self._lsh.planes,
            beta=np.asarray(self._lsh.beta),
            flat=arrays.to_device(self._sketch.flat, False),
            lengths=self._lengths,
            sizes=np.array([self._n_kv_heads, self._value_dim]),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RaceState:
        """Read what `save` wrote.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its
            checksum.
        """
        content = files.load(
            path, _FILE_KIND, _FILE_VERSION, ("planes", "beta", "flat", "lengths", "sizes")
        )
        lsh = SoftLSH(content["planes"], content["beta"])
        n_kv_heads, value_dim = (int(size) for size in content["sizes"])
        sketch = Sketch(content["flat"], lsh.n_tables * lsh.n_buckets)
        return cls(lsh, sketch, content["lengths"], n_kv_heads, value_dim)

    def __reduce__(self) -> tuple[type[RaceState], tuple[Any, ...]]:
        return type(self), (
            self._lsh,
            self._sketch,
            self._lengths,
            self._n_kv_heads,
            self._value_dim,
        )

    def check_same_hash(self, lsh: SoftLSH) -> None:
        """Raise ValueError if this state was made with another hash than `lsh`."""
        if lsh is not self._lsh and lsh.fingerprint != self._lsh.fingerprint:
            raise ValueError(
                "this state was made with another hash: its fingerprint is "
                f"{self._lsh.fingerprint[:12]}..., that of "
                f"the hash in use {lsh.fingerprint[:12]}...; planes and beta must be identical"
            )

    def __repr__(self) -> str:
        return (
            f"RaceState(batch={self.batch}, n_kv_heads={self._n_kv_heads}, "
            f"value_dim={self._value_dim}, "
            f"n_tokens={self.n_tokens}, dtype={self.dtype}, lsh={self._lsh!r})"
        )


def final_state(
    initial: RaceState | None, sketch: Sketch, problem: Problem, lsh: SoftLSH
) -> RaceState:
    """Wrap the sketch that attention arrived at."""
    lengths = problem.count_keys()
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
        raise TypeError(
            f"initial_state must be a racecore.RaceState or None, got {type(state).__qualname__}"
        )
    state.check_same_hash(lsh)
    wanted = (len(problem.sequences), problem.n_kv_heads, problem.value_dim)
    found = (state.batch, state.n_kv_heads, state.value_dim)
    if found != wanted:
        raise ValueError(
            "initial_state does not fit: (batch or packed sequences, key/value heads, value dim) "
            "must be "
            f"{wanted}, got {found}"
        )
