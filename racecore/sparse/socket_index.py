"""SocketIndex: some bytes per key, from which the few tokens that a query should attend to are
found.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from racecore import backends
from racecore.errors import CorruptFileError
from racecore.ops.socket.layout import BLOCK_TOKENS, HashedKeys, n_rows
from racecore.runtime import arrays, cuda, files
from racecore.soft_lsh import SoftLSH
from racecore.sparse import checks

__all__ = ["SocketIndex"]

_FILE_KIND = "racecore.SocketIndex"
_FILE_VERSION = 1
_GROWTH = 1.5


class SocketIndex:
    """Hashed keys of a key/value cache: which tokens deserve exact attention from a query, answered
    without reading the keys.

    Keys are hashed once, when they are appended, to the P signs of each of L tables; a query weighs
    these bits softly. What is kept of a token and key/value head is L bytes for P <= 8 (L * (8 + 1,
    2, 4 or 8) bits for P = 9, 10, up to 12, up to 16) and its norm in 16 bits. Batch and key/value
    heads are those of the first keys appended, and bits and norms lie where these lay: in host
    memory, or on a GPU. Keys and values stay with the caller.

    Parameters
    ----------
    lsh : SoftLSH
        Planes [L, P, D], shared by all heads, or [G, L, P, D], a set for each *key/value* head. Its
        beta is not used.
    scorer : {"soft", "hamming", "signed_jl"}
        What a query makes of a key's bits. "soft": the probability that the soft hash of the query
        gives to the key's buckets, summed over tables. "hamming": the number of signs that agree.
        "signed_jl": the sum over planes of the query's projection times the key's sign, times the
        norm of the key: an estimate of their product, and the best in the study of
        docs/socket_study.md, as is not to weigh by values. SOCKET's own is "soft", with the norms
        of values.
    tau : float
        Temperature of "soft": the hash is that of a `SoftLSH` with beta = 1/tau and tanh(u)/sqrt(D)
        for tanh(u).
    weight_by_value_norm : bool
        Multiply scores by the norm of the value.

    Raises
    ------
    ValueError, TypeError
        What was expected, what came and what to do.

    Notes
    -----
    Source: SOCKET (arXiv 2602.06283). ``score[j] = sum_l prob[l, code_l(j)] * ||v_j||``. Norms are kept with 6 bits of exponent
    and 10 of fraction: the relative error is at most 2^-11, between 2^-32 and 2^32.

    Examples
    --------
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
        self._hashed: HashedKeys | None = None

    @property
    def lsh(self) -> SoftLSH:
        """The hash this index was made with."""
        return self._lsh

    @property
    def scorer(self) -> str:
        """What a query makes of a key's bits."""
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
        """Bytes of codes and norms, with the room for tokens to come."""
        return 0 if self._hashed is None else self._hashed.codes.nbytes + self._hashed.norms.nbytes

    @property
    def on_device(self) -> bool:
        """Whether bits and norms are on a GPU, as the first keys appended were."""
        return self._hashed is not None and cuda.is_array(self._hashed.codes)

    @property
    def hashed(self) -> HashedKeys | None:
        """The bits and norms themselves, as the operations take them."""
        return self._hashed

    def append(
        self, key: Any, value: Any, *, lengths: Any = None, backend: str | None = None
    ) -> None:
        """Hash tokens and add them, in place. In whatever pieces tokens are appended, the index
        becomes the same.

        Parameters
        ----------
        key : array, shape [B, T, G, D]
        value : array, shape [B, T, G, V]
            Of one dtype: float16, bfloat16, float32 or float64; any strides, memory maps included.
            Without a batch axis where B is 1. Of values only norms are taken. On a GPU if the index
            is there.
        lengths : integers, shape [B], optional
            How many of the T tokens of each sequence count; the rest is padding. None: all.
        backend : {"cpu", "cuda", "reference"}, optional
            None takes the fastest that runs where the arrays are. "cuda" copies arrays in host
            memory to the GPU first.

        Raises
        ------
        ValueError, TypeError
            Shapes or dtypes that do not fit; the index is then unchanged.
        racecore.errors.BackendUnavailableError
            The backend cannot run here; lists every backend with its reason.
        """
        key, value, counts = checks.check_append(
            self, key, value, lengths, backends.needs_device(backend)
        )
        on_device = cuda.is_array(key)
        operations = backends.choose(backend, on_device).socket
        hashed = self._hashed
        if hashed is None:
            hashed = _no_keys(self._lsh, len(key), key.shape[2], on_device)
        hashed = _with_room(hashed, int((hashed.lengths + counts).max(initial=0)))
        operations.hash_keys(key, value, self._planes(key.shape[2]), self._scorer, hashed, counts)
        # only now: whatever was raised before, the index has what it had
        self._hashed = hashed._replace(lengths=hashed.lengths + counts)

    def scores(self, query: Any, *, backend: str | None = None) -> Any:
        """Return what a query thinks of every token.

        Parameters
        ----------
        query : array, shape [B, 1, H, D]
            H must be a multiple of G. Without a batch axis where B is 1.
        backend : {"cpu", "cuda", "reference"}, optional

        Returns
        -------
        array, shape [B, H, T]
            float32, or float64 for a float64 query, in the query's library; -inf behind the end of
            a shorter sequence. Without the batch axis if the query has none.
        """
        q, had_batch = checks.check_query(self, query, backends.needs_device(backend))
        operations, hashed = self._prepared(q, backend)
        tables = operations.query_tables(q, self._planes(hashed.codes.shape[1]), self._scorer)
        scores = operations.scores(tables, hashed, self._scorer.multiplies)
        return arrays.restorer(query)(scores if had_batch else scores[0])

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
        q, had_batch = checks.check_query(self, query, backends.needs_device(backend))
        operations, hashed = self._prepared(q, backend)
        selected = self.chosen(operations, q, hashed, choice)
        if self.on_device and selected.size:  # rows there are as wide as they might have to be
            selected = selected[:, :, : int((selected >= 0).sum(axis=2).max())]
        return arrays.restorer(query)(selected if had_batch else selected[0])

    def chosen(
        self, operations: Any, query: np.ndarray, hashed: HashedKeys, choice: checks.Choice
    ) -> np.ndarray:
        """Do what `select` does, of checked arguments and some sequences of this index."""
        tables = operations.query_tables(query, self._planes(hashed.codes.shape[1]), self._scorer)
        budgets = choice.budgets(hashed.lengths)
        return operations.select(
            tables, hashed, self._scorer.multiplies, budgets, choice.ends, choice.is_shared
        )

    def truncate(self, lengths: Any) -> None:
        """Forget tokens at the end, in place: those of drafts that were not accepted, say.

        Parameters
        ----------
        lengths : int, or integers of shape [B]
            How many tokens of every sequence remain; at most what there are.
        """
        if self._hashed is None:
            raise ValueError("this index is empty: there is nothing to truncate")
        kept = checks.check_lengths(lengths, len(self._hashed.codes), self.n_tokens)
        if (kept > self._hashed.lengths).any():
            raise ValueError(
                f"truncate cannot lengthen: the sequences have {self._hashed.lengths} tokens, got "
                f"{kept}"
            )
        self._hashed = self._hashed._replace(lengths=kept)

    def copy(self) -> SocketIndex:
        """Return an independent copy."""
        return self._of(None if self._hashed is None else _cut(self._hashed, slice(None)))

    def select_batch(self, batch_indices: Any) -> SocketIndex:
        """Return a new index of the sequences at `batch_indices`, in that order; repeats are legal
        (beam search).

        Raises
        ------
        IndexError
            An index is out of range.
        TypeError, ValueError
            The indices are not a list or 1-D array of integers, or there are no sequences yet.
        """
        if self._hashed is None:
            raise ValueError("this index is empty: append keys and values first")
        indices = np.atleast_1d(np.asarray(batch_indices))
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.dtype.kind not in "iu":
            raise TypeError(f"batch_indices must be integers, got {indices.dtype}")
        if indices.ndim != 1:
            raise ValueError(f"batch_indices must be one-dimensional, got shape {indices.shape}")
        return self._of(_cut(self._hashed, indices))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write bits, norms, hash, scorer and checksum to an .npz file, which appears whole or not
        at all.
        """
        hashed = (
            _no_keys(self._lsh, 0, 0) if self._hashed is None else _cut(self._hashed, slice(None))
        )
        files.save(
            path,
            _FILE_KIND,
            _FILE_VERSION,
            planes=self._lsh.planes,
            beta=np.asarray(self._lsh.beta),
            scorer=np.array(self._scorer.kind),
            tau=np.array(self._scorer.tau),
            weighs_values=np.array(self._scorer.weighs_values),
            codes=arrays.to_device(hashed.codes, False),
            norms=arrays.to_device(hashed.norms, False),
            lengths=hashed.lengths,
            is_empty=np.array(self._hashed is None),
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], lsh: SoftLSH | None = None, *, backend: str | None = None
    ) -> SocketIndex:
        """Read what `save` wrote, wherever that index was.

        Parameters
        ----------
        path : path
        lsh : SoftLSH, optional
            The hash that the index must have been made with.
        backend : {"cpu", "cuda", "reference"}, optional
            "cuda" brings the index to the GPU; else it is in host memory.

        Raises
        ------
        racecore.errors.CorruptFileError
            The file is not such a file, is newer than this version understands, or fails its
            checksum.
        ValueError
            It was made with another hash than `lsh`.
        """
        names = (
            "planes",
            "beta",
            "scorer",
            "tau",
            "weighs_values",
            "codes",
            "norms",
            "lengths",
            "is_empty",
        )
        content = files.load(path, _FILE_KIND, _FILE_VERSION, names)
        own = SoftLSH(content["planes"], content["beta"])
        if lsh is not None and lsh != own:
            raise ValueError(
                f"{os.fspath(path)} was made with another hash: its fingerprint is "
                f"{own.fingerprint[:12]}..., that of lsh "
                f"{lsh.fingerprint[:12]}..."
            )
        index = cls(
            own,
            scorer=str(content["scorer"]),
            tau=float(content["tau"]),
            weight_by_value_norm=bool(content["weighs_values"]),
        )
        if not content["is_empty"]:
            hashed = HashedKeys(
                content["codes"],
                content["norms"],
                content["lengths"].astype(np.int64),
                own.n_tables,
                own.n_planes,
            )
            _check_sizes(hashed, path)
            on_device = bool(backends.needs_device(backend))
            index._hashed = hashed._replace(
                codes=arrays.to_device(hashed.codes, on_device),
                norms=arrays.to_device(hashed.norms, on_device),
            )
        return index

    def _planes(self, n_kv_heads: int) -> np.ndarray:
        return self._lsh.per_head(n_kv_heads)[0]

    def _prepared(self, query: np.ndarray, backend: str | None) -> tuple[Any, HashedKeys]:
        operations = backends.choose(backend, cuda.is_array(query)).socket
        if self._hashed is None:
            raise ValueError("this index is empty: append keys and values first")
        return operations, self._hashed

    def _of(self, hashed: HashedKeys | None) -> SocketIndex:
        """Return an index with the same hash and scorer."""
        kind, tau, weighs_values = self._scorer
        new = SocketIndex(self._lsh, scorer=kind, tau=tau, weight_by_value_norm=weighs_values)
        new._hashed = hashed
        return new

    def __repr__(self) -> str:
        return (
            f"SocketIndex(scorer={self._scorer.kind!r}, tau={self._scorer.tau:g}, "
            "weight_by_value_norm="
            f"{self._scorer.weighs_values}, batch={self.batch}, n_kv_heads={self.n_kv_heads}, "
            f"n_tokens={self.n_tokens}, "
            f"lsh={self._lsh!r})"
        )


def _no_keys(lsh: SoftLSH, batch: int, n_kv_heads: int, on_device: bool = False) -> HashedKeys:
    shape = (batch, n_kv_heads, 0, n_rows(lsh.n_tables, lsh.n_planes), BLOCK_TOKENS)
    codes, norms = (
        arrays.zeros(shape, np.uint8, on_device),
        arrays.zeros(shape[:3], np.uint16, on_device),
    )
    return HashedKeys(codes, norms, np.zeros(batch, np.int64), lsh.n_tables, lsh.n_planes)


def _with_room(hashed: HashedKeys, n_tokens: int) -> HashedKeys:
    """Return the same keys in arrays for at least `n_tokens`: those there are, or longer ones by a
    constant factor.
    """
    has, needed = hashed.codes.shape[2], -(-n_tokens // BLOCK_TOKENS)
    if needed <= has:
        return hashed
    size = max(needed, int(has * _GROWTH) + 1) if has else needed
    batch, n_kv_heads, _, rows, _ = hashed.codes.shape
    on_device = cuda.is_array(hashed.codes)
    codes = arrays.zeros((batch, n_kv_heads, size, rows, BLOCK_TOKENS), np.uint8, on_device)
    norms = arrays.zeros((batch, n_kv_heads, size * BLOCK_TOKENS), np.uint16, on_device)
    codes[:, :, :has] = hashed.codes
    norms[:, :, : has * BLOCK_TOKENS] = hashed.norms
    return hashed._replace(codes=codes, norms=norms)


def _cut(hashed: HashedKeys, sequences: Any) -> HashedKeys:
    """Return a copy of some sequences without room to spare."""
    lengths = hashed.lengths[
        sequences
    ].copy()  # raises where there is no such sequence; a GPU would not
    n_blocks = -(-int(lengths.max(initial=0)) // BLOCK_TOKENS)
    if not isinstance(sequences, slice):
        sequences = arrays.to_device(sequences, cuda.is_array(hashed.codes))
    codes = arrays.copied(hashed.codes[:, :, :n_blocks][sequences])
    norms = arrays.copied(hashed.norms[:, :, : n_blocks * BLOCK_TOKENS][sequences])
    return hashed._replace(codes=codes, norms=norms, lengths=lengths)


def _check_sizes(hashed: HashedKeys, path: str | os.PathLike[str]) -> None:
    """Raise unless the arrays of a file fit each other."""
    batch, n_kv_heads, n_blocks, rows, lanes = hashed.codes.shape
    fits = hashed.norms.shape == (
        batch,
        n_kv_heads,
        n_blocks * BLOCK_TOKENS,
    ) and hashed.lengths.shape == (batch,)
    fits = fits and (rows, lanes) == (n_rows(hashed.n_tables, hashed.n_planes), BLOCK_TOKENS)
    fits = fits and bool(
        ((hashed.lengths >= 0) & (hashed.lengths <= n_blocks * BLOCK_TOKENS)).all()
    )
    if not fits or (hashed.codes.dtype, hashed.norms.dtype) != (
        np.dtype(np.uint8),
        np.dtype(np.uint16),
    ):
        raise CorruptFileError(f"{os.fspath(path)} holds arrays that do not fit each other")
