"""The checks of the arguments of `SocketIndex` and `sparse_attention`, and their messages."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from racecore import inputs
from racecore.inputs import Passed
from racecore.ops.socket.layout import Scorer
from racecore.runtime import arrays, cuda, dlpack
from racecore.runtime.arrays import CallerArray
from racecore.soft_lsh import SoftLSH

__all__ = [
    "SCORERS",
    "Choice",
    "Decoding",
    "IndexDescription",
    "check_append",
    "check_batch_indices",
    "check_budget",
    "check_choice",
    "check_decoding",
    "check_lengths",
    "check_query",
    "check_scorer",
    "described",
]

SCORERS = ("soft", "hamming", "signed_jl")
SELECTIONS = ("head", "group")


class IndexDescription(NamedTuple):
    """The hash, the sizes and the device of an index: all that arguments are checked against."""

    lsh: SoftLSH
    batch: int | None  # B; None before the first append, as is G
    n_kv_heads: int | None  # G
    lengths: np.ndarray  # int64 [B]
    on_device: bool

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max(initial=0))


class Choice(NamedTuple):
    """The options of a selection: how many tokens, and which in any case."""

    budget: int | float
    sink: int
    window: int
    is_shared: bool

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers of first and last tokens that are always chosen: at least the last one."""
        return (self.sink, self.window) if self.sink or self.window else (0, 1)

    def budgets(self, lengths: np.ndarray) -> np.ndarray:
        """Return the budget of every sequence in tokens, int64 [B]; shares are rounded up."""
        if isinstance(self.budget, int):
            return np.full(len(lengths), self.budget, np.int64)
        # less a few roundings before it is rounded up: 0.07 * 100 is 7.000000000000001
        return np.array([math.ceil(self.budget * int(n) * (1 - 1e-15)) for n in lengths], np.int64)


class Decoding(NamedTuple):
    """The checked arguments of `sparse_attention`; all arrays have a batch axis."""

    query: np.ndarray  # [B, Tq, H, D]
    key: np.ndarray  # [B, T, G, D]
    value: np.ndarray  # [B, T, G, V]
    lengths: np.ndarray  # int64 [B]
    passed: Passed


def check_scorer(lsh: Any, scorer: Any, tau: Any, weight_by_value_norm: Any) -> Scorer:
    """Check the arguments of `SocketIndex`."""
    if not isinstance(lsh, SoftLSH):
        raise TypeError(f"lsh must be a racecore.SoftLSH, got {type(lsh).__qualname__}")
    if not isinstance(scorer, str) or scorer not in SCORERS:
        raise ValueError(f"scorer must be one of {', '.join(map(repr, SCORERS))}, got {scorer!r}")
    if isinstance(tau, (bool, str)) or not isinstance(tau, (int, float, np.integer, np.floating)):
        raise TypeError(f"tau must be a number, got {tau!r}")
    if not 1e-6 <= tau <= 1e6:
        raise ValueError(
            f"tau must be a positive number, from 1e-6 to 1e6, got {tau!r}; useful values are 0.3 "
            "to 0.5"
        )
    if not isinstance(weight_by_value_norm, (bool, np.bool_)):
        raise TypeError(f"weight_by_value_norm must be True or False, got {weight_by_value_norm!r}")
    return Scorer(scorer, float(tau), bool(weight_by_value_norm))


