"""SocketIndex: some bytes per key, by which a query selects the few tokens to attend to."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from racecore import backends
from racecore.ops.socket.layout import HashedKeys
from racecore.runtime import arrays, cuda
from racecore.soft_lsh import SoftLSH
from racecore.sparse import checks
from racecore.sparse.key_storage import no_keys, trimmed, with_capacity
from racecore.sparse.saved_index import SavedIndex, read_index, write_index

__all__ = ["SocketIndex"]


class SocketIndex:
    """Hashed keys of a key/value cache: scores and selects tokens for a query without their keys.

    Keys are hashed once, when they are appended, to the P signs of each of L tables; a query weighs
    these bits softly. A token takes, per key/value head, L bytes for P <= 8 (L * (8 + 1, 2, 4 or 8)
    bits for P = 9, 10, up to 12, up to 16) and 16 bits for its norm. Batch and key/value heads are
    those of the first keys appended, and so is the device: host memory, or a GPU. Keys and values
    stay with the caller.

    Parameters
    ----------
    lsh : SoftLSH
        Planes [L, P, D], shared by all heads, or [G, L, P, D], a set for each *key/value* head. Its
        beta is not used.
    scorer : {"soft", "hamming", "signed_jl"}
        The score of a key's bits. "soft": the probability that the soft hash of the query gives to
        the key's buckets, summed over tables. "hamming": the number of signs that agree.
        "signed_jl": the sum over planes of the query's projection times the key's sign, times the
        norm of the key; it estimates their product. "signed_jl" without the norms of values was the
        best in the study of docs/socket_study.md; SOCKET itself uses "soft" with them.
    tau : float
        Temperature of "soft": the hash is that of a `SoftLSH` with beta = 1/tau and tanh(u)/sqrt(D)
        for tanh(u).
    weight_by_value_norm : bool
        Multiply scores by the norm of the value.

    Raises
    ------
    ValueError, TypeError
        The message says what was expected, what came and what to do.

    Notes
    -----
    Source: SOCKET (arXiv 2602.06283). ``score[j] = sum_l prob[l, code_l(j)] * ||v_j||``. Norms are
    kept with 6 bits of exponent and 10 of fraction: the relative error is at most 2^-11, between
    2^-32 and 2^32.

    Examples
    --------
    >>> import numpy as np
    >>> from racecore import SoftLSH
    >>> rng = np.random.default_rng(0)
    >>> key, value = (rng.standard_normal((1, 5000, 2, 64), dtype=np.float32) for _ in range(2))
    >>> index = SocketIndex(SoftLSH.random(head_dim=64, n_tables=60, n_planes=8, rng=0))
    >>> index.append(key, value)
    >>> index.select(key[:, -1:], budget=100, sink=4, window=16).shape[:2]
    (1, 2)
    """

    __slots__ = ("_hashed", "_lsh", "_scorer")

    def __init__(
        self,
        lsh: SoftLSH,
        *,
        scorer: str = "signed_jl",
        tau: float = 0.4,
        weight_by_value_norm: bool = False,
    ) -> None:
        self._scorer = checks.check_scorer(lsh, scorer, tau, weight_by_value_norm)
        self._lsh = lsh
        # None before the first append, which decides batch, heads and device
        self._hashed: HashedKeys | None = None

    @property
    def lsh(self) -> SoftLSH:
        """The hash this index was made with."""
        return self._lsh

    @property
    def scorer(self) -> str:
        """The name of the score of a key's bits."""
        return self._scorer.kind

    @property
    def tau(self) -> float:
        """Temperature of the scorer "soft"."""
        return self._scorer.tau

    @property
    def weight_by_value_norm(self) -> bool:
        """Whether scores are multiplied by the norms of the values."""
        return self._scorer.weighs_values

    @property
    def batch(self) -> int | None:
        """B, the number of sequences; None before the first append."""
        return None if self._hashed is None else len(self._hashed.codes)

    @property
    def n_kv_heads(self) -> int | None:
        """G, the number of key/value heads; None before the first append."""
        return None if self._hashed is None else self._hashed.codes.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens appended to each sequence, int64 [B]; a copy."""
        return np.zeros(0, np.int64) if self._hashed is None else self._hashed.lengths.copy()

    @property
    def n_tokens(self) -> int:
        """Tokens appended to the longest sequence."""
        return 0 if self._hashed is None else int(self._hashed.lengths.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and norms, spare capacity included."""
        return 0 if self._hashed is None else self._hashed.codes.nbytes + self._hashed.norms.nbytes

    @property
    def on_device(self) -> bool:
        """Whether bits and norms are on a GPU, as the first keys appended were."""
        return self._hashed is not None and cuda.is_array(self._hashed.codes)

    @property
    def hashed(self) -> HashedKeys | None:
        """Bits and norms in the form that the operations take; None before the first append."""
        return self._hashed

    @property
    def description(self) -> checks.IndexDescription:
        """Hash, sizes and device, against which arguments are checked."""
        return checks.IndexDescription(
            self._lsh, self.batch, self.n_kv_heads, self.lengths, self.on_device
        )

    def append(
        self, key: Any, value: Any, *, lengths: Any = None, backend: str | None = None
    ) -> None:
        """Hash tokens and add them, in place; how they are divided into calls changes nothing.

        Parameters
        ----------
        key : array, shape [B, T, G, D]
        value : array, shape [B, T, G, V]
            Of one dtype: float16, bfloat16, float32 or float64; any strides, memory maps included.
            Without a batch axis if B is 1. Of values only norms are taken. On a GPU if the index
            is there.
        lengths : integers, shape [B], optional
            How many of the T tokens of each sequence count; the rest is padding. None: all.
        backend : {"cpu", "cuda", "reference"}, optional
            None takes the fastest for the device of the arrays. "cuda" copies arrays in host
            memory to the GPU first.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit; the index is then unchanged.
        racecore.errors.BackendUnavailableError
            The backend cannot run here; lists every backend with its reason.
        """
        key, value, counts = checks.check_append(
            self.description, key, value, lengths, backends.needs_device(backend)
        )
        on_device = cuda.is_array(key)
        operations = backends.choose(backend, on_device).socket
        hashed = self._hashed
        if hashed is None:
            hashed = no_keys(self._lsh, len(key), key.shape[2], on_device)
        hashed = with_capacity(hashed, int((hashed.lengths + counts).max(initial=0)))
        operations.hash_keys(key, value, self._planes(key.shape[2]), self._scorer, hashed, counts)
        # last, so that an error above leaves the index as it was
        self._hashed = hashed._replace(lengths=hashed.lengths + counts)

    def scores(self, query: Any, *, backend: str | None = None) -> Any:
        """Return the score of every token for a query.

        Parameters
        ----------
        query : array, shape [B, 1, H, D]
            H must be a multiple of G. Without a batch axis if B is 1.
        backend : {"cpu", "cuda", "reference"}, optional

        Returns
        -------
        array, shape [B, H, T]
            float32, or float64 for a float64 query, in the query's library; -inf past the end of a
            shorter sequence. Without the batch axis if the query has none.
        """
        q, passed = checks.check_query(self.description, query, backends.needs_device(backend))
        operations, hashed = self._prepared(q, backend)
        # [B, H, L, N, 16]: a score for every value of each digit of a code
        tables = operations.query_tables(q, self._planes(hashed.codes.shape[1]), self._scorer)
        scores = operations.scores(tables, hashed, self._scorer.multiplies)
        return passed.way_back()(scores if passed.had_batch else scores[0])

    def select(
        self,
        query: Any,
        *,
        budget: int | float,
        sink: int = 128,
        window: int = 128,
        group_selection: str = "head",
        backend: str | None = None,
    ) -> Any:
        """Return the tokens that a query should attend to: the best by score, the first and the
        last.

        Parameters
        ----------
        query : array, shape [B, 1, H, D]
        budget : int or float
            How many of all tokens to choose by score; a float is a share of each sequence, rounded
            up. Of equal scores the earlier tokens come first. They are exactly those of the highest
            `scores`.
        sink, window : int
            How many of the first and of the last tokens to take in any case. If both are 0, the
            last one is taken.
        group_selection : {"head", "group"}
            "head": every query head chooses for itself. "group": the heads of a key/value head
            choose together, by the sum of their scores; then every row is read once for all of
            them.
        backend : {"cpu", "cuda", "reference"}, optional

        Returns
        -------
        int64 array, shape [B, H, W], or [B, G, W] for "group"
            Token numbers, ascending, without duplicates, padded with -1 at the end; in the query's
            library. On a GPU this waits until W is known, as `sparse_attention` does not.
        """
        choice = checks.check_choice(budget, sink, window, group_selection)
        q, passed = checks.check_query(self.description, query, backends.needs_device(backend))
        operations, hashed = self._prepared(q, backend)
        selected = self.chosen(operations, q, hashed, choice)
        if self.on_device and selected.size:
            # rows on a GPU have the largest possible width: cut them to the longest
            selected = selected[:, :, : int((selected >= 0).sum(axis=2).max())]
        return passed.way_back()(selected if passed.had_batch else selected[0])

    def chosen(
        self, operations: Any, query: np.ndarray, hashed: HashedKeys, choice: checks.Choice
    ) -> np.ndarray:
        """Return the selected tokens for checked arguments and some sequences of this index."""
        tables = operations.query_tables(query, self._planes(hashed.codes.shape[1]), self._scorer)
        budgets = choice.budgets(hashed.lengths)
        return operations.select(
            tables, hashed, self._scorer.multiplies, budgets, choice.ends, choice.is_shared
        )

    def truncate(self, lengths: Any) -> None:
        """Drop tokens at the end, in place, such as drafts that were not accepted.

        Parameters
        ----------
        lengths : int, or integers of shape [B]
            How many tokens of every sequence remain; at most its length.
        """
        if self._hashed is None:
            raise ValueError("this index is empty: there is nothing to truncate")
        kept = checks.check_lengths(lengths, len(self._hashed.codes), self.n_tokens)
        if (kept > self._hashed.lengths).any():
            raise ValueError(
                f"truncate cannot lengthen: the sequences have {self._hashed.lengths} tokens, got "
                f"{kept}"
            )
        # codes and norms stay: appended tokens overwrite them
        self._hashed = self._hashed._replace(lengths=kept)

    def copy(self) -> SocketIndex:
        """Return an independent copy."""
        return self._of(None if self._hashed is None else trimmed(self._hashed, slice(None)))

    def select_batch(self, batch_indices: Any) -> SocketIndex:
        """Return a new index of the sequences at `batch_indices`, in that order.

        Repeats are legal (beam search).

        Raises
        ------
        IndexError
            An index is out of range.
        TypeError, ValueError
            The indices are not a list or 1-D array of integers, or there are no sequences yet.
        """
        if self._hashed is None:
            raise ValueError("this index is empty: append keys and values first")
        indices = checks.check_batch_indices(batch_indices)
        return self._of(trimmed(self._hashed, indices))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write index, hash and checksum to an .npz file, which appears whole or not at all."""
        write_index(path, SavedIndex(self._lsh, self._scorer, self._hashed))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], lsh: SoftLSH | None = None, *, backend: str | None = None
    ) -> SocketIndex:
        """Read a file of `save`; that index may have been on any device.

        Parameters
        ----------
        path : path
        lsh : SoftLSH, optional
            The hash that the index must have been made with.
        backend : {"cpu", "cuda", "reference"}, optional
            "cuda" loads the index to the GPU; else it is in host memory.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its
            checksum.
        ValueError
            It was made with another hash than `lsh`.
        """
        saved = read_index(path, lsh)
        hashed = saved.hashed
        if hashed is not None:
            on_device = bool(backends.needs_device(backend))
            codes, norms = (arrays.to_device(x, on_device) for x in (hashed.codes, hashed.norms))
            hashed = hashed._replace(codes=codes, norms=norms)
        return cls._from(saved._replace(hashed=hashed))

    @classmethod
    def _from(cls, saved: SavedIndex) -> SocketIndex:
        kind, tau, weighs_values = saved.scorer
        index = cls(saved.lsh, scorer=kind, tau=tau, weight_by_value_norm=weighs_values)
        index._hashed = saved.hashed
        return index

    def _planes(self, n_kv_heads: int) -> np.ndarray:
        return self._lsh.per_head(n_kv_heads)[0]

    def _prepared(self, query: np.ndarray, backend: str | None) -> tuple[Any, HashedKeys]:
        operations = backends.choose(backend, cuda.is_array(query)).socket
        if self._hashed is None:
            raise ValueError("this index is empty: append keys and values first")
        return operations, self._hashed

    def _of(self, hashed: HashedKeys | None) -> SocketIndex:
        """Return an index of other keys with the same hash and scorer."""
        return SocketIndex._from(SavedIndex(self._lsh, self._scorer, hashed))

    def __repr__(self) -> str:
        return (
            f"SocketIndex(scorer={self._scorer.kind!r}, tau={self._scorer.tau:g}, "
            "weight_by_value_norm="
            f"{self._scorer.weighs_values}, batch={self.batch}, n_kv_heads={self.n_kv_heads}, "
            f"n_tokens={self.n_tokens}, "
            f"lsh={self._lsh!r})"
        )
