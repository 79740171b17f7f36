"""RaceState: the additive sketch of all keys and values so far. States of disjoint tokens add."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from racecore import backends, chunking, outputs
from racecore.inputs import Passed
from racecore.problem import Problem, Sketch, changed
from racecore.runtime import arrays
from racecore.soft_lsh import SoftLSH
from racecore.state import checks
from racecore.state.contents import Contents, Snapshot
from racecore.state.saved_state import SavedState, read_state, write_state

__all__ = ["RaceState"]


class RaceState:
    """The additive sketch of keys and values: one mass and one value sum per bucket.

    ``mass[s] = sum_j phi(k_j)[s]`` and ``value_sum[s] = sum_j phi(k_j)[s] * v_j``, in float64 for
    inputs of any dtype, or in float32 by choice. Make one with `zeros`, with ``attention(...,
    return_state=True)`` or with `load`. The state lives on the device of the arrays it was last
    used with: its sums are NumPy arrays, or CuPy arrays on a GPU.

    Notes
    -----
    Source: RACE Attention (arXiv 2510.04008), Algorithms 1 and 2. The size is independent of the
    number of tokens: ``8 * B * G * L * R * (1 + V)`` bytes, half of that in float32.
    """

    __slots__ = ("__weakref__", "_checked_step", "_contents", "_sizes")

    def __init__(
        self, lsh: SoftLSH, sketch: Sketch, lengths: np.ndarray, n_kv_heads: int, value_dim: int
    ) -> None:
        batch, n_state_heads, _ = sketch.flat.shape
        self._sizes = checks.StateSizes(lsh, batch, n_state_heads, n_kv_heads, value_dim)
        self._contents = Contents(sketch, lengths)
        # shapes and dtypes of the last plain step, and its checked problem without arrays
        self._checked_step: tuple[Any, Any] = (None, None)

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
            that is added by itself (docs/numerics has measurements).

        Raises
        ------
        ValueError
            Sizes that are not positive (an empty batch is legal), heads that do not divide those of
            `lsh`, another dtype.
        TypeError
            `lsh` is not a SoftLSH.
        """
        checks.check_sizes(lsh, batch, n_kv_heads, value_dim)
        n_buckets = lsh.n_tables * lsh.n_buckets
        shape = (int(batch), lsh.n_heads or int(n_kv_heads), n_buckets * (1 + int(value_dim)))
        sketch = Sketch(arrays.zeros(shape, checks.check_state_dtype(dtype)), n_buckets)
        return cls(lsh, sketch, np.zeros(batch, np.int64), int(n_kv_heads), int(value_dim))

    @property
    def lsh(self) -> SoftLSH:
        """The hash this state was made with."""
        return self._sizes.lsh

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self._sizes.batch

    @property
    def n_kv_heads(self) -> int:
        """G, the number of key/value heads."""
        return self._sizes.n_kv_heads

    @property
    def value_dim(self) -> int:
        """V, the length of a value."""
        return self._sizes.value_dim

    @property
    def dtype(self) -> np.dtype:
        """Of the sums: float64 or float32."""
        return self.sketch.flat.dtype

    @property
    def mass(self) -> np.ndarray:
        """Summed bucket probabilities of the keys: [B, G, L, R]; a view.

        With planes or beta per query head it is [B, H, L, R].
        """
        lsh = self.lsh
        return self.sketch.mass.reshape(*self.sketch.flat.shape[:2], lsh.n_tables, lsh.n_buckets)

    @property
    def value_sum(self) -> np.ndarray:
        """Sum of probabilities times values: [B, G, L, R, V]; a view."""
        return self.sketch.value_sum.reshape(*self.mass.shape, self.value_dim)

    @property
    def sketch(self) -> Sketch:
        """The sums in the form that the operations take."""
        return self._contents.sketch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens appended to each sequence, int64 [B]. Masked tokens do not count."""
        return self._contents.lengths

    @property
    def n_tokens(self) -> int:
        """Tokens appended to the longest sequence."""
        return int(self.lengths.max(initial=0))

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
        problem = checks.check_append(self._sizes, key, value, key_mask)
        operations = backends.choose(None, problem.on_device).bidirectional
        # a few tokens in one pass over the state, if the backend has it; else through a copy
        contents = self._contents
        if self.dtype == np.float64 and operations.add_at_once(
            problem, contents.to_write(problem.on_device), contents.lengths
        ):
            return
        after = contents.widened_copy(problem.on_device)
        for first, last in chunking.parts(problem):
            operations.sum_keys(problem.part(first, last), after.part(first, last))
        contents.replace(after, problem)

    def attend(self, query: Any, *, readout: str = "ratio", backend: str | None = None) -> Any:
        """Read out the state: attention of queries to all tokens so far.

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
            In the query's dtype and library; zeros if nothing was appended.
        """
        on_device = backends.needs_device(backend)
        problem, passed = checks.check_attend(self._sizes, query, readout, on_device)
        sketch = self.sketch.to_device(problem.on_device)
        # A host array that backend="cuda" copied to the GPU does not move the state there.
        if passed.on_device == problem.on_device:
            self._contents.sketch = sketch
        result, rows, give_back = outputs.result_array(
            None, passed, problem.out_shape, [], problem.on_device
        )
        operations = backends.choose(backend, problem.on_device).bidirectional
        # [B, M, S*(1+V)]; operations read float64
        wide = sketch.rounded(np.dtype(np.float64))
        for first, last in chunking.parts(problem):
            operations.read_out(problem.part(first, last), wide.part(first, last), rows)
        return give_back(result)

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
        """Add tokens, in place, and return their causal attention over the state and themselves.

        One token is `append` followed by `attend`, with the same bits, in one pass over the state.
        Several, such as a prompt or a part of one, are ``attention(..., is_causal=True,
        initial_state=state, return_state=True)``, with the same bits if the state is float64.

        Parameters
        ----------
        query : array, shape [B, T, H, D]
        key : array, shape [B, T, G, D]
        value : array, shape [B, T, G, V]
            As for `racecore.attention`. A state of one sequence also takes [T, heads, dim].
        readout : {"ratio", "bucket_mean"}
            See `racecore.attention`.
        key_mask : bool array, shape [B, T], optional
            True = the key takes part. Every query gets a result, masked or not.
        counts : integers or bools, shape [B], optional
            How many of the T tokens each sequence has. Tokens after them are never read, and their
            results are zero. A sequence without a token keeps its state, to the bit. True means
            all tokens, False none.
        backend : str, optional
            See `racecore.attention`.
        out : array, optional
            Array for the result.

        Returns
        -------
        array, shape [B, T, H, V]
            In the query's dtype and library.

        Raises
        ------
        ValueError, TypeError, racecore.errors.BackendUnavailableError
            Arguments that do not fit; the state is then unchanged. If anything is raised later, a
            step is done as a whole or not at all.
        """
        passed = Passed.resolve(query, key, value, backends.needs_device(backend))
        problem = self._problem_of_step(passed, key_mask, counts, readout)
        contents = self._contents
        on_device = problem.on_device
        sources = []
        if out is not None:
            sources = [(name, x.source) for name, x in passed._asdict().items()]
            sources.append(("state", contents.sketch.flat))
        result, rows, give_back = outputs.result_array(
            out, passed.query, problem.out_shape, sources, on_device
        )
        chosen = backends.choose(backend, on_device)
        # decoding writes the state in place and is never left half done; a scan takes a copy
        if rows.shape[1] == 1:
            chosen.decoding.step(problem, contents.to_write(on_device), contents.lengths, rows)
        else:
            after = contents.widened_copy(on_device)
            for first, last in chunking.parts(problem):
                chosen.causal.causal_scan(
                    problem.part(first, last), after.part(first, last), rows, False
                )
            contents.replace(after, problem)
        # rows past the end of a sequence were not computed
        if counts is not None:
            for row, end in zip(rows, problem.sequences[:, 2].tolist(), strict=True):
                row[end:] = 0
        # backend="cuda" copied host arrays to the GPU for this step only
        if passed.query.on_device != on_device:
            contents.sketch = contents.sketch.to_device(passed.query.on_device)
        return give_back(result)

    def _problem_of_step(self, passed: Passed, key_mask: Any, counts: Any, readout: str) -> Problem:
        """Return the checked problem of a step; arrays like those of the last one pass at once."""
        if key_mask is not None or counts is not None:
            return checks.check_step(self._sizes, passed, key_mask, counts, readout)
        q, k, v = passed.query.array, passed.key.array, passed.value.array
        shapes = (q.shape, k.shape, v.shape)
        signature = (*shapes, q.dtype, k.dtype, v.dtype, type(q), readout)
        last, problem = self._checked_step
        if signature == last:
            return changed(problem, query=q, key=k, value=v)
        problem = checks.check_step(self._sizes, passed, None, None, readout)
        if passed.query.had_batch:
            self._checked_step = signature, changed(problem, query=None, key=None, value=None)
        return problem

    def snapshot(self) -> Snapshot:
        """Return a snapshot for `restore`, to undo tokens that may turn out to be wrong.

        Nothing is copied now. The sums are copied once, when this state is next written to, and not
        even then if the snapshot has been dropped before.
        """
        return self._contents.snapshot()

    def restore(self, snapshot: Snapshot, members: Any = None) -> None:
        """Restore a snapshot, to the bit; it may be used again.

        Parameters
        ----------
        snapshot : Snapshot
            From this state's `snapshot`. A whole state is restored without a copy.
        members : integers or bools, optional
            Restore only these sequences of the batch.

        Raises
        ------
        TypeError, ValueError, IndexError
            No snapshot, or one of another state; members that do not exist. Nothing has been
            changed then.
        """
        self._contents.check_own(snapshot)
        if members is None:
            self._contents.restore(snapshot)
        else:
            self._contents.restore_members(snapshot, checks.check_members(members, "members"))

    def merge(self, other: RaceState) -> None:
        """Add the tokens of `other`, in place.

        The order of merges matters to the last bit only. This state keeps its dtype: sums of
        float32 and float64 are float64 before they are rounded.

        Raises
        ------
        ValueError
            `other` was made with another hash, or for other sizes.
        """
        if not isinstance(other, RaceState):
            raise TypeError(f"only a RaceState can be merged, got {type(other).__qualname__}")
        checks.check_mergeable(self._sizes, other._sizes)
        self._contents.add(other._contents)

    def _like(self, sketch: Sketch, lengths: np.ndarray) -> RaceState:
        """Return a state of other contents with the same hash and heads."""
        return RaceState(self.lsh, sketch, lengths, self.n_kv_heads, self.value_dim)

    def copy(self) -> RaceState:
        """Return an independent copy."""
        return self._like(self.sketch.copy(), self.lengths.copy())

    def astype(self, dtype: DTypeLike) -> RaceState:
        """Return a copy whose sums are of another dtype, float32 or float64."""
        flat = self.sketch.flat.astype(checks.check_state_dtype(dtype))
        return self._like(Sketch(flat, self.sketch.n_buckets), self.lengths.copy())

    def select(self, batch_indices: Any) -> RaceState:
        """Return a new state of the sequences at `batch_indices`, in that order.

        Repeats are legal (beam search).

        Raises
        ------
        IndexError
            An index is out of range.
        TypeError, ValueError
            The indices are not a list or 1-D array of integers (or a bool array of length B).
        """
        chosen = self._contents.select(checks.check_members(batch_indices, "batch_indices"))
        return self._like(chosen.sketch, chosen.lengths)

    def _parts(self) -> SavedState:
        return SavedState(self.lsh, self.sketch, self.lengths, self.n_kv_heads, self.value_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state, hash and checksum to an .npz file, which appears whole or not at all."""
        write_state(path, self._parts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RaceState:
        """Read a file of `save`.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its
            checksum.
        """
        return cls(*read_state(path))

    def __reduce__(self) -> tuple[type[RaceState], tuple[Any, ...]]:
        return type(self), tuple(self._parts())

    def check_same_hash(self, lsh: SoftLSH) -> None:
        """Raise ValueError if this state was made with another hash than `lsh`."""
        checks.check_same_hash(self.lsh, lsh)

    def __repr__(self) -> str:
        return (
            f"RaceState(batch={self.batch}, n_kv_heads={self.n_kv_heads}, "
            f"value_dim={self.value_dim}, "
            f"n_tokens={self.n_tokens}, dtype={self.dtype}, lsh={self.lsh!r})"
        )