def check_append(
    index: IndexDescription, key: Any, value: Any, lengths: Any, on_device: bool | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the arguments of `SocketIndex.append`; return 4-D arrays and the counts of new tokens.

    `on_device` says whether to compute on a GPU, None means on the device of the arrays.
    """
    k, v = (x.array for x in arrays.resolve(on_device, key=key, value=value))
    _check_device(index, "key", k)
    batch, n_kv_heads = index.batch, index.n_kv_heads
    if k.ndim == v.ndim == 3 and (batch is None or batch == 1):
        k, v = k[None], v[None]
    wanted = [
        "B" if batch is None else str(batch),
        "T",
        "G" if n_kv_heads is None else str(n_kv_heads),
    ]
    text = f"[{', '.join([*wanted, str(index.lsh.head_dim)])}] and [{', '.join([*wanted, 'V'])}]"
    fits = k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3] and k.shape[3] == index.lsh.head_dim
    fits = (
        fits
        and (batch is None or k.shape[0] == batch)
        and (n_kv_heads is None or k.shape[2] == n_kv_heads)
    )
    if not fits or 0 in (k.shape[2], v.shape[3]):
        raise ValueError(
            f"key and value must have shapes {text} for this index, got {k.shape} and {v.shape}"
        )
    inputs.check_dtypes(key=k, value=v)
    planes = index.lsh.planes
    if planes.ndim == 4 and len(planes) != k.shape[2]:
        raise ValueError(
            f"keys are hashed once per key/value head, of which there are {k.shape[2]}, and lsh "
            f"has planes for {len(planes)} "
            "heads: share planes among all heads (shape [L, P, D]) or give one set per key/value "
            "head"
        )
    if lengths is None:
        return k, v, np.full(len(k), k.shape[1], np.int64)
    return k, v, check_lengths(lengths, len(k), k.shape[1])


def _check_device(index: IndexDescription, name: str, array: Any) -> None:
    """Check that an array is on the device of an index that has any keys."""
    on_device = cuda.is_array(array)
    if index.batch is None or index.on_device == on_device:
        return
    memory = ["the host's memory", "a GPU's memory"]
    raise ValueError(
        f"the index is in {memory[index.on_device]} and {name} in {memory[on_device]}: an index "
        "stays on the device of the first keys appended to it; move the arrays there with "
        "cupy.asarray or cupy.asnumpy, or move the index with SocketIndex.save and "
        "SocketIndex.load(path, backend=...)"
    )


def check_lengths(lengths: Any, batch: int, most: int) -> np.ndarray:
    """Return the numbers of tokens of every sequence, int64 [B], 0 to `most` each."""
    array = np.asarray(
        arrays.to_host(lengths, "lengths") if dlpack.is_on_device(lengths) else lengths
    )
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers, got {array.dtype}")
    if array.ndim == 0:
        array = np.full(batch, array)
    if array.shape != (batch,):
        raise ValueError(f"lengths must have shape [B] = ({batch},), got {array.shape}")
    if ((array < 0) | (array > most)).any():
        where = int(np.argmax((array < 0) | (array > most)))
        raise ValueError(
            f"lengths must be from 0 to {most}, the tokens there are, got {array[where]} at index "
            f"{where}"
        )
    return array.astype(np.int64)


def check_batch_indices(batch_indices: Any) -> np.ndarray:
    """Return the argument of `SocketIndex.select_batch` as a 1-D array of integers."""
    indices = np.atleast_1d(np.asarray(batch_indices))
    if indices.size == 0:
        indices = indices.astype(np.int64)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"batch_indices must be integers, got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"batch_indices must be one-dimensional, got shape {indices.shape}")
    return indices


def check_query(
    index: IndexDescription, query: Any, on_device: bool | None
) -> tuple[np.ndarray, CallerArray]:
    """Check the query of `SocketIndex.scores` and `select`; return it 4-D, and as it was passed."""
    if index.batch is None:
        raise ValueError("this index is empty: append keys and values first")
    (passed,) = arrays.resolve(on_device, query=query)
    q = passed.array
    _check_device(index, "query", q)
    if q.ndim == 3 and index.batch == 1:
        q = q[None]
    if q.ndim != 4 or (q.shape[0], q.shape[1], q.shape[3]) != (index.batch, 1, index.lsh.head_dim):
        raise ValueError(
            f"query must have shape [{index.batch}, 1, H, {index.lsh.head_dim}] for this index, "
            f"one token, got {q.shape}"
        )
    if q.shape[2] == 0 or q.shape[2] % (index.n_kv_heads or 1):
        raise ValueError(
            f"the query's heads must be a multiple of the index's {index.n_kv_heads}, got "
            f"{q.shape[2]}"
        )
    inputs.check_dtypes(query=q)
    return q, passed


def check_budget(budget: Any) -> int | float:
    """Return the budget: a number of tokens (int) or a share of them (float)."""
    if isinstance(budget, (int, np.integer)) and not isinstance(budget, bool):
        if budget < 0:
            raise ValueError(f"budget must not be negative, got {budget}")
        return int(budget)
    if not isinstance(budget, (float, np.floating)):
        raise TypeError(
            f"budget must be a number of tokens (int) or a share of them (float), got {budget!r}"
        )
    if not 0 <= budget <= 1:
        raise ValueError(
            f"a float budget is a share of the tokens, from 0 to 1, got {budget}; for a number "
            "pass an int"
        )
    return float(budget)


def check_choice(budget: Any, sink: Any, window: Any, group_selection: Any) -> Choice:
    """Check the options of a selection."""
    for name, size in (("sink", sink), ("window", window)):
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise TypeError(f"{name} must be an integer number of tokens, got {size!r}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    if not isinstance(group_selection, str) or group_selection not in SELECTIONS:
        raise ValueError(
            "group_selection must be 'head' (every query head selects for itself) or 'group' "
            "(those that share a "
            f"key/value head select together), got {group_selection!r}"
        )
    return Choice(check_budget(budget), int(sink), int(window), group_selection == "group")


def check_decoding(passed: Passed, index: IndexDescription | None, lengths: Any) -> Decoding:
    """Check the arrays of `sparse_attention`, with each other and with the index."""
    q, k, v = inputs.check_shapes(passed)
    inputs.check_dtypes(query=q, key=k, value=v)
    batch, n_tokens, n_kv_heads = k.shape[:3]
    if index is None:
        found = (
            np.full(batch, n_tokens, np.int64)
            if lengths is None
            else check_lengths(lengths, batch, n_tokens)
        )
        return Decoding(q, k, v, _at_least(found, q.shape[1]), passed)
    _check_index(index, batch, n_kv_heads, k.shape[3])
    _check_device(index, "key", k)
    if lengths is None:
        if n_tokens != index.n_tokens:
            raise ValueError(
                f"key and value have {n_tokens} tokens and the index {index.n_tokens}: append "
                "every token to the index before "
                "attending; of a cache with spare capacity, pass the part in use (key[:, :n]) or "
                "its lengths"
            )
        return Decoding(q, k, v, _at_least(index.lengths, q.shape[1]), passed)
    given = check_lengths(lengths, batch, n_tokens)
    if (given != index.lengths).any():
        where = int(np.argmax(given != index.lengths))
        raise ValueError(
            f"lengths[{where}] is {given[where]}, and the index has {index.lengths[where]} tokens "
            "of that sequence: append "
            "every token to the index before attending"
        )
    return Decoding(q, k, v, _at_least(given, q.shape[1]), passed)


def described(index: Any) -> IndexDescription | None:
    """Return the description of an index; None stays None."""
    description = getattr(index, "description", None)
    if index is not None and not isinstance(description, IndexDescription):
        raise TypeError(
            "index must be a racecore.SocketIndex, or None for dense attention, got "
            f"{type(index).__qualname__}"
        )
    return description


def _check_index(index: IndexDescription, batch: int, n_kv_heads: int, head_dim: int) -> None:
    if index.lsh.head_dim != head_dim:
        raise ValueError(
            f"the index hashes rows of {index.lsh.head_dim} values, query and key have {head_dim}"
        )
    if index.batch is None:
        raise ValueError("the index is empty: append the keys and values to it first")
    if (index.batch, index.n_kv_heads) != (batch, n_kv_heads):
        raise ValueError(
            f"the index has (batch, key/value heads) = {(index.batch, index.n_kv_heads)}, key and "
            f"value {(batch, n_kv_heads)}"
        )


def _at_least(lengths: np.ndarray, n_queries: int) -> np.ndarray:
    """Return `lengths`; raise if several queries are more than the tokens of their sequence."""
    if n_queries > 1 and (lengths < n_queries).any():
        where = int(np.argmax(lengths < n_queries))
        raise ValueError(
            f"the {n_queries} queries are the last tokens of each sequence, but sequence {where} "
            f"has only {lengths[where]}"
        )
    return lengths
